"""What of the Hopper kernel can be tested without a GPU: what it refuses, its plans, and that it lowers."""

import dataclasses
import functools
import itertools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.call import Call, Device
from paged_prefill.lowering.mosaic_gpu import host, room
from paged_prefill.lowering.mosaic_gpu.hopper.registers import REGISTERS, WIDE_REGISTERS
from paged_prefill.lowering.mosaic_gpu.widening import behind_widening
from paged_prefill.primitive.context import policy
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.tests import layouts, packs, plans, problems
from paged_prefill.tests.covering import pairs

QUANTISED = dict(cache_dtype="float8_e4m3fn", features=frozenset({"quantised"}))
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


class SupportsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("float32", dict(dtype="float32"), HOPPER, "float32"),
        ("head_dim", dict(head_dim=72), HOPPER, "head_dim of a multiple of 16 up to 576, not 72"),
        ("quantised_heads", dict(head_dim=96, cache_dtype="int8", features=("quantised",)), HOPPER,
         "head_dim of a multiple of 64 up to 576 with caches that are quantised, not 96"),
        ("wide_heads", dict(head_dim=272), HOPPER, "head_dim of a multiple of 64 up to 576 with a latent"),
        ("head_dim_too_large", dict(head_dim=640), HOPPER, "up to 576"),
        ("value_dim", dict(value_dim=72), HOPPER, "value_dim of a multiple of 16 up to 512, not 72"),
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
        head_dim=(64, 80, 96, 128, 192, 256),
        page_size=(8, 16, 128, 192),
        pack=((1, 1), (16, 16), (5000, 1), (40000, 1)),
        features=((), ("quantised",), ("quantised", "slot_scales")),
    )
    def test_runs_with_sizes_that_fit(self, device, head_dim, page_size, pack, features):
        page_size = page_size if features else {8: 1, 192: 24}.get(page_size, page_size)  # which are gathered
        (tokens, seqs), group = pack, 7 if head_dim == 128 else 4
        given = problem(head_dim=head_dim, value_dim=head_dim, page_size=page_size, tokens=tokens, seqs=seqs,
                        q_heads=2 * group, features=features, cache_dtype="int8" if features else "bfloat16")
        if features and head_dim % 64:
            return self.assertIn("that are quantised", KERNEL.supports(given, device))
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
        heads = host.rows_of(behind_widening(given), configs[0]) // configs[0].block_q
        self.assertLess(-(-group // heads) * heads, group + 8, "too many rows are empty")

    @parameterized.parameters(
        (96, 1, 1), (80, 1, 1), (112, 1, 1), (48, 1, 1), (96, 1000, 2), (80, 1000, 4),
        (128, 1000, 1), (24, 1000, 8), (12, 1000, 16), (8, 1000, 8), (6, 1000, 32), (3, 1000, 64), (24, 3, 2), (8, 5, 8), (1, 40, 64),
    )  # fmt: skip
    def test_tiles_of_wide_heads_are_as_few_as_they_can_be(self, group, tokens_per_seq, block_q):
        given = problem(head_dim=512, value_dim=512, q_heads=2 * group, seqs=7, tokens=7 * tokens_per_seq)
        self.assertEqual(KERNEL.heuristic(given, HOPPER).block_q, block_q)

    def check_wide(self, given, configs):
        for config in configs:
            few = host.few_rows(behind_widening(given), config)  # a warpgroup alone has registers for them
            self.assertEqual((config.block_kv, config.num_warps), (64, 8 if few else 12))
            self.assertLessEqual(host.shared_bytes(behind_widening(given), config), host.SHARED_BYTES)
            self.assertIsNone(KERNEL.misfit(given, HOPPER, config))

    @parameterized.parameters(
        (16, 1, 1), (16, 4, 4), (16, 5, 8), (32, 1, 1), (32, 3, 2), (64, 1, 1), (128, 1, 1), (128, 2, 1), (48, 1, 1),
        (12, 1, 1), (8, 1, 1), (24, 1, 1), (71, 1, 1), (71, 2, 2), (71, 3, 2), (71, 7, 8), (12, 5, 8), (64, 100, 32),
    )  # fmt: skip
    def test_decode_steps_of_large_groups_have_few_empty_rows(self, group, tokens_per_seq, block_q):
        """As few tiles of 64 rows as can be load the keys, be there a longer sequence or not; single tokens have few rows."""
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
    # How rows lie, beside the usual way, and the words of the tree mask beside which each of these has ranges.
    KINDS = dict(latent=1, short=40, few_rows=40)
    STEPS_AND_PROMPT = dict(seqs=16, tokens=16), dict(dtype=jnp.float16, head_dim=64)

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
        ("drafts_of_heads_of_96", dict(seqs=16, tokens=64, head_dim=96, value_dim=64), {}),
        ("heads_of_112_over_pages_of_24", dict(head_dim=112, page_size=24), {}),
        ("heads_of_96", dict(head_dim=96), {}), ("heads_of_160", dict(head_dim=160), dict(attn_logits_soft_cap=30.0)),
        ("steps_of_heads_of_80", dict(seqs=16, tokens=16, head_dim=80), {}),
        ("steps_of_heads_of_112", dict(seqs=1, tokens=1, head_dim=112, value_dim=240, pages_per_seq=2000), {}),
        ("steps_of_values_of_32", dict(seqs=16, tokens=16, value_dim=32, page_size=1), dict(sliding_window=50)),
        ("wide_heads", dict(head_dim=512, value_dim=512), {}),
        ("wide_values", dict(head_dim=64, value_dim=384), dict(sliding_window=50)),
        ("wide_keys", dict(head_dim=576, value_dim=128), dict(attn_logits_soft_cap=30.0)),
        ("a_page_table_of_more_slots_than_int32_counts", dict(page_size=2**16, pages_per_seq=2**15 + 1), {}),
    )
    def test_lowers_for_cuda_where_there_is_no_gpu(self, operands, parameters):
        call = jax.jit(functools.partial(ragged_paged_prefill, platform="cuda", return_lse=True, **parameters))
        text = call.trace(*shapes(**operands)).lower(lowering_platforms=("cuda",)).as_text()
        self.assertIn("mosaic_gpu", text)

    @parameterized.parameters(
        *itertools.product((False, True), (0, 1, 40), ("usual",)),
        *((words == of_tree, words, kind) for kind, of_tree in KINDS.items() for words in (0, 1, 40)),
    )
    def test_lowers_with_every_operand_that_it_takes(self, ranges, words, kind):
        # What hides keys is in all combinations, and in all pairs with how rows lie, which asks for each by itself.
        # Caps and sinks, which neither asks about, are in all pairs.
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

    @parameterized.parameters(  # all dims with scales of slots and without, and in both dtypes; these with every scale
        ("int8", (1, 64, 16), (576, 512, True)), ("float8_e5m2", None, (576, 512, True)),
        ("int8", (1,), (192, 128, True)), ("float8_e5m2", (1, 64, 16), (192, 128, True)),
        ("int8", None, (512, 512, False)), ("float8_e5m2", (1, 64, 16), (512, 512, False)),
        ("int8", (1, 64, 16), (320, 384, False)), ("float8_e5m2", (1,), (320, 384, False)),
    )  # fmt: skip
    def test_lowers_for_quantised_caches_of_wide_heads(self, cache_dtype, scale, dims):
        (head_dim, value_dim, latent), soft_cap = dims, None if cache_dtype == "int8" else 50.0
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
        # Only scales of slots follow the layout; those of a cache or a head are in one pair each.
        *itertools.product(layouts.NAMES, ((2, 64, 16),), STEPS_AND_PROMPT),
        *zip(layouts.NAMES, ((), (2,)), STEPS_AND_PROMPT),
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
