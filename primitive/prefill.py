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
"""

from functools import partial
import operator

import jax
from jax.extend.core import Primitive
from jax.interpreters import xla
import jax.numpy as jnp

from paged_prefill.primitive import checks


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
        **only_local,
    ):
        checks.check_config("config", config)
        if softmax_scale is None:
            checks.check_query(operands[0])
            softmax_scale = operands[0].shape[-1] ** -0.5
        checks.check_parameters(
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=attn_logits_soft_cap,
            sliding_window=sliding_window,
            platform=platform,
        )
        platform = checks.requested_platform(platform, config)
        return super().bind(
            *operands,
            softmax_scale=float(softmax_scale),
            attn_logits_soft_cap=None if attn_logits_soft_cap is None else float(attn_logits_soft_cap),
            sliding_window=None if sliding_window is None else operator.index(sliding_window),
            cache_batch_dims=operator.index(cache_batch_dims),
            platform=platform,
            config=config,
            **only_local,
        )


paged_prefill_p = PagedPrefillPrimitive("paged_prefill")
local_paged_prefill_p = PagedPrefillPrimitive("local_paged_prefill")


def _abstract(*operands, cache_batch_dims, **params):
    checks.check_operands(*operands, cache_batch_dims=cache_batch_dims)
    return _results(operands[0], operands[2])


def _local_abstract(*operands, cache_batch_dims, num_kv_heads, **params):
    *operands, kv_head_start = operands
    checks.check_operands(*operands, cache_batch_dims=cache_batch_dims, num_kv_heads=num_kv_heads)
    if kv_head_start.shape or kv_head_start.dtype != jnp.int32:
        raise TypeError(f"kv_head_start must be an int32 scalar, got {kv_head_start.str_short()}")
    return _results(operands[0], operands[2])


def _results(query, value_cache):
    out = jax.core.ShapedArray((*query.shape[:-1], value_cache.shape[-1]), query.dtype)
    lse = jax.core.ShapedArray(query.shape[:-1], jnp.float32)
    return out, lse


for primitive, rule in ((paged_prefill_p, _abstract), (local_paged_prefill_p, _local_abstract)):
    primitive.def_abstract_eval(rule)
    primitive.def_impl(partial(xla.apply_primitive, primitive))
