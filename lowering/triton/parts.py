"""Into how many parts the keys of the Triton kernel's tiles are cut; the estimates are those of splits.py."""

from dataclasses import replace

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.splits import (
    LEAST_PART_BYTES,
    MERGE_BYTES,
    MOST_PARTS,
    RESULT_BYTES,
    SHORT_CALL,
    best_splits,
    most_keys,
    parts_of,
)
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton.launch import capability
from paged_prefill.lowering.triton.sizes import (
    DECODE,
    DRAFTS,
    KEYS_OF_PROMPT,
    KEYS_PER_SPLIT,
    SHARED_KIB,
    TALL_ROWS,
    has_low_tiles,
    is_short_step,
    key_bytes,
    programs,
    rows_of,
    shared_bytes,
)
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

WARPS = 8  # that keep a core busy: tiles of fewer warps share one
SHORT_SPLITS = 32  # of a short step: the merge of more would show
EVEN_PARTS = 4 / 3  # times the parts that an estimate takes, for all cores to have as many
TALL_SLOWER = 2  # as much: products of so many rows take as long as their keys and values, and come after them
MERGED_SHARE = 0.01  # of a part's bytes: what its result may take, written and read, for it to be worth it
PIECES_OF_SEQUENCE = 2  # a core: more of its parts would cost more than they even out
REPAID = 32  # times that prompts may take for one context to be worth a merge of all
MOST_ABSENT = 2**12  # parts that no tile has: their programs end at once, a thousand of them in a microsecond


def num_splits(problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int:
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
        if is_short_step(problem, device, config.block_q * problem.group):
            warps, most = 2 * WARPS, min(most, SHORT_SPLITS)
    # Where parts vary, short contexts in a short table have few of them: that does not have to be so of all.
    settled = single or problem.tokens_per_seq >= SHORT_CALL
    alone = has_low_tiles(problem, device) or (settled and not few_rows and keys <= 2 * KEYS_OF_PROMPT)
    slots = device.cores if alone else _slots(problem, device, config, warps)
    rows = problem.tokens * problem.q_heads
    best = best_splits(problem, device, config, unsplit=unsplit, slots=slots, rows=rows, most=most, enough=enough)
    # Parts of one long context are equally long: then cores that have one more than others are waited for.
    filled = slots // unsplit
    evenly = single and few_rows and best < filled <= min(most, best * EVEN_PARTS)
    return filled if evenly else best


def _slots(problem: Problem, device: Device, config: PrefillPageAttentionConfig, warps: int) -> int:
    """Tiles at work at a time, of so many warps a core."""
    capacity = SHARED_KIB.get(capability(device)) if device.platform == "cuda" else None
    fitting = max(1, capacity * 1024 // shared_bytes(problem, device, config)) if capacity else warps
    return device.cores * max(1, min(warps // config.num_warps, fitting))


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
    # tiles than `unsplit`. Where tiles are few a long one is felt more, and there are cores to spare for what parts
    # cost.
    mixed = problem.tokens_per_seq > DRAFTS
    share = 1 if unsplit >= (4 if mixed else 2) * device.cores else 1 / 4
    wide = max(problem.head_dim, problem.value_dim) > 256
    if share < 1 and (not wide or (rows <= DECODE.rows and "latent" not in problem.features)):
        # Of few tiles parts are short, of short steps of single tokens shortest; tall tiles begin and end slowly, and
        # keys of the widest are few.
        few_rows = 1 / 32 if problem.tokens_per_seq == 1 and is_short_step(problem, device, rows) else 3 / 64
        share = max(1 / 16 if wide or rows >= TALL_ROWS else few_rows, min(share, unsplit / (4 * device.cores)))
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
    blocks = -(-most_keys(problem, config.block_q) // config.block_kv)
    # Prompts have parts too where one context as long as the table would take far longer than the merge of all.
    longest = most_keys(problem, config.block_q) * key_bytes(problem) * slower
    repaid = problem.tokens_per_seq < SHORT_CALL or longest >= REPAID * (MERGE_BYTES + 2 * results / device.cores)
    if min(problem.seqs, problem.tokens) == 1 or not repaid or current_policy() == "invariant":
        return parts
    of_part = min(-(-part_bytes // (config.block_kv * key_bytes(problem) * slower)), -(-blocks // parts.least))
    # What a part's result takes, written and read, beside its keys.
    result_bytes = 8 * min(rows, problem.tokens_per_seq * problem.group) * problem.value_dim
    if share < 1 / 4 or (mixed and share < 1) or result_bytes <= part_bytes * MERGED_SHARE:
        # Each context may be long: it has a part a core. Parts of narrower heads, and of wider in shorter blocks, end
        # sooner, and a core takes several.
        seqs, width = min(problem.seqs, problem.tokens), max(problem.head_dim, problem.value_dim)
        if not mixed and (seqs == 2 or (64 < width <= 128 and most <= MOST_PARTS)):
            most = min(most, seqs * device.cores // unsplit)
        parts = replace(parts, most=max(parts.most, min(most, round(blocks / of_part))))
    return Parts(1, parts.most, of_part) if parts.most > 1 else parts
