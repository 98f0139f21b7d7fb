"""The edges of the operation: each is right, and nothing outside what a row sees has an effect on any bit."""

from dataclasses import replace
import functools

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, ragged_paged_prefill
from paged_prefill.primitive.reference import reference
from paged_prefill.tests import cases, packs

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
SEQUENCES = ((21, 34), (0, 7), (5, 2), (1, 1), (1, 30))

# What XLA makes of windows, caps and other values' dims has no part in dtypes, for it masks, caps and sums in float32: one
# dtype of each is here, and the grids of peers_grid_test.py have windows and caps in all. On a GPU all of them run.
IN_ONE_DTYPE = {
    "window": "float32",
    "window_of_one": "bfloat16",
    "window_past_context": "float16",
    "soft_cap_and_window": "bfloat16",
    "soft_cap_far_exceeded": "float32",
    "value_dim_is_smaller": "float16",
    "value_dim_is_larger": "bfloat16",
}
EDGES = [c for c in cases.EDGES if IN_ONE_DTYPE.get(c.name.removesuffix(f"_{c.dtype}"), c.dtype) == c.dtype]

jitted_reference = jax.jit(reference, static_argnames="sliding_window")


def attend(pack, **parameters):
    return ragged_paged_prefill(*pack, cfg=cases.SMALL_TILES, return_lse=True, **parameters)


class EdgesTest(parameterized.TestCase):
    @parameterized.named_parameters(cases.named(EDGES))
    def test_matches_reference(self, case):
        cases.check(case)

    def test_every_edge_is_here(self):
        self.assertLen(cases.EDGES, len(EDGES) + 2 * len(IN_ONE_DTYPE))

    def test_a_context_may_be_longer_than_the_pool(self):
        """A table may name a page again and again, though sizes are chosen as if none did."""
        rng, contexts = np.random.default_rng(0), (300, 20, 130)
        cache = (2, 3, 4, 16)  # three pages of four
        pack = packs.Pack(
            query=rng.standard_normal((9, 4, 16), np.float32),
            key_cache=rng.standard_normal(cache, np.float32),
            value_cache=rng.standard_normal(cache, np.float32),
            context_lens=np.int32(contexts),
            page_indices=rng.integers(0, 3, (3, 75), np.int32),
            query_offsets=np.int32([0, 1, 6, 9]),
        )
        for sizes in (cases.SMALL_TILES, None):
            packs.assert_matches_reference(pack, *ragged_paged_prefill(*pack, cfg=sizes, return_lse=True))

    @parameterized.product(dtype=cases.DTYPES, sliding_window=(None, 7))
    def test_what_no_row_sees_has_no_effect_on_any_bit(self, dtype, sliding_window):
        case = cases.Case("unseen", SEQUENCES, dtype=dtype, room=cases.ROOM, page_size=4, head_dim=16)
        results = []
        for poison in (0.0, np.nan, np.inf, -np.inf, float(jnp.finfo(dtype).max)):
            pack = case.pack(poison=poison, sliding_window=sliding_window)
            for junk in (0, -1, LARGEST, SMALLEST):
                pages = np.array(pack.page_indices)
                pages[np.isin(pages, packs.JUNK_PAGES)] = junk
                results.append(attend(pack._replace(page_indices=pages), sliding_window=sliding_window))
        for result in results[1:]:
            chex.assert_trees_all_equal(result, results[0])
        self.assertFalse(np.isnan(np.asarray(results[0][0], np.float32)).any())

    @parameterized.named_parameters(
        ("no_tokens", dict(query=(0, 4, 16))),
        ("no_sequences", dict(context_lens=(0,), page_indices=(0, 5), query_offsets=(1,))),
        ("no_pages_in_the_table", dict(page_indices=(2, 0))),
        ("no_pages_in_the_pool", dict(key_cache=(2, 0, 8, 16), value_cache=(2, 0, 8, 16))),
        ("no_packs", dict(query=(0, 6, 4, 16), context_lens=(0, 2), page_indices=(0, 2, 5), query_offsets=(0, 3))),
    )
    def test_empty_packs(self, shapes):
        full = dict(query=(6, 4, 16), key_cache=(2, 9, 8, 16), value_cache=(2, 9, 8, 16), context_lens=(2,),
                    page_indices=(2, 5), query_offsets=(3,))
        shapes = full | shapes
        for run in (ragged_paged_prefill, jax.jit(ragged_paged_prefill, static_argnames="return_lse")):
            operands = [jnp.full(s, 6, jnp.float32 if len(s) > 2 and n in ("query", "key_cache", "value_cache") else jnp.int32)
                        for n, s in shapes.items()]
            out, lse = run(*operands, return_lse=True)
            chex.assert_shape((out, lse), (shapes["query"], shapes["query"][:-1]))
            np.testing.assert_array_equal(out, 0.0)
            np.testing.assert_array_equal(lse, -np.inf)

    @parameterized.named_parameters(
        ("negative_context", dict(context_lens=[-5, SMALLEST, -1, 0, 3])),
        ("context_past_the_page_table", dict(context_lens=[LARGEST, 2**30, 57, 56, 1000])),
        ("offsets_past_the_tokens", dict(query_offsets=[0, 20, 47, 48, 49, LARGEST])),
        ("offsets_negative", dict(query_offsets=[SMALLEST, -3, 4, 9, 20, 48])),
        ("offsets_decrease", dict(query_offsets=[5, 3, 30, 10, 48, 0])),
        ("offsets_all_past_the_end", dict(query_offsets=[LARGEST] * 6)),
        ("pages_outside_the_pool", dict(page_indices=[LARGEST, SMALLEST, -1, 48, 0, 47] * 11 + [LARGEST] * 4)),
        ("all_at_once", dict(context_lens=[LARGEST, -1, 48, 100, 7], query_offsets=[-9, 50, 3, 17, SMALLEST, LARGEST],
                             page_indices=[LARGEST, SMALLEST, -1, 48, 0, 47] * 11 + [-1] * 4)),
    )
    def test_index_arrays_are_made_harmless(self, indices):
        pack = self.plain_pack()
        indices = {k: jnp.asarray(v, jnp.int32).reshape(getattr(pack, k).shape) for k, v in indices.items()}
        pack = pack._replace(**indices)
        for window in (None, 7):
            out, lse = attend(pack, sliding_window=window)
            packs.assert_matches_reference(pack, out, lse, sliding_window=window)
            want = jitted_reference(*pack, sliding_window=window)
            np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want[1]))
            np.testing.assert_allclose(out, want[0], atol=1e-5)

    def test_random_index_arrays_are_harmless(self):
        pack = self.plain_pack()
        extremes = np.asarray([SMALLEST, -1, 0, 1, 13, 47, 48, 49, 2**30, LARGEST])
        rng = np.random.default_rng(0)
        for _ in range(30):
            drawn = {
                name: jnp.asarray(rng.choice(extremes, getattr(pack, name).shape), jnp.int32)
                for name in ("context_lens", "page_indices", "query_offsets")
            }
            garbage = pack._replace(**drawn)
            packs.assert_matches_reference(garbage, *attend(garbage))

    def test_a_needed_page_outside_the_pool_is_clamped(self):
        pack = self.plain_pack()
        outside = pack._replace(page_indices=pack.page_indices.at[:, 0].set(jnp.asarray([-7, 48, LARGEST, SMALLEST, 99])))
        inside = pack._replace(page_indices=pack.page_indices.at[:, 0].set(jnp.asarray([0, 47, 47, 0, 47])))
        chex.assert_trees_all_equal(attend(outside), attend(inside))

    def test_keys_past_the_page_table_are_not_seen(self):
        """A context longer than its row of the table: rows past its end all see exactly the table's keys."""
        pack = self.plain_pack()._replace(
            context_lens=jnp.asarray([80, 0, 0, 0, 0]), query_offsets=jnp.asarray([0, 20, 20, 20, 20, 20])
        )
        out, _ = attend(pack)
        keys = pack.value_cache[:, pack.page_indices[0]].reshape(2, 56, 16)
        logits = jnp.einsum("tkgd,kjd->tkgj", pack.query[:20].reshape(20, 2, 2, 16),
                            pack.key_cache[:, pack.page_indices[0]].reshape(2, 56, 16)) / 4
        want = jnp.einsum("tkgj,kjd->tkgd", jax.nn.softmax(logits), keys).reshape(20, 4, 16)
        np.testing.assert_allclose(out[:20], want, atol=1e-5)

    @parameterized.parameters(*cases.DTYPES)
    def test_broken_numbers_stay_in_their_sequence(self, dtype):
        cases.check_broken(jax.jit(attend), replace(cases.BROKEN, dtype=dtype))

    def test_a_soft_cap_hides_no_nan(self):
        cases.check_broken(jax.jit(functools.partial(attend, attn_logits_soft_cap=30.0)), numbers=[np.nan])

    def test_the_reference_says_so_too(self):
        cases.check_broken(lambda pack: jitted_reference(*pack))
        with np.errstate(invalid="ignore"):
            cases.check_broken(packs.exact)

    def test_a_page_table_of_more_slots_than_int32_counts(self):
        cases.check(cases.ENDLESS)

    @parameterized.product(
        run=(ragged_paged_prefill, append_to_pages),
        sizes=(dict(columns=2**31 + 8), dict(pages=2**31 + 8), dict(page_size=2**30), dict(columns=2**31, pages=2**32)),
    )
    def test_sizes_past_int32_lower(self, run, sizes):
        sizes = dict(columns=5, pages=3, page_size=1) | sizes
        cache = jax.ShapeDtypeStruct((1, sizes["pages"], sizes["page_size"], 8), jnp.float32)
        indices = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, sizes["columns"]), (3,))]
        tokens = [jax.ShapeDtypeStruct((9, heads, 8), jnp.float32) for heads in (2, 1)]
        first = (tokens[0], cache, cache) if run is ragged_paged_prefill else (cache, cache, tokens[1], tokens[1])
        jax.jit(run).lower(*first, *indices)

    def test_mask_value_changes_nothing(self):
        pack = cases.Case("mask_value", SEQUENCES, room=cases.ROOM, page_size=4, head_dim=16).pack()
        chex.assert_trees_all_equal(attend(pack, mask_value=-1e9), attend(pack), attend(pack, mask_value=-np.inf))

    def plain_pack(self):
        """48 tokens, five sequences of 14 columns over 48 pages, nothing poisoned and every page index valid."""
        rng = np.random.default_rng(3)
        pack = packs.make_pack(3, [9] * 5, [30] * 5, page_size=4, head_dim=16, tokens_after=3, poison=1.0, spare_pages=8,
                               spare_columns=6)
        pages = np.stack([rng.permutation(48)[:14] for _ in range(5)])
        fill = rng.standard_normal
        return pack._replace(
            page_indices=jnp.asarray(pages, jnp.int32),
            key_cache=jnp.asarray(fill(pack.key_cache.shape), jnp.float32),
            value_cache=jnp.asarray(fill(pack.value_cache.shape), jnp.float32),
        )


if __name__ == "__main__":
    absltest.main()
