"""The definition of the operation in plain jax.numpy: dense and slow, the oracle of every test.

For row i of a sequence with n new tokens, at position p = context_len - n + i, over its keys j:

    logits[j] = softmax_scale * (q . k[j]),  cap * tanh(logits / cap) with a soft cap
    visible[j] = 0 <= j <= p,  and j > p - W with a window W
    out = sum_j exp(logits[j]) v[j] / sum_j exp(logits[j]) over the visible keys;  0 where there are none
    lse = log sum_j exp(logits[j]) over the visible keys;  -inf where there are none
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_prefill.primitive.attention import normalised


def reference(
    query: Float[Array, "*batch tokens q_heads head_dim"],
    key_cache: Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "*pools kv_heads num_pages page_size value_dim"],
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    softmax_scale: float | None = None,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    compute_dtype=None,
) -> tuple[Float[Array, "*batch tokens q_heads value_dim"], Float[Array, "*batch tokens q_heads"]]:
    """Attention of each sequence's new tokens to its pages, by the formula; see the module's docstring.

    Computes in `compute_dtype`: by default float32, or float64 where jax_enable_x64 is set. Results have that dtype.
    """
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5
    if compute_dtype is None:
        compute_dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    one_pack = functools.partial(
        _one_pack,
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        compute_dtype=compute_dtype,
    )
    cache_batch_dims = key_cache.ndim - 4
    for dim in reversed(range(query.ndim - 3)):
        cache_axis = 0 if dim < cache_batch_dims else None
        one_pack = jax.vmap(one_pack, in_axes=(0, cache_axis, cache_axis, 0, 0, 0))
    return one_pack(query, key_cache, value_cache, context_lens, page_indices, query_offsets)


def _one_pack(query, key_cache, value_cache, context_lens, page_indices, query_offsets, **parameters):
    tokens, q_heads, _ = query.shape
    compute_dtype = parameters["compute_dtype"]
    offsets = jax.lax.cummax(jnp.clip(query_offsets, 0, tokens))
    out = jnp.zeros((tokens, q_heads, value_cache.shape[-1]), compute_dtype)
    lse = jnp.full((tokens, q_heads), -jnp.inf, compute_dtype)
    row = jnp.arange(tokens, dtype=jnp.int32)

    def add_sequence(seq, results):
        out, lse = results
        start, end = offsets[seq], offsets[seq + 1]
        owned = (start <= row) & (row < end)
        # Position -1 sees nothing: rows of other sequences must not look into this one's pages.
        position = jnp.where(owned, jnp.maximum(context_lens[seq], 0) - (end - row), -1)
        seq_out, seq_lse = _one_sequence(query, key_cache, value_cache, position, page_indices[seq], **parameters)
        return jnp.where(owned[:, None, None], seq_out, out), jnp.where(owned[:, None], seq_lse, lse)

    return jax.lax.fori_loop(0, context_lens.shape[0], add_sequence, (out, lse)) if page_indices.size else (out, lse)


def _one_sequence(
    query, key_cache, value_cache, position, pages, *, softmax_scale, attn_logits_soft_cap, sliding_window, compute_dtype
):
    """The attention of rows at the given positions to one sequence's keys."""
    tokens, q_heads, head_dim = query.shape
    kv_heads, num_pages = key_cache.shape[:2]
    pages = jnp.clip(pages, 0, num_pages - 1)

    def gather(cache):  # [kv_heads, keys, features]
        return cache[:, pages].reshape(kv_heads, -1, cache.shape[-1]).astype(compute_dtype)

    keys, values = gather(key_cache), gather(value_cache)
    j, position = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :], position[:, None]
    visible = j <= position
    if sliding_window is not None:
        visible &= j > position - sliding_window
    grouped = query.astype(compute_dtype).reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
    logits = jnp.einsum("tkgd,kjd->tkgj", grouped, keys) * jnp.asarray(softmax_scale, compute_dtype)
    if attn_logits_soft_cap is not None:
        logits = attn_logits_soft_cap * jnp.tanh(logits / attn_logits_soft_cap)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0, largest)[..., None])
    total = jnp.sum(weights, axis=-1)
    # A slot that no row sees may hold anything, and 0 * NaN is NaN.
    values = jnp.where(jnp.any(visible, axis=0)[None, :, None], values, 0)
    out, lse = normalised(jnp.einsum("tkgj,kjd->tkgd", weights, values), total, largest)
    return out.reshape(tokens, q_heads, -1), lse.reshape(tokens, q_heads)
