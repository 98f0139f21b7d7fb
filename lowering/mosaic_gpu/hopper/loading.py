"""What the loading warps of a thread block do: they bring queries, keys and values into shared memory, piece after
piece.

Half a block of keys, or of values, is a warp's work, a quarter where there are keys alone, and all where there are two
teams; where other warps of the warpgroup widen, everything is one's. They run ahead of those that compute, as far as
the rings have room.
"""

from dataclasses import dataclass
import functools
import itertools
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper import gather, mates, threads
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import copy_parts, copy_tiles, copy_together
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.hopper.plan import MATES, WARPGROUP_ROWS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Places
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, Part, lie_apart, parts_of

MOST_ASKED_COLUMNS = 256  # that are brought into the second cache together


class Source(NamedTuple):
    """The keys, or the values: where they lie in global memory, and the ring of blocks that copies fill.

    Blocks of a quantised cache come as they are, and unless products of few rows read them so, are widened into a
    second ring (`wide_*`), which is what products read. There, where each slot has its own scale, those of keys and
    values are fetched with the keys.
    """

    rows: jax.Array  # the cache as a matrix in global memory: each slot is a row, of all heads where those lie together
    beside: int  # rows of one head's features from a key to what this is about: its value, in one array with it; else 0
    features: int
    shares: int  # of them, each of which comes on its own
    freed: int  # of those, how many a stage has room for on their own: all, or it has for all together
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


def sources_of(plan: Plan, caches, optional, scratch) -> list[Source]:
    """Keys, and unless they are values too, values."""
    kinds = (
        ("keys", (0, plan.head_dim), plan.key_scale),
        ("values", (plan.value_rows, plan.value_dim), plan.value_scale),
    )
    found, names = [], ("key_scale", "value_scale")
    slot_scales = tuple(
        (optional[its_scale], beside, scratch[f"{name}_scales"])
        for its_scale, (name, (beside, *_), scale) in zip(names, kinds)
        if scale == "slot" and plan.widens
    )
    for i, (rows, (name, of_rows, scale)) in enumerate(zip(caches, kinds)):
        blocks = [scratch[name], scratch[f"{name}_here"], scratch[f"{name}_free"]]
        raw, is_widened = blocks, plan.widens_keys if name == "keys" else plan.widens
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
        stages = plan.slots if name == "values" and not plan.widens else plan.stages
        found.append(Source(rows, *of_rows, plan.block_shares, plan.freed_shares, stages, *raw, scale, optional.get(names[i]), *wide))
    return found


@dataclass(frozen=True)
class Queries:
    """The query, and the places that its rows are copied to."""

    plan: Plan
    query: jax.Array  # [tokens, q_heads, head_dim] in global memory
    places: Places

    def copy(self, piece, team, done) -> None:
        """Starts to copy a piece's rows, a slab at a time, once there is a place."""
        plan = self.plan
        occupied = done > 0 if plan.query_places == 1 else piece.number >= plan.query_places
        if plan.asks_ahead:
            pl.when(occupied)(functools.partial(self._ask_for, piece))
        for row in range(0, plan.rows, plan.slab):
            queries = plan.queries_of(piece, team, row // WARPGROUP_ROWS)
            if row % (plan.rows // plan.query_groups) == 0:
                pl.when(occupied)(functools.partial(plgpu.barrier_wait, self.places.free.at[queries]))
            head, token = plan.head_and_token(row)
            token, head = piece.tile.start + token, piece.head + head
            rows = (token, pl.ds(head, plan.slab)) if plan.by_token else (pl.ds(token, plan.slab), head)
            for part, columns in self._parts():
                its_rows = pl.ds(row % WARPGROUP_ROWS, plan.slab)
                target = self.places.slots.at[plan.query_of(piece, team, row // WARPGROUP_ROWS), part, its_rows]
                plgpu.copy_gmem_to_smem(self.query.at[*rows, columns], target, self.places.here.at[queries])

    def _ask_for(self, piece) -> None:
        """Brings a piece's rows into the second cache, while the last one still has its place."""
        place = pl.ds(piece.tile.start, self.plan.block_q), pl.ds(piece.head, self.plan.heads)
        for _, columns in self._parts():
            plgpu.async_prefetch(self.query.at[*place, columns])

    def _parts(self):
        """(number, columns) of all parts."""
        columns = self.plan.query_columns
        for part in range(self.plan.query_parts):
            yield part, pl.ds(part * columns, columns)


@dataclass(frozen=True)
class Loading:
    """A warp's share of a team's loads: the runs at some offsets of every block, and perhaps the queries."""

    plan: Plan
    pages: jax.Array  # the page table, in global memory
    queries: Queries
    sources: list[Source]  # keys, values, or both
    offsets: range  # in a block, or in the half of one that begins with key `first`
    first: int | jax.Array = 0
    team: int = 0
    has_keys: bool = True
    has_queries: bool = True

    def copy_piece(self, piece, done) -> None:
        """Copies a piece's blocks, its query beside the first; `done` blocks went through the team's rings before."""
        plan, steps = self.plan, piece.steps
        last_queries = plan.queries_of(piece, self.team, plan.row_groups - 1)
        ahead = 1 if self.has_keys else 0  # blocks that the first query takes along
        copy_query = functools.partial(self.queries.copy, piece, self.team, done)
        if self.has_queries:
            pl.when(done == 0 if plan.values_before_query else True)(copy_query)

        def step(i, pages):
            rows = self._rows_of(piece, i, pages)
            pages = self._looked_up(piece, i + 1)
            if plan.query_comes_first:
                here = self.queries.places.here
                pl.when((done == 0) & (i == ahead))(lambda: plgpu.barrier_wait(here.at[last_queries]))
            self._announce_late(i, done)
            for source in self.sources:
                for share in range(source.shares):
                    slot = self._free_stage(source, i, done, share)
                    self._copy_runs(piece, source, slot, share, rows[source.beside])
            self._close_gathered(i, done)
            if plan.asks_for_blocks:
                pl.when(i + 1 < steps)(functools.partial(self._ask_for_block, piece, i + 1))
            if self.has_queries and plan.values_before_query:
                pl.when((done > 0) & (i == 0))(copy_query)
            return pages

        lax.fori_loop(0, steps, step, self._looked_up(piece, 0))
        self._announce_rest(steps, done)

    def _keys_of(self, piece, i):
        """The first keys of the runs of block i; where they are gathered, each lane's own key of each."""
        first = (piece.last - i) * self.plan.block_kv + self.first
        if self.plan.gathers:
            first += gather.lane(threads)
        return (first + offset for offset in self.offsets)

    def _looked_up(self, piece, i):
        """Where block i is gathered, the pages of its keys, a block ahead: they take as long to come as the keys do."""
        keys = self._keys_of(piece, i) if self.plan.gathers else ()
        return tuple(threads.load(self.pages, self.plan.page_of(piece, jnp.maximum(key, 0))) for key in keys)

    def _rows_of(self, piece, i, pages=()):
        """The rows of the cache at which the runs of block i begin, by `Source.beside`."""
        besides, pages = {source.beside for source in self.sources}, pages or [None] * len(self.offsets)
        each = lambda: zip(pages, self._keys_of(piece, i))
        return {beside: [self._row_of(piece, page, key, beside) for page, key in each()] for beside in besides}

    def _row_of(self, piece, page, key, beside):
        if not self.plan.gathers:
            return self.plan.row_of(piece, self.pages[self.plan.page_of(piece, key)], key, beside)
        row = self.plan.row_of(piece, page, key, beside)
        return jnp.where((piece.tile.first_key <= key) & (key < piece.tile.end_key), row, -1)

    def _free_stage(self, source: Source, i, done, share):
        """Where a share of block i of a piece goes, once nothing reads there."""
        slot = self._stage_of(source, i, done)
        if share >= source.freed:  # the first was waited for
            return slot
        place, occupied = slot * source.freed + share, pl.when(done + i >= source.stages)
        if self.plan.mates:
            occupied(lambda: mates.wait_for_place(source.free, place, done + i, source.stages))
        else:
            occupied(lambda: plgpu.barrier_wait(source.free.at[place]))
        return slot

    def _stage_of(self, source: Source, i, done):
        return self.team * source.stages + lax.rem(done + i, source.stages)

    def _copy_runs(self, piece, source: Source, slot, share, rows) -> None:
        """Starts to copy a share of keys or values, each run from a row of the cache to its offset in a block."""
        plan, column = self.plan, self.plan.in_slot(piece, source.beside) * source.features
        features = source.features // source.shares
        blocks, parts = source.blocks, [((share,) if source.shares > 1 else (), Part(share * features, features))]
        if lie_apart(source.features):
            parts = [((i,), part) for i, part in enumerate(parts_of(source.features))]
        elif plan.keys_come_apart:
            every = parts_of(source.features)
            parts = [((i,), every[i]) for i in plan.key_groups[share]]
        targets = [
            (row, part, blocks.at[slot, *place, pl.ds(self.first + offset, plan.run)])
            for row, offset in zip(rows, self.offsets)
            for place, part in parts
        ]
        if plan.gathers:
            for row, part, target in targets:
                gather.start(threads, source.rows, row, column + part.first, part.features, target)
        elif lie_apart(source.features):
            copies = [(source.rows, row, column + part.first, part.features, target) for row, part, target in targets]
            copy_parts(source.here, slot, copies)
        elif plan.announces_runs:
            copies = [(source.rows, row, column, target) for row, _, target in targets]
            copy_tiles(source.here, slot, copies, MATES if plan.mates else 1)
        elif source.wide_blocks is None:
            here = source.here.at[slot * source.shares + share]
            for row, part, target in targets:
                place = pl.ds(row, plan.run)
                if plan.slot_rows > 1 or part.features < source.features:  # of a slot, one head's columns, or some of them
                    place = place, pl.ds(column + part.first, part.features)
                plgpu.copy_gmem_to_smem(source.rows.at[place], target, here)
        else:
            copies = [(source.rows, row, column, target) for row, _, target in targets]
            copy_together(source.here, slot, copies, tiled=plan.fp8_terms > 0)

    def _ask_for_block(self, piece, i) -> None:
        """Brings block i into the second cache, from where it is copied soon."""
        rows = self._rows_of(piece, i)
        for source in self.sources:
            column = self.plan.in_slot(piece, source.beside) * source.features
            width = next(width for width in range(MOST_ASKED_COLUMNS, 0, -COLUMNS) if source.features % width == 0)
            for row, first in itertools.product(rows[source.beside], range(0, source.features, width)):
                place = pl.ds(row, self.plan.run), pl.ds(column + first, width)
                plgpu.async_prefetch(source.rows.at[place])

    # Gathered keys announce themselves to no barrier: their warp waits for them, and does.

    @property
    def _late(self) -> int:
        """Gathered blocks under way while a place for another is waited for.

        With one more, none is there for those who would free it.
        """
        return min(source.stages for source in self.sources) - 1 if self.plan.gathers else 0

    def _announce_late(self, i, done) -> None:
        """Before a place for block i is waited for: what has come meanwhile."""
        if late := self._late:
            pl.when(i >= late)(lambda: threads.wait_for_groups(late - 1))
            pl.when(i >= late)(functools.partial(self._announce, i - late, done))

    def _close_gathered(self, i, done) -> None:
        """Behind the copies of block i."""
        if self.plan.gathers:
            threads.close_group()
            if not self._late:
                threads.wait_for_groups(0)
                self._announce(i, done)

    def _announce_rest(self, steps, done) -> None:
        """At a piece's end: the blocks that are still under way."""
        for left in range(self._late, 0, -1):
            pl.when(steps >= left)(functools.partial(threads.wait_for_groups, left - 1))
            pl.when(steps >= left)(functools.partial(self._announce, steps - left, done))

    def _announce(self, i, done) -> None:
        """That block i of a piece has come."""
        for source, _ in itertools.product(self.sources, self.offsets):
            plgpu.barrier_arrive(source.here.at[self._stage_of(source, i, done)])


def load(plan: Plan, pieces: Pieces, pages, queries: Queries, sources: list[Source], warp, mate=None) -> None:
    """One warp's share of all loads of a thread block; all of them where `warp` is None.

    Of two that copy for one another, it is a share of half of them: `mate` is which of the two this block is.
    """
    offsets = range(0, plan.block_kv, plan.run)[: copies_of_a_block(plan)]
    loading = functools.partial(Loading, plan, pages, queries)
    if warp is None:
        return pieces.each(loading(sources, offsets).copy_piece)
    warps, size = 4 // plan.teams, copies_of_a_warp(plan)
    firsts = range(0, len(offsets), size)
    for team, (part, first), (i, source) in itertools.product(range(plan.teams), enumerate(firsts), enumerate(sources)):
        share = loading(
            sources=[source],
            offsets=offsets[first : first + size],
            first=mate * (plan.block_kv // MATES) if plan.mates else 0,
            team=team,
            has_keys=i == 0,
            has_queries=part == 0 and i == len(sources) - 1,
        )
        its_warp = team * warps + len(sources) * part + i
        pl.when(warp == its_warp)(functools.partial(pieces.each, share.copy_piece, team))


def copies_of(plan: Plan) -> int:
    """Runs of a block of keys: a copy each, or one for each part where parts lie apart."""
    return plan.block_kv // plan.run


def copies_of_a_block(plan: Plan) -> int:
    """Those that a thread block makes."""
    return copies_of(plan) // (MATES if plan.mates else 1)


def copies_of_a_warp(plan: Plan) -> int:
    """Those of keys, or of values, where all four warps of a warpgroup load, a team's share each."""
    return -(-copies_of_a_block(plan) * (1 if plan.latent else 2) // (4 // plan.teams))


def loading_warps(plan: Plan) -> int:
    """Warps that share the copies of a block of keys, or of values."""
    if plan.widens and plan.loading_warpgroups == 1:  # the others widen
        return 1
    return -(-copies_of_a_block(plan) // copies_of_a_warp(plan))
