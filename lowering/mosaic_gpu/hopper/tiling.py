"""How factors of products lie in shared memory: in tiles of 8 swizzled rows, which TMA writes and a wgmma reads.

Blocks of keys and of values lie in *parts* of 64 features, swizzled over 128 bytes. The last one may have fewer, of
heads of 80 or 96: its rows have room for 64 all the same, of which products read those that there are, and nothing
fills up the others. Such parts lie apart, [parts, rows, 64], each with copies of its own. Where all are whole, one copy
brings them.

Queries are few bytes. Their parts are as wide as all can be: 64, 32 or 16 features, swizzled over 128, 64 or 32 bytes.
"""

import math
from typing import NamedTuple

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import numpy as np

SWIZZLE_BYTES = 128  # of the widest row
LEAST_COLUMNS, COLUMNS = 16, 64  # 16-bit elements in a swizzled row, at least and at most


class Part(NamedTuple):
    """Neighbouring features of a block's rows, which lie in swizzled rows of 64."""

    first: int
    features: int


def parts_of(features: int) -> list[Part]:
    """Those of rows of so many."""
    return [Part(first, min(COLUMNS, features - first)) for first in range(0, features, COLUMNS)]


def whole(features: int) -> int:
    """How many there is room for where so many are."""
    return COLUMNS * len(parts_of(features))


def lie_apart(features: int) -> bool:
    """Whether the parts of a block do."""
    return features != whole(features)


def matrix_of(block):
    """A block [rows / 8, parts, 8, columns], whether its parts lie apart or not: what is in shared memory, seen so."""
    if ir.MemRefType(block.type).rank == 4:
        return block
    return mgpu.memref_transpose(mgpu.memref_slice(block, (slice(None), slice(None), 0)), (1, 0, 2, 3))


def columns_of(features: int) -> int:
    """Numbers of a swizzled row where so many features are in parts of one width."""
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
