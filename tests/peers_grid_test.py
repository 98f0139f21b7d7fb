"""The grids that the field's libraries are tested on. What was reduced, and why, stands beside each in cases.py."""

import functools

from absl.testing import absltest, parameterized
import jax

from paged_prefill import ragged_paged_prefill
from paged_prefill.tests import cases, compiling

PARAMETERS = ("softmax_scale", "attn_logits_soft_cap", "sliding_window", "cfg", "return_lse")
attend = functools.partial(jax.jit, ragged_paged_prefill, static_argnames=PARAMETERS)
# These hold the numbers that users get; compiled so, each takes seconds, and other tests are compiled fast. Every dtype,
# chunks and decoding, one KV head and many, soft caps and windows, head_dim 64 to 256, and the longest sums are among them.
AS_USERS_GET = (
    "vllm_mixed_gqa_cap", "vllm_mixed_window_256_cap", "vllm_decode_mha_window_128", "vllm_decode_mqa",
    "sglang_page_64_window_cap", "fa3_32767",
)  # fmt: skip


class PeersGridTest(parameterized.TestCase):
    @parameterized.named_parameters(cases.named(cases.GRIDS))
    def test_matches_reference(self, case):
        options = compiling.AS_USERS_DO if case.name in AS_USERS_GET else None
        cases.check(case, attend(compiler_options=options))

    def test_what_users_get_has_every_dtype_in_chunks_and_in_decoding(self):
        chosen = [case for case in cases.GRIDS if case.name in AS_USERS_GET]
        self.assertLen(chosen, len(AS_USERS_GET))
        self.assertEqual({case.dtype for case in chosen}, set(cases.DTYPES))
        self.assertEqual({max(new for new, _ in case.sequences) > 1 for case in chosen}, {False, True})
        self.assertEqual({case.head_dim for case in chosen}, {64, 128, 256})

    def test_every_grid_has_every_dtype(self):
        grids = (cases.FLASHINFER_PAGED, cases.FLASHINFER_FA3, cases.FLASHINFER_WINDOW, cases.FA3_KVCACHE, cases.VLLM,
                 cases.SGLANG)
        for grid in grids:
            self.assertEqual({case.dtype for case in grid}, set(cases.DTYPES))


if __name__ == "__main__":
    absltest.main()
