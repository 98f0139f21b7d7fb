"""The body of the TPU kernel: how one grid step fetches and attends.

An item walks over its keys in blocks, from its window's start to its causal limit; blocks lie on one fixed grid of a
sequence's keys, so the bits of a row do not depend on the pack it is in. Two buffers hold blocks: while one is computed
with, the pages of the next block, be it this item's or the next one's, are copied into the other, each page by one
strided copy for all KV heads. The page table stays in HBM, however large: an item's row of it is copied to SMEM while
the item before it computes.

A block is computed in chunks of keys. The rows of a part of the tile times the query heads of a group are the rows of
one matrix product with the chunk's keys; an item of few rows, as in decoding, takes only the slice of the tile that
holds them. Blocks that every row sees whole are not masked, and the copies of the next one's pages are started within
the loop of the matrix products, where the scalar unit has nothing else to do.

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

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_tpu import schedule
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Items, Sizes, largest_divisor, sublanes
from paged_prefill.primitive.attention import factor_and_lse

COPIES_AT_ONCE = 4  # page copies started in one step of a loop, for the scalar unit to overlap


class Scratch(NamedTuple):
    """What the kernel keeps on the chip from one grid step to the next."""

    keys: object  # VMEM [2, runs_per_block, kv_heads, run, head_dim]
    values: object  # VMEM [2, runs_per_block, kv_heads, run, value_dim]
    table: object  # SMEM [2 * pages_per_seq]
    acc: object  # VMEM [kv_heads, rows, value_dim] float32
    m: object  # VMEM [kv_heads, rows, LANES] float32, the same in every lane
    l: object  # VMEM [kv_heads, rows, LANES] float32, to be summed over the lanes
    logits: object  # VMEM [2, rows of a part, chunk] float32
    weights: object  # VMEM [2, rows of a part, chunk]
    fade: object  # VMEM [2, rows of a part, LANES] float32, the same in every lane
    sums: object  # VMEM [2, chunk / DEPTH, rows of a part, value_dim] float32, weights times values
    slot: object  # SMEM [1], the buffer that holds the next block to compute with
    page_sems: object  # DMA [2]
    table_sems: object  # DMA [2]


class Rows(NamedTuple):
    """The slice of a tile that takes part in one matrix product. `at` is where its running values are kept."""

    first: object
    count: int
    at: object

    @property
    def slice(self):
        return pl.ds(self.first, self.count)


def kernel(head_start_ref, *refs, sizes: Sizes, softmax_scale, soft_cap, window):
    """One grid step: one item, and the KV heads of one core."""
    items = Items(*refs[: len(Items._fields)])
    query_ref, key_pages, value_pages, table_hbm, out_ref, lse_ref, *scratch = refs[len(Items._fields) :]
    scratch = Scratch(*scratch)
    kv_heads, group = query_ref.shape[:2]
    runs_per_block = sizes.runs_per_block
    block_kv = runs_per_block * sizes.run
    item, num_items = pl.program_id(1), pl.num_programs(1)
    first_head = head_start_ref[0] + pl.program_id(0) * kv_heads
    position = items.position[item]
    row_start, row_end = items.row_start[item], items.row_end[item]
    key_start, key_end = items.key_start[item], items.key_end[item]
    first_block = lax.div(key_start, block_kv)
    last_block = jnp.maximum(lax.div(key_end - 1, block_kv), first_block)

    def table_slot(item):
        width = table_hbm.shape[-1]
        return pl.multiple_of(lax.rem(item, 2) * width, LANES), width

    def table_copy(item):
        slot = scratch.table.at[pl.ds(*table_slot(item))]
        return pltpu.make_async_copy(table_hbm.at[items.seq[item], 0], slot, scratch.table_sems.at[lax.rem(item, 2)])

    def run_copier(item, block, slot):
        """The function that starts to copy a run of a block."""
        heads = pl.ds(first_head, kv_heads)
        pool, sem, table = items.pool[item], scratch.page_sems.at[slot], table_slot(item)[0]

        def start(at):
            run = block * runs_per_block + at
            index = scratch.table[table + lax.div(run, sizes.runs_per_page)]
            if sizes.runs_per_page > 1:
                index = index * sizes.runs_per_page + lax.rem(run, sizes.runs_per_page)
            for pages, buffer in ((key_pages, scratch.keys), (value_pages, scratch.values)):
                pltpu.make_async_copy(pages.at[pool, heads, index], buffer.at[slot, at], sem).start()

        return start

    def needed_runs(item, block):
        """Which of the block's runs hold needed keys, as [start, end), and whether that is all of them."""
        first = block * runs_per_block
        start = jnp.maximum(lax.div(items.key_start[item], sizes.run) - first, 0)
        end = jnp.minimum(pl.cdiv(items.key_end[item], sizes.run) - first, runs_per_block)
        return start, end, (start == 0) & (end == runs_per_block)

    def start_fetch(item, block, slot):
        start, end, _ = needed_runs(item, block)
        copy = run_copier(item, block, slot)
        rest = end - lax.rem(jnp.maximum(end - start, 0), COPIES_AT_ONCE)

        @pl.loop(start, rest, step=COPIES_AT_ONCE)
        def _(at):
            for i in range(COPIES_AT_ONCE):
                copy(at + i)

        pl.loop(rest, end)(copy)

    def fetch_next(block, slot):
        """Starts to fetch the block after this one, which may be the next item's first."""

        @pl.when(block < last_block)
        def _():
            start_fetch(item, block + 1, slot)

        @pl.when((block == last_block) & (item + 1 < num_items))
        def _():
            table_copy(item + 1).wait()
            start_fetch(item + 1, lax.div(items.key_start[item + 1], block_kv), slot)

    def wait_fetch(block, slot):
        start, end, whole = needed_runs(item, block)

        def wait(*at):  # a copy of the same size stands for the ones that were started
            for buffer in (scratch.keys, scratch.values):
                there = buffer.at[slot, *at]
                pltpu.make_async_copy(there, there, scratch.page_sems.at[slot]).wait()

        pl.when(whole)(wait)
        pl.when(jnp.logical_not(whole))(lambda: pl.loop(start, end)(wait))

    def attend_block(block, parts, whole_block, rows_of, masked_at_once):
        """Waits for a block, starts the copies of the one after it, and folds it into the running values."""
        slot = scratch.slot[0]
        scratch.slot[0] = 1 - slot
        step = functools.partial(
            _attend_step,
            query_ref=query_ref,
            keys_ref=scratch.keys.at[slot],
            values_ref=scratch.values.at[slot],
            scratch=scratch,
            sizes=sizes,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
        )
        first_key = block * block_kv

        def unmasked():
            """Every row of the tile sees every key, and every page of the next block is needed."""
            wait_fetch(block, slot)
            at_once, tile_parts = sizes.heads_at_once(kv_heads), [part_rows(part) for part in range(sizes.parts)]
            steps = kv_heads // at_once
            copy = run_copier(item, block + 1, 1 - slot)
            share = sizes.runs_per_chunk // steps if sizes.runs_per_chunk % steps == 0 else 0

            @pl.loop(0, sizes.chunks_per_block)
            def _(chunk):
                if not share:
                    for run in range(sizes.runs_per_chunk):
                        copy(chunk * sizes.runs_per_chunk + run)

                @pl.loop(0, steps)
                def _(heads):
                    for run in range(share):
                        copy(chunk * sizes.runs_per_chunk + heads * share + run)
                    pairs = itertools.product(range(at_once), tile_parts)
                    step(chunk, [(i % 2, heads * at_once + head, rows) for i, (head, rows) in enumerate(pairs)])

        def masked():
            fetch_next(block, 1 - slot)
            wait_fetch(block, slot)
            at_once = largest_divisor(kv_heads, masked_at_once)
            low = lax.div(jnp.maximum(key_start - first_key, 0), sizes.chunk)
            high = jnp.minimum(pl.cdiv(key_end - first_key, sizes.chunk), sizes.chunks_per_block)

            @pl.loop(low, high)
            def _(chunk):
                @pl.loop(*parts)
                def _(part):
                    rows = rows_of(part)
                    mask = Mask(first_key + chunk * sizes.chunk, position + rows.first, key_start, key_end, window)

                    @pl.loop(0, kv_heads // at_once)
                    def _(heads):
                        # If every buffer's number were known when compiling, the compiler would keep the buffers in
                        # registers, of which there are too few, and spill.
                        buffers = [lax.rem(part + i, 2) for i in range(at_once)]
                        step(chunk, [(buffer, heads * at_once + i, rows) for i, buffer in enumerate(buffers)], mask)

        if whole_block is None:
            return masked()
        whole = whole_block(first_key)
        pl.when(whole)(unmasked)
        pl.when(jnp.logical_not(whole))(masked)

    def part_rows(part):
        first = pl.multiple_of(part * sizes.part, sizes.part)
        return Rows(first, sizes.part, pl.ds(pl.multiple_of(part * group * sizes.part, sizes.part), group * sizes.part))

    def attend_tile():
        """The parts of the tile that hold the item's rows."""
        parts = lax.div(row_start, sizes.part), pl.cdiv(row_end, sizes.part)
        all_parts = (parts[0] == 0) & (parts[1] == sizes.parts)

        def whole_block(first_key):
            end = first_key + block_kv
            whole = all_parts & (end <= position + row_start + 1) & (end + block_kv <= key_end)
            return whole if window is None else whole & (first_key > position + row_end - 1 - window)

        attend_rows(parts, whole_block, part_rows, 1)

    def attend_few_rows():
        """As in decoding: only the slice of the tile that holds the item's rows."""
        rows = Rows(pl.multiple_of(lax.div(row_start, few) * few, few), few, pl.ds(0, group * few))
        attend_rows((0, 1), None, lambda _: rows, schedule.PRODUCTS_AT_ONCE)

    def attend_rows(parts, whole_block, rows_of, masked_at_once):
        """Attends the rows rows_of(part) for every part in [start, end); `whole_block` says which need no mask."""
        running = scratch.m, scratch.l, scratch.acc

        @pl.loop(*parts)
        def _(part):
            for ref, value in zip(running, (-jnp.inf, 0.0, 0.0)):
                at = rows_of(part).at
                ref[:, at] = jnp.full((kv_heads, at.size, ref.shape[-1]), value, jnp.float32)

        @pl.loop(first_block, last_block + 1)
        def _(block):
            attend_block(block, parts, whole_block, rows_of, masked_at_once)

        @pl.loop(*parts)
        def _(part):
            scale = softmax_scale if soft_cap is None else soft_cap
            _write(out_ref, lse_ref, running, rows_of(part), row_start, row_end, scale=scale)

    @pl.when(item == 0)
    def first_fetch():
        table_copy(0).start()
        table_copy(0).wait()
        scratch.slot[0] = 0
        start_fetch(0, first_block, 0)

    @pl.when(item + 1 < num_items)
    def fetch_next_table():
        table_copy(item + 1).start()

    few = sublanes(query_ref.dtype)
    if sizes.block_q > few:
        is_few = row_end - lax.div(row_start, few) * few <= few
        pl.when(is_few)(attend_few_rows)
        pl.when(jnp.logical_not(is_few))(attend_tile)
    else:
        attend_tile()


class Mask(NamedTuple):
    """What decides which keys of a chunk are visible: positions of its first key and first row, and the item's keys."""

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
        """Values [keys, value_dim] with zeros for keys that no row sees: they may be anything, and 0 * NaN is NaN."""
        key = self.first_key + lax.broadcasted_iota(jnp.int32, (values.shape[0], 1), 0)
        return jnp.where((key >= self.key_start) & (key < self.key_end), values, 0)


def _attend_step(
    chunk, products, mask: Mask | None = None, *, query_ref, keys_ref, values_ref, scratch: Scratch, sizes: Sizes,
    softmax_scale, soft_cap,
):  # fmt: skip
    """Folds a chunk of keys into the running values of `products`: the buffer, the KV head and the Rows of each.

    Neighbours have different buffers.
    """
    m_ref, l_ref, acc_ref = scratch.m, scratch.l, scratch.acc
    group = query_ref.shape[1]
    runs = pl.ds(chunk * sizes.runs_per_chunk, sizes.runs_per_chunk)
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    to_exponent = (softmax_scale if soft_cap is None else soft_cap) * math.log2(math.e)

    def product(x, y, contract):
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def logits(buffer, head, rows):
        query = query_ref[head, :, rows.slice].reshape(group * rows.count, -1)
        keys = keys_ref[runs, head].reshape(sizes.chunk, -1)
        for row in range(0, len(query), schedule.LOGIT_ROWS):
            strip = slice(row, min(row + schedule.LOGIT_ROWS, len(query)))
            scratch.logits[buffer, strip] = product(query[strip], keys, 1)

    def softmax(buffer, head, rows):
        count = group * rows.count
        s = scratch.logits[buffer, :count]
        if soft_cap is not None:
            s = jnp.tanh(s * (softmax_scale / soft_cap))
        if mask is not None:
            s = mask.hide(s, group)
        m = m_ref[head, rows.at]
        m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        # A row that has seen no key yet would subtract infinity from itself.
        shift = m_next if mask is None else jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp2((s - _widen(shift, sizes.chunk)) * to_exponent)
        fade = jnp.exp2((m - shift) * to_exponent)
        m_ref[head, rows.at] = m_next
        l_ref[head, rows.at] = l_ref[head, rows.at] * fade + _lane_sums(p)
        scratch.weights[buffer, :count] = p.astype(values_ref.dtype)
        scratch.fade[buffer, :count] = fade

    def add_values(buffer, head, rows):
        count = group * rows.count
        values = values_ref[runs, head].reshape(sizes.chunk, -1)
        if mask is not None:
            values = mask.zero(values)
        parts = range(scratch.sums.shape[1])
        for part in parts:
            keys = slice(part * schedule.DEPTH, min((part + 1) * schedule.DEPTH, sizes.chunk))
            scratch.sums[buffer, part, :count] = product(scratch.weights[buffer, :count, keys], values[keys], 0)
        acc = acc_ref[head, rows.at] * _widen(scratch.fade[buffer, :count], acc_ref.shape[2])
        acc_ref[head, rows.at] = acc + sum(scratch.sums[buffer, part, :count] for part in parts)

    # The logits of the next product come first: the matrix unit computes them while the softmax runs.
    logits(*products[0])
    for current, following in zip(products, [*products[1:], None]):
        if following is not None:
            logits(*following)
        softmax(*current)
        add_values(*current)


def _write(out_ref, lse_ref, running, rows: Rows, row_start, row_end, *, scale):
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
        out = (acc_ref[head, rows.at] * _widen(factor, value_dim)).astype(out_ref.dtype)
        out = out.reshape(group, rows.count, value_dim)
        out_ref[head, :, rows.slice] = jnp.where(mine[None], out, out_ref[head, :, rows.slice])
        head_lse = _widen(head_lse, lse_ref.shape[1]).reshape(group, rows.count, -1)
        lse = lse_ref[rows.slice]
        for i in range(group):
            lse = jnp.where(mine & (lane == head * group + i), head_lse[i], lse)
        lse_ref[rows.slice] = lse


def _widen(x, width):
    """[rows, LANES], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def _lane_sums(p):
    """[rows, keys] as [rows, LANES] with the same sum over the lanes."""
    keys = p.shape[1]
    if keys % LANES == 0:
        return sum(p[:, i : i + LANES] for i in range(0, keys, LANES))
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane == 0, jnp.sum(p, axis=1, keepdims=True), 0.0)
