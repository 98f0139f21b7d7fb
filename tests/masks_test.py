"""What rows see by `masks`: each function against its rule written out pair by pair, in packs of every kind."""

import contextlib

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, masks, ragged_paged_prefill
from paged_prefill.tests import cases

TOKENS = 24
# Four sequences: tokens before, between (of a sequence of none) and after; a context that is shorter than its chunk.
CONTEXT_LENS = np.array([[19, 7, 30, 3], [9, 0, 1, 60], [12, 12, 12, 12]])
QUERY_OFFSETS = np.array([[2, 9, 9, 17, 22], [0, 8, 12, 13, 24], [24, 24, 24, 24, 24]])
# What jitted code cannot check: offsets out of range or decreasing, contexts below 0 and beyond memory.
HARMLESS = np.array([-4, 6, 3, 11, 2**31 - 1]), np.array([4, -5, -(2**31), 2**31 - 1])


def draw_spans(rng, shape) -> np.ndarray:
    """Spans [*shape, 4, 2]: some overlap, some are empty, some reach out of their sequence."""
    start = rng.integers(-5, 30, (*shape, 4, 1))
    return np.concatenate([start, start + rng.integers(-2, 14, start.shape)], axis=-1)


RNG = np.random.default_rng(0)
SPANS = draw_spans(RNG, CONTEXT_LENS.shape)
PREFIX_LENS = RNG.integers(-3, 40, CONTEXT_LENS.shape)


def in_span(extra, p, j) -> bool:
    return any(start <= p < end and start <= j < end for start, end in extra)


# (name, function, its static arguments, a further array [*batch, seqs, ...], whether the row at p sees key j)
RULES = [
    ("causal", masks.causal, {}, {}, lambda p, j, _: j <= p),
    ("window", masks.causal, dict(window=5), {}, lambda p, j, _: p - 5 < j <= p),
    ("window_of_one", masks.causal, dict(window=1), {}, lambda p, j, _: j == p),
    ("wide_window", masks.causal, dict(window=2**40), {}, lambda p, j, _: j <= p),
    ("chunked", masks.chunked, dict(chunk=4), {}, lambda p, j, _: j <= p and j // 4 == p // 4),
    ("chunked_wide", masks.chunked, dict(chunk=2**40), {}, lambda p, j, _: j <= p),
    ("full", masks.full, {}, {}, lambda p, j, _: True),
    ("prefix", masks.prefix, {}, dict(prefix_lens=PREFIX_LENS), lambda p, j, m: j <= p or j < m),
    ("spans", masks.spans, {}, dict(spans=SPANS), lambda p, j, s: j <= p or in_span(s, p, j)),
    ("spans_beside_window", masks.spans, dict(window=3), dict(spans=SPANS),
     lambda p, j, s: p - 3 < j <= p or in_span(s, p, j)),
    ("spans_inside_window", masks.spans, dict(window=3, inside_window=True), dict(spans=SPANS),
     lambda p, j, s: (j <= p or in_span(s, p, j)) and p - 3 < j),
    ("no_spans", masks.spans, dict(window=3), dict(spans=SPANS[..., :0, :]), lambda p, j, _: p - 3 < j <= p),
]  # fmt: skip


def harmless(context_lens, query_offsets, tokens):
    contexts = np.clip(context_lens, 0, 2**30)
    return contexts, np.maximum.accumulate(np.clip(query_offsets, 0, tokens))


def written_out(context_lens, query_offsets, tokens, sees, further=None) -> np.ndarray:
    """Which of its sequence's first 100 keys each row of one pack sees, [tokens, 100], pair by pair."""
    visible = np.zeros((tokens, 100), bool)
    contexts, offsets = harmless(context_lens, query_offsets, tokens)
    for seq, context in enumerate(contexts):
        for token in range(offsets[seq], offsets[seq + 1]):
            p = int(context) - int(offsets[seq + 1]) + token
            for j in range(min(context, 100)):
                visible[token, j] = sees(p, j, None if further is None else further[seq])
    return visible


def seen(key_ranges) -> np.ndarray:
    """The same from key ranges [*batch, tokens, 2]."""
    key_ranges = np.asarray(key_ranges)
    assert key_ranges.dtype == np.int32 and np.all(key_ranges >= 0), key_ranges
    key = np.arange(100)
    return (key_ranges[..., :1] <= key) & (key < key_ranges[..., 1:])


@contextlib.contextmanager
def strict(x64: bool):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(x64):
        yield


class KeyRangesTest(parameterized.TestCase):
    @parameterized.named_parameters(*RULES)
    def test_every_pair_is_as_written_out(self, make, static, further, sees):
        """A pack by itself, packs of a batch, and by vmap with what is mapped and what is not."""
        (array,) = further.values() or [None]
        want = np.stack([
            written_out(context, offsets, TOKENS, sees, None if array is None else array[i])
            for i, (context, offsets) in enumerate(zip(CONTEXT_LENS, QUERY_OFFSETS))
        ])  # fmt: skip

        @jax.jit
        def ranges(context_lens, query_offsets, further):
            return make(context_lens, query_offsets, tokens=TOKENS, **further, **static)

        with strict(x64=False):
            np.testing.assert_array_equal(seen(ranges(CONTEXT_LENS, QUERY_OFFSETS, further)), want)
            np.testing.assert_array_equal(seen(jax.vmap(ranges)(CONTEXT_LENS, QUERY_OFFSETS, further)), want)
            first = {name: array[0] for name, array in further.items()}
            np.testing.assert_array_equal(seen(ranges(CONTEXT_LENS[0], QUERY_OFFSETS[0], first)), want[0])
            one = jax.vmap(ranges, in_axes=(0, None, None))(CONTEXT_LENS, QUERY_OFFSETS[0], first)
        for got, context in zip(one, CONTEXT_LENS):
            expected = written_out(context, QUERY_OFFSETS[0], TOKENS, sees, None if array is None else array[0])
            np.testing.assert_array_equal(seen(got), expected)

    @parameterized.named_parameters(*RULES)
    def test_indices_are_made_harmless_and_may_have_any_integer_dtype(self, make, static, further, sees):
        offsets, context_lens = HARMLESS
        further = {name: array[0] for name, array in further.items()}
        (array,) = further.values() or [None]
        want = written_out(context_lens, offsets, TOKENS, sees, array)
        self.assertTrue(want.any())
        ranges = jax.jit(lambda c, o, further: make(c, o, TOKENS, **further, **static))
        for dtype, x64 in ((np.int64, True), (np.int32, False)):
            with strict(x64):
                got = ranges(context_lens.astype(dtype), offsets.astype(dtype), further)
                np.testing.assert_array_equal(seen(got), want)

    @parameterized.named_parameters(*RULES)
    def test_random_packs(self, make, static, further, sees):
        rng = np.random.default_rng(1)
        ranges = jax.jit(lambda c, o, further: make(c, o, TOKENS, **further, **static))
        for _ in range(10):
            offsets = np.sort(rng.integers(0, TOKENS + 1, 5))
            context_lens = np.diff(offsets) + rng.integers(-2, 40, 4)
            drawn = dict(spans=draw_spans(rng, (4,)), prefix_lens=rng.integers(0, 40, 4))
            own = {name: drawn[name][tuple(map(slice, array.shape[1:]))] for name, array in further.items()}
            (array,) = own.values() or [None]
            want = written_out(context_lens, offsets, TOKENS, sees, array)
            np.testing.assert_array_equal(seen(ranges(context_lens, offsets, own)), want)

    def test_rows_that_no_sequence_owns_have_an_empty_interval(self):
        @jax.jit
        def all_of_them(*index):
            return [make(*index, TOKENS, **further, **static) for _, make, static, further, _ in RULES]

        for got in map(np.asarray, all_of_them(CONTEXT_LENS, QUERY_OFFSETS)):
            for ranges, offsets in zip(got, QUERY_OFFSETS):
                np.testing.assert_array_equal(ranges[: offsets[0]], 0)
                np.testing.assert_array_equal(ranges[offsets[-1] :], 0)

    def test_positions(self):
        want = np.full((3, TOKENS), -1)
        for pack, (context_lens, offsets) in enumerate(zip(CONTEXT_LENS, QUERY_OFFSETS)):
            for context, start, end in zip(context_lens, offsets, offsets[1:]):
                want[pack, start:end] = context - (end - start) + np.arange(end - start)
        got = masks.positions(CONTEXT_LENS, QUERY_OFFSETS, TOKENS)
        self.assertEqual(got.dtype, jnp.int32)
        np.testing.assert_array_equal(got, want)

    @parameterized.named_parameters(("no_tokens", 0, 3), ("no_sequences", 5, 0))
    def test_empty(self, tokens, seqs):
        index = np.zeros((2, seqs), np.int32), np.zeros((2, seqs + 1), np.int32)
        further = dict(spans=np.zeros((2, seqs, 4, 2), int), prefix_lens=np.zeros((2, seqs), int))

        @jax.jit
        def all_of_them(parents, *index):
            ranges = [
                make(*index, tokens, **{name: further[name] for name in own}, **static)
                for _, make, static, own, _ in RULES
            ]
            return *ranges, masks.tree(parents, index[1]), masks.positions(*index, tokens)

        *got, positions = all_of_them(np.zeros((2, tokens), int), *index)
        for ranges in got:
            np.testing.assert_array_equal(ranges, np.zeros((2, tokens, 2)))
        np.testing.assert_array_equal(positions, np.full((2, tokens), -1))

    def test_many_sequences(self):
        """More than the few that are written out one by one."""
        offsets = np.arange(0, 41)
        got = jax.jit(masks.causal, static_argnums=(2, 3))(np.arange(5, 45), offsets, 42, 3)
        want = written_out(np.arange(5, 45), offsets, 42, lambda p, j, _: p - 3 < j <= p)
        np.testing.assert_array_equal(seen(got), want)

    def test_sizes_may_be_symbolic(self):
        batch, seqs, spans, tokens = jax.export.symbolic_shape("batch, seqs, spans, tokens")

        def all_of_them(context_lens, query_offsets, spans, parents):
            index = context_lens, query_offsets, parents.shape[-1]
            return (
                masks.positions(*index), masks.causal(*index), masks.chunked(*index, 4), masks.full(*index),
                masks.prefix(*index, context_lens), masks.spans(*index, spans), masks.tree(parents, query_offsets),
            )  # fmt: skip

        shapes = (batch, seqs), (batch, seqs + 1), (batch, seqs, spans, 2), (batch, tokens)
        exported = jax.export.export(jax.jit(all_of_them))(*[jax.ShapeDtypeStruct(s, jnp.int32) for s in shapes])
        parents = RNG.integers(-1, 9, (3, TOKENS))
        concrete = [np.asarray(x, np.int32) for x in (CONTEXT_LENS, QUERY_OFFSETS, SPANS, parents)]
        chex.assert_trees_all_equal(tuple(exported.call(*concrete)), jax.jit(all_of_them)(*concrete))

    def test_follow_the_cut_of_their_arguments_over_a_mesh(self):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        parents = np.zeros((3, TOKENS))
        given = [x[:2].astype(np.int32) for x in (CONTEXT_LENS, QUERY_OFFSETS, SPANS, parents)]

        @jax.jit
        def both(context_lens, query_offsets, spans, parents):
            return masks.spans(context_lens, query_offsets, TOKENS, spans), masks.tree(parents, query_offsets)

        with jax.set_mesh(mesh):
            got = both(*[jax.device_put(x, jax.P("data")) for x in given])
            self.assertEqual([jax.typeof(x).sharding.spec for x in got], [jax.P("data", None, None)] * 2)
        chex.assert_trees_all_equal(got, both(*given))


class WidthsTest(parameterized.TestCase):
    @parameterized.parameters((masks.causal, "window"), (masks.chunked, "chunk"))
    def test_a_traced_width_is_a_static_one(self, make, name):
        ranges = jax.jit(lambda width: make(CONTEXT_LENS, QUERY_OFFSETS, TOKENS, **{name: width}))
        static = jax.jit(lambda width: make(CONTEXT_LENS, QUERY_OFFSETS, TOKENS, **{name: width}), static_argnums=0)
        for dtype in (jnp.int32, jnp.uint8):
            with strict(x64=False):
                np.testing.assert_array_equal(ranges(dtype(5)), static(5))
        all_before = jax.jit(masks.causal, static_argnums=2)(CONTEXT_LENS, QUERY_OFFSETS, TOKENS)
        for wide in (2**30, 2**31 - 1):
            np.testing.assert_array_equal(ranges(jnp.int32(wide)), all_before)
        for too_small in (0, -1, -(2**31)):
            np.testing.assert_array_equal(ranges(jnp.int32(too_small)), static(1))

    def test_layers_with_and_without_a_window_are_one_program(self):
        """A scan over layers whose windows are traced, against each layer by itself with a static window."""
        case = cases.Case("layers", ((9, 40), (1, 33), (3, 3), (0, 8)), page_size=4, head_dim=16, tokens_before=2)
        pack = case.pack(poison=0.0)
        windows = [5, None, 1, 200]

        @jax.jit
        def layers(query, windows):
            def layer(query, window):
                ranges = masks.causal(pack.context_lens, pack.query_offsets, len(query), window)
                return query + ragged_paged_prefill(query, *pack[1:], key_ranges=ranges, cfg=cases.SMALL_TILES), None

            return jax.lax.scan(layer, query, windows)[0]

        widths = jnp.asarray([2**30 if w is None else w for w in windows])
        self.assertEqual(str(jax.make_jaxpr(layers)(pack.query, widths)).count(" paged_prefill["), 1)

        @jax.jit
        def unrolled(query):
            for window in windows:
                query += ragged_paged_prefill(query, *pack[1:], sliding_window=window, cfg=cases.SMALL_TILES)
            return query

        np.testing.assert_allclose(layers(pack.query, widths), unrolled(pack.query), atol=1e-5, rtol=1e-6)

    @parameterized.parameters(None, 7)
    def test_ranges_of_causality_and_window_attend_as_without(self, window):
        case = cases.Case("same", ((19, 50), (1, 33), (5, 2), (0, 8)), page_size=4, head_dim=16, tokens_before=2)
        pack = case.pack(sliding_window=window)
        ranges = masks.causal(pack.context_lens, pack.query_offsets, len(pack.query), window)
        got = ragged_paged_prefill(*pack, key_ranges=ranges, return_lse=True, cfg=cases.SMALL_TILES)
        want = ragged_paged_prefill(*pack, sliding_window=window, return_lse=True, cfg=cases.SMALL_TILES)
        chex.assert_trees_all_close(got, want, atol=1e-6, rtol=1e-6)
        self.assertTrue(np.isfinite(got[1]).any())


def ancestors(parents) -> list[set[int]]:
    """The numbers of each token's ancestors and its own, in one chunk."""
    lines = []
    for token, parent in enumerate(parents):
        line = {token}
        while 0 <= parent < len(parents):
            line.add(int(parent))
            parent = parents[parent]
        lines.append(line)
    return lines


def numbers(mask) -> list[set[int]]:
    """The numbers of the bits of each row of a mask [tokens, words]."""
    bits = np.unpackbits(np.asarray(mask).astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


TREE = jax.jit(masks.tree, static_argnums=2)


class TreeTest(parameterized.TestCase):
    def assert_numbers(self, mask, want):
        """Of each row of a mask [tokens, words]; row by row, since comparing long lists at once takes minutes."""
        got = numbers(mask)
        self.assertLen(got, len(want))
        for token, (row, wanted) in enumerate(zip(got, want)):
            self.assertEqual(row, wanted, f"token {token}")

    def assert_tree(self, parents, words):
        """A chunk by itself, and in a pack behind another with tokens of nobody around it; under jit."""
        parents, offsets = np.asarray(parents), [0, len(parents)]
        with strict(x64=False):
            got = TREE(parents, np.asarray(offsets), words)
        self.assertEqual((got.dtype, got.shape), (jnp.uint32, (len(parents), words)))
        self.assert_numbers(got, ancestors(parents))
        pack = np.concatenate([[7, 7], [-1, 0, 1], parents, [0]])
        packed = TREE(pack, np.array([2, 5, 5 + len(parents)]), words)
        self.assert_numbers(packed, [set(), set(), {0}, {0, 1}, {0, 1, 2}, *ancestors(parents), set()])

    @parameterized.named_parameters(
        ("by_hand", [-1, 0, 0, 1, 1, 2, 5, -1, 7], 1),
        ("one", [-1], 2),
        ("wide", [-1] + [0] * 31, 1),
        ("forest", [-1] * 40, 2),
        ("chain_of_one_word", range(-1, 31), 1),
        ("deep", range(-1, 63), 2),
        ("deep_in_many_words", range(-1, 127), 4),
        ("binary", [(i - 1) // 2 for i in range(96)], 3),
        ("comb", [max(i - 1 - (i % 3 == 0), -1) for i in range(64)], 2),
        ("no_tokens_of_the_chunk", [-1, 3, -9, 2**31 - 1, -(2**31), 1], 2),
    )
    def test_ancestors(self, parents, words):
        self.assert_tree(list(parents), words)

    @parameterized.parameters((1, 32), (2, 33), (2, 64), (3, 90))
    def test_random_trees(self, words, tokens):
        rng = np.random.default_rng(tokens)
        for near in (2, 8, tokens):
            self.assert_tree([rng.integers(max(-1, i - near), i) for i in range(tokens)], words)

    def test_batches_and_vmap(self):
        rng = np.random.default_rng(0)
        parents = rng.integers(-1, np.arange(20), (3, 2, 20))
        offsets = np.sort(rng.integers(0, 21, (3, 2, 4)), axis=-1)
        want = np.stack([[TREE(p, o) for p, o in zip(*x)] for x in zip(parents, offsets)])
        for got in (TREE(parents, offsets), jax.vmap(jax.vmap(TREE))(parents, offsets)):
            np.testing.assert_array_equal(got, want)

    def test_a_chain_longer_than_the_mask_sees_by_causality(self):
        tokens = 150
        got = TREE(np.arange(-1, tokens - 1), np.array([0, tokens]), 2)
        self.assert_numbers(got, [set(range(min(i + 1, 64))) for i in range(tokens)])

    def test_a_loop_ends_and_stays_in_its_chunk(self):
        got = TREE(np.array([1, 0, 2, 0, 1, 0]), np.array([0, 2, 6]), 1)
        self.assert_numbers(got, [{0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}])

    def test_offsets_are_made_harmless(self):
        parents = np.array([-1, 0, 1, 0, 0, 1])
        got = TREE(parents, np.array([-3, 4, 2, 2**31 - 1]), 1)
        np.testing.assert_array_equal(got, TREE(parents, np.array([0, 4, 4, 6]), 1))

    def test_drafts_attend_as_the_path_that_leads_to_them(self):
        """Each draft of a tree, against a sequence of its ancestors alone; and beside them a prefill longer than the mask."""
        rng = np.random.default_rng(0)
        old, parents, prefill = 13, [-1, 0, 0, 1, 1, 2, 5, 3], 40
        query, key, value = (
            jnp.asarray(rng.standard_normal((old + len(parents) + prefill, h, 16)), jnp.float32) for h in (4, 2, 2)
        )

        @jax.jit
        def attend(tokens, context_lens, offsets, tree_mask=None):
            """Appends these tokens, all that were before being the old ones, and attends with them."""
            seqs = len(context_lens)
            caches = [jnp.full((2, 16 * seqs, 4, 16), jnp.nan)] * 2
            pages = jnp.arange(16 * seqs).reshape(seqs, 16)
            first = jnp.tile(jnp.arange(old), seqs)
            caches = append_to_pages(
                *caches, key[first], value[first], jnp.full(seqs, old), pages, jnp.arange(seqs + 1) * old
            )
            caches = append_to_pages(*caches, key[tokens], value[tokens], context_lens, pages, offsets)
            index = context_lens, pages, offsets
            return ragged_paged_prefill(query[tokens], *caches, *index, cfg=cases.SMALL_TILES, tree_mask=tree_mask)

        offsets = np.array([0, len(parents), len(parents) + prefill])
        pack = old + np.arange(offsets[-1]), old + np.diff(offsets), offsets
        tree = TREE(np.concatenate([parents, np.arange(-1, prefill - 1)]), offsets, 1)
        got, causal = attend(*pack, tree), attend(*pack)
        np.testing.assert_allclose(got[len(parents) :], causal[len(parents) :], atol=1e-6)
        paths = [np.array(sorted(line)) for line in ancestors(parents)]
        lengths = np.array([len(path) for path in paths])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        want = attend(old + np.concatenate(paths), old + lengths, ends)
        np.testing.assert_allclose(got[: len(parents)], want[ends[1:] - 1], atol=1e-6)


INDEX = dict(context_lens=np.zeros((2, 3), int), query_offsets=np.zeros((2, 4), int), tokens=8)
# (what is wrong, the function, its changed arguments, error, what it says)
ERRORS = [
    ("context_lens_scalar", masks.causal, dict(context_lens=3), ValueError, r"context_lens must have shape \[\.\.\., seqs\], got \(\)"),
    ("context_lens_dtype", masks.full, dict(context_lens=np.zeros((2, 3))), TypeError,
     r"context_lens must be an array of integers, got float64"),
    ("query_offsets", masks.positions, dict(query_offsets=np.zeros((2, 3), int)), ValueError,
     r"query_offsets must have shape \[2, .*4\], got \(2, 3\)"),
    ("query_offsets_dtype", masks.causal, dict(query_offsets=np.zeros((2, 4), bool)), TypeError,
     r"query_offsets must be an array of integers, got bool"),
    ("tokens", masks.causal, dict(tokens=-1), ValueError, r"tokens must be at least 0, got -1"),
    ("tokens_type", masks.causal, dict(tokens=2.0), TypeError, r"tokens must be an integer, got 2.0"),
    ("window", masks.causal, dict(window=0), ValueError, r"window must be at least 1, or an array of one, got 0"),
    ("window_type", masks.causal, dict(window=2.5), TypeError, r"window must be an integer, or an array of one, got 2.5"),
    ("window_shape", masks.causal, dict(window=np.ones(2, int)), ValueError, r"window must have shape \[\], got \(2,\)"),
    ("window_dtype", masks.causal, dict(window=jnp.float32(2)), TypeError, r"window must be an array of integers, got float32"),
    ("chunk", masks.chunked, dict(chunk=-2), ValueError, r"chunk must be at least 1, or an array of one, got -2"),
    ("chunk_none", masks.chunked, dict(chunk=None), TypeError, r"chunk must be an integer, or an array of one, got None"),
    ("prefix_lens", masks.prefix, dict(prefix_lens=np.zeros(3, int)), ValueError,
     r"prefix_lens must have shape \[2, .*3\], got \(3,\)"),
    ("prefix_lens_dtype", masks.prefix, dict(prefix_lens=np.zeros((2, 3))), TypeError, r"prefix_lens must be an array of integers"),
    ("spans", masks.spans, dict(spans=np.zeros((2, 3, 2), int)), ValueError,
     r"spans must have shape \[2, .*3, n, 2\], got \(2, 3, 2\)"),
    ("spans_seqs", masks.spans, dict(spans=np.zeros((2, 4, 1, 2), int)), ValueError, r"spans must have shape \[2, .*3, n, 2\]"),
    ("spans_ends", masks.spans, dict(spans=np.zeros((2, 3, 1, 3), int)), ValueError, r"spans must have shape \[2, .*3, n, 2\]"),
    ("spans_dtype", masks.spans, dict(spans=np.zeros((2, 3, 1, 2))), TypeError, r"spans must be an array of integers"),
]  # fmt: skip
TREE_ERRORS = [
    ("parents_scalar", dict(parents=1), ValueError, r"parents must have shape \[\.\.\., tokens\], got \(\)"),
    ("parents_dtype", dict(parents=np.zeros(8)), TypeError, r"parents must be an array of integers, got float64"),
    ("query_offsets", dict(query_offsets=np.zeros((2, 3), int)), ValueError,
     r"query_offsets must have shape \[seqs \+ 1\], got \(2, 3\)"),
    ("no_query_offsets", dict(query_offsets=np.zeros(0, int)), ValueError,
     r"query_offsets must have at least one of seqs \+ 1, got \(0,\)"),
    ("words", dict(words=0), ValueError, r"words must be at least 1, got 0"),
    ("words_type", dict(words=1.0), TypeError, r"words must be an integer, got 1.0"),
]  # fmt: skip


class ErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(*ERRORS)
    def test_names_the_argument_what_it_got_and_what_it_takes(self, make, changed, error, message):
        with self.assertRaisesRegex(error, message):
            make(**INDEX | changed)

    @parameterized.named_parameters(*TREE_ERRORS)
    def test_of_a_tree(self, changed, error, message):
        arguments = dict(parents=np.zeros(8, int), query_offsets=np.zeros(3, int)) | changed
        with self.assertRaisesRegex(error, message):
            masks.tree(**arguments)

    def test_what_is_static_says_so(self):
        with self.assertRaisesRegex(TypeError, "tokens must be an integer, got .*Tracer"):
            jax.jit(masks.causal)(*INDEX.values())


if __name__ == "__main__":
    absltest.main()
