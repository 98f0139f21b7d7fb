"""What surrounds a sharded call: vmap, loops over donated caches, export, hints, errors, threads, TPUs not here."""

import concurrent.futures
import functools
import importlib.util
from pathlib import Path
import re
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export, lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import lowering
from paged_prefill import (
    append_to_pages,
    create_shard_map_wrapper,
    paged_prefill_p,
    prefill_page_attention,
    ragged_paged_prefill,
    sharding_hints,
)
from paged_prefill.lowering.choose import XLA
from paged_prefill.primitive.context import current_policy, policy
from paged_prefill.tests import cases, compiling, meshes
from paged_prefill.tests.packs import Pack, exact
from paged_prefill.tests.tuning_stand_ins import environment

CUT = meshes.specs("data", "model", "model")
WAYS = ("automatic", "explicit", "hint")
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit, "hint": AxisType.Auto}

attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)


def attend_by(way):
    """The public call, with the hints of the usual cut where they are the way."""
    return functools.partial(attend, batch_axis="data", head_axis="model") if way == "hint" else attend


def append_by(way):
    """Likewise for writing."""
    return functools.partial(append_to_pages, head_axis="model") if way == "hint" else append_to_pages


def compile_on(mesh, call, pack, cut, **jit):
    operands = meshes.put(mesh, pack, cut)
    return jax.jit(call, **jit).lower(*operands).compile(), operands


class DenseTest(parameterized.TestCase):
    """Tests of what surrounds a call, whatever the kernel: one that compiles fast stands in for the product's."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(XLA, "attend", meshes.dense_kernel))


class BatchTest(DenseTest):
    @parameterized.parameters(*WAYS)
    def test_replicas_with_private_pools(self, way):
        """*C cut along the batch axis: each replica has its own caches, and nothing is exchanged."""
        pack = meshes.batched_pack(pools=1, batch=(4, 3), q_heads=8, kv_heads=4)
        cut = meshes.specs("data", "model", "model", batch_dims=2, pool_axis="data")
        compiled, operands = compile_on(meshes.mesh(kind=KINDS[way]), attend_by(way), pack, cut)
        results = compiled(*operands)
        meshes.assert_close(results, exact(pack))
        self.assertEmpty(meshes.collectives(compiled))
        self.assertEqual(results[0].sharding.spec[:4], ("data", None, None, "model"))

    @parameterized.parameters(*WAYS)
    def test_vmap_over_private_pools(self, way):
        pack = meshes.batched_pack(pools=1, batch=(4,), q_heads=8, kv_heads=2)
        cut = meshes.specs("data", "model", None, pool_axis="data")
        compiled, operands = compile_on(meshes.mesh(kind=KINDS[way]), jax.vmap(attend_by(way)), pack, cut)
        meshes.assert_close(compiled(*operands), exact(pack))
        self.assertEmpty(meshes.collectives(compiled))

    @parameterized.parameters(False, True)
    def test_spmd_axis_name_cuts_the_new_axis(self, pools):
        """Though no operand says so; the heads are cut as the caches are all the same."""
        pack = meshes.batched_pack(pools=int(pools), q_heads=16, kv_heads=8)
        cut = meshes.specs(None, None, "model", pool_axis="data" if pools else None)
        in_axes = (0, 0 if pools else None, 0 if pools else None, 0, 0, 0)
        call = jax.vmap(attend, in_axes, spmd_axis_name="data")
        compiled, operands = compile_on(meshes.mesh(), call, pack, cut)
        results = compiled(*operands)
        meshes.assert_close(results, exact(pack))
        self.assertEmpty(meshes.collectives(compiled))
        for result in results:
            self.assertEqual(result.sharding.spec[:3], ("data", None, "model"))

    def test_batch_axis_waits_for_vmap(self):
        """A call of one sequence has no batch; its batch_axis cuts the first dimension that vmap adds, no later one."""
        pack = meshes.batched_pack(batch=(3, 4), q_heads=8, kv_heads=4)
        call = functools.partial(prefill_page_attention, cfg=cases.ONE_HEIGHT, batch_axis="data", head_axis="model")
        for _ in range(2):
            call = jax.vmap(call, (0, None, None, 0, 0))
        cut = meshes.specs(None, None, "model", batch_dims=2)
        query, keys, values, lens, pages, _ = meshes.put(meshes.mesh(), pack, cut)
        arguments = (query, keys, values, lens[..., :1], pages[..., 0, :])
        (equation,) = jax.make_jaxpr(call)(*arguments).eqns[-1:]
        while equation.primitive is not paged_prefill_p:  # inside vmap's own jit calls, if any
            equation = equation.params["jaxpr"].eqns[-1]
        self.assertEqual(equation.params["hint"].batch, ((), ("data",)))
        compiled = jax.jit(call).lower(*arguments).compile()
        out = compiled(*arguments)
        offsets = np.broadcast_to(np.int32([0, 5]), (3, 4, 2))
        whole = Pack(*pack[:3], pack.context_lens[..., :1], pack.page_indices[..., :1, :], offsets)
        np.testing.assert_allclose(out, exact(whole)[0], atol=1e-5)
        self.assertEmpty(meshes.collectives(compiled))
        self.assertEqual(out.sharding.spec[:4], (None, "data", None, "model"))

    def test_hint_follows_its_dimension(self):
        """A dimension that vmap adds in front is whole, and the pack's own batch stays cut."""
        pack = meshes.batched_pack(batch=(3, 4), q_heads=8, kv_heads=4)
        cut = meshes.specs(None, None, "model", batch_dims=2)
        call = jax.vmap(attend_by("hint"), (0, None, None, 0, 0, 0))
        compiled, operands = compile_on(meshes.mesh(), call, pack, cut)
        results = compiled(*operands)
        meshes.assert_close(results, exact(pack))
        self.assertEqual(results[0].sharding.spec[:4], (None, "data", None, "model"))


class CacheTest(parameterized.TestCase):
    """Caches are large: they stay in place, cut, and are never exchanged."""

    def arguments(self, mesh, layers=None):
        rng = np.random.default_rng(3)
        pack = meshes.batched_pack(batch=(2,), q_heads=8, kv_heads=4, num_pages=4096)
        cut = meshes.specs(None, "model", "model")
        # Two packs of two sequences that own all their tokens and the pages they write.
        pack = pack._replace(
            context_lens=np.full((2, 2), 7, np.int32),
            page_indices=rng.permutation(4096)[:12].reshape(2, 2, 3).astype(np.int32),
        )
        new = [rng.standard_normal((2, 5, 4, x.shape[-1]), np.float32) for x in pack[1:3]]
        if layers:
            pack = pack._replace(**{n: np.stack([getattr(pack, n)] * layers) for n in ("key_cache", "value_cache")})
            cut = cut._replace(key_cache=P(None, "model"), value_cache=P(None, "model"))
        new = [jax.device_put(x, NamedSharding(mesh, P(None, None, "model"))) for x in new]
        return meshes.put(mesh, pack, cut), new, pack, [np.asarray(x) for x in new]

    @parameterized.product(way=WAYS, whole_tokens=(False, True))
    def test_append_and_prefill_under_one_jit(self, way, whole_tokens):
        mesh = meshes.mesh(kind=KINDS[way])

        def step(pack, key, value):
            caches = append_by(way)(*pack[1:3], key, value, *pack[3:])
            return functools.partial(attend_by(way), pack.query)(*caches, *pack[3:]), *caches

        pack, new, host, host_new = self.arguments(mesh)
        if whole_tokens:
            new = [jax.device_put(x, NamedSharding(mesh, P())) for x in host_new]
        caches = NamedSharding(mesh, P("model"))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(None, caches, caches))
        want = jax.jit(append_to_pages)(*host[1:3], *host_new, *host[3:])
        compiled = jitted.lower(pack, *new).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        results, *written = compiled(pack, *new)
        chex.assert_trees_all_equal(tuple(map(np.asarray, written)), tuple(map(np.asarray, want)))
        meshes.assert_close(results, exact(host._replace(key_cache=want[0], value_cache=want[1])))
        self.assertEmpty(meshes.collectives(compiled))
        self.assertTrue(pack.key_cache.is_deleted() and pack.value_cache.is_deleted())
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, host.key_cache.nbytes // 4 // 2)

    @parameterized.parameters(*WAYS)
    def test_scan_over_layers_with_donated_caches(self, way):
        mesh, layers = meshes.mesh(kind=KINDS[way]), 3

        def model(pack, key, value):
            def layer(carry, number):
                query, keys, values = carry
                one = [lax.dynamic_index_in_dim(x, number, keepdims=False) for x in (keys, values)]
                factor = (number + 1).astype(key.dtype)
                one = append_by(way)(*one, key * factor, value * factor, *pack[3:])
                head_axis = "model" if way == "hint" else None
                out, _ = attend(query, *one, *pack[3:], head_axis=head_axis)
                keys, values = (lax.dynamic_update_index_in_dim(x, y, number, 0) for x, y in zip((keys, values), one))
                return (query + out[..., : query.shape[-1]], keys, values), None

            return lax.scan(layer, pack[:3], jnp.arange(layers))[0]

        pack, new, host, host_new = self.arguments(mesh, layers)
        want = jax.jit(model)(Pack(*map(jnp.asarray, host)), *host_new)
        caches = NamedSharding(mesh, P(None, "model"))
        jitted = jax.jit(model, donate_argnums=0, out_shardings=(None, caches, caches))
        compiled = jitted.lower(pack, *new).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        results = compiled(pack, *new)
        for got, right in zip(results, want):
            np.testing.assert_allclose(got, right, atol=1e-4, rtol=1e-4)
        self.assertEmpty(meshes.collectives(compiled))
        self.assertTrue(pack.key_cache.is_deleted() and pack.value_cache.is_deleted())
        self.assertEqual(results[1].sharding.spec[:2], (None, "model"))
        # At most a layer at a time is set aside, of the part that one device holds.
        one_layer = (host.key_cache.nbytes + host.value_cache.nbytes) // layers // 4
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 1.5 * one_layer)


    @parameterized.parameters(*WAYS)
    def test_append_to_pools_of_their_own(self, way):
        """Batch and heads cut: each device writes what it holds, and the types say so."""
        mesh = meshes.mesh(kind=KINDS[way])
        pack = meshes.batched_pack(pools=1, batch=(2,), q_heads=8, kv_heads=4, num_pages=64)
        pages = np.random.default_rng(0).permutation(64)[:12].reshape(2, 2, 3)
        pack = pack._replace(page_indices=pages.astype(np.int32), context_lens=np.full((2, 2), 7, np.int32))
        new = [np.random.default_rng(1).standard_normal((2, 5, 4, x.shape[-1]), np.float32) for x in pack[1:3]]
        want = [append_to_pages(*(x[i] for x in (*pack[1:3], *new, *pack[3:]))) for i in range(2)]
        cut = meshes.specs("data", "model", "model", pool_axis="data")
        on_mesh = meshes.put(mesh, pack, cut)
        new = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in new]
        call = functools.partial(append_by(way), batch_axis="data") if way == "hint" else append_to_pages
        compiled = jax.jit(call, donate_argnums=(0, 1)).lower(*on_mesh[1:3], *new, *on_mesh[3:]).compile()
        if way == "explicit":
            self.assertEqual(jax.typeof(jax.eval_shape(call, *on_mesh[1:3], *new, *on_mesh[3:])[0]).sharding.spec[:2], ("data", "model"))
        got = compiled(*on_mesh[1:3], *new, *on_mesh[3:])
        for side in range(2):
            np.testing.assert_array_equal(got[side], np.stack([x[side] for x in want]))
            self.assertEqual(got[side].sharding.spec[:2], ("data", "model"))
        self.assertEmpty(meshes.collectives(compiled))

    @parameterized.parameters("automatic", "hint")
    def test_packs_that_write_into_one_pool_are_gathered(self, way):
        """Every device that holds the pool must see all packs, however they were cut; the pool does not move."""
        mesh = meshes.mesh(kind=KINDS[way])
        pack, new, host, host_new = self.arguments(mesh)
        new = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in host_new]
        call = functools.partial(append_by(way), batch_axis="data") if way == "hint" else append_to_pages
        compiled = jax.jit(call).lower(*pack[1:3], *new, *pack[3:]).compile()
        for got, want in zip(compiled(*pack[1:3], *new, *pack[3:]), append_to_pages(*host[1:3], *host_new, *host[3:])):
            np.testing.assert_array_equal(got, want)
        self.assertFalse([kind for _, kind in meshes.collectives(compiled) if "4096" in kind], "a cache moved")

    def test_packs_that_write_into_one_pool_and_are_cut_by_type_are_refused(self):
        mesh = meshes.mesh(kind=AxisType.Explicit)
        pack, _, _, host_new = self.arguments(mesh)
        new = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in host_new]
        with self.assertRaisesRegex(ValueError, "key is cut as .* append_to_pages cuts heads, pages, and batch dimensions where"):
            jax.jit(append_to_pages)(*pack[1:3], *new, *pack[3:])


class ExportTest(parameterized.TestCase):
    PACK = meshes.batched_pack(q_heads=8, kv_heads=4)

    def call(self, way, mesh):
        call = functools.partial(attend_by(way), platform="xla")
        if way != "manual":
            return call
        return jax.shard_map(call, mesh=mesh, in_specs=tuple(CUT), out_specs=(CUT.query, CUT.query))

    @parameterized.product(way=("explicit", "hint", "manual"))
    def test_round_trip(self, way):
        mesh = meshes.mesh(kind=KINDS.get(way, AxisType.Auto))
        operands = meshes.put(mesh, self.PACK, CUT)
        exported = export.export(jax.jit(self.call(way, mesh)), platforms=("cpu",))(*operands)
        exported = export.deserialize(exported.serialize())
        self.assertEqual(exported.nr_devices, 8)
        meshes.assert_close(jax.jit(exported.call)(*operands), exact(self.PACK))

    @parameterized.product(way=("explicit", "hint", "manual"))
    def test_for_platforms_that_are_not_here(self, way):
        mesh = meshes.mesh(kind=KINDS.get(way, AxisType.Auto))
        operands = meshes.put(mesh, self.PACK, CUT)
        exported = export.export(jax.jit(self.call(way, mesh)), platforms=("tpu", "cuda"))(*operands)
        self.assertEqual(export.deserialize(exported.serialize()).platforms, ("tpu", "cuda"))

    @parameterized.product(way=("explicit", "manual"))
    def test_for_devices_that_are_not_here(self, way):
        """An AbstractMesh of more devices than this process has."""
        kind = KINDS.get(way, AxisType.Auto)
        mesh = jax.sharding.AbstractMesh((4, 4), ("data", "model"), axis_types=(kind,) * 2)
        operands = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip(self.PACK, CUT)
        ]
        exported = export.export(jax.jit(self.call(way, mesh)), platforms=("tpu",))(*operands)
        self.assertEqual(exported.nr_devices, 16)

    def test_the_callback_cannot_be_exported_and_says_what_to_do(self):
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)
        with self.assertRaisesRegex(NotImplementedError, "paged_prefill .*cannot be exported.*head_axis="):
            export.export(jax.jit(attend))(*operands)


class HintTest(DenseTest):
    PACK = meshes.batched_pack(q_heads=8, kv_heads=4)

    def test_context_manager(self):
        """Sets what a call leaves open, and only that; nests; ends."""
        hint = lambda **own: jax.make_jaxpr(functools.partial(attend, **own))(*self.PACK).eqns[-1].params["hint"]
        self.assertIsNone(hint())
        with sharding_hints(head_axis="model", batch_axis="data"):
            self.assertEqual(hint()[:2], ((("data",),), ("model",)))
            self.assertEqual(hint(batch_axis="rows")[:2], ((("rows",),), ("model",)))
            with sharding_hints(head_axis=()):
                self.assertEqual(hint()[:2], ((("data",),), ()))
        self.assertIsNone(hint())

    def test_context_manager_on_a_mesh(self):
        def model(*operands):
            with sharding_hints(head_axis="model", batch_axis="data"):
                return attend(*operands)

        compiled, operands = compile_on(meshes.mesh(), model, self.PACK, CUT)
        meshes.assert_close(compiled(*operands), exact(self.PACK))
        self.assertNotIn("CustomSPMDPartitioning", jax.jit(model).lower(*operands).as_text())
        self.assertEmpty(meshes.collectives(compiled))

    def test_hint_without_a_mesh_changes_nothing(self):
        meshes.assert_close(attend_by("hint")(*self.PACK), exact(self.PACK))

    def test_hint_under_set_mesh_cuts_what_nobody_cut(self):
        with jax.set_mesh(meshes.mesh()):
            results = jax.jit(attend_by("hint"))(*map(jnp.asarray, self.PACK))
        meshes.assert_close(results, exact(self.PACK))
        self.assertEqual(results[0].sharding.spec[:3], ("data", None, "model"))

    @parameterized.named_parameters(
        ("unknown_axis", dict(head_axis="heads"), ValueError, r"must name axes of the mesh \('data', 'model'\).*heads"),
        ("one_axis_twice", dict(head_axis="data", batch_axis="data"), ValueError, "can cut one dimension once"),
        ("no_name", dict(head_axis=1), TypeError, "head_axis must be the name of a mesh axis"),
    )
    def test_errors(self, hints, error, message):
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)
        with self.assertRaisesRegex(error, message):
            jax.jit(functools.partial(attend, **hints))(*operands)


    @parameterized.named_parameters(
        ("batch", dict(batch_axis="model"), 3, 8, r"batch_axis='model' cuts into 4 parts, and a batch dimension of 3 cannot"),
        ("batch_by_both", dict(batch_axis=("data", "model")), 4, 8, r"batch_axis=\('data', 'model'\) cuts into 8 parts"),
        ("heads", dict(head_axis="model"), 4, 6, r"head_axis='model' cuts into 4 parts, and 6 query heads over 6 KV heads"),
    )
    def test_a_hint_that_does_not_divide(self, hints, batch, heads, message):
        pack = meshes.batched_pack(batch=(batch,), q_heads=heads, kv_heads=heads)
        operands = meshes.put(meshes.mesh(), pack, meshes.specs())
        with self.assertRaisesRegex(ValueError, message):
            jax.jit(functools.partial(attend, **hints))(*operands)


class ErrorTest(DenseTest):
    PACK = meshes.batched_pack(q_heads=8, kv_heads=4, num_pages=24)

    @parameterized.named_parameters(
        ("slots", CUT._replace(key_cache=P(None, None, "model")), "key_cache is cut as .*Reshard it"),
        ("pages_of_one", CUT._replace(key_cache=P(None, "model"), query=P("data")), "value_cache is cut as .*Reshard it"),
        ("features", CUT._replace(value_cache=P(None, None, None, "model")), "value_cache is cut as .*Reshard it"),
        ("two_caches_unlike", CUT._replace(key_cache=P("data"), query=P()), "value_cache is cut as .*Reshard it"),
    )
    def test_a_cache_that_would_have_to_move(self, cut, message):
        """Our words, through the compiler, and with types at once."""
        for kind, error in ((AxisType.Auto, jax.errors.JaxRuntimeError), (AxisType.Explicit, ValueError)):
            with self.assertRaisesRegex(error, message):
                jax.jit(attend)(*meshes.put(meshes.mesh(kind=kind), self.PACK, cut))
        # and the process is as good as before
        compiled, operands = compile_on(meshes.mesh(), attend, self.PACK, CUT)
        meshes.assert_close(compiled(*operands), exact(self.PACK))

    @parameterized.named_parameters(
        ("features", CUT._replace(query=P(None, None, None, "model"))),
        ("heads_over_another_axis", CUT._replace(query=P(None, None, "data"))),
    )
    def test_a_query_that_wishes_otherwise_moves(self, cut):
        """Conflicting wishes: small arrays move, caches do not."""
        compiled, operands = compile_on(meshes.mesh(), attend, self.PACK, cut)
        meshes.assert_close(compiled(*operands), exact(self.PACK))
        found = meshes.collectives(compiled)
        self.assertNotEmpty(found)
        self.assertFalse([kind for _, kind in found if re.search(r"\b24\b", kind)], "a cache moved")

    @parameterized.product(axes=("data", "model"), kind=(AxisType.Auto, AxisType.Explicit))
    def test_half_manual_meshes_are_refused(self, axes, kind):
        mesh = meshes.mesh(kind=kind)
        mapped = jax.shard_map(
            attend, mesh=mesh, in_specs=(P(),) * 6, out_specs=(P(), P()), axis_names={axes}, check_vma=False
        )
        with self.assertRaisesRegex(NotImplementedError, "make every axis manual"):
            jax.jit(mapped)(*meshes.put(mesh, self.PACK, meshes.specs()))

    def test_tpus_with_automatic_axes_need_to_be_told(self):
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)
        with self.assertRaisesRegex(NotImplementedError, "several TPUs.*38196.*head_axis="):
            jax.jit(attend).trace(*operands).lower(lowering_platforms=("tpu",))

    def test_a_kernel_that_cannot_run(self):
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)
        with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "platform='triton' cannot run this call on cpu"):
            jax.jit(functools.partial(attend, platform="triton"))(*operands)


class WrapperTest(DenseTest):
    """create_shard_map_wrapper, ejKernel's way."""

    SPECS = (P(None, "model"), P("model"), P("model"), P(), P())

    def arguments(self, q_heads=8, kv_heads=4):
        pack = meshes.batched_pack(batch=(), q_heads=q_heads, kv_heads=kv_heads)
        one = Pack(*pack[:3], pack.context_lens[:1], pack.page_indices[:1], np.int32([0, 5]))
        return (*pack[:3], pack.context_lens[:1], pack.page_indices[0]), exact(one)[0]

    @parameterized.product(
        heads_and_caches=(((16, 8), P("model")), ((8, 2), P()), ((8, 1), P()), ((8, 2), P("data"))),
        check_vma=(True, False),
    )
    def test_values(self, heads_and_caches, check_vma):
        heads, cache = heads_and_caches
        query = P(None, ("data", "model") if cache == P("data") else "model")
        arguments, want = self.arguments(*heads)
        function, call_args = create_shard_map_wrapper(
            *arguments,
            cfg=cases.ONE_HEIGHT,
            mesh=meshes.mesh(),
            in_specs=(query, cache, cache, P(), P()),
            out_specs=query,
            check_vma=check_vma,
        )
        np.testing.assert_allclose(jax.jit(function)(*call_args), want, atol=1e-5)

    @parameterized.named_parameters(
        ("nothing_given", {}, "needs mesh, in_specs and out_specs, got no mesh and no in_specs and no out_specs"),
        ("no_out_specs", dict(mesh=1, in_specs=1), "got no out_specs"),
        ("too_few", dict(in_specs=SPECS[:4]), "in_specs must have one PartitionSpec for each of 5"),
        ("query_whole", dict(in_specs=(P(), *SPECS[1:])), "spec of query must be"),
        ("tokens", dict(in_specs=(P("data", "model"), *SPECS[1:])), "spec of query must be"),
        ("pages", dict(in_specs=(SPECS[0], P("model", "data"), *SPECS[2:])), "spec of key_cache must be"),
        ("out", dict(out_specs=P()), "spec of out must be"),
    )
    def test_errors(self, given, message):
        defaults = dict(mesh=meshes.mesh(), in_specs=self.SPECS, out_specs=self.SPECS[0])
        given = defaults | given if "mesh" not in given and given else given
        with self.assertRaisesRegex(ValueError, re.escape(message)):
            create_shard_map_wrapper(*self.arguments()[0], **given)


class TracingTest(DenseTest):
    PACK = meshes.batched_pack(q_heads=8, kv_heads=4)

    def test_explicit_types_tell_the_result(self):
        operands = meshes.put(meshes.mesh(kind=AxisType.Explicit), self.PACK, CUT)
        out, lse = jax.eval_shape(attend, *operands)
        self.assertEqual(out.sharding.spec, P("data", None, "model", None))
        self.assertEqual(lse.sharding.spec, P("data", None, "model"))

    @parameterized.parameters(*WAYS)
    def test_eager(self, way):
        operands = meshes.put(meshes.mesh(kind=KINDS[way]), self.PACK, CUT)
        results = attend_by(way)(*operands)
        meshes.assert_close(results, exact(self.PACK))
        self.assertEqual(results[0].sharding.spec[:3], ("data", None, "model"))

    @parameterized.product(kind=(AxisType.Auto, AxisType.Explicit), jit=(True, False))
    def test_arrays_that_know_no_mesh(self, kind, jit):
        """NumPy's, say, under jax.set_mesh; and some that do beside them, as `prefill_page_attention` makes offsets."""
        query, *caches = self.PACK[:3]
        pack = [x[0] for x in self.PACK[3:]]
        new = [np.ones((query.shape[1], cache.shape[0], cache.shape[-1]), cache.dtype) for cache in caches]

        def run():
            one = prefill_page_attention(query[0], *caches, pack[0][:1], pack[1][0])
            return [*(jax.jit(attend) if jit else attend)(*self.PACK), one, *append_to_pages(*caches, *new, *pack)]

        with jax.set_mesh(meshes.mesh(kind=kind)):
            results = run()
        chex.assert_trees_all_equal(results, run())

    def test_a_mesh_that_constraints_alone_speak_of(self):
        """By their specs, under jax.set_mesh: no argument has a mesh, and nothing is gathered."""

        def model(*operands):
            return attend(*(lax.with_sharding_constraint(x, spec) for x, spec in zip(operands, CUT, strict=True)))

        with jax.set_mesh(meshes.mesh()):
            compiled = jax.jit(model).lower(*self.PACK).compile()
            meshes.assert_close(compiled(*self.PACK), exact(self.PACK))
        self.assertEmpty(meshes.collectives(compiled))

    @parameterized.parameters(*WAYS)
    def test_inside_control_flow(self, way):
        def model(*operands):
            call = jax.checkpoint(attend_by(way))
            body = lambda carry, _: (carry, lax.cond(carry > 0, call, lambda *p: call(*p), *operands))
            return lax.scan(body, jnp.int32(1), None, length=2)[1]

        compiled, operands = compile_on(meshes.mesh(kind=KINDS[way]), model, self.PACK, CUT)
        for turn in range(2):
            meshes.assert_close([x[turn] for x in compiled(*operands)], exact(self.PACK))
        self.assertEmpty(meshes.collectives(compiled))

    def test_mixed_axis_types(self):
        for kinds in ((AxisType.Auto, AxisType.Explicit), (AxisType.Explicit, AxisType.Auto)):
            mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kinds)
            for way in ("automatic", "hint"):
                with self.subTest(kinds=kinds, way=way):
                    compiled, operands = compile_on(mesh, attend_by(way), self.PACK, CUT)
                    meshes.assert_close(compiled(*operands), exact(self.PACK))
                    self.assertEmpty(meshes.collectives(compiled))

    def test_module_names_parameters_and_code(self):
        """What a persistent cache's key is made of, once JAX leaves the callback's address out."""
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)
        texts = [
            jax.jit(functools.partial(attend, **p)).lower(*operands).as_text()
            for p in (dict(softmax_scale=0.25), dict(softmax_scale=0.5))
        ]
        self.assertIn("softmax_scale=0.25", texts[0])
        self.assertIn("softmax_scale=0.5", texts[1])
        for text in texts:
            self.assertRegex(text, 'paged_prefill_code = "[0-9a-f]{64}"')

    def test_module_names_the_tables_that_decide_its_sizes(self):
        """So that a persistent cache gives nobody the executable of another table."""
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.enter_context(environment(XDG_CACHE_HOME=str(folder)))
        operands = meshes.put(meshes.mesh(), self.PACK, CUT)

        def reads():
            text = jax.jit(lambda *operands: attend(*operands)).lower(*operands).as_text()
            return re.search('paged_prefill_reads = "(.+?)"', text)[1]

        untuned = reads()
        self.assertEqual(reads(), untuned)
        table = folder / "paged_prefill" / "cpu.json"
        table.parent.mkdir()
        table.write_text('{"format": 2, "entries": []}')
        self.assertNotEqual(reads(), untuned)
        table.unlink()
        self.assertEqual(reads(), untuned)

    def test_the_callback_keeps_the_callers_settings(self):
        """The compiler calls from a thread of its own."""
        seen = []

        def spy(*operands, **parameters):
            settings = jax.config.jax_default_matmul_precision, current_policy()
            seen.append((*settings, jax.sharding.get_abstract_mesh().empty))
            return run(*operands, **parameters)

        run, mesh = lowering.run, meshes.mesh()
        operands = meshes.put(mesh, self.PACK, CUT)
        with mock.patch.object(lowering, "run", spy):
            with jax.default_matmul_precision("highest"), jax.set_mesh(mesh), policy("off"):
                lowered = jax.jit(attend).lower(*operands)
            lowered.compile()
        self.assertEqual(seen, [("highest", "off", True)])

    def test_eight_threads_at_once(self):
        mesh = meshes.mesh()
        explicit = meshes.mesh(kind=AxisType.Explicit)
        want = exact(self.PACK)

        def work(number):
            way = WAYS[number % 3]
            operands = meshes.put(explicit if way == "explicit" else mesh, self.PACK, CUT)
            out, lse = jax.jit(lambda *p: attend_by(way)(*p))(*operands)
            meshes.assert_close((out, lse), want)
            return number

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            self.assertEqual(list(pool.map(work, range(8))), list(range(8)))


@absltest.skipIf(importlib.util.find_spec("libtpu") is None, "libtpu, which compiles for TPUs, is not installed")
class TpuTest(parameterized.TestCase):
    """Compiled by the real compiler for a v5e 2x2 that is not here: heads cut, nothing exchanged."""

    @parameterized.product(way=("hint", "explicit"), kv_heads=(4, 1))
    def test_ahead_of_time(self, way, kv_heads):
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        devices = np.array(topology.devices).reshape(1, 4)
        mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(KINDS[way],) * 2)
        pack = meshes.batched_pack(q_heads=8, kv_heads=kv_heads)
        cut = meshes.specs("data", "model", None if kv_heads == 1 else "model")
        operands = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x, spec in zip(pack, cut)
        ]
        call = functools.partial(attend_by(way), platform="xla")
        compiled = jax.jit(call).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
        self.assertEmpty(meshes.collectives(compiled))
        out, _ = compiled.output_shardings
        self.assertEqual(out.shard_shape((4, 5, 8, 12)), (4, 5, 2, 12))


if __name__ == "__main__":
    absltest.main()
