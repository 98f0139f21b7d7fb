"""Keys that lie anywhere, brought to a block one by one: where pages are no runs of its rows, as pages of 1.

Each lane of a loading warp has looked up one row, and all copy each of them, 16 bytes a lane. Such a copy is an ordinary
write that comes later: each lane waits for its own, and then announces them.
"""

from jax import lax

from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, SWIZZLE_BYTES
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARP_LANES

COPY_BYTES = 16
LANES = SWIZZLE_BYTES // COPY_BYTES  # that copy a part of a row side by side: its 64 numbers
ROWS = WARP_LANES // LANES  # at a time
TILE_ROWS = 8  # after which the order of a swizzled row's copies begins anew


def lane(threads):
    """This thread's, in its warp."""
    return threads.number() & (WARP_LANES - 1)


def start(threads, source, row, column, features: int, target) -> None:
    """Starts to copy so many features, from that column on, of the rows of all lanes to `target` [WARP_LANES, features],
    tiled as products read it. A negative row is zeros, which nobody reads anywhere."""
    of_rows, of_row = lax.div(lane(threads), LANES), lax.rem(lane(threads), LANES)
    parts = features // COLUMNS
    for first in range(0, WARP_LANES, ROWS):
        in_tile, its_row = of_rows + first % TILE_ROWS, threads.of_lane(row, of_rows + first)
        place = in_tile * SWIZZLE_BYTES + (of_row ^ in_tile) * COPY_BYTES
        for part in range(parts):
            tile = first // TILE_ROWS * parts + part
            its_column = column + part * COLUMNS + of_row * (COLUMNS // LANES)
            threads.copy_later(source, its_row, its_column, target, place + tile * TILE_ROWS * SWIZZLE_BYTES)
