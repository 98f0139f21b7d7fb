"""What primitive/reference.py defines, once more and only in NumPy, pair by pair; and the bar that results are held to.

Operands come by name, as `paged_prefill_p.bind` takes them. Nothing to compile, and only the rows that are asked for.
"""

import jax.numpy as jnp
import numpy as np


def exact(operands, **parameters):
    """The float64 result by the definition, as arrays (out, lse); see `_definition`."""
    return _definition(operands, lambda x: np.asarray(x, np.float64), **parameters)


def in_dtype(operands, **parameters):
    """The definition computed in the query's own dtype: every result is rounded to it. Arrays (out, lse), float64."""
    dtype = operands["query"].dtype
    out, lse = _definition(operands, lambda x: np.asarray(x, dtype).astype(np.float32), **parameters)
    return out.astype(np.float64), lse.astype(np.float64)


class Sequence:
    """One sequence of one pack, as the definition sees it: its rows, its keys, and which of them see which.

    Attributes:
      pool: the index of its pool among the caches' leading dimensions and layers.
      start, end: its tokens.
      page, slot: where its keys are, [keys]; only those of its context that the page table has a page for.
    """

    def __init__(self, operands, pack, seq, *, sliding_window=None):
        self._operands, self._pack, self._window = operands, pack, sliding_window
        tokens = operands["query"].shape[-3]
        offsets = np.maximum.accumulate(
            np.clip(np.asarray(operands["query_offsets"])[pack].astype(np.int64), 0, tokens)
        )
        self.start, self.end = offsets[seq], offsets[seq + 1]
        self.pool = pool_of(operands, "key_cache", pack)
        num_pages, page_size = operands["key_cache"].shape[-3:-1]
        pages = np.clip(np.asarray(operands["page_indices"])[pack][seq].astype(np.int64), 0, num_pages - 1)
        self._context_len = max(int(np.asarray(operands["context_lens"])[pack][seq]), 0)
        key = np.arange(min(self._context_len, len(pages) * page_size))
        self.page, self.slot = pages[key // page_size], key % page_size

    def hull(self, rows):
        """All keys that some of these rows might see are low <= j < high; told without a mask, since that is large."""
        low, high = self._ends(rows)
        return max(0, int(low.min(initial=2**31))), min(len(self.page), int(high.max(initial=0)))

    def visible(self, rows, keys):
        """Which of its rows, by their tokens, see which of its keys, bool [rows, keys]."""
        low, high = self._ends(rows)
        visible = (low[:, None] <= keys) & (keys < high[:, None]) & (keys < len(self.page))
        tree = self._of_rows("tree_mask", rows)
        if tree is not None:
            in_tree = np.unpackbits(tree.astype("<u4").view(np.uint8), axis=-1, bitorder="little").astype(bool)
            token = keys - (self._context_len - (self.end - self.start))  # of the sequence, from its first new one on
            for column in np.flatnonzero((0 <= token) & (token < in_tree.shape[1])):
                visible[:, column] &= in_tree[:, token[column]]
        return visible

    def _ends(self, rows):
        """The interval of each row, as it is written."""
        ranges = self._of_rows("key_ranges", rows)
        if ranges is not None:
            return ranges.astype(np.int64).T
        position = self._context_len - (self.end - rows).astype(np.int64)
        return position - (2**40 if self._window is None else self._window) + 1, position + 1

    def _of_rows(self, name, rows):
        array = self._operands.get(name)
        return None if array is None else np.asarray(array)[self._pack][rows]


def pool_of(operands, name, pack):
    """The index of a pack's pool in a cache or scale: in its leading dimensions, where a 1 serves all, and its layers."""
    layer, cache = operands.get("layer"), operands[name]
    cache_batch_dims = operands["key_cache"].ndim - 4 - (layer is not None)
    pool = tuple(0 if size == 1 else i for i, size in zip(pack[:cache_batch_dims], cache.shape))
    return pool if layer is None else (*pool, int(np.clip(np.asarray(layer)[pack], 0, cache.shape[len(pool)] - 1)))


def sequences(operands, **parameters):
    """Every sequence of every pack, as pairs (index of the pack, `Sequence`)."""
    for pack in np.ndindex(operands["query"].shape[:-3]):
        for seq in range(operands["context_lens"].shape[-1]):
            yield pack, Sequence(operands, pack, seq, **parameters)


def _definition(
    operands, rounded, *, rows=None, softmax_scale=None, attn_logits_soft_cap=None, sliding_window=None, value_dim=None
):
    """Every intermediate result goes through `rounded`. `rows` are tokens of the packs; others are left 0 and NaN."""
    operands = {name: np.asarray(x) for name, x in operands.items() if x is not None}
    query, latent = operands["query"], "value_cache" not in operands
    (tokens, q_heads, head_dim), kv_heads = query.shape[-3:], operands["key_cache"].shape[-4]
    group = q_heads // kv_heads
    scale = rounded(head_dim**-0.5 if softmax_scale is None else softmax_scale)
    wanted = np.arange(tokens) if rows is None else np.asarray(rows)
    features = value_dim if latent else operands["value_cache"].shape[-1]
    out = np.zeros((*query.shape[:-1], features), scale.dtype)
    lse = np.full(query.shape[:-1], -np.inf if rows is None else np.nan, scale.dtype)
    lse[..., wanted, :] = -np.inf

    def stored(name, pack, sequence, keys):
        """The numbers of a sequence's keys or values, [kv_heads, keys, features]."""
        at = sequence.page[keys], sequence.slot[keys]
        numbers = operands[f"{name}_cache"][pool_of(operands, f"{name}_cache", pack)][:, *at].astype(np.float64)
        if f"{name}_scale" in operands:
            own = operands[f"{name}_scale"][pool_of(operands, f"{name}_scale", pack)].astype(np.float64)
            numbers = numbers * (own[:, *at][..., None] if own.ndim == 3 else own.reshape(-1, 1, 1))
        return numbers

    def attend(q, keys, values, visible, sinks):
        """q [rows, q_heads, head_dim]; keys and values [kv_heads, keys, features]; sinks [q_heads] or None."""
        q = rounded(q).reshape(-1, kv_heads, group, head_dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, head_dim)
        keys, values = (rounded(np.where(visible.any(0)[:, None], x, 0)) for x in (keys, values))
        logits = rounded(rounded(q @ keys.swapaxes(1, 2)) * scale)
        if attn_logits_soft_cap is not None:
            logits = rounded(attn_logits_soft_cap * rounded(np.tanh(rounded(logits / attn_logits_soft_cap))))
        logits = np.where(np.repeat(visible, group, axis=0), logits, -np.inf)
        if sinks is not None:  # one more key, whose value is 0
            sink = np.broadcast_to(rounded(sinks).reshape(kv_heads, 1, group, 1), (kv_heads, len(visible), group, 1))
            logits = np.concatenate([logits, sink.reshape(kv_heads, -1, 1)], axis=-1)
            values = np.pad(values, ((0, 0), (0, 1), (0, 0)))
        largest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
        with np.errstate(invalid="ignore"):  # a logit of +inf makes its row NaN
            weights = rounded(np.exp(rounded(logits - np.where(np.isneginf(largest), 0, largest))))
        total = rounded(weights.sum(axis=-1, keepdims=True))
        unseen = total == 0  # and not NaN
        seen = np.where(unseen, 1, total)
        result = rounded(rounded(weights / seen) @ values)
        sums = np.where(unseen, -np.inf, rounded(largest + rounded(np.log(seen))))
        shape = (kv_heads, len(visible), group, -1)
        return tuple(x.reshape(shape).transpose(1, 0, 2, 3).reshape(len(visible), q_heads, -1) for x in (result, sums))

    for pack, sequence in sequences(operands, sliding_window=sliding_window):
        mine = wanted[(sequence.start <= wanted) & (wanted < sequence.end)]
        for block in np.split(mine, range(256, len(mine), 256)):
            keys = np.arange(*sequence.hull(block))
            sinks = operands["sinks"][pack] if "sinks" in operands else None
            if not block.size or (not keys.size and sinks is None):
                continue
            k = stored("key", pack, sequence, keys)
            v = k[..., :value_dim] if latent else stored("value", pack, sequence, keys)
            row_out, row_lse = attend(query[pack][block], k, v, sequence.visible(block, keys), sinks)
            out[pack][block], lse[pack][block] = row_out, row_lse[..., 0]
    return out, lse


def assert_matches(operands, out, lse=None, *, rows=None, **parameters) -> None:
    """Holds results to the project's bar, against the float64 definition; only `rows` (token numbers) if given.

    float32: within 1e-5 of the largest value. bfloat16 and float16: at most twice the error of the definition computed
    in that dtype, or what rounding the exact result to that dtype may cost (half a unit in the last place of the
    largest value), whichever is more. Rows that see no key are exactly 0, and their lse -inf or the sink. NaN is where
    the definition has it, and nowhere else.
    """
    exact_out, exact_lse = exact(operands, rows=rows, **parameters)
    dtype = out.dtype
    assert dtype == operands["query"].dtype and out.shape == exact_out.shape, (dtype, out.shape, exact_out.shape)
    checked = slice(None) if rows is None else rows

    def at_rows(array, tokens_axis):
        return None if array is None else np.asarray(array, np.float64).swapaxes(0, tokens_axis)[checked]

    got, exact_out = at_rows(out, out.ndim - 3), at_rows(exact_out, out.ndim - 3)
    unseen = np.isneginf(at_rows(exact_lse, out.ndim - 3))
    np.testing.assert_array_equal(got[unseen], 0.0)
    np.testing.assert_array_equal(got[(exact_out == 0).all(-1)], 0.0)
    coarse = (None, None) if dtype == jnp.float32 else in_dtype(operands, rows=rows, **parameters)
    _assert_within(got, exact_out, at_rows(coarse[0], out.ndim - 3), dtype, "out")
    if lse is not None:
        assert lse.dtype == jnp.float32 and lse.shape == exact_lse.shape, (lse.dtype, lse.shape)
        results = [at_rows(x, out.ndim - 3) for x in (lse, exact_lse, coarse[1])]
        np.testing.assert_array_equal(np.isneginf(results[0]), unseen)
        seen_lse = [None if x is None else np.where(unseen, 0.0, x) for x in results]
        _assert_within(*seen_lse, jnp.dtype(jnp.float32), "lse")


def assert_near(operands, out, lse, relative, lse_error, **parameters) -> None:
    """Holds results to errors where products are of 8 bits: relative in L2 of the output, the largest of the lse.

    Rows that see no key are exactly 0, and their lse -inf or the sink. NaN is where the definition has it.
    """
    exact_out, exact_lse = exact(operands, **parameters)
    got, got_lse = (np.asarray(x, np.float64) for x in (out, lse))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact_out), "where out is NaN")
    np.testing.assert_array_equal(got[(exact_out == 0).all(-1)], 0.0)
    np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(exact_lse))
    known = ~np.isnan(exact_out)
    error = np.linalg.norm(got[known] - exact_out[known]) / max(np.linalg.norm(exact_out[known]), 1e-30)
    assert error <= relative, f"out is off by {error:.3g} of its size, at most {relative:.3g} is allowed"
    finite = np.isfinite(exact_lse)
    np.testing.assert_allclose(got_lse[finite], exact_lse[finite], rtol=0, atol=lse_error)


def _assert_within(got, want, coarse, dtype, name) -> None:
    if not want.size:
        return
    broken = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), broken, f"where {name} is NaN")
    got, want, coarse = (None if x is None else np.where(broken, 0.0, x) for x in (got, want, coarse))
    assert np.all(np.isfinite(got)), f"{name} holds Inf"
    error, largest = np.max(np.abs(got - want)), np.max(np.abs(want))
    bar = 1e-5 * max(largest, 1.0 if name == "lse" else 0.0)
    if coarse is not None:
        bar = max(2 * np.max(np.abs(coarse - want)), float(jnp.finfo(dtype).eps) / 2 * largest)
    assert error <= bar, f"{name} is off by {error:.3g}, at most {bar:.3g} is allowed (largest value {largest:.3g})"
