"""The Hopper kernel: its launch, and what each warpgroup of a thread block does.

The block takes a *tile*: some tokens of one sequence, for some of the query heads that share a KV head, 64 rows (a head
and a token) to each compute warpgroup (compute.py). One more warpgroup only loads (loading.py): its warps copy keys and
values page by page, from where they lie into the rows of a swizzled tile in shared memory, and the query rows of the next
tile. Where tiles have few keys, two of one warpgroup each go on side by side: *teams*, with blocks and barriers of their
own. These and all other words of this folder are in its docstring (__init__.py).
"""

from dataclasses import dataclass
import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import alternate, few_rows, mates, wide
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import initialise
from paged_prefill.lowering.mosaic_gpu.hopper.compute import compute, compute_chain, compute_each
from paged_prefill.lowering.mosaic_gpu.hopper.last_part import counters_shape, merge_where_last
from paged_prefill.lowering.mosaic_gpu.hopper.loading import Queries, load, loading_warps, sources_of
from paged_prefill.lowering.mosaic_gpu.hopper import pairs
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.scratch import apart, scratch_of
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.hopper.widen import widen
from paged_prefill.lowering.tiles import Tiles


def table_of(tiles: Tiles, number, firsts=None):
    """All integers that the kernel reads of the tiles, or of their parts, in one array: a row each.

    Of parts, their number, which is no static one, is behind them, and the rows of first parts (tiles.schedule). XLA
    writes a stack out field by field, and works out what fields have in common as often, or in a kernel of its own; so
    each element picks its field here.
    """
    *fields, slabs = tiles
    columns = [*fields, *(column for field in slabs for column in field.T)]
    place = jnp.arange(len(columns), dtype=jnp.int32)
    table = sum(jnp.where(place == i, column[:, None], 0) for i, column in enumerate(columns)).reshape(-1)
    return table if firsts is None else jnp.concatenate([table, jnp.append(number, firsts)])


def launch(plan: Plan, schedule, query, caches, optional):
    """Runs the kernel over a schedule: its table, the page table, the pools (of each pack, or sequence), kv_head_start.

    `caches` are as rows, one where it is latent; `optional` the other arrays of the call that there are, by name.

    Returns out [results * tokens * q_heads, value_dim], in float32 if there are several, and lse [results * q_heads *
    tokens]. Where the number of parts varies, before them those of tiles of one part, as if nothing were split; of all
    tiles, and nothing else, where the last part merges.
    """
    grid = dict(grid=(plan.thread_blocks,))
    if plan.mates:
        grid = mates.cluster_of(plan.thread_blocks)
    if plan.clusters:
        grid = dict(grid=(plan.pieces // plan.splits,), cluster=(plan.splits,), cluster_names=("part",))
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, list(optional)),
        out_type=_results_of(plan),
        scratch_types=scratch_of(plan),
        **grid,
        grid_names=("block",),
        num_threads=plan.computing_warpgroups + plan.loading_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=1024,  # the least there is: no reduction here goes over warps
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="paged_prefill",
    )
    operands = *schedule, query, *caches, *(array.reshape(-1) for array in optional.values())
    if plan.last_merges:
        shape = pairs.counters_shape(plan) if plan.merges_in_pairs else counters_shape(plan)
        counters = jax.new_ref(jnp.zeros(shape, jnp.int32))
        found = compat.takes_references(kernel)(*operands, counters)[:2]
    else:
        found = kernel(*operands)
    return [array.reshape(-1, plan.value_dim) if array.ndim > 1 else array for array in found]


def _results_of(plan: Plan) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The types of what the kernel writes: out and lse, of parts behind those of whole tiles where there are both."""
    shape, found = jax.ShapeDtypeStruct, []
    for results in [1, plan.results] if plan.final_beside_parts else [plan.results]:
        rows, dtype = results * plan.tokens, jnp.dtype(plan.dtype) if results == 1 else jnp.float32
        found += [shape((rows, plan.q_heads, plan.value_dim), dtype), shape((rows * plan.q_heads,), jnp.float32)]
    if plan.merges_in_pairs:
        found.append(shape(pairs.places_shape(plan), jnp.float32))
    return tuple(found)


def _kernel(plan: Plan, names, table, pages, pools, kv_head_start, query, *others, **scratch):
    """A thread block: one warpgroup loads and the others compute, each going through the block's share of the work.

    The loads run ahead from one piece of work into the next: the steps of the rings are counted on from piece to piece.
    """
    results_at = len(others) - len(_results_of(plan))
    number = results_at - len(names) - plan.last_merges
    caches, optional, results = others[:number], others[number:results_at], others[results_at:]
    counters, optional = optional[-1] if plan.last_merges else None, dict(zip(names, optional))
    if plan.merges_in_pairs:
        results = *results, counters
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    block, mate = mates.number_of(block) if plan.mates else (block, None)
    slab = lax.rem(warpgroup, plan.slabs)
    part = lax.axis_index("part") if plan.clusters else None
    pieces, scratch = Pieces(plan, table, pools, kv_head_start, block, slab, part), apart(plan, scratch)
    sources = sources_of(plan, caches, optional, scratch)
    shared = Shared.of(plan, optional, sources, scratch)
    thread_block = _ThreadBlock(plan, pieces, pages, query, shared, results, counters, mate)
    if plan.mates:
        pl.when(warpgroup == plan.computing_warpgroups)(thread_block.start_barriers)
        mates.meet()
    pl.when(warpgroup < plan.computing_warpgroups)(functools.partial(thread_block.compute, warpgroup))
    pl.when(warpgroup == plan.computing_warpgroups)(thread_block.load)
    if plan.loading_warpgroups == 2:
        pl.when(warpgroup == plan.computing_warpgroups + 1)(thread_block.widen)
    if plan.mates:
        mates.meet()


@dataclass(frozen=True)
class _ThreadBlock:
    """What its warpgroups have in common, and what each kind of them does."""

    plan: Plan
    pieces: Pieces
    pages: jax.Array  # the page table, in global memory, as all but `shared`
    query: jax.Array
    shared: Shared
    results: tuple[jax.Array, ...]
    counters: jax.Array | None  # of parts, where the last of them merges
    mate: jax.Array | None  # which of two that copy for one another it is

    def compute(self, warpgroup) -> None:
        plan, pieces = self.plan, self.pieces
        _set_registers(plan.registers.computes, "increase")
        if plan.announced_together and not plan.mates:
            plgpu.barrier_wait(self.shared.scratch["started"])
        if plan.takes_turns:  # the first turn is the first warpgroup's
            pl.when(warpgroup == plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(self.shared.scratch["turn"].at[0]))
        team, of_team = (warpgroup, jnp.int32(0)) if plan.teams > 1 else (0, warpgroup)
        self._attend(team, of_team)
        if plan.last_merges and not plan.merges_in_pairs:
            of_pieces = functools.partial(pieces.index_of, team=team), lambda i: pieces.piece_of(i, team)[0]
            merge_where_last(plan, pieces.table, *of_pieces, of_team, self.shared.optional, self.results, self.counters)

    def _attend(self, team, warpgroup) -> None:
        """All pieces of a team, by the loop that the plan chooses."""
        plan, pieces = self.plan, self.pieces
        given = dict(warpgroup=warpgroup, shared=self.shared, results=self.results)
        if plan.alternates:
            return pieces.each(functools.partial(alternate.compute, plan, **given))
        if plan.wide:
            return pieces.each(functools.partial(wide.compute, plan, **given))
        if plan.chains:
            return compute_chain(plan, pieces.piece_of, **given)
        given |= dict(team=team)
        if plan.few_rows:
            given |= dict(way=functools.partial(few_rows.FewRows, pages=self.pages))
        if plan.looks_ahead:
            return compute_each(plan, pieces.piece_of, **given)
        pieces.each(functools.partial(compute, plan, **given), team)

    def load(self) -> None:
        """Each warp its share; where blocks are widened, all but one of them do that, or another warpgroup does."""
        plan, sources = self.plan, self.shared.sources
        queries = Queries(plan, self.query, self.shared.queries)
        share = functools.partial(load, plan, self.pieces, self.pages, queries, sources)
        _set_registers(plan.registers.loads, "decrease")
        if (plan.widens or plan.announced_together) and not plan.mates:
            self.start_barriers()
            plgpu.barrier_arrive(self.shared.scratch["started"])

        def work(warp):
            if not plan.widens or plan.loading_warpgroups > 1:
                return share(warp, self.mate)
            pl.when(warp == 0)(lambda: share(None))
            pl.when(warp > 0)(lambda: widen(plan, self.pieces.each, self.pages, sources, warp - 1))

        _each_warp(work)

    def start_barriers(self) -> None:
        """Those that Pallas does not know, before the other warps of this warpgroup, and other warpgroups, use them."""
        together = self.plan.announced_together
        for name, source in zip(("keys", "values"), self.shared.sources):
            if source.wide_blocks is not None or name in together:
                initialise(source.here, loading_warps(self.plan))
            if self.plan.mates:
                initialise(source.free, mates.readers(self.plan.warpgroups))
        if self.plan.mates:
            mates.fence_initialised()
        plgpu.commit_smem()

    def widen(self) -> None:
        _set_registers(self.plan.registers.widens, "decrease")
        plgpu.barrier_wait(self.shared.scratch["started"])
        _each_warp(functools.partial(widen, self.plan, self.pieces.each, self.pages, self.shared.sources))


def _each_warp(do) -> None:
    """Calls do(warp) for each warp of a warpgroup."""

    @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
    def call():
        do(lax.axis_index("warp"))

    call()


def _set_registers(number, action) -> None:
    if number is not None:
        plgpu.set_max_registers(number, action=action)
