"""Into how many parts the keys of the Hopper kernel's tiles are cut, and who merges their results."""

import math

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.mosaic_gpu.deal import FEW, SOME, TIGHT, dealt, finer
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import exchange_shape
from paged_prefill.lowering.mosaic_gpu.hopper.last_part import MOST_TOGETHER
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_COLUMNS, WARPGROUP_ROWS
from paged_prefill.lowering.mosaic_gpu.room import SHARED_BYTES, bytes_of_blocks, is_latent, is_quantised, programs, rows_of
from paged_prefill.lowering.mosaic_gpu.room import shared_bytes, shares_rows, teams_of, two_share_rows, warpgroups_of
from paged_prefill.lowering.mosaic_gpu.rounds import rows_together
from paged_prefill.lowering.splits import LEAST_PART_BYTES, MOST_PARTS, SHORT_CALL, parts_of
from paged_prefill.lowering.tiles import Parts
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

EXCHANGE_BYTES = 1024  # for the barriers of what a cluster's blocks send each other, and where it begins
CORE_GROUP = 16  # cores that a cluster's blocks must share (a GPC); the last group of a chip may lack some of them
# The most thread blocks of a cluster: on any Hopper GPU, and on those of at least CORES_OF_LARGE_GROUPS cores, whose groups
# have room for more (an H20's have ten cores).
MOST_IN_CLUSTER, MOST_IN_LARGE_CLUSTER, CORES_OF_LARGE_GROUPS = 8, 16, 132
# Results of a tile with the most parts it may have: from so many on, a kernel merges them sooner than one warpgroup.
LAST_MERGES_BYTES = 2**16
# Parts of a latent tile: of more, pairs of pairs wait for one another longer than a kernel takes, 48 us for 37 with one long
# context of 13 parts. Up to six take as long by either.
MOST_IN_PAIRS = 12
FEWEST_BLOCKS = 2  # of a part, where as many parts as contexts as long as the table want are merged by a kernel
SMALLER_PARTS = ((4, 8), (2, 2))  # where there are so many cores a tile, parts of long tiles are so many times smaller


def parts_of_tiles(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> Parts:
    """A core has room for one thread block. The fewer tiles there are, the more a long one is felt: so parts are smaller,
    also where contexts that differ gain by it, or a prompt may lie beside steps (deal.py). But what merges in clusters is
    not given up for more of them.
    """
    unsplit, least = programs(problem, config), config.num_splits
    smaller = next((by for few, by in SMALLER_PARTS if few * unsplit <= device.cores), 1)
    sizes = dict(slots=device.cores, part_bytes=LEAST_PART_BYTES // smaller)
    parts = parts_of(problem, device, config, unsplit=unsplit, **sizes)
    parts = parts if parts.most >= 2 * least else Parts(least, least)
    if (two_share_rows(problem, config) and not _is_measured(problem, device, config, parts)) or current_policy() == "invariant":
        return parts
    prompts = problem.tokens_per_seq >= SHORT_CALL
    if prompts and unsplit > device.cores and (is_latent(problem) or is_quantised(problem)):  # not measured
        return parts
    if parts == Parts() and rows_together(problem, config, device.cores) > 1:  # which tiles of any parts are not
        return parts
    clusters = in_cluster(problem, device, config, least)
    slots = device.cores * (1 if clusters and not parts.vary else teams_of(problem, config))
    if parts == Parts(least, least) and least > MOST_PARTS and not (clusters or prompts or is_latent(problem)):
        return Parts(1, least, FEWEST_BLOCKS)  # of a short context fewer are merged, by a kernel
    return finer(parts, dealt(problem, device, config, unsplit=unsplit, slots=slots, in_cluster=clusters))


def _is_measured(problem: Problem, device: Device, config: PrefillPageAttentionConfig, parts: Parts) -> bool:
    """Whether the estimate is of what was measured, where two warpgroups share a tile's rows: steps and drafts of wide heads,
    and latent tiles, if there are many in 16 bits. Where the pool has room for half of their tables at most, and so most
    contexts are short, few whose parts would neither vary nor be merged in clusters were measured too, and many in 8 bits;
    and where it has no room for all, those of SOME cores.
    """
    if not is_latent(problem):
        return problem.tokens_per_seq < SHORT_CALL and not is_quantised(problem)
    many, seqs = programs(problem, config) > FEW * device.cores, min(problem.seqs, problem.tokens)
    some = programs(problem, config) > SOME * device.cores and not is_quantised(problem)
    uneven = problem.num_pages * problem.page_size <= (TIGHT if some else 1 / 2) * seqs * problem.longest
    if many or is_quantised(problem):
        return many and (uneven or not is_quantised(problem))
    return uneven and not parts.vary and not in_cluster(problem, device, config, parts.least)


def merges_in_cluster(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> bool:
    """Whether the blocks that have a tile's parts merge them, in a call with these sizes."""
    return merged_in_cluster(problem, device, config, parts_of_tiles(problem, device, config))


def merged_in_cluster(problem: Problem, device: Device, config: PrefillPageAttentionConfig, parts: Parts) -> bool:
    """The same, of these parts."""
    return not parts.vary and in_cluster(problem, device, config, parts.most)


def last_merges(problem: Problem, device: Device, config: PrefillPageAttentionConfig, parts: Parts) -> bool:
    """Whether a warpgroup merges a tile's parts that ends the last of them. Of more numbers, or more parts than it reads at a
    time, a kernel takes no longer, nor does XLA where all tiles have as many parts; but where two share the rows of many
    latent tiles and add what is in their registers: few tiles' pairs wait for one another."""
    if shares_rows(problem):  # few rows of latent keys have no registers for others' results; wide heads are not measured
        merge = is_latent(problem) and parts.vary and two_share_rows(problem, config)
        merge = merge and (parts.most <= MOST_IN_PAIRS or is_quantised(problem))  # more are not measured in 8 bits
        return merge and programs(problem, config) > FEW * device.cores
    if not parts.vary or parts.most > MOST_TOGETHER:
        return False
    tokens, heads = min(config.block_q, problem.tokens_per_seq), rows_of(problem, config) // config.block_q
    rows = min(tokens * min(heads, problem.group), WARPGROUP_ROWS)
    return 4 * rows * problem.value_dim * parts.most < LAST_MERGES_BYTES


def in_cluster(problem: Problem, device: Device, config: PrefillPageAttentionConfig, parts: int) -> bool:
    """Whether they would, of so many parts: where the chip has room for all clusters at a time."""
    large = device.known and device.cores >= CORES_OF_LARGE_GROUPS
    if not 1 < parts <= (MOST_IN_LARGE_CLUSTER if large else MOST_IN_CLUSTER):
        return False
    if two_share_rows(problem, config) and (is_quantised(problem) or not is_latent(problem)):  # not measured
        return False
    at_a_time = device.cores // 2 if parts == 2 else (device.cores // CORE_GROUP - 1) * (CORE_GROUP // parts)
    in_place_of = bytes_of_blocks(problem, config)
    return programs(problem, config) <= at_a_time and exchange_fits(problem, config, parts, in_place_of)


def exchange_fits(problem: Problem, config: PrefillPageAttentionConfig, parts: int, in_place_of: int = 0) -> bool:
    """Whether there is room for what a cluster's blocks send each other, in place of so many bytes."""
    columns = problem.value_dim // (2 if two_share_rows(problem, config) else 1)
    outputs = -(-columns // WARPGROUP_COLUMNS)
    exchanged = 4 * math.prod(exchange_shape(outputs * warpgroups_of(config), parts, columns // outputs))
    return shared_bytes(problem, config) + max(0, exchanged + EXCHANGE_BYTES - in_place_of) <= SHARED_BYTES
