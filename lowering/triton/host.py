"""The Triton lowering, through jax_triton: NVIDIA GPUs from compute capability 8.0, and AMD's.

(Pallas' own Triton back end is deprecated.) The kernel is in kernel.py; here are what it can run, its sizes,
and what goes around it: the schedule of tiles before, in schedule.py, and the merge of their parts after, in merge.py.

Tokens that no sequence owns are intervals as sequences are, with a context of length 0: their tiles see no key, and so
write 0 and -inf. A launch has as many programs as the most tiles that any pack of its shape could need.
"""

from dataclasses import replace
import functools

import jax
import jax.numpy as jnp

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton.constants import (
    MAX_FLOAT32_DIM,
    CacheLayout,
    CallSizes,
    ScheduleFields,
    Softmax,
    TileSizes,
    Widths,
    scales_of,
)
from paged_prefill.lowering.triton.launch import capability, launch, power_of_2, reason_against
from paged_prefill.lowering.triton.merge import merge
from paged_prefill.lowering.triton.parts import PIECES_OF_SEQUENCE, num_splits, parts_of_tiles
from paged_prefill.lowering.triton.schedule import POOL_FIELD, most_pieces, schedule_of
from paged_prefill.lowering.triton.sizes import (
    DECODE,
    FEW_ROWS,
    MOST_KEYS,
    SHARED_KIB,
    SHORT_BLOCK,
    TALL_ROWS,
    device_class,
    is_wide_latent,
    may_share_keys,
    programs,
    rows_of,
    share_columns,
    shared_bytes,
    tile_sizes,
)
from paged_prefill.primitive.config import PrefillPageAttentionConfig

MAX_HEAD_DIM, MAX_VALUE_DIM = 576, 512
SUMS_OF_WARP = 2**11  # of a tile, that the registers of one warp hold
LANES = 8  # of a warp, over which a product of few rows shares out its columns


class Triton(Kernel):
    """Takes head_dim up to 576 and value_dim up to 512, 256 in float32; needs Triton and a GPU that it compiles for."""

    name = "triton"
    version = 16
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
        """Sizes by device, dims and dtype; splits where the tiles would leave cores idle."""
        config = tile_sizes(problem, device)
        return replace(config, num_splits=self.num_splits(problem, device, config))

    def num_splits(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
        return num_splits(problem, device, config)

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
        tile = _tile(call, device, config, parts)
        # Splits are kept in float32 until a second kernel merges them: one whose last split does that needs counters,
        # which two calls at once would share, and is slower (benchmarks/results/triton.md).
        out_shape = (problem.tokens, problem.q_heads, splits, problem.value_dim)
        sinks = call.sinks if splits == 1 else None  # else the merge has them
        run = functools.partial(
            launch,
            attend_tile,
            results=(
                jax.ShapeDtypeStruct(out_shape, query.dtype if splits == 1 else jnp.float32),
                jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32),
            ),
            grid=(pieces * problem.num_kv_heads * tile.widths.value_parts,),
            name="paged_prefill",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            CALL=CallSizes.of(call, sinks),
            CACHE=CacheLayout.of(call),
            SOFTMAX=Softmax.of(call),
            SCHEDULE=_fields(call, config, parts, tile, schedule.shape[1], device),
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
            cuda=functools.partial(run, TILE=tile._replace(ptx=True)),
            default=functools.partial(run, TILE=tile),
        )
        if splits == 1:
            return out[:, :, 0], lse[:, :, 0]
        return merge(out, lse, query.dtype, call.sinks_of_rows(), device)


def _tile(call: Call, device: Device, config: PrefillPageAttentionConfig, parts: Parts) -> TileSizes:
    problem, rows, block_kv = call.problem, rows_of(call.problem, config), power_of_2(config.block_kv)
    shared = share_columns(problem, device, rows, config.num_warps)
    widths = Widths.of(problem, rows, shared)
    plain_masks = call.ranges is None and call.tree is None  # others take more registers
    key_shares = _key_shares(problem, config, rows)
    all_masked = masks_every_block(problem, rows, block_kv, key_shares)
    return TileSizes(
        rows=rows,
        block_kv=block_kv,
        edge_kv=block_kv if all_masked else power_of_2(block_kv // (2 if plain_masks else 4)),
        widths=widths,
        all_masked=all_masked,
        replace_hidden=all_masked and call.tree is None,
        key_shares=key_shares,
        sum_last=rows <= FEW_ROWS and key_shares == 1 and not _sums_each_step(problem, device),
        lanes=LANES,
        spread=config.num_warps // key_shares if _spreads(problem, device, config, rows) else 0,
        float16_products=_float16_products(problem, device, rows),
        share_columns=shared,
        # Where they are short. Others have enough, and their machine code came out slower for it.
        read_again=parts.vary or (widths.main > 64 and (rows > DECODE.rows or problem.dtype == "float32")),
        ptx=False,
    )


def _fields(call, config, parts, tile, intervals, device) -> ScheduleFields:
    # What all warps find together the compiler knows to be one number for all lanes, and so what follows from it. Then
    # fewer registers are taken and no branch is guarded, which tall tiles need more than a short start.
    problem, rows = call.problem, tile.rows
    if problem.cache_dtype == problem.dtype:
        tall = rows >= TALL_ROWS and tile.widths.main > 64
    else:
        tall = device_class(device) == "blackwell" and rows > FEW_ROWS and tile.widths.value_parts > 1
    together = tall or (rows > DECODE.rows and is_wide_latent(problem))
    return ScheduleFields(
        intervals=intervals,
        intervals_padded=power_of_2(intervals, least=32 * config.num_warps if together else 16),
        most_parts=parts.most,
        most_parts_padded=power_of_2(parts.most),
        parts_vary=parts.vary,
        key_pool_field=POOL_FIELD if call.key_pool is None else POOL_FIELD + 1,
        value_pool_field=POOL_FIELD if call.value_pool is None else POOL_FIELD + 2,
    )


def masks_every_block(problem: Problem, rows: int, block_kv: int, key_shares: int) -> bool:
    """Whether one loop masks all blocks, also those that every row sees: a second loop takes time to begin.

    A mask of few rows takes few registers, but a tree's takes more, and where keys are turned to numbers none are left
    but to warps with keys of their own; in float32 wide heads leave fewer for two loops of longer blocks, which compute
    for longer than a mask takes.
    """
    if problem.dtype == "float32" and {"key_ranges", "tree_mask"} & set(problem.features):
        return max(problem.head_dim, problem.value_dim) > 128 and block_kv > SHORT_BLOCK
    few = rows <= FEW_ROWS and "tree_mask" not in problem.features
    return few and (problem.cache_dtype == problem.dtype or key_shares > 1)


def _key_shares(problem: Problem, config: PrefillPageAttentionConfig, rows: int) -> int:
    """How many warps share out a block's keys: all or one. Each needs registers for a tile's sums, and 16 keys."""
    sums = rows * power_of_2(max(problem.head_dim, problem.value_dim))
    fits = rows <= FEW_ROWS and sums <= SUMS_OF_WARP and config.block_kv >= 16 * config.num_warps
    return config.num_warps if fits and problem.dtype != "float32" and may_share_keys(problem) else 1


def _sums_each_step(problem: Problem, device: Device) -> bool:
    """Whether products of six parts, of wide heads in float32, leave no registers for weights that are not summed yet.

    On Hopper they do, but beside a tree, and sums over warps in each step would take 1% more.
    """
    wide = problem.dtype == "float32" and max(problem.head_dim, problem.value_dim) > 128
    return wide and (device_class(device) != "hopper" or "tree_mask" in problem.features)


def _float16_products(problem: Problem, device: Device, rows: int) -> bool:
    """Whether bfloat16 queries are multiplied in float16, with keys of 8 bits, whose numbers are float16's as they are.

    NVIDIA's GPUs make float16 of 8 bits in fewer instructions than bfloat16, which bind a tile of few rows. Before
    compute capability 9.0 they make bfloat16 of float16 in no one instruction, which Triton 3.6 asks for all the same.
    From 10.0 on some make bfloat16 of float8_e4m3fn at once, by an instruction of newer PTX than `launch.PTX_VERSION`,
    for which Triton 3.9 asks.
    """
    if problem.dtype != "bfloat16" or problem.cache_dtype == problem.dtype or device.platform == "rocm":
        return False
    old = capability(device) < 90 and problem.cache_dtype.startswith("float8")
    new = capability(device) >= 100 and problem.cache_dtype == "float8_e4m3fn"
    return rows <= DECODE.rows or old or new


def _spreads(problem: Problem, device: Device, config: PrefillPageAttentionConfig, rows: int) -> bool:
    """Whether warps take features of values by turns: of 8 bits, a lane then loads neighbours at once.

    So it is where a product of few rows shares out its columns, on NVIDIA's GPUs over 8 lanes of each warp.
    """
    of_8_bits = problem.cache_dtype != problem.dtype and "latent" not in problem.features
    several = problem.value_dim > LANES * config.num_warps
    return of_8_bits and several and rows <= FEW_ROWS and device.platform != "rocm"
