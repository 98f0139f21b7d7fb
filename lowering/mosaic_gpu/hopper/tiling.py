"""How factors of products lie in shared memory: in tiles of 8 swizzled rows, which TMA writes and a wgmma reads.

A row of so many features is cut into parts, the widest first: as many of 64 as there are, and what is left into one of
32, of 16, or of both, swizzled over 128, 64 and 32 bytes. So heads of 96 or 80 features take the bytes and the products
that they have, and nothing is filled up. Each part is a *strip* of columns, which lies in an array of its own, with copies
of its own; where all are of 64, they are one strip, which one copy brings. What a single wgmma reads as its columns is
one strip too, of parts as wide as all can be.
"""

import math
from typing import NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np

SWIZZLE_BYTES = 128  # of the widest row
LEAST_COLUMNS, COLUMNS = 16, 64  # 16-bit elements in a swizzled row, at least and at most


class Strip(NamedTuple):
    """Neighbouring columns of a row that lie in one array: a part, or several of 64."""

    first: int  # feature
    features: int
    columns: int  # of a part

    @property
    def parts(self) -> int:
        return self.features // self.columns


def strips(features: int) -> list[Strip]:
    """Those of rows of so many features, the widest first."""
    if features % COLUMNS == 0:
        return one_strip(features)
    found, first = [], 0
    for columns in (64, 32, 16):
        while features - first >= columns:
            found.append(Strip(first, columns, columns))
            first += columns
    return found


def one_strip(features: int) -> list[Strip]:
    """The same columns in one array."""
    return [Strip(0, features, columns_of(features))]


def at(references, *place):
    """That place of each strip's array."""
    return [reference.at[place] for reference in references]


def columns_of(features: int) -> int:
    """Numbers of a swizzled row of a strip of so many features."""
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
