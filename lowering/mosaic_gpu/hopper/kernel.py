"""The Hopper kernel: its launch, the pieces of work that a thread block goes through, and how it loads their pages.

The block takes a *tile*: some tokens of one sequence, for some of the query heads that share a KV head, 64 rows (a head
and a token) to each compute warpgroup (compute.py). One more warpgroup only loads: its warps copy keys and values page
by page, from where they lie into the rows of a swizzled tile in shared memory, and the query rows of the next tile.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import copy_together, initialise
from paged_prefill.lowering.mosaic_gpu.hopper.compute import compute
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, TILED
from paged_prefill.lowering.mosaic_gpu.hopper.plan import TILE_COLUMNS, WARPGROUP_ROWS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper import wide
from paged_prefill.lowering.mosaic_gpu.hopper.widen import copies_of, copies_of_a_warp, widen, widening_scratch
from paged_prefill.lowering.tiles import Slabs, Tiles


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

    Returns out [splits * tokens * q_heads, value_dim], in float32 if split, and lse [splits * q_heads * tokens].
    """
    dtype, product_dtype = jnp.dtype(plan.dtype), jnp.dtype(plan.product_dtype)
    rows = plan.splits * plan.tokens * query.shape[1]
    out_type = jax.ShapeDtypeStruct((rows, plan.value_dim), dtype if plan.splits == 1 else jnp.float32)
    lse_type = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def ring(features):
        return plgpu.SMEM((plan.slots, plan.block_kv, features), product_dtype, transforms=TILED)

    blocks = dict(keys=ring(plan.head_dim)) | ({} if plan.latent else dict(values=ring(plan.value_dim)))
    if plan.shares_place:
        blocks = dict(places=plgpu.RefUnion(*([view] for view in blocks.values())))

    # The same bytes seen in several ways: wgmma takes tiles of 8 rows; the copies start at any row, so not at a tile's;
    # and products may be of another dtype.
    query_shape = (plan.row_groups, plan.query_parts, WARPGROUP_ROWS, COLUMNS)
    views = ((dtype, TILED[1:]), (dtype, TILED), (product_dtype, TILED))
    query_views = [plgpu.SMEM(query_shape, its_dtype, transforms=transforms) for its_dtype, transforms in views]
    # Each copy of a block arrives, or each warp that widens it.
    arrivals = plan.widening_warps if plan.quantised else copies_of(plan)
    slabs, turns = plan.rows // plan.slab, plan.output_turns if plan.latent else 1
    scratch = dict(
        query_views=plgpu.RefUnion(*([view] for view in query_views)),
        query_here=plgpu.Barrier(num_arrivals=slabs * plan.query_parts),
        query_free=plgpu.Barrier(num_arrivals=plan.warpgroups),
        **blocks,
        keys_here=plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.slots * len(plan.key_groups)),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.slots * turns),
    )
    if not plan.latent:
        scratch |= dict(
            values_here=plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.slots),
            values_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.slots * plan.output_turns),
        )
    if plan.wide:
        scratch |= wide.wide_scratch(plan)
    else:
        scratch |= dict(
            turn=plgpu.Barrier(num_barriers=plan.warpgroups),
            cleaned=plgpu.Barrier(num_arrivals=plan.warpgroups),
        )
    if plan.quantised:
        scratch |= widening_scratch(plan)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, list(optional)),
        out_type=(out_type, lse_type),
        scratch_types=scratch,
        grid=(min(plan.pieces, plan.cores),),
        grid_names=("block",),
        num_threads=plan.warpgroups + plan.loading_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=1024,  # the least there is: no reduction here goes over warps
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="paged_prefill",
    )
    return kernel(*schedule, query, *caches, *(array.reshape(-1) for array in optional.values()))


def _kernel(plan: Plan, names, table, pages, pools, kv_head_start, query, *others, **scratch):
    """A thread block: one warpgroup loads and the others compute, each going through the block's share of the work.

    The loads run ahead from one piece of work into the next: the steps of the rings are counted on from piece to piece.
    """
    *others, out, lse = others
    number = len(others) - len(names)
    caches, optional = others[:number], others[number:]
    optional = dict(zip(names, optional))
    blocks = min(plan.pieces, plan.cores)
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    slab = lax.rem(warpgroup, plan.slabs)

    def each_piece(do):
        """Calls do(piece, steps already done) for this block's pieces: longest first, to and fro over the blocks."""

        def turn(i, done, pieces=plan.pieces):
            index = i * blocks + jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
            piece = _piece(plan, table, pools, kv_head_start, jnp.minimum(index, plan.pieces - 1), slab)
            exists = (index < pieces) & (piece.tile.length > 0)
            pl.when(exists)(lambda: do(piece, done))
            return done + jnp.where(exists, piece.steps, 0)

        def turn_of_parts(carry):
            """Asks how many there are beside asking for one: neither waits for the other."""
            i, done, _ = carry
            pieces = table[plan.rows_of_table * plan.columns] * plan.head_tiles
            return i + 1, turn(i, done, pieces), (i + 1) * blocks < pieces

        if plan.parts.vary:
            lax.while_loop(lambda carry: carry[2], turn_of_parts, (jnp.int32(0), jnp.int32(0), jnp.bool_(True)))
        else:
            lax.fori_loop(0, -(-plan.pieces // blocks), turn, jnp.int32(0))

    if plan.shares_place:
        [scratch["keys"]], [scratch["values"]] = scratch.pop("places")
    sources = _sources(plan, caches, optional, **scratch)

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        _set_registers(plan.registers.computes, "increase")
        if plan.takes_turns:  # the first turn is the first warpgroup's
            pl.when(warpgroup == plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))
        shared = dict(warpgroup=warpgroup, optional=optional, sources=sources, out=out, lse=lse)
        each_piece(functools.partial(wide.compute if plan.wide else compute, plan, **shared, **scratch))

    def start_barriers():
        """Those that Pallas does not know, before the other warps of this warpgroup and those that widen use them."""
        for source in sources:
            initialise(source.here, loading_warps(plan))
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["started"])

    def load(warp):
        if not plan.quantised or plan.loading_warpgroups > 1:
            return _load(plan, each_piece, pages, query, sources, warp, **scratch)
        pl.when(warp == 0)(lambda: _load(plan, each_piece, pages, query, sources, None, **scratch))
        pl.when(warp > 0)(lambda: widen(plan, each_piece, pages, sources, warp - 1))

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        _set_registers(plan.registers.loads, "decrease")
        if plan.quantised:
            start_barriers()
        _each_warp(load)

    if plan.loading_warpgroups == 2:

        @pl.when(warpgroup == plan.warpgroups + 1)
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

    tile: Tiles  # all scalars too: of what slabs see, one slab's
    pool: Int[Array, ""]
    head_tile: Int[Array, ""]
    last: Int[Array, ""]  # block of keys: they are taken from there downwards
    steps: Int[Array, ""]  # blocks; at least one, all of it masked if need be, so that there is always a result
    head: Int[Array, ""]  # first query head
    heads_left: Int[Array, ""]  # heads from there to the end of the group
    first_row: Int[Array, ""]  # of the KV head's keys, in the caches as matrices of rows


def _piece(plan: Plan, table, pools, kv_head_start, index, slab) -> Piece:
    head_tile = lax.rem(index, plan.head_tiles)
    row = lax.div(index, plan.head_tiles)
    if not plan.parts.vary:
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
        tile = _part(tile, part, plan.splits)
    steps = jnp.maximum(tile.end_block - tile.first_block, 1)
    return Piece(
        tile=tile,
        pool=pool,
        head_tile=head_tile,
        last=tile.first_block + steps - 1,
        steps=steps,
        head=kv_head * plan.group + in_group,
        heads_left=plan.group - in_group,
        first_row=pool * plan.pool_rows + (kv_head_start[0] + kv_head) * plan.head_rows,
    )


def _part(tile: Tiles, part, splits: int) -> Tiles:
    """One of as many parts as every tile has, the last of which may be empty."""
    share = lax.div(tile.end_block - tile.first_block + splits - 1, splits)
    first_block = tile.first_block + part * share
    end_block = jnp.minimum(first_block + share, tile.end_block)
    return tile._replace(first_block=first_block, end_block=end_block, part=part)


class Source(NamedTuple):
    """The keys, or the values: where they lie, and the blocks that copies bring, to be written once `free` says so.

    Those of a quantised cache come as they are, and are widened into other blocks, which are what products read. Where
    each slot has its own scale, those of keys and values are fetched with the keys.
    """

    rows: jax.Array  # of whole slots, in global memory
    beside: int  # rows from those of keys to these
    features: int
    blocks: jax.Array
    here: jax.Array
    free: jax.Array
    scale: str | None
    scales: jax.Array | None  # in global memory
    slot_scales: tuple = ()  # (in global memory, of blocks for those that compute)
    wide_blocks: jax.Array | None = None
    wide_here: jax.Array | None = None
    wide_free: jax.Array | None = None
    free_before: int = 0  # the step that waits first for a widened block to be free
    groups: list[list[int]] = []  # of parts, which are widened one after the other
    turns: list[int] = [0]  # in which a widened block becomes free, that the first groups wait for


def _sources(plan: Plan, caches, optional, **scratch) -> list[Source]:
    kinds = (
        ("keys", (0, plan.head_dim), plan.key_scale),
        ("values", (plan.value_rows, plan.value_dim), plan.value_scale),
    )
    found, names = [], ("key_scale", "value_scale")
    slot_scales = tuple(
        (optional[its_scale], scratch[f"{name}_scales"])
        for its_scale, (name, _, scale) in zip(names, kinds)
        if scale == "slot"
    )
    for i, (rows, (name, of_rows, scale)) in enumerate(zip(caches, kinds)):
        blocks = [scratch[name], scratch[f"{name}_here"], scratch[f"{name}_free"]]
        raw = blocks
        if plan.quantised:
            raw = [scratch[f"raw_{name}"], scratch["raw_here"].at[i], scratch[f"raw_{name}_free"]]
        wide = []
        if plan.quantised:
            if plan.shares_place:  # what comes next there waits for what was there
                blocks[2] = scratch["keys_free" if name == "values" else "values_free"]
            after = 0 if plan.shares_place and name == "values" else plan.slots
            groups, turns = [[*range(plan.value_dim // COLUMNS)]], [0]
            if name == "keys":
                groups, turns = plan.key_groups, plan.turns_before_keys
            wide = [slot_scales if i == 0 else (), *blocks, after, groups, turns]
        found.append(Source(rows, *of_rows, *raw, scale, optional.get(names[i]), *wide))
    return found


def _load(plan, each_piece, pages, query, sources, warp, *, query_views, query_here, query_free, **_):
    """Copies each piece's query rows, and its blocks of keys and values page by page.

    Half a block of keys, or of values, is a warp's work, a quarter where there are keys alone; all is one's where
    `warp` is None.
    """
    [[query_slots], *_] = query_views

    def copy_query(piece, done):
        pl.when(done > 0)(lambda: plgpu.barrier_wait(query_free))
        for row in range(0, plan.rows, plan.slab):
            head, token = plan.head_and_token(row)
            token, head = piece.tile.start + token, piece.head + head
            rows = (token, pl.ds(head, plan.slab)) if plan.by_token else (pl.ds(token, plan.slab), head)
            for part in range(plan.query_parts):
                slots = query_slots.at[row // WARPGROUP_ROWS, part, pl.ds(row % WARPGROUP_ROWS, plan.slab)]
                plgpu.copy_gmem_to_smem(query.at[*rows, pl.ds(part * COLUMNS, COLUMNS)], slots, query_here)

    def copy(offsets, sources, before=None):
        """Copies the runs at these offsets of every block."""

        def row_of(piece, key, beside):
            return plan.row_of(piece, pages[plan.page_of(piece, key)], key, beside)

        def copy_piece(piece, done):
            if before is not None:
                before(piece, done)

            def step(i, _):
                slot = lax.rem(done + i, plan.stages)
                rows = {
                    beside: [row_of(piece, (piece.last - i) * plan.block_kv + offset, beside) for offset in offsets]
                    for beside in {source.beside for source in sources}
                }
                for source in sources:

                    @pl.when(done + i >= plan.stages)
                    def _(source=source):
                        plgpu.barrier_wait(source.free.at[slot])

                    _copy_runs(plan, piece, source, slot, offsets, rows[source.beside])

            lax.fori_loop(0, piece.steps, step, None)

        each_piece(copy_piece)

    offsets = range(0, plan.block_kv, plan.run)
    if warp is None:
        return copy(offsets, sources, copy_query)
    size = copies_of_a_warp(plan)
    for part, first in enumerate(range(0, len(offsets), size)):
        for i, source in enumerate(sources):
            before = copy_query if part == 0 and source is sources[-1] else None
            share = offsets[first : first + size]
            pl.when(warp == len(sources) * part + i)(functools.partial(copy, share, [source], before))


def loading_warps(plan: Plan) -> int:
    """Warps that share the copies of a block of keys, or of values."""
    return 1 if plan.loading_warpgroups == 1 else -(-copies_of(plan) // copies_of_a_warp(plan))


def _copy_runs(plan: Plan, piece, source: Source, slot, offsets, rows) -> None:
    """Starts to copy keys or values, each run from a row of the cache to its offset in a block."""
    if not plan.quantised:
        for offset, row in zip(offsets, rows):
            place = pl.ds(row, plan.run)
            if plan.slot_rows > 1:  # of a slot, one head's columns
                first = lax.rem(piece.first_row + source.beside, plan.slot_rows) * source.features
                place = place, pl.ds(first, source.features)
            slots = source.blocks.at[slot, pl.ds(offset, plan.run)]
            plgpu.copy_gmem_to_smem(source.rows.at[place], slots, source.here.at[slot])
        return
    copies = []
    for offset, row in zip(offsets, rows):
        copies.append((source.rows, row, plan.run, source.blocks.at[slot, pl.ds(offset, plan.run)]))
    copy_together(source.here, slot, copies)
