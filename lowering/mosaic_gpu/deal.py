"""How small the parts of tiles are where contexts may differ, which no static shape says: `finer`.

Tiles of few tokens wait for memory, and a launch ends with its longest part. So `_time` estimates when a launch ends whose
pieces are dealt to thread blocks as the kernel deals them, for parts of several sizes and contexts of several kinds
(`_kinds`), and the size is taken that is best over all kinds. A part's size follows what is static, and the tile's own
context and sequence. The size of the page pool is static too: it bounds what contexts have together, so that where a table
is as wide as the longest of them, it says how long the others can be, unless sequences share pages.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.mosaic_gpu.room import few_rows, is_latent, is_quantised, rows_of, shares_rows, two_share_rows
from paged_prefill.lowering.splits import MOST_PARTS, SHORT_CALL, bytes_of_key, most_keys
from paged_prefill.lowering.tiles import Parts
from paged_prefill.primitive.config import PrefillPageAttentionConfig

# Of parts, in bytes of keys and values.
SIZES = (2**17, 3 * 2**16, 2**18, 3 * 2**17, 2**19, 3 * 2**18, 2**20, 3 * 2**19, 2**21)
PAIR_BLOCKS = 8  # the fewest of a part, where pairs are merged
FEWEST_BLOCKS = 3  # of a part of few rows of latent keys
PAIR_RESULT_BYTES = 2**28  # of the places of all pairs, at most: few are ever written, where one context is long
SMALLEST_OF_MANY = 3 * 2**17  # with more than FEW tiles: a core has several parts, and finer ones are up to 15% slower
SMALLEST_OF_PROMPTS = 2**19  # where prompts lie beside long contexts: their own few keys stay one part
# What takes time, in bytes of keys and values that a core loads meanwhile with all others at work, 22.8 KB a us on an
# H100: fitted to what 24 launches took there, each with parts of three to five sizes and five kinds of contexts.
LAUNCH_BYTES = 75 * 2**10  # of a launch, whatever there is to do
PIECE_BYTES = 5 * 2**10  # to begin and to end a part
# Of a block, were memory endless; of 64 rows and 128 keys, or with a soft cap; of latent keys, in 16 and in 8 bits, by 37 more
# launches of 8 to 32 heads, over equal and uneven contexts.
STEP_BYTES, LONG_STEP_BYTES = 12.5 * 2**10, 20 * 2**10
LATENT_STEP_BYTES, WIDENED_LATENT_STEP_BYTES = 25 * 2**10, 35 * 2**10
# Of 64 wide rows, whose one stage waits for the next part's query too: by 51 launches of 6 to 32 sequences on an H200.
WIDE_STEP_BYTES, WIDE_PIECE_BYTES = 47 * 2**10, 50 * 2**10
FEW_WIDE_STEP_BYTES, FEW_WIDE_PIECE_BYTES = 30 * 2**10, 35 * 2**10  # of few wide rows, by 35 launches on an H200
# Of 64 rows of two warpgroups, by 60 launches on an H200, and in 8 bits.
SHARED_ROWS_STEP_BYTES, WIDENED_SHARED_ROWS_STEP_BYTES = 40 * 2**10, 68 * 2**10
MERGE_BYTES, MERGED_PART_BYTES = 40 * 2**10, 2**10  # of a merge, and for each part of the tile with the most
CLUSTER_PART_BYTES = 3 * 2**10  # of each part that a cluster merges, by steps over short contexts on an H200
# Of each part of a tile but one, where two warpgroups share rows, in bytes of the time that a core's own steps take: to end
# it, to begin the next, and to merge two where pairs are merged.
PART_BYTES, PAIR_BYTES = 220 * 2**10, 500 * 2**10
RESULTS = 4  # times the bytes of all results, to write and to read them: partly in memory
FINER_RESULT_BYTES = 2**27  # of all results together, at most: packs of prompts and a long context want so many parts
LEAST_LATENT_ROWS = 16  # of a tile whose results they are: those of 8 rows of latent caches take hardly less
# If a repeated call loads no more than this, the second cache still holds it, and delivers it in this share of the time.
HELD_BYTES, OF_HELD = 40 * 10**6, 0.55
# What each kind of contexts counts: of those as long as the table, which most engines measure, and of those of which most
# are short; of those in a table eight times as wide; 1 for all others.
OF_EQUAL, OF_SHORT, OF_WIDE = 3.0, 3.0, 0.5
# What memory takes of an H100's time, on an H100 and on an H200: where it takes less, cores without work cost more. Parts
# suit both, so that they follow the number of cores alone.
MEMORIES = (1.0, 0.7)
# Tokens of each sequence: of more, all but one may have one, and that one a prompt.
MOST_DRAFTED = 8
# Rounds over the cores that parts of a sequence of several tiles may make: 0 where these have no more parts together than
# one tile alone, so that a prompt's tiles stay whole where a step beside it is cut.
PROMPT_ROUNDS = (0, 2)
FEW = 0.25  # tiles for each core, at most
# How many times their least time, that of halves which clusters merge, contexts as long as the table may take over latent
# keys, in 16 and in 8 bits. Uneven ones take up to 1.4 times as long by halves, in 8 bits twice as long: so longer tables,
# where results cost less of the time, have more parts.
LATENT_EVENLY, WIDENED_LATENT_EVENLY, SHARED_ROWS_EVENLY = 1.115, 1.2, 1.1
# Likewise where a tile of 64 such rows has its keys alone, so that all would have as many parts, and the pool has more room
# than all tables and so says nothing of contexts: uneven ones take half as long again by those as by parts of 32 blocks.
ALONE_EVENLY, ROOMY = 1.3, 1.25
# Pools of fewer times all tables' room: contexts of latent keys are taken to fill them, the longest so many times the mean at
# most. Two sequences of few tiles were up to 1.28 times as slow by it, 24 tiles of 64 rows 0.78: so there must be so many.
TIGHT, LONGEST_OF_TIGHT, SOME = 0.95, 12, 0.125
WIDE_EVENLY = 1.1  # likewise of wide heads, where a part costs as much as a block
REACH = 2  # windows: contexts of so many at most are considered, since tiles see as much of all longer ones
SPREAD = 8  # times a mean context, were the pool full, at most
FULL = 4  # times as much count contexts as long as the table, if every core has a tile without any parts


class Launch(NamedTuple):
    """What is static about a launch, as far as the estimate needs it."""

    seqs: int
    head_tiles: int  # of the same tokens
    capacity: int  # keys of the longest context that there is room for
    held: int  # keys that the pool has room for, of all sequences
    most_keys: int  # that a tile sees
    block_kv: int
    block_bytes: int  # of keys and values
    result_bytes: int  # of all tiles, in float32
    slots: int  # tiles at a time
    cores: int
    smallest: int  # part that may be, in bytes of keys and values
    step_bytes: float = STEP_BYTES
    piece_bytes: float = PIECE_BYTES
    in_cluster: bool = False  # whether parts that do not vary are merged there
    evenly: float = math.inf  # how many times their least time contexts as long as the table may take
    part_bytes: float = 0  # of each part of a tile but one
    latent: bool = False
    in_pairs: bool = False  # whether parts are merged where the later of two ends (hopper/pairs.py)
    sharing: int = 1  # tiles that read the same keys, which memory brings once
    tiles_of_seq: int = 1  # of one head's, were all sequences to have as many tokens
    block_q: int = 1  # tokens of a tile
    prompt: int = 0  # tokens of a sequence, were all others to have one; 0 where so few are drafts


def dealt(
    problem: Problem, device: Device, config: PrefillPageAttentionConfig, *, unsplit: int, slots: int, in_cluster=False
) -> Launch:
    """The launch of a problem, as if its tokens were spread evenly over the sequences.

    `unsplit` are its tiles of all heads, and `slots` the pieces that are at work at the same time.
    """
    seqs = min(problem.seqs, problem.tokens)
    wide = few_rows(problem, config) is None and config.block_kv > 64
    step_bytes = LONG_STEP_BYTES if wide or problem.attention.attn_logits_soft_cap is not None else STEP_BYTES
    piece_bytes, part_bytes, evenly, rows = PIECE_BYTES, 0, math.inf, 0
    sharing, in_pairs = 1, False
    if is_latent(problem) and two_share_rows(problem, config):
        sharing, in_pairs = -(-problem.group // (rows_of(problem, config) // config.block_q)), unsplit > FEW * device.cores
        step_bytes, evenly = SHARED_ROWS_STEP_BYTES, SHARED_ROWS_EVENLY
        if is_quantised(problem):
            step_bytes = WIDENED_SHARED_ROWS_STEP_BYTES
        part_bytes = (PAIR_BYTES if in_pairs else PART_BYTES) * config.block_kv * bytes_of_key(problem) / step_bytes
    elif is_latent(problem):
        step_bytes, evenly = LATENT_STEP_BYTES, LATENT_EVENLY
        if is_quantised(problem):
            step_bytes, evenly = WIDENED_LATENT_STEP_BYTES, WIDENED_LATENT_EVENLY
    elif shares_rows(problem) and few_rows(problem, config) is not None:
        step_bytes, piece_bytes, evenly = FEW_WIDE_STEP_BYTES, FEW_WIDE_PIECE_BYTES, WIDE_EVENLY
    elif two_share_rows(problem, config):
        step_bytes, piece_bytes, evenly = WIDE_STEP_BYTES, WIDE_PIECE_BYTES, WIDE_EVENLY
    if is_latent(problem):
        rows = LEAST_LATENT_ROWS * unsplit
    tiles_of_seq = -(-problem.tokens_per_seq // config.block_q)
    prompt = min(problem.tokens - seqs + 1, problem.longest) if problem.tokens_per_seq > MOST_DRAFTED else 0
    smallest = SIZES[0] if unsplit <= FEW * device.cores else SMALLEST_OF_MANY
    return Launch(
        seqs=seqs,
        head_tiles=unsplit // (seqs * tiles_of_seq),
        capacity=problem.longest,
        held=problem.num_pages * problem.page_size,
        most_keys=most_keys(problem, config.block_q),
        block_kv=config.block_kv,
        block_bytes=config.block_kv * bytes_of_key(problem),
        result_bytes=4 * max(rows, problem.tokens * problem.q_heads) * problem.value_dim,
        slots=slots,
        cores=device.cores,
        smallest=smallest if problem.tokens_per_seq < SHORT_CALL else SMALLEST_OF_PROMPTS,
        step_bytes=step_bytes,
        piece_bytes=piece_bytes,
        in_cluster=in_cluster,
        evenly=evenly,
        part_bytes=part_bytes,
        latent=is_latent(problem),
        in_pairs=in_pairs,
        sharing=sharing,
        tiles_of_seq=tiles_of_seq,
        block_q=config.block_q,
        prompt=prompt,
    )


@functools.lru_cache
def finer(parts: Parts, launch: Launch) -> Parts:
    """`parts`, or others with which a launch of several sequences ends sooner over all kinds of contexts."""
    if launch.seqs == 1:
        return parts
    blocks = -(-launch.most_keys // launch.block_kv)
    results = PAIR_RESULT_BYTES if launch.in_pairs else FINER_RESULT_BYTES
    most = max(1, min(MOST_PARTS, results // launch.result_bytes))
    found = [parts]
    if parts.vary and launch.evenly < math.inf:
        found.append(Parts(parts.least, parts.least))
    of_round = min(most, launch.slots // launch.head_tiles)  # of one long context, all at work at the same time
    of_parts = [-(-size // launch.block_bytes) for size in SIZES if size >= launch.smallest]
    tight, fewest = _is_tight(launch), PAIR_BLOCKS if launch.part_bytes else FEWEST_BLOCKS
    longest = _longest_of_tight(launch) if tight else min(launch.most_keys, _longest(launch))
    of_longest = {max(-(-longest // (number * launch.block_kv)), fewest) for number in range(2, MOST_PARTS + 1)}
    if launch.part_bytes:  # each costs as much as many blocks: so those of the longest context are of one size
        of_parts = sorted(of_longest)
    elif tight:
        of_parts = sorted(of_longest.union(of_parts))
    several = launch.prompt > launch.block_q or launch.tiles_of_seq > 1
    rounds = PROMPT_ROUNDS if several else [None]
    # Tiles of few keys may have fewer parts than equal contexts want.
    sizes = of_parts, (most, of_round), {parts.least: None, 1: None}, rounds
    for of_part, bound, least, of_prompt in itertools.product(*sizes):
        bound = min(bound, -(-blocks // of_part))
        together = None if of_prompt is None else max(of_prompt * launch.slots // launch.head_tiles, bound)
        smaller = Parts(least, bound, of_part, together=together)
        if smaller.vary and (tight or smaller.most > (1 if launch.prompt else parts.least)):
            found.append(smaller)
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        return parts
    if tight:
        return _best_of_tight_pool(launch, found)
    kinds = _kinds(launch)
    times = np.array([[_time(launch, each, tiles, MEMORIES) for tiles, _ in kinds] for each in found])
    times = times.swapaxes(1, 2).reshape(len(found), -1)  # all kinds by the first memory, then by the next
    weights, power = np.array([weight for _, weight in kinds]), 2
    if not launch.prompt and launch.seqs * launch.tiles_of_seq * launch.head_tiles >= launch.cores:
        weights[0], power = FULL * weights[0], 1
    weights = np.tile(weights, len(MEMORIES))
    # Squared, a few per cent of every kind matter less than one kind that takes half as long again.
    longer = times / times.min(axis=0)
    # Rounded: the last bits differ from machine to machine, and processes that share a program must choose the same.
    costs = np.round(np.log(longer) ** power @ weights, 9)
    room = _room(launch)  # contexts of equal length count less, the less there is of it
    best = lambda evenly: found[int(np.argmin(np.where(longer[:, 0] * room <= evenly, costs, np.inf)))]
    chosen = best(launch.evenly)
    alone = launch.in_pairs and launch.sharing == 1 and launch.held > ROOMY * launch.seqs * launch.capacity
    return best(ALONE_EVENLY) if alone and not chosen.vary else chosen


def _is_tight(launch: Launch) -> bool:
    """Whether the pool has no room for all tables of many latent tiles: so contexts differ, and by how much, it says."""
    tiles = launch.seqs * launch.tiles_of_seq * launch.head_tiles
    many = tiles > (SOME if launch.part_bytes else FEW) * launch.cores
    return launch.latent and many and launch.held < TIGHT * launch.seqs * launch.capacity


def _best_of_tight_pool(launch: Launch, found: list[Parts]) -> Parts:
    """The parts with which packs that fill such a pool end soonest."""
    kinds = _that_fill(launch)
    times = np.array([[_time(launch, each, tiles, MEMORIES) for tiles, _ in kinds] for each in found])
    longer = np.log(times / times.min(axis=0)).sum(axis=2) @ np.array([weight for _, weight in kinds])
    return found[int(np.argmin(np.round(longer, 9)))]


def _that_fill(launch: Launch) -> list:
    """Packs whose contexts have room in the pool together, and how much each counts. They are spread up to as long as the
    table; up to half as long; and all but one are alike, and that one is as long as the table.
    """
    place, longest = np.arange(1, launch.seqs + 1) / launch.seqs, _longest_of_tight(launch)
    mean = launch.held / (launch.seqs * longest)
    spread = lambda most: most * _that_fit(place, mean * launch.seqs / most)
    alone = np.append(np.full(launch.seqs - 1, (mean * launch.seqs - 1) / max(launch.seqs - 1, 1)), 1)
    kinds = (spread(1), 2.0), (alone, 1.0), (spread(max(mean, 1 / 2)), 1.0)
    contexts = [(np.maximum(share * longest, 1), weight) for share, weight in kinds]
    packs = [(_evenly(launch, each), weight) for each, weight in contexts]
    if launch.prompt:
        packs += [(_beside_prompt(launch, each), weight) for each, weight in contexts]
    return packs


def _longest_of_tight(launch: Launch) -> int:
    """The longest context that is considered there, as far as a tile sees it."""
    return min(launch.most_keys, LONGEST_OF_TIGHT * launch.held // launch.seqs)


class Pack(NamedTuple):
    """The tiles of one head's tokens, an entry each."""

    blocks: np.ndarray  # of keys that it sees
    of_seq: np.ndarray  # tiles of its sequence
    results: np.ndarray  # its share of all results


def _kinds(launch: Launch) -> list:
    """Packs, and how much each counts. Contexts are all equal; spread evenly from short to long; and spread exponentially,
    so that most are short. Each again in a table eight times as wide. So are the tokens, or a prompt has all but one of
    each other sequence, and the shortest context; or all sequences are prompts that begin.
    """
    place = np.arange(1, launch.seqs + 1) / launch.seqs
    longest = _longest(launch)
    of_equal = 1 + (OF_EQUAL - 1) * _room(launch)
    kinds = [(np.ones(launch.seqs), of_equal), (place, 1.0), (2.0 ** (8 * (place - 1)), OF_SHORT)]
    kinds += [(share / 8, OF_WIDE) for share, _ in kinds]
    contexts = [(np.maximum(_that_fit(share, _room(launch) * launch.seqs) * longest, 1), weight) for share, weight in kinds]
    packs = [(_evenly(launch, each), weight) for each, weight in contexts]
    if launch.prompt:
        packs += [(_beside_prompt(launch, each), weight) for each, weight in contexts]
        packs.append((_evenly(launch, np.full(launch.seqs, launch.tiles_of_seq * launch.block_q)), OF_EQUAL))
    return packs


def _longest(launch: Launch) -> int:
    """The longest context that is considered, in keys."""
    return min(launch.capacity, REACH * launch.most_keys, -(-SPREAD * launch.held // launch.seqs), launch.held)


def _room(launch: Launch) -> float:
    """For which share of the longest context the pool has room in each sequence."""
    return min(launch.held / (launch.seqs * _longest(launch)), 1)


def _that_fit(shares, room: float):
    """Shares of the longest context that take no more room than there is: the more they differ, the longer one may be."""
    if shares.sum() <= room:
        return shares
    if shares.min() == shares.max():
        return np.full_like(shares, room / len(shares))
    steeper = [shares ** 2.0 ** (quarters / 4) for quarters in range(1, 25)]
    return next((found for found in steeper if found.sum() <= room), steeper[-1])


def _evenly(launch: Launch, contexts) -> Pack:
    """Of sequences with as many tokens each."""
    blocks = -(-np.minimum(contexts, launch.most_keys) // launch.block_kv).repeat(launch.tiles_of_seq)
    return Pack(blocks, np.full(len(blocks), launch.tiles_of_seq), np.full(len(blocks), 1 / len(blocks)))


def _beside_prompt(launch: Launch, contexts) -> Pack:
    """Of a prompt with the first context, and of steps with the others."""
    ends = np.minimum(np.arange(launch.block_q, launch.prompt + launch.block_q, launch.block_q), launch.prompt)
    keys = np.concatenate([max(contexts[0] - launch.prompt, 0) + ends, contexts[1:]])
    blocks = -(-np.minimum(keys, launch.most_keys) // launch.block_kv)
    tokens = np.concatenate([np.diff(ends, prepend=0), np.ones(launch.seqs - 1)])
    of_seq = np.concatenate([np.full(len(ends), len(ends)), np.ones(launch.seqs - 1, int)])
    return Pack(blocks, of_seq, tokens / tokens.sum())


def _time(launch: Launch, parts: Parts, tiles: Pack, of_memory=1.0):
    """When a launch ends, in bytes that a core of an H100 loads meanwhile, with its pieces dealt longest first, to and fro;
    by one memory, or by each of several.

    Pieces at work wait for memory, which they share, and for their own steps: where few are at work, mostly for their
    steps, where many are, mostly for memory.
    """
    of_memory = np.asarray(of_memory, float)
    blocks, most = tiles.blocks, parts.most
    if parts.vary and parts.together is not None:
        most = np.clip(parts.together // tiles.of_seq, 1, most)
    share = np.ceil(blocks / np.minimum(np.maximum(np.ceil(blocks / parts.blocks), parts.least), most))
    number = np.ceil(blocks / share).astype(int)
    sizes = np.concatenate([share.repeat(number - 1), blocks - share * (number - 1)])
    sizes = sizes * launch.block_bytes + launch.piece_bytes
    merging = launch.in_pairs and not (launch.in_cluster and not parts.vary)
    if launch.part_bytes and not (launch.in_cluster and not parts.vary):
        of_part = launch.part_bytes * (1 - 1 / number)
        sizes += np.concatenate([of_part.repeat(number - 1), of_part])
    sizes.sort()
    sizes = sizes[::-1].repeat(launch.head_tiles)
    rounds = np.zeros((-(-len(sizes) // launch.slots), launch.slots))
    rounds.ravel()[: len(sizes)] = sizes
    rounds[1::2] = rounds[1::2, ::-1]
    ends = rounds.sum(axis=0)
    ends.sort()
    ends[1:] -= ends[:-1].copy()  # how long after the last one each ends
    at_work = np.arange(launch.slots, 0, -1)  # until then
    loaded = blocks.sum() * launch.head_tiles / launch.sharing * launch.block_bytes
    memory = np.full_like(of_memory, OF_HELD) if loaded <= HELD_BYTES else of_memory
    step = launch.step_bytes / launch.block_bytes
    # One product each: all at once they would differ in their last bits, which decide between equals.
    at_work = at_work / (launch.cores * launch.sharing)
    time = LAUNCH_BYTES + np.reshape([ends @ np.hypot(at_work * m, step) for m in memory.flat], memory.shape)
    if merging or parts.most == 1:
        return time
    if launch.in_cluster and not parts.vary:
        return time + CLUSTER_PART_BYTES * parts.most
    written = (np.where(number > 1, number, 0) if launch.prompt else number) @ tiles.results
    results = RESULTS * of_memory * launch.result_bytes / launch.cores * written
    return time + MERGE_BYTES + MERGED_PART_BYTES * number.max() + results
