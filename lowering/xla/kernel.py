"""The streaming lowering that runs anywhere XLA does: flash attention over pages, written with plain XLA operations.

A sequence is cut into query tiles of a few heights. The cut depends on its own length alone, so that a one-token row
costs one row, and the bits of a sequence do not depend on the pack it is in. A tile walks over its keys a block at a
time, from its window's start to its causal limit, and keeps the running maximum m, the sum l and the unnormalised
output of Milakov and Gimelshein's online softmax (arXiv 1805.02867). Only a tile and a block of pages are ever
materialised.
"""

import functools
import math
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import Call
from paged_prefill.primitive.attention import normalised
from paged_prefill.primitive.config import PrefillPageAttentionConfig

# The height of the tiles that a small rest of a sequence is cut into.
PART_HEIGHT = 32


def attend(call: Call, *, config: PrefillPageAttentionConfig, product_dtype):
    """`Xla.attend`, whose matrix products have operands of this dtype."""
    problem, query, sequences = call.problem, call.query, call.sequences
    tokens, q_heads, num_kv_heads, value_dim = problem.tokens, problem.q_heads, problem.num_kv_heads, problem.value_dim
    dtype, page_size, capacity = query.dtype, problem.page_size, problem.capacity
    attention, sliding_window = problem.attention, problem.attention.sliding_window
    # Keys are fetched in runs of `run` slots that lie together: pages, or equal parts of pages above the block size.
    run = _largest_divisor(page_size, config.block_kv)
    runs_per_page, runs_per_block = page_size // run, max(1, config.block_kv // run)
    block_kv = runs_per_block * run

    def in_runs(pages):
        pools, heads, num_pages, _, features = pages.shape
        return pages.reshape(pools, heads, num_pages * runs_per_page, run, features)

    key_runs, value_runs = in_runs(call.key_pages), in_runs(call.value_pages)

    def fetch(tile, first_run, *pools):  # -> a block of each, [num_kv_heads, keys, features]
        index = first_run + jnp.arange(runs_per_block, dtype=jnp.int32)
        column = _divided(index, runs_per_page)
        page = _taken(sequences.page_indices, tile.seq, jnp.minimum(column, problem.pages_per_seq - 1))
        runs = page * runs_per_page + index - column * runs_per_page
        corner = jnp.stack(jnp.broadcast_arrays(tile.pool, call.kv_head_start, runs), axis=-1)
        dimensions = lax.GatherDimensionNumbers(
            offset_dims=(0, 2, 3), collapsed_slice_dims=(0, 2), start_index_map=(0, 1, 2)
        )

        def block(pool):
            sizes = (1, num_kv_heads, 1, *pool.shape[-2:])
            gathered = lax.gather(pool, corner, dimensions, sizes, mode=lax.GatherScatterMode.CLIP)
            return gathered.astype(product_dtype).reshape(num_kv_heads, block_kv, pool.shape[-1])

        return map(block, pools)

    def attend_tile(query, height, packed, results):
        tile, row = _Tile(*packed), jnp.arange(height, dtype=jnp.int32)
        token = jnp.where(row < tile.rows, tile.token + row, tokens)
        queries = _taken(query, token).reshape(height, num_kv_heads, -1, query.shape[-1])
        queries = queries.transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, query.shape[-1]).astype(product_dtype)
        if product_dtype == jnp.float32:
            queries, scale = queries * attention.softmax_scale, 1.0  # once for each query, not for each logit
        else:
            scale = attention.softmax_scale
        first, end = attention.visible_keys(jnp.repeat(tile.position + row, problem.group)[:, None])
        origin = tile.first_run * run  # where the first block begins
        blocks = _divided(jnp.maximum(tile.key_end - origin, 0) + block_kv - 1, block_kv)

        def step(masked, i, running):
            i, *pools = _kept_in_loop(i, key_runs, value_runs)
            tile = _Tile(*packed)
            first_run = tile.first_run + i * runs_per_block
            keys, values = fetch(tile, first_run, *pools)
            visible = None
            if masked:
                key = first_run * run + jnp.arange(block_kv, dtype=jnp.int32)
                visible = (key < end) & (key < tile.key_end)
                if sliding_window is not None:
                    visible &= key >= first
                # Slots outside may hold anything, and 0 * NaN is NaN: a weight of zero is not enough.
                values = jnp.where(((key >= tile.first_key) & (key < tile.key_end))[:, None], values, 0)
            return _attend_block(running, queries, keys, values, visible, scale, attention.attn_logits_soft_cap)

        # Blocks begin : whole_end are seen whole and need no mask; only tall tiles are worth a loop for them.
        running = _start(queries, value_dim)
        begin = whole = 0
        if height == config.block_q and (sliding_window is None or sliding_window >= height + block_kv):
            if sliding_window is not None:
                last_first, _ = attention.visible_keys(tile.position + tile.rows - 1)
                begin = _divided(jnp.maximum(last_first - origin + block_kv - 1, 0), block_kv)
            _, first_end = attention.visible_keys(tile.position)
            whole_end = _divided(jnp.maximum(jnp.minimum(first_end, capacity) - origin, 0), block_kv)
            whole = jnp.maximum(whole_end - begin, 0)
            running = lax.fori_loop(begin, begin + whole, functools.partial(step, False), running)
        m, l, acc = lax.fori_loop(
            0, blocks - whole, lambda i, running: step(True, i + jnp.where(i < begin, 0, whole), running), running
        )
        out, lse = normalised(acc, l, m)

        def rows_first(x):
            x = x.reshape(num_kv_heads, height, -1, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(height, q_heads, *x.shape[3:])

        return tuple(
            result.at[token].set(rows_first(x), mode="drop", unique_indices=True, wrap_negative_indices=False)
            for result, x in zip(results, (_bits(out.astype(dtype)), lse), strict=True)
        )

    describe = functools.partial(_tile, block_q=config.block_q, capacity=capacity, attention=attention, run=run)
    # XLA compiles a kernel for every scalar that a loop's body takes from outside: these are taken together.
    seqs = sequences.length.shape[0]
    packed_sequences = jnp.stack([jnp.arange(seqs, dtype=jnp.int32), *sequences[:4]], axis=1)

    def attend_sequence(seq, results):
        packed_sequence = lax.dynamic_index_in_dim(packed_sequences, seq, keepdims=False)
        _, _, length, _, _ = packed_sequence
        for height, count in _tile_counts(length, tokens, config.block_q):

            def body(i, results, height=height):
                i, query_here, sequence_here = _kept_in_loop(i, query, packed_sequence)
                tile = describe(*sequence_here, i, height=height)
                return attend_tile(query_here, height, lax.optimization_barrier(jnp.stack(tile)), results)

            results = lax.fori_loop(0, count, body, results)
        return results

    results = (
        _bits(jnp.zeros((tokens, q_heads, value_dim), dtype)),
        jnp.full((tokens, q_heads), -jnp.inf, jnp.float32),
    )
    out_bits, lse = lax.fori_loop(0, seqs, attend_sequence, results)
    return _floats(out_bits, dtype), lse


def _tile_counts(length, tokens, block_q):
    """How many tiles of which height cover a sequence of `length` rows, as pairs (height, count).

    First tiles of block_q rows, the last too if what is left fills more than half of it. Else what is left goes to
    tiles of PART_HEIGHT, or a single row to a tile of its own. Heights that so few tokens cannot need are left out.
    """
    whole = _divided(length, block_q)
    rest = length - whole * block_q
    most_in_parts = block_q // 2 if PART_HEIGHT < block_q else 1
    parts = _divided(rest + PART_HEIGHT - 1, PART_HEIGHT)
    counts = [  # height, the fewest tokens that need it, count
        (block_q, min(most_in_parts + 1, block_q), whole + (rest > most_in_parts)),
        (PART_HEIGHT, 2, jnp.where((rest > 1) & (rest <= most_in_parts), parts, 0)),
        (1, 1, (rest == 1).astype(jnp.int32)),
    ]
    counts = counts[:1] + [count for count in counts[1:] if count[0] < block_q]
    return [(height, n) for height, fewest, n in counts if not isinstance(tokens, int) or fewest <= tokens]


class _Tile(NamedTuple):
    """What there is to know of a tile, all int32. Loops are handed it packed into one array."""

    seq: Int[Array, ""]
    pool: Int[Array, ""]
    token: Int[Array, ""]  # of its first row
    rows: Int[Array, ""]  # of its height, those that exist
    position: Int[Array, ""]  # where its first row stands in its sequence; negative before the context
    first_key: Int[Array, ""]  # no row looks at keys outside first_key : key_end
    key_end: Int[Array, ""]
    first_run: Int[Array, ""]  # that holds first_key


def _tile(seq, start, length, context_len, pool, i, *, height, block_q, capacity, attention, run) -> _Tile:
    """A sequence's tile number i of those that have this height."""
    first_row = i * height
    if height < block_q:  # what is left beside whole tiles
        first_row += _divided(length, block_q) * block_q
    rows = jnp.minimum(height, length - first_row)
    position = context_len - length + first_row
    first_key, _ = attention.visible_keys(position)
    _, key_end = attention.visible_keys(position + rows - 1)
    key_end = jnp.minimum(key_end, capacity)
    return _Tile(seq, pool, start + first_row, rows, position, first_key, key_end, _divided(first_key, run))


def _taken(array, *indices):
    """array[indices], for indices that are not negative; those too large count as the largest."""
    return array.at[indices].get(mode="clip", wrap_negative_indices=False)


def _divided(number, by):
    """number // by, neither negative: one operation, where rounding down for negative numbers would take seven."""
    return lax.div(number, jnp.asarray(by, number.dtype))


def _kept_in_loop(i, *arrays):
    """Arrays that a loop's body gathers from, tied to its counter.

    XLA's CPU compiler gathers bfloat16 in float32 (jaxlib 0.10), and would else convert whole caches ahead of the loop.
    """
    return lax.optimization_barrier((i, *arrays))


def _bits(x):
    """16-bit floats as integers: XLA's CPU compiler scatters those as they are, and bfloat16 in float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(bits, dtype):
    """The floats that `_bits` took."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def _start(tile, value_dim):
    kv_heads, rows, _ = tile.shape
    m = jnp.full((kv_heads, rows), -jnp.inf, jnp.float32)
    return m, jnp.zeros_like(m), jnp.zeros((kv_heads, rows, value_dim), jnp.float32)


def _attend_block(running, tile, keys, values, visible, scale, soft_cap):
    """One step of the online softmax: folds the keys of a block into (m, l, unnormalised output) of a tile's rows.

    `visible` [rows, keys] says which rows see which keys; None: all see all.
    """
    m, l, acc = running
    logits = _product("hqd,hkd->hqk", tile, keys) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
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


def _largest_divisor(page_size, limit):
    """The largest divisor of page_size that is at most `limit`."""
    return max(d for low in range(1, math.isqrt(page_size) + 1) if page_size % low == 0
               for d in (low, page_size // low) if d <= limit)
