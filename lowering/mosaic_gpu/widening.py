"""Quantised caches of calls whose tiles would widen each key many times: they are widened once, before the kernel.

What is then left is a call over caches in the query's dtype, which nothing else here tells from any other.
"""

from dataclasses import replace
import math

import numpy as np

from paged_prefill.lowering.call import Call, Problem, granularity
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS
from paged_prefill.lowering.mosaic_gpu.hopper.widen import QUANTISED
from paged_prefill.lowering.mosaic_gpu.hopper.widen_pages import Kind, Launch, widen_pages
from paged_prefill.lowering.mosaic_gpu.scheduling import indices_of
from paged_prefill.lowering.splits import mean_keys
from paged_prefill.primitive.context import current_policy
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.packing import MAX_CONTEXT

ROWS = 2 * WARPGROUP_ROWS  # of a query, of a tile
# Tiles that see a key, on average, from which on it is widened once. That reads a byte of a number and writes two, at
# 12 bytes a cycle and core 0.25 cycles; each tile that widens it takes 0.018 longer, with scales of slots 0.057.
TILES, TILES_OF_SLOT_SCALES = 16, 6
PAGE_SIZE = 128  # of what is widened, if a sequence's capacity is so many times that: a block of keys is one copy
MOST_BYTES = 2**29  # of what is widened: 131072 keys of 8 heads of 128 have as many, and an H100 150 times as many


def widens_first(problem: Problem, fp8_terms: int | None = 0) -> bool:
    """Whether a call's keys and values are widened before its kernel, by its shapes: no step of single tokens has it.

    Numbers times scales may be too large for float16. By the policy "invariant" a sequence's bits follow no pack. And
    products of `fp8_terms` want numbers of 8 bits.
    """
    if "quantised" not in problem.features or problem.dtype != "bfloat16" or problem.cache_dtype not in QUANTISED:
        return False
    if fp8_terms or current_policy() == "invariant":
        return False
    features = problem.head_dim + (0 if "latent" in problem.features else problem.value_dim)
    size = 2 * features * problem.num_kv_heads * problem.seqs * problem.capacity
    keys = min(problem.capacity, last_keys(problem))
    tiles = problem.tokens_per_seq * problem.group / ROWS * mean_keys(problem, ROWS) / keys
    least = TILES_OF_SLOT_SCALES if "slot_scales" in problem.features else TILES
    return size <= MOST_BYTES and tiles >= least


def last_keys(problem: Problem) -> int:
    """Of a context, those that rows may see: with a window not those before it, were all tokens one sequence's."""
    window = problem.attention.sliding_window
    return MAX_CONTEXT if window is None else min(MAX_CONTEXT, window + problem.tokens)


def behind_widening(problem: Problem, fp8_terms: int | None = 0) -> Problem:
    """What the kernel is launched for: another problem, where it is over caches that were widened."""
    return left_of(problem) if widens_first(problem, fp8_terms) else problem


def left_of(problem: Problem) -> Problem:
    """What is left of a problem behind the widening: pages in the order of sequences, of the heads that it reads."""
    page_size = math.gcd(problem.capacity, PAGE_SIZE)
    pages_per_seq = problem.capacity // page_size
    gone = {"quantised", "slot_scales", *LAYOUTS}
    return replace(
        problem,
        pools=1,
        cache_kv_heads=problem.num_kv_heads,
        num_pages=problem.seqs * pages_per_seq,
        page_size=page_size,
        pages_per_seq=pages_per_seq,
        cache_dtype=problem.dtype,
        features=tuple(name for name in problem.features if name not in gone),
    )


def widened_call(call: Call, fp8_terms: int | None = 0) -> Call:
    """The call that the kernel is launched for: over caches that are widened here, scales and all, where they are."""
    if not widens_first(call.problem, fp8_terms):
        return call
    problem, left = call.problem, left_of(call.problem)
    sequences, indices, rows = call.sequences, call.indices, problem.rows
    pages, pools, contexts = indices_of(call)
    caches, scales = caches_of(call), scales_of(call)
    kinds = zip(caches, (0, rows.get("2", 0)), scales)
    launch = Launch(
        kinds=tuple(Kind(cache.shape[-1], beside, granularity(scale)) for cache, beside, scale in kinds),
        cache_dtype=problem.cache_dtype,
        seqs=problem.seqs,
        seqs_of_pool=problem.seqs // pools.shape[0],
        capacity=problem.capacity,
        last_keys=last_keys(problem),
        pages_per_seq=problem.pages_per_seq,
        kv_heads=problem.num_kv_heads,
        cache_kv_heads=problem.cache_kv_heads,
        pools=problem.pools,
        num_pages=problem.num_pages,
        page_size=problem.page_size,
        pool_rows=rows["pool"],
        head_rows=rows["kv_heads"],
        page_rows=rows["num_pages"],
        slot_rows=rows["page_size"],
    )
    found = widen_pages(
        launch,
        [pages.reshape(-1), pools, contexts, call.kv_head_start.reshape(1)],
        [cache.reshape(-1, cache.shape[-1]) for cache in caches],
        [scale.reshape(-1) for _, scale in zip(caches, scales) if scale is not None],
    )
    shape = 1, left.num_kv_heads, left.num_pages, left.page_size
    key_pages, *values = (rows.reshape(*shape, rows.shape[-1]) for rows in found)
    # Constants, which no kernel writes: but of ascending numbers and no other XLA makes one that does.
    pages = np.arange(left.num_pages + 1, dtype=np.int32) % left.num_pages
    pools, none = np.zeros(pools.shape, np.int32), np.zeros(left.seqs, np.int32)
    return replace(
        call,
        key_pages=key_pages,
        value_pages=values[0] if values else None,
        sequences=sequences._replace(pool=none, page_indices=pages[:-1].reshape(left.seqs, left.pages_per_seq)),
        indices=indices and indices._replace(page_indices=pages, pools=pools),
        kv_head_start=np.int32(0),
        key_scale=None,
        value_scale=None,
        problem=left,
    )


def caches_of(call: Call):
    """The keys' and the values', which may be the same array; the keys' alone, where values are part of them."""
    values = call.key_pages if call.problem.layout.combined else call.value_pages
    return [call.key_pages] if values is None else [call.key_pages, values]


def scales_of(call: Call):
    """Those of the keys and of the values; of single slots, they may lie in one array, as the caches do."""
    together = call.problem.layout.combined and granularity(call.key_scale) == "slot"
    return call.key_scale, call.key_scale if together else call.value_scale
