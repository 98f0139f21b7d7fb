"""How a GPU kernel's launch covers a pack: tiles of query tokens, the one with the most keys first."""

import itertools
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.contract import Sequences

# Up to so many sequences their sums are written out: XLA then makes the schedule one kernel, where each sum is one more.
FEW_SEQUENCES = 8


class Tiles(NamedTuple):
    """Arrays of int32, an entry a tile. The keys that a tile's rows see lie in blocks first_block : end_block."""

    index: Int[Array, " tiles"]  # its number in the order of the tokens
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
    sequences: Sequences, tokens: int, capacity: int, block_q: int, block_kv: int, sliding_window: int | None
) -> tuple[Tiles, Int[Array, " tokens"]]:
    """Cuts every token of a pack into tiles. Returns them, the longest first, and the index of each token's tile.

    Tokens that no sequence owns form tiles of sequences without a context, so that a kernel writes every token once.
    `sequences` ascend in the pack, as `contract.flatten` lays them.
    """
    seqs = sequences.start.shape[0]
    # Stretches of tokens: before the first sequence, the first, between it and the second, ... after the last.
    end = sequences.start + sequences.length
    bounds = jnp.stack([sequences.start, end], axis=1).reshape(-1)
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
    size = jnp.concatenate([bounds, jnp.full(1, tokens, jnp.int32)]) - begin
    tile = jnp.arange(tiles_at_most(tokens, seqs, block_q), dtype=jnp.int32)
    counts = -(-size // block_q)
    if seqs <= FEW_SEQUENCES:
        last_tile = list(itertools.accumulate(counts))
        stretch = sum((tile >= last).astype(jnp.int32) for last in last_tile)
        last_tile = jnp.stack(last_tile)
    else:
        last_tile = jnp.cumsum(counts)
        stretch = jnp.sum(tile[:, None] >= last_tile, axis=1, dtype=jnp.int32)
    exists = stretch < 2 * seqs + 1
    stretch = jnp.minimum(stretch, 2 * seqs)
    owned = exists & (stretch % 2 == 1)
    seq = jnp.minimum(stretch // 2, seqs - 1)
    within = (tile - last_tile[stretch]) * block_q + -(-size[stretch] // block_q) * block_q  # first token, in its stretch

    context_len = jnp.where(owned, sequences.context_len[seq], 0)
    length = jnp.where(exists, jnp.minimum(size[stretch] - within, block_q), 0)
    position = context_len - size[stretch] + within
    end_key = jnp.minimum(context_len, capacity)
    first_key = seen_from = jnp.zeros_like(position)
    if sliding_window is not None:
        first_key = jnp.clip(context_len - size[stretch] - sliding_window + 1, 0, end_key)
        seen_from = jnp.clip(position - sliding_window + 1, 0, end_key)
    seen_to = jnp.clip(position + length, 0, end_key)
    first_block = seen_from // block_kv
    tiles = Tiles(
        index=tile,
        start=jnp.where(exists, begin[stretch] + within, tokens),
        length=length,
        position=position,
        first_block=first_block,
        end_block=jnp.maximum(-(-seen_to // block_kv), first_block),
        seq=seq,
        pool=sequences.pool[seq],
        first_key=first_key,
        end_key=end_key,
    )
    tile_of_token = jnp.sum(tiles.start <= jnp.arange(tokens)[:, None], axis=1, dtype=jnp.int32) - 1
    if seqs == 1:  # a later token sees more keys
        return Tiles(*(field[::-1] for field in tiles)), tile_of_token
    blocks = jnp.where(exists, tiles.end_block - tiles.first_block, -1)
    return Tiles(*lax.sort((-blocks, *tiles), num_keys=1, is_stable=True)[1:]), tile_of_token
