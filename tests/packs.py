"""Random packs for tests, poisoned wherever no row may look, and results held to the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.tests import oracle

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
    # NumPy converts, for JAX would compile a program for each shape.
    floats = (jax.device_put(x.astype(np.float32).astype(dtype)) for x in (query, key_cache, value_cache))
    lens = np.asarray(context_lens, np.int32).reshape(len(lengths))
    return Pack(*floats, *(jax.device_put(x) for x in (lens, page_indices, offsets.astype(np.int32))))


def exact(pack: Pack, **parameters):
    """The float64 result of a pack by the definition, as numpy arrays (out, lse)."""
    return oracle.exact(pack._asdict(), **parameters)


def assert_matches_reference(pack: Pack, out, lse=None, **parameters) -> None:
    """Holds results of a pack to the project's bar; see `oracle.assert_matches`."""
    oracle.assert_matches(pack._asdict(), out, lse, **parameters)
