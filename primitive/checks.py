"""Every error a caller can see: one function each for shapes, parameters and concrete values."""

import math
import numbers
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ATTENTION_DTYPES = ("float32", "bfloat16", "float16")
Platform = Literal["auto", "xla", "triton", "pallas", "cuda"]
PLATFORMS = get_args(Platform)
DEFAULT_MASK_VALUE = -2.381976426469702e38
LARGEST_MASK_VALUE = -1e9


def check_operands(
    query,
    key_cache,
    value_cache,
    context_lens,
    page_indices,
    query_offsets,
    *,
    cache_batch_dims,
    num_kv_heads=None,
    query_name="query",
) -> None:
    """Checks the shapes and dtypes of the operands of `paged_prefill_p`, which may be abstract.

    `num_kv_heads` is how many KV heads the query heads attend to, where that is not all of the caches'. `query_name`
    is what the caller knows the first operand by.
    Raises ValueError for a shape and TypeError for a dtype; each names the operand, what it got, and what it takes.
    """
    check_query(query, query_name)
    lead = query.shape[:-3]
    check_cache_rank("key_cache", key_cache, lead)
    if not 0 <= cache_batch_dims <= len(lead):
        raise ValueError(
            f"cache_batch_dims must be between 0 and the number of query's batch dimensions ({len(lead)}, since query "
            f"has shape {query.shape}), got {cache_batch_dims}"
        )
    cache_lead = lead[:cache_batch_dims]
    _check_cache("key_cache", key_cache, cache_lead, query, query_name)
    _check_cache("value_cache", value_cache, cache_lead, query, query_name)
    if key_cache.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key_cache must have {query_name}'s head_dim {query.shape[-1]} as its last dimension, got {key_cache.shape}"
        )
    if value_cache.shape[:-1] != key_cache.shape[:-1]:
        raise ValueError(
            f"value_cache must agree with key_cache {key_cache.shape} in all but its last dimension, "
            f"got {value_cache.shape}"
        )
    kv_heads = key_cache.shape[-4] if num_kv_heads is None else num_kv_heads
    if query.shape[-2] % kv_heads:
        raise ValueError(
            f"{query_name} must have a multiple of key_cache's {kv_heads} KV heads, got {query.shape[-2]} query heads"
        )
    _check_indices("context_lens", context_lens, lead, ("seqs",))
    seqs = context_lens.shape[-1]
    _check_indices("page_indices", page_indices, lead, (seqs, "pages_per_seq"))
    _check_indices("query_offsets", query_offsets, lead, (seqs + 1,))


def check_query(query, name="query") -> None:
    """Checks that the first operand has a token, head and feature dimension, the last two not empty."""
    if query.ndim < 3:
        raise ValueError(f"{name} must have shape [..., tokens, q_heads, head_dim], got {query.shape}")
    if 0 in query.shape[-2:]:
        raise ValueError(f"{name} must have at least one head and one feature, got {query.shape}")


def check_cache_rank(name, cache, lead=None) -> None:
    """Checks the number of dimensions of a cache, where `lead` are the batch dimensions it may share, if known."""
    if cache.ndim < 4 or (lead is not None and cache.ndim > len(lead) + 4):
        raise ValueError(f"{name} must have shape {_cache_form(name, ['*pools'] if lead != () else [])}, got {cache.shape}")


def _cache_form(name, lead) -> str:
    last = "head_dim" if name == "key_cache" else "value_dim"
    return "[" + ", ".join([*map(str, lead), "kv_heads", "num_pages", "page_size", last]) + "]"


def _check_cache(name, cache, lead, query, query_name) -> None:
    if cache.ndim != len(lead) + 4 or cache.shape[: len(lead)] != lead:
        raise ValueError(f"{name} must have shape {_cache_form(name, lead)}, got {cache.shape}")
    if 0 in (cache.shape[-4], cache.shape[-2], cache.shape[-1]):
        raise ValueError(f"{name} must have at least one head, one slot a page and one feature, got {cache.shape}")
    if query.dtype.name not in ATTENTION_DTYPES:
        raise TypeError(f"{query_name} must be one of {', '.join(ATTENTION_DTYPES)}, got {query.dtype.name}")
    if cache.dtype != query.dtype:
        raise TypeError(f"{name} must have {query_name}'s dtype {query.dtype.name}, got {cache.dtype.name}")


def _check_indices(name, array, lead, tail) -> None:
    form = "[" + ", ".join(map(str, (*lead, *tail))) + "]"
    matches = array.ndim == len(lead) + len(tail) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, (*lead, *tail), strict=True)
    )
    if not matches:
        raise ValueError(f"{name} must have shape {form}, got {array.shape}")
    if array.dtype != jnp.int32:
        raise TypeError(f"{name} must be int32, got {array.dtype.name}")


def static_parameters(*, softmax_scale, attn_logits_soft_cap, sliding_window, platform) -> dict:
    """The static parameters of a call as Python's numbers, None where they are None.

    Raises ValueError or TypeError that names the parameter.
    """
    if softmax_scale is not None:
        softmax_scale = number("softmax_scale", softmax_scale)
        if not math.isfinite(softmax_scale):
            raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if attn_logits_soft_cap is not None:
        attn_logits_soft_cap = number("attn_logits_soft_cap", attn_logits_soft_cap)
        if not 0 < attn_logits_soft_cap < math.inf:
            raise ValueError(
                f"attn_logits_soft_cap must be a positive finite number or None, got {attn_logits_soft_cap}"
            )
    if sliding_window is not None:
        if not isinstance(sliding_window, numbers.Integral) or isinstance(sliding_window, bool):
            raise TypeError(f"sliding_window must be an integer or None, got {sliding_window!r}")
        if sliding_window < 1:
            raise ValueError(
                f"sliding_window must be at least 1 (the keys a row sees, its own included) or None, "
                f"got {sliding_window}"
            )
        sliding_window = int(sliding_window)
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    return dict(
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        platform=platform,
    )


def check_config(name, config) -> None:
    """Checks the type of a configuration, by its fields: the class is the lowering's."""
    if config is not None and not hasattr(config, "block_kv"):
        raise TypeError(f"{name} must be a PrefillPageAttentionConfig or None, got {config!r}")


def check_mesh(mesh) -> None:
    """Refuses a mesh that a shard_map has made manual in part, which neither XLA nor JAX can cut a custom call over."""
    others = [axis for axis in mesh.auto_axes + mesh.explicit_axes if mesh.shape[axis] > 1]
    if mesh.manual_axes and others:
        raise NotImplementedError(
            f"paged_prefill inside a shard_map over {mesh.manual_axes} that leaves the axes {tuple(others)} to the "
            "compiler: make every axis manual (axis_names=), or call it outside shard_map"
        )


def requested_platform(platform, config) -> str:
    """The one kernel that `platform` and `config.platform` ask for together; ValueError where they disagree."""
    asked = {name for name in (platform, getattr(config, "platform", None)) if name not in (None, "auto")}
    if len(asked) > 1:
        raise ValueError(f"platform={platform!r} and cfg.platform={config.platform!r} ask for different kernels")
    return asked.pop() if asked else "auto"


def check_rank(name, array, form, ndim) -> None:
    """Checks the number of dimensions of an argument of a public function."""
    if array.ndim != ndim:
        raise ValueError(f"{name} must have shape {form}, got {array.shape}")


def check_mask_value(mask_value) -> None:
    """Accepts any value that could mask; masked keys have weight exactly 0 whatever it is."""
    if not number("mask_value", mask_value) <= LARGEST_MASK_VALUE:
        raise ValueError(
            f"mask_value must be at most {LARGEST_MASK_VALUE:g}, or it could not mask a key, got {mask_value}"
        )


def number(name, value) -> float:
    """`value` as a Python float; TypeError where it is traced or no number at all."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} is a static parameter and must be a Python number, got the traced value {value}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error


def int32_indices(**arrays) -> list[jax.Array]:
    """The index arguments of a public function as int32: any integer dtype will do, and saturates."""
    converted = []
    for name, array in arrays.items():
        if isinstance(array, (jax.Array, np.ndarray)) and array.dtype == np.int32:
            converted.append(array)
            continue
        # What is not an array of JAX's stays numpy's until it is narrow: JAX would wrap wide numbers around.
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be an array of integers, got {array.dtype.name}")
        unsigned = jnp.issubdtype(array.dtype, jnp.unsignedinteger)
        if array.dtype.itemsize > 4 or array.dtype == jnp.uint32:
            limits = jnp.iinfo(jnp.int32)
            array = array.clip(None if unsigned else limits.min, limits.max)
        converted.append(jnp.asarray(array.astype(jnp.int32)))
    return converted


def indices_of_one(query, key_cache, context_len, page_indices) -> list[jax.Array]:
    """The index arguments of `prefill_page_attention` as int32, once the ranks of its arguments are checked."""
    check_rank("query", query, "[chunk, q_heads, head_dim]", 3)
    check_rank("key_cache", key_cache, "[kv_heads, num_pages, page_size, head_dim]", 4)
    indices = context_len, page_indices = int32_indices(context_len=context_len, page_indices=page_indices)
    if context_len.size != 1:
        raise ValueError(f"context_len must have shape [1] or be a scalar, got {context_len.shape}")
    check_rank("page_indices", page_indices, "[pages_per_seq]", 1)
    return indices


def pack_of_one(query, key_cache, value_cache, context_len, page_indices):
    """The operands of a pack that holds one sequence; the last two as `indices_of_one` gives them."""
    offsets = jnp.asarray([0, query.shape[0]], jnp.int32)
    return query, key_cache, value_cache, context_len.reshape(1), page_indices[None], offsets


def check_new_tokens(name, tokens, cache) -> None:
    """Checks that `tokens` (key or value of `append_to_pages`) can be written into `cache`."""
    check_cache_rank(f"{name}_cache", cache)
    expected = (cache.shape[-4], cache.shape[-1])
    if tokens.ndim < 3 or tokens.shape[-2:] != expected:
        form = "[..., tokens, " + ", ".join(map(str, expected)) + "]"
        raise ValueError(f"{name} must have shape {form} to go into {name}_cache {cache.shape}, got {tokens.shape}")
    if tokens.dtype != cache.dtype:
        raise TypeError(f"{name} must have {name}_cache's dtype {cache.dtype.name}, got {tokens.dtype.name}")


def check_same_tokens(key, value) -> None:
    """Checks that the key and value of `append_to_pages` are of the same tokens."""
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have shape {(*key.shape[:-1], value.shape[-1])} to go with key, got {value.shape}")


def check_partial(name, shape, expected) -> None:
    """Checks a shape of `merge` against the one that `out_a` asks for."""
    if shape != expected:
        raise ValueError(f"{name} must have shape {expected} to go with out_a, got {shape}")


def validate(
    query: Float[Array, "*batch tokens q_heads head_dim"],
    key_cache: Float[Array, "*pools kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "*pools kv_heads num_pages page_size value_dim"],
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    sliding_window: int | None = None,
) -> None:
    """Checks concrete inputs of `ragged_paged_prefill`, values included, which jitted code cannot.

    The shapes are those of `ragged_paged_prefill`. Index values are in tokens (`context_lens`, `query_offsets`) and
    pages (`page_indices`). Costs a copy of the index arrays to the host; the caches are not read.

    Raises:
      ValueError: a shape does not fit, or a value would be made harmless silently under jit: a context that is
        negative, shorter than its chunk or longer than its row of the page table; offsets that decrease or leave
        [0, tokens]; a page that some row of the chunk needs outside [0, num_pages). Names the argument, the
        sequence and the value.
      TypeError: a dtype does not fit, or an argument is traced.
    """
    named = dict(context_lens=context_lens, page_indices=page_indices, query_offsets=query_offsets)
    for name, array in named.items():
        if isinstance(array, jax.core.Tracer):
            raise TypeError(f"validate needs concrete arrays, but {name} is traced; call it outside jit")
        if not np.issubdtype(np.asarray(array).dtype, np.integer):
            raise TypeError(f"{name} must be an array of integers, got {np.asarray(array).dtype.name}")
    lens, pages, offsets = (np.asarray(array).astype(np.int64) for array in named.values())
    as_int32 = (jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (lens, pages, offsets))
    check_operands(query, key_cache, value_cache, *as_int32, cache_batch_dims=key_cache.ndim - 4)
    static_parameters(
        softmax_scale=None, attn_logits_soft_cap=None, sliding_window=sliding_window, platform="auto"
    )
    num_pages, page_size = key_cache.shape[-3:-1]
    for pack in np.ndindex(lens.shape[:-1]):
        _validate_offsets(pack, offsets[pack], query.shape[-3])
        for seq in range(lens.shape[-1]):
            length = offsets[pack][seq + 1] - offsets[pack][seq]
            _validate_sequence(
                (*pack, seq), lens[pack][seq], length, pages[pack][seq], num_pages, page_size, sliding_window
            )


def _validate_offsets(pack, offsets, tokens) -> None:
    where = f" of pack {pack}" if pack else ""
    for seq, offset in enumerate(offsets):
        if not 0 <= offset <= tokens:
            raise ValueError(f"query_offsets[{seq}]{where} must be between 0 and the {tokens} tokens of query, got {offset}")
        if seq and offset < offsets[seq - 1]:
            raise ValueError(
                f"query_offsets{where} must not decrease, got {offset} after {offsets[seq - 1]} (sequence {seq - 1})"
            )


def _validate_sequence(seq, context_len, length, pages, num_pages, page_size, sliding_window) -> None:
    name = seq[0] if len(seq) == 1 else seq
    if context_len < 0:
        raise ValueError(f"context_lens of sequence {name} must not be negative, got {context_len}")
    if context_len < length:
        raise ValueError(
            f"context_lens of sequence {name} must count its {length} new tokens too, got {context_len}"
        )
    capacity = len(pages) * page_size
    if length and context_len > capacity:
        raise ValueError(
            f"page_indices of sequence {name} holds {len(pages)} pages of {page_size} slots, too few for its "
            f"context_lens of {context_len}"
        )
    if not length:
        return
    first_key = 0 if sliding_window is None else max(0, context_len - length - sliding_window + 1)
    for slot in range(first_key // page_size, -(-context_len // page_size)):
        if not 0 <= pages[slot] < num_pages:
            raise ValueError(
                f"page_indices of sequence {name} must lie in [0, {num_pages}) where its keys are, "
                f"got {pages[slot]} in column {slot}"
            )
