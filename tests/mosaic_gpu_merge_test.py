"""The kernel that merges the Hopper kernel's tiles of several parts, run on a CPU."""

from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import merge
from paged_prefill.lowering.mosaic_gpu.hopper.plan import TILE_COLUMNS
from paged_prefill.lowering.splits import merge_splits
from paged_prefill.lowering.tiles import Tiles
from paged_prefill.tests.gpu_threads import Shared, Threads, counted

COLUMNS = TILE_COLUMNS + 4
jitted_merge = jax.jit(merge_splits, static_argnums=2, static_argnames="by_head")


def table_of(rng, tiles, room):
    """A row for each part of tiles (start, length, parts), in any order, junk behind them, and their number twice: of all, and of those
    that a merge looks through."""
    table = rng.integers(-(2**31), 2**31, (room, COLUMNS), dtype=np.int32)
    rows = [dict(start=a, length=b, part=i, parts=n) for a, b, n in tiles for i in range(n)]
    for place, row in zip(rng.permutation(len(rows)), rows):
        for name, value in row.items():
            table[place, Tiles._fields.index(name)] = value
    return np.append(table, np.int32([len(rows)] * 2))


def merged_by_threads(launch, table, of_parts, results):
    """What the kernel writes, block by block."""
    table = Shared(0, table)
    of_parts, results = ((out.reshape(-1, launch.value_dim), Shared(0, np.ravel(lse))) for out, lse in (of_parts, results))
    with mock.patch.object(merge.lax, "fori_loop", counted):
        for block in range(launch.blocks):
            threads = Threads(merge.THREADS, [])
            merge.merge_shares(launch, threads, lambda: jnp.int32(block), table, of_parts, results)
    return results[0], results[1].values


class MergeTest(parameterized.TestCase):
    @parameterized.parameters((1, 1, "bfloat16", 17), (40, 1, "float16", 5), (40, 2, "bfloat16", 17))
    def test_tiles_of_several_parts_are_merged_and_others_left_as_they_are(self, cores, tokens_of_tile, dtype, splits):
        """A block has many rows of the table, or one. Rows that see no key, rows of NaN, parts that nobody wrote."""
        rng, tiles = np.random.default_rng(cores), [(0, 1, 1), (1, 3, 4), (4, 2, 2), (6, 5, splits), (11, 1, 1)]
        tokens, heads, value_dim = 12, 10, 64
        table = table_of(rng, tiles, len(tiles) * splits)
        out = rng.standard_normal((splits, tokens, heads, value_dim)).astype(np.float32)
        lse = 20 * rng.standard_normal((splits, heads, tokens)).astype(np.float32)
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse[:, 1, 2] = -np.inf
        lse[1, 2, 5] = np.nan
        out[np.isneginf(lse).swapaxes(1, 2)] = 0
        launch = merge.Launch(cores, len(tiles) * splits, COLUMNS, tokens, tokens_of_tile, heads, value_dim)
        before = np.full(out.shape[1:], 77, dtype), np.full(lse.shape[1:], 77, np.float32)
        want = [x.copy() for x in before]
        for start, length, parts in tiles:
            here = slice(start, start + length)
            if parts > 1:
                merged = jitted_merge(out[:parts, here], lse[:parts, :, here], jnp.dtype(dtype), by_head=True)
                want[0][here], want[1][:, here] = merged[0], merged[1].T
            out[parts:, here], lse[parts:, :, here] = np.nan, np.nan
        got = merged_by_threads(launch, table, (out, lse), before)
        for a, b, tolerance in zip(got, want, (1e-2, 1e-6)):
            np.testing.assert_allclose(a.reshape(b.shape).astype(np.float32), b.astype(np.float32), tolerance)
        self.assertTrue(np.isnan(got[0].reshape(before[0].shape)[5, 2].astype(np.float32)).all())

    def test_no_row_is_looked_up_where_no_tile_is_cut(self):
        """By the second number alone: rows that it does not count may say what they like."""
        launch = merge.Launch(1, 8, COLUMNS, tokens=4, tokens_of_tile=1, q_heads=10, value_dim=64)
        table = table_of(np.random.default_rng(0), [(0, 4, 8)], 8)
        of_parts = np.zeros((8, 4, 10, 64), np.float32), np.zeros((8, 10, 4), np.float32)
        for rows, untouched in ((8, False), (0, True)):
            table[-1] = rows
            before = np.full((4, 10, 64), 77, np.float16), np.full((10, 4), 77, np.float32)
            got = merged_by_threads(launch, table, of_parts, before)
            self.assertEqual(all((x == 77).all() for x in got), untouched)


if __name__ == "__main__":
    absltest.main()
