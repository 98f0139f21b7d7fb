"""The integer arrays that the Hopper kernel reads of a pack; its table of tiles is made by one launch where one can."""

import jax.numpy as jnp

from paged_prefill.lowering.call import Call
from paged_prefill.lowering.mosaic_gpu.hopper.kernel import table_of
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.schedule import Launch, fits, table_in_one
from paged_prefill.lowering.tiles import Tiling, schedule
from paged_prefill.primitive.context import current_policy

# By the policy "invariant", tokens that are masked alike (`Tiling.whole_of`): so rows go through the same steps in
# tiles of any height up to this.
WHOLE_OF = 128


def schedule_of(call: Call, plan: Plan):
    """(table of tiles, page table, pools, first KV head): what the kernel reads of the pack.

    The table does not depend on pools: so XLA makes one for all layers of a model.
    """
    problem, indices, invariant = call.problem, call.indices, current_policy() == "invariant"
    tiling = Tiling(
        tokens=problem.tokens,
        seqs=problem.seqs,
        capacity=problem.capacity,
        block_q=plan.block_q,
        block_kv=plan.block_kv,
        attention=problem.attention,
        slab=plan.slab_tokens,
        ordered=plan.pieces > plan.cores,
        parts=plan.parts,
        whole_of=WHOLE_OF if invariant and not plan.wide and WHOLE_OF % plan.block_q == 0 else None,
    )
    if indices is not None and call.ranges is None and fits(tiling):
        table = table_in_one(Launch(tiling, indices.query_offsets.shape[0], plan.columns), indices)
    else:
        table = table_of(*schedule(call.sequences, tiling, call.ranges))
    pages, pools, _ = indices_of(call)
    if plan.pools == 1:  # a constant, which no kernel writes
        pools = jnp.zeros(1, jnp.int32)
    return table, pages.reshape(-1), pools, call.kv_head_start.reshape(1)


def indices_of(call: Call):
    """page_indices, the pools of packs or sequences, and context_lens: as given, where the call still has them so."""
    if call.indices is not None:
        return call.indices.page_indices, call.indices.pools, call.indices.context_lens
    return call.sequences.page_indices, call.sequences.pool, call.sequences.context_len
