"""Products of queries and keys part by part, also where their parts are not of one width (tiling.py)."""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.interpreters.mlir import ir
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import matrix_of

arith, llvm = compat.mlir_dialects("arith", "llvm")

ROWS = 64  # of a wgmma


def place_of(query, keys, place: int) -> tuple[int, int]:
    """Where a query's part at that place begins in a block of keys [rows / 8, parts, 8, columns]: (part, column in it).

    A query of more parts than the keys has several terms of each.
    """
    _, parts, _, size = ir.MemRefType(keys.type).shape
    part, first = divmod(place * ir.MemRefType(query.type).shape[-1], size)
    return part % parts, first


def add_part(logits, query, keys, place: int, own=slice(None)):
    """logits + the query's part at that place @ the same features of those keys."""
    keys = matrix_of(keys)
    part, first = place_of(query, keys, place)
    its_keys = mgpu.memref_transpose(mgpu.memref_slice(keys, (own, slice(part, part + 1))), (1, 0, 3, 2))
    kind = ir.MemRefType(query.type)
    columns, its_query = kind.shape[-1], mgpu.memref_slice(query, place)
    if columns < ir.MemRefType(keys.type).shape[-1]:
        return multiply(logits, its_query, its_keys, first_of_b=first)
    return mgpu.wgmma(logits, its_query, its_keys, swizzle=columns * utils.bytewidth(kind.element_type))


def multiply(acc, a, b, *, first_of_a: int = 0, first_of_b: int = 0):
    """acc + a @ b, as mgpu.wgmma has it; over the columns of the narrower one, and those of the other from that one on.

    Both have one part, `b` transposed.
    """
    (rows, of_a), (of_b, width) = (mma_utils.tiled_memref_shape(matrix)[0] for matrix in (a, b))
    element_type, i64 = ir.MemRefType(a.type).element_type, ir.IntegerType.get_signless(64)
    way = dict(group_size=(ROWS, of_a), logical_k_major=False), dict(group_size=(of_b, width), logical_k_major=True)
    (of_rows, (group_bytes, _), _), (of_columns, _, _) = (
        mma_utils.create_descriptor(matrix, 2 * columns, **how)
        for matrix, columns, how in zip((a, b), (of_a, of_b), way)
    )

    def later(descriptor, offset):
        offset = arith.constant(i64, mma_utils.encode_addr(offset))
        return llvm.add(descriptor, offset, overflow_flags=llvm.IntegerOverflowFlags.none)

    registers = [
        compat.wgmma_m64(
            acc._value.registers[group : group + 1],
            later(of_rows[0], 2 * first_of_a + group * group_bytes),
            later(of_columns[0], 2 * first_of_b),
            a_transpose=False,
            b_transpose=False,
            a_k_stride=of_rows[1][1][0],
            b_k_stride=of_columns[1][1][0],
            n=width,
            swizzle=2 * min(of_a, of_b),  # so many bytes are multiplied
            element_type=element_type,
        )
        for group in range(rows // ROWS)
    ]
    product = mgpu.FragmentedArray(_registers=np.concatenate(registers), _layout=acc._value.layout, _is_signed=None)
    return mgpu.WGMMAAccumulator(_value=product, _original_layout=acc._original_layout, _sync=False)
