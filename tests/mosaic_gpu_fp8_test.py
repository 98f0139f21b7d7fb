"""The Hopper kernel's products in 8 bits, as far as they can be tested without a GPU."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper import compute, softmax
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.tests import layouts, packs, plans, poisoned, problems

KERNEL = host.MosaicGpu()
HOPPER = Device("cuda", "NVIDIA H100", "9.0")
FP8 = jnp.float8_e4m3fn


def plan(**changes):
    usual = dict(soft_cap=None, block_kv=64, cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")
    return plans.plan(**(usual | dict(fp8_terms=2) | changes))


def rounded(numbers):
    """As the kernel rounds, which keeps what is too large at the largest number."""
    return jnp.clip(numbers, -448, 448).astype(FP8).astype(jnp.float32)


class ArithmeticTest(parameterized.TestCase):
    @parameterized.parameters(1e-20, 1.0, 3e4)
    def test_two_terms_are_a_bfloat16(self, size):
        rng = np.random.default_rng(0)
        query = rng.standard_normal((64, 128)) * 10.0 ** rng.integers(-2, 1, (64, 1)) * size
        query[5], query[6, 3] = 0, size * 2.0**20
        query = np.float32(query.astype(jnp.bfloat16))
        for scale in (0.5, -0.5):
            factor, to_logits = softmax.scaled_rows(plan(), np.abs(query).max(axis=1), jnp.float32(scale))
            scaled = query * np.asarray(factor)[:, None]
            first = rounded(scaled)
            terms = np.float64(first) + np.float64(rounded(scaled - first))
            self.assertLess(np.abs(scaled).max(), 448)
            # Where numbers are small beside their row's largest, nothing is lost but what 8 bits cannot hold.
            np.testing.assert_allclose(terms, scaled, rtol=0, atol=2.0**-10)
            large = np.abs(scaled) >= 1
            np.testing.assert_array_equal(terms[large], scaled[large])
            some = np.abs(query).max(axis=1) > 0
            np.testing.assert_allclose(
                (terms * np.asarray(to_logits)[:, None])[some], (query * scale * plan().softmax_scale)[some],
                rtol=1e-5, atol=2e-5 * np.abs(query).max(),
            )

    def test_a_row_that_is_not_finite_is_nan(self):
        for number in (np.inf, np.nan):
            factor, to_logits = softmax.scaled_rows(plan(), jnp.full(64, number), jnp.float32(0.5))
            self.assertTrue(np.all(np.isnan(factor * number)))
            self.assertFalse(np.any(to_logits <= 0))

    @parameterized.parameters(0.3, 1.0, 3.0)
    def test_weights_of_8_bits_are_a_softmax(self, spread):
        """Also where a row's maximum grows from block to block, a little or much, and so do weights by an old one."""
        rng = np.random.default_rng(1)
        logits = rng.standard_normal((64, 256)) * spread
        logits[::2] += np.repeat([0, 1.5, 3, 4.5], 64)
        logits[1::4] += np.repeat([0, 30, 500, -30], 64)
        values = rng.standard_normal((256, 512), np.float32)
        weigher, largest = softmax.Softmax(plan(), jnp.ones(64)), []
        acc, m, l = jnp.zeros((64, 512)), jnp.full(64, -jnp.inf), jnp.zeros((64, 8))

        def packed(weights):
            largest.append(float(weights.max()))
            return rounded(weights)

        fakes = dict(any_in_warp=lambda flags, after: jnp.any(flags), moved=lambda array: array, packed=packed)
        with mock.patch.multiple(softmax, **fakes), jax.disable_jit():
            for first in range(0, 256, 64):
                visible = functools.partial(jnp.ones, (64, 64), bool) if first == 0 else None
                block, before = jnp.asarray(logits[:, first : first + 64], jnp.float32), acc
                weights, acc, m, l = weigher.step(block, lambda: before, m, l, visible)
                self.assertLessEqual(float(weights.max()), 448)
                acc += weights @ values[first : first + 64]
        out, lse = weigher.result(acc, m, l.sum(axis=1), scales=[jnp.float32(1)] * 2)
        exact = np.exp(logits - logits.max(axis=1, keepdims=True))
        total = exact.sum(axis=1, keepdims=True)
        want = exact @ values / total
        self.assertLess(np.linalg.norm(out - want) / np.linalg.norm(want), 3e-2)
        np.testing.assert_allclose(lse, logits.max(axis=1) + np.log(total[:, 0]), rtol=1e-5, atol=1e-5)

    def test_blocks_of_keys_are_as_many_as_come_and_blocks_of_values_as_are_transposed(self):
        fp8 = plan(stages=6)
        self.assertEqual((fp8.key_slots, fp8.slots, fp8.widens_keys), (6, 4, False))
        self.assertEqual([int(fp8.key_slot_of(0, jnp.int32(i))) for i in (5, 6, 7)], [5, 0, 1])
        widened = plan(stages=6, fp8_terms=0)
        self.assertEqual((widened.key_slots, widened.widens_keys), (widened.slots, True))
        teams = plans.plan(teams=2, warpgroups=1, stages=3)
        self.assertEqual(teams.key_slot_of(1, jnp.int32(4)), teams.slot_of(1, jnp.int32(4)))

    @parameterized.parameters(0, 1, 2)
    def test_a_warpgroup_writes_its_query_over_its_own_alone(self, fp8_terms):
        """Of one term in half the room, the second warpgroup's lay where the first might still have its query to read."""
        self.assertEqual(plan(fp8_terms=fp8_terms).query_matrices, (1 if fp8_terms == 0 else 2) * plan().query_parts)


class SizesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("int8", dict(cache_dtype="int8"), "got 1 with caches in int8"),
        ("not_quantised", dict(features=(), cache_dtype="bfloat16"), "got 1 with caches in bfloat16"),
        ("slots", dict(features=("quantised", "slot_scales")), "got 1 with scales of each token and head"),
        ("latent", dict(features=("quantised", "latent"), num_kv_heads=1, cache_kv_heads=1), "got 1 with a latent cache"),
        ("wide", dict(head_dim=512, value_dim=512), "got 1 with a latent cache or a head_dim or value_dim above 256"),
    )
    def test_refuses(self, changes, reason):
        sizes = dict(tokens=100, pages_per_seq=200, features=("quantised",), cache_dtype="float8_e4m3fn") | changes
        problem = problems.problem(**sizes)
        config = PrefillPageAttentionConfig(fp8_terms=1).over(KERNEL.heuristic(problem, HOPPER))
        self.assertIn(reason, KERNEL.misfit(problem, HOPPER, config))
        self.assertIsNone(KERNEL.misfit(problem, HOPPER, PrefillPageAttentionConfig(fp8_terms=0).over(config)))

    @parameterized.product(
        head_dim=(64, 128, 192, 256), page_size=(8, 64), pack=((100, 1), (8192, 1), (16, 16)), fp8_terms=(1, 2)
    )
    def test_sizes_of_widened_caches_fit(self, head_dim, page_size, pack, fp8_terms):
        tokens, seqs = pack
        problem = problems.problem(tokens=tokens, seqs=seqs, head_dim=head_dim, value_dim=head_dim, page_size=page_size,
                                   pages_per_seq=200, features=("quantised",), cache_dtype="float8_e4m3fn")
        config = KERNEL.complete(problem, HOPPER, PrefillPageAttentionConfig(fp8_terms=fp8_terms))
        self.assertIsNone(KERNEL.misfit(problem, HOPPER, config))

    @parameterized.parameters(
        (None, (), 12), (0, (), 12), (1, (), 16), (2, (), 16), (None, ("slot_scales",), 16)
    )
    def test_two_warpgroups_where_they_widen_larger_blocks_than_three(self, fp8_terms, features, num_warps):
        """Scales of slots leave no room for those, and what is not widened lies in half the shared memory.

        In float16: caches of bfloat16 queries are widened before.
        """
        problem = problems.problem(tokens=8192, q_heads=32, num_kv_heads=8, pages_per_seq=512, dtype="float16",
                                   features=("quantised", *features), cache_dtype="float8_e4m3fn")
        config = KERNEL.complete(problem, HOPPER, PrefillPageAttentionConfig(fp8_terms=fp8_terms))
        self.assertEqual(config.num_warps, num_warps)

    @parameterized.parameters(-1, 3, True, 1.0, "1")
    def test_terms_that_there_are_not(self, value):
        with self.assertRaisesRegex(ValueError, "cfg.fp8_terms must be 0, 1, 2 or None, got"):
            PrefillPageAttentionConfig(fp8_terms=value)


class LoweringTest(parameterized.TestCase):
    def check_lowers(self, call, fp8_terms, **parameters):
        cfg = PrefillPageAttentionConfig(fp8_terms=fp8_terms)
        run = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", cfg=cfg, **parameters))
        with mock.patch.object(host, "launch", side_effect=host.launch) as launch:
            text = run.trace(**call).lower(lowering_platforms=("cuda",)).as_text()
        [launched] = launch.call_args_list
        self.assertEqual(launched.args[0].fp8_terms, fp8_terms)
        self.assertIn("mosaic_gpu", text)
        return launched.args[0]

    def call(self, **kind):
        usual = dict(sequences=((70, 300), (1, 513), (9, 4)), q_heads=8, kv_heads=2, head_dim=128, page_size=16,
                     dtype="bfloat16", cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")
        return poisoned.make_call(0, **(usual | kind))

    @parameterized.named_parameters(
        ("plain", 1, {}, {}),
        ("everything", 2, dict(key_ranges=True, tree_words=2, sinks=True, layers=2), dict(attn_logits_soft_cap=20.0)),
        ("tree", 1, dict(tree_words=1, head_dim=64, value_dim=192, page_size=8), {}),
        ("window", 2, dict(head_dim=192, value_dim=128, key_scale=None, value_scale="tensor"), dict(sliding_window=100)),
        ("float16", 1, dict(dtype="float16", head_dim=256, page_size=64), {}),
        ("decode", 2, dict(sequences=((1, 300),) * 8, sinks=True), {}),
        ("three_warpgroups", 1, dict(sequences=((8192, 8192),), q_heads=32, kv_heads=8), {}),
    )
    def test_lowers_with_every_operand(self, fp8_terms, kind, parameters):
        self.check_lowers(self.call(**kind), fp8_terms, **parameters)

    @parameterized.parameters(0, 1, 2)
    def test_products_take_the_terms_that_there_are(self, fp8_terms):
        """And not what else the rows of a query have room for."""
        with mock.patch.object(compute, "start_products", side_effect=compute.start_products) as start:
            plan = self.check_lowers(self.call(), fp8_terms)
        [parts] = {call.args[0].shape[0] for call in start.call_args_list}
        self.assertEqual(parts, plan.query_parts * max(fp8_terms, 1))

    @parameterized.parameters(*layouts.NAMES)
    def test_lowers_in_every_layout(self, name):
        self.assertIn(name, LAYOUTS)
        self.check_lowers(layouts.lay(self.call(), name), 2, cache_layout=name)

    def test_widens_unless_asked(self):
        self.check_lowers(self.call(), 0)

    def test_other_kernels_have_no_use_for_it(self):
        operands = dict(zip(packs.Pack._fields, self.small()))
        results = [
            jax.jit(functools.partial(ragged_paged_prefill, platform="xla", cfg=PrefillPageAttentionConfig(fp8_terms=n)))(
                **operands
            )
            for n in (0, 2)
        ]
        chex.assert_trees_all_equal(*results)

    @staticmethod
    def small():
        query, key, value = np.random.default_rng(0).standard_normal((3, 4, 2, 8, 16), np.float32)
        pools = [x[:2] for x in (key, value)]
        return query[:, :, 0], *pools, np.int32([4]), np.int32([[0, 1]]), np.int32([0, 4])


if __name__ == "__main__":
    absltest.main()
