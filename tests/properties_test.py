"""Properties over drawn shapes, packs and parameters. Shapes come from a small set, so that compilations are shared."""

from dataclasses import replace

from absl.testing import absltest
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, merge, ragged_paged_prefill
from paged_prefill.primitive.reference import reference
from paged_prefill.tests import cases, packs

# The same examples in every run, and no clock: the first example of a shape compiles.
hypothesis.settings.register_profile(
    "suite", max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck), print_blob=True,
)
hypothesis.settings.load_profile("suite")

# Each shape with parameters of its own: five compilations for each form of call.
KINDS = (
    dict(q_heads=4, kv_heads=2, head_dim=16, page_size=4),
    dict(q_heads=4, kv_heads=2, head_dim=16, page_size=4, sliding_window=7),
    dict(q_heads=8, kv_heads=1, head_dim=8, value_dim=24, page_size=1, room=(48, 6, 56, 200), attn_logits_soft_cap=3.0),
    dict(q_heads=3, kv_heads=3, head_dim=5, page_size=7, dtype="bfloat16", sliding_window=19, softmax_scale=1.5),
    dict(q_heads=4, kv_heads=2, head_dim=16, page_size=16, dtype="float16"),
)
# Up to six sequences of up to 8 new tokens and 56 keys: at most 48 tokens and 14 pages of 4 in the page table.
sequences = st.lists(st.tuples(st.integers(0, 8), st.integers(-2, 30)), min_size=1, max_size=6)
long_sequences = st.lists(st.tuples(st.integers(9, 24), st.integers(0, 56)), min_size=1, max_size=2)


@st.composite
def drawn_cases(draw):
    """Cases that share a few compilations: packs of many shapes, padded to one."""
    kind = {"room": (48, 6, 14, 90), **draw(st.sampled_from(KINDS))}
    pack = tuple(draw(st.one_of(sequences, long_sequences)))
    before = draw(st.integers(0, 48 - sum(n for n, _ in pack)))
    name = str(draw(st.integers(0, 2**16)))  # the seed
    return cases.Case(name, pack, tokens_before=before, cfg=cases.SMALL_TILES, **kind)


jitted_reference, jitted_merge = jax.jit(reference), jax.jit(merge)


class PropertiesTest(absltest.TestCase):
    @hypothesis.given(drawn_cases())
    def test_matches_reference(self, case):
        cases.check(case)

    @hypothesis.given(drawn_cases(), st.randoms(use_true_random=False))
    def test_order_of_pages_and_sequences_does_not_matter(self, case, random):
        """Pages moved about in the pool, and the sequences in another order: the same bits for each sequence."""
        pack = case.pack()
        rng = np.random.default_rng(random.getrandbits(32))
        out = ragged_paged_prefill(*pack, **case.parameters, cfg=case.cfg, return_lse=True)
        moved = rng.permutation(pack.key_cache.shape[1])
        pages = np.asarray(pack.page_indices)
        pages = np.where(np.isin(pages, packs.JUNK_PAGES), pages, np.argsort(moved)[np.clip(pages, 0, len(moved) - 1)])
        order = rng.permutation(len(pages))
        offsets = np.asarray(pack.query_offsets)
        rows = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in order])
        others = np.setdiff1d(np.arange(len(pack.query)), rows)
        taken = np.concatenate([rows, others])
        shuffled = packs.Pack(
            pack.query[taken], pack.key_cache[:, moved], pack.value_cache[:, moved], pack.context_lens[order],
            jnp.asarray(pages[order]), jnp.asarray(np.cumsum([0] + [offsets[s + 1] - offsets[s] for s in order]), jnp.int32),
        )
        got = ragged_paged_prefill(*shuffled, **case.parameters, cfg=case.cfg, return_lse=True)
        chex.assert_trees_all_equal(got, tuple(x[taken] for x in out))

    @hypothesis.given(drawn_cases())
    def test_cutting_a_chunk_changes_no_row(self, case):
        """The rows of a chunk as a chunk, and as decode steps of their own, one by one (chunked prefill's promise)."""
        tokens, _, pages_per_seq, num_pages = case.room
        pack = replace(case, room=(tokens, tokens, pages_per_seq, num_pages)).pack(poison=0.0)  # one shape for both calls
        whole = ragged_paged_prefill(*pack, **case.parameters, cfg=case.cfg, return_lse=True)
        offsets = np.asarray(pack.query_offsets)
        owner = np.searchsorted(offsets, np.arange(tokens), side="right") - 1
        owned = (owner >= 0) & (owner < len(offsets) - 1)
        owner = np.where(owned, owner, 0)
        context = np.maximum(np.asarray(pack.context_lens)[owner], 0) - offsets[owner + 1] + np.arange(tokens) + 1
        single = pack._replace(
            context_lens=jnp.asarray(np.where(owned, context, 0), jnp.int32),
            page_indices=pack.page_indices[owner],
            query_offsets=jnp.arange(tokens + 1, dtype=jnp.int32),
        )
        got = ragged_paged_prefill(*single, **case.parameters, cfg=case.cfg, return_lse=True)
        tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[case.dtype]
        for a, b in zip(got, whole):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)

    @hypothesis.given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=17, max_size=17))
    def test_any_index_arrays_mean_what_the_reference_says(self, numbers):
        """Any int32 whatever: harmless, and the same as by the definition. Small numbers stand in for half of them."""
        base = cases.Case("any", ((8, 20), (9, 14)), page_size=4, head_dim=8).pack(poison=1.0)
        seqs, columns = base.page_indices.shape
        small = [n if i % 2 else n % 30 - 5 for i, n in enumerate(numbers)]
        pack = base._replace(
            context_lens=jnp.asarray(small[:seqs], jnp.int32),
            page_indices=jnp.asarray(np.resize(small[5:], (seqs, columns)), jnp.int32),
            query_offsets=jnp.asarray(small[2 : 2 + seqs + 1], jnp.int32),
        )
        out, lse = ragged_paged_prefill(*pack, cfg=cases.SMALL_TILES, return_lse=True)
        packs.assert_matches_reference(pack, out, lse)
        want = jitted_reference(*pack)
        np.testing.assert_allclose(out, want[0], atol=1e-5)
        np.testing.assert_allclose(lse, want[1], atol=1e-5)

    @hypothesis.given(drawn_cases())
    def test_append_then_attend_is_attention_over_what_was_written(self, case):
        """Caches emptied of the chunk and appended to are the caches that make_pack wrote, to the bit."""
        if case.sliding_window is not None:  # make_pack poisons what the window does not need
            return
        pack = case.pack()
        lens, offsets = np.asarray(pack.context_lens), np.asarray(pack.query_offsets)
        keys, values = np.array(pack.key_cache), np.array(pack.value_cache)
        new = [np.zeros((len(pack.query), c.shape[0], c.shape[3]), c.dtype) for c in (keys, values)]
        for seq in range(len(lens)):
            for token in range(offsets[seq], offsets[seq + 1]):
                position = lens[seq] - offsets[seq + 1] + token
                if position >= 0:
                    at = np.s_[:, pack.page_indices[seq, position // case.page_size], position % case.page_size]
                    for array, cache in zip(new, (keys, values)):
                        array[token] = cache[at]
                        cache[at] = np.nan
        caches = append_to_pages(jnp.asarray(keys), jnp.asarray(values), *map(jnp.asarray, new), *pack[3:])
        chex.assert_trees_all_equal(caches, tuple(pack[1:3]))

    @hypothesis.given(st.integers(0, 2**16), st.floats(-300, 300), st.floats(-300, 300))
    def test_merge_commutes(self, seed, shift_a, shift_b):
        rng = np.random.default_rng(seed)
        a, b = (rng.standard_normal((3, 2, 4), np.float32) for _ in range(2))
        lse_a, lse_b = (np.float32(rng.standard_normal((3, 2)) + s) for s in (shift_a, shift_b))
        out, lse = map(np.asarray, jitted_merge(a, lse_a, b, lse_b))
        chex.assert_trees_all_equal((out, lse), tuple(map(np.asarray, jitted_merge(b, lse_b, a, lse_a))))
        self.assertTrue(np.all(lse >= np.maximum(lse_a, lse_b)))
        tolerance = 1e-6
        self.assertTrue(np.all(out <= np.maximum(a, b) + tolerance) and np.all(out >= np.minimum(a, b) - tolerance))


if __name__ == "__main__":
    absltest.main()
