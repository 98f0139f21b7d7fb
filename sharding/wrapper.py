"""The way in for callers of ejKernel's wrapper: they say how each array is cut, and get a function under shard_map."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive import checks
from paged_prefill.primitive.checks import DEFAULT_MASK_VALUE, Platform
from paged_prefill.primitive.binding import shapes_of
from paged_prefill.primitive.cut import cut_of_specs
from paged_prefill.primitive.operands import PREFILL
from paged_prefill.primitive.prefill import parameters_of
from paged_prefill.sharding.partition import Call, on_one_device


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
      ValueError: mesh, in_specs or out_specs is missing, or they cut anything but heads; names which.
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
    shapes = shapes_of(PREFILL, PREFILL.present(operands), operands.values(), 0)
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
