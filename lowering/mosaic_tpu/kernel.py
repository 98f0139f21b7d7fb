"""The TPU kernel for sequences of more than one new token: how one grid step attends, and the call.

One pallas_call runs all of them. Its grid walks over the items of schedule.py, the rows of one sequence in one tile of
the query; fetching.py brings the keys and values of an item, block by block.

A block is computed in chunks of keys. The rows of a part of the tile times the query heads of a group are the rows of
one matrix product with the chunk's keys; an item of few rows takes only the slice of the tile that holds them. Blocks
that every row sees whole are not masked, and the copies of the next one's pages are started within the loop of the
matrix products, where the scalar unit has nothing else to do.

The mathematics is in step.py. The products of one KV head overlap with the softmax of another, as in tpu-inference's
ragged paged attention (arXiv 2604.15464). The logits of a product are four times what the registers hold, so logits,
weights and weighted values pass through buffers in VMEM, of which two are in turn.
"""

import functools
import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.call import Call, Problem
from paged_prefill.lowering.mosaic_tpu import fetching, schedule
from paged_prefill.lowering.mosaic_tpu.fetching import Fetcher, Pages, Scales
from paged_prefill.lowering.mosaic_tpu.masks import Mask, MaskByRow, Rows, zero_outside
from paged_prefill.lowering.mosaic_tpu.registers import widen
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Items, Sizes, largest_divisor, round_up, sublanes
from paged_prefill.lowering.mosaic_tpu.step import Product, Scratch, Static, Step
from paged_prefill.primitive.attention import factor_and_lse


def kernel(*refs, static: Static):
    """One grid step, given the references of `attend`'s pallas_call."""
    _Item(*refs, static=static).run()


class _Item:
    """An item, for the KV heads of one core: which rows attend, and which of its keys need a mask."""

    def __init__(self, head_start_ref, *refs, static: Static):
        self.static, self.sizes = static, static.sizes
        refs = iter(refs)
        self.items = items = Items(*itertools.islice(refs, len(Items._fields)))
        scales = Scales.of(refs, static.held)
        self.query_ref = next(refs)
        self.seen_refs = (next(refs), next(refs)) if static.by_row else None
        pages = Pages.of(refs, static.held)
        self.out_ref, self.lse_ref, self.buffers, self.scratch = refs
        self.kv_heads, self.group = self.query_ref.shape[:2]
        first_head = head_start_ref[0] + pl.program_id(0) * self.kv_heads
        self.number = item = pl.program_id(1)
        self.fetcher = Fetcher(
            items, item, pl.num_programs(1), pages, static.held, self.buffers, first_head, self.kv_heads, self.sizes
        )
        self.position = items.position[item]
        self.row_start, self.row_end = items.row_start[item], items.row_end[item]
        self.key_start, self.key_end = items.key_start[item], items.key_end[item]
        self.scale_of = functools.partial(scales.of_head, items.pool[item], first_head)
        # In no chunk do keys both start for some rows and end for others, unless the window is shorter.
        window = static.window
        self.one_edge = not static.by_row and self.sizes.chunk_is_cut and window is not None and window >= self.sizes.chunk

    def run(self):
        """Attends all rows of the item."""
        self.fetcher.begin()
        few = sublanes(self.query_ref.dtype)
        if self.sizes.block_q > few:
            is_few = self.row_end - lax.div(self.row_start, few) * few <= few
            pl.when(is_few)(lambda: self._attend_few_rows(few))
            pl.when(jnp.logical_not(is_few))(self._attend_tile)
        else:
            self._attend_tile()

    def mask_of(self, first_key, rows, first, causal=True, windowed=True):
        """What hides keys from rows, of those from the first-th on of a chunk that starts at `first_key`.

        Rows that follow causality and a window may be asked about one of the two alone.
        """
        if self.static.by_row:
            first_new = self.items.first_new[self.number] if self.static.tree else None
            return MaskByRow(*self.seen_refs, rows, first_key + first, self.row_start, self.row_end, first_new)
        window = self.static.window if windowed else None
        return Mask(self.scratch.ends, rows, first_key + first, self.key_start, self.key_end, causal, window)

    def seen_whole(self, first_key, keys):
        """Whether every row sees so many keys from the first on."""
        items, item = self.items, self.number
        return (items.whole_start[item] <= first_key) & (first_key + keys <= items.whole_end[item])

    def windows_start_in(self, first_key):
        """Whether the window of the tile's first row starts in a chunk, and no row's keys end before it does."""
        if not self.one_edge:
            return False
        start = self.position + 1 - self.static.window
        return (first_key <= start) & (first_key + self.sizes.chunk <= self.key_end)

    def part_rows(self, part):
        """The rows of a part of the tile."""
        size = self.sizes.part
        first = pl.multiple_of(part * size, size)
        return Rows(first, size, pl.ds(pl.multiple_of(part * self.group * size, size), self.group * size))

    def _attend_tile(self):
        """The parts of the tile that hold the item's rows."""
        sizes = self.sizes
        parts = lax.div(self.row_start, sizes.part), pl.cdiv(self.row_end, sizes.part)
        self._attend_rows(parts, (parts[0] == 0) & (parts[1] == sizes.parts), self.part_rows)

    def _attend_few_rows(self, few: int):
        """Only the slice of the tile that holds the item's rows."""
        first = pl.multiple_of(lax.div(self.row_start, few) * few, few)
        rows = Rows(first, few, pl.ds(0, self.group * few))
        self._attend_rows((0, 1), None, lambda _: rows)

    def _attend_rows(self, parts, all_parts, rows_of):
        """Attends the rows rows_of(part) for every part in [start, end).

        `all_parts` says whether those are all parts of the tile, None that it takes other slices of it.
        """
        static, scratch = self.static, self.scratch
        if not static.by_row:
            pl.loop(*parts)(lambda part: Mask.fill(scratch.ends, rows_of(part), self.group, self.position))

        def clear():
            pl.loop(*parts)(lambda part: pl.loop(0, self.kv_heads)(lambda head: scratch.clear(head, rows_of(part).at)))

        # A chunk of which all parts are attended together needs no running values before it.
        fresh = None
        if all_parts is not None:
            first_key = lax.div(self.key_start, self.sizes.chunk) * self.sizes.chunk
            fresh = all_parts & (self.key_start < self.key_end)
            fresh &= self.seen_whole(first_key, self.sizes.chunk) | self.windows_start_in(first_key)
        clear() if fresh is None else pl.when(jnp.logical_not(fresh))(clear)

        @pl.loop(self.fetcher.first_block, self.fetcher.last_block + 1)
        def _(block):
            _Block(self, block, parts, all_parts, fresh, rows_of).run()

        @pl.loop(*parts)
        def _(part):
            scale = static.softmax_scale if static.soft_cap is None else static.soft_cap
            rows = self.row_start, self.row_end
            _write(self.out_ref, self.lse_ref, scratch, rows_of(part), *rows, scale, self.scale_of)


class _Block:
    """A block of keys of an item, for the rows that `_Item._attend_rows` gives.

    `run` waits for it, starts the copies of the one after it, and folds it into the running values.
    """

    def __init__(self, item: _Item, block, parts, all_parts, fresh, rows_of):
        self.item, self.sizes, self.scratch = item, item.sizes, item.scratch
        self.number, self.parts, self.all_parts, self.fresh, self.rows_of = block, parts, all_parts, fresh, rows_of
        static, buffers, self.fetcher = item.static, item.buffers, item.fetcher
        self.slot, self.first_key = self.fetcher.turn(), block * self.sizes.block_kv
        self.following, self.exists = self.fetcher.following(block)
        keys_ref = buffers.keys.at[self.slot]
        self.values_ref = keys_ref if static.held.latent else buffers.values.at[self.slot]
        slot_scales_of = functools.partial(buffers.scales_of_slots, static.held, self.slot)
        self.step = Step(
            item.query_ref, keys_ref, self.values_ref, self.scratch, static, item.scale_of, slot_scales_of
        )

    def run(self):
        """The whole block unmasked where that is right, or else chunk by chunk."""
        if self.all_parts is None:
            return self._by_chunks()
        hot = self.all_parts & (self.number > self.fetcher.first_block)
        hot &= self.item.seen_whole(self.first_key, self.sizes.block_kv)
        hot &= self.exists & self.fetcher.whole(self.following)
        pl.when(hot)(self._whole)
        pl.when(jnp.logical_not(hot))(self._by_chunks)

    def _whole(self):
        """No chunk needs a mask, and every run of the next block is needed."""
        self.fetcher.wait(self.number, self.slot)
        copy = self.fetcher.copier(self.following, 1 - self.slot)
        pl.loop(0, self.sizes.chunks_per_block)(lambda chunk: self._tile_chunk(chunk, copy=copy))

    def _by_chunks(self):
        """Each chunk that some row sees, masked where it has to be."""
        item, sizes = self.item, self.sizes
        pl.when(self.exists)(lambda: self.fetcher.start(self.following, 1 - self.slot))
        self.fetcher.wait(self.number, self.slot)
        low = lax.div(jnp.maximum(item.key_start - self.first_key, 0), sizes.chunk)
        high = jnp.minimum(pl.cdiv(item.key_end - self.first_key, sizes.chunk), sizes.chunks_per_block)

        @pl.loop(low, high)
        def _(chunk):
            if self.all_parts is None:
                return self._masked_chunk(chunk)
            whole = self.all_parts & item.seen_whole(self.first_key + chunk * sizes.chunk, sizes.chunk)
            is_fresh = self.fresh & (self.number == self.fetcher.first_block) & (chunk == low)
            pl.when(is_fresh & whole)(lambda: self._tile_chunk(chunk, fresh=True))
            if item.one_edge:
                pl.when(is_fresh & jnp.logical_not(whole))(lambda: self._first_chunk_of_windows(chunk))
            pl.when(whole & jnp.logical_not(is_fresh))(lambda: self._tile_chunk(chunk))
            pl.when(jnp.logical_not(whole | is_fresh))(lambda: self._masked_chunk(chunk))

    def _tile_chunk(self, chunk, mask_of=None, keys_of_parts=None, copy=None, fresh=False):
        """A chunk for all parts of the tile side by side; `copy` starts to copy a run of the next block."""
        sizes, step, kv_heads = self.sizes, self.step, self.item.kv_heads
        keys_of_parts = keys_of_parts or [sizes.whole_chunk] * sizes.parts
        at_once = sizes.heads_at_once(kv_heads)
        steps, first_run = kv_heads // at_once, chunk * sizes.runs_per_chunk
        share = sizes.runs_per_chunk // steps if sizes.runs_per_chunk % steps == 0 else 0
        for run in range(0 if share or copy is None else sizes.runs_per_chunk):
            copy(first_run, run)

        @pl.loop(0, steps)
        def _(heads):
            first = first_run + heads * share
            copies = [functools.partial(copy, first, run) for run in range(share if copy else 0)]

            def product(number, head, part, keys):
                return Product(number & 1, heads * at_once + head, self.item.part_rows(part), keys)

            of_heads = enumerate(keys_of_parts * at_once)
            products = [product(number, *divmod(number, sizes.parts), keys) for number, keys in of_heads]
            if mask_of is not None or fresh:
                return step.attend(chunk, products, mask_of, fresh, copies)
            passed = step.attend_by_old_maximum(chunk, products, copies)

            def attend_passed(head, part):
                number = head * sizes.parts + part
                step.attend_passed(chunk, number, product(number, head, part, sizes.whole_chunk))

            @pl.when(passed)
            def _():
                pl.loop(0, at_once)(lambda head: pl.loop(0, sizes.parts)(lambda part: attend_passed(head, part)))

    def _part_chunk(self, chunk, part, mask_of, keys):
        """A chunk for one part of the tile."""
        kv_heads = self.item.kv_heads
        at_once = 1 if self.all_parts is not None else largest_divisor(kv_heads, schedule.PRODUCTS_AT_ONCE)

        @pl.loop(0, kv_heads // at_once)
        def _(heads):
            # If every buffer's number were known when compiling, the compiler would keep the buffers in
            # registers, of which there are too few, and spill.
            rows, head = self.rows_of(part), heads * at_once
            products = [Product(lax.rem(part + i, 2), head + i, rows, keys) for i in range(at_once)]
            self.step.attend(chunk, products, mask_of)

    def _first_chunk_of_windows(self, chunk):
        """Where rows' windows start: later parts see fewer of its keys."""
        first = self._zero_outside(chunk)
        mask_of = functools.partial(self.item.mask_of, first, causal=False)
        self._tile_chunk(chunk, mask_of, self.sizes.keys_in_window(), fresh=True)

    def _masked_chunk(self, chunk):
        """A chunk of which some rows do not see all keys."""
        if self.item.static.by_row:
            first = self.first_key + chunk * self.sizes.chunk
        else:
            first = self._zero_outside(chunk)
        tile, part_by_part = (functools.partial(f, chunk, first) for f in (self._masked_tile, self._masked_parts))
        if self.all_parts is None:
            return part_by_part()
        pl.when(self.all_parts)(tile)
        pl.when(jnp.logical_not(self.all_parts))(part_by_part)

    def _masked_tile(self, chunk, first):
        """All parts of the tile. Those before the last see fewer keys, if the last does not see past the chunk."""
        item, sizes = self.item, self.sizes
        mask_of = functools.partial(item.mask_of, first)

        def attend(keys):
            self._tile_chunk(chunk, mask_of, [keys] * sizes.parts)

        def attend_staggered(keys):
            of_parts = functools.partial(mask_of, windowed=not item.one_edge)
            self._tile_chunk(chunk, of_parts, sizes.keys_up_to(keys.stop))

        if item.static.by_row or not sizes.chunk_is_cut or sizes.part * (sizes.parts - 1) < LANES:
            return self._up_to(item.key_end, first, attend)
        end = item.position + sizes.block_q
        ends_within = end - first <= sizes.chunk
        pl.when(ends_within)(lambda: self._up_to(end, first, attend_staggered))
        pl.when(jnp.logical_not(ends_within))(lambda: attend(sizes.whole_chunk))

    def _masked_parts(self, chunk, first):
        """The parts of the tile one by one."""
        item, mask_of = self.item, functools.partial(self.item.mask_of, first)

        @pl.loop(*self.parts)
        def _(part):
            rows = self.rows_of(part)
            end = item.key_end
            if not item.static.by_row:
                end = jnp.minimum(end, item.position + rows.first + rows.count)
            self._up_to(end, first, functools.partial(self._part_chunk, chunk, part, mask_of))

    def _up_to(self, end, first, attend):
        """Calls attend(keys) for those of a chunk's keys that may be seen, where rows' keys end at `end`.

        What lies behind the last key that rows see adds zeros, which change no bit of sums by lanes.
        """
        if not self.sizes.chunk_is_cut:
            return attend(self.sizes.whole_chunk)
        ends_early = end - first <= schedule.DEPTH
        pl.when(ends_early)(lambda: attend(slice(0, schedule.DEPTH)))
        pl.when(jnp.logical_not(ends_early))(lambda: attend(self.sizes.whole_chunk))

    def _zero_outside(self, chunk):
        """Zeroes a chunk's values that no row of the item sees; the chunk's first key."""
        first = self.first_key + chunk * self.sizes.chunk
        zero_outside(self.values_ref, chunk, (self.item.key_start - first, self.item.key_end - first), self.sizes)
        return first


def _write(out_ref, lse_ref, scratch: Scratch, rows: Rows, row_start, row_end, scale, scale_of):
    """Divides, and writes the rows of the item, and no other's."""
    kv_heads, group, _, value_dim = out_ref.shape
    row = rows.first + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    lane = lax.broadcasted_iota(jnp.int32, (1, lse_ref.shape[1]), 1)
    by_lane_ref = scratch.by_lane

    def write(mine):
        """`mine` are the rows to write, None if all."""

        @pl.loop(0, kv_heads)
        def _(head):
            m, l = scratch.m[head, rows.at], jnp.sum(scratch.l[head, rows.at], axis=1, keepdims=True)
            l = jnp.broadcast_to(l, m.shape)
            factor, _ = factor_and_lse(l, m)
            if (value_scale := scale_of("value", head)) is not None:
                factor = factor * value_scale
            out = (scratch.acc[head, rows.at] * widen(factor, value_dim)).astype(out_ref.dtype)
            out = out.reshape(group, rows.count, value_dim)
            if mine is not None:
                out = jnp.where(mine[None], out, out_ref[head, :, rows.slice])
            out_ref[head, :, rows.slice] = out
            # A logarithm for each query head in a lane of its own, not one for each of the lanes that hold the same.
            for of_head, by_lane in ((l, by_lane_ref.at[0]), (m, by_lane_ref.at[1])):
                of_head, x = widen(of_head, lane.shape[1]).reshape(group, rows.count, -1), by_lane[: rows.count]
                for i in range(group):
                    x = jnp.where(lane == head * group + i, of_head[i], x)
                by_lane[: rows.count] = x

        l, m = by_lane_ref[0, : rows.count], by_lane_ref[1, : rows.count]
        _, lse = factor_and_lse(l, m * scale)
        lse_ref[rows.slice] = lse if mine is None else jnp.where(mine, lse, lse_ref[rows.slice])

    all_mine = (row_start <= rows.first) & (rows.first + rows.count <= row_end)
    pl.when(all_mine)(lambda: write(None))
    pl.when(jnp.logical_not(all_mine))(lambda: write((row >= row_start) & (row < row_end)))


def attend(call: Call, sizes: Sizes, splits: int, vmem_limit_bytes: int):
    """The results of sequences of more than one new token; the rows of others are anything.

    `splits` are the cores that share the KV heads.
    """
    problem, sequences = call.problem, call.sequences
    tokens, q_heads, num_kv_heads, group = problem.tokens, problem.q_heads, problem.num_kv_heads, problem.group
    block_q, attention, heads = sizes.block_q, problem.attention, num_kv_heads // splits
    first_row = schedule.first_row(call, block_q)
    items, count = schedule.work_items(call, block_q, first_row)
    tiles, packing = -(-tokens // block_q), sublanes(call.query.dtype)
    rows = tiles * block_q + (block_q - packing if problem.seqs > 1 else 0)  # the last tile may start so much later
    query = jnp.pad(call.query, ((0, rows - tokens), (0, 0), (0, 0)))
    query = query.reshape(-1, num_kv_heads, group, problem.head_dim).transpose(1, 2, 0, 3)
    pages, scales, held = fetching.pages_of(call, sizes), fetching.scales_of(call), fetching.Held.by(call)
    by_row = call.ranges is not None or call.tree is not None
    seen = _seen(call, tiles, block_q, first_row) if by_row else []

    def in_elements(*sizes):
        return [pl.Element(size) for size in sizes]

    def tile_of(split, item, head_start, tile, first_token, *_):
        return (split * heads, 0, pl.multiple_of(first_token[item], packing), 0)

    def lse_tile_of(split, item, head_start, tile, first_token, *_):
        return (split, pl.multiple_of(first_token[item], packing), 0)

    def seen_tile_of(split, item, head_start, tile, *_):
        return (tile[item], 0, 0)

    out, lse = pl.pallas_call(
        functools.partial(
            kernel,
            static=Static(
                sizes=sizes,
                softmax_scale=abs(attention.softmax_scale) or 1.0,
                soft_cap=attention.attn_logits_soft_cap,
                window=attention.sliding_window,
                value_dim=problem.value_dim,
                held=held,
                by_row=by_row,
                tree=call.tree is not None,
            ),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items) + len(scales),
            grid=(splits, jnp.maximum(count, 1)),
            in_specs=[
                pl.BlockSpec(in_elements(heads, group, block_q, problem.head_dim), tile_of),
                *(pl.BlockSpec((None, *x.shape[1:]), seen_tile_of) for x in seen),
                *fetching.in_hbm(pages),
            ],
            out_specs=[
                pl.BlockSpec(in_elements(heads, group, block_q, problem.value_dim), tile_of),
                pl.BlockSpec([None, *in_elements(block_q, q_heads // splits)], lse_tile_of),
            ],
            scratch_shapes=[fetching.buffers_of(problem, held, sizes, heads), Scratch.of(problem, sizes, heads)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, group, rows, problem.value_dim), query.dtype),
            jax.ShapeDtypeStruct((splits, rows, q_heads // splits), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # every index was clamped by call.flatten
        ),
        name="paged_prefill",
    )(call.kv_head_start.reshape(1), *items, *scales.values(), query, *seen, *(x for x in pages if x is not None))
    _, owned = schedule.owners(sequences, tokens)
    # Before the heads go back: XLA made both as one from a copy in HBM, and keeps on the chip what lies between two.
    out = jnp.where(owned[:, None], out[:, :, :tokens], 0)
    out = out.transpose(2, 0, 1, 3).reshape(tokens, q_heads, problem.value_dim)
    return out, lse[:, :tokens].transpose(1, 0, 2).reshape(tokens, q_heads)


def _seen(call: Call, tiles: int, block_q: int, first_row) -> list:
    """What each row sees, int32 [tiles, block_q, 2 + words], and the same with the rows last."""
    seen = schedule.seen_by_rows(call)
    if call.tree is not None:
        seen = jnp.concatenate([seen, lax.bitcast_convert_type(call.tree, jnp.int32)], axis=1)
    seen = jnp.pad(seen, ((0, (tiles + 1) * block_q - len(seen)), (0, 0)))
    seen = lax.dynamic_slice_in_dim(seen, first_row, tiles * block_q).reshape(tiles, block_q, -1)
    return [seen, seen.swapaxes(1, 2)]


def vmem_bytes(problem: Problem, sizes: Sizes) -> int:
    """VMEM that a call takes beside the buffers of pages, from above: running values and one step's intermediates."""
    itemsize = jnp.dtype(problem.dtype).itemsize
    value_dim = round_up(problem.value_dim, LANES)
    features = round_up(problem.head_dim, LANES) + value_dim
    rows = problem.q_heads * sizes.block_q
    tiles = 2 * rows * features * itemsize + 2 * sizes.block_q * round_up(problem.q_heads, LANES) * 4
    running = rows * (value_dim + 2 * LANES) * 4 + problem.group * sizes.block_q * LANES * 4
    per_row = sizes.chunk * (4 + itemsize)
    per_row += -(-sizes.chunk // schedule.DEPTH) * value_dim * 4
    by_row = problem.group * max(sizes.block_q, 2 * sizes.part) * LANES * 4
    buffers = by_row + 2 * problem.group * sizes.part * per_row + 2 * sizes.part * round_up(problem.q_heads, LANES) * 4
    # What the compiler keeps of a masked step besides.
    step = 2 * problem.group * sizes.part * (round_up(sizes.chunk, LANES) + features) * 4
    return tiles + running + buffers + step
