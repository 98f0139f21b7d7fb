"""Caches in every layout: the attention against the oracle, appends to the bit, cuts over a mesh, and nothing copied.

The kernels for GPUs and TPUs have theirs beside their other tests.
"""

import functools
import types

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np

from paged_prefill import (
    PrefillPageAttentionConfig,
    append_to_pages,
    local_pages,
    merge_over,
    paged_prefill_p,
    ragged_paged_prefill,
    sharding_hints,
    validate,
)
from paged_prefill.lowering.choose import XLA
from paged_prefill.primitive.cut import settle
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.operands import PREFILL, Shapes
from paged_prefill.sharding.rule import sharding_rule
from paged_prefill.tests import appends, compiling, layouts, meshes, oracle, poisoned

# Tiles of one row, so one walk to compile; blocks are parts of a page of 24, or several pages of 4.
SMALL_TILES = PrefillPageAttentionConfig(block_q=1, block_kv=16)
SIZES = dict(page_size=4, head_dim=8, tokens_before=1, tokens_after=1)
SEQUENCES = ((5, 34), (0, 7), (1, 44), (7, 3))
EVERYTHING = dict(
    key_ranges=True, tree_words=1, sinks=True, layers=2, batch=(2,), pools=1, page_size=24,
    cache_dtype="int8", key_scale="slot", value_scale="slot",
)  # fmt: skip
BY_HEAD = dict(dtype="bfloat16", cache_dtype="float8_e4m3fn", key_scale="head", value_scale="tensor", sliding_window=9)


def attend(name, call, **parameters):
    """(out, lse) of a call whose operands are in this project's order, run in a layout."""
    run = functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True, cache_layout=name, **parameters)
    return jax.jit(lambda call: run(**call))(layouts.lay(call, name))


class AttentionTest(parameterized.TestCase):
    @parameterized.parameters(*layouts.NAMES)
    def test_every_operand_at_once(self, name):
        call = poisoned.make_call(0, SEQUENCES, **SIZES | EVERYTHING)
        oracle.assert_matches(call, *attend(name, call))

    @parameterized.parameters("pskd", "ps(k2)d", "p2ksd")
    def test_scales_of_heads_window_and_cap(self, name):
        call = poisoned.make_call(1, SEQUENCES, **SIZES, **BY_HEAD)
        parameters = dict(sliding_window=9, attn_logits_soft_cap=3.0)
        oracle.assert_matches(call, *attend(name, call, **parameters), **parameters)

    @parameterized.parameters("pskd", "pksd")
    def test_latent(self, name):
        call = poisoned.make_call(2, SEQUENCES, **SIZES, value_dim=6, latent=True, kv_heads=1)
        oracle.assert_matches(call, *attend(name, call, value_dim=6), value_dim=6)

    @parameterized.parameters("pskd", "p2skd")
    def test_vmap_over_caches_and_over_packs_that_share_them(self, name):
        calls = [poisoned.make_call(seed, SEQUENCES, **SIZES, poison=False) for seed in (3, 4)]
        calls[1] |= {x: calls[0][x] for x in calls[0] if x not in ("query", "key_cache", "value_cache")}
        laid = [layouts.lay(call, name) for call in calls]
        laid = [{x: array for x, array in each.items() if array is not None} for each in laid]
        caches = tuple(x for x in ("key_cache", "value_cache") if x in laid[0])
        rest = {x: array for x, array in laid[0].items() if x not in ("query", *caches)}
        run = functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True, cache_layout=name)

        @jax.jit
        def both(queries, stacked):
            def each(query, held):
                return run(query=query, **dict.fromkeys(("key_cache", "value_cache")) | dict(zip(caches, held)), **rest)

            one_pool = [x[0] for x in stacked]
            return jax.vmap(each)(queries, stacked), jax.vmap(each, (0, None))(queries, one_pool)

        queries, stacked = np.stack([x["query"] for x in laid]), [np.stack([x[y] for x in laid]) for y in caches]
        own, shared = both(queries, stacked)
        for i, call in enumerate(calls):
            oracle.assert_matches(call, own[0][i], own[1][i])
            of_one_pool = calls[0] | dict(query=call["query"])
            oracle.assert_matches(of_one_pool, shared[0][i], shared[1][i])

    def test_exported_with_sizes_that_are_symbolic(self):
        call = poisoned.make_call(5, ((3, 9), (1, 6)), **SIZES)
        tokens, pages = export.symbolic_shape("t, n")
        laid = {x: array for x, array in layouts.lay(call, "ps(k2)d").items() if array is not None}
        types_ = {x: jax.ShapeDtypeStruct(array.shape, array.dtype) for x, array in laid.items()}
        types_["query"] = types_["query"].update(shape=(tokens, 4, 8))
        types_["key_cache"] = types_["key_cache"].update(shape=(pages, 4, 4, 8))
        run = functools.partial(ragged_paged_prefill, value_cache=None, cache_layout="ps(k2)d", return_lse=True, cfg=SMALL_TILES)
        module = export.export(jax.jit(lambda call: run(**call)))(types_)
        oracle.assert_matches(call, *export.deserialize(module.serialize()).call(laid))

    @parameterized.parameters(*layouts.NAMES)
    def test_what_a_layout_means(self, name):
        """The definition's way back into order, of caches and of scales of slots."""
        call = poisoned.make_call(6, SEQUENCES, **SIZES, layers=2, cache_dtype="int8", key_scale="slot", value_scale="slot")
        laid, found = layouts.lay(call, name), []
        for x in ("key_cache", "value_cache", "key_scale", "value_scale"):
            if laid[x] is not None:
                found += LAYOUTS[name].to_default(jnp.asarray(laid[x]), 1)
        chex.assert_trees_all_equal(found, [call[x] for x in ("key_cache", "value_cache", "key_scale", "value_scale")])


class AppendTest(parameterized.TestCase):
    @parameterized.parameters(*layouts.NAMES)
    def test_tokens_go_to_their_slots_and_nothing_else_is_touched(self, name):
        layouts.check_written(appends.make_append(0, value_dim=8, layers=2, batch=(2, 2), pools=1), name)
        kind = dict(value_dim=8, cache_dtype="int8")
        layouts.check_written(appends.make_append(1, key_scale="slot", value_scale="slot", **kind), name)

    def test_scales_that_are_given(self):
        kind = dict(value_dim=8, cache_dtype="float8_e5m2", key_scale="head", value_scale="tensor")
        layouts.check_written(appends.make_append(2, **kind), "ps(k2)d")

    def test_latent(self):
        layouts.check_written(appends.make_append(3, latent=True), "pskd")


class MemoryTest(parameterized.TestCase):
    LAYERS = 3

    def test_a_scan_over_layers_writes_and_reads_all_of_them_in_place(self):
        """Caches of every layout in one program, donated: what it takes beside them is less than half a layer of one."""
        call = appends.make_append(7, layers=self.LAYERS, value_dim=8, spare_pages=2_000)
        call["query"] = np.random.default_rng(0).standard_normal((call["key"].shape[0], 4, 8), np.float32)
        laid = {name: layouts.lay(call, name) for name in layouts.NAMES}
        caches = {name: [laid[name][x] for x in ("key_cache", "value_cache")] for name in laid}
        caches = jax.tree.map(lambda x: jnp.asarray(x) + 0, caches)
        names = ("context_lens", "page_indices", "query_offsets")
        pack = {x: call[x] for x in names}

        def model(caches, query, key, value):
            def layer(carry, number):
                caches, query = carry
                caches = dict(caches)
                for name, held in caches.items():
                    form = dict(layer=number, cache_layout=name, **pack)
                    held = append_to_pages(*held, key, value, **form)
                    query = ragged_paged_prefill(query, *held, cfg=SMALL_TILES, **form)
                    caches[name] = list(held)
                return (caches, query), None

            return jax.lax.scan(layer, (caches, query), jnp.arange(self.LAYERS, dtype=jnp.int32))[0]

        lowered = jax.jit(model, donate_argnums=0).lower(caches, *(call[x] for x in ("query", "key", "value")))
        compiled = lowered.compile(compiling.AS_USERS_DO)
        memory, large = compiled.memory_analysis(), jax.tree.leaves(caches)
        self.assertEqual(memory.alias_size_in_bytes, sum(x.nbytes for x in large))
        self.assertLess(memory.temp_size_in_bytes, min(x.nbytes for x in large) / self.LAYERS / 2)
        pointers = [x.unsafe_buffer_pointer() for x in large]
        written, _ = compiled(caches, *(call[x] for x in ("query", "key", "value")))
        self.assertEqual([x.unsafe_buffer_pointer() for x in jax.tree.leaves(written)], pointers)


def cut_of(name, heads=None, pages=None, batch=None):
    """How a cache in a layout is cut by what cuts its heads and pages, behind a pool."""
    axes = {"kv_heads": heads, "2 * kv_heads": heads, "num_pages": pages}
    return P(batch, *(axes.get(dim) for dim in LAYOUTS[name].dims))


class ShardingTest(parameterized.TestCase):
    """Two packs with pools of their own: batch, heads and pages cut, in each way there is."""

    def setUp(self):
        super().setUp()
        self.enter_context(absltest.mock.patch.object(type(XLA), "attend", staticmethod(meshes.dense_kernel)))
        call = poisoned.make_call(
            8, ((4, 11), (1, 9)), page_size=2, head_dim=4, q_heads=8, kv_heads=4, batch=(2,), pools=1, poison=False,
            cache_dtype="int8", key_scale="slot", value_scale="slot", spare_pages=5,
        )  # fmt: skip
        self.call, self.want = call, oracle.exact(call)

    def laid(self, name, mesh, **cut):
        """The call in a layout, on a mesh, and the specs."""
        laid = {x: array for x, array in layouts.lay(self.call, name).items() if array is not None}
        cache = cut_of(name, **cut)
        specs = {x: P(cut.get("batch")) for x in laid} | {x: cache for x in laid if x.endswith("cache")}
        specs |= {x: P(*cache[:-1]) for x in laid if x.endswith("scale")}
        specs["query"] = P(cut.get("batch"), None, cut.get("heads"))
        return meshes.put_call(mesh, laid, specs), specs

    def check(self, got):
        for a, b in zip(got, self.want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    @parameterized.parameters("pskd", "ps(k2)d", "p2ksd")
    def test_the_compiler_is_told_how(self, name):
        mesh = meshes.mesh((2, 2, 2), names=("data", "model", "pages"))
        laid, _ = self.laid(name, mesh, batch="data", heads="model", pages="pages")
        run = functools.partial(ragged_paged_prefill, cache_layout=name, return_lse=True)
        compiled = jax.jit(lambda call: run(value_cache=call.get("value_cache"), **{x: call[x] for x in call if x != "value_cache"})).lower(laid).compile()
        self.assertNoCommonElements({op for op, _ in meshes.collectives(compiled)}, {"all-gather", "all-to-all"})
        self.check(compiled(laid))

    @parameterized.parameters("pksd", "ps(k2)d")
    def test_explicit_axes(self, name):
        mesh = meshes.mesh((2, 2, 2), AxisType.Explicit, ("data", "model", "pages"))
        laid, _ = self.laid(name, mesh, batch="data", heads="model", pages="pages")
        with jax.set_mesh(mesh):
            held = dict.fromkeys(("value_cache",)) | laid
            out, lse = jax.jit(functools.partial(ragged_paged_prefill, cache_layout=name, return_lse=True))(**held)
        self.assertEqual(jax.typeof(out).sharding.spec, P("data", None, "model", None))
        self.check((out, lse))

    @parameterized.parameters("p2skd", "pskd")
    def test_hints(self, name):
        mesh = meshes.mesh((2, 2, 2), names=("data", "model", "pages"))
        laid, _ = self.laid(name, mesh, batch="data", heads="model", pages="pages")
        run = functools.partial(ragged_paged_prefill, cache_layout=name, return_lse=True)
        with jax.set_mesh(mesh), sharding_hints(head_axis="model", batch_axis="data", page_axis="pages"):
            self.check(jax.jit(lambda call: run(**dict.fromkeys(("value_cache",)) | call))(laid))

    @parameterized.parameters("pskd", "ps(k2)d")
    def test_inside_a_shard_map(self, name):
        mesh = meshes.mesh((2, 4), names=("data", "pages"))
        laid, specs = self.laid(name, mesh, batch="data", pages="pages")
        pack = ("context_lens", "page_indices", "query_offsets")

        def local(call):
            mine = local_pages("pages", call["query"], call["key_cache"], *(call[x] for x in pack), cache_layout=name)
            held = dict.fromkeys(("value_cache",)) | call | mine
            return merge_over("pages", *ragged_paged_prefill(**held, cache_layout=name, return_lse=True))

        self.check(jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("data")))(laid))

    @parameterized.parameters(*layouts.NAMES)
    def test_append_where_pages_and_heads_are_cut(self, name):
        mesh = meshes.mesh((2, 2, 2), AxisType.Explicit, ("data", "model", "pages"))
        call = appends.make_append(
            9, head_dim=4, value_dim=4, page_size=2, kv_heads=4, q_heads=4, batch=(2,), pools=1, spare_pages=2,
            sequences=((3, 9), (2, 5)),
        )  # fmt: skip
        laid = {x: array for x, array in layouts.lay(call, name).items() if array is not None}
        cache = cut_of(name, "model", "pages", "data")
        specs = {x: cache if x.endswith("cache") else P("data") for x in laid}
        specs |= {x: P("data", None, "model") for x in ("key", "value")}
        put = meshes.put_call(mesh, laid, specs)
        with jax.set_mesh(mesh):
            append = functools.partial(append_to_pages, cache_layout=name)
            got = jax.jit(append)(**dict.fromkeys(("value_cache",)) | put)
        self.assertEqual(jax.typeof(got[0]).sharding.spec, cache)
        appends.assert_written(call, layouts.in_order(got, name, 1))

    def test_the_plan_and_the_rule_know_where_heads_and_pages_stand(self):
        mesh = {"data": 2, "model": 4}
        sizes = {"kv_heads": 8, "2 * kv_heads": 16, "num_pages": 12, "page_size": 4, "2": 2, "features": 8}
        for name in layouts.NAMES:
            layout = LAYOUTS[name]
            cache = tuple(sizes[dim] for dim in layout.dims)
            shapes = dict(query=(5, 16, 8), key_cache=cache, value_cache=cache, context_lens=(2,), page_indices=(2, 3))
            shapes |= dict(query_offsets=(3,), key_scale=cache[:-1])
            if layout.combined:
                del shapes["value_cache"]
            call = Shapes(PREFILL, shapes, 0, layout)
            given = P(*cut_of(name, "model", "data")[1:])
            cut = settle(mesh, call, dict(key_cache=given))
            self.assertEqual((cut.kv_heads, cut.pages), (("model",), ("data",)), name)
            self.assertEqual((cut.specs(call)["key_cache"], cut.specs(call)["key_scale"]), (given, P(*given[:-1])), name)
            rule = sharding_rule(call, types.SimpleNamespace(shape={"data": 2, "model": 4}))
            in_cache = [x if isinstance(x, str) else x[0] for x in rule.operand_mappings[1]]
            self.assertEqual(in_cache.index("num_pages"), layout.dims.index("num_pages"))
            self.assertIn("kv_heads", in_cache)
            self.assertNoCommonElements(rule.need_replication_factors, ("kv_heads", "num_pages"))


def call_of(name, **changes):
    """The types of a call in a layout, by name."""
    sizes = {"kv_heads": 2, "2 * kv_heads": 4, "num_pages": 9, "page_size": 8, "2": 2, "features": 16}
    cache = jax.ShapeDtypeStruct(tuple(sizes[dim] for dim in LAYOUTS[name].dims), jnp.float32)
    call = dict(query=jax.ShapeDtypeStruct((10, 4, 16), jnp.float32), key_cache=cache, value_cache=cache)
    call |= dict(value_cache=None) if LAYOUTS[name].combined else {}
    shapes = dict(context_lens=(2,), page_indices=(2, 5), query_offsets=(3,))
    return call | {x: jax.ShapeDtypeStruct(shape, jnp.int32) for x, shape in shapes.items()} | changes


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class ErrorTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("values_twice", "ps(k2)d", dict(value_cache=floats(9, 8, 4, 16)),
         r"value_cache must be None: cache_layout='ps\(k2\)d' has the values in key_cache, got value_cache \(9, 8, 4, 16\)"),
        ("value_dim", "p2ksd", dict(value_dim=8), r"value_dim is for a latent cache, and cache_layout='p2ksd' has the"),
        ("odd_heads", "ps(k2)d", dict(key_cache=floats(9, 8, 3, 16)), r"key_cache must have an even number of heads"),
        ("three_of_two", "p2skd", dict(key_cache=floats(9, 3, 8, 2, 16)),
         r"key_cache must have shape \[num_pages, 2, page_size, kv_heads, head_dim = 16\], got \(9, 3, 8, 2, 16\)"),
        ("too_few_dimensions", "p2ksd", dict(key_cache=floats(9, 8, 2, 16)),
         r"key_cache must have shape \[num_pages, 2, kv_heads, page_size, head_dim(| = 16)\], got"),
        ("another_value_cache", "pksd", dict(value_cache=floats(9, 8, 2, 16)),
         r"value_cache must have shape \[num_pages = 9, kv_heads = 2, page_size = 8, value_dim\], got"),
        ("scales_in_another_order", "pskd",
         dict(key_cache=floats(9, 8, 2, 16, dtype=jnp.int8), value_cache=floats(9, 8, 2, 16, dtype=jnp.int8),
              key_scale=floats(2, 9, 8)), r"key_scale must have shape .*\[num_pages = 9, page_size = 8, kv_heads = 2\]"),
        ("scales_twice", "ps(k2)d",
         dict(key_cache=floats(9, 8, 4, 16, dtype=jnp.int8), key_scale=floats(9, 8, 4), value_scale=floats(9, 8, 4)),
         r"value_scale must be None where scales are of each slot"),
        ("another_layout", "pskd", dict(key_cache=floats(9, 5, 2, 16), value_cache=floats(9, 5, 2, 16), query=floats(10, 9, 16)),
         r"looks like \[kv_heads, num_pages, page_size, head_dim\], which .*take by cache_layout='kpsd'$"),
    )  # fmt: skip
    def test_calls(self, name, changes, message):
        changes = dict(changes)
        static = dict(cache_layout=name) | {x: changes.pop(x) for x in ("value_dim",) if x in changes}
        for call in (ragged_paged_prefill, paged_prefill_p.bind):
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(functools.partial(call, **static), **call_of(name, **changes))

    def test_layouts_that_there_are_not(self):
        for name in ("kspd", None, 3, "PSKD"):
            message = r"cache_layout must be one of kpsd, pskd, pksd, ps\(k2\)d, p2ksd, p2skd, got "
            call = call_of("kpsd")
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(functools.partial(ragged_paged_prefill, cache_layout=name), **call)
            del call["query"]
            key = floats(10, 2, 16)
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(functools.partial(append_to_pages, cache_layout=name), key=key, value=key, **call)

    def test_appends(self):
        call, append = call_of("ps(k2)d"), functools.partial(append_to_pages, cache_layout="ps(k2)d")
        del call["query"]
        key = floats(10, 2, 16)
        with self.assertRaisesRegex(ValueError, "value must be given with key: cache_layout='ps.k2.d' has the values in"):
            jax.eval_shape(append, **call, key=key, value=None)
        with self.assertRaisesRegex(ValueError, r"value must have shape .*2, 16\] to go into key_cache \(9, 8, 4, 16\), got"):
            jax.eval_shape(append, **call, key=key, value=floats(10, 2, 8))

    @parameterized.parameters(*layouts.NAMES)
    def test_validate_knows_where_pages_and_slots_stand(self, name):
        call = poisoned.make_call(10, ((3, 9), (1, 6)), **SIZES, layers=3)
        call["layer"] = np.int32(2)
        validate(**layouts.lay(call, name), cache_layout=name)
        num_pages = call["key_cache"].shape[2]
        beyond = np.where(np.arange(call["page_indices"].shape[1]) == 0, num_pages, call["page_indices"])
        with self.assertRaisesRegex(ValueError, rf"page_indices of sequence 0 must lie in \[0, {num_pages}\)"):
            validate(**layouts.lay(call, name) | dict(page_indices=beyond), cache_layout=name)
        with self.assertRaisesRegex(ValueError, r"layer must lie in \[0, 3\), got 3"):
            validate(**layouts.lay(call, name) | dict(layer=np.int32(3)), cache_layout=name)


if __name__ == "__main__":
    absltest.main()
