"""What broke in other libraries, each held right here. The names of the tests say whose bug it was."""

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, append_to_pages, prefill_page_attention, ragged_paged_prefill
from paged_prefill.tests import cases, compiling, packs

# Small tiles compile in half the time; where the size of a tile matters, the kernel's own choice runs.
SMALL = PrefillPageAttentionConfig(block_q=16, block_kv=64)


class PeersBugsTest(parameterized.TestCase):
    """In float32 and in one dtype of 16 bits, each of which has its tests; edges_test.py has all dtypes at each edge."""

    @parameterized.parameters("float32", "bfloat16")
    def test_flashinfer_4452_lse_of_rows_without_keys(self, dtype):
        pack = cases.Case("flashinfer_4452", ((6, 3), (2, 0), (4, 4)), dtype=dtype, tokens_before=1).pack()
        out, lse = ragged_paged_prefill(*pack, cfg=SMALL, return_lse=True)
        unseen = [0, 1, 2, 3, 7, 8]
        np.testing.assert_array_equal(np.isneginf(lse).all(-1).nonzero()[0], unseen)
        np.testing.assert_array_equal(np.asarray(out, np.float32)[unseen], 0)
        packs.assert_matches_reference(pack, out, lse)

    @parameterized.product(score=(-524288.0, -5e5, -1e9, -3e38), dtype=("float32", "bfloat16"), cap=(None, 50.0))
    def test_flashinfer_4451_one_visible_key_with_a_score_below_any_sentinel(self, score, dtype, cap):
        query = jnp.full((1, 1, 1), score, dtype)
        keys, values = jnp.ones((1, 1, 1, 1), dtype), jnp.full((1, 1, 1, 1), 3.5, dtype)
        out, lse = ragged_paged_prefill(
            query, keys, values, jnp.ones(1, jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.asarray([0, 1]),
            softmax_scale=1.0, attn_logits_soft_cap=cap, cfg=SMALL, return_lse=True,
        )
        np.testing.assert_array_equal(np.asarray(out, np.float32), 3.5)
        np.testing.assert_allclose(lse, score if cap is None else -cap, rtol=5e-3 if dtype == "bfloat16" else 1e-6)

    @parameterized.product(dtype=("float32", "float16"), where=("key_cache", "value_cache"), junk=(np.nan, np.inf))
    def test_flash_attention_2374_nan_in_one_cache_past_the_context(self, dtype, where, junk):
        case = cases.Case("flash_attention_2374", ((9, 21), (1, 6)), dtype=dtype, page_size=8)
        clean = case.pack(poison=0.0)
        poisoned = clean._replace(**{where: getattr(case.pack(poison=junk), where)})
        self.assertFalse(np.isfinite(np.asarray(getattr(poisoned, where), np.float32)).all())
        chex.assert_trees_all_equal(
            ragged_paged_prefill(*poisoned, cfg=SMALL, return_lse=True),
            ragged_paged_prefill(*clean, cfg=SMALL, return_lse=True),
        )

    @parameterized.parameters("float32", "float16")
    def test_vllm_30887_53628_freed_pages_left_of_the_window(self, dtype):
        """Keys before the window are NaN and their pages given back: -1, or a page now written by another sequence."""
        case = cases.Case("vllm_30887", ((5, 60), (1, 33)), dtype=dtype, page_size=4, sliding_window=9)
        pack = case.pack()
        freed = np.asarray(pack.page_indices[0, : (60 - 5 - 9 + 1) // 4])
        self.assertTrue(np.isin(freed, packs.JUNK_PAGES).all() and len(freed) > 8)
        out, lse = ragged_paged_prefill(*pack, sliding_window=9, cfg=SMALL, return_lse=True)
        packs.assert_matches_reference(pack, out, lse, sliding_window=9)
        others = pack._replace(page_indices=pack.page_indices.at[0, : len(freed)].set(pack.page_indices[1, 8]))
        got = ragged_paged_prefill(*others, sliding_window=9, cfg=SMALL, return_lse=True)
        chex.assert_trees_all_equal(got, (out, lse))

    @parameterized.parameters("float32", "bfloat16")
    def test_flashinfer_4972_window_over_many_keys(self, dtype):
        case = cases.Case("flashinfer_4972", ((300, 4096),), 8, 2, 128, page_size=16, dtype=dtype, sliding_window=334)
        cases.check(case)

    def test_flashinfer_3130_vllm_50427_caches_of_more_than_2_31_elements(self):
        """A pool of 2**31 + elements: tokens are appended past that and read back. Values are one feature, to be small.

        In int8, the fewest bytes, and in small integers, which it holds exactly.
        """
        head_dim, page_size = 128, 16
        num_pages = 2**31 // (head_dim * page_size) + 5
        make = jax.jit(  # as users compile, since the loop over all elements is most of the time
            lambda features: jnp.zeros((1, num_pages, page_size, features), jnp.int8), static_argnums=0,
            compiler_options=compiling.AS_USERS_DO,
        )
        keys, values = make(head_dim), make(1)
        self.assertGreater(keys.size, 2**31)
        rng = np.random.default_rng(0)
        tokens = 40
        query = jnp.asarray(rng.standard_normal((tokens, 2, head_dim)), jnp.float16)
        key, value = (jnp.asarray(rng.integers(-3, 4, (tokens, 1, features)), jnp.float16) for features in (head_dim, 1))
        pages = jnp.asarray([[num_pages - 1, 1, num_pages - 2]], jnp.int32)
        indices = jnp.asarray([tokens]), pages, jnp.asarray([0, tokens])
        # 2**31 elements before the last pages are pages 0 to 4: a wrapped offset would write and read these.
        keys, values = jax.jit(append_to_pages, donate_argnums=(0, 1))(keys, values, key, value, *indices)
        out, lse = ragged_paged_prefill(query, keys, values, *indices, cfg=SMALL, return_lse=True)
        small = packs.Pack(
            query, jnp.stack([keys[:, p] for p in pages[0]], 1), jnp.stack([values[:, p] for p in pages[0]], 1),
            indices[0], jnp.arange(3)[None], indices[2],
        )
        np.testing.assert_array_equal(small.key_cache.reshape(48, head_dim)[:tokens], key[:, 0])
        np.testing.assert_array_equal(jnp.any(keys[:, :4] != 0, axis=(0, 2, 3)), [False, True, False, False])
        packs.assert_matches_reference(small, out, lse)

    @parameterized.parameters("float32", "float16")
    def test_vllm_56578_soft_cap_far_exceeded(self, dtype):
        """|logit / cap| in the thousands: tanh is 1, exp-form soft caps are NaN."""
        case = cases.Case("vllm_56578", ((9, 21), (1, 6)), dtype=dtype, attn_logits_soft_cap=0.5, softmax_scale=300.0, cfg=SMALL)
        cases.check(case)

    @parameterized.parameters(("float32", None), ("bfloat16", 50), ("float16", None))
    def test_vllm_51902_bits_do_not_depend_on_the_pack(self, dtype, sliding_window):
        """A sequence alone, and in packs of any order and any neighbours, of a prefill, a decode and odd lengths."""
        parameters = dict(sliding_window=sliding_window, cfg=PrefillPageAttentionConfig(block_q=64, block_kv=128))
        lengths, contexts = (150, 1, 37, 0, 70, 3), (333, 90, 37, 12, 70, 600)
        pack = packs.make_pack(0, lengths, contexts, dtype=jnp.dtype(dtype), sliding_window=sliding_window)
        offsets = np.asarray(pack.query_offsets)
        outs = ragged_paged_prefill(*pack, **parameters, return_lse=True)

        def rows(seq):
            return slice(offsets[seq], offsets[seq + 1])

        for chosen in ([0], [1], [4], [5, 0], [2, 4, 1], [1, 1, 5, 3, 2]):
            # Filled up to the shape of the whole pack, with tokens and sequences of nothing, to share its compilation.
            tokens = np.concatenate([np.arange(len(pack.query))[rows(s)] for s in chosen])
            ends = np.cumsum([0] + [lengths[s] for s in chosen])
            seqs = np.asarray(chosen + [3] * (6 - len(chosen)))
            fewer = packs.Pack(
                pack.query[np.resize(tokens, len(pack.query))], *pack[1:3], pack.context_lens[seqs], pack.page_indices[seqs],
                jnp.asarray(np.pad(ends, (0, 7 - len(ends)), mode="edge"), jnp.int32),
            )
            got = ragged_paged_prefill(*fewer, **parameters, return_lse=True)
            for seq, start, end in zip(chosen, ends, ends[1:]):
                chex.assert_trees_all_equal([x[start:end] for x in got], [x[rows(seq)] for x in outs])
        alone = prefill_page_attention(
            pack.query[rows(0)], *pack[1:3], pack.context_lens[0], pack.page_indices[0], **parameters
        )
        chex.assert_trees_all_equal(alone, outs[0][rows(0)])

    def test_sglang_33915_parameters_given_at_either_place_count(self):
        """Sizes in cfg reach the kernel, and platform= may stand in either place; both at odds is an error."""
        pack = cases.Case("sglang_33915", ((30, 60),)).pack()

        def lowered(**parameters):
            return jax.jit(lambda *p: ragged_paged_prefill(*p, **parameters)).lower(*pack).as_text()

        texts = {lowered(cfg=PrefillPageAttentionConfig(block_q=q, block_kv=kv)) for q in (4, 8) for kv in (16, 32)}
        self.assertLen(texts, 4)
        in_cfg = jax.make_jaxpr(lambda *p: ragged_paged_prefill(*p, cfg=PrefillPageAttentionConfig(platform="xla")))(*pack)
        as_argument = jax.make_jaxpr(lambda *p: ragged_paged_prefill(*p, platform="xla"))(*pack)
        for jaxpr in (in_cfg, as_argument):
            self.assertEqual(jaxpr.eqns[-1].params["platform"], "xla")
        # ejKernel ignores cfg= under one of its policies: here every size gives the same numbers by another program.
        for block_q, block_kv in ((1, 1), (7, 13)):
            config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
            packs.assert_matches_reference(pack, *ragged_paged_prefill(*pack, cfg=config, return_lse=True))

    @parameterized.parameters("float32", "bfloat16")
    def test_vllm_56862_page_table_ends_with_the_context(self, dtype):
        """The last tile reaches past the table's last column, and the next row of the table holds other pages."""
        sequences = ((33, 257), (33, 250), (1, 257))
        case = cases.Case("vllm_56862", sequences, dtype=dtype, page_size=16, spare_columns=0, spare_pages=1, cfg=SMALL)
        cases.check(case)

    @parameterized.parameters("float32", "float16")
    def test_sglang_22688_flash_attention_2562_sequences_of_nothing(self, dtype):
        """Sequences without keys and without rows, first, between and last, in a pack of longer ones."""
        sequences = ((0, 0), (4, 0), (70, 300), (0, 50), (0, 0), (1, 0), (1, 200), (0, 0), (3, 0))
        cases.check(cases.Case("sglang_22688", sequences, dtype=dtype, page_size=16, cfg=SMALL))

    @parameterized.parameters((1, "bfloat16"), (2, "float32"), (5, "float16"), (48, "float32"), (600, "bfloat16"), (1000, "float16"))
    def test_sglang_32902_vllm_41339_page_sizes_below_and_above_the_block(self, page_size, dtype):
        sequences = ((12, 130), (1, 599), (3, 3))
        cases.check(cases.Case("sglang_32902", sequences, page_size=page_size, dtype=dtype, cfg=SMALL))

    def test_ejkernel_scalar_and_one_element_context_len(self):
        pack = cases.Case("ejkernel", ((30, 60),)).pack()
        for context_len in (60, jnp.int32(60), np.asarray([60]), jnp.asarray([60], jnp.int8)):
            out = prefill_page_attention(*pack[:3], context_len, pack.page_indices[0], cfg=SMALL)
            packs.assert_matches_reference(pack, out)

    def test_ejkernel_scale_is_not_rounded_to_the_query_dtype(self):
        """1 / sqrt(112) in bfloat16 is 0.0942 for 0.0945: 2.5e-3 off. Logits are large here, so that it would show."""
        pack = cases.Case("ejkernel_scale", ((30, 60),), 4, 4, 112, dtype="bfloat16").pack()
        _, lse = ragged_paged_prefill(*pack, cfg=SMALL, return_lse=True)
        np.testing.assert_allclose(lse, packs.exact(pack)[1], atol=1e-4)


if __name__ == "__main__":
    absltest.main()
