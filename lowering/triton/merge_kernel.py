"""The Triton kernel that merges the parts of tiles: softmaxes of disjoint keys add up by exp(lse).

Importing this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _weighted(out_of_parts, place, feature, lses, weights, VALUE_DIM: tl.constexpr):
    """The weighted sum of some parts' outputs.

    Nobody may have written the output of a part that saw nothing. NaN is the row's own, and stays.
    """
    written = (lses != float("-inf"))[:, :, None] & (feature < VALUE_DIM)[None, None, :]
    values = tl.load(out_of_parts + place[:, :, None] * VALUE_DIM + feature[None, None, :], mask=written, other=0.0)
    return tl.sum(values * weights[:, :, None], 0)


@triton.jit
def merge_parts(
    out_of_parts,  # float32 [SPLITS, ALL_ROWS, VALUE_DIM]
    lse_of_parts,  # [SPLITS, ALL_ROWS]; what is written of -inf is not looked at
    sinks,  # [ALL_ROWS], one more weight without a value; of no one -inf
    out,  # [ALL_ROWS, VALUE_DIM]
    lse,  # [ALL_ROWS]
    ALL_ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts whose values are on their way together: all, or as many as most rows have
    ROWS: tl.constexpr,  # of a program
    WIDTH: tl.constexpr,
    WIDTHS: tl.constexpr,  # that VALUE_DIM takes
    SINKS: tl.constexpr,
):
    """One program merges some features of some rows, and goes no further than the last part that any of them has."""
    row = tl.program_id(0) // WIDTHS * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(0) % WIDTHS * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, SPLITS_PADDED)
    exists = row < ALL_ROWS
    place = part.to(tl.int64)[:, None] * ALL_ROWS + row[None, :]
    lses = tl.load(lse_of_parts + place, mask=(part < SPLITS)[:, None] & exists[None, :], other=float("-inf"))
    largest = tl.max(lses, 0)
    if SINKS:
        sink = tl.load(sinks + row, mask=exists, other=float("-inf"))
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(lses - base[None, :])
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp(sink - base)
    if AT_ONCE == SPLITS_PADDED:
        merged = _weighted(out_of_parts, place, feature, lses, weights, VALUE_DIM)
    else:
        merged = tl.zeros((ROWS, WIDTH), tl.float32)
        end = tl.max(tl.max(tl.where(lses != float("-inf"), part[:, None] + 1, 0), 0), 0)
        for first in tl.range(0, end, AT_ONCE):
            some = first + tl.arange(0, AT_ONCE)
            at = some.to(tl.int64)[:, None] * ALL_ROWS + row[None, :]
            of_some = tl.load(lse_of_parts + at, mask=(some < SPLITS)[:, None] & exists[None, :], other=float("-inf"))
            merged += _weighted(out_of_parts, at, feature, of_some, tl.exp(of_some - base[None, :]), VALUE_DIM)
    unseen = total == 0
    merged = merged / tl.where(unseen, 1.0, total)[:, None]
    places = row.to(tl.int64)[:, None] * VALUE_DIM + feature[None, :]
    tl.store(out + places, merged.to(out.dtype.element_ty), mask=exists[:, None] & (feature < VALUE_DIM)[None, :])
    tl.store(lse + row, tl.where(unseen, float("-inf"), base + tl.log(total)), mask=exists)
