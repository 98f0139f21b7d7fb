"""The Hopper kernel's softmax where no GPU is needed: rows that warpgroups share, and scales of each slot."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import softmax
from paged_prefill.tests import plans


class SharedRowsTest(parameterized.TestCase):
    """The arithmetic of two warpgroups that share rows: each weighs its half of the keys, by a maximum of both."""

    def attend(self, logits, values, softmax_scale):
        plan = plans.plan(soft_cap=None, head_dim=512, value_dim=512, block_q=8, block_kv=64,
                             softmax_scale=softmax_scale, cache_dtype="int8", key_scale="tensor", value_scale="tensor")
        shared = softmax.Softmax(plan, jnp.full(64, softmax_scale))
        shape = (64, values.shape[1] // 2)
        running = [(jnp.zeros(shape), jnp.full(64, -jnp.inf), jnp.zeros((64, 8)))] * 2
        with mock.patch.object(softmax, "any_in_warp", lambda flags, after: jnp.any(flags)):
            for first in range(0, logits.shape[1], 64):
                block = jnp.asarray(logits[:, first : first + 64])
                largest, halves = block.max(axis=1), jnp.split(block, 2, axis=1)
                steps = [shared.step_together(half, largest, *own) for half, own in zip(halves, running)]
                weights = jnp.concatenate([step[0] for step in steps], axis=1)
                columns = jnp.split(jnp.asarray(values[first : first + 64]), 2, axis=1)
                running = [(acc + weights @ own, m, l) for (_, acc, m, l), own in zip(steps, columns)]
        total, scales = sum(l.sum(axis=1) for _, _, l in running), [jnp.float32(1)] * 2
        results = [shared.result(acc, m, total, scales=scales) for acc, m, _ in running]
        chex.assert_trees_all_equal(results[0][1], results[1][1])
        return np.concatenate([out for out, _ in results], axis=1), np.asarray(results[0][1])

    def operands(self):
        """Rows whose logits grow from block to block or not, that see few keys, or none."""
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-1, 3, (64, 1))
        logits[::3] += np.repeat([0, 300, -500, 900], 64)
        logits[1::3, 128:] = -np.inf
        logits[2::6] = np.where(rng.random(256) < 0.02, logits[2::6], -np.inf)
        logits[7] = -np.inf
        return logits.astype(np.float32), rng.standard_normal((256, 16), np.float32)

    @parameterized.parameters(0.1, 1.0)
    def test_is_a_softmax_over_both_halves_of_all_blocks(self, softmax_scale):
        logits, values = self.operands()
        out, lse = self.attend(logits, values, softmax_scale)
        exact = np.float64(softmax_scale) * logits
        largest = np.maximum(exact.max(axis=1, keepdims=True), -1e300)
        weights = np.exp(exact - largest)
        total = weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out, weights @ values / np.maximum(total, 1e-300), rtol=1e-4, atol=1e-5)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse, (largest + np.log(total))[:, 0], rtol=1e-5, atol=1e-5)
        self.assertEqual((lse[7], np.abs(out[7]).max()), (-np.inf, 0))

    def test_a_row_has_its_bits_whatever_the_rows_beside_it(self):
        logits, values = self.operands()
        logits[1::2] = logits[1::2] * 1e-3
        # Their maximum grows a little, and so is kept: were it taken with those of the others, their bits would change.
        logits[::2] = np.random.default_rng(1).standard_normal((32, 256))
        wild = logits.copy()
        wild[1::2] += np.repeat(np.float32([0, 400, 800, 1600]), 64)
        results = [self.attend(each, values, 1.0) for each in (logits, wild)]
        chex.assert_trees_all_equal(*[[array[::2] for array in result] for result in results])

    def test_a_row_that_sees_nan_has_nan(self):
        logits, values = self.operands()
        logits[5, 70] = np.nan
        out, lse = self.attend(logits, values, 0.1)
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(lse)), [5])
        self.assertTrue(np.all(np.isnan(out[5])))


class AlternatingBlocksTest(SharedRowsTest):
    """The same of two warpgroups that take blocks by turns, and follow each other's maximum."""

    def attend(self, logits, values, softmax_scale):
        plan = plans.plan(soft_cap=None, head_dim=576, value_dim=512, block_q=1, block_kv=64, latent=True,
                          softmax_scale=softmax_scale)
        weigher = softmax.Softmax(plan)
        weigher.dtype = jnp.dtype("float32")  # of weights: what is tested is which maximum they have
        columns = jnp.split(jnp.asarray(values), 2, axis=1)
        running = [(jnp.zeros(half[:64].shape), jnp.full(64, -jnp.inf), jnp.zeros((64, 8))) for half in columns]
        anyone, same = lambda flags, after: jnp.any(flags), lambda array: array
        with mock.patch.multiple(softmax, any_in_warp=anyone, moved=same):
            for i, first in enumerate(range(0, logits.shape[1], 64)):
                keys, own = slice(first, first + 64), i % 2
                block, (acc, m, l) = jnp.asarray(logits[:, keys]), running[own]
                visible = functools.partial(jnp.not_equal, block, -jnp.inf) if i == 0 or jnp.isinf(block).any() else None
                weights, *running[own] = weigher.step(block, lambda: acc, m, l, visible)
                running[1 - own] = weigher.by_maximum(running[own][1], *running[1 - own])
                running = [(acc + weights @ half[keys], m, l) for (acc, m, l), half in zip(running, columns)]
        total = sum(l.sum(axis=1) for _, _, l in running)
        results = [weigher.result(acc, m, total) for acc, m, _ in running]
        chex.assert_trees_all_equal(results[0][1], results[1][1])
        return np.concatenate([out for out, _ in results], axis=1), np.asarray(results[0][1])


class SlotScalesTest(parameterized.TestCase):
    """The arithmetic of a softmax whose keys and values have scales of their own, slot by slot."""

    @staticmethod
    def attend(products, numbers, key_scales, value_scales, seen, whole, soft_cap=None):
        """Blocks of 64 keys; from the block `whole` on, all rows see all keys."""
        plan = plans.plan(soft_cap=soft_cap, block_kv=64, softmax_scale=0.2, cache_dtype="int8", key_scale="slot",
                             value_scale="slot")
        weigher = softmax.Softmax(plan, jnp.full(64, 0.2))
        acc, m, l = jnp.zeros((64, numbers.shape[1])), jnp.full(64, -jnp.inf), jnp.zeros((64, 8))
        anyone, same = lambda flags, after: jnp.any(flags), lambda array: array
        with mock.patch.multiple(softmax, any_in_warp=anyone, moved=same):
            for i, first in enumerate(range(0, products.shape[1], 64)):
                keys = slice(first, first + 64)
                visible = None if i >= whole else functools.partial(jnp.asarray, seen[:, keys])
                scales = [functools.partial(jnp.asarray, x[keys]) for x in (key_scales, value_scales)]
                block, before = jnp.asarray(products[:, keys]), acc
                weights, acc, m, l = weigher.step(block, lambda: before, m, l, visible, *scales)
                acc += weights.astype(jnp.float32) @ jnp.asarray(numbers[keys])
        scales = [jnp.float32(1)] * 2
        return [np.asarray(x) for x in weigher.result(acc, m, l.sum(axis=1), scales=scales)]

    @staticmethod
    def operands(spread):
        rng = np.random.default_rng(0)
        products = rng.standard_normal((64, 256)) * 10.0 ** rng.integers(-1, 2, (64, 1))
        products[::4] += np.repeat([0, 300, -500, 900], 64)
        numbers = rng.integers(-127, 128, (256, 8))
        key_scales, value_scales = (10.0 ** rng.uniform(-spread, spread, 256) for _ in range(2))
        key_scales, value_scales = np.clip(key_scales, None, 1.0), value_scales * rng.choice([-1, 1], 256)
        value_scales *= np.repeat(10.0 ** (spread * np.array([0, -1, 1, 2])), 64)
        value_scales[[3, 200]] = 0
        seen = rng.random((64, 256)) < 0.7
        seen[7], seen[:, 128:] = False, True
        seen[:, 50:60] = False  # of no row
        key_scales[50:60], value_scales[50:60] = np.nan, np.inf
        return [np.float32(x) for x in (products, numbers, key_scales, value_scales)] + [seen]

    @parameterized.product(spread=(0, 2, 6), soft_cap=(None, 20.0))
    def test_is_a_softmax_of_scaled_keys_over_scaled_values(self, spread, soft_cap):
        products, numbers, key_scales, value_scales, seen = operands = self.operands(spread)
        out, lse = self.attend(*operands, whole=2, soft_cap=soft_cap)
        key_scales, value_scales = (np.where(seen.any(0), x, 0).astype(np.float64) for x in (key_scales, value_scales))
        logits = 0.2 * products * key_scales
        logits = np.where(seen, logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap), -np.inf)
        largest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=1, keepdims=True)
        terms = weights[:, :, None] / total[:, :, None] * (value_scales[:, None] * numbers)
        error = np.abs(out - terms.sum(axis=1)) / np.abs(terms).max(axis=1)
        self.assertLess(error.max(), 4e-3)
        np.testing.assert_allclose(lse, (largest + np.log(total))[:, 0], rtol=1e-5, atol=1e-4)

    @parameterized.parameters((7.5, False), (9.0, True))
    def test_a_maximum_is_left_where_16_bits_have_room_above_it(self, growth, moves):
        """To weigh a block again costs as much as the block: only weights times scales that grow 2^8-fold do."""
        plan = plans.plan(soft_cap=None, block_kv=64, cache_dtype="int8", key_scale="slot", value_scale="slot")
        weigher, maxima = softmax.Softmax(plan, jnp.ones(64)), []
        acc, m, l = jnp.zeros((64, 8)), jnp.full(64, -jnp.inf), jnp.zeros((64, 8))
        with mock.patch.multiple(softmax, any_in_warp=lambda flags, after: jnp.any(flags), moved=lambda array: array):
            for visible, grown in ((lambda: jnp.ones((64, 64), bool), 0.0), (None, growth)):
                scales = dict(key_scales=lambda: jnp.ones(64), value_scales=lambda: jnp.full(64, 2.0**grown))
                _, acc, m, l = weigher.step(jnp.zeros((64, 64)), lambda: acc, m, l, visible, **scales)
                maxima.append(np.asarray(m))
        self.assertEqual(np.any(maxima[0] != maxima[1]), moves)

    def test_weights_of_values_that_hardly_count_stay_finite(self):
        products, numbers = np.repeat(np.float32([[0, 119.5 * np.log(2) / 0.2]]), 64, axis=1), np.ones((128, 8))
        value_scales = np.repeat(np.float32([1, 1e-36]), 64)
        operands = np.repeat(products, 64, axis=0), np.float32(numbers), np.ones(128, np.float32), value_scales
        out, lse = self.attend(*operands, np.ones((64, 128), bool), whole=1)
        np.testing.assert_allclose(lse, np.log(64) + 119.5 * np.log(2), rtol=1e-5)
        np.testing.assert_allclose(out, np.exp2(-119.5), rtol=1e-3)

    def test_a_row_has_its_bits_whatever_the_rows_beside_it(self):
        products, *others = self.operands(2)
        wild = products.copy()
        wild[1::2] += np.repeat(np.float32([0, 400, 800, 1600]), 64)
        results = [self.attend(each, *others, whole=2) for each in (products, wild)]
        self.assertTrue(np.any(results[0][0][1::2] != results[1][0][1::2]))
        chex.assert_trees_all_equal(*[[array[::2] for array in result] for result in results])

    def test_a_scale_that_a_row_sees_as_nan_makes_it_nan(self):
        for i in (2, 3):
            *others, seen = operands = self.operands(0)
            operands[i] = operands[i].copy()
            operands[i][100] = np.nan
            out, lse = self.attend(*operands[:4], seen, whole=2)
            np.testing.assert_array_equal(np.isnan(out).all(axis=1), seen[:, 100])
            np.testing.assert_array_equal(np.isnan(out).any(axis=1), seen[:, 100])


if __name__ == "__main__":
    absltest.main()
