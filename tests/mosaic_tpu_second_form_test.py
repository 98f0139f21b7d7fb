"""The TPU kernels with the optional operands, in TPU interpret mode with races looked for."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, lowering
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_tpu import schedule
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.prefill import local_paged_prefill_p
from paged_prefill.tests import layouts, oracle, poisoned, tpus

SIZES = dict(page_size=8, head_dim=16, value_dim=12, tokens_before=2, tokens_after=3)
# Longer than a tile and a block, of one token, without any, and one whose first rows see nothing.
SEQUENCES = ((37, 66), (1, 37), (0, 9), (1, 64), (3, 2), (5, 30))
BF16 = dict(dtype="bfloat16", page_size=16)
SLOTS = dict(key_scale="slot", value_scale="slot", spare_columns=1)  # a table of few columns: all are gathered
BY_ROW = dict(key_ranges=True, tree_words=1, sinks=True)
SMALL = PrefillPageAttentionConfig(block_q=16, block_kv=32)


def check(operands, **parameters):
    """Runs a call in the kernels and holds it to the oracle."""
    out, lse = attend(operands, **parameters)
    for name in ("pools", "layout", "cores"):
        parameters.pop(name, None)
    oracle.assert_matches(operands, out, lse, **parameters)


def attend(
    operands, *, pools=0, value_dim=None, layout="kpsd", cores=1, kv_head_start=0, num_kv_heads=None, **parameters
):
    """The kernels' results of a call, in a layout of its caches."""
    head_dim, kv_heads = operands["query"].shape[-1], operands["key_cache"].shape[-4]
    laid = operands if layout == "kpsd" else layouts.lay(operands, layout)
    named = {name: jax.device_put(x) for name, x in laid.items() if x is not None}
    named["kv_head_start"] = jnp.int32(kv_head_start)
    present = local_paged_prefill_p.operation.present(named)
    run = functools.partial(
        lowering.run, device=Device("tpu", "TPU v6e", core_count=cores), present=present, platform="pallas",
        config=SMALL, cache_batch_dims=pools, num_kv_heads=num_kv_heads or kv_heads, value_dim=value_dim,
        cache_layout=layout, attention=Attention(**{"softmax_scale": head_dim**-0.5} | parameters),
    )  # fmt: skip
    with mock.patch.multiple(schedule, CHUNK=16, ROWS=32, DEPTH=8):
        return tpus.interpreted(run, *(named[name] for name in present), cores=cores)


class SecondFormTest(parameterized.TestCase):
    @parameterized.named_parameters(  # ranges alone, and trees, are beside quantised caches below
        ("key_ranges_tree_and_sinks", dict(key_ranges=True, tree_words=2, sinks=True)),
        ("sinks_of_any_size", dict(sinks=poisoned.EXTREME_SINKS)),
        ("e4m3_of_each_head", dict(cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")),
        ("e4m3_of_each_slot", dict(cache_dtype="float8_e4m3fn", **SLOTS)),
        ("e5m2_keys_of_each_slot", dict(cache_dtype="float8_e5m2", **SLOTS | dict(value_scale="head"), **BF16)),
        ("int8_values_of_each_slot_and_what_rows_see", dict(cache_dtype="int8", **SLOTS | dict(key_scale=None), **BY_ROW)),
        ("e5m2_of_a_tensor", dict(cache_dtype="float8_e5m2", key_scale="tensor", **BF16)),
    )
    def test_operands(self, kind):
        check(poisoned.make_call(0, SEQUENCES, **SIZES | kind))

    def test_window_cap_tree_int8_and_latent(self):
        kind = dict(tree_words=1, latent=True, cache_dtype="int8", key_scale="head", sliding_window=20)
        call = poisoned.make_call(1, SEQUENCES, **SIZES | kind | dict(kv_heads=1))
        check(call, value_dim=12, sliding_window=20, attn_logits_soft_cap=3.0)

    def test_slot_scales_with_window_and_cap_in_pages_that_are_no_register(self):
        kind = dict(SIZES, page_size=24, cache_dtype="int8", **SLOTS, sliding_window=20)
        check(poisoned.make_call(7, SEQUENCES, **kind), sliding_window=20, attn_logits_soft_cap=3.0)

    def test_slot_scales_of_a_latent_cache_before_heads(self):
        kind = dict(latent=True, layers=2, cache_dtype="int8", **SLOTS | dict(value_scale=None))
        check(poisoned.make_call(5, ((5, 70), (1, 37)), **SIZES, **kind), value_dim=12, layout="pksd")

    def test_slot_scales_of_stacked_pages_and_two_cores(self):
        kind = dict(SIZES, value_dim=16, page_size=64, cache_dtype="float8_e4m3fn", **SLOTS)
        check(poisoned.make_call(8, ((5, 70), (1, 37)), batch=(2,), **kind), layout="p2ksd", cores=2)

    def test_slot_scales_of_some_heads_of_the_caches(self):
        kind = dict(cache_dtype="int8", **SLOTS, q_heads=4, kv_heads=2)
        call = poisoned.make_call(9, ((5, 70), (1, 37)), **SIZES | kind)
        out, lse = attend(call)
        some = attend(call | dict(query=call["query"][:, 2:]), kv_head_start=1, num_kv_heads=1)
        chex.assert_trees_all_close(some, (out[:, 2:], lse[:, 2:]), atol=1e-5)

    def test_layers_of_packs_in_pools_of_their_own_and_shared(self):
        kind = dict(layers=2, batch=(2, 2), pools=1, key_ranges=True, cache_dtype="int8", value_scale="tensor")
        check(poisoned.make_call(2, ((9, 14), (1, 40)), **SIZES | kind), pools=1)

    def test_stacked_pages_of_several_runs(self):
        kind = dict(SIZES, value_dim=16, page_size=64, cache_dtype="int8", key_scale="head", value_scale="tensor")
        check(poisoned.make_call(4, ((5, 70), (1, 37)), **kind), layout="p2ksd")

    def test_latent_pages_before_heads(self):
        check(poisoned.make_call(5, ((5, 70), (1, 37)), **SIZES, latent=True, layers=2), value_dim=12, layout="pksd")

    @parameterized.parameters("pskd", "ps(k2)d", "p2skd")
    def test_slots_apart_are_refused(self, layout):
        with self.assertRaisesRegex(ValueError, "has the slots of a head apart, .*it takes those with slots behind heads"):
            check(poisoned.make_call(6, SEQUENCES, **dict(SIZES, value_dim=16)), layout=layout)

    @parameterized.parameters("key_cache", "value_cache")
    def test_caches_of_which_one_serves_all_pools(self, name):
        call = poisoned.make_call(3, ((9, 14), (1, 40)), batch=(2,), pools=1, poison=False, **SIZES)
        shared = call[name][:1]
        call["page_indices"] = np.concatenate([call["page_indices"][:1]] * 2)  # where both find pages that are theirs
        check(call | {name: shared}, pools=1)


if __name__ == "__main__":
    absltest.main()
