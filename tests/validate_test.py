"""`validate` takes a whole call of `ragged_paged_prefill`, and says which pages `append_to_pages` would spoil."""

import inspect

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ragged_paged_prefill, validate
from paged_prefill.tests import packs

GOOD = dict(
    context_lens=[12, 40, 3],
    page_indices=[[3, 1, -1, -1, -1], [0, 8, 7, 6, 5], [2, 99, 99, 99, 99]],
    query_offsets=[0, 4, 5, 8],
)
FLOATS = dict(
    query=jnp.zeros((10, 4, 16)), key_cache=jnp.zeros((2, 9, 8, 16)), value_cache=jnp.zeros((2, 9, 8, 24))
)  # fmt: skip
QUANTISED = dict(
    query=jnp.zeros((10, 4, 16)),
    key_cache=jnp.zeros((3, 2, 9, 8, 16), jnp.int8),
    value_cache=jnp.zeros((3, 2, 9, 8, 24), jnp.int8),
    **GOOD,
    key_scale=np.ones((3, 2), np.float32),
    layer=2,
)
PAGES = GOOD["page_indices"]


class ValuesTest(parameterized.TestCase):
    def call(self, sliding_window=None, **changes):
        arrays = FLOATS | {n: np.asarray(x, np.int32) for n, x in (GOOD | changes).items()}
        return validate(**arrays, sliding_window=sliding_window)

    def test_accepts_what_is_right(self):
        self.assertIsNone(self.call())
        self.assertIsNone(self.call(sliding_window=1))
        self.assertIsNone(self.call(context_lens=[0, 40, 3], query_offsets=[2, 2, 5, 8]))
        self.assertIsNone(self.call(context_lens=[10**6, 40, 3], query_offsets=[0, 0, 5, 8]))  # no new token, not looked at

    @parameterized.named_parameters(
        ("context_negative", dict(context_lens=[12, -40, 3]), r"context_lens of sequence 1 must not be negative, got -40"),
        ("context_shorter_than_chunk", dict(context_lens=[12, 40, 2]),
         r"context_lens of sequence 2 must count its 3 new tokens too, got 2"),
        ("context_past_the_table", dict(context_lens=[12, 41, 3]),
         r"page_indices of sequence 1 holds 5 pages of 8 slots, too few for its context_lens of 41"),
        ("offset_negative", dict(query_offsets=[-1, 4, 5, 8]),
         r"query_offsets\[0\] must be between 0 and the 10 tokens of query, got -1"),
        ("offset_past_the_tokens", dict(query_offsets=[0, 4, 5, 11]),
         r"query_offsets\[3\] must be between 0 and the 10 tokens of query, got 11"),
        ("offsets_decrease", dict(query_offsets=[0, 4, 3, 8]),
         r"query_offsets must not decrease, got 3 after 4 \(sequence 1\)"),
        ("page_negative", dict(context_lens=[17, 40, 3]),
         r"page_indices of sequence 0 must lie in \[0, 9\) where its keys are, got -1 in column 2"),
        ("page_past_the_pool", dict(context_lens=[12, 40, 9]),
         r"page_indices of sequence 2 must lie in \[0, 9\) where its keys are, got 99 in column 1"),
    )
    def test_values(self, changes, message):
        with self.assertRaisesRegex(ValueError, message):
            self.call(**changes)

    def test_only_pages_a_row_needs_are_looked_at(self):
        pages = [[3, 1, -1, -1, -1], [-1, -1, -1, -1, 5], [2, 99, 99, 99, 99]]
        with self.assertRaisesRegex(ValueError, r"page_indices of sequence 1 .*got -1 in column 0"):
            self.call(page_indices=pages)
        self.call(page_indices=pages, sliding_window=8)
        with self.assertRaisesRegex(ValueError, r"page_indices of sequence 1 .*got -1 in column 3"):
            self.call(page_indices=pages, sliding_window=9)

    def test_a_pack_of_a_batch_is_named(self):
        arrays = {n: jnp.stack([x] * 2) for n, x in FLOATS.items()}
        arrays |= {n: np.stack([x] * 2).astype(np.int64) for n, x in GOOD.items()}
        validate(**arrays)
        arrays["query_offsets"][1, 3] = 11
        with self.assertRaisesRegex(ValueError, r"query_offsets\[3\] of pack \(1,\) must be between 0 and the 10 tokens"):
            validate(**arrays)
        arrays["query_offsets"][1, 3] = 8
        arrays["context_lens"][1, 2] = -1
        with self.assertRaisesRegex(ValueError, r"context_lens of sequence \(1, 2\) must not be negative, got -1"):
            validate(**arrays)

    def test_values_past_int32(self):
        for value in (2**32 + 12, 2**40):
            arrays = FLOATS | {n: np.asarray(x, np.int64) for n, x in GOOD.items()}
            arrays["context_lens"][0] = value
            with self.assertRaisesRegex(ValueError, rf"too few for its context_lens of {value}"):
                validate(**arrays)

    def test_sliding_window_and_tracers(self):
        with self.assertRaisesRegex(ValueError, "sliding_window must be at least 1"):
            self.call(sliding_window=0)
        arrays = FLOATS | {n: jnp.asarray(x) for n, x in GOOD.items()}
        with self.assertRaisesRegex(TypeError, r"validate needs concrete arrays, but context_lens is traced; call it outside jit"):
            jax.jit(validate)(**arrays)

    @parameterized.parameters(*GOOD)
    def test_what_has_no_values(self, name):
        with self.assertRaisesRegex(TypeError, rf"{name} must be an array of integers, got ShapeDtypeStruct\("):
            validate(**FLOATS | GOOD | {name: jax.ShapeDtypeStruct((3,), jnp.int32)})


class WholeCallTest(parameterized.TestCase):
    def test_takes_the_call_argument_for_argument(self):
        taken, of_call = (inspect.signature(f).parameters for f in (validate, ragged_paged_prefill))
        self.assertEqual(taken, of_call)
        validate(
            **QUANTISED, softmax_scale=0.5, mask_value=-1e30, attn_logits_soft_cap=30.0, sliding_window=7,
            platform="xla", cfg=PrefillPageAttentionConfig(block_q=4), head_axis="model", batch_axis="data",
            return_lse=True, sinks=[0.0, 1.0, -np.inf, 2.0], value_scale=2.0, tree_mask=np.full((10, 1), 3, np.uint32),
        )  # fmt: skip

    def test_takes_a_latent_cache(self):
        validate(**QUANTISED | dict(value_cache=None), value_dim=8)

    @parameterized.named_parameters(
        ("mask_value", dict(mask_value=-1e4), ValueError, r"mask_value must be at most -1e\+09"),
        ("softmax_scale", dict(softmax_scale="big"), TypeError, "softmax_scale must be a number, got 'big'"),
        ("soft_cap", dict(attn_logits_soft_cap=0.0), ValueError, "attn_logits_soft_cap must be a positive .*got 0.0"),
        ("platform", dict(platform="gpu"), ValueError, "platform must be one of auto, .*got 'gpu'"),
        ("cfg", dict(cfg=64), TypeError, "cfg must be a PrefillPageAttentionConfig or None, got 64"),
        ("axes", dict(head_axis="x", batch_axis="x"), ValueError, "a mesh axis can cut one dimension once"),
        ("heads", dict(query=jnp.zeros((10, 5, 16))), ValueError, "query must have a multiple of key_cache's 2 KV heads"),
        ("ranges_dtype", dict(key_ranges=np.zeros((10, 2))), TypeError, "key_ranges must be an array of integers, got float64"),
        ("ranges_shape", dict(key_ranges=np.zeros((9, 2), int)), ValueError, r"key_ranges must have shape \[tokens = 10, 2\]"),
        ("ranges_and_window", dict(key_ranges=np.zeros((10, 2), int), sliding_window=3), ValueError, "key_ranges stands in place"),
        ("tree_dtype", dict(tree_mask=np.zeros((10, 1), np.int32)), TypeError, "tree_mask must be uint32, got int32"),
        ("sinks_shape", dict(sinks=np.zeros(3, np.float32)), ValueError, r"sinks must have shape \[q_heads = 4\], got \(3,\)"),
        ("sinks_nan", dict(sinks=[0.0, np.nan, 0.0, 0.0]), ValueError, r"sinks must hold numbers or -inf, got nan at \[1\]"),
        ("sinks_inf", dict(sinks=[0.0, 0.0, np.inf, 0.0]), ValueError, r"sinks must hold numbers or -inf, got inf at \[2\]"),
        ("scale_shape", dict(key_scale=np.ones((3, 3))), ValueError, r"key_scale must have shape \[layers = 3, kv_heads = 2\]"),
        ("scale_negative", dict(value_scale=-0.5), ValueError, r"value_scale must hold numbers from 0 on, got -0.5 at \[\]"),
        ("scale_nan", dict(key_scale=[1.0, 2.0, np.nan]), ValueError, r"key_scale must hold numbers .*got nan at \[2\]"),
        ("value_dim", dict(value_dim=3), ValueError, "value_dim is for a latent cache"),
        ("layer_float", dict(layer=1.5), TypeError, "layer must be an array of integers, got float64"),
        ("layer_negative", dict(layer=-1), ValueError, r"layer must lie in \[0, 3\), got -1"),
        ("layer_too_large", dict(layer=3), ValueError, r"layer must lie in \[0, 3\), got 3"),
    )  # fmt: skip
    def test_reports(self, changes, error, message):
        with self.assertRaisesRegex(error, message):
            validate(**QUANTISED | changes)

    def test_scales_of_slots_may_hold_anything(self):
        validate(**QUANTISED | dict(key_scale=jnp.full((3, 2, 9, 8), jnp.nan)))

    def test_a_layer_of_a_batch_is_named(self):
        batch = {n: np.stack([QUANTISED[n]] * 2) for n in ("query", "context_lens", "page_indices", "query_offsets")}
        batch["context_lens"][1] = 0
        batch["query_offsets"][1] = 0
        validate(**QUANTISED | batch | dict(layer=[0, 2]))
        with self.assertRaisesRegex(ValueError, r"layer of pack \(1,\) must lie in \[0, 3\), got 5"):
            validate(**QUANTISED | batch | dict(layer=[0, 5]))

    def test_concrete_indices_under_jit(self):
        indices = {n: QUANTISED[n] for n in ("context_lens", "page_indices", "query_offsets")}
        arrays = {n: x for n, x in QUANTISED.items() if n not in indices}
        arrays |= dict(layer=None, key_cache=arrays["key_cache"][0], value_cache=arrays["value_cache"][0], key_scale=None)

        jax.eval_shape(lambda arrays: validate(**arrays, **indices), arrays)
        wrong = indices | dict(context_lens=[-1, 40, 3])
        with self.assertRaisesRegex(ValueError, "context_lens of sequence 0 must not be negative, got -1"):
            jax.eval_shape(lambda arrays: validate(**arrays, **wrong), arrays)
        with self.assertRaisesRegex(TypeError, "validate needs concrete arrays, but sinks is traced"):
            jax.eval_shape(lambda sinks: validate(**arrays, **indices, sinks=sinks), jnp.zeros(4))

    def test_key_ranges_say_which_pages_are_needed(self):
        ranges = np.zeros((10, 2), int)
        missing = [row[:] for row in PAGES]
        missing[1] = [-1, 8, -1, 6, 5]
        call = QUANTISED | dict(page_indices=missing)
        ranges[4] = [8, 16]  # of sequence 1, which has one row: column 1
        validate(**call, key_ranges=ranges)
        ranges[8] = [0, 40]  # of no sequence
        validate(**call, key_ranges=ranges)
        ranges[4] = [24, 2**31 - 1]  # the ends are cut to the context
        validate(**call, key_ranges=ranges)
        ranges[4] = [16, 3]  # no key
        validate(**call, key_ranges=ranges)
        ranges[4] = [-5, 1]
        with self.assertRaisesRegex(ValueError, "page_indices of sequence 1 .*got -1 in column 0"):
            validate(**call, key_ranges=ranges)
        ranges[4] = [15, 17]
        with self.assertRaisesRegex(ValueError, "page_indices of sequence 1 .*got -1 in column 2"):
            validate(**call, key_ranges=ranges)


class WritesTest(parameterized.TestCase):
    """Sequences of 4, 1 and 3 new tokens, in columns 1, 4 and 0 of 5, on pages of 8 slots; 12, 40 and 3 are contexts."""

    def call(self, page_indices, **changes):
        call = dict(
            query=jnp.zeros((10, 4, 16)), key_cache=jnp.zeros((2, 9, 8, 16)), value_cache=jnp.zeros((2, 9, 8, 24)),
            context_lens=[12, 40, 3], query_offsets=[0, 4, 5, 8], page_indices=page_indices,
        )  # fmt: skip
        validate(**call | changes)

    @parameterized.named_parameters(
        ("a_shared_prefix", [[0, 1, -1, -1, -1], [0, 8, 7, 6, 5], [2, 99, 99, 99, 99]]),
        ("one_page_twice_that_nobody_writes", [[3, 1, -1, -1, -1], [0, 8, 8, 8, 5], [2, 99, 99, 99, 99]]),
        ("a_written_page_in_a_column_that_nobody_needs", [[3, 1, 1, 5, 2], [0, 8, 7, 6, 5], [2, 5, 1, 2, 2]]),
    )
    def test_accepts(self, pages):
        self.call(pages)

    @parameterized.named_parameters(
        ("two_writers", [[3, 1, -1, -1, -1], [0, 8, 7, 6, 1], [2, 99, 99, 99, 99]],
         "page_indices of sequences 0 and 1 both have page 1 where their new tokens go"),
        ("another_needs_it", [[3, 1, -1, -1, -1], [0, 8, 1, 6, 5], [2, 99, 99, 99, 99]],
         "page_indices of sequence 1 needs page 1, in column 2, where the new tokens of sequence 0 go"),
        ("a_later_one_writes_it", [[2, 1, -1, -1, -1], [0, 8, 7, 6, 5], [2, 99, 99, 99, 99]],
         "page_indices of sequence 0 needs page 2, in column 0, where the new tokens of sequence 2 go"),
        ("twice_in_a_row", [[3, 1, -1, -1, -1], [0, 8, 5, 6, 5], [2, 99, 99, 99, 99]],
         r"page_indices of sequence 1 must not have a page twice where its new tokens go, got page 5 in columns \[2, 4\]"),
    )  # fmt: skip
    def test_reports(self, pages, message):
        with self.assertRaisesRegex(ValueError, message):
            self.call(pages)

    def test_a_page_left_of_the_window_may_be_written(self):
        pages = [[3, 1, -1, -1, -1], [1, 8, 7, 6, 5], [2, 99, 99, 99, 99]]
        self.call(pages, sliding_window=32)
        with self.assertRaisesRegex(ValueError, "page_indices of sequence 1 needs page 1, in column 0"):
            self.call(pages, sliding_window=33)

    def test_a_chunk_over_several_pages(self):
        one = dict(context_lens=[30], query_offsets=[0, 10])  # tokens 20 to 29, columns 2 and 3
        self.call([[0, 0, 1, 2]], **one)
        for pages, columns in (([0, 1, 2, 2], r"\[2, 3\]"), ([0, 2, 1, 2], r"\[1, 3\]"), ([1, 2, 1, 0], r"\[0, 2\]")):
            with self.assertRaisesRegex(ValueError, f"must not have a page twice .*in columns {columns}"):
                self.call([pages], **one)

    def test_packs_that_share_a_pool(self):
        query = jnp.zeros((2, 4, 4, 16))
        batch = dict(query=query, context_lens=[[12], [12]], query_offsets=[[0, 4]] * 2)
        self.call([[[3, 1]], [[3, 2]]], **batch)
        with self.assertRaisesRegex(ValueError, r"page_indices of sequences \(0, 0\) and \(1, 0\) both have page 1"):
            self.call([[[3, 1]], [[2, 1]]], **batch)
        own = dict(key_cache=jnp.zeros((2, 2, 9, 8, 16)), value_cache=jnp.zeros((2, 2, 9, 8, 24)))
        self.call([[[3, 1]], [[2, 1]]], **batch, **own)  # pools, or layers, of their own
        self.call([[[3, 1]], [[2, 1]]], **batch, **own, layer=[0, 1])
        with self.assertRaisesRegex(ValueError, r"page_indices of sequences \(0, 0\) and \(1, 0\) both have page 1"):
            self.call([[[3, 1]], [[2, 1]]], **batch, **own, layer=1)
        one_pool = {name: cache[:1] for name, cache in own.items()}
        with self.assertRaisesRegex(ValueError, r"page_indices of sequences \(0, 0\) and \(1, 0\) both have page 1"):
            self.call([[[3, 1]], [[2, 1]]], **batch, **one_pool)

    def test_what_it_reports_is_what_append_spoils(self):
        """Random tables: it refuses every one where an append, sequence by sequence, changes what another row sees."""
        rng = np.random.default_rng(0)
        lengths, contexts = [3, 1, 0, 2], [5, 4, 3, 6]
        refused = 0
        for _ in range(40):
            pages = rng.integers(0, 40, (4, 3))
            pages[rng.random((4, 3)) < 0.3] = 7  # often one and the same
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            written = {}
            spoiled = False
            slots = [[(pages[s, j // 2], j % 2) for j in range(context)] for s, context in enumerate(contexts)]
            for s, length in enumerate(lengths):
                for slot in slots[s][contexts[s] - length :]:
                    spoiled |= slot in written
                    written[slot] = s
            for s, length in enumerate(lengths):
                old = slots[s][: contexts[s] - length] if length else []
                new = slots[s][contexts[s] - length :] if length else []
                spoiled |= any(slot in written for slot in old) or any(written[slot] != s for slot in new)
            call = dict(
                query=np.zeros((6, 2, 8), np.float32), key_cache=np.zeros((1, 40, 2, 8), np.float32),
                value_cache=np.zeros((1, 40, 2, 8), np.float32), context_lens=contexts, page_indices=pages,
                query_offsets=offsets,
            )  # fmt: skip
            if spoiled:
                refused += 1
                with self.assertRaisesRegex(ValueError, "page_indices of sequence"):
                    validate(**call)
        self.assertGreater(refused, 10)

    def test_packs_of_tests_are_right(self):
        for window in (None, 5):
            pack = packs.make_pack(0, [3, 1, 0, 9], [9, 20, 4, 9], head_dim=8, sliding_window=window, tokens_before=2)
            validate(*pack, sliding_window=window)


if __name__ == "__main__":
    absltest.main()
