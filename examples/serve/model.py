"""The decoder: one function for all families, over paged caches.

What a layer does is decided by which weights it has: `query_norm` there means that queries are normalised, `sinks` that
its attention has sinks, `router` that it has experts. Letters of products: t tokens, w width, h heads, d features.

A step's tokens are a pack, as `ragged_paged_prefill` has it. Caches are a dict by the features of a key, each of them
one `Cache` for all layers of that kind, which layers of a scan write and read in place by their number in it.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from paged_prefill import append_to_pages, masks, ragged_paged_prefill
from paged_prefill.examples.serve import experts
from paged_prefill.examples.serve.config import Config

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever config.json says
ACTIVATIONS = dict(
    silu=jax.nn.silu,
    gelu=functools.partial(jax.nn.gelu, approximate=False),
    gelu_tanh=functools.partial(jax.nn.gelu, approximate=True),
)


class Cache(NamedTuple):
    """The pages of all layers of one kind."""

    key: Array  # [layers, kv_heads, num_pages, page_size, head_dim]
    value: Array | None  # None for a latent cache
    key_scale: Array | None = None  # float32 [layers, kv_heads, num_pages, page_size], of a quantised cache
    value_scale: Array | None = None


class Pack(NamedTuple):
    """Which tokens are whose, and where their keys lie."""

    context_lens: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]
    query_offsets: Int[Array, " seqs_plus_1"]


class Step(NamedTuple):
    """What a layer needs to know of a step's tokens beside their vectors."""

    pack: Pack
    position: Int[Array, " tokens"]  # of a draft its depth; -1 where nobody owns the token
    tree_mask: UInt32[Array, "tokens words"] | None = None


def new_caches(config: Config, num_pages: int, page_size: int, dtype, *, quantised=None) -> dict[str, Cache]:
    """Empty caches in `dtype`, or in the dtype `quantised` with a scale of each slot."""
    kinds = {layer.head_dim: (layer.kv_heads, layer.head_dim) for layer in config.layers}
    if len({(layer.kv_heads, layer.head_dim) for layer in config.layers}) > len(kinds):
        raise ValueError("layers whose keys have as many features must have as many KV heads")

    def cache(kv_heads, head_dim):
        layers = sum(layer.head_dim == head_dim for layer in config.layers)
        pages = (layers, kv_heads, num_pages, page_size)
        key = jnp.zeros((*pages, head_dim), quantised or dtype)
        scale = None if quantised is None else jnp.zeros(pages, jnp.float32)
        if config.latent:
            return Cache(key, None, scale, None)
        return Cache(key, jnp.zeros_like(key), scale, None if scale is None else jnp.zeros_like(scale))

    return {str(head_dim): cache(*kind) for head_dim, kind in kinds.items()}


def forward(config: Config, weights: dict, caches: dict[str, Cache], tokens: Int[Array, " tokens"], step: Step):
    """The vectors of all tokens behind the last norm, [tokens, width], and the caches with their keys and values."""
    x = weights["embedding"][tokens]
    x *= jnp.asarray(config.embedding_scale, x.dtype)

    def pattern(carry, layers):
        for layer in layers:
            carry = decoder_layer(config, layer, *carry, step)
        return carry, None

    for segment in weights["segments"]:
        (x, caches), _ = lax.scan(pattern, (x, caches), segment)
    return rms_norm(x, weights["final_norm"], config.norm_eps), caches


def unembed(config: Config, weights: dict, x: Float[Array, "rows width"]) -> Float[Array, "rows vocabulary"]:
    """float32 logits of what `forward` returns."""
    matrix = weights.get("unembedding", weights["embedding"])
    logits = jnp.einsum("tw,vw->tv", x, matrix, preferred_element_type=jnp.float32)
    if config.final_soft_cap is not None:
        logits = config.final_soft_cap * jnp.tanh(logits / config.final_soft_cap)
    return logits


def decoder_layer(config: Config, w: dict, x, caches, step: Step):
    """One layer: attention and feed-forward, each with the norms that it has before and behind."""

    def norm(x, name):
        return rms_norm(x, w[name], config.norm_eps) if name in w else x

    attention = latent_attention if config.latent else grouped_attention
    attended, caches = attention(config, w, norm(x, "attention_norm"), caches, step)
    x += norm(attended, "attention_post_norm")
    fed = feed_forward(config, w, norm(x, "mlp_norm"))
    x += norm(fed, "mlp_post_norm")
    return x * w["layer_scale"].reshape(1, 1) if "layer_scale" in w else x, caches


def grouped_attention(config: Config, w: dict, x, caches, step: Step):
    """Attention whose KV heads serve several query heads each, keys and values in pages."""

    def projected(name):
        heads = jnp.einsum("tw,whd->thd", x, w[name])
        heads += w[f"{name}_bias"][None] if f"{name}_bias" in w else 0
        return rms_norm(heads, w[f"{name}_norm"], config.norm_eps) if f"{name}_norm" in w else heads

    def rotated(heads):
        heads = rotate(heads, step.position, w["frequencies"], w["rope_scale"])
        return rms_norm(heads, w["rotated_norm"], config.norm_eps) if "rotated_norm" in w else heads

    query, key, value = rotated(projected("query")), rotated(projected("key")), projected("value")
    if "temperature" in w:
        query *= growth(config, w["temperature"], step.position).astype(query.dtype)
    attended, caches = attend(config, w, query, key, value, caches, step)
    out = jnp.einsum("thd,hdw->tw", attended, w["out"])
    return out + w["out_bias"][None] if "out_bias" in w else out, caches


def latent_attention(config: Config, w: dict, x, caches, step: Step):
    """DeepSeek's (arXiv 2405.04434), absorbed: what makes keys and values of latents goes into query and output."""
    sizes = config.latent
    if "query_down" in w:
        query = rms_norm(x @ w["query_down"], w["query_down_norm"], LATENT_NORM_EPS)
        query = jnp.einsum("tr,rhd->thd", query, w["query_up"])
    else:
        query = jnp.einsum("tw,whd->thd", x, w["query_up"])
    query, query_rotary = jnp.split(query, [sizes.head_dim], axis=-1)
    latent, key_rotary = jnp.split(x @ w["latent_down"], [sizes.rank], axis=-1)
    latent = rms_norm(latent, w["latent_norm"], LATENT_NORM_EPS)
    rotary = functools.partial(rotate, position=step.position, frequencies=w["frequencies"], scale=w["rope_scale"])
    query = jnp.concatenate([jnp.einsum("thd,hdl->thl", query, w["key_up"]), rotary(query_rotary)], axis=-1)
    key = jnp.concatenate([latent[:, None], rotary(key_rotary[:, None])], axis=-1)
    attended, caches = attend(config, w, query, key, None, caches, step)
    return jnp.einsum("thl,hlv,hvw->tw", attended, w["value_up"], w["out"]), caches


def attend(config: Config, w: dict, query, key, value, caches, step: Step):
    """Writes a layer's new keys and values into its cache, and attends to it."""
    kind, layer = str(key.shape[-1]), w["cache_layer"]
    cache = caches[kind]
    scales = dict(key_scale=cache.key_scale, value_scale=cache.value_scale)
    cache = Cache(*append_to_pages(cache.key, cache.value, key, value, *step.pack, layer=layer, **scales))
    attended = ragged_paged_prefill(
        query,
        cache.key,
        cache.value,
        *step.pack,
        **visible(config, w, step),
        layer=layer,
        key_scale=cache.key_scale,
        value_scale=cache.value_scale,
        sinks=w.get("sinks"),
        value_dim=config.latent.rank if config.latent else None,
        softmax_scale=config.softmax_scale,
        attn_logits_soft_cap=config.soft_cap,
    )
    return attended, caches | {kind: cache}


def visible(config: Config, w: dict, step: Step) -> dict:
    """What says which keys a layer's tokens see; traced, so that one program serves layers that see differently."""
    tree_mask = dict(tree_mask=step.tree_mask)
    window = config.layers[0].window
    if config.alike and (window is None or step.tree_mask is None):
        return tree_mask | dict(sliding_window=window)
    ranges = masks.causal(step.pack.context_lens, step.pack.query_offsets, step.position.shape[0])
    # A draft's window begins by its depth, not by its place in the chunk.
    low = jnp.maximum(step.position - (window if config.alike else w["window"]) + 1, 0)
    if not config.alike:
        low = jnp.maximum(low, jnp.maximum(step.position, 0) // w["chunk"] * w["chunk"])
    return tree_mask | dict(key_ranges=ranges.at[:, 0].set(low))


def feed_forward(config: Config, w: dict, x):
    """A gated MLP, experts, or experts beside an MLP that all tokens go through."""
    out = experts.mixture(config.experts, w, x, ACTIVATIONS[config.activation]) if "router" in w else None
    if "gate" not in w:
        return out
    dense = (ACTIVATIONS[config.activation](x @ w["gate"]) * (x @ w["up"])) @ w["down"]
    return dense if out is None else dense + out


def rms_norm(x, weight, eps: float):
    """RMSNorm (arXiv 1910.07467) over as many dimensions as the weight has, in float32."""
    axes = tuple(range(-weight.ndim, 0))
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + jnp.float32(eps))
    return (wide * weight.reshape(*[1] * (x.ndim - weight.ndim), *weight.shape)).astype(x.dtype)


def rotate(x: Float[Array, "tokens heads features"], position, frequencies, scale):
    """Rotary embedding (arXiv 2104.09864): two halves against each other; features beyond the frequencies stay."""
    angle = position.astype(jnp.float32)[:, None, None] * frequencies[None, None]
    cos, sin = ((f(angle) * scale).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    half = frequencies.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def growth(config: Config, rate, position):
    """By how much Llama 4's queries of layers without rotary embedding grow with their position."""
    steps = jnp.floor((position.astype(jnp.float32) + 1) / config.temperature_floor)
    return (jnp.log1p(jnp.maximum(steps, 0)) * rate + 1)[:, None, None]
