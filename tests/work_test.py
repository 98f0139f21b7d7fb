"""Protects what other tests count work with."""

from absl.testing import absltest
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from paged_prefill.tests import work


class CounterTest(absltest.TestCase):
    def test_loops_count_as_often_as_they_turn(self):
        def turn(count):
            return lax.fori_loop(0, count, lambda i, x: x + 1.0, jnp.zeros(100))

        count = work.counter(turn, jnp.int32(0))
        self.assertEqual(count(jnp.int32(7)) - count(jnp.int32(5)), 2 * (100 + 1))  # and the loop's own counter

    def test_a_scan_counts_its_body_and_gives_its_results(self):
        def step(carry, x):
            return carry + x.sum(), jnp.sin(x) * carry

        def run(xs, factor):
            return lax.scan(lambda c, x: step(c * factor, x), jnp.float32(1), xs, reverse=True)

        operands = jnp.arange(12.0).reshape(4, 3), jnp.float32(2)
        count, results = work._evaluate(jax.make_jaxpr(run)(*operands), *operands)
        for got, want in zip(results, jax.tree.leaves(run(*operands)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
        self.assertEqual(float(count), 4 * (1 + 1 + 1 + 3 + 3))

    def test_the_branch_that_is_taken_counts(self):
        def either(flag, x):
            return lax.cond(flag, lambda x: x + 1, lambda x: jnp.cos(jnp.sin(x)), x)

        x = jnp.ones(50)
        count = work.counter(either, True, x)
        self.assertEqual(count(False, x) - count(True, x), 50)

    def test_a_write_in_place_counts_what_is_written(self):
        def write(x):
            return lax.dynamic_update_slice(x, jnp.ones(3), (5,)).reshape(10, 100)

        count = work.counter(write, jnp.zeros(1000))
        self.assertLess(count(jnp.zeros(1000)), 20)


if __name__ == "__main__":
    absltest.main()
