"""One step of the Triton kernel: how a block of keys and values is found, loaded, and folded into a tile's softmax.

`CALL`, `CACHE`, `SOFTMAX` and `TILE` are what a kernel is compiled for: the named tuples of constants.py.

Importing this module needs Triton.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Four int8 as float16: the bytes that count from -128 on are the last digits of numbers of 1024 and more.
INT8_TO_FLOAT16 = tl.constexpr(
    """{
    .reg .b32 bytes, digits, least;
    xor.b32 bytes, $2, 0x80808080;
    mov.b32 digits, 0x64646464;
    mov.b32 least, 0x64806480;
    prmt.b32 $0, bytes, digits, 0x4140;
    prmt.b32 $1, bytes, digits, 0x4342;
    sub.f16x2 $0, $0, least;
    sub.f16x2 $1, $1, least;
    }"""
)


class Queries(NamedTuple):
    """A tile's rows of queries, in the parts that their product with keys is summed of (see `Widths`).

    A part of width 0 is the main one again.
    """

    main: tl.tensor
    other: tl.tensor
    rest: tl.tensor
    unit: tl.tensor  # what each row is counted in, or 1


class Cached(NamedTuple):
    """Where the keys and values of one sequence and head lie, and by what they are scaled."""

    page_table: tl.tensor
    key_base: tl.tensor
    value_base: tl.tensor
    first_feature: tl.tensor  # of the values that the program sums up
    key_scale: tl.tensor  # of all keys; where those of slots lie; or 1
    value_scale: tl.tensor


class Sums(NamedTuple):
    """An online softmax: each row's largest logit in base 2, its sum of weights, and of weighted values."""

    top: tl.tensor
    total: tl.tensor
    weighted: tl.tensor
    unit: tl.tensor  # what `weighted` is counted in, where values have scales of their own in float16


@triton.jit
def keys_of(block, BLOCK_KV: tl.constexpr, KEY_SHARES: tl.constexpr):
    """The keys of a block; of several shares [KEY_SHARES, keys of each], which take them by turns."""
    if KEY_SHARES == 1:
        return block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    else:
        turns = tl.arange(0, BLOCK_KV // KEY_SHARES)[None, :]
        return block * BLOCK_KV + turns * KEY_SHARES + tl.arange(0, KEY_SHARES)[:, None]


@triton.jit
def pool_rows(page_table, keys, block, CACHE: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Rows of the page pool that hold keys; `block` is theirs, or None where others are read in place of some."""
    if block is not None and CACHE.page_size % BLOCK_KV == 0:  # the block lies in one page
        page = tl.load(page_table + block * BLOCK_KV // CACHE.page_size)
    else:  # unsigned: a shift by a power of 2
        page = tl.load(page_table + (keys.to(tl.uint32) // CACHE.page_size).to(tl.int32))
    return page * CACHE.page_rows + (keys.to(tl.uint32) % CACHE.page_size).to(tl.int32) * CACHE.slot_rows


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
def _to(x, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """`x` in a dtype that has its numbers. Of int8 Triton would make float16 one by one."""
    if TILE.ptx and x.dtype == tl.int8 and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(INT8_TO_FLOAT16, "=&r,=&r,r", [x], tl.float16, is_pure=True, pack=4)
    else:
        return x.to(DTYPE)


@triton.jit
def load_heads(base, rows, first, DTYPE: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Rows of queries or keys in the parts that their product is summed of; a part of width 0 is the main one again."""
    MAIN: tl.constexpr = TILE.widths.main
    OTHER: tl.constexpr = TILE.widths.other
    REST: tl.constexpr = TILE.widths.rest
    main = _load_rows(base, rows, first, SIZE, MAIN, MAIN + OTHER <= SIZE)
    main = _to(main, DTYPE, TILE)
    other = main
    rest = main
    if OTHER != 0:
        other = _to(_load_rows(base, rows, MAIN - first, SIZE, OTHER, MAIN + OTHER <= SIZE), DTYPE, TILE)
    if REST != 0:
        rest = _to(_load_rows(base, rows, MAIN + OTHER, SIZE, REST, MAIN + OTHER + REST <= SIZE), DTYPE, TILE)
    return main, other, rest


@triton.jit
def turned(x, OUTER: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr):
    """The columns of [rows, OUTER * MIDDLE * INNER] in the order INNER, MIDDLE, OUTER; unchanged where MIDDLE is 0."""
    if MIDDLE == 0:
        return x
    else:
        WIDTH: tl.constexpr = OUTER * MIDDLE * INNER
        ROWS: tl.constexpr = x.numel // WIDTH
        apart = tl.reshape(x, (ROWS, OUTER, MIDDLE, INNER))
        return tl.reshape(tl.permute(apart, (0, 3, 2, 1)), x.shape)


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
def _logits(queries, keys, cached, rows, always, SOFTMAX: tl.constexpr, CACHE: tl.constexpr, TILE: tl.constexpr):
    """Products of queries and keys, of which `keys` has the parts; scaled but for the softmax scale, and capped."""
    main, other, rest = keys
    SHARES: tl.constexpr = TILE.key_shares
    ROWS: tl.constexpr = queries.main.shape[-2]
    KEYS: tl.constexpr = main.shape[-2]
    logits = tl.zeros((SHARES, ROWS, KEYS) if SHARES > 1 else (ROWS, KEYS), tl.float32)
    if always:
        logits = tl.dot(queries.main, tl.trans(main), input_precision=SOFTMAX.precision)
    if TILE.widths.other != 0:
        logits = tl.dot(queries.other, tl.trans(other), logits, input_precision=SOFTMAX.precision)
    if TILE.widths.rest != 0:
        logits = tl.dot(queries.rest, tl.trans(rest), logits, input_precision=SOFTMAX.precision)
    row_scale = queries.unit
    if CACHE.key_scale == "slot":
        logits = logits * tl.expand_dims(tl.load(cached.key_scale + rows), -2)
    elif CACHE.key_scale != "one":
        row_scale = row_scale * cached.key_scale
    if TILE.float16_products:
        logits = logits * row_scale[:, None]
    elif CACHE.key_scale == "tensor" or CACHE.key_scale == "head":
        logits = logits * row_scale
    if SOFTMAX.negate:
        logits = -logits
    if SOFTMAX.soft_cap is not None:
        exact: tl.constexpr = queries.main.dtype == tl.float32
        logits = _tanh(logits * (SOFTMAX.scale / SOFTMAX.soft_cap), exact, TILE.ptx)
    return logits


@triton.jit
def _maxima(x, y, other_x, other_y):
    return tl.maximum(x, other_x), tl.maximum(y, other_y)


@triton.jit
def fold_block(
    sums,
    queries,
    cached,
    rows,
    visible,
    always,
    CALL: tl.constexpr,
    CACHE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """One step of the online softmax: folds a block into a tile's sums.

    `rows` are those of the pool that hold its keys. `visible` is None where all rows of the tile see all keys; `always`
    is True, to the compiler or at run time.
    """
    dtype: tl.constexpr = queries.main.dtype
    # Where keys are values too, their main part is the program's part of those.
    first = cached.first_feature if CACHE.latent else 0
    keys = load_heads(cached.key_base, rows, first, dtype, CALL.head_dim, TILE)
    values = keys[0]
    if not CACHE.latent:
        width: tl.constexpr = TILE.widths.value
        whole: tl.constexpr = TILE.widths.value_parts * width == CALL.value_dim
        values = _load_rows(cached.value_base, rows, cached.first_feature, CALL.value_dim, width, whole)
        values = turned(values, TILE.lanes, TILE.spread, width // (TILE.lanes * max(TILE.spread, 1)))
        values = _to(values, dtype, TILE)
    logits = _logits(queries, keys, cached, rows, always, SOFTMAX, CACHE, TILE)
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    # Some keys may be seen by no row.
    HIDDEN: tl.constexpr = SOFTMAX.gaps and visible is not None and not TILE.replace_hidden
    if CACHE.value_scale == "slot":
        share = tl.load(cached.value_scale + rows)
        if HIDDEN:
            share = tl.where(tl.max(visible.to(tl.int32), 0) != 0, share, 0.0)
    # A weight times a small scale would leave float16's normal numbers: it is counted in a row's largest scale.
    IN_UNITS: tl.constexpr = CACHE.value_scale == "slot" and dtype == tl.float16
    total = sums.total
    top = sums.top
    unit = sums.unit
    weights = logits
    fade = sums.top
    if always:
        if IN_UNITS:  # both at once, since warps wait for one another
            shares = tl.broadcast_to(tl.expand_dims(tl.abs(share), -2), logits.shape)
            largest, largest_share = tl.reduce((logits, shares), len(logits.shape) - 1, _maxima)
            unit = tl.maximum(sums.unit, largest_share)
        else:
            largest = tl.max(logits, -1)
        top = tl.maximum(sums.top, largest * SOFTMAX.to_base_2)
        weights = tl.exp2(logits * SOFTMAX.to_base_2 - tl.expand_dims(top, -1))
        fade = tl.exp2(sums.top - top)
        if TILE.sum_last:  # those of neighbouring keys are a thread's own
            some = tl.reshape(weights, (total.shape[0], total.shape[1], weights.shape[1] // total.shape[1]))
            total = total * fade[:, None] + tl.sum(some, 2)
        else:
            total = total * fade + tl.sum(weights, -1)
    if IN_UNITS:
        inverse = 1.0 / tl.where(unit == 0, 1.0, unit)
        fade = fade * (sums.unit * inverse)
        weights = weights * (tl.expand_dims(share, -2) * tl.expand_dims(inverse, -1))
    elif CACHE.value_scale == "slot":
        weights = weights * tl.expand_dims(share, -2)
    if HIDDEN:  # a weight of 0 is not enough where a value is NaN
        values = tl.where((tl.max(visible.to(tl.int32), 0) != 0)[:, None], values, 0.0)
    weights = weights.to(values.dtype)
    weighted = sums.weighted * tl.expand_dims(fade, -1)
    weighted = tl.dot(weights, values, weighted, input_precision=SOFTMAX.precision)
    return Sums(top, total, weighted, unit)
