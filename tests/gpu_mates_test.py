"""Thread blocks that copy keys for one another, on a real Hopper GPU. Where there is none, all is skipped."""

from dataclasses import replace
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax

from paged_prefill import PrefillPageAttentionConfig as Config, ragged_paged_prefill
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.tests import layouts, oracle, poisoned
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((1, 500), (300, 900), (0, 7), (1, 222), (450, 450), (129, 700))
SIZES = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3, dtype="bfloat16")
KINDS = dict(
    chain=({}, {}, Config(block_q=128, block_kv=128, num_warps=12, num_stages=3)),
    window=(dict(sliding_window=200), dict(sliding_window=200), Config(block_q=128, block_kv=128, num_warps=12, num_stages=3)),
    soft_cap=({}, dict(attn_logits_soft_cap=30.0), Config(block_q=128, block_kv=128, num_warps=12, num_stages=3)),
    two_heads_of_a_tile=(dict(page_size=64), {}, Config(block_q=64, block_kv=128, num_warps=12, num_stages=3)),
    pages_as_large_as_blocks=(dict(page_size=128), {}, Config(block_q=128, block_kv=128, num_warps=12, num_stages=2)),
    three_warpgroups=({}, {}, Config(block_q=192, block_kv=64, num_warps=16, num_stages=4)),
    four_warpgroups=(dict(head_dim=64), {}, Config(block_q=128, block_kv=64, num_warps=20, num_stages=3)),
    large_heads=(dict(head_dim=256), {}, Config(block_q=128, block_kv=64, num_warps=12, num_stages=2)),
    heads_beside_one_another=({}, dict(cache_layout="pskd"), Config(block_q=128, block_kv=128, num_warps=12, num_stages=3)),
    values_beside_keys=({}, dict(cache_layout="ps(k2)d"), Config(block_q=128, block_kv=128, num_warps=12, num_stages=3)),
)


class GpuMatesTest(parameterized.TestCase):
    @parameterized.product(name=[*KINDS], cores=(2, 4, 132))
    def test_they_have_the_bits_of_blocks_that_copy_for_themselves(self, name, cores):
        """Also where each goes through many pieces, and some through none; and whatever the other sequences are."""
        gpus_for(self, hopper=True)
        kind, parameters, cfg = KINDS[name]
        call = poisoned.make_call(1, **SIZES | kind)
        laid = layouts.lay(call, parameters["cache_layout"]) if "cache_layout" in parameters else call
        plan_of, found = host._plan, {}
        for has_mates in (False, True):
            of_plan = lambda *args: replace(plan_of(*args), cores=cores, mates=has_mates)
            run = jax.jit(functools.partial(
                ragged_paged_prefill, platform="cuda", return_lse=True, cfg=replace(cfg, num_splits=1), **parameters
            ))
            with mock.patch.object(host, "_plan", of_plan), mock.patch.object(host, "launch", side_effect=host.launch) as launch:
                found[has_mates] = run(**laid)
            self.assertEqual(launch.call_args.args[0].mates, has_mates)
        chex.assert_trees_all_equal(*found.values())
        of_oracle = {name: value for name, value in parameters.items() if name != "cache_layout"}
        oracle.assert_matches(call, *found[True], **of_oracle)
        poisoned.assert_no_bit_changes(run, laid, found[True])


if __name__ == "__main__":
    absltest.main()
