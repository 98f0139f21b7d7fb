"""The pieces of work that a thread block goes through, looked up in the table of tiles that a schedule has made."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.mosaic_gpu.hopper.plan import TILE_COLUMNS, Plan
from paged_prefill.lowering.tiles import Slabs, Tiles


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


@dataclass(frozen=True)
class Pieces:
    """Those of a thread block's teams. The loads run ahead of what computes: both go through the same pieces."""

    plan: Plan
    table: jax.Array  # of tiles, or of their parts (kernel.table_of), in global memory
    pools: jax.Array  # of each pack, or sequence
    kv_head_start: jax.Array
    block: Int[Array, ""]  # the thread block, or its cluster
    slab: Int[Array, ""]  # whose share of the tile's tokens the warpgroup has
    part: Int[Array, ""] | None = None  # of a cluster's tile, which the thread block has

    def index_of(self, i, team=0):
        """The number of a team's i-th piece: longest first, to and fro over the thread blocks' teams."""
        blocks = self.plan.thread_blocks
        place, places = team * blocks + self.block, self.plan.teams * blocks
        return i * places + jnp.where(lax.rem(i, 2) == 0, place, places - 1 - place)

    def number_of_all(self):
        """How many pieces there are, of all teams: at most, where tiles have as many parts."""
        if not self.plan.parts.vary:
            return self.plan.pieces
        return self.table[self.plan.rows_of_table * self.plan.columns] * self.plan.head_tiles

    def piece_of(self, i, team=0, pieces=None):
        """A team's i-th piece, and whether there is one, of so many in all (`number_of_all`)."""
        index = self.index_of(i, team)
        piece = self.numbered(jnp.minimum(index, self.plan.pieces - 1))._replace(number=i)
        pieces = self.number_of_all() if pieces is None else pieces
        return piece, (index < pieces) & (piece.tile.length > 0)

    def each(self, do, team=0) -> None:
        """Calls do(piece, steps already done) for a team's pieces: the steps are counted on from piece to piece.

        Of a cluster, each block has a part of one tile; where there is one part, the other blocks end.
        """
        if self.plan.clusters:
            piece = self.numbered(self.block, self.part)
            takes_part = (piece.tile.parts > 1) | (self.part == 0)
            return pl.when((piece.tile.length > 0) & takes_part)(lambda: do(piece, jnp.int32(0)))
        places = self.plan.teams * self.plan.thread_blocks

        def turn(i, done, pieces=None):
            piece, exists = self.piece_of(i, team, pieces)
            pl.when(exists)(lambda: do(piece, done))
            return done + jnp.where(exists, piece.steps, 0)

        def turn_of_parts(carry):
            """Asks how many there are beside asking for one: neither waits for the other."""
            i, done, _ = carry
            pieces = self.number_of_all()
            return i + 1, turn(i, done, pieces), (i + 1) * places < pieces

        if self.plan.parts.vary:
            lax.while_loop(lambda carry: carry[2], turn_of_parts, (jnp.int32(0), jnp.int32(0), jnp.bool_(True)))
        else:
            lax.fori_loop(0, -(-self.plan.pieces // places), turn, jnp.int32(0))

    def numbered(self, index, part=None) -> Piece:
        """A piece by its number: of all tiles if `part` says which of a tile's it is, and else of all parts."""
        plan = self.plan
        row, head_tile = self._row_and_head_tile(index)
        if part is None and not plan.parts.vary:
            row, part = lax.div(row, plan.splits), lax.rem(row, plan.splits)
        tile = self._tile(row)
        pool = jnp.int32(0)
        if plan.pools > 1:
            # Behind the last part is junk.
            entry = jnp.clip(lax.div(tile.seq, plan.seqs_of_pool), 0, self.pools.shape[0] - 1)
            pool = jnp.clip(self.pools[entry], 0, plan.pools - 1)
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
            cache_head=pool * plan.cache_kv_heads + self.kv_head_start[0] + kv_head,
            head=kv_head * plan.group + in_group,
            heads_left=plan.group - in_group,
            first_row=pool * plan.pool_rows + (self.kv_head_start[0] + kv_head) * plan.head_rows,
        )

    def _row_and_head_tile(self, index):
        """The row of the table and the tile of heads of a piece by its number."""
        plan, of_head = self.plan, self.plan.head_tiles_per_group
        each = lax.div(index, plan.head_tiles), lax.rem(index, plan.head_tiles)
        if plan.rows_together == 1:
            return each
        turn, within = (op(index, plan.rows_together * plan.head_tiles) for op in (lax.div, lax.rem))
        kv_head, within = (op(within, plan.rows_together * of_head) for op in (lax.div, lax.rem))
        row, of_head_tile = lax.div(within, of_head), lax.rem(within, of_head)
        together = turn * plan.rows_together + row, kv_head * of_head + of_head_tile
        return [jnp.where(index < plan.pieces_together, *either) for either in zip(together, each)]

    def _tile(self, row) -> Tiles:
        """A row of the table."""
        first = row * self.plan.columns
        fields = [self.table[first + i] for i in range(TILE_COLUMNS)]
        slabs = first + TILE_COLUMNS + self.slab
        return Tiles(*fields, Slabs(*(self.table[slabs + i * self.plan.slabs] for i in range(len(Slabs._fields)))))
