"""When a launch of prompts ends, by an estimate: which of two sizes of tiles suits it better, and in which order.

Cores go through pieces, a tile's keys for each of its heads, those of most keys first, dealt to and fro. With few
pieces a core, how many rows a tile has decides how long the others wait for the core with the most to do.

Heads that are many read more keys than the second cache holds, and each tile reads its own from memory, unless the
others of its head are at work at the same time. Then some rows of the table have their turn together (`rows_together`).
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from paged_prefill.lowering.call import Problem
from paged_prefill.lowering.mosaic_gpu.hopper.plan import MATES, WARPGROUP_ROWS, are_gathered
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import lie_apart
from paged_prefill.lowering.mosaic_gpu.room import is_quantised, keys_of_prompts, programs, rows_of, shares_rows, teams_of, warpgroups_of
from paged_prefill.lowering.splits import bytes_of_key, most_keys
from paged_prefill.primitive.config import PrefillPageAttentionConfig

WAIT = 0.8  # how far the end of a launch follows the core with the most to do, and not the mean of all: an exponent
# Rows of the table that may have their turn together, and how much longer the estimate must say that a launch takes
# without: tiles that go in step ask for the same lines at the same time, and take 2 to 4% longer by it. Also what more
# rows must gain.
TOGETHER, WORTH, NEARLY = (2, 3, 4, 6, 8, 12, 16), 0.08, 0.02
HELD_BYTES = 6 * 10**7  # of keys and values: little more than the second cache holds, which brings most of them once
MEMORY = 2800  # bytes that memory brings in a cycle of a core of an H200; an H100's brings 2000
APART = 3  # products and memory go on beside one another: the exponent by which their times add up, by 12 launches
# Features by which any block may be masked, with which chunks take 3% longer by mates; and the fewest keys that tiles see
# with which prompts take none: long ones take 1 to 4% less.
MASKED, KEYS_OF_MATES = frozenset({"key_ranges", "tree_mask"}), 1024
# Cycles of a step for each of its products of two numbers, 2048 a cycle at most, and for each of its exponentials.
PRODUCT, EXPONENTIAL, ENDS = 1.12 / 2048, 0.1, 4000


class Pace(NamedTuple):
    """Cycles of a core with heads of 128 features in 16 bits: on an H100, by clocks in the kernel and 24 launches."""

    step: int  # over a block of keys
    ends: int  # of a piece's beginning and end, beside which no product runs
    stays: float  # of a step, however few warpgroups have rows: all of it where they take turns


CHAIN, THREE_WARPGROUPS = Pace(2330, 4000, 1.0), Pace(1680, 5000, 0.55)


def cycles(problem: Problem, config: PrefillPageAttentionConfig, pace: Pace, pieces: int, cores: int) -> float:
    """Until a launch of so many pieces ends, were the new tokens the last of full tables, as many in each."""
    tokens, block_q, block_kv = problem.tokens_per_seq, config.block_q, config.block_kv
    starts = np.arange(0, tokens, block_q)
    ends = np.minimum(starts + block_q, tokens)
    keys = np.minimum(max(problem.longest - tokens, 0) + ends, most_keys(problem, block_q))
    # Warpgroups that go apart pass over blocks that only others of their tile see: of early tokens, and with a window
    # of late.
    passed_over = max(block_q // block_kv - 1, 0) / (2 if problem.attention.sliding_window is None else 1)
    with_rows = np.ceil((ends - starts) / WARPGROUP_ROWS) / math.ceil(block_q / WARPGROUP_ROWS)  # a last tile has fewer
    step = pace.step * (pace.stays + (1 - pace.stays) * with_rows)
    of_tiles = pace.ends + step * (np.ceil(keys / block_kv) - passed_over)
    of_pieces = np.sort(np.repeat(of_tiles, pieces // len(of_tiles)))[::-1]
    return _end(of_pieces, cores)


def has_mates(problem: Problem, config: PrefillPageAttentionConfig, cores: int) -> bool:
    """Whether two thread blocks copy keys for one another (hopper/mates.py): those of a KV head's tiles of the same tokens.

    So it is where pages are copied as they lie, and prompts have tiles for all cores, of many keys: at both ends of a
    piece they wait for one another.
    """
    if is_quantised(problem) or shares_rows(problem) or warpgroups_of(config) == 1 or not MASKED.isdisjoint(problem.features):
        return False
    if lie_apart(problem.head_dim) or lie_apart(problem.value_dim) or are_gathered(problem.page_size, config.block_kv):
        return False
    halves = config.block_kv % (MATES * min(problem.page_size, config.block_kv // MATES)) == 0
    head_tiles = -(-problem.group // (rows_of(problem, config) // config.block_q))
    filled = problem.tokens_per_seq >= config.block_q and programs(problem, config) >= cores
    pairs = halves and head_tiles % MATES == 0 and cores % MATES == 0
    return pairs and filled and keys_of_prompts(problem, config.block_q) >= KEYS_OF_MATES


def _end(of_pieces, cores: int) -> float:
    """When a launch ends whose pieces are dealt to and fro, in this order."""
    rounds = np.pad(of_pieces, (0, -len(of_pieces) % cores)).reshape(-1, cores)
    rounds[1::2] = rounds[1::2, ::-1]
    of_cores = rounds.sum(axis=0)
    # While some cores have nothing to do, there is more power for the others: not all of the wait counts.
    return of_cores.max() ** WAIT * of_cores.mean() ** (1 - WAIT)


@functools.lru_cache
def rows_together(problem: Problem, config: PrefillPageAttentionConfig, cores: int) -> int:
    """How many rows of the table have their turn together: of each KV head all their tiles, before the next head's.

    1 unless that ends sooner, and later for no kind of sequences: equal ones, and such whose tokens or contexts are
    spread. The rows of a turn should differ little, since whoever has the longest has them in every second round.
    """
    seqs = min(problem.seqs, problem.tokens)
    of_key = problem.num_kv_heads * bytes_of_key(problem)
    held = of_key * seqs * problem.longest <= HELD_BYTES
    if held or problem.tokens_per_seq <= config.block_q or seqs >= TOGETHER[-1]:  # all rows of a turn may be others'
        return 1
    heads, features = rows_of(problem, config) // config.block_q, problem.head_dim + problem.value_dim
    head_tiles, block_kv = -(-problem.group // heads), config.block_kv
    step = heads * config.block_q * block_kv * max(PRODUCT * features, EXPONENTIAL)
    whole = -(-problem.tokens // config.block_q)  # rows that there are, however the tokens are spread
    at_once = cores / (problem.num_kv_heads * head_tiles)  # rows, one after the other
    places = cores * teams_of(problem, config)

    def time(together, rows):
        seq, start, end = rows
        of_rows = ENDS + step * np.ceil((end - start) / block_kv)
        grouped = min(whole, len(of_rows)) // together * together
        groups = of_rows[:grouped].reshape(-1, 1, together).repeat(problem.num_kv_heads, axis=1)
        of_pieces = np.append(groups, of_rows[grouped:].repeat(problem.num_kv_heads)).repeat(head_tiles)
        # Of each sequence that has rows in a turn, memory brings the keys once that any of them sees.
        sharing = max(together, at_once)
        turn = np.arange(len(seq)) // int(sharing) * seqs + seq
        order = np.argsort(turn, kind="stable")
        _, first = np.unique(turn[order], return_index=True)
        read = np.maximum.reduceat(end[order], first) - np.minimum.reduceat(start[order], first)
        memory = of_key * read.sum() * int(sharing) / sharing / MEMORY
        return (_end(of_pieces, places) ** APART + memory**APART) ** (1 / APART)

    even, spread = np.ones(seqs), np.arange(1, seqs + 1) * 2 / (seqs + 1)
    kinds = [(even, even), (spread, spread), (even, spread)][: 1 if seqs == 1 else None]
    kinds = [_rows(problem, config.block_q, *shares) for shares in kinds]
    times = np.array([[time(together, rows) for rows in kinds] for together in (1, *TOGETHER) if together <= whole])
    gains = np.round(np.log(times[0] / times), 9)  # as everywhere: last bits differ between machines
    gains = np.where(gains.min(axis=1) >= 0, gains.mean(axis=1), 0)
    # The fewer rows, the less they differ, whatever the sequences are.
    return (1, *TOGETHER)[int(np.argmax(gains >= gains.max() - NEARLY))] if gains.max() > WORTH else 1


def _rows(problem: Problem, block_q: int, of_tokens, of_context):
    """Of the table's rows, those of most keys first: the sequence, and the first and the last key that its tokens see.
    The sequences have such shares of a mean one's tokens, and in proportion to the longest one's, of the most keys.
    """
    found = []
    for seq, (tokens, keys) in enumerate(zip(of_tokens, of_context)):
        size = max(round(problem.tokens_per_seq * tokens), 1)
        context = max(round(problem.longest * keys / max(of_context)), size)
        end = context - size + np.minimum(np.arange(0, size, block_q) + block_q, size)[::-1]
        found.append((np.full_like(end, seq), np.maximum(end - most_keys(problem, block_q), 0), end))
    seq, start, end = map(np.concatenate, zip(*found))
    order = np.argsort(start - end, kind="stable")
    return seq[order], start[order], end[order]
