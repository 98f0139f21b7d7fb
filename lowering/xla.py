"""The streaming lowering that runs anywhere XLA does: flash attention over pages, written with plain XLA operations.

A sequence is cut into query tiles, all of the largest height but the last, which has the smallest height that holds
what is left. So a tile's shape depends on its own sequence alone: a one-token row costs one row, and the bits of a
sequence do not depend on the pack it is in. A tile walks over its keys a block at a time, from its window's start to
its causal limit, and keeps the running maximum m, the sum l and the unnormalised output of Milakov and Gimelshein's
online softmax (arXiv 1805.02867). Only a tile and a block of pages are ever materialised.
"""

import functools
import math

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.config import PrefillPageAttentionConfig
from paged_prefill.lowering.contract import Device, Problem, Sequences

VERSION = 1

# Heights of a sequence's last tile. Their ratio bounds the rows computed in vain.
TILE_HEIGHTS = (1, 16, 64, 256)


def supports(problem: Problem, device: Device) -> str | None:
    """This lowering runs every call."""
    return None


def heuristic_config(problem: Problem, device: Device) -> PrefillPageAttentionConfig:
    """The sizes that were fastest in benchmarks/results/cpu.md, by which a block's logits stay within some MiB.

    They depend on nothing that differs between a sequence alone and in a pack, so that its bits do not either.
    """
    return PrefillPageAttentionConfig(block_q=512 if problem.q_heads <= 8 else 256, block_kv=512)


def candidate_configs(problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
    """The heuristic sizes and their neighbours."""
    sizes = [(512, 512), (256, 512), (256, 1024), (128, 512), (128, 1024), (64, 512)]
    others = [PrefillPageAttentionConfig(block_q=q, block_kv=kv) for q, kv in sizes]
    first = heuristic_config(problem, device)
    return [first, *(config for config in others if config != first)]


def attend(query, key_pages, value_pages, sequences: Sequences, kv_head_start, **parameters):
    """See contract.py. Uses block_q and block_kv."""
    operands = (query, key_pages, value_pages, sequences, kv_head_start)
    if query.dtype == jnp.float32:
        return _attend(*operands, **parameters, compute_dtype=jnp.float32)
    # Few CPUs multiply 16-bit floats; XLA would convert the operands of every product one by one.
    return lax.platform_dependent(
        *operands,
        cpu=functools.partial(_attend, **parameters, compute_dtype=jnp.float32),
        default=functools.partial(_attend, **parameters, compute_dtype=query.dtype),
    )


def _attend(
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
    compute_dtype,
):
    tokens, q_heads, _ = query.shape
    dtype, value_dim = query.dtype, value_pages.shape[-1]
    page_size = key_pages.shape[-2]
    # Keys are fetched in runs of `run` slots that lie together: pages, or equal parts of pages above the block size.
    run = _largest_divisor(page_size, config.block_kv)
    runs_per_page, runs_per_block = page_size // run, max(1, config.block_kv // run)
    block_kv = runs_per_block * run
    capacity = sequences.page_indices.shape[1] * page_size

    def in_runs(pages):
        pools, heads, num_pages, _, features = pages.shape
        return pages.reshape(pools, heads, num_pages * runs_per_page, run, features)

    key_runs, value_runs = in_runs(key_pages), in_runs(value_pages)

    def fetch(runs, seq, indices):  # -> [num_kv_heads, keys, features]
        column = jnp.minimum(indices // runs_per_page, sequences.page_indices.shape[1] - 1)
        page = sequences.page_indices[seq, column] * runs_per_page + indices % runs_per_page
        corner = jnp.stack(jnp.broadcast_arrays(sequences.pool[seq], kv_head_start, page), axis=-1)
        dimensions = lax.GatherDimensionNumbers(offset_dims=(0, 2, 3), collapsed_slice_dims=(0, 2), start_index_map=(0, 1, 2))
        sizes = (1, num_kv_heads, 1, *runs.shape[-2:])
        gathered = lax.gather(runs, corner, dimensions, sizes, mode=lax.GatherScatterMode.CLIP)
        return gathered.astype(compute_dtype).reshape(num_kv_heads, -1, runs.shape[-1])

    def attend_tile(query, height, seq, first_row, results):
        rows = first_row + jnp.arange(height, dtype=jnp.int32)
        token = jnp.where(rows < sequences.length[seq], sequences.start[seq] + rows, tokens)
        position = sequences.context_len[seq] - sequences.length[seq] + rows
        first_position = position[0]
        last_position = first_position + jnp.minimum(height, sequences.length[seq] - first_row) - 1
        key_end = jnp.minimum(last_position + 1, capacity)
        first_key = 0 if sliding_window is None else jnp.maximum(first_position - sliding_window + 1, 0)
        first_run = first_key // run
        num_blocks = (key_end - first_run * run + block_kv - 1) // block_kv

        tile = query.at[token].get(mode="clip")
        tile = tile.reshape(height, num_kv_heads, -1, tile.shape[-1])
        tile = tile.transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, tile.shape[-1]).astype(compute_dtype)
        if compute_dtype == jnp.float32:
            tile, scale = tile * softmax_scale, 1.0  # once for each query, not for each logit
        else:
            scale = softmax_scale
        row_position = jnp.repeat(position, tile.shape[1] // height)[:, None]

        def step(masked, i, running):
            i, keys, values = _kept_in_loop(i, key_runs, value_runs)
            indices = first_run + i * runs_per_block + jnp.arange(runs_per_block, dtype=jnp.int32)
            keys, values = fetch(keys, seq, indices), fetch(values, seq, indices)
            visible = None
            if masked:
                key = (indices[:, None] * run + jnp.arange(run, dtype=jnp.int32)).reshape(-1)
                visible = (key <= row_position) & (key < key_end)
                if sliding_window is not None:
                    visible &= key > row_position - sliding_window
                # Slots outside may hold anything, and 0 * NaN is NaN: a weight of zero is not enough.
                values = jnp.where(((key >= first_key) & (key < key_end))[:, None], values, 0)
            return _attend_block(running, tile, keys, values, visible, scale, attn_logits_soft_cap)

        # Blocks begin : end are seen whole by every row; only those before and after need masks.
        begin = end = 0
        running = _start(tile, value_dim)
        if height == config.block_q and (sliding_window is None or sliding_window >= height + block_kv):
            if sliding_window is not None:
                begin = jnp.maximum(last_position - sliding_window + 1 - first_run * run + block_kv - 1, 0) // block_kv
            end = (jnp.minimum(first_position + 1, capacity) - first_run * run) // block_kv
            end = jnp.maximum(end, begin)
            running = lax.fori_loop(begin, end, functools.partial(step, False), running)
        whole = end - begin
        m, l, acc = lax.fori_loop(
            0, num_blocks - whole, lambda i, running: step(True, i + jnp.where(i < begin, 0, whole), running), running
        )
        out, lse = _finish(m, l, acc)

        def rows_first(x):
            x = x.reshape(num_kv_heads, height, -1, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(height, q_heads, *x.shape[3:])

        return tuple(
            result.at[token].set(rows_first(x), mode="drop", unique_indices=True)
            for result, x in zip(results, (_bits(out.astype(dtype)), lse), strict=True)
        )

    results = (
        _bits(jnp.zeros((tokens, q_heads, value_dim), dtype)),
        jnp.full((tokens, q_heads), -jnp.inf, jnp.float32),
    )
    for height, count, locate in _tiles(sequences.length, tokens, config.block_q):

        def body(i, results, height=height, locate=locate):
            i, tokens_here = _kept_in_loop(i, query)
            return attend_tile(tokens_here, height, *locate(i), results)

        results = lax.fori_loop(0, count, body, results)
    out_bits, lse = results
    return _floats(out_bits, dtype), lse


def _tiles(length, tokens, block_q):
    """Yields (height, number of tiles of that height, tile number -> (sequence, first row))."""
    heights = [h for h in TILE_HEIGHTS if h < block_q] + [block_q]
    rest = length % block_q
    previous = 0
    for height in heights:
        if isinstance(tokens, int) and previous >= tokens:
            return
        whole = length // block_q if height == block_q else jnp.zeros_like(length)
        per_sequence = whole + ((rest > previous) & (rest <= height))
        ends = jnp.cumsum(per_sequence)

        def locate(i, height=height, per_sequence=per_sequence, ends=ends):
            seq = jnp.sum(ends <= i, dtype=jnp.int32)
            within = i - (ends[seq] - per_sequence[seq])
            return seq, (within if height == block_q else length[seq] // block_q) * block_q

        yield height, ends[-1], locate
        previous = height


def _kept_in_loop(i, *arrays):
    """Arrays that a loop's body gathers from, tied to its counter.

    XLA's CPU compiler gathers bfloat16 in float32 (jaxlib 0.10), and would else convert whole caches ahead of the loop.
    """
    return lax.optimization_barrier((i, *arrays))


def _bits(x):
    """16-bit floats as integers, which XLA's CPU compiler scatters as they are; bfloat16 it would scatter in float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(bits, dtype):
    """The floats that `_bits` took."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def _start(tile, value_dim):
    kv_heads, rows, _ = tile.shape
    m = jnp.full((kv_heads, rows), -jnp.inf, jnp.float32)
    return m, jnp.zeros_like(m), jnp.zeros((kv_heads, rows, value_dim), jnp.float32)


def _attend_block(running, tile, keys, values, visible, scale, attn_logits_soft_cap):
    """One step of the online softmax: folds the keys of a block into (m, l, unnormalised output) of a tile's rows.

    `visible` [rows, keys] says which rows see which keys; None: all see all.
    """
    m, l, acc = running
    logits = _product("hqd,hkd->hqk", tile, keys) * scale
    if attn_logits_soft_cap is not None:
        logits = attn_logits_soft_cap * jnp.tanh(logits / attn_logits_soft_cap)
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    m_next = jnp.maximum(m, jnp.max(logits, axis=-1))
    shift = jnp.where(jnp.isneginf(m_next), 0.0, m_next)
    weights = jnp.exp(logits - shift[..., None])
    fade = jnp.exp(m - shift)
    update = _product("hqk,hkd->hqd", weights.astype(values.dtype), values)
    return m_next, l * fade + jnp.sum(weights, axis=-1), acc * fade[..., None] + update


def _product(subscripts, a, b):
    """A product accumulated in float32; of float32 operands in full, where GPUs and TPUs would round them."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _finish(m, l, acc):
    seen = jnp.where(l > 0, l, 1.0)
    return acc / seen[..., None], jnp.where(l > 0, m + jnp.log(seen), -jnp.inf)


def _largest_divisor(page_size, limit):
    """The largest divisor of page_size that is at most `limit`."""
    return max(d for low in range(1, math.isqrt(page_size) + 1) if page_size % low == 0
               for d in (low, page_size // low) if d <= limit)
