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
from paged_prefill.lowering.mosaic_tpu.fetching import Fetcher, LoadedBlock, Pages, Scales
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
        """The tiles of so many KV heads, each of which `group` query heads share."""
        heads = kv_heads * group
        rows = round_up(min(heads, group), SUBLANES) if kv_heads == 1 else max(schedule.power_of_2_up_to(group), SUBLANES)
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


def kernel(*refs, static: Static):
    """One grid step, given the references of `attend`'s pallas_call."""
    _Item(*refs, static=static).run()


class _Item:
    """An item, for the KV heads of one core."""

    def __init__(self, head_start_ref, *refs, static: Static):
        self.static, self.sizes, self.row_tiles = static, static.sizes, static.row_tiles
        refs = iter(refs)
        self.items = items = Items(*itertools.islice(refs, len(Items._fields)))
        self.scales = Scales.of(refs, static.held)
        self.query_ref, pages = next(refs), Pages.of(refs, static.held)
        self.out_ref, self.lse_ref, self.buffers, self.scratch = refs
        kv_heads = self.row_tiles.kv_heads
        self.first_head = head_start_ref[0] + pl.program_id(0) * kv_heads
        self.number = item = pl.program_id(1)
        self.fetcher = Fetcher(
            items, item, pl.num_programs(1), pages, static.held, self.buffers, self.first_head, kv_heads, self.sizes
        )
        self.key_start, self.key_end = items.key_start[item], items.key_end[item]
        self.at_once, self.chunks_at_once = _at_once(self.row_tiles, self.sizes)
        self.steps = self.row_tiles.tiles // self.row_tiles.period // self.at_once

    def run(self):
        """Attends to all keys that the token sees."""
        scratch, static = self.scratch, self.static
        scratch.m[...] = jnp.full(scratch.m.shape, -jnp.inf, jnp.float32)
        scratch.l[...] = jnp.zeros(scratch.l.shape, jnp.float32)
        scratch.acc[...] = jnp.zeros(scratch.acc.shape, jnp.float32)
        self.fetcher.begin()
        pl.loop(self.fetcher.first_block, self.fetcher.last_block + 1)(self._attend_block)
        scale = static.softmax_scale if static.soft_cap is None else static.soft_cap
        _write(self.out_ref, self.lse_ref, scratch, scale)

    def _attend_block(self, block):
        """Waits for a block, starts the copies of the one after it, and folds it into the running values."""
        static, buffers, block_kv = self.static, self.buffers, self.sizes.block_kv
        slot, first_key = self.fetcher.turn(), block * block_kv
        following, exists = self.fetcher.following(block)
        keys_ref = buffers.keys.at[slot]
        loaded = LoadedBlock(
            query_ref=self.query_ref,
            keys_ref=keys_ref,
            values_ref=keys_ref if static.held.latent else buffers.values.at[slot],
            scratch=self.scratch,
            static=static,
            scale_of=functools.partial(self.scales.of_head, self.items.pool[self.number], self.first_head),
            slot_scales_of=functools.partial(buffers.scales_of_slots, static.held, slot),
        )
        seen_whole = (self.key_start <= first_key) & (first_key + block_kv <= self.key_end)
        hot = seen_whole & exists & self.fetcher.whole(following)
        pl.when(hot)(lambda: self._unmasked(loaded, block, slot, following))
        pl.when(jnp.logical_not(hot))(lambda: self._masked(loaded, block, first_key, slot, following, exists))

    def _unmasked(self, loaded: LoadedBlock, block, slot, following):
        """Every key of the block is seen, and every run of the next one is needed."""
        sizes, at_once, chunks_at_once, steps = self.sizes, self.at_once, self.chunks_at_once, self.steps
        self.fetcher.wait(block, slot)
        copy = self.fetcher.copier(following, 1 - slot)
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
                _Step(loaded, chunks, part * at_once, at_once, beside=copies(part)).attend()

            @pl.loop(steps_with_copies, steps)
            def _(part):
                _Step(loaded, chunks, part * at_once, at_once).attend()

    def _masked(self, loaded: LoadedBlock, block, first_key, slot, following, exists):
        """The chunks of the block that hold a key that is seen."""
        sizes = self.sizes
        pl.when(exists)(lambda: self.fetcher.start(following, 1 - slot))
        self.fetcher.wait(block, slot)
        start, end = self.key_start - first_key, self.key_end - first_key
        low = lax.div(jnp.maximum(start, 0), sizes.chunk)
        high = jnp.minimum(pl.cdiv(end, sizes.chunk), sizes.chunks_per_block)

        @pl.loop(low, high)
        def _(chunk):
            interval = start - chunk * sizes.chunk, end - chunk * sizes.chunk
            zero_outside(loaded.values_ref, chunk, interval, sizes)

            @pl.loop(0, self.steps)
            def _(part):
                _Step(loaded, [chunk], part * self.at_once, self.at_once, interval).attend()


def _at_once(row_tiles: RowTiles, sizes: Sizes) -> tuple[int, int]:
    """Periods of tiles and chunks in one step: enough products for the matrix unit never to wait for a softmax."""
    keys_of_period = row_tiles.period * row_tiles.rows * sizes.chunk / row_tiles.group
    most = max(1, int(schedule.DECODE_KEYS / keys_of_period))
    periods = schedule.largest_divisor(row_tiles.tiles // row_tiles.period, most)
    return periods, schedule.largest_divisor(sizes.chunks_per_block, most // periods)


class _Step:
    """Chunks of keys, folded into the running values of some periods of tiles.

    All logits come first: the matrix unit computes those of later chunks while the softmax of the first ones runs.
    `interval` is what is seen of each chunk, None for all. `beside` are functions that start copies, spread evenly over
    the products with values: the compiler keeps loads and copies in the order of the program, and only what lies between
    them runs at the same time.
    """

    def __init__(self, loaded: LoadedBlock, chunks, first_period, periods: int, interval=None, beside=()):
        self.loaded, self.chunks, self.first_period, self.interval = loaded, chunks, first_period, interval
        static, self.scratch = loaded.static, loaded.scratch
        self.sizes, self.row_tiles = static.sizes, static.row_tiles
        self.tiles = range(periods * self.row_tiles.period)
        # Products are in pieces, for copies to lie between them.
        chunk, depth = self.sizes.chunk, schedule.DEPTH
        self.pieces = [slice(first, min(first + depth, chunk)) for first in range(0, chunk, depth)]
        products = len(chunks) * sum(len(self._kv_heads_of(tile)) for tile in self.tiles)
        self.shares = _shares(beside, products * len(self.pieces))
        self.row = lax.broadcasted_iota(jnp.int32, (self.row_tiles.rows, 1), 0)

    def attend(self):
        """Folds the chunks in, one after the other."""
        acc = self.scratch.acc
        logits_of_chunks = [[self._logits(chunk, tile) for tile in self.tiles] for chunk in self.chunks]
        for chunk, logits_of_tiles in zip(self.chunks, logits_of_chunks):
            weights = [self._softmax(tile, s) for tile, s in zip(self.tiles, logits_of_tiles)]
            for tile, (p, fade) in zip(self.tiles, weights):
                at = self._number_of(tile)
                added = self._weighted_values(chunk, tile, p)
                acc[at] = acc[at] * widen(fade, added.shape[1]) + added

    def _number_of(self, tile: int):
        """The number of one of the step's tiles, among all."""
        return self.first_period * self.row_tiles.period + tile

    def _kv_heads_of(self, tile: int) -> range:
        """The KV heads of a tile's rows, counted from the first of its period."""
        return self.row_tiles.kv_heads_of(tile % self.row_tiles.period)

    def _logits(self, chunk, tile: int):
        """Logits [rows, keys] of a tile, scales included."""
        query = self.loaded.query_ref[self._number_of(tile)]

        def of_head(head):
            keys_of = functools.partial(self._of_keys, self.loaded.keys_ref, head, chunk)
            here = jnp.concatenate([self._product(query, keys_of(keys), 1) for keys in self.pieces], axis=1)
            for scale in (self.loaded.scale_of("key", head), self.loaded.slot_scales_of("key", head, chunk)):
                here = here if scale is None else here * scale
            return here

        return self._of_each_head(tile, of_head)

    def _softmax(self, tile: int, s):
        """Weights of logits, and by what the running values fade, of which the maximum and the sum move on."""
        scratch, static, at = self.scratch, self.loaded.static, self._number_of(tile)
        to_exponent = (static.softmax_scale if static.soft_cap is None else static.soft_cap) * math.log2(math.e)
        if static.soft_cap is not None:
            s = jnp.tanh(s * (static.softmax_scale / static.soft_cap))
        if self.interval is not None:
            s = hide_outside(s, self.interval)
        m = scratch.m[at]
        # No chunk is without a key that is seen, so the maximum is above -inf unless a logit is.
        m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp2((s - widen(shift, self.sizes.chunk)) * to_exponent)
        fade = jnp.exp2((m - shift) * to_exponent)
        scratch.m[at] = m_next
        scratch.l[at] = scratch.l[at] * fade + lane_sums(p)
        return p, fade

    def _weighted_values(self, chunk, tile: int, p):
        """Weights [rows, keys] times values, scales included; some copies are started beside each product."""

        def of_head(head):
            weights, parts = self._weights(p, head, chunk), []
            for keys in self.pieces:
                values = self._of_keys(self.loaded.values_ref, head, chunk, keys)[:, : self.loaded.static.value_dim]
                parts.append(self._product(weights[:, keys], values, 0))
                for start in next(self.shares):
                    start()
            here, scale = sum(parts), self.loaded.scale_of("value", head)
            return here if scale is None else here * scale

        return self._of_each_head(tile, of_head)

    def _weights(self, p, head, chunk):
        """Weights times the scales of their slots' values, as they come to be multiplied."""
        if (scales := self.loaded.slot_scales_of("value", head, chunk)) is not None:
            p = p * (scales if self.interval is None else zero_scales_outside(scales, self.interval))  # 0 * NaN is NaN
        return p.astype(self.loaded.query_ref.dtype)

    def _of_each_head(self, tile: int, of_head):
        """For each row of a tile, what `of_head` gives for its KV head."""
        period, rows, group = self.row_tiles.period, self.row_tiles.rows, self.row_tiles.group
        result = None
        for head in self._kv_heads_of(tile):
            here = of_head((self.first_period + tile // period) * (period * rows // group) + head)
            first_row = head * group - tile % period * rows
            result = here if result is None else jnp.where(self.row >= first_row, here, result)
        return result

    def _of_keys(self, ref, head, chunk, keys: slice):
        """What some of a chunk's keys have in `ref`, [keys, features]."""
        at = self.sizes.keys_of_chunk(chunk, keys.start, keys.stop - keys.start)
        return ref[head, at].astype(self.loaded.query_ref.dtype)

    def _product(self, x, y, contract: int):
        """x times y, whose dimension `contract` is summed over."""
        precision = lax.Precision.HIGHEST if self.loaded.query_ref.dtype == jnp.float32 else None
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


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
