"""Thread blocks of the Hopper kernel that copy keys for one another, where no GPU is needed."""

from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import kernel, loading, mates
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.hopper.plan import MATES
from paged_prefill.lowering.tiles import Tiles
from paged_prefill.tests import plans
from paged_prefill.tests.mosaic_gpu_pieces_test import launch_of

SIZES = (
    {},
    dict(warpgroups=3, block_q=192, block_kv=64),
    dict(warpgroups=4, block_q=128, head_dim=64, value_dim=64),
    dict(page_size=64, block_kv=64),
    dict(page_size=256),
    dict(page_size=8),
)


def plan_of(sizes):
    return plans.plan(**(dict(mates=True, soft_cap=None) | sizes))


class MatesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("prompt", {}, True),
        ("window", dict(sliding_window=1500), True),
        ("no_other_head_of_the_same_keys", dict(kv_heads=32), False),
        ("an_odd_number_of_them", dict(q_heads=28, kv_heads=4), False),
        ("fewer_tiles_than_cores", dict(tokens=512, q_heads=8, kv_heads=2), False),
        ("decode_steps", dict(seqs=256, tokens=256), False),
        ("short_prompts", dict(seqs=8, tokens=8192, pages_per_seq=128), False),
        ("a_short_prompt", dict(tokens=1500, pages_per_seq=94, q_heads=64), False),
        ("ranges", dict(key_ranges=True), False),
    )
    def test_prompts_whose_heads_share_keys_have_mates(self, call, has_mates):
        call = dict(tokens=8192, pages_per_seq=512, q_heads=32, kv_heads=8) | call
        if "key_ranges" in call:
            call |= dict(key_ranges=jnp.zeros((call["tokens"], 2), jnp.int32))
        self.assertEqual(launch_of(**call)[0].mates, has_mates)

    @parameterized.product(warpgroups=(2, 3), rows_together=(1, 4), cores=(4, 10))
    def test_both_go_through_the_same_blocks_of_keys_for_two_heads(self, warpgroups, rows_together, cores):
        """Else they would wait for one another for ever."""
        sizes = dict(warpgroups=warpgroups, block_q=64 * warpgroups, block_kv=64, rows_together=rows_together)
        plan = plan_of(sizes | dict(tiles=11, tokens=640 * warpgroups, cores=cores))
        rng = np.random.default_rng(cores)
        table = rng.integers(0, 9, (plan.rows_of_table, plan.columns), np.int32)
        for name, values in dict(length=plan.block_q, first_block=0, end_block=1 + np.arange(11)).items():
            table[:, Tiles._fields.index(name)] = values
        table[-2:, Tiles._fields.index("length")] = 0
        zeros, heads = jnp.zeros(1, jnp.int32), []
        for block in range(0, plan.thread_blocks, MATES):
            each = [
                Pieces(plan, jnp.asarray(table.ravel()), zeros, zeros, block=jnp.int32(block + i), slab=jnp.int32(0))
                for i in range(MATES)
            ]
            for i in range(-(-plan.pieces // plan.thread_blocks)):
                (one, exists), (other, other_exists) = (pieces.piece_of(jnp.int32(i)) for pieces in each)
                self.assertEqual(bool(exists), bool(other_exists))
                if exists:
                    same = [(int(x.tile.start), int(x.last), int(x.steps), int(x.first_row), int(x.pool)) for x in (one, other)]
                    self.assertEqual(*same)
                    self.assertNotEqual(int(one.head), int(other.head))
                    heads += [(int(x.last), int(x.head)) for x in (one, other)]
        self.assertLen(set(heads), 9 * plan.head_tiles)

    @parameterized.parameters(*SIZES)
    def test_each_copies_half_of_a_block_and_its_own_query(self, **sizes):
        plan, found, queries = plan_of(sizes), {}, []
        sources = [SimpleNamespace(name=name) for name in ("keys", "values")]
        for mate in range(MATES):
            for warp in range(4):
                pieces = mock.Mock()
                with mock.patch.object(loading.pl, "when", lambda here: lambda do: do() if here else None):
                    loading.load(plan, pieces, None, None, sources, np.int32(warp), np.int32(mate))
                for (copy_piece, _), _ in pieces.each.call_args_list:
                    share = copy_piece.__self__
                    found.setdefault(share.sources[0].name, []).append((mate, warp, [share.first + i for i in share.offsets]))
                    queries += [mate] if share.has_queries else []
        self.assertEqual(queries, [0, 1])
        for shares in found.values():
            offsets = [offset for *_, offsets in shares for offset in offsets]
            self.assertEqual(sorted(offsets), [*range(0, plan.block_kv, plan.run)])
            # A warp announces what its like in the other block copies too.
            of_each = [[(warp, len(offsets)) for mate, warp, offsets in shares if mate == which] for which in range(MATES)]
            self.assertEqual(*of_each)
            self.assertLen(of_each[0], loading.loading_warps(plan))

    @parameterized.parameters(2, 3, 4)
    def test_a_place_is_free_when_all_warps_of_both_have_read_it(self, warpgroups):
        plan = plan_of(dict(warpgroups=warpgroups, block_kv=64))
        sources = [SimpleNamespace(wide_blocks=None, here=f"{name} here", free=f"{name} free") for name in ("keys", "values")]
        block = SimpleNamespace(plan=plan, shared=SimpleNamespace(sources=sources))
        with (
            mock.patch.object(kernel, "initialise") as initialise,
            mock.patch.object(kernel.mates, "fence_initialised") as fence,
            mock.patch.object(kernel.plgpu, "commit_smem"),
        ):
            kernel._ThreadBlock.start_barriers(block)
        warps = dict(call.args for call in initialise.call_args_list)
        self.assertEqual({name: warps[f"{name} free"] for name in ("keys", "values")}, dict.fromkeys(("keys", "values"), 8 * warpgroups))
        self.assertEqual({warps[f"{name} here"] for name in ("keys", "values")}, {loading.loading_warps(plan)})
        fence.assert_called_once()

    @parameterized.parameters(1, 2, 3)
    def test_a_place_is_waited_for_as_often_as_it_was_let_go(self, stages):
        with mock.patch.object(mates, "wait") as wait:
            for step in range(stages, 9):
                mates.wait_for_place("free", step % stages, jnp.int32(step), stages)
        turns = [int(turn) for (_, _, turn), _ in wait.call_args_list]
        self.assertEqual(turns, [step // stages - 1 for step in range(stages, 9)])


if __name__ == "__main__":
    absltest.main()
