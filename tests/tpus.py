"""TPUs that are not here, for tests that compile for them."""

import functools

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}


@functools.cache
def device_of(generation):
    """A device of a generation, known to the compiler alone."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def compiling_for(device):
    """Within it, what is lowered for a TPU is lowered for this one."""
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))
