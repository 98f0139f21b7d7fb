"""The attention's two primitives: their parameters and their types. What they take and give is in operands.py.

`paged_prefill_p` is the operation that users see in a jaxpr: global shapes, any number of leading batch dimensions.
`local_paged_prefill_p` is what one device runs. It has one more operand, `kv_head_start` (int32 scalar, clamped), and
one more parameter, `num_kv_heads`: the query heads here attend to KV heads kv_head_start : kv_head_start +
num_kv_heads. `sharding/partition.py` lowers the first to the second.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from paged_prefill.primitive import checks, context
from paged_prefill.primitive.binding import (
    OperationPrimitive,
    define,
    define_transformations,
    specs_by_plan,
    specs_of_one_device,
    typed_result,
)
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import ONE, PREFILL, Operand

KV_HEAD_START = Operand("kv_head_start", ((),), ONE, "int32")
NEEDED = [row for row in PREFILL.operands if not row.optional or row.name == "value_cache"]
LOCAL = PREFILL._replace(
    name="local_paged_prefill",
    operands=(*NEEDED, KV_HEAD_START, *(row for row in PREFILL.operands if row not in NEEDED)),
)


def parameters_of(
    operands,
    *,
    softmax_scale: float | None = None,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    value_dim: int | None = None,
    cache_batch_dims: int = 0,
    cache_layout: str = DEFAULT_LAYOUT,
    platform: str | None = "auto",
    config=None,
) -> dict:
    """The parameters that both primitives have of a call, checked."""
    checks.check_config("config", config)
    platform = checks.check_platform(platform)
    config = context.with_overlay(config, platform)
    checks.check_leading("query", operands["query"])
    head_dim = operands["query"].shape[-1]
    return dict(
        attention=checks.attention_of(
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=attn_logits_soft_cap,
            sliding_window=sliding_window,
            head_dim=head_dim,
        ),
        value_dim=None if value_dim is None else checks.integer("value_dim", value_dim, other=" or None"),
        cache_batch_dims=checks.integer("cache_batch_dims", cache_batch_dims),
        cache_layout=checks.check_layout(cache_layout).name,
        platform=checks.requested_platform(platform, config),
        config=config,
    )


# What `paged_prefill_p.bind` becomes where types tell the cut. Apart, since lowering then needs no devices, which jit
# can be told of a primitive only: so a program for an AbstractMesh can be lowered and exported.
_bound = partial(OperationPrimitive, PREFILL, "paged_prefill", parameters_of, hint=context.check_hint)
typed_paged_prefill_p = _bound()
paged_prefill_p = _bound(typed=typed_paged_prefill_p)
local_paged_prefill_p = OperationPrimitive(
    LOCAL, "local_paged_prefill", parameters_of, num_kv_heads=checks.check_num_kv_heads
)


def _types(operation, specs_of):
    """The types of results by those of operands, checked; `specs_of` says how a mesh cuts them."""

    def types(*operands, present, attention, value_dim, num_kv_heads=None, **parameters):
        named = dict(zip(present, operands, strict=True))
        form = {name: parameters[name] for name in ("cache_batch_dims", "cache_layout")}
        checks.check_attention_operands(operation, named, attention, value_dim, num_kv_heads=num_kv_heads, **form)
        return _results(named, value_dim, specs_of(operation, operands, present=present, **form))

    return types


def _results(named, value_dim, specs):
    query = named["query"]
    features = features_of_values(named["key_cache"], named.get("value_cache"), value_dim)
    out = typed_result(query, (*query.shape[:-1], features), query.dtype, specs["out"])
    return out, typed_result(query, query.shape[:-1], jnp.float32, specs["lse"])


def features_of_values(key_cache, value_cache, value_dim) -> int:
    """The features of an output: told of a latent cache, and in one array with the keys as many as theirs."""
    if value_dim is not None:
        return value_dim
    return (key_cache if value_cache is None else value_cache).shape[-1]


# Functions that return, as text, what compiled code depends on beside the code of this package, such as the user's
# tables. lowering/ adds its own; sharding/ writes what they return into modules, for the key of JAX's persistent
# compilation cache. The list is here since neither of the two imports the other.
lowering_reads: list[Callable[[], str]] = []

define(local_paged_prefill_p, _types(LOCAL, specs_of_one_device))
for _primitive in (paged_prefill_p, typed_paged_prefill_p):
    define(_primitive, _types(PREFILL, specs_by_plan))
    define_transformations(_primitive, binds=paged_prefill_p)
