"""The optional operands, alone and combined, against the oracle: what they mean, and what does not count."""

import functools

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill
from paged_prefill.lowering.xla import host, walks
from paged_prefill.lowering.xla.kernel import attend
from paged_prefill.primitive.reference import reference
from paged_prefill.tests import oracle, poisoned

# Smaller than the sequences: chunks are several tiles and no multiple of one, contexts several blocks.
SMALL_TILES = PrefillPageAttentionConfig(block_q=8, block_kv=16)
SIZES = dict(page_size=4, head_dim=16, value_dim=12, tokens_before=2, tokens_after=3)
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")


def check(operands, *, cfg=SMALL_TILES, **parameters):
    """Runs a call and holds it to the oracle."""
    out, lse = jax.jit(functools.partial(ragged_paged_prefill, **parameters, cfg=cfg, return_lse=True))(**operands)
    oracle.assert_matches(operands, out, lse, **parameters)


def causal_ranges(operands):
    """The intervals that causality leaves; junk for tokens that no sequence owns."""
    ranges = np.full((*operands["query"].shape[:1], 2), 7, np.int32)
    for seq, context in enumerate(operands["context_lens"]):
        start, end = operands["query_offsets"][seq : seq + 2]
        ranges[start:end] = np.stack([np.zeros(end - start), context - end + np.arange(start, end) + 1], -1)
    return ranges


class AloneTest(parameterized.TestCase):
    """Each operand by itself, with NaN wherever no row may look."""

    @parameterized.named_parameters(
        ("key_ranges", dict(key_ranges=True)),
        ("tree_mask", dict(tree_words=1)),
        ("sinks", dict(sinks=True)),
        ("layer", dict(layers=3)),
        ("latent", dict(latent=True)),
    )
    def test_float32(self, operand):
        operands = poisoned.make_call(0, **SIZES | operand)
        check(operands, **(dict(value_dim=12) if "latent" in operand else {}))

    @parameterized.parameters("bfloat16", "float16")
    def test_half_dtypes(self, dtype):
        check(poisoned.make_call(1, **SIZES, key_ranges=True, tree_words=1, latent=True, dtype=dtype), value_dim=12)

    @parameterized.named_parameters(
        (f"{dtype}_of_each_{granularity}_{query}", dtype, granularity, query)
        for i, dtype in enumerate(QUANTISED)
        for j, granularity in enumerate(poisoned.GRANULARITIES)
        for query in [("float32", "bfloat16", "float16")[(i + j) % 3]]
    )
    def test_quantised_caches(self, dtype, granularity, query):
        """float32 is within 1e-5 of the oracle on the dequantised numbers; both caches' scales are each their own."""
        scales = dict(key_scale=granularity, value_scale=granularity)
        check(poisoned.make_call(2, **SIZES, dtype=query, cache_dtype=dtype, **scales), attn_logits_soft_cap=3.0)

    def test_scales_of_two_granularities_and_one_that_is_absent(self):
        for scales in (dict(key_scale="slot", value_scale="tensor"), dict(value_scale="head")):
            operands = poisoned.make_call(3, **SIZES, cache_dtype="int8", **scales)
            check(operands, softmax_scale=2.0**-12)  # stored numbers are up to 127

    @parameterized.parameters("head", "slot")
    def test_small_values_in_products_of_float16(self, granularity):
        """As GPUs and TPUs multiply: a weight times a small scale is no normal number of float16."""
        scales = dict(key_scale=granularity, value_scale=granularity)
        operands = poisoned.make_call(20, **SIZES, dtype="float16", cache_dtype="int8", **scales)
        with np.errstate(over="ignore"):  # of what is poison
            operands["value_scale"] = operands["value_scale"] * np.float32(2.0**-13)
        in_float16 = lambda call, config, _, turns: attend(call, config, jnp.float16, turns)
        with absltest.mock.patch.object(host, "attend", in_float16):
            check(operands)


class CombinedTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("float32", dict(cache_dtype="float8_e5m2", key_scale="head", value_scale="slot")),
        ("bfloat16", dict(dtype="bfloat16", cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot")),
        ("float16", dict(dtype="float16", cache_dtype="int8", key_scale="slot", value_scale="head")),
    )
    def test_ranges_tree_sinks_cap_quantised_and_layer(self, kind):
        operands = poisoned.make_call(4, **SIZES, key_ranges=True, tree_words=1, sinks=True, layers=2, **kind)
        check(operands, attn_logits_soft_cap=2.0, softmax_scale=0.7)

    def test_tree_sinks_window_cap_quantised_and_layer(self):
        kind = dict(
            tree_words=2, sinks=True, layers=2, cache_dtype="float8_e4m3fn", key_scale="head", value_scale="tensor"
        )
        operands = poisoned.make_call(5, **SIZES, **kind, sliding_window=9)
        check(operands, attn_logits_soft_cap=2.0, sliding_window=9)

    def test_packs_of_a_batch_with_pools_of_their_own_and_shared(self):
        kind = dict(
            key_ranges=True,
            tree_words=1,
            sinks=True,
            layers=3,
            cache_dtype="int8",
            key_scale="slot",
            value_scale="head",
        )
        check(poisoned.make_call(6, ((9, 14), (1, 20)), **SIZES, **kind, batch=(2, 2), pools=1))

    def test_deepseek(self):
        """Keys of 512 + 64 features, whose first 512 are the values, one head of them for all; stored in 8 bits."""
        kind = dict(q_heads=16, kv_heads=1, head_dim=576, value_dim=512, page_size=16, dtype="bfloat16")
        quantised = dict(cache_dtype="float8_e4m3fn", key_scale="slot", layers=2)
        operands = poisoned.make_call(7, ((3, 70), (1, 40), (20, 20)), **kind, **quantised, latent=True)
        check(operands, value_dim=512, softmax_scale=192**-0.5)

    def test_gemma_4(self):
        """Heads of 512 features and spans of an image that see each other."""
        operands = poisoned.make_call(
            8, ((12, 70), (1, 40)), q_heads=4, kv_heads=2, head_dim=512, page_size=16, key_ranges=True
        )
        check(operands, cfg=PrefillPageAttentionConfig(block_q=4, block_kv=32))

    def test_heuristic_sizes(self):
        """With no sizes chosen, and a page that is larger than a block of them."""
        kind = dict(page_size=640, key_ranges=True, tree_words=3, sinks=True, cache_dtype="int8", key_scale="slot")
        check(poisoned.make_call(9, ((70, 700), (300, 300)), head_dim=8, **kind), cfg=None)


class RangesTest(parameterized.TestCase):
    SEQUENCES = ((20, 45), (3, 60), (0, 9), (1, 1))

    def operands(self, ranges, **kind):
        """A call in which the rows of each sequence have these ranges, in turn."""
        with_ranges = lambda rng, lead, most_keys: np.resize(np.asarray(ranges, np.int32), (*lead, 2))
        with absltest.mock.patch.object(poisoned, "random_ranges", with_ranges):
            return poisoned.make_call(10, self.SEQUENCES, **SIZES, key_ranges=True, **kind)

    # One shape for all of these, so one compilation.
    attend = staticmethod(jax.jit(functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True)))

    @parameterized.named_parameters(
        ("gap_in_the_hull", [(0, 3), (40, 43), (2, 4)]),
        ("gap_of_whole_blocks", [(0, 1), (59, 60)]),
        ("no_row_sees_any", [(5, 5), (9, 2), (70, 90), (-9, 0)]),
        ("one_row_of_a_tile_sees_any", [(3, 3)] * 5 + [(4, 30)] + [(9, 3)] * 4),
        ("back_to_front", [(30, 4), (0, 9), (44, 43)]),
        ("beyond_the_context", [(0, 2**31 - 1), (40, 1000), (44, 45), (60, 61)]),
        ("negative", [(-(2**31), 7), (-5, 30), (-9, -4)]),
        ("all_of_int32", [(-(2**31), 2**31 - 1), (2**31 - 1, -(2**31))]),
        ("all_keys_for_all", [(0, 60)]),
        ("backwards_over_the_rows", [(20, 30), (10, 20), (0, 10)]),
        ("of_one_key", [(k, k + 1) for k in range(45)]),
    )
    def test_intervals(self, ranges):
        operands = self.operands(ranges)
        oracle.assert_matches(operands, *self.attend(**operands))

    def test_causal_ranges_are_causality(self):
        operands = poisoned.make_call(11, self.SEQUENCES, **SIZES)
        want = ragged_paged_prefill(**operands, cfg=SMALL_TILES, return_lse=True)
        got = self.attend(**operands, key_ranges=causal_ranges(operands))
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


class SharedLanesTest(parameterized.TestCase):
    """Tiles of one row that walk side by side, of which those with many blocks have four lanes each."""

    SEQUENCES = ((1, 60), (1, 3), (0, 7), (1, 33), (1, 0), (9, 20), (1, 9), (1, 25), (1, 1), (1, 60))

    @parameterized.named_parameters(
        ("causal", {}, {}),
        ("window", dict(sliding_window=19), dict(sliding_window=19, attn_logits_soft_cap=2.0)),
        ("key_ranges_and_sinks", dict(key_ranges=True, sinks=True), {}),
        ("tree_mask", dict(tree_words=1), {}),
        ("latent_of_layers", dict(latent=True, layers=2, cache_dtype="int8", key_scale="head"), dict(value_dim=12)),
        ("scales_of_slots", dict(cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot"), {}),
        ("packs", dict(batch=(2,), pools=1, dtype="bfloat16"), {}),
    )
    def test_against_the_oracle(self, kind, parameters):
        with absltest.mock.patch.multiple(walks, LANE_KEYS=4, ONLY_BLOCK=4):
            check(poisoned.make_call(20, self.SEQUENCES, **SIZES, **kind), **parameters)

    def test_one_row_for_each_head(self):
        with absltest.mock.patch.multiple(walks, LANE_KEYS=4, ONLY_BLOCK=4):
            check(poisoned.make_call(21, self.SEQUENCES, **SIZES, q_heads=3, kv_heads=3))


class TreeTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("chunks_longer_than_its_words", ((70, 90), (33, 33), (5, 40)), 1),
        ("several_words", ((70, 90), (1, 9), (64, 64)), 2),
        ("words_past_the_chunk", ((5, 40), (31, 50), (32, 32)), 3),
        ("more_new_tokens_than_context", ((40, 9), (70, 35)), 2),
    )
    def test_random_bits(self, sequences, words):
        check(poisoned.make_call(12, sequences, **SIZES, tree_words=words))

    def test_branches_see_their_ancestors_only(self):
        """Two branches of a draft: each row as if the other branch were not there."""
        parents = [-1, 0, 1, 0, 3]
        operands = poisoned.make_call(13, ((5, 25),), **SIZES, tree_words=1, poison=False)
        mask = np.zeros_like(operands["tree_mask"])
        for token, parent in enumerate(parents):
            mask[2 + token] = 1 << token | (mask[2 + parent] if parent >= 0 else 0)
        out = ragged_paged_prefill(**operands | dict(tree_mask=mask), cfg=SMALL_TILES)
        for branch in ((0, 1, 2), (0, 3, 4)):
            rows = 2 + np.asarray(branch)
            # The context, then the branch, in pages of its own.
            alone = {name: np.array(x) for name, x in operands.items() if name != "tree_mask"}
            at = lambda position: (operands["page_indices"][0, position // 4], position % 4)
            for name in ("key_cache", "value_cache"):
                for place, token in enumerate(branch):
                    page, slot = at(20 + place)
                    from_page, from_slot = at(20 + token)
                    alone[name][:, page, slot] = operands[name][:, from_page, from_slot]
            alone |= dict(query=operands["query"][rows])
            alone |= dict(context_lens=np.int32([23]), query_offsets=np.int32([0, 3]))
            want = ragged_paged_prefill(**alone, cfg=SMALL_TILES)
            np.testing.assert_allclose(out[rows], want, atol=1e-6)


class SinksTest(parameterized.TestCase):
    # Most calls have the same shapes, so one compilation for each dtype.
    attend = staticmethod(jax.jit(functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True)))

    def test_rows_without_keys_and_tokens_without_sequence(self):
        operands = poisoned.make_call(14, **SIZES, sinks=True)
        _, lse = self.attend(**operands)
        offsets = operands["query_offsets"]
        empty = slice(*offsets[2:4])  # its context is empty
        np.testing.assert_array_equal(lse[empty], np.broadcast_to(operands["sinks"], (5, 4)))
        np.testing.assert_array_equal(lse[: offsets[0]], -np.inf)
        np.testing.assert_array_equal(lse[offsets[-1] :], -np.inf)

    @parameterized.parameters(None, SMALL_TILES)
    def test_single_rows_without_keys(self, cfg):
        """They have a result all the same, which is the sink."""
        check(poisoned.make_call(18, ((1, 0), (1, 70), (2, 1), (1, 0)), **SIZES, sinks=True), cfg=cfg)

    @parameterized.parameters((True,), (poisoned.EXTREME_SINKS,))
    def test_packs_in_which_nothing_can_be_seen(self, sinks):
        """Not a page, or not a column of the page table: still the sink alone. Not a sequence: not even that."""
        operands = poisoned.make_call(15, ((3, 0), (2, 0)), **SIZES, sinks=sinks)
        for changed in (
            dict(query_offsets=operands["query_offsets"][:1])
            | {name: operands[name][:0] for name in ("context_lens", "page_indices")},
            dict(page_indices=operands["page_indices"][:, :0]),
            {name: operands[name][:, :0] for name in ("key_cache", "value_cache")},
        ):
            check(operands | changed)

    @parameterized.parameters(((5, 9),), ((1, 9),))
    def test_an_output_of_16_bits_is_rounded_once(self, sequence):
        """CPUs multiply float16 in float32: the same numbers in float32 are what is to be rounded."""
        operands = poisoned.make_call(17, (sequence,) * 8, **SIZES, sinks=True, dtype="float16", poison=False)
        wide = {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in operands.items()}
        half, single = (ragged_paged_prefill(**x, cfg=SMALL_TILES) for x in (operands, wide))
        np.testing.assert_array_equal(half, single.astype(jnp.float16))

    @parameterized.parameters("float32", "bfloat16")
    def test_of_any_size(self, dtype):
        operands = poisoned.make_call(16, **SIZES, sinks=poisoned.EXTREME_SINKS, dtype=dtype)
        (out, lse), (without, _) = (self.attend(**operands | x) for x in ({}, dict(sinks=None)))
        oracle.assert_matches(operands, out, lse)
        np.testing.assert_array_equal(out[:, 0], without[:, 0])

    @parameterized.parameters(-1e30, 1e30)
    def test_finite_and_far_from_all_logits(self, sink):
        operands = poisoned.make_call(16, **SIZES, sinks=(sink,) * 4)
        oracle.assert_matches(operands, *self.attend(**operands))

    def test_of_any_size_in_the_reference(self):
        operands = poisoned.make_call(16, **SIZES, sinks=poisoned.EXTREME_SINKS)
        oracle.assert_matches(operands, *reference(**operands))


class HarmlessTest(parameterized.TestCase):
    def test_a_layer_that_does_not_exist_is_clamped(self):
        operands = poisoned.make_call(17, **SIZES, layers=3, batch=(2,), pools=1, poison=False)
        attend = jax.jit(functools.partial(ragged_paged_prefill, cfg=SMALL_TILES))
        for wrong, right in ((-1, 0), (-(2**31), 0), (3, 2), (2**31 - 1, 2)):
            got, want = (attend(**operands | dict(layer=np.full(2, layer, np.int32))) for layer in (wrong, right))
            np.testing.assert_array_equal(got, want)

    def test_what_no_row_sees_changes_no_bit(self):
        """The same call with other poison: slots, scales, layers, ranges and trees of tokens that nobody owns."""
        kind = dict(
            key_ranges=True,
            tree_words=1,
            sinks=True,
            layers=2,
            cache_dtype="float8_e5m2",
            key_scale="slot",
            value_scale="slot",
        )
        attend = jax.jit(functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True))
        operands = poisoned.make_call(18, **SIZES, **kind)
        other = dict(operands)
        poisoned.poison_unseen(np.random.default_rng(99), other)
        self.assertFalse(np.array_equal(operands["key_cache"].view(np.int8), other["key_cache"].view(np.int8)))
        for a, b in zip(attend(**operands), attend(**other)):
            np.testing.assert_array_equal(a, b)


class RandomTest(parameterized.TestCase):
    @parameterized.parameters(range(3))
    def test_calls_of_serving(self, seed):
        operands, parameters = poisoned.sample(np.random.default_rng(seed))
        check(operands, **parameters)

    # One shape with every operand, so one compilation; what is drawn to be absent has the value that changes nothing.
    ROOM = dict(tokens=40, seqs=4, columns=14, pages=60)
    attend = staticmethod(
        jax.jit(functools.partial(ragged_paged_prefill, cfg=SMALL_TILES, return_lse=True, attn_logits_soft_cap=4.0))
    )

    @hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @hypothesis.given(
        st.integers(0, 2**16),
        st.lists(st.tuples(st.integers(0, 10), st.integers(-2, 50)), min_size=1, max_size=4),
        st.sets(st.sampled_from(("key_ranges", "tree_mask", "sinks", "key_scale", "value_scale"))),
    )
    def test_any_combination(self, seed, sequences, absent):
        sequences += [(0, 0)] * (self.ROOM["seqs"] - len(sequences))
        needed = [-(-max(context, 0) // SIZES["page_size"]) for _, context in sequences]
        spare = dict(spare_pages=self.ROOM["pages"] - sum(needed), spare_columns=self.ROOM["columns"] - max(needed))
        rest = self.ROOM["tokens"] - sum(length for length, _ in sequences)
        sizes = SIZES | spare | dict(tokens_before=rest // 2, tokens_after=rest - rest // 2)
        kind = {"layers": 2, "cache_dtype": "float8_e4m3fn", "key_ranges": "key_ranges" not in absent}
        kind |= {"tree_words": int("tree_mask" not in absent), "sinks": "sinks" not in absent}
        kind |= {name: "slot" for name in ("key_scale", "value_scale") if name not in absent}
        wanted = poisoned.make_call(seed, sequences, **sizes, **kind)
        ones = np.ones(wanted["key_cache"].shape[:-1], np.float32)
        neutral = dict(
            key_ranges=causal_ranges(wanted),
            tree_mask=np.full((40, 1), 2**32 - 1, np.uint32),
            sinks=np.full(4, -np.inf, np.float32),
            key_scale=ones,
            value_scale=ones,
        )
        out, lse = self.attend(**wanted | {name: neutral[name] for name in absent})
        oracle.assert_matches(wanted, out, lse, attn_logits_soft_cap=4.0)


class ReferenceTest(parameterized.TestCase):
    """The definition in jax.numpy and the tests' own in NumPy hold each other."""

    @parameterized.named_parameters(
        ("ranges_tree_and_sinks", dict(key_ranges=True, tree_words=1, sinks=True), {}),
        ("tree_and_window", dict(tree_words=2, sliding_window=9), dict(sliding_window=9, attn_logits_soft_cap=1.5)),
        ("latent_of_layers", dict(latent=True, layers=2, cache_dtype="int8", key_scale="head"), dict(value_dim=12)),
        (
            "batch",
            dict(
                batch=(2, 2),
                pools=1,
                layers=2,
                sinks=True,
                cache_dtype="float8_e4m3fn",
                key_scale="tensor",
                value_scale="slot",
            ),
            {},
        ),
    )
    def test_agrees_with_numpy(self, kind, parameters):
        operands = poisoned.make_call(19, ((9, 14), (3, 1), (1, 20)), **SIZES, **kind)
        with jax.enable_x64(True):
            got = reference(**operands, **parameters)
        for a, b in zip(got, oracle.exact(operands, **parameters)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)

    def test_one_sequence_by_hand(self):
        """Three stored keys that a scale makes logarithms of, a sink, and two rows that see two of the keys and all."""
        operands = dict(
            query=jnp.asarray([[[1.0]], [[1.0]]]),
            key_cache=jnp.asarray([[[[[2], [1]], [[3], [-128]]]]], jnp.int8),
            value_cache=jnp.asarray([[[[[10], [20]], [[30], [-128]]]]], jnp.int8),
            context_lens=jnp.asarray([3]),
            page_indices=jnp.asarray([[0, 1]]),
            query_offsets=jnp.asarray([0, 2]),
            key_scale=jnp.log(jnp.asarray([2.0])),  # of the one layer
            value_scale=jnp.asarray([0.5]),
            layer=jnp.asarray(0),
            sinks=jnp.log(jnp.asarray([6.0])),
            key_ranges=jnp.asarray([[0, 2], [-1, 9]]),
            tree_mask=jnp.asarray([[0b10], [0b11]], jnp.uint32),
        )
        out, lse = reference(**operands, softmax_scale=1.0)
        # Keys weigh 4, 2 and 8; tokens of the chunk are keys 1 and 2.
        np.testing.assert_allclose(out.ravel(), [4 * 5 / 10, (4 * 5 + 2 * 10 + 8 * 15) / 20], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), np.log([10, 20]), rtol=1e-6)
        for a, b in zip((out, lse), oracle.exact(operands, softmax_scale=1.0)):
            np.testing.assert_allclose(a, b, rtol=1e-6)


if __name__ == "__main__":
    absltest.main()
