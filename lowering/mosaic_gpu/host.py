"""The Hopper kernel, in Pallas Mosaic GPU: pages by TMA, wgmma, and warpgroups that take turns on the tensor cores.

One launch serves the whole pack; what a thread block does is in hopper/kernel.py. Here is what the rest of lowering/
calls: which problems it supports, the sizes it runs with, and the call itself. The words are those of hopper/__init__.py.
"""

from dataclasses import replace
import functools
import math

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem, granularity
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.mosaic_gpu.deal import MOST_DRAFTED
from paged_prefill.lowering.mosaic_gpu.hopper.kernel import launch
from paged_prefill.lowering.mosaic_gpu.hopper.merge import Launch as Merging, merge
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_COLUMNS, WARPGROUP_ROWS, Plan, are_gathered
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, LEAST_COLUMNS
from paged_prefill.lowering.mosaic_gpu.hopper.widen import QUANTISED
from paged_prefill.lowering.mosaic_gpu.parts import MOST_IN_LARGE_CLUSTER, exchange_fits, in_cluster, last_merges
from paged_prefill.lowering.mosaic_gpu.parts import merged_in_cluster, merges_in_cluster, parts_of_tiles
from paged_prefill.lowering.mosaic_gpu.room import SHARED_BYTES, few_rows, fewest_stages
from paged_prefill.lowering.mosaic_gpu.room import heads_of_fewest_tiles, heads_of_prompts, is_latent, is_quantised, keys_of_prompts
from paged_prefill.lowering.mosaic_gpu.room import keys_of_tiles, programs, reads_bytes, rows_of, shared_bytes, shares_rows, teams_of
from paged_prefill.lowering.mosaic_gpu.room import tiles_of_packs, two_share_rows, warpgroups_of
from paged_prefill.lowering.mosaic_gpu.rounds import CHAIN, THREE_WARPGROUPS, cycles, has_mates, rows_together
from paged_prefill.lowering.mosaic_gpu.scheduling import schedule_of
from paged_prefill.lowering.mosaic_gpu.widening import behind_widening, caches_of, scales_of, widened_call
from paged_prefill.lowering.splits import LEAST_PART_BYTES, MOST_PARTS, best_splits, bytes_of_key, mean_keys
from paged_prefill.lowering.splits import merge_splits, most_keys
from paged_prefill.lowering.tiles import Parts, tiles_at_most
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy
from paged_prefill.primitive.layout import LAYOUTS

MOST_STAGES = {1: 4, 2: 4, 3: 5, 4: 5}  # by the number of computing warpgroups
MOST_QUANTISED_STAGES = 6  # of half the bytes
MERGED_BYTES = 2**16  # the fewest of a part that a cluster merges, in 16 bits: a single block takes no longer with fewer
STAGES_OF_A_PART = 2  # where keys are split, a part has few blocks: more in flight only make it start later
ROUNDS = 4  # of tiles over the cores: from so many on three warpgroups are considered
MOST_HEAD_DIM, MOST_VALUE_DIM = 576, 512
WIDE = f"a latent cache or a head_dim or value_dim above {WARPGROUP_COLUMNS}"  # of which two warpgroups share rows
# The most rows of a tile of several tokens whose products are transposed (hopper/few_rows.py): so they are 1 to 30% faster,
# and with 32 rows up to 10% slower.
MOST_ROWS_OF_TOKENS = 16
FEATURES_OF_MASKED_STEPS = frozenset({"key_ranges", "tree_mask", "quantised"})  # with which steps follow a tile's height
FEW_TOKENS = 16  # new tokens of each sequence: with fewer they are no prompts
# Of more, all but one sequence may have one, and that one a prompt. Were it so, tiles of few rows are left from so many times
# the reads of its keys on that tiles of 64 rows have.
MOST_READS = 1.15
SHORT = 768  # the most keys that tiles of short prompts see on average: with as many, two teams gain 1%
LONGEST_SHORT_PART = 1024  # keys of a lone chunk's parts: with as many 19% are gained, with twice as many 6% are lost
MOST_CORES = 1.5  # tiles of decode steps for each core: from so many on, two teams a thread block are considered
# How many times the rows of two warpgroups three and four compute in the same time, where all tiles have work: 1.02 to 1.06
# and 1.13 to 1.16 were measured.
FASTER = {3: 1.04, 4: 1.15}
# Bounds of value_dim / 2 + block_kv, by warpgroups: a thread holds its share of the output, a block's logits, and weights of
# half their size.
MOST_REGISTERS = {3: 128, 4: 96}
MOST_EMPTY = 1.02  # how many times the rows other tiles may have, empty ones counted, to be preferred
# Keys that tiles see on average: from so many on, three warpgroups are considered where the pieces of two would be a chain;
# and tiles of one wide head in place of two.
MANY, LONG = 1100, 4096


class MosaicGpu(Kernel):
    """Where the device is not known, it is taken to be a Hopper GPU."""

    name = "mosaic_gpu"
    version = 27
    platforms = ("cuda",)
    features = frozenset(
        {"key_ranges", "latent", "quantised", "slot_scales", "tree_mask"} | ({*LAYOUTS} & {*FEATURES})
    )
    invariant = True

    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        if device.compute_capability not in (None, "9.0"):
            return f"needs compute capability 9.0 (H100, H200), the device has {device.compute_capability}"
        if problem.dtype not in ("bfloat16", "float16"):
            return f"takes bfloat16 and float16, not {problem.dtype}"
        if is_quantised(problem) and problem.cache_dtype not in QUANTISED:
            return f"takes caches in the query's dtype and in {', '.join(QUANTISED)}, not in {problem.cache_dtype}"
        # Numbers are widened in parts of 64 columns. Where two warpgroups share an output, each has an equal share of its parts.
        parts, shares, where = LEAST_COLUMNS, 1, ""
        if is_quantised(problem):
            parts, where = COLUMNS, " with caches that are quantised"
        if shares_rows(problem):
            parts, shares, where = COLUMNS, 2, f" with {WIDE}"
        for name, size, multiple, most in (
            ("head_dim", problem.head_dim, parts, MOST_HEAD_DIM),
            ("value_dim", problem.value_dim, shares * parts, MOST_VALUE_DIM),
        ):
            if size % multiple or not 0 < size <= most:
                return f"takes a {name} of a multiple of {multiple} up to {most}{where}, not {size}"
        if _block_kv(problem) is None:
            return f"takes a page_size of 8, 16, 32 or a multiple of 64 in {problem.cache_dtype}, not {problem.page_size}"
        rows = problem.pools * problem.rows["pool"]
        if rows >= 2**31:
            return f"a cache may have at most {2**31 - 1} rows, a slot of each head and pool, got {rows}"
        return None

    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """Sizes from the shape and the chip; measured in benchmarks/results."""
        return self._heuristic(problem, device)

    def complete(self, problem: Problem, device: Device, chosen: PrefillPageAttentionConfig) -> PrefillPageAttentionConfig:
        return chosen.over(self._heuristic(problem, device, widens=not chosen.fp8_terms))

    def _heuristic(self, problem: Problem, device: Device, widens=True) -> PrefillPageAttentionConfig:
        """`widens` says whether quantised caches are widened, and not multiplied as they are."""
        problem = behind_widening(problem, not widens)
        if current_policy() == "invariant":
            return _for_any_pack(problem)
        more, config = _with_more_warpgroups(problem), _with_at_most_two(problem, widens)
        config = _for_a_prompt_too(problem, device, config) or config
        teams = _with_teams(problem, config)
        short = _has_short_prompts(problem)
        apart = widens and (short or self._has_short_parts(problem, device, config))
        small = _with_one_warpgroup(problem, device) if apart else None
        many = teams is not None and _has_many_steps(problem, device, config)
        if teams is not None and (many or short):
            config = more if _fills_four_warpgroups(problem, device, more, teams) else teams
            if many and not reads_bytes(problem, config):  # memory serves fewer copies at a time 1 to 2% faster
                config = replace(config, num_stages=2 + are_gathered(problem.page_size, config.block_kv))
        elif small is not None:
            config = small
        elif more is not None and _ends_sooner(problem, device, more, config, widens and is_quantised(problem)):
            config = more
        else:
            config = _with_one_head(problem, device, config) or config
        few = STAGES_OF_A_PART * (2 if is_quantised(problem) else 1)
        few += are_gathered(problem.page_size, config.block_kv)  # one is waited for before the next is asked for
        of_parts = replace(config, num_stages=min(config.num_stages, few))
        of_parts = replace(of_parts, num_splits=self.num_splits(problem, device, of_parts))
        if of_parts.num_splits == 1:
            return replace(config, num_splits=1)
        if of_parts.block_kv > 64 and not is_quantised(problem) and not merges_in_cluster(problem, device, of_parts):
            # Where there is no cluster for each large block, smaller ones may suit those that there are.
            small = replace(of_parts, block_kv=64, num_stages=STAGES_OF_A_PART + 1)
            small = replace(small, num_splits=self.num_splits(problem, device, small))
            if merges_in_cluster(problem, device, small):
                return small
        return of_parts

    def _has_short_parts(self, problem: Problem, device: Device, two: PrefillPageAttentionConfig) -> bool:
        """Whether chunks have so few rows that even tiles of one warpgroup are cut into short parts.

        Then those of two, which have twice as many rows, would be cut into twice as many, and more were merged.
        """
        plain = FEATURES_OF_MASKED_STEPS.isdisjoint(problem.features) and warpgroups_of(two) == 2  # others are not measured
        if problem.tokens_per_seq <= MOST_DRAFTED or not plain:  # nor are drafts
            return False
        one = _with_one_warpgroup(problem, device)
        if one is None:
            return False
        one = replace(one, num_stages=min(one.num_stages, STAGES_OF_A_PART))
        splits = self.num_splits(problem, device, one)
        return splits > 1 and mean_keys(problem, one.block_q) <= LONGEST_SHORT_PART * splits

    def candidates(self, problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
        """The heuristic sizes first, then their neighbours: other stages, heads, blocks and warpgroups."""
        first = self.heuristic(problem, device)
        problem = behind_widening(problem)
        rows = rows_of(problem, first)
        changes = [dict(num_stages=max(first.num_stages + more, 1)) for more in (-1, 1)]
        tokens = (2 * first.block_q, 4 * first.block_q) if first.block_q < 8 or shares_rows(problem) else (rows, rows // 2)
        changes += [dict(block_q=block_q) for block_q in tokens]
        found = [first] + [replace(first, **change) for change in changes]
        found += [_sized(problem, first.block_q, 64, warpgroups_of(first))]
        if problem.tokens_per_seq >= 3 * WARPGROUP_ROWS and not shares_rows(problem):
            found += [_with_at_most_two(problem), _with_more_warpgroups(problem)]
        found += [_with_teams(problem, _with_at_most_two(problem))]
        near = [c for c in found if c is not None and 1 / 2 <= c.num_warps / first.num_warps <= 2]
        near = [c for c in near if first.block_q <= 4 * c.block_q]
        fitting = [c for c in near if self.misfit(problem, device, c) is None]
        return list(dict.fromkeys(replace(c, num_splits=self.num_splits(problem, device, c)) for c in fitting))

    def choices(self, problem: Problem, device: Device) -> dict[str, tuple[int, ...]]:
        """Tiles of whole slabs, and what fits them."""
        tiles = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
        stages = range(MOST_QUANTISED_STAGES, 0, -1)
        return dict(block_q=tiles, block_kv=(64, 128), num_warps=(8, 12, 16, 20), num_stages=tuple(stages))

    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        problem = behind_widening(problem, config.fp8_terms)
        if two_share_rows(problem, config) and config.num_warps != 12:
            return f"cfg.num_warps must be 12 (4 of them load) with {WIDE}, got {config.num_warps}"
        if config.num_warps not in (8, 12, 16, 20):
            return f"cfg.num_warps must be 8, 12, 16 or 20 (4 of them load), got {config.num_warps}"
        if config.num_warps == 20 and is_quantised(problem):
            return "cfg.num_warps 20 has no registers for caches that are quantised"
        rows = rows_of(problem, config)
        whole = config.block_q % WARPGROUP_ROWS == 0 or WARPGROUP_ROWS % config.block_q == 0
        if config.block_q < 1 or rows % config.block_q or not whole:
            slabs = f"{rows} rows into slabs of 8, 16, 32 or multiples of 64"
            return f"cfg.block_q must divide {slabs}, got {config.block_q}"
        spare = rows > WARPGROUP_ROWS or rows // config.block_q >= 2 * problem.group
        if config.block_q < 8 and spare and few_rows(problem, config) is None:
            takes = f"where {WARPGROUP_ROWS} rows / block_q are fewer than twice the heads of a group"
            return f"cfg.block_q must be at least 8, or 1, 2 or 4 {takes}, got {config.block_q}"
        page, block = problem.page_size, config.block_kv
        if shares_rows(problem) and block != 64:
            return f"cfg.block_kv must be 64 with {WIDE}, got {block}"
        if block not in (64, 128) or (is_quantised(problem) and page % block and block % page):
            fits = f", and a multiple or a divisor of page_size {page}" if is_quantised(problem) else ""
            return f"cfg.block_kv must be 64 or 128{fits}, got {block}"
        most = MOST_REGISTERS.get(warpgroups_of(config), math.inf)
        if problem.value_dim // 2 + block > most:
            return (
                f"cfg.num_warps {config.num_warps} has registers for value_dim / 2 + cfg.block_kv of at most {most}, got "
                f"value_dim {problem.value_dim} and cfg.block_kv {block}"
            )
        if config.fp8_terms and (wrong := _reason_against_fp8(problem)):
            return f"cfg.fp8_terms is for caches in float8_e4m3fn, got {config.fp8_terms} with {wrong}"
        fewest = fewest_stages(problem)
        if config.num_stages < fewest or shared_bytes(problem, config) > SHARED_BYTES:
            return f"cfg.num_stages must be at least {fewest} and fit the shared memory, got {config.num_stages}"
        return None

    def num_splits(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
        """The best by an estimate of their time; a core has room for one thread block."""
        if current_policy() == "invariant":
            return 1
        problem = behind_widening(problem, config.fp8_terms)
        most = most_keys(problem, config.block_q) // config.block_kv
        unsplit, rows = programs(problem, config), problem.tokens * problem.q_heads
        # Of latent caches, tiles wait for their own steps as much as for memory: fewer parts, that a cluster merges, are slower.
        numbers = () if is_latent(problem) else range(2, min(most, MOST_IN_LARGE_CLUSTER) + 1)
        clusters = frozenset(n for n in numbers if in_cluster(problem, device, config, n))
        sizes = dict(unsplit=unsplit, slots=device.cores, rows=rows, most=most)
        splits, of_round = best_splits(problem, device, config, **sizes, in_cluster=clusters), device.cores // unsplit
        # Where parts of a single context are long, more of them cost nothing, and cores without any could load.
        long = most_keys(problem, config.block_q) * bytes_of_key(problem) >= of_round * LEAST_PART_BYTES
        alone = min(problem.seqs, problem.tokens) == 1 and 1 < splits < of_round <= MOST_PARTS
        return of_round if alone and long else splits

    def blocks(self, problem: Problem, config: PrefillPageAttentionConfig) -> int:
        """Tiles times splits."""
        return programs(behind_widening(problem, config.fp8_terms), config) * config.num_splits

    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Uses block_q, block_kv, num_warps (of which 4 load), num_stages and num_splits."""
        call = widened_call(call, config.fp8_terms)
        problem, query = call.problem, call.query
        plan = _plan(call, config, device)
        # The caches as plain matrices of whole slots: a copy's place in them is a row, which fits 32 bits, and a column
        # where heads lie behind the slots.
        caches = [x.reshape(-1, plan.slot_rows * x.shape[-1]) for x in caches_of(call)]
        optional = dict(ranges=call.ranges)
        optional["tree"] = None if call.tree is None else lax.bitcast_convert_type(call.tree, jnp.int32)
        optional["sinks"] = call.sinks
        optional["key_scale"], optional["value_scale"] = scales_of(call)
        optional = {name: array for name, array in optional.items() if array is not None}
        table, *schedule = schedule_of(call, plan)
        *final, out, lse = launch(plan, [table, *schedule], query, caches, optional)
        if final:
            out, lse = merge(_merging(problem, plan), table, (out, lse), *final)
        splits = 1 if plan.final_beside_parts else plan.results
        lse = lse.reshape(splits, problem.q_heads, problem.tokens)
        out = out.reshape(splits, problem.tokens, problem.q_heads, problem.value_dim)
        return merge_splits(out, lse, query.dtype, by_head=True) if splits > 1 else (out[0], lse[0].T)


def _merging(problem: Problem, plan: Plan) -> Merging:
    return Merging(
        cores=plan.cores,
        tiles=plan.tiles,
        rows=plan.rows_of_table,
        columns=plan.columns,
        tokens=plan.tokens,
        tokens_of_tile=min(plan.block_q, problem.tokens_per_seq),
        q_heads=plan.q_heads,
        value_dim=plan.value_dim,
        most=plan.splits,
    )


def _plan(call: Call, config: PrefillPageAttentionConfig, device: Device) -> Plan:
    problem, parts = call.problem, parts_of_tiles(call.problem, device, config)
    clusters = merged_in_cluster(problem, device, config, parts)
    if clusters:
        block_bytes = 2 * config.block_kv * (problem.head_dim + (0 if is_latent(problem) else problem.value_dim))
        parts = replace(parts, fewest=max(MERGED_BYTES // block_bytes, 1))
    key_scale, value_scale = map(granularity, scales_of(call))
    return Plan(
        cores=device.cores,
        group=problem.group,
        num_kv_heads=problem.num_kv_heads,
        cache_kv_heads=problem.cache_kv_heads,
        seqs_of_pack=problem.seqs // (1 if call.sinks is None else call.sinks.shape[0]),
        seqs_of_pool=1 if call.indices is None else problem.seqs // call.indices.pools.shape[0],
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        page_size=problem.page_size,
        tokens=problem.tokens,
        tiles=tiles_at_most(problem.tokens, problem.seqs, config.block_q),
        num_pages=problem.num_pages,
        pages_per_seq=problem.pages_per_seq,
        pools=problem.pools,
        pool_rows=problem.rows["pool"],
        head_rows=problem.rows["kv_heads"],
        page_rows=problem.rows["num_pages"],
        slot_rows=problem.rows["page_size"],
        value_rows=problem.rows.get("2", 0),
        rows=rows_of(problem, config),
        block_q=config.block_q,
        block_kv=config.block_kv,
        warpgroups=warpgroups_of(config),
        teams=1 if clusters else teams_of(problem, config),
        stages=config.num_stages,
        parts=parts,
        clusters=clusters,
        last_merges=not clusters and last_merges(problem, device, config, parts),
        exchanges_in_blocks=clusters and not exchange_fits(problem, config, parts.most),
        softmax_scale=problem.attention.softmax_scale,
        soft_cap=problem.attention.attn_logits_soft_cap,
        window=problem.attention.sliding_window,
        has_ranges=call.ranges is not None,
        tree_words=0 if call.tree is None else call.tree.shape[1],
        latent="latent" in problem.features,
        dtype=problem.dtype,
        cache_dtype=problem.cache_dtype,
        key_scale=key_scale,
        value_scale=value_scale,
        fp8_terms=config.fp8_terms or 0,
        mates=parts == Parts() and has_mates(problem, config, device.cores),
        rows_together=rows_together(problem, config, device.cores) if parts == Parts() else 1,
    )


def _block_kv(problem: Problem) -> int | None:
    """The largest block of keys that is made of whole pages or divides one; else what 16 bits can be gathered to."""
    largest = 128 if max(problem.head_dim, problem.value_dim) <= 128 else 64
    page = problem.page_size
    fits = [b for b in (64, largest) if page % 8 == 0 and (b % page == 0 or page % b == 0)]
    return max(fits, default=None if is_quantised(problem) else largest)


def _with_at_most_two(problem: Problem, widens=True) -> PrefillPageAttentionConfig:
    """Few rows take no 8-bit products (`widens` as in `_heuristic`)."""
    tokens_per_seq, block_kv = problem.tokens_per_seq, _block_kv(problem)
    if problem.longest <= 64 or shares_rows(problem):  # a larger block would be half empty, or has no room
        block_kv = 64
    together = pl.next_power_of_2(tokens_per_seq)
    if together > 1 and not _has_heads_for_slabs(problem):
        together = max(8, together)
    rows = few_rows(problem, few := _sized(problem, together, block_kv, 1))
    if widens and rows is not None and (together == 1 or rows <= MOST_ROWS_OF_TOKENS):
        return few
    if shares_rows(problem):
        return _for_wide(problem)
    warpgroups = _most_warpgroups(problem)
    heads = min(pl.next_power_of_2(problem.group), WARPGROUP_ROWS // pl.next_power_of_2(tokens_per_seq))
    if heads >= 16 and problem.group > 8:  # those of a token lie together, and few rows are empty
        heads, warpgroups = heads_of_fewest_tiles(problem), 1
    elif tokens_per_seq < WARPGROUP_ROWS:  # pack a group's heads into the tile
        heads = min(16, pl.next_power_of_2(problem.group))
        rows = heads * max(8, pl.next_power_of_2(tokens_per_seq))
        # Steps beside a prompt leave most rows empty, and a second warpgroup would widen as much with fewer warps.
        few = rows <= WARPGROUP_ROWS or (is_quantised(problem) and widens and tokens_per_seq < FEW_TOKENS)
        warpgroups = 1 if few else warpgroups
    else:
        heads = heads_of_prompts(problem, block_kv)
    return _sized(problem, warpgroups * WARPGROUP_ROWS // heads, block_kv, warpgroups)


def _has_heads_for_slabs(problem: Problem) -> bool:
    """Whether tiles may have fewer than 8 tokens of several: the heads of one are 8 rows, and that is faster.

    Heads of up to 256 features in 16 bits are as fast by 8 tokens, of which most may be empty: memory binds. And where
    sequences cannot all have as many tokens, one may be a prompt, whose keys more tiles would read.
    """
    if is_latent(problem):
        return True
    alike = problem.tokens == problem.seqs * problem.tokens_per_seq
    return alike and problem.group > 4 and (is_quantised(problem) or shares_rows(problem))


def _for_a_prompt_too(problem: Problem, device: Device, few: PrefillPageAttentionConfig):
    """Tiles of 64 rows in place of few, where these would read a prompt's keys many times, and else None.

    With tiles for all cores, memory binds, and sequences of as many tokens each take as long by either.
    """
    if few_rows(problem, few) is None or problem.tokens_per_seq <= MOST_DRAFTED or programs(problem, few) < device.cores:
        return None
    if shares_rows(problem) or not FEATURES_OF_MASKED_STEPS.isdisjoint(problem.features):  # others are not measured
        return None
    tall = _sized(problem, WARPGROUP_ROWS // pl.next_power_of_2(problem.group), 64, 1)
    reads, fewer = (tiles_of_packs(problem, each.block_q)[1] for each in (few, tall))
    return None if reads < MOST_READS * fewer else _with_teams(problem, tall) or tall


def _for_any_pack(problem: Problem) -> PrefillPageAttentionConfig:
    """All heads of a group in a tile, and as many tokens as have room: that suits chunks and single tokens alike. Where
    tiles of any height move no bit (scheduling.WHOLE_OF), single tokens have one warpgroup, and prompts fewer heads.
    """
    if shares_rows(problem):
        return replace(_for_wide(replace(problem, tokens=problem.seqs)), num_splits=1)
    heads, block_kv = min(16, pl.next_power_of_2(problem.group)), _block_kv(problem)
    warpgroups = _most_warpgroups(problem)
    plain = problem.attention.attn_logits_soft_cap is None and FEATURES_OF_MASKED_STEPS.isdisjoint(problem.features)
    plain = plain and problem.head_dim == problem.value_dim == block_kv == 128  # others are not measured
    if plain and problem.tokens_per_seq == 1 and heads <= 8:
        warpgroups = 1
    elif plain and problem.tokens_per_seq >= WARPGROUP_ROWS:
        heads = heads_of_prompts(problem, block_kv)
    return replace(_sized(problem, warpgroups * WARPGROUP_ROWS // heads, block_kv, warpgroups), num_splits=1)


def _for_wide(problem: Problem) -> PrefillPageAttentionConfig:
    """64 rows of two warpgroups: heads of so many tokens as make for the fewest tiles; the most heads, if some tie."""
    heads = [2**i for i in range(6, -1, -1) if 2**i < 2 * problem.group]
    sizes = [_sized(problem, WARPGROUP_ROWS // of_token, 64, 2) for of_token in heads]
    return min(sizes, key=functools.partial(programs, problem))


def _most_warpgroups(problem: Problem) -> int:
    """Two that compute, unless the caches are quantised and their rows so wide that there is no room."""
    sizes = _config(WARPGROUP_ROWS, 64, 2, 2)
    return 2 if shared_bytes(problem, sizes) <= SHARED_BYTES else 1


def _with_more_warpgroups(problem: Problem) -> PrefillPageAttentionConfig | None:
    """Three, or four where heads have 64 features: more rows share what is loaded, and more warps what a core can do.

    Their logits of 64 keys are what fits a thread's fewer registers. None where blocks of a quantised cache leave no room
    for so many rows, or heads are wide.
    """
    if shares_rows(problem):
        return None
    if (problem.head_dim, problem.value_dim) != (COLUMNS, COLUMNS) or is_quantised(problem):
        return _sized(problem, 3 * WARPGROUP_ROWS, 64, 3)
    # Two heads' tokens are a little faster than one's, but where more rows stay empty.
    found = [_sized(problem, 4 * WARPGROUP_ROWS // heads, 64, 4) for heads in (2, 1, 4)]
    return min(found, key=functools.partial(programs, problem))


def _with_teams(problem: Problem, config: PrefillPageAttentionConfig) -> PrefillPageAttentionConfig | None:
    """Tiles of one warpgroup, two side by side, in place of these; None where they have no room."""
    if reads_bytes(problem, config):
        return config
    heads = math.gcd(problem.group, 4 if problem.tokens_per_seq <= WARPGROUP_ROWS else 2)
    block_q = config.block_q if warpgroups_of(config) == 1 else WARPGROUP_ROWS // heads
    sizes = [_config(block_q, 64, 1, stages) for stages in range(MOST_STAGES[1], 1, -1)]
    return next((config for config in sizes if teams_of(problem, config) == 2), None)


def _with_one_warpgroup(problem: Problem, device: Device) -> PrefillPageAttentionConfig | None:
    """Tiles of 64 rows where even of them there is one a core at most, also of a prompt beside steps; None else, and for wide
    heads.

    Of fewer tokens, those of as many heads as make for the fewest tiles, and of these the ones with most empty rows, whose
    parts merge sooner.
    """
    if shares_rows(problem):
        return None
    heads = [math.gcd(problem.group, 2)]
    if problem.tokens_per_seq <= WARPGROUP_ROWS:
        heads = [number for number in (1, 2, 4, 8) if number < 2 * problem.group]

    def tiles(number):
        packs = tiles_of_packs(problem, WARPGROUP_ROWS // number)
        return [problem.num_kv_heads * -(-problem.group // number) * each for each in packs]

    number = min(heads, key=lambda number: sum(tiles(number)))
    return _sized(problem, WARPGROUP_ROWS // number, 64, 1) if max(tiles(number)) <= device.cores else None


def _sized(problem: Problem, block_q: int, block_kv: int, warpgroups: int) -> PrefillPageAttentionConfig | None:
    """Tile sizes with as many stages as the shared memory has room for, and blocks small enough for two, if any are."""
    stages = MOST_QUANTISED_STAGES if is_quantised(problem) else MOST_STAGES[warpgroups]
    sizes = [
        _config(block_q, block, warpgroups, number)
        for least, block in ((2, block_kv), (fewest_stages(problem), 64))
        for number in range(stages, least - 1, -1)
    ]
    found = [config for config in sizes if shared_bytes(problem, config) <= SHARED_BYTES]
    if found and reads_bytes(problem, found[0]):  # as much is on its way, and one team computes while the other waits
        found = [each for each in found if each.num_stages > 1 and teams_of(problem, each) == 2] or found
    return next(iter(found), None)


def _config(block_q: int, block_kv: int, warpgroups: int, stages: int) -> PrefillPageAttentionConfig:
    num_warps = 4 * (warpgroups + 1)
    return PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=stages)


def _reason_against_fp8(problem: Problem) -> str | None:
    """Why products cannot be of 8 bits."""
    if problem.cache_dtype != "float8_e4m3fn":
        return f"caches in {problem.cache_dtype}"
    if "slot_scales" in problem.features:
        return "scales of each token and head"
    return WIDE if shares_rows(problem) else None


def _has_short_prompts(problem: Problem) -> bool:
    """Whether tiles see so few keys that their beginnings and ends take most of the time: two go on beside one another.

    Over more keys, two warpgroups that share what is loaded, and take turns, are faster.
    """
    tokens = min(FEW_TOKENS, problem.longest / 2)  # or that are half of all keys
    filled = problem.tokens_per_seq >= WARPGROUP_ROWS or problem.group in (1, 2) or problem.group % 4 == 0  # rows of a tile
    keys = (keys_of_prompts if filled else mean_keys)(problem, WARPGROUP_ROWS)
    return problem.tokens_per_seq >= tokens and keys <= SHORT


def _are_like_128(problem: Problem) -> bool:
    """Whether keys and values lie in two parts each, as heads of 128 features do: so they go with these sizes."""
    return all(COLUMNS < size <= 2 * COLUMNS for size in (problem.head_dim, problem.value_dim))


def _has_many_steps(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> bool:
    """Whether decode steps have work for most teams: memory serves two of a core a little faster than one.

    Of narrower heads that is so of tiles of 64 rows; of few rows two take up to 5% longer.
    """
    if not _are_like_128(problem):  # others are not measured, or do not fit
        return False
    if (problem.head_dim, problem.value_dim) != (128, 128) and few_rows(problem, config) is not None:
        return False
    few = problem.tokens_per_seq < FEW_TOKENS and warpgroups_of(config) == 1
    return few and programs(problem, config) >= MOST_CORES * device.cores


def _with_one_head(problem: Problem, device: Device, config: PrefillPageAttentionConfig):
    """Tiles of one wide head's tokens in place of two heads', where they are faster, and else None: where tiles fill the
    chip for some rounds, and see so many keys that those which only some of their tokens see do not count.
    """
    one = replace(config, block_q=rows_of(problem, config))
    if (problem.head_dim, problem.value_dim) != (256, 256) or is_quantised(problem):  # others are not measured
        return None
    if few_rows(problem, config) is not None or "key_ranges" in problem.features:
        return None
    tiles = programs(problem, config)
    if tiles < ROUNDS * device.cores or programs(problem, one) > MOST_EMPTY * tiles:
        return None
    return one if sum(keys_of_tiles(problem, one.block_q)) >= 2 * LONG else None


def _fills_four_warpgroups(problem: Problem, device: Device, more, teams) -> bool:
    """Whether there are four, and tiles for all cores with hardly more empty rows than two teams have: then they are
    faster over few keys too, by 5 to 25%."""
    if more is None or warpgroups_of(more) < 4 or problem.attention.attn_logits_soft_cap is not None:
        return False
    rows, of_teams = (rows_of(problem, config) * programs(problem, config) for config in (more, teams))
    return programs(problem, more) >= device.cores and rows <= MOST_EMPTY * of_teams


def _ends_sooner(problem: Problem, device: Device, more, two, widens: bool) -> bool:
    """Whether tiles of more warpgroups end sooner than those of at most two, longest first over the cores.

    Where caches are widened, they do not if two have room for larger blocks: shared memory binds, and three read each
    block once more and their queries twice as often.

    Tiles of early tokens see fewer keys. Where all see as many, the last round takes as long as the others, however few
    tiles it has; the more they differ, the better short ones fill what it leaves, if there are enough of them.
    """
    number = warpgroups_of(more)
    if number == 3 and not _are_like_128(problem):  # others are not measured, or do not fit
        return False
    if widens and two.block_kv > more.block_kv:
        return False
    if number == 4 and (problem.attention.attn_logits_soft_cap is not None or programs(problem, two) < device.cores):
        return False
    fewest, most = keys_of_tiles(problem, more.block_q)
    plain = not is_quantised(problem) and problem.attention.attn_logits_soft_cap is None
    if number == 3 and plain and two.block_kv > more.block_kv:  # the pieces of two are a chain
        many = mean_keys(problem, more.block_q) >= MANY and 2 * programs(problem, more) >= 3 * device.cores
        if "key_ranges" in problem.features or not many:
            return False  # ranges may make pieces short, and few pieces may be cut into parts
        sizes = (more, THREE_WARPGROUPS), (two, CHAIN)
        three, chain = (cycles(problem, *size, programs(problem, size[0]), device.cores) for size in sizes)
        return three < chain
    if number == 3 and programs(problem, more) < ROUNDS * device.cores:
        return False

    def time(config):
        rounds = programs(problem, config) / device.cores
        keys = rounds * (most + fewest) / 2 + (math.ceil(rounds) - rounds) * fewest
        return rows_of(problem, config) * max(keys, most)

    return time(more) < FASTER[number] * time(two)
