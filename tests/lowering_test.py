"""What a call costs: memory of the order of a tile, work that follows context and window; and the kernel contract."""

import dataclasses
import functools
import re
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.call import Device, flatten
from paged_prefill.lowering.choose import XLA
from paged_prefill.lowering.splits import merge_splits
from paged_prefill.lowering.xla import host, kernel, softmax, walks
from paged_prefill.primitive.attention import Attention, factor_and_lse
from paged_prefill.primitive.context import policy
from paged_prefill.primitive.packing import FEW_SEQUENCES, MAX_CONTEXT
from paged_prefill.tests import cases, compiling, oracle, packs, poisoned
from paged_prefill.tests.problems import problem

PART_HEIGHTS = [turns.part_heights for turns in (walks.ACCELERATOR_TURNS, walks.CPU_TURNS)]


def temporaries(chunk, pages_per_seq, *, seqs=1, num_pages=4096, dtype=jnp.float32, heads=(8, 2, 64), **parameters):
    """Bytes of temporaries of a call at page size 16; `heads` are query heads, KV heads and head_dim."""
    q_heads, kv_heads, head_dim = heads
    cache = jax.ShapeDtypeStruct((kv_heads, num_pages, 16, head_dim), dtype)
    indices = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((seqs,), (seqs, pages_per_seq), (seqs + 1,))]
    call = jax.jit(lambda *p: ragged_paged_prefill(*p, platform="xla", **parameters))
    query = jax.ShapeDtypeStruct((chunk, q_heads, head_dim), dtype)
    compiled = call.lower(query, cache, cache, *indices).compile(
        compiler_options=compiling.FUSED_AS_USERS_DO
    )
    return compiled.memory_analysis().temp_size_in_bytes


def tiles_of(lengths, heights):
    """Of each height, how many tiles sequences of these lengths have, and their first rows that are in one."""

    def described(lengths):
        return walks.tiles_of(lengths, heights, heights, lambda tiles, first, _: (tiles, first))

    return dict(zip(heights, zip(*map(np.asarray, jax.jit(described)(jnp.asarray(lengths, jnp.int32))))))


class MemoryTest(parameterized.TestCase):
    @parameterized.parameters("float32", "bfloat16")
    def test_temporaries_are_of_the_order_of_a_tile(self, dtype):
        """Bounded whatever the chunk, the page table and the pool; a float32 row of the results may be held twice."""
        dtype = jnp.dtype(dtype)
        base = temporaries(512, 512, dtype=dtype)
        self.assertLess(base, 16 * 2**20)
        slack = 2**20
        # The indices are held a few times over: two integers of 4 bytes for each entry of the page table.
        with self.subTest("page_table_pool_and_sequences_many_times_larger"):
            larger = temporaries(512, 512 * 8, seqs=16, num_pages=4096 * 4, dtype=dtype)
            self.assertLess(larger, base + 8 * 512 * 8 * 16 + slack)
        with self.subTest("chunk_4_times_longer"):
            results = 4 * 512 * 8 * (64 + 1) * 4
            self.assertLess(temporaries(512 * 4, 512, dtype=dtype), base + 2 * results + slack)

    def test_results_of_16_bits_leave_room(self):
        """These are 8 MiB, and a turn's logits and weights 4 each: not all of that is there at once."""
        self.assertLess(temporaries(1024, 64, dtype=jnp.bfloat16, heads=(32, 8, 128)), 16 * 2**20)

    def test_largest_benchmark_fits_in_64_MiB(self):
        """Chunk 2048 at 16384, the goal of benchmarks/cpu.py; ejKernel's XLA path takes 1.2 GiB."""
        self.assertLess(temporaries(2048, 1024), 64 * 2**20)


class CostTest(parameterized.TestCase):
    """How many blocks of keys are fetched, those of idle lanes too: what a call costs, whatever the machine does."""

    CONFIG = PrefillPageAttentionConfig(block_q=32, block_kv=64)

    def blocks(self, sequences, pages_per_seq, turns=walks.ACCELERATOR_TURNS, tokens=None, **parameters) -> int:
        """Of sequences (new tokens, context), with a table of so many pages of 16 for each, in a pack of `tokens`."""
        lengths, context_lens = zip(*sequences)
        tokens, seqs = tokens or sum(lengths), len(sequences)
        cache = np.zeros((2, 64, 16, 8), np.float32)
        operands = dict(
            query=np.zeros((tokens, 4, 8), np.float32),
            key_cache=cache,
            value_cache=cache,
            context_lens=np.asarray(context_lens, np.int32),
            page_indices=np.zeros((seqs, pages_per_seq), np.int32),
            query_offsets=np.cumsum([0, *lengths], dtype=np.int32),
            kv_head_start=np.int32(0),
        )
        attend, fetched = self.counting(turns, tuple(parameters.items()))
        fetched.clear()
        jax.block_until_ready(attend(operands))
        jax.effects_barrier()
        return sum(fetched)

    @classmethod
    @functools.cache
    def counting(cls, turns, parameters):
        """A jitted kernel, which calls of the same shapes share, and the lanes of each fetch of the last call."""
        fetched, attention = [], Attention(1.0, **dict(parameters))

        class Counting(kernel.Walker):
            def _fetch(self, *arguments):
                jax.debug.callback(lambda: fetched.append(self.walk.lanes))
                return super()._fetch(*arguments)

        @jax.jit
        def attend(operands):
            call = flatten(operands, cache_batch_dims=0, num_kv_heads=2, attention=attention)
            with mock.patch.object(kernel, "Walker", Counting), mock.patch.multiple(walks, LANE_KEYS=16, ONLY_BLOCK=16):
                return kernel.attend(call, cls.CONFIG, jnp.float32, turns)

        return attend, fetched

    def test_follows_the_context_and_not_the_table(self):
        self.assertEqual(self.blocks([(16, 1024)], 64), 16)
        self.assertEqual(self.blocks([(16, 1024)], 4096), 16)
        self.assertEqual(self.blocks([(16, 65536)], 4096), 1024)

    def test_follows_the_window(self):
        """65536 keys of context seen by 16 rows through a window of 64: 79 keys, which may touch three blocks."""
        self.assertLessEqual(self.blocks([(16, 65536)], 4096, sliding_window=64), 3)

    def test_follows_causality(self):
        """A chunk that is its own context: each tile stops at its last row."""
        self.assertEqual(self.blocks([(128, 128)], 8), 1 + 1 + 2 + 2)

    def test_a_pack_costs_what_its_sequences_cost(self):
        alone = self.blocks([(64, 1024)], 64)
        self.assertLessEqual(self.blocks([(64, 1024)] + [(1, 16)] * 63, 64), alone + 64)
        self.assertEqual(self.blocks([(64, 1024)] + [(0, 16)] * 63, 64, tokens=64 + 63), alone)

    def test_of_a_ragged_pack_follows_each_context(self):
        """Blocks of 16 keys and four lanes: the long sequence has all of them, the others one each, as it is right."""
        long, short = (1, 16384), (1, 16)
        self.assertEqual(self.blocks([long], 1024), 1024)
        for sequences in ([long] + [short] * 63, [short] * 63 + [long], [short] * 40 + [long] + [short] * 23):
            self.assertEqual(self.blocks(sequences, 1024), 1024 + 64)

    @parameterized.parameters((300, 3), (600, 5), (896, 7), (1024, 8), (4096, 8))
    def test_no_more_lanes_share_a_row_than_its_table_has_blocks(self, keys, lanes):
        """A lane without a block fetches one all the same; but bits of the invariant policy follow no table's width."""
        row = problem(seqs=3, tokens=3, page_size=4, pages_per_seq=keys // 4)
        config = PrefillPageAttentionConfig(block_q=32, block_kv=256)
        wide = walks.walks(row, config, walks.CPU_TURNS)[-1]
        self.assertEqual((wide.block_kv, wide.lanes, wide.splits), (walks.LANE_KEYS, lanes, lanes))
        with policy("invariant"):
            self.assertEqual(walks.walks(row, config, walks.CPU_TURNS)[-1].lanes, 8)

    def test_lanes_are_filled_in_order_of_their_blocks(self):
        """Of a table too narrow for lanes to be shared: long and short in turn cost as if they were sorted."""
        eight_lanes = walks.ACCELERATOR_TURNS._replace(bytes=8 * 2 * 16 * 8 * 4)
        self.assertEqual(self.blocks([(1, 32), (1, 16)] * 16, 2, eight_lanes), 8 * (2 * 2 + 2))

    def test_lanes_of_short_tables_walk_only_where_there_are_single_rows(self):
        """A table of one block: as many sequences as there are lanes, of which each has one, or none walks."""
        self.assertEqual(self.blocks([(16, 16)] * 8, 1), 8)
        self.assertEqual(self.blocks([(16, 16)] * 7 + [(1, 16)], 1, tokens=128), 7 + walks.ACCELERATOR_TURNS.lanes)

    def test_a_token_with_a_short_table_is_no_loop(self):
        """Loops, and tiles that cannot be, are compiled too."""
        shapes = dict(query=(1, 16, 64), caches=(2, 9, 16, 64), context_lens=(1,), table=(1, 6), offsets=(2,))
        query, cache, *rest = (
            jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) > 2 else jnp.int32) for shape in shapes.values()
        )
        self.assertNotIn("stablehlo.while", jax.jit(ragged_paged_prefill).lower(query, cache, cache, *rest).as_text())

    def decode(self, **closed_over):
        """Eight steps over 1024 keys, lowered; of arrays that are given, as constants."""
        shapes = dict(query=(8, 32, 64), key_cache=(8, 9, 32, 64), value_cache=(8, 9, 32, 64))
        shapes |= dict(context_lens=(8,), page_indices=(8, 32), query_offsets=(9,))
        given = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) > 2 else jnp.int32)
            for name, shape in shapes.items()
            if name not in closed_over
        }
        return jax.jit(lambda given: ragged_paged_prefill(**given, **closed_over)).lower(given)

    def test_what_is_known_of_tiles_is_a_kernel_a_turn(self):
        """Each kernel takes 10 to 25 ms to compile: they were 66, of which 24 made integers alone."""
        text = self.decode().compile().as_text()
        parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
        calls = re.findall(r"to_apply=%?([\w.-]+), frontend_attributes=\{[^}]*xla_cpu_small_call", text)
        self.assertGreaterEqual(len(calls), 5)  # tables, a plan, and what is running
        within = set()
        while calls:
            within.add(name := calls.pop())
            calls += set(re.findall(r"(?:to_apply|body|condition)=%?([\w.-]+)", parts[name])) - within
        kernels = [line for name, part in parts.items() if name not in within for line in part.split("\n")]
        kernels = [line for line in kernels if " fusion(" in line]
        integers = [line for line in kernels if re.search(r"= s32\[", line)]
        self.assertLessEqual(len(kernels), 30)
        self.assertLessEqual(len(integers), 6)

    def test_each_argument_of_a_kernel_of_many_steps_has_a_use_and_is_no_constant(self):
        """XLA ends the process of a caller whose arguments lose their use, as a constant that it copies within does."""
        text = self.decode(context_lens=jnp.full(8, 1024), query_offsets=jnp.arange(9)).as_text()
        calls = re.findall(r"call @(\w+)\(([^)]*)\) \{mhlo.frontend_attributes = \{[^}]*xla_cpu_small_call", text)
        self.assertGreaterEqual(len(calls), 5)
        for name, arguments in calls:
            body = text[text.index(f"@{name}(", text.index("func.func private @" + name + "(") - 1) :].split("\n  }")[0]
            for i, argument in enumerate(filter(None, arguments.split(", "))):
                self.assertGreaterEqual(len(re.findall(rf"%arg{i}\b", body)), 2, (name, i))
                source = re.escape(argument.split("#")[0])
                self.assertRegex(text, rf"{source}(:\d+)? = stablehlo.optimization_barrier|{source}: ", (name, i))

    @parameterized.parameters((1, 64), (2, 64), (1, 128))
    def test_a_loop_over_keys_in_place_is_no_kernel_of_one_thread(self, group, head_dim):
        """XLA makes one of a loop that calls no library, and of few rows no step would: it took 3 to 4 times as long."""
        shapes = (16, 4 * group, head_dim), *[(4, 305, 16, head_dim)] * 2, (16,), (16, 19), (17,)
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32 if len(s) > 2 else jnp.int32) for s in shapes]
        text = jax.jit(ragged_paged_prefill).lower(*arrays).compile().as_text()
        loops = [line for line in text.split("\n") if "xla_cpu_small_call" in line and "to_apply=%while" in line]
        self.assertEmpty([line for line in loops if "f32[" in line])

    def entry(self, tokens, pages_per_seq) -> tuple[str, str]:
        """The optimised program of one prompt, and its part outside of loops."""
        query, cache = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 4, 64), (2, 9, 16, 64)))
        indices = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1,), (1, pages_per_seq), (2,))]
        text = jax.jit(ragged_paged_prefill).lower(query, cache, cache, *indices).compile().as_text()
        return text, text[text.index("ENTRY") :]

    def test_nothing_is_fetched_ahead_of_a_loop(self):
        """Of a short prompt no row walks alone: keys fetched for its lanes ahead of their loop are fetched in vain."""
        text, entry = self.entry(12, 2)
        block = "f32[1,2,32,64]"
        self.assertIn(block, text)
        self.assertNotIn(block, entry)

    def test_what_a_tile_is_is_computed_in_its_loop(self):
        """Ahead of it, each of a tile's numbers would be a kernel of its own to compile: 34 of them."""
        _, entry = self.entry(40, 64)
        self.assertLess(entry.count(" fusion("), 15)

    @parameterized.parameters(("float32", 6), ("bfloat16", 6), ("bfloat16", 64))
    def test_queries_are_scaled_ahead_of_products_in_place(self, dtype, pages_per_seq):
        """Once, and not for every key: in one kernel with the products, that took two to three times as long."""
        query, cache = (jax.ShapeDtypeStruct(s, dtype) for s in ((8, 4, 64), (2, 99, 16, 64)))
        indices = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8,), (8, pages_per_seq), (9,))]
        call = jax.jit(lambda *operands: ragged_paged_prefill(*operands, softmax_scale=0.75))
        text = call.lower(query, cache, cache, *indices).compile().as_text()
        products = [x for x in re.split(r"\n}\n", text) if " gather(" in x and re.search(r" reduce\(.*, .*, ", x)]
        self.assertNotEmpty(products)
        self.assertFalse([x for x in products if "constant(0.75)" in x])

    @parameterized.parameters(4, 12, 64, 4096)
    def test_sizes_do_not_follow_the_number_of_sequences(self, pages_per_seq):
        """But for how many lanes walk at once, on which no bit of a row depends (`invariant_test.ShortTablesTest`)."""
        few, many = (problem(seqs=n, tokens=512 * n, pages_per_seq=pages_per_seq, num_kv_heads=2) for n in (2, 64))
        configs = [XLA.heuristic(p, Device("cpu")) for p in (few, many)]
        self.assertEqual(*configs)
        few, many = (walks.walks(p, configs[0], walks.CPU_TURNS) for p in (few, many))
        self.assertEqual(few, [a._replace(lanes=b.lanes) if a.at_once else a for a, b in zip(many, few, strict=True)])

    def test_many_short_sequences_take_few_turns(self):
        """A turn of a loop costs as much as hundreds of keys: the loop's counter must not count sequences."""
        short = problem(seqs=64, tokens=64, pages_per_seq=4, num_kv_heads=2, head_dim=64)
        for turns, lanes in ((walks.CPU_TURNS, 64), (walks.ACCELERATOR_TURNS, walks.ACCELERATOR_TURNS.lanes)):
            wide = walks.walks(short, self.CONFIG, turns)[-1]
            self.assertEqual((wide.height, wide.lanes), (1, lanes))


class XlaTest(parameterized.TestCase):
    CONFIG = PrefillPageAttentionConfig(block_q=128, block_kv=128)

    @parameterized.parameters((True, "bf16", 0.2), (False, "f32", 0.2), (True, "bf16", -0.2), (True, "bf16", 0.0))
    def test_bfloat16_is_right_in_the_products_of_either_kind_of_cpu(self, multiplies, dtype, scale):
        """By any scale: the largest logit is looked for before one is multiplied by it."""
        pack = cases.Case("products", ((70, 133), (1, 40), (3, 9)), dtype="bfloat16").pack()
        call = jax.jit(
            lambda *p: ragged_paged_prefill(*p, return_lse=True, softmax_scale=scale, cfg=cases.SMALL_TILES)
        )
        with mock.patch.object(host, "_cpu_multiplies_bfloat16", return_value=multiplies):
            lowered = call.lower(*pack)
        self.assertEqual(set(re.findall(r"dot_general .*: \(tensor<\S*x(\w+)>", lowered.as_text())), {dtype})
        packs.assert_matches_reference(pack, *lowered.compile()(*pack), softmax_scale=scale)

    @parameterized.parameters(
        ("vendor_id : AuthenticAMD\nflags\t\t: fpu avx512_bf16\n", True),
        ("vendor_id : GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("vendor_id : GenuineIntel\nflags\t\t: fpu avx512_bf16\n", False),
        ("vendor_id : AuthenticAMD\nflags\t\t: fpu avx512f\nbugs : avx512_bf16\n", False),
        ("processor : 0\nFeatures\t: fp asimd\n", False),
    )
    def test_the_cpu_is_asked_what_it_multiplies(self, cpuinfo, multiplies):
        ask = host._cpu_multiplies_bfloat16.__wrapped__
        with mock.patch("builtins.open", mock.mock_open(read_data=cpuinfo)):
            self.assertEqual(ask(), multiplies)
        with mock.patch("builtins.open", side_effect=FileNotFoundError):
            self.assertFalse(ask())

    @parameterized.parameters(
        ("cpu", 200, 2, (128, 200)),
        ("cpu", 600, 2, (128, 600)),
        ("cpu", 1000, 2, (256, 256)),
        ("cpu", 2000, 2, (256, 512)),
        ("cpu", 2000, 4, (256, 256)),
        ("cpu", 2000, 32, (128, 256)),
        ("cpu", 5000, 1, (1024, 256)),
        ("cpu", 5000, 8, (512, 256)),
        ("cpu", 5000, 32, (128, 256)),
        ("cpu", 600, 64, (32, 256)),
        ("cuda", 200, 2, (128, 200)),
        ("cuda", 600, 2, (128, 256)),
        ("cuda", 2000, 16, (128, 256)),
        ("cuda", 5000, 2, (256, 512)),
    )
    def test_sizes_follow_the_table_and_the_platform(self, platform, keys, group, sizes):
        """What two threads of a CPU share must be large; and its logits must not be, where many heads share keys."""
        call = problem(tokens=keys, pages_per_seq=keys // 20, page_size=20, q_heads=2 * group, num_kv_heads=2)
        config = XLA.heuristic(call, Device(platform))
        self.assertEqual((config.block_q, config.block_kv), sizes)

    @parameterized.product(block_q=(1, 2, 8, 16, 32, 33, 64, 256, 512, 1024), parts=PART_HEIGHTS)
    def test_tiles_cover_every_length_and_little_more(self, block_q, parts):
        lengths = np.arange(1, 3 * 1024 + 2, dtype=np.int32)  # of one shape, since each compiles all that runs on it
        heights = walks.heights_of(block_q, parts)
        self.assertEqual(heights, tuple(sorted(set(heights), reverse=True)))
        tiles = tiles_of(lengths, heights)
        counts, rows = {}, np.zeros(len(lengths), np.int32)
        for height in heights:
            counts[height], first = tiles[height]
            np.testing.assert_array_equal(first[counts[height] > 0], rows[counts[height] > 0])  # behind the taller
            rows += height * counts[height]
        in_vain = rows - lengths
        self.assertEqual(in_vain.min(), 0)
        self.assertLess(in_vain.max(), max(block_q / 2, heights[-2:][0]))
        np.testing.assert_array_equal(in_vain[lengths % block_q == 1], 0)
        for n in {x for x in (1, 2, 5, 8, 17, block_q // 2 + 1, block_q) if x <= len(lengths)}:
            needed = {height for height, count in counts.items() if count[:n].any()}
            self.assertEqual(set(walks.needed_heights(heights, n)), needed)  # the rest is left out

    @parameterized.parameters(1, 20, 48, 128, 250, 300, 1024)
    def test_one_sequence_compiles_no_lower_tiles_than_it_is_cut_into(self, tokens):
        """And is cut as beside others; where it is shorter than it may be, what is left takes a low tile all the same."""
        config = PrefillPageAttentionConfig(block_q=256, block_kv=256)
        alone, beside = (
            walks.heights_of_call(problem(seqs=n, tokens=tokens), config, walks.CPU_TURNS) for n in (1, tokens // 2 + 1)
        )
        self.assertEqual(alone, beside[: len(alone)])
        self.assertTrue(alone[-1] == 1 or 4 * alone[-1] <= tokens or len(alone) == 1)
        lengths = [tokens, tokens // 2, 1]
        cuts = [{h: tiles for h, (tiles, _) in tiles_of(lengths, heights).items()} for heights in (alone, beside)]
        self.assertEqual(*({height: tiles[0] for height, tiles in cut.items() if tiles[0]} for cut in cuts))
        covered = sum(height * tiles for height, tiles in cuts[0].items())
        self.assertTrue((covered >= np.asarray(lengths)).all())

    @parameterized.parameters((2, [1]), (8, [1]), (9, [8, 1]), (17, [32, 1]), (300, [32, 1]))
    def test_a_pack_of_as_many_sequences_as_tokens_compiles_few_heights(self, seqs, heights):
        """For each takes 0.3 to 0.6 seconds. But bits of the invariant policy follow no pack."""
        call, config = problem(seqs=seqs, tokens=seqs), PrefillPageAttentionConfig(block_q=256, block_kv=256)
        self.assertEqual([walk.height for walk in walks.walks(call, config, walks.CPU_TURNS)], heights)
        with policy("invariant"):
            self.assertEqual(
                walks.heights_of_call(call, config, walks.CPU_TURNS), walks.heights_of(256, walks.CPU_TURNS.part_heights)
            )

    @parameterized.product(
        lengths=((3, 0, 1, 2, 0, 1, 0), (7, 0, 0, 0, 0, 0, 0), (0, 30, 1, 5, 1, 0) + (0,) * 31), spare_columns=(0, 90)
    )
    def test_longer_sequences_in_packs_of_as_many_sequences_as_tokens(self, lengths, spare_columns):
        """Where each token is a tile, and where there is one height besides; of one block, and of several."""
        self.assertLen(lengths, sum(lengths))
        sequences = [(length, length + 7 * i) for i, length in enumerate(lengths)]
        for operands in (dict(sinks=True), dict(key_ranges=True), dict(tree_words=1), dict(sliding_window=9)):
            call = poisoned.make_call(0, sequences, page_size=8, spare_columns=spare_columns, **operands)
            window = {name: x for name, x in operands.items() if name == "sliding_window"}
            results = jax.jit(lambda call: ragged_paged_prefill(**call, **window, return_lse=True))(call)
            oracle.assert_matches(call, *results, **window)

    @parameterized.parameters((5, {8: 1}), (16, {8: 2}), (17, {32: 1}), (40, {32: 1, 8: 1}), (33, {32: 1, 1: 1}))
    def test_few_tokens_take_low_tiles_on_a_cpu(self, length, tiles):
        """Five drafted tokens in a tile of 32 rows took four times as long."""
        heights = walks.heights_of(256, walks.CPU_TURNS.part_heights)
        counts = {height: int(tiles) for height, (tiles, _) in tiles_of(length, heights).items()}
        self.assertEqual({height: n for height, n in counts.items() if n}, tiles)

    @parameterized.parameters(
        (512, 1300, {512: 2, 256: 1, 32: 1}), (1024, 800, {256: 3, 32: 1}), (1024, 900, {1024: 1})
    )
    def test_what_tall_tiles_leave_takes_tiles_that_are_as_fast(self, block_q, length, tiles):
        heights = walks.heights_of(block_q, walks.CPU_TURNS.part_heights)
        counts = {height: int(tiles) for height, (tiles, _) in tiles_of(length, heights).items()}
        self.assertEqual({height: n for height, n in counts.items() if n}, tiles)

    @parameterized.product(group=(1, 3, 7, 8), dtype=("float32", "bfloat16", "float16"))
    def test_few_rows_are_multiplied_where_keys_and_values_lie(self, group, dtype):
        """No block is copied for them; and no NaN of a slot that no row sees gets into a sum."""
        sequences = ((1, 700), (1, 1), (1, 260), (1, 399))
        case = cases.Case("in_place", sequences, 2 * group, 2, 48, 40, page_size=16, dtype=dtype, sliding_window=300)
        rows = problem(seqs=4, tokens=4, q_heads=2 * group, num_kv_heads=2)
        self.assertEqual(walks.walks(rows, self.CONFIG, walks.CPU_TURNS)[-1].in_place, group <= 7)
        float8 = dataclasses.replace(rows, cache_dtype="float8_e4m3fn")
        self.assertFalse(walks.walks(float8, self.CONFIG, walks.CPU_TURNS)[-1].in_place)
        int8 = dataclasses.replace(rows, cache_dtype="int8")
        self.assertEqual(walks.walks(int8, self.CONFIG, walks.CPU_TURNS)[-1].in_place, group <= 3)
        with mock.patch.object(walks, "LEAST_IN_PLACE", 1):
            cases.check(case)

    @parameterized.product(turn_bytes=(2**22, 2**13), in_place=(False, True))
    def test_single_rows_of_short_tables_walk_at_once(self, turn_bytes, in_place):
        """All of a pack, or as many as a turn may hold; beside longer sequences, and some without a token."""
        sequences = ((1, 30), (0, 20), (1, 1), (3, 17), (1, 48), (0, 0), (1, 33), (40, 41), (1, 5))
        rows = problem(seqs=9, tokens=48, q_heads=4, num_kv_heads=2, head_dim=16, page_size=8, pages_per_seq=6)
        least = 1 if in_place else walks.LEAST_BYTES_IN_PLACE
        with mock.patch.multiple(walks, ONLY_TURN_BYTES=turn_bytes, LEAST_BYTES_IN_PLACE=least):
            wide = walks.walks(rows, self.CONFIG, walks.CPU_TURNS)[-1]
            self.assertEqual((wide.lanes, wide.in_place), (9 if turn_bytes == 2**22 else 1, in_place))
            cases.check(cases.Case("at_once", sequences, 4, 2, 16, page_size=8, attn_logits_soft_cap=3.0))

    @parameterized.parameters((None, 8), (20, 8), (None, 64))
    def test_tall_tiles_that_look_at_half_a_table_take_half_a_block(self, window, page_size):
        """Of the sequences' first tiles and of none but those, or with a window of others too; or half a page, of one."""
        sequences = ((64, 64), (33, 33), (20, 32), (20, 33), (40, 60), (17, 17), (1, 30))
        config = PrefillPageAttentionConfig(block_q=32, block_kv=64)
        case = cases.Case("halves", sequences, page_size=page_size, sliding_window=window, cfg=config, spare_columns=0)
        rows = problem(seqs=7, tokens=195, page_size=page_size, pages_per_seq=64 // page_size)
        with mock.patch.object(walks, "LEAST_HALVED", 2**11):
            halved = [[w.run * runs for runs in w.few_runs] for w in walks.walks(rows, config, walks.CPU_TURNS)]
            self.assertEqual(halved, [[32], [], []])
            with policy("invariant"):  # bits follow no table's width
                self.assertEqual(walks.walks(rows, config, walks.CPU_TURNS)[0].few_runs, ())
            cases.check(case)

    @parameterized.parameters(16, 128)
    def test_first_tiles_of_prompts_take_what_they_look_at(self, page_size):
        """A fourth of a block, of a page too: 48 tokens in a table of 512 keys took three times as long with half of it."""
        sequences = ((32, 32), (33, 33), (20, 32), (20, 33), (40, 64), (33, 65), (17, 128), (1, 30))
        config = PrefillPageAttentionConfig(block_q=32, block_kv=128)
        rows = problem(seqs=8, tokens=196, page_size=page_size, pages_per_seq=128 // page_size)
        with mock.patch.object(walks, "LEAST_HALVED", 2**11):
            shorter = [[w.run * runs for runs in w.few_runs] for w in walks.walks(rows, config, walks.CPU_TURNS)]
            self.assertEqual(shorter, [[32, 64], [], []])
            cases.check(cases.Case("first", sequences, page_size=page_size, cfg=config, spare_columns=0))

    def test_few_rows_of_a_short_table_take_fewer_keys_at_once(self):
        """Of a table that taller tiles take as one block: most prompts there are short. Never more than of long ones."""
        for keys, expected in ((256, 256), (272, 128), (512, 128), (1024, 256)):
            rows = problem(seqs=2, tokens=70, page_size=16, pages_per_seq=keys // 16)
            config = PrefillPageAttentionConfig(block_q=64, block_kv=min(keys, 512))
            of_height = {walk.height: walk.block_kv for walk in walks.walks(rows, config, walks.CPU_TURNS)}
            self.assertEqual(of_height[8], expected)
            with policy("invariant"):
                of_height = {walk.height: walk.block_kv for walk in walks.walks(rows, config, walks.CPU_TURNS)}
                self.assertEqual(of_height[8], 256)

    def test_short_prompts_of_long_tables_take_half_a_block(self):
        """In tiles that can be of sequences so short: 20 prompts of 30 to 100 tokens took three times as long."""
        sequences = ((32, 32), (20, 20), (20, 33), (40, 60), (17, 90), (5, 5), (1, 30))
        config = PrefillPageAttentionConfig(block_q=128, block_kv=64)
        rows = problem(seqs=7, tokens=135, page_size=8, pages_per_seq=30)
        with mock.patch.object(walks, "LEAST_HALVED", 2**11):
            halved = [walk.few_runs for walk in walks.walks(rows, config, walks.CPU_TURNS)]
            self.assertEqual(halved, [(), (4,), (), ()])
            cases.check(cases.Case("short_of_long", sequences, page_size=8, cfg=config, spare_columns=18))

    def test_few_rows_have_no_copy_of_their_keys(self):
        block = 4 * 8 * 2 * walks.LANE_KEYS * 64  # of eight lanes and two heads
        self.assertLess(temporaries(1, 512), block)

    @parameterized.parameters(None, 100)
    def test_blocks_of_which_all_is_seen_are_not_masked(self, window):
        """Whether they are is asked of each; in every block something is hidden or nothing."""
        config = PrefillPageAttentionConfig(block_q=32, block_kv=16)
        sequences = ((100, 400), (40, 90), (33, 33), (17, 200))
        cases.check(cases.Case("masks", sequences, sliding_window=window, cfg=config))


class SplitsTest(parameterized.TestCase):
    def test_merged_parts_are_the_whole_and_nan_stays(self):
        rng = np.random.default_rng(0)
        lse, out = rng.normal(size=(3, 5, 2)) * 9, rng.normal(size=(3, 5, 2, 4))
        lse[:, 3], out[:, 3] = -np.inf, 0  # sees no key
        lse[0, 2], out[0, 2] = -np.inf, 0  # sees none in one part
        lse[1, 4, 0], out[1, 4, 0] = np.nan, np.nan
        merged, merged_lse = merge_splits(jnp.float32(out), jnp.float32(lse), jnp.float32)
        weights = np.exp(lse)
        total = weights.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.testing.assert_allclose(merged_lse, np.log(total), rtol=1e-5)
            want = (weights[..., None] * out).sum(0) / total[..., None]
        want[3] = 0
        np.testing.assert_allclose(merged, want, rtol=1e-4, atol=1e-6)
        self.assertTrue(np.isnan(merged_lse[4, 0]))

    def test_lanes_that_share_a_tile_become_one_and_others_stay(self):
        rng = np.random.default_rng(1)
        lanes, splits, rows = 6, 3, (2, 5)
        largest, total = rng.normal(size=(lanes, *rows)) * 9, rng.uniform(1, 9, (lanes, *rows))
        unnormalised = rng.normal(size=(lanes, *rows, 4))
        for unseen in (np.s_[1], np.s_[:, 1, 2]):  # a lane without a block, and a row that sees no key
            largest[unseen], total[unseen], unnormalised[unseen] = -np.inf, 0, 0
        factor, _ = factor_and_lse(jnp.float32(total), jnp.float32(largest))
        running = softmax.Running(*map(jnp.float32, (largest, total, factor, unnormalised)))
        merged = softmax.merge_lanes(running, jnp.arange(lanes) < splits, splits)
        for x, before in zip(merged, running, strict=True):
            np.testing.assert_array_equal(x[splits:], before[splits:])
        top = largest[:splits].max(0)
        weights = np.exp(largest[:splits] - np.where(np.isneginf(top), 0, top))
        total = (total[:splits] * weights).sum(0)
        factor = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
        wanted = top, total, factor, (unnormalised[:splits] * weights[..., None]).sum(0)
        for x, want in zip(merged, wanted, strict=True):
            np.testing.assert_allclose(x[0], want, rtol=1e-5, atol=1e-6)


class ContractTest(parameterized.TestCase):
    @parameterized.parameters(0, 1, 2)
    def test_flatten_is_one_pack_over_pools(self, cache_batch_dims):
        lead = (2, 3)
        rng = np.random.default_rng(0)
        cache_lead = lead[:cache_batch_dims]
        query = jnp.asarray(rng.standard_normal((*lead, 10, 4, 8)), jnp.float32)
        keys, values = (jnp.asarray(rng.standard_normal((*cache_lead, 2, 5, 4, d)), jnp.float32) for d in (8, 6))
        context_lens = jnp.asarray(rng.integers(0, 20, (*lead, 2)), jnp.int32)
        page_indices = jnp.asarray(rng.integers(0, 5, (*lead, 2, 5)), jnp.int32)
        offsets = jnp.asarray(np.sort(rng.integers(0, 11, (*lead, 3))), jnp.int32)
        pack = packs.Pack(query, keys, values, context_lens, page_indices, offsets)
        call = flatten(
            pack._asdict() | dict(kv_head_start=jnp.int32(0)),
            cache_batch_dims=cache_batch_dims,
            num_kv_heads=2,
            attention=Attention(1.0),
        )
        flat_query, key_pages, value_pages, sequences = call.query, call.key_pages, call.value_pages, call.sequences
        self.assertEqual(flat_query.shape, (60, 4, 8))
        self.assertEqual((key_pages.shape[1:], value_pages.shape[1:]), ((2, 5, 4, 8), (2, 5, 4, 6)))
        for array in sequences:
            self.assertEqual(array.dtype, jnp.int32)
        for number, (a, b) in enumerate(np.ndindex(lead)):
            for seq in range(2):
                i = number * 2 + seq
                rows = slice(int(sequences.start[i]), int(sequences.start[i] + sequences.length[i]))
                np.testing.assert_array_equal(flat_query[rows], query[a, b, offsets[a, b, seq] : offsets[a, b, seq + 1]])
                self.assertEqual(sequences.context_len[i], context_lens[a, b, seq])
                np.testing.assert_array_equal(sequences.page_indices[i], page_indices[a, b, seq])
                np.testing.assert_array_equal(key_pages[sequences.pool[i]], keys[(a, b)[:cache_batch_dims]])

    @parameterized.parameters(3, 12)
    def test_sinks_are_of_rows_that_a_sequence_owns(self, seqs):
        call = poisoned.make_call(0, ((2, 20), (0, 9), (3, 2)) * (seqs // 3), q_heads=4, kv_heads=2, head_dim=8,
                                  sinks=True, tokens_before=2, tokens_after=1, page_size=4)
        parameters = dict(cache_batch_dims=0, num_kv_heads=2, attention=Attention(1.0))
        flat = flatten(call | dict(kv_head_start=0), **parameters)
        sinks = np.asarray(flat.sinks_of_rows())
        offsets, tokens = call["query_offsets"], len(call["query"])
        token = np.arange(tokens)
        owned = ((offsets[:-1, None] <= token) & (token < offsets[1:, None])).any(0)
        np.testing.assert_array_equal(sinks, np.where(owned[:, None], call["sinks"], -np.inf))

    @parameterized.parameters(4, FEW_SEQUENCES + 3)
    def test_flatten_makes_indices_harmless(self, seqs):
        rng = np.random.default_rng(0)
        extremes = [-(2**31), -1, 0, 3, 9, 10, 11, 2**30, 2**31 - 1]
        for _ in range(20):
            shapes = ((seqs,), (seqs, 5), (seqs + 1,))
            lens, pages, offsets = (jnp.asarray(rng.choice(extremes, shape), jnp.int32) for shape in shapes)
            cache = jnp.zeros((2, 7, 4, 8))
            pack = packs.Pack(jnp.zeros((10, 4, 8)), cache, cache, lens, pages, offsets)
            start = int(rng.choice(extremes))
            call = flatten(
                pack._asdict() | dict(kv_head_start=jnp.int32(start)),
                cache_batch_dims=0,
                num_kv_heads=1,
                attention=Attention(1.0),
            )
            self.assertEqual(call.kv_head_start, np.clip(start, 0, 1))
            start, length, context_len, pool, page_indices = map(np.asarray, call.sequences)
            self.assertTrue(np.all(length >= 0) and np.all(start >= 0) and np.all(start + length <= 10))
            self.assertLessEqual(length.sum(), 10)
            bounds = np.maximum.accumulate(np.clip(offsets, 0, 10))
            np.testing.assert_array_equal([start, start + length], [bounds[:-1], bounds[1:]])
            self.assertTrue(np.all((context_len >= 0) & (context_len <= MAX_CONTEXT)))
            self.assertTrue(np.all((page_indices >= 0) & (page_indices < 7)) and not pool.any())

    def test_every_candidate_of_the_xla_kernel_computes_the_definition(self):
        pack = cases.Case("candidates", ((300, 600), (1, 40)), head_dim=16).pack()
        for config in XLA.candidates(problem(dtype="float32"), Device("cpu")):
            packs.assert_matches_reference(pack, *ragged_paged_prefill(*pack, cfg=config, return_lse=True))

    def test_config_over_a_default(self):
        default = PrefillPageAttentionConfig(block_q=64, block_kv=128, num_warps=4)
        mine = PrefillPageAttentionConfig(block_kv=32)
        self.assertEqual(mine.over(default), PrefillPageAttentionConfig(block_q=64, block_kv=32, num_warps=4))
        self.assertEqual(hash(mine), hash(PrefillPageAttentionConfig(block_kv=32)))

    def test_results_do_not_depend_on_the_configuration(self):
        """Within rounding; and no configuration, however odd, reads or writes outside."""
        pack = cases.Case("configurations", ((70, 133), (1, 40), (3, 9)), page_size=8).pack()
        for block_q, block_kv in ((1, 8), (16, 1), (128, 4096)):
            config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
            packs.assert_matches_reference(pack, *ragged_paged_prefill(*pack, cfg=config, return_lse=True))


if __name__ == "__main__":
    absltest.main()
