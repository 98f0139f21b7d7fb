"""Protects the choice of a kernel: the device's order, what is passed over and why, and what a call may ask for."""

import importlib.util
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import _log_once as log_once, choose, log_passed_over
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

    @parameterized.named_parameters(
        ("float32_on_hopper_without_triton", HOPPER, dict(dtype="float32"), "jax_triton",
         ["by xla on NVIDIA H200", "mosaic_gpu: takes bfloat16 and float16, not float32",
          'triton: the package jax_triton is missing; install it with pip install "paged_prefill[cuda]"']),
        ("other_gpu_without_triton", Device("cuda", "NVIDIA L4", "8.9"), {}, "triton",
         ["by xla on NVIDIA L4", "mosaic_gpu: needs compute capability 9.0", "triton: the package triton is missing"]),
        ("tpu", Device("tpu", "TPU v5e"), dict(page_size=12), None, ["by xla on TPU v5e", "page_size 12 must be a multiple"]),
        ("unknown", Device("tpu"), {}, None, ["by xla on a tpu device", "not known here; ask for it by platform="]),
    )
    def test_xla_on_an_accelerator_is_warned_of_once_with_every_reason(self, device, changes, missing, words):
        with mock.patch.object(importlib.util, "find_spec", lambda name: None if name == missing else name):
            chosen = choose(problem(**changes), device)
        log_once.cache_clear()
        with self.assertLogs("absl", "WARNING") as logs:
            log_passed_over(device, *chosen)
            log_passed_over(device, *chosen)
        [record] = logs.records
        for each in words:
            self.assertIn(each, record.getMessage())

    def test_another_kernel_in_place_of_the_first_is_no_warning(self):
        with mock.patch.object(importlib.util, "find_spec", lambda name: name):
            chosen = choose(problem(dtype="float32"), HOPPER)
        self.assertEqual(chosen[0], "triton")
        log_once.cache_clear()
        with self.assertLogs("absl", "INFO") as logs:
            log_passed_over(HOPPER, *chosen)
            log_passed_over(HOPPER, "mosaic_gpu", {})
        [record] = logs.records
        self.assertEqual((record.levelname, record.args[0]), ("INFO", "triton"))

    def test_a_lowered_call_warns(self):
        operands = [jax.ShapeDtypeStruct(s, "float32") for s in ((5, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8))]
        operands += [jax.ShapeDtypeStruct(s, "int32") for s in ((1,), (1, 3), (2,))]
        log_once.cache_clear()
        with self.assertLogs("absl", "WARNING") as logs:
            jax.jit(ragged_paged_prefill).trace(*operands).lower(lowering_platforms=("tpu",))
            jax.jit(lambda *p: ragged_paged_prefill(*p)).trace(*operands).lower(lowering_platforms=("tpu",))
        self.assertLen([r for r in logs.records if "mosaic_tpu" in r.getMessage()], 1)
        with self.assertNoLogs("absl", "WARNING"):
            jax.jit(ragged_paged_prefill).trace(*operands).lower()

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
