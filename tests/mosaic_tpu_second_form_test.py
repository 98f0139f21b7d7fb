"""The TPU kernels with the operands of the second form, in TPU interpret mode with races looked for."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, compat, lowering
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_tpu import schedule
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.prefill import local_paged_prefill_p
from paged_prefill.tests import layouts, oracle, poisoned

SIZES = dict(page_size=8, head_dim=16, value_dim=12, tokens_before=2, tokens_after=3)
# Longer than a tile and a block, of one token, without any, and one whose first rows see nothing.
SEQUENCES = ((37, 66), (1, 37), (0, 9), (1, 64), (3, 2), (5, 30))
SMALL = PrefillPageAttentionConfig(block_q=16, block_kv=32)


def check(operands, *, pools=0, value_dim=None, layout="kpsd", **parameters):
    """Runs a call in the kernels, in a layout of its caches, and holds it to the oracle."""
    head_dim, kv_heads = operands["query"].shape[-1], operands["key_cache"].shape[-4]
    laid = operands if layout == "kpsd" else layouts.lay(operands, layout)
    named = {name: jnp.asarray(x) for name, x in laid.items() if x is not None}
    named["kv_head_start"] = jnp.int32(0)
    present = local_paged_prefill_p.operation.present(named)
    run = functools.partial(
        lowering.run, device=Device("tpu", "TPU v6e", core_count=1), present=present, platform="pallas", config=SMALL,
        cache_batch_dims=pools, num_kv_heads=kv_heads, value_dim=value_dim, cache_layout=layout,
        attention=Attention(**{"softmax_scale": head_dim**-0.5} | parameters),
    )  # fmt: skip
    interpreter = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    with pltpu.force_tpu_interpret_mode(interpreter), mock.patch.multiple(schedule, CHUNK=16, ROWS=32, DEPTH=8):
        out, lse = jax.block_until_ready(jax.jit(run)(*(named[name] for name in present)))
    assert not compat.tpu_interpreter_found_races()
    oracle.assert_matches(operands, out, lse, **parameters, **dict(value_dim=value_dim) if value_dim else {})


class SecondFormTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("key_ranges", dict(key_ranges=True)),
        ("tree_mask", dict(tree_words=1)),
        ("key_ranges_tree_and_sinks", dict(key_ranges=True, tree_words=2, sinks=True)),
        ("e4m3_of_each_head", dict(cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head")),
        ("e5m2_of_a_tensor", dict(cache_dtype="float8_e5m2", key_scale="tensor", dtype="bfloat16", page_size=16)),
    )
    def test_operands(self, kind):
        check(poisoned.make_call(0, SEQUENCES, **SIZES | kind))

    def test_window_cap_tree_int8_and_latent(self):
        kind = dict(tree_words=1, latent=True, cache_dtype="int8", key_scale="head", sliding_window=20)
        call = poisoned.make_call(1, SEQUENCES, **SIZES | kind | dict(kv_heads=1))
        check(call, value_dim=12, sliding_window=20, attn_logits_soft_cap=3.0)

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
