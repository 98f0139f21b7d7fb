"""The reference is held to the same definition written in numpy, which tests use where a compilation costs too much."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.primitive.reference import reference
from paged_prefill.tests import cases, packs


class ReferenceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("plain", {}),
        ("window_and_cap", dict(sliding_window=7, attn_logits_soft_cap=2.0)),
        ("values_narrower", dict(head_dim=24, value_dim=8, softmax_scale=0.3)),
    )
    def test_agrees_with_numpy(self, changes):
        sequences = ((21, 34), (0, 7), (5, 2), (1, 1), (1, 44))
        case = cases.Case("reference", sequences, room=cases.ROOM, page_size=4, tokens_before=2, **changes)
        pack = case.pack()
        want = packs.exact(pack, **case.parameters)
        with jax.enable_x64(True):
            got = reference(*pack, **case.parameters)
        self.assertEqual(got[0].dtype, np.float64)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        got = reference(*pack, **case.parameters)
        self.assertEqual(got[0].dtype, jnp.float32)
        packs.assert_matches_reference(pack, *got, **case.parameters)

    def test_one_sequence_by_hand(self):
        """Three keys, two new tokens, scale 1: exponentials of small integers."""
        query = jnp.asarray([[[1.0]], [[2.0]]])
        key_cache = jnp.log(jnp.asarray([3.0, jnp.nan, 2.0, 5.0])).reshape(1, 2, 2, 1)
        value_cache = jnp.asarray([30.0, jnp.nan, 10.0, 20.0]).reshape(1, 2, 2, 1)
        out, lse = reference(
            query, key_cache, value_cache, jnp.asarray([3]), jnp.asarray([[1, 0]]), jnp.asarray([0, 2]), softmax_scale=1.0
        )
        np.testing.assert_allclose(out.ravel(), [(20 + 100) / 7, (40 + 500 + 270) / 38], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), np.log([7, 38]), rtol=1e-6)

    def test_rows_alone_are_the_rows_of_the_whole(self):
        case = cases.Case("rows", ((21, 34), (9, 40)), room=cases.ROOM, page_size=4, sliding_window=11)
        pack, rows = case.pack(), np.asarray([0, 5, 20, 21, 29])
        whole, some = packs.exact(pack, sliding_window=11), packs.exact(pack, sliding_window=11, rows=rows)
        for a, b in zip(whole, some):
            np.testing.assert_allclose(a[rows], b[rows], rtol=1e-12)


if __name__ == "__main__":
    absltest.main()
