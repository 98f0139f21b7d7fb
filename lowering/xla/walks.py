"""How a call's tiles go over their keys: sizes that follow from static shapes alone.

A sequence is cut into query tiles of a few heights. The cut depends on its own length alone, so that a one-token row
costs one row, and the bits of a sequence do not depend on the pack it is in.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from paged_prefill.lowering.call import Problem
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

# The height of the tiles that a small rest of a sequence is cut into.
PART_HEIGHT = 32
# The keys of a block that one row walks over: fewer, and a batched product takes longer for each. A table of up to
# ONLY_BLOCK keys is a single block all the same, for which no loop over blocks is compiled.
LANE_KEYS, ONLY_BLOCK = 128, 256
# The lanes that share the blocks of one row, and those that walk side by side where a row has a single block.
SPLITS, MOST_LANES = 4, 8
# What a block of keys, or its logits, may take in one turn of a loop: more does not stay in the cores' caches. Lanes of
# a single block take more, since their products are small beside what a turn costs by itself.
TURN_BYTES, ONLY_TURN_BYTES = 2**19, 2**22


class Walk(NamedTuple):
    """The walk of the tiles of one height.

    Attributes:
      height: query tokens of a tile.
      run: keys that lie together, and are fetched as one: a page, or an equal part of a page above the block size.
      runs: how many runs a block has.
      lanes: tiles that walk side by side, for a turn of a loop costs as much as a few hundred keys of one row.
      splits: lanes that share the blocks of a tile with many; 1 where none are shared.
      heads: KV heads that are taken at a time.
      most_blocks: blocks that a tile can have; None where that is not known.
      alone: whether a sequence has one such tile at most.
    """

    height: int
    run: int
    runs: int
    lanes: int
    splits: int
    heads: int
    most_blocks: int | None
    alone: bool

    @property
    def block_kv(self) -> int:
        """Keys of a block."""
        return self.run * self.runs


def walks(problem: Problem, config: PrefillPageAttentionConfig) -> list[Walk]:
    """The walks of a call, one for each height that its tokens can need."""
    return [_walk(problem, config, height) for height in heights(problem.tokens, config.block_q)]


def _walk(problem, config, height) -> Walk:
    """The number of sequences has no say: products of another shape may round differently."""
    alone = height == 1 < config.block_q  # then a sequence has at most one such tile
    invariant = current_policy() == "invariant"  # then neither has the table's width, nor heads, which a mesh may cut
    block_kv = config.block_kv
    if alone and (invariant or not isinstance(problem.capacity, int) or problem.capacity > ONLY_BLOCK):
        block_kv = min(block_kv, LANE_KEYS)
    run = _largest_divisor(problem.page_size, block_kv)
    runs = max(1, block_kv // run)
    block_kv = run * runs
    most_blocks = -(-problem.capacity // block_kv) if isinstance(problem.capacity, int) else None
    shares = alone and (most_blocks is None or shared(most_blocks, SPLITS))
    limit = ONLY_TURN_BYTES if alone and most_blocks == 1 else TURN_BYTES
    lanes = 1
    if shares or (alone and invariant):
        lanes = SPLITS
    elif alone:
        lanes = max(1, min(MOST_LANES, limit // (4 * block_kv * problem.num_kv_heads * problem.head_dim)))
    if invariant:
        heads = 1
    else:
        bytes_of_head = 4 * block_kv * lanes * max(problem.head_dim, height * problem.group)
        heads = _largest_divisor(problem.num_kv_heads, max(1, limit // bytes_of_head))
    return Walk(height, run, runs, lanes, SPLITS if shares else 1, heads, most_blocks, alone)


def shared(blocks, splits: int):
    """Whether the lanes of a walk share the blocks of a tile that has so many, which leaves less than half idle."""
    return (2 * blocks > splits) & (splits > 1)


def heights(tokens, block_q: int) -> list[int]:
    """The heights of tiles that so many tokens can need, the tallest first."""
    fewest = {1: 1, PART_HEIGHT: 2, block_q: _most_in_parts(block_q) + 1}
    return [
        height
        for height in sorted({1, min(PART_HEIGHT, block_q), block_q}, reverse=True)
        if not isinstance(tokens, int) or fewest[height] <= tokens
    ]


def tiles_of(length, height: int, block_q: int):
    """How many tiles of a height a sequence of `length` rows has, and its first row that is in one.

    First tiles of block_q rows, the last too if what is left fills more than half of it. Else what is left goes to
    tiles of PART_HEIGHT, or a single row to a tile of its own.
    """
    whole = lax.div(length, jnp.int32(block_q))
    first_left = whole * block_q
    left = length - first_left
    in_parts = left <= _most_in_parts(block_q)
    if height == block_q:
        return whole + (~in_parts).astype(jnp.int32), jnp.zeros_like(length)
    if height == 1:
        return (left == 1).astype(jnp.int32), first_left
    return jnp.where((left > 1) & in_parts, lax.div(left + (height - 1), jnp.int32(height)), 0), first_left


def _most_in_parts(block_q: int) -> int:
    """The most rows left by whole tiles that are not one more."""
    if block_q == 1:
        return 0
    return block_q // 2 if PART_HEIGHT < block_q else 1


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    return max(d for low in range(1, math.isqrt(number) + 1) if number % low == 0
               for d in (low, number // low) if d <= limit)  # fmt: skip
