"""Which keys the rows of a Hopper kernel's warpgroup see, where no GPU is needed."""

from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import compute, masks
from paged_prefill.tests import plans

TOKENS, BLOCK = 64, 64


def iota(dtype, shape, axis, *, layout):
    del layout
    return jax.lax.broadcasted_iota(dtype, shape, axis)


class SeenKeysTest(parameterized.TestCase):
    def seen(self, block, position, end_key, ranges=None, **changes):
        plan = plans.plan(soft_cap=None, tokens=TOKENS, block_q=TOKENS, rows=TOKENS, block_kv=BLOCK, warpgroups=1, **changes)
        tile = SimpleNamespace(start=0, length=TOKENS, position=position, end_key=end_key)
        piece = SimpleNamespace(tile=tile, last=block)
        optional = {} if ranges is None else dict(ranges=jnp.asarray(ranges).reshape(-1))
        with mock.patch.object(masks.plgpu, "broadcasted_iota", iota):
            with mock.patch.object(masks, "gathered", lambda array, places, _: array[places]):
                return np.asarray(masks.Rows(plan, piece, 0, optional).seen()(0))

    @parameterized.parameters(None, 1, 40, 100, 2**31 - 1)
    def test_positions(self, window):
        kinds = (0, 0, 64), (2, 100, 150), (1, 100, 170), (1, 128, 192), (3, 128, 192), (0, -20, 44)
        for block, position, end_key in kinds:
            key, token = block * BLOCK + np.arange(BLOCK), position + np.arange(TOKENS)[:, None]
            expected = (key <= token) & (key < end_key) & (key > token - (window or 2**40))
            np.testing.assert_array_equal(self.seen(block, position, end_key, window=window), expected)

    def test_ranges(self):
        rng = np.random.default_rng(0)
        ranges = np.sort(rng.integers(0, 300, (TOKENS, 2)), axis=1).astype(np.int32)
        ranges[::5] = ranges[::5, ::-1]
        ranges[1::7] = [[-(2**31), 2**31 - 1]]
        ranges[2::7] = [[2**31 - 1, -(2**31)]]
        for block in range(5):
            key, (low, end) = block * BLOCK + np.arange(BLOCK), np.int64(ranges).T[:, :, None]
            seen = self.seen(block, 0, 290, ranges, has_ranges=True)
            np.testing.assert_array_equal(seen, (key >= low) & (key < np.minimum(end, 290)))

    @parameterized.product(
        sizes=((64, 1, 64), (64, 2, 256), (128, 2, 128), (64, 3, 128), (64, 4, 64), (128, 2, 112)), masks_any=(False, True)
    )
    def test_values_that_no_row_sees_are_zeroed_once(self, sizes, masks_any):
        block, warpgroups, features = sizes
        rng, last, end_key = np.random.default_rng(block * features), 1, 2 * block - 5
        low, end = np.sort(rng.integers(0, 2 * block, (2, TOKENS)), axis=0)
        low, end = np.maximum(low, end - 9), np.minimum(end, end_key)
        ranges, first_key = np.stack([low, end], axis=1).astype(np.int32), block + 3
        sizes = dict(tokens=TOKENS, block_q=TOKENS, rows=64 * warpgroups, block_kv=block, value_dim=features)
        plan = plans.plan(soft_cap=None, warpgroups=warpgroups, has_ranges=masks_any, **sizes)
        tile = SimpleNamespace(start=0, length=TOKENS, position=0, first_key=first_key, end_key=end_key, holes=1)
        rows = masks.Rows(plan, SimpleNamespace(tile=tile, last=last), 0, dict(ranges=jnp.asarray(ranges).reshape(-1)))
        zeroed = np.zeros((block, -(-features // 64)), int)

        def zero(values, keys, parts, where):
            for key, its_part, there in zip(*map(np.asarray, (keys, parts, where))):
                if there:
                    zeroed[key, its_part] += 1

        key = last * block + np.arange(block)
        held = (first_key <= key) & (key < end_key)
        if masks_any:
            held &= ((low <= key[:, None]) & (key[:, None] < end)).any(axis=1)
        for alone in (False, True):
            zeroed[:] = 0
            number = 128 * (1 if alone else warpgroups)
            threads = dict(number=lambda number=number: jnp.arange(number, dtype=jnp.int32), zero=zero)
            with mock.patch.multiple(compute.threads, **threads), mock.patch.object(compute.plgpu, "commit_smem"):
                compute.zero_unseen(plan, rows, None if alone else 0, 0, None)
            np.testing.assert_array_equal(zeroed, np.broadcast_to(~held[:, None], zeroed.shape))


if __name__ == "__main__":
    absltest.main()
