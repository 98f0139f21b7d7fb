"""Random packs for tests, poisoned wherever no row may look, and the bar that results are held to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.primitive.reference import reference

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
    free = list(rng.permutation(num_pages))
    key_cache = np.full((kv_heads, num_pages, page_size, head_dim), poison, np.float32)
    value_cache = np.full((kv_heads, num_pages, page_size, value_dim), poison, np.float32)
    page_indices = rng.choice(JUNK_PAGES, (len(lengths), pages_per_seq)).astype(np.int32)
    for seq, (length, context) in enumerate(zip(lengths, context_lens, strict=True)):
        first = 0 if sliding_window is None else max(0, context - length - sliding_window + 1)
        if not length:
            first = context  # no row, so nothing is seen
        for key in range(first, context):
            column = key // page_size
            if page_indices[seq, column] in JUNK_PAGES:
                page_indices[seq, column] = free.pop()
            page = page_indices[seq, column]
            key_cache[:, page, key % page_size] = rng.standard_normal((kv_heads, head_dim))
            value_cache[:, page, key % page_size] = rng.standard_normal((kv_heads, value_dim))
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
    """The float64 reference of a pack, as numpy arrays (out, lse)."""
    with jax.enable_x64(True):
        return tuple(map(np.asarray, jax.jit(lambda *p: reference(*p, **parameters))(*pack)))


def in_dtype(pack: Pack, **parameters):
    """The reference computed wholly in the pack's own dtype, as float64 numpy arrays (out, lse)."""
    dtype = pack.query.dtype
    results = jax.jit(lambda *p: reference(*p, compute_dtype=dtype, **parameters))(*pack)
    return tuple(np.asarray(x, np.float64) for x in results)


def assert_matches_reference(pack: Pack, out, lse=None, **parameters) -> None:
    """Holds results to the project's bar, against the float64 reference.

    float32: within 1e-5 of the largest value. bfloat16 and float16: at most twice the error of the reference computed
    in that dtype, or what rounding the exact result to that dtype may cost (half a unit in the last place of the
    largest value), whichever is more. Rows that see no key are exactly 0 and -inf.
    """
    exact_out, exact_lse = exact(pack, **parameters)
    dtype = out.dtype
    assert dtype == pack.query.dtype and out.shape == exact_out.shape, (dtype, out.shape, exact_out.shape)
    unseen = np.isneginf(exact_lse)
    got = np.asarray(out, np.float64)
    np.testing.assert_array_equal(got[unseen], 0.0)
    coarse_out, coarse_lse = (None, None) if dtype == jnp.float32 else in_dtype(pack, **parameters)
    _assert_within(got, exact_out, coarse_out, dtype, "out")
    if lse is not None:
        assert lse.dtype == jnp.float32 and lse.shape == exact_lse.shape, (lse.dtype, lse.shape)
        np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), unseen)
        seen_lse = [None if x is None else np.where(unseen, 0.0, x) for x in (np.asarray(lse), exact_lse, coarse_lse)]
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
