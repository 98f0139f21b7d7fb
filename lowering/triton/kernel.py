"""The Triton kernel: one program attends with one tile of query rows to the keys it sees.

A tile is a run of `TILE.rows` rows of one sequence and one KV head, where row r is token r // group and head r % group
of the group that shares the KV head: so a group's heads fill the matrix units together, and each key is loaded once for
all of them. Each row sees one interval of keys, and in a tree some of its chunk's; keys are walked in blocks over the
hull of the tile's intervals, and only the blocks that some row does not see whole pay for a mask. The softmax is the
online one of Milakov and Gimelshein (arXiv 1805.02867) in base 2, divided once at the end, as in FlashAttention-2
(arXiv 2307.08691).

`attend_tile` is the program, and calls its stages in their order: which piece it has (`_piece_of`, `_rows_of`), which
keys its rows see (`_seen`, `_blocks`), where these lie (`_cached`), the two loops over blocks (`_fold_masked`,
`_fold_whole`), whose step is in block_kernel.py, and what it writes (`_merged`, `_scaled`, `_with_sink`, `_store`).

Importing this module needs Triton. Every size is a compile-time constant, as JAX's shapes are; so is what a call has of
the optional operands. An operand that it does not have is another array, never looked at. The constants are named
tuples of constants.py: `CALL`, `CACHE`, `SOFTMAX`, `SCHEDULE` and `TILE`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from paged_prefill.lowering.triton.block_kernel import (
    LOG2_E,
    Cached,
    Queries,
    Sums,
    fold_block,
    keys_of,
    load_heads,
    pool_rows,
    turned,
)

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no difference of two maxima is NaN


class Intervals(NamedTuple):
    """What the schedule says of all intervals: which pieces each has."""

    number: tl.tensor
    first_piece: tl.tensor
    length: tl.tensor
    parts: tl.tensor


class Pages(NamedTuple):
    """The arrays of the caches, as `attend_tile` is given them."""

    key_pages: tl.tensor
    value_pages: tl.tensor
    page_indices: tl.tensor
    key_scales: tl.tensor
    value_scales: tl.tensor


class Piece(NamedTuple):
    """What a program has: a part of a tile of an interval. One past the last has none."""

    number: tl.tensor
    interval: tl.tensor
    column: tl.tensor  # of the schedule, where the interval's fields begin
    exists: tl.tensor
    parts: tl.tensor  # that the interval's tiles have


class Rows(NamedTuple):
    """A tile's rows, and which of the tile's parts the program has."""

    part: tl.tensor
    first: tl.tensor
    number: tl.tensor  # within the interval
    exist: tl.tensor
    first_token: tl.tensor
    token: tl.tensor
    length: tl.tensor  # tokens of the interval


class Seen(NamedTuple):
    """Which keys rows see: each low to high, some row start to end, all rows full_start to full_end."""

    low: tl.tensor
    high: tl.tensor
    start: tl.tensor
    end: tl.tensor
    full_start: tl.tensor
    full_end: tl.tensor
    first_new: tl.tensor  # the first key that is new, since new tokens end the context


class Blocks(NamedTuple):
    """The part's blocks low to high, of which full_low to full_high need no mask."""

    low: tl.tensor
    high: tl.tensor
    full_low: tl.tensor
    full_high: tl.tensor


class Edges(NamedTuple):
    """The masked blocks, of EDGE_KV keys: those of low to high but for `unmasked` from full_low on."""

    low: tl.tensor
    high: tl.tensor
    full_low: tl.tensor
    unmasked: tl.tensor
    last_key: tl.tensor  # that some row sees
    first: tl.tensor  # the first of them
    first_rows: tl.tensor  # of the pool, that hold its keys


@triton.jit
def _look_up(piece, FIELD: tl.constexpr, SCHEDULE: tl.constexpr):
    """A field of the piece's interval; 0 where there is none."""
    return tl.load(piece.column + FIELD * SCHEDULE.intervals, mask=piece.exists, other=0)


@triton.jit
def _intervals(schedule, SCHEDULE: tl.constexpr):
    number = tl.arange(0, SCHEDULE.intervals_padded)
    there = number < SCHEDULE.intervals
    first_piece = tl.load(schedule + number, mask=there, other=2**31 - 1)
    length = tl.load(schedule + 2 * SCHEDULE.intervals + number, mask=there, other=0)
    parts = SCHEDULE.most_parts
    if SCHEDULE.parts_vary:
        parts = tl.load(schedule + SCHEDULE.parts_field * SCHEDULE.intervals + number, mask=there, other=1)
    return Intervals(number, first_piece, length, parts)


@triton.jit
def _piece_of(schedule, number, intervals, CALL: tl.constexpr, SCHEDULE: tl.constexpr, TILE: tl.constexpr):
    """The piece of that number. One past the last gets length 0, so that every loop is empty and every store masked."""
    num_pieces = (intervals.length * CALL.group + TILE.rows - 1) // TILE.rows * intervals.parts
    is_owner = (intervals.first_piece <= number) & (number - intervals.first_piece < num_pieces)
    interval = tl.min(tl.where(is_owner, intervals.number, SCHEDULE.intervals), 0)
    column = schedule + interval
    exists = (interval < SCHEDULE.intervals) | TILE.read_again
    parts = SCHEDULE.most_parts
    if SCHEDULE.parts_vary:
        parts = tl.load(column + SCHEDULE.parts_field * SCHEDULE.intervals, mask=exists, other=1)
    return Piece(number, interval, column, exists, parts)


@triton.jit
def _rows_of(piece, CALL: tl.constexpr, SCHEDULE: tl.constexpr, TILE: tl.constexpr, AGAIN: tl.constexpr):
    """The rows of a piece's tile.

    AGAIN reads anew what these follow from, so that the loops between need no registers to hold it.
    """
    first_piece = tl.load(piece.column, mask=piece.exists, other=0, volatile=AGAIN)
    start = tl.load(piece.column + SCHEDULE.intervals, mask=piece.exists, other=0, volatile=AGAIN)
    length = tl.load(piece.column + 2 * SCHEDULE.intervals, mask=piece.exists, other=0, volatile=AGAIN)
    within = piece.number - first_piece
    # The last tile first: it sees the most keys.
    tiles_after = (length * CALL.group + TILE.rows - 1) // TILE.rows - 1 - within // piece.parts
    first = tl.maximum(tiles_after, 0) * TILE.rows
    number = first + tl.arange(0, TILE.rows)
    part = within % piece.parts
    exist = number < length * CALL.group
    return Rows(part, first, number, exist, start + first // CALL.group, start + number // CALL.group, length)


@triton.jit
def _seen(
    rows, context_len, ranges, CALL: tl.constexpr, CACHE: tl.constexpr, SOFTMAX: tl.constexpr, TILE: tl.constexpr
):
    """Causality and a window move with the row, so that the first row and the last say it for all; ranges do not."""
    first_new = context_len - rows.length
    position = first_new + rows.number // CALL.group
    end = tl.minimum(context_len, CACHE.capacity)
    if SOFTMAX.ranges:
        low = tl.maximum(tl.load(ranges + 2 * rows.token.to(tl.int64), mask=rows.exist, other=0), 0)
        high = tl.minimum(tl.load(ranges + 2 * rows.token.to(tl.int64) + 1, mask=rows.exist, other=0), end)
        sees = rows.exist & (low < high)
        seen_start = tl.min(tl.where(sees, low, end), 0)
        seen_end = tl.max(tl.where(sees, high, 0), 0)
        full_start = tl.max(tl.where(rows.exist, low, 0), 0)
        full_end = tl.min(tl.where(rows.exist, high, end), 0)
    else:
        first_position = first_new + rows.first // CALL.group
        last_position = first_new + (tl.minimum(rows.first + TILE.rows, rows.length * CALL.group) - 1) // CALL.group
        high = tl.where(rows.exist, position + 1, 0) if SOFTMAX.gaps else position + 1
        seen_end = tl.minimum(last_position + 1, CACHE.capacity)
        full_end = tl.minimum(first_position + 1, CACHE.capacity)
        if SOFTMAX.window is None:
            low = 0
            seen_start = 0
            full_start = 0
        else:
            low = position - SOFTMAX.window + 1
            seen_start = tl.maximum(first_position - SOFTMAX.window + 1, 0)
            full_start = tl.maximum(last_position - SOFTMAX.window + 1, 0)
    if SOFTMAX.tree_words != 0:
        full_end = tl.minimum(full_end, first_new)
    return Seen(low, high, seen_start, seen_end, full_start, full_end, first_new)


@triton.jit
def _blocks(seen, rows, piece, TILE: tl.constexpr):
    """What rows see, in blocks, of which each part has as many as another or one more."""
    first = seen.start // TILE.block_kv
    number = tl.maximum((seen.end + TILE.block_kv - 1) // TILE.block_kv - first, 0)
    low = first + number * rows.part // piece.parts
    high = first + number * (rows.part + 1) // piece.parts
    full_end = 0 if TILE.all_masked else seen.full_end
    full_low = tl.minimum(tl.maximum((seen.full_start + TILE.block_kv - 1) // TILE.block_kv, low), high)
    full_high = tl.maximum(tl.minimum(tl.maximum(full_end, 0) // TILE.block_kv, high), full_low)
    return Blocks(low, high, full_low, full_high)


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
def _cached(
    pages, piece, pool, cache_head, first_feature, CALL: tl.constexpr, CACHE: tl.constexpr, SCHEDULE: tl.constexpr
):
    key_pool = _look_up(piece, SCHEDULE.key_pool_field, SCHEDULE)
    value_pool = _look_up(piece, SCHEDULE.value_pool_field, SCHEDULE)
    row = cache_head.to(tl.int64) * CACHE.head_rows
    key_base = pages.key_pages + (key_pool.to(tl.int64) * CACHE.pool_rows + row) * CALL.head_dim
    value_row = value_pool.to(tl.int64) * CACHE.pool_rows + row + CACHE.value_rows
    value_base = pages.value_pages + value_row * CALL.value_dim
    page_table = pages.page_indices + tl.minimum(piece.interval, CALL.seqs - 1).to(tl.int64) * CACHE.pages_per_seq
    row += pool.to(tl.int64) * CACHE.pool_rows
    pool_head = pool * CACHE.kv_heads + cache_head
    of_keys: tl.constexpr = CACHE.key_scale  # Triton takes no string for an argument
    of_values: tl.constexpr = CACHE.value_scale
    key_scale = _scale(pages.key_scales, pool, pool_head, row, of_keys)
    value_scale = _scale(pages.value_scales, pool, pool_head, row + CACHE.value_rows, of_values)
    return Cached(page_table, key_base, value_base, first_feature, key_scale, value_scale)


@triton.jit
def _masked_block(step, high, full_low, unmasked):
    """The block of a step through those that need a mask, or the last of them."""
    block = tl.where(step < full_low, step, step + unmasked)
    return tl.minimum(block, high - 1)


@triton.jit
def _in_interval(key, seen, SOFTMAX: tl.constexpr):
    """Whether rows see keys as far as their intervals say."""
    visible = (tl.expand_dims(key, -2) < seen.high[:, None]) & tl.expand_dims(key < seen.end, -2)
    if SOFTMAX.ranges or SOFTMAX.window is not None:
        visible &= tl.expand_dims(key, -2) >= seen.low[:, None]
    return visible


@triton.jit
def _masked_rows(
    page_table, block, seen, last_key, CACHE: tl.constexpr, SOFTMAX: tl.constexpr, TILE: tl.constexpr
):
    """Rows of the page pool for a masked block: a key outside those that rows see is read as the nearest inside.

    Its weight is 0, but its slot may hold NaN, and 0 * NaN is NaN. Where ranges leave gaps inside, all keys that no row
    sees are read as the first that some row does; or `fold_block` leaves their values out.
    """
    keys = keys_of(block, TILE.edge_kv, TILE.key_shares)
    nearest = tl.minimum(tl.maximum(keys, seen.start), last_key)
    if SOFTMAX.ranges and TILE.replace_hidden:
        if seen.full_start >= seen.full_end:  # else rows have a key in common
            seen_by_some = tl.max(_in_interval(keys, seen, SOFTMAX).to(tl.int32), -2) != 0
            nearest = tl.where(seen_by_some, keys, seen.start)
        return pool_rows(page_table, nearest, None, CACHE, TILE.edge_kv)
    else:
        return pool_rows(page_table, nearest, block, CACHE, TILE.edge_kv)


@triton.jit
def _edges(blocks, seen, page_table, CACHE: tl.constexpr, SOFTMAX: tl.constexpr, TILE: tl.constexpr):
    """The masked blocks, on either side of those that need no mask; the order of blocks is free.

    They are shorter: a mask takes registers, and fewer keys are computed for nothing.
    """
    SHARES: tl.constexpr = TILE.key_shares
    KEYS: tl.constexpr = TILE.edge_kv // SHARES
    EDGES: tl.constexpr = TILE.block_kv // TILE.edge_kv
    low = tl.maximum(blocks.low * EDGES, seen.start // TILE.edge_kv)
    high = tl.minimum(blocks.high * EDGES, (seen.end + TILE.edge_kv - 1) // TILE.edge_kv)
    unmasked = (blocks.full_high - blocks.full_low) * EDGES
    last_key = seen.end - 1
    first = _masked_block(low, high, blocks.full_low * EDGES, unmasked)
    if low + unmasked < high:
        rows = _masked_rows(page_table, first, seen, last_key, CACHE, SOFTMAX, TILE)
    else:
        rows = tl.zeros((SHARES, KEYS) if SHARES > 1 else (KEYS,), tl.int32)
    return Edges(low, high, blocks.full_low * EDGES, unmasked, last_key, first, rows)


@triton.jit
def _power_of_2_of(main, other, rest):
    """The power of two of each row's largest number: counted in it, a row fits float16 as far as it matters."""
    largest = tl.max(tl.abs(main.to(tl.float32)), 1)
    largest = tl.maximum(largest, tl.max(tl.abs(other.to(tl.float32)), 1))
    largest = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), 1))
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def _queries_of(main, other, rest, TILE: tl.constexpr):
    """Queries as products take them."""
    unit = 1.0
    if TILE.float16_products:
        unit = _power_of_2_of(main, other, rest)
        main = (main / unit[:, None]).to(tl.float16)
        other = (other / unit[:, None]).to(tl.float16)
        rest = (rest / unit[:, None]).to(tl.float16)
    SHARES: tl.constexpr = TILE.key_shares
    if SHARES > 1:  # Triton gives each product of a batch to a warp
        main = tl.broadcast_to(main[None, :, :], (SHARES, main.shape[0], main.shape[1]))
        other = tl.broadcast_to(other[None, :, :], (SHARES, other.shape[0], other.shape[1]))
        rest = tl.broadcast_to(rest[None, :, :], (SHARES, rest.shape[0], rest.shape[1]))
    return Queries(main, other, rest, unit)


@triton.jit
def _no_sums(TILE: tl.constexpr):
    """Those of no key; where warps share out keys, each has its own."""
    ROWS: tl.constexpr = TILE.rows
    KEYS: tl.constexpr = TILE.edge_kv
    WIDTH: tl.constexpr = TILE.widths.value
    SHARES: tl.constexpr = TILE.key_shares
    top = tl.full((SHARES, ROWS) if SHARES > 1 else (ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS, KEYS) if TILE.sum_last else ((SHARES, ROWS) if SHARES > 1 else (ROWS,)), tl.float32)
    weighted = tl.zeros((SHARES, ROWS, WIDTH) if SHARES > 1 else (ROWS, WIDTH), tl.float32)
    return Sums(top, total, weighted, tl.zeros((SHARES, ROWS) if SHARES > 1 else (ROWS,), tl.float32))


@triton.jit
def _in_tree(tree, rows, key, first_new, WORDS: tl.constexpr):
    """Whether rows see keys as far as the tree says: it is about the first 32 * WORDS tokens of their chunk."""
    new = key - first_new
    told = (new >= 0) & (new < 32 * WORDS)
    # From the tile's first token on, offsets have 32 bits: half the registers through the loop.
    of_tile = tree + rows.first_token.to(tl.int64) * WORDS
    place = (rows.token - rows.first_token)[:, None] * WORDS + (new >> 5)[None, :]
    word = tl.load(of_tile + place, mask=told[None, :] & rows.exist[:, None], other=0)
    bit = (word >> (new & 31).to(tl.uint32)[None, :]) & 1
    return (bit != 0) | (new < 0)[None, :] | (new >= 32 * WORDS)[None, :]


@triton.jit
def _fold_masked(
    queries,
    cached,
    seen,
    rows,
    edges,
    tree,
    CALL: tl.constexpr,
    CACHE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of the blocks that need a mask.

    Page indices are fetched one block ahead of the keys, off the path from a key's address to its arrival.
    The loops must not ask for num_stages themselves: Triton then pipelines those fetches too, and no longer the keys
    and values.
    """
    # Triton gives the warps a product's rows where another product follows, and what more warps there are than rows do
    # the same again. It does not follow a result out of a branch: behind one, they share the columns.
    always = seen.end > 0 if TILE.share_columns else True
    block = edges.first
    block_rows = edges.first_rows
    sums = _no_sums(TILE)
    for step in tl.range(edges.low, edges.high - edges.unmasked):
        next_block = _masked_block(step + 1, edges.high, edges.full_low, edges.unmasked)
        next_rows = _masked_rows(cached.page_table, next_block, seen, edges.last_key, CACHE, SOFTMAX, TILE)
        key = keys_of(block, TILE.edge_kv, TILE.key_shares)
        visible = _in_interval(key, seen, SOFTMAX)
        if SOFTMAX.tree_words != 0:
            visible &= _in_tree(tree, rows, key, seen.first_new, SOFTMAX.tree_words)
        sums = fold_block(sums, queries, cached, block_rows, visible, always, CALL, CACHE, SOFTMAX, TILE)
        block = next_block
        block_rows = next_rows
    return sums


@triton.jit
def _fold_whole(
    sums,
    queries,
    cached,
    seen,
    blocks,
    CALL: tl.constexpr,
    CACHE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """Folds the blocks of which every row sees every key."""
    always = seen.end > 0 if TILE.share_columns else True
    KEYS: tl.constexpr = TILE.block_kv
    last_block = tl.maximum(blocks.full_high - 1, blocks.full_low)
    if blocks.full_low < blocks.full_high:
        block_rows = pool_rows(cached.page_table, keys_of(blocks.full_low, KEYS, 1), blocks.full_low, CACHE, KEYS)
    else:
        block_rows = tl.zeros((KEYS,), tl.int32)
    # Where queries are widest their many descriptors are made in the loop: made before it, they take registers.
    for block in tl.range(blocks.full_low, blocks.full_high, disable_licm=TILE.share_columns):
        next_block = tl.minimum(block + 1, last_block)
        next_rows = pool_rows(cached.page_table, keys_of(next_block, KEYS, 1), next_block, CACHE, KEYS)
        sums = fold_block(sums, queries, cached, block_rows, None, always, CALL, CACHE, SOFTMAX, TILE)
        block_rows = next_rows
    return sums


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
def _merged(sums, queries, CACHE: tl.constexpr, TILE: tl.constexpr):
    """The sums of all shares of the keys."""
    IN_UNITS: tl.constexpr = CACHE.value_scale == "slot" and queries.main.dtype == tl.float16
    if TILE.key_shares > 1:
        top = tl.max(sums.top, 0)
        fade = tl.exp2(sums.top - top[None, :])
        total = tl.sum(sums.total * fade, 0)
        unit = tl.max(sums.unit, 0)
        if IN_UNITS:
            fade = fade * (sums.unit / tl.where(unit == 0, 1.0, unit)[None, :])
        weighted = _sum_of_shares(sums.weighted * fade[:, :, None], TILE.key_shares, TILE.rows, TILE.widths.value)
        return Sums(top, total, weighted, unit)
    else:
        return sums


@triton.jit
def _scaled(sums, value_scale, queries, CACHE: tl.constexpr, TILE: tl.constexpr):
    """The sums of values as they are, in the order of their features."""
    weighted = sums.weighted
    unseen = sums.total == 0
    if CACHE.value_scale == "slot":
        if queries.main.dtype == tl.float16:
            weighted = weighted * sums.unit[:, None]
    elif CACHE.value_scale != "one":  # nobody may look at the scale of what nobody sees
        weighted = weighted * tl.where(unseen, 1.0, value_scale)[:, None]
    inner: tl.constexpr = TILE.widths.value // (TILE.lanes * max(TILE.spread, 1))
    return Sums(sums.top, sums.total, turned(weighted, inner, TILE.spread, TILE.lanes), sums.unit)


@triton.jit
def _with_sink(sums, sinks, piece, rows, head, CALL: tl.constexpr):
    """The sums with one more weight, without a value."""
    # others are no sequence's
    has_sink = rows.number < tl.where(piece.interval < CALL.seqs, rows.length * CALL.group, 0)
    place = piece.interval // CALL.seqs_of_pack * (CALL.kv_heads * CALL.group) + head * CALL.group
    sink = tl.load(sinks + (place + rows.number % CALL.group), mask=has_sink, other=float("-inf")) * LOG2_E
    top = tl.maximum(sums.top, sink)
    fade = tl.exp2(sums.top - top)
    weighted = sums.weighted * fade[:, None]
    return Sums(top, sums.total * fade + tl.exp2(sink - top), weighted, sums.unit)


@triton.jit
def _query_rows(rows, head, CALL: tl.constexpr):
    """Where a tile's rows lie among all heads of all tokens."""
    return rows.token.to(tl.int64) * (CALL.kv_heads * CALL.group) + head * CALL.group + rows.number % CALL.group


@triton.jit
def _store(
    out,
    lse,
    result,
    row_lse,
    piece,
    rows,
    head,
    first_feature,
    CALL: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TILE: tl.constexpr,
):
    query_rows = _query_rows(rows, head, CALL)
    result_rows = query_rows * SCHEDULE.most_parts + rows.part
    features = first_feature + tl.arange(0, TILE.widths.value)
    tl.store(
        out + result_rows[:, None] * CALL.value_dim + features[None, :],
        result.to(out.dtype.element_ty),
        mask=rows.exist[:, None] & (features < CALL.value_dim)[None, :],
    )
    tl.store(lse + result_rows, row_lse, mask=rows.exist)
    if SCHEDULE.parts_vary:  # the first part says of those that this tile does not have that they see no key
        absent = tl.arange(0, SCHEDULE.most_parts_padded)
        lacks = (absent >= tl.where(rows.part == 0, piece.parts, SCHEDULE.most_parts)) & (absent < SCHEDULE.most_parts)
        places = lse + query_rows[:, None] * SCHEDULE.most_parts + absent[None, :]
        nothing = tl.full(places.shape, float("-inf"), tl.float32)
        tl.store(places, nothing, mask=rows.exist[:, None] & lacks[None, :])


@triton.jit
def attend_tile(
    query,  # [tokens, kv_heads * group, head_dim]
    key_pages,  # [rows, head_dim]: a row is a slot of a head, and `CACHE` says where
    value_pages,  # [rows, value_dim]; keys and values may be one array
    page_indices,  # [seqs, pages_per_seq]
    schedule,  # [fields, intervals]: see schedule.py
    kv_head_start,  # []
    ranges,  # [tokens, 2]
    tree,  # [tokens, tree_words]
    key_scales,  # [pools], [pools, heads of the cache] or [rows], as CACHE.key_scale says
    value_scales,
    sinks,  # [packs, kv_heads * group]
    out,  # [tokens, kv_heads * group, most_parts, value_dim]
    lse,  # [tokens, kv_heads * group, most_parts]
    CALL: tl.constexpr,
    CACHE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SCHEDULE: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0) // TILE.widths.value_parts
    first_feature = tl.program_id(0) % TILE.widths.value_parts * TILE.widths.value
    head = program % CALL.kv_heads
    number = program // CALL.kv_heads

    intervals = _intervals(schedule, SCHEDULE)
    if TILE.read_again:  # where parts vary most may have none: each ends before it waits for its warps
        if number >= tl.load(schedule + SCHEDULE.pieces_field * SCHEDULE.intervals):
            return
    piece = _piece_of(schedule, number, intervals, CALL, SCHEDULE, TILE)
    rows = _rows_of(piece, CALL, SCHEDULE, TILE, False)
    context_len = _look_up(piece, 3, SCHEDULE)
    pool = _look_up(piece, SCHEDULE.pool_field, SCHEDULE)
    query_rows = _query_rows(rows, head, CALL)
    seen = _seen(rows, context_len, ranges, CALL, CACHE, SOFTMAX, TILE)
    blocks = _blocks(seen, rows, piece, TILE)

    pages = Pages(key_pages, value_pages, page_indices, key_scales, value_scales)
    cache_head = tl.load(kv_head_start) + head
    cached = _cached(pages, piece, pool, cache_head, first_feature, CALL, CACHE, SCHEDULE)

    # The first page indices are fetched while the queries arrive, of which nothing is made before.
    query_rows = tl.where(rows.exist, query_rows, 0)
    first = first_feature if CACHE.latent else 0
    main, other, rest = load_heads(query, query_rows, first, query.dtype.element_ty, CALL.head_dim, TILE)
    edges = _edges(blocks, seen, cached.page_table, CACHE, SOFTMAX, TILE)
    queries = _queries_of(main, other, rest, TILE)
    sums = _fold_masked(queries, cached, seen, rows, edges, tree, CALL, CACHE, SOFTMAX, TILE)
    if not TILE.all_masked:
        sums = _fold_whole(sums, queries, cached, seen, blocks, CALL, CACHE, SOFTMAX, TILE)
    if TILE.sum_last:
        sums = Sums(sums.top, tl.sum(sums.total, -1), sums.weighted, sums.unit)

    if TILE.read_again:
        rows = _rows_of(piece, CALL, SCHEDULE, TILE, True)
    sums = _merged(sums, queries, CACHE, TILE)
    sums = _scaled(sums, cached.value_scale, queries, CACHE, TILE)
    if CALL.seqs_of_pack is not None:
        sums = _with_sink(sums, sinks, piece, rows, head, CALL)
    unseen = sums.total == 0
    result = sums.weighted / tl.where(unseen, 1.0, sums.total)[:, None]
    row_lse = tl.where(unseen, float("-inf"), (sums.top + tl.log2(sums.total)) * LN_2)
    _store(out, lse, result, row_lse, piece, rows, head, first_feature, CALL, SCHEDULE, TILE)
