"""How tiles cover a pack, as kernels for GPUs launch them: each token in one, and the keys that its rows see."""

import collections
import dataclasses
import functools

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering import tiles
from paged_prefill.lowering.call import Sequences
from paged_prefill.primitive.attention import Attention
from paged_prefill.tests import poisoned


def each_of(schedule):
    """The tiles of a schedule of NumPy arrays, one by one."""
    return [jax.tree.map(lambda field: field[i], schedule) for i in range(len(schedule.start))]


class ScheduleTest(parameterized.TestCase):
    @parameterized.product(
        slabs=(1, 3), window=(None, 50), few_sequences=(0, 100), ordered=(True, False), whole_of=(None, 192)
    )
    def test_every_token_is_in_one_tile_and_sees_its_keys(self, slabs, window, few_sequences, ordered, whole_of):
        lengths, contexts, before, after = [70, 0, 1, 130, 9, 64], [300, 20, 513, 130, 4, 900], 3, 40
        block_kv, capacity, attention = 64, 640, Attention(1.0, sliding_window=window)
        slab = 16 if slabs == 1 else 64
        block_q = slabs * slab
        starts = before + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        tokens = before + sum(lengths) + after
        arrays = (np.asarray(x, np.int32) for x in (starts, lengths, contexts, np.arange(6) % 2))
        sequences = Sequences(*arrays, np.zeros((6, 40), np.int32))
        old, tiles.FEW_SEQUENCES = tiles.FEW_SEQUENCES, few_sequences
        self.addCleanup(setattr, tiles, "FEW_SEQUENCES", old)
        # A function of its own for each case, or jit would remember what another value of FEW_SEQUENCES gave.
        schedule = jax.jit(
            lambda sequences: tiles.schedule(
                sequences,
                tiles.Tiling(tokens, 6, capacity, block_q, block_kv, attention, slab, ordered, whole_of=whole_of),
            )[0]
        )(sequences)
        schedule, covered = jax.tree.map(np.asarray, schedule), np.zeros(tokens, int)
        self.assertLessEqual(len(schedule.start), tiles.tiles_at_most(tokens, 6, block_q))
        owner = {t: s for s, (a, n) in enumerate(zip(starts, lengths)) for t in range(a, a + n)}
        for tile in each_of(schedule):
            for row in range(tile.length):
                token = tile.start + row
                covered[token] += 1
                if token not in owner:
                    self.assertEqual(tile.end_block, tile.first_block)
                    continue
                seq = owner[token]
                position = contexts[seq] - lengths[seq] + token - starts[seq]
                first = 0 if window is None else max(0, position - window + 1)
                last = min(position, capacity - 1)
                self.assertEqual((tile.seq, tile.position + row), (seq, position))
                seen_start, seen_end, whole_start, whole_end = (field[row // slab] for field in tile.slabs)
                seen = np.arange(first, max(last + 1, first))
                np.testing.assert_array_equal(seen, seen[(seen >= seen_start) & (seen < seen_end)])
                np.testing.assert_array_equal(np.setdiff1d(np.arange(whole_start, whole_end), seen), [])
                if last >= first:
                    self.assertLessEqual(tile.first_block * block_kv, first)
                    self.assertGreater(tile.end_block * block_kv, last)
                    self.assertLessEqual(tile.first_key, first)
                    self.assertGreater(tile.end_key, last)
        np.testing.assert_array_equal(covered, 1)
        work = -(-schedule.slabs.seen_end // block_kv) - schedule.slabs.seen_start // block_kv
        work = np.where(schedule.length > 0, work.clip(0).sum(axis=1), -1)
        in_order = np.diff(work) <= 0 if ordered else np.diff((schedule.length > 0).astype(int)) <= 0
        self.assertTrue(np.all(in_order), "the tile of most work is not first, or one that does not exist not last")

    @parameterized.parameters(None, 50, 300)
    def test_what_all_see_does_not_follow_the_height_of_tiles(self, window):
        lengths, contexts = [70, 1, 130, 300], [300, 513, 130, 1000]
        starts = 3 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        arrays = (np.asarray(x, np.int32) for x in (starts, lengths, contexts, np.zeros(4)))
        sequences, found = Sequences(*arrays, np.zeros((4, 40), np.int32)), []
        for block_q in (16, 32, 128):
            tiling = tiles.Tiling(510, 4, 1024, block_q, 64, Attention(1.0, sliding_window=window), block_q, whole_of=128)
            schedule, *_ = jax.jit(tiles.schedule, static_argnums=1)(sequences, tiling)
            whole = np.full((510, 2), -1)
            for tile in each_of(jax.tree.map(np.asarray, schedule)):
                whole[tile.start : tile.start + tile.length] = tile.slabs.whole_start[0], tile.slabs.whole_end[0]
            found.append(whole[3 : 3 + sum(lengths)])
        self.assertGreater((found[0][:, 1] > found[0][:, 0]).mean(), 0.05)
        for others in found[1:]:
            np.testing.assert_array_equal(others, found[0])

    @parameterized.product(few_sequences=(0, 100), ordered=(True, False), slab=(16, 8))
    def test_tiles_know_what_their_ranges_say(self, few_sequences, ordered, slab):
        """Of random ranges, and junk for tokens without a sequence: what some row of a tile sees, and what all see."""
        call = poisoned.make_call(3, ((70, 300), (0, 20), (1, 44), (90, 200), (9, 4)), key_ranges=True, tokens_before=3,
                                  tokens_after=20, page_size=16)
        ranges, tokens = call["key_ranges"].copy(), len(call["query"])
        ranges[10:50] = np.arange(40)[:, None] * 3 + np.array([0, 50])  # rows that leave no hole
        lengths, contexts = np.diff(call["query_offsets"]), call["context_lens"]
        sequences = Sequences(call["query_offsets"][:-1], lengths, contexts, 0 * contexts, call["page_indices"])
        old, tiles.FEW_SEQUENCES = tiles.FEW_SEQUENCES, few_sequences
        self.addCleanup(setattr, tiles, "FEW_SEQUENCES", old)
        schedule = jax.jit(
            lambda sequences, ranges: tiles.schedule(
                sequences, tiles.Tiling(tokens, 5, 320, 16, 64, Attention(1.0), slab, ordered), ranges
            )[0]
        )(sequences, ranges)
        found = each_of(jax.tree.map(np.asarray, schedule))
        self.assertEqual(sum(tile.length for tile in found), tokens)
        without_holes = 0
        for tile in found:
            owned = [np.searchsorted(call["query_offsets"], t, side="right") - 1 == tile.seq
                     for t in range(tile.start, tile.start + tile.length)]
            if not any(owned) or not 3 <= tile.start < tokens - 20:
                self.assertGreaterEqual(tile.first_key, tile.end_key)
                continue
            low, high = np.clip(ranges[tile.start : tile.start + tile.length].T, 0, contexts[tile.seq])
            seen = np.zeros((tile.length, 320), bool)
            for row in range(tile.length):
                seen[row, low[row] : high[row]] = True
            some, every = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.all(0))
            self.assertEqual(tile.first_new, contexts[tile.seq] - lengths[tile.seq])
            if len(some):
                self.assertEqual((tile.first_key, tile.end_key), (some[0], some[-1] + 1))
                self.assertEqual((tile.first_block, tile.end_block), (some[0] // 64, some[-1] // 64 + 1))
                self.assertLessEqual(len(some) < some[-1] + 1 - some[0], tile.holes)
                without_holes += not tile.holes and tile.length > 1
            for slab_seen, *fields in zip(np.split(seen, range(slab, len(seen), slab)), *tile.slabs):
                of_slab = seen if tile.holes else slab_seen
                some, every = np.flatnonzero(slab_seen.any(0)), np.flatnonzero(of_slab.all(0))
                if len(some):
                    self.assertEqual(tuple(fields[:2]), (some[0], some[-1] + 1))
                np.testing.assert_array_equal(np.arange(*fields[2:]), every)
        self.assertGreater(without_holes, 0)

    @parameterized.product(
        parts=(tiles.Parts(1, 6, 2), tiles.Parts(2, 4, 3), tiles.Parts(1, 6, 2, together=8), tiles.Parts(3, 6, 2, together=2)),
        window=(None, 300),
    )
    def test_parts_hold_all_blocks_of_their_tile_whatever_else_is_in_the_pack(self, parts, window):
        lengths, contexts, others = [1, 5, 0, 40, 1, 1], [640, 30, 20, 513, 4, 900], [640, 2, 640, 100, 4, 0]
        starts = 3 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        whole = tiles.Tiling(60, 6, 640, 16, 64, Attention(1.0, sliding_window=window), 16)

        @functools.partial(jax.jit, static_argnums=1)
        def schedule(contexts, tiling):
            arrays = (jnp.asarray(x, jnp.int32) for x in (starts, lengths, contexts, np.zeros(6)))
            return tiles.schedule(Sequences(*arrays, jnp.zeros((6, 40), jnp.int32)), tiling)[:2]

        def by_start(contexts, tiling):
            found, number = jax.tree.map(np.asarray, schedule(jnp.asarray(contexts), tiling))
            there = collections.defaultdict(list)
            for tile in filter(lambda tile: tile.length > 0, each_of(found)[:number]):
                there[int(tile.start)].append(tile)
            return there

        found, uncut = (by_start(contexts, tiling) for tiling in (dataclasses.replace(whole, parts=parts), whole))
        shares = []
        for start, own in found.items():
            [tile] = uncut.pop(start)
            blocks = range(tile.first_block, tile.end_block)
            shares += [max(1, *(part.end_block - part.first_block for part in own), 0)]
            for field, value in tile._asdict().items():  # but for their blocks they are what the tile is
                if field not in ("first_block", "end_block", "part", "parts"):
                    chex.assert_trees_all_equal(*[getattr(part, field) for part in own], value)
            own = sorted(own, key=lambda part: part.part)
            self.assertEqual([(part.part, part.parts) for part in own], [(i, len(own)) for i in range(len(own))])
            self.assertEqual([b for part in own for b in range(part.first_block, part.end_block)], list(blocks))
            tiles_of_seq = -(-lengths[tile.seq] // 16) if tile.owned else 1
            most = np.clip(parts.together // tiles_of_seq, 1, parts.most) if parts.together else parts.most
            want = np.clip(-(-len(blocks) // parts.blocks), min(parts.least, most), most)
            self.assertEqual(shares[-1], max(1, -(-len(blocks) // want)))
            self.assertLessEqual(len(own), most)
        self.assertEmpty(uncut)
        self.assertEqual(shares, sorted(shares, reverse=True))
        found, beside_others = (by_start(x, dataclasses.replace(whole, parts=parts)) for x in (contexts, others))
        for seq in (0, 4):
            chex.assert_trees_all_equal(found[int(starts[seq])], beside_others[int(starts[seq])])


if __name__ == "__main__":
    absltest.main()
