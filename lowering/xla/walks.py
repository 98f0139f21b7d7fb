"""How a call's tiles go over their keys: sizes that follow from static shapes alone.

A sequence is cut into query tiles of a few heights. The cut depends on its own length alone, so that a one-token row
costs one row, and the bits of a sequence do not depend on what else is in the pack. Which heights there are follows the
sizes of the pack too (`heights_of_call`).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_prefill.lowering.call import Problem
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

# The keys of a block that one row walks over: fewer, and a batched product takes longer for each. A table of up to
# ONLY_BLOCK keys is a single block all the same, for which no loop over blocks is compiled.
LANE_KEYS, ONLY_BLOCK = 128, 256
# What the single block of keys of tiles of one row may take: more than others, since the products are small beside what
# a turn of a loop costs by itself.
ONLY_TURN_BYTES = 2**22
# Tiles of so many rows keep a processor as busy as taller ones.
TALL = 256
# The same for what is multiplied in place, of which a quarter is ever made, and the fewest numbers for which that pays:
# it is done by two threads, and a thread must be woken. Where lanes follow the pack, the fewest bytes of a lane's keys.
IN_PLACE_BYTES, LEAST_IN_PLACE, LEAST_BYTES_IN_PLACE = 2**23, 2**16, 2**14
# So many rows at most are multiplied by integers of 8 bits in place: of more, LLVM makes no vectors.
MOST_ROWS_OF_8_BITS = 3
# The most rows of a tile in a pack of as many sequences as tokens.
PACK_HEIGHT = 32
# The fewest logits of a head and a tile for which less than a block is worth a program of its own.
LEAST_HALVED = 2**13
# The most of a block for a few rows that a taller tile left: it is fetched for few products, and should stay in a
# cache. Fewer keys where a taller tile would have all of a table in one block: there, most prompts are short.
FEW_ROWS, FEW_ROWS_KEYS, SHORT_TABLE_KEYS, FEW_ROWS_BYTES = 8, 256, 128, 2**19


class Turns(NamedTuple):
    """What a turn of a loop may be: what differs between platforms.

    Attributes:
      part_heights: heights of the tiles that a small rest of a sequence is cut into, the tallest first. Each is one
        more loop to compile.
      lanes: the most single rows that walk side by side where none shares its blocks. None for all of a pack, where a
        table is a single block.
      splits: how many lanes may share the blocks of one row, the fewest first.
      bytes: what a block of keys, or its logits, may take.
      skips: whether a step is left out for nothing, without a word between a device and its host.
      rows_in_place: up to so many rows of a tile are multiplied by keys and values where they lie in the pages.
      in_one: whether what is small is computed by one kernel (`plan.in_one`).
      few_heights: whether heights that tokens and sequences make of little use are not compiled.
    """

    part_heights: tuple[int, ...]
    lanes: int | None
    splits: tuple[int, ...]
    bytes: int
    rows_in_place: int
    skips: bool
    in_one: bool
    few_heights: bool


ACCELERATOR_TURNS = Turns(
    (32,), lanes=8, splits=(4,), bytes=2**19, rows_in_place=0, skips=False, in_one=False, few_heights=False
)
# A CPU's time follows the rows: a draft of five tokens takes a quarter in the lower tiles. And its turns are large:
# each kernel that two threads share costs some 20 microseconds by itself. But an idle lane costs as much as a busy one,
# so that a sequence alone should leave few.
CPU_TURNS = Turns(
    (256, 32, 8), lanes=None, splits=(2, 3, 4, 5, 6, 7, 8), bytes=2**22, rows_in_place=7, skips=True, in_one=True,
    few_heights=True,
)  # fmt: skip


class Walk(NamedTuple):
    """The walk of the tiles of one height.

    Attributes:
      height: query tokens of a tile.
      run: keys that lie together, and are fetched as one: a page, or an equal part of a page above the block size, or of
        one as long where less than a block may do.
      runs: how many runs a block has.
      few_runs: how many it has for a tile that looks at no more keys than these hold, the fewest first.
      lanes: tiles that walk side by side, for a turn of a loop costs as much as a few hundred keys of one row.
      splits: lanes that share the blocks of a tile with many; 1 where none are shared.
      heads: KV heads that are taken at a time.
      most_blocks: blocks that a tile can have; None where that is not known.
      alone: whether a sequence has one such tile at most.
      at_once: whether all tiles of a pack walk side by side, as far as a turn may hold them: so lanes follow the pack.
      in_place: whether keys and values are multiplied where they lie in the pages, without a copy of the block.
      skips: whether it is first asked if there are such tiles.
      skips_masks: whether it is first asked if anything of a block is hidden from a row.
      in_one: that of `Turns`.
    """

    height: int
    run: int
    runs: int
    few_runs: tuple[int, ...]
    lanes: int
    splits: int
    heads: int
    most_blocks: int | None
    alone: bool
    at_once: bool
    in_place: bool
    skips: bool
    skips_masks: bool
    in_one: bool

    @property
    def block_kv(self) -> int:
        """Keys of a block."""
        return self.run * self.runs


def walks(problem: Problem, config: PrefillPageAttentionConfig, turns: Turns) -> list[Walk]:
    """The walks of a call, one for each height of tiles that its tokens can need."""
    heights = heights_of_call(problem, config, turns)
    return [_walk(problem, config, turns, heights, height) for height in needed_heights(heights, problem.tokens)]


def _walk(problem, config, turns, heights, height) -> Walk:
    """The number of sequences has no say but in how many lanes there are, which leaves a lane's bits as they are."""
    alone = height == 1 < config.block_q  # then a sequence has at most one such tile
    invariant = current_policy() == "invariant"  # then neither has the table's width, nor heads, which a mesh may cut
    block_kv, limit = config.block_kv, turns.bytes
    if 1 < height <= FEW_ROWS < config.block_q:
        few = SHORT_TABLE_KEYS if not invariant and _one_block(problem.capacity, config) else FEW_ROWS_KEYS
        block_kv, limit = min(block_kv, few), min(limit, FEW_ROWS_BYTES)
    if alone and (invariant or not isinstance(problem.capacity, int) or problem.capacity > ONLY_BLOCK):
        block_kv = min(block_kv, LANE_KEYS)
    run = largest_divisor(problem.page_size, block_kv)
    halves = turns.skips and not invariant and height * block_kv >= LEAST_HALVED
    first = _first_keys(heights, height)
    if halves and run % first == 0:  # a part of a long page
        run = first
    runs = max(1, block_kv // run)
    block_kv = run * runs
    most_blocks = -(-problem.capacity // block_kv) if isinstance(problem.capacity, int) else None
    splits = _splits(turns, None if invariant else most_blocks)
    shares = alone and (most_blocks is None or shared(most_blocks, splits))
    if alone and most_blocks == 1:
        limit = ONLY_TURN_BYTES
    at_once = alone and most_blocks == 1 and turns.lanes is None and not invariant and not problem.symbolic
    lanes = 1
    if shares or (alone and invariant):
        lanes = splits
    elif alone:
        most_lanes = max(1, limit // (4 * block_kv * problem.num_kv_heads * problem.head_dim))
        if at_once:
            rows = max(1, min(problem.tokens, problem.seqs))
            lanes = -(-rows // -(-rows // most_lanes))  # as many in each turn
        else:
            lanes = min(turns.lanes or turns.splits[0], most_lanes)
    # Floats of 8 bits are converted number by number where they are multiplied, once for every row.
    vectors = problem.head_dim % 8 == 0 and not problem.cache_dtype.startswith("float8")
    bytes_of_number = jnp.dtype(problem.cache_dtype).itemsize
    most_rows = min(turns.rows_in_place, MOST_ROWS_OF_8_BITS if bytes_of_number == 1 else turns.rows_in_place)
    in_place = alone and vectors and problem.group <= most_rows
    if at_once:
        in_place &= bytes_of_number * problem.num_kv_heads * block_kv * problem.head_dim >= LEAST_BYTES_IN_PLACE
    if in_place:
        limit = IN_PLACE_BYTES
    if invariant:
        heads = 1
    else:
        bytes_of_head = 4 * block_kv * lanes * max(problem.head_dim, height * problem.group)
        heads = largest_divisor(problem.num_kv_heads, max(1, limit // bytes_of_head))
    in_place &= at_once or lanes * heads * block_kv * problem.head_dim >= LEAST_IN_PLACE
    needed = height == 1 and problem.tokens == problem.seqs  # to be sure, as far as shapes say
    skips = turns.skips and most_blocks == 1 and problem.capacity <= ONLY_BLOCK and not needed
    skips_masks = turns.skips and height > FEW_ROWS and most_blocks != 1
    few_runs = _few_runs(first, height, run, runs) if halves else ()
    splits = splits if shares else 1
    return Walk(
        height, run, runs, few_runs, lanes, splits, heads, most_blocks, alone, at_once, in_place, skips, skips_masks,
        turns.in_one,
    )  # fmt: skip


def _one_block(capacity, config: PrefillPageAttentionConfig) -> bool:
    """Whether all keys of a table are one block of the tallest tiles, but more than one of any tile's."""
    return isinstance(capacity, int) and ONLY_BLOCK < capacity <= config.block_kv


def _first_keys(heights: tuple[int, ...], height: int) -> int:
    """How many keys a tile of a height looks at, at most, if no tile and no context is before it."""
    taller = heights.index(height) - 1
    return height if taller < 0 else most_for_lower(heights, heights[taller])


def _few_runs(first: int, height: int, run: int, runs: int) -> tuple[int, ...]:
    """Half of a block, and less where so many keys, that a first tile looks at, are less."""
    half, of_first = -(-runs // 2), -(-first // run)
    if half == runs or height // 2 >= half * run:  # as a rule, no tile looks at so few
        return ()
    return (of_first, half) if of_first < half else (half,)


def _splits(turns: Turns, most_blocks: int | None) -> int:
    """The fewest lanes that can have a block each, or as many as there may be; None for blocks without a number."""
    enough = (splits for splits in turns.splits if most_blocks is not None and splits >= most_blocks)
    return next(enough, turns.splits[-1])


def shared(blocks, splits: int):
    """Whether the lanes of a walk share the blocks of a tile that has so many, which leaves less than half idle."""
    return (2 * blocks > splits) & (splits > 1)


def heights_of(block_q: int, part_heights: tuple[int, ...]) -> tuple[int, ...]:
    """The heights of tiles where the tallest has block_q rows, the tallest first; the last is 1."""
    return tuple(sorted({block_q, 1, *(height for height in part_heights if 2 * height <= block_q)}, reverse=True))


def heights_of_call(problem: Problem, config: PrefillPageAttentionConfig, turns: Turns) -> tuple[int, ...]:
    """The heights that a call's sequences are cut into, the tallest first: the last takes what is left, however few.

    On a CPU, each takes 0.3 to 0.6 seconds to compile. So one sequence goes without those that its tokens are not cut
    into, and a pack of as many sequences as tokens, as a rule a decode step, without tall ones; where that is small,
    each token is a tile. The policy "invariant" has all.
    """
    heights = heights_of(config.block_q, turns.part_heights)
    tokens, seqs = problem.tokens, problem.seqs
    if not turns.few_heights or current_policy() == "invariant" or problem.symbolic:
        return heights
    if seqs == 1:
        return tuple(height for height in heights if height >= _lowest(heights, tokens))
    if tokens == seqs <= min(turns.part_heights):
        return (1,)
    if tokens <= seqs:
        lower = (height for height in needed_heights(heights, tokens) if height <= PACK_HEIGHT)
        return tuple(sorted({next(lower), 1}, reverse=True))
    return heights


def _lowest(heights: tuple[int, ...], tokens: int) -> int:
    """The lowest that so many tokens are cut into; lower yet where less than a fourth of them would be a tile.

    But not where they are one of the tallest, as more than half of them would be.
    """
    lowest, left = 1, tokens
    for height in heights:
        tiles = left // height
        tiles += left - tiles * height > most_for_lower(heights, height)
        lowest, left = height if tiles else lowest, max(left - tiles * height, 0)
    if heights[0] == lowest >= tokens:
        return lowest
    return max(height for height in heights if height == 1 or (height <= lowest and 4 * height <= tokens))


def of_tokens(problem: Problem, heights: tuple[int, ...]) -> bool:
    """Whether each token of a pack is a tile, of as many tokens as sequences."""
    return heights == (1,) and not problem.symbolic and problem.tokens == problem.seqs


def needed_heights(heights: tuple[int, ...], tokens) -> list[int]:
    """Those of `heights` that so many tokens can need."""
    return [h for h in heights if not isinstance(tokens, int) or tokens > most_for_lower(heights, h)]


def tiles_of(length, heights: tuple[int, ...], walked: list[int], described):
    """Of each of the last heights, how many tiles a sequence of `length` rows has, and its first row that is in one.

    As many tiles of the tallest height as are full, and one more if what is left fills more than half of it; where the
    next height is tall too, if it fills all but half of one of those. What is left then goes to the next height in the
    same way, but that the lowest above 1 leaves no more than a single row.

    `walked` are the heights that the rows can need. Returns what `described(tiles, first_row, height)` says of each: in
    a loop, so that XLA compiles it once for all.
    """
    numbers = jnp.array([(height, most_for_lower(heights, height)) for height in walked], jnp.int32)

    def of_height(rows, height_and_most):
        first, left = rows
        height, most = height_and_most
        tiles = lax.div(left, height)
        tiles += (left - tiles * height > most).astype(jnp.int32)
        rows = tiles * height
        return (first + jnp.minimum(rows, left), jnp.maximum(left - rows, 0)), described(tiles, first, height)

    rows = jnp.zeros_like(length), length
    if len(walked) == 1:
        return jax.tree.map(lambda x: x[None], of_height(rows, numbers[0])[1])
    return lax.scan(of_height, rows, numbers)[1]


def most_for_lower(heights, height) -> int:
    """The most rows left by whole tiles of a height that are not one more."""
    if height == heights[-1]:
        return 0
    lower = heights[heights.index(height) + 1]
    if lower == 1:
        return 1
    return height - lower // 2 if lower >= TALL else height // 2  # two tall tiles are as fast as one twice as tall


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`."""
    return max(d for low in range(1, math.isqrt(number) + 1) if number % low == 0
               for d in (low, number // low) if d <= limit)  # fmt: skip
