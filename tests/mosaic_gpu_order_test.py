"""In which order the Hopper kernel goes through the pieces of a prompt, where no GPU is needed."""

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import host
from paged_prefill.lowering.mosaic_gpu.hopper.pieces import Pieces
from paged_prefill.lowering.mosaic_gpu.rounds import rows_together
from paged_prefill.lowering.tiles import tiles_at_most
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.tests import plans, problems

HOPPER = Device("cuda", "NVIDIA H200", "9.0", 132)


def order(tokens, together, seqs=1, group=4, num_kv_heads=3):
    """Of all pieces in their order: the row of the table, and the tile of heads."""
    sizes = dict(block_q=64, warpgroups=2, group=group, num_kv_heads=num_kv_heads)  # two heads in a tile
    plan = plans.plan(tokens=tokens, tiles=tiles_at_most(tokens, seqs, 64), rows_together=together, **sizes)
    pieces = Pieces(plan, *[jnp.zeros(1, jnp.int32)] * 3, block=jnp.int32(0), slab=jnp.int32(0))
    rows, head_tiles = pieces._row_and_head_tile(jnp.arange(plan.pieces, dtype=jnp.int32))
    return np.asarray(rows), np.asarray(head_tiles), plan


class OrderTest(parameterized.TestCase):
    @parameterized.product(together=(1, 2, 3, 4), tokens=(64, 320, 500), group=(1, 3, 4))
    def test_each_row_is_there_once_for_each_head(self, together, tokens, group):
        rows, head_tiles, plan = order(tokens, together, group=group)
        found = {*zip(rows.tolist(), head_tiles.tolist())}
        self.assertLen(found, plan.pieces)
        self.assertEqual({row for row, _ in found}, {*range(plan.tiles)})
        self.assertEqual({head for _, head in found}, {*range(plan.head_tiles)})

    def test_a_heads_tiles_come_one_after_another(self):
        rows, head_tiles, plan = order(512, 4)
        self.assertEqual(plan.head_tiles_per_group, 2)
        self.assertEqual(rows[:10].tolist(), [0, 0, 1, 1, 2, 2, 3, 3, 0, 0])
        self.assertEqual(head_tiles[:10].tolist(), [0, 1] * 4 + [2, 3])
        self.assertEqual(rows[24:26].tolist(), [4, 4])  # behind those of the last head

    @parameterized.parameters((512, 1), (500, 2), (700, 5))
    def test_rows_that_may_be_empty_come_last(self, tokens, seqs):
        """The table has room for sequences that begin anywhere: where all tokens are of one, some rows are no tiles. Were
        they dealt with others, some thread blocks would have nothing but them.
        """
        for together in (2, 4, 8):
            rows, _, plan = order(tokens, together, seqs)
            there = rows < -(-tokens // 64)
            self.assertFalse(there.all())
            self.assertTrue((np.diff(there.astype(int)) <= 0).all(), (together, rows))

    @parameterized.named_parameters(
        ("many_heads", dict(q_heads=128, num_kv_heads=128), True),
        ("many_wide_keys", dict(q_heads=128, num_kv_heads=128, head_dim=192), True),
        ("few_tiles", dict(q_heads=128, num_kv_heads=128, tokens=512, pages_per_seq=256), True),
        ("several_prompts", dict(q_heads=128, num_kv_heads=128, tokens=4 * 2048, seqs=4), True),
        ("a_sequence_for_each_row", dict(q_heads=128, num_kv_heads=128, tokens=16 * 2048, seqs=16), False),
        ("keys_that_the_second_cache_holds", dict(q_heads=32, num_kv_heads=32), False),
        ("few_keys_for_many_heads", dict(q_heads=128, num_kv_heads=8), False),
        ("one_tile_each", dict(q_heads=128, num_kv_heads=128, tokens=100, pages_per_seq=512), False),
        ("decode_steps", dict(q_heads=128, num_kv_heads=128, tokens=256, seqs=256), False),
        ("products_that_bind", dict(q_heads=64, num_kv_heads=64, tokens=4096, pages_per_seq=256), False),
        ("a_window", dict(q_heads=64, num_kv_heads=64, tokens=8192, pages_per_seq=512, sliding_window=1024), False),
        ("several_rows_at_once_anyway", dict(q_heads=32, num_kv_heads=32, tokens=8192, pages_per_seq=512), False),
    )
    def test_rows_are_together_where_memory_would_bring_keys_for_each(self, changes, together):
        kernel = host.MosaicGpu()
        given = problems.problem(**dict(tokens=2048, pages_per_seq=128) | changes)
        found = rows_together(given, kernel.heuristic(given, HOPPER), HOPPER.cores)
        self.assertEqual(found > 1, together, found)

    def test_no_more_rows_than_gain(self):
        """Of 16 rows together, four bring most of what all would."""
        kernel, given = host.MosaicGpu(), problems.problem(q_heads=128, num_kv_heads=128, tokens=2048, pages_per_seq=128)
        self.assertEqual(rows_together(given, kernel.heuristic(given, HOPPER), HOPPER.cores), 4)

    def test_no_more_rows_than_there_are(self):
        """Four tiles of 512 tokens."""
        given = problems.problem(q_heads=128, num_kv_heads=128, tokens=512, pages_per_seq=256)
        config = PrefillPageAttentionConfig(block_q=128, block_kv=128, num_warps=12, num_stages=3)
        self.assertEqual(rows_together(given, config, 132), 4)


if __name__ == "__main__":
    absltest.main()
