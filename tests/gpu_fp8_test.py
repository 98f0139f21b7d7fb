"""The Hopper kernel's products in 8 bits on a real GPU. Where there is no GPU, every test is skipped."""

import functools

from absl.testing import absltest, parameterized
import chex
import jax
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.tests import layouts, oracle, poisoned
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
DECODE = ((1, 300), (1, 1), (1, 900), (1, 64))
USUAL = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3, dtype="bfloat16",
             cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")
THREE_WARPGROUPS = dict(block_q=192, block_kv=64, num_warps=16, num_stages=5)
KINDS = dict(
    plain={},
    float16=dict(dtype="float16", key_scale="tensor", value_scale=None),
    everything=dict(key_ranges=True, tree_words=2, sinks=True, layers=2),
    tree=dict(tree_words=1, page_size=8),
    d64=dict(head_dim=64, value_dim=192, page_size=64),
    d192=dict(head_dim=192, value_dim=128, page_size=128),
    d256=dict(head_dim=256, value_dim=256, key_ranges=True),
    group_of_16=dict(q_heads=16, kv_heads=1),
    page_32=dict(page_size=32, key_ranges=True),
    page_256=dict(page_size=256, sinks=True),
)
RELATIVE = 3e-2  # that an output may err in L2
LSE_ERRORS = {1: 5e-2, 2: 2e-2}  # by the number of terms: those of single logits, in rows of few keys
SMALL = 0.02  # a scale whose logits spread by 0.3: with one term, the error grows with them


class GpuFp8Test(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self, hopper=True)

    def attend(self, call, fp8_terms, sizes=(), **parameters):
        cfg = PrefillPageAttentionConfig(fp8_terms=fp8_terms, **dict(sizes))
        run = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=cfg, **parameters)
        return jax.jit(lambda call: run(**call))(call)

    def check(self, seed, fp8_terms, kind, sizes=(), **parameters):
        call = poisoned.make_call(seed, **(USUAL | kind))
        if fp8_terms == 1:
            parameters = dict(softmax_scale=SMALL) | parameters
        results = self.attend(call, fp8_terms, sizes, **parameters)
        oracle.assert_near(call, *results, RELATIVE, LSE_ERRORS[fp8_terms], **parameters)

    @parameterized.product(kind=tuple(KINDS), fp8_terms=(1, 2))
    def test_is_near_the_oracle(self, kind, fp8_terms):
        self.check(0, fp8_terms, KINDS[kind])
        self.check(1, fp8_terms, KINDS[kind], attn_logits_soft_cap=20.0)

    @parameterized.product(sliding_window=(30, 100), fp8_terms=(1, 2))
    def test_windows(self, sliding_window, fp8_terms):
        self.check(2, fp8_terms, dict(sliding_window=sliding_window), sliding_window=sliding_window)

    @parameterized.product(kind=("plain", "everything", "group_of_16"), fp8_terms=(1, 2))
    def test_in_splits_of_decode_steps(self, kind, fp8_terms):
        self.check(3, fp8_terms, KINDS[kind] | dict(sequences=DECODE), dict(num_splits=3))

    @parameterized.product(kind=("plain", "everything", "tree"), fp8_terms=(1, 2))
    def test_three_warpgroups(self, kind, fp8_terms):
        kind = KINDS[kind] | dict(sequences=((400, 900), (193, 193), (5, 700)))
        self.check(4, fp8_terms, kind, THREE_WARPGROUPS)

    @parameterized.parameters(0.01, 0.2, -0.25)
    def test_two_terms_are_near_whatever_logits_are(self, softmax_scale):
        self.check(5, 2, {}, softmax_scale=softmax_scale)

    def test_long_contexts(self):
        """Tensor cores add products of 8 bits in fewer bits than 32: what 64 blocks lose is within the bar."""
        self.check(6, 2, dict(sequences=((64, 8192),), q_heads=2))

    @parameterized.parameters(*layouts.NAMES)
    def test_every_layout(self, name):
        call = poisoned.make_call(7, **USUAL)
        results = self.attend(layouts.lay(call, name), 2, cache_layout=name)
        chex.assert_trees_all_equal(results, self.attend(call, 2))

    @parameterized.product(sizes=((), THREE_WARPGROUPS), sliding_window=(None, 70))
    def test_what_no_row_sees_has_no_effect_on_any_bit(self, sizes, sliding_window):
        call = poisoned.make_call(9, **USUAL, sliding_window=sliding_window)
        other = dict(call)
        poisoned.poison_unseen(np.random.default_rng(99), other, sliding_window)
        run = functools.partial(self.attend, fp8_terms=2, sizes=sizes, sliding_window=sliding_window)
        chex.assert_trees_all_equal(run(call), run(other))

    @parameterized.parameters(1, 2)
    def test_a_row_has_the_same_bits_each_time_whatever_the_rows_beside_it(self, fp8_terms):
        call = poisoned.make_call(10, **(USUAL | dict(sequences=((100, 900),), tokens_before=0)))
        wild = dict(call, query=call["query"].copy())
        wild["query"][1::2] *= 100
        results = [self.attend(each, fp8_terms) for each in (call, wild, call)]
        self.assertTrue(np.any(results[0][0][1::2] != results[1][0][1::2]))
        chex.assert_trees_all_equal(*[[array[::2] for array in result] for result in results])
        chex.assert_trees_all_equal(results[0], results[2])


if __name__ == "__main__":
    absltest.main()
