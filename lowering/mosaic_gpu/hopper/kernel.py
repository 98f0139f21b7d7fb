"""The body of the Hopper kernel: how a thread block loads pages, and how its warpgroups attend to them.

The block takes a *tile*: some tokens of one sequence, for some of the query heads that share a KV head, 64 rows (a head
and a token) to each compute warpgroup. One more warpgroup only loads: its warps copy keys and values page by page, from
where they lie into the rows of a swizzled tile in shared memory, and the query rows of the next tile.

A warpgroup starts the logits of block i and, behind them, the output of block i - 1, which runs on beside its softmax
of block i. Two warpgroups do so in turns, FlashAttention-3's ping-pong (arXiv 2407.08608). Blocks are taken from the
last to the first, so that those which need a mask come first.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), with exp2 for exp. Its maximum is any number near
the largest logit. So a block's weights are taken by the maximum so far, and where their sums show that a logit has
passed it by far, once more by the new one: most blocks look for no maximum, and scale no output. Logits with a soft
cap are bounded, and bfloat16 has room for weights by one maximum that never changes; and while they are small, a
polynomial stands for tanh (soft_cap.py).
"""

from dataclasses import dataclass
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, ROWS, SWIZZLE_BYTES, TILED, WGMMA
from paged_prefill.lowering.mosaic_gpu.hopper.operations import any_in_warp, any_in_warpgroup, moved, settled
from paged_prefill.lowering.mosaic_gpu.hopper.operations import start_products, store_rows
from paged_prefill.lowering.mosaic_gpu.hopper.soft_cap import Polynomial, polynomial
from paged_prefill.lowering.tiles import Tiles
from paged_prefill.primitive.attention import factor_and_lse

WARPGROUP_ROWS = 64  # rows of a wgmma
# Registers of a thread that computes and of one that loads, by the number of computing warpgroups; one has enough.
REGISTERS = {2: (240, 24), 3: (160, 32)}
TABLE_COLUMNS = len(Tiles._fields) + 1
LOG2_E = math.log2(math.e)
# Of 16 weights: none of which is too large for 16 bits then, and the largest is more than 16 where the sum is more.
LARGEST_SUM = 256.0
# How small and large a fixed maximum may make weights, as exponents of 2: bfloat16 has all its bits down to -126, and
# products of weights up to 2^40 with values up to 1e20 have finite sums in float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = -110.0, 40.0


@dataclass(frozen=True)
class Plan:
    """Everything static about a launch."""

    cores: int  # as many blocks are launched at most: any other number is right too, and less balanced
    group: int  # query heads of a KV head
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    tokens: int
    tiles: int
    pages_per_seq: int
    keys_per_head: int  # slots of one head of one pool
    block_q: int
    block_kv: int
    warpgroups: int
    stages: int
    splits: int
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    dtype: str

    @property
    def rows(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def heads(self) -> int:
        """Query heads of a tile."""
        return self.rows // self.block_q

    @property
    def head_tiles_per_group(self) -> int:
        return -(-self.group // self.heads)

    @property
    def head_tiles(self) -> int:
        return self.num_kv_heads * self.head_tiles_per_group

    @property
    def pieces(self) -> int:
        return self.tiles * self.splits * self.head_tiles

    @property
    def query_parts(self) -> int:
        """Parts of 64 columns, a swizzled row each."""
        return self.head_dim // COLUMNS

    @property
    def takes_turns(self) -> bool:
        """Two warpgroups are faster in turns, three without, and two without where a polynomial makes a step short."""
        return self.warpgroups == 2 and self.polynomial is None

    @property
    def rounds_late(self) -> bool:
        """Whether a thread has registers for logits and weights in 32 bits, beside the output and the last weights."""
        needed = self.value_dim // 2 + self.block_kv + self.block_kv // 4
        return self.warpgroups < 3 and needed <= 200  # of 240, and 255 for one warpgroup

    @property
    def fixed_maximum(self) -> float | None:
        """What stands for every row's maximum, in units of the soft cap, where capped logits allow one for all."""
        if self.soft_cap is None or self.dtype != "bfloat16":
            return None
        largest = self.soft_cap * LOG2_E
        maximum = min(largest, -SMALLEST_WEIGHT - largest)
        return maximum / largest if largest - maximum <= LARGEST_WEIGHT else None

    @functools.cached_property
    def polynomial(self) -> Polynomial | None:
        """What stands for tanh where logits are small."""
        if self.fixed_maximum is None:
            return None
        return polynomial(self.softmax_scale, self.soft_cap, self.fixed_maximum)

    @property
    def run(self) -> int:
        """Keys of one copy: they lie together, in one page."""
        return min(self.page_size, self.block_kv)

    @property
    def slab(self) -> int:
        """Rows of a warpgroup that belong to one head, and lie together in the query."""
        return min(self.block_q, WARPGROUP_ROWS)


def table_of(tiles: Tiles, first_row, page_indices):
    """All integers that the kernel reads, in one array: a row a tile, its first_row last, and then the page indices.

    One array is one small kernel before this one, where two are two.
    """
    return jnp.concatenate([jnp.stack([*tiles, first_row], axis=1).reshape(-1), page_indices.reshape(-1)])


def launch(plan: Plan, table, query, key_rows, value_rows):
    """Runs the kernel. Returns out [splits * tokens * q_heads, value_dim], in float32 if split, and lse without dim."""
    dtype = jnp.dtype(plan.dtype)
    rows = plan.splits * plan.tokens * query.shape[1]
    out_type = jax.ShapeDtypeStruct((rows, plan.value_dim), dtype if plan.splits == 1 else jnp.float32)
    lse_type = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def ring(features):
        return plgpu.SMEM((plan.stages, plan.block_kv, features), dtype, transforms=TILED)

    # The same bytes seen in two ways: wgmma takes tiles of 8 rows; the copies start at any row, so not at a tile's.
    query_shape = (plan.warpgroups, plan.query_parts, WARPGROUP_ROWS, COLUMNS)
    query_views = [plgpu.SMEM(query_shape, dtype, transforms=transforms) for transforms in (TILED[1:], TILED)]
    copies = plan.block_kv // plan.run
    slabs = plan.rows // plan.slab
    scratch = dict(
        query_views=plgpu.RefUnion(*([view] for view in query_views)),
        keys=ring(plan.head_dim),
        values=ring(plan.value_dim),
        query_here=plgpu.Barrier(num_arrivals=slabs * plan.query_parts),
        query_free=plgpu.Barrier(num_arrivals=plan.warpgroups),
        keys_here=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        values_here=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        values_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        turn=plgpu.Barrier(num_barriers=plan.warpgroups),
        cleaned=plgpu.Barrier(num_arrivals=plan.warpgroups),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(out_type, lse_type),
        scratch_types=scratch,
        grid=(min(plan.pieces, plan.cores),),
        grid_names=("block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_prefill",
    )
    return kernel(table, query, key_rows, value_rows)


def _kernel(plan: Plan, table, query, key_rows, value_rows, out, lse, **scratch):
    """A thread block: one warpgroup loads and the others compute, each going through the block's share of the work.

    The loads run ahead from one piece of work into the next: the steps of the rings are counted on from piece to piece.
    """
    pieces, blocks = plan.pieces, min(plan.pieces, plan.cores)
    block = lax.axis_index("block")

    def each_piece(do):
        """Calls do(piece, steps already done) for this block's pieces: longest first, to and fro over the blocks."""

        def turn(i, done):
            index = i * blocks + jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
            piece = _piece(plan, table, jnp.minimum(index, pieces - 1))
            exists = (index < pieces) & (piece.tile.length > 0)
            pl.when(exists)(lambda: do(piece, done))
            return done + jnp.where(exists, piece.steps, 0)

        lax.fori_loop(0, -(-pieces // blocks), turn, jnp.int32(0))

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[plan.warpgroups][0], action="increase")
        if plan.takes_turns:  # the first turn is the first warpgroup's
            pl.when(warpgroup == plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))
        each_piece(lambda piece, done: _compute(plan, piece, done, warpgroup, query.shape[1], out, lse, **scratch))

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[plan.warpgroups][1], action="decrease")
        _load(plan, each_piece, table, query, key_rows, value_rows, **scratch)


class Piece(NamedTuple):
    """A share of a tile's blocks of keys: the work between two visits to the schedule. All scalars, but the tile."""

    tile: Tiles
    split: Int[Array, ""]
    head_tile: Int[Array, ""]
    last: Int[Array, ""]  # block of keys: the share's blocks are taken from there downwards
    steps: Int[Array, ""]  # blocks; at least one, all of it masked if need be, so that there is always a result
    head: Int[Array, ""]  # first query head
    heads_left: Int[Array, ""]  # heads from there to the end of the group
    first_row: Int[Array, ""]  # of the KV head, in the caches as matrices of rows


def _piece(plan: Plan, table, index) -> Piece:
    head_tile = lax.rem(index, plan.head_tiles)
    split = lax.rem(lax.div(index, plan.head_tiles), plan.splits)
    row = lax.div(index, plan.head_tiles * plan.splits) * TABLE_COLUMNS
    *fields, first_row = [table[row + i] for i in range(TABLE_COLUMNS)]
    tile = Tiles(*fields)
    kv_head = lax.div(head_tile, plan.head_tiles_per_group)
    in_group = lax.rem(head_tile, plan.head_tiles_per_group) * plan.heads
    share = lax.div(tile.end_block - tile.first_block + plan.splits - 1, plan.splits)
    first = tile.first_block + split * share
    steps = jnp.maximum(jnp.minimum(share, tile.end_block - first), 1)
    return Piece(
        tile=tile,
        split=split,
        head_tile=head_tile,
        last=first + steps - 1,
        steps=steps,
        head=kv_head * plan.group + in_group,
        heads_left=plan.group - in_group,
        first_row=first_row + kv_head * plan.keys_per_head,
    )


def _load(
    plan, each_piece, table, query, key_rows, value_rows, *,
    query_views, keys, values, query_here, query_free, keys_here, values_here, keys_free, values_free, **_
):
    """Copies each piece's query rows, and its blocks of keys and values page by page: half a block is a warp's work."""
    [[query_slots], _] = query_views

    def copy_query(piece, done):
        pl.when(done > 0)(lambda: plgpu.barrier_wait(query_free))
        for row in range(0, plan.rows, plan.slab):
            head, token = divmod(row, plan.block_q)
            for part in range(plan.query_parts):
                tokens, columns = pl.ds(piece.tile.start + token, plan.slab), pl.ds(part * COLUMNS, COLUMNS)
                slots = query_slots.at[row // WARPGROUP_ROWS, part, pl.ds(row % WARPGROUP_ROWS, plan.slab)]
                plgpu.copy_gmem_to_smem(query.at[tokens, piece.head + head, columns], slots, query_here)

    def copy(offsets, source, ring, here, free, before=None):
        """Copies the runs at these offsets of every block."""

        def row_of(piece, key):
            column = jnp.minimum(lax.div(key, plan.page_size), plan.pages_per_seq - 1)
            page = table[plan.tiles * TABLE_COLUMNS + piece.tile.seq * plan.pages_per_seq + column]
            return piece.first_row + page * plan.page_size + lax.rem(key, plan.page_size)

        def copy_piece(piece, done):
            if before is not None:
                before(piece, done)

            def step(i, _):
                slot = lax.rem(done + i, plan.stages)
                rows = [row_of(piece, (piece.last - i) * plan.block_kv + offset) for offset in offsets]

                @pl.when(done + i >= plan.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                for offset, row in zip(offsets, rows):
                    slots = ring.at[slot, pl.ds(offset, plan.run)]
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(row, plan.run)], slots, here.at[slot])

            lax.fori_loop(0, piece.steps, step, None)

        each_piece(copy_piece)

    offsets = range(0, plan.block_kv, plan.run)
    half = -(-len(offsets) // 2)

    @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
    def each_warp():
        warp = lax.axis_index("warp")
        for part, share in enumerate((offsets[:half], offsets[half:])):
            if share:
                before = copy_query if part == 0 else None
                copy_keys = functools.partial(copy, share, key_rows, keys, keys_here, keys_free)
                copy_values = functools.partial(copy, share, value_rows, values, values_here, values_free, before)
                pl.when(warp == 2 * part)(copy_keys)
                pl.when(warp == 2 * part + 1)(copy_values)

    each_warp()


def _compute(
    plan, piece, done, warpgroup, q_heads, out, lse, *,
    query_views, keys, values, query_here, query_free, keys_here, values_here, keys_free, values_free, turn, cleaned
):
    """One compute warpgroup's 64 rows: `slab` tokens of one head, then of the next."""
    dtype = jnp.dtype(plan.dtype)
    tile, steps = piece.tile, piece.steps
    [_, [query_tile]] = query_views
    shape = (WARPGROUP_ROWS, plan.block_kv)

    def take_turn():
        if plan.takes_turns:
            plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn():
        if plan.takes_turns:
            plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, plan.warpgroups)])

    def slot_of(i):
        return lax.rem(done + i, plan.stages)

    def rows():
        """The warpgroup's rows, as rows of the tile."""
        return plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROWS) + warpgroup * WARPGROUP_ROWS

    def head_and_token(row):
        """(head in the tile, token in the tile) of rows of the tile."""
        return lax.div(row, plan.block_q), lax.rem(row, plan.block_q)

    def owns(row):
        """Whether rows of the tile are there: its tokens and heads may be fewer than it has room for."""
        head, token = head_and_token(row)
        return (token < tile.length) & (head < piece.heads_left)

    def visible(i):
        # Positions relative to the tile's first token; a key as its column in the block.
        _, token = head_and_token(rows())
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
        block = (piece.last - i) * plan.block_kv - tile.position
        last = jnp.minimum(token, tile.end_key - tile.position - 1) - block
        seen = key <= lax.broadcast_in_dim(last, shape, [0])
        if plan.window is None:
            return seen
        return seen & (key > lax.broadcast_in_dim(token - block - plan.window, shape, [0]))

    # `unit` turns logits into units of log 2, and is positive: so their maximum can be taken before.
    if plan.soft_cap is not None:
        unit, largest = plan.soft_cap * LOG2_E, 1
    elif plan.softmax_scale > 0:
        unit, largest = plan.softmax_scale * LOG2_E, 4096
    else:
        unit, largest = LOG2_E, math.inf

    def weigh(logits, m):
        """Weights by the maximum m, and their sums over every eighth column."""
        if unit * largest <= 4096:  # one fused operation, which errs by 2^-24 of the product: too much where it is huge
            # The barriers here and in `softmax` settle which product is fused, so that a row's bits are the same
            # whichever way its warp goes.
            exponents = logits * unit - lax.broadcast_in_dim(lax.optimization_barrier(m * unit), shape, [0])
        else:
            exponents = (logits - lax.broadcast_in_dim(m, shape, [0])) * unit
        weights = jnp.exp2(exponents)
        return weights, _fold(jnp.add, weights)

    def follow(logits, acc, m, l, passed=None):
        """Weights by the new maximum of all rows, or of those that `passed` theirs; and the output, m and l by it."""
        m_next = jnp.maximum(m, _fold(jnp.maximum, logits).max(axis=1))
        if passed is None:
            shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # of a row that has seen no key
        else:
            shift = m_next = jnp.where(passed, m_next, m)
        weights, sums = weigh(logits, shift)
        fade = jnp.exp2((m - shift) * unit)
        acc, l = (array * lax.broadcast_in_dim(fade, array.shape, [0]) for array in (acc, l))
        return weights, acc, m_next, l + sums

    def rounded(weights):
        """Behind the wait for the last products: so the next ones may begin with the results."""
        return lax.optimization_barrier(weights).astype(dtype)

    def softmax(logits, output, m, l, i, masked):
        """The weights of block i, and the output so far, m and l with it. `output` waits for the output's product."""
        if plan.polynomial is not None:
            logits = jnp.tanh(logits * plan.polynomial.to_tanh)
        elif plan.soft_cap is not None:
            logits = jnp.tanh(logits * (plan.softmax_scale / plan.soft_cap))
        elif plan.softmax_scale <= 0:
            logits = lax.optimization_barrier(logits * plan.softmax_scale)
        if masked:
            logits = jnp.where(visible(i), logits, -jnp.inf)
        if plan.fixed_maximum is not None:
            weights, sums = weigh(logits, m)
            acc = output()
            return rounded(weights), acc, m, l + sums
        if masked:
            weights, *others = follow(logits, output(), m, l)
            return weights.astype(dtype), *others
        weights, sums = weigh(logits, m)
        if not plan.rounds_late:
            weights = weights.astype(dtype)
        passed = ~(sums <= LARGEST_SUM)  # also where a sum is NaN
        anyone = any_in_warp(passed, after=None if plan.rounds_late else weights)
        acc = output()
        if not plan.rounds_late:
            weights = moved(weights)

        def again():
            # A row's bits do not depend on the other rows of its warp.
            own = jnp.where(passed, 1.0, 0.0).max(axis=1) > 0
            new, *others = follow(logits, acc, m, l, passed=own)
            return new.astype(weights.dtype), *others

        weights, *others = lax.cond(anyone, again, lambda: (weights, acc, m, l + sums))
        return rounded(weights) if plan.rounds_late else weights, *others

    def clean_values(i):
        """Zeroes values that no row may see: they may hold NaN, and 0 * NaN is NaN."""
        start = (piece.last - i) * plan.block_kv

        @pl.when((start < tile.first_key) | (start + plan.block_kv > tile.end_key))
        def _():
            layout = plgpu.Layout.SMEM_GMEM_COPY((plan.block_kv, COLUMNS), dtype, SWIZZLE_BYTES)
            key = start + plgpu.broadcasted_iota(jnp.int32, (plan.block_kv, COLUMNS), 0, layout=layout)
            holds = (key >= tile.first_key) & (key < tile.end_key)
            for c in range(plan.value_dim // COLUMNS):

                @pl.when(warpgroup == c % plan.warpgroups)
                def _(c=c):
                    part = values.at[slot_of(i), :, pl.ds(c * COLUMNS, COLUMNS)]
                    part[...] = jnp.where(holds, plgpu.layout_cast(part[...], layout), 0)

            plgpu.commit_smem()
            plgpu.barrier_arrive(cleaned)
            plgpu.barrier_wait(cleaned)

    def logits_of(i):
        """Block i's logits, with no other product beside them."""

        def products(logits):
            for part in range(plan.query_parts):
                columns = keys.at[slot_of(i), :, pl.ds(part * COLUMNS, COLUMNS)]
                plgpu.wgmma(logits, query_tile.at[warpgroup, part], columns.transpose((1, 0)))
            pass_turn()
            return logits[...]

        return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

    def scale_query(factor):
        """And rows that the tile does not own become 0: then their logits cast no doubt on those of the others."""
        layout = plgpu.Layout.SMEM_GMEM_COPY((WARPGROUP_ROWS, COLUMNS), dtype, SWIZZLE_BYTES)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS, COLUMNS), 0, layout=layout)
        owned = owns(row + warpgroup * WARPGROUP_ROWS)
        for part in range(plan.query_parts):
            columns = query_tile.at[warpgroup, part]
            scaled = plgpu.layout_cast(columns[...], layout).astype(jnp.float32) * factor
            columns[...] = jnp.where(owned, scaled, 0.0).astype(dtype)
        plgpu.commit_smem()

    def start():
        """Block 0: its logits, and no output yet."""
        plgpu.barrier_wait(query_here)
        if plan.polynomial is not None:
            scale_query(plan.polynomial.query_factor)
        plgpu.barrier_wait(keys_here.at[slot_of(0)])
        take_turn()
        logits = logits_of(0)
        plgpu.barrier_arrive(keys_free.at[slot_of(0)])
        m = -jnp.inf if plan.fixed_maximum is None else plan.fixed_maximum
        m = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), m, jnp.float32), ROWS)
        l = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, 8), jnp.float32), WGMMA)
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.value_dim), jnp.float32), WGMMA)
        running = softmax(logits, lambda: acc, m, l, 0, masked=True)
        plgpu.barrier_wait(values_here.at[slot_of(0)])
        clean_values(0)
        return running

    def products_of(i, weights, acc):
        """Block i's logits; and a function that waits for the output of block i - 1, which is still being computed."""
        plgpu.barrier_wait(keys_here.at[slot_of(i)])
        take_turn()
        operands = (query_tile.at[warpgroup], keys.at[slot_of(i)], acc, weights, values.at[slot_of(i - 1)])
        logits, acc = start_products(*operands)
        pass_turn()

        def output():
            # The wait for the next values is a loop: ptxas moves no wait for products across it, so none comes early.
            plgpu.barrier_wait(values_here.at[slot_of(i)])
            done = settled(acc, still_running=0)
            plgpu.barrier_arrive(values_free.at[slot_of(i - 1)])
            return done

        return settled(logits, still_running=1), output

    def step(masked, i, running):
        """Block i's logits and weights, and the output of block i - 1."""
        weights, acc, m, l = running
        logits, output = products_of(i, weights, acc)
        plgpu.barrier_arrive(keys_free.at[slot_of(i)])
        return softmax(logits, output, m, l, i, masked)

    def steps_by_polynomial(first, end, running):
        """Steps from block `first` to `end`, or to the first block with logits that are not small; and where it ended.

        Whether they are is seen in the weights. So that block is weighed again, by tanh, from logits computed again.
        All rows of the warpgroup change together: so a row's last bits may depend on the rows beside it, which are of
        the same sequence, and of the same KV head.
        """

        def one(carry):
            i, _, (weights, acc, m, l) = carry
            logits, output = products_of(i, weights, acc)
            weights = jnp.exp2(plan.polynomial(logits) - lax.broadcast_in_dim(m * unit, shape, [0]))
            sums = _fold(jnp.add, weights)
            small = ~any_in_warpgroup(plan.polynomial.doubts(sums), warpgroup)
            acc = output()
            pl.when(small)(lambda: plgpu.barrier_arrive(keys_free.at[slot_of(i)]))
            weights = rounded(weights)
            return i + 1, small, (weights, acc, m, l + jnp.where(small, sums, 0.0))

        def again(i, running):
            _, acc, m, l = running
            logits = logits_of(i)
            plgpu.barrier_arrive(keys_free.at[slot_of(i)])
            return softmax(logits, lambda: acc, m, l, i, masked=False)

        carry = first, jnp.bool_(True), running
        end, small, running = lax.while_loop(lambda carry: (carry[0] < end) & carry[1], one, carry)
        return end, lax.cond(small, lambda running: running, functools.partial(again, end - 1), running)

    def finish(running):
        """The output of the last block, and the rows' results."""
        weights, acc, m, l = running
        plgpu.barrier_arrive(query_free)
        clean_values(steps - 1)
        take_turn()

        def product(output):
            plgpu.wgmma(output, weights, values.at[slot_of(steps - 1)])
            pass_turn()

        acc = pl.run_state(product)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(values_free.at[slot_of(steps - 1)])
        to_natural = plan.soft_cap or (plan.softmax_scale if plan.softmax_scale > 0 else 1.0)
        factor, row_lse = factor_and_lse(l.sum(axis=1), m * to_natural)
        return acc * lax.broadcast_in_dim(factor, acc.shape, [0]), row_lse

    # Blocks that every row sees whole need no mask: from block `edge` on, and up to block `clear`.
    whole = lax.div(jnp.minimum(tile.position + 1, tile.end_key), plan.block_kv)
    edge = jnp.clip(piece.last + 1 - whole, 1, steps)
    clear = steps
    if plan.window is not None:
        last_window = tile.position + tile.length - plan.window
        first_whole = lax.div(last_window + plan.block_kv - 1, plan.block_kv)
        clear = jnp.clip(piece.last + 1 - first_whole, edge, steps)
    running = start()
    running = lax.fori_loop(1, edge, functools.partial(step, True), running)
    if plan.polynomial is not None:
        edge, running = steps_by_polynomial(edge, clear, running)
    running = lax.fori_loop(edge, clear, functools.partial(step, False), running)
    if plan.window is not None:
        running = lax.fori_loop(clear, steps, functools.partial(step, True), running)
    acc, row_lse = finish(running)
    head, token = head_and_token(rows())
    place = (piece.split * plan.tokens + tile.start + token) * q_heads + piece.head + head
    store_rows(acc.astype(out.dtype), row_lse, jnp.where(owns(rows()), place, -1), out, lse)


def _fold(combine, array):
    """[rows, columns] as [rows, 8]: columns that lie 8 apart, and so in one thread, combined pair by pair.

    A thread waits for no other's share this way, and its own operations need not wait for one another.
    """
    parts = [array[:, c : c + 8] for c in range(0, array.shape[1], 8)]
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]
