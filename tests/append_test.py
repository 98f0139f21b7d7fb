"""append_to_pages with all its operands: layers, quantised and latent caches, in place; and what quantising costs."""

import functools

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, ragged_paged_prefill
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.quantised import largest_number
from paged_prefill.tests import cases, compiling, oracle, poisoned
from paged_prefill.tests.appends import CACHES, QUANTISED, assert_written, make_append


def check(call):
    assert_written(call, jax.jit(append_to_pages)(**call))


class WritesTest(parameterized.TestCase):
    """Each token to its slot, to the bit, and nothing else."""

    @parameterized.product(dtype=QUANTISED, granularity=poisoned.GRANULARITIES)
    def test_quantised(self, dtype, granularity):
        query = dict(zip(poisoned.GRANULARITIES, ("float32", "bfloat16", "float16")))[granularity]
        check(make_append(0, dtype=query, cache_dtype=dtype, key_scale=granularity, value_scale=granularity))

    def test_absent_scales_count_as_one(self):
        for scales in ({}, dict(value_scale="slot"), dict(key_scale="head")):
            check(make_append(1, cache_dtype="int8", **scales))

    @parameterized.parameters("float32", "bfloat16", "int8", "float8_e5m2")
    def test_layer_of_each_pack_in_pools_of_their_own_and_shared(self, dtype):
        kind = (
            dict(cache_dtype=dtype, key_scale="slot", value_scale="head") if dtype in QUANTISED else dict(dtype=dtype)
        )
        check(make_append(2, layers=3, batch=(2, 2), pools=1, **kind))

    @parameterized.parameters("float32", "int8")
    def test_latent(self, dtype):
        kind = dict(cache_dtype=dtype, key_scale="slot") if dtype in QUANTISED else {}
        check(make_append(3, latent=True, layers=2, **kind))

    @parameterized.parameters("float32", "bfloat16", "float8_e4m3fn")
    def test_nothing_to_write(self, dtype):
        """No token, and none with a page."""
        kind = dict(cache_dtype=dtype) if dtype in QUANTISED else dict(dtype=dtype)
        call = make_append(11, layers=2, batch=(2,), pools=1, **kind)
        no_tokens = {name: call[name][:, :0] for name in ("key", "value")}
        for nothing in (dict(page_indices=np.full_like(call["page_indices"], -1)), no_tokens):
            for got, before in zip(jax.jit(append_to_pages)(**call | nothing), (call[name] for name in CACHES)):
                np.testing.assert_array_equal(np.asarray(got).view(np.uint8), before.view(np.uint8))

    @parameterized.product(cache_layout=tuple(LAYOUTS), nothing=("tokens", "num_pages"))
    def test_nothing_to_write_in_any_layout(self, cache_layout, nothing):
        """A pack without tokens, and a pool without pages; by scales of each head and layer."""
        layout = LAYOUTS[cache_layout]
        sizes = {"tokens": 5, "num_pages": 3, "kv_heads": 2, "2": 2, "2 * kv_heads": 4, "page_size": 4, "features": 8}
        sizes[nothing] = 0
        new = dict.fromkeys(("key", "value"), jnp.ones((sizes["tokens"], 2, 8)))
        indices = dict(context_lens=[sizes["tokens"]], page_indices=[[0, 1]], query_offsets=[0, sizes["tokens"]])
        indices = {name: np.array(values) for name, values in indices.items()}
        for dtype in ("float32", "float8_e4m3fn"):
            cache = jnp.ones((3, *(sizes[dim] for dim in layout.dims)), dtype)
            scales = dict.fromkeys(("key_scale", "value_scale"), jnp.ones((3, 2))) if dtype in QUANTISED else {}
            append = functools.partial(append_to_pages, cache_layout=cache_layout)
            value_cache = None if layout.combined else cache
            got, _ = jax.jit(append)(cache, value_cache, **new, **indices, **scales, layer=1)
            np.testing.assert_array_equal(got, cache)

    def test_a_layer_that_does_not_exist_is_clamped(self):
        call = make_append(4, layers=3, batch=(2,), pools=1)
        append = jax.jit(append_to_pages)
        for wrong, right in ((-1, 0), (2**31 - 1, 2)):
            chex.assert_trees_all_equal(*(append(**call | dict(layer=np.full(2, n, np.int32))) for n in (wrong, right)))

    @parameterized.named_parameters(
        ("int8", "int8", [0.5, 1.5, -0.5, -2.5, 126.5, 127.5, 1e9, -1e9, np.inf, -np.inf], [0, 2, 0, -2, 126, 127, 127, -127, 127, -127]),
        # Halfway between 16 and 18, 18 and 20; a little beside; past the largest.
        ("float8_e4m3fn", "float8_e4m3fn", [17, 19, -17, 17 + 2**-12, 17 - 2**-12, 449, 463, 465, 1e9, -np.inf],
         [16, 20, -16, 18, 16, 448, 448, 448, 448, -448]),
        ("float8_e5m2", "float8_e5m2", [9, 11, -9, 9 + 2**-12, 9 - 2**-12, 57345, 61439, 61441, 1e9, -np.inf],
         [8, 12, -8, 10, 8, 57344, 57344, 57344, 57344, -57344]),
    )  # fmt: skip
    def test_rounds_to_nearest_even_and_clips(self, dtype, numbers, stored):
        new = jnp.asarray(numbers, jnp.float32).reshape(1, 1, -1) / 4
        cache = jnp.zeros((1, 2, 2, new.shape[-1]), dtype)
        append = jax.jit(functools.partial(append_to_pages, value_cache=None, value=None))
        indices = dict(context_lens=np.int32([2]), page_indices=np.int32([[1]]), query_offsets=np.int32([0, 1]))
        written, _ = append(key_cache=cache, key=new, key_scale=np.float32(0.25), **indices)
        np.testing.assert_array_equal(written[0, 1, 1].astype(jnp.float32), stored)

    def test_a_token_of_zeros(self):
        call = make_append(5, cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot") | dict(
            key=np.zeros((11, 2, 8), np.float32)
        )
        check(call)


class TransformsTest(parameterized.TestCase):
    def test_vmap_over_pools(self):
        """Everything mapped, and scales that are not: each element's own pool, where they would go."""
        every = [
            make_append(seed, layers=2, cache_dtype="int8", key_scale="slot", value_scale="tensor") for seed in range(2)
        ]
        stacked = {name: np.stack([call[name] for call in every]) for name in every[0]}
        shared = stacked | dict(value_scale=every[0]["value_scale"])
        axes = {name: None if name == "value_scale" else 0 for name in stacked}
        got = jax.jit(jax.vmap(lambda call: append_to_pages(**call), (axes,)))(shared)
        for i, call in enumerate(every):
            assert_written(call | dict(value_scale=every[0]["value_scale"]), [x[i] for x in got])

    def test_strict_flags(self):
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            for dtype in ("float32", "bfloat16"):
                for granularity in poisoned.GRANULARITIES:
                    for cache_dtype in ("int8", "float8_e4m3fn"):
                        kind = dict(cache_dtype=cache_dtype, key_scale=granularity, value_scale=granularity)
                        call = make_append(6, dtype=dtype, layers=2, batch=(2,), pools=1, **kind)
                        jax.jit(append_to_pages).lower(**call)
            check(make_append(6, layers=2, cache_dtype="int8", key_scale="slot", value_scale="head"))

    def test_symbolic_sizes(self):
        call = make_append(7, batch=(2,), pools=1, layers=2, cache_dtype="int8", key_scale="slot", value_scale="head")
        axes = dict(
            key_cache="batch,_,_,pages,_,_", value_cache="batch,_,_,pages,_,_", key="batch,tokens,_,_",
            value="batch,tokens,_,_", context_lens="batch,seqs", page_indices="batch,seqs,columns",
            query_offsets="batch,seqs + 1", key_scale="batch,_,_,pages,_", value_scale="batch,_,_", layer="batch",
        )  # fmt: skip
        scope = export.SymbolicScope()

        def abstract(name):
            dims = [str(n) if axis == "_" else axis for axis, n in zip(axes[name].split(","), call[name].shape)]
            return jax.ShapeDtypeStruct(export.symbolic_shape(",".join(dims), scope=scope), call[name].dtype)

        exported = export.export(jax.jit(lambda call: append_to_pages(**call)))({name: abstract(name) for name in call})
        assert_written(call, export.deserialize(exported.serialize()).call(call))


class InPlaceTest(parameterized.TestCase):
    """Donated caches are written where they are, and no layer is set aside."""

    LAYERS = 6

    def model(self, latent, parameters):
        """Appends to and attends in each layer of stacked caches in turn; the tokens depend on what came before."""

        def run(caches, scales, call):
            def layer(carry, number):
                query, caches, scales = carry
                tokens = {name: call[name] + query[..., :1, :1] for name in ("key", "value") if call[name] is not None}
                indices = {name: call[name] for name in ("context_lens", "page_indices", "query_offsets")}
                written = append_to_pages(
                    **caches, **tokens | (dict(value=None) if latent else {}), **scales, **indices, layer=number
                )
                caches, scales = dict(zip(caches, written)), dict(zip(scales, written[2:]))
                out = ragged_paged_prefill(query, **caches, **scales, **indices, layer=number, cfg=cases.ONE_HEIGHT, **parameters)
                return (query + 0.1 * jnp.mean(out, -1, keepdims=True), caches, scales), None

            return lax.scan(layer, (call["query"], caches, scales), jnp.arange(self.LAYERS))[0]

        return run

    @parameterized.named_parameters(
        ("float32", dict()),
        ("float16", dict(dtype="float16")),
        ("bfloat16", dict(dtype="bfloat16")),
        ("int8_of_each_slot", dict(cache_dtype="int8", key_scale="slot", value_scale="slot")),
        ("float8_e4m3fn", dict(cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot")),
        ("float8_e5m2_latent", dict(cache_dtype="float8_e5m2", key_scale="slot", latent=True, head_dim=16)),
        ("latent", dict(latent=True, head_dim=16)),
    )
    def test_scan_over_stacked_layers(self, kind):
        latent = kind.get("latent", False)
        call = make_append(8, layers=self.LAYERS, spare_pages=4_000, **kind)
        call["query"] = (
            np.random.default_rng(0)
            .standard_normal((*call["key"].shape[:1], 4, call["key_cache"].shape[-1]))
            .astype(call["key"].dtype)
        )
        caches = {name: jnp.asarray(call[name]) + 0 if call[name] is not None else None for name in CACHES[:2]}
        scales = {name: jnp.asarray(call[name]) + 0 for name in CACHES[2:] if name in call}
        rest = {name: x for name, x in call.items() if name not in (*CACHES, "layer")}
        model = self.model(latent, dict(value_dim=12) if latent else {})
        compiled = jax.jit(model, donate_argnums=(0, 1)).lower(caches, scales, rest).compile(compiling.FUSED_AS_USERS_DO)
        large = jax.tree.leaves((caches, scales))
        memory = compiled.memory_analysis()
        self.assertEqual(memory.alias_size_in_bytes, sum(x.nbytes for x in large))
        self.assertLess(memory.temp_size_in_bytes, min(x.nbytes for x in large) / self.LAYERS / 2)
        pointers = [x.unsafe_buffer_pointer() for x in large]
        _, *written = compiled(caches, scales, rest)
        self.assertEqual([x.unsafe_buffer_pointer() for x in jax.tree.leaves(written)], pointers)

    def test_products_that_make_tokens_stay_out_of_the_scatter(self):
        """XLA for GPU draws those of one token into it, where each element becomes a loop over the width."""
        call = make_append(0, dtype="bfloat16")
        lowered = jax.jit(append_to_pages).trace(**call).lower(lowering_platforms=("cuda",)).as_text()
        self.assertRegex(lowered, r"(?s)optimization_barrier %\w+, %\w+ : .*stablehlo\.scatter")

    @parameterized.parameters("int8", "float8_e4m3fn")
    def test_a_vmapped_cache_is_not_copied(self, dtype):
        call = make_append(9, layers=2, cache_dtype=dtype, key_scale="slot", value_scale="slot", spare_pages=5_000)
        stacked = {name: jnp.stack([call[name]] * 2) for name in call}
        caches = {name: stacked.pop(name) for name in CACHES}
        append = jax.vmap(lambda caches, rest: append_to_pages(**caches, **rest))
        compiled = jax.jit(append, donate_argnums=0).lower(caches, stacked).compile(compiling.FUSED_AS_USERS_DO)
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, caches["key_scale"].nbytes / 4)


class ErrorTest(parameterized.TestCase):
    """What storing keys and values in 8 bits costs: the error of the output beside that of caches left as they are."""

    # Root mean squares over that of the output, for a loud and a quiet KV head: keys and values are Gaussian, one in
    # twenty features ten times as large, and all of the quiet head a tenth.
    MEASURED = {
        ("float8_e4m3fn", "tensor"): (0.045, 0.050),
        ("float8_e4m3fn", "head"): (0.045, 0.042),
        ("float8_e4m3fn", "slot"): (0.027, 0.028),
        ("float8_e5m2", "tensor"): (0.088, 0.083),
        ("float8_e5m2", "head"): (0.088, 0.086),
        ("float8_e5m2", "slot"): (0.050, 0.053),
        ("int8", "tensor"): (0.035, 0.410),
        ("int8", "head"): (0.035, 0.043),
        ("int8", "slot"): (0.018, 0.019),
    }
    INDICES = dict(
        context_lens=np.int32([192]), page_indices=np.arange(12, dtype=np.int32)[None], query_offsets=np.int32([0, 192])
    )

    APPEND = staticmethod(jax.jit(append_to_pages))

    def append_and_attend(self, query, key, value, cache, **scales):
        written = self.APPEND(cache, cache, key, value, **self.INDICES, **scales)
        caches = dict(zip(CACHES, written)) | dict(zip(CACHES[2:], written[2:] or scales.values()))
        return oracle.exact(dict(query=query, **caches, **self.INDICES))[0]

    @parameterized.parameters(*((*key, *errors) for key, errors in MEASURED.items()))
    def test_of_attention(self, dtype, granularity, *measured):
        rng = np.random.default_rng(0)
        tokens, heads, features = 192, 2, 64
        loud = np.where(rng.random((heads, features)) < 0.05, 10, 1) * np.asarray([1.0, 0.1])[:, None]
        key, value = (rng.standard_normal((tokens, heads, features)) * loud for _ in range(2))
        query = rng.standard_normal((tokens, 4, features)) / np.sqrt((loud**2).mean(-1)).repeat(2)[:, None]
        key, value, query = (x.astype(np.float32) for x in (key, value, query))
        scales = {}
        for name, new in dict(key_scale=key, value_scale=value).items():
            largest = np.abs(new).max((0, 2)) / largest_number(jnp.dtype(dtype))
            scales[name] = dict(tensor=largest.max(), head=largest, slot=np.zeros((heads, 12, 16)))[granularity]
        cache = np.zeros((heads, 12, 16, features), dtype)
        got, want = (
            self.append_and_attend(query, key, value, cache, **scales)
            for cache, scales in ((cache, scales), (np.float32(cache), {}))
        )
        size = lambda x: np.sqrt((x.reshape(tokens, heads, -1) ** 2).mean((0, 2)))
        errors = size(got - want) / size(want)
        self.assertTrue(np.all(errors < 1.2 * np.asarray(measured)), errors)
        self.assertTrue(np.all(errors > np.asarray(measured) / 1.2), errors)  # else they are not what was measured


if __name__ == "__main__":
    absltest.main()
