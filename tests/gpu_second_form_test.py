"""The optional operands on a real GPU, in the kernels that take them. Where there is no GPU, every test is skipped."""

import functools
import itertools

from absl.testing import absltest, parameterized
import chex
import jax
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.choose import KERNELS
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import policy
from paged_prefill.tests import oracle, poisoned
from paged_prefill.tests.append_test import QUANTISED

SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
DECODE = ((1, 300), (1, 1), (1, 900), (1, 64))
SPLIT = PrefillPageAttentionConfig(num_splits=3)
DTYPES = ("bfloat16", "float16", "float32")

ALONE = dict(
    key_ranges=dict(key_ranges=True),
    tree_mask=dict(tree_words=1),
    long_tree=dict(tree_words=3),
    sinks=dict(sinks=True),
    layers=dict(layers=3),
    latent=dict(latent=True, head_dim=80, value_dim=64),
    mla=dict(latent=True, head_dim=576, value_dim=512, q_heads=16, kv_heads=1),
    wide=dict(head_dim=512, value_dim=512, q_heads=4, kv_heads=2, key_ranges=True),
)
QUANTISED_KINDS = {
    f"{dtype}_{scale}": dict(cache_dtype=dtype, key_scale=scale, value_scale=scale)
    for dtype in QUANTISED
    for scale in poisoned.GRANULARITIES
}
COMBINED = dict(
    all_int8=dict(key_ranges=True, tree_words=2, sinks=True, layers=2, **QUANTISED_KINDS["int8_slot"]),
    all_e4m3=dict(key_ranges=True, tree_words=1, sinks=True, layers=2, **QUANTISED_KINDS["float8_e4m3fn_head"]),
    quantised_mla=dict(ALONE["mla"], cache_dtype="float8_e4m3fn", key_scale="slot", layers=2, tree_words=1),
    one_absent=dict(cache_dtype="int8", key_scale="slot", sinks=True),
)


def named(*tables):
    """(name, arguments of `poisoned.make_call`, dtype), each in one dtype, the dtypes in turn; wide heads not in float32."""
    everything = [item for table in tables for item in table.items()]
    cases = [(name, kind, dtype) for (name, kind), dtype in zip(everything, itertools.cycle(DTYPES))]
    wide = lambda kind, dtype: "bfloat16" if kind.get("head_dim", 0) > 256 and dtype == "float32" else dtype
    return [(f"{name}_{wide(kind, dtype)}", kind, wide(kind, dtype)) for name, kind, dtype in cases]


class GpuSecondFormTest(parameterized.TestCase):
    kernel = "triton"

    def setUp(self):
        super().setUp()
        try:
            jax.devices("cuda")
        except RuntimeError as error:
            self.skipTest(f"no CUDA GPU here: {error}".splitlines()[0])

    def attend(self, call, **parameters):
        run = functools.partial(ragged_paged_prefill, platform=self.kernel, return_lse=True, **parameters)
        return jax.jit(lambda call: run(**call))(call)

    def check(self, seed, kind, *, cfg=None, **parameters):
        kind = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3) | kind
        call = poisoned.make_call(seed, **kind)
        parameters |= dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}
        oracle.assert_matches(call, *self.attend(call, cfg=cfg, **parameters), **parameters)

    @parameterized.named_parameters(named(ALONE, QUANTISED_KINDS, COMBINED))
    def test_matches_the_oracle(self, kind, dtype):
        self.check(0, dict(kind, dtype=dtype))

    @parameterized.named_parameters(named(COMBINED, QUANTISED_KINDS, ALONE))
    def test_in_splits_of_decode_steps(self, kind, dtype):
        self.check(1, dict(kind, dtype=dtype, sequences=DECODE), cfg=SPLIT, attn_logits_soft_cap=20.0)

    @parameterized.product(page_size=(1, 5, 24, 128), dtype=DTYPES)
    def test_any_page_size(self, page_size, dtype):
        kind = dict(key_ranges=True, tree_words=1, dtype=dtype, page_size=page_size, **QUANTISED_KINDS["int8_slot"])
        self.check(2, kind, softmax_scale=-0.1)

    @parameterized.parameters(*QUANTISED)
    def test_windows_over_quantised_caches(self, dtype):
        for scale in poisoned.GRANULARITIES:
            self.check(3, dict(QUANTISED_KINDS[f"{dtype}_{scale}"], dtype="bfloat16"), sliding_window=100)

    def test_calls_as_serving_makes_them(self):
        rng = np.random.default_rng(0)
        for _ in range(25):
            call, parameters = poisoned.sample(rng)
            oracle.assert_matches(call, *self.attend(call, **parameters), **parameters)

    @parameterized.parameters(1, 3)
    def test_the_same_bits_each_time(self, num_splits):
        kind = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16")
        call = poisoned.make_call(4, **kind, key_ranges=True)
        cfg = PrefillPageAttentionConfig(num_splits=num_splits)
        first = self.attend(call, cfg=cfg)
        for _ in range(5):
            chex.assert_trees_all_equal(self.attend(call, cfg=cfg), first)

    def test_invariant(self):
        """Each sequence alone has the bits that it has in the pack."""
        kind = dict(q_heads=8, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16", tokens_before=0)
        call = poisoned.make_call(5, SEQUENCES, **kind)
        with policy("invariant"):
            together = self.attend(call)
            for seq, (length, _) in enumerate(SEQUENCES):
                start = call["query_offsets"][seq]
                rows = slice(start, start + length)
                if not length:
                    continue
                alone = call | dict(
                    query=call["query"][rows],
                    context_lens=call["context_lens"][seq : seq + 1],
                    page_indices=call["page_indices"][seq : seq + 1],
                    query_offsets=np.int32([0, length]),
                )
                chex.assert_trees_all_equal(self.attend(alone), tuple(x[rows] for x in together))

    def test_every_feature_is_taken(self):
        self.assertEqual(KERNELS["cuda"][self.kernel].features, KERNELS["cuda"]["xla"].features)


if __name__ == "__main__":
    absltest.main()
