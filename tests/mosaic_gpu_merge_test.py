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
    """A row for each part of tiles (start, length, parts), in any order, junk behind them, their number, and of each tile the
    first part's row if it has several. A tile more has no tokens.
    """
    table = rng.integers(-(2**31), 2**31, (room, COLUMNS), dtype=np.int32)
    rows = [dict(start=a, length=b, part=i, parts=n) for a, b, n in tiles for i in range(n)]
    places = rng.permutation(len(rows))
    for place, row in zip(places, rows):
        for name, value in row.items():
            table[place, Tiles._fields.index(name)] = value
    firsts = [place if row["parts"] > 1 else -1 for place, row in zip(places, rows) if row["part"] == 0]
    return np.concatenate([table.reshape(-1), [len(rows), *firsts, -1]]).astype(np.int32)


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
    @parameterized.parameters((1, 1, "bfloat16", 17, 1), (40, 1, "float16", 5, 1), (40, 2, "bfloat16", 17, 4))
    def test_tiles_of_several_parts_are_merged_and_others_left_as_they_are(
        self, cores, tokens_of_tile, dtype, splits, ways
    ):
        """A block has many rows of the table, or one; a thread has all parts, or lanes share them. Rows that see no key, rows
        of NaN, parts that nobody wrote."""
        rng, tiles = np.random.default_rng(cores), [(0, 1, 1), (1, 3, 4), (4, 2, 2), (6, 5, splits), (11, 1, 1)]
        tokens, heads, value_dim = 12, 10, 64
        table = table_of(rng, tiles, len(tiles) * splits)
        out = rng.standard_normal((splits, tokens, heads, value_dim)).astype(np.float32)
        lse = 20 * rng.standard_normal((splits, heads, tokens)).astype(np.float32)
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse[:, 1, 2] = -np.inf
        lse[1, 2, 5] = np.nan
        out[np.isneginf(lse).swapaxes(1, 2)] = 0
        launch = merge.Launch(cores, len(tiles) + 1, len(tiles) * splits, COLUMNS, tokens, tokens_of_tile, heads, value_dim, splits)
        self.assertEqual(launch.ways, ways)
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


if __name__ == "__main__":
    absltest.main()
