"""The work of a pack as a list of items, made by plain XLA operations before the TPU kernel starts.

The tokens of a pack are cut into tiles of `block_q`, wherever its sequences start and end, so that every tile is aligned
and the kernel's grid can fetch it as a block. An item is the part of one sequence inside one tile. Items are in the order of the
tokens, so a tile's items follow one another, and so do a sequence's.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.contract import Sequences


class Items(NamedTuple):
    """The items of a pack, all int32 [items]; those from the count of items on are empty.

    Attributes:
      tile: which tile of `block_q` tokens.
      seq: which sequence; `pool` its pool.
      row_start, row_end: the item's rows within the tile.
      position: where row 0 of the tile would stand in the sequence (negative where the sequence starts later).
      key_start, key_end: the keys that some row of the item may see; both 0 where there are none.
    """

    tile: Int[Array, " items"]
    seq: Int[Array, " items"]
    pool: Int[Array, " items"]
    row_start: Int[Array, " items"]
    row_end: Int[Array, " items"]
    position: Int[Array, " items"]
    key_start: Int[Array, " items"]
    key_end: Int[Array, " items"]


def max_items(tokens: int, seqs: int, block_q: int) -> int:
    """The most items that a pack can have: each tile has one, and each further sequence in a tile one more."""
    return min(-(-tokens // block_q) + seqs, tokens)


def work_items(sequences: Sequences, tokens: int, capacity: int, block_q: int, sliding_window: int | None):
    """Returns (Items, count). Needs sequences in the order of their tokens, which `contract.flatten` gives."""
    start, length, context_len = sequences.start, sequences.length, sequences.context_len
    first_tile = start // block_q
    per_sequence = jnp.where(length > 0, (start + length - 1) // block_q - first_tile + 1, 0)
    ends = jnp.cumsum(per_sequence, dtype=jnp.int32)

    item = jnp.arange(max_items(tokens, start.size, block_q), dtype=jnp.int32)
    exists = item < ends[-1]
    seq = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), start.size - 1)
    tile = jnp.where(exists, first_tile[seq] + item - (ends[seq] - per_sequence[seq]), 0)
    base = tile * block_q
    row_start = jnp.maximum(start[seq] - base, 0)
    row_end = jnp.minimum(start[seq] + length[seq] - base, block_q)
    position = context_len[seq] - length[seq] - (start[seq] - base)
    key_end = jnp.minimum(position + row_end, capacity)
    key_start = 0 if sliding_window is None else jnp.maximum(position + row_start - sliding_window + 1, 0)
    sees = exists & (key_end > key_start)
    items = Items(
        tile=tile,
        seq=seq,
        pool=sequences.pool[seq],
        row_start=jnp.where(exists, row_start, 0),
        row_end=jnp.where(exists, row_end, 0),
        position=position,
        key_start=jnp.where(sees, key_start, 0),
        key_end=jnp.where(sees, key_end, 0),
    )
    return items, ends[-1]
