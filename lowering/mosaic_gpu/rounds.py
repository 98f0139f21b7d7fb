"""When a launch of prompts ends, by an estimate: which of two sizes of tiles suits it better.

Cores go through pieces, a tile's keys for each of its heads, those of most keys first, dealt to and fro. With few
pieces a core, how many rows a tile has decides how long the others wait for the core with the most to do.
"""

import math
from typing import NamedTuple

import numpy as np

from paged_prefill.lowering.call import Problem
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS
from paged_prefill.lowering.splits import most_keys
from paged_prefill.primitive.config import PrefillPageAttentionConfig

WAIT = 0.8  # how far the end of a launch follows the core with the most to do, and not the mean of all: an exponent


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
    rounds = np.pad(of_pieces, (0, -len(of_pieces) % cores)).reshape(-1, cores)
    rounds[1::2] = rounds[1::2, ::-1]
    of_cores = rounds.sum(axis=0)
    # While some cores have nothing to do, there is more power for the others: not all of the wait counts.
    return of_cores.max() ** WAIT * of_cores.mean() ** (1 - WAIT)
