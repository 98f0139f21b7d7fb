"""The Shardy rule: which dimensions go together. Only a suggestion to the compiler; `partition` has the last word."""

import math

from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule

from paged_prefill.primitive.operands import Shapes


def sharding_rule(call: Shapes, mesh) -> SdyShardingRule:
    """The rule for operands of these shapes on `mesh`, read off the table of operands.

    Batch dimensions go together, the caches' pages, and query heads with the caches' heads: equal, or as (KV head,
    member of its group). The results' tokens have a factor of their own: they may be cut, those of the operands not.
    They are tied only where Shardy can never put a part of a mesh axis on the caches, since JAX cannot read such a
    sharding back (IndivisibleError). Shardy wants no factor of size 1 in a compound, no explicit size for a factor
    that is a whole dimension somewhere, and the factors that stay whole in order of first appearance.
    """
    whole_heads = call.kv_heads > 1 and call.kv_heads % math.prod(mesh.shape.values()) == 0
    heads = CompoundFactor("kv_heads", "group") if whole_heads else "q_heads"
    if call.heads == call.kv_heads:
        heads = "kv_heads"
    pairs = CompoundFactor("kv_heads", "pair") if whole_heads else "pairs"
    factors = {"q_heads": heads, "2 * kv_heads": pairs, "seqs + 1": "offsets", "2": "bounds"}
    shared_packs = range(call.cache_batch_dims, len(call.batch)) if call.operation.writes else ()
    cut = {"kv_heads", "q_heads", "num_pages", "result_tokens", heads, pairs}
    cut |= {f"batch{dim}" for dim in range(len(call.batch)) if dim not in shared_packs}
    whole = []

    def mapping(row, tokens="tokens"):
        # A pool that serves all of a batch dimension has a factor of its own.
        lead = [
            f"{row.name}{dim}" if size == 1 != call.batch[dim] else f"batch{dim}"
            for dim, size in enumerate(call.lead(row))
        ]
        names = lead + [tokens if dim == "tokens" else factors.get(dim, dim) for dim in call.dims(row)]
        whole.extend(name for name in names if name not in cut and name not in whole)
        return ArrayMapping(*names)

    operands = call.operation.table(tuple(call.shapes))
    operand_mappings = tuple(map(mapping, operands))
    result_mappings = tuple(mapping(row, tokens="result_tokens") for row in call.results())
    used = {factor for mapped in (*operand_mappings, *result_mappings) for factor in mapped}
    sizes = {"kv_heads": call.kv_heads, "group": call.heads // call.kv_heads, "pair": 2}
    parts = {part for factor in used if isinstance(factor, CompoundFactor) for part in factor} - used
    return SdyShardingRule(
        operand_mappings=operand_mappings,
        result_mappings=result_mappings,
        need_replication_factors=tuple(whole),
        **{part: sizes[part] for part in sorted(parts)},
    )
