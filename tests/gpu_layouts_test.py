"""Caches as others lay them on a real GPU, in each kernel and in the writer. Where there is no GPU, all is skipped."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.triton.append import TritonWriter
from paged_prefill.tests import appends, layouts, oracle, poisoned
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
SIZES = dict(q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3)
EVERYTHING = dict(key_ranges=True, tree_words=2, sinks=True, layers=2)


class GpuLayoutsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self)

    def check(self, platform, name, kind, *, cfg=None, **parameters):
        call = poisoned.make_call(0, **dict(sequences=SEQUENCES) | SIZES | kind)
        run = functools.partial(
            ragged_paged_prefill, platform=platform, cfg=cfg, return_lse=True, cache_layout=name, **parameters
        )
        oracle.assert_matches(call, *jax.jit(lambda call: run(**call))(layouts.lay(call, name)), **parameters)

    @parameterized.product(name=layouts.NAMES, page_size=(5, 8, 64, 192), dtype=("bfloat16",))
    def test_hopper(self, name, page_size, dtype):
        self.check("cuda", name, dict(EVERYTHING, dtype=dtype, page_size=page_size))

    @parameterized.parameters(*layouts.NAMES)
    def test_hopper_in_splits_of_decode_steps(self, name):
        decode = ((1, 700), (2, 513), (1, 40), (3, 1100))
        cfg = PrefillPageAttentionConfig(num_splits=3)
        self.check("cuda", name, dict(sequences=decode, dtype="float16", head_dim=64), cfg=cfg, attn_logits_soft_cap=20.0)

    @parameterized.product(name=layouts.NAMES, head_dim=(80, 112), page_size=(5, 16))
    def test_hopper_copies_parts_that_lie_apart(self, name, head_dim, page_size):
        """Prompts, and steps in tiles of few rows: a head's columns begin anywhere in a row."""
        kind = dict(dtype="bfloat16", head_dim=head_dim, page_size=page_size)
        self.check("cuda", name, EVERYTHING | kind)
        self.check("cuda", name, kind | dict(sequences=((1, 700), (1, 513), (1, 40), (0, 9), (1, 1100))))

    @parameterized.product(name=layouts.NAMES, granularity=poisoned.GRANULARITIES)
    def test_hopper_reads_quantised_caches(self, name, granularity):
        """Two warpgroups that compute, and one; each granularity with a dtype and a page size of its own."""
        of_granularity = dict(tensor=("float8_e5m2", 192, 192), head=("float8_e4m3fn", 64, 128), slot=("int8", 8, 64))
        cache_dtype, page_size, head_dim = of_granularity[granularity]
        scales = dict(key_scale=granularity, value_scale=granularity)
        kind = dict(cache_dtype=cache_dtype, page_size=page_size, head_dim=head_dim) | scales
        self.check("cuda", name, EVERYTHING | dict(dtype="bfloat16") | kind)
        decode = dict(sequences=((1, 700), (2, 513), (1, 40), (3, 1100)), dtype="float16")
        self.check("cuda", name, decode | kind, cfg=PrefillPageAttentionConfig(num_splits=3), attn_logits_soft_cap=20.0)
        self.check("cuda", name, decode | kind, sliding_window=100)

    @parameterized.parameters(*layouts.NAMES)
    def test_triton(self, name):
        self.check("triton", name, dict(EVERYTHING, cache_dtype="int8", key_scale="slot", value_scale="slot", page_size=24))
        self.check("triton", name, dict(dtype="bfloat16", sliding_window=100), sliding_window=100)

    @parameterized.parameters("pskd", "pksd")
    def test_latent(self, name):
        kind = dict(dtype="bfloat16", latent=True, kv_heads=1, q_heads=16, head_dim=576, value_dim=512)
        self.check("triton", name, kind, value_dim=512)

    @parameterized.parameters(*layouts.NAMES)
    def test_append(self, name):
        kinds = dict(dtype="bfloat16", layers=2), dict(cache_dtype="int8", key_scale="slot", value_scale="slot")
        with mock.patch.object(TritonWriter, "pays", lambda self, operands: True):
            for kind in kinds:
                layouts.check_written(appends.make_append(1, SEQUENCES, value_dim=8, **kind), name)


if __name__ == "__main__":
    absltest.main()
