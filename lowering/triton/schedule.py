"""Which programs of the Triton kernel have which rows and parts of their keys: they look themselves up in an array."""

import math

import jax.numpy as jnp

from paged_prefill.lowering.call import Call
from paged_prefill.lowering.tiles import Parts

PARTS_FIELD, PIECES_FIELD, POOL_FIELD = 4, 5, 6  # of the schedule; pools of the caches apart follow


def schedule_of(call: Call, rows: int, block_kv: int, parts: Parts, pieces: int):
    """int32 [7 or 9, 2 * seqs + 1]: of sequences, then of gaps, what a program looks up.

    That is the first piece, start, length, context_len and parts, the number of all pieces, and the pool.

    A piece is a part of a tile, and the tiles of a sequence have the parts of its last: where these vary, so few that
    the sequence has at most so many `pieces`, or one a tile. Pieces are numbered longest first, so that the last
    programs to start are short ones. The sequences must be in the order of their rows, as `call.flatten` gives them.
    Where caches have pools apart, those of the keys and of the values follow.
    """
    sequences, group = call.sequences, call.problem.group
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), sequences.start + sequences.length])
    gaps = jnp.concatenate([sequences.start, jnp.full(1, call.problem.tokens, jnp.int32)]) - ends
    nothing = jnp.zeros_like(gaps)
    pools = [sequences.pool]
    if call.key_pool is not None or call.value_pool is not None:
        pools += [sequences.pool if x is None else x for x in (call.key_pool, call.value_pool)]
    start, length, context_len, *pools = (
        jnp.concatenate(pair)
        for pair in (
            (sequences.start, ends),
            (sequences.length, gaps),
            (sequences.context_len, nothing),
            *((pool, nothing) for pool in pools),
        )
    )
    number = jnp.arange(len(start))
    num_tiles = (length * group + rows - 1) // rows
    num_parts, size = jnp.full_like(length, parts.most), context_len
    if parts.vary:
        seen_end = jnp.minimum(context_len, call.problem.capacity)
        last_tile = context_len - length + (num_tiles - 1) * rows // group
        seen_start = jnp.minimum(call.problem.attention.visible_keys(last_tile)[0], seen_end)
        blocks = (seen_end + block_kv - 1) // block_kv - seen_start // block_kv
        enough = pieces // jnp.maximum(num_tiles * call.problem.num_kv_heads, 1)
        num_parts = jnp.clip(enough, 1, parts.number(blocks))
        size = (blocks + num_parts - 1) // num_parts
    longer = size[:, None] < size[None, :]
    before = longer | ((size[:, None] == size[None, :]) & (number[:, None] > number[None, :]))
    pieces_of = num_tiles * num_parts
    first_piece = jnp.sum(jnp.where(before, pieces_of[None, :], 0), axis=1, dtype=jnp.int32)
    all_pieces = jnp.full_like(length, jnp.sum(pieces_of))
    return jnp.stack([first_piece, start, length, context_len, num_parts, all_pieces, *pools])


def most_pieces(seqs: int, tokens: int, group: int, rows: int, parts: Parts) -> int:
    """An upper bound on the pieces of any pack. Where parts vary, what no sequence owns has one a tile."""
    tiles_of_seqs, tiles = (_most_tiles(intervals, tokens, group, rows) for intervals in (seqs, 2 * seqs + 1))
    return tiles_of_seqs * parts.most + (tiles - tiles_of_seqs) * (1 if parts.vary else parts.most)


def _most_tiles(intervals: int, tokens: int, group: int, rows: int) -> int:
    """Of any partition of the tokens: each interval wastes less than a tile, by the factor that both rows share."""
    return (tokens * group + min(intervals, tokens) * (rows - math.gcd(group, rows))) // rows
