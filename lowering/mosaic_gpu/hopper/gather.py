"""Keys that lie anywhere, brought to a block one by one: where pages are no runs of its rows, as pages of 1.

Each lane of a loading warp has looked up one row, and all copy each of them, 16 bytes a lane. Such a copy is an ordinary
write that comes later: each lane waits for its own, and then announces them.
"""

from jax import lax

from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARP_LANES
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import SWIZZLE_BYTES, columns_of

COPY_BYTES = 16
TILE_ROWS = 8  # after which the order of a swizzled row's copies begins anew


def lane(threads):
    """This thread's, in its warp."""
    return threads.number() & (WARP_LANES - 1)


def start(threads, source, row, column, features: int, target) -> None:
    """Starts to copy so many features, from that column on, of the rows of all lanes to `target` [WARP_LANES, features],
    tiled as products read it. A negative row is zeros, which nobody reads anywhere."""
    columns = columns_of(features)
    row_bytes, parts = columns * source.dtype.itemsize, features // columns
    lanes, tile_bytes = row_bytes // COPY_BYTES, TILE_ROWS * row_bytes  # lanes that copy a part of a row side by side
    of_rows, of_row = lax.div(lane(threads), lanes), lax.rem(lane(threads), lanes)
    beyond, rows = 0, WARP_LANES // lanes  # at a time
    if rows > TILE_ROWS:  # of two tiles
        beyond = lax.div(of_rows, TILE_ROWS) * (parts * tile_bytes)
    for first in range(0, WARP_LANES, rows):
        in_tile, its_row = of_rows + first % TILE_ROWS, threads.of_lane(row, of_rows + first)
        if rows > TILE_ROWS:
            in_tile = lax.rem(of_rows, TILE_ROWS)
        place = in_tile * row_bytes + (of_row ^ lax.div(in_tile, SWIZZLE_BYTES // row_bytes)) * COPY_BYTES + beyond
        for part in range(parts):
            tile = first // TILE_ROWS * parts + part
            its_column = column + part * columns + of_row * (columns // lanes)
            threads.copy_later(source, its_row, its_column, target, place + tile * tile_bytes)
