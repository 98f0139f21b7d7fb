"""Protects the choice of a kernel: the device's order, what is passed over and why, and what a call may ask for."""

from absl.testing import absltest, parameterized
import jax

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import choose
from paged_prefill.tests.problems import problem

HOPPER = Device("cuda", "NVIDIA H200", "9.0")


class ChoiceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("cpu", Device("cpu", "cpu"), "xla"),
        ("tpu", Device("tpu", "TPU v5e"), "mosaic_tpu"),
        ("hopper", HOPPER, "mosaic_gpu"),
    )
    def test_the_first_kernel_of_the_device_that_supports_the_call(self, device, expected):
        self.assertEqual(choose(problem(), device), (expected, {}))

    def test_what_is_passed_over_is_told_with_the_reason(self):
        name, passed_over = choose(problem(page_size=12), Device("tpu", "TPU v5e"))
        self.assertEqual(name, "xla")
        self.assertIn("page_size 12 must be a multiple of 16", passed_over["mosaic_tpu"])

    @parameterized.parameters("tpu", "cuda", "rocm")
    def test_a_device_that_is_not_known_takes_what_runs_anywhere(self, platform):
        name, passed_over = choose(problem(), Device(platform))
        self.assertEqual(name, "xla")
        for reason in passed_over.values():
            self.assertIn("not known here", reason)

    def test_a_gpu_without_a_compute_capability_is_not_known(self):
        self.assertEqual(choose(problem(), Device("cuda", "NVIDIA A100"))[0], "xla")

    def test_asking_for_a_kernel_says_what_the_device_is(self):
        self.assertEqual(choose(problem(), Device("cuda"), "cuda"), ("mosaic_gpu", {}))

    @parameterized.parameters("auto", "pallas", "cuda")
    def test_symbolic_sizes_are_for_the_xla_kernel_only(self, platform):
        (tokens,) = jax.export.symbolic_shape("tokens")
        if platform == "auto":
            self.assertEqual(choose(problem(tokens=tokens), HOPPER)[0], "xla")
        else:
            with self.assertRaisesRegex(ValueError, f"platform='{platform}' cannot run this call on cuda: .*symbolic"):
                choose(problem(tokens=tokens), HOPPER, platform)


if __name__ == "__main__":
    absltest.main()
