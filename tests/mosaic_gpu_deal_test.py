"""How small parts of tiles are where contexts may differ: the estimate, and what it chooses."""

import functools
import math
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import deal, host, parts as parts_module, rounds
from paged_prefill.lowering.tiles import Parts
from paged_prefill.tests import problems

KERNEL, HOPPER = host.MosaicGpu(), Device("cuda", "NVIDIA H200", "9.0")
LATENT = dict(head_dim=576, value_dim=512, q_heads=128, features=frozenset({"latent"}))
BYTES_A_US = 22800  # of an H100's memory, a core


def launch(**changes):
    sizes = dict(seqs=9, head_tiles=10, capacity=12000, most_keys=12000, block_kv=128, block_bytes=2**16)
    sizes |= dict(held=10**9, result_bytes=2**18, slots=132, cores=132, smallest=2**17)
    return deal.Launch(**(sizes | changes))


def parts_of(seqs, context, q_heads=32, kv_heads=8, *, tokens=1, **changes):
    sizes = dict(tokens=tokens * seqs, seqs=seqs, q_heads=q_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads)
    problem = problems.problem(**(sizes | dict(page_size=16, pages_per_seq=context // 16) | changes))
    return host.parts_of_tiles(problem, HOPPER, KERNEL.heuristic(problem, HOPPER))


def number_of(parts, blocks, tiles=1):
    """Parts of a tile of so many blocks, whose sequence has so many tiles."""
    return int(parts.number(np.int32(blocks), parts.most_of(np.int32(tiles))))


class EstimateTest(parameterized.TestCase):
    @parameterized.product(
        parts=(Parts(), Parts(2, 2), Parts(1, 7, 4), Parts(3, 5, 16)),
        most=(500, 12000),
        in_cluster=(False, True),
        of_memory=deal.MEMORIES,
        in_pairs=(False, True),
    )
    def test_a_launch_ends_when_all_parts_have_been_loaded(self, parts, most, in_cluster, of_memory, in_pairs):
        """Event by event: cores with work left share the memory, or the second cache, and each goes through its own steps.

        Where pairs are merged, tiles share keys that memory brings once, and each part but one of a tile is merged once.
        """
        shape = launch(in_cluster=in_cluster, in_pairs=in_pairs, part_bytes=9e4 * in_pairs, sharing=2 if in_pairs else 1)
        contexts = np.random.default_rng(0).integers(1, most, 9)
        shared = (deal.OF_HELD if most == 500 else of_memory) / shape.sharing
        in_cluster &= not parts.vary and parts.most > 1
        in_pairs &= not in_cluster
        pieces = []
        for context in contexts:
            blocks = -(-context // 128)
            share, number = (int(x(np.int32(blocks))) for x in (parts.share, parts.number))
            beside = deal.PIECE_BYTES + (shape.part_bytes * (number - 1) / number if in_pairs else 0)
            sizes = [min(share, blocks - first) * 2**16 + beside for first in range(0, blocks, share)]
            pieces += [size for size in sizes for _ in range(10)]
        left = [0.0] * 132
        for i, size in enumerate(sorted(pieces, reverse=True)):
            turn, place = divmod(i, 132)
            left[131 - place if turn % 2 else place] += size
        time = deal.LAUNCH_BYTES
        while left := [work for work in left if work > 1e-3]:
            least = min(left)
            longer = math.sqrt((len(left) / 132 * shared) ** 2 + (deal.STEP_BYTES / 2**16) ** 2)
            left, time = [work - least for work in left], time + least * longer
        time += deal.CLUSTER_PART_BYTES * parts.most * in_cluster
        if not (in_pairs or in_cluster) and parts.most > 1:
            most = max(int(parts.number(np.int32(-(-context // 128)))) for context in contexts)
            time += deal.MERGE_BYTES + most * deal.MERGED_PART_BYTES
            time += deal.RESULTS * of_memory * 2**18 / 132 * len(pieces) / 90
        self.assertAlmostEqual(deal._time(shape, parts, deal._evenly(shape, contexts), of_memory) / time, 1)

    @parameterized.product(parts=(Parts(), Parts(1, 6, 4), Parts(2, 6, 4, together=12), Parts(1, 6, 4, together=6)), context=(60, 3000))
    def test_a_prompt_beside_steps_is_as_many_pieces_as_the_kernel_has(self, parts, context):
        """Its tiles see the more keys the later they are, and have the fewer parts the more they are; results of whole tiles
        are no parts'."""
        shape = launch(seqs=9, head_tiles=10, block_q=16, prompt=100, tiles_of_seq=1, cores=10**4, slots=10**4)
        contexts = np.array([context, *np.random.default_rng(0).integers(1, 12000, 8)])
        keys = [max(context - 100, 0) + end for end in (16, 32, 48, 64, 80, 96, 100)]
        tiles = [(-(-k // 128), 7, tokens) for k, tokens in zip(keys, [16] * 6 + [4])]
        tiles += [(-(-k // 128), 1, 1) for k in contexts[1:]]
        longest = loaded = written = 0
        for blocks, of_seq, tokens in tiles:
            most = parts.most_of(np.int32(of_seq)) if parts.vary else None
            share, number = (int(find(np.int32(blocks), most)) for find in (parts.share, parts.number))
            longest, loaded = max(longest, share), loaded + 10 * blocks
            written += number * tokens / 108 * (number > 1)
        pack = deal._beside_prompt(shape, contexts)
        self.assertEqual([*zip(pack.blocks, pack.of_seq)], [tile[:2] for tile in tiles])
        np.testing.assert_allclose(pack.results, [tokens / 108 for _, _, tokens in tiles])
        one = launch(seqs=1, head_tiles=1, cores=10**4, slots=10**4)
        alone = deal._time(one, Parts(), deal._evenly(one, np.array([longest * 128])))
        time = deal._time(shape, parts, pack)
        if parts.most > 1:
            most = max(int(parts.number(np.int32(blocks), parts.most_of(np.int32(n)))) for blocks, n, _ in tiles)
            time -= deal.MERGE_BYTES + most * deal.MERGED_PART_BYTES + deal.RESULTS * 2**18 / 10**4 * written
        self.assertAlmostEqual(time / alone, 1, delta=0.02)  # cores for all pieces: the longest is what all wait for

    @parameterized.named_parameters(
        ("teams", launch(seqs=64, head_tiles=8, capacity=8192, most_keys=8192, block_kv=64, block_bytes=2**15,
                         result_bytes=2**20, slots=264), {"1/1": (709.2, 94.8, 80.7), "4/32": (721.3, 97.7, 48.0)}),
        ("wide", launch(seqs=16, head_tiles=8, capacity=4096, most_keys=4096, block_kv=64, result_bytes=2**18),
         {"1/1": (179.0, 26.9, 47.1), "4/16": (184.0, 28.7, 25.6)}),
        ("one_group", launch(seqs=64, head_tiles=1, capacity=4096, most_keys=4096, result_bytes=2**18),
         {"1/1": (49.0, None, 24.7), "4/8": (52.8, None, 10.6)}),
        ("wide_heads_on_an_h200", launch(seqs=8, head_tiles=2, capacity=16384, most_keys=16384, block_kv=64, block_bytes=2**17,
                          result_bytes=2**18, step_bytes=deal.WIDE_STEP_BYTES, piece_bytes=deal.WIDE_PIECE_BYTES),
         {"1/1": (589.3, 75.8, 558.2), "16/16": (143.4, 48.0, 49.8), "32/8": (150.0, 32.8, 36.7)}, 0.7),
        ("drafts", launch(seqs=32, head_tiles=8, capacity=8192, most_keys=8192, block_kv=64, block_bytes=2**15,
                          result_bytes=2**21, slots=264), {"1/1": (359.0, 50.5, 83.5), "2/64": (366.4, 53.7, 52.3)}),
    )  # fmt: skip
    def test_so_long_launches_took(self, shape, taken, memory=1.0):
        """Microseconds on an H100 but where said, of contexts as long as the table, of an eighth, and of one among others of a 32nd.

        Those that lie in the second cache from the last launch are shorter, and left out."""
        seqs, errors = shape.seqs, []
        contexts = [np.full(seqs, 1.0), np.full(seqs, 1 / 8), np.where(np.arange(seqs) == seqs // 2, 1, 1 / 32)]
        for parts, times in taken.items():
            most, blocks = map(int, parts.split("/"))
            for share, time in zip(contexts, times):
                if time is not None:
                    pack = deal._evenly(shape, share * shape.capacity)
                    estimate = deal._time(shape, Parts(1, most, blocks), pack, memory)
                    errors.append(math.log(estimate / BYTES_A_US / time))
        self.assertLess(np.abs(errors).max(), 0.18)
        self.assertLess(np.sqrt(np.mean(np.square(errors))), 0.08)

    @parameterized.product(parts=(Parts(), Parts(1, 4, 32), Parts(2, 2)), smallest=(2**17, 2**20))
    def test_no_parts_are_larger_than_they_were_or_too_small(self, parts, smallest):
        found = deal.finer(parts, launch(smallest=smallest))
        self.assertIn(found.least, (1, parts.least))
        if found != parts:
            self.assertGreaterEqual(found.blocks * 2**16, smallest)
            self.assertLess(found.blocks, parts.blocks if parts.vary else 64)

    @parameterized.parameters(7, 17, 33)
    def test_parts_of_many_tiles_are_not_the_smallest(self, seqs):
        fewest = 3 * 2**17 if 3 * seqs > deal.FEW * 132 else 2**17
        with mock.patch.object(parts_module, "finer", wraps=deal.finer) as called:
            parts_of(seqs, 31744, 9, 3, head_dim=64, value_dim=64)
        self.assertEqual(called.call_args.args[1].smallest, fewest)

    @parameterized.parameters((4096, 30000), (4096, 5000), (9000, 5000))
    def test_contexts_behind_a_window_count_as_far_as_tiles_see(self, most_keys, capacity):
        """However wide the table is, some kinds have contexts that differ in what tiles see of them."""
        shape = launch(capacity=capacity, most_keys=most_keys, seqs=20)
        blocks = [kind.blocks for kind, _ in deal._kinds(shape)]
        longest = min(capacity, deal.REACH * most_keys)
        self.assertEqual([each.max() for each in blocks[:3]], [-(-min(longest, most_keys) // 128)] * 3)
        self.assertAlmostEqual(blocks[1].min(), longest / 20 / 128, delta=1)
        self.assertLess(blocks[2].mean(), 0.4 * most_keys / 128)

    @parameterized.product(seqs=(2, 9, 64), capacity=(1024, 12000, 100000), held=(5000, 40000, 10**6))
    def test_contexts_have_room_in_the_pool(self, seqs, capacity, held):
        """Together, and those of unequal length are the longer for it."""
        shape = launch(seqs=seqs, capacity=capacity, most_keys=capacity, held=held, head_tiles=1)
        for pack, _ in deal._kinds(shape):
            self.assertLessEqual(128 * (pack.blocks - 1).sum(), max(held, 128 * seqs))
        longest = [pack.blocks.max() for pack, _ in deal._kinds(shape)[:3]]
        self.assertEqual(longest[1:], [-(-deal._longest(shape) // 128)] * 2)
        self.assertEqual(longest[0] == longest[1], held >= seqs * deal._longest(shape))

    def test_a_table_is_no_longer_than_a_context_that_the_pool_holds(self):
        """Tables are as wide as a model's longest context, whatever the pool has room for."""
        same = [launch(seqs=20, capacity=capacity, most_keys=capacity, held=30000) for capacity in (30000, 10**6)]
        self.assertEqual(*map(deal._longest, same))

    @parameterized.product(seqs=(2, 9, 64), share=(0.1, 0.3, 0.6, 0.9))
    def test_contexts_of_latent_keys_fill_a_pool_without_room_for_all_tables(self, seqs, share):
        """They differ the more, the less room there is; and one may be the only long one."""
        held = max(int(share * seqs * 12800), 13000)
        shape = launch(seqs=seqs, capacity=12800, most_keys=12800, held=held, head_tiles=1, latent=True)
        spread, alone, shorter = (128 * pack.blocks for pack, _ in deal._that_fill(shape))
        for contexts in (spread, alone, shorter):
            self.assertBetween(contexts.sum(), 0.5 * held, held + 128 * seqs)
        self.assertEqual((spread.max(), alone.max()), (12800, 12800))
        self.assertLen(set(alone[:-1]), 1)
        self.assertAlmostEqual(shorter.max(), max(12800 / 2, held / seqs), delta=128)

    def test_results_of_all_parts_have_room(self):
        self.assertEqual(deal.finer(Parts(), launch(result_bytes=2**26)), Parts())
        self.assertLessEqual(deal.finer(Parts(), launch(result_bytes=2**24)).most, 4)


class ChoiceTest(parameterized.TestCase):
    def test_contexts_as_long_as_the_table_pay_little(self):
        """For the sake of others, of which one gains most: by the estimate, over random decode steps."""
        rng, kept, paid, gained = np.random.default_rng(0), deal.finer, [], []

        def recorded(parts, launch):
            found = kept(parts, launch)
            before, after = (np.array([deal._time(launch, x, c) for c, _ in deal._kinds(launch)]) for x in (parts, found))
            paid.append(after[0] / before[0])
            gained.append(np.log(before / after).max())
            return found

        with mock.patch.object(parts_module, "finer", recorded):
            for _ in range(100):
                seqs, kv_heads, group = rng.integers(2, 129), 2 ** rng.integers(0, 4), rng.integers(1, 17)
                parts_of(int(seqs), int(2 ** rng.uniform(8, 16)), int(group * kv_heads), int(kv_heads))
        self.assertGreater(len(paid), 80)
        self.assertLess(max(paid), 1.15)
        self.assertLess(np.mean(np.log(paid)), 0.015)
        self.assertGreater(np.mean(gained), 0.05)

    @parameterized.named_parameters(
        ("tiles_fill_the_chip", (64, 4096), {}),
        ("so_do_those_of_a_wider_table", (48, 2048), {}),
        ("a_single_sequence", (1, 8192), {}),
        ("prompts", (4, 4096), dict(tokens=2048)),
    )
    def test_parts_do_not_vary_where(self, call, changes):
        self.assertFalse(parts_of(*call, **changes).vary)

    @parameterized.parameters(
        (8, 2, dict(head_dim=512), True), (8, 2, dict(head_dim=512, tokens=64), False), (8, 2, dict(head_dim=256), True),
        (8, 2, dict(head_dim=512, cache_dtype="int8", features=frozenset({"quantised"})), False),
        (40, 1, LATENT, True), (8, 1, LATENT, False),
        (40, 1, LATENT | dict(features=frozenset({"latent", "quantised"}), cache_dtype="int8"), False),
        (40, 1, LATENT | dict(features=frozenset({"latent", "quantised"}), cache_dtype="int8", num_pages=19520), True),
        (10, 1, LATENT | dict(num_pages=18500), True), (10, 1, LATENT | dict(num_pages=18600), False),
        (8, 1, LATENT | dict(num_pages=7808), True), (8, 1, LATENT | dict(num_pages=7820), False),
    )  # fmt: skip
    def test_where_warpgroups_share_rows_the_estimate_is_of_what_was_measured(self, seqs, kv_heads, changes, asked):
        """In 16 bits: steps of wide heads, and many latent tiles; some where the pool has no room for all tables, and few, and in
        8 bits, for half of them at most.
        """
        changes = dict(value_dim=changes["head_dim"], q_heads=16) | changes
        with mock.patch.object(parts_module, "finer", wraps=deal.finer) as called:
            parts_of(seqs, 31232, kv_heads=kv_heads, **changes)
        self.assertEqual(called.called, asked)

    def test_a_long_latent_context_of_many_heads_is_halved_and_a_short_one_is_not(self):
        """Without parts the longest is what all others wait for; and the fewer parts, the fewer results."""
        parts = parts_of(64, 8192, kv_heads=1, **LATENT)
        self.assertEqual([int(parts.number(np.int32(blocks))) for blocks in (10, 64, 65, 128)], [1, 1, 2, 2])
        self.assertFalse(parts_of(64, 4096, kv_heads=1, **LATENT).vary)

    def test_a_latent_tile_that_has_its_keys_alone_has_finer_parts_unless_the_pool_is_as_large_as_all_tables(self):
        """64 uneven contexts of up to 8192 keys took 86 us by parts of 32 blocks, and 122 by halves; equal ones 184 and 160: which
        they are, a larger pool does not say.
        """
        alone = LATENT | dict(q_heads=64)
        roomy = lambda seqs, keys: parts_of(seqs, keys, kv_heads=1, **alone, num_pages=2 * seqs * -(-keys // 16))
        self.assertEqual([int(roomy(64, 8192).share(np.int32(blocks))) for blocks in (20, 64, 128)], [20, 32, 32])
        self.assertBetween(roomy(40, 20032).blocks, 32, 60)
        self.assertEqual(parts_of(64, 8192, kv_heads=1, **alone), Parts(2, 2))
        self.assertEqual(parts_of(64, 4096, kv_heads=1, **alone), Parts(2, 2))

    @parameterized.product(q_heads=(48, 64, 96, 128), seqs=(48, 64, 200))
    def test_a_long_latent_context_has_more_parts_where_the_pool_has_no_room_for_many(self, q_heads, seqs):
        """One context of 8192 keys of 64 heads among others of a 16th of it took 70 us by four parts."""
        parts = [
            parts_of(seqs, 8192, kv_heads=1, **(LATENT | dict(q_heads=q_heads, num_pages=seqs * 512 // share)))
            for share in (1, 10)
        ]
        full, small = [number_of(each, 128) for each in parts]
        self.assertGreater(small, full)

    @parameterized.parameters((32, 128, 4096), (32, 200, 8192), (16, 64, 8192), (64, 64, 8192))
    def test_one_long_latent_context_is_cut_and_short_ones_are_whole(self, q_heads, seqs, context):
        """32 heads, one of 8192 keys among others of a 16th: 27.2 us by parts of 8 blocks, of which others have one, 36.7 by 6."""
        short = context // 16
        pages = (context + (seqs - 1) * short) // 16 + 8
        parts = parts_of(seqs, context, kv_heads=1, **(LATENT | dict(q_heads=q_heads, num_pages=pages)))
        self.assertGreaterEqual(number_of(parts, context // 64), 5)
        self.assertEqual(number_of(parts, short // 64), 1)

    def test_parts_of_some_latent_tiles_vary_where_the_pool_has_no_room_for_all_tables(self):
        """24 tiles of 64 heads, up to 16384 keys: 89.5 us, and 113.9 by five parts each. Of two they took longer, 32.7 for 25.0."""
        of_heads = lambda seqs: LATENT | dict(q_heads=64, num_pages=seqs * 540)
        self.assertTrue(parts_of(24, 16384, kv_heads=1, **of_heads(24)).vary)
        self.assertFalse(parts_of(2, 16384, kv_heads=1, **of_heads(2)).vary)

    @parameterized.parameters((48, 1.2), (64, 1.2), (96, 1.1), (128, 1.1))
    def test_contexts_as_long_as_the_table_pay_little_where_pairs_are_merged(self, q_heads, longest):
        """And their parts are of one size: each costs as much as many blocks. Over random decode steps."""
        rng, varied = np.random.default_rng(q_heads), 0
        for _ in range(20):
            seqs, context = int(rng.integers(40, 300)), 64 * int(2 ** rng.uniform(5, 10))
            with mock.patch.object(parts_module, "finer", wraps=deal.finer) as called:
                parts = parts_of(seqs, context, kv_heads=1, **(LATENT | dict(q_heads=q_heads)))
            before, launch = called.call_args.args
            time = functools.partial(deal._time, launch, tiles=deal._evenly(launch, np.full(seqs, launch.capacity)))
            self.assertLessEqual(time(parts), longest * min(time(before), time(Parts(before.least, before.least))))
            if parts != before and parts.vary:
                blocks, varied = context // 64, varied + 1
                self.assertLess(int(parts.share(np.int32(blocks))) * int(parts.number(np.int32(blocks))) - blocks, parts.most)
        self.assertGreater(varied, 2)

    def test_steps_of_wide_heads_have_parts_that_suit_uneven_contexts(self):
        """Of six with one long context, 32 parts of at least 4 blocks took 67 us, and at least five of each tile 73. But
        where nearly every core has a tile, contexts as long as the table took 304 by parts of 6 blocks, and 277 by 16.
        """
        wide = dict(q_heads=32, kv_heads=4, head_dim=512, value_dim=512)
        few, many = parts_of(6, 19392, **wide), parts_of(32, 4096, **wide)
        self.assertEqual(few.least, 1)
        self.assertBetween(few.blocks, 4, 8)
        self.assertGreaterEqual(few.most, 22)
        self.assertGreaterEqual(many.blocks, 16)

    @parameterized.product(heads=(16, 32), cache_dtype=("bfloat16", "float8_e4m3fn"))
    def test_steps_over_latent_keys_are_dealt_evenly(self, heads, cache_dtype):
        """A step of theirs takes a core longer than memory: where contexts are alike, no core has many blocks more."""
        features = {"latent"} | ({"quantised"} if cache_dtype != "bfloat16" else set())
        latent = dict(head_dim=576, value_dim=512, cache_dtype=cache_dtype, features=frozenset(features))
        parts, blocks = parts_of(64, 4096, heads, 1, **latent), 64
        share = int(parts.share(np.int32(blocks)))
        self.assertLess(-(-64 * -(-blocks // share) // 132) * share, 1.1 * 64 * blocks / 132)

    @parameterized.product(heads=(8, 16, 32), call=((64, 4096), (64, 16384), (20, 8192), (100, 4096)), quantised=(False, True))
    def test_contexts_as_long_as_the_table_pay_less_over_latent_keys(self, heads, call, quantised):
        """Also beside tiles that are all cut into the fewest parts."""
        features = frozenset({"latent", "quantised"} if quantised else {"latent"})
        latent = dict(head_dim=576, value_dim=512, cache_dtype="int8" if quantised else "bfloat16", features=features)
        with mock.patch.object(parts_module, "finer", wraps=deal.finer) as called:
            found = parts_of(*call, heads, 1, **latent)
        parts, launch = called.call_args.args
        time = functools.partial(deal._time, launch, tiles=deal._evenly(launch, np.full(call[0], launch.capacity)))
        longest = 1.2 if quantised else 1.115
        self.assertLessEqual(time(found), longest * min(time(parts), time(Parts(parts.least, parts.least))))
        if call == (64, 16384):  # their results are little beside so many keys, and uneven contexts are dealt by them
            self.assertTrue(found.vary)
        if call == (20, 8192) and heads == 16 and quantised:  # even parts would take uneven contexts half as long again
            self.assertTrue(found.vary)

    @parameterized.named_parameters(
        ("drafts", (6, 14784), dict(tokens=4), 2**20),
        ("drafts_with_a_window", (21, 20992, 8, 4), dict(tokens=5, sliding_window=4096, attn_logits_soft_cap=50.0), 2**20),
        ("a_few_steps", (9, 12000, 40, 10), {}, 2**20),
        ("more_tiles_than_cores", (20, 4096), {}, 3 * 2**18),
        ("few_tiles", (17, 30336, 8, 1), {}, 2**18),
        ("those_of_a_cluster", (16, 11776, 4, 4), dict(tokens=5, head_dim=64, value_dim=64), 2**20),
        ("a_window", (38, 28161, 4, 1), dict(sliding_window=4096), 2**19),
        ("a_prompt_beside_steps", (3, 40000, 24, 2), dict(tokens=96), 2**21),
        ("one_of_few_is_long", (3, 10752, 16, 16), dict(tokens=3), 3 * 2**17),
        ("a_wide_table", (19, 87616, 16, 2), dict(tokens=5), 3 * 2**18),
    )
    def test_parts_are_small_where(self, call, changes, most_bytes):
        """A tile's longest part is what others wait for: contexts may differ, or tiles leave a round half empty."""
        parts = parts_of(*call, **changes)
        self.assertTrue(parts.vary)
        self.assertLessEqual(parts.blocks * 2**16, most_bytes)

    def test_one_long_context_of_few_fills_the_cores(self):
        """Without a second round of its parts."""
        parts = parts_of(3, 10752, 16, 16, tokens=3)
        self.assertEqual(parts.number(np.int32(54)) * 16, 8 * 16)

    @parameterized.parameters((2, 1, 256), (4, 1, 128))
    def test_clusters_merge_the_parts_of_short_tables_and_not_of_one_long_context_among_few(self, q_heads, kv_heads, dim):
        """A cluster of 16 has no more parts for the long one: 30.9 us for 19.9, 16.4 for 12.2."""
        call = dict(q_heads=q_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads, head_dim=dim, value_dim=dim, seqs=7, tokens=7)
        for pages, in_cluster in ((128, True), (1856, False)):
            given = problems.problem(**call, page_size=16, pages_per_seq=pages, num_pages=2 * pages)
            config = KERNEL.heuristic(given, HOPPER)
            parts = host.parts_of_tiles(given, HOPPER, config)
            self.assertEqual((parts.vary, host.merges_in_cluster(given, HOPPER, config)), (not in_cluster, in_cluster))

    def test_tiles_of_few_keys_have_fewer_parts_than_equal_contexts_want(self):
        """As those of a prompt beside long contexts: each part's results are written and read once more."""
        parts = parts_of(11, 155648, 4, 1, tokens=61)
        self.assertEqual(parts.number(np.int32(6)), 1)
        self.assertGreater(parts.number(np.int32(150)), 8)

    @parameterized.named_parameters(
        ("many_heads", 17, 281, (71, 1, 64), 37504, 196, (34, 3), 8),
        ("large_heads", 5, 1766, (8, 4, 256), 6640, 104, (28, 28), 3),
        ("more_tiles_than_cores", 7, 515, (64, 4, 128), 16928, 133, (16, 4), 3),
        ("fewer", 4, 141, (4, 2, 128), 15008, 157, (5, 4), 16),
        ("wide_heads", 11, 465, (4, 1, 512), 34560, 360, (29, 8), 30),  # whose results are 117 MB
    )
    def test_one_long_context_beside_a_prompt_has_parts(self, seqs, tokens, heads, keys, blocks, prompt, fewest):
        """And the prompt's own tiles, which see few keys, have none, or its many tiles too few to be cut."""
        problem = problems.problem(
            tokens=tokens, seqs=seqs, q_heads=heads[0], num_kv_heads=heads[1], cache_kv_heads=heads[1], head_dim=heads[2],
            value_dim=heads[2], pages_per_seq=keys // 16,
        )  # fmt: skip
        parts = host.parts_of_tiles(problem, HOPPER, KERNEL.heuristic(problem, HOPPER))
        tiles, its_blocks = prompt
        self.assertGreaterEqual(number_of(parts, blocks), fewest)
        self.assertEqual(number_of(parts, its_blocks, tiles), 1)

    @parameterized.parameters("int8", "bfloat16")
    def test_parts_of_prompts_are_chosen_over_keys_that_they_were_measured_with(self, dtype):
        features = frozenset({"quantised"} if dtype == "int8" else ())
        parts = parts_of(2, 4096, tokens=1024, cache_dtype=dtype, features=features)
        self.assertEqual(parts.vary, dtype == "bfloat16")

    def test_prompts_whose_tiles_of_a_head_go_one_after_another_have_no_parts(self):
        """Of a table of parts none of them would."""
        heads = dict(q_heads=64, num_kv_heads=64, cache_kv_heads=64)
        problem = problems.problem(tokens=512, seqs=2, pages_per_seq=256, **heads)
        self.assertGreater(rounds.rows_together(problem, KERNEL.heuristic(problem, HOPPER), 132), 1)
        self.assertFalse(parts_of(2, 4096, 64, 64, tokens=256).vary)

    def test_few_keys_in_a_wide_table_are_no_36_parts_of_a_block(self):
        """As many parts as contexts as long as the table want leave each a block, whose results are merged."""
        parts = parts_of(2, 18240, 7, 1, tokens=14)
        self.assertLessEqual(number_of(parts, 18), 9)
        self.assertGreaterEqual(number_of(parts, 142), 16)

    @parameterized.parameters((1, 28416, 4, 2), (2, 51200, 4, 1))
    def test_a_short_context_in_a_wide_table_is_not_merged_from_as_many_parts_as_the_table_wants(self, seqs, context, *heads):
        parts = parts_of(seqs, context, *heads)
        self.assertGreater(number_of(parts, context // 128), 50)
        self.assertEqual(number_of(parts, 10), 5)

    @parameterized.parameters((5, 354, 354, 8, 4), (3, 700, 700, 16, 16), (8, 512, 4096, 32, 8), (12, 64, 512, 9, 3), (7, 87, 1456, 7, 1))
    def test_whole_prompts_have_no_parts(self, seqs, tokens, context, q_heads, kv_heads):
        """Which a kernel would look for to merge them, also in wider tables."""
        parts = parts_of(seqs, -(-context // 16) * 16, q_heads, kv_heads, tokens=tokens)
        self.assertFalse(parts.vary, parts)


if __name__ == "__main__":
    absltest.main()
