"""How a GPU kernel's launch covers a pack: tiles of query tokens, the one with the most keys first."""

from dataclasses import dataclass
import itertools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_prefill.lowering.call import Sequences
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.packing import FEW_SEQUENCES


class Slabs(NamedTuple):
    """What the rows of slabs see. A tile's tokens are cut into slabs of equal size, some of which may be empty: on Hopper,
    the tokens that one warpgroup has rows of.
    """

    seen_start: Int[Array, "tiles slabs"]  # no row sees keys but seen_start : seen_end
    seen_end: Int[Array, "tiles slabs"]
    whole_start: Int[Array, "tiles slabs"]  # every row sees all keys whole_start : whole_end
    whole_end: Int[Array, "tiles slabs"]


class Tiles(NamedTuple):
    """Arrays of int32, an entry a tile, or a part of one. The keys that its rows see lie in first_block : end_block.

    Between first_key and end_key no slot is empty; with ranges these are the first and last keys that its rows see.
    """

    start: Int[Array, " tiles"]  # its first token
    length: Int[Array, " tiles"]  # its tokens; 0 where there is no tile
    position: Int[Array, " tiles"]  # where its first token stands in its sequence; negative before the context
    first_new: Int[Array, " tiles"]  # where the first new token of its sequence stands
    first_block: Int[Array, " tiles"]
    end_block: Int[Array, " tiles"]
    seq: Int[Array, " tiles"]
    first_key: Int[Array, " tiles"]
    end_key: Int[Array, " tiles"]
    owned: Int[Array, " tiles"]  # 1 where a sequence owns its tokens
    holes: Int[Array, " tiles"]  # 1 where between first_key and end_key may lie keys that no row sees
    part: Int[Array, " tiles"]  # which of the tile's
    parts: Int[Array, " tiles"]  # that it has; before a schedule cuts it, the most that it may have
    slabs: Slabs


class Stretch(NamedTuple):
    """Neighbouring tokens that a sequence owns, or that none does; an entry a tile, or a scalar."""

    begin: Int[Array, " tiles"]
    size: Int[Array, " tiles"]
    owned: Bool[Array, " tiles"]
    seq: Int[Array, " tiles"]  # the sequence, or one that stands for none
    context_len: Int[Array, " tiles"]  # of that sequence


def tiles_at_most(tokens: int, seqs: int, block_q: int) -> int:
    """The most tiles of block_q tokens that a pack can need, the stretches that no sequence owns included."""
    stretches = min(2 * seqs + 1, tokens)
    return (tokens - stretches) // block_q + stretches


@dataclass(frozen=True)
class Parts:
    """Into how many parts the keys of a tile are cut. It follows the tile's own keys and what is static: no bit of a tile
    depends on the rest of the pack.

    Where the number varies, each part is an entry of the schedule; else a kernel cuts its tiles itself, and the last
    parts of a tile may be empty.

    Attributes:
      least, most: the fewest and the most parts of a tile.
      blocks: how many blocks of keys a part has, as far as `least` and `most` allow.
      fewest: the fewest blocks of a part.
      together: where their number varies, the most parts of all tiles of a sequence together, unless there are more tiles:
        those of a prompt are work for many cores as they are. None where that is no bound.
    """

    least: int = 1
    most: int = 1
    blocks: int = 1
    fewest: int = 1
    together: int | None = None

    @property
    def vary(self) -> bool:
        """Whether tiles may have different numbers of parts."""
        return self.most > self.least

    def most_of(self, tiles):
        """The most parts of each tile of a sequence that has so many."""
        if self.together is None:
            return jnp.full_like(tiles, self.most)
        return jnp.clip(lax.div(jnp.int32(self.together), jnp.maximum(tiles, 1)), 1, self.most)

    def share(self, blocks, most=None):
        """How many blocks each part but the last has, of a tile of `blocks` blocks that has at most so many parts."""
        least, most = (self.least, self.most) if most is None else (jnp.minimum(self.least, most), most)
        parts = jnp.clip(lax.div(blocks + (self.blocks - 1), jnp.int32(self.blocks)), least, most)
        return jnp.maximum(lax.div(blocks + (parts - 1), parts), self.fewest)

    def number(self, blocks, most=None):
        """How many parts of such a tile have any; at least 1, so that there is always a result."""
        share = self.share(blocks, most)
        return jnp.maximum(lax.div(blocks + (share - 1), share), 1)

    def part(self, tile: Tiles, part, number) -> Tiles:
        """Part `part` of the `number` parts of a tile."""
        share = self.share(tile.end_block - tile.first_block, tile.parts if self.vary else None)
        first_block = tile.first_block + part * share
        end_block = jnp.minimum(tile.end_block, first_block + share)
        return tile._replace(first_block=first_block, end_block=end_block, part=part, parts=number)


@dataclass(frozen=True)
class Tiling:
    """How a pack is cut into tiles, and in which order these stand in the schedule; entries that do not exist are last.

    Attributes:
      capacity: keys that a row of the page table holds.
      slab: tokens of a slab. A tile's work is the number of blocks of keys that its slabs see.
      ordered: whether tiles of most work come first; else they are in the order of the pack.
      parts: where their number varies, the parts of a tile are the entries, those of most blocks first.
      whole_of: tokens of a sequence, from its first on, that say together which keys all of them see; a multiple of the
        tile's, or None for those of a slab. Where bits follow which blocks are masked, they do not follow the tile's height.
    """

    tokens: int
    seqs: int
    capacity: int
    block_q: int
    block_kv: int
    attention: Attention
    slab: int
    ordered: bool = True
    parts: Parts = Parts()
    whole_of: int | None = None

    @property
    def tiles(self) -> int:
        """The most tiles that a pack can need."""
        return tiles_at_most(self.tokens, self.seqs, self.block_q)

    @property
    def rows(self) -> int:
        """The most entries of a schedule."""
        return self.tiles * (self.parts.most if self.parts.vary else 1)

    def tiles_of(self, size):
        """The tiles of a stretch."""
        return lax.div(size + (self.block_q - 1), jnp.int32(self.block_q))

    def reversed(self, tile, tiles):
        """The order of a single sequence's tiles: the later the tile, the more keys it sees."""
        return jnp.where(tile < tiles, tiles - 1 - tile, tile)

    def tile(self, stretch: Stretch, within) -> Tiles:
        """The tile that begins at token `within` of its stretch; empty from its end on. `slabs` is a list of Slabs."""
        context_len = jnp.where(stretch.owned, stretch.context_len, 0)
        length = jnp.clip(stretch.size - within, 0, self.block_q)
        first_new = context_len - stretch.size
        position = first_new + within
        end_key = jnp.minimum(context_len, self.capacity)

        def slab(token):
            """What the slab sees that begins at that token of the tile."""
            first, rows = position + token, jnp.clip(length - token, 0, self.slab)
            seen_start, whole_end = self.attention.visible_keys(first)
            whole_start, seen_end = self.attention.visible_keys(first + (rows - 1))
            seen_end = jnp.where(rows > 0, seen_end, seen_start)
            if self.whole_of is not None:
                before = lax.rem(within, jnp.int32(self.whole_of))
                last = jnp.minimum(within - before + self.whole_of, stretch.size) - 1
                _, whole_end = self.attention.visible_keys(position - before)
                whole_start, _ = self.attention.visible_keys(first_new + last)
            return Slabs(*(jnp.minimum(x, end_key) for x in (seen_start, seen_end, whole_start, whole_end)))

        seq_from, _ = self.attention.visible_keys(first_new)
        seen_from, _ = self.attention.visible_keys(position)
        _, seen_to = self.attention.visible_keys(position + (length - 1))
        first_key, seen_from, seen_to = (jnp.minimum(x, end_key) for x in (seq_from, seen_from, seen_to))
        first_block, end_block = self.blocks(seen_from, seen_to)
        return Tiles(
            start=jnp.minimum(stretch.begin + within, self.tokens),
            length=length,
            position=position,
            first_new=first_new,
            first_block=first_block,
            end_block=end_block,
            seq=stretch.seq,
            first_key=first_key,
            end_key=end_key,
            owned=jnp.where(stretch.owned, 1, 0),
            holes=jnp.zeros_like(length),
            part=jnp.zeros_like(length),
            parts=self.parts.most_of(self.tiles_of(stretch.size)) if self.parts.vary else jnp.ones_like(length),
            slabs=[slab(token) for token in range(0, self.block_q, self.slab)],
        )

    def blocks(self, seen_start, seen_end):
        """The blocks that hold these keys, first to end."""
        first = lax.div(seen_start, jnp.int32(self.block_kv))
        return first, jnp.maximum(lax.div(seen_end + (self.block_kv - 1), jnp.int32(self.block_kv)), first)

    def work(self, length, slabs):
        """The work of tiles, by which they are ordered; -1 for empty ones. `slabs` is a list, one a slab."""
        ends = [self.blocks(slab.seen_start, slab.seen_end) for slab in slabs]
        return jnp.where(length > 0, sum(end - first for first, end in ends), -1)


def schedule(sequences: Sequences, tiling: Tiling, ranges: Int[Array, "tokens 2"] | None = None) -> Tiles:
    """Cuts every token of a pack into tiles.

    Tokens that no sequence owns form tiles of sequences without a context, so that a kernel writes every token once.
    `sequences` ascend in the pack, as `call.flatten` lays them. What rows see is said by `ranges`, if there are any.

    Returns as many entries as there can be, and how many there are: all of the tiles, or some of their parts. Of parts
    also where the first one stands of each tile that has several, and else -1; None of tiles.
    """
    seqs, block_q = tiling.seqs, tiling.block_q
    few = seqs <= FEW_SEQUENCES
    begin, size, firsts, ends = _stretches(sequences.start, sequences.length, tiling)

    def take(values, places):
        """values[places], for places within."""
        if few:
            return sum(jnp.where(places == i, value, 0) for i, value in enumerate(values))
        return values[places]

    def describe(tile) -> Tiles:
        """Tiles by their index. Those that do not exist lie past the end of the last stretch."""
        if few:
            stretch = sum((tile >= end).astype(jnp.int32) for end in ends[:-1])
        else:
            stretch = jnp.sum(tile[:, None] >= ends[None, :-1], axis=1, dtype=jnp.int32)
        seq = jnp.minimum(lax.div(stretch, jnp.int32(2)), seqs - 1)
        within = (tile - take(firsts, stretch)) * block_q  # first token, in its stretch
        owned = stretch == 2 * seq + 1
        its = Stretch(take(begin, stretch), take(size, stretch), owned, seq, take(sequences.context_len, seq))
        found = tiling.tile(its, within)
        if ranges is None:
            return found._replace(slabs=jax.tree.map(lambda *slabs: jnp.stack(slabs, axis=1), *found.slabs))
        slabs, holes = _slabs_of_ranges(ranges, found.start, found.length, found.end_key, block_q, tiling.slab)
        end_key = jnp.max(slabs.seen_end, axis=1)
        first_key = jnp.minimum(jnp.min(slabs.seen_start, axis=1), end_key)
        first_block, end_block = tiling.blocks(first_key, end_key)
        return found._replace(
            slabs=slabs, holes=holes, first_key=first_key, end_key=end_key, first_block=first_block, end_block=end_block
        )

    index = jnp.arange(tiling.tiles, dtype=jnp.int32)
    if tiling.parts.vary:
        return _parts_of(describe(index), tiling.parts)
    if not tiling.ordered:
        return describe(index), tiling.tiles, None
    if seqs == 1 and ranges is None:
        return describe(tiling.reversed(index, ends[-1])), tiling.tiles, None
    natural = describe(index)
    work = tiling.work(natural.length, [Slabs(*columns) for columns in zip(*(field.T for field in natural.slabs))])
    rank = jnp.sum(_come_before(work), axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None, :] == index[:, None], index[None, :], 0), axis=1, dtype=jnp.int32)
    ordered = describe(order) if few and ranges is None else jax.tree.map(lambda field: field[order], natural)
    return ordered, tiling.tiles, None


def _come_before(work):
    """Which tiles have more work than each, or as much and come before it."""
    # Comparing all with all is quicker than a sort: tiles are few.
    index = jnp.arange(work.shape[0], dtype=jnp.int32)
    more, alike = work[None, :] > work[:, None], work[None, :] == work[:, None]
    return more | (alike & (index[None, :] < index[:, None]))


def _parts_of(tiles: Tiles, parts: Parts):
    """The parts of tiles, those of most blocks first, how many there are, and the first of each tile that has several.

    What lies behind them is any part.
    """
    blocks = tiles.end_block - tiles.first_block
    share = parts.share(blocks, tiles.parts)
    number = jnp.where(tiles.length > 0, parts.number(blocks, tiles.parts), 0)
    first = jnp.sum(jnp.where(_come_before(share), number[None, :], 0), axis=1, dtype=jnp.int32)
    index = jnp.arange(tiles.length.shape[0] * parts.most, dtype=jnp.int32)
    within = (index[:, None] >= first[None, :]) & (index[:, None] < (first + number)[None, :])
    tile = jnp.argmax(within, axis=1)
    found = parts.part(jax.tree.map(lambda field: field[tile], tiles), index - first[tile], number[tile])
    return found, jnp.sum(number, dtype=jnp.int32), jnp.where(number > 1, first, -1)


def _slabs_of_ranges(ranges, start, length, end_key, block_q, slab):
    """The same by the ranges of the rows; and whether between what a tile's rows see may lie keys that none sees.

    Rows whose ranges meet those of the row before them leave no hole; whether others do is not looked at. Where one may
    be, somebody has to look for it in each block that is not whole: so then what is whole is so for all slabs.
    """
    row = jnp.arange(block_q, dtype=jnp.int32)[None, :]
    here, end_key = row < length[:, None], end_key[:, None]
    low, high = ranges.at[start[:, None] + jnp.minimum(row, length[:, None] - 1)].get(mode="clip").transpose(2, 0, 1)
    low, high = jnp.clip(low, 0, end_key), jnp.clip(high, 0, end_key)
    meet = jnp.maximum(low[:, 1:], low[:, :-1]) <= jnp.minimum(high[:, 1:], high[:, :-1])
    holes = jnp.any(here[:, 1:] & ~meet, axis=1)
    sees = here & (low < high)

    def of_slabs(reduce, condition, bound, otherwise):
        return reduce(jnp.where(condition, bound, otherwise).reshape(-1, block_q // slab, slab), axis=2)

    whole_start, whole_end = of_slabs(jnp.max, here, low, 0), of_slabs(jnp.min, here, high, end_key)
    slabs = Slabs(
        seen_start=of_slabs(jnp.min, sees, low, end_key),
        seen_end=of_slabs(jnp.max, sees, high, 0),
        whole_start=jnp.where(holes[:, None], jnp.max(whole_start, axis=1, keepdims=True), whole_start),
        whole_end=jnp.where(holes[:, None], jnp.min(whole_end, axis=1, keepdims=True), whole_end),
    )
    return slabs, holes.astype(jnp.int32)


def _stretches(starts, lengths, tiling):
    """The stretches of tokens before the first sequence, of it, between it and the second, ... after the last.

    Returns their first tokens, their sizes, their first tiles, and the number of tiles up to their ends: arrays, or
    lists of scalars where sequences are few.
    """
    if starts.shape[0] <= FEW_SEQUENCES:
        bounds = [bound for start, length in zip(starts, lengths) for bound in (start, start + length)]
        begin = [jnp.int32(0), *bounds]
        size = [end - first for first, end in zip(begin, [*bounds, jnp.int32(tiling.tokens)])]
        counts = [tiling.tiles_of(n) for n in size]
        ends = list(itertools.accumulate(counts))
        return begin, size, [jnp.int32(0), *ends[:-1]], ends
    bounds = jnp.stack([starts, starts + lengths], axis=1).reshape(-1)
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
    size = jnp.concatenate([bounds, jnp.full(1, tiling.tokens, jnp.int32)]) - begin
    counts = tiling.tiles_of(size)
    ends = jnp.cumsum(counts)
    return begin, size, ends - counts, ends
