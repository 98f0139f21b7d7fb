"""The Triton kernel: one program attends with one tile of query rows to the keys it sees.

A tile is a run of `ROWS` rows of one sequence and one KV head, where row r is token r // GROUP and head r % GROUP of
the group that shares the KV head: so a group's heads fill the matrix units together, and each key is loaded once for
all of them. Each row sees one interval of keys, and in a tree some of its chunk's; keys are walked in blocks over the hull
of the tile's intervals, and only the blocks that some row does not see whole pay for a mask. The softmax is the online
one of Milakov and Gimelshein (arXiv 1805.02867) in base 2, divided once at the end, as in FlashAttention-2 (arXiv
2307.08691).

Importing this module needs Triton. Every size is a compile-time constant, as JAX's shapes are; so is what a call has of
the optional operands. An operand that it does not have is another array, never looked at.
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
def _keys(block, BLOCK_KV: tl.constexpr, KEY_SHARES: tl.constexpr):
    """The keys of a block; of several shares [KEY_SHARES, keys of each], which take them by turns."""
    if KEY_SHARES == 1:
        return block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    else:
        turns = tl.arange(0, BLOCK_KV // KEY_SHARES)[None, :]
        return block * BLOCK_KV + turns * KEY_SHARES + tl.arange(0, KEY_SHARES)[:, None]


@triton.jit
def _pool_rows(
    page_table,
    block,
    first_key,
    last_key,
    BLOCK_KV: tl.constexpr,
    KEY_SHARES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
):
    """Rows of the page pool that hold a block's keys, each key first brought into first_key to last_key."""
    keys = _keys(block, BLOCK_KV, KEY_SHARES)
    if first_key is not None:
        keys = tl.minimum(tl.maximum(keys, first_key), last_key)
    if PAGE_SIZE % BLOCK_KV == 0:  # the block lies in one page
        page = tl.load(page_table + block * BLOCK_KV // PAGE_SIZE)
    else:
        page = tl.load(page_table + (keys.to(tl.uint32) // PAGE_SIZE).to(tl.int32))  # unsigned: a shift by a power of 2
    return page * PAGE_ROWS + (keys.to(tl.uint32) % PAGE_SIZE).to(tl.int32) * SLOT_ROWS


@triton.jit
def _masked_block(step, end, full_low, unmasked):
    """The block of a step through those that need a mask, or the last of them."""
    block = tl.where(step < full_low, step, step + unmasked)
    return tl.minimum(block, end - 1)


@triton.jit
def _load_rows(base, rows, first, SIZE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a [*, SIZE] array of any size (offsets have 64 bits), WIDTH features of them from `first`.

    They are zeros past SIZE; WHOLE says that none are.
    """
    features = first + tl.arange(0, WIDTH)
    pointers = base + tl.expand_dims(rows.to(tl.int64), -1) * SIZE + features
    if WHOLE:
        return tl.load(pointers)
    else:
        within, pointers = tl.broadcast(features < SIZE, pointers)
        return tl.load(pointers, mask=within, other=0.0)


@triton.jit
def _load_heads(
    base, rows, first, DTYPE: tl.constexpr, SIZE: tl.constexpr, MAIN: tl.constexpr, OTHER: tl.constexpr, REST: tl.constexpr
):
    """Rows of queries or keys in the parts that their product is summed of; a part of width 0 is the main one again."""
    main = _load_rows(base, rows, first, SIZE, MAIN, MAIN + OTHER <= SIZE).to(DTYPE)
    other = main
    rest = main
    if OTHER != 0:
        other = _load_rows(base, rows, MAIN - first, SIZE, OTHER, MAIN + OTHER <= SIZE).to(DTYPE)
    if REST != 0:
        rest = _load_rows(base, rows, MAIN + OTHER, SIZE, REST, MAIN + OTHER + REST <= SIZE).to(DTYPE)
    return main, other, rest


@triton.jit
def _power_of_2_of(tile, tile_other, tile_rest):
    """The power of two of each row's largest number: counted in it, a row fits float16 as far as it matters."""
    largest = tl.max(tl.abs(tile.to(tl.float32)), 1)
    largest = tl.maximum(largest, tl.max(tl.abs(tile_other.to(tl.float32)), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(tile_rest.to(tl.float32)), 1))
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def _scale(scales, pool, pool_head, first_row, PER: tl.constexpr):
    """The scale of all keys or values that a tile sees, or where those of its slots lie."""
    if PER == "tensor":
        return tl.load(scales + pool)
    elif PER == "head":
        return tl.load(scales + pool_head)
    elif PER == "slot":
        return scales + first_row
    else:
        return 1.0


@triton.jit
def _in_tree(tree, token, row_exists, key, first_new, WORDS: tl.constexpr):
    """Whether rows see keys as far as the tree says: it is about the first 32 * WORDS tokens of their chunk."""
    new = key - first_new
    told = (new >= 0) & (new < 32 * WORDS)
    word = tl.load(
        tree + token.to(tl.int64)[:, None] * WORDS + (new >> 5)[None, :],
        mask=told[None, :] & row_exists[:, None],
        other=0,
    )
    bit = (word >> (new & 31).to(tl.uint32)[None, :]) & 1
    return (bit != 0) | (new < 0)[None, :] | (new >= 32 * WORDS)[None, :]


@triton.jit
def _tile_of(
    field, exists, piece, parts, INTERVALS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, AGAIN: tl.constexpr
):
    """Of a piece: which part of its tile it is, the tile's rows, which of them exist, their tokens, its interval's length.

    AGAIN reads anew what these follow from, so that the loops between need no registers to hold it.
    """
    first_piece = tl.load(field, mask=exists, other=0, volatile=AGAIN)
    start = tl.load(field + INTERVALS, mask=exists, other=0, volatile=AGAIN)
    length = tl.load(field + 2 * INTERVALS, mask=exists, other=0, volatile=AGAIN)
    within = piece - first_piece
    tiles_after = (length * GROUP + ROWS - 1) // ROWS - 1 - within // parts  # the last tile first: it sees the most keys
    first_row = tl.maximum(tiles_after, 0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    return within % parts, first_row, rows, rows < length * GROUP, start + rows // GROUP, length


@triton.jit
def _turned(x, OUTER: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr):
    """The columns of [rows, OUTER * MIDDLE * INNER] in the order INNER, MIDDLE, OUTER; as they are where MIDDLE is 0."""
    if MIDDLE == 0:
        return x
    else:
        apart = tl.reshape(x, (x.shape[0], OUTER, MIDDLE, INNER))
        return tl.reshape(tl.permute(apart, (0, 3, 2, 1)), (x.shape[0], OUTER * MIDDLE * INNER))


@triton.jit
def _maxima(x, y, other_x, other_y):
    return tl.maximum(x, other_x), tl.maximum(y, other_y)


@triton.jit
def _fold_block(
    running_max,
    total,
    acc,
    unit,
    tile,
    tile_other,
    tile_rest,
    key_base,
    value_base,
    first_feature,
    key_scale,  # of all keys; of each slot, where there is one
    value_scale,
    pool_rows,
    visible,  # None: all rows see all keys
    row_unit,  # what each row's queries are counted in, or None
    always,  # True, to the compiler or at run time
    SHARES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_OTHER: tl.constexpr,
    HEAD_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUES_WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    SPREAD: tl.constexpr,
    LATENT: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    GAPS: tl.constexpr,
    SUM_LAST: tl.constexpr,
    SCALE: tl.constexpr,
    NEGATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TO_BASE_2: tl.constexpr,
    HARDWARE_TANH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: folds a block into a tile's running maximum, sum and unnormalised output."""
    # Where keys are values too, their main part is the program's part of those.
    keys, keys_other, keys_rest = _load_heads(
        key_base, pool_rows, first_feature if LATENT else 0, tile.dtype, HEAD_DIM, HEAD_MAIN, HEAD_OTHER, HEAD_REST
    )
    values = keys
    if not LATENT:
        values = _load_rows(value_base, pool_rows, first_feature, VALUE_DIM, VALUE_WIDTH, VALUES_WHOLE)
        values = _turned(values, LANES, SPREAD, VALUE_WIDTH // (LANES * max(SPREAD, 1))).to(tile.dtype)
    logits = tl.zeros(SHARES + (tile.shape[-2], keys.shape[-2]), tl.float32)
    if always:
        logits = tl.dot(tile, tl.trans(keys), input_precision=PRECISION)
    if HEAD_OTHER != 0:
        logits = tl.dot(tile_other, tl.trans(keys_other), logits, input_precision=PRECISION)
    if HEAD_REST != 0:
        logits = tl.dot(tile_rest, tl.trans(keys_rest), logits, input_precision=PRECISION)
    if row_unit is not None:
        logits = logits * row_unit[:, None]
    if KEY_SCALE == "slot":
        logits = logits * tl.load(key_scale + pool_rows)[None, :]
    elif KEY_SCALE != "one":
        logits = logits * key_scale
    if NEGATE:
        logits = -logits
    if SOFT_CAP is not None:
        logits = _tanh(logits * (SCALE / SOFT_CAP), tile.dtype == tl.float32, HARDWARE_TANH)
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    if VALUE_SCALE == "slot":
        share = tl.load(value_scale + pool_rows)
        if GAPS and visible is not None:
            share = tl.where(tl.max(visible.to(tl.int32), 0) != 0, share, 0.0)
    # A weight times a small scale would leave float16's normal numbers: it is counted in a row's largest scale.
    IN_UNITS: tl.constexpr = VALUE_SCALE == "slot" and tile.dtype == tl.float16
    new_max = running_max
    new_unit = unit
    weights = logits
    fade = running_max
    if always:
        if IN_UNITS:  # both at once, since warps wait for one another
            shares = tl.broadcast_to(tl.abs(share)[None, :], logits.shape)
            largest, largest_share = tl.reduce((logits, shares), 1, _maxima)
            new_unit = tl.maximum(unit, largest_share)
        else:
            largest = tl.max(logits, -1)
        new_max = tl.maximum(running_max, largest * TO_BASE_2)
        weights = tl.exp2(logits * TO_BASE_2 - tl.expand_dims(new_max, -1))
        fade = tl.exp2(running_max - new_max)
        if SUM_LAST:  # those of neighbouring keys are a thread's own
            some = tl.reshape(weights, (total.shape[0], total.shape[1], weights.shape[1] // total.shape[1]))
            total = total * fade[:, None] + tl.sum(some, 2)
        else:
            total = total * fade + tl.sum(weights, -1)
    if IN_UNITS:
        inverse = 1.0 / tl.where(new_unit == 0, 1.0, new_unit)
        fade = fade * (unit * inverse)
        unit = new_unit
        weights = weights * (share[None, :] * inverse[:, None])
    elif VALUE_SCALE == "slot":
        weights = weights * share[None, :]
    if GAPS and visible is not None:  # a weight of 0 is not enough where a value is NaN
        values = tl.where((tl.max(visible.to(tl.int32), 0) != 0)[:, None], values, 0.0)
    acc = tl.dot(weights.to(values.dtype), values, acc * tl.expand_dims(fade, -1), input_precision=PRECISION)
    return new_max, total, acc, unit


@triton.jit
def _sum_of_shares(x, SHARES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum over the first axis of [SHARES, ROWS, WIDTH], by halves: a fifth of the code of Triton's over warps."""
    x = tl.permute(x, (1, 2, 0))
    for halving in tl.static_range(1, 6):
        if SHARES >> halving > 0:
            left, right = tl.split(tl.reshape(x, (ROWS, WIDTH, SHARES >> halving, 2)))
            x = left + right
    return tl.reshape(x, (ROWS, WIDTH))


@triton.jit
def attend_tile(
    query,  # [TOKENS, KV_HEADS * GROUP, HEAD_DIM]
    key_pages,  # [rows, HEAD_DIM]: a row is a slot of a head, and POOL_ROWS, HEAD_ROWS and so on say where
    value_pages,  # [rows, VALUE_DIM]; keys and values may be one array
    page_indices,  # [seqs, PAGES_PER_SEQ]
    schedule,  # [fields, INTERVALS]: see schedule.py
    kv_head_start,  # []
    ranges,  # [TOKENS, 2]
    tree,  # [TOKENS, TREE_WORDS]
    key_scales,  # [pools], [pools, CACHE_KV_HEADS] or [rows], as KEY_SCALE says
    value_scales,
    sinks,  # [packs, KV_HEADS * GROUP]
    out,  # [NUM_SPLITS, TOKENS, KV_HEADS * GROUP, VALUE_DIM]
    lse,  # [NUM_SPLITS, TOKENS, KV_HEADS * GROUP]
    TOKENS: tl.constexpr,
    SEQS: tl.constexpr,
    INTERVALS: tl.constexpr,
    INTERVALS_PADDED: tl.constexpr,
    PARTS_FIELD: tl.constexpr,
    PIECES_FIELD: tl.constexpr,
    POOL_FIELD: tl.constexpr,
    KEY_POOL_FIELD: tl.constexpr,
    VALUE_POOL_FIELD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CACHE_KV_HEADS: tl.constexpr,
    POOL_ROWS: tl.constexpr,  # from one pool to the next, and so on
    HEAD_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    VALUE_ROWS: tl.constexpr,  # from a key to its value in one array, else 0
    PAGE_SIZE: tl.constexpr,
    PAGES_PER_SEQ: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,  # widths of the parts of a head: powers of two, or 0
    HEAD_OTHER: tl.constexpr,
    HEAD_REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,  # of a program's part of the values: registers have no room for all of a wide one
    VALUE_PARTS: tl.constexpr,
    LATENT: tl.constexpr,  # whether values are the first features of the keys; then VALUE_WIDTH is HEAD_MAIN
    KEY_SCALE: tl.constexpr,  # "one" for none, "tensor", "head" or "slot"
    VALUE_SCALE: tl.constexpr,
    RANGES: tl.constexpr,
    TREE_WORDS: tl.constexpr,  # 0 for no tree
    SEQS_OF_PACK: tl.constexpr,  # which share their sinks; None without
    SCALE: tl.constexpr,
    NEGATE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    EDGE_KV: tl.constexpr,
    ALL_MASKED: tl.constexpr,  # no block goes without a mask: of few rows it costs nothing, and a second loop its start
    KEY_SHARES: tl.constexpr,  # of a block, one a warp, which then waits for no other until the end
    NUM_SPLITS: tl.constexpr,  # parts of a tile, or the most of one
    SPLITS_PADDED: tl.constexpr,
    PARTS_VARY: tl.constexpr,
    SUM_LAST: tl.constexpr,  # whether weights are summed over warps after the loop
    LANES: tl.constexpr,  # of a warp, over which a product of few rows shares out its columns
    SPREAD: tl.constexpr,  # warps that take features of values by turns, which gives a lane neighbours; 0 for none
    FLOAT16_PRODUCTS: tl.constexpr,  # of bfloat16 queries and float8 keys, whose numbers are float16's as they are
    SHARE_COLUMNS: tl.constexpr,
    READ_AGAIN: tl.constexpr,  # to save registers
    HARDWARE_TANH: tl.constexpr,
):
    program = tl.program_id(0) // VALUE_PARTS
    first_feature = tl.program_id(0) % VALUE_PARTS * VALUE_WIDTH
    head = program % KV_HEADS
    piece = program // KV_HEADS

    # The interval whose piece this is. A piece past the last has none: it ends, or gets length 0, so that every loop is
    # empty and every store masked.
    numbers = tl.arange(0, INTERVALS_PADDED)
    first_pieces = tl.load(schedule + numbers, mask=numbers < INTERVALS, other=2**31 - 1)
    lengths = tl.load(schedule + 2 * INTERVALS + numbers, mask=numbers < INTERVALS, other=0)
    parts_of_each = NUM_SPLITS
    if PARTS_VARY:
        parts_of_each = tl.load(schedule + PARTS_FIELD * INTERVALS + numbers, mask=numbers < INTERVALS, other=1)
    if READ_AGAIN:  # where parts vary most may have none: each ends before it waits for its warps
        if piece >= tl.load(schedule + PIECES_FIELD * INTERVALS):
            return
    num_pieces = (lengths * GROUP + ROWS - 1) // ROWS * parts_of_each
    is_owner = (first_pieces <= piece) & (piece - first_pieces < num_pieces)
    interval = tl.min(tl.where(is_owner, numbers, INTERVALS), 0)
    field = schedule + interval
    exists = (interval < INTERVALS) | READ_AGAIN
    parts = tl.load(field + PARTS_FIELD * INTERVALS, mask=exists, other=1) if PARTS_VARY else NUM_SPLITS
    split, first_row, rows, row_exists, token, length = _tile_of(
        field, exists, piece, parts, INTERVALS, GROUP, ROWS, False
    )
    context_len = tl.load(field + 3 * INTERVALS, mask=exists, other=0)
    pool = tl.load(field + POOL_FIELD * INTERVALS, mask=exists, other=0)

    query_row = token.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    first_new = context_len - length
    position = first_new + rows // GROUP

    # The keys low to high that each row sees; seen_start to seen_end that some row sees; full_start to full_end that all
    # rows see. Causality and a window move with the row, so that the first row and the last say it for all.
    GAPS: tl.constexpr = RANGES or TREE_WORDS != 0  # some keys that no row sees may lie between some that are seen
    end = tl.minimum(context_len, CAPACITY)
    if RANGES:
        low = tl.maximum(tl.load(ranges + 2 * token.to(tl.int64), mask=row_exists, other=0), 0)
        high = tl.minimum(tl.load(ranges + 2 * token.to(tl.int64) + 1, mask=row_exists, other=0), end)
        sees = row_exists & (low < high)
        seen_start = tl.min(tl.where(sees, low, end), 0)
        seen_end = tl.max(tl.where(sees, high, 0), 0)
        full_start = tl.max(tl.where(row_exists, low, 0), 0)
        full_end = tl.min(tl.where(row_exists, high, end), 0)
    else:
        first_position = first_new + first_row // GROUP
        last_position = first_new + (tl.minimum(first_row + ROWS, length * GROUP) - 1) // GROUP
        high = tl.where(row_exists, position + 1, 0) if GAPS else position + 1
        seen_end = tl.minimum(last_position + 1, CAPACITY)
        full_end = tl.minimum(first_position + 1, CAPACITY)
        if WINDOW is None:
            low = 0
            seen_start = 0
            full_start = 0
        else:
            low = position - WINDOW + 1
            seen_start = tl.maximum(first_position - WINDOW + 1, 0)
            full_start = tl.maximum(last_position - WINDOW + 1, 0)
    if TREE_WORDS != 0:
        full_end = tl.minimum(full_end, first_new)
    # The same in blocks: this part's are low_block to high_block, of which full_low to full_high need no mask.
    first_block = seen_start // BLOCK_KV
    num_blocks = tl.maximum((seen_end + BLOCK_KV - 1) // BLOCK_KV - first_block, 0)
    low_block = first_block + num_blocks * split // parts
    high_block = first_block + num_blocks * (split + 1) // parts
    if ALL_MASKED:
        full_end = 0
    full_low = tl.minimum(tl.maximum((full_start + BLOCK_KV - 1) // BLOCK_KV, low_block), high_block)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_end, 0) // BLOCK_KV, high_block), full_low)

    cache_head = tl.load(kv_head_start) + head
    key_pool = tl.load(field + KEY_POOL_FIELD * INTERVALS, mask=exists, other=0)
    value_pool = tl.load(field + VALUE_POOL_FIELD * INTERVALS, mask=exists, other=0)
    first_row = cache_head.to(tl.int64) * HEAD_ROWS
    key_base = key_pages + (key_pool.to(tl.int64) * POOL_ROWS + first_row) * HEAD_DIM
    value_base = value_pages + (value_pool.to(tl.int64) * POOL_ROWS + first_row + VALUE_ROWS) * VALUE_DIM
    page_table = page_indices + tl.minimum(interval, SEQS - 1).to(tl.int64) * PAGES_PER_SEQ
    first_row += pool.to(tl.int64) * POOL_ROWS
    key_scale = _scale(key_scales, pool, pool * CACHE_KV_HEADS + cache_head, first_row, KEY_SCALE)
    value_scale = _scale(value_scales, pool, pool * CACHE_KV_HEADS + cache_head, first_row + VALUE_ROWS, VALUE_SCALE)

    query_rows = tl.where(row_exists, query_row, 0)
    tile, tile_other, tile_rest = _load_heads(
        query, query_rows, first_feature if LATENT else 0, query.dtype.element_ty, HEAD_DIM, HEAD_MAIN, HEAD_OTHER, HEAD_REST
    )

    # The blocks that need a mask, on either side of those that do not; the order of blocks is free. They are shorter,
    # of EDGE_KV keys: a mask takes registers, and fewer keys are computed for nothing. A key outside those that rows see
    # is read as the nearest inside: its weight is 0, but its slot may hold NaN, and 0 * NaN is NaN.
    # Page indices are fetched one block ahead of the keys, off the path from a key's address to its arrival. The loops
    # must not ask for num_stages themselves: Triton then pipelines those fetches too, and no longer the keys and values.
    # The first are fetched while the queries arrive, of which nothing is made before.
    SHARES: tl.constexpr = (KEY_SHARES,) if KEY_SHARES > 1 else ()
    EDGES: tl.constexpr = BLOCK_KV // EDGE_KV
    edge_low = tl.maximum(low_block * EDGES, seen_start // EDGE_KV)
    edge_high = tl.minimum(high_block * EDGES, (seen_end + EDGE_KV - 1) // EDGE_KV)
    unmasked = (full_high - full_low) * EDGES
    last_key = seen_end - 1
    edge_block = _masked_block(edge_low, edge_high, full_low * EDGES, unmasked)
    if edge_low + unmasked < edge_high:
        edge_rows = _pool_rows(
            page_table, edge_block, seen_start, last_key, EDGE_KV, KEY_SHARES, PAGE_SIZE, PAGE_ROWS, SLOT_ROWS
        )
    else:
        edge_rows = tl.zeros(SHARES + (EDGE_KV // KEY_SHARES,), tl.int32)

    row_unit = None
    if FLOAT16_PRODUCTS:
        row_unit = _power_of_2_of(tile, tile_other, tile_rest)
        tile = (tile / row_unit[:, None]).to(tl.float16)
        tile_other = (tile_other / row_unit[:, None]).to(tl.float16)
        tile_rest = (tile_rest / row_unit[:, None]).to(tl.float16)
    if KEY_SHARES > 1:  # Triton gives each product of a batch to a warp
        tile = tl.broadcast_to(tile[None, :, :], (KEY_SHARES, ROWS, tile.shape[1]))
        tile_other = tl.broadcast_to(tile_other[None, :, :], (KEY_SHARES, ROWS, tile_other.shape[1]))
        tile_rest = tl.broadcast_to(tile_rest[None, :, :], (KEY_SHARES, ROWS, tile_rest.shape[1]))
    # Triton gives the warps a product's rows where another product follows, and what more warps there are than rows do
    # the same again. It does not follow a result out of a branch: behind one, they share the columns.
    always = seen_end > 0 if SHARE_COLUMNS else True
    VALUES_WHOLE: tl.constexpr = VALUE_PARTS * VALUE_WIDTH == VALUE_DIM
    TO_BASE_2: tl.constexpr = LOG2_E * (SCALE if SOFT_CAP is None else SOFT_CAP)
    running_max = tl.full(SHARES + (ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS, EDGE_KV) if SUM_LAST else SHARES + (ROWS,), tl.float32)
    acc = tl.zeros(SHARES + (ROWS, VALUE_WIDTH), tl.float32)
    unit = tl.zeros((ROWS,), tl.float32)  # what acc is counted in, where values have scales of their own in float16
    for step in tl.range(edge_low, edge_high - unmasked):
        next_edge = _masked_block(step + 1, edge_high, full_low * EDGES, unmasked)
        next_edge_rows = _pool_rows(
            page_table, next_edge, seen_start, last_key, EDGE_KV, KEY_SHARES, PAGE_SIZE, PAGE_ROWS, SLOT_ROWS
        )
        key = _keys(edge_block, EDGE_KV, KEY_SHARES)
        visible = (tl.expand_dims(key, -2) < high[:, None]) & tl.expand_dims(key < seen_end, -2)
        if RANGES or WINDOW is not None:
            visible &= tl.expand_dims(key, -2) >= low[:, None]
        if TREE_WORDS != 0:
            visible &= _in_tree(tree, token, row_exists, key, first_new, TREE_WORDS)
        running_max, total, acc, unit = _fold_block(
            running_max, total, acc, unit, tile, tile_other, tile_rest, key_base, value_base, first_feature,
            key_scale, value_scale, edge_rows, visible, row_unit, always, SHARES, HEAD_DIM, HEAD_MAIN, HEAD_OTHER, HEAD_REST,
            VALUE_DIM, VALUE_WIDTH, VALUES_WHOLE, LANES, SPREAD, LATENT, KEY_SCALE, VALUE_SCALE, GAPS, SUM_LAST,
            SCALE, NEGATE, SOFT_CAP, TO_BASE_2, HARDWARE_TANH, PRECISION,
        )  # fmt: skip
        edge_block = next_edge
        edge_rows = next_edge_rows

    if not ALL_MASKED:
        last_block = tl.maximum(full_high - 1, full_low)
        if full_low < full_high:
            pool_rows = _pool_rows(page_table, full_low, None, None, BLOCK_KV, 1, PAGE_SIZE, PAGE_ROWS, SLOT_ROWS)
        else:
            pool_rows = tl.zeros((BLOCK_KV,), tl.int32)
        # Where queries are widest their many descriptors are made in the loop: made before it, they take registers.
        for block in tl.range(full_low, full_high, disable_licm=SHARE_COLUMNS):
            next_block = tl.minimum(block + 1, last_block)
            next_rows = _pool_rows(page_table, next_block, None, None, BLOCK_KV, 1, PAGE_SIZE, PAGE_ROWS, SLOT_ROWS)
            running_max, total, acc, unit = _fold_block(
                running_max, total, acc, unit, tile, tile_other, tile_rest, key_base, value_base, first_feature,
                key_scale, value_scale, pool_rows, None, row_unit, always, SHARES, HEAD_DIM, HEAD_MAIN, HEAD_OTHER, HEAD_REST,
                VALUE_DIM, VALUE_WIDTH, VALUES_WHOLE, LANES, SPREAD, LATENT, KEY_SCALE, VALUE_SCALE, GAPS, SUM_LAST,
                SCALE, NEGATE, SOFT_CAP, TO_BASE_2, HARDWARE_TANH, PRECISION,
            )  # fmt: skip
            pool_rows = next_rows
    if SUM_LAST:
        total = tl.sum(total, -1)

    if READ_AGAIN:
        split, _, rows, row_exists, token, length = _tile_of(
            field, exists, piece, parts, INTERVALS, GROUP, ROWS, True
        )
    if KEY_SHARES > 1:
        top = tl.max(running_max, 0)
        fade = tl.exp2(running_max - top[None, :])
        total = tl.sum(total * fade, 0)
        acc = _sum_of_shares(acc * fade[:, :, None], KEY_SHARES, ROWS, VALUE_WIDTH)
        running_max = top
    unseen = total == 0
    if VALUE_SCALE == "slot":
        if tile.dtype == tl.float16:
            acc = acc * unit[:, None]
    elif VALUE_SCALE != "one":
        acc = acc * tl.where(unseen, 1.0, value_scale)[:, None]  # nobody may look at the scale of what nobody sees
    acc = _turned(acc, VALUE_WIDTH // (LANES * max(SPREAD, 1)), SPREAD, LANES)
    if SEQS_OF_PACK is not None:  # one more weight, without a value
        has_sink = rows < tl.where(interval < SEQS, length * GROUP, 0)  # others are no sequence's
        sink_place = interval // SEQS_OF_PACK * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
        sink = tl.load(sinks + sink_place, mask=has_sink, other=float("-inf")) * LOG2_E
        top = tl.maximum(running_max, sink)
        fade = tl.exp2(running_max - top)
        acc = acc * fade[:, None]
        total = total * fade + tl.exp2(sink - top)
        running_max = top
        unseen = total == 0
    acc = acc / tl.where(unseen, 1.0, total)[:, None]
    row_lse = tl.where(unseen, float("-inf"), (running_max + tl.log2(total)) * LN_2)
    query_row = token.to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    result_row = query_row + split.to(tl.int64) * (TOKENS * KV_HEADS * GROUP)
    features = first_feature + tl.arange(0, VALUE_WIDTH)
    tl.store(
        out + result_row[:, None] * VALUE_DIM + features[None, :],
        acc.to(out.dtype.element_ty),
        mask=row_exists[:, None] & (features < VALUE_DIM)[None, :],
    )
    tl.store(lse + result_row, row_lse, mask=row_exists)
    if PARTS_VARY:  # the first part says of those that this tile does not have that they see no key
        absent = tl.arange(0, SPLITS_PADDED)
        lacks = (absent >= tl.where(split == 0, parts, NUM_SPLITS)) & (absent < NUM_SPLITS)
        places = lse + query_row[:, None] + absent.to(tl.int64)[None, :] * (TOKENS * KV_HEADS * GROUP)
        nothing = tl.full((ROWS, SPLITS_PADDED), float("-inf"), tl.float32)
        tl.store(places, nothing, mask=row_exists[:, None] & lacks[None, :])
