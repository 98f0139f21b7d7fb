"""Which sizes the Hopper kernel chooses for a call: warpgroups, tokens of a tile, teams."""

import dataclasses

from absl.testing import absltest, parameterized

from paged_prefill.lowering.mosaic_gpu import host, room
from paged_prefill.tests.mosaic_gpu_test import HOPPER, KERNEL, QUANTISED, problem


class SizesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("many_tiles", dict(tokens=8192), 16),
        ("few_tiles", dict(tokens=1024), 12),
        ("empty_rows", dict(tokens=200 * 64, seqs=64), 12),
        ("other_dims", dict(tokens=8192, head_dim=64), 12),
        ("a_last_round_nearly_full", dict(tokens=4096, q_heads=64, pages_per_seq=2048), 16),  # 10.7 of 11
        ("a_last_round_hardly_begun", dict(tokens=4096, num_kv_heads=4, pages_per_seq=2048), 12),  # 5.3 of 6
        ("the_same_beside_short_tiles", dict(tokens=4096, num_kv_heads=4, pages_per_seq=256, attn_logits_soft_cap=50.0), 16),
        ("tiles_of_few_keys", dict(tokens=2048, q_heads=64, pages_per_seq=128), 12),
        ("three_rounds_for_five", dict(tokens=3000, q_heads=24, pages_per_seq=313), 16),  # 2.9, and of two 4.4
        ("four_rounds_for_three", dict(tokens=2048, pages_per_seq=1024), 12),  # but of more rows: 3.9, and of three 2.7
        ("a_last_tile_of_few_rows", dict(tokens=1200, q_heads=40, pages_per_seq=438), 16),  # 3.03 rounds of two take 4
        ("a_last_tile_of_one_token", dict(tokens=3841, pages_per_seq=1090), 12),  # 5.1 rounds of three, 7.5 of two
        ("a_last_round_begun_by_half", dict(tokens=2151, q_heads=24, pages_per_seq=1177), 16),
        ("a_long_prompt_with_a_window", dict(tokens=8192, sliding_window=1024), 16),
        ("narrow_heads", dict(tokens=8192, head_dim=80, value_dim=112), 16),
        ("narrow_heads_with_a_window", dict(tokens=8192, head_dim=96, value_dim=96, sliding_window=1024), 16),
        ("narrow_heads_over_a_long_context", dict(tokens=2048, head_dim=96, value_dim=96, pages_per_seq=1024), 12),
        ("ranges", dict(tokens=8192, features=frozenset({"key_ranges"})), 12),
    )
    def test_three_warpgroups_where_they_are_busy(self, changes, num_warps):
        given = problem(**dict(q_heads=32, num_kv_heads=8, pages_per_seq=512) | changes)
        self.assertEqual(KERNEL.heuristic(given, HOPPER).num_warps, num_warps)
        near = {8, 12, 16} if num_warps == 12 else {12, 16}  # teams of two heads have tiles of a sixth of the tokens
        self.assertContainsSubset(near, {c.num_warps for c in KERNEL.candidates(given, HOPPER)})

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

    def test_few_rows_of_wide_heads_are_no_tiles_of_one_head(self):
        """Steps of a token or two, beside so many others that tiles fill the chip for several rounds, over long tables."""
        given = problem(tokens=196, seqs=144, q_heads=8, num_kv_heads=4, head_dim=256, value_dim=256, pages_per_seq=16340)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertIsNotNone(room.few_rows(given, config))
        self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    @parameterized.named_parameters(
        ("short_prompts", {}, 2), ("of_64_features", dict(head_dim=64, value_dim=64), 2),
        ("long_contexts", dict(pages_per_seq=2048), 1), ("long_prompts", dict(tokens=8 * 1024, pages_per_seq=128), 1),
        ("a_short_window", dict(pages_per_seq=512, sliding_window=300), 2), ("decode_steps", dict(tokens=8), 1),
        ("decode_steps_that_fill_the_chip", dict(tokens=64, seqs=64, pages_per_seq=512), 2),
        ("drafts_that_do", dict(tokens=32 * 4, seqs=32, pages_per_seq=512), 2),
        ("drafts_of_narrow_heads", dict(tokens=32 * 4, seqs=32, pages_per_seq=512, head_dim=96, value_dim=96), 2),
        ("decode_steps_of_narrow_heads", dict(tokens=64, seqs=64, pages_per_seq=512, head_dim=96, value_dim=96), 1),
        ("decode_steps_of_other_dims", dict(tokens=64, seqs=64, head_dim=64, value_dim=64), 1),
        ("no_room", dict(head_dim=256, value_dim=256), 1),
        ("wide", dict(head_dim=512, value_dim=512), 1), ("quantised", dict(cache_dtype="int8", features=("quantised",)), 1),
        ("a_wide_table", dict(pages_per_seq=256), 2), ("one_prompt_in_it", dict(seqs=1, tokens=100, pages_per_seq=256), 1),
    )
    def test_tiles_of_short_prompts_go_side_by_side(self, changes, teams):
        """Where two have room, and few keys: else more rows share what is loaded."""
        given = problem(**dict(tokens=8 * 100, seqs=8, q_heads=32, num_kv_heads=8, pages_per_seq=32) | changes)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(host.teams_of(given, config), teams)
        for config in KERNEL.candidates(given, HOPPER):
            of_all = host.teams_of(given, config) * (host.shared_bytes(given, config) - room.RESERVED_BYTES)
            self.assertLessEqual(of_all + room.RESERVED_BYTES, host.SHARED_BYTES)

    @parameterized.named_parameters(
        ("quantised", dict(**QUANTISED), 16), ("of_narrow_heads", dict(head_dim=64, value_dim=64, **QUANTISED), 16),
        ("of_six_heads", dict(q_heads=24, **QUANTISED), 16), ("of_four", dict(q_heads=16, **QUANTISED), None),
        ("four_tokens", dict(tokens=64, **QUANTISED), None), ("in_16_bits", {}, None),
        ("a_prompt_beside_steps", dict(tokens=15 + 16, **QUANTISED), None),
        ("wide", dict(head_dim=512, value_dim=512), 16), ("four_wide", dict(tokens=64, head_dim=512, value_dim=512), None),
        ("wide_and_quantised", dict(head_dim=512, value_dim=512, **QUANTISED), None),
    )
    def test_two_tokens_of_eight_heads_are_few_rows(self, changes, rows):
        """Over quantised caches, which nobody else widens then, and of wide heads; by 8 tokens most rows would be empty."""
        given = problem(**dict(tokens=32, seqs=16, q_heads=32, num_kv_heads=4, pages_per_seq=256) | changes)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(room.few_rows(given, config), rows)
        self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    @parameterized.named_parameters(
        ("one_head_a_group", {}, 64), ("of_96_features", dict(head_dim=96, value_dim=96), 64),
        ("of_192", dict(head_dim=192), 64), ("of_256", dict(head_dim=256, value_dim=256), 64),
        ("drafts", dict(tokens=54 * 8), 8), ("few_tiles", dict(q_heads=2, num_kv_heads=2), 16),
        ("one_sequence", dict(seqs=1, tokens=10, q_heads=256, num_kv_heads=256), 16),
        ("a_tree", dict(features=frozenset({"tree_mask"})), 16),
    )
    def test_a_prompt_beside_steps_does_not_read_its_keys_by_a_few_rows(self, changes, block_q):
        """Where its tokens may be all but one of each other sequence: by 16 of 443 tokens it would 28 times."""
        given = problem(**dict(tokens=53 + 443, seqs=54, q_heads=32, num_kv_heads=32, pages_per_seq=256) | changes)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(config.block_q, block_q)
        self.assertEqual(room.few_rows(given, config), None if block_q == 64 else block_q)

    def test_tiles_of_packs_are_those_of_drafts_and_of_one_prompt(self):
        given = problem(tokens=53 + 443, seqs=54, pages_per_seq=256)
        self.assertEqual(room.tiles_of_packs(given, 16), (54, 53 + 28))
        self.assertEqual(room.tiles_of_packs(given, 8), (2 * 54, 53 + 56))
        self.assertEqual(room.tiles_of_packs(dataclasses.replace(given, pages_per_seq=4), 16), (54, 53 + 4))

    @parameterized.parameters(("bfloat16", 2, 1), ("int8", 1, 2), ("float8_e4m3fn", 1, 2))
    def test_steps_beside_a_prompt_have_one_warpgroup_where_caches_are_widened(self, cache_dtype, number, of_prompts):
        features = () if cache_dtype == "bfloat16" else ("quantised",)
        call = dict(seqs=104, q_heads=32, num_kv_heads=2, pages_per_seq=512, cache_dtype=cache_dtype, features=features)
        sizes = lambda tokens: KERNEL.heuristic(problem(**call, tokens=104 * tokens), HOPPER)
        self.assertEqual((host.warpgroups_of(sizes(5)), host.warpgroups_of(sizes(40))), (number, of_prompts))

    @parameterized.product(
        cache_dtype=("bfloat16", "float8_e4m3fn", "int8"), dims=((64, 64), (128, 128), (192, 128), (256, 256)),
        slot_scales=(False, True),
    )  # fmt: skip
    def test_a_short_prompt_of_few_tiles_has_the_smallest(self, cache_dtype, dims, slot_scales):
        """Also over quantised caches: more thread blocks widen, each less."""
        features = () if cache_dtype == "bfloat16" else ("quantised", "slot_scales")[: 1 + slot_scales]
        call = dict(tokens=197, seqs=1, q_heads=8, num_kv_heads=2, head_dim=dims[0], value_dim=dims[1])
        given = problem(**call, page_size=64, pages_per_seq=5, cache_dtype=cache_dtype, features=features)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual(host.rows_of(given, config), 64)
        self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    @parameterized.parameters(
        (445, 27784, (2, 1, 256), dict(sliding_window=1024), 1),
        (300, 2000, (4, 1, 128), {}, 1),
        (400, 4096, (4, 4, 64), {}, 1),
        (12, 1500, (64, 8, 128), {}, 1),
        (35, 1712, (8, 1, 128), {}, 1),
        (5, 1664, (71, 1, 64), {}, 2),  # drafts
        (28, 1700, (28, 4, 128), {}, 1),  # eight heads in a tile, of which one is nobody's
        (200, 8192, (8, 2, 128), {}, 2),  # parts of 2000 keys
        (454, 1373, (9, 3, 64), {}, 2),  # tiles of one warpgroup for half of the cores, which are not cut
        (151, 1062, (28, 4, 128), {}, 2),
        (300, 2000, (4, 1, 128), dict(attn_logits_soft_cap=50.0), 1),
        (300, 2000, (4, 1, 128), dict(features=frozenset({"key_ranges"})), 2),
    )  # fmt: skip
    def test_a_lone_chunk_of_short_parts_has_tiles_of_one_warpgroup(self, tokens, context, heads, changes, warpgroups):
        """By two, twice as many parts of it were merged: 14.0 us for 10.7, with a window and 256 features 19.2 for 12.5."""
        q_heads, kv_heads, dim = heads
        sizes = dict(q_heads=q_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads, head_dim=dim, value_dim=dim)
        given = problem(tokens=tokens, pages_per_seq=-(-context // 16), **sizes, **changes)
        self.assertEqual(host.warpgroups_of(KERNEL.heuristic(given, HOPPER)), warpgroups)

    @parameterized.parameters((20, 1200, 16, 4, 32), (17, 1685, 32, 4, 8), (60, 1200, 8, 2, 64), (40, 1500, 64, 8, 8))
    def test_a_lone_chunk_of_few_tokens_has_the_fewest_tiles_and_of_these_the_emptiest(
        self, tokens, context, q_heads, kv_heads, block_q
    ):
        heads = dict(q_heads=q_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads)
        config = KERNEL.heuristic(problem(tokens=tokens, pages_per_seq=-(-context // 16), **heads), HOPPER)
        self.assertEqual((config.num_warps, config.block_q), (8, block_q))

    @parameterized.parameters(
        (5, 80, 1248, 6, 1, 1, 8),  # a step's heads are one tile, which four in a tile would make two
        (3, 29, 3536, 20, 4, 1, 8),
        (5, 277, 5200, 2, 1, 1, 32),
        (6, 180, 5200, 28, 4, 2, 16),  # tiles of 64 rows for most cores, which are not cut
    )
    def test_a_chunk_beside_steps_has_tiles_of_one_warpgroup_if_these_are_cut(
        self, seqs, tokens, context, q_heads, kv_heads, warpgroups, block_q
    ):
        """By two they took 12.1 us for 7.6: what takes turns is longer on its way through a few blocks."""
        heads = dict(q_heads=q_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads)
        given = problem(tokens=tokens, seqs=seqs, pages_per_seq=-(-context // 16), **heads)
        config = KERNEL.heuristic(given, HOPPER)
        self.assertEqual((host.warpgroups_of(config), config.block_q), (warpgroups, block_q))

    def test_a_row_of_short_prompts_is_one_of_two_heads_or_four(self):
        for group, tokens, block_q in ((1, 100, 64), (4, 100, 32), (4, 40, 16), (7, 40, 64), (6, 40, 32)):
            given = problem(tokens=8 * tokens, seqs=8, q_heads=2 * group, pages_per_seq=32)
            self.assertEqual(KERNEL.heuristic(given, HOPPER).block_q, block_q)

    @parameterized.parameters(
        (1, 2048, 4, 128), (1, 1984, 4, 128), (1, 71, 4, 32), (8, 71, 4, 32), (8, 512, 4, 64), (8, 2048, 4, 128), (8, 71, 6, 64), (8, 71, 7, 128)
    )
    def test_tiles_have_tokens_of_one_head_unless_many_rows_would_be_empty(self, seqs, tokens, group, block_q):
        """Of prompts that differ, half of the last tile is, of as many tokens as there are."""
        given = problem(tokens=seqs * tokens, seqs=seqs, q_heads=2 * group, pages_per_seq=8192)
        self.assertEqual(KERNEL.heuristic(given, HOPPER).block_q, block_q)


if __name__ == "__main__":
    absltest.main()
