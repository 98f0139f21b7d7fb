"""The merge of a tile's parts by the warpgroup that ends the last of them: no kernel follows. (Where two warpgroups share
rows, pairs.py is in its place.)

Parts end at any time, and nobody waits for another. Each tile has a counter in memory, one for each of the warpgroups
that share it. A warpgroup that is done with all of its pieces counts itself in at the tiles of each, and merges those
whose last part it had, in the order of the parts. Counting piece by piece would let it wait for memory as often, and
merging then would delay what it has still to do.

The counters are an array of the call's own, of zeros: XLA gives each call another, since the kernel writes there. The last
leaves them as they were.
"""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.merge import NUMBERS, merged_numbers
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.tiles import Tiles

arith, llvm = compat.mlir_dialects("arith", "llvm")

THREADS = 128  # of a warpgroup
# Results that a thread reads without waiting for one another, NUMBERS of a row and its lse each; and of as many parts.
# Three warpgroups have registers for fewer.
READ, FEW_READ, MOST_TOGETHER = 16, 8, 8


def counters_shape(plan: Plan) -> tuple[int, ...]:
    """Of int32: a tile is known by its first token."""
    return (plan.tokens * plan.head_tiles * plan.warpgroups,)


def merge_where_last(plan: Plan, table, index_of, piece_of, warpgroup, optional, results, counters) -> None:
    """What a warpgroup does that has stored its results of all of its team's pieces.

    `index_of(i)` is the number of the i-th of them, where i may be each thread's own, and `piece_of(i)` that piece.
    """
    thread, places = lax.rem(threads.number(), THREADS), plan.teams * plan.thread_blocks
    pieces = table[plan.rows_of_table * plan.columns] * plan.head_tiles if plan.parts.vary else jnp.int32(plan.pieces)
    turns = lax.div(pieces + (places - 1), places)  # at most so many of a team

    def some(first):
        """Those that the threads have one each of."""
        index = index_of(first + thread)
        last = _count_in(plan, table, jnp.minimum(index, plan.pieces - 1), index < pieces, warpgroup, counters)

        def one(i, _):
            @pl.when(_any_thread(last & jnp.where(thread == i, 1, 0)))
            def _():
                piece = piece_of(first + i)
                rows = Rows(plan, piece, warpgroup, optional)
                merge_rows(plan, threads, piece, rows, results[:2], results[2:])

        lax.fori_loop(0, jnp.minimum(turns - first, THREADS), one, None)

    lax.fori_loop(0, lax.div(turns + (THREADS - 1), THREADS), lambda i, _: some(i * THREADS), None)


def counter_of(plan: Plan, start, head_tile, warpgroup):
    """The number of a tile's counter by its first token: that of one of its warpgroups."""
    return (start * plan.head_tiles + head_tile) * plan.warpgroups + warpgroup


def _count_in(plan: Plan, table, index, exists, warpgroup, counters):
    """1 in threads whose piece was the last of its tile, and 0 in others. All results are stored before."""
    row, head_tile = lax.div(index, plan.head_tiles), lax.rem(index, plan.head_tiles)
    row = (row if plan.parts.vary else lax.div(row, plan.splits)) * plan.columns
    start, length, parts = (
        threads.load(table, row + Tiles._fields.index(name)) for name in ("start", "length", "parts")
    )
    parts = parts if plan.parts.vary else jnp.int32(plan.splits)
    counts = exists & (length > 0) & (parts > 1)
    counter = jnp.where(counts, counter_of(plan, start, head_tile, warpgroup), -1)
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, splat), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)
    )
    def count(_, counters, counter, parts):
        i32, i64, i8 = (ir.IntegerType.get_signless(width) for width in (32, 64, 8))
        counter, parts = counter.registers.item(), parts.registers.item()
        offset = arith.muli(arith.extsi(i64, counter), arith.constant(i64, 4))
        place = llvm.ptrtoint(i64, utils.getelementptr(utils.memref_ptr(counters), [offset], i8))
        assembly = (
            "{ .reg .pred p, q; .reg .b32 n; setp.ge.s32 p, $1, 0; mov.b32 n, 0; bar.sync $4, 128; "
            "@p atom.acq_rel.gpu.global.add.u32 n, [$2], 1; add.s32 n, n, 1; setp.eq.and.s32 q, n, $3, p; "
            "@q st.relaxed.gpu.global.u32 [$2], 0; selp.b32 $0, 1, 0, q; }"
        )
        arguments = [counter, place, parts, _barrier()]
        found = llvm.inline_asm(i32, arguments, assembly, "=r,r,l,r,r,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return count(counters, counter, parts)


def _any_thread(flag):
    """Whether it is set in any thread of the warpgroup, which wait for one another: a scalar."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(splat,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat))
    def vote(_, flag):
        i32 = ir.IntegerType.get_signless(32)
        # The vote of the warp tells ptxas that all of it goes one way.
        assembly = (
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; bar.red.or.pred p, $2, 128, p; "
            "vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        )
        arguments = [flag.registers.item(), _barrier()]
        found = llvm.inline_asm(i32, arguments, assembly, "=r,r,r,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(flag) > 0


def _barrier():
    """The number of the warpgroup's own, as Pallas has them."""
    return arith.addi(utils.warpgroup_idx(sync=False), arith.constant(ir.IntegerType.get_signless(32), 1))


def merge_rows(plan: Plan, threads, piece, rows, results, of_parts) -> None:
    """What a thread does of a warpgroup's rows. `threads` has the words for it."""
    (out, lse), tile, size = results, piece.tile, plan.tokens * plan.q_heads
    (first_head, heads), (first_token, tokens) = rows.there()
    groups = plan.output_columns // NUMBERS
    number, thread = heads * tokens * groups, lax.rem(threads.number(), THREADS)
    together = min(plan.splits, MOST_TOGETHER)
    read = READ if plan.computing_warpgroups < 3 else FEW_READ
    at_a_time = max(read // together, 1)  # groups of numbers of a thread
    # A division by a number that is not static takes a thread as long as memory takes to answer: so there is one.
    inverse = lax.div(jnp.int32(2**16 - 1), jnp.maximum(tokens, 1)) + 1

    def turn(i, _):
        heres, places = [], []
        for j in range(at_a_time):
            index = thread + (i * at_a_time + j) * THREADS
            heres.append(index < number)
            index = jnp.minimum(index, number - 1)
            row, column = lax.div(index, groups), lax.rem(index, groups) * NUMBERS
            head = lax.shift_right_logical(row * inverse, 16)  # row / tokens, of up to 64 rows
            token = tile.start + first_token + (row - head * tokens)
            head += piece.head + first_head
            places.append((token * plan.q_heads + head, head * plan.tokens + token, column))
        merged = merged_numbers(threads, tile.parts, of_parts, size, places, together)
        for here, (row, of_lse, column), (numbers, merged_lse) in zip(heres, places, merged):
            threads.store_numbers(numbers, out, row, column, here)
            threads.store(lse, of_lse, merged_lse, here & (column == 0))

    lax.fori_loop(0, lax.div(number + (at_a_time * THREADS - 1), at_a_time * THREADS), turn, None)
