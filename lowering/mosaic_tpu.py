"""The TPU kernel, in Pallas Mosaic: flash attention with pages fetched by asynchronous copies.

One pallas_call runs a whole pack. Its grid walks over the items of mosaic_tpu_schedule.py: the rows of one sequence in
one tile of the query. An item walks over its keys in blocks, from its window's start to its causal limit; blocks lie on
one fixed grid of a sequence's keys, so the bits of a row do not depend on the pack or tile it is in. Two buffers hold blocks:
while one is computed with, the pages of the next block, be it this item's or the next one's, are copied into the
other, each page by one strided copy for all KV heads. The page table stays in HBM; an item's row of it is copied to SMEM ahead.

A block is computed in chunks of keys. The query rows of a KV head's group, times the rows of the tile, are the rows
of one matrix product with the chunk's keys. Only chunks that some row sees in part are masked. The running maximum m, sum l and
unnormalised output are those of the online softmax (Milakov and Gimelshein, arXiv 1805.02867), with powers of 2:

    m' = max(m, max_j s_j)    p_j = 2^(c (s_j - m'))    l' = 2^(c (m - m')) l + sum_j p_j    out' = 2^(c (m - m')) out + p v

where s = q . k and c = softmax_scale log2(e), or s = tanh(softmax_scale q . k / cap) and c = cap log2(e) with a soft cap.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.config import PrefillPageAttentionConfig
from paged_prefill.lowering.contract import Device, Problem, Sequences
from paged_prefill.lowering.mosaic_tpu_schedule import Items, work_items

LANES = 128
CHUNK = 512  # keys of one matrix product


def supports(problem: Problem, device: Device) -> str | None:
    return None


def heuristic_config(problem: Problem, device: Device) -> PrefillPageAttentionConfig:
    return PrefillPageAttentionConfig(block_q=128, block_kv=1024)


def candidate_configs(problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
    return [heuristic_config(problem, device)]


class Scratch(NamedTuple):
    """What the kernel keeps on the chip from one grid step to the next."""

    keys: object  # VMEM [2, pages, kv_heads, page_size, head_dim]
    values: object  # VMEM [2, pages, kv_heads, page_size, value_dim]
    table: object  # SMEM [2, 1, pages_per_seq]
    acc: object  # VMEM [kv_heads, rows, value_dim] float32
    m: object  # VMEM [kv_heads, rows, LANES] float32, the same in every lane
    l: object  # VMEM [kv_heads, rows, LANES] float32, to be summed over the lanes
    slot: object  # SMEM [1], the buffer that holds the next block to compute with
    page_sems: object  # DMA [2]
    table_sems: object  # DMA [2]


def attend(
    query,
    key_pages,
    value_pages,
    sequences: Sequences,
    kv_head_start,
    *,
    num_kv_heads: int,
    softmax_scale: float,
    attn_logits_soft_cap: float | None,
    sliding_window: int | None,
    config: PrefillPageAttentionConfig,
):
    """See contract.py. Uses block_q and block_kv."""
    tokens, q_heads, head_dim = query.shape
    *_, page_size, value_dim = value_pages.shape
    group = q_heads // num_kv_heads
    block_q, block_kv = config.block_q, config.block_kv
    pages_per_block = block_kv // page_size
    capacity = sequences.page_indices.shape[1] * page_size
    items, count = work_items(sequences, tokens, capacity, block_q, sliding_window)

    # With a scale that is not positive, the sign goes to the query: the maximum is taken of unscaled products.
    if softmax_scale <= 0:
        query = query * jnp.sign(softmax_scale).astype(query.dtype)
    by_group = query.reshape(tokens, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    table = jnp.pad(sequences.page_indices, ((0, 0), (0, -sequences.page_indices.shape[1] % LANES)))
    table = table[:, None]

    rows = group * block_q
    scratch = Scratch(
        keys=pltpu.VMEM((2, pages_per_block, num_kv_heads, page_size, head_dim), key_pages.dtype),
        values=pltpu.VMEM((2, pages_per_block, num_kv_heads, page_size, value_dim), value_pages.dtype),
        table=pltpu.SMEM((2, *table.shape[1:]), jnp.int32),
        acc=pltpu.VMEM((num_kv_heads, rows, value_dim), jnp.float32),
        m=pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
        l=pltpu.VMEM((num_kv_heads, rows, LANES), jnp.float32),
        slot=pltpu.SMEM((1,), jnp.int32),
        page_sems=pltpu.SemaphoreType.DMA((2,)),
        table_sems=pltpu.SemaphoreType.DMA((2,)),
    )

    def tile_of(item, head_start, tile, *_):
        return (0, 0, tile[item], 0)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    kernel = functools.partial(
        _kernel,
        softmax_scale=abs(softmax_scale) or 1.0,
        soft_cap=attn_logits_soft_cap,
        window=sliding_window,
    )
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items),
            grid=(jnp.maximum(count, 1),),
            in_specs=[pl.BlockSpec((num_kv_heads, group, block_q, head_dim), tile_of), in_hbm, in_hbm, in_hbm],
            out_specs=[
                pl.BlockSpec((num_kv_heads, group, block_q, value_dim), tile_of),
                pl.BlockSpec((block_q, q_heads), lambda item, head_start, tile, *_: (tile[item], 0)),
            ],
            scratch_shapes=list(scratch),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, group, tokens, value_dim), query.dtype),
            jax.ShapeDtypeStruct((tokens, q_heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=100 * 2**20,
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        name="paged_prefill",
    )(kv_head_start.reshape(1), *items, by_group, key_pages, value_pages, table)

    # Rows that no sequence owns were not written.
    token = jnp.arange(tokens, dtype=jnp.int32)
    owned = jnp.any((sequences.start <= token[:, None]) & (token[:, None] < sequences.start + sequences.length), axis=1)
    out = out.transpose(2, 0, 1, 3).reshape(tokens, q_heads, value_dim)
    return jnp.where(owned[:, None, None], out, 0), jnp.where(owned[:, None], lse, -jnp.inf)


def _kernel(head_start_ref, *refs, softmax_scale, soft_cap, window):
    """One grid step: one item."""
    items = Items(*refs[: len(Items._fields)])
    query_ref, key_pages, value_pages, table_hbm, out_ref, lse_ref, *scratch = refs[len(Items._fields) :]
    scratch = Scratch(*scratch)
    kv_heads, group, block_q, _ = query_ref.shape
    _, pages_per_block, _, page_size, value_dim = scratch.values.shape
    block_kv = pages_per_block * page_size
    chunk = min(CHUNK, block_kv)
    pages_per_chunk = chunk // page_size
    rows = group * block_q
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    to_exponent = (softmax_scale if soft_cap is None else soft_cap) * math.log2(math.e)

    item, num_items = pl.program_id(0), pl.num_programs(0)
    position = items.position[item]
    row_start, row_end = items.row_start[item], items.row_end[item]
    key_start, key_end = items.key_start[item], items.key_end[item]
    first_block = key_start // block_kv
    last_block = jnp.maximum((key_end - 1) // block_kv, first_block)

    # Fetching

    def table_copy(item):
        slot = lax.rem(item, 2)
        return pltpu.make_async_copy(table_hbm.at[items.seq[item]], scratch.table.at[slot], scratch.table_sems.at[slot])

    def page_copies(item, page, slot, at):
        heads = pl.ds(head_start_ref[0], kv_heads)
        index = scratch.table[lax.rem(item, 2), 0, page]
        sem = scratch.page_sems.at[slot]
        return (
            pltpu.make_async_copy(pages.at[items.pool[item], heads, index], buffer.at[slot, at], sem)
            for pages, buffer in ((key_pages, scratch.keys), (value_pages, scratch.values))
        )

    def needed_pages(item, block):  # [from, to) within the block
        first = block * pages_per_block
        start = items.key_start[item] // page_size - first
        end = (items.key_end[item] + page_size - 1) // page_size - first
        return jnp.maximum(start, 0), jnp.minimum(end, pages_per_block)

    def start_fetch(item, block, slot):
        start, end = needed_pages(item, block)
        first = block * pages_per_block
        whole = (start == 0) & (end == pages_per_block)

        def start_page(at):
            for copy in page_copies(item, first + at, slot, at):
                copy.start()

        @pl.when(whole)
        def _():
            for at in range(pages_per_block):
                start_page(at)

        @pl.when(jnp.logical_not(whole))
        def _():
            pl.loop(start, end)(start_page)

    def wait_fetch(item, block, slot):
        start, end = needed_pages(item, block)
        whole = (start == 0) & (end == pages_per_block)
        sem = scratch.page_sems.at[slot]

        @pl.when(whole)
        def _():
            for buffer in (scratch.keys, scratch.values):
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], sem).wait()

        @pl.when(jnp.logical_not(whole))
        def _():
            @pl.loop(start, end)
            def _(at):
                for buffer in (scratch.keys, scratch.values):
                    pltpu.make_async_copy(buffer.at[slot, at], buffer.at[slot, at], sem).wait()

    @pl.when(item == 0)
    def prologue():
        table_copy(0).start()
        table_copy(0).wait()
        scratch.slot[0] = 0
        start_fetch(0, first_block, 0)

    @pl.when(item + 1 < num_items)
    def fetch_next_table():
        table_copy(item + 1).start()

    # Computing

    def attend_chunk(slot, block, index, masked):
        """Folds one chunk of keys into m, l and acc of every head."""
        pages = pl.ds(index * pages_per_chunk, pages_per_chunk)
        first_key = block * block_kv + index * chunk
        if masked:
            key = first_key + lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
            row = lax.broadcasted_iota(jnp.int32, (group, block_q, 1), 1).reshape(rows, 1)
            visible = (key <= position + row) & (key < key_end)
            if window is not None:
                visible &= key > position + row - window
            key = first_key + lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
            exists = (key >= key_start) & (key < key_end)

        def softmax(head):
            query = query_ref[head].reshape(rows, -1)
            keys = scratch.keys[slot, pages, head].reshape(chunk, -1)
            s = lax.dot_general(
                query, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            if soft_cap is not None:
                s = jnp.tanh(s * (softmax_scale / soft_cap))
            if masked:
                s = jnp.where(visible, s, -jnp.inf)
            m = scratch.m[head]
            m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
            shift = jnp.where(m_next == -jnp.inf, 0.0, m_next) if masked else m_next
            p = jnp.exp2((s - _widen(shift, chunk)) * to_exponent)
            fade = jnp.exp2((m - shift) * to_exponent)
            scratch.m[head] = m_next
            scratch.l[head] = scratch.l[head] * fade + _lane_sums(p)
            return p.astype(scratch.values.dtype), fade

        def add_values(head, p, fade):
            values = scratch.values[slot, pages, head].reshape(chunk, -1)
            if masked:
                values = jnp.where(exists, values, 0)
            update = lax.dot_general(
                p, values, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            scratch.acc[head] = scratch.acc[head] * _widen(fade, value_dim) + update

        # The values of one head are added while the softmax of the next one runs.
        previous = None
        for head in range(kv_heads):
            current = head, *softmax(head)
            if previous is not None:
                add_values(*previous)
            previous = current
        add_values(*previous)

    def attend_block(block, _):
        slot = scratch.slot[0]
        is_last = block == last_block

        @pl.when(jnp.logical_not(is_last) | (item + 1 < num_items))
        def fetch_next():
            next_item = jnp.minimum(item + is_last.astype(jnp.int32), num_items - 1)

            @pl.when(is_last)
            def _():
                table_copy(next_item).wait()

            next_block = jnp.where(is_last, items.key_start[next_item] // block_kv, block + 1)
            start_fetch(next_item, next_block, 1 - slot)

        wait_fetch(item, block, slot)
        scratch.slot[0] = 1 - slot

        # Chunks [low, high) of the block hold needed keys; all rows see all of those in [whole_low, whole_high).
        first_key = block * block_kv
        low = jnp.maximum(key_start - first_key, 0) // chunk
        high = jnp.minimum(pl.cdiv(key_end - first_key, chunk), block_kv // chunk)
        whole_high = jnp.minimum(position + row_start + 1, key_end) - first_key
        whole_high = jnp.clip(lax.div(jnp.maximum(whole_high, 0), chunk), low, high)
        whole_low = low
        if window is not None:
            whole_low = jnp.maximum(position + row_end - window - first_key, 0)
            whole_low = jnp.clip(pl.cdiv(whole_low, chunk), low, high)
            whole_high = jnp.maximum(whole_high, whole_low)
            pl.loop(low, whole_low)(functools.partial(attend_chunk, slot, block, masked=True))
        pl.loop(whole_low, whole_high)(functools.partial(attend_chunk, slot, block, masked=False))
        pl.loop(whole_high, high)(functools.partial(attend_chunk, slot, block, masked=True))
        return _

    scratch.m[...] = jnp.full_like(scratch.m, -jnp.inf)
    scratch.l[...] = jnp.zeros_like(scratch.l)
    scratch.acc[...] = jnp.zeros_like(scratch.acc)
    lax.fori_loop(first_block, last_block + 1, attend_block, None)

    # Writing: the item's rows, and no other's.
    row = lax.broadcasted_iota(jnp.int32, (block_q, 1), 0)
    mine = (row >= row_start) & (row < row_end)
    lane = lax.broadcasted_iota(jnp.int32, lse_ref.shape, 1)
    lse = lse_ref[...]
    for head in range(kv_heads):
        l = jnp.sum(scratch.l[head], axis=1, keepdims=True)
        seen = jnp.where(l > 0, l, 1.0)
        out = (scratch.acc[head] / seen).astype(out_ref.dtype).reshape(group, block_q, value_dim)
        out_ref[head] = jnp.where(mine[None], out, out_ref[head])
        scale = softmax_scale if soft_cap is None else soft_cap
        head_lse = jnp.where(l > 0, scratch.m[head][:, :1] * scale + jnp.log(seen), -jnp.inf)
        head_lse = head_lse.reshape(group, block_q, 1)
        for i in range(group):
            lse = jnp.where(mine & (lane == head * group + i), head_lse[i], lse)
    lse_ref[...] = lse


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
