"""Parts that are merged where the last of them ends, on a real Hopper GPU. Where there is none, all is skipped."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import numpy as np

from paged_prefill import PrefillPageAttentionConfig as Config, ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.tests import oracle, poisoned
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((1, 300), (0, 7), (1, 44), (1, 700), (3, 513), (5, 0), (1, 1)) * 3
UNEVEN = ((1, 9000), (0, 7), (1, 200), (1, 64), (1, 900)) * 5
DRAFTS = ((4, 9000), (0, 7), (3, 200), (2, 64), (4, 900)) * 5
SIZES = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3, dtype="bfloat16")
LATENT = dict(latent=True, head_dim=576, value_dim=512, q_heads=64, kv_heads=1, page_size=64)
REPEATED = 30


def few(block_q=1, block_kv=64, parts=5):
    return Config(block_q=block_q, block_kv=block_kv, num_warps=8, num_stages=2, num_splits=parts)


KINDS = dict(
    few_rows=({}, few()),
    few_rows_of_17_parts=(dict(dtype="float16"), few(parts=17)),
    many_rows=({}, few(16)),
    two_warpgroups=({}, Config(block_q=32, block_kv=64, num_warps=12, num_stages=2, num_splits=5)),
    three=(dict(q_heads=6), Config(block_q=64, block_kv=64, num_warps=16, num_stages=2, num_splits=3)),
    four=(dict(head_dim=64), Config(block_q=64, block_kv=64, num_warps=20, num_stages=2, num_splits=3)),
    uneven=(dict(sequences=UNEVEN, q_heads=16, kv_heads=4), None),
    drafts=(dict(sequences=DRAFTS, q_heads=16, kv_heads=4), few(4)),
    wide=(dict(head_dim=512, q_heads=4), Config(num_splits=4)),
    quantised=(dict(cache_dtype="int8", key_scale="slot", value_scale="slot", sinks=True), Config(num_splits=4)),
    wide_and_quantised=(
        dict(cache_dtype="float8_e4m3fn", key_scale="head", value_scale="head", head_dim=512, q_heads=16),
        Config(num_splits=3),
    ),
    latent=(LATENT | dict(sequences=UNEVEN), None),
    latent_of_two_tiles=(LATENT | dict(sequences=UNEVEN, q_heads=100, sinks=True, dtype="float16"), None),
    latent_drafts=(LATENT | dict(sequences=DRAFTS, q_heads=16, tree_words=1), Config(block_q=4, num_warps=12, num_splits=3)),
    latent_and_quantised=(LATENT | dict(cache_dtype="int8", key_scale="slot"), Config(num_splits=3)),
    tree=(dict(tree_words=2), few(8)),
    ranges=(dict(key_ranges=True), few(8, 128)),
)


class GpuLastPartTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self, hopper=True)
        # Also where it is not chosen, or a cluster merges.
        self.enter_context(mock.patch.multiple(host, last_merges=lambda *_: True, merged_in_cluster=lambda *_: False))

    @parameterized.parameters(*KINDS)
    def test_it_is_right_and_has_the_same_bits_each_time_and_beside_another_call(self, name):
        """Whichever part is the last; and of the sequences beside one, none changes its bits."""
        kind, cfg = KINDS[name]
        call = poisoned.make_call(1, **SIZES | kind)
        latent = dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}
        attend = functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=cfg, **latent)
        run = jax.jit(lambda call: attend(**call))
        with mock.patch.object(host, "launch", side_effect=host.launch) as launch:
            first = run(call)
        self.assertTrue(launch.call_args.args[0].last_merges)
        oracle.assert_matches(call, *first, **latent)
        for _ in range(REPEATED):
            chex.assert_trees_all_equal(run(call), first)

        seq = np.repeat(np.arange(len(call["context_lens"])), np.diff(call["query_offsets"]))
        start, end = call["query_offsets"][[0, -1]]
        wild = dict(call, query=np.array(call["query"]))
        wild["query"][start:end][seq % 2 == 1] *= 40
        others = run(wild)
        own = np.zeros(len(call["query"]), bool)
        own[start:end] = seq % 2 == 0
        chex.assert_trees_all_equal(*[[np.asarray(array)[own] for array in result] for result in (first, others)])
        together = jax.jit(lambda *calls: [attend(**call) for call in calls])(call, wild, call)
        chex.assert_trees_all_equal(together, [first, others, first])


if __name__ == "__main__":
    absltest.main()
