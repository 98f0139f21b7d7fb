"""What a tile of given sizes takes of a thread block: warpgroups, rows and shared memory."""

import math

from jax.experimental import pallas as pl

from paged_prefill.lowering.call import Problem
from paged_prefill.lowering.mosaic_gpu.hopper.columns import board_shape, room_shape
from paged_prefill.lowering.mosaic_gpu.hopper import plan
from paged_prefill.lowering.mosaic_gpu.hopper.plan import FP8_SLOTS, WARPGROUP_ROWS, is_wide, value_stages, widened
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import whole
from paged_prefill.lowering.splits import mean_keys, most_keys
from paged_prefill.primitive.config import PrefillPageAttentionConfig

SHARED_BYTES = 227 * 1024
MOST_FEW_ROWS = 32  # of a tile, with which products have its rows for columns
MOST_EMPTY_OF_ONE_HEAD = 1.06  # how many times the rows tiles of one head may have, empty ones counted, of those of more
RESERVED_BYTES = 3072  # for barriers, and for what the compiler reserves


def is_quantised(problem: Problem) -> bool:
    """Whether the caches hold 8 bits a number."""
    return "quantised" in problem.features


def is_latent(problem: Problem) -> bool:
    """Whether values are the first features of the keys."""
    return "latent" in problem.features


def shares_rows(problem: Problem) -> bool:
    """Whether two warpgroups share the rows of a tile, each with half of the output's columns (`plan.is_wide`)."""
    return is_wide(problem.head_dim, problem.value_dim, is_latent(problem))


def warpgroups_of(config: PrefillPageAttentionConfig) -> int:
    """The warpgroups that compute. Of `num_warps`, 4 load; the warps that widen quantised caches are not counted in it."""
    return config.num_warps // 4 - 1


def rows_of(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Rows of a tile."""
    return few_rows(problem, config) or (1 if shares_rows(problem) else warpgroups_of(config)) * WARPGROUP_ROWS


def few_rows(problem: Problem, config: PrefillPageAttentionConfig) -> int | None:
    """The rows of a tile whose products are transposed (hopper/few_rows.py): at least 8, which a copy brings; else None."""
    widens_wide = shares_rows(problem) and is_quantised(problem) and not is_latent(problem)
    if config.fp8_terms or widens_wide or warpgroups_of(config) > 1:
        return None
    rows = config.block_q * max(pl.next_power_of_2(problem.group), 8 if config.block_q < 8 else 1)
    return rows if rows <= MOST_FEW_ROWS else None


def reads_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> bool:
    """Whether products widen a quantised cache themselves (`plan.reads_bytes`)."""
    return plan.reads_bytes(is_quantised(problem), few_rows(problem, config) is not None, is_latent(problem))


def two_share_rows(problem: Problem, config: PrefillPageAttentionConfig) -> bool:
    """Whether two warpgroups share the rows of a tile of these sizes. Few rows are one's, but over wide caches of 8 bits."""
    return shares_rows(problem) and few_rows(problem, config) is None


def fewest_stages(problem: Problem) -> int:
    """The fewest stages with which loads can run beside products: 2, or 1 where a stage is free before its products end.

    So it is over quantised caches, whose blocks are widened into other buffers; and wide keys and values have a stage
    each, and wait for one another.
    """
    return 1 if is_quantised(problem) or (shares_rows(problem) and not is_latent(problem)) else 2


def features_of_blocks(problem: Problem) -> int:
    """Of keys and values together, those that blocks have room for."""
    return whole(problem.head_dim) + (0 if is_latent(problem) else whole(problem.value_dim))


def features_of_stages(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Those of all stages."""
    stages, of_keys = config.num_stages, config.num_stages * whole(problem.head_dim)
    if is_latent(problem):
        return of_keys
    of_few = few_rows(problem, config) is not None
    of_values = value_stages(stages, problem.head_dim, problem.value_dim) if of_few else stages
    return of_keys + of_values * whole(problem.value_dim)


def shared_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Shared memory of a thread block with one tile at a time."""
    block, features = config.block_kv, features_of_blocks(problem)
    few = few_rows(problem, config) is not None
    rows, blocks = rows_of(problem, config), block * features_of_stages(problem, config)
    fixed = 2 * rows * (problem.head_dim + (block if few or shares_rows(problem) else 0)) + RESERVED_BYTES
    if few:
        fixed += 4 * sum(map(math.prod, (board_shape(rows), room_shape(rows, problem.value_dim))))
    if not is_quantised(problem):
        return fixed + 2 * blocks
    if reads_bytes(problem, config):
        return fixed + blocks
    if config.fp8_terms:
        return 2 * rows * problem.head_dim + FP8_SLOTS * block * problem.value_dim + blocks + RESERVED_BYTES
    slots, scales = widened(block, features, shares_rows(problem)), 0
    if "slot_scales" in problem.features:  # of keys, of values or of both
        scales = 2 * 4 * (slots + 1) * block
    if shares_rows(problem):  # keys and values in one place, and warpgroups that exchange their numbers
        features, scales = max(problem.head_dim, problem.value_dim), scales + 1024
    return fixed + 2 * slots * block * features + blocks + scales


def bytes_of_blocks(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Shared memory of all blocks of keys and values, as products read them and as they come."""
    block, features = config.block_kv, features_of_blocks(problem)
    if config.fp8_terms:
        return block * (config.num_stages * features + FP8_SLOTS * problem.value_dim)
    if not is_quantised(problem):
        return 2 * block * features_of_stages(problem, config)
    if reads_bytes(problem, config):
        return block * features * config.num_stages
    return block * features * (2 * widened(block, features, shares_rows(problem)) + config.num_stages)


def programs(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Tiles of all heads before keys are split, were the tokens spread evenly over the sequences."""
    heads = rows_of(problem, config) // config.block_q
    tiles_of_tokens = min(problem.seqs, problem.tokens) * -(-problem.tokens_per_seq // config.block_q)
    return tiles_of_tokens * problem.num_kv_heads * -(-problem.group // heads)


def keys_of_tiles(problem: Problem, block_q: int) -> tuple[int, int]:
    """The fewest and the most that a tile sees, where the new tokens are the last that the table has room for."""
    most = most_keys(problem, block_q)
    return min(most, max(problem.longest - problem.tokens_per_seq, 0)), most


def keys_of_prompts(problem: Problem, block_q: int) -> float:
    """The keys that a tile sees on average. Whole prompts in a wide table see as few as they have: of several, both count."""
    keys = mean_keys(problem, block_q)
    return keys if min(problem.seqs, problem.tokens) == 1 else math.sqrt(keys * min(keys, problem.tokens_per_seq / 2))


def tiles_of_packs(problem: Problem, block_q: int) -> tuple[int, int]:
    """Tiles of so many tokens, of a head: were all sequences to have as many tokens, and were all but one to have one.

    No static shape says which it is: drafts, or a prompt beside decode steps.
    """
    tokens, seqs = problem.tokens, min(problem.seqs, problem.tokens)
    longest = min(tokens - seqs + 1, problem.longest)
    return seqs * -(-problem.tokens_per_seq // block_q), seqs - 1 + -(-longest // block_q)


def heads_of_fewest_tiles(problem: Problem) -> int:
    """Heads of a token in a tile of 64 rows: those with which a group's tiles read their keys the fewest times."""

    def tiles(heads):
        return -(-problem.group // heads) * sum(tiles_of_packs(problem, WARPGROUP_ROWS // heads))

    return min((16, 32, 64), key=tiles)


def heads_of_prompts(problem: Problem, block_kv: int) -> int:
    """Heads of a tile of 128 rows: one's tokens are up to 5% faster than those of two or four, but for wide dims. But the
    more tokens of a head a tile has, the more of its rows stay empty: half of a prompt's last tile, where prompts differ.
    """
    tokens, rows = problem.tokens_per_seq, 2 * WARPGROUP_ROWS
    heads = [h for h in ((1, 2, 4) if block_kv == 128 else (2,)) if problem.group % h == 0] or [1]

    def with_empty(h, alone=min(problem.seqs, problem.tokens) == 1):
        return rows // h * -(-tokens * h // rows) if alone else tokens + rows / h / 2

    fewest = min(map(with_empty, heads))
    return next(h for h in heads if with_empty(h) <= MOST_EMPTY_OF_ONE_HEAD * fewest)


def teams_of(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Tiles of one warpgroup side by side, where two have room: each waits for less beside the other."""
    widens = is_quantised(problem) and not reads_bytes(problem, config)
    if warpgroups_of(config) > 1 or widens or shares_rows(problem):
        return 1
    return 2 if 2 * shared_bytes(problem, config) - RESERVED_BYTES <= SHARED_BYTES else 1
