"""The sizes of the Triton kernel's tiles, by device and problem."""

from typing import NamedTuple

import jax.numpy as jnp

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.splits import SHORT_CALL, mean_keys, most_keys
from paged_prefill.lowering.triton.constants import MOST_VALUES, Widths
from paged_prefill.lowering.triton.launch import capability, power_of_2
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy


class _Sizes(NamedTuple):
    """Sizes of a tile: `rows` are query rows, those of all heads of a group together."""

    rows: int
    block_kv: int
    num_warps: int
    num_stages: int


# By class of device, for dims up to 64, 128, 256 and all others in 16-bit dtypes, and up to 128 and 256 in float32.
# Those of Hopper are the fastest measured (benchmarks/results); others are not measured, but fit registers and shared
# memory.
SIZES = {
    "hopper": (
        _Sizes(128, 64, 8, 3), _Sizes(128, 128, 8, 3), _Sizes(128, 64, 8, 2), _Sizes(128, 32, 8, 2),
        *2 * [_Sizes(16, 32, 4, 2)],
    ),
    "blackwell": (
        _Sizes(128, 64, 8, 3), _Sizes(128, 64, 8, 3), _Sizes(64, 64, 8, 2), _Sizes(64, 32, 8, 2),
        *2 * [_Sizes(16, 32, 4, 2)],
    ),
    "ampere": (
        _Sizes(128, 64, 8, 3), _Sizes(128, 32, 8, 3), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 8, 2), _Sizes(16, 32, 4, 2),
        _Sizes(16, 16, 4, 2),
    ),
    "cdna": (
        _Sizes(128, 32, 4, 2), _Sizes(128, 32, 4, 2), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 4, 2), _Sizes(64, 16, 8, 2),
        _Sizes(16, 16, 4, 2),
    ),
}  # fmt: skip
SHORT_BLOCK = 16  # keys, where registers are short
# For a few rows a sequence, where memory is the limit: of dims up to 128 on NVIDIA's GPUs, and of those beyond 256 or
# on AMD's, where Triton 3.6 does not compile more stages of scales.
DECODE, SHALLOW_DECODE = _Sizes(16, 32, 4, 4), _Sizes(16, 32, 4, 2)
# Of dims beyond 256 where shared memory holds two such tiles: short steps, of which more are on their way.
WIDE_STEPS = _Sizes(16, SHORT_BLOCK, 4, 4)
# Of dims up to 64, and up to 128 on Hopper, where each tile's keys are its own: half as many steps, each no longer.
LONG_DECODE = _Sizes(16, 64, 4, 4)
# On Hopper of dims beyond 64: three tiles share a core, with as many bytes on their way as two of four. Short steps end
# with the few blocks that are asked for at once.
THREE_STAGES = 3
LATENT = _Sizes(64, 64, 8, 2)  # of a wide latent cache on Hopper
FEW_ROWS = 32  # of a tile that waits for memory
FEW_KEYS = 512  # of a table, over which warps that share out keys gain less than the sum over them costs
# Shared memory of a thread block, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
# Of dims of 129 to 256 on Hopper: at least so many cores for each tile, and of short parts in any case.
LONE_CHUNK, LONE_TILES, LONE_SHORT_TILES = _Sizes(64, 32, 4, 3), 32, 3
TALL_STEP = 128  # keys of a decode step of dims up to 64 on Hopper, of a group that fills a tall tile
KEYS_OF_PROMPT = 1024  # in a table: prompts seldom fill it, and over so few are not split, but those of wide heads
DRAFTS = 8  # tokens of a sequence that are no prompt
SHORT = _Sizes(64, 64, 4, 3)  # of dims up to 128 on Hopper, two to a core, where tiles see few keys
SHORT_STEPS, ROUNDS = _Sizes(64, 32, 4, 2), 4  # of more tiles than so many a core, four at a time
SHORT_KEYS = 768  # that are few, on average
FEW_TALL = 8  # cores for each tall tile of a chunk, of which half a tile is much
# Of dims of 129 to 256 on Hopper, over few keys: a step of the lowest takes half the time of one of 128 rows. So the
# lowest are taken that no core has two of.
LOW_TILES = (_Sizes(16, 32, 4, 3), _Sizes(32, 64, 4, 3), _Sizes(64, 64, 4, 2))
SHORT_TILES = 8  # of a sequence among others: their last ones are half empty
PROMPT_TILES, PROMPT_TABLE = 24, 4 * KEYS_OF_PROMPT  # of those, where contexts are hardly longer than what is new
# A decode step of fewer bytes of keys a core waits for them one after another more than for memory.
SHORT_BYTES = 2**19
TALL_ROWS = 128
KEYS_PER_SPLIT = 128  # fewer do not repay the merge
MOST_KEYS = 64  # of a block, for fewer rows in four warps: with more they spill


def tile_sizes(problem: Problem, device: Device) -> PrefillPageAttentionConfig:
    """Those of a tile by device, dims and dtype, and by how many tokens and keys the pack has; without splits.

    Under the policy "invariant" tiles are as tall for one token as for many.
    """
    width = max(problem.head_dim, problem.value_dim)
    *by_width, narrow_float32, wide_float32 = SIZES[device_class(device)]
    sizes = by_width[sum(width > most for most in (64, 128, 256))]
    if problem.dtype == "float32":
        sizes = narrow_float32 if width <= 128 else wide_float32
        if width > 128 and "tree_mask" in problem.features and device_class(device) == "ampere":
            sizes = sizes._replace(block_kv=32, num_warps=8)  # a tree's words leave four warps too few registers
    elif device.platform == "rocm" and problem.cache_dtype != problem.dtype and width > 128:
        # Registers to turn wide keys to numbers: eight warps would turn some twice.
        sizes = sizes._replace(block_kv=16, num_warps=4)
    elif device.platform == "rocm" and "key_ranges" in problem.features and width <= 128:
        sizes = sizes._replace(num_warps=8)
    elif device.platform == "rocm" and "tree_mask" in problem.features:
        sizes = sizes._replace(num_warps=4)  # as many registers as there are
    elif device_class(device) == "ampere" and problem.cache_dtype != problem.dtype and width > 64:
        # Of half as many bytes three stages fit. Of two, a latent tile's registers are cut to let in a second one.
        sizes = sizes._replace(rows=32, num_stages=3) if width > 256 else sizes._replace(rows=64)
    elif device_class(device) == "blackwell" and 128 < width <= 192:
        sizes = sizes._replace(num_warps=4)
    elif device_class(device) == "blackwell" and problem.cache_dtype != problem.dtype and is_wide_latent(problem):
        sizes = sizes._replace(block_kv=SHORT_BLOCK if problem.group > LATENT.rows else sizes.block_kv)
    rows_per_seq = problem.tokens_per_seq * problem.group
    if current_policy() == "invariant":
        rows_per_seq = sizes.rows
    elif _has_few_drafts(problem, device):
        rows_per_seq = min(rows_per_seq, DECODE.rows)
    elif _is_mixed(problem, device) and 4 * problem.group <= SHORT.rows:
        rows_per_seq = max(rows_per_seq, SHORT.rows)  # of their prompts: single tokens wait for memory either way
    if rows_per_seq <= DECODE.rows and problem.dtype != "float32" and not 128 < width <= 256:
        sizes = DECODE if width <= 128 and device.platform == "cuda" else SHALLOW_DECODE
        if _has_long_blocks(problem, device):
            sizes = LONG_DECODE
            if width > 64 and not is_short_step(problem, device, DECODE.rows):
                sizes = sizes._replace(num_stages=THREE_STAGES)
        elif _has_wide_steps(problem, device):
            sizes = WIDE_STEPS
        if problem.cache_dtype != problem.dtype and device.platform == "cuda":
            sizes = _steps_in_8_bits(sizes, problem, device)
    elif 128 < width <= 256 and rows_per_seq <= FEW_ROWS and device_class(device) == "hopper":
        if problem.cache_dtype == problem.dtype != "float32":
            sizes = DECODE._replace(num_stages=THREE_STAGES)
            sizes = sizes if leaves_cores(problem, device, DECODE.rows) else sizes._replace(rows=FEW_ROWS)
    elif current_policy() != "invariant" and has_low_tiles(problem, device):
        low = LOW_TILES[0].rows
        # Else parts of the lowest are short.
        lowest = device.cores / 2 <= tiles_of(problem, low) or leaves_cores(problem, device, low)
        fitting = [each for each in LOW_TILES[not lowest :] if tiles_of(problem, each.rows) <= device.cores]
        sizes = fitting[0] if fitting else sizes
    elif share_columns(problem, device) and rows_per_seq >= LATENT.rows:
        sizes = LATENT
    elif sizes.rows > SHORT.rows and current_policy() != "invariant" and _has_few_keys(problem, device):
        prompts = problem.tokens_per_seq >= SHORT_CALL and problem.capacity <= PROMPT_TABLE
        sizes = SHORT_STEPS if prompts and tiles_of(problem, SHORT.rows) > ROUNDS * device.cores else SHORT
    elif current_policy() != "invariant" and _fills_half_a_tile(problem, device):
        sizes = SHORT
    elif current_policy() != "invariant" and _is_lone_chunk(problem, device):
        sizes = LONE_CHUNK
    rows = min(sizes.rows, power_of_2(rows_per_seq))
    if rows == FEW_ROWS and current_policy() != "invariant" and _has_drafts(problem, device):
        rows = SHORT.rows  # then each warp has rows of its own, and waits for no other in a step
    if rows == TALL_ROWS and current_policy() != "invariant" and _is_tall_step(problem, device):
        sizes = sizes._replace(block_kv=TALL_STEP)
    if rows < sizes.rows and width <= 128:
        sizes = sizes._replace(block_kv=min(sizes.block_kv, MOST_KEYS), num_warps=4)
    return PrefillPageAttentionConfig(
        block_q=max(1, rows // problem.group),
        block_kv=sizes.block_kv,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )


def _steps_in_8_bits(sizes: _Sizes, problem: Problem, device: Device) -> _Sizes:
    """Those of few rows over a quantised cache: as many bytes on their way, or registers to turn wide keys."""
    width = max(problem.head_dim, problem.value_dim)
    # Longer blocks of keys and values so wide spill; before 8.9 Triton 3.6 compiles no 16 keys of float8_e5m2.
    if width > 256 and "latent" not in problem.features and capability(device) >= 89:
        return sizes._replace(block_kv=SHORT_BLOCK, num_warps=8, num_stages=3)
    if width > 128:
        return sizes._replace(num_warps=8)
    if device_class(device) == "ampere" or "tree_mask" in problem.features:
        return sizes
    if not may_share_keys(problem) or device_class(device) != "hopper":  # more spill on Blackwell
        return sizes._replace(block_kv=64, num_stages=THREE_STAGES)
    # Where tiles are few more than three a core, two of more stages, twice: a second round of three would be short.
    two = width > 64 and THREE_STAGES * device.cores < tiles_of(problem, DECODE.rows) <= 4 * device.cores
    # As many keys as have the bytes of a block of 16 bits: where warps share them out, a step takes as long.
    return sizes._replace(block_kv=128, num_stages=THREE_STAGES + two)


def key_bytes(problem: Problem) -> int:
    """Of a key and a value."""
    return (problem.head_dim + problem.value_dim) * jnp.dtype(problem.cache_dtype).itemsize


def rows_of(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Rows of a tile: those of all heads of a group for block_q tokens, or in a wide latent cache a token's in part."""
    rows = power_of_2(config.block_q * problem.group)
    # In 8 bits Hopper's registers hold more rows; where they do not, blocks are short too.
    fewer = is_wide_latent(problem) and (problem.cache_dtype == problem.dtype or config.block_kv <= SHORT_BLOCK)
    return min(rows, LATENT.rows) if config.block_q == 1 and fewer else rows


def programs(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Programs that have work before keys are split, were the tokens spread evenly over the sequences."""
    return tiles_of(problem, rows_of(problem, config))


def tiles_of(problem: Problem, rows: int) -> int:
    tiles_per_seq = -(-problem.tokens_per_seq * problem.group // rows)
    return min(problem.seqs, problem.tokens) * tiles_per_seq * problem.num_kv_heads


def leaves_cores(problem: Problem, device: Device, rows: int) -> bool:
    """Whether tiles so low have a core each with all the parts that may repay a merge: then none waits for another."""
    parts = max(1, most_keys(problem, rows // problem.group) // KEYS_PER_SPLIT)
    return tiles_of(problem, rows) * parts <= device.cores


def _has_few_drafts(problem: Problem, device: Device) -> bool:
    """Whether drafts have so few of the lowest tiles that warps may have keys of their own, as in decode."""
    few = tiles_of(problem, DECODE.rows) < device.cores // 8
    return few and problem.group <= DECODE.rows and _has_drafts(problem, device)


def _has_drafts(problem: Problem, device: Device) -> bool:
    """Whether sequences have a few tokens each, of narrow heads in 16 bits."""
    of_16_bits = problem.cache_dtype == problem.dtype != "float32"
    return 1 < problem.tokens_per_seq <= DRAFTS and of_16_bits and _of_narrow_heads(problem, device)


def _is_tall_step(problem: Problem, device: Device) -> bool:
    """Whether a decode step has tall tiles of a large group: of narrow heads it waits for memory all the same."""
    narrow = max(problem.head_dim, problem.value_dim) <= 64 and problem.cache_dtype == problem.dtype
    return device_class(device) == "hopper" and problem.tokens_per_seq == 1 and narrow


def _is_lone_chunk(problem: Problem, device: Device) -> bool:
    """Whether a chunk of wide heads has so few tiles that parts of lower ones fill the cores: fewer are merged."""
    of_16_bits = problem.cache_dtype == problem.dtype != "float32"
    plain_masks = not {"key_ranges", "tree_mask"} & set(problem.features)
    wide = 128 < max(problem.head_dim, problem.value_dim) <= 256 and problem.tokens_per_seq * problem.group > FEW_ROWS
    single = min(problem.seqs, problem.tokens) == 1 and problem.capacity > KEYS_OF_PROMPT
    short = most_keys(problem, max(1, LONE_CHUNK.rows // problem.group)) <= 2 * KEYS_OF_PROMPT
    few = (LONE_SHORT_TILES if short else LONE_TILES) * tiles_of(problem, LONE_CHUNK.rows) <= device.cores
    return device_class(device) == "hopper" and of_16_bits and plain_masks and wide and single and few


def _fills_half_a_tile(problem: Problem, device: Device) -> bool:
    """Whether of a lone chunk's few tall tiles the last is at most half full: lower ones leave fewer rows empty."""
    rows, single = problem.tokens_per_seq * problem.group, min(problem.seqs, problem.tokens) == 1
    few = single and FEW_TALL * tiles_of(problem, TALL_ROWS) <= device.cores
    few = few and 4 * problem.group <= SHORT.rows and _of_narrow_heads(problem, device)
    return few and rows > TALL_ROWS and 0 < rows % TALL_ROWS <= SHORT.rows


def has_low_tiles(problem: Problem, device: Device) -> bool:
    """Whether prompts of wide heads have all keys of a table few, and none in 8 bits.

    On Hopper, since it is measured nowhere else. Then a merge costs more than most of the idle cores could save.
    """
    of_16_bits = problem.cache_dtype == problem.dtype != "float32"
    wide = 128 < max(problem.head_dim, problem.value_dim) <= 256
    prompt = problem.tokens_per_seq * problem.group > FEW_ROWS and problem.capacity <= KEYS_OF_PROMPT
    return device_class(device) == "hopper" and of_16_bits and wide and prompt


def _has_few_keys(problem: Problem, device: Device) -> bool:
    """Whether tiles see so few keys that their beginnings and ends take most of the time: two go on beside one another.

    So it is too where several sequences are short, whatever their table says: of a tall tile the last is half empty.

    Of other dims and on other GPUs that is not measured. Tiles of a large group would leave too many rows empty.
    """
    if not _of_narrow_heads(problem, device):
        return False
    few_keys = mean_keys(problem, SHORT.rows // problem.group) <= SHORT_KEYS or (
        problem.capacity <= 2 * KEYS_OF_PROMPT and tiles_of(problem, SHORT.rows) <= device.cores
    )
    tiles = PROMPT_TILES if problem.capacity <= PROMPT_TABLE else SHORT_TILES
    short = problem.tokens_per_seq * problem.group <= tiles * SHORT.rows or tiles_of(problem, TALL_ROWS) <= device.cores
    return 4 * problem.group <= SHORT.rows and (few_keys or (min(problem.seqs, problem.tokens) > 1 and short))


def _of_narrow_heads(problem: Problem, device: Device) -> bool:
    return device_class(device) == "hopper" and max(problem.head_dim, problem.value_dim) <= 128


def _is_mixed(problem: Problem, device: Device) -> bool:
    """Whether a pack has as many tokens a sequence as a few prompts beside single tokens; if fewer, of many tiles.

    On Hopper, of heads up to 128: of wide ones, and of few drafts, low tiles are faster.
    """
    few = tiles_of(problem, DECODE.rows) <= ROUNDS * device.cores
    drafts = problem.tokens_per_seq <= (DRAFTS if few else DRAFTS // 2)
    several = min(problem.seqs, problem.tokens) > 1
    return several and not drafts and problem.tokens_per_seq < SHORT_CALL and _of_narrow_heads(problem, device)


def _has_long_blocks(problem: Problem, device: Device) -> bool:
    """Whether a decode step takes blocks of 64 keys: a step through them takes as long as one through 32.

    Of a single sequence over few keys more parts start at once.
    """
    if device.platform != "cuda" or problem.cache_dtype != problem.dtype:
        return False
    width = max(problem.head_dim, problem.value_dim)
    several = min(problem.seqs, problem.tokens) > 1 or problem.capacity > FEW_KEYS
    return width <= 64 or (width <= 128 and device_class(device) == "hopper" and several)


def may_share_keys(problem: Problem) -> bool:
    """Whether warps may share out a block's keys: not under a tree, which takes registers, nor under a cap.

    A tanh of each share would take a warp longer than its share of all.
    """
    capped = problem.attention.attn_logits_soft_cap is not None
    return problem.capacity > FEW_KEYS and not capped and "tree_mask" not in problem.features


def _has_wide_steps(problem: Problem, device: Device) -> bool:
    """Whether a decode step of heads beyond 256 that are not latent has short blocks: in 16 bits, of which two tiles fit."""
    wide = max(problem.head_dim, problem.value_dim) > 256 and "latent" not in problem.features
    return wide and problem.cache_dtype == problem.dtype and device_class(device) in ("hopper", "blackwell")


def is_short_step(problem: Problem, device: Device, rows: int) -> bool:
    """Whether cores wait for their first bytes more than for memory, were all contexts as long as the table."""
    keys = most_keys(problem, max(1, rows // problem.group))
    all_keys = min(problem.seqs, problem.tokens) * problem.num_kv_heads * keys * key_bytes(problem)
    return all_keys < SHORT_BYTES * device.cores


def device_class(device: Device) -> str:
    if device.platform == "rocm":
        return "cdna"
    return {9: "hopper", 10: "blackwell"}.get(capability(device) // 10, "ampere")


def share_columns(problem: Problem, device: Device, rows: int = 64, num_warps: int = 8) -> bool:
    """Whether warps share a product's columns: in a wide latent cache, on Hopper, of whose warps four take 64 rows.

    Then a tile's sums fit the registers of eight, and the first product is made once.
    """
    of_16_bits = problem.cache_dtype == problem.dtype
    return of_16_bits and is_wide_latent(problem) and device_class(device) == "hopper" and (rows, num_warps) == (64, 8)


def is_wide_latent(problem: Problem) -> bool:
    return "latent" in problem.features and problem.value_dim > MOST_VALUES


def shared_bytes(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
    """Shared memory that a launch in a 16-bit dtype takes at least, on an NVIDIA GPU."""
    rows, block_kv = rows_of(problem, config), power_of_2(config.block_kv)
    widths = Widths.of(problem, rows, share_columns(problem, device, rows, config.num_warps))
    head_dim = widths.main + widths.other + widths.rest
    features = head_dim + (0 if "latent" in problem.features else widths.value)
    # In Hopper and data centres' Blackwell the matrix unit reads keys and values there, so that none of the blocks is
    # in registers; and those of a quantised cache are there twice, one block as it is multiplied.
    in_shared = device_class(device) in ("hopper", "blackwell") and rows >= 64
    if problem.cache_dtype == problem.dtype:
        return 2 * rows * head_dim + 2 * (config.num_stages - (not in_shared)) * block_kv * features
    return 2 * rows * head_dim + (config.num_stages - 1 + 2 * in_shared) * block_kv * features
