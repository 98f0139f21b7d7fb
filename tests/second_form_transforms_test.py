"""JAX's transforms over calls with every operand: vmap of each, control flow, export of any size, strict flags."""

import functools

from absl.testing import absltest, parameterized
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from paged_prefill import paged_prefill_p, ragged_paged_prefill
from paged_prefill.primitive.operands import PREFILL
from paged_prefill.tests import cases, compiling, oracle, poisoned

SIZES = dict(page_size=4, head_dim=8, value_dim=12, tokens_before=1, tokens_after=1)
EVERYTHING = dict(
    key_ranges=True, tree_words=1, sinks=True, layers=2, cache_dtype="int8", key_scale="slot", value_scale="head"
)
SEQUENCES = ((5, 9), (0, 3), (3, 2), (1, 14))
NAMES = tuple(row.name for row in PREFILL.operands)


def bind(operands, **parameters):
    return tuple(paged_prefill_p.bind(**operands, **parameters, config=cases.ONE_HEIGHT))


def variants(count, only, **kind):
    """Calls of one shape without poison, alike in all operands but `only`: what one may see, another need not."""
    every = [
        # The first reads layer 0, which no index that is clamped finds by luck.
        poisoned.make_call(seed, SEQUENCES, **SIZES | EVERYTHING | kind, poison=False) | dict(layer=np.int32(seed % 2))
        for seed in range(count)
    ]
    return [{name: (call if name in only else every[0])[name] for name in every[0]} for call in every]


def stacked(every, only, axis=0):
    return {
        name: np.stack([call[name] for call in every], axis) if name in only else every[0][name] for name in every[0]
    }


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def expected(every, **parameters):
    return tuple(np.stack(x) for x in zip(*(oracle.exact(call, **parameters) for call in every)))


class VmapTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_each_operand_alone(self, name):
        """Mapped on its last axis where it has one; a scale, or a cache, of each element's own beside caches of all."""
        every = variants(2, [name])
        axes = {other: every[0][name].ndim if other == name else None for other in every[0]}
        operands = stacked(every, [name], axis=every[0][name].ndim)
        assert_close(jax.vmap(bind, (axes,))(operands), expected(every))

    @parameterized.named_parameters(
        ("all_but_the_caches", [name for name in NAMES if "cache" not in name and "scale" not in name]),
        ("caches_and_scales", ["key_cache", "value_cache", "key_scale", "value_scale"]),
        ("all", NAMES),
    )
    def test_together(self, names):
        every = variants(2, names)
        axes = {other: 0 if other in names else None for other in every[0]}
        assert_close(jax.jit(jax.vmap(bind, (axes,)))(stacked(every, names)), expected(every))

    @parameterized.named_parameters(
        ("queries_of_layers", ["query", "sinks", "key_ranges"], ["layer"]),
        ("pools_of_scales", ["key_scale"], ["key_cache", "layer", "tree_mask"]),
        ("layers_of_pools", ["layer", "value_scale"], ["key_cache", "value_cache", "query"]),
        ("queries_of_pools", ["query", "sinks", "layer"], ["key_cache", "value_scale"]),
    )
    def test_nested(self, outer, inner):
        base = variants(6, NAMES)
        grid = [
            [{n: base[3 * a * (n in outer) + b * (n in inner)][n] for n in base[0]} for b in range(3)] for a in range(2)
        ]
        operands = stacked([stacked(row, inner) for row in grid], outer)
        axes = [{n: 0 if n in names else None for n in base[0]} for names in (inner, outer)]
        got = jax.jit(jax.vmap(jax.vmap(bind, (axes[0],)), (axes[1],)))(operands)
        assert_close(got, tuple(np.stack(x) for x in zip(*map(expected, grid))))

    def test_a_latent_cache(self):
        kind = dict(latent=True, key_ranges=False, value_scale=None, value_dim=6)
        every = variants(2, ["query", "key_scale"], **kind)
        axes = {name: 0 if name in ("query", "key_scale") else None for name in every[0]}
        vmapped = jax.vmap(functools.partial(bind, value_dim=6), (axes,))
        assert_close(vmapped(stacked(every, ("query", "key_scale"))), expected(every, value_dim=6))

    def test_nothing_large_is_copied(self):
        """Layers, caches and scales that are not mapped go into the equation as they are, no layer is sliced out."""
        call = poisoned.make_call(0, SEQUENCES, **SIZES | EVERYTHING | dict(value_scale="slot"), spare_pages=5_000)
        mapped = [name for name in call if "cache" not in name and "scale" not in name]
        vmapped = jax.vmap(bind, ({name: 0 if name in mapped else None for name in call},))
        operands = stacked([call] * 3, mapped)
        closed = jax.make_jaxpr(vmapped)(operands)
        equation = closed.eqns[-1]
        places = dict(zip(sorted(operands), closed.jaxpr.invars))
        for name, var in zip(equation.params["present"], equation.invars):
            if name not in mapped:
                self.assertIs(var, places[name], name)
        compiled = jax.jit(vmapped).lower(operands).compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, call["key_scale"].nbytes / 2 / 4)


class ControlFlowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.call = poisoned.make_call(3, SEQUENCES, **SIZES, **EVERYTHING)
        self.want = oracle.exact(self.call)

    def test_scan_over_layers(self):
        """One program for all layers; caches and scales stand outside of the loop."""
        layers = [variants(1, [])[0] | dict(layer=np.int32(layer)) for layer in range(2)]

        @jax.jit
        def model(operands, numbers):
            return jax.lax.scan(lambda carry, layer: (carry, bind(operands | dict(layer=layer))), 0, numbers)[1]

        assert_close(model(layers[0], jnp.arange(2)), expected(layers))

    def test_cond_remat_and_loops(self):
        @jax.jit
        def model(flag, operands):
            call = jax.checkpoint(bind)
            either = lambda: jax.lax.cond(flag, call, lambda operands: tuple(0 * x for x in call(operands)), operands)
            return jax.lax.fori_loop(0, 2, lambda i, _: either(), either())

        assert_close(model(True, self.call), self.want)

    def test_strict_flags(self):
        """No operand meets another rank or dtype on its way: eagerly, under jit and vmap."""
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True, attn_logits_soft_cap=3.0)
            want = oracle.exact(self.call, attn_logits_soft_cap=3.0)
            assert_close(jax.jit(attend)(**self.call), want)
            batched = jax.vmap(lambda call: attend(**call))({name: x[None] for name, x in self.call.items()})
            assert_close(batched, [x[None] for x in want])
            numbers = dict(key_scale=0.02, value_scale=1, layer=1, sinks=[0, 1, 2, 3])
            for dtype in ("bfloat16", "float16"):
                for kind in (dict(dtype=dtype), dict(dtype=dtype, latent=True, value_scale=None, head_dim=16)):
                    call = poisoned.make_call(4, SEQUENCES, **SIZES | EVERYTHING | kind)
                    own = dict(value_dim=12, value_scale=None) if "latent" in kind else {}
                    with_numbers = functools.partial(attend, **numbers | own)
                    jax.jit(with_numbers).lower(**{name: x for name, x in call.items() if name not in numbers})

    def test_with_x64_on(self):
        with jax.enable_x64(True):
            wide = {name: self.call[name].astype(np.int64) for name in ("key_ranges", "layer", "context_lens")}
            attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
            assert_close(jax.jit(attend)(**self.call | wide), self.want)
            self.assertNotIn("f64", str(jax.make_jaxpr(bind)(self.call)))


class ExportTest(parameterized.TestCase):
    """The batch, tokens, sequences, page table and pool as variables, alone and together."""

    AXES = {
        "query": ("batch", "tokens", None, None),
        "key_cache": (None, None, "pages", None, None),
        "value_cache": (None, None, "pages", None, None),
        "context_lens": ("batch", "seqs"),
        "page_indices": ("batch", "seqs", "columns"),
        "query_offsets": ("batch", "seqs + 1"),
        "key_ranges": ("batch", "tokens", None),
        "tree_mask": ("batch", "tokens", None),
        "sinks": ("batch", None),
        "key_scale": (None, None, "pages", None),
        "value_scale": (None, None),
        "layer": ("batch",),
    }

    @parameterized.parameters(
        ("batch",), ("tokens",), ("seqs",), ("columns",), ("pages",), ("batch", "tokens", "seqs", "columns", "pages")
    )
    def test_symbolic_sizes(self, *symbolic):
        """Exported for no size in particular, it runs calls of two: in the second, all that is symbolic is larger."""
        larger = dict(tokens=dict(tokens_after=4), columns=dict(spare_columns=5), pages=dict(spare_pages=7))
        more = SIZES | {name: n for size in symbolic for name, n in larger.get(size, {}).items()}
        first = poisoned.make_call(0, SEQUENCES, batch=(3,), **SIZES | EVERYTHING)
        second = poisoned.make_call(1, SEQUENCES + ((0, 0),) * ("seqs" in symbolic), batch=(3,), **more | EVERYTHING)
        if "batch" in symbolic:
            first = {name: x[:2] if self.AXES[name][0] == "batch" else x for name, x in first.items()}
        scope = export.SymbolicScope()

        def abstract(name):
            axes = [axis if axis and axis.split()[0] in symbolic else None for axis in self.AXES[name]]
            dims = [str(size) if axis is None else axis for axis, size in zip(axes, first[name].shape)]
            return jax.ShapeDtypeStruct(export.symbolic_shape(",".join(dims), scope=scope), first[name].dtype)

        exported = export.export(jax.jit(bind))({name: abstract(name) for name in first})
        exported = export.deserialize(exported.serialize())
        for call in (first, second):
            assert_close(exported.call(call), oracle.exact(call))


if __name__ == "__main__":
    absltest.main()
