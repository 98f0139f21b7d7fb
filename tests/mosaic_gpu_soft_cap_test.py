"""The polynomial that stands for tanh, on its own: how far it errs wherever its sums do not cast doubt on it."""

import math

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import soft_cap as soft_cap_module
from paged_prefill.lowering.mosaic_gpu.hopper.plan import SMALLEST_WEIGHT

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


if __name__ == "__main__":
    absltest.main()
