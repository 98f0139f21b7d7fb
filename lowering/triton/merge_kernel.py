"""The Triton kernel that merges the parts of tiles: softmaxes of disjoint keys add up by exp(lse).

Importing this module needs Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _outputs(rows_of_parts, part, feature, SIZES: tl.constexpr):
    """Some parts' outputs, all on their way together: a guarded load would wait for what the one before it is needed for."""
    pointers = rows_of_parts[:, :, None] + (part * SIZES.value_dim)[:, :, None] + feature[None, None, :]
    if SIZES.value_dim % SIZES.width == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(feature < SIZES.value_dim)[None, None, :], other=0.0)


@triton.jit
def _weighted(values, lses, base):
    """The weighted sum of some parts' outputs but those that saw nothing. NaN is the row's own, and stays."""
    values = tl.where((lses != float("-inf"))[:, :, None], values, 0.0)
    return tl.sum(values * tl.exp(lses - base[None, :])[:, :, None], 0)


@triton.jit
def merge_parts(
    out_of_parts,  # float32 [rows, splits, value_dim]
    lse_of_parts,  # [rows, splits]; what is written of -inf is not looked at
    sinks,  # [rows], one more weight without a value; of no one -inf
    out,  # [rows, value_dim]
    lse,  # [rows]
    SIZES: tl.constexpr,
):
    """One program merges some features of some rows, and goes no further than the last part that any of them has."""
    row = tl.program_id(0) // SIZES.widths * SIZES.rows + tl.arange(0, SIZES.rows)
    feature = tl.program_id(0) % SIZES.widths * SIZES.width + tl.arange(0, SIZES.width)
    part = tl.arange(0, SIZES.splits_padded)
    exists = row < SIZES.all_rows
    first_place = tl.where(exists, row, 0).to(tl.int64)[None, :] * SIZES.splits
    rows_of_parts = out_of_parts + first_place * SIZES.value_dim
    there = (part < SIZES.splits)[:, None] & exists[None, :]
    lses = tl.load(lse_of_parts + first_place + part[:, None], mask=there, other=float("-inf"))
    # Nobody may have written the output of a part that saw nothing: in its place another is read, and left out.
    if SIZES.at_once == SIZES.splits_padded:
        written = tl.where(lses != float("-inf"), part[:, None], 0)
        values = _outputs(rows_of_parts, written, feature, SIZES)
    largest = tl.max(lses, 0)
    if SIZES.sinks:
        sink = tl.load(sinks + row, mask=exists, other=float("-inf"))
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    if SIZES.at_once == SIZES.splits_padded:
        merged = _weighted(values, lses, base)
    else:
        ROWS: tl.constexpr = SIZES.rows
        WIDTH: tl.constexpr = SIZES.width
        merged = tl.zeros((ROWS, WIDTH), tl.float32)
        end = tl.max(tl.max(tl.where(lses != float("-inf"), part[:, None] + 1, 1), 0), 0)
        for first in tl.range(0, end, SIZES.at_once):
            some = tl.minimum(first + tl.arange(0, SIZES.at_once), end - 1)[:, None]
            values = _outputs(rows_of_parts, some, feature, SIZES)
            of_some = tl.load(lse_of_parts + first_place + some)
            new = (first + tl.arange(0, SIZES.at_once))[:, None] < end
            merged += _weighted(values, tl.where(new, of_some, float("-inf")), base)
    total = tl.sum(tl.exp(lses - base[None, :]), 0)
    if SIZES.sinks:
        total += tl.exp(sink - base)
    unseen = total == 0
    merged = merged / tl.where(unseen, 1.0, total)[:, None]
    places = row.to(tl.int64)[:, None] * SIZES.value_dim + feature[None, :]
    tl.store(out + places, merged.to(out.dtype.element_ty), mask=exists[:, None] & (feature < SIZES.value_dim)[None, :])
    tl.store(lse + row, tl.where(unseen, float("-inf"), base + tl.log(total)), mask=exists)
