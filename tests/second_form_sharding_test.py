"""Calls with every operand on 8 devices, cut by heads, batch and both, in all ways: right, and nothing exchanged."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np

from paged_prefill import append_to_pages, ragged_paged_prefill
from paged_prefill.lowering.choose import XLA
from paged_prefill.tests import cases, meshes, oracle, poisoned

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit, "hint": AxisType.Auto}
SIZES = dict(page_size=4, head_dim=8, value_dim=12, tokens_before=1, tokens_after=1)
EVERYTHING = dict(
    key_ranges=True,
    tree_words=1,
    sinks=True,
    layers=2,
    cache_dtype="float8_e4m3fn",
    key_scale="slot",
    value_scale="head",
)
SEQUENCES = ((5, 9), (3, 2), (1, 14))
# What cuts the batch, the query heads and the KV heads, with so many KV heads for 16 query heads.
CUTS = {
    "heads": (None, ("data", "model"), ("data", "model"), 8),
    "batch": ("data", None, None, 2),
    "both": ("data", "model", "model", 4),
    "caches_whole": ("data", "model", None, 2),
}


def hints(way, batch, heads):
    return dict(batch_axis=batch, head_axis=heads) if way == "hint" else {}


class AttentionTest(parameterized.TestCase):
    """Of what surrounds the kernel: one that compiles fast stands in for the product's, whose calls are cut elsewhere."""

    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(XLA, "attend", meshes.dense_kernel))

    @parameterized.product(way=tuple(KINDS), cut=tuple(CUTS))
    def test_every_operand(self, way, cut):
        batch, heads, kv_axes, kv_heads = CUTS[cut]
        call = poisoned.make_call(0, SEQUENCES, batch=(2,), q_heads=16, kv_heads=kv_heads, **SIZES, **EVERYTHING)
        operands = meshes.put_call(meshes.mesh(kind=KINDS[way]), call, meshes.specs_of_call(call, batch, heads, kv_axes))
        attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True, **hints(way, batch, heads))
        compiled = jax.jit(lambda operands: attend(**operands)).lower(operands).compile()
        out, lse = compiled(operands)
        oracle.assert_matches(call, out, lse)
        self.assertEmpty(meshes.collectives(compiled))
        self.assertEqual((*out.sharding.spec, None, None, None)[:3], (batch, None, heads))

    @parameterized.parameters(*KINDS)
    def test_latent_caches_of_each_replica(self, way):
        """One KV head for all query heads, so caches are whole along it, and cut with the batch."""
        kind = EVERYTHING | dict(latent=True, value_scale=None, head_dim=16, key_scale="tensor")
        call = poisoned.make_call(1, SEQUENCES, batch=(2,), pools=1, q_heads=8, kv_heads=1, **SIZES | kind)
        del call["value_cache"]
        specs = meshes.specs_of_call(call, "data", "model", None, pools=1)
        operands = meshes.put_call(meshes.mesh(kind=KINDS[way]), call, specs)
        attend = functools.partial(
            ragged_paged_prefill, value_cache=None, value_dim=12, cfg=cases.ONE_HEIGHT, return_lse=True
        )
        attend = functools.partial(attend, **hints(way, "data", "model"))
        compiled = jax.jit(lambda operands: attend(**operands)).lower(operands).compile()
        out, lse = compiled(operands)
        oracle.assert_matches(call, out, lse, value_dim=12)
        self.assertEmpty(meshes.collectives(compiled))
        self.assertEqual(out.sharding.spec[:3], ("data", None, "model"))


class AppendTest(parameterized.TestCase):
    @parameterized.product(way=tuple(KINDS), scale=("slot", "head"))
    def test_quantising_into_layers_cut_by_pools_and_heads(self, way, scale):
        """The scales that come back are cut as the caches are."""
        kind = dict(layers=2, cache_dtype="int8", key_scale=scale, value_scale=scale, poison=False)
        call = poisoned.make_call(2, SEQUENCES, batch=(2,), pools=1, q_heads=4, kv_heads=4, **SIZES, **kind)
        rng = np.random.default_rng(0)
        lead = call.pop("query").shape[:-1]
        call |= dict(
            key=rng.standard_normal((*lead, 8), np.float32), value=rng.standard_normal((*lead, 12), np.float32)
        )
        want = jax.jit(append_to_pages)(**call)
        specs = meshes.specs_of_call(call | dict(query=None), "data", "model", "model", pools=1)
        specs |= dict(key=P("data", None, "model"), value=P("data", None, "model"))
        operands = meshes.put_call(meshes.mesh(kind=KINDS[way]), call, specs)
        append = functools.partial(append_to_pages, **hints(way, "data", "model"))
        compiled = jax.jit(lambda operands: append(**operands)).lower(operands).compile()
        got = compiled(operands)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
            self.assertEqual(a.sharding.spec[:3], ("data", None, "model"))
        self.assertEmpty(meshes.collectives(compiled))


if __name__ == "__main__":
    absltest.main()
