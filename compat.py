"""The only file that imports a private JAX name. Each says which JAX versions need it, and why."""

import importlib

import jax
from jax._src import dispatch


def require_devices_during_lowering(primitive) -> None:
    """Lets the lowering rule of `primitive` know the devices and the mesh of the computation.

    JAX 0.10 to 0.12: `custom_partitioning` inside a lowering rule needs them, and jit hands them only to primitives of
    this set; without it lowering ends in `AssertionError: Please file a bug`.
    """
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def tpu_interpreter_found_races() -> bool:
    """Whether the last kernel run in TPU interpret mode with `detect_races=True` raced.

    JAX 0.10 to 0.12 have no public name for what the detector found; it only prints it.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # for tests only, so not loaded before

    return interpret_pallas_call.races.races_found


def mlir_dialects(*names):
    """Modules that write operations of these MLIR dialects, for what Pallas has no operation of.

    JAX 0.10 to 0.12 hand out `jax.interpreters.mlir.ir` but no dialect beside StableHLO's.
    """
    return [importlib.import_module(f"jaxlib.mlir.dialects.{name}") for name in names]


def wgmma_m64(*operands, element_type, **parameters):
    """One group of Hopper's matrix instructions, 64 rows each. JAX 0.10 has one name for its operands' type, later two."""
    from jax.experimental.mosaic.gpu.wgmma import wgmma_m64 as emit  # for Hopper only, so not loaded before

    if jax.__version_info__ < (0, 11):
        return emit(*operands, element_type=element_type, **parameters)
    return emit(*operands, a_element_type=element_type, b_element_type=element_type, **parameters)


def takes_references(kernel):
    """A kernel of Pallas Mosaic GPU that writes into arrays it is given, as references, and not in results alone.

    JAX 0.10 wraps it for vmap, and settles no reference through that; later both go together.
    """
    return kernel.fun if jax.__version_info__ < (0, 11) else kernel
