"""The TPU kernel for sequences of more than one new token: how one grid step attends, and the call.

One pallas_call runs all of them. Its grid walks over the items of schedule.py, the rows of one sequence in one tile of
the query; fetching.py brings the keys and values of an item, block by block.

A block is computed in chunks of keys. The rows of a part of the tile times the query heads of a group are the rows of
one matrix product with the chunk's keys; an item of few rows takes only the slice of the tile that holds them. Blocks
that every row sees whole are not masked, and the copies of the next one's pages are started within the loop of the
matrix products, where the scalar unit has nothing else to do.

The running maximum m, sum l and unnormalised output are those of the online softmax (Milakov and Gimelshein,
arXiv 1805.02867), in powers of 2, which is what the chip computes:

    m' = max(m, max_j s_j)    p_j = 2^(c (s_j - m'))    fade = 2^(c (m - m'))
    l' = fade l + sum_j p_j   out' = fade out + p v

with s = q . k and c = softmax_scale log2(e), or s = tanh(softmax_scale q . k / cap) and c = cap log2(e) with a soft
cap. The products of one KV head overlap with the softmax of another, as in tpu-inference's ragged paged attention
(arXiv 2604.15464). The logits of a product are four times what the registers hold, so logits, weights and weighted
values pass through buffers in VMEM, of which two are in turn.
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

from paged_prefill.lowering.call import Call, Problem
from paged_prefill.lowering.mosaic_tpu import fetching, schedule
from paged_prefill.lowering.mosaic_tpu.fetching import Fetcher, Pages, Scales, zero_outside, zero_scales_outside
from paged_prefill.lowering.mosaic_tpu.registers import lane_sums, widen
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Items, Sizes, largest_divisor, round_up, sublanes
from paged_prefill.primitive.attention import factor_and_lse

class Scratch(NamedTuple):
    """What is kept on the chip beside the buffers of pages."""

    acc: object  # VMEM [kv_heads, rows, value_dim] float32
    m: object  # VMEM [kv_heads, rows, LANES] float32, the same in every lane
    l: object  # VMEM [kv_heads, rows, LANES] float32, to be summed over the lanes
    logits: object  # VMEM [2, rows of a part, chunk] float32
    weights: object  # VMEM [2, rows of a part, chunk]
    fade: object  # VMEM [2, rows of a part, LANES] float32, the same in every lane
    sums: object  # VMEM [2, chunk / DEPTH, rows of a part, value_dim] float32, weights times values


class Rows(NamedTuple):
    """The slice of a tile that takes part in one matrix product. `at` is where its running values are kept."""

    first: object
    count: int
    at: object

    @property
    def slice(self):
        return pl.ds(self.first, self.count)


class Static(NamedTuple):
    """What is static about a launch."""

    sizes: Sizes
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    value_dim: int
    held: fetching.Held
    by_row: bool  # whether what rows see is read from arrays
    tree: bool


def kernel(head_start_ref, *refs, static: Static):
    """One grid step: one item, and the KV heads of one core."""
    sizes = static.sizes
    refs = iter(refs)
    items = Items(*itertools.islice(refs, len(Items._fields)))
    scales = Scales.of(refs, static.held)
    query_ref = next(refs)
    seen_refs = (next(refs), next(refs)) if static.by_row else None
    pages = Pages.of(refs, static.held)
    out_ref, lse_ref, buffers, scratch = refs
    kv_heads, group = query_ref.shape[:2]
    first_head = head_start_ref[0] + pl.program_id(0) * kv_heads
    item = pl.program_id(1)
    fetcher = Fetcher(items, item, pl.num_programs(1), pages, static.held, buffers, first_head, kv_heads, sizes)
    block_kv, position = fetcher.block_kv, items.position[item]
    row_start, row_end = items.row_start[item], items.row_end[item]
    key_start, key_end = items.key_start[item], items.key_end[item]
    scale_of = functools.partial(scales.of_head, items.pool[item], first_head)

    def mask_of(rows, first_key):
        if static.by_row:
            first_new = items.first_new[item] if static.tree else None
            return MaskByRow(*seen_refs, rows, first_key, row_start, row_end, first_new)
        return Mask(first_key, position + rows.first, key_start, key_end, static.window)

    def attend_block(block, parts, seen_whole, rows_of, masked_at_once):
        """Waits for a block, starts the copies of the one after it, and folds it into the running values."""
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
            scale_of=scale_of,
            slot_scales_of=functools.partial(buffers.scales_of_slots, static.held, slot),
        )

        def whole_chunk(chunk, copy=None):
            """Every row of the tile sees every key; `copy` starts to copy a run of the next block."""
            at_once, tile_parts = sizes.heads_at_once(kv_heads), [part_rows(part) for part in range(sizes.parts)]
            steps, first_run = kv_heads // at_once, chunk * sizes.runs_per_chunk
            share = sizes.runs_per_chunk // steps if sizes.runs_per_chunk % steps == 0 else 0
            for run in range(0 if share or copy is None else sizes.runs_per_chunk):
                copy(first_run, run)

            @pl.loop(0, steps)
            def _(heads):
                for run in range(0 if copy is None else share):
                    copy(first_run + heads * share, run)
                pairs = itertools.product(range(at_once), tile_parts)
                step(chunk, [(i % 2, heads * at_once + head, rows) for i, (head, rows) in enumerate(pairs)])

        def masked_chunk(chunk):
            first, at_once = first_key + chunk * sizes.chunk, largest_divisor(kv_heads, masked_at_once)
            if not static.by_row:
                zero_outside(values_ref, chunk, (key_start - first, key_end - first), sizes)

            @pl.loop(*parts)
            def _(part):
                rows = rows_of(part)
                mask = mask_of(rows, first)

                def first_keys(keys):
                    @pl.loop(0, kv_heads // at_once)
                    def _(heads):
                        # If every buffer's number were known when compiling, the compiler would keep the buffers in
                        # registers, of which there are too few, and spill.
                        buffers = [lax.rem(part + i, 2) for i in range(at_once)]
                        step(chunk, [(buffer, heads * at_once + i, rows) for i, buffer in enumerate(buffers)], mask, keys)

                # What lies behind the last key that these rows see adds zeros, which change no bit of sums by lanes.
                if sizes.chunk <= schedule.DEPTH or sizes.chunk % LANES or schedule.DEPTH % LANES:
                    return first_keys(sizes.chunk)
                end = key_end if static.by_row else jnp.minimum(key_end, position + rows.first + rows.count)
                ends_early = end - first <= schedule.DEPTH
                pl.when(ends_early)(lambda: first_keys(schedule.DEPTH))
                pl.when(jnp.logical_not(ends_early))(lambda: first_keys(sizes.chunk))

        def whole_block():
            """No chunk needs a mask, and every run of the next block is needed."""
            fetcher.wait(block, slot)
            copy = fetcher.copier(following, 1 - slot)
            pl.loop(0, sizes.chunks_per_block)(lambda chunk: whole_chunk(chunk, copy))

        def any_block():
            pl.when(exists)(lambda: fetcher.start(following, 1 - slot))
            fetcher.wait(block, slot)
            low = lax.div(jnp.maximum(key_start - first_key, 0), sizes.chunk)
            high = jnp.minimum(pl.cdiv(key_end - first_key, sizes.chunk), sizes.chunks_per_block)

            @pl.loop(low, high)
            def _(chunk):
                if seen_whole is None:
                    return masked_chunk(chunk)
                whole = seen_whole(first_key + chunk * sizes.chunk, sizes.chunk)
                pl.when(whole)(lambda: whole_chunk(chunk))
                pl.when(jnp.logical_not(whole))(lambda: masked_chunk(chunk))

        if seen_whole is None:
            return any_block()
        hot = seen_whole(first_key, block_kv) & exists & fetcher.whole(following)
        pl.when(hot)(whole_block)
        pl.when(jnp.logical_not(hot))(any_block)

    def part_rows(part):
        first = pl.multiple_of(part * sizes.part, sizes.part)
        return Rows(first, sizes.part, pl.ds(pl.multiple_of(part * group * sizes.part, sizes.part), group * sizes.part))

    def attend_tile():
        """The parts of the tile that hold the item's rows."""
        parts = lax.div(row_start, sizes.part), pl.cdiv(row_end, sizes.part)
        all_parts = (parts[0] == 0) & (parts[1] == sizes.parts)

        def seen_whole(first_key, keys):
            return all_parts & (items.whole_start[item] <= first_key) & (first_key + keys <= items.whole_end[item])

        attend_rows(parts, seen_whole, part_rows, 1)

    def attend_few_rows():
        """Only the slice of the tile that holds the item's rows."""
        rows = Rows(pl.multiple_of(lax.div(row_start, few) * few, few), few, pl.ds(0, group * few))
        attend_rows((0, 1), None, lambda _: rows, schedule.PRODUCTS_AT_ONCE)

    def attend_rows(parts, seen_whole, rows_of, masked_at_once):
        """Attends the rows rows_of(part) for every part in [start, end); `seen_whole` says which keys need no mask."""
        running = scratch.m, scratch.l, scratch.acc

        @pl.loop(*parts)
        def _(part):
            for ref, value in zip(running, (-jnp.inf, 0.0, 0.0)):
                at = rows_of(part).at
                ref[:, at] = jnp.full((kv_heads, at.size, ref.shape[-1]), value, jnp.float32)

        @pl.loop(fetcher.first_block, fetcher.last_block + 1)
        def _(block):
            attend_block(block, parts, seen_whole, rows_of, masked_at_once)

        @pl.loop(*parts)
        def _(part):
            scale = static.softmax_scale if static.soft_cap is None else static.soft_cap
            _write(out_ref, lse_ref, running, rows_of(part), row_start, row_end, scale, scale_of)

    fetcher.begin()
    few = sublanes(query_ref.dtype)
    if sizes.block_q > few:
        is_few = row_end - lax.div(row_start, few) * few <= few
        pl.when(is_few)(attend_few_rows)
        pl.when(jnp.logical_not(is_few))(attend_tile)
    else:
        attend_tile()


class Mask(NamedTuple):
    """What decides which keys of a chunk are visible: positions of its first key and first row, and the item's ends."""

    first_key: object
    first_position: object
    key_start: object
    key_end: object
    window: int | None

    def hide(self, s, group):
        """Logits [group * rows, keys] with -inf where a row does not see a key."""
        rows, keys = s.shape
        row = lax.broadcasted_iota(jnp.int32, (group, rows // group, 1), 1).reshape(rows, 1)
        end = jnp.minimum(self.first_position + row + 1, self.key_end) - self.first_key
        key = lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        visible = key < end
        if self.window is not None:
            visible &= key >= self.first_position + row + 1 - self.window - self.first_key
        return jnp.where(visible, s, -jnp.inf)

    def zero(self, values):
        """The values of keys that no row sees, zeroed: already done, where they lie."""
        return values

    def zero_scales(self, scales):
        """Scales [1, keys] with zeros for keys that no row of the item sees."""
        return zero_scales_outside(scales, (self.key_start - self.first_key, self.key_end - self.first_key))


class MaskByRow(NamedTuple):
    """The same where what each row sees is read from arrays: lo and hi of its keys, and the words of its tree.

    Attributes:
      seen_ref: VMEM [block_q, 2 + words]; `turned_ref` the same with the rows in lanes.
      rows: those that take part.
      row_start, row_end: the item's rows in the tile.
      first_new: where the sequence's first new token stands; None where there is no tree.
    """

    seen_ref: object
    turned_ref: object
    rows: Rows
    first_key: object
    row_start: object
    row_end: object
    first_new: object

    def hide(self, s, group):
        """Logits [group * rows, keys] with -inf where a row does not see a key."""
        seen = jnp.concatenate([self.seen_ref[self.rows.slice]] * group)
        row = self.rows.first + lax.broadcasted_iota(jnp.int32, (group, self.rows.count, 1), 1).reshape(-1, 1)
        columns = [seen[:, i : i + 1] for i in range(seen.shape[1])]
        return jnp.where(self._sees(columns, row, 1, s.shape[1]), s, -jnp.inf)

    def zero(self, values):
        """Values [keys, value_dim] with zeros for keys that no row of the item sees."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.turned_ref.shape[1]), 1)
        columns = [self.turned_ref[i : i + 1] for i in range(self.turned_ref.shape[0])]
        sees = jnp.where(self._sees(columns, row, 0, values.shape[0]), 1, 0)
        return jnp.where(jnp.max(sees, axis=1, keepdims=True) > 0, values, 0)

    def zero_scales(self, scales):
        """Scales [1, keys] with zeros for keys that no row of the item sees."""
        row = lax.broadcasted_iota(jnp.int32, (self.seen_ref.shape[0], 1), 0)
        columns = [self.seen_ref[:, i : i + 1] for i in range(self.seen_ref.shape[1])]
        sees = jnp.where(self._sees(columns, row, 1, scales.shape[1]), 1, 0)
        return jnp.where(jnp.max(sees, axis=0, keepdims=True) > 0, scales, 0.0)

    def _sees(self, columns, row, keys_axis, keys):
        lo, hi, *words = columns
        shape = (1, keys) if keys_axis else (keys, 1)
        key = self.first_key + lax.broadcasted_iota(jnp.int32, shape, keys_axis)
        sees = (key >= lo) & (key < hi) & (row >= self.row_start) & (row < self.row_end)
        for number, word in enumerate(words):
            bit = key - self.first_new - 32 * number
            there = lax.shift_right_logical(word + jnp.zeros_like(bit), jnp.clip(bit, 0, 31) + jnp.zeros_like(word))
            sees &= (bit < 0) | (bit > 31) | ((there & 1) == 1)
        return sees


def _attend_step(
    chunk, products, mask: Mask | MaskByRow | None = None, num_keys=None, *, query_ref, keys_ref, values_ref,
    scratch: Scratch, static: Static, scale_of, slot_scales_of,
):  # fmt: skip
    """Folds a chunk of keys into the running values of `products`: the buffer, the KV head and the Rows of each.

    Only the first `num_keys` of the chunk, if that is told. Neighbours have different buffers. `scale_of` is the scale of "key" or "value" of a KV head, `slot_scales_of` those of
    a chunk's slots; None where there are none.
    """
    sizes, softmax_scale, soft_cap = static.sizes, static.softmax_scale, static.soft_cap
    num_keys = num_keys or sizes.chunk
    m_ref, l_ref, acc_ref = scratch.m, scratch.l, scratch.acc
    group = query_ref.shape[1]
    runs = pl.ds(chunk * sizes.runs_per_chunk, sizes.runs_per_chunk)
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    to_exponent = (softmax_scale if soft_cap is None else soft_cap) * math.log2(math.e)

    def product(x, y, contract):
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def of_keys(ref, head):
        """What the chunk's keys have in `ref`, [num_keys, features]."""
        return ref[runs, head].astype(query_ref.dtype).reshape(sizes.chunk, -1)[:num_keys]

    def times_slot_scales(x, name, head, seen):
        """Logits or weights [rows, num_keys] times the scales of slots, if there are any; `seen` zeroes other keys'."""
        scales = slot_scales_of(name, head, chunk)
        return x if scales is None else x * seen(scales[:, :num_keys])

    def logits(buffer, head, rows):
        query = query_ref[head, :, rows.slice].reshape(group * rows.count, -1)
        keys = of_keys(keys_ref, head)
        for row in range(0, len(query), schedule.LOGIT_ROWS):
            strip = slice(row, min(row + schedule.LOGIT_ROWS, len(query)))
            scratch.logits[buffer, strip, :num_keys] = product(query[strip], keys, 1)

    def softmax(buffer, head, rows):
        count = group * rows.count
        s = times_slot_scales(scratch.logits[buffer, :count, :num_keys], "key", head, lambda scales: scales)
        if (scale := scale_of("key", head)) is not None:
            s = s * scale
        if soft_cap is not None:
            s = jnp.tanh(s * (softmax_scale / soft_cap))
        if mask is not None:
            s = mask.hide(s, group)
        m = m_ref[head, rows.at]
        m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        # A row that has seen no key yet would subtract infinity from itself.
        shift = m_next if mask is None else jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp2((s - widen(shift, num_keys)) * to_exponent)
        fade = jnp.exp2((m - shift) * to_exponent)
        m_ref[head, rows.at] = m_next
        l_ref[head, rows.at] = l_ref[head, rows.at] * fade + lane_sums(p)
        p = times_slot_scales(p, "value", head, lambda x: x if mask is None else mask.zero_scales(x))  # 0 * NaN is NaN
        scratch.weights[buffer, :count, :num_keys] = p.astype(query_ref.dtype)
        scratch.fade[buffer, :count] = fade

    def add_values(buffer, head, rows):
        count = group * rows.count
        values = of_keys(values_ref, head)[:, : static.value_dim]
        if mask is not None:
            values = mask.zero(values)
        parts = range(-(-num_keys // schedule.DEPTH))
        for part in parts:
            keys = slice(part * schedule.DEPTH, min((part + 1) * schedule.DEPTH, num_keys))
            scratch.sums[buffer, part, :count] = product(scratch.weights[buffer, :count, keys], values[keys], 0)
        acc = acc_ref[head, rows.at] * widen(scratch.fade[buffer, :count], acc_ref.shape[2])
        acc_ref[head, rows.at] = acc + sum(scratch.sums[buffer, part, :count] for part in parts)

    # The logits of the next product come first: the matrix unit computes them while the softmax runs.
    logits(*products[0])
    for current, following in zip(products, [*products[1:], None]):
        if following is not None:
            logits(*following)
        softmax(*current)
        add_values(*current)


def _write(out_ref, lse_ref, running, rows: Rows, row_start, row_end, scale, scale_of):
    """Divides, and writes the rows of the item, and no other's."""
    m_ref, l_ref, acc_ref = running
    kv_heads, group, _, value_dim = out_ref.shape
    row = rows.first + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    mine = (row >= row_start) & (row < row_end)
    lane = lax.broadcasted_iota(jnp.int32, (1, lse_ref.shape[1]), 1)

    @pl.loop(0, kv_heads)
    def _(head):
        l = jnp.sum(l_ref[head, rows.at], axis=1, keepdims=True)
        l = jnp.broadcast_to(l, (l.shape[0], LANES))
        factor, head_lse = factor_and_lse(l, m_ref[head, rows.at] * scale)
        if (value_scale := scale_of("value", head)) is not None:
            factor = factor * value_scale
        out = (acc_ref[head, rows.at] * widen(factor, value_dim)).astype(out_ref.dtype)
        out = out.reshape(group, rows.count, value_dim)
        out_ref[head, :, rows.slice] = jnp.where(mine[None], out, out_ref[head, :, rows.slice])
        head_lse = widen(head_lse, lse_ref.shape[1]).reshape(group, rows.count, -1)
        lse = lse_ref[rows.slice]
        for i in range(group):
            lse = jnp.where(mine & (lane == head * group + i), head_lse[i], lse)
        lse_ref[rows.slice] = lse


def attend(call: Call, sizes: Sizes, splits: int, vmem_limit_bytes: int):
    """The results of sequences of more than one new token; the rows of others are anything.

    `splits` are the cores that share the KV heads.
    """
    problem, sequences = call.problem, call.sequences
    tokens, q_heads, num_kv_heads, group = problem.tokens, problem.q_heads, problem.num_kv_heads, problem.group
    block_q, attention, heads = sizes.block_q, problem.attention, num_kv_heads // splits
    items, count = schedule.work_items(call, block_q)
    tiles = -(-tokens // block_q)
    query = jnp.pad(call.query, ((0, tiles * block_q - tokens), (0, 0), (0, 0)))
    query = query.reshape(-1, num_kv_heads, group, problem.head_dim).transpose(1, 2, 0, 3)
    pages, scales, held = fetching.pages_of(call, sizes), fetching.scales_of(call), fetching.Held.by(call)
    by_row = call.ranges is not None or call.tree is not None
    seen = _seen(call, tiles, block_q) if by_row else []

    def tile_of(split, item, head_start, tile, *_):
        return (split, 0, tile[item], 0)

    def lse_tile_of(split, item, head_start, tile, *_):
        return (split, tile[item], 0)

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
                pl.BlockSpec((heads, group, block_q, problem.head_dim), tile_of),
                *(pl.BlockSpec((None, *x.shape[1:]), seen_tile_of) for x in seen),
                *fetching.in_hbm(pages),
            ],
            out_specs=[
                pl.BlockSpec((heads, group, block_q, problem.value_dim), tile_of),
                pl.BlockSpec((None, block_q, q_heads // splits), lse_tile_of),
            ],
            scratch_shapes=[fetching.buffers_of(problem, held, sizes, heads), scratch_of(problem, sizes, heads)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, group, tiles * block_q, problem.value_dim), query.dtype),
            jax.ShapeDtypeStruct((splits, tiles * block_q, q_heads // splits), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # every index was clamped by call.flatten
        ),
        name="paged_prefill",
    )(call.kv_head_start.reshape(1), *items, *scales.values(), query, *seen, *(x for x in pages if x is not None))
    out = out[:, :, :tokens].transpose(2, 0, 1, 3).reshape(tokens, q_heads, problem.value_dim)
    return out, lse[:, :tokens].transpose(1, 0, 2).reshape(tokens, q_heads)


def _seen(call: Call, tiles: int, block_q: int) -> list:
    """What each row sees, int32 [tiles, block_q, 2 + words], and the same with the rows last."""
    seen = schedule.seen_by_rows(call)
    if call.tree is not None:
        seen = jnp.concatenate([seen, lax.bitcast_convert_type(call.tree, jnp.int32)], axis=1)
    seen = jnp.pad(seen, ((0, tiles * block_q - len(seen)), (0, 0))).reshape(tiles, block_q, -1)
    return [seen, seen.swapaxes(1, 2)]


def scratch_of(problem: Problem, sizes: Sizes, heads: int) -> Scratch:
    """The scratch for so many KV heads."""
    rows, part_rows = problem.group * sizes.block_q, problem.group * sizes.part
    return Scratch(
        acc=pltpu.VMEM((heads, rows, problem.value_dim), jnp.float32),
        m=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        l=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        logits=pltpu.VMEM((2, part_rows, sizes.chunk), jnp.float32),
        weights=pltpu.VMEM((2, part_rows, sizes.chunk), jnp.dtype(problem.dtype)),
        fade=pltpu.VMEM((2, part_rows, LANES), jnp.float32),
        sums=pltpu.VMEM((2, -(-sizes.chunk // schedule.DEPTH), part_rows, problem.value_dim), jnp.float32),
    )


def vmem_bytes(problem: Problem, sizes: Sizes) -> int:
    """VMEM that a call takes beside the buffers of pages, from above: running values and one step's intermediates."""
    itemsize = jnp.dtype(problem.dtype).itemsize
    value_dim = round_up(problem.value_dim, LANES)
    features = round_up(problem.head_dim, LANES) + value_dim
    rows = problem.q_heads * sizes.block_q
    tiles = 2 * rows * features * itemsize + 2 * sizes.block_q * round_up(problem.q_heads, LANES) * 4
    running = rows * (value_dim + 2 * LANES) * 4
    per_row = sizes.chunk * (4 + itemsize) + LANES * 4
    per_row += -(-sizes.chunk // schedule.DEPTH) * value_dim * 4
    buffers = 2 * problem.group * sizes.part * per_row
    # What the compiler keeps of a masked step besides.
    step = 2 * problem.group * sizes.part * (round_up(sizes.chunk, LANES) + features) * 4
    return tiles + running + buffers + step
