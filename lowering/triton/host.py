"""The Triton lowering, through jax_triton: NVIDIA GPUs from compute capability 8.0, and AMD's.

(Pallas' own Triton back end is deprecated.) The kernel is in kernel.py; here are what it can run, its sizes,
and what goes around it: the schedule of tiles before, in schedule.py, and the merge of their parts after, in merge.py.

Tokens that no sequence owns are intervals as sequences are, with a context of length 0: their tiles see no key, and so
write 0 and -inf. A launch has as many programs as the most tiles that any pack of its shape could need.
"""

from dataclasses import replace
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.splits import (
    LEAST_PART_BYTES,
    MERGE_BYTES,
    MOST_PARTS,
    RESULT_BYTES,
    SHORT_CALL,
    best_splits,
    mean_keys,
    most_keys,
    parts_of,
)
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton.constants import MAX_FLOAT32_DIM, MOST_VALUES, Widths, constants, scales_of
from paged_prefill.lowering.triton.launch import capability, launch, power_of_2, reason_against
from paged_prefill.lowering.triton.merge import merge
from paged_prefill.lowering.triton.schedule import most_pieces, schedule_of
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

MAX_HEAD_DIM, MAX_VALUE_DIM = 576, 512


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
        _Sizes(128, 64, 8, 3), _Sizes(128, 128, 8, 3), _Sizes(128, 64, 8, 2), _Sizes(128, 32, 8, 2), *2 * [_Sizes(16, 32, 4, 2)]
    ),
    "blackwell": (
        _Sizes(128, 64, 8, 3), _Sizes(128, 64, 8, 3), _Sizes(64, 64, 8, 2), _Sizes(64, 32, 8, 2), *2 * [_Sizes(16, 32, 4, 2)]
    ),
    "ampere": (
        _Sizes(128, 64, 8, 3), _Sizes(128, 32, 8, 3), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 8, 2), _Sizes(16, 32, 4, 2),
        _Sizes(16, 16, 4, 2),
    ),
    "cdna": (
        _Sizes(128, 32, 4, 2), _Sizes(128, 32, 4, 2), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 8, 2), _Sizes(64, 16, 8, 2),
        _Sizes(16, 16, 4, 2),
    ),
}  # fmt: skip
# For a few rows a sequence, where memory is the limit: of dims up to 128 on NVIDIA's GPUs, and of those beyond 256 or on
# AMD's, where Triton 3.6 does not compile more stages of scales.
DECODE, SHALLOW_DECODE = _Sizes(16, 32, 4, 4), _Sizes(16, 32, 4, 2)
# Of dims up to 64, and up to 128 on Hopper, where each tile's keys are its own: fewer steps, each as long as one of half.
LONG_DECODE = _Sizes(16, 64, 4, 4)
# On Hopper of dims beyond 64: three tiles share a core, with as many bytes on their way as two of four. Short steps end
# with the few blocks that are asked for at once.
THREE_STAGES = 3
LATENT = _Sizes(64, 64, 8, 2)  # of a wide latent cache on Hopper
SHORT_BLOCK = 16  # keys, where registers are short
FEW_ROWS = 32  # of a tile that waits for memory
SUMS_OF_WARP = 2**11  # of a tile, that the registers of one warp hold
FEW_KEYS = 512  # of a table, over which warps that share out keys gain less than the sum over them costs
# Shared memory of a thread block, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
LANES = 8  # of a warp, over which a product of few rows shares out its columns
WARPS = 8  # that keep a core busy: tiles of fewer warps share one
KEYS_PER_SPLIT = 128  # fewer do not repay the merge
LONE_CHUNK, LONE_TILES = _Sizes(64, 32, 4, 3), 32  # of dims of 129 to 256 on Hopper: at least so many cores for each tile
TALL_STEP = 128  # keys of a decode step of dims up to 64 on Hopper, of a group that fills a tall tile
KEYS_OF_PROMPT = 1024  # in a table: prompts seldom fill it, and over so few are not split, but those of wide heads
DRAFTS = 8  # tokens of a sequence that are no prompt
SHORT = _Sizes(64, 64, 4, 3)  # of dims up to 128 on Hopper, two to a core, where tiles see few keys
SHORT_STEPS, ROUNDS = _Sizes(64, 32, 4, 2), 4  # of more tiles than so many a core, four at a time
SHORT_KEYS = 768  # that are few, on average
# Of dims of 129 to 256 on Hopper, over few keys: a step of the lowest takes half the time of one of 128 rows. So the
# lowest are taken that no core has two of.
LOW_TILES = (_Sizes(16, 32, 4, 3), _Sizes(32, 64, 4, 3), _Sizes(64, 64, 4, 2))
SHORT_TILES = 8  # of a sequence among others: their last ones are half empty
PROMPT_TILES, PROMPT_TABLE = 24, 4 * KEYS_OF_PROMPT  # of those, where contexts are hardly longer than what is new
MOST_KEYS = 64  # of a block, for fewer rows in four warps: with more they spill
# A decode step of fewer bytes of keys a core waits for them one after another more than for memory: then more tiles
# share a core, and the merge of more splits than so many would show.
SHORT_BYTES, SHORT_SPLITS = 2**19, 32
EVEN_PARTS = 4 / 3  # times the parts that an estimate takes, for all cores to have as many
TALL_ROWS, TALL_SLOWER = 128, 2  # products of so many rows take as long as their keys and values, and come after them
MERGED_SHARE = 0.01  # of a part's bytes: what its result may take, written and read, for it to be worth it
PIECES_OF_SEQUENCE = 2  # a core: more of its parts would cost more than they even out
REPAID = 32  # times that prompts may take for one context to be worth a merge of all
MOST_ABSENT = 2**12  # parts that no tile has: their programs end at once, a thousand of them in a microsecond


class Triton(Kernel):
    """Takes head_dim up to 576 and value_dim up to 512, 256 in float32; needs Triton and a GPU that it compiles for."""

    name = "triton"
    version = 12
    platforms = ("cuda", "rocm")
    features = frozenset(FEATURES)
    invariant = True

    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        if reason := reason_against(device, problem.cache_dtype):
            return reason
        narrow = problem.dtype == "float32"
        for name, most in (("head_dim", MAX_HEAD_DIM), ("value_dim", MAX_VALUE_DIM)):
            most = MAX_FLOAT32_DIM if narrow else most
            if (dim := getattr(problem, name)) > most:
                return f"{name} may be at most {most}{' in float32' if narrow else ''}, got {dim}"
        if problem.num_pages * problem.rows["num_pages"] >= 2**31:
            return (
                f"a pool may have at most {2**31 - 1} slots, of all heads where pages hold these, got "
                f"{problem.num_pages} pages of {problem.page_size}"
            )
        return self.misfit(problem, device, self.heuristic(problem, device))

    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """Sizes by device, dims and dtype; splits where the tiles would leave cores idle.

        Under the policy "invariant" tiles are as tall for one token as for many, and not split.
        """
        width = max(problem.head_dim, problem.value_dim)
        *by_width, narrow_float32, wide_float32 = SIZES[_device_class(device)]
        sizes = by_width[sum(width > most for most in (64, 128, 256))]
        if problem.dtype == "float32":
            sizes = narrow_float32 if width <= 128 else wide_float32
        elif device.platform == "rocm" and problem.cache_dtype != problem.dtype and width > 128:
            # Registers to turn wide keys to numbers: of the widest, eight warps would each turn all.
            sizes = sizes._replace(block_kv=16, num_warps=8 if width <= 256 else 4)
        elif device.platform == "rocm" and "key_ranges" in problem.features and width <= 128:
            sizes = sizes._replace(num_warps=8)
        elif _device_class(device) == "ampere" and problem.cache_dtype != problem.dtype and width > 64:
            sizes = sizes._replace(rows=32 if width > 256 else 64)
        elif _device_class(device) == "blackwell" and 128 < width <= 192:
            sizes = sizes._replace(num_warps=4)
        elif _device_class(device) == "blackwell" and problem.cache_dtype != problem.dtype and _is_wide_latent(problem):
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
                if width > 64 and not _is_short_step(problem, device, DECODE.rows):
                    sizes = sizes._replace(num_stages=THREE_STAGES)
            # As many bytes on their way, or registers to turn wide keys to numbers.
            if problem.cache_dtype != problem.dtype and device.platform == "cuda":
                if width > 128:
                    sizes = sizes._replace(num_warps=8)
                elif _device_class(device) != "ampere":
                    sizes = sizes._replace(block_kv=64, num_stages=3)
        elif 128 < width <= 256 and rows_per_seq <= FEW_ROWS and _device_class(device) == "hopper":
            if problem.cache_dtype == problem.dtype != "float32":
                sizes = DECODE._replace(num_stages=THREE_STAGES)
                sizes = sizes if _leaves_cores(problem, device, DECODE.rows) else sizes._replace(rows=FEW_ROWS)
        elif current_policy() != "invariant" and _has_low_tiles(problem, device):
            low = LOW_TILES[0].rows
            lowest = device.cores / 2 <= _tiles(problem, low) or _leaves_cores(problem, device, low)  # else parts are short
            fitting = [each for each in LOW_TILES[not lowest :] if _tiles(problem, each.rows) <= device.cores]
            sizes = fitting[0] if fitting else sizes
        elif _share_columns(problem, device) and rows_per_seq >= LATENT.rows:
            sizes = LATENT
        elif sizes.rows > SHORT.rows and current_policy() != "invariant" and _has_few_keys(problem, device):
            prompts = problem.tokens_per_seq >= SHORT_CALL and problem.capacity <= PROMPT_TABLE
            sizes = SHORT_STEPS if prompts and _tiles(problem, SHORT.rows) > ROUNDS * device.cores else SHORT
        elif current_policy() != "invariant" and _is_lone_chunk(problem, device):
            sizes = LONE_CHUNK
        rows = min(sizes.rows, power_of_2(rows_per_seq))
        if rows == TALL_ROWS and current_policy() != "invariant" and _is_tall_step(problem, device):
            sizes = sizes._replace(block_kv=TALL_STEP)
        if rows < sizes.rows and width <= 128:
            sizes = sizes._replace(block_kv=min(sizes.block_kv, MOST_KEYS), num_warps=4)
        config = PrefillPageAttentionConfig(
            block_q=max(1, rows // problem.group),
            block_kv=sizes.block_kv,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
        return replace(config, num_splits=self.num_splits(problem, device, config))

    def candidates(self, problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
        """The heuristic sizes, then their neighbours that fit; what else does not fit fails to compile."""
        first = self.heuristic(problem, device)
        changes = [dict(num_stages=first.num_stages + more) for more in (-1, 1)]
        for factor in (0.5, 2):
            tile = dict(block_q=int(first.block_q * factor), num_warps=int(first.num_warps * factor))
            changes += [dict(block_q=tile["block_q"]), dict(block_kv=int(first.block_kv * factor))]
            changes += [tile | dict(block_kv=min(first.block_kv, MOST_KEYS)) if factor < 1 else tile]
        found = [first] + [replace(first, **change) for change in changes if 0 not in change.values()]
        sane = [c for c in found if c.num_warps in (4, 8) and c.block_kv >= 16 and c.num_stages > 1]
        fitting = [c for c in sane if self.misfit(problem, device, c) is None]
        return list(dict.fromkeys(replace(c, num_splits=self.num_splits(problem, device, c)) for c in fitting))

    def choices(self, problem: Problem, device: Device) -> dict[str, tuple[int, ...]]:
        """Those that shared memory holds; registers have room for the heuristic's warps."""
        return dict(block_q=(1, 2, 4, 8, 16, 32, 64, 128), block_kv=(16, 32, 64, 128), num_stages=(1, 2, 3, 4))

    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        """How a tile and its blocks of keys pass the shared memory, or None; also where that is not known before."""
        capacity = SHARED_KIB.get(capability(device)) if device.platform == "cuda" else None
        if capacity is None or problem.dtype == "float32":  # in float32 and on AMD, Triton lays it out in other ways
            return None
        needed = shared_bytes(problem, device, config)
        if needed <= capacity * 1024:
            return None
        return (
            f"cfg.block_q {config.block_q} (of {problem.group} heads of a group), block_kv {config.block_kv} and "
            f"num_stages {config.num_stages} need {needed} bytes of shared memory, more than the {capacity * 1024} of "
            f"{device.kind}"
        )

    def num_splits(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
        """The best by an estimate of their time; none under the policy "invariant"."""
        if current_policy() == "invariant":
            return 1
        unsplit = programs(problem, config)
        keys = most_keys(problem, config.block_q)
        few_rows = config.block_q * problem.group <= DECODE.rows
        warps, most = WARPS, keys // KEYS_PER_SPLIT if _may_split(problem, config) else 1
        single = min(problem.seqs, problem.tokens) == 1
        enough = 1 if single and not few_rows else 0.5  # all of a long chunk's tiles are long, and repay a merge
        if few_rows:
            if _is_short_step(problem, device, config.block_q * problem.group):
                warps, most = 2 * WARPS, min(most, SHORT_SPLITS)
            elif problem.cache_dtype != problem.dtype and config.num_warps == 4:
                # Fewer tiles turn numbers slower than memory brings them: here are as many as registers let into a core.
                # They are equally long, so that rounds tell.
                warps, enough = 2 * WARPS - 4 * ("slot_scales" in problem.features), math.inf
        # Where parts vary, short contexts in a short table have few of them: that does not have to be so of all.
        settled = single or problem.tokens_per_seq >= SHORT_CALL
        alone = _has_low_tiles(problem, device) or (settled and not few_rows and keys <= 2 * KEYS_OF_PROMPT)
        slots = device.cores if alone else _slots(problem, device, config, warps)
        rows = problem.tokens * problem.q_heads
        best = best_splits(problem, device, config, unsplit=unsplit, slots=slots, rows=rows, most=most, enough=enough)
        # Parts of one long context are equally long: then cores that have one more than others are waited for.
        filled = slots // unsplit
        evenly = single and few_rows and best < filled <= min(most, best * EVEN_PARTS)
        return filled if evenly else best

    def blocks(self, problem: Problem, config: PrefillPageAttentionConfig) -> int:
        """Tiles times splits."""
        return programs(problem, config) * config.num_splits

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses every size; block_q is rounded so that its rows are a power of 2: see `rows_of`."""
        from paged_prefill.lowering.triton.kernel import attend_tile

        problem, query = call.problem, call.query
        rows, block_kv = rows_of(problem, config), power_of_2(config.block_kv)
        parts = parts_of_tiles(problem, device, config)
        splits = parts.most
        schedule = schedule_of(call, rows, block_kv, parts, PIECES_OF_SEQUENCE * device.cores)
        pieces = most_pieces(problem.seqs, problem.tokens, problem.group, rows, parts)
        share_columns = _share_columns(problem, device, rows, config.num_warps)
        widths = Widths.of(problem, rows, share_columns)
        plain_masks = call.ranges is None and call.tree is None  # others take more registers
        all_masked = masks_every_block(problem, rows, block_kv, plain_masks)
        key_shares = _key_shares(problem, config, rows) if all_masked else 1
        # What all warps find together the compiler knows to be one number for all lanes, and so what follows from it. Then
        # fewer registers are taken and no branch is guarded, which tall tiles need more than a short start.
        if problem.cache_dtype == problem.dtype:
            tall = rows >= TALL_ROWS and widths.main > 64
        else:
            tall = _device_class(device) == "blackwell" and rows > FEW_ROWS and widths.value_parts > 1
        together = tall or (rows > DECODE.rows and _is_wide_latent(problem))
        # Splits are kept in float32 until a second kernel merges them: one whose last split does that needs counters,
        # which two calls at once would share, and is slower (benchmarks/results/triton.md).
        out_shape = (splits, problem.tokens, problem.q_heads, problem.value_dim)
        sinks = call.sinks if splits == 1 else None  # else the merge has them
        run = functools.partial(
            launch,
            attend_tile,
            results=(
                jax.ShapeDtypeStruct(out_shape, query.dtype if splits == 1 else jnp.float32),
                jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32),
            ),
            grid=(pieces * problem.num_kv_heads * widths.value_parts,),
            name="paged_prefill",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            INTERVALS=schedule.shape[1],
            INTERVALS_PADDED=power_of_2(schedule.shape[1], least=32 * config.num_warps if together else 16),
            ROWS=rows,
            BLOCK_KV=block_kv,
            EDGE_KV=block_kv if all_masked else power_of_2(block_kv // (2 if plain_masks else 4)),
            ALL_MASKED=all_masked,
            KEY_SHARES=key_shares,
            NUM_SPLITS=splits,
            SPLITS_PADDED=power_of_2(splits),
            PARTS_VARY=parts.vary,
            SUM_LAST=rows <= FEW_ROWS and key_shares == 1,
            LANES=LANES,
            SPREAD=config.num_warps if _spreads(problem, device, config, rows) else 0,
            FLOAT16_PRODUCTS=_float16_products(problem, device, rows),
            SHARE_COLUMNS=share_columns,
            # Where they are short. Others have enough, and their machine code came out slower for it.
            READ_AGAIN=parts.vary or (widths.main > 64 and (rows > DECODE.rows or problem.dtype == "float32")),
            SEQS_OF_PACK=None if sinks is None else problem.seqs // sinks.shape[0],
            **constants(call, widths),
        )
        inputs = [
            query,
            call.key_pages,
            call.key_pages if problem.layout.combined else call.value_pages,
            call.sequences.page_indices,
            schedule,
            call.kv_head_start,
            call.ranges,
            call.tree,
            *scales_of(call),
            sinks,
        ]
        inputs = [schedule if x is None else x for x in inputs]
        # Which GPU this is compiled for is known only where it is lowered.
        out, lse = jax.lax.platform_dependent(
            inputs,
            cuda=functools.partial(run, HARDWARE_TANH=True),
            default=functools.partial(run, HARDWARE_TANH=False),
        )
        if splits == 1:
            return out[0], lse[0]
        return merge(out, lse, query.dtype, call.sinks_of_rows(), device)


def rows_of(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Rows of a tile: those of all heads of a group for block_q tokens, or in a wide latent cache a token's in part."""
    rows = power_of_2(config.block_q * problem.group)
    # In 8 bits Hopper's registers hold more rows; where they do not, blocks are short too.
    fewer = _is_wide_latent(problem) and (problem.cache_dtype == problem.dtype or config.block_kv <= SHORT_BLOCK)
    return min(rows, LATENT.rows) if config.block_q == 1 and fewer else rows


def programs(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Programs that have work before keys are split, were the tokens spread evenly over the sequences."""
    return _tiles(problem, rows_of(problem, config))


def _tiles(problem: Problem, rows: int) -> int:
    tiles_per_seq = -(-problem.tokens_per_seq * problem.group // rows)
    return min(problem.seqs, problem.tokens) * tiles_per_seq * problem.num_kv_heads


def _leaves_cores(problem: Problem, device: Device, rows: int) -> bool:
    """Whether tiles so low have a core each with all the parts that may repay a merge: then none waits for another."""
    parts = max(1, most_keys(problem, rows // problem.group) // KEYS_PER_SPLIT)
    return _tiles(problem, rows) * parts <= device.cores


def _has_few_drafts(problem: Problem, device: Device) -> bool:
    """Whether drafts have so few tiles, though these are the lowest, that warps may have keys of their own as in decode."""
    drafts = 1 < problem.tokens_per_seq <= DRAFTS and problem.group <= DECODE.rows
    of_16_bits = problem.cache_dtype == problem.dtype != "float32"
    return drafts and of_16_bits and _of_narrow_heads(problem, device) and _tiles(problem, DECODE.rows) < device.cores // 8


def _is_tall_step(problem: Problem, device: Device) -> bool:
    """Whether a decode step has tall tiles of a large group: of narrow heads it waits for memory all the same."""
    narrow = max(problem.head_dim, problem.value_dim) <= 64 and problem.cache_dtype == problem.dtype
    return _device_class(device) == "hopper" and problem.tokens_per_seq == 1 and narrow


def _is_lone_chunk(problem: Problem, device: Device) -> bool:
    """Whether a chunk of wide heads has so few tiles that parts of lower ones fill the cores, with fewer results to merge."""
    of_16_bits = problem.cache_dtype == problem.dtype != "float32" and not {"key_ranges", "tree_mask"} & set(problem.features)
    wide = 128 < max(problem.head_dim, problem.value_dim) <= 256 and problem.tokens_per_seq * problem.group > FEW_ROWS
    single = min(problem.seqs, problem.tokens) == 1 and problem.capacity > KEYS_OF_PROMPT
    few = LONE_TILES * _tiles(problem, LONE_CHUNK.rows) <= device.cores
    return _device_class(device) == "hopper" and of_16_bits and wide and single and few


def _has_low_tiles(problem: Problem, device: Device) -> bool:
    """Whether prompts of wide heads have all keys of a table few, and none in 8 bits.

    On Hopper, since it is measured nowhere else. Then a merge costs more than most of the idle cores could save.
    """
    of_16_bits = problem.cache_dtype == problem.dtype != "float32"
    wide = 128 < max(problem.head_dim, problem.value_dim) <= 256
    prompt = problem.tokens_per_seq * problem.group > FEW_ROWS and problem.capacity <= KEYS_OF_PROMPT
    return _device_class(device) == "hopper" and of_16_bits and wide and prompt


def masks_every_block(problem: Problem, rows: int, block_kv: int, plain_masks: bool) -> bool:
    """Whether one loop masks all blocks, also those that every row sees, for the time that a second loop takes to begin.

    A mask of few rows takes few registers, but where keys are turned to numbers none are left, and ranges and trees take
    more; in float32 wide heads leave fewer for two loops of longer blocks, which compute for longer than a mask takes.
    """
    if problem.dtype == "float32" and not plain_masks:
        return max(problem.head_dim, problem.value_dim) > 128 and block_kv > SHORT_BLOCK
    return plain_masks and problem.cache_dtype == problem.dtype and rows <= FEW_ROWS


def _has_few_keys(problem: Problem, device: Device) -> bool:
    """Whether tiles see so few keys that their beginnings and ends take most of the time: two go on beside one another.

    So it is too where several sequences are short, whatever their table says: of a tall tile the last is half empty.

    Of other dims and on other GPUs that is not measured. Tiles of a large group would leave too many rows empty.
    """
    if not _of_narrow_heads(problem, device):
        return False
    few_keys = mean_keys(problem, SHORT.rows // problem.group) <= SHORT_KEYS or (
        problem.capacity <= 2 * KEYS_OF_PROMPT and _tiles(problem, SHORT.rows) <= device.cores
    )
    tiles = PROMPT_TILES if problem.capacity <= PROMPT_TABLE else SHORT_TILES
    short = problem.tokens_per_seq * problem.group <= tiles * SHORT.rows or _tiles(problem, TALL_ROWS) <= device.cores
    return 4 * problem.group <= SHORT.rows and (few_keys or (min(problem.seqs, problem.tokens) > 1 and short))


def _of_narrow_heads(problem: Problem, device: Device) -> bool:
    return _device_class(device) == "hopper" and max(problem.head_dim, problem.value_dim) <= 128


def _is_mixed(problem: Problem, device: Device) -> bool:
    """Whether a pack has as many tokens a sequence as a few prompts beside single tokens; if fewer, of many tiles.

    On Hopper, of heads up to 128: of wide ones, and of few drafts, low tiles are faster.
    """
    drafts = problem.tokens_per_seq <= (DRAFTS if _tiles(problem, DECODE.rows) <= ROUNDS * device.cores else DRAFTS // 2)
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
    return width <= 64 or (width <= 128 and _device_class(device) == "hopper" and several)


def _key_bytes(problem: Problem) -> int:
    return (problem.head_dim + problem.value_dim) * jnp.dtype(problem.cache_dtype).itemsize


def _slots(problem: Problem, device: Device, config: PrefillPageAttentionConfig, warps: int) -> int:
    """Tiles at work at a time, of so many warps a core."""
    capacity = SHARED_KIB.get(capability(device)) if device.platform == "cuda" else None
    fitting = max(1, capacity * 1024 // shared_bytes(problem, device, config)) if capacity else warps
    return device.cores * max(1, min(warps // config.num_warps, fitting))


def _is_short_step(problem: Problem, device: Device, rows: int) -> bool:
    """Whether cores wait for their first bytes more than for memory, were all contexts as long as the table."""
    keys = most_keys(problem, max(1, rows // problem.group))
    all_keys = min(problem.seqs, problem.tokens) * problem.num_kv_heads * keys * _key_bytes(problem)
    return all_keys < SHORT_BYTES * device.cores


def _may_split(problem: Problem, config: PrefillPageAttentionConfig) -> bool:
    """Whether parts of a full table would gain more than the merge costs where contexts are short."""
    few_rows = config.block_q * problem.group <= DECODE.rows or problem.tokens_per_seq <= DRAFTS
    wide = max(problem.head_dim, problem.value_dim) > 128
    return few_rows or wide or most_keys(problem, config.block_q) > KEYS_OF_PROMPT


def parts_of_tiles(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> Parts:
    """Of the keys of each tile; what splits and their merge cost is as in every kernel.

    Where parts vary a tile of few keys has fewer than `num_splits`: so many that none is longer than a long tile's.
    """
    if not _may_split(problem, config):
        return Parts(config.num_splits, config.num_splits)
    unsplit, rows = programs(problem, config), rows_of(problem, config)
    results = problem.tokens * problem.q_heads * problem.value_dim * 4
    # Of few contexts there are as few rows to merge.
    contexts = min(problem.seqs, problem.tokens) * problem.num_kv_heads
    few = device.cores // (8 if max(problem.head_dim, problem.value_dim) > 128 else 16)
    most = MOST_PARTS * (1 + (contexts <= few) + 2 * (contexts <= few // 4))
    most = min(most, 1 + MOST_ABSENT // max(unsplit, 1), max(1, RESULT_BYTES // results))
    slower = TALL_SLOWER if rows >= TALL_ROWS else 1
    # Packs of more tokens than drafts have are mixed: their long contexts are those of single tokens, which have fewer
    # tiles than `unsplit`. Where tiles are few a long one is felt more, and there are cores to spare for what parts cost.
    mixed = problem.tokens_per_seq > DRAFTS
    share = 1 if unsplit >= (4 if mixed else 2) * device.cores else 1 / 4
    if share < 1 and max(problem.head_dim, problem.value_dim) <= 256:
        # Of few tiles parts are short, of short steps of single tokens shortest; tall tiles take longer to begin and end.
        few_rows = 1 / 32 if problem.tokens_per_seq == 1 and _is_short_step(problem, device, rows) else 3 / 64
        share = max(1 / 16 if rows >= TALL_ROWS else few_rows, min(share, unsplit / (4 * device.cores)))
    part_bytes = int(LEAST_PART_BYTES * share)
    parts = parts_of(
        problem,
        device,
        config,
        unsplit=unsplit,
        slots=_slots(problem, device, config, WARPS if rows > DECODE.rows else 2 * WARPS),
        most=most,
        part_bytes=part_bytes,
        slower=slower,
    )
    # Prompts have parts too where one context as long as the table would take far longer than the merge of all.
    longest = most_keys(problem, config.block_q) * _key_bytes(problem) * slower
    repaid = problem.tokens_per_seq < SHORT_CALL or longest >= REPAID * (MERGE_BYTES + 2 * results / device.cores)
    if min(problem.seqs, problem.tokens) == 1 or not repaid or current_policy() == "invariant":
        return parts
    blocks = -(-most_keys(problem, config.block_q) // config.block_kv)
    of_part = min(-(-part_bytes // (config.block_kv * _key_bytes(problem) * slower)), -(-blocks // parts.least))
    # What a part's result takes, written and read, beside its keys.
    result_bytes = 8 * min(rows, problem.tokens_per_seq * problem.group) * problem.value_dim
    if share < 1 / 4 or (mixed and share < 1) or result_bytes <= part_bytes * MERGED_SHARE:
        if min(problem.seqs, problem.tokens) == 2 and not mixed:  # both may be long: each has one a core
            most = min(most, 2 * device.cores // unsplit)
        parts = replace(parts, most=max(parts.most, min(most, round(blocks / of_part))))
    return Parts(1, parts.most, of_part) if parts.most > 1 else parts


def _device_class(device: Device) -> str:
    if device.platform == "rocm":
        return "cdna"
    return {9: "hopper", 10: "blackwell"}.get(capability(device) // 10, "ampere")


def _share_columns(problem: Problem, device: Device, rows: int = 64, num_warps: int = 8) -> bool:
    """Whether warps share a product's columns: in a wide latent cache, on Hopper, of whose warps four take 64 rows.

    Then a tile's sums fit the registers of eight, and the first product is made once.
    """
    of_16_bits = problem.cache_dtype == problem.dtype
    return of_16_bits and _is_wide_latent(problem) and _device_class(device) == "hopper" and (rows, num_warps) == (64, 8)


def _is_wide_latent(problem: Problem) -> bool:
    return "latent" in problem.features and problem.value_dim > MOST_VALUES


def _key_shares(problem: Problem, config: PrefillPageAttentionConfig, rows: int) -> int:
    """How many warps share out a block's keys: all or one. Each needs registers for a tile's sums, and 16 keys."""
    sums = rows * power_of_2(max(problem.head_dim, problem.value_dim))
    fits = sums <= SUMS_OF_WARP and problem.dtype != "float32" and config.block_kv >= 16 * config.num_warps
    # A tanh of each share takes a warp longer than its share of all.
    return config.num_warps if fits and problem.capacity > FEW_KEYS and problem.attention.attn_logits_soft_cap is None else 1


def _float16_products(problem: Problem, device: Device, rows: int) -> bool:
    """Whether bfloat16 queries are multiplied in float16, with keys of float8: exact, since their numbers are float16's.

    NVIDIA's GPUs make float16 of float8_e4m3fn, and bfloat16 only of that: of few rows memory is the limit. Before
    compute capability 9.0 they make bfloat16 of float16 in no one instruction, which Triton 3.6 asks for all the same.
    """
    if problem.dtype != "bfloat16" or not problem.cache_dtype.startswith("float8") or device.platform == "rocm":
        return False
    return capability(device) < 90 or (rows <= DECODE.rows and problem.cache_dtype == "float8_e4m3fn")


def _spreads(problem: Problem, device: Device, config: PrefillPageAttentionConfig, rows: int) -> bool:
    """Whether warps take features of values by turns: of 8 bits, a lane then loads neighbours at once and not one by one.

    So it is where a product of few rows shares out its columns, on NVIDIA's GPUs over 8 lanes of each warp.
    """
    of_8_bits = problem.cache_dtype != problem.dtype and "latent" not in problem.features
    several = problem.value_dim > LANES * config.num_warps
    return of_8_bits and several and rows <= FEW_ROWS and device.platform != "rocm"


def shared_bytes(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
    """Shared memory that a launch in a 16-bit dtype takes at least, on an NVIDIA GPU."""
    rows, block_kv = rows_of(problem, config), power_of_2(config.block_kv)
    widths = Widths.of(problem, rows, _share_columns(problem, device, rows, config.num_warps))
    head_dim = widths.main + widths.other + widths.rest
    features = head_dim + (0 if "latent" in problem.features else widths.value)
    # In Hopper and data centres' Blackwell the matrix unit reads keys and values there, so that none of the blocks is in
    # registers; and those of a quantised cache are there twice, one block as it is multiplied.
    in_shared = _device_class(device) in ("hopper", "blackwell") and rows >= 64
    if problem.cache_dtype == problem.dtype:
        return 2 * rows * head_dim + 2 * (config.num_stages - (not in_shared)) * block_kv * features
    return 2 * rows * head_dim + (config.num_stages - 1 + 2 * in_shared) * block_kv * features
