"""The two primitives: what they take, their abstract evaluation, and how they run when called eagerly.

`paged_prefill_p` is the operation that users see in a jaxpr: global shapes, any number of leading batch dimensions.

    query          [*C, *B, tokens, q_heads, head_dim]
    key_cache      [*C, kv_heads, num_pages, page_size, head_dim]
    value_cache    [*C, kv_heads, num_pages, page_size, value_dim]
    context_lens   [*C, *B, seqs]                   int32
    page_indices   [*C, *B, seqs, pages_per_seq]    int32
    query_offsets  [*C, *B, seqs + 1]               int32

    -> out [*C, *B, tokens, q_heads, value_dim] in query's dtype, lse [*C, *B, tokens, q_heads] float32

`local_paged_prefill_p` is what one device runs. It has one more operand, `kv_head_start` (int32 scalar), and one more
parameter, `num_kv_heads`: the query heads here attend to KV heads kv_head_start : kv_head_start + num_kv_heads.
`sharding/partition.py` lowers the first to the second.
"""

from functools import partial
import operator

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import xla
import jax.numpy as jnp
from jax.sharding import NamedSharding

from paged_prefill.primitive import checks
from paged_prefill.primitive.cut import Cut, OPERANDS, check_stays, plan, wishes_of


class PagedPrefillPrimitive(Primitive):
    """A primitive whose `bind` fills in the parameters that a caller leaves out, and checks them."""

    multiple_results = True

    def bind(
        self,
        *operands,
        softmax_scale: float | None = None,
        attn_logits_soft_cap: float | None = None,
        sliding_window: int | None = None,
        cache_batch_dims: int = 0,
        platform: str = "auto",
        config=None,
        **others,
    ):
        checks.check_config("config", config)
        parameters = checks.static_parameters(
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=attn_logits_soft_cap,
            sliding_window=sliding_window,
            platform=platform,
        )
        parameters["platform"] = checks.requested_platform(platform, config)
        if softmax_scale is None:
            checks.check_query(operands[0])
            parameters["softmax_scale"] = operands[0].shape[-1] ** -0.5
        types = [jax.typeof(x) for x in operands]
        primitive = typed_paged_prefill_p if self is paged_prefill_p and _types_tell(types) else self
        return Primitive.bind(
            primitive,
            *_varying_alike(operands, types),
            cache_batch_dims=operator.index(cache_batch_dims),
            config=config,
            **parameters,
            **others,
        )


def _varying_alike(operands, types):
    """Under shard_map(check_vma=True) the operands of a primitive must vary over the same mesh axes."""
    varying = [aval.manual_axis_type.varying for aval in types]
    union = frozenset().union(*varying)
    return [
        x if axes == union else lax.pcast(x, tuple(sorted(union - axes)), to="varying")
        for x, axes in zip(operands, varying)
    ]


def _types_tell(types) -> bool:
    """Whether the types of the operands say how each is cut: every axis of their mesh is explicit or manual."""
    mesh = mesh_of(*types)
    return not mesh.empty and not mesh.auto_axes


paged_prefill_p = PagedPrefillPrimitive("paged_prefill")
# What `paged_prefill_p.bind` becomes where types tell the cut. Apart, since lowering then needs no devices, which jit
# can be told of a primitive only: so a program for an AbstractMesh can be lowered and exported.
typed_paged_prefill_p = PagedPrefillPrimitive("paged_prefill")
local_paged_prefill_p = PagedPrefillPrimitive("local_paged_prefill")


def mesh_of(*avals):
    """The mesh that types speak of, or an empty one."""
    return next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), avals[0].sharding.mesh)


def _abstract(*operands, cache_batch_dims, **params):
    checks.check_operands(*operands, cache_batch_dims=cache_batch_dims)
    query, key_cache, value_cache = operands[:3]
    mesh = mesh_of(*operands)
    checks.check_mesh(mesh)
    # Only explicit axes show in types. The results follow the plan, and no operand may have to move for it.
    types = {name: aval.sharding.spec for name, aval in zip(OPERANDS, operands, strict=True)}
    wishes = wishes_of(types, query.ndim - 3, cache_batch_dims)
    specs = plan(mesh.shape, query, key_cache, cache_batch_dims, wishes).specs(cache_batch_dims)
    for name, spec in types.items():
        check_stays(name, spec, specs[name], mesh.shape)
    return _results(query, value_cache, specs)


def _local_abstract(*operands, cache_batch_dims, num_kv_heads, **params):
    *operands, kv_head_start = operands
    checks.check_operands(*operands, cache_batch_dims=cache_batch_dims, num_kv_heads=num_kv_heads)
    if kv_head_start.shape or kv_head_start.dtype != jnp.int32:
        raise TypeError(f"kv_head_start must be an int32 scalar, got {kv_head_start.str_short()}")
    whole = Cut(((),) * (operands[0].ndim - 3)).specs(cache_batch_dims)
    return _results(operands[0], operands[2], whole)


def _results(query, value_cache, specs):
    def result(shape, dtype, spec):
        sharding = NamedSharding(query.sharding.mesh, spec)
        return query.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)

    out = result((*query.shape[:-1], value_cache.shape[-1]), query.dtype, specs["out"])
    return out, result(query.shape[:-1], jnp.float32, specs["lse"])


for primitive, rule in (
    (paged_prefill_p, _abstract),
    (typed_paged_prefill_p, _abstract),
    (local_paged_prefill_p, _local_abstract),
):
    primitive.def_abstract_eval(rule)
    primitive.def_impl(partial(xla.apply_primitive, primitive))
