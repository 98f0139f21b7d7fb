"""TPUs that are not here, for tests that compile for them or interpret what they would run."""

import functools

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from paged_prefill import compat
from paged_prefill.tests import stepping

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}


@functools.cache
def device_of(generation):
    """A device of a generation, known to the compiler alone."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def compiling_for(device):
    """Within it, what is lowered for a TPU is lowered for this one."""
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def interpreted(function, *arguments, cores=1):
    """What `function` gives on a TPU, on CPU: copies run as late as waits allow, and races are looked for.

    It is run operation by operation, which costs less than to compile a kernel's interpreter: see `stepping.run`. What
    several cores run is compiled.
    """
    interpreter = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", num_cores_or_threads=cores)
    with pltpu.force_tpu_interpret_mode(interpreter), compat.tpu_interpreter_by_steps():
        if cores > 1:
            results = jax.block_until_ready(jax.jit(function)(*arguments))
        else:
            results = stepping.run(function, *arguments)
    assert not compat.tpu_interpreter_found_races()
    return results
