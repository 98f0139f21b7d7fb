"""The public functions: what users call, in the terms they know."""

import functools

import jax
from jaxtyping import Array, Float, Int, UInt32

from paged_prefill.primitive import checks, context
from paged_prefill.primitive.checks import DEFAULT_MASK_VALUE, Platform
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import AxisHint
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import PREFILL
from paged_prefill.primitive.prefill import paged_prefill_p, parameters_of


def prefill_page_attention(
    query: Float[Array, "chunk q_heads head_dim"],
    key_cache: Float[Array, "kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "kv_heads num_pages page_size value_dim"],
    context_len: Int[Array, "1"],
    page_indices: Int[Array, " pages_per_seq"],
    /,
    *,
    softmax_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    platform: Platform | None = None,
    cfg: PrefillPageAttentionConfig | None = None,
    head_axis: AxisHint = None,
    batch_axis: AxisHint = None,
    page_axis: AxisHint = None,
) -> Float[Array, "chunk q_heads value_dim"]:
    """Attention of one sequence's new tokens to its paged keys and values, their own included.

    Takes the call of ejKernel's function of the same name, argument for argument. Row i stands at position
    p = context_len - chunk + i and sees keys 0 to p, or with a window the last `sliding_window` of them.

    Args:
      query: the chunk, float32, bfloat16 or float16.
      key_cache, value_cache: the page pools, the chunk already written (see `append_to_pages`), both in query's dtype or
        both in a quantised one, whose numbers are taken as they are.
      context_len: tokens of the sequence in the cache, the chunk included; a scalar or one element, any integer dtype.
      page_indices: key j is in page page_indices[j // page_size], slot j % page_size; any integer dtype.
      softmax_scale: multiplies query . key; 1 / sqrt(head_dim) by default.
      mask_value: accepted for ejKernel's callers; masked keys have weight exactly 0 whatever it is.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap), before masking.
      sliding_window: how many keys a row sees, its own included.
      platform: "auto" or None takes the fastest kernel that supports the call; "xla", "triton", "pallas" and "cuda" ask
        for one. Under `jax.export`, "auto" is "xla", which runs anywhere, unless a `jax.sharding.AbstractDevice` says
        which TPU the module is for; a kernel that is asked for is then built for devices like this process's.
      cfg: sizes for the kernel to run with; it always wins over tables and heuristics.
      head_axis: the mesh axis, or axes, that the heads are cut over; see `ragged_paged_prefill`.
      batch_axis: those that the first dimension added by `jax.vmap` is cut over; a single call has no batch.
      page_axis: those that the caches' pages are cut over; see `ragged_paged_prefill`.

    Returns:
      The output in query's dtype, accumulated in float32. A row that sees no key is 0.

    Raises:
      ValueError, TypeError: a shape, dtype or parameter does not fit, or the kernel asked for cannot run; names the
        argument, what it got, and what it takes.
    """
    checks.check_mask_value(mask_value)
    checks.check_config("cfg", cfg)
    indices = checks.indices_of_one(query, key_cache, value_cache, context_len, page_indices)
    parameters = parameters_of(
        dict(query=query),
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        platform=platform,
        config=cfg,
    )
    hint = context.hint_of(head_axis, batch_axis, page_axis, 0)
    return _attend_one(query, key_cache, value_cache, *indices, parameters=tuple(parameters.items()), hint=hint)


@functools.partial(jax.jit, static_argnames=("parameters", "hint"), inline=True)  # one dispatch where the call is eager
def _attend_one(query, key_cache, value_cache, context_len, page_indices, *, parameters, hint):
    pack = checks.pack_of_one(query, key_cache, value_cache, context_len, page_indices)
    present = tuple(row.name for row in PREFILL.operands[: len(pack)])
    return paged_prefill_p.bind(*pack, present=present, hint=hint, **dict(parameters))[0]


def ragged_paged_prefill(
    query: Float[Array, "*batch tokens q_heads head_dim"],
    key_cache: Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "*pools kv_heads num_pages page_size value_dim"] | None,
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    softmax_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    platform: Platform | None = None,
    cfg: PrefillPageAttentionConfig | None = None,
    head_axis: AxisHint = None,
    batch_axis: AxisHint = None,
    return_lse: bool = False,
    key_ranges: Int[Array, "*batch tokens 2"] | None = None,
    tree_mask: UInt32[Array, "*batch tokens words"] | None = None,
    sinks: Float[Array, "*batch q_heads"] | None = None,
    key_scale: jax.typing.ArrayLike | None = None,
    value_scale: jax.typing.ArrayLike | None = None,
    layer: jax.typing.ArrayLike | None = None,
    value_dim: int | None = None,
    page_axis: AxisHint = None,
    cache_layout: str = DEFAULT_LAYOUT,
) -> (
    Float[Array, "*batch tokens q_heads value_dim"]
    | tuple[Float[Array, "*batch tokens q_heads value_dim"], Float[Array, "*batch tokens q_heads"]]
):
    """Attention of a pack: the new tokens of several sequences back to back, prefill and decode mixed.

    Sequence s owns tokens query_offsets[s] : query_offsets[s + 1]; with n of them, its row i stands at position
    p = context_lens[s] - n + i and sees keys 0 to p, or with a window the last `sliding_window` of them. A decode step
    is a sequence with one new token.

    Args:
      query: float32, bfloat16 or float16. `*batch` dimensions, if any, hold a pack each.
      key_cache, value_cache: the page pools, the new tokens already written (see `append_to_pages`), both in query's
        dtype, or in float8_e4m3fn, float8_e5m2 or int8. `*pools` dimensions, if any, are the first of `*batch`: each
        such element has pools of its own. value_cache is None for a latent cache, or if key_cache has the values too.
      context_lens: tokens of each sequence in the cache, this chunk included; negative counts as 0.
      page_indices: key j of a sequence is in page page_indices[j // page_size], slot j % page_size. Entries that no row
        needs may hold anything.
      query_offsets: clamped to [0, tokens], and may not decrease.
      softmax_scale: multiplies query . key; 1 / sqrt(head_dim) by default.
      mask_value: accepted for ejKernel's callers; masked keys have weight exactly 0 whatever it is.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap), before masking.
      sliding_window: how many keys a row sees, its own included.
      platform: "auto" or None takes the fastest kernel that supports the call; "xla", "triton", "pallas" and "cuda" ask
        for one.
      cfg: sizes for the kernel to run with; it always wins over tables and heuristics.
      head_axis: hint for a mesh with automatic axes: the axis, or tuple of axes, that the heads are cut over. The
        caches are taken to be cut by as many of them, from the first, as divide kv_heads, and whole over the rest.
        With a hint the call needs no compiler's callback, so it works on several TPUs and can be exported; what no
        hint names is whole on each device. Explicit mesh axes speak for themselves, and so does a shard_map.
      batch_axis: likewise for the first dimension of `*batch`, or, where there is none, the first that vmap adds.
      page_axis: likewise for the caches' pages: of N pages on W devices, page g is on device g // (N / W). Each device
        attends to the keys that it holds, and what it gets is merged, the size of the output.
      return_lse: also return log(sum(exp(logits))) of each row, natural logarithm, float32: what `merge` takes.
      key_ranges: row i sees the keys lo <= j < hi of its sequence, in place of causality and window; see `masks`.
      tree_mask: which tokens of its own chunk a row sees, a bit each, on top of that; see `masks.tree`.
      sinks: a logit of each query head that has no value: exp(sink) joins the sum of exponentials. [q_heads] or
        [*batch, q_heads], numbers of any dtype.
      key_scale, value_scale: what the numbers of quantised caches are multiplied by, 1 where absent: a number, or
        behind [*pools, (layers)] one of each KV head [kv_heads] or of each slot [kv_heads, num_pages, page_size].
      layer: which layer is read of caches [*pools, layers, kv_heads, ...]; an integer or [*batch], also traced, clamped
        to those that there are.
      value_dim: of a latent cache: how many of a key's features, the first ones, are its value.
      cache_layout: the order of the caches' dimensions behind those in front: "kpsd" as above, "pskd" [num_pages,
        page_size, kv_heads, head_dim] or "pksd" [num_pages, kv_heads, page_size, head_dim]; and with keys and values in
        one array, key_cache, where value_cache is None: "ps(k2)d" [num_pages, page_size, 2 * kv_heads, head_dim], each
        key's head followed by its value's, "p2ksd" and "p2skd". Scales of slots lie as the cache does, without features.

    Returns:
      The output in query's dtype, accumulated in float32; with `return_lse`, a pair with the lse. A row that sees no
      key has output 0 and lse -inf, or its sink where there are sinks; a token that no sequence owns 0 and -inf.

    Raises:
      ValueError, TypeError: a shape, dtype or parameter does not fit, or the kernel asked for cannot run; names the
        argument, what it got, and what it takes. Index values are not checked here; see `validate`.
    """
    checks.check_mask_value(mask_value)
    checks.check_config("cfg", cfg)
    checks.check_flag("return_lse", return_lse)
    layout, layered = checks.check_layout(cache_layout), layer is not None
    checks.check_leading("query", query)
    checks.check_cache_rank("key_cache", key_cache, layout, query.shape[:-3], layered)
    batch, pools = query.shape[:-3], layout.lead(key_cache.shape)
    named = checks.int32_indices(
        context_lens=context_lens, page_indices=page_indices, query_offsets=query_offsets
    ) | checks.scales_of(pools, key_scale=key_scale, value_scale=value_scale)
    if key_ranges is not None:
        named |= checks.int32_indices(key_ranges=key_ranges)
    out, lse = paged_prefill_p.bind(
        query,
        key_cache,
        value_cache,
        **named,
        tree_mask=tree_mask,
        **checks.of_packs(batch, sinks=sinks, layer=layer),
        value_dim=value_dim,
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        platform=platform,
        config=cfg,
        hint=context.hint_of(head_axis, batch_axis, page_axis, len(batch)),
        cache_batch_dims=len(pools) - layered,
        cache_layout=cache_layout,
    )
    return (out, lse) if return_lse else out
