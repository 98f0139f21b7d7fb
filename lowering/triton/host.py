"""The Triton lowering, through jax_triton: NVIDIA GPUs from compute capability 8.0, and AMD's.

(Pallas' own Triton back end is deprecated.) The kernel is in kernel.py; here are what it can run, its sizes,
and what goes around it: the schedule of tiles before, and the merge of splits after.

Rows that no sequence owns are intervals as sequences are, with a context of length 0: their tiles see no key, and so
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
    MOST_PARTS,
    best_splits,
    mean_keys,
    merge_splits,
    most_keys,
    parts_of,
)
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton.launch import capability, launch, reason_against
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

MAX_HEAD_DIM, MAX_VALUE_DIM = 576, 512
MAX_FLOAT32_DIM = 256  # whose products of six parts leave no registers for more
MOST_VALUES = 256  # features of a value that a program of a tall tile sums up


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
        _Sizes(128, 64, 8, 3), _Sizes(128, 32, 8, 3), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 8, 2), *2 * [_Sizes(16, 32, 4, 2)]
    ),
    "cdna": (
        _Sizes(128, 32, 4, 2), _Sizes(128, 32, 4, 2), _Sizes(64, 32, 8, 2), _Sizes(64, 16, 8, 2), _Sizes(64, 16, 8, 2),
        _Sizes(16, 16, 4, 2),
    ),
}  # fmt: skip
# For a few rows a sequence, where memory is the limit: of dims up to 128 on NVIDIA's GPUs, and of those beyond 256 or on
# AMD's, where Triton 3.6 does not compile more stages of scales.
DECODE, SHALLOW_DECODE = _Sizes(16, 32, 4, 4), _Sizes(16, 32, 4, 2)
LATENT = _Sizes(64, 64, 8, 2)  # of a wide latent cache on Hopper
# Shared memory of a thread block, by compute capability.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
WARPS = 8  # that keep a core busy: tiles of fewer warps share one
KEYS_PER_SPLIT = 128  # fewer do not repay the merge
KEYS_OF_PROMPT = 512  # in a table: prompts seldom fill it, and over fewer they are not split, but those of wide heads
SHORT = _Sizes(64, 64, 4, 3)  # of dims of 65 to 128 on Hopper, two to a core, where tiles see few keys
SHORT_KEYS = 768  # that are few, on average
MOST_KEYS = 64  # of a block, for fewer rows in four warps: with more they spill
# A decode step of fewer bytes of keys a core waits for them one after another more than for memory: then more tiles
# share a core, and the merge of more splits than so many would show.
SHORT_BYTES, SHORT_SPLITS = 2**19, 32
TALL_ROWS, TALL_SLOWER = 128, 2  # products of so many rows take as long as their keys and values, and come after them
MOST_ABSENT = 2**12  # parts that no tile has: their programs end at once, a thousand of them in a microsecond


class Triton(Kernel):
    """Takes head_dim up to 576 and value_dim up to 512, 256 in float32; needs Triton and a GPU that it compiles for."""

    name = "triton"
    version = 6
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
        rows_per_seq = problem.tokens_per_seq * problem.group
        if current_policy() == "invariant":
            rows_per_seq = sizes.rows
        if rows_per_seq <= DECODE.rows and problem.dtype != "float32" and not 128 < width <= 256:
            sizes = DECODE if width <= 128 and device.platform == "cuda" else SHALLOW_DECODE
            # As many bytes on their way, or registers to turn wide keys to numbers.
            if problem.cache_dtype != problem.dtype and device.platform == "cuda":
                if width > 128:
                    sizes = sizes._replace(num_warps=8)
                elif "slot_scales" in problem.features or problem.cache_dtype != "float8_e4m3fn":
                    # Blocks of 64 of that, with a scale a head, take the registers of a core's fourth tile.
                    sizes = sizes._replace(block_kv=64, num_stages=3)
        elif _share_columns(problem, device) and rows_per_seq >= LATENT.rows:
            sizes = LATENT
        elif sizes.rows > SHORT.rows and current_policy() != "invariant" and _has_few_keys(problem, device):
            sizes = SHORT
        rows = min(sizes.rows, _power_of_2(rows_per_seq))
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
        few_rows, wide = config.block_q * problem.group <= DECODE.rows, max(problem.head_dim, problem.value_dim) > 256
        worth = few_rows or wide or keys >= KEYS_OF_PROMPT
        warps, most, enough = WARPS, keys // KEYS_PER_SPLIT if worth else 1, 0.5
        key_bytes = (problem.head_dim + problem.value_dim) * jnp.dtype(problem.cache_dtype).itemsize
        all_keys = min(problem.seqs, problem.tokens) * problem.num_kv_heads * keys * key_bytes
        if few_rows:
            if all_keys < SHORT_BYTES * device.cores:
                warps, most = 2 * WARPS, min(most, SHORT_SPLITS)
            elif problem.cache_dtype != problem.dtype and config.num_warps == 4:
                # Fewer tiles turn numbers slower than memory brings them: here are as many as registers let into a core.
                # They are equally long, so that rounds tell.
                warps, enough = 2 * WARPS - 4 * ("slot_scales" in problem.features), math.inf
        slots = device.cores * max(1, warps // config.num_warps)
        rows = problem.tokens * problem.q_heads
        return best_splits(problem, device, config, unsplit=unsplit, slots=slots, rows=rows, most=most, enough=enough)

    def blocks(self, problem: Problem, config: PrefillPageAttentionConfig) -> int:
        """Tiles times splits."""
        return programs(problem, config) * config.num_splits

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses every size; block_q is rounded so that its rows are a power of 2: see `rows_of`."""
        from paged_prefill.lowering.triton.kernel import attend_tile

        problem, query = call.problem, call.query
        rows, block_kv = rows_of(problem, config), _power_of_2(config.block_kv)
        parts = parts_of_tiles(problem, device, config)
        splits = parts.most
        schedule = _schedule(call, rows, block_kv, parts)
        tiles = _most_tiles(schedule.shape[1], problem.tokens, problem.group, rows)
        share_columns = _share_columns(problem, device, rows, config.num_warps)
        widths = _Widths.of(problem, rows, share_columns)
        # Splits are kept in float32 until they are merged. By XLA: a kernel whose last split merges the others has to
        # have its counters zeroed before, which takes longer (benchmarks/results/triton.md).
        out_shape = (splits, problem.tokens, problem.q_heads, problem.value_dim)
        sinks = call.sinks if splits == 1 else None  # else the merge has them
        run = functools.partial(
            launch,
            attend_tile,
            results=(
                jax.ShapeDtypeStruct(out_shape, query.dtype if splits == 1 else jnp.float32),
                jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32),
            ),
            grid=(tiles * problem.num_kv_heads * splits * widths.value_parts,),
            name="paged_prefill",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            INTERVALS=schedule.shape[1],
            INTERVALS_PADDED=_power_of_2(schedule.shape[1]),
            ROWS=rows,
            BLOCK_KV=block_kv,
            # Masks of ranges and trees take more registers.
            EDGE_KV=_power_of_2(block_kv // (2 if call.ranges is None and call.tree is None else 4)),
            NUM_SPLITS=splits,
            SPLITS_PADDED=_power_of_2(splits),
            PARTS_VARY=parts.vary,
            FLOAT16_PRODUCTS=_float16_products(problem, device, rows),
            SHARE_COLUMNS=share_columns,
            # Where they are short. Others have enough, and their machine code came out slower for it.
            READ_AGAIN=parts.vary or (widths.main > 64 and (rows > DECODE.rows or problem.dtype == "float32")),
            SEQS_OF_PACK=None if sinks is None else problem.seqs // sinks.shape[0],
            **_constants(call, widths),
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
            *_scales_of(call),
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
        return merge_splits(out, lse, query.dtype, call.sinks_of_rows(), may_lack=parts.vary)


def rows_of(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Rows of a tile: those of all heads of a group for block_q tokens, or in a wide latent cache a token's in part."""
    rows = _power_of_2(config.block_q * problem.group)
    return min(rows, LATENT.rows) if config.block_q == 1 and _is_wide_latent(problem) else rows


def programs(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """Programs that have work before keys are split, were the tokens spread evenly over the sequences."""
    rows = rows_of(problem, config)
    tiles_per_seq = -(-problem.tokens_per_seq * problem.group // rows)
    return min(problem.seqs, problem.tokens) * tiles_per_seq * problem.num_kv_heads


def _has_few_keys(problem: Problem, device: Device) -> bool:
    """Whether tiles see so few keys that their beginnings and ends take most of the time: two go on beside one another.

    Of other dims and on other GPUs that is not measured. Tiles of a large group would leave too many rows empty.
    """
    if _device_class(device) != "hopper" or not 64 < max(problem.head_dim, problem.value_dim) <= 128:
        return False
    return 4 * problem.group <= SHORT.rows and mean_keys(problem, SHORT.rows // problem.group) <= SHORT_KEYS


def parts_of_tiles(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> Parts:
    """Of the keys of each tile; what splits and their merge cost is as in every kernel."""
    unsplit, rows = programs(problem, config), rows_of(problem, config)
    warps = WARPS if rows > DECODE.rows else 2 * WARPS
    return parts_of(
        problem,
        device,
        config,
        unsplit=unsplit,
        slots=device.cores * max(1, warps // config.num_warps),
        most=min(MOST_PARTS, 1 + MOST_ABSENT // max(unsplit, 1)),
        # Where tiles are few a long one is felt more, and there are cores to spare for what parts cost.
        part_bytes=LEAST_PART_BYTES // (4 if unsplit < 2 * device.cores else 1),
        slower=TALL_SLOWER if rows >= TALL_ROWS else 1,
    )


def _device_class(device: Device) -> str:
    if device.platform == "rocm":
        return "cdna"
    return {9: "hopper", 10: "blackwell"}.get(capability(device) // 10, "ampere")


def _share_columns(problem: Problem, device: Device, rows: int = 64, num_warps: int = 8) -> bool:
    """Whether warps share a product's columns: in a wide latent cache, on Hopper, of whose warps four take 64 rows.

    Then a tile's sums fit the registers of eight, and the first product is made once.
    """
    return _is_wide_latent(problem) and _device_class(device) == "hopper" and (rows, num_warps) == (64, 8)


def _is_wide_latent(problem: Problem) -> bool:
    latent = "latent" in problem.features and problem.cache_dtype == problem.dtype
    return latent and problem.value_dim > MOST_VALUES


def _float16_products(problem: Problem, device: Device, rows: int) -> bool:
    """Whether bfloat16 queries are multiplied in float16: where memory is the limit, with keys of float8_e4m3fn.

    NVIDIA's GPUs make float16 of such a number, exactly, and bfloat16 only of that.
    """
    of = (problem.dtype, problem.cache_dtype)
    return rows <= DECODE.rows and of == ("bfloat16", "float8_e4m3fn") and device.platform != "rocm"


def shared_bytes(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
    """Shared memory that a launch in a 16-bit dtype takes at least, on an NVIDIA GPU."""
    rows, block_kv = rows_of(problem, config), _power_of_2(config.block_kv)
    widths = _Widths.of(problem, rows, _share_columns(problem, device, rows, config.num_warps))
    head_dim = widths.main + widths.other + widths.rest
    features = head_dim + (0 if "latent" in problem.features else widths.value)
    # In Hopper and data centres' Blackwell the matrix unit reads keys and values there, so that none of the blocks is in
    # registers; and those of a quantised cache are there twice, one block as it is multiplied.
    in_shared = _device_class(device) in ("hopper", "blackwell") and rows >= 64
    if problem.cache_dtype == problem.dtype:
        return 2 * rows * head_dim + 2 * (config.num_stages - (not in_shared)) * block_kv * features
    return 2 * rows * head_dim + (config.num_stages - 1 + 2 * in_shared) * block_kv * features


class _Widths(NamedTuple):
    """The powers of two that features are laid out in.

    A head is in parts where one power of two would waste more. A tall tile's values are shared out over programs, each of
    which has MOST_VALUES: its sums have to stay in registers.
    """

    main: int
    other: int
    rest: int
    value: int
    value_parts: int

    @classmethod
    def of(cls, problem: Problem, rows: int, share_columns: bool) -> "_Widths":
        latent = "latent" in problem.features
        whole = _power_of_2(problem.head_dim)
        main, other, rest = whole // 2, 0, _power_of_2(problem.head_dim - whole // 2)
        # The values of a latent cache are the first part of its keys.
        if main < 16 or main + rest >= whole or (latent and problem.value_dim > main):
            main, rest = whole, 0
        if main == MAX_FLOAT32_DIM and problem.dtype == "float32" and not latent:
            main, other, rest = main // 2, main // 4, main // 4  # a product of all six parts at once would spill
        value = main if latent else _power_of_2(problem.value_dim)
        most = value if rows <= DECODE.rows else MOST_VALUES * (2 if share_columns else 1)
        parts = max(1, value // most)
        if parts > 1 and latent:
            main, other = most, main - most
        return cls(main, other, rest, value // parts, parts)


def _constants(call: Call, widths: _Widths) -> dict:
    """The kernel's compile-time constants that no configuration changes."""
    problem, attention = call.problem, call.problem.attention
    latent, rows, (key_scale, value_scale) = "latent" in problem.features, problem.rows, _scales_of(call)
    return dict(
        TOKENS=problem.tokens,
        SEQS=problem.seqs,
        PARTS_FIELD=PARTS_FIELD,
        POOL_FIELD=POOL_FIELD,
        KEY_POOL_FIELD=POOL_FIELD if call.key_pool is None else POOL_FIELD + 1,
        VALUE_POOL_FIELD=POOL_FIELD if call.value_pool is None else POOL_FIELD + 2,
        KV_HEADS=problem.num_kv_heads,
        GROUP=problem.group,
        CACHE_KV_HEADS=problem.cache_kv_heads,
        POOL_ROWS=rows["pool"],
        HEAD_ROWS=rows["kv_heads"],
        PAGE_ROWS=rows["num_pages"],
        SLOT_ROWS=rows["page_size"],
        VALUE_ROWS=rows.get("2", 0),
        PAGE_SIZE=problem.page_size,
        PAGES_PER_SEQ=problem.pages_per_seq,
        CAPACITY=problem.capacity,
        HEAD_DIM=problem.head_dim,
        HEAD_MAIN=widths.main,
        HEAD_OTHER=widths.other,
        HEAD_REST=widths.rest,
        VALUE_DIM=problem.value_dim,
        VALUE_WIDTH=widths.value,
        VALUE_PARTS=widths.value_parts,
        LATENT=latent,
        KEY_SCALE=_granularity(key_scale),
        VALUE_SCALE=_granularity(value_scale),
        RANGES=call.ranges is not None,
        TREE_WORDS=0 if call.tree is None else call.tree.shape[1],
        # The running maximum is taken before the scale, so the scale must be positive. A scale of 0 has the same
        # softmax as one too small to see.
        SCALE=max(abs(attention.softmax_scale), 1e-30),
        NEGATE=attention.softmax_scale < 0,
        SOFT_CAP=attention.attn_logits_soft_cap,
        WINDOW=attention.sliding_window,
        # float32 products as six of bfloat16, exact to 24 bits or so; other dtypes have but one way.
        PRECISION="bf16x6",
    )


def _scales_of(call: Call):
    """The scales of keys and of values, which may be one array."""
    problem = call.problem
    of_both = "latent" in problem.features or (problem.layout.combined and _granularity(call.key_scale) == "slot")
    return call.key_scale, call.key_scale if of_both else call.value_scale


def _granularity(scale) -> str:
    """What one of a call's scales is for, beside a pool; "one" for no scale."""
    return "one" if scale is None else {1: "tensor", 2: "head"}.get(scale.ndim, "slot")


PARTS_FIELD, POOL_FIELD = 4, 5  # of the schedule; pools of the caches apart follow


def _schedule(call: Call, rows: int, block_kv: int, parts: Parts):
    """int32 [6 or 8, 2 * seqs + 1]: first piece, start, length, context_len, parts and pool of sequences, then of gaps.

    A piece is a part of a tile, and the tiles of a sequence have the parts of its last. Pieces are numbered longest
    first, so that the last programs to start are short ones. The sequences must be in the order of their rows, as
    `call.flatten` gives them. Where caches have pools apart, those of the keys and of the values follow.
    """
    sequences, group = call.sequences, call.problem.group
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), sequences.start + sequences.length])
    gaps = jnp.concatenate([sequences.start, jnp.full(1, call.problem.tokens, jnp.int32)]) - ends
    nothing = jnp.zeros_like(gaps)
    pools = [sequences.pool]
    if call.key_pool is not None or call.value_pool is not None:
        pools += [sequences.pool if x is None else x for x in (call.key_pool, call.value_pool)]
    start, length, context_len, *pools = (
        jnp.concatenate(pair)
        for pair in (
            (sequences.start, ends),
            (sequences.length, gaps),
            (sequences.context_len, nothing),
            *((pool, nothing) for pool in pools),
        )
    )
    number = jnp.arange(len(start))
    num_tiles = (length * group + rows - 1) // rows
    num_parts, size = jnp.full_like(length, parts.most), context_len
    if parts.vary:
        seen_end = jnp.minimum(context_len, call.problem.capacity)
        last_tile = context_len - length + (num_tiles - 1) * rows // group
        seen_start = jnp.minimum(call.problem.attention.visible_keys(last_tile)[0], seen_end)
        blocks = (seen_end + block_kv - 1) // block_kv - seen_start // block_kv
        num_parts, size = parts.number(blocks), parts.share(blocks)
    longer = size[:, None] < size[None, :]
    before = longer | ((size[:, None] == size[None, :]) & (number[:, None] > number[None, :]))
    first_piece = jnp.sum(jnp.where(before, (num_tiles * num_parts)[None, :], 0), axis=1, dtype=jnp.int32)
    return jnp.stack([first_piece, start, length, context_len, num_parts, *pools])


def _most_tiles(intervals: int, tokens: int, group: int, rows: int) -> int:
    """An upper bound on the tiles of any partition of the tokens: each interval wastes less than one tile."""
    return (tokens * group + min(intervals, tokens) * (rows - 1)) // rows


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and at least 16, the smallest side of a matrix product."""
    return max(16, 1 << (n - 1).bit_length())
