"""The streaming lowering that runs anywhere XLA does: flash attention over pages, written with plain XLA operations.

A sequence is cut into query tiles of a few heights. The cut depends on its own length alone, so that a one-token row
costs one row, and the bits of a sequence do not depend on the pack it is in. A tile walks over its keys a block at a
time, from the first that some row sees to the last, and keeps the running maximum m, the sum l and the unnormalised
output of Milakov and Gimelshein's online softmax (arXiv 1805.02867). Only a tile and a block of pages are ever
materialised, and only a block in hand is turned from a quantised cache's numbers into those that are multiplied.
"""

import functools
import math
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from paged_prefill.lowering.call import Call
from paged_prefill.primitive.attention import normalised
from paged_prefill.primitive.config import PrefillPageAttentionConfig

# The height of the tiles that a small rest of a sequence is cut into.
PART_HEIGHT = 32


class Streaming:
    """The walk of one call: what does not change from tile to tile, and its steps, from the whole to a block of keys.

    `product_dtype` is that of the operands of its matrix products.
    """

    def __init__(self, call: Call, config: PrefillPageAttentionConfig, product_dtype):
        self.call, self.problem, self.attention = call, call.problem, call.problem.attention
        self.block_q, self.product_dtype = config.block_q, product_dtype
        # Keys are fetched in runs of `run` slots that lie together: pages, or equal parts of pages above the block size.
        self.run = _largest_divisor(self.problem.page_size, config.block_kv)
        self.runs_per_page = self.problem.page_size // self.run
        self.runs_per_block = max(1, config.block_kv // self.run)
        self.block_kv = self.runs_per_block * self.run
        self.pages = {
            name: self._in_runs(array)
            for name, array in dict(
                keys=call.key_pages,
                values=call.value_pages,
                key_scale=_of_each_slot(call.key_scale),
                value_scale=_of_each_slot(call.value_scale),
            ).items()
            if array is not None
        }

    def _in_runs(self, pages):
        """[pools, kv_heads, num_pages, page_size, ...] with the slots of a page in runs."""
        pools, heads, num_pages = pages.shape[:3]
        return pages.reshape(pools, heads, num_pages * self.runs_per_page, self.run, *pages.shape[4:])

    def attend(self):
        """The results of the whole call, tile by tile."""
        problem, sequences, tokens = self.problem, self.call.sequences, self.problem.tokens
        seqs = sequences.length.shape[0]
        pools = [sequences.pool if x is None else x for x in (self.call.key_pool, self.call.value_pool)]
        # XLA compiles a kernel for every scalar that a loop's body takes from outside: these are taken together.
        numbers = jnp.stack([jnp.arange(seqs, dtype=jnp.int32), *sequences[:4], *pools], axis=1)
        of_tokens = dict(query=self.call.query, ranges=self.call.ranges, tree=self.call.tree)
        of_tokens = {name: array for name, array in of_tokens.items() if array is not None}

        def attend_sequence(seq, results):
            sequence = lax.dynamic_index_in_dim(numbers, seq, keepdims=False)
            for height, count in _tile_counts(_Sequence(*sequence).length, tokens, self.block_q):

                def body(i, results, height=height):
                    i, here, *arrays = _kept_in_loop(i, sequence, *of_tokens.values())
                    by_token = dict(zip(of_tokens, arrays))
                    return self._attend_tile(_Sequence(*here), i, height, by_token, results)

                results = lax.fori_loop(0, count, body, results)
            return results

        out = _bits(jnp.zeros((tokens, problem.q_heads, problem.value_dim), self.call.query.dtype))
        lse = jnp.full((tokens, problem.q_heads), -jnp.inf, jnp.float32)
        out, lse = lax.fori_loop(0, seqs, attend_sequence, (out, lse))
        return _floats(out, self.call.query.dtype), lse

    def _attend_tile(self, sequence: "_Sequence", i, height: int, by_token, results):
        """Adds the results of a sequence's tile number i of those that have this height."""
        problem, softmax_scale = self.problem, self.attention.softmax_scale
        token, rows, position = _place(sequence, i, height, self.block_q)
        row = jnp.arange(height, dtype=jnp.int32)
        taken = jnp.where(row < rows, token + row, problem.tokens)
        here = {name: _taken(x, taken) for name, x in by_token.items()}
        tile, low, high = self._tile(sequence, rows, position, row, here.get("ranges"))
        seen = _Seen(*(x if x is None else jnp.repeat(x, problem.group, axis=0) for x in (low, high, here.get("tree"))))
        # Loops are handed a tile packed into one array.
        packed = lax.optimization_barrier(jnp.stack(tile))
        tile = _Tile(*packed)

        queries = here["query"].reshape(height, problem.num_kv_heads, problem.group, problem.head_dim).transpose(1, 0, 2, 3)
        queries = queries.reshape(problem.num_kv_heads, -1, problem.head_dim).astype(self.product_dtype)
        scale = softmax_scale
        if self.product_dtype == jnp.float32:
            queries, scale = queries * softmax_scale, 1.0  # once for each query, not for each logit

        def step(masked, i, running):
            i, *pages = _kept_in_loop(i, *self.pages.values())
            return self._step(_Tile(*packed), i, queries, scale, seen if masked else None, pages, running)

        # Blocks begin : end are seen whole by every row and need no mask; only tall tiles are worth a loop for them.
        origin = tile.first_run * self.run  # where the first block begins
        blocks = _divided(jnp.maximum(tile.end_key - origin, 0) + self.block_kv - 1, self.block_kv)
        running = _start(queries, problem.value_dim)
        begin = whole = 0
        if height == self.block_q and self._sees_whole_blocks(height):
            begin = _divided(jnp.maximum(tile.whole_start - origin + self.block_kv - 1, 0), self.block_kv)
            whole = jnp.maximum(_divided(jnp.maximum(tile.whole_end - origin, 0), self.block_kv) - begin, 0)
            running = lax.fori_loop(begin, begin + whole, functools.partial(step, False), running)
        m, l, acc = lax.fori_loop(
            0, blocks - whole, lambda i, running: step(True, i + jnp.where(i < begin, 0, whole), running), running
        )
        out, lse = normalised(acc, l, m)

        def rows_first(x):
            x = x.reshape(problem.num_kv_heads, height, problem.group, *x.shape[2:])
            return jnp.moveaxis(x, 0, 1).reshape(height, problem.q_heads, *x.shape[3:])

        return tuple(
            result.at[taken].set(rows_first(x), mode="drop", unique_indices=True, wrap_negative_indices=False)
            for result, x in zip(results, (_bits(out.astype(self.call.query.dtype)), lse), strict=True)
        )

    def _sees_whole_blocks(self, height: int) -> bool:
        """Whether a window is wide enough for a block that every row of a tile sees whole."""
        window = self.attention.sliding_window
        return window is None or window >= height + self.block_kv

    def _tile(self, sequence: "_Sequence", rows, position, row, ranges):
        """What there is to know of a tile, and the keys low <= j < high that each of its rows sees; low None for 0.

        By causality and window both ends grow with the row, so that the first row and the last say it for all.
        """
        end = jnp.minimum(sequence.context_len, self.problem.capacity)
        first_new = sequence.context_len - sequence.length
        if ranges is None:
            low, high = self.attention.visible_keys(position + row)
            first_low, first_high = self.attention.visible_keys(position)
            last_low, last_high = self.attention.visible_keys(position + rows - 1)
            hull, common = (first_low, last_high), (last_low, first_high)
            low = None if self.attention.sliding_window is None else low
        else:
            low, high = jnp.maximum(ranges[:, 0], 0), jnp.minimum(ranges[:, 1], end)
            sees = (row < rows) & (low < high)
            hull = jnp.min(jnp.where(sees, low, end)), jnp.max(jnp.where(sees, high, 0))
            common = jnp.max(jnp.where(row < rows, low, 0)), jnp.min(jnp.where(row < rows, high, end))
        if self.call.tree is not None:
            common = common[0], jnp.minimum(common[1], first_new)
        if self.call.ranges is not None or self.call.tree is not None:
            high = jnp.where(row < rows, high, 0)  # rows past the sequence's stand for another's: they see nothing
        numbers = (*hull, *common)
        start_key, end_key, whole_start, whole_end = (jnp.minimum(x, end) for x in numbers)
        tile = _Tile(
            sequence.seq, sequence.pool, sequence.key_pool, sequence.value_pool, start_key, end_key, whole_start,
            whole_end, _divided(start_key, self.run), first_new,
        )  # fmt: skip
        return tile, low, jnp.minimum(high, end_key)

    def _step(self, tile: "_Tile", i, queries, scale, seen: "_Seen | None", pages, running):
        """Folds block i of a tile into what is running; `seen` is what rows see, or None where all see all of it."""
        block = self._fetch(tile, tile.first_run + i * self.runs_per_block, pages)
        if seen is None:
            return _attend_block(running, queries, block, None, scale, self.attention.attn_logits_soft_cap)
        key = (tile.first_run + i * self.runs_per_block) * self.run + jnp.arange(self.block_kv, dtype=jnp.int32)
        visible = seen.visible(key, tile.first_new)
        # Slots that no row sees may hold anything, and 0 * NaN is NaN: a weight of zero is not enough.
        if self.call.ranges is None and self.call.tree is None:
            some = (key >= tile.start_key) & (key < tile.end_key)
        else:
            some = jnp.any(visible, axis=0)
        block = block._replace(values=jnp.where(some[None, :, None], block.values, 0))
        if block.value_scale is not None:
            block = block._replace(value_scale=jnp.where(some[None, :], block.value_scale, 0.0))
        return _attend_block(running, queries, block, visible, scale, self.attention.attn_logits_soft_cap)

    def _fetch(self, tile: "_Tile", first_run, pages) -> "_Block":
        """A block of keys and values, as they are multiplied, from the arrays `self.pages`."""
        index = first_run + jnp.arange(self.runs_per_block, dtype=jnp.int32)
        column = _divided(index, self.runs_per_page)
        page = _taken(
            self.call.sequences.page_indices, tile.seq, jnp.minimum(column, self.problem.columns - 1)
        )
        runs = page * self.runs_per_page + index - column * self.runs_per_page
        pools = dict(keys=tile.key_pool, values=tile.value_pool)
        heads = self.problem.num_kv_heads

        def gather(name, array):  # [num_kv_heads, keys, ...]
            corner = jnp.broadcast_arrays(pools.get(name, tile.pool), self.call.kv_head_start, runs)
            dimensions = lax.GatherDimensionNumbers(
                offset_dims=(0, *range(2, array.ndim - 1)), collapsed_slice_dims=(0, 2), start_index_map=(0, 1, 2)
            )
            sizes = (1, heads, 1, *array.shape[3:])
            mode = lax.GatherScatterMode.CLIP
            gathered = lax.gather(array, jnp.stack(corner, axis=-1), dimensions, sizes, mode=mode)
            return gathered.reshape(heads, self.block_kv, *array.shape[4:])

        gathered = {name: gather(name, array) for name, array in zip(self.pages, pages, strict=True)}
        keys = gathered["keys"].astype(self.product_dtype)
        key_scale = self._scale(tile, self.call.key_scale, gathered.get("key_scale"))
        if "values" not in gathered:  # a latent cache
            return _Block(keys, keys[..., : self.problem.value_dim], key_scale, key_scale)
        value_scale = self._scale(tile, self.call.value_scale, gathered.get("value_scale"))
        return _Block(keys, gathered["values"].astype(self.product_dtype), key_scale, value_scale)

    def _scale(self, tile: "_Tile", scale, of_each_slot):
        """A block's scales, [kv_heads or 1, keys or 1], or None."""
        if of_each_slot is not None or scale is None:
            return of_each_slot
        here = _taken(scale, tile.pool)
        if here.ndim:
            here = lax.dynamic_slice_in_dim(here, self.call.kv_head_start, self.problem.num_kv_heads)
        return here.reshape(-1, 1)


def _of_each_slot(scale):
    """Scales of slots, which are pages too; None for others."""
    return None if scale is None or scale.ndim < 4 else scale


class _Sequence(NamedTuple):
    """What there is to know of a sequence, all int32."""

    seq: Int[Array, ""]
    start: Int[Array, ""]
    length: Int[Array, ""]
    context_len: Int[Array, ""]
    pool: Int[Array, ""]
    key_pool: Int[Array, ""]
    value_pool: Int[Array, ""]


class _Tile(NamedTuple):
    """What there is to know of a tile, all int32."""

    seq: Int[Array, ""]
    pool: Int[Array, ""]
    key_pool: Int[Array, ""]
    value_pool: Int[Array, ""]
    start_key: Int[Array, ""]  # no row looks at keys outside start_key : end_key
    end_key: Int[Array, ""]
    whole_start: Int[Array, ""]  # every row sees whole_start : whole_end
    whole_end: Int[Array, ""]
    first_run: Int[Array, ""]  # that holds start_key
    first_new: Int[Array, ""]  # where the sequence's first new token stands


class _Seen(NamedTuple):
    """What each row of a tile sees: keys low <= j < high, and of its chunk those with a bit in `tree`, if given."""

    low: Int[Array, " rows"] | None
    high: Int[Array, " rows"]
    tree: UInt32[Array, "rows words"] | None

    def visible(self, key: Int[Array, " keys"], first_new) -> Bool[Array, "rows keys"]:
        """Which rows see which keys."""
        visible = key[None, :] < self.high[:, None]
        if self.low is not None:
            visible &= key[None, :] >= self.low[:, None]
        if self.tree is None:
            return visible
        new = key - first_new
        word = self.tree.at[:, jnp.maximum(new, 0) >> 5].get(mode="clip")
        bit = (word >> (new & 31).astype(jnp.uint32)[None, :]) & jnp.uint32(1)
        in_tree = (new >= 0) & (new < 32 * self.tree.shape[1])
        return visible & ((bit != 0) | ~in_tree[None, :])


class _Block(NamedTuple):
    """A block of keys and their values, and what either is multiplied by."""

    keys: Float[Array, "kv_heads keys head_dim"]
    values: Float[Array, "kv_heads keys value_dim"]
    key_scale: Float[Array, "heads keys"] | None
    value_scale: Float[Array, "heads keys"] | None


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
        (block_q, min(most_in_parts + 1, block_q), whole + (rest > most_in_parts).astype(jnp.int32)),
        (PART_HEIGHT, 2, jnp.where((rest > 1) & (rest <= most_in_parts), parts, 0)),
        (1, 1, (rest == 1).astype(jnp.int32)),
    ]
    counts = counts[:1] + [count for count in counts[1:] if count[0] < block_q]
    return [(height, n) for height, fewest, n in counts if not isinstance(tokens, int) or fewest <= tokens]


def _place(sequence: _Sequence, i, height: int, block_q: int):
    """A tile's first token, how many of its rows exist, and where the first stands; negative before the context."""
    first_row = i * height
    if height < block_q:  # what is left beside whole tiles
        first_row += _divided(sequence.length, block_q) * block_q
    rows = jnp.minimum(height, sequence.length - first_row)
    return sequence.start + first_row, rows, sequence.context_len - sequence.length + first_row


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


def _attend_block(running, queries, block: _Block, visible, scale, soft_cap):
    """One step of the online softmax: folds a block into (m, l, unnormalised output) of a tile's rows.

    `visible` [rows, keys] says which rows see which keys; None: all see all.
    """
    m, l, acc = running
    logits = _product("hqd,hkd->hqk", queries, block.keys) * scale
    if block.key_scale is not None:
        logits *= block.key_scale[:, None, :]
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if visible is not None:
        logits = jnp.where(visible[None], logits, -jnp.inf)
    m_next = jnp.maximum(m, jnp.max(logits, axis=-1))
    shift = jnp.where(jnp.isneginf(m_next), 0.0, m_next)
    weights = jnp.exp(logits - shift[..., None])
    l_block = jnp.sum(weights, axis=-1)
    fade = jnp.exp(m - shift)
    value_scale = block.value_scale
    if value_scale is not None and value_scale.shape[-1] > 1:
        # By their share of the largest: times a small scale, weights would leave the normal numbers of float16.
        share, value_scale = value_scale, jnp.max(jnp.abs(value_scale), axis=-1, keepdims=True)
        weights *= (share / jnp.where(value_scale == 0, 1.0, value_scale))[:, None, :]
    update = _product("hqk,hkd->hqd", weights.astype(block.values.dtype), block.values)
    if value_scale is not None:
        update *= value_scale[..., None]
    return m_next, l * fade + l_block, acc * fade[..., None] + update


def _product(subscripts, a, b):
    """A product accumulated in float32; of float32 operands in full, where GPUs and TPUs would round them."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _largest_divisor(page_size, limit):
    """The largest divisor of page_size that is at most `limit`."""
    return max(d for low in range(1, math.isqrt(page_size) + 1) if page_size % low == 0
               for d in (low, page_size // low) if d <= limit)
