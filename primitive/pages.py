"""What goes with the operation: writing new keys and values into their pages, and combining partial results."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_prefill.primitive import checks


def append_to_pages(
    key_cache: Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "*pools kv_heads num_pages page_size value_dim"],
    key: Float[Array, "*batch tokens kv_heads head_dim"],
    value: Float[Array, "*batch tokens kv_heads value_dim"],
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
) -> tuple[
    Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    Float[Array, "*pools kv_heads num_pages page_size value_dim"],
]:
    """Writes the keys and values of a pack's new tokens into their pages; call it before `ragged_paged_prefill`.

    Token i of a sequence with n new tokens goes to position p = context_len - n + i, which is slot p % page_size of
    page page_indices[p // page_size]. Under `jax.jit` with both caches donated, nothing is copied. A token that no
    sequence owns, or whose position or page does not exist, is not written anywhere.

    Args:
      key_cache, value_cache: the page pools, in the dtype of `key` and `value`.
      key, value: the new tokens, packed as the query of `ragged_paged_prefill` is.
      context_lens: tokens of each sequence in the cache once this call has written, so this chunk included.
      page_indices: the pages of each sequence, in order.
      query_offsets: sequence s owns tokens query_offsets[s] : query_offsets[s + 1].

    Returns:
      The two caches with the tokens written.

    Raises:
      ValueError, TypeError: a shape or dtype does not fit; names the argument.
    """
    checks.check_new_tokens("key", key, key_cache)
    checks.check_new_tokens("value", value, value_cache)
    checks.check_same_tokens(key, value)
    indices = checks.int32_indices(
        context_lens=context_lens, page_indices=page_indices, query_offsets=query_offsets
    )
    checks.check_operands(
        key, key_cache, value_cache, *indices, cache_batch_dims=key_cache.ndim - 4, query_name="key"
    )
    write = _append
    for _ in range(key_cache.ndim - 4):
        write = jax.vmap(write)
    return write(key_cache, value_cache, key, value, *indices)


def _append(key_cache, value_cache, key, value, context_lens, page_indices, query_offsets):
    num_pages, page_size = key_cache.shape[1:3]
    locate = functools.partial(_slots, tokens=key.shape[-3], num_pages=num_pages, page_size=page_size)
    for _ in range(key.ndim - 3):
        locate = jax.vmap(locate)
    page, slot = (x.reshape(-1) for x in locate(context_lens, page_indices, query_offsets))

    def write(cache, new):
        new = jnp.moveaxis(new.reshape(-1, *new.shape[-2:]), 1, 0)
        # Heads are a batch dimension of the indices too, or XLA's TPU compiler copies the cache in a loop.
        at = (jnp.broadcast_to(x, new.shape[:2]) for x in (page, slot))
        return jax.vmap(lambda pages, new, page, slot: pages.at[page, slot].set(new, mode="drop"))(cache, new, *at)

    return write(key_cache, key), write(value_cache, value)


def _slots(context_lens, page_indices, query_offsets, *, tokens, num_pages, page_size):
    """The page and slot of each token of one pack; page `num_pages`, which does not exist, for those without one."""
    nowhere = jnp.full(tokens, num_pages, jnp.int32), jnp.zeros(tokens, jnp.int32)
    seqs, pages_per_seq = page_indices.shape
    if not page_indices.size:
        return nowhere
    offsets = jax.lax.cummax(jnp.clip(query_offsets, 0, tokens))
    token = jnp.arange(tokens, dtype=jnp.int32)
    seq = jnp.searchsorted(offsets, token, side="right").astype(jnp.int32) - 1
    owned = (seq >= 0) & (seq < seqs)
    seq = jnp.clip(seq, 0, seqs - 1)
    position = context_lens[seq] - offsets[seq + 1] + token
    column = position // page_size
    exists = owned & (position >= 0) & (column < pages_per_seq)
    page = page_indices[seq, jnp.clip(column, 0, pages_per_seq - 1)]
    exists &= (0 <= page) & (page < num_pages)
    return jnp.where(exists, page, num_pages), position % page_size


def merge(
    out_a: Float[Array, "*rows value_dim"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows value_dim"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows value_dim"], Float[Array, "*rows"]]:
    """Combines the attention of the same rows over two disjoint sets of keys, exactly.

    With w_a = exp(lse_a - m), w_b = exp(lse_b - m) and m = max(lse_a, lse_b):
    out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = m + log(w_a + w_b). A side that saw no key (lse -inf) counts for
    nothing. This is the merge of FlashAttention's split keys and FlashInfer's cascades, with natural logarithms.

    Args:
      out_a, out_b: outputs, float32, bfloat16 or float16; the sum is in float32 (float64 for float64).
      lse_a, lse_b: natural logarithms of the sums of exponentials, as `ragged_paged_prefill` returns them.

    Returns:
      The output in `out_a`'s dtype, and its lse.

    Raises:
      ValueError: the shapes do not agree; names the argument.
    """
    checks.check_partial("out_b", out_b.shape, out_a.shape)
    checks.check_partial("lse_a", lse_a.shape, out_a.shape[:-1])
    checks.check_partial("lse_b", lse_b.shape, out_a.shape[:-1])
    largest = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(jnp.isneginf(largest), 0.0, largest)
    weight_a, weight_b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = weight_a + weight_b
    seen = jnp.where(total > 0, total, 1.0)

    def part(weight, out):
        return jnp.where(weight[..., None] > 0, (weight / seen)[..., None] * out, 0.0)

    out = (part(weight_a, out_a) + part(weight_b, out_b)).astype(out_a.dtype)
    return out, jnp.where(total > 0, shift + jnp.log(seen), -jnp.inf)
