"""append_to_pages through Triton without a GPU: what it writes, under Triton's interpreter, and its choice.

On GPUs, gpu_append_test.py runs it.
"""

import importlib.util
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import choose_writer
from paged_prefill.tests import append_test, layouts, poisoned, triton_stand_ins
from paged_prefill.tests.triton_test import HAS_TRITON, TARGETS, WithInterpreter, process

H200 = Device("cuda", "NVIDIA H200", "9.0")
QUANTISED = append_test.QUANTISED


@absltest.skipUnless(HAS_TRITON, "Triton is not installed")
class InterpretedTest(WithInterpreter):
    def check(self, *kinds):
        self.interpreter.submit(triton_stand_ins.check_appended_interpreted, kinds).result()

    @parameterized.parameters("float32", "bfloat16", "float16")
    def test_tokens_go_to_their_slots_and_nothing_else_is_touched(self, dtype):
        """Tokens before, between and after sequences, and more new tokens than the context holds."""
        long = ((21, 30), (0, 5), (40, 40), (3, 2))
        self.check(dict(seed=0, dtype=dtype), dict(seed=1, sequences=long, dtype=dtype))

    @parameterized.product(dtype=QUANTISED, granularity=poisoned.GRANULARITIES)
    def test_quantised(self, dtype, granularity):
        query = dict(zip(poisoned.GRANULARITIES, ("float32", "bfloat16", "float16")))[granularity]
        scales = dict(key_scale=granularity, value_scale=granularity)
        self.check(dict(seed=2, dtype=query, cache_dtype=dtype, **scales))

    def test_scales_of_two_granularities_and_absent_ones(self):
        scales = (dict(), dict(value_scale="slot"), dict(key_scale="head"), dict(key_scale="slot", value_scale="tensor"))
        self.check(*(dict(seed=3, cache_dtype="int8", **each) for each in scales))

    def test_layers_in_pools_of_their_own_and_shared(self):
        kind = dict(layers=3, batch=(2, 2), pools=1)
        self.check(
            dict(seed=4, **kind), dict(seed=5, cache_dtype="int8", key_scale="slot", value_scale="head", **kind)
        )

    def test_latent(self):
        self.check(
            dict(seed=6, latent=True, layers=2), dict(seed=7, latent=True, cache_dtype="int8", key_scale="slot")
        )

    @parameterized.parameters(*layouts.NAMES)
    def test_caches_as_others_lay_them(self, name):
        kinds = dict(), dict(cache_dtype="int8", key_scale="slot", value_scale="slot", layers=2)
        kinds = [dict(seed=9, value_dim=8, **each) for each in kinds]
        self.interpreter.submit(triton_stand_ins.check_appended_interpreted, kinds, name).result()

    def test_more_sequences_than_are_compared_at_a_time(self):
        with_gaps = tuple((i % 3, 2 + i % 5) for i in range(300))
        self.check(dict(seed=8, sequences=with_gaps))

    def test_indices_that_no_one_should_give(self):
        """Offsets that decrease, or lie outside; contexts below 0; pages that do not exist; layers too."""
        self.interpreter.submit(check_wild).result()

    @parameterized.parameters("float8_e4m3fn", "float8_e5m2")
    def test_every_rounding_of_float8_is_that_of_the_definition(self, dtype):
        """All numbers of the dtype, those halfway between two, and those beside; NaN stays NaN."""
        every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
        every = np.unique(every[np.isfinite(every)])
        halves = (every[1:] + every[:-1]) / 2
        beside = [np.nextafter(x, np.float32(sign * np.inf)) for x in (every, halves) for sign in (1, -1)]
        numbers = np.concatenate([every, halves, *beside, [1e-30, -1e-30]])
        numbers = np.clip(numbers, every[0], every[-1]).astype(np.float32)
        got = self.interpreter.submit(triton_stand_ins.rounded_interpreted, dtype, [*numbers, np.nan]).result()
        np.testing.assert_array_equal(got[:-1], numbers.astype(dtype).astype(np.float32))
        self.assertTrue(np.isnan(got[-1]))


def check_wild():
    """The same bits by Triton and by XLA, whatever the indices."""
    from paged_prefill import append_to_pages
    from paged_prefill.lowering.choose import XLA_WRITER

    rng = np.random.default_rng(0)
    for seed in range(8):
        call = append_test.make_append(seed, layers=2, batch=(2,), pools=1)
        for name in ("context_lens", "page_indices", "query_offsets", "layer"):
            junk = rng.choice([-(2**31), -1, 2, 3, 40, 2**31 - 1], call[name].shape)
            call[name] = np.where(rng.random(call[name].shape) < 0.3, junk, call[name]).astype(np.int32)
        got = jax.jit(append_to_pages)(**call)
        present = {name: jnp.asarray(x) for name, x in call.items()}
        want = XLA_WRITER.write(present, 1, Device("cpu", "cpu"))
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)


def operands(cache_dtype="bfloat16", granularity=None, head_dim=128, value_dim=128):
    """2048 tokens for a stack of caches, as (shape, dtype); `value_dim` None for a latent cache."""
    scale = dict(tensor=(2,), head=(2, 8), slot=(2, 8, 1024, 16)).get(granularity)
    given = dict(context_lens=((1,), "int32"), page_indices=((1, 256), "int32"), query_offsets=((2,), "int32"))
    for name, features in dict(key=head_dim, value=value_dim).items():
        if features:
            given[name] = (2048, 8, features), "bfloat16"
            given[f"{name}_cache"] = (2, 8, 1024, 16, features), cache_dtype
            given |= {f"{name}_scale": (scale, "float32")} if scale else {}
    return given | dict(layer=((), "int32"))


@absltest.skipUnless(HAS_TRITON, "Triton is not installed")
class CompiledTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Triton keeps to NVIDIA or AMD; and a process takes longer to begin than to compile for a target.
        cls.compilers = {kind: cls.enterClassContext(process()) for kind in ("cuda", "hip")}

    @parameterized.named_parameters((name, name) for name in TARGETS)
    def test_compiles_without_spilling_and_stores_whole_vectors(self, name):
        target, _, _ = TARGETS[name]
        dtypes = QUANTISED if target[1] != 80 else QUANTISED[1:]
        kinds = [dict(), dict(head_dim=576, value_dim=None)]
        kinds += [dict(cache_dtype=dtype, granularity=scale) for dtype in dtypes for scale in poisoned.GRANULARITIES]
        calls = [operands(**kind) for kind in kinds]
        found = self.compilers[target[0]].submit(triton_stand_ins.compile_appends, target, calls).result()
        for kind, each in zip(kinds, found, strict=True):
            with self.subTest(str(kind)):
                self.assertEqual((each["spilled"], each["scratch"]), (0, 0), each)
                if target[0] == "cuda" and "cache_dtype" not in kind:
                    self.assertEqual(each["stores"], {"v4.b32"}, each)
                converts = target[0] == "cuda" and target[1] >= 89 and "float8" in kind.get("cache_dtype", "")
                self.assertEqual(each["converts"], converts, each)


class ChoiceTest(parameterized.TestCase):
    def choose(self, device, missing=None, sequences=((126, 150), (1, 3)), **kind):
        kind["sequences"] = sequences
        call = {name: x for name, x in append_test.make_append(0, **kind).items() if x is not None}
        with mock.patch.object(importlib.util, "find_spec", lambda name: None if name == missing else name):
            writer, passed_over = choose_writer(call, device)
        return writer.name, passed_over.get("triton")

    @parameterized.parameters((H200,), (Device("rocm", "AMD Instinct MI300X", "gfx942"),))
    def test_gpus_take_triton(self, device):
        self.assertEqual(self.choose(device), ("triton", None))

    @parameterized.named_parameters(
        ("no_triton", H200, dict(missing="triton"), "the package triton is missing"),
        ("no_jax_triton", H200, dict(missing="jax_triton"), "the package jax_triton is missing"),
        ("old_gpu", Device("cuda", "Tesla V100", "7.0"), {}, "compute capability 8.0"),
        ("float8_on_ampere", Device("cuda", "NVIDIA A100-SXM4-80GB", "8.0"), dict(cache_dtype="float8_e4m3fn"),
         "float8_e4m3fn caches need compute capability 8.9"),
        ("unknown", Device("cuda"), {}, "not known here"),
    )  # fmt: skip
    def test_scatters_where_it_cannot_run_and_says_why(self, device, changes, words):
        name, reason = self.choose(device, **changes)
        self.assertEqual(name, "xla")
        self.assertIn(words, reason)

    def test_few_tokens_are_scattered_without_a_word(self):
        for device in (Device("cuda", "NVIDIA A100", "8.0"), Device("rocm", "AMD Instinct MI300X", "gfx942")):
            self.assertEqual(self.choose(device, sequences=((3, 9),)), ("xla", None))

    @parameterized.parameters((Device("cpu", "cpu"),), (Device("tpu", "TPU v5e"),))
    def test_elsewhere_it_is_not_asked(self, device):
        self.assertEqual(self.choose(device), ("xla", None))


if __name__ == "__main__":
    absltest.main()
