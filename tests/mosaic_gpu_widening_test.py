"""Quantised caches that are widened before the Hopper kernel, without a GPU: what is, thread by thread, and when.

On GPUs, gpu_widening_test.py runs it.
"""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.call import Device, flatten
from paged_prefill.lowering.mosaic_gpu import widening
from paged_prefill.lowering.mosaic_gpu.host import MosaicGpu
from paged_prefill.lowering.mosaic_gpu.hopper import widen_pages
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.context import policy
from paged_prefill.tests import layouts, poisoned
from paged_prefill.tests.gpu_threads import Shared, Threads
from paged_prefill.tests.problems import problem

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", "9.0", 132)
UNTOUCHED = 12352.0  # in bfloat16 too
SEQUENCES = (7, 34), (0, 9), (5, 0), (3, 80)
USUAL = dict(q_heads=4, kv_heads=4, head_dim=64, page_size=8, dtype="bfloat16")


def widened_by_threads(launch, indices, caches, scales):
    """What `widen_pages.widen_pages` returns, block by block."""
    indices = [Shared(0, np.asarray(x)) for x in indices]
    scales, caches = [Shared(0, np.asarray(x)) for x in scales], [np.asarray(x) for x in caches]
    results = [np.full((launch.rows, kind.features), UNTOUCHED, ml_dtypes.bfloat16) for kind in launch.kinds]
    threads = Threads(widen_pages.THREADS, [])
    for block in np.ndindex(launch.seqs, -(-launch.capacity // widen_pages.ROWS), launch.kv_heads):
        block = [jnp.int32(x) for x in block]
        *_, has_work = widen_pages.keys_of(launch, block, indices)
        if has_work:
            widen_pages.widen_rows(launch, threads, in_bfloat16, block, indices, caches, scales, results)
    return results


def in_bfloat16(word, dtype, scale):
    numbers = np.asarray(word).reshape(-1, 1).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):  # NaN and the like where no row looks
        numbers = numbers * np.asarray(scale).reshape(-1, 1)
    words = numbers.astype(ml_dtypes.bfloat16).view(np.int32)
    return words[:, 0], words[:, 1]


class WhatIsWidenedTest(parameterized.TestCase):
    """All keys of contexts that pages hold, of two heads, times their scales, to the bit; and nothing else."""

    def check(self, seed, layout="kpsd", pools=0, sequences=SEQUENCES, window=None, **kind):
        call = poisoned.make_call(seed, sequences, pools=pools, **(USUAL | kind))
        attention = Attention(1.0, sliding_window=window)
        parameters = dict(cache_batch_dims=pools, num_kv_heads=2, attention=attention)
        parameters |= dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}
        start = dict(kv_head_start=np.int32(1))
        here = lambda call: {name: x for name, x in call.items() if x is not None}
        want = flatten(here(call) | start, **parameters)
        laid = flatten(here(layouts.lay(call, layout)) | start, cache_layout=layout, **parameters)
        always = mock.patch.multiple(widening, TILES=0, TILES_OF_SLOT_SCALES=0)
        with always, mock.patch.object(widening, "widen_pages", widened_by_threads):
            found = widening.widened_call(laid)
        self.assertEqual(found.problem.cache_dtype, "bfloat16")
        self.assertEqual(found.problem.capacity, want.problem.capacity)
        self.assertEmpty({"quantised", "slot_scales", layout} & {*found.problem.features})
        self.assert_widened(want, want.key_pages, want.key_scale, found.key_pages)
        if not kind.get("latent"):
            self.assert_widened(want, want.value_pages, want.value_scale, found.value_pages)

    def assert_widened(self, call, cache, scale, widened):
        scale = np.float32(1) if scale is None else np.asarray(scale)
        scale = scale.reshape(scale.shape + (1,) * (5 - scale.ndim))
        with np.errstate(all="ignore"):
            cache = (np.asarray(cache).astype(np.float32) * scale).astype(ml_dtypes.bfloat16).astype(np.float32)
        seqs, features = call.problem.seqs, cache.shape[-1]
        widened = np.asarray(widened).astype(np.float32).reshape(2, seqs, -1, features)
        _, _, lengths, pools, pages = map(np.asarray, call.sequences)
        for seq in range(seqs):
            length, first = min(lengths[seq], call.problem.capacity), 0
            if window := call.problem.attention.sliding_window:  # some before it may be there, in whole blocks
                first = max(lengths[seq] - call.problem.tokens - window, 0)
                before = first // widen_pages.ROWS * widen_pages.ROWS
                np.testing.assert_array_equal(widened[:, seq, : min(before, length)], np.float32(UNTOUCHED))
            keys = cache[pools[seq], 1:3][:, pages[seq]].reshape(2, -1, features)
            np.testing.assert_array_equal(widened[:, seq, first:length], keys[:, first:length])
            np.testing.assert_array_equal(widened[:, seq, length:], np.float32(UNTOUCHED))

    @parameterized.product(
        cache_dtype=("float8_e4m3fn", "float8_e5m2", "int8"),
        scales=((None, None), ("tensor", "head"), ("slot", "slot"), (None, "slot")),
    )
    def test_each_dtype_and_scale(self, cache_dtype, scales):
        key_scale, value_scale = scales
        self.check(0, cache_dtype=cache_dtype, key_scale=key_scale, value_scale=value_scale)

    @parameterized.named_parameters(
        ("layers_and_pools", dict(layers=3, batch=(2, 2), pools=1, sequences=((3, 20), (1, 9)))),
        ("several_turns_of_wide_rows", dict(head_dim=576, value_dim=192, sequences=((3, 70), (1, 9)))),
        ("latent", dict(latent=True, value_dim=64, head_dim=128, value_scale=None)),
        ("large_pages", dict(page_size=64, sequences=((9, 200), (1, 64)))),
        ("window", dict(window=20, sequences=((9, 200), (1, 64), (2, 158), (1, 96)))),
    )
    def test_forms(self, kind):
        self.check(**dict(seed=1, cache_dtype="int8", key_scale="slot", value_scale="slot") | kind)

    @parameterized.product(layout=layouts.NAMES, scale=("head", "slot"))
    def test_caches_as_others_lay_them(self, layout, scale):
        self.check(2, layout, cache_dtype="float8_e4m3fn", key_scale=scale, value_scale=scale, layers=2)

    def test_indices_that_no_one_should_give(self):
        rng = np.random.default_rng(0)
        made = poisoned.make_call

        def with_junk(*args, **kind):
            call = made(*args, **kind)
            for name in ("context_lens", "page_indices", "layer"):
                junk = rng.choice([-(2**31), -1, 2, 3, 40, 2**31 - 1], call[name].shape)
                call[name] = np.where(rng.random(call[name].shape) < 0.5, junk, call[name]).astype(np.int32)
            return call

        with mock.patch.object(poisoned, "make_call", with_junk):
            for seed in range(4):
                self.check(seed, window=(None, 20)[seed % 2], cache_dtype="int8", key_scale="slot", value_scale="head", layers=2)


def of_cache(**changes):
    """A prompt over a quantised cache."""
    usual = dict(tokens=2048, cache_dtype="float8_e4m3fn", features=("quantised",), pages_per_seq=128)
    return problem(**usual | changes)


class ChoiceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("prompt", {}, True),
        ("scales_of_slots", dict(features=("quantised", "slot_scales"), tokens=1024), True),
        ("long_context", dict(pages_per_seq=8192), True),
        ("workspace_too_large", dict(pages_per_seq=8256), False),
        ("table_of_too_many", dict(pages_per_seq=1024, tokens=16 * 2048, seqs=16), False),
        ("decode", dict(tokens=64, seqs=64), False),
        ("drafts_of_large_groups", dict(tokens=256, seqs=64, num_kv_heads=1), False),
        ("few_tokens", dict(tokens=512), False),
        ("window", dict(pages_per_seq=4096, sliding_window=1024), True),
        ("short_window", dict(pages_per_seq=4096, sliding_window=256), False),
        ("float16", dict(dtype="float16"), False),
        ("16_bits", dict(cache_dtype="bfloat16", features=()), False),
    )
    def test_it_is_for_keys_that_many_tiles_see(self, changes, want):
        self.assertEqual(widening.widens_first(of_cache(**changes)), want)

    def test_sizes_are_those_over_16_bits_but_for_products_of_8(self):
        kernel, quantised = MosaicGpu(), of_cache(pages_per_seq=1024)
        plain = of_cache(cache_dtype="bfloat16", features=(), pages_per_seq=1024)
        self.assertEqual(kernel.heuristic(quantised, H100), kernel.heuristic(plain, H100))
        self.assertEqual(kernel.candidates(quantised, H100), kernel.candidates(widening.left_of(quantised), H100))
        terms = PrefillPageAttentionConfig(fp8_terms=1)
        self.assertNotEqual(kernel.complete(quantised, H100, terms), kernel.heuristic(plain, H100))

    def test_never_where_bits_may_not_follow_the_pack(self):
        with policy("invariant"):
            self.assertFalse(widening.widens_first(of_cache()))

    @parameterized.parameters((80, 16), (128, 128), (8 * 13, 8), (192, 64))
    def test_the_table_has_room_for_as_many_keys_as_before(self, capacity, page_size):
        left = widening.left_of(of_cache(page_size=8, pages_per_seq=capacity // 8, seqs=3))
        self.assertEqual((left.capacity, left.page_size), (capacity, page_size))
        self.assertEqual(left.num_pages, 3 * capacity // page_size)

    @parameterized.parameters("float8_e4m3fn", "float8_e5m2", "int8")
    def test_lowers(self, cache_dtype):
        shape = jax.ShapeDtypeStruct
        cache, scale = shape((2, 64, 16, 128), cache_dtype), shape((2, 64, 16), jnp.float32)
        operands = dict(
            query=shape((1024, 8, 128), jnp.bfloat16), key_cache=cache, value_cache=cache, key_scale=scale,
            context_lens=shape((1,), jnp.int32), page_indices=shape((1, 64), jnp.int32),
            query_offsets=shape((2,), jnp.int32),
        )  # fmt: skip
        call = functools.partial(ragged_paged_prefill, platform="cuda")
        lowered = jax.jit(call).trace(**operands).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("widen_pages", lowered)


if __name__ == "__main__":
    absltest.main()
