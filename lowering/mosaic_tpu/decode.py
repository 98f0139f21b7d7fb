"""The TPU kernel for sequences of one new token, as in decoding: how one grid step attends, and the call.

The query heads of a token are the rows of a matrix product, in tiles that fill the sublanes of registers. A tile's rows
may belong to several KV heads: it is multiplied with the keys of each, and each row keeps the logits of its own. So
what the vector unit does, softmax above all, costs as much for groups of one head as for one group of eight. Every row
sees the same keys, so a block needs a mask only where it holds keys that none sees.

Fetching is in fetching.py, the mathematics in step.py.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import Call, Problem
from paged_prefill.lowering.mosaic_tpu import fetching, schedule
from paged_prefill.lowering.mosaic_tpu.fetching import Fetcher, Pages, Scales
from paged_prefill.lowering.mosaic_tpu.masks import hide_outside, zero_outside, zero_scales_outside
from paged_prefill.lowering.mosaic_tpu.registers import lane_sums, widen
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, SUBLANES, Sizes, round_up
from paged_prefill.primitive.attention import factor_and_lse


class RowTiles(NamedTuple):
    """How the query heads of one core lie in tiles of rows: head h is row h % rows of tile h // rows."""

    tiles: int
    rows: int
    period: int  # tiles after which rows meet KV heads in the same way again
    kv_heads: int
    group: int

    @classmethod
    def of(cls, kv_heads: int, group: int) -> "RowTiles":
        heads = kv_heads * group
        rows = round_up(min(heads, group), SUBLANES) if kv_heads == 1 else max(schedule.power_of_2(group), SUBLANES)
        tiles = -(-heads // rows)
        period = math.lcm(rows, group) // rows
        return cls(tiles, rows, period if tiles % period == 0 and heads % rows == 0 else tiles, kv_heads, group)

    def kv_heads_of(self, tile: int) -> range:
        """The KV heads that rows of one of the first `period` tiles belong to."""
        last = min((tile + 1) * self.rows - 1, self.kv_heads * self.group - 1)
        return range(tile * self.rows // self.group, last // self.group + 1)


class Items(NamedTuple):
    """The sequences of one new token, all int32 [items]; those from the count of items on are anything within bounds.

    Attributes:
      token: which token of the pack.
      seq: which sequence; `pool` its pool, `key_pool` and `value_pool` where these are of their own.
      key_start, key_end: the keys that the token sees; both 0 where there are none.
    """

    token: Int[Array, " items"]
    seq: Int[Array, " items"]
    pool: Int[Array, " items"]
    key_pool: Int[Array, " items"]
    value_pool: Int[Array, " items"]
    key_start: Int[Array, " items"]
    key_end: Int[Array, " items"]


class Static(NamedTuple):
    """What is static about a launch."""

    sizes: Sizes
    row_tiles: RowTiles
    softmax_scale: float
    soft_cap: float | None
    value_dim: int
    held: fetching.Held


class Scratch(NamedTuple):
    """What is kept on the chip beside the buffers of pages."""

    acc: object  # VMEM [tiles, rows, value_dim] float32
    m: object  # VMEM [tiles, rows, LANES] float32, the same in every lane
    l: object  # VMEM [tiles, rows, LANES] float32, to be summed over the lanes


def kernel(head_start_ref, *refs, static: Static):
    """One grid step: one item, and the KV heads of one core."""
    sizes, row_tiles = static.sizes, static.row_tiles
    refs = iter(refs)
    items = Items(*itertools.islice(refs, len(Items._fields)))
    scales = Scales.of(refs, static.held)
    query_ref, pages = next(refs), Pages.of(refs, static.held)
    out_ref, lse_ref, buffers, scratch = refs
    first_head = head_start_ref[0] + pl.program_id(0) * row_tiles.kv_heads
    item = pl.program_id(1)
    kv_heads = row_tiles.kv_heads
    fetcher = Fetcher(items, item, pl.num_programs(1), pages, static.held, buffers, first_head, kv_heads, sizes)
    key_start, key_end, block_kv = items.key_start[item], items.key_end[item], sizes.block_kv
    at_once, chunks_at_once = _at_once(row_tiles, sizes)
    steps = row_tiles.tiles // row_tiles.period // at_once

    scratch.m[...] = jnp.full(scratch.m.shape, -jnp.inf, jnp.float32)
    scratch.l[...] = jnp.zeros(scratch.l.shape, jnp.float32)
    scratch.acc[...] = jnp.zeros(scratch.acc.shape, jnp.float32)
    fetcher.begin()

    @pl.loop(fetcher.first_block, fetcher.last_block + 1)
    def _(block):
        slot, first_key = fetcher.turn(), block * block_kv
        following, exists = fetcher.following(block)
        keys_ref = buffers.keys.at[slot]
        values_ref = keys_ref if static.held.latent else buffers.values.at[slot]
        step = functools.partial(
            _attend_step,
            query_ref=query_ref,
            keys_ref=keys_ref,
            values_ref=values_ref,
            scratch=scratch,
            static=static,
            scale_of=functools.partial(scales.of_head, items.pool[item], first_head),
            slot_scales_of=functools.partial(buffers.scales_of_slots, static.held, slot),
        )
        seen_whole = (key_start <= first_key) & (first_key + block_kv <= key_end)
        hot = seen_whole & exists & fetcher.whole(following)

        @pl.when(hot)
        def unmasked():
            """Every key of the block is seen, and every run of the next one is needed."""
            fetcher.wait(block, slot)
            copy = fetcher.copier(following, 1 - slot)
            runs = chunks_at_once * sizes.runs_per_chunk
            steps_with_copies = schedule.largest_divisor(runs, steps)
            share = runs // steps_with_copies

            @pl.loop(0, sizes.chunks_per_block // chunks_at_once)
            def _(i):
                chunks = [i * chunks_at_once + chunk for chunk in range(chunks_at_once)]

                def copies(part):
                    return [functools.partial(copy, i * runs + part * share, run) for run in range(share)]

                @pl.loop(0, steps_with_copies)
                def _(part):
                    step(chunks, part * at_once, at_once, beside=copies(part))

                @pl.loop(steps_with_copies, steps)
                def _(part):
                    step(chunks, part * at_once, at_once)

        @pl.when(jnp.logical_not(hot))
        def masked():
            pl.when(exists)(lambda: fetcher.start(following, 1 - slot))
            fetcher.wait(block, slot)
            start, end = key_start - first_key, key_end - first_key
            low = lax.div(jnp.maximum(start, 0), sizes.chunk)
            high = jnp.minimum(pl.cdiv(end, sizes.chunk), sizes.chunks_per_block)

            @pl.loop(low, high)
            def _(chunk):
                interval = start - chunk * sizes.chunk, end - chunk * sizes.chunk
                zero_outside(values_ref, chunk, interval, sizes)

                @pl.loop(0, steps)
                def _(part):
                    step([chunk], part * at_once, at_once, interval)

    _write(out_ref, lse_ref, scratch, static.softmax_scale if static.soft_cap is None else static.soft_cap)


def _at_once(row_tiles: RowTiles, sizes: Sizes) -> tuple[int, int]:
    """Periods of tiles and chunks in one step: enough products for the matrix unit never to wait for a softmax."""
    keys_of_period = row_tiles.period * row_tiles.rows * sizes.chunk / row_tiles.group
    most = max(1, int(schedule.DECODE_KEYS / keys_of_period))
    periods = schedule.largest_divisor(row_tiles.tiles // row_tiles.period, most)
    return periods, schedule.largest_divisor(sizes.chunks_per_block, most // periods)


def _attend_step(
    chunks, first_period, periods, interval=None, beside=(), *, query_ref, keys_ref, values_ref, scratch: Scratch,
    static: Static, scale_of, slot_scales_of,
):  # fmt: skip
    """Folds chunks of keys into the running values of some periods of tiles; `interval` is what is seen of each chunk.

    All logits come first: the matrix unit computes those of later chunks while the softmax of the first ones runs.
    `beside` are functions that start copies, spread evenly over the products with values: the compiler keeps loads and
    copies in the order of the program, and only what lies between them runs at the same time. `scale_of` is the scale of
    "key" or "value" of a KV head, `slot_scales_of` those of a chunk's slots; None where there are none.
    """
    sizes, row_tiles, softmax_scale, soft_cap = static.sizes, static.row_tiles, static.softmax_scale, static.soft_cap
    rows, period = row_tiles.rows, row_tiles.period
    tiles = range(periods * period)
    products = len(chunks) * sum(len(row_tiles.kv_heads_of(tile % period)) for tile in tiles)
    # Products are in pieces, for copies to lie between them.
    pieces = [slice(first, min(first + schedule.DEPTH, sizes.chunk)) for first in range(0, sizes.chunk, schedule.DEPTH)]
    shares = _shares(beside, products * len(pieces))
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    to_exponent = (softmax_scale if soft_cap is None else soft_cap) * math.log2(math.e)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

    def product(x, y, contract):
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def weighted(p, head, chunk):
        """Weights [rows, keys] times the scales of values, as they come to be multiplied."""
        if (scales := slot_scales_of("value", head, chunk)) is not None:
            p = p * (scales if interval is None else zero_scales_outside(scales, interval))  # 0 * NaN is NaN
        return p.astype(query_ref.dtype)

    def of_each_head(chunk, tile, x, ref, contract, name):
        """The product of each row with what its KV head has in `ref`, times the scales."""
        result = None
        for head in row_tiles.kv_heads_of(tile % period):
            place = (first_period + tile // period) * (period * rows // row_tiles.group) + head
            rows_of_x, here = weighted(x, place, chunk) if contract == 0 else x, []
            for keys in pieces:
                y = ref[place, sizes.keys_of_chunk(chunk, keys.start, keys.stop - keys.start)].astype(query_ref.dtype)
                y = y[:, : static.value_dim] if contract == 0 else y
                here.append(product(rows_of_x[:, keys] if contract == 0 else x, y, contract))
                for start in next(shares) if contract == 0 else ():
                    start()
            here = sum(here) if contract == 0 else jnp.concatenate(here, axis=1)
            for scale in (scale_of(name, place), slot_scales_of(name, place, chunk) if contract == 1 else None):
                here = here if scale is None else here * scale
            first_row = head * row_tiles.group - tile % period * rows
            result = here if result is None else jnp.where(row >= first_row, here, result)
        return result

    def softmax(tile, s):
        at = first_period * period + tile
        if soft_cap is not None:
            s = jnp.tanh(s * (softmax_scale / soft_cap))
        if interval is not None:
            s = hide_outside(s, interval)
        m = scratch.m[at]
        # No chunk is without a key that is seen, so the maximum is above -inf unless a logit is.
        m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp2((s - widen(shift, sizes.chunk)) * to_exponent)
        fade = jnp.exp2((m - shift) * to_exponent)
        scratch.m[at] = m_next
        scratch.l[at] = scratch.l[at] * fade + lane_sums(p)
        return p, fade

    def logits(chunk, tile):
        return of_each_head(chunk, tile, query_ref[first_period * period + tile], keys_ref, 1, "key")

    logits_of_chunks = [[logits(chunk, tile) for tile in tiles] for chunk in chunks]
    for chunk, logits_of_tiles in zip(chunks, logits_of_chunks):
        weights = [softmax(tile, s) for tile, s in zip(tiles, logits_of_tiles)]
        for tile, (p, fade) in zip(tiles, weights):
            at = first_period * period + tile
            added = of_each_head(chunk, tile, p, values_ref, 0, "value")
            scratch.acc[at] = scratch.acc[at] * widen(fade, added.shape[1]) + added


def _shares(sequence, count):
    """An iterator over so many slices of a sequence that are as alike in size as can be."""
    return (sequence[i * len(sequence) // count : (i + 1) * len(sequence) // count] for i in range(count))


def _write(out_ref, lse_ref, scratch: Scratch, scale):
    """Divides, and writes the output of the tiles and their lse, the rows of which become lanes."""
    tiles, rows, value_dim = scratch.acc.shape
    lane = lax.broadcasted_iota(jnp.int32, (1, lse_ref.shape[-1]), 1)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    total_lse = jnp.zeros((1, lse_ref.shape[-1]), jnp.float32)
    for tile in range(tiles):
        l = jnp.broadcast_to(jnp.sum(scratch.l[tile], axis=1, keepdims=True), scratch.m.shape[1:])
        factor, lse = factor_and_lse(l, scratch.m[tile] * scale)
        out_ref[tile] = (scratch.acc[tile] * widen(factor, value_dim)).astype(out_ref.dtype)
        mine = lane == tile * rows + row
        total_lse += jnp.sum(jnp.where(mine, widen(lse, mine.shape[1]), 0.0), axis=0, keepdims=True)
    lse_ref[...] = total_lse


def items_of(call: Call) -> tuple[Items, Int[Array, ""]]:
    """The items of a pack, and how many there are."""
    sequences, problem = call.sequences, call.problem
    ends = jnp.cumsum((sequences.length == 1).astype(jnp.int32), dtype=jnp.int32)
    item = jnp.arange(problem.seqs, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), problem.seqs - 1)
    token, context_len = jnp.minimum(sequences.start[seq], problem.tokens - 1), sequences.context_len[seq]
    if call.ranges is None:
        key_start, key_end = problem.attention.visible_keys(context_len - 1)
    else:
        key_start, key_end = jnp.maximum(call.ranges[token, 0], 0), jnp.minimum(call.ranges[token, 1], context_len)
    if call.tree is not None:  # of the sequence's new tokens there is but its own
        sees_itself = (call.tree[token, 0] & 1) == 1
        key_end = jnp.where(sees_itself, key_end, jnp.minimum(key_end, context_len - 1))
    key_end = jnp.minimum(key_end, problem.capacity)
    sees = (item < ends[-1]) & (key_start < key_end)
    seen = dict(key_start=jnp.where(sees, key_start, 0), key_end=jnp.where(sees, key_end, 0))
    return Items(token, seq, **schedule.pools_of(call, seq), **seen), ends[-1]


def attend(call: Call, sizes: Sizes, splits: int, vmem_limit_bytes: int, out, lse):
    """`out` and `lse` with the results of sequences of one new token; `splits` are the cores that share the KV heads."""
    problem, heads = call.problem, call.problem.num_kv_heads // splits
    head_dim, value_dim, attention = problem.head_dim, problem.value_dim, problem.attention
    items, count = items_of(call)
    row_tiles = RowTiles.of(heads, problem.group)
    tiles, rows, of_core = row_tiles.tiles, row_tiles.rows, heads * problem.group
    query = call.query.reshape(-1, splits, of_core, head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, tiles * rows - of_core), (0, 0)))
    query = query.reshape(-1, splits, tiles, rows, head_dim)
    lanes = round_up(tiles * rows, LANES)
    pages, scales, held = fetching.pages_of(call, sizes), fetching.scales_of(call), fetching.Held.by(call)
    ones, ones_lse = pl.pallas_call(
        functools.partial(
            kernel,
            static=Static(
                sizes=sizes,
                row_tiles=row_tiles,
                softmax_scale=abs(attention.softmax_scale) or 1.0,
                soft_cap=attention.attn_logits_soft_cap,
                value_dim=value_dim,
                held=held,
            ),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items) + len(scales),
            grid=(splits, jnp.maximum(count, 1)),
            in_specs=[
                pl.BlockSpec(
                    (None, None, tiles, rows, head_dim),
                    lambda split, item, head_start, token, *_: (token[item], split, 0, 0, 0),
                ),
                *fetching.in_hbm(pages),
            ],
            out_specs=[
                pl.BlockSpec((None, None, tiles, rows, value_dim), lambda split, item, *_: (item, split, 0, 0, 0)),
                pl.BlockSpec((None, None, 1, lanes), lambda split, item, *_: (item, split, 0, 0)),
            ],
            scratch_shapes=[fetching.buffers_of(problem, held, sizes, heads), scratch_of(row_tiles, value_dim)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((problem.seqs, splits, tiles, rows, value_dim), query.dtype),
            jax.ShapeDtypeStruct((problem.seqs, splits, 1, lanes), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # every index was clamped by call.flatten
        ),
        name="paged_decode",
    )(call.kv_head_start.reshape(1), *items, *scales.values(), query, *(x for x in pages if x is not None))
    ones = ones.reshape(problem.seqs, splits, tiles * rows, value_dim)[:, :, :of_core]
    ones = ones.reshape(problem.seqs, *out.shape[1:])
    ones_lse = ones_lse[:, :, 0, :of_core].reshape(problem.seqs, -1)
    at = jnp.where(jnp.arange(problem.seqs) < count, items.token, problem.tokens)
    return out.at[at].set(ones, mode="drop"), lse.at[at].set(ones_lse, mode="drop")


def scratch_of(row_tiles: RowTiles, value_dim: int) -> Scratch:
    """The scratch for the tiles of one core."""
    of_tiles = row_tiles.tiles, row_tiles.rows
    return Scratch(*(pltpu.VMEM((*of_tiles, width), jnp.float32) for width in (value_dim, LANES, LANES)))


def vmem_bytes(problem: Problem, sizes: Sizes) -> int:
    """VMEM that a call takes beside the buffers of pages, from above, on one core."""
    row_tiles = RowTiles.of(problem.num_kv_heads, problem.group)
    rows = row_tiles.tiles * round_up(row_tiles.rows, 16)
    value_dim = round_up(problem.value_dim, LANES)
    tiles = 2 * rows * ((round_up(problem.head_dim, LANES) + value_dim) * jnp.dtype(problem.dtype).itemsize + 32)
    running = rows * (value_dim + 2 * LANES) * 4
    keys_at_once = round_up(sizes.chunk * _at_once(row_tiles, sizes)[1], LANES)
    step = 2 * rows * keys_at_once * 4  # what the compiler keeps of a step
    return tiles + running + step
