"""Parts of blocks that lie apart (hopper/tiling.py): how they are copied, announced and waited for, where no GPU is needed."""

from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu import room
from paged_prefill.lowering.mosaic_gpu.hopper import arrivals, loading, tiling
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.tests import plans, problems


class Ring:
    """A reference to shared memory that records what is taken of it."""

    def __init__(self):
        self.at = self

    def __getitem__(self, place):
        return place


class PartsTest(parameterized.TestCase):
    @parameterized.parameters(*range(16, 272, 16))
    def test_only_the_last_part_has_fewer_than_64_features(self, features):
        parts = tiling.parts_of(features)
        self.assertEqual([part.features for part in parts[:-1]], [64] * (len(parts) - 1))
        covered = [part.first + i for part in parts for i in range(part.features)]
        self.assertEqual(covered, [*range(features)])
        self.assertEqual((tiling.whole(features), tiling.lie_apart(features)), (64 * len(parts), features % 64 > 0))

    @parameterized.parameters((80, 80), (96, 64), (64, 112), (128, 128), (48, 208))
    def test_blocks_have_room_for_whole_parts(self, head_dim, value_dim):
        """As many bytes as blocks of the next multiples of 64 have."""
        config = PrefillPageAttentionConfig(block_q=64, block_kv=64, num_warps=12, num_stages=2)
        given = problems.problem(head_dim=head_dim, value_dim=value_dim)
        whole = problems.problem(head_dim=-(-head_dim // 64) * 64, value_dim=-(-value_dim // 64) * 64)
        self.assertEqual(room.bytes_of_blocks(given, config), room.bytes_of_blocks(whole, config))
        query = 2 * room.rows_of(given, config) * (given.head_dim - whole.head_dim)  # which lies in parts of one width
        self.assertEqual(room.shared_bytes(given, config), room.shared_bytes(whole, config) + query)

    @parameterized.product(
        sizes=({}, dict(teams=2, warpgroups=1, rows=64), dict(teams=2, warpgroups=1, rows=8), dict(page_size=256)),
        dims=((80, 96), (112, 128), (64, 16)),
    )
    def test_as_many_warps_announce_a_block_as_its_barrier_waits_for(self, sizes, dims):
        plan = plans.plan(head_dim=dims[0], value_dim=dims[1], soft_cap=None, **sizes)
        together = [name for name, n in zip(("keys", "values"), dims) if n % 64 or plan.warpgroups > 1]
        self.assertEqual(plan.announced_together, together)
        sources, pieces, found = [SimpleNamespace(name=name) for name in ("keys", "values")], mock.Mock(), {}
        with mock.patch.object(loading.pl, "when", lambda condition: lambda do: do()):
            loading.load(plan, pieces, None, None, sources, jnp.int32(0))
        for (copy_piece, team), _ in pieces.each.call_args_list:
            [source] = copy_piece.__self__.sources
            found.setdefault((team, source.name), []).append(copy_piece.__self__.offsets)
        self.assertLen(found, 2 * plan.teams)
        for of_warps in found.values():
            self.assertLen(of_warps, loading.loading_warps(plan))
            offsets = sorted(offset for offsets in of_warps for offset in offsets)
            self.assertEqual(offsets, [*range(0, plan.block_kv, plan.run)])

    @parameterized.product(features=(96, 112, 16), slot_rows=(1, 2))
    def test_each_part_of_a_run_has_a_copy(self, features, slot_rows):
        """From its columns of the head's, to its own place; all of a warp's are announced together."""
        plan = plans.plan(head_dim=features, value_dim=features, slot_rows=slot_rows, soft_cap=None)
        source = SimpleNamespace(rows="cache", beside=0, features=features, shares=1, blocks=Ring(), here="here", wide_blocks=None)
        offsets, piece = range(32, 64, 16), SimpleNamespace(first_row=1)
        share = loading.Loading(plan, None, None, [source], offsets)
        with mock.patch.object(loading, "copy_parts") as copy:
            share._copy_runs(piece, source, 2, 0, [300, 500])
        [(here, slot, copies), _] = copy.call_args
        self.assertEqual((here, slot), ("here", 2))
        column, expected = features * (1 % slot_rows), []
        for row, offset in zip((300, 500), offsets):
            for number, first in enumerate(range(0, features, 64)):
                place = 2, number, loading.pl.ds(offset, 16)
                expected.append(("cache", row, column + first, min(64, features - first), place))
        self.assertEqual([(rows, row, int(at), n, place) for rows, row, at, n, place in copies], expected)

    @parameterized.parameters(dict(warpgroups=1), dict(has_ranges=True), dict(tree_words=2), dict(page_size=5), dict(cache_dtype="int8"))
    def test_runs_of_whole_parts_are_announced_together_where_prompts_gain(self, **others):
        self.assertTrue(plans.plan(soft_cap=None).announces_runs)
        plan = plans.plan(soft_cap=None, **others)
        self.assertFalse(plan.announces_runs)
        self.assertEmpty(plan.announced_together)

    @parameterized.product(slot_rows=(1, 2), blocks=(1, 2))
    def test_runs_of_whole_parts_have_a_copy_each(self, slot_rows, blocks):
        """All of a warp's are announced together, and those of another thread block if it copies as many to here."""
        plan = plans.plan(slot_rows=slot_rows, soft_cap=None, mates=blocks > 1)
        source = SimpleNamespace(rows="cache", beside=0, features=128, shares=1, blocks=Ring(), here="here", wide_blocks=None)
        share = loading.Loading(plan, None, None, [source], range(32, 64, 16), first=64 * (blocks - 1))
        with mock.patch.object(loading, "copy_tiles") as copy:
            share._copy_runs(SimpleNamespace(first_row=1), source, 2, 0, [300, 500])
        [(here, slot, copies, number), _] = copy.call_args
        self.assertEqual((here, slot, number), ("here", 2, blocks))
        places = [(2, loading.pl.ds(64 * (blocks - 1) + offset, 16)) for offset in (32, 48)]
        expected = [("cache", row, 128 * (1 % slot_rows), place) for row, place in zip((300, 500), places)]
        self.assertEqual([(rows, row, int(at), place) for rows, row, at, place in copies], expected)

    @parameterized.parameters(1, 2, 3, 4)
    def test_the_phase_that_is_waited_for_is_the_blocks_own(self, stages):
        """Blocks go through a ring in order: a stage is filled once a turn."""
        plan = plans.plan(head_dim=96, stages=stages, soft_cap=None, tiles=500)
        with mock.patch.object(arrivals, "wait") as wait:
            for step in range(9):
                arrivals.wait_for_block(plan, "keys", "here", step % plan.key_slots, jnp.int32(step // 2), step - step // 2)
        phases = [int(phase) for (_, _, phase), _ in wait.call_args_list]
        self.assertEqual(phases, [step // plan.key_slots for step in range(9)])


if __name__ == "__main__":
    absltest.main()
