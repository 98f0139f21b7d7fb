"""The only file that imports a private JAX name. Each says which JAX versions need it, and why."""

import contextlib
import importlib
import types

import jax
from jax._src import dispatch
import numpy as np


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


@contextlib.contextmanager
def tpu_interpreter_by_steps():
    """Within it, TPU kernels called outside of `jax.jit` in TPU interpret mode run operation by operation.

    JAX 0.10 to 0.12 compile a program of each, whose thousand operations take seconds whatever the kernel's sizes are.
    Operations alone are small programs, and kernels share them. Kernels on several cores are compiled all the same.
    """
    from jax._src import dispatch  # for tests only, so not loaded before
    from jax._src.pallas import pallas_call
    from jax._src.pallas.mosaic import primitives
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    primitive = pallas_call.pallas_call_p
    compiled, lax, callback = primitive.impl, interpreter.lax, interpreter.callback

    def scan(body, carry, xs, length):
        return lax.scan(body, carry, xs, length) if length or xs else (carry, [])  # what `jax.disable_jit` leaves out

    def io_callback(function, result_types, *arguments, ordered=False):
        return function(*jax.tree.map(np.asarray, arguments))

    def by_steps(*arguments, interpret, **parameters):
        if interpret.num_cores_or_threads > 1:  # which traces what each core is to run
            return compiled(*arguments, interpret=interpret, **parameters)
        interpreter.lax = types.SimpleNamespace(**vars(lax) | dict(scan=scan))
        interpreter.callback = types.SimpleNamespace(io_callback=io_callback)
        try:
            with jax.disable_jit():
                results = interpreter.interpret_pallas_call(*arguments, interpret_params=interpret, **parameters)
        finally:
            interpreter.lax, interpreter.callback = lax, callback
        return [jax.numpy.asarray(x) for x in results]

    dispatch.simple_impl(primitives.bitcast_p)  # JAX has it in programs only
    primitive.def_impl(by_steps)
    try:
        yield
    finally:
        primitive.def_impl(compiled)


def stage_primitive():
    """The primitive that makes a JAX array of a number or NumPy array, which JAX 0.10 to 0.12 do not export."""
    from jax._src.core import stage_p  # for tests only, so not loaded before

    return stage_p


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


def copy_descriptor(context, source, shape, swizzle: int, transforms=()):
    """What a TMA copy of a box of so many rows and columns of a matrix in global memory is told of both, on Mosaic GPU;
    or of a box of the matrix as transformed.

    JAX 0.10 to 0.12 copy boxes whose rows are as wide as the swizzle, and no narrower ones; and to all blocks of a
    cluster those of which each copies a share itself.
    """
    return context._get_tma_desc(source, tuple(transforms), None, tuple(shape), swizzle, None)


def takes_references(kernel):
    """A kernel of Pallas Mosaic GPU that writes into arrays it is given, as references, and not in results alone.

    JAX 0.10 wraps it for vmap, and settles no reference through that; later both go together.
    """
    return kernel.fun if jax.__version_info__ < (0, 11) else kernel
