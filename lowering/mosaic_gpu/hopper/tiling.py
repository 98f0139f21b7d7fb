"""How factors of products lie in shared memory: in tiles of 8 swizzled rows, which TMA writes and a wgmma reads.

A row of so many features is cut into parts of 64, 32 or 16 of them, whichever are whole, and swizzled over 128, 64 or 32
bytes: so heads of 96 or 80 features take the bytes and the products that they have, and nothing is filled up.
"""

import math

from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np

SWIZZLE_BYTES = 128  # of the widest row
LEAST_COLUMNS, COLUMNS = 16, 64  # 16-bit elements in a swizzled row, at least and at most


def columns_of(features: int) -> int:
    """Numbers of a swizzled row where rows have so many features: 64, 32 or 16, so that all parts of a row are whole."""
    return math.gcd(COLUMNS, features)


def tiling_of(dtype, features: int = COLUMNS):
    """How factors of products of that dtype lie in shared memory, by the size of their last dimension."""
    columns = columns_of(features)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * dtype.itemsize)


def columns_of_bytes(features: int) -> int:
    """Numbers of a swizzled row of 8 bits that no product reads: 128 where all parts are whole so, and else 64."""
    return math.gcd(SWIZZLE_BYTES, features)


def tiling_of_bytes(features: int):
    """How blocks of them lie."""
    columns = columns_of_bytes(features)
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns)


# Of parts of 64 numbers, in 16 and in 8 bits.
TILED, TILED_BYTES = tiling_of(np.dtype(np.float16)), tiling_of(np.dtype(np.int8))


def tiled(reference):
    """The type of such a factor."""
    return plgpu.RefType(tiling_of(reference.dtype, reference.shape[-1]))
