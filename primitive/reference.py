"""The definition of the operation in plain jax.numpy: dense and slow, the oracle of every test.

For row i of a sequence with n new tokens, at position p = context_len - n + i, over its keys 0 <= j < context_len that
the page table has a page for:

    k[j], v[j] = stored numbers, times key_scale and value_scale if given;  v[j] = k[j][:value_dim] in a latent cache
    logits[j]  = softmax_scale * (q . k[j]),  cap * tanh(logits / cap) with a soft cap
    visible[j] = j <= p,  and j > p - W with a window W;  lo <= j < hi in place of both with key_ranges
                 and, with a tree_mask, for token k = j - (context_len - n) with 0 <= k < 32 * words:
                 bit k % 32 of word k // 32 is set
    total      = sum_j exp(logits[j]) over the visible keys,  + exp(sink) with sinks; one of +inf counts as NaN
    out        = sum_j exp(logits[j]) v[j] / total over the visible keys;  0 where there are none
    lse        = log(total);  -inf where total is 0

A token that no sequence owns has out 0 and lse -inf, with sinks too. Caches of another layout mean what they do once
their dimensions are brought into order, and so do scales of slots.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from paged_prefill.primitive import checks
from paged_prefill.primitive.attention import normalised
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import BATCH, PREFILL


def reference(
    query: Float[Array, "*batch tokens q_heads head_dim"],
    key_cache: Array,  # [*pools, (layers,) kv_heads, num_pages, page_size, head_dim]
    value_cache: Array | None,  # [*pools, (layers,) kv_heads, num_pages, page_size, value_dim]
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    key_ranges: Int[Array, "*batch tokens 2"] | None = None,
    tree_mask: UInt32[Array, "*batch tokens words"] | None = None,
    sinks: Float[Array, "*batch q_heads"] | None = None,
    key_scale: Float[Array, "..."] | None = None,
    value_scale: Float[Array, "..."] | None = None,
    layer: Int[Array, "*batch"] | None = None,
    value_dim: int | None = None,
    softmax_scale: float | None = None,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    cache_layout: str = DEFAULT_LAYOUT,
    compute_dtype=None,
) -> tuple[Float[Array, "*batch tokens q_heads value_dim"], Float[Array, "*batch tokens q_heads"]]:
    """Attention of each sequence's new tokens to its pages, by the formula; see the module's docstring.

    Computes in `compute_dtype`: by default float32, or float64 where jax_enable_x64 is set. Results have that dtype.
    `value_dim` is told where value_cache is None: the values are the first features of the keys.
    """
    given = locals()
    operands = {row.name: jnp.asarray(given[row.name]) for row in PREFILL.operands if given[row.name] is not None}
    attention = checks.attention_of(
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        head_dim=query.shape[-1],
    )
    if compute_dtype is None:
        compute_dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    one_pack = functools.partial(_one_pack, attention=attention, value_dim=value_dim, compute_dtype=compute_dtype)
    layout = checks.check_layout(cache_layout)
    lead_dims = len(layout.lead(operands["key_cache"].shape))
    operands = _in_default_layout(operands, layout, lead_dims)
    batch, cache_batch_dims = query.shape[:-3], lead_dims - (layer is not None)
    rows = PREFILL.table(PREFILL.present(operands))
    mapped = [  # of each batch dimension: the operands that have it
        {row.name for row in rows if row.lead == BATCH or _has(operands[row.name], dim, size, cache_batch_dims)}
        for dim, size in enumerate(batch)
    ]
    for row in rows:  # a pool of 1 serves all of a dimension
        if row.lead != BATCH:
            ones = tuple(dim for dim in range(cache_batch_dims) if row.name not in mapped[dim])
            operands[row.name] = operands[row.name].squeeze(ones)
    for names in reversed(mapped):
        one_pack = jax.vmap(one_pack, in_axes=({name: 0 if name in names else None for name in operands},))
    return one_pack(operands)


def _in_default_layout(operands, layout, lead_dims):
    """The operands with the caches, and scales of slots, in this project's order, keys and values apart."""
    moved = dict(operands)
    for kind in ("cache", "scale"):
        for name in ("key", "value"):
            array = operands.get(f"{name}_{kind}")
            if array is not None and array.ndim > lead_dims + 1:
                moved |= zip((f"{name}_{kind}", f"value_{kind}"), layout.to_default(array, lead_dims))
    return moved


def _has(operand, dim, size, cache_batch_dims) -> bool:
    """Whether a cache, or what goes with it, has pools of its own for each element of a batch dimension."""
    return dim < cache_batch_dims and operand.shape[dim] == size


def _one_pack(operands, *, attention, value_dim, compute_dtype):
    query, offsets, layer = (operands.get(name) for name in ("query", "query_offsets", "layer"))
    tokens, q_heads, _ = query.shape
    pool = {
        name: operands[name] for name in ("key_cache", "value_cache", "key_scale", "value_scale") if name in operands
    }
    if layer is not None:
        pool = {name: x[jnp.clip(layer, 0, x.shape[0] - 1)] for name, x in pool.items()}
    features = value_dim if value_dim is not None else pool["value_cache"].shape[-1]
    out = jnp.zeros((tokens, q_heads, features), compute_dtype)
    lse = jnp.full((tokens, q_heads), -jnp.inf, compute_dtype)
    offsets = jax.lax.cummax(jnp.clip(offsets, 0, tokens))
    token = jnp.arange(tokens, dtype=jnp.int32)

    def add_sequence(seq, results):
        out, lse = results
        start, end = offsets[seq], offsets[seq + 1]
        owned = (start <= token) & (token < end)
        keys, values = _keys_and_values(pool, operands["page_indices"][seq], value_dim, compute_dtype)
        # Rows of other sequences must not look into this one's pages.
        visible = owned[:, None] & _visible(operands, seq, token - start, end - start, keys.shape[1], attention)
        seq_out, seq_lse = _softmax(
            query.astype(compute_dtype), keys, values, visible, operands.get("sinks"), attention
        )
        return jnp.where(owned[:, None, None], seq_out, out), jnp.where(owned[:, None], seq_lse, lse)

    return jax.lax.fori_loop(0, offsets.shape[0] - 1, add_sequence, (out, lse))


def _keys_and_values(pool, pages, value_dim, compute_dtype):
    """One sequence's keys and values, [kv_heads, keys, features]."""

    def gather(name):
        cache = pool[f"{name}_cache"]
        at = jnp.clip(pages, 0, cache.shape[1] - 1)
        gathered = cache[:, at].reshape(cache.shape[0], -1, cache.shape[-1]).astype(compute_dtype)
        scale = pool.get(f"{name}_scale", jnp.ones(())).astype(compute_dtype)
        if scale.ndim == 3:
            return gathered * scale[:, at].reshape(*gathered.shape[:2], 1)
        return gathered * scale.reshape(-1, 1, 1)

    keys = gather("key")
    return keys, keys[..., :value_dim] if value_dim is not None else gather("value")


def _visible(operands, seq, row, length, keys, attention):
    """Which keys of a sequence each of its rows sees, [rows, keys]."""
    context_len = jnp.maximum(operands["context_lens"][seq], 0)
    first_new = context_len - length
    low, high = attention.visible_keys(first_new + row)
    if "key_ranges" in operands:
        low, high = operands["key_ranges"].T
    j = jnp.arange(keys, dtype=jnp.int32)
    visible = (low[:, None] <= j[None, :]) & (j[None, :] < jnp.minimum(high, context_len)[:, None])
    if "tree_mask" in operands:
        k = j - first_new
        in_tree = (0 <= k) & (k < 32 * operands["tree_mask"].shape[1])
        k = jnp.where(in_tree, k, 0)
        bit = operands["tree_mask"][:, k // 32] >> (k % 32).astype(jnp.uint32)[None, :] & jnp.uint32(1)
        visible &= (bit == 1) | ~in_tree[None, :]
    return visible


def _softmax(query, keys, values, visible, sinks, attention):
    """Output and lse of rows that see the given keys."""
    tokens, q_heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    grouped = query.reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
    logits = jnp.einsum("tkgd,kjd->tkgj", grouped, keys) * attention.softmax_scale
    if attention.attn_logits_soft_cap is not None:
        logits = attention.attn_logits_soft_cap * jnp.tanh(logits / attention.attn_logits_soft_cap)
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(query.dtype).reshape(1, kv_heads, -1)
        largest = jnp.maximum(largest, sinks)
    shift = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = jnp.exp(logits - shift[..., None])
    total = jnp.sum(weights, axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks - shift)
    # A slot that no row sees may hold anything, and 0 * NaN is NaN.
    values = jnp.where(jnp.any(visible, axis=0)[None, :, None], values, 0)
    out, lse = normalised(jnp.einsum("tkgj,kjd->tkgd", weights, values), total, largest)
    return out.reshape(tokens, q_heads, -1), lse.reshape(tokens, q_heads)
