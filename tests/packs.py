"""Random packs for tests, poisoned wherever no row may look, and the bar that results are held to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

JUNK_PAGES = (-1, 2**31 - 1, -(2**31))


class Pack(NamedTuple):
    """The operands of `paged_prefill_p`, in order."""

    query: jax.Array
    key_cache: jax.Array
    value_cache: jax.Array
    context_lens: jax.Array
    page_indices: jax.Array
    query_offsets: jax.Array


def make_pack(
    seed: int,
    lengths,
    context_lens,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    value_dim: int | None = None,
    page_size: int = 8,
    dtype=jnp.float32,
    sliding_window: int | None = None,
    spare_pages: int = 3,
    spare_columns: int = 2,
    tokens_before: int = 0,
    tokens_after: int = 0,
    poison: float = np.nan,
) -> Pack:
    """A pack of sequences with `lengths` new tokens each, whose contexts are `context_lens` tokens long.

    Pages are a random permutation of a larger pool. Every slot that no row sees holds `poison`: those past a context,
    those left of the window for the whole chunk, those of spare pages. Every page index that no row needs is junk.
    `tokens_before` and `tokens_after` are tokens of the query that no sequence owns.
    """
    rng = np.random.default_rng(seed)
    value_dim = head_dim if value_dim is None else value_dim
    pages_needed = [-(-max(context, 0) // page_size) for context in context_lens]
    pages_per_seq = max(pages_needed, default=0) + spare_columns
    num_pages = sum(pages_needed) + spare_pages
    free = rng.permutation(num_pages)
    key_cache = np.full((kv_heads, num_pages, page_size, head_dim), poison, np.float32)
    value_cache = np.full((kv_heads, num_pages, page_size, value_dim), poison, np.float32)
    page_indices = rng.choice(JUNK_PAGES, (len(lengths), pages_per_seq)).astype(np.int32)
    for seq, (length, context) in enumerate(zip(lengths, context_lens, strict=True)):
        first = 0 if sliding_window is None else max(0, context - length - sliding_window + 1)
        if not length:
            first = context  # no row, so nothing is seen
        key = np.arange(first, max(context, 0))
        columns = np.unique(key // page_size)
        page_indices[seq, columns] = free[: len(columns)]
        free = free[len(columns) :]
        at = page_indices[seq, key // page_size], key % page_size
        key_cache[:, *at] = rng.standard_normal((kv_heads, len(key), head_dim))
        value_cache[:, *at] = rng.standard_normal((kv_heads, len(key), value_dim))
    offsets = tokens_before + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = tokens_before + sum(lengths) + tokens_after
    query = rng.standard_normal((tokens, q_heads, head_dim))
    return Pack(
        jnp.asarray(query, dtype),
        jnp.asarray(key_cache, dtype),
        jnp.asarray(value_cache, dtype),
        jnp.asarray(context_lens, jnp.int32).reshape(len(lengths)),
        jnp.asarray(page_indices),
        jnp.asarray(offsets, jnp.int32),
    )


def exact(pack: Pack, **parameters):
    """The float64 result of a pack by the definition, as numpy arrays (out, lse); see `_definition`."""
    return _definition(pack, lambda x: np.asarray(x, np.float64), **parameters)


def in_dtype(pack: Pack, **parameters):
    """The definition computed in the pack's own dtype: every result is rounded to it. Arrays (out, lse), float64."""
    dtype = pack.query.dtype
    out, lse = _definition(pack, lambda x: np.asarray(x, dtype).astype(np.float32), **parameters)
    return out.astype(np.float64), lse.astype(np.float64)


def _definition(pack, rounded, *, rows=None, softmax_scale=None, attn_logits_soft_cap=None, sliding_window=None):
    """What primitive/reference.py defines, once more and only in numpy: nothing to compile, and only `rows` if given.

    reference_test.py holds the two to each other. Every intermediate result goes through `rounded`. `rows` are token
    numbers of the pack; the others are left 0 and NaN.
    """
    query, key_cache, value_cache, context_lens, page_indices, query_offsets = map(np.asarray, pack)
    lead, (tokens, q_heads, head_dim) = query.shape[:-3], query.shape[-3:]
    num_pages, page_size = key_cache.shape[-3:-1]
    kv_heads, group = key_cache.shape[-4], q_heads // key_cache.shape[-4]
    scale = rounded(head_dim**-0.5 if softmax_scale is None else softmax_scale)
    wanted = np.arange(tokens) if rows is None else np.asarray(rows)
    out = np.zeros((*query.shape[:-1], value_cache.shape[-1]), scale.dtype)
    lse = np.full(query.shape[:-1], -np.inf if rows is None else np.nan, scale.dtype)
    lse[..., wanted, :] = -np.inf

    def attend(q, keys, values, position, key):
        """q [rows, q_heads, head_dim]; keys and values [kv_heads, keys, features]; position [rows]; key [keys]."""
        q = rounded(q).reshape(-1, kv_heads, group, head_dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, head_dim)
        visible = key <= position[:, None]
        if sliding_window is not None:
            visible &= key > position[:, None] - sliding_window
        keys, values = (rounded(np.where(visible.any(0)[:, None], x, 0)) for x in (keys, values))
        logits = rounded(rounded(q @ keys.swapaxes(1, 2)) * scale)
        if attn_logits_soft_cap is not None:
            logits = rounded(attn_logits_soft_cap * rounded(np.tanh(rounded(logits / attn_logits_soft_cap))))
        logits = np.where(np.repeat(visible, group, axis=0), logits, -np.inf)
        largest = logits.max(axis=-1, keepdims=True)
        weights = rounded(np.exp(rounded(logits - np.where(np.isneginf(largest), 0, largest))))
        total = rounded(weights.sum(axis=-1, keepdims=True))
        unseen = total == 0  # and not NaN
        divisor = np.where(unseen, 1, total)
        result = rounded(rounded(weights / divisor) @ values)
        sums = np.where(unseen, -np.inf, rounded(largest + rounded(np.log(divisor))))
        shape = (kv_heads, len(position), group, -1)
        return tuple(x.reshape(shape).transpose(1, 0, 2, 3).reshape(len(position), q_heads, -1) for x in (result, sums))

    for pack_index in np.ndindex(lead):
        pool = pack_index[: key_cache.ndim - 4]
        offsets = np.maximum.accumulate(np.clip(query_offsets[pack_index], 0, tokens))
        for seq, (start, end) in enumerate(zip(offsets, offsets[1:])):
            mine = wanted[(start <= wanted) & (wanted < end)]
            pages = np.clip(page_indices[pack_index][seq].astype(np.int64), 0, num_pages - 1)
            for block in np.split(mine, range(256, len(mine), 256)):
                position = max(int(context_lens[pack_index][seq]), 0) - (end - block).astype(np.int64)
                last = min(position.max(initial=-1) + 1, pages.size * page_size)
                first = 0 if sliding_window is None else max(0, position.min(initial=0) - sliding_window + 1)
                key = np.arange(first, last)
                if not key.size:
                    continue
                keys, values = (c[pool][:, pages[key // page_size], key % page_size] for c in (key_cache, value_cache))
                row_out, row_lse = attend(query[pack_index][block], keys, values, position, key)
                out[pack_index][block], lse[pack_index][block] = row_out, row_lse[..., 0]
    return out, lse


def assert_matches_reference(pack: Pack, out, lse=None, *, rows=None, **parameters) -> None:
    """Holds results to the project's bar, against the float64 reference; only `rows` (token numbers) if given.

    float32: within 1e-5 of the largest value. bfloat16 and float16: at most twice the error of the reference computed
    in that dtype, or what rounding the exact result to that dtype may cost (half a unit in the last place of the
    largest value), whichever is more. Rows that see no key are exactly 0 and -inf.
    """
    exact_out, exact_lse = exact(pack, rows=rows, **parameters)
    dtype = out.dtype
    assert dtype == pack.query.dtype and out.shape == exact_out.shape, (dtype, out.shape, exact_out.shape)
    checked = slice(None) if rows is None else rows

    def at_rows(array, tokens_axis):
        return None if array is None else np.asarray(array, np.float64).swapaxes(0, tokens_axis)[checked]

    got, exact_out = at_rows(out, out.ndim - 3), at_rows(exact_out, out.ndim - 3)
    unseen = np.isneginf(at_rows(exact_lse, out.ndim - 3))
    np.testing.assert_array_equal(got[unseen], 0.0)
    coarse = (None, None) if dtype == jnp.float32 else in_dtype(pack, rows=rows, **parameters)
    _assert_within(got, exact_out, at_rows(coarse[0], out.ndim - 3), dtype, "out")
    if lse is not None:
        assert lse.dtype == jnp.float32 and lse.shape == exact_lse.shape, (lse.dtype, lse.shape)
        results = [at_rows(x, out.ndim - 3) for x in (lse, exact_lse, coarse[1])]
        np.testing.assert_array_equal(np.isneginf(results[0]), unseen)
        seen_lse = [None if x is None else np.where(unseen, 0.0, x) for x in results]
        _assert_within(*seen_lse, jnp.dtype(jnp.float32), "lse")


def _assert_within(got, want, coarse, dtype, name) -> None:
    if not want.size:
        return
    assert np.all(np.isfinite(got)), f"{name} holds NaN or Inf"
    error, largest = np.max(np.abs(got - want)), np.max(np.abs(want))
    bar = 1e-5 * max(largest, 1.0 if name == "lse" else 0.0)
    if coarse is not None:
        bar = max(2 * np.max(np.abs(coarse - want)), float(jnp.finfo(dtype).eps) / 2 * largest)
    assert error <= bar, f"{name} is off by {error:.3g}, at most {bar:.3g} is allowed (largest value {largest:.3g})"
