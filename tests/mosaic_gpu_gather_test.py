"""Keys that a Hopper warp gathers one by one, run on a CPU."""

import itertools
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper import gather, loading
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARP_LANES
from paged_prefill.tests import plans, problems
from paged_prefill.tests.gpu_threads import Shared, Threads, counted


class Lanes(Threads):
    """A warp's: what it copies lies in `copied` bytes at once, each written once."""

    def __init__(self, size):
        super().__init__(WARP_LANES, [])
        self.copied, self.written = np.zeros(size, np.uint8), np.zeros(size, int)

    def close_group(self):
        pass

    def wait_for_groups(self, left):
        pass

    def of_lane(self, value, lane):
        return jnp.asarray(value)[lane]

    def copy_later(self, matrix, row, column, shared, byte):
        places = np.asarray(byte)[:, None] + np.arange(gather.COPY_BYTES)
        words = np.stack(self.load_words(matrix, jnp.maximum(row, 0), column, gather.COPY_BYTES // 4), axis=-1)
        self.copied[places] = np.where(np.asarray(row)[:, None] < 0, 0, words.view(np.uint8))
        self.written[places] += 1


class GatherTest(parameterized.TestCase):
    @parameterized.product(features=(16, 48, 64, 80, 192, 256), column=(0, 128))
    def test_each_row_lies_as_products_read_it(self, features, column):
        """Tiles of 8 rows of 64 numbers: of a row, 16 bytes lie where their place and the row's differ in their bits.

        Rows that are not there are zeros, and so is what is behind the features of a part that has fewer.
        """
        rng, parts = np.random.default_rng(features + column), -(-features // 64)
        source = rng.integers(0, 2**16, (300, 512), dtype=np.uint16)
        rows = rng.permutation(len(source))[:WARP_LANES]
        rows[rng.permutation(WARP_LANES)[:9]] = -1
        threads = Lanes(WARP_LANES * 64 * parts * 2)
        gather.start(threads, source, jnp.asarray(rows, jnp.int32), jnp.int32(column), features, None)
        self.assertTrue((threads.written == 1).all())
        tiles = threads.copied.view(np.uint16).reshape(WARP_LANES // 8, parts, 8, 8, 8)
        for lane, row in enumerate(rows):
            copies = tiles[lane // 8, :, lane % 8, np.arange(8) ^ lane % 8].swapaxes(0, 1)
            expected = np.zeros(64 * parts)
            if row >= 0:
                expected[:features] = source[row, column : column + features]
            np.testing.assert_array_equal(copies.reshape(-1), expected)


class Ring:
    at = property(lambda self: self)

    def __getitem__(self, place):
        return place


class LoadingTest(parameterized.TestCase):
    @parameterized.product(page_size=(1, 5, 24), keys=((0, 300), (150, 290), (260, 261), (0, 1)), done=(0, 7))
    def test_each_block_has_its_own_keys_however_early_they_are_looked_up(self, page_size, keys, done):
        """Keys that the tile does not see have no row; each block is announced once, to the stage it lies in."""
        rng, (first_key, end_key) = np.random.default_rng(page_size), keys
        pages_per_seq, seq = -(-300 // page_size), 2 if first_key else 0
        plan = plans.plan(page_size=page_size, page_rows=page_size, pages_per_seq=pages_per_seq, num_pages=700, soft_cap=None)
        self.assertTrue(plan.gathers)
        table = rng.integers(0, plan.num_pages, (3, pages_per_seq)).astype(np.int32)
        first_block, end_block = first_key // plan.block_kv, -(-end_key // plan.block_kv)
        piece = SimpleNamespace(
            tile=SimpleNamespace(seq=seq, first_key=first_key, end_key=end_key),
            last=end_block - 1, steps=end_block - first_block, first_row=40)  # fmt: skip
        source = SimpleNamespace(rows="cache", beside=0, features=128, shares=1, freed=1, stages=2, blocks=Ring(), here=SimpleNamespace(at=range(2)))
        pages, started, announced = Shared(table.size, table.reshape(-1)), [], []
        source.free = source.here
        share = loading.Loading(plan, pages, mock.MagicMock(), [source], range(64, 128, 32), has_queries=False)
        python = SimpleNamespace(fori_loop=counted, rem=lambda a, b: int(a) % b)
        warps = SimpleNamespace(barrier_wait=lambda slot: None, barrier_arrive=announced.append)
        start = lambda threads, rows, row, column, features, target: started.append((target, np.asarray(row)))
        when = lambda true: lambda do: do() if true else None
        with (
            mock.patch.multiple(loading, lax=python, threads=Lanes(0), plgpu=warps, pl=SimpleNamespace(when=when, ds=slice)),
            mock.patch.object(gather, "start", start),
        ):
            share.copy_piece(piece, done)
        self.assertEqual(announced, [(done + i) % 2 for i in range(piece.steps) for _ in share.offsets])
        blocks = itertools.product(range(piece.steps), (64, 96))
        for (i, offset), (target, rows) in zip(blocks, started, strict=True):
            self.assertEqual((int(target[0]), target[1]), ((done + i) % 2, slice(offset, 32)))
            of_lanes = (piece.last - i) * plan.block_kv + offset + np.arange(WARP_LANES)
            seen = (first_key <= of_lanes) & (of_lanes < end_key)
            places = table[seq, np.minimum(of_lanes // page_size, pages_per_seq - 1)] * page_size + of_lanes % page_size
            np.testing.assert_array_equal(rows, np.where(seen, piece.first_row + places, -1))


class SizesTest(parameterized.TestCase):
    def sizes(self, **changes):
        return host.MosaicGpu().heuristic(problems.problem(**changes), Device("cuda", "NVIDIA H200", "9.0"))

    @parameterized.parameters(dict(warpgroups=2), dict(warpgroups=1, teams=2))
    def test_lanes_that_have_several_keys_have_registers_for_them(self, **sizes):
        """24 are too few for the pages of four keys, and were spilled beside each block."""
        plan = plans.plan(page_size=1, page_rows=1, pages_per_seq=300, **sizes)
        self.assertEqual((plan.gathers, plan.computing_warpgroups), (True, 2))
        computes, loads, _ = plan.registers
        self.assertGreaterEqual(loads, 40)
        self.assertLessEqual(128 * (2 * computes + loads), 65536)

    @parameterized.parameters((16, 2), (1, 3), (24, 3))
    def test_parts_have_one_more_block_on_its_way_where_keys_are_gathered(self, page_size, stages):
        config = self.sizes(tokens=9, seqs=9, q_heads=4, num_kv_heads=1, page_size=page_size, pages_per_seq=28800 // page_size)
        self.assertGreater(config.num_splits, 1)
        self.assertEqual((config.block_kv, config.num_stages), (128, stages))

    @parameterized.product(page_size=(1, 16), tokens=(1, 14), pages=(3, 48))
    def test_no_block_is_larger_than_twice_the_table(self, page_size, tokens, pages):
        config = self.sizes(tokens=tokens, page_size=page_size, pages_per_seq=pages)
        self.assertEqual(config.block_kv, 64 if page_size * pages <= 64 else 128)


if __name__ == "__main__":
    absltest.main()
