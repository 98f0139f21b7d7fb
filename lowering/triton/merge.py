"""How the parts of tiles are merged by a kernel of Triton's; merge_kernel.py is that kernel."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.triton.launch import launch, power_of_2

LEAST_WIDTH, MOST_WIDTH = 32, 128  # features of a program
MERGED = 2**11  # numbers of all parts that a program, of one warp, has on their way
MERGED_AT_ONCE = 8  # parts, at least
PROGRAMS = 14  # a core: more are started for longer than they merge


class MergeSizes(NamedTuple):
    """`SIZES` of the merge: those of the call, and of a program of it."""

    all_rows: int
    value_dim: int
    splits: int
    splits_padded: int
    sinks: bool
    at_once: int  # parts whose outputs are on their way together
    rows: int
    width: int  # features
    widths: int  # that value_dim takes


def merge(out, lse, dtype, sinks, device: Device):
    """The attention to all keys from those to parts of them, [tokens, q_heads, splits]: by a kernel of its own.

    XLA's takes as long to run, and seconds of a compile for every one that merges many parts.
    """
    from paged_prefill.lowering.triton.merge_kernel import merge_parts

    *shape, splits, value_dim = out.shape
    sizes = merge_sizes(math.prod(shape), splits, value_dim, sinks is not None, device.cores)
    merged, lse = launch(
        merge_parts,
        [out, lse, lse if sinks is None else sinks],
        (jax.ShapeDtypeStruct((*shape, value_dim), dtype), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)),
        grid=(-(-sizes.all_rows // sizes.rows) * sizes.widths,),
        name="paged_prefill_merge",
        num_warps=1,
        num_stages=1,
        SIZES=sizes,
    )
    return merged, lse


def merge_sizes(all_rows: int, splits: int, value_dim: int, sinks: bool, cores: int) -> MergeSizes:
    """Of few rows few features each, so that all parts are on their way at once; of more so many as cores start."""
    padded, most = power_of_2(splits, least=2), min(MOST_WIDTH, power_of_2(value_dim))
    width = min(LEAST_WIDTH if padded > MERGED_AT_ONCE else 2 * LEAST_WIDTH, most)
    while width < most and all_rows * -(-value_dim // width) > PROGRAMS * cores:
        width *= 2
    widths = -(-value_dim // width)
    at_once = min(padded, max(MERGED_AT_ONCE, MERGED // width))
    rows = max(1, min(MERGED // (at_once * width), power_of_2(all_rows * widths // (PROGRAMS * cores), least=1)))
    return MergeSizes(all_rows, value_dim, splits, padded, sinks, at_once, rows, width, widths)
