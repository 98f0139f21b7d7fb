"""The shared memory of a thread block: rings, places for queries, and their barriers, by name."""

from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper import few_rows, wide
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import exchange_scratch
from paged_prefill.lowering.mosaic_gpu.hopper.loading import copies_of
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import tiling_of, tiling_of_bytes
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
    if plan.shares_place:
        [scratch["keys"]], [scratch["values"]] = scratch.pop("places")
    if "blocks" in scratch:
        in_rows = [[f"rows_of_{name}" for name in plan.rings]] if plan.in_strips else []
        exchange = [["exchange", "exchanged"]] if plan.exchanges_in_blocks else []
        for names, view in zip([plan.rings, *in_rows, *exchange], scratch.pop("blocks")):
            scratch |= dict(zip(names, view))
    return scratch


def _queries(plan: Plan) -> dict:
    """Places for queries; a list, for each strip, where tiles have few rows.

    The same bytes are seen in several ways: wgmma takes tiles of 8 rows; the copies start at any row, so not at a
    tile's; and products may be of another dtype.
    """
    dtype, product_dtype = jnp.dtype(plan.dtype), jnp.dtype(plan.product_dtype)

    def views(strip):
        loaded, taken = (tiling_of(its_dtype, strip.columns) for its_dtype in (dtype, product_dtype))
        matrices = plan.query_matrices * strip.parts // plan.query_parts
        kinds = (strip.parts, dtype, loaded[1:]), (strip.parts, dtype, loaded), (matrices, product_dtype, taken)
        places, shape = plan.query_places * plan.teams * plan.row_groups, (plan.rows // plan.row_groups, strip.columns)
        found = (plgpu.SMEM((places, n, *shape), its_dtype, transforms=ways) for n, its_dtype, ways in kinds)
        return plgpu.RefUnion(*([view] for view in found))

    of_strips = [*map(views, plan.key_strips)]
    queries = plan.query_places * plan.teams * plan.query_groups
    copies = plan.rows // plan.slab * plan.query_parts // plan.query_groups
    return dict(
        query_views=of_strips if plan.few_rows else of_strips[0],
        query_here=plgpu.Barrier(num_arrivals=copies, num_barriers=queries),
        query_free=plgpu.Barrier(num_arrivals=plan.warpgroups // plan.query_groups, num_barriers=queries),
    )


def _rings(plan: Plan) -> dict:
    """The blocks of keys and values. Each copy of a block that products read arrives, or each warp that widens it."""
    arrivals = [copies_of(plan) * (1 if plan.gathers else len(found)) for found in (plan.key_strips, plan.value_strips)]
    turns = plan.output_turns if plan.latent else 1
    found = _blocks(plan) | dict(
        keys_here=plgpu.Barrier(
            num_arrivals=plan.widening_warps if plan.widens_keys else arrivals[0],
            num_barriers=plan.teams * plan.key_slots * len(plan.key_groups),
        ),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.teams * plan.key_slots * turns),
    )
    if not plan.latent:
        outputs = plan.teams * plan.slots * plan.output_turns
        found |= dict(
            values_here=plgpu.Barrier(
                num_arrivals=plan.widening_warps if plan.widens else arrivals[1],
                num_barriers=plan.teams * plan.slots,
            ),
            values_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=outputs),
        )
    return found


def _blocks(plan: Plan) -> dict:
    """Without barriers, and with what is exchanged in a cluster, which may lie where they do.

    Lists, for each strip of columns, where tiles have few rows.
    """
    dtype = jnp.dtype(plan.block_dtype)

    def ring(slots, *shape):
        transforms = tiling_of_bytes(shape[-1]) if plan.reads_bytes else tiling_of(dtype, shape[-1])
        return plgpu.SMEM((plan.teams * slots, *shape), dtype, transforms=transforms)

    found = dict(keys=[ring(plan.key_slots, plan.block_kv, strip.features) for strip in plan.key_strips])
    if plan.fp8_terms:  # whose products read values as features of all keys
        found |= dict(values=[ring(plan.slots, plan.value_dim, plan.block_kv)])
    elif not plan.latent:
        found |= dict(values=[ring(plan.slots, plan.block_kv, strip.features) for strip in plan.value_strips])
    if not plan.few_rows:
        found = {name: of_strips[0] for name, of_strips in found.items()}
    if plan.shares_place:
        found = dict(places=plgpu.RefUnion(*([view] for view in found.values())))
    found |= raw_rings(plan)
    views, others = [[*found.values()]], {}
    if plan.in_strips:
        views.append([[*map(_as_rows, ring)] if len(ring) > 1 else ring for ring in found.values()])
    if plan.clusters:
        exchange, others = exchange_scratch(plan)
        if plan.exchanges_in_blocks:
            views.append([*exchange.values()])
        else:
            others |= exchange
    return others | (dict(blocks=plgpu.RefUnion(*views)) if len(views) > 1 else found)


def _as_rows(strip):
    """The same bytes of one part as swizzled rows: a copy that brings some columns of a row knows no tiles."""
    return plgpu.SMEM(strip.shape, strip.dtype, transforms=tiling_of(jnp.dtype(strip.dtype), strip.shape[-1])[1:])
