"""The merge of a tile's parts by the warpgroup that ends the last of them: no kernel follows.

A part's warpgroups are done at any time, and none waits for another. Each has a word in memory: it writes there that its
results are, and then looks at the words of all parts of its rows. The fence between lets the last one see all; where
two end together both may, and both write the same bits, since parts are added up in their order.

Nobody zeroes the words before: memory holds a number of 64 bits by chance only, and who merges takes it away. So every
call has words of its own, which no other call shares.
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
from paged_prefill.lowering.mosaic_gpu.hopper.merge import NUMBERS, merged_numbers
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan

arith, llvm = compat.mlir_dialects("arith", "llvm")

THREADS = 128  # of a warpgroup
MOST_PARTS = THREADS  # each is one thread's to look at
THERE = 0x9E3779B97F4A7C15  # any number that nobody else writes
BYTES = 8  # of a word
# Results that a thread reads without waiting for one another, NUMBERS of a row and its lse each; and of as many parts.
# Three warpgroups have registers for fewer.
READ, FEW_READ, MOST_TOGETHER = 16, 8, 8


def words_shape(plan: Plan) -> tuple[int, ...]:
    """Of all words, in int32: those of a tile's parts, for the same rows and columns, lie together."""
    return (BYTES // 4 * plan.head_tiles * plan.warpgroups * plan.tiles * plan.splits,)


def word_of(plan: Plan, piece, rows, first_column):
    """The number of the word of a warpgroup's part of a tile: the other parts' are beside it, in their order."""
    share = lax.div(rows.first_row, WARPGROUP_ROWS) + lax.div(first_column, plan.output_columns)
    return (piece.head_tile * plan.warpgroups + share) * (plan.tiles * plan.splits) + piece.entry


def merge_if_last(plan: Plan, piece, rows, results, first_column) -> None:
    """What a warpgroup does that has stored a part's results of its `rows`, from that column on."""
    out, lse, *of_parts, words = results
    own = word_of(plan, piece, rows, first_column)
    first, parts = own - piece.tile.part, piece.tile.parts

    @pl.when(_all_are_there(words, own, first, parts))
    def _():
        merge_rows(plan, threads, piece, rows, (out, lse), of_parts, first_column)
        _forget(words, first, parts)


def merge_rows(plan: Plan, threads, piece, rows, results, of_parts, first_column) -> None:
    """What a thread does of a warpgroup's rows, in its columns. `threads` has the words for it."""
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
            row, column = lax.div(index, groups), first_column + lax.rem(index, groups) * NUMBERS
            head = lax.shift_right_logical(row * inverse, 16)  # row / tokens, of up to 64 rows
            token = tile.start + first_token + (row - head * tokens)
            head += piece.head + first_head
            places.append((token * plan.q_heads + head, head * plan.tokens + token, column))
        merged = merged_numbers(threads, tile.parts, of_parts, size, places, together)
        for here, (row, of_lse, column), (numbers, merged_lse) in zip(heres, places, merged):
            threads.store_numbers(numbers, out, row, column, here)
            threads.store(lse, of_lse, merged_lse, here & (column == 0))

    lax.fori_loop(0, lax.div(number + (at_a_time * THREADS - 1), at_a_time * THREADS), turn, None)


def _all_are_there(words, own, first, parts):
    """Says that the results are there which the warpgroup has stored; whether those of all parts are, a scalar."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), splat, splat, splat),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat),
    )
    def ask(_, words, own, first, parts):
        i32 = ir.IntegerType.get_signless(32)
        own, first, parts = (number.registers.item() for number in (own, first, parts))
        thread = arith.remui(utils.thread_idx(), arith.constant(i32, THREADS))
        last = arith.subi(parts, arith.constant(i32, 1))
        looks_at = _place(words, arith.addi(first, arith.minsi(thread, last)))
        assembly = (
            "{ .reg .pred p; .reg .b64 w; setp.eq.u32 p, $1, 0; bar.sync $4, 128; "
            f"@p st.release.gpu.global.b64 [$2], {THERE}; @p fence.sc.gpu; bar.sync $4, 128; "
            f"ld.acquire.gpu.global.b64 w, [$3]; setp.eq.b64 p, w, {THERE}; bar.red.and.pred p, $4, 128, p; "
            # The vote of the warp tells ptxas that all of it goes one way.
            "vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        )
        # As Pallas numbers the barriers of warpgroups.
        barrier = arith.addi(utils.warpgroup_idx(sync=False), arith.constant(i32, 1))
        arguments = [thread, _place(words, own), looks_at, barrier]
        found = llvm.inline_asm(i32, arguments, assembly, "=r,r,l,l,r,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return ask(words, *map(jnp.int32, (own, first, parts))) > 0


def _forget(words, first, parts) -> None:
    """Takes away what says that the results of these parts are there: all have said so, and none will again."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat))
    def forget(_, words, first, parts):
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), arith.constant(i32, THREADS))
        first, parts = (number.registers.item() for number in (first, parts))
        assembly = "{ .reg .pred p; setp.lt.s32 p, $0, $1; @p st.relaxed.gpu.global.b64 [$2], 0; }"
        arguments = [thread, parts, _place(words, arith.addi(first, thread))]
        llvm.inline_asm(ir.Type.parse("!llvm.void"), arguments, assembly, "r,r,l,~{memory}", has_side_effects=True)

    forget(words, *map(jnp.int32, (first, parts)))


def _place(words, number):
    """A pointer to one of them, as an integer."""
    i8, i64 = (ir.IntegerType.get_signless(width) for width in (8, 64))
    offset = arith.muli(arith.extsi(i64, number), arith.constant(i64, BYTES))
    return llvm.ptrtoint(i64, utils.getelementptr(utils.memref_ptr(words), [offset], i8))
