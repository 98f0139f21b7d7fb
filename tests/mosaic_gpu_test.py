"""What of the Hopper kernel can be tested without a GPU: its schedule, what it refuses, and that it lowers."""

import collections
import dataclasses
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering import tiles
from paged_prefill.lowering.call import Call, Device, Sequences
from paged_prefill.lowering.mosaic_gpu import host, room
from paged_prefill.lowering.mosaic_gpu.hopper.plan import REGISTERS, WIDE_REGISTERS
from paged_prefill.lowering.mosaic_gpu.widening import behind_widening
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.context import policy
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.tests import layouts, packs, plans, poisoned, problems
from paged_prefill.tests.covering import pairs

KERNEL = host.MosaicGpu()
HOPPER = Device("cuda", "NVIDIA H200", "9.0")
UNKNOWN = Device("cuda")


def shapes(seqs=1, tokens=100, q_heads=8, kv_heads=2, head_dim=128, value_dim=None, page_size=16, pages_per_seq=60,
           dtype=jnp.bfloat16):
    cache = (kv_heads, 64, page_size)
    floats = ((tokens, q_heads, head_dim), (*cache, head_dim), (*cache, value_dim or head_dim))
    ints = ((seqs,), (seqs, pages_per_seq), (seqs + 1,))
    return [jax.ShapeDtypeStruct(s, dtype) for s in floats] + [jax.ShapeDtypeStruct(s, jnp.int32) for s in ints]


def problem(**changes):
    sizes = dict(tokens=100, q_heads=8, num_kv_heads=2, cache_kv_heads=2, pages_per_seq=200)
    return problems.problem(**(sizes | changes))


def each_of(schedule):
    """The tiles of a schedule of NumPy arrays, one by one."""
    return [jax.tree.map(lambda field: field[i], schedule) for i in range(len(schedule.start))]


class ScheduleTest(parameterized.TestCase):
    @parameterized.product(slabs=(1, 3), window=(None, 50), few_sequences=(0, 100), ordered=(True, False))
    def test_every_token_is_in_one_tile_and_sees_its_keys(self, slabs, window, few_sequences, ordered):
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
                sequences, tiles.Tiling(tokens, 6, capacity, block_q, block_kv, attention, slab, ordered)
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

    @parameterized.product(parts=(tiles.Parts(1, 6, 2), tiles.Parts(2, 4, 3)), window=(None, 300))
    def test_parts_hold_all_blocks_of_their_tile_whatever_else_is_in_the_pack(self, parts, window):
        lengths, contexts, others = [1, 5, 0, 40, 1, 1], [640, 30, 20, 513, 4, 900], [640, 2, 640, 100, 4, 0]
        starts = 3 + np.concatenate([[0], np.cumsum(lengths)[:-1]])
        whole = tiles.Tiling(60, 6, 640, 16, 64, Attention(1.0, sliding_window=window), 16)

        @functools.partial(jax.jit, static_argnums=1)
        def schedule(contexts, tiling):
            arrays = (jnp.asarray(x, jnp.int32) for x in (starts, lengths, contexts, np.zeros(6)))
            return tiles.schedule(Sequences(*arrays, jnp.zeros((6, 40), jnp.int32)), tiling)

        def by_start(contexts, tiling):
            found, number = jax.tree.map(np.asarray, schedule(jnp.asarray(contexts), tiling))
            there = collections.defaultdict(list)
            for tile in filter(lambda tile: tile.length > 0, each_of(found)[:number]):
                there[int(tile.start)].append(tile)
            return there

        found = by_start(contexts, dataclasses.replace(whole, parts=parts))
        shares = []
        for start, [tile] in by_start(contexts, whole).items():
            own, blocks = found.pop(start), range(tile.first_block, tile.end_block)
            shares += [max(1, *(part.end_block - part.first_block for part in own), 0)]
            for field, value in tile._asdict().items():  # but for their blocks they are what the tile is
                if field not in ("first_block", "end_block", "part", "parts"):
                    chex.assert_trees_all_equal(*[getattr(part, field) for part in own], value)
            own = sorted(own, key=lambda part: part.part)
            self.assertEqual([(part.part, part.parts) for part in own], [(i, len(own)) for i in range(len(own))])
            self.assertEqual([b for part in own for b in range(part.first_block, part.end_block)], list(blocks))
            want = np.clip(-(-len(blocks) // parts.blocks), parts.least, parts.most)
            self.assertLessEqual(shares[-1], max(1, -(-len(blocks) // want)))
        self.assertEmpty(found)
        self.assertEqual(shares, sorted(shares, reverse=True))
        found, beside_others = (by_start(x, dataclasses.replace(whole, parts=parts)) for x in (contexts, others))
        for seq in (0, 4):
            chex.assert_trees_all_equal(found[int(starts[seq])], beside_others[int(starts[seq])])


class SupportsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("float32", dict(dtype="float32"), HOPPER, "float32"),
        ("head_dim", dict(head_dim=80), HOPPER, "head_dim of a multiple of 64 up to 576, not 80"),
        ("head_dim_too_large", dict(head_dim=640), HOPPER, "up to 576"),
        ("value_dim", dict(value_dim=72), HOPPER, "value_dim of a multiple of 64 up to 512, not 72"),
        ("value_dim_too_large", dict(value_dim=576), HOPPER, "up to 512"),
        ("value_dim_that_two_do_not_share", dict(value_dim=320), HOPPER, "multiple of 128 up to 512 with"),
        ("values_of_64_beside_wide_keys", dict(head_dim=512, value_dim=64), HOPPER, "head_dim or value_dim above 256"),
        ("latent_values_of_192", dict(features=("latent",), head_dim=256, value_dim=192), HOPPER, "a latent cache or"),
        ("float32_keys", dict(cache_dtype="float32", features=("quantised",)), HOPPER, "not in float32"),
        ("page_of_24", dict(page_size=24, cache_dtype="int8", features=("quantised",)), HOPPER, "64 in int8, not 24"),
        ("endless_pool", dict(num_pages=2**26), HOPPER, "at most 2147483647 rows"),
        ("ampere", {}, Device("cuda", "NVIDIA A100", "8.0"), "9.0"),
        ("blackwell", {}, Device("cuda", "NVIDIA B200", "10.0"), "10.0"),
        ("cpu", {}, Device("cpu"), "not on cpu"),
    )
    def test_refuses(self, changes, device, reason):
        self.assertIn(reason, KERNEL.supports(problem(**changes), device))

    @parameterized.product(
        device=(HOPPER, UNKNOWN),
        head_dim=(64, 128, 192, 256),
        page_size=(8, 16, 128, 192),
        pack=((1, 1), (16, 16), (5000, 1), (40000, 1)),
        features=((), ("quantised",), ("quantised", "slot_scales")),
    )
    def test_runs_with_sizes_that_fit(self, device, head_dim, page_size, pack, features):
        page_size = page_size if features else {8: 1, 192: 24}.get(page_size, page_size)  # which are gathered
        (tokens, seqs), group = pack, 7 if head_dim == 128 else 4
        given = problem(head_dim=head_dim, value_dim=head_dim, page_size=page_size, tokens=tokens, seqs=seqs,
                        q_heads=2 * group, features=features, cache_dtype="int8" if features else "bfloat16")
        self.assertIsNone(KERNEL.supports(given, device))
        configs = KERNEL.candidates(given, device)
        self.assertEqual(configs[0], KERNEL.heuristic(given, device))
        self.assertLen(set(configs), len(configs))
        launched = behind_widening(given)
        for config in configs:
            whole = config.block_kv % launched.page_size * (launched.page_size % config.block_kv) == 0
            self.assertEqual(whole, page_size != 24)
            self.assertGreaterEqual(config.num_stages, 1 if "quantised" in launched.features else 2)
            self.assertLessEqual(host.shared_bytes(launched, config), host.SHARED_BYTES)
            self.assertIsNone(KERNEL.misfit(given, device, config))

    @parameterized.product(
        dims=((512, 512, ()), (320, 128, ()), (64, 384, ()), (576, 512, ("latent",)), (128, 128, ("latent",)),
              (576, 512, ("quantised", "slot_scales")), (64, 384, ("quantised",)),
              (576, 512, ("latent", "quantised", "slot_scales"))),
        page_size=(8, 192),
        pack=((1, 1), (16, 16), (5000, 1)),
        group=(1, 12, 16, 128),
    )  # fmt: skip
    def test_two_warpgroups_share_the_rows_of_wide_heads(self, dims, page_size, pack, group):
        (head_dim, value_dim, features), (tokens, seqs) = dims, pack
        dtype = "float8_e5m2" if "quantised" in features else "bfloat16"
        given = problem(head_dim=head_dim, value_dim=value_dim, page_size=page_size, tokens=tokens, seqs=seqs,
                        q_heads=2 * group, features=features, cache_dtype=dtype)
        self.assertIsNone(KERNEL.supports(given, HOPPER))
        configs = KERNEL.candidates(given, HOPPER)
        self.assertEqual(configs[0], KERNEL.heuristic(given, HOPPER))
        self.check_wide(given, configs)
        with policy("invariant"):
            self.check_wide(given, [KERNEL.heuristic(given, HOPPER)])
        heads = 64 // configs[0].block_q
        self.assertLess(-(-group // heads) * heads, group + 8, "too many rows are empty")

    def check_wide(self, given, configs):
        for config in configs:
            self.assertEqual((config.block_kv, config.num_warps), (64, 12))
            self.assertLessEqual(host.shared_bytes(behind_widening(given), config), host.SHARED_BYTES)
            self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    @parameterized.parameters(
        (16, 1, 1), (16, 4, 4), (16, 5, 8), (32, 1, 1), (32, 3, 4), (64, 1, 1), (128, 1, 1), (128, 2, 2), (48, 1, 1),
        (12, 1, 1), (8, 1, 1), (24, 1, 1), (71, 1, 1), (71, 2, 2), (71, 7, 8), (12, 5, 8), (64, 100, 128),
    )  # fmt: skip
    def test_decode_steps_of_large_groups_have_few_empty_rows(self, group, tokens_per_seq, block_q):
        """What 64 rows can hold of a group is in one tile, whose keys are loaded once; single tokens have few rows."""
        given = problem(q_heads=2 * group, seqs=7, tokens=7 * tokens_per_seq)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(config.block_q, block_q)
        self.assertIsNone(KERNEL.misfit(given, HOPPER, config))
        if block_q < 8:
            self.assertEqual(config.num_warps, 8)
            sizes = dict(q_heads=2 * (64 // block_q // 2), cache_dtype="float8_e4m3fn", features=("quantised",))
            few = dataclasses.replace(given, **sizes)
            of_64_rows = dataclasses.replace(config, block_kv=64, fp8_terms=1)  # as products of 8 bits have
            self.assertIn("heads of a group", KERNEL.misfit(few, HOPPER, of_64_rows))

    @parameterized.product(cache_dtype=("float8_e4m3fn", "int8"), scales=((), ("slot_scales",)), head_dim=(64, 128, 256))
    def test_single_tokens_over_quantised_caches_have_few_rows(self, cache_dtype, scales, head_dim):
        dims = dict(head_dim=head_dim, value_dim=head_dim)
        given = problem(seqs=7, tokens=7, **dims, cache_dtype=cache_dtype, features=("quantised", *scales))
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(room.few_rows(given, config), 8)
        self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    def test_blocks_that_several_tiles_share_are_asked_for_before_they_are_copied(self):
        sizes = dict(latent=True, num_kv_heads=1, head_dim=576, value_dim=512, block_kv=64, block_q=1, tokens=64, tiles=64)
        asks = lambda **changes: plans.plan(**(sizes | dict(group=128) | changes)).asks_for_blocks
        self.assertTrue(asks())
        self.assertFalse(asks(group=64))
        self.assertFalse(asks(cache_dtype="float8_e4m3fn"))
        self.assertFalse(asks(tokens=2048))

    @parameterized.parameters(
        (dict(num_warps=16), "num_warps must be 12"), (dict(block_kv=128), "block_kv must be 64"),
        (dict(block_q=128), "block_q must divide"), (dict(block_q=4), "at least 8, or 1, 2 or 4 where"),
        (dict(num_stages=2), "num_stages"),
    )
    def test_sizes_that_do_not_fit_wide_heads(self, sizes, reason):
        given = problem(head_dim=512, value_dim=512)
        config = dataclasses.replace(KERNEL.heuristic(given, HOPPER), **sizes)
        self.assertIn(reason, KERNEL.misfit(given, HOPPER, config))

    @parameterized.named_parameters(
        ("many_tiles", dict(tokens=8192), 16),
        ("few_tiles", dict(tokens=2048), 12),
        ("empty_rows", dict(tokens=200 * 64, seqs=64), 12),
        ("other_dims", dict(tokens=8192, head_dim=64), 12),
        ("a_last_round_nearly_full", dict(tokens=4096, q_heads=64, pages_per_seq=2048), 16),  # 10.7 of 11
        ("a_last_round_hardly_begun", dict(tokens=4096, num_kv_heads=4, pages_per_seq=2048), 12),  # 5.3 of 6
        ("the_same_beside_short_tiles", dict(tokens=4096, num_kv_heads=4, pages_per_seq=256, attn_logits_soft_cap=50.0), 16),
        ("tiles_of_few_keys", dict(tokens=4096, pages_per_seq=256), 12),
        ("ranges", dict(tokens=8192, features=frozenset({"key_ranges"})), 12),
    )
    def test_three_warpgroups_where_they_are_busy(self, changes, num_warps):
        given = problem(**dict(q_heads=32, num_kv_heads=8, pages_per_seq=512) | changes)
        self.assertEqual(KERNEL.heuristic(given, HOPPER).num_warps, num_warps)
        self.assertEqual({c.num_warps for c in KERNEL.candidates(given, HOPPER)}, {8, 12, 16})

    @parameterized.named_parameters(
        ("one_prompt", {}, 128), ("odd_groups", dict(tokens=4096, q_heads=24), 256),
        ("few_tokens_each", dict(tokens=32 * 60, seqs=32), 64), ("decode_steps", dict(tokens=512, seqs=512), None),
        ("few_tiles", dict(tokens=512), None), ("short_prompts", dict(tokens=4096, seqs=4, pages_per_seq=64), 128),
        ("a_short_prompt", dict(pages_per_seq=64, tokens=1024), None), ("cap", dict(attn_logits_soft_cap=50.0), None),
    )
    def test_four_warpgroups_of_64_features_where_they_are_busy(self, changes, block_q):
        sizes = dict(tokens=2048, pages_per_seq=128, q_heads=32, num_kv_heads=8, head_dim=64, value_dim=64)
        config = KERNEL.heuristic(problem(**sizes | changes), HOPPER)
        self.assertEqual((config.block_q if config.num_warps == 20 else None), block_q)

    @parameterized.named_parameters(
        ("many_tiles_of_many_keys", {}, 128), ("few_tiles", dict(tokens=2048, pages_per_seq=1024), 64),
        ("few_keys", dict(tokens=4096, pages_per_seq=256), 64),
        ("window", dict(sliding_window=1024), 64), ("ranges", dict(features=frozenset({"key_ranges"})), 64),
        ("rows_stay_empty", dict(tokens=64 * 192, seqs=64), 64),
        ("other_dims", dict(head_dim=192, value_dim=192), 64),
    )
    def test_tiles_of_one_wide_head_where_they_are_busy(self, changes, block_q):
        wide = dict(tokens=8192, pages_per_seq=512, q_heads=16, num_kv_heads=8, head_dim=256, value_dim=256)
        self.assertEqual(KERNEL.heuristic(problem(**wide | changes), HOPPER).block_q, block_q)

    @parameterized.named_parameters(
        ("short_prompts", {}, 2), ("of_64_features", dict(head_dim=64, value_dim=64), 2),
        ("long_contexts", dict(pages_per_seq=512), 1), ("long_prompts", dict(tokens=8 * 1024, pages_per_seq=128), 1),
        ("a_short_window", dict(pages_per_seq=512, sliding_window=300), 2), ("decode_steps", dict(tokens=8), 1),
        ("decode_steps_that_fill_the_chip", dict(tokens=64, seqs=64, pages_per_seq=512), 2),
        ("drafts_that_do", dict(tokens=32 * 4, seqs=32, pages_per_seq=512), 2),
        ("decode_steps_of_other_dims", dict(tokens=64, seqs=64, head_dim=64, value_dim=64), 1),
        ("no_room", dict(head_dim=256, value_dim=256), 1),
        ("wide", dict(head_dim=512, value_dim=512), 1), ("quantised", dict(cache_dtype="int8", features=("quantised",)), 1),
    )
    def test_tiles_of_short_prompts_go_side_by_side(self, changes, teams):
        """Where two have room, and few keys: else more rows share what is loaded."""
        given = problem(**dict(tokens=8 * 100, seqs=8, q_heads=32, num_kv_heads=8, pages_per_seq=32) | changes)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(host._teams(given, config), teams)
        for config in KERNEL.candidates(given, HOPPER):
            of_all = host._teams(given, config) * (host.shared_bytes(given, config) - host.RESERVED_BYTES)
            self.assertLessEqual(of_all + host.RESERVED_BYTES, host.SHARED_BYTES)

    def test_a_row_of_short_prompts_is_one_of_two_heads_or_four(self):
        for group, tokens, block_q in ((1, 100, 64), (4, 100, 32), (4, 40, 16), (7, 40, 64), (6, 40, 32)):
            given = problem(tokens=8 * tokens, seqs=8, q_heads=2 * group, pages_per_seq=32)
            self.assertEqual(KERNEL.heuristic(given, HOPPER).block_q, block_q)


class PlanTest(parameterized.TestCase):
    plan = staticmethod(plans.plan)

    @parameterized.parameters(1e-3, 1.0, 30.0, 50.0, 51.9)
    def test_weights_by_the_fixed_maximum_stay_in_range(self, soft_cap):
        maximum = self.plan(soft_cap=soft_cap).fixed_maximum
        smallest, largest = (soft_cap * (logit - maximum) / np.log(2) for logit in (-1, 1))
        self.assertGreaterEqual(round(smallest, 6), -110)
        self.assertLessEqual(largest, 40)
        self.assertGreaterEqual(largest, 0)

    @parameterized.parameters(
        dict(soft_cap=None), dict(soft_cap=60.0), dict(soft_cap=1e4), dict(warpgroups=1), dict(dtype="float16"),
        dict(head_dim=512),
    )
    def test_a_maximum_is_looked_for_where_no_fixed_one_does(self, **changes):
        self.assertIsNone(self.plan(**changes).fixed_maximum)

    @parameterized.parameters(
        (dict(), True), (dict(softmax_scale=-3.0), True), (dict(soft_cap=19.9), False), (dict(soft_cap=60.0), False),
        (dict(soft_cap=None), False), (dict(dtype="float16"), False), (dict(warpgroups=3), True),
    )
    def test_warpgroups_take_turns_where_no_polynomial_makes_a_step_short(self, changes, has_polynomial):
        """A block that is weighed again has no turn of its own: with turns, its products would pass one on."""
        plan = self.plan(**changes)
        self.assertEqual(plan.polynomial is not None, has_polynomial)
        self.assertEqual(plan.takes_turns, plan.warpgroups == 2 and not has_polynomial)

    @parameterized.parameters(
        (dict(), False), (dict(head_dim=64, value_dim=64), True), (dict(block_kv=64), True),
        (dict(head_dim=256, value_dim=256, block_kv=64), False), (dict(warpgroups=3, block_kv=64), False),
    )
    def test_weights_are_rounded_late_where_registers_allow(self, changes, late):
        self.assertEqual(self.plan(soft_cap=None, **changes).rounds_late, late)

    @parameterized.parameters(
        (dict(block_q=1), (64, 1)), (dict(block_q=4), (16, 4)), (dict(block_q=8), (8, 8)), (dict(block_q=64), (1, 64)),
    )  # fmt: skip
    def test_each_row_of_a_wide_tile_is_a_head_and_a_token(self, changes, sizes):
        """Those that are copied together lie together in the query: a token's heads, or a head's tokens."""
        plan = self.plan(soft_cap=None, head_dim=512, value_dim=512, **changes)
        rows = [plan.head_and_token(row) for row in range(plan.rows)]
        self.assertLen(rows, 64)
        self.assertEqual(sorted(rows), sorted(np.ndindex(sizes)))
        self.assertGreaterEqual(plan.slab, 8)
        for first in range(0, 64, plan.slab):
            for row in range(plan.slab):
                head, token = rows[first]
                step = (row, 0) if plan.by_token else (0, row)
                self.assertEqual(rows[first + row], (head + step[0], token + step[1]))

    def test_two_warpgroups_share_a_wide_block_and_its_output(self):
        wide = functools.partial(self.plan, soft_cap=None, head_dim=512, value_dim=512, block_q=1, block_kv=64)
        latent, quantised = functools.partial(wide, head_dim=576, latent=True), dict(cache_dtype="int8", key_scale="head")
        plans = (wide(), True, 64), (latent(), True, 64), (wide(**quantised), False, 32), (latent(**quantised), False, 32)
        for plan, alternates, keys in plans:
            self.assertEqual((plan.rows, plan.logit_columns, plan.output_columns, plan.slabs), (64, keys, 256, 1))
            self.assertEqual((plan.alternates, plan.takes_turns), (alternates, False))
        plan = self.plan(soft_cap=None)
        self.assertEqual((plan.rows, plan.logit_columns, plan.output_columns), (128, 128, 128))

    @parameterized.parameters("kpsd", *layouts.NAMES)
    def test_keys_values_and_scales_of_slots_are_found_in_every_layout(self, name):
        """Each number says whose it is: pool, head, page and slot, and whether of a key or a value."""
        whose = np.arange(2 * 3 * 2 * 5 * 8, dtype=np.int32).reshape(2, 3, 2, 5, 8)
        given = dict(key_cache=whose[0][..., None], value_cache=whose[1][..., None])
        given |= dict(key_scale=whose[0], value_scale=whose[1])
        laid = given if name == "kpsd" else layouts.lay(given, name)
        rows = LAYOUTS[name].rows(dict(kv_heads=2, num_pages=5, page_size=8))
        plan = self.plan(page_size=8, num_pages=5, pools=3, pool_rows=rows["pool"], head_rows=rows["kv_heads"],
                         page_rows=rows["num_pages"], slot_rows=rows["page_size"], value_rows=rows.get("2", 0))
        pool, head, page, slot = jnp.indices(whose.shape[1:], jnp.int32)
        piece = mock.Mock(first_row=pool * plan.pool_rows + head * plan.head_rows)
        for kind, beside, want in zip(("key", "value"), (0, plan.value_rows), whose):
            holder = "key" if name in layouts.COMBINED else kind
            place = piece, page, 8 + slot, beside
            cache = np.asarray(laid[f"{holder}_cache"]).reshape(-1, plan.slot_rows)
            chex.assert_trees_all_equal(cache[plan.row_of(*place), plan.in_slot(piece, beside)], want)
            chex.assert_trees_all_equal(np.ravel(laid[f"{holder}_scale"])[plan.place_of_scale(*place)], want)

    @parameterized.parameters("tensor", "head", "slot", None)
    def test_numbers_of_8_bits_stay_what_they_are(self, scale):
        plan = self.plan(cache_dtype="int8", key_scale=scale, value_scale=scale)
        self.assertEqual((plan.quantised, plan.product_dtype), (True, "float16"))

    def test_teams_have_blocks_of_their_own(self):
        plan = self.plan(teams=2, warpgroups=1, stages=3)
        slots = [[int(plan.slot_of(team, jnp.int32(step))) for step in range(5)] for team in (0, 1)]
        self.assertEqual(slots, [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]])
        self.assertEqual((plan.registers, plan.rows), (REGISTERS[2, False], 64))

    def test_registers_of_a_block_are_what_the_chip_has(self):
        wide = zip(((2, False), (2, True)), WIDE_REGISTERS.values())
        for (warpgroups, quantised), registers in [*REGISTERS.items(), *wide]:
            head_dim, dtype = 512 if registers in WIDE_REGISTERS.values() else 128, "int8" if quantised else "bfloat16"
            plan = self.plan(warpgroups=warpgroups, cache_dtype=dtype, head_dim=head_dim, value_dim=head_dim)
            others = plan.loading_warpgroups
            threads = 128 * (warpgroups + others)
            start = min(65536 // threads // 8 * 8, 255)
            computes, *loads = [number or start for number in registers[: 1 + others]]
            self.assertLessEqual(128 * (warpgroups * computes + sum(loads)), start * threads)


class LoweringTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("chunk", {}, {}), ("decode", dict(seqs=16, tokens=16), {}),
        ("dims", dict(head_dim=64, value_dim=256), dict(attn_logits_soft_cap=30.0)),
        ("small_cap", {}, dict(attn_logits_soft_cap=15.0)),
        ("large_cap", {}, dict(attn_logits_soft_cap=70.0)), ("window", dict(q_heads=10), dict(sliding_window=50)),
        ("split", dict(dtype=jnp.float16), dict(cfg=PrefillPageAttentionConfig(num_splits=4))),
        ("long_tiles", dict(seqs=16, tokens=16, q_heads=32, kv_heads=8, pages_per_seq=2000), {}),
        ("long_tiles_of_wide_heads", dict(seqs=99, tokens=99, head_dim=512, pages_per_seq=2000), {}),
        ("three_warpgroups", dict(tokens=8192, q_heads=32, kv_heads=8), {}),
        ("four_warpgroups", dict(tokens=2048, q_heads=32, kv_heads=8, head_dim=64), {}),
        ("two_teams", dict(seqs=3, pages_per_seq=20), {}),
        ("two_teams_of_parts", dict(seqs=99, tokens=99, q_heads=32, kv_heads=8, pages_per_seq=2000),
         dict(cfg=PrefillPageAttentionConfig(block_q=16, block_kv=64, num_warps=8, num_stages=2))),
        ("heads_of_a_token_together", dict(seqs=9, tokens=18, q_heads=64), dict(attn_logits_soft_cap=30.0)),
        ("more_heads_of_a_token_than_there_are", dict(seqs=9, tokens=9, q_heads=71, kv_heads=1), {}),
        ("pages_of_1", dict(page_size=1), {}), ("pages_of_24_of_wide_heads", dict(page_size=24, head_dim=512), {}),
        ("steps_over_pages_of_1", dict(seqs=16, tokens=16, page_size=1), {}),
        ("wide_heads", dict(head_dim=512, value_dim=512), {}),
        ("wide_values", dict(head_dim=64, value_dim=384), dict(sliding_window=50)),
        ("wide_keys", dict(head_dim=576, value_dim=128), dict(attn_logits_soft_cap=30.0)),
        ("a_page_table_of_more_slots_than_int32_counts", dict(page_size=2**16, pages_per_seq=2**15 + 1), {}),
    )
    def test_lowers_for_cuda_where_there_is_no_gpu(self, operands, parameters):
        call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, **parameters))
        text = call.trace(*shapes(**operands)).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("mosaic_gpu", text)

    @parameterized.product(ranges=(False, True), words=(0, 1, 40), kind=("usual", "latent", "short", "few_rows"))
    def test_lowers_with_every_operand_that_it_takes(self, ranges, words, kind):
        # What hides keys and how rows lie is in all combinations; caps and sinks, which neither asks about, in all pairs.
        soft_cap = 50.0 if (words == 40) ^ (kind in ("latent", "few_rows")) else None
        sinks = ranges ^ (words == 1) ^ (soft_cap is None)  # with and without each of the others, and with all of them
        sizes = dict(latent=dict(q_heads=128, kv_heads=1, head_dim=576), short=dict(pages_per_seq=20)).get(kind, {})
        operands = dict(zip(packs.Pack._fields, shapes(seqs=3, tokens=24 if words == 1 else 100, **sizes)))
        own = dict(value_dim=512, value_cache=None) if kind == "latent" else {}
        if kind == "few_rows":
            own = dict(cfg=PrefillPageAttentionConfig(block_q=4, block_kv=64, num_warps=8, num_stages=2))
        operands = {name: shape for name, shape in operands.items() if name not in own}
        tokens, q_heads, _ = operands["query"].shape
        operands |= {"key_ranges": jax.ShapeDtypeStruct((tokens, 2), jnp.int32)} if ranges else {}
        operands |= {"tree_mask": jax.ShapeDtypeStruct((tokens, words), jnp.uint32)} if words else {}
        operands |= {"sinks": jax.ShapeDtypeStruct((q_heads,), jnp.float32)} if sinks else {}
        window = None if ranges or sinks else 50
        call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", attn_logits_soft_cap=soft_cap,
                                         sliding_window=window, **own))
        self.assertIn("mosaic_gpu", call.trace(**operands).lower(lowering_platforms=("cuda",)).as_text())

    @parameterized.parameters(
        *pairs(
            cache_dtype=("int8", "float8_e4m3fn", "float8_e5m2"),
            scale=(None, (), (2,), (2, 64, 16)),
            kind=(dict(seqs=16, tokens=16), dict(dtype=jnp.float16, head_dim=256), dict(head_dim=192, value_dim=64)),
        )
    )
    def test_lowers_for_quantised_caches(self, cache_dtype, scale, kind):
        soft_cap = 50.0 if (cache_dtype == "int8") == (scale in (None, (2,))) else None  # of each, some with and without
        operands = dict(zip(packs.Pack._fields, shapes(**kind)))
        for name in ("key", "value"):
            operands[f"{name}_cache"] = jax.ShapeDtypeStruct(operands[f"{name}_cache"].shape, cache_dtype)
            operands |= {} if scale is None else {f"{name}_scale": jax.ShapeDtypeStruct(scale, jnp.float32)}
        call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", attn_logits_soft_cap=soft_cap))
        self.assertIn("mosaic_gpu", call.trace(**operands).lower(lowering_platforms=("cuda",)).as_text())

    @parameterized.parameters(
        *pairs(
            kind=(("int8", None), ("float8_e5m2", 50.0)),
            scale=(None, (1,), (1, 64, 16)),
            dims=((576, 512, True), (192, 128, True), (512, 512, False), (320, 384, False)),
        )
    )
    def test_lowers_for_quantised_caches_of_wide_heads(self, kind, scale, dims):
        (cache_dtype, soft_cap), (head_dim, value_dim, latent) = kind, dims
        sizes = dict(q_heads=16, kv_heads=1, head_dim=head_dim, value_dim=value_dim)
        operands = dict(zip(packs.Pack._fields, shapes(**sizes)))
        for name in ("key",) if latent else ("key", "value"):
            operands[f"{name}_cache"] = jax.ShapeDtypeStruct(operands[f"{name}_cache"].shape, cache_dtype)
            operands |= {} if scale is None else {f"{name}_scale": jax.ShapeDtypeStruct(scale, jnp.float32)}
        operands |= dict(value_cache=None) if latent else {}
        own = dict(platform="cuda", attn_logits_soft_cap=soft_cap) | (dict(value_dim=value_dim) if latent else {})
        call = jax.jit(functools.partial(ragged_paged_prefill, **own))
        self.assertIn("mosaic_gpu", call.trace(**operands).lower(lowering_platforms=("cuda",)).as_text())

    @parameterized.parameters(
        *pairs(
            name=layouts.NAMES,
            scale=((), (2,), (2, 64, 16)),
            kind=(dict(seqs=16, tokens=16), dict(dtype=jnp.float16, head_dim=64)),
        )
    )
    def test_lowers_for_quantised_caches_in_every_layout(self, name, scale, kind):
        """All dtypes are loaded alike, before they are widened."""
        shaped = dict(zip(packs.Pack._fields, shapes(**kind)))
        operands = {f"{x}_cache": np.zeros(shaped[f"{x}_cache"].shape, np.int8) for x in ("key", "value")}
        operands |= {f"{x}_scale": np.zeros(scale, np.float32) for x in ("key", "value")}
        operands = shaped | layouts.lay(operands, name)
        call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", cache_layout=name))
        self.assertIn("mosaic_gpu", call.trace(**operands).lower(lowering_platforms=("cuda",)).as_text())

    @parameterized.named_parameters(
        ("chunk", {}, {}),
        ("decode", dict(seqs=16, tokens=16), dict(cfg=PrefillPageAttentionConfig(num_splits=2))),
        ("wide_heads", dict(head_dim=512, value_dim=512), dict(sliding_window=50, attn_logits_soft_cap=30.0)),
        ("float16", dict(dtype=jnp.float16), dict(platform="pallas")),
    )
    def test_the_program_is_the_same_with_x64_on(self, operands, parameters):
        def program():
            call = functools.partial(ragged_paged_prefill, **dict(platform="cuda", return_lse=True) | parameters)
            return jax.jit(call).trace(*shapes(**operands)).lower(lowering_platforms=("cuda",)).as_text()

        narrow = program()
        with jax.enable_x64(True):
            self.assertEqual(program(), narrow)

    @parameterized.parameters(1, 3)
    def test_sinks_have_their_part_before_results_are_rounded(self, num_splits):
        """The results are those of the kernel, or of the one merge."""
        operands = dict(zip(packs.Pack._fields, shapes(seqs=3))) | {"sinks": jax.ShapeDtypeStruct((8,), jnp.float32)}
        call = functools.partial(ragged_paged_prefill, platform="cuda",
                                 cfg=PrefillPageAttentionConfig(num_splits=num_splits))
        with mock.patch.object(Call, "with_sinks", side_effect=AssertionError("sinks join after the kernel")):
            text = jax.jit(call).trace(**operands).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("mosaic_gpu", text)

    @parameterized.named_parameters(
        ("rows", dict(block_q=100), "block_q"),
        ("keys", dict(block_kv=96), "block_kv"),
        ("warps", dict(num_warps=4), "num_warps"),
        ("registers", dict(num_warps=16, block_q=192, block_kv=128), "num_warps"),
        ("stages", dict(num_stages=9), "num_stages"),
    )
    def test_sizes_that_do_not_fit_are_named(self, sizes, name):
        call = functools.partial(ragged_paged_prefill, platform="cuda", cfg=PrefillPageAttentionConfig(**sizes))
        with self.assertRaisesRegex(ValueError, f"mosaic_gpu: cfg.{name} .*sizes from: cfg"):
            jax.jit(call).trace(*shapes()).lower(lowering_platforms=("cuda",))


if __name__ == "__main__":
    absltest.main()
