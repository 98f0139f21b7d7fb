"""How a GPU kernel's launch covers a pack: tiles of query tokens, the one with the most keys first."""

import itertools
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import Sequences
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.packing import FEW_SEQUENCES


class Tiles(NamedTuple):
    """Arrays of int32, an entry a tile. The keys that a tile's rows see lie in blocks first_block : end_block."""

    start: Int[Array, " tiles"]  # its first token
    length: Int[Array, " tiles"]  # its tokens; 0 where there is no tile
    position: Int[Array, " tiles"]  # where its first token stands in its sequence; negative before the context
    first_block: Int[Array, " tiles"]
    end_block: Int[Array, " tiles"]
    seq: Int[Array, " tiles"]
    pool: Int[Array, " tiles"]
    first_key: Int[Array, " tiles"]  # keys of the sequence that hold anything: no row may look at other slots
    end_key: Int[Array, " tiles"]


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
    ordered: bool = True,
) -> Tiles:
    """Cuts every token of a pack into tiles: `ordered`, the longest first; those that do not exist are last.

    Tokens that no sequence owns form tiles of sequences without a context, so that a kernel writes every token once.
    `sequences` ascend in the pack, as `call.flatten` lays them.
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
        """Tiles by their index."""
        if few:
            stretch = sum((tile >= end).astype(jnp.int32) for end in ends)
        else:
            stretch = jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        exists = stretch <= 2 * seqs
        stretch = jnp.minimum(stretch, 2 * seqs)
        seq = jnp.minimum(lax.div(stretch, jnp.int32(2)), seqs - 1)
        owned = exists & (stretch == 2 * seq + 1)
        stretch_size = take(size, stretch)
        within = (tile - take(firsts, stretch)) * block_q  # first token, in its stretch

        context_len = jnp.where(owned, take(sequences.context_len, seq), 0)
        length = jnp.where(exists, jnp.minimum(stretch_size - within, block_q), 0)
        position = context_len - stretch_size + within
        end_key = jnp.minimum(context_len, capacity)
        seq_from, _ = attention.visible_keys(context_len - stretch_size)
        seen_from, _ = attention.visible_keys(position)
        _, seen_to = attention.visible_keys(position + (length - 1))
        first_block = lax.div(jnp.minimum(seen_from, end_key), jnp.int32(block_kv))
        end_block = lax.div(jnp.minimum(seen_to, end_key) + (block_kv - 1), jnp.int32(block_kv))
        return Tiles(
            start=jnp.where(exists, take(begin, stretch) + within, tokens),
            length=length,
            position=position,
            first_block=first_block,
            end_block=jnp.maximum(end_block, first_block),
            seq=seq,
            pool=take(sequences.pool, seq),
            first_key=jnp.minimum(seq_from, end_key),
            end_key=end_key,
        )

    index = jnp.arange(tiles_at_most(tokens, seqs, block_q), dtype=jnp.int32)
    if not ordered:
        order = index
    elif seqs == 1:  # the later the tile, the more keys it sees
        order = jnp.where(index < ends[-1], ends[-1] - 1 - index, index)
    else:
        natural = describe(index)
        blocks = jnp.where(natural.length > 0, natural.end_block - natural.first_block, -1)
        # Comparing all with all is quicker than a sort: tiles are few.
        more, alike = blocks[None, :] > blocks[:, None], blocks[None, :] == blocks[:, None]
        rank = jnp.sum(more | (alike & (index[None, :] < index[:, None])), axis=1, dtype=jnp.int32)
        order = jnp.sum(jnp.where(rank[None, :] == index[:, None], index[None, :], 0), axis=1, dtype=jnp.int32)
    return describe(order)


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
