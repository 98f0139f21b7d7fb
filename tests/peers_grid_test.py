"""The grids that the field's libraries are tested on. What was reduced, and why, stands beside each in cases.py."""

from absl.testing import absltest, parameterized
import jax

from paged_prefill import ragged_paged_prefill
from paged_prefill.tests import cases, compiling

PARAMETERS = ("softmax_scale", "attn_logits_soft_cap", "sliding_window", "cfg", "return_lse")
# The numbers that users get: other tests are compiled fast.
attend = jax.jit(ragged_paged_prefill, static_argnames=PARAMETERS, compiler_options=compiling.AS_USERS_DO)


class PeersGridTest(parameterized.TestCase):
    @parameterized.named_parameters(cases.named(cases.GRIDS))
    def test_matches_reference(self, case):
        cases.check(case, attend)

    def test_every_grid_has_every_dtype(self):
        grids = (cases.FLASHINFER_PAGED, cases.FLASHINFER_FA3, cases.FLASHINFER_WINDOW, cases.FA3_KVCACHE, cases.VLLM,
                 cases.SGLANG)
        for grid in grids:
            self.assertEqual({case.dtype for case in grid}, set(cases.DTYPES))


if __name__ == "__main__":
    absltest.main()
