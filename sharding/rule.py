"""The Shardy rule: which dimensions go together. Only a suggestion to the compiler; `partition` has the last word."""

import math

from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule


def sharding_rule(cache_batch_dims: int, mesh, operands, results) -> SdyShardingRule:
    """The rule for operands with these (MLIR) types on `mesh`.

    Batch dimensions go together, and query heads with the caches' heads: equal, or as (KV head, member of its group).
    They are tied only where Shardy can never put a part of a mesh axis on the caches, since JAX cannot read such a
    sharding back (IndivisibleError). Shardy wants no factor of size 1 in a compound, no explicit size for a factor
    that is a whole dimension somewhere, and the factors that stay whole in order of first appearance.
    """
    query, key_cache = operands[:2]
    q_heads, kv_heads = query.shape[-2], key_cache.shape[cache_batch_dims]
    batch = [f"b{dim}" for dim in range(len(query.shape) - 3)]
    sizes = {}
    if q_heads == kv_heads:
        heads = "k"
    elif kv_heads % math.prod(mesh.shape.values()) == 0:
        heads, sizes = CompoundFactor("k", "g"), {"g": q_heads // kv_heads}
    else:
        heads = "h"
    pool = batch[:cache_batch_dims]
    return SdyShardingRule(
        operand_mappings=(
            ArrayMapping(*batch, "t", heads, "d"),
            ArrayMapping(*pool, "k", "p", "s", "d"),
            ArrayMapping(*pool, "k", "p", "s", "v"),
            ArrayMapping(*batch, "q"),
            ArrayMapping(*batch, "q", "n"),
            ArrayMapping(*batch, "m"),
        ),
        result_mappings=(ArrayMapping(*batch, "t", heads, "v"), ArrayMapping(*batch, "t", heads)),
        need_replication_factors=("t", "d", "p", "s", "v", "q", "n", "m"),
        **sizes,
    )
