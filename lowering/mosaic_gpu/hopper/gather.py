"""Keys that lie anywhere, brought to a block one by one: where pages are no runs of its rows, as pages of 1.

Each lane of a loading warp has looked up one row, and all copy each of them, 16 bytes a lane. Such a copy is an
ordinary write that comes later: each lane waits for its own, and then announces them.
"""

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARP_LANES
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, SWIZZLE_BYTES, parts_of

COPY_BYTES = 16
TILE_ROWS = 8  # after which the order of a swizzled row's copies begins anew


def lane(threads):
    """This thread's, in its warp."""
    return threads.number() & (WARP_LANES - 1)


def start(threads, source, row, column, features: int, target) -> None:
    """Starts to copy so many features, from that column on, of the rows of all lanes to `target`: WARP_LANES rows of
    whole parts of 64, tiled as products read them. A negative row is zeros, which nobody reads anywhere, and so is what
    lies behind the features."""
    lanes, tile_bytes = SWIZZLE_BYTES // COPY_BYTES, TILE_ROWS * SWIZZLE_BYTES  # lanes that copy a part side by side
    of_rows, of_row = lax.div(lane(threads), lanes), lax.rem(lane(threads), lanes)
    parts, rows = parts_of(features), WARP_LANES // lanes  # at a time
    for first in range(0, WARP_LANES, rows):
        in_tile, its_row = of_rows + first % TILE_ROWS, threads.of_lane(row, of_rows + first)
        place = in_tile * SWIZZLE_BYTES + (of_row ^ in_tile) * COPY_BYTES
        for i, part in enumerate(parts):
            of_part = of_row * (COLUMNS // lanes)
            there = its_row if part.features == COLUMNS else jnp.where(of_part < part.features, its_row, -1)
            tile = first // TILE_ROWS * len(parts) + i
            threads.copy_later(source, there, column + part.first + of_part, target, place + tile * tile_bytes)
