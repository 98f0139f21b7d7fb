"""The shared memory of a thread block: rings, places for queries, and their barriers, by name."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper import few_rows, wide
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import arrivals
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import exchange_scratch
from paged_prefill.lowering.mosaic_gpu.hopper.loading import copies_of
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, parts_of, tiling_of, tiling_of_bytes
from paged_prefill.lowering.mosaic_gpu.hopper.widen import raw_rings, widening_scratch


def scratch_of(plan: Plan) -> dict:
    """All of it; `apart` names what lies in one place."""
    found = _queries(plan) | _rings(plan)
    if plan.few_rows:
        found |= few_rows.few_rows_scratch(plan)
    elif plan.wide:
        found |= wide.wide_scratch(plan)
    else:
        found |= dict(
            turn=plgpu.Barrier(num_barriers=plan.warpgroups),
            cleaned=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.teams),
        )
    if plan.widens:
        found |= widening_scratch(plan)
    return found


def apart(plan: Plan, scratch: dict) -> dict:
    """The same as a kernel has it, with a name for each of those that share a place."""
    scratch = dict(scratch)
    first = 0
    for name, number in _counted_barriers(plan).items():
        scratch[name], first = scratch["counted"].at[pl.ds(first, number)], first + number
    if plan.shares_place:
        [scratch["keys"]], [scratch["values"]] = scratch.pop("places")
    if "blocks" in scratch:
        exchange = [["exchange", "exchanged"]] if plan.exchanges_in_blocks else []
        for names, view in zip([plan.rings, *exchange], scratch.pop("blocks")):
            scratch |= dict(zip(names, view))
    return scratch


def _queries(plan: Plan) -> dict:
    """Places for queries. The same bytes are seen in several ways.

    wgmma takes tiles of 8 rows; the copies start at any row, so not at a tile's; and products may be of another dtype.
    """
    dtype, product_dtype, columns = jnp.dtype(plan.dtype), jnp.dtype(plan.product_dtype), plan.query_columns
    loaded, taken = (tiling_of(its_dtype, columns) for its_dtype in (dtype, product_dtype))
    kinds = [(plan.query_parts, dtype, loaded[1:]), (plan.query_parts, dtype, loaded)]
    kinds += [(plan.query_matrices, product_dtype, taken)]
    places, shape = plan.query_places * plan.teams * plan.row_groups, (plan.rows // plan.row_groups, columns)
    views = (plgpu.SMEM((places, parts, *shape), its_dtype, transforms=ways) for parts, its_dtype, ways in kinds)
    queries = plan.query_places * plan.teams * plan.query_groups
    copies = plan.rows // plan.slab * plan.query_parts // plan.query_groups
    return dict(
        query_views=plgpu.RefUnion(*([view] for view in views)),
        query_here=plgpu.Barrier(num_arrivals=copies, num_barriers=queries),
        query_free=plgpu.Barrier(num_arrivals=plan.warpgroups // plan.query_groups, num_barriers=queries),
    )


def _rings(plan: Plan) -> dict:
    """The blocks of keys and values. Each copy of a block that products read arrives, or each warp that widens it."""
    turns, freed = plan.output_turns if plan.latent else 1, plan.freed_shares
    key_copies = copies_of(plan) * (len(plan.key_groups[0]) if plan.keys_come_apart else 1)
    found = _blocks(plan) | dict(
        keys_here=plgpu.Barrier(
            num_arrivals=plan.widening_warps if plan.widens_keys else key_copies,
            num_barriers=plan.teams * plan.key_slots * len(plan.key_groups),
        ),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.teams * plan.key_slots * turns * freed),
    )
    if not plan.latent:
        outputs = plan.teams * plan.slots * plan.output_turns
        found |= dict(
            values_here=plgpu.Barrier(
                num_arrivals=plan.widening_warps if plan.widens else copies_of(plan),
                num_barriers=plan.teams * plan.slots * freed,
            ),
            # A share is one warpgroup's.
            values_free=plgpu.Barrier(num_arrivals=plan.warpgroups // freed, num_barriers=outputs * freed),
        )
    if counted := _counted_barriers(plan):  # in one array: each takes a kilobyte
        found = {name: barriers for name, barriers in found.items() if name not in counted}
        found |= dict(counted=arrivals(sum(counted.values())))
        if not plan.mates:
            found |= dict(started=plgpu.Barrier())
    return found


def _counted_barriers(plan: Plan) -> dict[str, int]:
    """Barriers of the rings that are words of shared memory (arrivals.py), and how many of each there are."""
    slots = dict(keys=plan.teams * plan.key_slots, values=plan.teams * plan.slots)
    kinds = ("here", "free") if plan.mates else ("here",)
    return {f"{name}_{kind}": slots[name] for name in plan.announced_together for kind in kinds}


def _blocks(plan: Plan) -> dict:
    """Without barriers, and with what is exchanged in a cluster, which may lie where they do."""
    dtype = jnp.dtype(plan.block_dtype)

    def ring(slots, *shape, apart=False):
        if apart:
            shape = len(parts_of(shape[-1])), shape[0], COLUMNS
        if plan.freed_shares > 1:
            shape = plan.freed_shares, shape[0], shape[1] // plan.freed_shares
        transforms = tiling_of_bytes(shape[-1]) if plan.reads_bytes else tiling_of(dtype, shape[-1])
        return plgpu.SMEM((plan.teams * slots, *shape), dtype, transforms=transforms)

    found = dict(keys=ring(plan.key_slots, plan.block_kv, plan.head_dim, apart=plan.lies_apart("keys")))
    if plan.fp8_terms:  # whose products read values as features of all keys
        found |= dict(values=ring(plan.slots, plan.value_dim, plan.block_kv))
    elif not plan.latent:
        found |= dict(values=ring(plan.slots, plan.block_kv, plan.value_dim, apart=plan.lies_apart("values")))
    if plan.shares_place:
        found = dict(places=plgpu.RefUnion(*([view] for view in found.values())))
    found |= raw_rings(plan)
    views, others = [[*found.values()]], {}
    if plan.clusters:
        exchange, others = exchange_scratch(plan)
        if plan.exchanges_in_blocks:
            views.append([*exchange.values()])
        else:
            others |= exchange
    return others | (dict(blocks=plgpu.RefUnion(*views)) if len(views) > 1 else found)
