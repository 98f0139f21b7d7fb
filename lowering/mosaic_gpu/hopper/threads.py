"""What one thread does on its own, where Pallas speaks of warpgroups.

What it takes for scalars are numbers that each thread has of its own, once they depend on `number`: arithmetic on them,
and loops of as many turns for all, are each thread's own too.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat

arith, gpu, memref, scf = compat.mlir_dialects("arith", "gpu", "memref", "scf")

OWN = plgpu.Layout.WG_SPLAT


def number():
    """This thread's, in its block."""

    @plgpu.inline_mgpu(return_type=_own(jnp.int32))
    def get(_):
        return mgpu.FragmentedArray.splat(utils.thread_idx(), (), is_signed=True)

    return get()


def load(vector, index):
    """vector[index], of int32 or float32."""
    signed = True if jnp.issubdtype(vector.dtype, jnp.integer) else None

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN), return_type=_own(vector.dtype))
    def read(_, vector, index):
        value = memref.load(vector, [_index(index)])
        return mgpu.FragmentedArray.splat(value, (), is_signed=signed)

    return read(vector, index)


def store(vector, index, value, where=True) -> None:
    """vector[index] = value, if `where`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN, OWN, OWN))
    def write(_, vector, index, value, where):
        zero = arith.constant(ir.IntegerType.get_signless(32), 0)
        branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, where.registers.item(), zero))
        with ir.InsertionPoint(branch.then_block):
            memref.store(value.registers.item(), vector, [_index(index)])
            scf.yield_([])

    write(vector, index, jnp.asarray(value, vector.dtype), jnp.where(where, jnp.int32(1), jnp.int32(0)))


def synchronise() -> None:
    """Waits for all threads of the block: what they stored before is seen behind."""

    @plgpu.inline_mgpu()
    def wait(_):
        gpu.barrier()

    wait()


def _own(dtype):
    return plgpu.ShapeDtypeStruct((), dtype, layout=OWN)


def _index(number):
    return arith.index_cast(ir.IndexType.get(), number.registers.item())
