"""Copies of a block that arrive together: one lane announces them all, where Pallas has each lane announce each copy.

A warp that copies page by page spends most of its time on that. Pallas hands its barriers to no other code, so these
are words of shared memory, and who waits counts their phases.
"""

import math

from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import SWIZZLE_BYTES, TILED, TILED_BYTES

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


def copy_together(barriers, stage, copies, tiled=False) -> None:
    """Starts this warp's copies of a block, (source, first row, first column, target), announced to barrier `stage`.

    Targets are rows of bytes, or `tiled` as products read them.
    """
    types = [plgpu.RefType(), SPLAT]
    for _ in copies:
        types += [plgpu.RefType(), SPLAT, SPLAT, plgpu.RefType(TILED_BYTES if tiled else ())]

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def start(context, barriers, stage, *operands):
        index = ir.IndexType.get()
        barrier, one = barrier_of(barriers, stage), utils.single_thread_predicate(utils.ThreadSubset.WARP)
        parts = [operands[i : i + 4] for i in range(0, len(operands), 4)]
        arrive = "@$2 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;"
        total = arith.constant(ir.IntegerType.get_signless(32), sum(_bytes(target) for *_, target in parts))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [barrier.get_ptr(), total, one], arrive, "r,r,b", has_side_effects=True
        )
        for source, *firsts, target in parts:
            shape, way = ir.MemRefType(target.type).shape, {}
            if tiled:
                down, across, *tile = shape
                shape = down * tile[0], across * tile[1]
                way = dict(swizzle=tile[1], gmem_transform=mgpu.TileTransform(tuple(tile)))
            elif shape[1] > MOST_COLUMNS:
                _copy_rows(source, *(first.registers.item() for first in firsts), target, barrier, one)
                continue
            place = tuple(
                mgpu.ds(arith.index_cast(index, first.registers.item()), size)
                for first, size in zip(firsts, shape)
            )
            context.async_copy(
                src_ref=source, dst_ref=target, gmem_slice=place, barrier=barrier, arrive=False, predicate=one, **way
            )

    start(barriers, stage, *[x for copy in copies for x in copy])


def copy_parts(barriers, stage, copies) -> None:
    """The same of parts that lie apart (tiling.py): (source, first row, first column, columns, target).

    Targets are rows of 64 columns as products read them, of which a copy writes those that a part has.
    """
    widths = [columns for *_, columns, _ in copies]

    def describe(context, source, row, column, target, columns):
        tiles, _, rows, _ = ir.MemRefType(target.type).shape
        box = tiles * rows, columns
        return compat.copy_descriptor(context, source, box, SWIZZLE_BYTES), [column, row], math.prod(box)

    _copy_boxes(barriers, stage, [(source, row, column, target) for source, row, column, _, target in copies], widths, describe)


def copy_tiles(barriers, stage, copies, blocks: int) -> None:
    """The same of (source, first row, first column, target), all of whose parts are whole, for so many thread blocks.

    They are a cluster, and each of them makes as many copies, of other rows, which come to the same places in all:
    `stage` is told of the copies of all.
    """

    def describe(context, source, row, column, target, _):
        i32 = ir.IntegerType.get_signless(32)
        *box, rows, columns = ir.MemRefType(target.type).shape
        of_tile = lambda place, size: arith.divui(place, arith.constant(i32, size))
        none = arith.constant(i32, 0)
        places = [none, none, of_tile(column, columns), of_tile(row, rows)]
        tiles = (mgpu.TileTransform((rows, columns)),)
        descriptor = compat.copy_descriptor(context, source, (*box, rows, columns), SWIZZLE_BYTES, tiles)
        return descriptor, places, math.prod(box) * rows * columns

    _copy_boxes(barriers, stage, copies, [None] * len(copies), describe, blocks)


def _copy_boxes(barriers, stage, copies, widths, describe, blocks: int = 1) -> None:
    """Starts such copies by tensor copies of boxes: `describe` finds the box of each, where it begins, and its numbers."""
    types = [plgpu.RefType(), SPLAT, *[plgpu.RefType(), SPLAT, SPLAT, plgpu.RefType(TILED)] * len(copies)]

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def start(context, barriers, stage, *operands):
        none, i16, i32 = ir.Type.parse("!llvm.void"), *(ir.IntegerType.get_signless(width) for width in (16, 32))
        barrier, one = barrier_of(barriers, stage).get_ptr(), utils.single_thread_predicate(utils.ThreadSubset.WARP)
        boxes, total = [], 0
        for columns, i in zip(widths, range(0, len(operands), 4)):
            source, row, column, target = operands[i : i + 4]
            place = (first.registers.item() for first in (row, column))
            descriptor, first, numbers = describe(context, source, *place, target, columns)
            boxes.append((utils.memref_ptr(target), descriptor, first))
            total += blocks * numbers * utils.bytewidth(ir.MemRefType(target.type).element_type)
        arrive = "@$2 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$0], $1;"
        llvm.inline_asm(none, [barrier, arith.constant(i32, total), one], arrive, "r,r,b", has_side_effects=True)
        to_all = [arith.constant(i16, 2**blocks - 1)] if blocks > 1 else []
        for target, descriptor, first in boxes:
            dims, way = len(first), ".multicast::cluster" if to_all else ""
            places, mask = ", ".join(f"${4 + i}" for i in range(dims)), f", ${4 + dims}" if to_all else ""
            copy = (
                f"@$3 cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes{way} "
                f"[$0], [$1, {{{places}}}], [$2]{mask};"
            )
            kinds = ",".join(["r,l,r,b", *["r"] * dims, *["h"] * len(to_all)])
            operands = [target, descriptor, barrier, one, *first, *to_all]
            llvm.inline_asm(none, operands, copy, kinds, has_side_effects=True)

    flat = [x for source, row, column, target in copies for x in (source, row, jnp.int32(column), target)]
    start(barriers, stage, *flat)


def _copy_rows(source, row, column, target, barrier, predicate) -> None:
    """Copies so many columns of rows of bytes as a plain run of them, or where rows have more columns, one each."""
    i8, i32, i64 = (ir.IntegerType.get_signless(width) for width in (8, 32, 64))
    (rows, columns), width = ir.MemRefType(target.type).shape, ir.MemRefType(source.type).shape[1]
    start = arith.addi(arith.muli(arith.extsi(i64, row), arith.constant(i64, width)), arith.extsi(i64, column))
    start = utils.getelementptr(utils.memref_ptr(source), [start], i8)
    together = rows if width == columns else 1
    size = arith.constant(i32, together * columns)
    copy = "@$4 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    for i in range(0, rows, together):
        place = utils.getelementptr(utils.memref_ptr(target), [i * columns], i8)
        operands = [place, utils.getelementptr(start, [i * width], i8), size, barrier.get_ptr(), predicate]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, copy, "r,l,r,r,b", has_side_effects=True)


def wait_for_block(plan, name: str, here, slot, done, i) -> None:
    """Until block i of a piece has come to its slot in that ring, through which `done` blocks went before the piece."""
    if name in plan.announced_together:
        slots = plan.key_slots if name == "keys" else plan.slots
        wait(here, slot, lax.div(done + i, jnp.int32(slots)))
    else:
        plgpu.barrier_wait(here.at[slot])


def wait(barriers, stage, phase) -> None:
    """Until all copies of barrier `stage` have come, for the phase-th time, from 0."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def wait_for(_, barriers, stage, phase):
        i1 = ir.IntegerType.get_signless(1)
        barrier_of(barriers, stage).wait_parity(arith.trunci(i1, phase.registers.item()))

    wait_for(barriers, stage, phase)


def barrier_of(barriers, stage):
    """One of them, as Mosaic GPU has it."""
    i32 = ir.IntegerType.get_signless(32)
    none = arith.constant(i32, 0)  # of the phases that Mosaic GPU's own barriers count
    return utils.BarrierRef(utils.memref_ptr(barriers), arith.addi(none, stage.registers.item()), none, 1)


def _bytes(target) -> int:
    kind = ir.MemRefType(target.type)
    size = utils.bitwidth(kind.element_type) // 8
    for length in kind.shape:
        size *= length
    return size
