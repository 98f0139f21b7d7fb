"""Copies of a block that arrive together: one lane announces them all, where Pallas has each lane announce each copy.

A warp that copies page by page spends most of its time on that. Pallas hands its barriers to no other code, so these
are words of shared memory, and who waits counts their phases.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat

arith, llvm, nvvm = compat.mlir_dialects("arith", "llvm", "nvvm")

MOST_COLUMNS = 256  # of a tensor copy
SPLAT = plgpu.Layout.WG_SPLAT


def arrivals(*shape: int):
    """Shared memory of so many barriers."""
    return plgpu.SMEM((*shape, 2), jnp.int32)


def initialise(barriers, warps: int) -> None:
    """By one thread of the warpgroup, before any use: phases end when so many warps have announced copies that came."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def start(_, barriers):
        i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
        address, one = utils.memref_ptr(barriers), utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        for i in range(ir.MemRefType(barriers.type).shape[0]):
            nvvm.mbarrier_init(utils.getelementptr(address, [i], i64), arith.constant(i32, warps), predicate=one)
        # Copies reach them by another way than threads do.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    start(barriers)


def copy_together(barriers, stage, copies) -> None:
    """Starts this warp's copies of a block, (source, first row, rows, target), announced to barrier `stage`."""
    lengths = [length for _, _, length, _ in copies]
    types = [plgpu.RefType(), SPLAT]
    for _ in copies:
        types += [plgpu.RefType(), SPLAT, plgpu.RefType()]

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def start(context, barriers, stage, *operands):
        index = ir.IndexType.get()
        barrier, one = _barrier(barriers, stage), utils.single_thread_predicate(utils.ThreadSubset.WARP)
        parts = list(zip(operands[::3], operands[1::3], lengths, operands[2::3]))
        arrive = "@$2 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;"
        total = arith.constant(ir.IntegerType.get_signless(32), sum(_bytes(target) for *_, target in parts))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [barrier.get_ptr(), total, one], arrive, "r,r,b", has_side_effects=True
        )
        for source, row, length, target in parts:
            if ir.MemRefType(source.type).shape[1] > MOST_COLUMNS:
                _copy_rows(source, row.registers.item(), target, barrier, one)
                continue
            first = arith.index_cast(index, row.registers.item())
            context.async_copy(
                src_ref=source, dst_ref=target, gmem_slice=(mgpu.ds(first, length),), barrier=barrier, arrive=False,
                predicate=one,
            )  # fmt: skip

    start(barriers, stage, *[x for source, row, _, target in copies for x in (source, row, target)])


def _copy_rows(source, row, target, barrier, predicate) -> None:
    """Copies whole rows, which lie together: a plain run of bytes."""
    i8, i64 = (ir.IntegerType.get_signless(width) for width in (8, 64))
    columns = arith.constant(i64, ir.MemRefType(source.type).shape[1])  # of 8 bits
    start = utils.getelementptr(utils.memref_ptr(source), [arith.muli(arith.extsi(i64, row), columns)], i8)
    size = arith.constant(ir.IntegerType.get_signless(32), _bytes(target))
    copy = "@$4 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    operands = [utils.memref_ptr(target), start, size, barrier.get_ptr(), predicate]
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, copy, "r,l,r,r,b", has_side_effects=True)


def wait(barriers, stage, phase) -> None:
    """Until all copies of barrier `stage` have come, for the phase-th time, from 0."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def wait_for(_, barriers, stage, phase):
        i1 = ir.IntegerType.get_signless(1)
        _barrier(barriers, stage).wait_parity(arith.trunci(i1, phase.registers.item()))

    wait_for(barriers, stage, phase)


def _barrier(barriers, stage):
    i32 = ir.IntegerType.get_signless(32)
    none = arith.constant(i32, 0)  # of the phases that Mosaic GPU's own barriers count
    return utils.BarrierRef(utils.memref_ptr(barriers), arith.addi(none, stage.registers.item()), none, 1)


def _bytes(target) -> int:
    kind = ir.MemRefType(target.type)
    size = utils.bitwidth(kind.element_type) // 8
    for length in kind.shape:
        size *= length
    return size
