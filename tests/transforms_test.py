"""JAX's transforms over the primitive as users write them: bind in jitted code, vmap, control flow, AOT, export."""

import itertools

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from paged_prefill import local_paged_prefill_p, paged_prefill_p, ragged_paged_prefill
from paged_prefill.tests import cases, compiling, packs

CASE = cases.Case("transforms", ((4, 9), (0, 3), (1, 14)), head_dim=8, page_size=4, tokens_before=1)
NAMES = packs.Pack._fields
QUERY, KEYS, VALUES = range(3)


def bind(*operands, **params):
    return tuple(paged_prefill_p.bind(*operands, **({"config": cases.ONE_HEIGHT} | params)))


def variants(count, only=range(6)):
    """`count` packs of one shape; operands outside `only` are the same in all. Nothing is poisoned, so all may mix."""
    plain = [CASE.pack(poison=1.0)]
    for seed in range(1, count):
        rng = np.random.default_rng(seed)
        first = plain[0]
        other = packs.Pack(
            *(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in first[:3]),
            jnp.asarray(rng.integers(1, 12, first.context_lens.shape), jnp.int32),
            jnp.asarray(rng.integers(0, first.key_cache.shape[1], first.page_indices.shape), jnp.int32),
            jnp.asarray(np.sort(rng.integers(0, len(first.query) + 1, first.query_offsets.shape)), jnp.int32),
        )
        plain.append(packs.Pack(*(b if i in only else a for i, (a, b) in enumerate(zip(first, other)))))
    return plain


def stack(all_packs, in_axes):
    return [
        x[0] if axis is None else np.stack(x, axis) for x, axis in zip(zip(*all_packs), in_axes, strict=True)
    ]


def expected(all_packs):
    return tuple(np.stack(x) for x in zip(*(packs.exact(p) for p in all_packs)))


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


class VmapTest(parameterized.TestCase):
    def test_every_combination_of_in_axes(self):
        """All 63, each batched operand on another axis than the last; results on axis 0, as vmap promises."""
        for chosen in itertools.product((False, True), repeat=6):
            if not any(chosen):
                continue
            with self.subTest(batched=[n for n, c in zip(NAMES, chosen) if c]):
                all_packs = variants(3, [i for i, c in enumerate(chosen) if c])
                in_axes = tuple(min(i % 3, all_packs[0][i].ndim) if c else None for i, c in enumerate(chosen))
                got = jax.vmap(bind, in_axes)(*stack(all_packs, in_axes))
                assert_close(got, expected(all_packs))

    def test_negative_in_axes_and_out_axes(self):
        all_packs = variants(3, [QUERY])
        got = jax.vmap(bind, (-1, None, None, None, None, None), out_axes=(1, -1))(*stack(all_packs, (3,) + (None,) * 5))
        want = expected(all_packs)
        assert_close(got, (np.moveaxis(want[0], 0, 1), np.moveaxis(want[1], 0, -1)))

    def test_nested(self):
        """Outer and inner vmap over every pair of: key cache only, query only, all but the caches, all."""
        kinds = {"key_cache": (1,), "query": (0,), "no_caches": (0, 3, 4, 5), "all": range(6)}
        for outer, inner in itertools.product(kinds, repeat=2):
            with self.subTest(outer=outer, inner=inner):
                base = variants(6)
                grid = [  # operand i of element (a, b) varies with a where the outer maps it, with b where the inner does
                    [
                        packs.Pack(*(base[a * (i in kinds[outer]) * 3 + b * (i in kinds[inner])][i] for i in range(6)))
                        for b in range(3)
                    ]
                    for a in range(2)
                ]
                axes = lambda kind: tuple(0 if i in kinds[kind] else None for i in range(6))
                stacked = [stack(row, axes(inner)) for row in grid]
                operands = stack(stacked, axes(outer))
                got = jax.jit(jax.vmap(jax.vmap(bind, axes(inner)), axes(outer)))(*operands)  # else each move of an axis is a program
                want = tuple(np.stack(x) for x in zip(*map(expected, grid)))
                assert_close(got, want)

    def test_vmap_inside_jit_is_one_equation_of_global_shapes(self):
        all_packs = variants(3, [QUERY])
        operands = stack(all_packs, (0,) + (None,) * 5)
        vmapped = jax.vmap(bind, (0,) + (None,) * 5)
        (eqn,) = [e for e in jax.make_jaxpr(vmapped)(*operands).eqns if e.primitive is paged_prefill_p]
        self.assertEqual(eqn.invars[0].aval.shape, operands[0].shape)
        assert_close(jax.jit(vmapped)(*operands), expected(all_packs))

    def test_a_cache_that_is_not_vmapped_is_not_copied(self):
        """Nested vmap over everything else: the very cache goes into the equation, and no buffer of its size is made."""
        pack = CASE.pack(spare_pages=20_000)
        axes = (0, None, None, 0, 0, 0)
        vmapped = jax.vmap(jax.vmap(bind, axes), axes)
        operands = [x if i in (KEYS, VALUES) else jnp.stack([jnp.stack([x] * 3)] * 2) for i, x in enumerate(pack)]
        jaxpr = jax.make_jaxpr(vmapped)(*operands).jaxpr
        (eqn,) = [e for e in jaxpr.eqns if e.primitive is paged_prefill_p]
        self.assertIs(eqn.invars[KEYS], jaxpr.invars[KEYS])
        self.assertIs(eqn.invars[VALUES], jaxpr.invars[VALUES])
        self.assertEqual(eqn.params["cache_batch_dims"], 0)
        compiled = jax.jit(vmapped).lower(*operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, pack.key_cache.nbytes / 10)

    @parameterized.parameters(KEYS, VALUES)
    def test_a_cache_is_not_copied_beside_one_that_is_vmapped(self, mapped):
        """It serves all elements as it is: a dimension of 1 in the equation, and no buffer of its size."""
        pack = CASE.pack(spare_pages=10_000)
        axes = [0 if i == mapped else None for i in range(6)]
        operands = [jnp.stack([x] * 3) if i == mapped else x for i, x in enumerate(pack)]
        vmapped = jax.vmap(bind, axes)
        (eqn,) = [e for e in jax.make_jaxpr(vmapped)(*operands).eqns if e.primitive is paged_prefill_p]
        self.assertEqual([eqn.invars[i].aval.shape[0] for i in (KEYS, VALUES)], [3 if i == mapped else 1 for i in (KEYS, VALUES)])
        compiled = jax.jit(vmapped).lower(*operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, pack.key_cache.nbytes / 10)
        want = bind(*pack)
        for got, one in zip(compiled(*operands), want):
            np.testing.assert_allclose(got, jnp.stack([one] * 3), atol=1e-6)

    def test_a_vmapped_cache_is_not_copied_either(self):
        pack = CASE.pack(spare_pages=10_000)
        operands = [jnp.stack([x] * 2) for x in pack]
        compiled = jax.jit(jax.vmap(bind)).lower(*operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, pack.key_cache.nbytes / 10)

    def test_spmd_axis_name(self):
        all_packs = variants(3)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            got = jax.jit(jax.vmap(bind, spmd_axis_name="data"))(*stack(all_packs, (0,) * 6))
        assert_close(got, expected(all_packs))

    def test_axis_size_of_zero(self):
        operands = [x[None][:0] for x in CASE.pack()]
        out, lse = jax.vmap(bind)(*operands)
        chex.assert_shape((out, lse), ((0, 6, 4, 8), (0, 6, 4)))

    def test_vmap_agrees_with_batch_dimensions(self):
        """Leading dimensions given by hand are the same call, to the bit."""
        operands = stack(variants(3), (0,) * 6)
        chex.assert_trees_all_equal(jax.vmap(bind)(*operands), bind(*operands, cache_batch_dims=1))
        chex.assert_trees_all_equal(jax.vmap(bind)(*operands), ragged_paged_prefill(*operands, cfg=cases.ONE_HEIGHT, return_lse=True))


class TracingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.pack = CASE.pack()

    def test_one_equation_with_its_parameters(self):
        def call(*operands):
            return ragged_paged_prefill(*operands, softmax_scale=0.25, sliding_window=7, attn_logits_soft_cap=30.0)

        text = str(jax.make_jaxpr(call)(*self.pack))
        self.assertEqual(text.count("paged_prefill["), 1)
        for parameter in (
            "softmax_scale=0.25", "sliding_window=7", "attn_logits_soft_cap=30.0", "cache_batch_dims=0", "platform=auto",
            "config=None",
        ):
            self.assertIn(parameter, text)

    def test_bind_fills_in_what_is_left_out(self):
        def call(*operands):
            return paged_prefill_p.bind(*operands)

        (eqn,) = jax.make_jaxpr(call)(*self.pack).eqns
        self.assertEqual(eqn.params["attention"].softmax_scale, 8**-0.5)
        packs.assert_matches_reference(self.pack, *jax.jit(call)(*self.pack))

    def test_results_of_bind_alone_and_under_jit(self):
        self.assertLen(paged_prefill_p.bind(*self.pack, config=cases.ONE_HEIGHT), 2)
        chex.assert_trees_all_equal(bind(*self.pack), jax.jit(bind)(*self.pack))
        packs.assert_matches_reference(self.pack, *bind(*self.pack))

    def test_numpy_operands(self):
        packs.assert_matches_reference(self.pack, *bind(*map(np.asarray, self.pack)))

    def test_local_primitive_attends_to_heads_from_kv_head_start_on(self):
        """Two of the cache's KV heads, from a start that is an operand, as a device with a replicated cache does."""
        pack = CASE.pack(kv_heads=6, q_heads=12)
        whole = bind(*pack)
        part = jax.jit(
            lambda start, query, *rest: tuple(
                local_paged_prefill_p.bind(query, *rest, start, num_kv_heads=2, config=cases.ONE_HEIGHT)
            )
        )
        for start in (0, 2, 4):
            got = part(jnp.int32(start), pack.query[:, 2 * start : 2 * start + 4], *pack[1:])
            want = (x[:, 2 * start : 2 * start + 4] for x in whole)
            assert_close(got, tuple(want))

    def test_scan(self):
        queries = jnp.stack([self.pack.query, 2 * self.pack.query])

        def step(carry, query):
            return carry + 1, bind(query, *self.pack[1:])

        count, got = jax.jit(lambda q: jax.lax.scan(step, 0, q))(queries)
        self.assertEqual(count, 2)
        assert_close(got, expected([self.pack._replace(query=q) for q in queries]))

    def test_while_and_fori_loop(self):
        got = jax.jit(lambda *p: jax.lax.fori_loop(0, 3, lambda i, _: bind(*p), bind(*p)))(*self.pack)
        packs.assert_matches_reference(self.pack, *got)

    def test_cond(self):
        def call(flag, *operands):
            return jax.lax.cond(flag, lambda: bind(*operands), lambda: (operands[0] * 0, operands[0][..., 0] * 0))

        packs.assert_matches_reference(self.pack, *jax.jit(call)(True, *self.pack))
        np.testing.assert_array_equal(jax.jit(call)(False, *self.pack)[0], 0)

    def test_remat(self):
        packs.assert_matches_reference(self.pack, *jax.jit(jax.checkpoint(bind))(*self.pack))

    def test_disable_jit(self):
        with jax.disable_jit():
            packs.assert_matches_reference(self.pack, *bind(*self.pack))

    def test_eval_shape(self):
        for dtype in cases.DTYPES:
            pack = CASE.pack(dtype=jnp.dtype(dtype), value_dim=5)
            out, lse = jax.eval_shape(bind, *pack)
            self.assertEqual((out.shape, out.dtype), ((6, 4, 5), dtype))
            self.assertEqual((lse.shape, lse.dtype), ((6, 4), jnp.float32))

    def test_ahead_of_time(self):
        abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.pack]
        compiled = jax.jit(bind).lower(*abstract).compile()
        packs.assert_matches_reference(self.pack, *compiled(*self.pack))

    def test_with_x64_on(self):
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x), jnp.int64) for x in self.pack[3:]]
            for indices in (self.pack[3:], wide):
                out, lse = jax.jit(lambda *p: ragged_paged_prefill(*p, cfg=cases.ONE_HEIGHT, return_lse=True))(*self.pack[:3], *indices)
                packs.assert_matches_reference(self.pack, out, lse)
            text = str(jax.make_jaxpr(bind)(*self.pack))
            self.assertNotIn("f64", text)

    def test_two_calls_with_other_parameters_are_two_programs(self):
        """Nothing a parameter changes is remembered from an earlier call (ejKernel kept timings of tracers)."""
        narrow = CASE.pack(poison=0.0)
        results = [bind(*narrow, **p)[0] for p in ({}, {"sliding_window": 2}, {"softmax_scale": 3.0}, {"attn_logits_soft_cap": 0.1})]
        for a, b in itertools.combinations(results, 2):
            self.assertGreater(np.abs(a - b).max(), 1e-3)


class ExportTest(parameterized.TestCase):
    def test_round_trip(self):
        pack = CASE.pack()
        exported = export.export(jax.jit(bind), platforms=["cpu"])(*pack)
        again = export.deserialize(exported.serialize())
        self.assertEqual(again.platforms, ("cpu",))
        chex.assert_trees_all_equal(tuple(jax.jit(again.call)(*pack)), bind(*pack))

    @parameterized.named_parameters(("caches_shared", 0), ("caches_of_their_own", 1))
    def test_symbolic_batch_size(self, cache_batch_dims):
        all_packs = variants(3)
        (batch,) = export.symbolic_shape("batch")
        batched = [cache_batch_dims or i not in (KEYS, VALUES) for i in range(6)]
        if not cache_batch_dims:
            all_packs = variants(3, (0, 3, 4, 5))
        abstract = [
            jax.ShapeDtypeStruct((batch, *x.shape) if b else x.shape, x.dtype) for b, x in zip(batched, all_packs[0])
        ]
        exported = export.export(jax.jit(lambda *p: bind(*p, cache_batch_dims=cache_batch_dims)))(*abstract)
        exported = export.deserialize(exported.serialize())
        for count in (1, 3):
            got = exported.call(*stack(all_packs[:count], [0 if b else None for b in batched]))
            assert_close(got, expected(all_packs[:count]))

    def test_symbolic_batch_of_a_vmap(self):
        all_packs = variants(3)
        (batch,) = export.symbolic_shape("batch")
        abstract = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in all_packs[0]]
        exported = export.export(jax.jit(jax.vmap(bind)))(*abstract)
        assert_close(exported.call(*stack(all_packs, (0,) * 6)), expected(all_packs))

    def test_symbolic_page_table(self):
        """Of all sizes of a problem the only one that changes from step to step in serving and is no batch."""
        pack = CASE.pack()
        (columns,) = export.symbolic_shape("columns")
        abstract = pack._replace(page_indices=jax.ShapeDtypeStruct((len(pack.context_lens), columns), jnp.int32))
        exported = export.export(jax.jit(bind))(*abstract)
        for more in (0, 3):
            longer = pack._replace(page_indices=jnp.pad(pack.page_indices, ((0, 0), (0, more))))
            assert_close(tuple(exported.call(*longer)), bind(*longer))


class DifferentiationTest(parameterized.TestCase):
    @parameterized.product(
        how=("jvp", "vjp", "grad", "linearize", "jacfwd"), operand=("query", "key_cache", "value_cache"), jitted=(True, False)
    )
    def test_is_refused_with_the_way_out(self, how, operand, jitted):
        pack = CASE.pack()

        def call(x):
            return bind(*pack._replace(**{operand: x}))[0].sum()

        call = jax.jit(call) if jitted else call
        x = getattr(pack, operand)
        ways = dict(
            jvp=lambda: jax.jvp(call, (x,), (x,)),
            vjp=lambda: jax.vjp(call, x),
            grad=lambda: jax.grad(call)(x),
            linearize=lambda: jax.linearize(call, x),
            jacfwd=lambda: jax.jacfwd(call)(x),
        )
        with self.assertRaisesRegex(NotImplementedError, r"paged_prefill.*jax\.lax\.stop_gradient"):
            ways[how]()

    def test_stop_gradient_is_the_way_out(self):
        pack = CASE.pack()

        def loss(weights, query, keys, values):
            query, keys, values = map(jax.lax.stop_gradient, (query, keys, values))
            return (weights * bind(query, keys, values, *pack[3:])[0]).sum()

        weights = jnp.ones_like(pack.query)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(weights, *pack[:3])
        np.testing.assert_allclose(gradients[0], bind(*pack)[0], atol=1e-6)
        for gradient in gradients[1:]:
            np.testing.assert_array_equal(gradient, 0)

    def test_gradients_of_what_is_around_it(self):
        """A loss that uses the result without differentiating through it: under vmap, scan and remat too."""
        pack = CASE.pack()

        @jax.checkpoint
        def loss(weights, query):
            return (weights * bind(jax.lax.stop_gradient(query), *pack[1:])[0]).sum()

        queries = jnp.stack([pack.query] * 2)
        gradient = jax.vmap(jax.grad(loss), (None, 0))(jnp.ones_like(pack.query), queries)
        np.testing.assert_allclose(gradient[1], bind(*pack)[0], atol=1e-5)


if __name__ == "__main__":
    absltest.main()
