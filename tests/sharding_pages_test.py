"""Caches cut over their pages, in every way: right, and nothing exchanged but partial results.

As in sharding_grid_test.py a kernel that compiles fast stands in for the product's where what counts is what each
device is given: its page table, its contexts, what rows see of its keys.
"""

import functools
import importlib.util
import math
import re
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np

from paged_prefill import (
    append_to_pages,
    create_shard_map_wrapper,
    local_pages,
    merge,
    merge_over,
    prefill_page_attention,
    ragged_paged_prefill,
    sharding_hints,
)
from paged_prefill.lowering.choose import XLA
from paged_prefill.lowering.xla.host import Xla
from paged_prefill.primitive.context import policy
from paged_prefill.sharding import pages
from paged_prefill.tests import cases, compiling, meshes, oracle, poisoned

KINDS = {
    "automatic": AxisType.Auto,
    "gspmd": AxisType.Auto,
    "explicit": AxisType.Explicit,
    "hint": AxisType.Auto,
    "shard_map": AxisType.Auto,
}
CUTS = {  # what cuts the batch, the heads and the pages
    "pages": (None, None, ("data", "model")),
    "heads_and_pages": (None, "data", "model"),
    "batch_and_pages": ("data", None, "model"),
}
SIZES = dict(batch=(2,), q_heads=8, page_size=4, head_dim=8, value_dim=12, tokens_after=1)
KV_HEADS = (8, 2, 1)
DECODE = ((1, 9), (1, 14), (0, 3), (1, 1), (1, 6))  # no more tokens than sequences, one of the tokens nobody's
CHUNKS = ((5, 9), (3, 2), (1, 14))
# Those that are cut in ways of their own.
OPERANDS = dict(sinks=True, layers=2, cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="head")
VARIANTS = {  # sequences, what else the operands have, parameters; by turns, as modules have every second one
    "plain": (CHUNKS, {}, {}),
    "window": (CHUNKS, dict(sliding_window=4), dict(sliding_window=4)),
    "decode": (DECODE, {}, {}),
    "cap": (CHUNKS, {}, dict(attn_logits_soft_cap=2.0)),
    "operands": (CHUNKS, OPERANDS, {}),
    "operands_of_decode": (DECODE, OPERANDS, {}),
}


def make_call(seed, sequences, *, share=8, page_size=4, batch=(), **kind):
    """A random call whose number of pages divides by `share`."""
    pages = sum(-(-context // page_size) for _, context in sequences)
    spare = next(n for n in range(3, 3 + share) if (pages + n) * math.prod(batch) % share == 0)
    return poisoned.make_call(seed, sequences, page_size=page_size, batch=batch, spare_pages=spare, **kind)


@functools.cache
def case(variant, kv_heads):
    sequences, kind, parameters = VARIANTS[variant]
    return make_call(len(variant), sequences, kv_heads=kv_heads, **SIZES, **kind), parameters


def specs_of(call, batch, heads, pages):
    kv_heads = heads if call["key_cache"].shape[-4] > 1 else None
    return meshes.specs_of_call(call, batch, heads, kv_heads, pages=pages, layers=int("layer" in call))


def attend(way, mesh, call, parameters, batch, heads, pages):
    """The results of a call on the mesh, by one of the ways."""
    run = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
    if way == "hint":
        return run(**call, **parameters, batch_axis=batch, head_axis=heads, page_axis=pages)
    if way != "shard_map":
        return run(**call, **parameters)

    def two_lines(call):
        names = ("context_lens", "page_indices", "query_offsets", "sinks")
        pack = {name: call.pop(name) for name in names if name in call}
        others = dict(parameters)
        window = others.pop("sliding_window", None)
        mine = local_pages(pages, call["query"], call["key_cache"], **pack, sliding_window=window)
        return merge_over(pages, *run(**call, **mine, **others))

    specs = specs_of(call, batch, heads, pages)
    result = P(batch, None, heads)
    return jax.shard_map(two_lines, mesh=mesh, in_specs=(specs,), out_specs=(result, result))(call)


def sizes_of(compiled):
    """The (operation, number of elements) of every array that a collective gives a device."""
    found = set()
    for op, kind in meshes.collectives(compiled):
        for shape in re.findall(r"\[([\d,]*)\]", kind):
            found.add((op, math.prod(int(size) for size in shape.split(",") if size)))
    return found


class GridTest(parameterized.TestCase):
    """All pairs of cuts, heads and variants; each way computes half the variants of a cut in one module.

    Each way and each cut has every variant. In every module are operands that are cut in ways of their own, decode steps,
    and two of the variants that tell devices only what rows see.
    """

    @parameterized.product(way=tuple(KINDS), cut=tuple(CUTS))
    def test_values_and_collectives(self, way, cut):
        batch, heads, pages = CUTS[cut]
        mesh = meshes.mesh(kind=KINDS[way])
        turn = list(CUTS).index(cut)
        variants = list(VARIANTS)[(list(KINDS).index(way) + turn) % 2 :: 2]
        cases = [case(variant, KV_HEADS[(list(VARIANTS).index(variant) + turn) % 3]) for variant in variants]
        calls = [meshes.put_call(mesh, call, specs_of(call, batch, heads, pages)) for call, _ in cases]
        jitted = jax.jit(
            lambda calls: [
                attend(way, mesh, call, parameters, batch, heads, pages)
                for call, (_, parameters) in zip(calls, cases, strict=True)
            ]
        )
        with mock.patch.object(XLA, "attend", meshes.dense_kernel), meshes.partitioner(shardy=way != "gspmd"):
            compiled = jitted.lower(calls).compile()
        allowed = set()
        for variant, (call, parameters), (out, lse) in zip(variants, cases, compiled(calls), strict=True):
            with self.subTest(variant=variant):
                oracle.assert_matches(call, out, lse, **parameters)
                self.assertEqual((*out.sharding.spec, None, None, None)[:3], (batch, None, heads))
            for result in (out, lse):
                allowed.add(("all-reduce", result.addressable_shards[0].data.size))
        self.assertEqual(sizes_of(compiled), allowed)


def everything(seed, sequences=((5, 9), (3, 2), (40, 44), (0, 7), (1, 14)), **kind):
    """A call that has every operand, one of its chunks longer than its trees and one longer than its context."""
    kind = dict(key_ranges=True, tree_words=1, sinks=True, layers=2, cache_dtype="int8", key_scale="slot") | kind
    sizes = dict(q_heads=4, kv_heads=2, head_dim=8, value_dim=12, tokens_before=1, tokens_after=1)
    return make_call(seed, sequences, value_scale="tensor", **sizes, **kind)


def by_pages(call, axes="model"):
    """The specs of a call without batch, whose pages alone are cut."""
    cut = meshes.specs_of_call(call, pages=axes, layers=int("layer" in call))
    return {name: spec if name.endswith(("cache", "scale")) else P() for name, spec in cut.items()}


class OwnershipTest(parameterized.TestCase):
    """One program by the product's kernel, and calls of its shapes with pages wherever."""

    def test_every_operand_wherever_pages_lie(self):
        """Anywhere; a sequence on one device alone, so that others hold none of it; and table entries of no page."""
        mesh = meshes.mesh()
        attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
        call = everything(0)
        compiled = jax.jit(lambda call: attend(**call)).lower(meshes.put_call(mesh, call, by_pages(call))).compile()
        for seed in range(6):
            call = everything(seed, poison=seed % 2 == 0)
            with self.subTest(seed=seed):
                if seed % 2:  # caches without poison, so that pages may be any
                    call |= self.on_purpose(seed, call)
                oracle.assert_matches(call, *compiled(meshes.put_call(mesh, call, by_pages(call))))

    @staticmethod
    def on_purpose(seed, call):
        rng = np.random.default_rng(seed)
        seqs, columns = call["page_indices"].shape
        num_pages = call["key_cache"].shape[-3]
        part = num_pages // 4
        pages = rng.integers(0, num_pages, (seqs, columns))
        pages[0] = rng.integers(part, 2 * part, columns)  # on the second device of four
        pages[1] = num_pages - 1
        pages[2, ::3] = rng.choice([-1, -(2**31), 2**31 - 1, num_pages, num_pages + 1], pages[2, ::3].shape)
        pages[4] = rng.choice([-(2**31), 2**31 - 1], columns)
        return dict(page_indices=pages.astype(np.int32))

    def test_latent_caches(self):
        """One KV head for all query heads, which are cut too: each device has its part of the pages, for its heads."""
        mesh, kind = meshes.mesh(), dict(latent=True, sinks=True, q_heads=8, kv_heads=1, head_dim=16)
        attend = functools.partial(ragged_paged_prefill, value_cache=None, value_dim=12, cfg=cases.ONE_HEIGHT)
        call = make_call(5, CHUNKS, batch=(2,), **kind, value_dim=12)
        del call["value_cache"]
        cut = meshes.specs_of_call(call, None, "data", None, pages="model", layers=0)
        operands = meshes.put_call(mesh, call, cut)
        compiled = jax.jit(lambda call: attend(**call, return_lse=True)).lower(operands).compile()
        oracle.assert_matches(call, *compiled(operands), value_dim=12)
        self.assertEqual({op for op, _ in sizes_of(compiled)}, {"all-reduce"})

    def test_hostile_indices(self):
        """Whatever index arrays hold, the results are those of whole caches."""
        mesh = meshes.mesh()
        attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
        for sequences in (CHUNKS, DECODE):
            call = make_call(1, sequences, q_heads=4, kv_heads=2, head_dim=8, sinks=True, tokens_after=1, poison=False)
            call["key_cache"], call["value_cache"] = (np.nan_to_num(call[n]) for n in ("key_cache", "value_cache"))
            with mock.patch.object(XLA, "attend", meshes.dense_kernel):
                cut = jax.jit(lambda call: attend(**call)).lower(meshes.put_call(mesh, call, by_pages(call))).compile()
            rng = np.random.default_rng(0)
            for _ in range(10):
                for name, around in (("context_lens", 20), ("page_indices", 30), ("query_offsets", 12)):
                    near = rng.integers(-3, around, call[name].shape)
                    far = rng.choice([-(2**31), 2**31 - 1, 10**9], call[name].shape)
                    call[name] = np.where(rng.random(call[name].shape) < 0.2, far, near).astype(np.int32)
                oracle.assert_matches(call, *cut(meshes.put_call(mesh, call, by_pages(call))))


class AppendTest(parameterized.TestCase):
    """Each token is written where its page is, in place, and nothing moves."""

    @staticmethod
    def call(layers=None, num_pages=64, **kind):
        """Two packs that share a pool, whose tables hold pages that are not there too."""
        rng = np.random.default_rng(4)
        call = make_call(2, CHUNKS, batch=(2,), q_heads=4, kv_heads=4, head_dim=8, layers=layers, poison=False, **kind)
        call |= dict(key=call["query"], value=rng.standard_normal(call["query"].shape, np.float32))
        pages = rng.permutation(num_pages)[: call["page_indices"].size].reshape(call["page_indices"].shape)
        pages[0, 1] = rng.choice([-1, -(2**31), 2**31 - 1, num_pages], pages.shape[-1])
        call["page_indices"] = pages.astype(np.int32)
        for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
            if name in call and call[name].ndim > 3:
                pages_axis = layers is not None and 2 or 1
                call[name] = np.repeat(call[name][(slice(None),) * pages_axis + (slice(1),)], num_pages, pages_axis)
        del call["query"]
        return call

    @parameterized.product(way=("automatic", "gspmd", "explicit", "hint"), kind=("plain", "quantised"))
    def test_in_place(self, way, kind):
        quantised = dict(layers=3, cache_dtype="int8", key_scale="slot", value_scale="slot")
        call = self.call(**(quantised if kind == "quantised" else {}))
        mesh, names = meshes.mesh(kind=KINDS[way]), [name for name in call if name.endswith(("cache", "scale"))]
        cut = meshes.specs_of_call(call, None, None, "data", pages="model", layers=int("layer" in call))
        cut |= dict(key=P(None, None, "data"), value=P(None, None, "data"))
        want = jax.jit(append_to_pages)(**call)
        hints = dict(head_axis="data", page_axis="model") if way == "hint" else {}
        caches = {name: call.pop(name) for name in names}
        append = jax.jit(lambda caches, call: append_to_pages(**caches, **call, **hints), donate_argnums=0)
        operands = meshes.put_call(mesh, caches, cut), meshes.put_call(mesh, call, cut)
        with meshes.partitioner(shardy=way != "gspmd"):
            compiled = append.lower(*operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        for got, right in zip(compiled(*operands), want, strict=True):
            np.testing.assert_array_equal(got, right)
            self.assertEqual([x for x in got.sharding.spec if x], ["data", "model"])
        self.assertEmpty(meshes.collectives(compiled))
        self.assertTrue(all(x.is_deleted() for x in operands[0].values()))
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, caches["key_cache"].nbytes // 8)


class ScanTest(parameterized.TestCase):
    @parameterized.parameters("automatic", "explicit", "hint")
    def test_over_layers_with_donated_caches(self, way):
        """A model's step: each layer writes and attends, and no device sets aside what one layer takes there."""
        layers, num_pages = 3, 2048
        call = make_call(5, CHUNKS, q_heads=4, kv_heads=4, head_dim=8, poison=False)
        query, lens, _, offsets = (call[n] for n in ("query", "context_lens", "page_indices", "query_offsets"))
        rng = np.random.default_rng(0)
        pages = rng.permutation(num_pages)[: call["page_indices"].size].reshape(call["page_indices"].shape)
        caches = rng.standard_normal((2, layers, 4, num_pages, 4, 8), np.float32)
        pack = lens, pages.astype(np.int32), offsets
        hints = dict(head_axis="data", page_axis="model") if way == "hint" else {}

        def model(hints, caches, query, *pack):
            def block(carry, layer):
                query, keys, values = carry
                keys, values = append_to_pages(keys, values, query, 2 * query, *pack, layer=layer, **hints)
                out = ragged_paged_prefill(query, keys, values, *pack, layer=layer, cfg=cases.ONE_HEIGHT, **hints)
                return (query + out, keys, values), None

            return jax.lax.scan(block, (query, *caches), jax.numpy.arange(layers, dtype="int32"))[0]

        want = jax.jit(functools.partial(model, {}))(tuple(caches), query, *pack)
        mesh = meshes.mesh(kind=KINDS[way])
        at = jax.sharding.NamedSharding(mesh, P(None, "data", "model"))
        heads = jax.sharding.NamedSharding(mesh, P(None, "data"))
        operands = [tuple(jax.device_put(x, at) for x in caches), jax.device_put(query, heads)]
        operands += [jax.device_put(x, jax.sharding.NamedSharding(mesh, P())) for x in pack]
        step = jax.jit(functools.partial(model, hints), donate_argnums=0, out_shardings=(heads, at, at))
        compiled = step.lower(*operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        for got, right in zip(compiled(*operands), want, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-4, rtol=1e-4)
        self.assertEqual({op for op, _ in sizes_of(compiled)}, {"all-reduce"})
        self.assertLessEqual(max(size for _, size in sizes_of(compiled)), query.size // 2)
        one_layer = caches[0, 0].nbytes // 8  # of one cache, on a device
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, one_layer)


class MergeTest(parameterized.TestCase):
    """How the sum over devices comes to those who want it."""

    def call(self):
        call = make_call(3, ((6, 9), (1, 14)), q_heads=4, kv_heads=2, head_dim=8, tokens_after=1)
        return call  # of 8 tokens

    @parameterized.product(way=("automatic", "gspmd"), axes=("model", ("data", "model"), ("model", "data")))
    def test_a_result_that_is_cut_over_tokens_is_scattered(self, way, axes):
        call, mesh = self.call(), meshes.mesh()
        operands = meshes.put_call(mesh, call, by_pages(call, axes))
        wanted = jax.sharding.NamedSharding(mesh, P(axes))
        attend = functools.partial(ragged_paged_prefill, return_lse=True)
        with mock.patch.object(XLA, "attend", meshes.dense_kernel), meshes.partitioner(shardy=way != "gspmd"):
            compiled = jax.jit(lambda call: attend(**call), out_shardings=wanted).lower(operands).compile()
        out, lse = compiled(operands)
        oracle.assert_matches(call, out, lse)
        self.assertEqual((out.sharding.spec[0], lse.sharding.spec[0]), (axes, axes))
        parts = [x.addressable_shards[0].data.size for x in (out, lse)]
        self.assertEqual(sizes_of(compiled), {("all-reduce", lse.size), *(("reduce-scatter", size) for size in parts)})

    def test_scattered_in_a_shard_map(self):
        call, mesh = self.call(), meshes.mesh()
        pack = ("context_lens", "page_indices", "query_offsets")

        def local(call):
            mine = local_pages("model", call["query"], call["key_cache"], *(call[name] for name in pack))
            return merge_over("model", *ragged_paged_prefill(**call | mine, return_lse=True), scatter=True)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=(by_pages(call),), out_specs=(P("model"), P("model")))
        with mock.patch.object(XLA, "attend", meshes.dense_kernel):
            oracle.assert_matches(call, *jax.jit(mapped)(call))

    @parameterized.product(scatter=(False, True), lse_dtype=("float32", "bfloat16"))
    def test_is_the_merge_of_two(self, scatter, lse_dtype):
        """Also of rows that a device saw no key of, whatever their outputs hold, and of rows of NaN."""
        rng = np.random.default_rng(0)
        out = rng.standard_normal((2, 6, 4, 8)).astype(np.float32)
        lse = jax.numpy.asarray(rng.standard_normal((2, 6, 4)), lse_dtype)
        lse = lse.at[0, 0].set(-np.inf).at[:, 1].set(-np.inf).at[1, 2].set(np.nan).at[1, 3].set(np.inf)
        out[0, 0] = out[:, 1] = np.nan
        mesh = jax.make_mesh((2,), ("pages",), axis_types=(AxisType.Auto,))
        cut = P("pages" if scatter else None)
        merge_here = functools.partial(merge_over, "pages", scatter=scatter)
        mapped = jax.shard_map(lambda *x: merge_here(*(y[0] for y in x)), mesh=mesh, in_specs=P("pages"), out_specs=(cut, cut))
        wanted = merge(out[0], lse[0], out[1], lse[1])
        for got, want in zip(jax.jit(mapped)(out, lse), wanted, strict=True):
            self.assertEqual(got.dtype, want.dtype)
            np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-6, atol=1e-6)
        self.assertTrue(np.isfinite(wanted[0][:2]).all() and np.isnan(wanted[0][2:4]).all())

    @parameterized.named_parameters(
        ("lse", (6, 4, 8), (6, 2), False, r"lse must have shape \(6, 4\) to go with out, got \(6, 2\)"),
        ("tokens", (6, 4, 8), (6, 4), True, "out must have a multiple of 4 tokens, which so many devices share, got 6"),
    )
    def test_errors(self, out, lse, scatter, message):
        merge_here = functools.partial(merge_over, "model", scatter=scatter)
        mapped = jax.shard_map(merge_here, mesh=meshes.mesh(), in_specs=(P(), P()), out_specs=(P(), P()))
        with self.assertRaisesRegex(ValueError, message):
            jax.eval_shape(mapped, jax.ShapeDtypeStruct(out, "float32"), jax.ShapeDtypeStruct(lse, "float32"))


class SurroundingsTest(parameterized.TestCase):
    """What surrounds a call: types, export, vmap, hints, errors, TPUs that are not here."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(XLA, "attend", meshes.dense_kernel))
        self.call = make_call(6, CHUNKS, q_heads=4, kv_heads=2, head_dim=8)

    def test_explicit_types_say_that_results_are_whole(self):
        operands = meshes.put_call(meshes.mesh(kind=AxisType.Explicit), self.call, by_pages(self.call))
        out, lse = jax.eval_shape(lambda call: ragged_paged_prefill(**call, return_lse=True), operands)
        self.assertEqual((out.sharding.spec, lse.sharding.spec), (P(None, None, None), P(None, None)))

    @parameterized.parameters("explicit", "hint")
    def test_export(self, way):
        operands = meshes.put_call(meshes.mesh(kind=KINDS[way]), self.call, by_pages(self.call))
        hints = dict(page_axis="model") if way == "hint" else {}
        attend = jax.jit(lambda call: ragged_paged_prefill(**call, platform="xla", return_lse=True, **hints))
        exported = jax.export.deserialize(jax.export.export(attend, platforms=("cpu", "tpu"))(operands).serialize())
        self.assertEqual(exported.nr_devices, 8)
        oracle.assert_matches(self.call, *jax.jit(exported.call)(operands))

    def test_export_with_symbolic_sizes(self):
        """One module for any pack; to run one ends the process in JAX 0.10 to 0.12, with heads cut too."""
        mesh, cut = meshes.mesh(), by_pages(self.call)
        tokens, seqs, columns = jax.export.symbolic_shape("tokens, seqs, columns")
        symbolic = dict(context_lens=(seqs,), page_indices=(seqs, columns), query_offsets=(seqs + 1,))
        symbolic |= dict(query=(tokens, 4, 8))
        arguments = {
            name: jax.ShapeDtypeStruct(
                symbolic.get(name, x.shape), x.dtype, sharding=jax.sharding.NamedSharding(mesh, cut[name])
            )
            for name, x in self.call.items()
        }
        attend = functools.partial(ragged_paged_prefill, page_axis="model", cfg=cases.ONE_HEIGHT, return_lse=True)
        with mock.patch.object(XLA, "attend", Xla.attend.__get__(XLA)):
            exported = jax.export.export(jax.jit(lambda call: attend(**call)))(arguments)
        self.assertEqual([str(out.shape) for out in exported.out_avals], ["(tokens, 4, 8)", "(tokens, 4)"])

    def test_vmap_over_packs(self):
        """A mapped axis goes before all others, and pages stay cut; with pools mapped too, each has its pages cut."""
        for pools in (0, 1):
            call = make_call(7, DECODE, batch=(2,), pools=pools, q_heads=4, kv_heads=2, head_dim=8)
            cut = meshes.specs_of_call(call, pools=pools, layers=0, pages="model")
            operands = meshes.put_call(meshes.mesh(), call, cut)
            axes = {name: 0 if pools or not name.endswith("cache") else None for name in call}
            for hints in ({}, dict(page_axis="model")):
                attend = jax.vmap(lambda call: ragged_paged_prefill(**call, **hints, return_lse=True), in_axes=(axes,))
                compiled = jax.jit(attend).lower(operands).compile()
                oracle.assert_matches(call, *compiled(operands))
                self.assertEqual({op for op, _ in sizes_of(compiled)}, {"all-reduce"})

    def test_sharding_hints(self):
        """For writing too; and a call's own page_axis goes before."""
        mesh, call = meshes.mesh(), self.call
        new = dict(key=np.ones((9, 2, 8), np.float32), value=np.ones((9, 2, 8), np.float32))

        def step(call, new):
            pack = {name: x for name, x in call.items() if name != "query"}
            keys, values = append_to_pages(**pack, **new)
            return ragged_paged_prefill(**call | dict(key_cache=keys, value_cache=values), return_lse=True)

        want = jax.jit(step)(call, new)
        operands = meshes.put_call(mesh, call, by_pages(call)), meshes.put_call(mesh, new, {name: P() for name in new})
        with sharding_hints(page_axis="model"):
            lowered = jax.jit(step).lower(*operands)
            whole = jax.make_jaxpr(lambda call: ragged_paged_prefill(**call, page_axis=()))(call)
        self.assertEqual(whole.eqns[-1].params["hint"].pages, ())
        self.assertNotIn("CustomSPMDPartitioning", lowered.as_text())
        compiled = lowered.compile()
        meshes.assert_close(compiled(*operands), want)
        self.assertEqual({op for op, _ in sizes_of(compiled)}, {"all-reduce"})

    def test_ejkernels_wrapper(self):
        query, keys, values, lens, pages = (
            self.call[n] for n in ("query", "key_cache", "value_cache", "context_lens", "page_indices")
        )
        cache = P("data", "model")
        for check_vma in (True, False):
            function, arguments = create_shard_map_wrapper(
                query[:5], keys, values, lens[:1], pages[0], mesh=meshes.mesh(), check_vma=check_vma,
                in_specs=(P(None, "data"), cache, cache, P(), P()), out_specs=P(None, "data"),
            )  # fmt: skip
            want = prefill_page_attention(*arguments)
            np.testing.assert_allclose(jax.jit(function)(*arguments), want, atol=1e-5)

    def test_the_policy_invariant_goes_by_no_size(self):
        """Decode steps are told what they see like all others, so that a pack's sizes choose nothing."""
        call, mesh = make_call(8, DECODE, q_heads=4, kv_heads=2, head_dim=8), meshes.mesh()
        operands, seen = meshes.put_call(mesh, call, by_pages(call)), []

        def spy(call, config, device):
            seen.append("key_ranges" in call.problem.features)
            return meshes.dense_kernel(call, config, device)

        with mock.patch.object(XLA, "attend", spy), policy("invariant"):
            oracle.assert_matches(call, *jax.jit(lambda c: ragged_paged_prefill(**c, return_lse=True))(operands))
        with mock.patch.object(XLA, "attend", spy):
            oracle.assert_matches(call, *jax.jit(lambda c: ragged_paged_prefill(**c, return_lse=True))(operands))
        self.assertEqual(seen, [True, False])

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_whole_pages_cost_nothing(self, kind):
        """Over an axis of one device the operands go to the kernel as they are."""
        mesh = meshes.mesh((8, 1), kind=kind)
        operands = meshes.put_call(mesh, self.call, by_pages(self.call))
        with mock.patch.object(pages, "hold", side_effect=AssertionError):
            compiled = jax.jit(lambda call: ragged_paged_prefill(**call, return_lse=True)).lower(operands).compile()
        self.assertEmpty(meshes.collectives(compiled))

    @parameterized.named_parameters(
        ("does_not_divide", dict(page_axis="model"), 9, "page_axis='model' cuts into 4 .* a pool of 9 pages cannot"),
        ("one_axis_twice", dict(page_axis="data", head_axis="data"), 8, "got head_axis='data' and page_axis='data'"),
        ("unknown", dict(page_axis="pages"), 8, r"page_axis must name axes of the mesh .*got \['pages'\]"),
    )
    def test_hints_that_cannot_be_followed(self, hints, num_pages, message):
        call = self.call | {name: self.call[name][:, :num_pages] for name in ("key_cache", "value_cache")}
        new = dict(key=np.ones((9, 2, 8), np.float32), value=np.ones((9, 2, 8), np.float32))
        pack = {name: x for name, x in call.items() if name != "query"}
        for function, operands in ((ragged_paged_prefill, call), (append_to_pages, pack | new)):
            operands = meshes.put_call(meshes.mesh(), operands, {name: P() for name in operands})
            with self.assertRaisesRegex(ValueError, message):
                jax.jit(functools.partial(function, **hints))(**operands)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_caches_cut_unlike_are_an_error(self, kind):
        error = ValueError if kind == AxisType.Explicit else jax.errors.JaxRuntimeError
        cut = by_pages(self.call) | dict(value_cache=P(None, "data"))
        operands = meshes.put_call(meshes.mesh(kind=kind), self.call, cut)
        with self.assertRaisesRegex(error, "value_cache is cut as .*Reshard it"):
            jax.jit(lambda call: ragged_paged_prefill(**call))(operands)

    def test_page_axis_in_a_shard_map_says_what_to_do(self):
        attend = lambda call: ragged_paged_prefill(**call, page_axis="model")
        specs = dict(in_specs=(by_pages(self.call),), out_specs=P())
        mapped = jax.shard_map(attend, mesh=meshes.mesh(), check_vma=False, **specs)
        with self.assertRaisesRegex(ValueError, "page_axis='model' inside a shard_map.*local_pages and merge_over"):
            jax.jit(mapped)(self.call)


@absltest.skipIf(importlib.util.find_spec("libtpu") is None, "libtpu, which compiles for TPUs, is not installed")
class TpuTest(parameterized.TestCase):
    """Compiled by the real compiler for a v5e 2x2 that is not here."""

    def compile(self, way, function, call):
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        devices = np.array(topology.devices).reshape(2, 2)
        mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(KINDS[way],) * 2)
        cut = dict(query=P(None, "data"), key=P(None, "data"), value=P(None, "data"))
        cut |= dict.fromkeys(("key_cache", "value_cache"), P("data", "model"))
        operands = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, cut.get(name, P())))
            for name, x in call.items()
        }
        hints = dict(head_axis="data", page_axis="model") if way == "hint" else {}
        donated = ("key_cache", "value_cache") if "key" in call else ()
        jitted = jax.jit(functools.partial(function, **hints), donate_argnames=donated)
        return jitted.trace(**operands).lower(lowering_platforms=("tpu",)).compile()

    @parameterized.parameters("hint", "explicit")
    def test_attention(self, way):
        """Decode steps by the TPU's own kernel, since they need no ranges; and the sums, of a part of the heads."""
        call = make_call(9, ((1, 40), (1, 90), (0, 30)), q_heads=4, kv_heads=2, head_dim=128, page_size=16)
        attend = functools.partial(ragged_paged_prefill, platform="pallas", return_lse=True)
        compiled = self.compile(way, attend, call)
        self.assertEqual({op for op, _ in sizes_of(compiled)}, {"all-reduce"})
        self.assertLessEqual(max(size for _, size in sizes_of(compiled)), call["query"].size // 2)
        self.assertEqual(compiled.output_shardings[0].shard_shape((2, 4, 128)), (2, 2, 128))

    @parameterized.parameters("hint", "explicit", "automatic")
    def test_append(self, way):
        call = make_call(9, CHUNKS, share=512, q_heads=2, kv_heads=2, head_dim=128, page_size=16)
        call |= {name: call["query"] for name in ("key", "value")}
        del call["query"]
        compiled = self.compile(way, append_to_pages, call)
        self.assertEmpty(meshes.collectives(compiled))
        self.assertEqual(compiled.memory_analysis().alias_size_in_bytes, 2 * call["key_cache"].nbytes // 4)


if __name__ == "__main__":
    absltest.main()
