"""The Hopper kernel: its launch, the pieces of work that a thread block goes through, and how it loads their pages.

The block takes a *tile*: some tokens of one sequence, for some of the query heads that share a KV head, 64 rows (a head
and a token) to each compute warpgroup (compute.py). One more warpgroup only loads: its warps copy keys and values page
by page, from where they lie into the rows of a swizzled tile in shared memory, and the query rows of the next tile.
Where tiles have few keys, two of one warpgroup each go on side by side: *teams*, with blocks and barriers of their own.
These and all other words of this folder are in its docstring (__init__.py).
"""

import functools
import itertools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import copy_together, initialise
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import exchange_scratch
from paged_prefill.lowering.mosaic_gpu.hopper.compute import compute, compute_chain, compute_each
from paged_prefill.lowering.mosaic_gpu.hopper.plan import TILE_COLUMNS, WARPGROUP_ROWS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper import alternate, few_rows, gather, threads, wide
from paged_prefill.lowering.mosaic_gpu.hopper.last_part import counters_shape, merge_where_last
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, tiling_of
from paged_prefill.lowering.mosaic_gpu.hopper.widen import copies_of, copies_of_a_warp, widen, widening_scratch
from paged_prefill.lowering.tiles import Slabs, Tiles


MOST_ASKED_COLUMNS = 256  # that are brought into the second cache together


def table_of(tiles: Tiles, number, parts_vary: bool):
    """All integers that the kernel reads of the tiles, or of their parts, in one array: a row each.

    The number of parts, which is no static one, is behind them. XLA writes a stack out field by field, and works out
    what fields have in common as often, or in a kernel of its own; so each element picks its field here.
    """
    *fields, slabs = tiles
    columns = [*fields, *(column for field in slabs for column in field.T)]
    place = jnp.arange(len(columns), dtype=jnp.int32)
    table = sum(jnp.where(place == i, column[:, None], 0) for i, column in enumerate(columns)).reshape(-1)
    return jnp.append(table, number) if parts_vary else table


def launch(plan: Plan, schedule, query, caches, optional):
    """Runs the kernel over a schedule: its table, the page table, the pools (of each pack, or sequence), kv_head_start.

    `caches` are as rows, one where it is latent; `optional` the other arrays of the call that there are, by name.

    Returns out [results * tokens * q_heads, value_dim], in float32 if there are several, and lse [results * q_heads *
    tokens]. Where the number of parts varies, before them those of tiles of one part, as if nothing were split; of all
    tiles, and nothing else, where the last part merges.
    """
    dtype, product_dtype = jnp.dtype(plan.dtype), jnp.dtype(plan.product_dtype)
    shape, result_types = jax.ShapeDtypeStruct, []
    for results in [1, plan.results] if plan.final_beside_parts else [plan.results]:
        rows, out_dtype = results * plan.tokens, dtype if results == 1 else jnp.float32
        result_types += [shape((rows, plan.q_heads, plan.value_dim), out_dtype), shape((rows * plan.q_heads,), jnp.float32)]


    def ring(slots, *shape):
        transforms = tiling_of(product_dtype, shape[-1])
        return plgpu.SMEM((plan.teams * slots, *shape), product_dtype, transforms=transforms)

    blocks = dict(keys=ring(plan.key_slots, plan.block_kv, plan.head_dim))
    if not plan.latent:  # products of 8 bits read values as features of all keys
        shape = (plan.value_dim, plan.block_kv) if plan.fp8_terms else (plan.block_kv, plan.value_dim)
        blocks |= dict(values=ring(plan.slots, *shape))
    if plan.shares_place:
        blocks = dict(places=plgpu.RefUnion(*([view] for view in blocks.values())))
    of_widening = widening_scratch(plan) if plan.quantised else {}
    blocks |= {name: of_widening.pop(name) for name in plan.rings if name in of_widening}
    if plan.clusters:
        blocks = exchange_scratch(plan, blocks)

    # The same bytes seen in several ways: wgmma takes tiles of 8 rows; the copies start at any row, so not at a tile's;
    # and products may be of another dtype.
    parts, shape = plan.query_parts, (plan.rows // plan.row_groups, plan.query_columns)
    loaded, taken = (tiling_of(its_dtype, plan.head_dim) for its_dtype in (dtype, product_dtype))
    views = (parts, dtype, loaded[1:]), (parts, dtype, loaded), (plan.query_matrices, product_dtype, taken)
    query_views = [
        plgpu.SMEM((plan.query_places * plan.teams * plan.row_groups, number, *shape), its_dtype, transforms=transforms)
        for number, its_dtype, transforms in views
    ]
    # Each copy of a block arrives, or each warp that widens it.
    arrivals = {False: copies_of(plan), True: plan.widening_warps}
    queries, turns = plan.query_places * plan.teams * plan.query_groups, plan.output_turns if plan.latent else 1
    copies_of_queries = plan.rows // plan.slab * plan.query_parts // plan.query_groups
    scratch = dict(
        query_views=plgpu.RefUnion(*([view] for view in query_views)),
        query_here=plgpu.Barrier(num_arrivals=copies_of_queries, num_barriers=queries),
        query_free=plgpu.Barrier(num_arrivals=plan.warpgroups // plan.query_groups, num_barriers=queries),
        **blocks,
        keys_here=plgpu.Barrier(
            num_arrivals=arrivals[plan.widens_keys],
            num_barriers=plan.teams * plan.key_slots * len(plan.key_groups),
        ),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.teams * plan.key_slots * turns),
    )
    if not plan.latent:
        outputs = plan.teams * plan.slots * plan.output_turns
        scratch |= dict(
            values_here=plgpu.Barrier(num_arrivals=arrivals[plan.quantised], num_barriers=plan.teams * plan.slots),
            values_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=outputs),
        )
    if plan.few_rows:
        scratch |= few_rows.few_rows_scratch(plan)
    elif plan.wide:
        scratch |= wide.wide_scratch(plan)
    else:
        scratch |= dict(
            turn=plgpu.Barrier(num_barriers=plan.warpgroups),
            cleaned=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.teams),
        )
    scratch |= of_widening
    grid = dict(grid=(min(plan.pieces, plan.cores),))
    if plan.clusters:
        grid = dict(grid=(plan.pieces // plan.splits,), cluster=(plan.splits,), cluster_names=("part",))
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, list(optional)),
        out_type=tuple(result_types),
        scratch_types=scratch,
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
        counters = jax.new_ref(jnp.zeros(counters_shape(plan), jnp.int32))
        found = compat.takes_references(kernel)(*operands, counters)[:2]
    else:
        found = kernel(*operands)
    return [array.reshape(-1, plan.value_dim) if array.ndim > 1 else array for array in found]


def _kernel(plan: Plan, names, table, pages, pools, kv_head_start, query, *others, **scratch):
    """A thread block: one warpgroup loads and the others compute, each going through the block's share of the work.

    The loads run ahead from one piece of work into the next: the steps of the rings are counted on from piece to piece.
    """
    results_at = len(others) - (4 if plan.final_beside_parts else 2)
    number = results_at - len(names) - plan.last_merges
    caches, optional, results = others[:number], others[number:results_at], others[results_at:]
    counters, optional = optional[-1] if plan.last_merges else None, dict(zip(names, optional))
    blocks = min(plan.pieces, plan.cores)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    slab = lax.rem(warpgroup, plan.slabs)
    part = lax.axis_index("part") if plan.clusters else None

    def index_of(i, team=0):
        """The number of a team's i-th piece: longest first, to and fro over the blocks' teams."""
        place, places = team * blocks + block, plan.teams * blocks
        return i * places + jnp.where(lax.rem(i, 2) == 0, place, places - 1 - place)

    def piece_of(i, team=0, pieces=plan.pieces):
        """A team's i-th piece, and whether there is one."""
        index = index_of(i, team)
        piece = _piece(plan, table, pools, kv_head_start, jnp.minimum(index, plan.pieces - 1), slab)._replace(number=i)
        return piece, (index < pieces) & (piece.tile.length > 0)

    def each_piece(do, team=0):
        """Calls do(piece, steps already done) for a team's pieces.

        Of a cluster, each block has a part of one tile; where there is one part, the other blocks end.
        """
        if plan.clusters:
            piece = _piece(plan, table, pools, kv_head_start, block, slab, part)
            takes_part = (piece.tile.parts > 1) | (part == 0)
            return pl.when((piece.tile.length > 0) & takes_part)(lambda: do(piece, jnp.int32(0)))
        places = plan.teams * blocks

        def turn(i, done, pieces=plan.pieces):
            piece, exists = piece_of(i, team, pieces)
            pl.when(exists)(lambda: do(piece, done))
            return done + jnp.where(exists, piece.steps, 0)

        def turn_of_parts(carry):
            """Asks how many there are beside asking for one: neither waits for the other."""
            i, done, _ = carry
            pieces = table[plan.rows_of_table * plan.columns] * plan.head_tiles
            return i + 1, turn(i, done, pieces), (i + 1) * places < pieces

        if plan.parts.vary:
            lax.while_loop(lambda carry: carry[2], turn_of_parts, (jnp.int32(0), jnp.int32(0), jnp.bool_(True)))
        else:
            lax.fori_loop(0, -(-plan.pieces // places), turn, jnp.int32(0))

    if plan.shares_place:
        [scratch["keys"]], [scratch["values"]] = scratch.pop("places")
    if plan.exchanges_in_blocks:
        rings, [scratch["exchange"], scratch["exchanged"]] = scratch.pop("blocks")
        scratch |= dict(zip(plan.rings, rings))
    sources = _sources(plan, caches, optional, **scratch)

    def attend_pieces(team, warpgroup):
        shared = dict(optional=optional, sources=sources, results=results, warpgroup=warpgroup)
        if plan.alternates:
            return each_piece(functools.partial(alternate.compute, plan, **shared, **scratch))
        if plan.wide:
            return each_piece(functools.partial(wide.compute, plan, **shared, **scratch))
        if plan.chains:
            return compute_chain(plan, piece_of, **shared, **scratch)
        shared |= dict(team=team)
        if plan.few_rows:
            shared |= dict(way=few_rows.FewRows)
        if plan.looks_ahead:
            return compute_each(plan, piece_of, **shared, **scratch)
        each_piece(functools.partial(compute, plan, **shared, **scratch), team)

    @pl.when(warpgroup < plan.computing_warpgroups)
    def _():
        _set_registers(plan.registers.computes, "increase")
        if plan.takes_turns:  # the first turn is the first warpgroup's
            pl.when(warpgroup == plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))
        team, of_team = (warpgroup, jnp.int32(0)) if plan.teams > 1 else (0, warpgroup)
        attend_pieces(team, of_team)
        if plan.last_merges:
            of_pieces = functools.partial(index_of, team=team), lambda i: piece_of(i, team)[0]
            merge_where_last(plan, table, *of_pieces, of_team, optional, results, counters)

    def start_barriers():
        """Those that Pallas does not know, before the other warps of this warpgroup and those that widen use them."""
        for source in sources:
            if source.wide_blocks is not None:
                initialise(source.here, loading_warps(plan))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["started"])

    def load(warp):
        if not plan.quantised or plan.loading_warpgroups > 1:
            return _load(plan, each_piece, pages, query, sources, warp, **scratch)
        pl.when(warp == 0)(lambda: _load(plan, each_piece, pages, query, sources, None, **scratch))
        pl.when(warp > 0)(lambda: widen(plan, each_piece, pages, sources, warp - 1))

    @pl.when(warpgroup == plan.computing_warpgroups)
    def _():
        _set_registers(plan.registers.loads, "decrease")
        if plan.quantised:
            start_barriers()
        _each_warp(load)

    if plan.loading_warpgroups == 2:

        @pl.when(warpgroup == plan.computing_warpgroups + 1)
        def _():
            _set_registers(plan.registers.widens, "decrease")
            plgpu.barrier_wait(scratch["started"])
            _each_warp(functools.partial(widen, plan, each_piece, pages, sources))


def _each_warp(do) -> None:
    """Calls do(warp) for each warp of a warpgroup."""

    @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
    def call():
        do(lax.axis_index("warp"))

    call()


def _set_registers(number, action) -> None:
    if number is not None:
        plgpu.set_max_registers(number, action=action)


class Piece(NamedTuple):
    """A part of a tile, for some heads: the work between two visits to the schedule. All scalars, but the tile."""

    number: Int[Array, ""]  # how many pieces its team has had before it
    tile: Tiles  # all scalars too: of what slabs see, one slab's
    pool: Int[Array, ""]
    head_tile: Int[Array, ""]
    last: Int[Array, ""]  # its last block of keys, which is its first step: the others follow downwards
    steps: Int[Array, ""]  # its blocks; at least one, all of it masked if need be, so that there is always a result
    cache_head: Int[Array, ""]  # KV head, counted through all pools
    head: Int[Array, ""]  # first query head
    heads_left: Int[Array, ""]  # heads from there to the end of the group
    first_row: Int[Array, ""]  # of the KV head's keys, in the caches as matrices of rows


def _piece(plan: Plan, table, pools, kv_head_start, index, slab, part=None) -> Piece:
    """A piece by its number: of all tiles if `part` says which of a tile's it is, and else of all parts."""
    head_tile = lax.rem(index, plan.head_tiles)
    row = lax.div(index, plan.head_tiles)
    if part is None and not plan.parts.vary:
        row, part = lax.div(row, plan.splits), lax.rem(row, plan.splits)
    row *= plan.columns
    fields = [table[row + i] for i in range(TILE_COLUMNS)]
    slabs = row + TILE_COLUMNS + slab
    tile = Tiles(*fields, Slabs(*(table[slabs + i * plan.slabs] for i in range(len(Slabs._fields)))))
    pool = jnp.int32(0)
    if plan.pools > 1:
        entry = jnp.clip(lax.div(tile.seq, plan.seqs_of_pool), 0, pools.shape[0] - 1)  # behind the last part is junk
        pool = jnp.clip(pools[entry], 0, plan.pools - 1)
    kv_head = lax.div(head_tile, plan.head_tiles_per_group)
    in_group = lax.rem(head_tile, plan.head_tiles_per_group) * plan.heads
    if not plan.parts.vary:
        blocks = tile.end_block - tile.first_block
        alone = plan.clusters & (plan.parts.share(blocks) >= blocks)  # the first part, that is
        tile = plan.parts.part(tile, part, jnp.where(alone, 1, plan.splits))
    steps = jnp.maximum(tile.end_block - tile.first_block, 1)
    return Piece(
        number=jnp.int32(0),
        tile=tile,
        pool=pool,
        head_tile=head_tile,
        last=tile.first_block + steps - 1,
        steps=steps,
        cache_head=pool * plan.cache_kv_heads + kv_head_start[0] + kv_head,
        head=kv_head * plan.group + in_group,
        heads_left=plan.group - in_group,
        first_row=pool * plan.pool_rows + (kv_head_start[0] + kv_head) * plan.head_rows,
    )


class Source(NamedTuple):
    """The keys, or the values: where they lie in global memory, and the ring of blocks that copies fill.

    Blocks of a quantised cache come as they are, and are widened into a second ring (`wide_*`), which is what products
    read. Where each slot has its own scale, those of keys and values are fetched with the keys.
    """

    rows: jax.Array  # the cache as a matrix in global memory, a row for each slot (of all heads where those lie together)
    beside: int  # rows of one head's features from a key to what this is about: its value, in one array with it; else 0
    features: int
    stages: int  # of the ring
    blocks: jax.Array  # the ring, in shared memory
    here: jax.Array  # barriers: a stage has been filled; it may be filled again
    free: jax.Array
    scale: str | None  # what has a scale of its own: a "tensor", a "head" or a "slot"
    scales: jax.Array | None  # in global memory
    slot_scales: tuple = ()  # of each kind: (scales in global memory, its `beside`, scales of blocks in shared memory)
    wide_blocks: jax.Array | None = None  # the second ring, and its barriers
    wide_here: jax.Array | None = None
    wide_free: jax.Array | None = None
    free_before: int = 0  # the first step that waits for a widened block to be free: those before find it so
    groups: list[list[int]] = []  # of 64 features each, by number: groups are widened one after the other
    turns: list[int] = [0]  # of `Plan.output_turns`: for each of the first groups, the one that frees its place


def _sources(plan: Plan, caches, optional, **scratch) -> list[Source]:
    kinds = (
        ("keys", (0, plan.head_dim), plan.key_scale),
        ("values", (plan.value_rows, plan.value_dim), plan.value_scale),
    )
    found, names = [], ("key_scale", "value_scale")
    slot_scales = tuple(
        (optional[its_scale], beside, scratch[f"{name}_scales"])
        for its_scale, (name, (beside, _), scale) in zip(names, kinds)
        if scale == "slot"
    )
    for i, (rows, (name, of_rows, scale)) in enumerate(zip(caches, kinds)):
        blocks = [scratch[name], scratch[f"{name}_here"], scratch[f"{name}_free"]]
        raw, is_widened = blocks, plan.widens_keys if name == "keys" else plan.quantised
        if is_widened:
            raw = [scratch[f"raw_{name}"], scratch["raw_here"].at[i], scratch[f"raw_{name}_free"]]
        wide = []
        if is_widened:
            if plan.shares_place:  # what comes next there waits for what was there
                blocks[2] = scratch["keys_free" if name == "values" else "values_free"]
            after = 0 if plan.shares_place and name == "values" else plan.slots
            groups, turns = [[*range(plan.value_dim // COLUMNS)]], [0]
            if name == "keys":
                groups, turns = plan.key_groups, plan.turns_before_keys
            wide = [slot_scales if i == 0 else (), *blocks, after, groups, turns]
        stages = plan.slots if name == "values" and not plan.quantised else plan.stages
        found.append(Source(rows, *of_rows, stages, *raw, scale, optional.get(names[i]), *wide))
    return found


def _load(plan, each_piece, pages, query, sources, warp, *, query_views, query_here, query_free, **_):
    """Copies each piece's query rows, and its blocks of keys and values page by page.

    Half a block of keys, or of values, is a warp's work, a quarter where there are keys alone, and all where there are
    two teams; everything is one's where `warp` is None.
    """
    [[query_slots], *_], keys = query_views, sources[0]

    def ask_for_query(piece):
        """Brings a piece's query into the second cache, while the last one still has its place."""
        place = pl.ds(piece.tile.start, plan.block_q), pl.ds(piece.head, plan.heads)
        for part in range(plan.query_parts):
            plgpu.async_prefetch(query.at[*place, pl.ds(part * plan.query_columns, plan.query_columns)])

    def copy_query(team, piece, done):
        occupied = done > 0 if plan.query_places == 1 else piece.number >= plan.query_places
        if plan.asks_ahead:
            pl.when(occupied)(functools.partial(ask_for_query, piece))
        for row in range(0, plan.rows, plan.slab):
            queries = plan.queries_of(piece, team, row // WARPGROUP_ROWS)
            if row % (plan.rows // plan.query_groups) == 0:
                pl.when(occupied)(functools.partial(plgpu.barrier_wait, query_free.at[queries]))
            head, token = plan.head_and_token(row)
            token, head = piece.tile.start + token, piece.head + head
            rows = (token, pl.ds(head, plan.slab)) if plan.by_token else (pl.ds(token, plan.slab), head)
            for part in range(plan.query_parts):
                its_rows = pl.ds(row % WARPGROUP_ROWS, plan.slab)
                slots = query_slots.at[plan.query_of(piece, team, row // WARPGROUP_ROWS), part, its_rows]
                numbers = query.at[*rows, pl.ds(part * plan.query_columns, plan.query_columns)]
                plgpu.copy_gmem_to_smem(numbers, slots, query_here.at[queries])

    def copy(offsets, sources, before=None, team=0):
        """Copies the runs at these offsets of every block."""
        ahead = 1 if any(source is keys for source in sources) else 0  # blocks that the first query takes along
        # Blocks under way while a place for another is waited for: with one more, none is there for those who would free it.
        late = min(source.stages for source in sources) - 1 if plan.gathers else 0
        besides = {source.beside for source in sources}

        def row_of(piece, key, beside):
            if plan.gathers:  # each lane its own
                key += gather.lane(threads)
                row = plan.row_of(piece, threads.load(pages, plan.page_of(piece, key)), key, beside)
                return jnp.where((piece.tile.first_key <= key) & (key < piece.tile.end_key), row, -1)
            return plan.row_of(piece, pages[plan.page_of(piece, key)], key, beside)

        def announce(i, done):
            """That block i of a piece has come."""
            for source, _ in itertools.product(sources, offsets):
                slot = team * source.stages + lax.rem(done + i, source.stages)
                plgpu.barrier_arrive(source.here.at[slot])

        def copy_piece(piece, done):
            last_queries = plan.queries_of(piece, team, plan.row_groups - 1)
            if before is not None:
                now = done == 0 if plan.values_before_query else True
                pl.when(now)(functools.partial(before, team, piece, done))

            def rows_of(i):
                first = (piece.last - i) * plan.block_kv
                return {beside: [row_of(piece, first + offset, beside) for offset in offsets] for beside in besides}

            def ask_for_block(i):
                rows = rows_of(i)
                for source in sources:
                    _ask_for_runs(plan, piece, source, rows[source.beside])

            def step(i, _):
                rows = rows_of(i)
                if plan.query_comes_first:
                    pl.when((done == 0) & (i == ahead))(lambda: plgpu.barrier_wait(query_here.at[last_queries]))
                if late:  # what has come meanwhile, before a place is waited for
                    pl.when(i >= late)(lambda: threads.wait_for_groups(late - 1))
                    pl.when(i >= late)(functools.partial(announce, i - late, done))
                for source in sources:
                    slot = team * source.stages + lax.rem(done + i, source.stages)

                    @pl.when(done + i >= source.stages)
                    def _(source=source, slot=slot):
                        plgpu.barrier_wait(source.free.at[slot])

                    _copy_runs(plan, piece, source, slot, offsets, rows[source.beside])
                if plan.gathers:
                    threads.close_group()
                    if not late:
                        threads.wait_for_groups(0)
                        announce(i, done)
                if plan.asks_for_blocks:
                    pl.when(i + 1 < piece.steps)(functools.partial(ask_for_block, i + 1))
                if before is not None and plan.values_before_query:
                    pl.when((done > 0) & (i == 0))(functools.partial(before, team, piece, done))

            lax.fori_loop(0, piece.steps, step, None)
            for left in range(late, 0, -1):
                pl.when(piece.steps >= left)(functools.partial(threads.wait_for_groups, left - 1))
                pl.when(piece.steps >= left)(functools.partial(announce, piece.steps - left, done))

        each_piece(copy_piece, team)

    offsets = range(0, plan.block_kv, plan.run)
    if warp is None:
        return copy(offsets, sources, copy_query)
    warps, size = 4 // plan.teams, copies_of_a_warp(plan)
    firsts = range(0, len(offsets), size)
    for team, (part, first), (i, source) in itertools.product(range(plan.teams), enumerate(firsts), enumerate(sources)):
        before = copy_query if part == 0 and source is sources[-1] else None
        share = offsets[first : first + size]
        its_warp = team * warps + len(sources) * part + i
        pl.when(warp == its_warp)(functools.partial(copy, share, [source], before, team))


def loading_warps(plan: Plan) -> int:
    """Warps that share the copies of a block of keys, or of values."""
    return 1 if plan.loading_warpgroups == 1 else -(-copies_of(plan) // copies_of_a_warp(plan))


def _ask_for_runs(plan: Plan, piece, source: Source, rows) -> None:
    """Brings runs of keys or values from these rows of the cache on into the second cache, from where they are copied soon."""
    column = plan.in_slot(piece, source.beside) * source.features
    width = next(width for width in range(MOST_ASKED_COLUMNS, 0, -COLUMNS) if source.features % width == 0)
    for row in rows:
        for first in range(0, source.features, width):
            plgpu.async_prefetch(source.rows.at[pl.ds(row, plan.run), pl.ds(column + first, width)])


def _copy_runs(plan: Plan, piece, source: Source, slot, offsets, rows) -> None:
    """Starts to copy keys or values, each run from a row of the cache to its offset in a block."""
    column = plan.in_slot(piece, source.beside) * source.features
    if plan.gathers:
        for offset, row in zip(offsets, rows):
            gather.start(threads, source.rows, row, column, source.features, source.blocks.at[slot, pl.ds(offset, plan.run)])
        return
    if source.wide_blocks is None:
        for offset, row in zip(offsets, rows):
            place = pl.ds(row, plan.run)
            if plan.slot_rows > 1:  # of a slot, one head's columns
                place = place, pl.ds(column, source.features)
            slots = source.blocks.at[slot, pl.ds(offset, plan.run)]
            plgpu.copy_gmem_to_smem(source.rows.at[place], slots, source.here.at[slot])
        return
    targets = [source.blocks.at[slot, pl.ds(offset, plan.run)] for offset in offsets]
    copies = [(source.rows, row, column, target) for row, target in zip(rows, targets)]
    copy_together(source.here, slot, copies, tiled=plan.fp8_terms > 0)
