"""Numerics of the TPU kernel, on CPU in TPU interpret mode: copies run as late as waits allow, races are found."""

import contextlib
from dataclasses import replace
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.call import Call, Device, Sequences, flatten, unflatten
from paged_prefill.lowering.mosaic_tpu import decode, host, kernel, schedule
from paged_prefill.lowering.mosaic_tpu.schedule import max_items, owners, work_items
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.tests import cases, oracle, packs, stepping, tpus

SMALL = dict(block_q=16, block_kv=16)


def run(
    pack, *, block_q, block_kv, kv_head_start=0, num_kv_heads=None, cache_batch_dims=0, cores=1, sinks=None, only=None,
    compiled=False, **parameters,
):  # fmt: skip
    """The kernel's (out, lse), as numpy arrays; with `only`, of one launch of the two, each of which takes a second.

    That of `kernel` is all there is to packs without sequences of one token, and that of `decode` writes but theirs.
    As one program where `compiled`, which takes seconds once.
    """
    optional = {} if sinks is None else dict(sinks=sinks)
    operands = pack._asdict() | dict(kv_head_start=np.int32(kv_head_start)) | optional
    config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
    device = Device("tpu", "TPU v4", core_count=cores)
    attend = _attend if compiled else _attend.__wrapped__

    def of_pack(operands):
        call = flatten(
            operands,
            cache_batch_dims=cache_batch_dims,
            num_kv_heads=num_kv_heads or pack.key_cache.shape[-4],
            attention=Attention(**{"softmax_scale": pack.query.shape[-1] ** -0.5, **parameters}),
        )
        return attend(call, config, device, only)

    out, lse = tpus.interpreted(of_pack, operands, cores=cores)
    return unflatten(np.asarray(out), np.asarray(lse), pack.query.shape)


def rising_pack(rise, **parameters):
    """A pack whose keys change by `rise` every 16 keys in a feature that rows of the query take, leave out, or turn round.

    Up to the keys from 64 on, from where they change back. All its products are exact, and so are its logits.
    """
    shapes = dict(q_heads=2, head_dim=16, page_size=16) | parameters
    pack = packs.make_pack(14, [5, 27, 2], [20, 130, 20], tokens_after=2, **shapes)
    dtype = pack.query.dtype
    query, keys = (np.round(4 * np.asarray(x, np.float32)) / 4 for x in (pack.query, pack.key_cache))
    query[..., 0] = np.array([1, 0, -1, 1 / 64])[np.arange(len(query)) % 4, None]
    for pages in np.asarray(pack.page_indices):  # each of them a chunk of keys
        columns = np.flatnonzero((0 <= pages) & (pages < keys.shape[1]))
        keys[:, pages[columns], :, :1] *= 0  # what is NaN stays so
        keys[:, pages[columns], :, :1] += rise * (4 - np.abs(columns - 4))[:, None, None]
    return pack._replace(query=jnp.asarray(query, dtype), key_cache=jnp.asarray(keys, dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _attend(call, config, device, only):
    no_tiles = mock.patch.object(kernel, "attend", lambda call, *_: host.nothing_seen(call.problem))
    no_steps = mock.patch.object(decode, "attend", lambda *arguments: arguments[-2:])  # what there was
    with {kernel: no_steps, decode: no_tiles}.get(only, contextlib.nullcontext()):
        return host.MosaicTpu().attend(call, config, device)


# The common table, thinned: the edges of a pack, which share one program for each dtype, and one case of each parameter.
TABLE = [
    replace(case, page_size={"float32": 8, "bfloat16": 16}[case.dtype])  # the smallest pages that the kernel takes
    for case in cases.EDGES
    if case.name.removesuffix("_float32") in (
        "context_shorter_than_chunk", "context_empty", "no_new_tokens", "one_token", "one_token_each",
        "chunk_longer_than_a_tile", "chunk_is_the_context", "tokens_without_sequence", "all_mixed", "window_past_context",
    )
    or case.name.removesuffix("_bfloat16") in ("all_mixed", "soft_cap_and_window", "soft_cap_far_exceeded")
]  # fmt: skip


class TableTest(parameterized.TestCase):
    @parameterized.named_parameters(cases.named(TABLE))
    def test_matches_reference(self, case):
        def attend(*pack, cfg, return_lse, **parameters):
            given = {name: value for name, value in parameters.items() if value is not None}
            shared = case.dtype == "float32" and not given  # the program of most
            return run(packs.Pack(*pack), block_q=cfg.block_q, block_kv=cfg.block_kv, compiled=shared, **given)

        cases.check(case, attend)

    def test_holds_what_it_names(self):
        self.assertLen(TABLE, 13)


# The shapes, and so the program, of the table's first edges.
EDGE = next(case for case in TABLE if case.name == "all_mixed_float32")
EDGE_SIZES = dict(block_q=EDGE.cfg.block_q, block_kv=EDGE.cfg.block_kv, compiled=True)


class MosaicTpuTest(chex.TestCase):
    @parameterized.named_parameters(  # without parameters, the table has it
        ("window_of_one", dict(sliding_window=1)),
        ("window_and_cap_and_negative_scale", dict(sliding_window=20, attn_logits_soft_cap=2.0, softmax_scale=-0.3)),
        ("zero_scale", dict(softmax_scale=0.0)),
    )
    def test_mixed_pack(self, parameters):
        # Chunks over several tiles and blocks, decode rows, an empty chunk, an empty context, a row that sees no key
        # beside some that do.
        lengths, contexts = [37, 1, 0, 1, 5, 3, 18], [75, 40, 33, 1, 0, 2, 18]
        pack = packs.make_pack(
            0, lengths, contexts, tokens_before=2, tokens_after=20, sliding_window=parameters.get("sliding_window")
        )
        packs.assert_matches_reference(pack, *run(pack, **SMALL, **parameters), **parameters)

    @parameterized.named_parameters(
        # Each is a program to compile, and so has two shapes that have nothing to do with one another.
        ("bf16_head_dim_80_value_dim_48", dict(dtype=jnp.bfloat16, page_size=16, head_dim=80, value_dim=48)),
        ("value_dim_above_a_register_and_group_of_5", dict(head_dim=16, value_dim=192, q_heads=5, kv_heads=1)),
        ("group_of_64_and_page_of_no_power_of_2", dict(q_heads=64, kv_heads=1, page_size=24, block_kv=48)),
        ("five_kv_heads_and_page_larger_than_a_block", dict(q_heads=5, kv_heads=5, page_size=32)),
        ("block_of_lanes_and_tile_larger_than_the_pack", dict(block_kv=128, block_q=64)),
    )
    def test_shapes(self, shape):
        sizes = {name: shape.pop(name, size) for name, size in SMALL.items()}
        pack = packs.make_pack(1, [21, 1, 4], [150, 50, 4], tokens_before=1, sliding_window=40, **shape)
        packs.assert_matches_reference(pack, *run(pack, **sizes, sliding_window=40), sliding_window=40)

    @parameterized.named_parameters(
        ("groups_of_4", dict(q_heads=16, kv_heads=4)),
        ("groups_of_1_with_a_window", dict(q_heads=16, kv_heads=16, sliding_window=70)),
        ("groups_of_5", dict(q_heads=40, kv_heads=8)),
        ("steps_of_two_chunks", dict(q_heads=16, kv_heads=4, decode_keys=128)),
        ("group_of_17_and_one_kv_head", dict(q_heads=17, kv_heads=1)),
        ("beside_a_chunk_on_two_cores", dict(q_heads=12, kv_heads=4, cores=2, chunk=(20, 70))),
    )
    def test_decoding(self, shape):
        # Blocks of two chunks that are seen whole before others that are, and before those that are not, and at the ends
        # of what is seen; a sequence of more tokens between, one without any, and one that sees nothing.
        cores, window = shape.pop("cores", 1), dict(sliding_window=shape.get("sliding_window"))
        (chunk, context), decode_keys = shape.pop("chunk", (2, 20)), shape.pop("decode_keys", 32)
        lengths, contexts = [1, 1, 1, 0, 1, chunk, 1], [64, 200, 96, 33, 0, context, 70]
        pack = packs.make_pack(9, lengths, contexts, head_dim=16, tokens_before=1, tokens_after=1, **shape)
        with mock.patch.multiple(schedule, CHUNK=16, DEPTH=8, DECODE_KEYS=decode_keys):
            results = run(pack, block_q=16, block_kv=32, cores=cores, only=decode if chunk == 2 else None, **window)
        others = np.delete(np.arange(len(pack.query)), slice(*pack.query_offsets[5:7].tolist()))
        packs.assert_matches_reference(pack, *results, rows=others if chunk == 2 else None, **window)

    @parameterized.parameters(None, 110)
    def test_chunks_of_a_block_and_parts_of_a_tile(self, window):
        # Blocks of three chunks and tiles of two parts, some of them seen whole, some in part, and some skipped.
        pack = packs.make_pack(2, [40, 1, 5], [200, 60, 70], tokens_before=14, sliding_window=window)
        with mock.patch.multiple(schedule, CHUNK=16, ROWS=32, DEPTH=8):
            results = run(pack, block_q=32, block_kv=48, sliding_window=window, only=kernel)
        others = np.delete(np.arange(len(pack.query)), pack.query_offsets[1])  # than the one of one token
        packs.assert_matches_reference(pack, *results, rows=others, sliding_window=window)

    @parameterized.parameters(None, 110)
    def test_keys_that_end_before_at_and_behind_the_first_of_a_chunk(self, window):
        shapes = dict(head_dim=16, page_size=64, sliding_window=window)  # pages of few copies, each of which takes time
        pack = packs.make_pack(11, [20, 20, 20, 3], [370, 384, 392, 130], **shapes)
        with mock.patch.multiple(schedule, CHUNK=256, ROWS=32, DEPTH=128):
            results = run(pack, block_q=32, block_kv=256, sliding_window=window, only=kernel)
        packs.assert_matches_reference(pack, *results, sliding_window=window)

    def test_parts_of_a_tile_that_see_fewer_keys_of_a_chunk(self):
        # Tiles of two parts of 128 tokens, the last rows of which see 254 keys of a chunk, and more than it has; behind
        # sequences of one token, and with rows that no sequence owns.
        shapes = dict(head_dim=16, q_heads=2, kv_heads=2, page_size=64, tokens_after=9)
        pack = packs.make_pack(12, [1, 1, 512, 256], [5, 300, 512, 600], **shapes)
        with mock.patch.multiple(schedule, CHUNK=256, ROWS=128, DEPTH=128):
            results = run(pack, block_q=256, block_kv=256, only=kernel)
        packs.assert_matches_reference(pack, *results, rows=np.arange(2, len(pack.query)))

    @parameterized.parameters(256, 300)
    def test_parts_of_a_tile_whose_windows_start_in_a_chunk(self, window):
        # At its first key, behind it, and in the one before; behind a sequence that shifts rows to other tiles, and not:
        # then no part of a tile is without rows, and later parts take fewer keys.
        contexts = [16, 511 + window, 560 + window, 700 + window]
        shapes = dict(head_dim=16, q_heads=1, kv_heads=1, tokens_after=8, page_size=64)
        pack = packs.make_pack(13, [16, 256, 256, 256], contexts, sliding_window=window, **shapes)
        offsets = jnp.maximum(pack.query_offsets - 16, 0)
        aligned = pack._replace(query=jnp.roll(pack.query, -16, axis=0), query_offsets=offsets)
        with mock.patch.multiple(schedule, CHUNK=256, ROWS=128, DEPTH=128):
            out, lse = run(pack, block_q=256, block_kv=512, sliding_window=window, only=kernel)
            aligned_results = run(aligned, block_q=256, block_kv=512, sliding_window=window, only=kernel)
        packs.assert_matches_reference(pack, out, lse, sliding_window=window)
        chex.assert_trees_all_equal((out[16:784], lse[16:784]), tuple(x[:768] for x in aligned_results))

    def test_context_past_the_page_table(self):
        pack = replace(EDGE, sequences=((9, 112), (2, 16))).pack()
        self.assertEqual(pack.page_indices.shape[1] * EDGE.page_size, 112)
        longer = pack._replace(context_lens=pack.context_lens.at[0].add(3))
        packs.assert_matches_reference(longer, *run(longer, **EDGE_SIZES))

    def test_a_page_table_of_more_slots_than_int32_counts(self):
        pack, parameters = cases.ENDLESS.pack(), cases.ENDLESS.parameters
        packs.assert_matches_reference(pack, *run(pack, **SMALL, sliding_window=50), **parameters)

    def test_nothing_to_do(self):
        out, lse = run(replace(EDGE, sequences=((0, 20), (0, 0))).pack(), **EDGE_SIZES)
        np.testing.assert_array_equal(out, 0.0)
        np.testing.assert_array_equal(lse, -np.inf)

    def test_pools_and_packs(self):
        # Two pools, each with two packs that take the pages of both: four packs of other queries, keys and contexts.
        one, other = (packs.make_pack(seed, [5, 1, 5, 1], [9, 30, 14, 31]) for seed in (0, 1))

        def by_pack(start, end, pack):  # the sequences and tokens of half a pack, as a pack
            tokens = slice(int(pack.query_offsets[start]), int(pack.query_offsets[start]) + 6)
            offsets = pack.query_offsets[start : end + 1] - pack.query_offsets[start]
            return pack.query[tokens], pack.context_lens[start:end], pack.page_indices[start:end], offsets

        halves = [[by_pack(start, start + 2, pack) for start in (0, 2)] for pack in (one, other)]
        query, context_lens, page_indices, query_offsets = (
            jnp.stack([jnp.stack([half[i] for half in row]) for row in halves]) for i in range(4)
        )
        caches = [jnp.stack([getattr(pack, name) for pack in (one, other)]) for name in ("key_cache", "value_cache")]
        pack = packs.Pack(query, *caches, context_lens, page_indices, query_offsets)
        packs.assert_matches_reference(pack, *run(pack, **SMALL, cache_batch_dims=1))

    def test_kv_head_start(self):
        pack = packs.make_pack(5, [7, 1], [30, 12], q_heads=8, kv_heads=4)
        out, lse = run(pack._replace(query=pack.query[:, 4:6]), **SMALL, kv_head_start=2, num_kv_heads=1)
        whole_out, whole_lse = packs.exact(pack)
        np.testing.assert_allclose(out, whole_out[:, 4:6], atol=1e-5)
        np.testing.assert_allclose(lse, whole_lse[:, 4:6], atol=1e-5)

    def test_unseen_slots_change_no_bit(self):
        case = replace(EDGE, sequences=((19, 50), (1, 21)), sliding_window=11)
        sizes = EDGE_SIZES | dict(compiled=False)
        results = [run(case.pack(poison=poison), **sizes, sliding_window=11) for poison in (np.nan, 3.0)]
        chex.assert_trees_all_equal(*results)

    def test_neighbours_change_no_bit(self):
        # A sequence behind one that shifts it to other rows of other tiles, and alone: then nobody owns the last rows.
        pack = replace(EDGE, sequences=((3, 40), (22, 70)), tokens_before=0, sliding_window=11).pack()
        sizes = EDGE_SIZES | dict(compiled=False)
        out, lse = run(pack, **sizes, sliding_window=11)
        offsets = jnp.maximum(pack.query_offsets - 3, 0)
        alone = pack._replace(query=jnp.roll(pack.query, -3, axis=0), query_offsets=offsets)
        alone_out, alone_lse = run(alone, **sizes, sliding_window=11)
        chex.assert_trees_all_equal((out[3:25], lse[3:25]), (alone_out[:22], alone_lse[:22]))

    def test_bits_are_those_of_a_sequence_alone_in_tiles_of_another_size_and_with_other_heads_beside(self):
        # What the heuristic may choose by pack and heads under the policy "invariant": all but the chunk.
        # Its first head shares rows of decoding with others, and there are tiles of them behind.
        pack = packs.make_pack(10, [1, 33, 2], [70, 90, 40], q_heads=9, kv_heads=3, head_dim=16)
        with mock.patch.multiple(schedule, CHUNK=32, ROWS=24, DEPTH=16, DECODE_KEYS=128):
            out, lse = run(pack, block_q=32, block_kv=64)
            heads = pack._replace(query=pack.query[:, :3])
            got = run(heads, block_q=16, block_kv=32, num_kv_heads=1)
            for rows, seq in ((slice(0, 1), 0), (slice(1, 34), 1)):
                count = rows.stop - rows.start
                alone = heads._replace(  # with rows that nobody owns and sequences without any: the program of `heads`
                    query=jnp.roll(heads.query, -rows.start, axis=0),
                    query_offsets=jnp.array([0, *[count] * 3], jnp.int32),
                    context_lens=jnp.roll(pack.context_lens, -seq),
                    page_indices=jnp.roll(pack.page_indices, -seq, axis=0),
                )
                one = [x[:count] for x in run(alone, block_q=16, block_kv=32, num_kv_heads=1)]
                chex.assert_trees_all_equal(one, [out[rows, :3], lse[rows, :3]])
        chex.assert_trees_all_equal(got, (out[:, :3], lse[:, :3]))

    @parameterized.named_parameters(
        ("far", dict(kv_heads=1), 300.0, None),
        ("within_what_weights_have_room_for_with_a_window_and_sinks", dict(kv_heads=1, sliding_window=90), 5.0, 2.0),
        ("tiles_of_one_part", dict(kv_heads=2, dtype=jnp.bfloat16), 2000.0, 900.0),
    )
    def test_logits_that_rise_from_chunk_to_chunk(self, shape, rise, sink):
        # Past the maximum of the first chunk, and of some rows of a tile.
        parameters = dict(sliding_window=shape.get("sliding_window"))
        pack, other = (rising_pack(each, **shape) for each in (rise, -3 * rise))
        sinks = None if sink is None else jnp.resize(jnp.array([sink, -np.inf], jnp.float32), pack.query.shape[1])
        mine = slice(*pack.query_offsets[1:3].tolist())
        # Neighbours that rise where these fall, also in rows of its tile; and none, and it in other rows.
        pages = pack.page_indices[1][:9]
        beside = other._replace(
            query=other.query.at[mine].set(pack.query[mine]),
            key_cache=other.key_cache.at[:, pages].set(pack.key_cache[:, pages]),
        )
        count = mine.stop - mine.start
        alone = pack._replace(
            query=jnp.roll(pack.query, -mine.start, axis=0), query_offsets=jnp.array([0, 0, count, count], jnp.int32)
        )
        with mock.patch.multiple(schedule, CHUNK=16, ROWS=32, DEPTH=8):
            shape = dict(block_q=32, block_kv=32, sinks=sinks, only=kernel)
            one, two, three = (run(x, **shape, **parameters) for x in (pack, beside, alone))
        oracle.assert_matches(pack._asdict() | dict(sinks=sinks), *one, **parameters)
        chex.assert_trees_all_equal([x[mine] for x in one], [x[mine] for x in two], [x[:count] for x in three])

    def test_broken_numbers_stay_in_their_sequence(self):
        broken = replace(EDGE, sequences=cases.BROKEN.sequences)
        cases.check_broken(functools.partial(run, **EDGE_SIZES), broken)


class InterpreterTest(parameterized.TestCase):
    @parameterized.product(early=(False, True), compiled=(False, True))
    def test_a_race_would_be_found(self, early, compiled):
        """Step by step as in one program."""

        def double(source, result, buffer, semaphore):
            copy = pltpu.make_async_copy(source, buffer, semaphore)
            copy.start()
            if early:
                result[...] = 2 * buffer[...]
            copy.wait()
            if not early:
                result[...] = 2 * buffer[...]

        def call(x):
            return pl.pallas_call(
                double,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
            )(x)

        run = functools.partial(tpus.interpreted, jax.jit(call) if compiled else call, np.ones((8, 128), np.float32))
        if early:
            with self.assertRaises((AssertionError, RuntimeError)):  # JAX 0.12 raises its own
                run()
        else:
            np.testing.assert_array_equal(run(), 2.0)


class ScheduleTest(chex.TestCase):
    @parameterized.parameters(range(8))
    def test_every_owned_row_is_in_one_item(self, seed):
        rng = np.random.default_rng(seed)
        tokens, seqs = ((53, 8), (9, 1))[seed % 2]
        block_q = int(rng.integers(1, 20))
        offsets = np.sort(rng.integers(0, tokens + 1, seqs + 1)).astype(np.int32)
        start, length = offsets[:-1], np.diff(offsets)
        contexts = rng.integers(0, 99, seqs).astype(np.int32)
        sequences = Sequences(start, length, contexts, start * 0, np.zeros((seqs, 10), np.int32))
        query, pages = np.zeros((tokens, 1, 1), np.float32), np.zeros((1, 1, 10, 8, 1), np.float32)
        attention = Attention(1.0, sliding_window=7)
        call = Call.of(query, pages, pages, sequences, 0, num_kv_heads=1, attention=attention)
        before = int(stepping.run(lambda call: schedule.first_row(call, block_q), call))
        self.assertEqual(before % 8, 0)
        items, count = stepping.run(lambda call: work_items(call, block_q, before), call)
        self.assertLessEqual(int(count), max_items(tokens, seqs, block_q))
        items = [np.asarray(x) for x in items]
        owner = np.full(tokens, -1)
        previous_tile = 0
        for number in range(int(count)):
            item = schedule.Items(*(x[number] for x in items))
            tile, seq, row_start, row_end = item.tile, item.seq, item.row_start, item.row_end
            self.assertGreaterEqual(tile, previous_tile)
            previous_tile = tile
            self.assertTrue(0 <= row_start < row_end <= block_q)
            self.assertEqual(item.first_token, before + tile * block_q)
            rows = item.first_token + np.arange(row_start, row_end)
            np.testing.assert_array_equal(owner[rows], -1)
            owner[rows] = seq
            positions = int(contexts[seq]) - int(length[seq]) + rows - int(start[seq])
            np.testing.assert_array_equal(positions, item.position + np.arange(row_start, row_end))
            seen = {k for p in positions for k in range(max(0, p - 6), min(p + 1, 80))}
            self.assertEqual((item.key_start, item.key_end), (min(seen), max(seen) + 1) if seen else (0, 0))
        want = np.full(tokens, -1)
        for seq in range(seqs):
            want[offsets[seq] : offsets[seq + 1]] = seq
        seq, owned = stepping.run(lambda sequences: owners(sequences, tokens), sequences)
        np.testing.assert_array_equal(np.where(owned, seq, -1), want)
        alone = np.array([seq >= 0 and length[seq] == 1 for seq in want])  # decode.py's
        np.testing.assert_array_equal(owner, np.where(alone, -1, want))

    def test_a_chunk_behind_sequences_of_one_token_takes_no_more_tiles_than_alone(self):
        def tiles(lengths):
            start = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
            table = np.zeros((len(lengths), 10), np.int32)
            sequences = Sequences(start, np.asarray(lengths, np.int32), start * 0 + 99, start * 0, table)
            pages = np.zeros((1, 1, 10, 16, 1), jnp.bfloat16)
            query = np.zeros((sum(lengths), 1, 1), jnp.bfloat16)
            call = Call.of(query, pages, pages, sequences, 0, num_kv_heads=1, attention=Attention(1.0))
            return int(stepping.run(lambda call: work_items(call, 64, schedule.first_row(call, 64))[1], call))

        self.assertEqual(tiles([1] * 48 + [128, 1, 1]), tiles([128]))
        self.assertEqual(tiles([1] * 80 + [64]), 1)
        self.assertEqual(tiles([1] * 5), 0)

    @parameterized.parameters(
        # KV heads, group: tiles, rows, period, and the KV heads of each tile of a period
        (8, 4, (4, 8, 1), [[0, 1]]),
        (1, 8, (1, 8, 1), [[0]]),
        (32, 1, (4, 8, 1), [list(range(8))]),
        (8, 5, (5, 8, 5), [[0, 1], [1, 2, 3], [3, 4], [4, 5, 6], [6, 7]]),
        (4, 7, (4, 8, 4), [[0, 1], [1, 2], [2, 3], [3]]),
        (2, 16, (2, 16, 1), [[0]]),
        (1, 71, (1, 72, 1), [[0]]),
        (1, 3, (1, 8, 1), [[0]]),
    )
    def test_rows_of_decoding_lie_in_full_tiles(self, kv_heads, group, sizes, heads):
        row_tiles = decode.RowTiles.of(kv_heads, group)
        self.assertEqual(row_tiles[:3], sizes)
        self.assertEqual([list(row_tiles.kv_heads_of(tile)) for tile in range(row_tiles.period)], heads)


if __name__ == "__main__":
    absltest.main()
