"""append_to_pages on a real GPU: what it writes, in place, and by which lowering. Where there is no GPU, all is skipped."""

import functools
import re
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import append_to_pages
from paged_prefill.lowering.mosaic_gpu.append import MosaicGpuWriter
from paged_prefill.lowering.triton.append import TritonWriter
from paged_prefill.lowering.triton.launch import PTX_TARGET
from paged_prefill.primitive.quantised import quantised
from paged_prefill.tests import append_test, poisoned, triton_append_test
from paged_prefill.tests.gpus import gpus_for
from paged_prefill.tests.append_test import CACHES, QUANTISED

INDICES = ("context_lens", "page_indices", "query_offsets")


class WithGpus(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.gpus = gpus_for(self)

    def step(self, caches, call):
        """Three layers of a stack in a scan, two writes of a layer one after the other, as a model's step."""

        def layer(caches, number):
            for _ in range(2):
                written = append_to_pages(**caches, **call, layer=number)
                caches = dict(zip([name for name in CACHES if name in caches], written))
            return caches, None

        return lax.scan(layer, caches, jnp.arange(3))[0]

    def large(self, **kind):
        """A call on a stack of caches of some 100 MB, and the caches."""
        call = append_test.make_append(4, layers=3, spare_pages=20_000, **kind)
        caches = {name: jnp.asarray(call[name]) for name in CACHES if name in call}
        return caches, {name: x for name, x in call.items() if name not in (*CACHES, "layer")}

    def assert_in_place(self, compiled, caches):
        memory = compiled.memory_analysis()
        sizes = [x.nbytes // max(1, len(x.sharding.device_set)) for x in caches.values()]
        self.assertLess(memory.temp_size_in_bytes, min(sizes) / 3 / 2)
        for cache in caches.values():
            shape = ",".join(map(str, cache.shape[-3:]))
            self.assertEmpty(re.findall(rf"= \S+\[[\d,]*{shape}\]\S* copy\(", compiled.as_text()))

    def check_in_place(self, given=(), **kind):
        caches, call = self.large(**kind)
        given = {name: caches.pop(name) for name in given}
        run = jax.jit(lambda caches, call: self.step(caches, call | given), donate_argnums=0)
        compiled = run.lower(caches, call).compile()
        self.assert_in_place(compiled, caches)
        pointers = [x.unsafe_buffer_pointer() for x in caches.values()]
        written = compiled(caches, call)
        self.assertEqual([written[name].unsafe_buffer_pointer() for name in caches], pointers)
        return compiled

    def check_large(self, tokens):
        """The last pages of a cache of more than 2^31 elements, in the last head."""
        pages = 2**31 // (2 * 16 * 128) + 1000
        new = jax.random.normal(jax.random.key(0), (2, tokens, 2, 128), jnp.bfloat16)
        indices = np.arange(pages - 3, pages, dtype=np.int32)[None]
        append = jax.jit(functools.partial(append_to_pages), donate_argnums=(0, 1))
        caches = [jnp.zeros((2, pages, 16, 128), jnp.bfloat16) for _ in range(2)]
        written = append(*caches, *new, np.int32([4 + tokens]), indices, np.int32([0, tokens]))
        for cache, stored in zip(written, new):
            got = cache[:, -3:].reshape(2, 48, 128)[:, 4 : 4 + tokens]
            np.testing.assert_array_equal(got.astype(jnp.float32), stored.swapaxes(0, 1).astype(jnp.float32))
            self.assertEqual(int(jnp.sum(jnp.any(cache != 0, axis=-1), dtype=jnp.int32)), 2 * tokens)


class MosaicGpuAppendTest(WithGpus):
    """Few tokens, on Hopper."""

    SIZES = dict(head_dim=128, value_dim=256)

    def setUp(self):
        super().setUp()
        gpus_for(self, hopper=True)

    def check(self, *args, **kind):
        call = append_test.make_append(*args, **self.SIZES | kind)
        self.assertIn("mosaic_gpu", jax.jit(append_to_pages).lower(**call).as_text())
        append_test.check(call)

    @parameterized.product(page_size=(1, 5, 16, 128), dtype=("float32", "bfloat16", "float16"))
    def test_any_page_size(self, page_size, dtype):
        self.check(0, ((7, 300), (1, 513), (0, 40), (30, 30), (9, 4), (1, 1), (24, 128)), dtype=dtype, page_size=page_size)

    @parameterized.named_parameters(
        ("layers_and_pools", dict(layers=3, batch=(2, 2), pools=1)),
        ("latent", dict(latent=True, layers=2, head_dim=576)),
        ("many_sequences", dict(sequences=tuple((i % 5 == 0, 2 + i % 5) for i in range(500)))),
        ("many_heads", dict(q_heads=40, kv_heads=40)),
    )
    def test_forms(self, kind):
        self.check(**dict(seed=2) | kind)

    def test_in_place_under_jit_and_scan(self):
        self.assertIn("mosaic_gpu", self.check_in_place(dtype="bfloat16", head_dim=16, value_dim=24).as_text())

    def test_a_cache_of_more_than_2_31_elements(self):
        self.check_large(tokens=40)


class GpuAppendTest(WithGpus):
    """Through Triton, whatever the number of tokens."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(MosaicGpuWriter, "pays", lambda self, operands: False))
        self.enter_context(mock.patch.object(TritonWriter, "pays", lambda self, operands: True))

    @parameterized.product(page_size=(1, 5, 16, 24, 128), dtype=("float32", "bfloat16", "float16"))
    def test_any_page_size(self, page_size, dtype):
        sequences = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
        append_test.check(append_test.make_append(0, sequences, dtype=dtype, page_size=page_size))

    @parameterized.product(dtype=QUANTISED, granularity=poisoned.GRANULARITIES, query=("float32", "bfloat16", "float16"))
    def test_quantised(self, dtype, granularity, query):
        scales = dict(key_scale=granularity, value_scale=granularity)
        append_test.check(append_test.make_append(1, dtype=query, cache_dtype=dtype, **scales))

    @parameterized.product(dtype=QUANTISED, scale=(1.0, 0.3, -2.0, 0.0, 1e-30, 1e30))
    def test_quotients_of_any_size(self, dtype, scale):
        """From one end of float32 to the other, and what is no number; over scales as far apart.

        But with none so small that numbers count that are subnormal, for which XLA's CPU compiler takes zeros.
        """
        rng, tokens, features = np.random.default_rng(0), 64, 128
        numbers = rng.standard_normal((tokens, 1, features)) * 10.0 ** rng.uniform(-8, 7, (tokens, 1, features)) * (scale or 1)
        numbers[0, 0, :4] = np.inf, -np.inf, np.finfo(np.float32).max, 0
        numbers[1, 0, 0] = 0 if dtype == "int8" else np.nan
        key, scale = numbers.astype(np.float32), np.float32(scale)
        cache = jnp.zeros((1, tokens // 16, 16, features), dtype)
        indices = dict(context_lens=np.int32([tokens]), page_indices=np.arange(tokens // 16, dtype=np.int32)[None])
        append = jax.jit(functools.partial(append_to_pages, value_cache=None, value=None))
        written, _ = append(key_cache=cache, key=key, key_scale=scale, query_offsets=np.int32([0, tokens]), **indices)
        with jax.default_device(jax.devices("cpu")[0]):
            stored = quantised(jnp.asarray(key[:, 0]), jnp.full(tokens, scale), jnp.dtype(dtype)).astype(jnp.float32)
        np.testing.assert_array_equal(np.asarray(written.astype(jnp.float32)).reshape(stored.shape), stored)

    @parameterized.named_parameters(
        ("layers_and_pools", dict(layers=3, batch=(2, 2), pools=1)),
        ("layers_and_pools_int8", dict(layers=3, batch=(2, 2), pools=1, cache_dtype="int8", key_scale="slot")),
        ("latent", dict(latent=True, layers=2)),
        ("many_sequences", dict(sequences=tuple((i % 3, 2 + i % 5) for i in range(600)))),
    )
    def test_forms(self, kind):
        append_test.check(append_test.make_append(**dict(seed=2) | kind))

    def test_indices_that_no_one_should_give(self):
        triton_append_test.check_wild()

    def test_takes_triton(self):
        call = {name: jnp.asarray(x) for name, x in append_test.make_append(3).items()}
        self.assertIn(PTX_TARGET, jax.jit(append_to_pages).lower(**call).as_text())

    @parameterized.named_parameters(
        ("bfloat16", dict(dtype="bfloat16")),
        ("int8_of_each_slot", dict(cache_dtype="int8", key_scale="slot", value_scale="slot")),
        ("float8_of_each_head", dict(cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")),
    )
    def test_in_place_under_jit_and_scan(self, kind):
        self.check_in_place([name for name in CACHES if kind.get(name) == "head"], **kind)

    @parameterized.parameters("shard_map", "automatic")
    def test_in_place_over_devices(self, way):
        if way == "automatic" and len(self.gpus) < 2:
            self.skipTest("one GPU is not cut automatically")
        caches, call = self.large(dtype="bfloat16")
        count = min(2, len(self.gpus))
        mesh = jax.make_mesh((count,), ("heads",), axis_types=(AxisType.Auto,), devices=self.gpus[:count])
        heads, tokens, whole = P(None, "heads"), P(None, "heads"), P()
        of_call = {name: whole if name in INDICES else tokens for name in call}
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        caches = {name: put(x, heads) for name, x in caches.items()}
        call = {name: put(x, of_call[name]) for name, x in call.items()}
        run = self.step
        if way == "shard_map":
            of_caches = {name: heads for name in caches}
            run = jax.shard_map(
                run, mesh=mesh, in_specs=(of_caches, of_call), out_specs=of_caches, check_vma=False
            )
        compiled = jax.jit(run, donate_argnums=0).lower(caches, call).compile()
        self.assertIn(PTX_TARGET, compiled.as_text())
        self.assert_in_place(compiled, caches)

    def test_a_cache_of_more_than_2_31_elements(self):
        self.check_large(tokens=40)


if __name__ == "__main__":
    absltest.main()
