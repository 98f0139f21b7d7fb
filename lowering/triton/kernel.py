"""The Triton kernel: one program attends with one tile of query rows to the keys it sees.

A tile is a run of `ROWS` rows of one sequence and one KV head, where row r is token r // GROUP and head r % GROUP of
the group that shares the KV head: so a group's heads fill the matrix units together, and each key is loaded once for
all of them. Keys are walked in blocks from the window's start to the causal limit; only the blocks that some row sees
in part pay for a mask. The softmax is the online one of Milakov and Gimelshein (arXiv 1805.02867) in base 2, divided
once at the end, as in FlashAttention-2 (arXiv 2307.08691).

Importing this module needs Triton. Every size is a compile-time constant, as JAX's shapes are.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no difference of two maxima is NaN


@triton.jit
def _tanh(x, EXACT: tl.constexpr, HARDWARE: tl.constexpr):
    """tanh by one exponential, which overflows to the right limit; absolute error 1e-7.

    EXACT uses the Taylor series near 0, where that absolute error would be a large relative one. Where it need not be,
    HARDWARE takes NVIDIA's instruction for it, a third of the work: its relative error of 2^-11 is that of float16.
    """
    if HARDWARE and not EXACT:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    if EXACT:
        square = x * x
        series = 62.0 / 2835.0 * square - 17.0 / 315.0
        series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
        large = tl.where(tl.abs(x) < 0.25, x + x * square * series, large)
    return large


@triton.jit
def _pool_rows(page_table, block, first_key, last_key, BLOCK_KV: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Rows of the page pool that hold a block's keys, each key first brought into first_key to last_key."""
    keys = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    if first_key is not None:
        keys = tl.minimum(tl.maximum(keys, first_key), last_key)
    if PAGE_SIZE % BLOCK_KV == 0:  # the block lies in one page
        page = tl.load(page_table + block * BLOCK_KV // PAGE_SIZE)
    else:
        page = tl.load(page_table + (keys.to(tl.uint32) // PAGE_SIZE).to(tl.int32))  # unsigned: a shift by a power of 2
    return page * PAGE_SIZE + (keys.to(tl.uint32) % PAGE_SIZE).to(tl.int32)


@triton.jit
def _load_rows(base, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a [*, SIZE] array of any size (offsets have 64 bits) as a tile PADDED wide, with zeros past SIZE."""
    features = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * SIZE + features[None, :]
    if SIZE == PADDED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(features < SIZE)[None, :], other=0.0)


@triton.jit
def _logits(
    tile,
    keys,
    SCALE: tl.constexpr,
    NEGATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HARDWARE_TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The logits of a tile's rows and a block's keys, but for a positive constant factor."""
    logits = tl.dot(tile, keys.T, input_precision=PRECISION)
    if NEGATE:
        logits = -logits
    if SOFT_CAP is not None:
        logits = _tanh(logits * (SCALE / SOFT_CAP), tile.dtype == tl.float32, HARDWARE_TANH)
    return logits


@triton.jit
def _fold(running_max, total, acc, logits, values, TO_BASE_2: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: folds a block into a tile's running maximum, sum and unnormalised output."""
    new_max = tl.maximum(running_max, tl.max(logits, 1) * TO_BASE_2)
    weights = tl.exp2(logits * TO_BASE_2 - new_max[:, None])
    fade = tl.exp2(running_max - new_max)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new_max, total, acc


@triton.jit
def attend_tile(
    query,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    key_pages,  # [pools, CACHE_KV_HEADS, POOL_ROWS, HEAD_DIM]
    value_pages,  # [pools, CACHE_KV_HEADS, POOL_ROWS, VALUE_DIM]
    page_indices,  # [seqs, PAGES_PER_SEQ]
    schedule,  # [5, INTERVALS]: see host.py
    kv_head_start,  # []
    out,  # [NUM_SPLITS, TOKENS, KV_HEADS * GROUP, VALUE_DIM]
    lse,  # [NUM_SPLITS, TOKENS, KV_HEADS * GROUP]
    TOKENS: tl.constexpr,
    SEQS: tl.constexpr,
    INTERVALS: tl.constexpr,
    INTERVALS_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CACHE_KV_HEADS: tl.constexpr,
    POOL_ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_SEQ: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    NEGATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    EDGE_KV: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HARDWARE_TANH: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % NUM_SPLITS
    head = program // NUM_SPLITS % KV_HEADS
    tile_number = program // (NUM_SPLITS * KV_HEADS)

    # The interval whose tile this is, its last tile first: that one sees the most keys. A tile number past the last
    # finds no interval and gets length 0, so that every loop is empty and every store masked.
    numbers = tl.arange(0, INTERVALS_PADDED)
    first_tiles = tl.load(schedule + numbers, mask=numbers < INTERVALS, other=2**31 - 1)
    lengths = tl.load(schedule + 2 * INTERVALS + numbers, mask=numbers < INTERVALS, other=0)
    num_tiles = (lengths * GROUP + ROWS - 1) // ROWS
    is_owner = (first_tiles <= tile_number) & (tile_number - first_tiles < num_tiles)
    interval = tl.min(tl.where(is_owner, numbers, INTERVALS), 0)
    field = schedule + interval
    exists = interval < INTERVALS
    first_tile = tl.load(field, mask=exists, other=0)
    start = tl.load(field + INTERVALS, mask=exists, other=0)
    length = tl.load(field + 2 * INTERVALS, mask=exists, other=0)
    context_len = tl.load(field + 3 * INTERVALS, mask=exists, other=0)
    pool = tl.load(field + 4 * INTERVALS, mask=exists, other=0)
    tiles_after = (length * GROUP + ROWS - 1) // ROWS - 1 - (tile_number - first_tile)
    first_row = tl.maximum(tiles_after, 0) * ROWS

    rows = first_row + tl.arange(0, ROWS)
    row_exists = rows < length * GROUP
    token = start + rows // GROUP
    query_row = token.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    position = context_len - length + rows // GROUP
    first_position = context_len - length + first_row // GROUP
    last_position = context_len - length + (tl.minimum(first_row + ROWS, length * GROUP) - 1) // GROUP

    # Keys that some row sees, and keys that all rows see.
    seen_end = tl.minimum(last_position + 1, CAPACITY)
    full_end = tl.minimum(first_position + 1, CAPACITY)
    if WINDOW is None:
        seen_start = 0
        full_start = 0
    else:
        seen_start = tl.maximum(first_position - WINDOW + 1, 0)
        full_start = tl.maximum(last_position - WINDOW + 1, 0)
    # The same in blocks: this split's are low to high, of which full_low to full_high need no mask.
    first_block = seen_start // BLOCK_KV
    num_blocks = tl.maximum((seen_end + BLOCK_KV - 1) // BLOCK_KV - first_block, 0)
    low = first_block + num_blocks * split // NUM_SPLITS
    high = first_block + num_blocks * (split + 1) // NUM_SPLITS
    full_low = tl.minimum(tl.maximum((full_start + BLOCK_KV - 1) // BLOCK_KV, low), high)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_end, 0) // BLOCK_KV, high), full_low)

    pool_head = (pool * CACHE_KV_HEADS + tl.load(kv_head_start) + head).to(tl.int64) * POOL_ROWS
    key_base = key_pages + pool_head * HEAD_DIM
    value_base = value_pages + pool_head * VALUE_DIM
    page_table = page_indices + tl.minimum(interval, SEQS - 1).to(tl.int64) * PAGES_PER_SEQ

    tile = _load_rows(query, tl.where(row_exists, query_row, 0), HEAD_DIM, HEAD_DIM_PADDED)
    TO_BASE_2: tl.constexpr = LOG2_E * (SCALE if SOFT_CAP is None else SOFT_CAP)
    running_max = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)

    # The blocks that need a mask, on either side of those that do not; the order of blocks is free. They are shorter,
    # of EDGE_KV keys: a mask takes registers, and fewer keys are computed for nothing. A key that no row sees is read
    # as the nearest that some row sees: its weight is 0, but its slot may hold NaN, and 0 * NaN is NaN.
    EDGES: tl.constexpr = BLOCK_KV // EDGE_KV
    edge_low = tl.maximum(low * EDGES, seen_start // EDGE_KV)
    edge_high = tl.minimum(high * EDGES, (seen_end + EDGE_KV - 1) // EDGE_KV)
    unmasked = (full_high - full_low) * EDGES
    for step in tl.range(0, edge_high - edge_low - unmasked):
        block = edge_low + step
        block = tl.where(block < full_low * EDGES, block, block + unmasked)
        pool_rows = _pool_rows(page_table, block, seen_start, seen_end - 1, EDGE_KV, PAGE_SIZE)
        keys = _load_rows(key_base, pool_rows, HEAD_DIM, HEAD_DIM_PADDED)
        values = _load_rows(value_base, pool_rows, VALUE_DIM, VALUE_DIM_PADDED)
        key = block * EDGE_KV + tl.arange(0, EDGE_KV)
        visible = (key[None, :] <= position[:, None]) & (key < seen_end)[None, :]
        if WINDOW is not None:
            visible &= key[None, :] > position[:, None] - WINDOW
        logits = _logits(tile, keys, SCALE, NEGATE, SOFT_CAP, HARDWARE_TANH, PRECISION)
        logits = tl.where(visible, logits, float("-inf"))
        running_max, total, acc = _fold(running_max, total, acc, logits, values, TO_BASE_2, PRECISION)

    # Page indices are fetched one block ahead of the keys, off the path from a key's address to its arrival. The loop
    # must not ask for num_stages itself: Triton then pipelines those fetches too, and no longer the keys and values.
    last_block = tl.maximum(full_high - 1, full_low)
    if full_low < full_high:
        pool_rows = _pool_rows(page_table, full_low, None, None, BLOCK_KV, PAGE_SIZE)
    else:
        pool_rows = tl.zeros((BLOCK_KV,), tl.int32)
    for block in tl.range(full_low, full_high):
        next_rows = _pool_rows(page_table, tl.minimum(block + 1, last_block), None, None, BLOCK_KV, PAGE_SIZE)
        keys = _load_rows(key_base, pool_rows, HEAD_DIM, HEAD_DIM_PADDED)
        values = _load_rows(value_base, pool_rows, VALUE_DIM, VALUE_DIM_PADDED)
        logits = _logits(tile, keys, SCALE, NEGATE, SOFT_CAP, HARDWARE_TANH, PRECISION)
        running_max, total, acc = _fold(running_max, total, acc, logits, values, TO_BASE_2, PRECISION)
        pool_rows = next_rows

    unseen = total == 0
    acc = acc / tl.where(unseen, 1.0, total)[:, None]
    row_lse = tl.where(unseen, float("-inf"), (running_max + tl.log2(total)) * LN_2)
    result_row = query_row + split.to(tl.int64) * (TOKENS * KV_HEADS * GROUP)
    features = tl.arange(0, VALUE_DIM_PADDED)
    tl.store(
        out + result_row[:, None] * VALUE_DIM + features[None, :],
        acc.to(out.dtype.element_ty),
        mask=row_exists[:, None] & (features < VALUE_DIM)[None, :],
    )
    tl.store(lse + result_row, row_lse, mask=row_exists)
