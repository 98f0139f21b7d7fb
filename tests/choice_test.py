"""Protects the choice of a kernel: the device's order, what is passed over and why, and what a call may ask for."""

from absl.testing import absltest, parameterized
import jax

from paged_prefill import lowering
from paged_prefill.lowering import contract

HOPPER = contract.Device("cuda", "NVIDIA H200", "9.0")


def problem(**changes) -> contract.Problem:
    sizes = dict(
        tokens=512, q_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, pools=1, cache_kv_heads=8, num_pages=64,
        page_size=16, seqs=1, pages_per_seq=64, dtype="bfloat16", softmax_scale=0.1, attn_logits_soft_cap=None,
        sliding_window=None,
    )  # fmt: skip
    return contract.Problem(**(sizes | changes))


class ChoiceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("cpu", contract.Device("cpu", "cpu"), "xla"),
        ("tpu", contract.Device("tpu", "TPU v5e"), "mosaic_tpu"),
        ("hopper", HOPPER, "mosaic_gpu"),
    )
    def test_the_first_kernel_of_the_device_that_supports_the_call(self, device, expected):
        self.assertEqual(lowering.choose(problem(), device), (expected, {}))

    def test_what_is_passed_over_is_told_with_the_reason(self):
        name, passed_over = lowering.choose(problem(page_size=12), contract.Device("tpu", "TPU v5e"))
        self.assertEqual(name, "xla")
        self.assertIn("page_size 12 must be a multiple of 16", passed_over["mosaic_tpu"])

    @parameterized.parameters("tpu", "cuda", "rocm")
    def test_a_device_that_is_not_known_takes_what_runs_anywhere(self, platform):
        name, passed_over = lowering.choose(problem(), contract.Device(platform))
        self.assertEqual(name, "xla")
        for reason in passed_over.values():
            self.assertIn("not known here", reason)

    def test_a_gpu_without_a_compute_capability_is_not_known(self):
        self.assertEqual(lowering.choose(problem(), contract.Device("cuda", "NVIDIA A100"))[0], "xla")

    def test_asking_for_a_kernel_says_what_the_device_is(self):
        self.assertEqual(lowering.choose(problem(), contract.Device("cuda"), "cuda"), ("mosaic_gpu", {}))

    @parameterized.parameters("auto", "pallas", "cuda")
    def test_symbolic_sizes_are_for_the_xla_kernel_only(self, platform):
        (tokens,) = jax.export.symbolic_shape("tokens")
        if platform == "auto":
            self.assertEqual(lowering.choose(problem(tokens=tokens), HOPPER)[0], "xla")
        else:
            with self.assertRaisesRegex(ValueError, f"platform='{platform}' cannot run this call on cuda: .*symbolic"):
                lowering.choose(problem(tokens=tokens), HOPPER, platform)


if __name__ == "__main__":
    absltest.main()
