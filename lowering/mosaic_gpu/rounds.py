"""When a launch of prompts ends, by an estimate: which of two sizes of tiles suits it better, and in which order they go.

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
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS
from paged_prefill.lowering.mosaic_gpu.room import rows_of, teams_of
from paged_prefill.lowering.splits import bytes_of_key, most_keys
from paged_prefill.primitive.config import PrefillPageAttentionConfig

WAIT = 0.8  # how far the end of a launch follows the core with the most to do, and not the mean of all: an exponent
# Rows of the table that may have their turn together, and how many times as long a launch must take without: the estimate is
# no better than this.
TOGETHER, WORTH = (2, 3, 4, 6, 8, 12, 16), 1.03
HELD_BYTES = 6 * 10**7  # of keys and values: little more than the second cache holds, which brings most of them once
MEMORY = 2400  # bytes that memory brings in a cycle of a core: between an H100's 2000 and an H200's 2800
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
    keys = np.minimum(max(problem.capacity - tokens, 0) + ends, most_keys(problem, block_q))
    # Warpgroups that go apart pass over blocks that only others of their tile see: of early tokens, and with a window
    # of late.
    passed_over = max(block_q // block_kv - 1, 0) / (2 if problem.attention.sliding_window is None else 1)
    with_rows = np.ceil((ends - starts) / WARPGROUP_ROWS) / math.ceil(block_q / WARPGROUP_ROWS)  # a last tile has fewer
    step = pace.step * (pace.stays + (1 - pace.stays) * with_rows)
    of_tiles = pace.ends + step * (np.ceil(keys / block_kv) - passed_over)
    of_pieces = np.sort(np.repeat(of_tiles, pieces // len(of_tiles)))[::-1]
    return _end(of_pieces, cores)


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

    1 unless that ends sooner, of sequences that are equal and of those that are not. The rows of a turn should differ
    little, since whoever has the longest has them in every round but on the way back.
    """
    seqs = min(problem.seqs, problem.tokens)
    of_key = problem.num_kv_heads * bytes_of_key(problem)
    held = of_key * seqs * problem.capacity <= HELD_BYTES
    if held or problem.tokens_per_seq <= config.block_q or seqs >= TOGETHER[-1]:  # all rows of a turn may be others'
        return 1
    heads, features = rows_of(problem, config) // config.block_q, problem.head_dim + problem.value_dim
    head_tiles, block_kv = -(-problem.group // heads), config.block_kv
    step = heads * config.block_q * block_kv * max(PRODUCT * features, EXPONENTIAL)
    whole = -(-problem.tokens // config.block_q)  # rows that there are, however the tokens are spread
    at_once = cores // (problem.num_kv_heads * head_tiles)  # rows, one after the other
    places = cores * teams_of(problem, config)

    def time(together, rows):
        seq, start, end = rows
        of_rows = ENDS + step * np.ceil((end - start) / block_kv)
        grouped = min(whole, len(of_rows)) // together * together
        groups = of_rows[:grouped].reshape(-1, 1, together).repeat(problem.num_kv_heads, axis=1)
        of_pieces = np.append(groups, of_rows[grouped:].repeat(problem.num_kv_heads)).repeat(head_tiles)
        # Of each sequence that has rows in a turn, memory brings the keys once that any of them sees.
        turn = np.arange(len(seq)) // max(together, at_once) * seqs + seq
        order = np.argsort(turn, kind="stable")
        _, first = np.unique(turn[order], return_index=True)
        read = np.maximum.reduceat(end[order], first) - np.minimum.reduceat(start[order], first)
        return math.hypot(_end(of_pieces, places), of_key * read.sum() / MEMORY)

    kinds = [_rows(problem, config.block_q, share) for share in ([1.0] * seqs, np.arange(1, seqs + 1) * 2 / (seqs + 1))]
    kinds = kinds[: min(seqs, 2)]
    times = np.array([[time(together, rows) for rows in kinds] for together in (1, *TOGETHER) if together <= whole])
    gains = np.round(np.log(times[0] / times), 9)  # as everywhere: last bits differ between machines
    best = int(np.argmax(np.where(gains.min(axis=1) >= 0, gains.sum(axis=1), 0)))
    return (1, *TOGETHER)[best] if gains[best].mean() > math.log(WORTH) else 1


def _rows(problem: Problem, block_q: int, shares):
    """Of the table's rows, those of most keys first: the sequence, and the first and the last key that its tokens see. The
    sequences have such shares of a mean one's tokens, and of the longest one's context.
    """
    found = []
    for seq, share in enumerate(shares):
        size = max(round(problem.tokens_per_seq * share), 1)
        context = max(round(problem.capacity * share / max(shares)), size)
        end = context - size + np.minimum(np.arange(0, size, block_q) + block_q, size)[::-1]
        found.append((np.full_like(end, seq), np.maximum(end - most_keys(problem, block_q), 0), end))
    seq, start, end = map(np.concatenate, zip(*found))
    order = np.argsort(start - end, kind="stable")
    return seq[order], start[order], end[order]
