"""How the parts of tiles are merged by a kernel of Triton's; merge_kernel.py is that kernel."""

import math

import jax
import jax.numpy as jnp

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.triton.launch import launch, power_of_2

MERGED_WIDTH, MERGED = 128, 2**11  # features and numbers of all parts that a warp merges
MERGED_AT_ONCE = 8  # parts, where rows keep all cores busy


def merge(out, lse, dtype, sinks, device: Device):
    """The attention to all keys from those to parts of them, [splits, tokens, q_heads]: by a kernel of its own.

    XLA's takes as long to run, and seconds of a compile for every one that merges many parts.
    """
    from paged_prefill.lowering.triton.merge_kernel import merge_parts

    splits, *shape, value_dim = out.shape
    all_rows, width = math.prod(shape), min(MERGED_WIDTH, power_of_2(value_dim))
    splits_padded, widths = power_of_2(splits, least=2), -(-value_dim // width)
    # As many programs as fill the cores, of no more than registers hold: of few rows, all parts by several warps.
    at_once = splits_padded if all_rows * widths <= 4 * device.cores else min(splits_padded, MERGED_AT_ONCE)
    rows = max(1, min(MERGED // (at_once * width), power_of_2(all_rows * widths // (8 * device.cores), least=1)))
    merged, lse = launch(
        merge_parts,
        [out, lse, lse if sinks is None else sinks],
        (jax.ShapeDtypeStruct((*shape, value_dim), dtype), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)),
        grid=(-(-all_rows // rows) * widths,),
        name="paged_prefill_merge",
        num_warps=1 if rows * at_once * width <= MERGED else 4,
        num_stages=1,
        ALL_ROWS=all_rows,
        VALUE_DIM=value_dim,
        SPLITS=splits,
        SPLITS_PADDED=splits_padded,
        AT_ONCE=at_once,
        ROWS=rows,
        WIDTH=width,
        WIDTHS=widths,
        SINKS=sinks is not None,
    )
    return merged, lse
