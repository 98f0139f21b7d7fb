"""Words for kernels that are written for single threads, where Pallas' unit is a warpgroup.

Pallas takes a scalar to be the same in all threads. Here each thread may have its own, once it depends on `number`, the
thread's index: arithmetic on it is then each thread's own too, and so are loops, as long as all threads have as many
turns.
"""

import contextlib

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import matrix_of, tiled

arith, gpu, llvm, memref, scf, vector = compat.mlir_dialects("arith", "gpu", "llvm", "memref", "scf", "vector")

OWN = plgpu.Layout.WG_SPLAT


def number():
    """The index of this thread in its thread block."""

    @plgpu.inline_mgpu(return_type=_own(jnp.int32))
    def get(_):
        return mgpu.FragmentedArray.splat(utils.thread_idx(), (), is_signed=True)

    return get()


def load(array, index):
    """array[index], of int32 or float32."""
    signed = True if jnp.issubdtype(array.dtype, jnp.integer) else None

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN), return_type=_own(array.dtype))
    def read(_, array, index):
        value = memref.load(array, [_index(index)])
        return mgpu.FragmentedArray.splat(value, (), is_signed=signed)

    return read(array, index)


def store(array, index, value, where=True) -> None:
    """array[index] = value, if `where`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN, OWN, OWN))
    def write(_, array, index, value, where):
        with _if(where):
            memref.store(value.registers.item(), array, [_index(index)])

    write(array, index, jnp.asarray(value, array.dtype), jnp.where(where, jnp.int32(1), jnp.int32(0)))


def load_words(matrix, row, column, number: int):
    """`number` words of 32 bits of matrix[row], from that column on, which is a multiple of their number.

    Of a float32 matrix they are its numbers, else integers. The load is volatile: else LLVM would move it to where the
    words are used.
    """
    dtype = jnp.float32 if matrix.dtype == jnp.float32 else jnp.int32
    element, signed = (ir.F32Type.get, None) if dtype == jnp.float32 else (lambda: ir.IntegerType.get_signless(32), True)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN, OWN), return_type=[_own(dtype)] * number)
    def read(_, matrix, row, column):
        words = llvm.load(ir.VectorType.get((number,), element()), _place(matrix, row, column), volatile_=True)
        each = [vector.extract(words, [], [i]) for i in range(number)]
        return [mgpu.FragmentedArray.splat(word, (), is_signed=signed) for word in each]

    return read(matrix, row, column)


def store_words(words, matrix, row, column, where) -> None:
    """Writes words, as `load_words` gives them, to matrix[row], from that column on, if `where`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN, OWN, OWN, *[OWN] * len(words)))
    def write(_, matrix, row, column, where, *words):
        words = [word.registers.item() for word in words]
        with _if(where):
            together = llvm.mlir_undef(ir.VectorType.get((len(words),), words[0].type))
            for i, word in enumerate(words):
                together = vector.insert(word, together, [], [i])
            llvm.store(together, _place(matrix, row, column))

    write(matrix, row, column, jnp.where(where, jnp.int32(1), jnp.int32(0)), *words)


def store_numbers(numbers, matrix, row, column, where) -> None:
    """Writes numbers in the matrix' dtype to matrix[row], if `where`, from a column on that their number divides."""
    store_words([number.astype(matrix.dtype) for number in numbers], matrix, row, column, where)


def of_lane(value, lane):
    """The int32 or float32 value that another lane of the warp has: a shuffle."""
    integer = jnp.issubdtype(value.dtype, jnp.integer)
    text, kind = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "r" if integer else "f"

    @plgpu.inline_mgpu(arg_types=(OWN, OWN), return_type=_own(value.dtype))
    def ask(_, value, lane):
        operands = [value.registers.item(), lane.registers.item()]
        constraints = f"={kind},{kind},r"
        found = llvm.inline_asm(operands[0].type, operands, text, constraints, has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True if integer else None)

    return ask(value, lane)


def copy_later(matrix, row, column, shared, byte) -> None:
    """Starts to copy 16 bytes of matrix[row], from that column on, to that byte of shared memory as products read it.

    Where the row is negative they are zeros, and nothing is read."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN, OWN, tiled(shared), OWN, OWN))
    def start(_, matrix, row, column, shared, byte, number):
        there = utils.getelementptr(utils.memref_ptr(shared), [byte.registers.item()], ir.IntegerType.get_signless(8))
        operands = there, _place(matrix, row, column), number.registers.item()
        _instruct("cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r", *operands)

    start(matrix, jnp.maximum(row, 0), column, shared, byte, jnp.where(row < 0, jnp.int32(0), jnp.int32(16)))


def zero(matrix, row, part, where) -> None:
    """Zeroes a swizzled row, a part of a row of what products read, if `where`."""

    @plgpu.inline_mgpu(arg_types=(tiled(matrix), OWN, OWN, OWN))
    def write(_, matrix, row, part, where):
        i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
        matrix = matrix_of(matrix)
        its_type = ir.MemRefType(matrix.type)
        (of_tile, of_part, of_row, _), _ = its_type.get_strides_and_offset()
        rows, columns = its_type.shape[2:]
        row, part, size = row.registers.item(), part.registers.item(), utils.bytewidth(its_type.element_type)
        terms = (
            (arith.divui(row, arith.constant(i32, rows)), of_tile),
            (arith.remui(row, arith.constant(i32, rows)), of_row),
            (part, of_part),
        )
        place = arith.constant(i32, 0)
        for number, stride in terms:
            place = arith.addi(place, arith.muli(number, arith.constant(i32, stride * size)))
        words = 4  # of a store, the most there are
        zeros = arith.constant(i32, 0)
        together = llvm.mlir_undef(ir.VectorType.get((words,), i32))
        for i in range(words):
            together = vector.insert(zeros, together, [], [i])
        with _if(where):
            for byte in range(0, columns * size, 4 * words):
                there = arith.addi(place, arith.constant(i32, byte))
                llvm.store(together, utils.getelementptr(utils.memref_ptr(matrix), [there], i8))

    write(matrix, row, part, jnp.where(where, jnp.int32(1), jnp.int32(0)))


def close_group() -> None:
    """Makes a group of the copies that this thread has started since the last one."""
    plgpu.inline_mgpu()(lambda _: _instruct("cp.async.commit_group;"))()


def wait_for_groups(left: int) -> None:
    """Waits until all of this thread's groups but the last `left` have arrived, and products may read them."""
    plgpu.inline_mgpu()(lambda _: _instruct(f"cp.async.wait_group {left}; fence.proxy.async.shared::cta;"))()


def _instruct(text: str, constraints: str = "", *operands) -> None:
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def _place(matrix, row, column):
    """A pointer to matrix[row, column]; what lies before it may be more than 32 bits count.

    A row is what the last dimension has. In bytes, since LLVM has no numbers of 8 bits but integers.
    """
    i8, i64 = (ir.IntegerType.get_signless(width) for width in (8, 64))
    its_type = ir.MemRefType(matrix.type)
    row, column = (arith.extsi(i64, number.registers.item()) for number in (row, column))
    offset = arith.addi(arith.muli(row, arith.constant(i64, its_type.shape[-1])), column)
    offset = arith.muli(offset, arith.constant(i64, utils.bytewidth(its_type.element_type)))
    return utils.getelementptr(utils.memref_ptr(matrix), [offset], i8)


@contextlib.contextmanager
def _if(flag):
    zero = arith.constant(ir.IntegerType.get_signless(32), 0)
    branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, flag.registers.item(), zero))
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


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
