"""The errors of a call where it is traced: one function each for shapes, dtypes and parameters."""

from collections.abc import Mapping
import math
import numbers
from typing import Any, Literal, get_args

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.layout import LAYOUTS, OWN_LAYOUT, CacheLayout
from paged_prefill.primitive.operands import (
    ATTENTION_DTYPES,
    BATCH,
    KEY_CACHE,
    POOLS,
    PREFILL,
    QUANTISED_DTYPES,
    VALUE_CACHE,
    Operand,
    Operation,
)

Platform = Literal["auto", "xla", "triton", "pallas", "cuda"]
PLATFORMS = get_args(Platform)
EJKERNEL_PLATFORMS = ("tilelang", "cute")  # that it has beside these
DEFAULT_MASK_VALUE = -2.381976426469702e38
LARGEST_MASK_VALUE = -1e9
# What a factor of the logits may be: its products with small constants, and its inverse, are normal numbers of float32.
LARGEST_FACTOR = 2.0**120
LONGEST_SHOWN = 80  # characters of a value in a message
CACHE_FORMS = {row.name: row.forms[0] for row in (KEY_CACHE, VALUE_CACHE)}
NOT_EMPTY = (
    "q_heads", "kv_heads", "2 * kv_heads", "page_size", "head_dim", "value_dim", "layers", "words", "seqs + 1"
)  # fmt: skip

# Sizes that attention is built for; jax.export may leave others open.
FIXED = ("q_heads", "kv_heads", "page_size", "head_dim")


def check_layout(name) -> CacheLayout:
    """The layout of that name."""
    if not is_one_of(name, LAYOUTS):
        raise ValueError(f"cache_layout must be one of {', '.join(LAYOUTS)}, got {shown(name)}")
    return LAYOUTS[name]


def shown(value) -> str:
    """A value that is not taken, as a message shows it: on one line, and no whole array."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def is_one_of(value, names) -> bool:
    """Whether a value is one of some names; what is no text, an array say, is none."""
    return isinstance(value, str) and value in names


def check_flag(name, value) -> None:
    """Refuses what is neither True nor False: a traced value before all, since it decides what the results are."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_operands(
    operation: Operation,
    operands: Mapping[str, Any],
    *,
    cache_batch_dims: int,
    cache_layout: str,
    num_kv_heads=None,
    value_dim=None,
) -> None:
    """Checks the shapes and dtypes of an operation's operands, given by name; they may be abstract.

    `num_kv_heads` is how many KV heads the query heads attend to, where that is not all of the caches'. `value_dim` is
    given where the values are the first features of the keys, and there is no value_cache.
    Raises ValueError for a shape and TypeError for a dtype; each names the operand, what it got, and what it takes.
    """
    for row in operation.operands:
        if operands.get(row.name) is None and not row.optional:
            raise TypeError(f"{row.name} must be an array, got None")
    present, leading = operation.present(operands), operands[operation.leading]
    check_leading(operation.leading, leading)
    lead, layout = leading.shape[:-3], LAYOUTS[cache_layout]
    if not 0 <= cache_batch_dims <= len(lead):
        check_cache_rank("key_cache", operands["key_cache"], layout, lead, "layer" in present)
        raise ValueError(
            f"cache_batch_dims must be between 0 and the number of {operation.leading}'s batch dimensions ({len(lead)}, "
            f"since {operation.leading} has shape {leading.shape}), got {cache_batch_dims}"
        )
    sizes: dict[str, int] = {}
    givers: dict[str, str] = {}
    for row in operation.table(present):
        own_lead = lead[: row.lead_dims(len(lead), cache_batch_dims)]
        _check_shape(row, operands[row.name], own_lead, present, sizes, givers, operation.writes, layout)
        _check_dtype(row.name, row.dtype, operands[row.name].dtype, operation.leading, leading.dtype)
    if not operation.writes:
        for name in FIXED:
            _check_number(name, sizes[name])
    _check_values(operands, value_dim, layout)
    kv_heads = sizes["kv_heads"] if num_kv_heads is None else num_kv_heads
    if kv_heads > sizes["kv_heads"]:
        raise ValueError(f"num_kv_heads must be at most key_cache's {sizes['kv_heads']} KV heads, got {num_kv_heads}")
    if "q_heads" in sizes and (q_heads := sizes["q_heads"]) % kv_heads:
        other = _other_layout("key_cache", operands["key_cache"], layout, lambda heads: q_heads % heads == 0)
        raise ValueError(
            f"query must have a multiple of key_cache's {kv_heads} KV heads, got {q_heads} query heads{other}"
        )


def _other_layout(name, cache, layout, fits) -> str:
    """What a message adds where heads fit a cache in another layout of as many dimensions."""

    def heads(other):
        size = other.sizes(cache.shape)["kv_heads"]
        return isinstance(size, int) and size and fits(size)

    alike = [x for x in LAYOUTS.values() if len(x.dims) == len(layout.dims) and x.combined == layout.combined]
    likely = [x for x in alike if x != layout and heads(x)]
    if not likely:
        return ""
    shape = ", ".join(map(str, cache.shape[-len(layout.dims) :]))
    return (
        f": by cache_layout={layout.name!r} {name} is laid out as {_laid_out(name, layout)}, and [{shape}] looks like "
        f"{' or '.join(_laid_out(name, x) for x in likely)}, which ragged_paged_prefill and append_to_pages take by "
        f"{' or '.join(f'cache_layout={x.name!r}' for x in likely)}"
    )


def _laid_out(name, layout, *before) -> str:
    """The dimensions of a cache as a message says them."""
    return f"[{', '.join([*before, *layout.ordered(CACHE_FORMS[name])])}]"


def check_array(name, array) -> None:
    """Refuses what has no shape, None before all, and arrays of NumPy's that JAX has no dtype for."""
    if not hasattr(array, "ndim"):
        raise TypeError(f"{name} must be an array, got {shown(array)}")
    of_numpy = isinstance(array, (np.ndarray, np.generic))
    if of_numpy and not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype.name}")


def check_kind(name, given, *kinds) -> jax.Array | np.ndarray:
    """What is given, numbers and lists too, as an array, whose dtype must be one of `kinds`.

    What is not an array of JAX's becomes one of NumPy's, since JAX would wrap wide numbers around.
    """
    try:
        array = given if isinstance(given, jax.Array) else np.asarray(given)
    except (ValueError, TypeError):  # rows of unlike lengths, traced values in a list
        raise TypeError(f"{name} must be an array, got {shown(given)}") from None
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        takes = "integers" if kinds == (jnp.integer,) else "numbers"
        got = shown(given) if array.dtype == object else array.dtype.name
        raise TypeError(f"{name} must be an array of {takes}, got {got}")
    return array


def check_leading(name, array) -> None:
    """Checks that the operand with all leading dimensions has a token, a head and a feature dimension."""
    check_array(name, array)
    if array.ndim < 3:
        heads = "q_heads" if name == "query" else "kv_heads"
        raise ValueError(f"{name} must have shape [..., tokens, {heads}, head_dim], got {array.shape}")
    if 0 in array.shape[-2:]:
        raise ValueError(f"{name} must have at least one head and one feature, got {array.shape}")


def check_cache_rank(name, cache, layout: CacheLayout, lead=None, layered=False) -> None:
    """Checks the number of dimensions of a cache, where `lead` are the batch dimensions it may share, if known."""
    check_array(name, cache)
    least = len(layout.dims) + layered
    if cache.ndim < least or (lead is not None and cache.ndim > len(lead) + least):
        before = ["*pools"] * (lead != ()) + ["layers"] * layered
        raise ValueError(f"{name} must have shape {_laid_out(name, layout, *before)}, got {cache.shape}")


def _check_shape(row: Operand, array, lead, present, sizes, givers, writes, layout) -> None:
    """Holds an operand to its form behind `lead`, and to `sizes`, the dimensions known so far, which it adds to.

    `givers` has the operand that each of them was read off.
    """
    dims = row.dims(array.ndim, len(lead), present, layout)
    if dims is None or not _fits(array.shape, lead, dims, sizes, shared=row.lead == POOLS and not writes):
        forms = [dims] if dims else row.all_dims(present, layout)
        text = " or ".join(_form(lead, form, sizes) for form in forms)
        wrong = (dim for dim, got in zip(dims or (), array.shape[len(lead) :]) if got != sizes.get(dim, got))
        whose = ", ".join(f"{dim} is {givers[dim]}'s" for dim in wrong)  # it may be the other operand that is wrong
        raise ValueError(f"{row.name} must have shape {text}, got {array.shape}{whose and ': '}{whose}")
    own = dict(zip(dims, array.shape[len(lead) :], strict=True))
    if empty := [dim for dim in own if dim in NOT_EMPTY and own[dim] == 0]:
        raise ValueError(f"{row.name} must have at least one of {' and '.join(empty)}, got {array.shape}")
    sizes.update(own)
    if "seqs" in own:
        sizes["seqs + 1"] = own["seqs"] + 1
    if row.name == "key_cache" and layout.combined:
        if "2 * kv_heads" in own and own["2 * kv_heads"] % 2:
            raise ValueError(f"key_cache must have an even number of heads, a key's and a value's each, got {array.shape}")
        sizes.update(kv_heads=layout.sizes(array.shape)["kv_heads"], value_dim=own["head_dim"])
    givers.update({dim: row.name for dim in sizes.keys() - givers.keys()})


def _form(lead, dims, sizes) -> str:
    """A form with what is known of its sizes, as a message says it."""
    named = (f"{dim} = {sizes[dim]}" if dim in sizes else dim for dim in dims)
    return f"[{', '.join([*map(str, lead), *named])}]"


def _fits(shape, lead, dims, sizes, *, shared) -> bool:
    """Whether a shape is `lead` and `dims`; with `shared`, a leading 1 stands for any size."""
    leads_fit = all(got == want or (shared and got == 1) for got, want in zip(shape, lead))
    known = (sizes.get(dim, int(dim) if dim.isdigit() else None) for dim in dims)
    return leads_fit and all(want is None or got == want for got, want in zip(shape[len(lead) :], known, strict=True))


def _check_dtype(name, kind, dtype, leading, leading_dtype) -> None:
    if kind not in ("attention", "cache"):
        if dtype != jnp.dtype(kind):
            raise TypeError(f"{name} must be {kind}, got {dtype.name}")
    elif name == leading or kind == "cache":
        allowed = ATTENTION_DTYPES + QUANTISED_DTYPES * (kind == "cache")
        if dtype.name not in allowed:
            raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {dtype.name}")
    if kind == "attention" and dtype != leading_dtype:
        raise TypeError(f"{name} must have {leading}'s dtype {leading_dtype.name}, got {dtype.name}")
    if name == KEY_CACHE.name and dtype.name in ATTENTION_DTYPES and dtype != leading_dtype:
        raise TypeError(
            f"{name} must have {leading}'s dtype {leading_dtype.name} or a quantised one ({', '.join(QUANTISED_DTYPES)}), "
            f"got {dtype.name}: cast {leading} with {leading}.astype({name}.dtype)"
        )


def _check_values(operands, value_dim, layout: CacheLayout) -> None:
    """Holds what stands for the values, and the scales, to the caches."""
    key_cache, value_cache = operands["key_cache"], operands.get("value_cache")
    if layout.combined:
        _check_combined(operands, value_dim, layout)
    elif value_cache is not None:
        if value_dim is not None:
            raise ValueError(f"value_dim is for a latent cache, which has no value_cache; got value_dim={value_dim} too")
        if value_cache.dtype != key_cache.dtype:
            raise TypeError(f"value_cache must have key_cache's dtype {key_cache.dtype.name}, got {value_cache.dtype.name}")
    elif operands.get("value_scale") is not None:
        raise ValueError("value_scale must be None without a value_cache: key_scale is that of a latent cache")
    for name in ("key_scale", "value_scale"):
        if operands.get(name) is not None and key_cache.dtype.name in ATTENTION_DTYPES:
            raise ValueError(
                f"{name} goes with caches of {', '.join(QUANTISED_DTYPES)}, got key_cache of {key_cache.dtype.name}"
            )


def _check_combined(operands, value_dim, layout: CacheLayout) -> None:
    """Holds a call to what goes with keys and values in one array."""
    within = f"cache_layout={layout.name!r} has the values in key_cache"
    if operands.get("value_cache") is not None:
        raise ValueError(f"value_cache must be None: {within}, got value_cache {operands['value_cache'].shape}")
    if value_dim is not None:
        raise ValueError(f"value_dim is for a latent cache, and {within}; got value_dim={value_dim}")
    scales = [operands.get(name) for name in ("key_scale", "value_scale")]
    slots = operands["key_cache"].ndim - 1
    if scales[1] is not None and slots in {x.ndim for x in scales if x is not None}:
        raise ValueError(
            f"value_scale must be None where scales are of each slot: {within}, and its scales in key_scale; got "
            f"value_scale {scales[1].shape}"
        )


def check_attention_operands(
    operation: Operation, operands, attention: Attention, value_dim, *, cache_layout, **others
) -> None:
    """Checks all operands of the attention, and what goes with which; `others` as in `check_operands`."""
    check_operands(operation, operands, value_dim=value_dim, cache_layout=cache_layout, **others)
    key_cache = operands["key_cache"]
    if operands.get("value_cache") is None and not LAYOUTS[cache_layout].combined:
        check_value_dim(value_dim, key_cache.shape[-1])
    if operands.get("key_ranges") is not None and attention.sliding_window is not None:
        raise ValueError(
            "key_ranges stands in place of causality and window: give it alone (masks.causal takes a window), got "
            f"sliding_window={attention.sliding_window} too"
        )


def check_num_kv_heads(num_kv_heads) -> int:
    """How many KV heads a device attends to."""
    return integer("num_kv_heads", num_kv_heads, least=1)


def check_value_dim(value_dim, head_dim) -> int:
    """The number of a key's features that are its value in a latent cache."""
    value_dim = integer("value_dim", value_dim, other=" where value_cache is None")
    if not 1 <= value_dim <= head_dim:
        raise ValueError(f"value_dim must be between 1 and head_dim {head_dim}, got {value_dim}")
    return value_dim


def attention_of(*, softmax_scale, attn_logits_soft_cap, sliding_window, head_dim: int) -> Attention:
    """The parameters that change the result, as Python's numbers; the scale is 1 / sqrt(head_dim) by default.

    Raises ValueError or TypeError that names the parameter.
    """
    _check_number("head_dim", head_dim)
    softmax_scale = head_dim**-0.5 if softmax_scale is None else number("softmax_scale", softmax_scale)
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if abs(softmax_scale) > LARGEST_FACTOR:
        raise ValueError(
            f"softmax_scale must be at most {LARGEST_FACTOR:.3g} in magnitude, which float32 can compute with, "
            f"got {softmax_scale}"
        )
    if attn_logits_soft_cap is not None:
        attn_logits_soft_cap = number("attn_logits_soft_cap", attn_logits_soft_cap)
        if not 0 < attn_logits_soft_cap < math.inf:
            raise ValueError(
                f"attn_logits_soft_cap must be a positive finite number or None, got {attn_logits_soft_cap}"
            )
        if not 1 / LARGEST_FACTOR <= attn_logits_soft_cap <= LARGEST_FACTOR:
            raise ValueError(
                f"attn_logits_soft_cap must be between {1 / LARGEST_FACTOR:.3g} and {LARGEST_FACTOR:.3g}, which float32 "
                f"can compute with, got {attn_logits_soft_cap}"
            )
    if isinstance(sliding_window, jax.core.Tracer):
        raise TypeError(
            f"sliding_window must be an integer or None, got {shown(sliding_window)}: of a window that is traced, "
            "masks.causal makes key_ranges"
        )
    if sliding_window is not None:
        means = " (the keys a row sees, its own included)"
        sliding_window = integer("sliding_window", sliding_window, least=1, means=means, other=" or None")
    return Attention(softmax_scale, attn_logits_soft_cap, sliding_window)


def _check_number(name, size) -> None:
    """Refuses a size that jax.export leaves open."""
    if export.is_symbolic_dim(size):
        raise ValueError(
            f"{name} must be a number, got {size}: under jax.export, heads, page_size and head_dim of attention may not be "
            "symbolic; tokens, sequences, pages, columns of page_indices, layers and batch dimensions may"
        )


def integer(name, value, *, least: int | None = None, means: str = "", other: str = "") -> int:
    """`value` as a Python integer of at least `least`; `means` says what that is, and `other` what else it may be."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer{other}, got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}{means}{other}, got {value}")
    return int(value)


def width_of(name, width, largest: int):
    """A number of keys that a mask is made with, at most `largest`: a Python integer, or an int32 scalar, also traced.

    An array's value cannot be checked, so it is made harmless: below 1 it counts as 1.
    """
    if not isinstance(width, (jax.Array, np.ndarray)):
        return min(integer(name, width, least=1, other=", or an array of one"), largest)
    check_rank(name, width, "[]", 0)
    return _int32(name, width).clip(1, largest)


def size_of(name, size):
    """A number of tokens, which may be symbolic."""
    return size if export.is_symbolic_dim(size) else integer(name, size, least=0)


def index_arrays(**arrays) -> dict[str, jax.Array]:
    """The index arguments of a function of `masks` as int32, each given as (array, names of its own dimensions).

    All have the leading dimensions of the first, whatever they are. Raises what `check_operands` raises.
    """
    named = int32_indices(**{name: array for name, (array, _) in arrays.items()})
    rows = [Operand(name, (dims,), BATCH, "int32") for name, (_, dims) in arrays.items()]
    (leading, *_), first = rows[0].forms, named[rows[0].name]
    if first.ndim < len(leading):
        raise ValueError(f"{rows[0].name} must have shape [..., {', '.join(leading)}], got {first.shape}")
    lead, sizes, givers = first.shape[: first.ndim - len(leading)], {}, {}
    for row in rows:
        _check_shape(row, named[row.name], lead, (), sizes, givers, True, OWN_LAYOUT)
    return named


def check_platform(platform, name="platform") -> str:
    """`platform`, None as "auto"."""
    if not (platform is None or is_one_of(platform, PLATFORMS)):
        theirs = is_one_of(platform, EJKERNEL_PLATFORMS)
        hint = ", which is a kernel of ejKernel's: \"auto\" takes the fastest here" * theirs
        raise ValueError(f"{name} must be one of {', '.join(PLATFORMS)}, got {shown(platform)}{hint}")
    return platform or "auto"


def check_config(name, config) -> None:
    """Checks the type of a configuration, by its fields: the class is in config.py, which needs this module."""
    if config is not None and not hasattr(config, "block_kv"):
        theirs = type(config).__name__ == "PrefillPageAttentionConfig"  # as ejKernel calls its own
        hint = f" of {type(config).__module__}: the class of this package takes the same arguments" * theirs
        raise TypeError(f"{name} must be a PrefillPageAttentionConfig or None, got {shown(config)}{hint}")


def check_mesh(name, mesh) -> None:
    """Refuses a mesh that a shard_map has made manual in part, which neither XLA nor JAX can cut a custom call over."""
    others = [axis for axis in mesh.auto_axes + mesh.explicit_axes if mesh.shape[axis] > 1]
    if mesh.manual_axes and others:
        raise NotImplementedError(
            f"{name} inside a shard_map over {mesh.manual_axes} that leaves the axes {tuple(others)} to the "
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
    check_array(name, array)
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
    dtype = getattr(value, "dtype", None)
    is_scalar = dtype is not None and jnp.ndim(value) == 0 and any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
    )
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or is_scalar):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # a Python integer past the largest float
        return math.inf if value > 0 else -math.inf


def int32_indices(**arrays) -> dict[str, jax.Array]:
    """The index arguments of a public function as int32: any integer dtype will do, and saturates."""
    return {name: _int32(name, array) for name, array in arrays.items()}


def _int32(name, array):
    if isinstance(array, (jax.Array, np.ndarray)) and array.dtype == np.int32:
        return array
    array = check_kind(name, array, jnp.integer)
    if array.dtype.itemsize > 4 or array.dtype == jnp.uint32:
        limits = jnp.iinfo(jnp.int32)
        unsigned = jnp.issubdtype(array.dtype, jnp.unsignedinteger)
        array = array.clip(None if unsigned else limits.min, limits.max)
    return jnp.asarray(array.astype(jnp.int32))


def scales_of(pools: tuple[int, ...], **scales) -> dict[str, jax.Array | None]:
    """The scales of quantised caches as float32; a number stands for one of each of `pools`, the layers included."""

    def scale_of(name, scale):
        if scale is None:
            return None
        scale = _float32(name, scale)
        return jnp.broadcast_to(scale, pools) if scale.ndim == 0 and pools else scale

    return {name: scale_of(name, scale) for name, scale in scales.items()}


def of_packs(batch: tuple[int, ...], **operands) -> dict[str, jax.Array | None]:
    """Optional operands that each pack of `batch` has its own of, in their dtype; one alone stands for all packs."""
    rows = {row.name: row for row in PREFILL.operands}

    def of_each(array, row):
        if array is None:
            return None
        array = dict(int32=_int32, float32=_float32)[row.dtype](row.name, array)
        return jnp.broadcast_to(array, (*batch, *array.shape)) if array.ndim == len(row.forms[0]) else array

    return {name: of_each(array, rows[name]) for name, array in operands.items()}


def _float32(name, array):
    return jnp.asarray(check_kind(name, array, jnp.floating, jnp.integer), jnp.float32)


def _check_arrays_of_one(query, key_cache, value_cache) -> None:
    check_rank("query", query, "[chunk, q_heads, head_dim]", 3)
    check_rank("key_cache", key_cache, "[kv_heads, num_pages, page_size, head_dim]", 4)
    check_array("value_cache", value_cache)


def indices_of_one(query, key_cache, value_cache, context_len, page_indices) -> list[jax.Array]:
    """The index arguments of `prefill_page_attention` as int32, once the ranks of its arguments are checked."""
    _check_arrays_of_one(query, key_cache, value_cache)
    context_len, page_indices = int32_indices(context_len=context_len, page_indices=page_indices).values()
    if context_len.size != 1:
        raise ValueError(f"context_len must have shape [1] or be a scalar, got {context_len.shape}")
    check_rank("page_indices", page_indices, "[pages_per_seq]", 1)
    return [context_len, page_indices]


def pack_of_one(query, key_cache, value_cache, context_len, page_indices):
    """The operands of a pack that holds one sequence; the last two as `indices_of_one` gives them."""
    offsets = jnp.asarray([0, query.shape[0]], jnp.int32)
    return query, key_cache, value_cache, context_len.reshape(1), page_indices[None], offsets


def abstract_pack_of_one(query, key_cache, value_cache, context_len, page_indices) -> dict[str, jax.ShapeDtypeStruct]:
    """The operands of that pack by name, as shapes and dtypes only, once the ranks of its arguments are checked."""
    _check_arrays_of_one(query, key_cache, value_cache)
    check_array("context_len", context_len)
    check_rank("page_indices", page_indices, "[pages_per_seq]", 1)
    indices = dict(context_lens=(1,), page_indices=(1, page_indices.shape[0]), query_offsets=(2,))
    arrays = dict(query=query, key_cache=key_cache, value_cache=value_cache)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()} | {
        name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in indices.items()
    }


def check_new_tokens(name, tokens, cache_name, cache, layout: CacheLayout, layered) -> None:
    """Checks that `tokens` (key or value of `append_to_pages`) can be written into `cache`."""
    check_array(name, tokens)
    check_cache_rank(cache_name, cache, layout, layered=layered)
    expected = (layout.sizes(cache.shape)["kv_heads"], cache.shape[-1])
    if tokens.ndim < 3 or tokens.shape[-2:] != expected:
        form = "[..., tokens, " + ", ".join(map(str, expected)) + "]"
        fits = tokens.ndim >= 3 and tokens.shape[-1] == cache.shape[-1]
        other = _other_layout(cache_name, cache, layout, lambda heads: fits and heads == tokens.shape[-2])
        raise ValueError(f"{name} must have shape {form} to go into {cache_name} {cache.shape}, got {tokens.shape}{other}")
    if tokens.dtype != cache.dtype and cache.dtype.name in ATTENTION_DTYPES:
        raise TypeError(f"{name} must have {cache_name}'s dtype {cache.dtype.name}, got {tokens.dtype.name}")


def check_same_tokens(key, value) -> None:
    """Checks that the key and value of `append_to_pages` are of the same tokens."""
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have shape {(*key.shape[:-1], value.shape[-1])} to go with key, got {value.shape}")


def check_append_operands(operation: Operation, operands, *, cache_layout, **others) -> None:
    """Checks all operands of `append_to_pages`; `others` as in `check_operands`."""
    check_operands(operation, operands, cache_layout=cache_layout, **others)
    if LAYOUTS[cache_layout].combined:
        if operands.get("value") is None:
            raise ValueError(f"value must be given with key: cache_layout={cache_layout!r} has the values in key_cache")
        return
    for with_value, without in (("value_cache", "value"), ("value", "value_cache")):
        if operands.get(with_value) is not None and operands.get(without) is None:
            raise ValueError(f"{without} must be given with {with_value}; both are None for a latent cache")


def check_parts(name, tokens, count) -> None:
    """Checks that tokens can be given to so many devices in equal parts."""
    if tokens % count:
        raise ValueError(f"{name} must have a multiple of {count} tokens, which so many devices share, got {tokens}")


def check_partials(**partials) -> None:
    """Checks outputs and lse of the same rows, by the names that `merge` has for them: the first output says the shape."""
    first, out = next(iter(partials.items()))
    for name, array in partials.items():
        check_array(name, array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be an array of floats, got {array.dtype.name}")
        expected = out.shape[:-1] if name.startswith("lse") else out.shape
        if array.shape != expected:
            raise ValueError(f"{name} must have shape {expected} to go with {first}, got {array.shape}")
