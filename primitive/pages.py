"""What goes with the attention: writing new keys and values into their pages, and combining partial results."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged_prefill.primitive import checks, context
from paged_prefill.primitive.append import append_to_pages_p
from paged_prefill.primitive.attention import normalised, part_of_merge
from paged_prefill.primitive.binding import shapes_of
from paged_prefill.primitive.context import AxisHint
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import APPEND, CACHES


def append_to_pages(
    key_cache: Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "*pools kv_heads num_pages page_size value_dim"] | None,
    key: Float[Array, "*batch tokens kv_heads head_dim"],
    value: Float[Array, "*batch tokens kv_heads value_dim"] | None,
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    key_scale: jax.typing.ArrayLike | None = None,
    value_scale: jax.typing.ArrayLike | None = None,
    layer: jax.typing.ArrayLike | None = None,
    head_axis: AxisHint = None,
    batch_axis: AxisHint = None,
    page_axis: AxisHint = None,
    cache_layout: str = DEFAULT_LAYOUT,
) -> tuple[jax.Array | None, ...]:
    """Writes the keys and values of a pack's new tokens into their pages; call it before `ragged_paged_prefill`.

    Token i of a sequence with n new tokens goes to position p = context_len - n + i, which is slot p % page_size of
    page page_indices[p // page_size]. Under `jax.jit` with the caches donated, nothing is copied. A token that no
    sequence owns, or whose position or page does not exist, is not written anywhere. Where two tokens go to one slot,
    either may be there in the end.

    Args:
      key_cache, value_cache: the page pools, in the dtype of `key` and `value`, or float8_e4m3fn, float8_e5m2 or int8:
        then a token is stored as its number over the scale, clipped to what the dtype holds and rounded to the nearest,
        ties to even. `*pools` dimensions, if any, are the first of `*batch`. value_cache is None for a latent cache.
      key, value: the new tokens, packed as the query of `ragged_paged_prefill` is. value is None for a latent cache.
      context_lens: tokens of each sequence in the cache once this call has written, so this chunk included.
      page_indices: the pages of each sequence, in order.
      query_offsets: sequence s owns tokens query_offsets[s] : query_offsets[s + 1].
      key_scale, value_scale: float32, of quantised caches, in the shape that `ragged_paged_prefill` takes. A number, and
        one of each KV head, are used as they are, and an absent one counts as 1. With one of each slot,
        [*pools, kv_heads, num_pages, page_size], each token and head gets its largest magnitude over the dtype's largest
        number, and what was there is written over.
      layer: which layer of caches [*pools, layers, kv_heads, ...] is written; an integer, also traced, clamped to those
        that there are.
      head_axis, batch_axis, page_axis: as in `ragged_paged_prefill`. Packs that write into one pool are whole on every
        device; where pages are cut, a token is written on the device that holds its page.
      cache_layout: the order of the caches' dimensions, as in `ragged_paged_prefill`. With keys and values in one array
        value_cache is None, and scales of each slot are in key_scale, of both.

    Returns:
      (key_cache, value_cache) with the tokens written; where either scale is one of each slot,
      (key_cache, value_cache, key_scale, value_scale). What was None is None.

    Raises:
      ValueError, TypeError: a shape or dtype does not fit; names the argument.
    """
    layout, layered = checks.check_layout(cache_layout), layer is not None
    checks.check_array("key", key)
    checks.check_cache_rank("key_cache", key_cache, layout, layered=layered)
    values = ("key_cache", key_cache) if layout.combined else ("value_cache", value_cache)
    for name, new, cache_name, cache in (("key", key, "key_cache", key_cache), ("value", value, *values)):
        if new is not None and cache is not None:
            checks.check_new_tokens(name, new, cache_name, cache, layout, layered)
    if value is not None:
        checks.check_same_tokens(key, value)
    named = checks.int32_indices(
        context_lens=context_lens, page_indices=page_indices, query_offsets=query_offsets
    ) | dict(key_cache=key_cache, value_cache=value_cache, key=key, value=value)
    pools = layout.lead(key_cache.shape)
    named |= checks.scales_of(pools, key_scale=key_scale, value_scale=value_scale)
    named |= checks.of_packs(key.shape[:-3], layer=layer)
    form = dict(cache_batch_dims=len(pools) - layered, cache_layout=cache_layout)
    hint = context.hint_of(head_axis, batch_axis, page_axis, key.ndim - 3)
    written = append_to_pages_p.bind(**named, hint=hint, **form)
    present = {name: array for name, array in named.items() if array is not None}
    names = [row.name for row in shapes_of(APPEND, present, present.values(), **form).results()]
    wanted = CACHES if {*names} <= {*CACHES} else (*CACHES, "key_scale", "value_scale")
    results = named | dict(zip(names, written, strict=True))
    return tuple(results[name] for name in wanted)


def merge(
    out_a: Float[Array, "*rows value_dim"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows value_dim"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows value_dim"], Float[Array, "*rows"]]:
    """Combines the attention of the same rows over two disjoint sets of keys, exactly.

    With w_a = exp(lse_a - m), w_b = exp(lse_b - m) and m = max(lse_a, lse_b):
    out = (w_a out_a + w_b out_b) / (w_a + w_b), lse = m + log(w_a + w_b). A side that saw no key (lse -inf) counts for
    nothing. An lse of NaN makes the row NaN, and so does one of +inf: FlashAttention-2 marks empty rows with it, where
    -inf is meant here. This is the merge of FlashAttention's split keys and FlashInfer's cascades, with natural
    logarithms.

    Args:
      out_a, out_b: outputs, float32, bfloat16 or float16; the sum is in float32 (float64 for float64).
      lse_a, lse_b: natural logarithms of the sums of exponentials, as `ragged_paged_prefill` returns them.

    Returns:
      The output in `out_a`'s dtype, and its lse.

    Raises:
      ValueError, TypeError: the shapes do not agree, or a dtype is no float; names the argument.
    """
    checks.check_partials(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    wide = jnp.dtype("float64" if jnp.dtype("float64") in {x.dtype for x in (out_a, lse_a, out_b, lse_b)} else "float32")
    largest = jnp.maximum(lse_a.astype(wide), lse_b.astype(wide))
    shift = jnp.where(jnp.isneginf(largest), 0.0, largest)
    (part_a, weight_a), (part_b, weight_b) = (part_of_merge(*x, shift) for x in ((out_a, lse_a), (out_b, lse_b)))
    out, lse = normalised(part_a + part_b, weight_a + weight_b, shift)
    return out.astype(out_a.dtype), lse.astype(lse_a.dtype)
