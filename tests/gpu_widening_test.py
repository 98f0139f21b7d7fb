"""Quantised caches that are widened before the Hopper kernel, on a real GPU. Without one, every test is skipped."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import widening
from paged_prefill.tests import layouts, oracle, poisoned
from paged_prefill.tests.append_test import QUANTISED
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
USUAL = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3, dtype="bfloat16")
DTYPES_AND_SCALES = {
    f"{dtype}_{scale}": dict(cache_dtype=dtype, key_scale=scale, value_scale=scale)
    for dtype in QUANTISED
    for scale in (None, *poisoned.GRANULARITIES)
}
SLOTS, HEADS = DTYPES_AND_SCALES["int8_slot"], DTYPES_AND_SCALES["float8_e4m3fn_head"]
KINDS = dict(
    everything=dict(key_ranges=True, tree_words=2, sinks=True, layers=2, **SLOTS),
    ranges=dict(key_ranges=True, **HEADS),
    tree=dict(tree_words=1, page_size=8, **HEADS),
    one_scale=dict(cache_dtype="int8", key_scale="slot", sinks=True),
    d64=dict(head_dim=64, value_dim=192, page_size=64, **SLOTS),
    d256=dict(head_dim=256, page_size=256, **HEADS),
    d512=dict(head_dim=512, value_dim=512, page_size=32, **SLOTS),
    latent=dict(latent=True, head_dim=576, value_dim=512, q_heads=32, kv_heads=1, cache_dtype="int8", key_scale="slot"),
    long=dict(sequences=((600, 1900), (700, 700)), **HEADS),
)


class GpuWideningTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self, hopper=True)
        self.enterContext(mock.patch.multiple(widening, TILES=0, TILES_OF_SLOT_SCALES=0))

    def attend(self, call, **parameters):
        run = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, **parameters)
        with mock.patch.object(widening, "widen_pages", side_effect=widening.widen_pages) as spy:
            results = jax.jit(lambda call: run(**call))(call)
        spy.assert_called_once()
        return results

    def check(self, seed, kind, **parameters):
        call = poisoned.make_call(seed, **(USUAL | kind))
        if kind.get("latent"):
            parameters |= dict(value_dim=kind["value_dim"])
        size = call["key_cache"].size * 2
        jnp.full(size, jnp.nan, jnp.bfloat16).block_until_ready()  # what is not written may lie there
        oracle.assert_matches(call, *self.attend(call, **parameters), **parameters)

    @parameterized.named_parameters(*(DTYPES_AND_SCALES | KINDS).items())
    def test_is_the_definition(self, kind):
        self.check(0, kind)
        self.check(1, kind, attn_logits_soft_cap=20.0)

    @parameterized.product(sliding_window=(30, 100), name=("float8_e5m2_head", "int8_slot", "d64"))
    def test_windows(self, sliding_window, name):
        kind = dict((DTYPES_AND_SCALES | KINDS)[name], sliding_window=sliding_window)
        self.check(2, kind, sliding_window=sliding_window)

    @parameterized.product(name=layouts.NAMES, scale=("head", "slot"))
    def test_every_layout(self, name, scale):
        call = poisoned.make_call(3, **USUAL, **DTYPES_AND_SCALES[f"int8_{scale}"])
        chex.assert_trees_all_equal(self.attend(layouts.lay(call, name), cache_layout=name), self.attend(call))

    @parameterized.parameters("head", "slot")
    def test_what_no_row_sees_has_no_effect_on_any_bit(self, scale):
        call = poisoned.make_call(4, **USUAL, **DTYPES_AND_SCALES[f"float8_e4m3fn_{scale}"])
        other = dict(call)
        poisoned.poison_unseen(np.random.default_rng(99), other)
        chex.assert_trees_all_equal(self.attend(call), self.attend(other))


if __name__ == "__main__":
    absltest.main()
