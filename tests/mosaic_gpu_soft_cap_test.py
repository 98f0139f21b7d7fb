"""The polynomial that stands for tanh, on its own: how far it errs where its sums do not cast doubt on it; and sinks."""

import math

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import soft_cap as soft_cap_module
from paged_prefill.lowering.mosaic_gpu.hopper.plan import SMALLEST_WEIGHT
from paged_prefill.primitive.attention import factor_and_lse, with_logit

GROUP = 16  # weights of a sum, of which a thread has four a block of 128 keys


def polynomial(soft_cap, softmax_scale=0.1):
    largest = soft_cap / math.log(2)
    maximum = min(largest, -SMALLEST_WEIGHT - largest) / largest
    return soft_cap_module.polynomial(softmax_scale, soft_cap, maximum), largest, maximum


def groups(soft_cap):
    """Logits over the cap, in groups: narrow and wide ones around means from far below to far above."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(-2, 2, (200_000, 1)) ** 3
    deviation = 10 ** rng.uniform(-3, 1, (200_000, 1))
    return mean + deviation * rng.normal(size=(200_000, GROUP))


class PolynomialTest(parameterized.TestCase):
    @parameterized.parameters(20.0, 30.0, 50.0, 51.9)
    def test_sums_that_cast_no_doubt_are_right(self, soft_cap):
        stands_in, unit, maximum = polynomial(soft_cap)
        y = groups(soft_cap)
        with np.errstate(over="ignore"):  # which is in doubt, of course
            weights = np.exp2(stands_in(y / stands_in.to_tanh) - unit * maximum)
            sums = weights.sum(axis=1)
        exact = np.exp2(unit * (np.tanh(y) - maximum))
        trusted = ~stands_in.doubts(sums)
        self.assertGreater(trusted.mean(), 0.1)
        self.assertLess(trusted.mean(), 0.9)
        errors = np.abs(weights - exact).sum(axis=1) / exact.sum(axis=1)
        self.assertLess(errors[trusted].max(), 2e-3)

    @parameterized.parameters(20.0, 50.0)
    def test_small_logits_cast_no_doubt(self, soft_cap):
        stands_in, unit, maximum = polynomial(soft_cap)
        y = np.random.default_rng(0).normal(size=(10_000, GROUP)) * 0.08
        self.assertFalse(stands_in.doubts(np.exp2(stands_in(y / stands_in.to_tanh) - unit * maximum).sum(axis=1)).any())

    @parameterized.parameters(0.1, -3.0)
    def test_scaled_queries_give_its_argument(self, softmax_scale):
        stands_in, *_ = polynomial(50.0, softmax_scale)
        logit = 12.0  # of the query as it is, before softmax_scale
        expected = math.tanh(logit * softmax_scale / 50)
        self.assertAlmostEqual(math.tanh(logit * stands_in.query_factor * stands_in.to_tanh), expected)

    @parameterized.parameters(np.nan, np.inf, 0.0)
    def test_sums_that_are_no_numbers_cast_doubt(self, value):
        stands_in, *_ = polynomial(50.0)
        self.assertTrue(stands_in.doubts(np.float32(value)))

    def test_small_caps_have_none(self):
        self.assertIsNone(polynomial(19.9)[0])


class SinkTest(parameterized.TestCase):
    @parameterized.product(sink=(-np.inf, -1e4, -90.0, 0.0, 1e4), start=(-np.inf, 26.0))
    def test_a_row_without_keys_has_its_sink_alone(self, sink, start):
        """`start` is the maximum before any key: a fixed one may lie far above the sink."""
        total, largest, fade = with_logit(*(np.full(2, x, np.float32) for x in (0, start, sink)))
        factor, lse = factor_and_lse(total, largest)
        np.testing.assert_array_equal(lse, np.full(2, sink, np.float32))
        self.assertTrue(np.all(np.isfinite(factor * fade)))

    @parameterized.product(sink=(np.inf, np.nan), total=(0, 3))
    def test_a_sink_that_is_no_number_makes_its_row_nan(self, sink, total):
        total, largest, fade = with_logit(*(np.full(2, x, np.float32) for x in (total, 1.0, sink)))
        for result in (*factor_and_lse(total, largest), fade * factor_and_lse(total, largest)[0]):
            np.testing.assert_array_equal(result, np.nan)

    def test_a_sink_is_one_more_weight(self):
        rng = np.random.default_rng(0)
        logits, sink = rng.normal(size=(50, 9)).astype(np.float32) * 30, rng.normal(size=50).astype(np.float32) * 30
        maximum = logits.max(axis=1) + rng.uniform(-5, 5, 50).astype(np.float32)
        total, largest, fade = with_logit(np.exp(logits - maximum[:, None]).sum(axis=1), maximum, sink)
        factor, lse = factor_and_lse(total, largest)
        every = np.concatenate([logits, sink[:, None]], axis=1).astype(np.float64)
        want = np.log(np.exp(every - every.max(axis=1, keepdims=True)).sum(axis=1)) + every.max(axis=1)
        np.testing.assert_allclose(lse, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(fade * factor, np.exp(maximum - want), rtol=1e-4)  # of exp(logit - maximum)


if __name__ == "__main__":
    absltest.main()
