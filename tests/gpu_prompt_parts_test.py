"""Parts of steps beside a prompt whose tiles have fewer, on a real Hopper GPU. Where there is none, all is skipped."""

from dataclasses import replace
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from paged_prefill import PrefillPageAttentionConfig as Config, ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.tiles import Parts
from paged_prefill.tests import oracle, poisoned
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((1, 2500), (300, 900), (1, 40), (0, 7), (1, 2222), (150, 150), (1, 700))
SIZES = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3, dtype="bfloat16")
PARTS = Parts(1, 6, 3, together=8)  # six of a step, two of a prompt of 150 tokens, one of a longer prompt
KINDS = dict(
    chain=({}, Config(block_q=64, block_kv=128, num_warps=12, num_stages=3)),
    chain_over_widened_keys=(
        dict(cache_dtype="int8", key_scale="head", value_scale="tensor"),
        Config(block_q=64, block_kv=128, num_warps=12),
    ),
    chain_over_ranges=(dict(key_ranges=True), Config(block_q=64, block_kv=128, num_warps=12, num_stages=3)),
    chain_over_gathered_keys=(dict(page_size=5), Config(block_q=64, block_kv=128, num_warps=12, num_stages=3)),
    looking_ahead=(dict(sliding_window=300, head_dim=64), Config(block_q=64, block_kv=128, num_warps=12, num_stages=3)),
    short_steps=(dict(head_dim=64), Config(block_q=128, block_kv=128, num_warps=12, num_stages=4)),
    three_warpgroups=(dict(q_heads=6), Config(block_q=64, block_kv=64, num_warps=16, num_stages=4)),
    two_teams=({}, Config(block_q=64, block_kv=64, num_warps=8, num_stages=3)),
    large_heads=(dict(head_dim=256), Config(block_q=64, block_kv=64, num_warps=12, num_stages=2)),
    wide_heads=(dict(head_dim=512), Config(block_q=16, block_kv=64, num_warps=12, num_stages=1)),
    tree=(dict(tree_words=2), Config(block_q=64, block_kv=64, num_warps=8, num_stages=3)),
)


class GpuPromptPartsTest(parameterized.TestCase):
    @parameterized.product(name=[*KINDS], cores=(3, 132))
    def test_it_is_right_and_no_bit_of_a_sequence_depends_on_the_others(self, name, cores):
        """Also where each thread block goes through many pieces; and where the others have fewer keys, and so fewer parts."""
        gpus_for(self, hopper=True)
        kind, cfg = KINDS[name]
        window = dict(sliding_window=kind["sliding_window"]) if "sliding_window" in kind else {}
        call = poisoned.make_call(1, **SIZES | kind)
        run = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, cfg=replace(cfg, num_splits=1), **window))
        plan_of = host._plan
        self.enter_context(mock.patch.object(host, "parts_of_tiles", lambda *_: PARTS))
        self.enter_context(mock.patch.object(host, "_plan", lambda *args: replace(plan_of(*args), cores=cores)))
        with mock.patch.object(host, "launch", side_effect=host.launch) as launch:
            first = run(**call)
        plan = launch.call_args.args[0]
        self.assertEqual((plan.parts, plan.chains), (PARTS, name.startswith("chain")))
        self.assertEqual(plan.looks_ahead, name == "looking_ahead")
        oracle.assert_matches(call, *first, **window)
        poisoned.assert_no_bit_changes(run, call, first)


if __name__ == "__main__":
    absltest.main()
