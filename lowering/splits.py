"""What kernels have in common that split the keys of a tile: into how many parts, and the merge of these."""

import functools

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.tiles import Parts
from paged_prefill.primitive.attention import factor_and_lse
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

MAX_SPLITS = 64
# What splitting costs, in bytes of keys and values that a core could have loaded meanwhile (an H100's: 25 KB a us).
PIECE_BYTES = 2**16  # to begin and to end one tile's share of the keys
MERGE_BYTES = 3 * 2**14  # to launch the merge
CLUSTER_BYTES = 2**14  # to merge within the launch instead
SPLIT_BYTES = 2**11  # to wait for one more result in the sums of the merge
ALONE = 1.25  # how much faster than with all others at work a core is alone, since memory is shared
NEARLY = 1.03  # times within this are the same: then fewer splits need less memory
# What parts of long tiles cost, beside those of short ones.
SHORT_CALL = 64  # tokens a sequence: longer prompts have many tiles, and do not wait for memory
LEAST_PART_BYTES = 2**21  # of a part's keys and values: with fewer it costs more than 1% of its time
NEXT_PIECE_BYTES = 2**14  # to go from one piece to the next, of which loads run ahead
OF_HALF = 1.6  # how much faster each of half of the cores loads than one of all
EVENLY = 1.04  # times the least that contexts of equal length may take, for the sake of others
MOST_PARTS = 32  # all of which the merge looks at
RESULT_BYTES = 2**26  # of all parts


def most_keys(problem: Problem, tokens: int) -> int:
    """The most keys that so many neighbouring tokens of a sequence see together."""
    window = problem.attention.sliding_window
    return problem.capacity if window is None else min(problem.capacity, window + tokens)


def bytes_of_key(problem: Problem) -> int:
    """Of a key and its value, which of a latent cache is part of it."""
    features = problem.head_dim + (0 if "latent" in problem.features else problem.value_dim)
    return features * jnp.dtype(problem.cache_dtype).itemsize


def mean_keys(problem: Problem, tokens: int) -> float:
    """The keys that so many neighbouring tokens see on average, where the new ones are the last of a full table."""
    keys = most_keys(problem, tokens)
    return max(keys / 2, min(keys, problem.capacity - problem.tokens_per_seq / 2))  # early tiles see fewer


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
    """The fewest parts, up to `most`, by which a launch takes nearly the least time, by an estimate; or those `in_cluster`.

    Pieces, `unsplit` times the splits, go in rounds over `slots`, so many at a time. A launch ends with its last round,
    with its longest piece, or when memory has delivered all keys; the merge follows, of as many `rows` from each split.
    Where `enough` of the slots, half of them, have work as it is, the merge costs more than the others would save.
    Parts of the numbers `in_cluster` are merged by those who have them, and leave no results in memory.
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
    """The parts of a tile: `num_splits` of any, and of one with many keys as many as spread a long context over cores.

    Long tiles have more in short calls alone, and never under the policy "invariant". No static shape says how long
    the contexts in a table are. So it takes the number by which two launches together end soonest, one of contexts as
    long as the table and one of a single such context; the first of them nearly as soon as without more parts. `slots`
    pieces are at work at a time. A tile has up to `most`, of at least `part_bytes` of keys and values, or fewer where
    it goes so many times `slower` through them than memory brings them.
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
