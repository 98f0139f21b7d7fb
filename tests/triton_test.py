"""The Triton kernel without a GPU: its numerics under Triton's interpreter, its machine code, and its refusals.

On GPUs, gpu_test.py runs it.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
import importlib.util
import multiprocessing
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from paged_prefill import PrefillPageAttentionConfig
from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import choose
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton import host
from paged_prefill.lowering.triton.parts import parts_of_tiles
from paged_prefill.lowering.triton.sizes import TALL_ROWS, rows_of, shared_bytes
from paged_prefill.lowering.triton.schedule import most_pieces
from paged_prefill.primitive.context import policy
from paged_prefill.tests import cases, problems, triton_stand_ins

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL = host.Triton()
H200 = Device("cuda", "NVIDIA H200", "9.0")


def process(prepare=None):
    """A process of its own, since Triton decides on its first import whether it compiles or interprets."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare)


def problem(**changes) -> Problem:
    sizes = dict(tokens=2048, pages_per_seq=1024, softmax_scale=128**-0.5)
    return problems.problem(**(sizes | changes))


def small(name, **changes) -> cases.Case:
    """A case of the common table without its room, which is so many empty programs for the interpreter."""
    case = next(case for case in cases.EDGES if case.name == name)
    return replace(case, room=None, name=name + "".join(f"_{k}" for k in changes), **changes)


SPLIT = PrefillPageAttentionConfig(block_q=16, block_kv=16, num_splits=3)
ONE_ROW = PrefillPageAttentionConfig(block_q=1, block_kv=64)
INTERPRETED = [
    *map(small, (
        "context_shorter_than_chunk_float32", "context_empty_bfloat16", "no_new_tokens_float16", "one_token_float32",
        "chunk_longer_than_a_tile_bfloat16", "chunk_is_the_context_float32", "all_mixed_float16", "window_float32",
        "window_of_one_bfloat16", "soft_cap_and_window_float32", "soft_cap_far_exceeded_bfloat16",
        "value_dim_is_larger_float32", "scale_is_zero", "scale_is_negative", "page_of_1", "page_of_7", "page_of_64",
        "no_spare_page_or_column", "odd_heads",
    )),
    replace(small("page_of_7"), name="page_of_24", page_size=24),
    small("all_mixed_float32", cfg=SPLIT),
    small("window_float16", cfg=SPLIT),
    small("one_token_each_bfloat16", cfg=ONE_ROW),
    replace(small("tokens_without_sequence_float32"), spare_columns=0, tokens_before=40),
    # tanh of what is nearly 0, times a huge cap.
    replace(small("chunk_is_the_context_float32"), name="soft_cap_far_away", attn_logits_soft_cap=1e4),
    # A window of several blocks, so that some need no mask.
    cases.Case("window_of_blocks", ((20, 185),), head_dim=16, sliding_window=90, cfg=replace(SPLIT, num_splits=1)),
]


class WithInterpreter(parameterized.TestCase):
    """Tests whose kernels run in Triton's interpreter, in a process of its own."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.interpreter = process(triton_stand_ins.interpret_triton)

    @classmethod
    def tearDownClass(cls):
        cls.interpreter.shutdown()
        super().tearDownClass()


@absltest.skipUnless(HAS_TRITON, "Triton is not installed")
class InterpretedTest(WithInterpreter):
    @parameterized.named_parameters(cases.named(INTERPRETED))
    def test_matches_reference_and_stays_inside_its_operands(self, case):
        self.interpreter.submit(triton_stand_ins.check_interpreted, case).result()

    def test_keys_past_the_page_table_are_not_seen(self):
        case = cases.Case("past_the_table", ((20, 80),), head_dim=16, page_size=4, cfg=SPLIT)
        self.interpreter.submit(triton_stand_ins.check_interpreted, case, columns=14).result()

    def test_a_page_table_of_more_slots_than_int32_counts(self):
        self.interpreter.submit(triton_stand_ins.check_interpreted, replace(cases.ENDLESS, cfg=SPLIT)).result()

    def test_a_device_attends_to_its_own_heads_of_a_whole_cache(self):
        case = cases.Case("second_head", ((5, 40),), head_dim=16, cfg=SPLIT)
        self.interpreter.submit(triton_stand_ins.check_interpreted, case, kv_head=1).result()

    @parameterized.named_parameters(
        ("float32", dict(cfg=ONE_ROW), (np.nan, np.inf, -np.inf)),
        ("splits_of_bfloat16", dict(cfg=SPLIT, dtype="bfloat16"), (np.nan, np.inf, -np.inf)),
        ("negative_scale", dict(cfg=ONE_ROW, softmax_scale=-0.5), (np.inf, -np.inf)),
        ("soft_cap", dict(cfg=ONE_ROW, attn_logits_soft_cap=30.0), (np.nan,)),
    )
    def test_broken_numbers_stay_in_their_sequence(self, changes, numbers):
        case = replace(cases.BROKEN, head_dim=16, **changes)
        self.interpreter.submit(triton_stand_ins.check_broken_interpreted, case, numbers).result()


TARGETS = {
    "sm_80": (("cuda", 80, 32), Device("cuda", "NVIDIA A100-SXM4-80GB", "8.0"), 163),
    "sm_89": (("cuda", 89, 32), Device("cuda", "NVIDIA GeForce RTX 4090", "8.9"), 99),
    "sm_90": (("cuda", 90, 32), H200, 227),
    "sm_100": (("cuda", 100, 32), Device("cuda", "NVIDIA B200", "10.0"), 227),
    "sm_120": (("cuda", 120, 32), Device("cuda", "NVIDIA GeForce RTX 5090", "12.0"), 99),
    "gfx942": (("hip", "gfx942", 64), Device("rocm", "AMD Instinct MI300X", "gfx942"), 64),
    "gfx950": (("hip", "gfx950", 64), Device("rocm", "AMD Instinct MI355X", "gfx950"), 160),
}
WIDE = dict(head_dim=256, value_dim=256, q_heads=16)
GEMMA_4 = dict(head_dim=512, value_dim=512, q_heads=16, num_kv_heads=4, cache_kv_heads=4)
MLA = dict(head_dim=576, value_dim=512, q_heads=16, num_kv_heads=1, cache_kv_heads=1, features=("latent",))
DECODE = dict(tokens=64, seqs=64, pages_per_seq=256)
LONG_DECODE = dict(tokens=16, seqs=16, pages_per_seq=2048)
SHORT = dict(tokens=1024, seqs=16, pages_per_seq=32)
FEW_HEADS = dict(q_heads=4, num_kv_heads=2, cache_kv_heads=2, pages_per_seq=2048)
ONE_HEAD, TWO_HEADS = (dict(num_kv_heads=n, cache_kv_heads=n) for n in (1, 2))
TEN_HEADS = dict(q_heads=40, num_kv_heads=10, cache_kv_heads=10)
FEW_GROUPS = dict(q_heads=24, num_kv_heads=2, cache_kv_heads=2)
FALCON = dict(q_heads=71, num_kv_heads=1, cache_kv_heads=1, head_dim=64, value_dim=64)
SLOTS = ("quantised", "slot_scales")
IN_8_BITS = dict(cache_dtype="int8", features=("quantised",))
CAPPED = dict(attn_logits_soft_cap=50.0)
# What is compiled for whom, as changes of `problem` and what `triton_stand_ins._call` takes beside: all sizes of
# Hopper; of the others, which share tables, each size where there is least shared memory, and each target.
COMPILED = {
    "sm_80": [(CAPPED, {}), (dict(cache_dtype="float8_e5m2", features=("quantised",)), dict(scale="head"))],
    "sm_89": [
        (GEMMA_4, dict(ranges=True)),
        (CAPPED | dict(dtype="float32"), {}),
        (WIDE | dict(dtype="float32", features=("tree_mask",)), dict(tree=True)),
        (dict(cache_dtype="float8_e4m3fn", features=("quantised",)), dict(scale="head")),
        (MLA | dict(cache_dtype="int8", features=("latent", *SLOTS)), dict(scale="slot")),
        (MLA | dict(q_heads=128, cache_dtype="int8", features=("latent", *SLOTS)), dict(scale="slot")),
    ],
    "sm_90": [
        (dict(head_dim=64, value_dim=64, sliding_window=4096), {}),
        ({}, dict(ranges=True, sinks=True)),
        (SHORT, dict(ranges=True)),
        (WIDE | dict(sliding_window=4096, page_size=128, pages_per_seq=128), {}),
        (GEMMA_4, dict(ranges=True)),
        (MLA | dict(sliding_window=4096), {}),
        (MLA | dict(features=("latent", "tree_mask", "key_ranges")), dict(tree=True, ranges=True)),
        (MLA | DECODE | dict(q_heads=128), {}),
        (DECODE | dict(cache_dtype="float8_e4m3fn", features=SLOTS), dict(scale="slot")),
        (LONG_DECODE | dict(IN_8_BITS, features=("quantised", "key_ranges")), dict(scale="head", ranges=True)),
        (DECODE | dict(IN_8_BITS, features=("quantised", "tree_mask")), dict(scale="head", tree=True)),
    ],
    "sm_100": [
        (MLA | dict(q_heads=128, cache_dtype="float8_e4m3fn", features=("latent", *SLOTS)), dict(scale="slot")),
        (GEMMA_4 | dict(cache_dtype="int8", features=SLOTS), dict(scale="slot")),
        (DECODE | dict(cache_dtype="float8_e5m2", features=("quantised",)), dict(scale="head")),
    ],
    "sm_120": [
        (WIDE, {}),
        (WIDE | dict(dtype="float32"), {}),
        (DECODE | MLA | dict(cache_dtype="float8_e5m2"), dict(scale="slot")),
        (DECODE | GEMMA_4 | dict(cache_dtype="float8_e4m3fn", features=SLOTS), dict(scale="slot")),
    ],
    "gfx942": [(CAPPED, {}), (dict(features=("key_ranges",)), dict(ranges=True)), (WIDE | dict(dtype="float32"), {}), (GEMMA_4, {}), (DECODE | dict(cache_dtype="int8", features=SLOTS), dict(scale="slot"))],
    "gfx950": [({}, {}), (GEMMA_4 | dict(cache_dtype="int8", features=SLOTS), dict(scale="slot"))],
}


@absltest.skipUnless(HAS_TRITON, "Triton is not installed")
class CompiledTest(parameterized.TestCase):
    @parameterized.parameters("cuda", "hip")
    def test_fits_without_spilling_and_takes_the_instruction_for_tanh_where_there_is_one(self, kind):
        launches = [
            (*TARGETS[name][:2], problem(**changes), optional)
            for name, each in COMPILED.items()
            for changes, optional in each
            if TARGETS[name][0][0] == kind
        ]
        with process() as compiler:  # Triton keeps to NVIDIA or AMD
            resources = compiler.submit(triton_stand_ins.compile_launches, launches).result()
        for (target, device, each, optional), found in zip(launches, resources, strict=True):
            with self.subTest(f"{target} {each} {optional}"):
                [shared_kib] = [kib for _, of, kib in TARGETS.values() if of == device]
                self.assertLessEqual(found["tensor_memory"], 512, found)  # Blackwell's, which jax_triton holds to
                self.assertEqual(found["spilled"], 0, found)
                self.assertEqual(found["scratch"], 0)  # a launch has none to give
                self.assertLessEqual(found["shared_bytes"], shared_kib * 1024, found)
                config = KERNEL.heuristic(each, device)
                self.assertIsNone(KERNEL.misfit(each, device, config))
                if kind == "cuda" and each.dtype == each.cache_dtype != "float32" and not each.features:
                    least = shared_bytes(each, device, config)
                    self.assertBetween(least, 0.8 * found["shared_bytes"], found["shared_bytes"])
                capped = each.attention.attn_logits_soft_cap is not None
                in_hardware = capped and kind == "cuda" and each.dtype != "float32"
                self.assertEqual(found["tanh_instructions"] > 0, in_hardware)


class In8BitsTest(parameterized.TestCase):
    @parameterized.parameters(("sm_89", True), ("sm_90", False), ("sm_100", True), ("sm_120", True))
    def test_is_multiplied_in_float16_where_bfloat16_of_it_takes_other_ptx_than_drivers_read(self, target, in_float16):
        each = problem(cache_dtype="float8_e4m3fn", features=("quantised",))
        self.assertEqual(host._float16_products(each, TARGETS[target][1], rows=TALL_ROWS), in_float16)

    @parameterized.product(target=tuple(TARGETS), cache_dtype=("int8", "float8_e4m3fn", "float8_e5m2"))
    def test_is_multiplied_in_float16_by_few_rows_on_nvidia(self, target, cache_dtype):
        each = problem(cache_dtype=cache_dtype, features=("quantised",))
        in_float16 = host._float16_products(each, TARGETS[target][1], rows=16)
        self.assertEqual(in_float16, target.startswith("sm"))


class HeuristicTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("a_full_grid_is_not_split", {}, 1),
        ("nor_is_one_over_half_full_of_decode", dict(tokens=20, seqs=20), 1),
        ("long_tiles_repay_a_merge_there", dict(tokens=320), 3),
        ("few_tiles_fill_the_multiprocessors", dict(tokens=128, pages_per_seq=2048), 4),
        ("tiles_of_4_warps_share_a_multiprocessor", dict(tokens=16, seqs=16, pages_per_seq=2048), 2),
        ("a_short_decode_step_is_split_finely", dict(tokens=8, seqs=8, pages_per_seq=64), 4),
        ("but_not_below_128_keys", dict(tokens=4, seqs=4, pages_per_seq=32), 4),
        ("nor_into_more_than_the_merge_repays", dict(tokens=1, pages_per_seq=512), 32),
        ("a_long_one_fills_cores_evenly", dict(tokens=1, pages_per_seq=8192), 33),
        ("short_contexts_are_not_split", dict(tokens=16, pages_per_seq=8), 1),
        ("nor_are_short_windows", dict(tokens=16, sliding_window=128), 1),
        ("nor_are_prompts_of_up_to_1024_keys", dict(tokens=16, pages_per_seq=64), 1),
        ("but_beyond_that", dict(tokens=16, pages_per_seq=72), 9),
        ("and_those_of_wide_heads", dict(tokens=16, pages_per_seq=24) | WIDE, 3),
        ("into_no_more_than_cores_for_few_keys", dict(tokens=98, pages_per_seq=128) | FEW_GROUPS, 3),
        ("but_of_these_where_half_of_the_cores_are_idle", dict(tokens=105, pages_per_seq=56) | WIDE, 1),
        ("and_of_wider_ones", dict(tokens=16, pages_per_seq=24) | GEMMA_4, 3),
        ("a_full_grid_of_decode_is_not_split", DECODE, 1),
        ("nor_in_8_bits", DECODE | dict(cache_dtype="int8", features=SLOTS), 1),
    )
    def test_splits(self, changes, splits):
        self.assertEqual(KERNEL.heuristic(problem(**changes), H200).num_splits, splits)

    @parameterized.named_parameters(
        ("of_a_short_step", dict(tokens=8, seqs=8, pages_per_seq=64), Parts(1, 4, 4)),
        ("of_few_tiles_are_short", dict(tokens=13, seqs=13, pages_per_seq=1024), Parts(1, 16, 13)),
        ("of_many_long", dict(tokens=128, seqs=128, pages_per_seq=4096), Parts(1, 5, 64)),
        ("of_many_rows_are_fewer", dict(tokens=128, seqs=32, pages_per_seq=512), Parts(1, 3, 16)),
        ("of_a_single_sequence_are_the_splits", dict(tokens=1, pages_per_seq=512), Parts(32, 32)),
        ("of_a_long_chunk_too", dict(tokens=128, pages_per_seq=2048), Parts(4, 4)),
        ("of_mixed_packs_more", dict(tokens=700, seqs=32, q_heads=16, num_kv_heads=2, cache_kv_heads=2), Parts(1, 11, 16)),
        ("of_mixed_packs_of_more_tiles_too", dict(tokens=707, seqs=22, sliding_window=4096, pages_per_seq=1392) | FEW_GROUPS, Parts(1, 4, 16)),
        ("of_mixed_packs_in_short_tables_not_fewer_for_all", dict(tokens=64, seqs=3, pages_per_seq=73) | dict(FEW_GROUPS, q_heads=32), Parts(1, 7, 3)),
        ("of_very_few_tiles_most", dict(tokens=8, seqs=8, pages_per_seq=1474) | FALCON, Parts(1, 64, 2)),
        ("of_two_contexts_twice_as_many", dict(tokens=2, seqs=2, pages_per_seq=12992) | FALCON, Parts(1, 128, 2)),
        ("of_two_sequences_of_more_heads_one_a_core", dict(tokens=2, seqs=2, pages_per_seq=573) | TEN_HEADS, Parts(1, 13, 3)),
        ("of_three_too", dict(tokens=3, seqs=3, pages_per_seq=1416), Parts(1, 16, 3)),
        ("of_few_heads_more", dict(tokens=3, seqs=3, pages_per_seq=1416) | TWO_HEADS, Parts(1, 64, 3)),
        ("of_narrower_ones_too", dict(tokens=3, seqs=3, pages_per_seq=1416, head_dim=64, value_dim=64), Parts(1, 32, 6)),
        ("of_heads_of_512_too", dict(tokens=2, seqs=2, pages_per_seq=1978) | GEMMA_4 | ONE_HEAD | dict(q_heads=4), Parts(1, 128, 4)),
        ("of_more_of_these_long", dict(tokens=48, seqs=48, pages_per_seq=2035) | GEMMA_4, Parts(1, 15, 16)),
        ("a_window_has_one_though_it_ends_within_a_block", dict(tokens=35, seqs=35, pages_per_seq=1908, sliding_window=4096), Parts(1, 1)),
        ("of_prompts_in_long_tables", dict(tokens=557, seqs=8) | FALCON, Parts(1, 6, 16)),
        ("prompts_have_one", dict(tokens=40, seqs=2, pages_per_seq=64), Parts(1, 1)),
        ("of_chunks_beside_others_are_the_splits", FEW_HEADS | dict(tokens=1106, seqs=2, sliding_window=4096), Parts(3, 3)),
    )
    def test_parts(self, changes, parts):
        each = problem(**changes)
        config = KERNEL.heuristic(each, H200)
        self.assertEqual(parts_of_tiles(each, H200, config), parts)
        with policy("invariant"):
            self.assertEqual(parts_of_tiles(each, H200, KERNEL.heuristic(each, H200)).most, 1)

    def test_a_launch_has_programs_for_any_pack_and_no_more_than_the_worst_needs(self):
        rng, fill = np.random.default_rng(0), 0
        for _ in range(3000):
            seqs, tokens, group, rows, most = map(int, (*rng.integers(1, (6, 20, 40)), 2 ** rng.integers(8), rng.integers(1, 5)))
            lengths = np.diff([0, *np.sort(rng.integers(0, tokens + 1, 2 * seqs)), tokens])
            tiles = -(-lengths * group // rows)  # of a gap, of a sequence, and so on
            for parts, of_gaps in ((Parts(1, most), 1), (Parts(most, most), most)):
                pieces = tiles[1::2].sum() * most + tiles[::2].sum() * of_gaps
                bound = most_pieces(seqs, tokens, group, rows, parts)
                self.assertLessEqual(pieces, bound, (lengths, group, rows, parts))
                fill = max(fill, pieces / bound)
        self.assertEqual(fill, 1)

    @parameterized.parameters({}, WIDE, GEMMA_4, MLA)
    def test_invariant_sizes_do_not_follow_the_pack(self, **dims):
        packs = (dict(), dict(tokens=1), DECODE, dict(tokens=40, seqs=3, pages_per_seq=64), SHORT)
        with policy("invariant"):
            [config] = {KERNEL.heuristic(problem(**dims | pack), H200) for pack in packs}
            self.assertEqual(config.num_splits, 1)

    @parameterized.parameters({}, WIDE, MLA, dict(MLA, q_heads=64))
    def test_invariant_loops_do_not_follow_the_pack(self, **dims):
        packs = [problem(**dims | pack) for pack in (dict(), dict(tokens=1), DECODE, SHORT)]
        with policy("invariant"):
            rows = rows_of(packs[0], KERNEL.heuristic(packs[0], H200))
            self.assertLen({host.masks_every_block(pack, rows, 64, 1) for pack in packs}, 1)

    @parameterized.product(rows=(16, 32, 64, 128), tree=(False, True))
    def test_warps_share_out_keys_of_few_rows_without_a_tree(self, rows, tree):
        each = problem(head_dim=16, value_dim=16, pages_per_seq=256, features=("tree_mask",) if tree else ())
        config = PrefillPageAttentionConfig(block_q=rows, block_kv=64, num_warps=4)
        self.assertEqual(host._key_shares(each, config, rows), 4 if rows <= 32 and not tree else 1)

    @parameterized.parameters(8, 16, 64, 128, 256)
    def test_a_latent_tile_is_64_rows_of_tokens_or_of_a_tokens_heads(self, q_heads):
        for pack in ({}, DECODE):
            each = problem(**MLA | pack | dict(q_heads=q_heads))
            config = KERNEL.heuristic(each, H200)
            in_8_bits = replace(each, cache_dtype="int8", features=("latent", "quantised", "slot_scales"))
            for name in ("sm_80", "sm_89", "gfx942"):
                device = TARGETS[name][1]
                of_8_bits = KERNEL.heuristic(in_8_bits, device)
                self.assertLessEqual(rows_of(in_8_bits, of_8_bits), 64)
                self.assertIsNone(KERNEL.misfit(in_8_bits, device, of_8_bits))
            self.assertGreaterEqual(rows_of(in_8_bits, KERNEL.heuristic(in_8_bits, H200)), q_heads)
            if q_heads >= 64 or not pack:
                self.assertEqual((rows_of(each, config), config.block_kv), (64, 64))

    @parameterized.parameters(4, 5, 6, 7, 8)
    def test_a_group_of_any_size_fills_one_tile_of_128_rows(self, group):
        block_q = KERNEL.heuristic(problem(q_heads=8 * group), H200).block_q
        self.assertGreater(block_q * group, 64)
        self.assertLessEqual(block_q * group, 128)

    @parameterized.named_parameters(
        ("prompts", SHORT, (64, 64, 4)),
        ("many_of_shorter_blocks", SHORT | dict(tokens=2048, seqs=32), (64, 32, 4)),
        ("and_of_longer_ones_in_a_short_table", SHORT | dict(tokens=4096, pages_per_seq=256), (64, 32, 4)),
        ("one_of_a_few_tokens", dict(tokens=20, pages_per_seq=2), (64, 64, 4)),
        ("a_short_window", dict(sliding_window=512), (64, 64, 4)),
        ("several_short_chunks_of_contexts_of_any_length", dict(tokens=1024, seqs=16), (64, 64, 4)),
        ("not_a_single_one", dict(tokens=64), (128, 128, 8)),
        ("nor_prompts_that_are_long", dict(tokens=2048, pages_per_seq=128), (128, 128, 8)),
        ("nor_longer_chunks", dict(tokens=4096, seqs=16), (128, 128, 8)),
        ("nor_groups_that_would_leave_rows_empty", SHORT | dict(q_heads=192), (128, 128, 8)),
        ("nor_wide_heads", SHORT | WIDE, (128, 64, 8)),
        ("which_are_low_over_few_keys", dict(tokens=105, pages_per_seq=56) | WIDE, (16, 32, 4)),
        ("or_a_little_taller_where_these_would_be_too_many", dict(tokens=256, pages_per_seq=56) | WIDE, (32, 64, 4)),
        ("or_whose_parts_have_a_core_each", dict(tokens=88, seqs=3, pages_per_seq=32, num_kv_heads=1, cache_kv_heads=1) | WIDE | dict(q_heads=2), (16, 32, 4)),
        ("and_few_tokens_over_more", dict(tokens=13, pages_per_seq=128) | WIDE | dict(q_heads=4, num_kv_heads=2, cache_kv_heads=2), (16, 32, 4)),
        ("a_single_one_over_up_to_2048_keys", dict(tokens=98, pages_per_seq=128) | FEW_GROUPS, (64, 64, 4)),
        ("several_of_few_heads_that_leave_cores_idle", FEW_HEADS | dict(tokens=1106, seqs=2), (64, 64, 4)),
        ("a_chunk_that_half_fills_its_last_tall_tile", dict(tokens=17, q_heads=16) | TWO_HEADS, (64, 64, 4)),
        ("not_one_that_fills_it", dict(tokens=32, q_heads=16) | TWO_HEADS, (128, 128, 8)),
        ("nor_one_of_many_tiles", dict(tokens=529, q_heads=16) | TWO_HEADS, (128, 128, 8)),
        ("nor_a_large_group", dict(tokens=4) | FALCON, (128, 64, 8)),
        ("narrow_ones", SHORT | dict(head_dim=64, value_dim=64), (64, 64, 4)),
        ("mixed_packs_of_any_group", dict(tokens=704, seqs=64, q_heads=8), (64, 64, 4)),
        ("or_of_fewer_tokens_and_many_tiles", dict(tokens=384, seqs=72, q_heads=8), (64, 64, 4)),
        ("not_drafts", dict(tokens=384, seqs=64, q_heads=8), (16, 64, 4)),
    )  # fmt: skip
    def test_tiles_of_few_keys_are_two_to_a_core(self, changes, sizes):
        each = problem(**changes)
        config = KERNEL.heuristic(each, H200)
        self.assertEqual((rows_of(each, config), config.block_kv, config.num_warps), sizes)
        if sizes[0] == 64:
            self.assertLess(2 * shared_bytes(each, H200, config), 227 * 1024)

    @parameterized.named_parameters(
        ("a_decode_step_has_three_tiles_a_core", DECODE, (16, 64, 4, 3)),
        ("a_short_one_four_stages", dict(tokens=8, seqs=8, pages_per_seq=64), (16, 64, 4, 4)),
        ("in_8_bits_of_twice_as_many_keys", LONG_DECODE | IN_8_BITS, (16, 128, 4, 3)),
        ("and_two_where_a_second_round_of_three_would_be_short", DECODE | IN_8_BITS, (16, 128, 4, 4)),
        ("under_a_cap_of_as_many", LONG_DECODE | IN_8_BITS | CAPPED, (16, 64, 4, 3)),
        ("under_a_tree_of_few", DECODE | dict(IN_8_BITS, features=("quantised", "tree_mask")), (16, 32, 4, 4)),
        ("few_drafts_are_low", dict(tokens=33, seqs=7, pages_per_seq=7424, q_heads=5) | ONE_HEAD, (16, 64, 4, 3)),
        ("more_have_a_warp_for_each_16_rows", dict(tokens=80, seqs=16, pages_per_seq=1024, q_heads=5) | ONE_HEAD, (64, 64, 4, 3)),
        ("a_lone_prompt_does_not", dict(tokens=20, pages_per_seq=1024, q_heads=1) | ONE_HEAD, (32, 64, 4, 3)),
        ("nor_in_8_bits", dict(tokens=80, seqs=16, pages_per_seq=1024, q_heads=5, cache_dtype="int8", features=("quantised",)) | ONE_HEAD, (32, 64, 4, 3)),
        ("a_wide_chunk_of_few_tiles_is_lower", dict(WIDE, tokens=64, q_heads=4) | TWO_HEADS, (64, 32, 4, 3)),
        ("of_more_tiles_it_is_not", dict(WIDE, tokens=64), (128, 64, 8, 2)),
        ("but_over_few_keys", dict(WIDE, tokens=64, pages_per_seq=128), (64, 32, 4, 3)),
        ("also_of_a_window", dict(WIDE, tokens=64, sliding_window=1024), (64, 32, 4, 3)),
        ("not_of_most_cores", dict(WIDE, tokens=256, pages_per_seq=128), (128, 64, 8, 2)),
        ("a_tall_decode_step_takes_more_keys", dict(tokens=8, seqs=8) | FALCON, (128, 128, 8, 3)),
    )
    def test_sizes_where_tiles_wait_for_memory(self, changes, sizes):
        config = KERNEL.heuristic(problem(**changes), H200)
        rows = rows_of(problem(**changes), config)
        self.assertEqual((rows, config.block_kv, config.num_warps, config.num_stages), sizes)
        with policy("invariant"):
            self.assertEqual(KERNEL.heuristic(problem(**changes), H200), KERNEL.heuristic(problem(**changes | SHORT), H200))

    @parameterized.parameters(("sm_89", 32, 2), ("sm_80", 32, 2), ("sm_90", 16, 4), ("sm_100", 16, 4))
    def test_steps_of_heads_of_512_are_short_where_two_tiles_fit_a_core(self, target, block_kv, num_stages):
        _, device, shared_kib = TARGETS[target]
        each = problem(**DECODE | GEMMA_4)
        config = KERNEL.heuristic(each, device)
        self.assertEqual((config.block_kv, config.num_warps, config.num_stages), (block_kv, 4, num_stages))
        if num_stages > 2:
            self.assertLess(2 * shared_bytes(each, device, config), shared_kib * 1024)
        latent = KERNEL.heuristic(problem(**DECODE | MLA), device)
        self.assertEqual((latent.block_kv, latent.num_stages), (32, 2))

    @parameterized.named_parameters(
        ("rows", dict(block_q=64), H200, 262144, 232448),
        ("stages", dict(num_stages=6, block_kv=64), TARGETS["sm_80"][1], 196608, 166912),
        ("keys", dict(block_kv=128, num_stages=2), TARGETS["sm_89"][1], None, None),
        ("more_keys", dict(block_kv=256, num_stages=2), TARGETS["sm_89"][1], 163840, 101376),
    )
    def test_sizes_past_the_shared_memory_are_named(self, sizes, device, needed, capacity):
        config = PrefillPageAttentionConfig(**sizes).over(KERNEL.heuristic(problem(), device))
        reason = KERNEL.misfit(problem(), device, config)
        if needed is None:
            self.assertIsNone(reason)
        else:
            sizes = f"block_q {config.block_q} .* block_kv {config.block_kv} and num_stages {config.num_stages}"
            self.assertRegex(reason, f"cfg.{sizes} need {needed} bytes .* more than the {capacity} of {device.kind}")

    @parameterized.parameters({}, dict(tokens=16, seqs=16), WIDE, dict(dtype="float32"))
    def test_candidates_start_with_the_heuristic_and_are_its_neighbours(self, **changes):
        configs = KERNEL.candidates(problem(**changes), H200)
        self.assertEqual(configs[0], KERNEL.heuristic(problem(**changes), H200))
        self.assertBetween(len(set(configs)), 4, 12)
        for config in configs[1:]:
            self.assertIn(config.num_warps, (4, 8))
            changed = {name for name, _ in config.sizes().items() - configs[0].sizes().items()}
            self.assertLess(len(changed - {"num_splits"}), 4)

    def test_candidates_of_four_warps_have_blocks_that_their_registers_hold(self):
        halves = [config for config in KERNEL.candidates(problem(), H200) if config.num_warps == 4]
        self.assertEqual([(config.block_q, config.block_kv) for config in halves], [(16, 64)])


class SupportsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("old_gpu", Device("cuda", "Tesla V100", "7.0"), {}, "compute capability 8.0"),
        ("no_gpu_here", Device("cuda"), {}, "no cuda device"),
        ("tpu", Device("tpu", "TPU v5"), {}, "not on tpu"),
        ("wide_head", H200, dict(head_dim=577), "head_dim may be at most 576, got 577"),
        ("wide_float32", H200, dict(head_dim=257, dtype="float32"), "head_dim may be at most 256 in float32, got 257"),
        ("float8_on_ampere", TARGETS["sm_80"][1], dict(cache_dtype="float8_e4m3fn"), "need compute capability 8.9"),
        ("endless_pool", H200, dict(num_pages=2**27), "at most 2147483647 slots"),
        ("wide_value", H200, dict(value_dim=513), "value_dim may be at most 512, got 513"),
        ("wide_group", H200, dict(WIDE, q_heads=4096), "of 512 heads of a group"),
    )
    def test_names_the_reason(self, device, changes, reason):
        with mock.patch.object(importlib.util, "find_spec", lambda name: name):
            self.assertIn(reason, KERNEL.supports(problem(**changes), device))
            self.assertIsNone(KERNEL.supports(problem(), H200))

    @parameterized.parameters("triton", "jax_triton")
    def test_where_a_package_is_missing_an_explicit_request_names_the_extra_and_auto_goes_on(self, missing):
        with mock.patch.object(importlib.util, "find_spec", lambda name: None if name == missing else name):
            reason = rf"package {missing} is missing.*pip install .paged_prefill\[cuda\]"
            with self.assertRaisesRegex(ValueError, reason):
                choose(problem(), H200, "triton")
            chosen, passed_over = choose(problem(head_dim=72), H200)
        self.assertNotEqual(chosen, "triton")
        self.assertIn(missing, passed_over["triton"])


if __name__ == "__main__":
    absltest.main()
