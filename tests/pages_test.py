"""append_to_pages and merge: what is written where, in place, and the exact sum of partial attentions."""

import re

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, merge, prefill_page_attention, ragged_paged_prefill
from paged_prefill.tests import cases, compiling, packs

SEQUENCES = ((9, 20), (0, 7), (5, 2), (1, 1), (1, 30))
CASE = cases.Case("append", SEQUENCES, page_size=4, head_dim=16, value_dim=8, tokens_before=2, spare_columns=0)


def new_tokens(pack, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    lead = (*pack.query.shape[:-2], pack.key_cache.shape[-4])
    return tuple(jnp.asarray(rng.standard_normal((*lead, c.shape[-1])), dtype) for c in pack[1:3])


def expected_cache(cache, new, context_lens, page_indices, query_offsets):
    """The same in loops: token i of a sequence goes to position context_len - n + i."""
    cache, new = np.array(cache), np.asarray(new)
    kv_heads, num_pages, page_size, _ = cache.shape
    for seq, context in enumerate(np.asarray(context_lens)):
        start, end = np.asarray(query_offsets)[seq : seq + 2]
        for token in range(start, end):
            position = context - (end - token)
            if 0 <= position < page_indices.shape[1] * page_size:
                page = page_indices[seq, position // page_size]
                if 0 <= page < num_pages:
                    cache[:, page, position % page_size] = new[token]
    return cache


class AppendTest(parameterized.TestCase):
    @parameterized.parameters(*cases.DTYPES)
    def test_writes_each_token_to_its_slot_and_nothing_else(self, dtype):
        pack = CASE.pack(dtype=jnp.dtype(dtype))
        new = new_tokens(pack, dtype)
        caches = jax.jit(append_to_pages)(*pack[1:3], *new, *pack[3:])
        for cache, old, tokens in zip(caches, pack[1:3], new, strict=True):
            self.assertEqual(cache.dtype, old.dtype)
            want = expected_cache(old, tokens, *pack[3:])
            np.testing.assert_array_equal(np.asarray(cache, np.float32), np.asarray(want, np.float32))

    def test_pages_and_positions_that_do_not_exist_are_not_written(self):
        pack = CASE.pack()
        new = new_tokens(pack)
        largest = 2**31 - 1
        for name, value in (
            ("context_lens", [-3, 0, 2, 10**6, largest]),
            ("page_indices", np.resize([-1, largest, -(2**31), pack.key_cache.shape[1], 0], pack.page_indices.shape)),
        ):
            changed = pack._replace(**{name: jnp.asarray(value, jnp.int32)})
            for cache, old, tokens in zip(append_to_pages(*pack[1:3], *new, *changed[3:]), pack[1:3], new, strict=True):
                np.testing.assert_array_equal(cache, expected_cache(old, tokens, *changed[3:]))

    @parameterized.named_parameters(
        ("past_the_tokens", [0, 5, 90, 95, 100, 2**31 - 1], [0, 5, 18, 18, 18, 18]),
        ("negative", [-(2**31), -1, 4, 9, 9, 18], [0, 0, 4, 9, 9, 18]),
        ("decreasing", [3, 9, 4, 12, 10, 18], [3, 9, 9, 12, 12, 18]),
    )
    def test_offsets_are_made_harmless_as_in_the_operation(self, offsets, harmless):
        pack = CASE.pack()
        new = new_tokens(pack)
        got, want = (
            append_to_pages(*pack[1:3], *new, *pack[3:5], jnp.asarray(x, jnp.int32)) for x in (offsets, harmless)
        )
        chex.assert_trees_all_equal(got, want)

    @parameterized.named_parameters(
        ("no_tokens", 0, 5, 7), ("no_sequences", 4, 0, 7), ("no_columns", 4, 5, 0)
    )
    def test_empty(self, tokens, seqs, columns):
        caches = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 4, 5))
        got = append_to_pages(
            *caches, jnp.zeros((tokens, 2, 8)), jnp.zeros((tokens, 2, 5)), jnp.full(seqs, 9), jnp.zeros((seqs, columns), jnp.int32),
            jnp.full(seqs + 1, tokens),
        )
        chex.assert_trees_all_equal(got, caches)

    def test_batch_dimensions(self):
        """Packs that share one pool, packs with a pool of their own, both by hand and by vmap."""
        several = [CASE.pack(), CASE.pack()]
        new = [new_tokens(p, seed=i) for i, p in enumerate(several)]
        own = [jnp.stack(x) for x in zip(*(p[1:3] + n + p[3:] for p, n in zip(several, new)))]
        want = [
            np.stack([expected_cache(p[1 + i], n[i], *p[3:]) for p, n in zip(several, new)]) for i in range(2)
        ]
        for got in (append_to_pages(*own), jax.vmap(append_to_pages)(*own)):
            for a, b in zip(got, want):
                np.testing.assert_array_equal(a, b)
        # One pool: the second pack's sequences stand in pages that the first does not use.
        both = cases.Case("shared", SEQUENCES * 2, page_size=4, head_dim=16, value_dim=8, spare_columns=0).pack()
        keys, values = new_tokens(both)
        half = len(both.query) // 2
        shared = append_to_pages(
            *both[1:3], keys.reshape(2, half, *keys.shape[1:]), values.reshape(2, half, *values.shape[1:]),
            both.context_lens.reshape(2, 5), both.page_indices.reshape(2, 5, -1),
            jnp.stack([both.query_offsets[:6], both.query_offsets[5:] - half]),
        )
        for got, want in zip(shared, append_to_pages(*both[1:3], keys, values, *both[3:])):
            np.testing.assert_array_equal(got, want)

    @parameterized.parameters(*cases.DTYPES)
    def test_donated_caches_are_written_in_place(self, dtype):
        """Append and attend in one jitted step: both caches aliased to their results, no temporary of their size."""
        pack = CASE.pack(dtype=jnp.dtype(dtype), spare_pages=20_000)
        # Computed, since an array that shares NumPy's memory cannot be written in place.
        pack = pack._replace(key_cache=pack.key_cache + 0, value_cache=pack.value_cache + 0)
        new = new_tokens(pack, dtype)

        def step(keys, values, query, key, value, *indices):
            keys, values = append_to_pages(keys, values, key, value, *indices)
            out = ragged_paged_prefill(query, keys, values, *indices, cfg=cases.SMALL_TILES)
            return out, keys, values

        want = step(*pack[1:3], pack.query, *new, *pack[3:])
        size = pack.key_cache.nbytes, pack.value_cache.nbytes
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*pack[1:3], pack.query, *new, *pack[3:])
        compiled = lowered.compile(compiler_options=compiling.FUSED_AS_USERS_DO)
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", compiled.as_text()).group(1)
        self.assertEqual(re.findall(r"\{(\d)\}: \((\d), \{\}", aliases), [("1", "0"), ("2", "1")])
        memory = compiled.memory_analysis()
        self.assertEqual(memory.alias_size_in_bytes, sum(size))
        self.assertLess(memory.temp_size_in_bytes, min(size) / 4)
        shape = ",".join(map(str, pack.key_cache.shape))
        copies = rf"\w+\[{shape}\]\S* (?:copy|convert|transpose|concatenate|pad)\("
        self.assertEmpty(re.findall(copies, compiled.as_text()))
        pointers = [x.unsafe_buffer_pointer() for x in pack[1:3]]
        got = compiled(*pack[1:3], pack.query, *new, *pack[3:])
        chex.assert_trees_all_equal(got, want)
        self.assertEqual([x.unsafe_buffer_pointer() for x in got[1:]], pointers)
        self.assertTrue(pack.key_cache.is_deleted() and pack.value_cache.is_deleted())

    def test_prefill_chunk_by_chunk_then_decode_is_one_dense_pass(self):
        """One sequence through random pages, chunk after chunk, token by token at the end; against one dense pass."""
        rng = np.random.default_rng(0)
        tokens, page_size = 40, 4
        query, key, value = (jnp.asarray(rng.standard_normal((tokens, h, 16)), jnp.float32) for h in (4, 2, 2))
        pages = jnp.asarray(rng.permutation(20)[:12], jnp.int32)
        keys = values = jnp.full((2, 20, page_size, 16), jnp.nan)

        @jax.jit
        def step(keys, values, query, key, value, context):
            offsets = jnp.asarray([0, len(query)])
            keys, values = append_to_pages(keys, values, key, value, context[None], pages[None], offsets)
            return prefill_page_attention(query, keys, values, context, pages, cfg=cases.SMALL_TILES), keys, values

        outs, start = [], 0
        for chunk in (18, 18, 1, 1, 1, 1):
            rows = slice(start, start + chunk)
            start += chunk
            out, keys, values = step(keys, values, query[rows], key[rows], value[rows], jnp.int32(start))
            outs.append(out)
        logits = jnp.einsum("tkgd,jkd->kgtj", query.reshape(tokens, 2, 2, 16), key) / 4
        logits = jnp.where(jnp.tri(tokens, dtype=bool), logits, -jnp.inf)
        dense = jnp.einsum("kgtj,jkd->tkgd", jax.nn.softmax(logits), value).reshape(tokens, 4, 16)
        np.testing.assert_allclose(jnp.concatenate(outs), dense, atol=1e-5)


jitted_merge = jax.jit(merge)  # one program for each shape; not jitted, each of its operations is one


class MergeTest(parameterized.TestCase):
    @parameterized.parameters(*cases.DTYPES)
    def test_near_and_far_keys_are_all_keys(self, dtype):
        """The last W keys of each row, and the keys before them, each a call of its own, against all keys at once."""
        window = 7
        case = cases.Case("merge", ((20, 50), (1, 40), (3, 3), (5, 2)), head_dim=16, page_size=4, dtype=dtype)
        pack = case.pack(poison=0.0)
        near = ragged_paged_prefill(*pack, sliding_window=window, return_lse=True, cfg=cases.ONE_HEIGHT)
        far_pack = []  # each row a sequence of its own, with the keys before its window as the context
        offsets, pages = np.asarray(pack.query_offsets), np.asarray(pack.page_indices)
        for seq in range(4):
            for token in range(offsets[seq], offsets[seq + 1]):
                far_pack.append((int(pack.context_lens[seq]) - (offsets[seq + 1] - token) + 1 - window, pages[seq]))
        lens, pages = zip(*far_pack)
        far = ragged_paged_prefill(
            *pack[:3], np.asarray(lens, np.int32), np.stack(pages), np.arange(len(lens) + 1), return_lse=True,
            cfg=cases.ONE_HEIGHT,
        )
        self.assertTrue(np.isneginf(far[1]).any() and np.isfinite(far[1]).any())
        packs.assert_matches_reference(pack, *jitted_merge(*near, *far))
        packs.assert_matches_reference(pack, *merge(*far, *near))

    def test_a_side_without_keys_counts_for_nothing(self):
        out, lse = jnp.ones((3, 2, 4)), jnp.zeros((3, 2))
        nothing = jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf)
        for got in (jitted_merge(out, lse, *nothing), jitted_merge(*nothing, out, lse)):
            chex.assert_trees_all_equal(got, (out, lse))
        got = jitted_merge(*nothing, *nothing)
        chex.assert_trees_all_equal(got, (jnp.zeros_like(out), nothing[1]))

    @parameterized.parameters(np.nan, np.inf)
    def test_an_lse_of_nan_or_inf_makes_its_row_nan_and_no_other(self, number):
        """No number hides it: it says that a row saw NaN, or means an empty row where -inf is meant."""
        out, lse = jnp.ones((3, 2, 4)), jnp.zeros((3, 2))
        broken = out, lse.at[1, 0].set(number)
        for others in ((2 * out, lse), (out * jnp.nan, lse - jnp.inf)):
            for got in (jitted_merge(*broken, *others), jitted_merge(*others, *broken)):
                np.testing.assert_array_equal(np.isnan(got[1]), np.isnan(lse.at[1, 0].set(np.nan)))
                np.testing.assert_array_equal(np.isnan(got[0]).all(-1), np.isnan(got[1]))
                np.testing.assert_array_equal(np.isnan(got[0]).any(-1), np.isnan(got[1]))

    def test_nan_and_inf_are_not_empty_rows(self):
        """Only -inf says that a side saw no key. NaN stays, and so it does of +inf, FlashAttention-2's mark of no key."""
        a, b = jnp.full((4, 3), 7.0), jnp.full((4, 3), 3.0)
        lse_a, lse_b = jnp.asarray([jnp.inf, jnp.nan, 0.5, -jnp.inf]), jnp.asarray([0.5, 0.5, 0.5, 0.5])
        for one, other in (((a, lse_a), (b, lse_b)), ((b, lse_b), (a, lse_a))):
            out, lse = jitted_merge(*one, *other)
            np.testing.assert_array_equal(np.isnan(lse), [True, True, False, False])
            np.testing.assert_array_equal(np.isnan(out).all(-1), [True, True, False, False])
            np.testing.assert_allclose(out[2:], jnp.asarray([[5.0] * 3, [3.0] * 3]), rtol=1e-6)
        # NaN in an output whose weight is too small to see.
        out, lse = jitted_merge(a * jnp.nan, jnp.full(4, -1e4), b, jnp.zeros(4))
        self.assertTrue(np.isnan(out).all())
        np.testing.assert_array_equal(lse, 0)

    def test_is_exact_for_any_size_of_lse(self):
        """Weights 1/4 and 3/4 whatever is added to both logarithms, and far beyond what exp can hold."""
        a, b = jnp.full((1, 4), 8.0), jnp.full((1, 4), 16.0)
        for shift in (0.0, 1e4, -1e4, 3e38, -3e38):
            out, lse = jitted_merge(a, jnp.full(1, shift), b, jnp.full(1, shift))
            np.testing.assert_allclose(out, 12.0, rtol=1e-6)
            np.testing.assert_allclose(lse, shift + np.log(2), rtol=1e-6)
        out, lse = jitted_merge(a, jnp.zeros(1), b, jnp.full(1, np.log(3.0)))
        np.testing.assert_allclose(out, 14.0, rtol=1e-6)
        np.testing.assert_allclose(lse, np.log(4.0), rtol=1e-6)
        out, lse = jitted_merge(a, jnp.full(1, 1e4), b, jnp.full(1, -1e4))
        np.testing.assert_array_equal(out, a)

    @parameterized.parameters(*cases.DTYPES)
    def test_dtype_is_of_the_first_output(self, dtype):
        out, lse = jitted_merge(jnp.ones((2, 3), dtype), jnp.zeros(2), jnp.ones((2, 3), jnp.float32), jnp.zeros(2))
        self.assertEqual((out.dtype, lse.dtype), (dtype, jnp.float32))

    def test_any_order_of_many_parts(self):
        rng = np.random.default_rng(0)
        logits, values = rng.standard_normal((3, 5)) * 4, rng.standard_normal((3, 5, 2))

        def part(chosen):
            weights = np.exp(logits[:, chosen])
            out = (weights[..., None] * values[:, chosen]).sum(1) / weights.sum(1)[:, None]
            return jnp.asarray(out, jnp.float32), jnp.asarray(np.log(weights.sum(1)), jnp.float32)

        parts = [part([i]) for i in range(5)]
        left = parts[0]
        for other in parts[1:]:
            left = jitted_merge(*left, *other)
        tree = jitted_merge(*jitted_merge(*parts[4], *parts[1]), *jitted_merge(*parts[2], *jitted_merge(*parts[0], *parts[3])))
        chex.assert_trees_all_close(left, part(range(5)), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(tree, part(range(5)), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
