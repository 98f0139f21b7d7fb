"""What kernels share that split the keys of a tile (split-K): into how many parts, and the merge of their results.

Times are estimated in bytes: those of keys and values that one core loads meanwhile.
"""

import functools

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.tiles import Parts
from paged_prefill.primitive.attention import factor_and_lse
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

MAX_SPLITS = 64
# What splitting costs, in such bytes (25 KB are a us of an H100).
PIECE_BYTES = 2**16  # to begin and to end one piece: a part of a tile
MERGE_BYTES = 3 * 2**14  # to launch the merge
CLUSTER_BYTES = 2**14  # to merge within the launch instead
SPLIT_BYTES = 2**11  # to wait for one more result in the sums of the merge
ALONE = 1.25  # how much faster a core loads alone than with all others at work, since memory is shared
NEARLY = 1.03  # times within this factor count as the same: then fewer splits are better, which need less memory
# For `parts_of`, which gives long tiles more parts than short ones.
SHORT_CALL = 64  # tokens a sequence: longer prompts have many tiles, and do not wait for memory
LEAST_PART_BYTES = 2**21  # of a part's keys and values: below, what a part costs is more than 1% of its time
NEXT_PIECE_BYTES = 2**14  # to go from one piece to the next, whose loads run ahead
OF_HALF = 1.6  # how much faster each core loads with half of the cores at work than with all
EVENLY = 1.04  # how many times their least time contexts of equal length may take, so that uneven ones gain
MOST_PARTS = 32  # of a tile; the merge looks at all of them
RESULT_BYTES = 2**26  # of the results of all parts together, at most


def most_keys(problem: Problem, tokens: int) -> int:
    """The most keys that `tokens` neighbouring tokens of a sequence can see together."""
    window = problem.attention.sliding_window
    return problem.longest if window is None else min(problem.longest, window + tokens)


def bytes_of_key(problem: Problem) -> int:
    """Of a key and its value, which of a latent cache is part of it."""
    features = problem.head_dim + (0 if "latent" in problem.features else problem.value_dim)
    return features * jnp.dtype(problem.cache_dtype).itemsize


def mean_keys(problem: Problem, tokens: int) -> float:
    """The keys that `tokens` neighbouring tokens see on average, if the new ones are the last of a full page table."""
    keys = most_keys(problem, tokens)
    return max(keys / 2, min(keys, problem.longest - problem.tokens_per_seq / 2))  # early tiles see fewer


def best_splits(
    problem: Problem,
    device: Device,
    config: PrefillPageAttentionConfig,
    *,
    unsplit: int,
    slots: int,
    rows: int,
    most: int,
    enough: float = 0.5,
    in_cluster: frozenset[int] = frozenset(),
) -> int:
    """Into how many parts all tiles are cut: the fewest by which a launch takes nearly the least time, by an estimate.

    Pieces, `unsplit` times the splits, go in rounds over the slots. A launch ends with its last round, with its longest
    piece, or when memory has delivered all keys; the merge follows.

    Args:
      config: its block_q and block_kv are used.
      unsplit: tiles of all heads, each a piece where nothing is split.
      slots: pieces that are at work at the same time.
      rows: rows of the results that each split leaves for the merge.
      most: the most parts to consider; 1 is returned where that is less than 2.
      enough: the share of the slots from which on, if they have work unsplit, a merge costs more than it saves.
      in_cluster: numbers of parts that the thread blocks of a cluster merge, without results in memory; preferred.
    """
    if most < 2 or unsplit >= slots * enough:
        return 1
    keys, mean = most_keys(problem, config.block_q), mean_keys(problem, config.block_q)
    key_bytes = bytes_of_key(problem)
    blocks = -(-keys // config.block_kv)
    all_keys = min(problem.seqs, problem.tokens) * problem.num_kv_heads * mean * key_bytes
    results = (rows + problem.tokens * problem.q_heads) * problem.value_dim * 4  # written and read, in float32

    def cost(splits):
        piece = -(-blocks // splits) * config.block_kv * key_bytes
        rounds = -(-unsplit * splits // slots)
        last = max(piece + PIECE_BYTES, rounds * (piece * mean / keys + PIECE_BYTES)) * slots / device.cores
        merge = MERGE_BYTES + splits * (SPLIT_BYTES + results / device.cores) if splits > 1 else 0
        merge = CLUSTER_BYTES if splits in in_cluster else merge
        return max(last / ALONE, all_keys / device.cores) + merge

    costs = {splits: cost(splits) for splits in range(1, min(most, MAX_SPLITS) + 1)}
    near = [splits for splits, each in costs.items() if each <= NEARLY * min(costs.values())]
    return min(near, key=lambda splits: (splits not in in_cluster, splits))


def parts_of(
    problem: Problem,
    device: Device,
    config: PrefillPageAttentionConfig,
    *,
    unsplit: int,
    slots: int,
    most: int = MOST_PARTS,
    part_bytes: int = LEAST_PART_BYTES,
    slower: int = 1,
) -> Parts:
    """The parts of each tile: at least `config.num_splits`, and more of tiles of many keys, so that cores share long contexts.

    No static shape says how long the contexts in a page table are. So this takes the number by which two launches
    together end soonest, one whose contexts are all as long as the table and one with a single such context; the first
    may take EVENLY times its least time. Tiles have the same number of parts in calls of long prompts, and under the
    policy "invariant".

    Args:
      unsplit, slots: as in `best_splits`.
      most: the most parts of a tile.
      part_bytes: the fewest bytes of keys and values that are worth a part.
      slower: how many times longer a tile computes with keys than memory takes to bring them; 1 where memory binds.
    """
    seqs, least = min(problem.seqs, problem.tokens), config.num_splits
    key_bytes = bytes_of_key(problem)
    block_bytes = config.block_kv * key_bytes * slower
    blocks, of_part = -(-most_keys(problem, config.block_q) // config.block_kv), -(-part_bytes // block_bytes)
    results = problem.tokens * problem.q_heads * problem.value_dim * 4
    most = min(most, RESULT_BYTES // results, (blocks + of_part // 2) // of_part)
    settled = current_policy() == "invariant" or problem.tokens_per_seq >= SHORT_CALL
    if settled or seqs == 1 or most <= least:
        return Parts(least, least)

    def time(pieces, splits):
        """Of a launch, in bytes that a core loads meanwhile: those of its last round share the memory with fewer.

        Those of a first round lie evenly over the cores; later ones go where others ended, and may be together.
        """
        rounds, rest = divmod(pieces * splits, slots)
        as_slow_as = (slots if rounds else device.cores) / OF_HALF  # a round of fewer takes no less
        at_a_time = rounds * slots + (max(rest, as_slow_as) if rest else 0)
        return at_a_time / device.cores * (-(-blocks // splits) * block_bytes + NEXT_PIECE_BYTES)

    def costs(splits):
        merge = MERGE_BYTES + splits * (SPLIT_BYTES + 2 * results / device.cores) if splits > 1 else 0
        return time(unsplit, splits) + merge, time(unsplit / seqs, splits) + merge

    estimates = {splits: costs(splits) for splits in range(least, most + 1)}
    soonest = min(even for even, _ in estimates.values())
    # Two parts cost as much as they gain: they have to be as good where all are long.
    near = {s: both for s, both in estimates.items() if both[0] <= soonest * (EVENLY if s > 2 else 1)}
    chosen = min(near, key=lambda s: sum(near[s]))
    return Parts(least, chosen, of_part)


def merge_splits(out, lse, dtype, *, by_head: bool = False):
    """The attention to all keys from those to disjoint parts of them [splits, ...]: softmaxes add up by exp(lse).

    `lse` is [splits, tokens, q_heads], or [splits, q_heads, tokens] `by_head`.
    A part that sees no key has output 0 here, so that NaN in an output is the row's own and stays; `merge`, which takes
    what users bring, drops it with the part.
    """
    # Written out: XLA fuses that into one kernel, where every reduction is one more. What features share, such as the
    # weights, and slices that it turns round would have a kernel of their own too: so each feature looks up its lse.
    every, (splits, tokens, heads, _) = jnp.asarray(lse).reshape(-1), out.shape
    token, head = (lax.broadcasted_iota(jnp.int32, out.shape[1:], axis) for axis in range(2))
    place = head * tokens + token if by_head else token * heads + head
    parts = [every.at[place + split * tokens * heads].get(mode="promise_in_bounds") for split in range(splits)]
    largest, weights, total = _weights(parts)
    summed = functools.reduce(jnp.add, [w * o for w, o in zip(weights, out)])
    factor, _ = factor_and_lse(total, largest)
    merged = jnp.where(total == 0, 0.0, summed * factor).astype(dtype)

    largest, _, total = _weights([*(jnp.matrix_transpose(lse) if by_head else lse)])
    return merged, factor_and_lse(total, largest)[1]


def _weights(parts):
    """The largest of some lse, the weights of their softmax by it, and the sum of these."""
    largest = functools.reduce(jnp.maximum, parts)
    weights = [jnp.exp(part - jnp.where(jnp.isneginf(largest), 0.0, largest)) for part in parts]
    return largest, weights, functools.reduce(jnp.add, weights)
