"""How a GPU kernel's launch covers a pack: tiles of query tokens, the one with the most keys first."""

import itertools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import Sequences
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.packing import FEW_SEQUENCES


class Slabs(NamedTuple):
    """What the rows of slabs see: a tile's tokens are cut into slabs of equal size, some of which may be empty."""

    seen_start: Int[Array, "tiles slabs"]  # no row sees keys but seen_start : seen_end
    seen_end: Int[Array, "tiles slabs"]
    whole_start: Int[Array, "tiles slabs"]  # every row sees all keys whole_start : whole_end
    whole_end: Int[Array, "tiles slabs"]


class Tiles(NamedTuple):
    """Arrays of int32, an entry a tile. The keys that a tile's rows see lie in blocks first_block : end_block.

    Between first_key and end_key no slot is empty; with ranges these are the first and last keys that its rows see.
    """

    start: Int[Array, " tiles"]  # its first token
    length: Int[Array, " tiles"]  # its tokens; 0 where there is no tile
    position: Int[Array, " tiles"]  # where its first token stands in its sequence; negative before the context
    first_new: Int[Array, " tiles"]  # where the first new token of its sequence stands
    first_block: Int[Array, " tiles"]
    end_block: Int[Array, " tiles"]
    seq: Int[Array, " tiles"]
    pool: Int[Array, " tiles"]
    first_key: Int[Array, " tiles"]
    end_key: Int[Array, " tiles"]
    owned: Int[Array, " tiles"]  # 1 where a sequence owns its tokens
    holes: Int[Array, " tiles"]  # 1 where between first_key and end_key may lie keys that no row sees
    slabs: Slabs


def tiles_at_most(tokens: int, seqs: int, block_q: int) -> int:
    """The most tiles of block_q tokens that a pack can need, the stretches that no sequence owns included."""
    stretches = min(2 * seqs + 1, tokens)
    return (tokens - stretches) // block_q + stretches


def schedule(
    sequences: Sequences,
    tokens: int,
    capacity: int,
    block_q: int,
    block_kv: int,
    attention: Attention,
    *,
    slab: int,
    ranges: Int[Array, "tokens 2"] | None = None,
    ordered: bool = True,
) -> Tiles:
    """Cuts every token of a pack into tiles: `ordered`, those of most work first; those that do not exist are last.

    A tile's work is the blocks of keys that its slabs of `slab` tokens see.

    Tokens that no sequence owns form tiles of sequences without a context, so that a kernel writes every token once.
    `sequences` ascend in the pack, as `call.flatten` lays them. What rows see is said by `ranges`, if there are any.
    """
    seqs = sequences.start.shape[0]
    few = seqs <= FEW_SEQUENCES
    begin, size, firsts, ends = _stretches(sequences.start, sequences.length, tokens, block_q)

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
        stretch_size = take(size, stretch)
        within = (tile - take(firsts, stretch)) * block_q  # first token, in its stretch

        owned = stretch == 2 * seq + 1
        context_len = jnp.where(owned, take(sequences.context_len, seq), 0)
        length = jnp.clip(stretch_size - within, 0, block_q)
        first_new = context_len - stretch_size
        position = first_new + within
        end_key = jnp.minimum(context_len, capacity)
        start = jnp.minimum(take(begin, stretch) + within, tokens)
        if ranges is None:
            token = jnp.arange(0, block_q, slab, dtype=jnp.int32)[None, :]  # the first of each slab, in the tile
            rows = jnp.clip(length[:, None] - token, 0, slab)
            slabs = _slabs(attention, position[:, None] + token, rows, end_key[:, None])
            seq_from, _ = attention.visible_keys(first_new)
            seen_from, _ = attention.visible_keys(position)
            _, seen_to = attention.visible_keys(position + (length - 1))
            first_key, seen_from, seen_to = (jnp.minimum(x, end_key) for x in (seq_from, seen_from, seen_to))
            holes = jnp.zeros_like(tile)
        else:
            slabs, holes = _slabs_of_ranges(ranges, start, length, end_key, block_q, slab)
            end_key = seen_to = jnp.max(slabs.seen_end, axis=1)
            first_key = seen_from = jnp.minimum(jnp.min(slabs.seen_start, axis=1), seen_to)
        first_block = lax.div(seen_from, jnp.int32(block_kv))
        end_block = lax.div(seen_to + (block_kv - 1), jnp.int32(block_kv))
        return Tiles(
            start=start,
            length=length,
            position=position,
            first_new=first_new,
            first_block=first_block,
            end_block=jnp.maximum(end_block, first_block),
            seq=seq,
            pool=take(sequences.pool, seq),
            first_key=first_key,
            end_key=end_key,
            owned=owned.astype(jnp.int32),
            holes=holes,
            slabs=slabs,
        )

    index = jnp.arange(tiles_at_most(tokens, seqs, block_q), dtype=jnp.int32)
    if not ordered:
        return describe(index)
    if seqs == 1 and ranges is None:  # the later the tile, the more keys it sees
        return describe(jnp.where(index < ends[-1], ends[-1] - 1 - index, index))
    natural = describe(index)
    seen_end, seen_start = natural.slabs.seen_end + (block_kv - 1), natural.slabs.seen_start
    blocks = jnp.maximum(lax.div(seen_end, jnp.int32(block_kv)) - lax.div(seen_start, jnp.int32(block_kv)), 0)
    blocks = jnp.where(natural.length > 0, jnp.sum(blocks, axis=1), -1)
    # Comparing all with all is quicker than a sort: tiles are few.
    more, alike = blocks[None, :] > blocks[:, None], blocks[None, :] == blocks[:, None]
    rank = jnp.sum(more | (alike & (index[None, :] < index[:, None])), axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None, :] == index[:, None], index[None, :], 0), axis=1, dtype=jnp.int32)
    return describe(order) if few and ranges is None else jax.tree.map(lambda field: field[order], natural)


def _slabs(attention, position, rows, end_key):
    """What slabs see whose first tokens stand at these positions, with so many rows; before end_key, where keys end."""
    seen_start, whole_end = attention.visible_keys(position)
    whole_start, seen_end = attention.visible_keys(position + (rows - 1))
    seen_end = jnp.where(rows > 0, seen_end, seen_start)
    return Slabs(*(jnp.minimum(x, end_key) for x in (seen_start, seen_end, whole_start, whole_end)))


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


def _stretches(starts, lengths, tokens, block_q):
    """The stretches of tokens before the first sequence, of it, between it and the second, ... after the last.

    Returns their first tokens, their sizes, their first tiles, and the number of tiles up to their ends: arrays, or
    lists of scalars where sequences are few.
    """
    if starts.shape[0] <= FEW_SEQUENCES:
        bounds = [bound for start, length in zip(starts, lengths) for bound in (start, start + length)]
        begin = [jnp.int32(0), *bounds]
        size = [end - first for first, end in zip(begin, [*bounds, jnp.int32(tokens)])]
        counts = [lax.div(n + (block_q - 1), jnp.int32(block_q)) for n in size]
        ends = list(itertools.accumulate(counts))
        return begin, size, [jnp.int32(0), *ends[:-1]], ends
    bounds = jnp.stack([starts, starts + lengths], axis=1).reshape(-1)
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
    size = jnp.concatenate([bounds, jnp.full(1, tokens, jnp.int32)]) - begin
    counts = lax.div(size + (block_q - 1), jnp.int32(block_q))
    ends = jnp.cumsum(counts)
    return begin, size, ends - counts, ends
