"""ejKernel's ways in, as thin faces over the operation, so that code written for it moves over."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paged_prefill.lowering.call import Problem, flatten
from paged_prefill.lowering.choose import KERNELS, choose, default_platform, device_of
from paged_prefill.primitive import checks
from paged_prefill.primitive.api import prefill_page_attention
from paged_prefill.primitive.binding import shapes_of
from paged_prefill.primitive.checks import DEFAULT_MASK_VALUE, Platform
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.cut import cut_of_specs
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import PREFILL
from paged_prefill.primitive.prefill import parameters_of
from paged_prefill.sharding.partition import Call, on_one_device


class PrefillPageAttention:
    """Chunked prefill over a paged cache, with the methods of ejKernel's operation.

    An *invocation*, where a method takes one, is any object whose `kwargs` hold the arguments of
    `prefill_page_attention` by name: query, key_cache, value_cache, context_len, page_indices (arrays or
    `jax.ShapeDtypeStruct`), and as far as they are given softmax_scale, attn_logits_soft_cap, sliding_window, platform.
    """

    op_id = "prefill_page_attention"

    def get_impl(self, cfg: PrefillPageAttentionConfig):
        """The operation with `cfg` settled: a function of the arguments of `run`, all by name.

        It also takes the sizes block_k (`cfg.block_kv`), num_warps and num_stages, which stand before those of `cfg`.
        """

        def run(*, block_k=None, num_warps=None, num_stages=None, **arguments):
            sizes = PrefillPageAttentionConfig(block_k=block_k, num_warps=num_warps, num_stages=num_stages)
            return self.run(cfg=sizes.over(cfg or PrefillPageAttentionConfig()), **arguments)

        return run

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
        return self._configurations(invocation, default_platform())[0]

    def candidate_cfgs(self, invocation) -> list[PrefillPageAttentionConfig]:
        """The configurations worth timing for an invocation, the heuristic one first."""
        return self._configurations(invocation, default_platform())[1]

    def candidate_cfgs_gpu(self, invocation) -> list[PrefillPageAttentionConfig]:
        """Those for a GPU: of this process, or the one that `jax.sharding.use_abstract_mesh` says; else for any."""
        return self._configurations(invocation, "rocm" if default_platform() == "rocm" else "cuda")[1]

    def candidate_cfgs_tpu(self, invocation) -> list[PrefillPageAttentionConfig]:
        """Likewise for a TPU."""
        return self._configurations(invocation, "tpu")[1]

    def _configurations(self, invocation, platform):
        arguments = invocation.kwargs
        problem = _problem(arguments)
        device = device_of(platform)
        name, _ = choose(problem, device, arguments.get("platform") or "auto")
        kernel = KERNELS[device.platform][name]
        return kernel.heuristic(problem, device), kernel.candidates(problem, device)


def _problem(arguments: dict[str, Any]) -> Problem:
    """The static description of a call of `prefill_page_attention` on one device."""
    names = ("query", "key_cache", "value_cache", "context_len", "page_indices")
    operands = checks.abstract_pack_of_one(*(arguments[name] for name in names))
    checks.check_operands(PREFILL, operands, cache_batch_dims=0, cache_layout=DEFAULT_LAYOUT)
    attention = checks.attention_of(
        softmax_scale=arguments.get("softmax_scale"),
        attn_logits_soft_cap=arguments.get("attn_logits_soft_cap"),
        sliding_window=arguments.get("sliding_window"),
        head_dim=operands["query"].shape[-1],
    )
    kv_heads = operands["key_cache"].shape[0]
    local = functools.partial(flatten, cache_batch_dims=0, num_kv_heads=kv_heads, attention=attention)
    return jax.eval_shape(local, operands | dict(kv_head_start=jax.ShapeDtypeStruct((), jnp.int32))).problem


def create_shard_map_wrapper(
    query: Float[Array, "chunk q_heads head_dim"],
    key_cache: Float[Array, "kv_heads num_pages page_size head_dim"],
    value_cache: Float[Array, "kv_heads num_pages page_size value_dim"],
    context_len: Int[Array, "1"],
    page_indices: Int[Array, " pages_per_seq"],
    platform: Platform | None = None,
    *,
    softmax_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    cfg: PrefillPageAttentionConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    in_specs: tuple[PartitionSpec, ...] | None = None,
    out_specs: PartitionSpec | None = None,
    check_vma: bool = False,
) -> tuple[Callable[..., Float[Array, "chunk q_heads value_dim"]], tuple[Array, ...]]:
    """`prefill_page_attention` under `jax.shard_map`, cut as the specs say: `function, call_args`, as in ejKernel.

    Where `in_specs` cuts the query's heads by more axes than the caches', each device attends to those of its KV heads
    that its query heads read, so caches with fewer heads than devices stay whole. Where `prefill_page_attention` is
    called on a mesh directly, none of this is needed.

    Args:
      query, key_cache, value_cache, context_len, page_indices: arrays, or anything with their shapes.
      platform, softmax_scale, mask_value, attn_logits_soft_cap, sliding_window, cfg: as in `prefill_page_attention`.
      mesh: the mesh to cut over.
      in_specs: one PartitionSpec each for the five arrays.
      out_specs: that of the output, which is cut as the query is.
      check_vma: as in `jax.shard_map`.

    Returns:
      A function of the five arrays, and the five arrays.

    Raises:
      ValueError: mesh, in_specs or out_specs is missing, or they cut anything but heads and pages; names which.
    """
    missing = [n for n, x in (("mesh", mesh), ("in_specs", in_specs), ("out_specs", out_specs)) if x is None]
    if missing:
        missing = " and no ".join(missing)
        raise ValueError(f"create_shard_map_wrapper needs mesh, in_specs and out_specs, got no {missing}")
    call_args = (query, key_cache, value_cache, context_len, page_indices)
    if len(in_specs) != len(call_args):
        raise ValueError(f"in_specs must have one PartitionSpec for each of {len(call_args)} arrays, got {in_specs}")
    checks.check_mask_value(mask_value)
    names = ("query", "key_cache", "value_cache", "context_lens", "page_indices", "out")
    given = dict(zip(names, (*in_specs, out_specs), strict=True))
    operands = checks.abstract_pack_of_one(*call_args)
    shapes = shapes_of(PREFILL, PREFILL.present(operands), operands.values(), 0, DEFAULT_LAYOUT)
    cut = cut_of_specs(mesh.shape, shapes, given)

    def local(query, key_cache, value_cache, *indices):
        indices = checks.indices_of_one(query, key_cache, *indices)
        parameters = parameters_of(
            dict(query=query),
            softmax_scale=softmax_scale,
            attn_logits_soft_cap=attn_logits_soft_cap,
            sliding_window=sliding_window,
            platform=platform,
            config=cfg,
        )
        run = on_one_device(mesh.shape, cut, shapes, Call(PREFILL, tuple(shapes.shapes), 0, tuple(parameters.items())))
        out, _ = run(*checks.pack_of_one(query, key_cache, value_cache, *indices))
        return out

    function = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check_vma)
    return function, call_args
