"""The Triton kernel that writes new tokens into their pages: a program stores a few tokens of one head, key and value.

A program finds the sequences that own its tokens, and their slots, from the index arrays as users give them, so that
nothing runs before it. A token without a slot is not stored; nothing else of the caches is touched.

Importing this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32 within the dtype's range as bytes of a float8, rounded to the nearest, ties to even.

    Written out, since GPUs without an instruction for it would round to float16 before.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT
    normal -= (127 - BIAS) << MANTISSA
    # Below the normal numbers: in units of the smallest, an integer in the last bits of 2^23 and it.
    unit = tl.abs(x) * (2.0 ** (BIAS - 1 + MANTISSA)) + 8388608.0
    subnormal = unit.to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.where(tl.abs(x) < 2.0 ** (1 - BIAS), subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _converted(numbers, DTYPE: tl.constexpr):
    """The same for any float32 by the instruction: what is too large becomes the largest number."""
    if DTYPE == tl.float8e5:
        CONVERT: tl.constexpr = "cvt.rn.satfinite.e5m2x2.f32"
    else:
        CONVERT: tl.constexpr = "cvt.rn.satfinite.e4m3x2.f32"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; " + CONVERT + " low, $2, $1; " + CONVERT + " high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [numbers],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _stored(numbers, DTYPE: tl.constexpr, LARGEST: tl.constexpr, CONVERTS: tl.constexpr):
    """float32 as a quantised cache holds it."""
    if CONVERTS and DTYPE != tl.int8:
        return _converted(numbers, DTYPE).to(DTYPE, bitcast=True)
    numbers = tl.where(numbers > LARGEST, LARGEST, tl.where(numbers < -LARGEST, -LARGEST, numbers))
    if DTYPE == tl.int8:
        rounded = (numbers + 12582912.0) - 12582912.0  # 1.5 * 2^23, past which there are no fractions
        return rounded.to(tl.int8)
    elif DTYPE == tl.float8e5:
        return _float8(numbers, 2, 15).to(DTYPE, bitcast=True)
    else:
        return _float8(numbers, 3, 7).to(DTYPE, bitcast=True)


@triton.jit
def _quotient(numbers, divisor, FUSES: tl.constexpr):
    """numbers / divisor, to the nearest float32: by one reciprocal of each divisor where that is exact.

    Two steps of Newton's make a quotient exact (Markstein) whose remainders are: those of divisors far from the ends of
    float32 are, where a quotient is not so small that every cache's dtype has 0 for it. An infinite one needs no steps.
    """
    SMALLEST: tl.constexpr = 2.0**-80
    LARGE: tl.constexpr = 2.0**80
    if FUSES:
        size = tl.abs(divisor)
        if tl.min(tl.where((size > SMALLEST) & (size < LARGE), 1, 0)) == 1:
            inverse = tl.broadcast_to(tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor), numbers.shape)
            each = tl.broadcast_to(divisor, numbers.shape)
            guess = numbers * inverse
            closer = tl.fma(tl.fma(-guess, each, numbers), inverse, guess)
            exact = tl.fma(tl.fma(-closer, each, numbers), inverse, closer)
            found = tl.where(tl.abs(guess) < float("inf"), exact, guess)
        else:
            found = tl.div_rn(numbers, tl.broadcast_to(divisor, numbers.shape))
    else:
        found = tl.div_rn(numbers, tl.broadcast_to(divisor, numbers.shape))
    return found


@triton.jit
def _write(
    rows,  # [BLOCK, PADDED]
    slot,  # [BLOCK]
    exists,  # [BLOCK]
    given_scale,
    cache,
    scales,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    FAST: tl.constexpr,
    pool_head,
    pool,
):
    """Stores rows at slots of a cache, quantised if it is."""
    features = tl.arange(0, PADDED)
    if cache.dtype.element_ty != rows.dtype:
        numbers = rows.to(tl.float32)
        if SCALE == "slot":
            own = tl.div_rn(tl.max(tl.abs(numbers), 1), LARGEST)
            # A maximum passes NaN over.
            own = tl.where(tl.max((numbers != numbers).to(tl.int32), 1) != 0, float("nan"), own)
            tl.store(scales + slot, own, mask=exists)
            numbers = _quotient(numbers, tl.where(own == 0, 1.0, own)[:, None], FAST)
        elif SCALE != "one":
            own = tl.load(given_scale + (pool_head if SCALE == "head" else pool) + tl.zeros((1, 1), tl.int32))
            numbers = _quotient(numbers, tl.where(own == 0, 1.0, own), FAST)
        rows = _stored(numbers, cache.dtype.element_ty, LARGEST, FAST)
    tl.store(
        cache + slot[:, None] * SIZE + features[None, :],
        rows,
        mask=exists[:, None] & (features < SIZE)[None, :],
    )


@triton.jit
def _load(new, row, there, SIZE: tl.constexpr, PADDED: tl.constexpr):
    features = tl.arange(0, PADDED)
    return tl.load(
        new + row[:, None] * SIZE + features[None, :], mask=there[:, None] & (features < SIZE)[None, :], other=0.0
    )


@triton.jit
def append_tokens(
    key,  # [packs, TOKENS, KV_HEADS, HEAD_DIM]
    value,  # [packs, TOKENS, KV_HEADS, VALUE_DIM]
    context_lens,  # [packs, SEQS]
    page_indices,  # [packs, SEQS, PAGES_PER_SEQ]
    query_offsets,  # [packs, SEQS + 1]
    layer,  # [packs]
    given_key_scale,  # [pools] or [pools, KV_HEADS]
    given_value_scale,
    key_cache_before,
    value_cache_before,
    key_scales_before,
    value_scales_before,
    key_cache,  # [rows, HEAD_DIM]: a row is a slot of a head, and POOL_ROWS, HEAD_ROWS and so on say where
    value_cache,  # [rows, VALUE_DIM]; never looked at where key_cache holds both, and so the scales
    key_scales,  # [rows]
    value_scales,
    TOKENS: tl.constexpr,
    SEQS: tl.constexpr,
    PAGES_PER_SEQ: tl.constexpr,
    PACKS_OF_POOL: tl.constexpr,
    LAYERS: tl.constexpr,  # None without the operand `layer`
    KV_HEADS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    POOL_ROWS: tl.constexpr,  # from one pool to the next, and so on
    HEAD_ROWS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    VALUE_ROWS: tl.constexpr,  # from a key to its value in one array, else None
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,  # None in a latent cache
    VALUE_DIM_PADDED: tl.constexpr,
    KEY_SCALE: tl.constexpr,  # "one", "tensor", "head" or "slot"
    VALUE_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    FAST: tl.constexpr,  # quotients by fused operations, and float8 by an instruction
    MAX_CONTEXT: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = program % KV_HEADS
    pack = program // (KV_HEADS * BLOCKS)
    token = program // KV_HEADS % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    there = token < TOKENS
    row = (pack.to(tl.int64) * TOKENS + token) * KV_HEADS + head
    keys = _load(key, row, there, HEAD_DIM, HEAD_DIM_PADDED)
    if VALUE_DIM is not None:
        values = _load(value, row, there, VALUE_DIM, VALUE_DIM_PADDED)

    # The first offset past a token ends the sequence that owns it, whatever lies behind: offsets may not decrease. What
    # there is to know of sequences is read with the offsets, so that nothing but the page waits for it.
    offsets = query_offsets + pack * (SEQS + 1)
    past = tl.full((BLOCK,), SEQS + 1, tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    context_len = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, SEQS + 1, OFFSETS):
        number = first + tl.arange(0, OFFSETS)
        offset = tl.load(offsets + number, mask=number <= SEQS, other=-1)
        is_seq = (number >= 1) & (number <= SEQS)
        context = tl.load(context_lens + pack * SEQS + number - 1, mask=is_seq, other=0)
        here = tl.min(tl.where(offset[None, :] > token[:, None], number[None, :], SEQS + 1), 1)
        is_here = (number[None, :] == here[:, None]) & (here < past)[:, None]
        end += tl.sum(tl.where(is_here, offset[None, :], 0), 1)
        context_len += tl.sum(tl.where(is_here, context[None, :], 0), 1)
        past = tl.minimum(past, here)
    owned = there & (past >= 1) & (past <= SEQS)
    seq = pack * SEQS + tl.where(owned, past - 1, 0)
    end = tl.minimum(end, TOKENS)
    context_len = tl.minimum(tl.maximum(context_len, 0), MAX_CONTEXT)
    position = context_len - end + token
    unsigned = tl.maximum(position, 0).to(tl.uint32)
    column = (unsigned // PAGE_SIZE).to(tl.int32)
    exists = owned & (position >= 0) & (column < PAGES_PER_SEQ)
    page = tl.load(page_indices + seq.to(tl.int64) * PAGES_PER_SEQ + column, mask=exists, other=-1)
    exists &= (page >= 0) & (page < NUM_PAGES)

    pool = pack // PACKS_OF_POOL
    if LAYERS is not None:
        pool = pool * LAYERS + tl.minimum(tl.maximum(tl.load(layer + pack), 0), LAYERS - 1)
    pool_head = pool * KV_HEADS + head
    slot = pool.to(tl.int64) * POOL_ROWS + head.to(tl.int64) * HEAD_ROWS + page.to(tl.int64) * PAGE_ROWS
    slot += (unsigned % PAGE_SIZE).to(tl.int32) * SLOT_ROWS
    _write(
        keys, slot, exists, given_key_scale, key_cache, key_scales,
        HEAD_DIM, HEAD_DIM_PADDED, KEY_SCALE, LARGEST, FAST, pool_head, pool,
    )  # fmt: skip
    if VALUE_ROWS is not None:
        _write(
            values, slot + VALUE_ROWS, exists, given_value_scale, key_cache, key_scales,
            VALUE_DIM, VALUE_DIM_PADDED, VALUE_SCALE, LARGEST, FAST, pool_head, pool,
        )  # fmt: skip
    elif VALUE_DIM is not None:
        _write(
            values, slot, exists, given_value_scale, value_cache, value_scales,
            VALUE_DIM, VALUE_DIM_PADDED, VALUE_SCALE, LARGEST, FAST, pool_head, pool,
        )  # fmt: skip
