"""`PrefillPageAttention`: ejKernel's class of that name as a thin face, so that code written for it moves over."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from paged_prefill import lowering
from paged_prefill.lowering import contract
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive import checks
from paged_prefill.primitive.api import prefill_page_attention
from paged_prefill.primitive.operands import PREFILL
from paged_prefill.sharding.wrapper import create_shard_map_wrapper


class PrefillPageAttention:
    """Chunked prefill over a paged cache, with the methods of ejKernel's operation.

    An *invocation*, where a method takes one, is any object whose `kwargs` hold the arguments of
    `prefill_page_attention` by name: query, key_cache, value_cache, context_len, page_indices (arrays or
    `jax.ShapeDtypeStruct`), and as far as they are given softmax_scale, attn_logits_soft_cap, sliding_window, platform.
    """

    op_id = "prefill_page_attention"

    def get_impl(self, cfg: PrefillPageAttentionConfig):
        """The operation with `cfg` settled: a function of the arguments of `run`, all by name."""
        return functools.partial(self.run, cfg=cfg)

    def run(
        self, query, key_cache, value_cache, context_len, page_indices, platform=None, *, cfg=None, **parameters
    ) -> jax.Array:
        """`prefill_page_attention`, whose arguments these are and whose errors it raises. cfg None leaves it open."""
        return prefill_page_attention(
            query, key_cache, value_cache, context_len, page_indices, platform=platform, cfg=cfg, **parameters
        )

    def create_shard_map_wrapper(
        self, query, key_cache, value_cache, context_len, page_indices, platform=None, *, cfg=None, **parameters
    ):
        """`paged_prefill.create_shard_map_wrapper`, whose arguments these are: (function, call_args)."""
        return create_shard_map_wrapper(
            query, key_cache, value_cache, context_len, page_indices, platform=platform, cfg=cfg, **parameters
        )

    def heuristic_cfg(self, invocation=None) -> PrefillPageAttentionConfig:
        """What the kernel of this machine would run an invocation with; everything left open for None."""
        if invocation is None:
            return PrefillPageAttentionConfig()
        return self._configurations(invocation)[0]

    def candidate_cfgs(self, invocation) -> list[PrefillPageAttentionConfig]:
        """The configurations worth timing for an invocation, the heuristic one first."""
        return self._configurations(invocation)[1]

    def _configurations(self, invocation):
        arguments = invocation.kwargs
        problem = _problem(arguments)
        device = lowering.device_of(lowering.default_platform())
        name, _ = lowering.choose(problem, device, arguments.get("platform") or "auto")
        kernel = lowering.KERNELS[device.platform][name]
        return kernel.heuristic_config(problem, device), kernel.candidate_configs(problem, device)


def _problem(arguments: dict[str, Any]) -> contract.Problem:
    """The static description of a call of `prefill_page_attention` on one device."""
    names = ("query", "key_cache", "value_cache", "context_len", "page_indices")
    operands = checks.abstract_pack_of_one(*(arguments.get(name) for name in names))
    checks.check_operands(PREFILL, operands, cache_batch_dims=0)
    flat = jax.eval_shape(functools.partial(contract.flatten, cache_batch_dims=0), *operands.values())
    attention = checks.attention_of(
        softmax_scale=arguments.get("softmax_scale"),
        attn_logits_soft_cap=arguments.get("attn_logits_soft_cap"),
        sliding_window=arguments.get("sliding_window"),
        head_dim=arguments["query"].shape[-1],
    )
    return contract.problem_of(*flat, num_kv_heads=arguments["key_cache"].shape[0], **vars(attention))
