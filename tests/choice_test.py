"""Protects the choice of a kernel: the device's order, what is passed over and why, and what a call may ask for."""

import importlib.util
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.export
import jax.numpy as jnp

from paged_prefill import ragged_paged_prefill, tune
from paged_prefill.lowering import tuning
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import _log_once as log_once, XLA, choose, device_of, log_passed_over
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs
from paged_prefill.tests.problems import problem
from paged_prefill.tests.tuning_stand_ins import environment

HOPPER = Device("cuda", "NVIDIA H200", "9.0")


class ChoiceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("cpu", Device("cpu", "cpu"), "xla"),
        ("tpu", Device("tpu", "TPU v5e"), "mosaic_tpu"),
        ("hopper", HOPPER, "mosaic_gpu"),
    )
    def test_the_first_kernel_of_the_device_that_supports_the_call(self, device, expected):
        self.assertEqual(choose(problem(), device), (expected, {}))
        self.assertEqual(choose(problem(head_dim=96, value_dim=80), device), (expected, {}))

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

    @parameterized.named_parameters(
        ("float32", dict(dtype="float32"), "takes bfloat16 and float16, not float32"),
        ("page_size", dict(page_size=24, cache_dtype="int8", features=("quantised",)), "or a multiple of 64 in int8, not 24"),
    )
    def test_another_kernel_in_place_of_the_first_is_no_warning(self, changes, words):
        with mock.patch.object(importlib.util, "find_spec", lambda name: name):
            chosen = choose(problem(**changes), HOPPER)
        self.assertEqual(chosen[0], "triton")
        log_once.cache_clear()
        with self.assertLogs("absl", "INFO") as logs:
            log_passed_over(HOPPER, *chosen)
            log_passed_over(HOPPER, *chosen)
            log_passed_over(HOPPER, "mosaic_gpu", {})
        [record] = logs.records
        self.assertIn(words, record.getMessage())
        self.assertEqual((record.levelname, record.args[1]), ("INFO", "triton"))

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


class ExportTest(parameterized.TestCase):
    """A module is for machines that are not here, so it is the same wherever it is made."""

    PACK = packs.make_pack(0, [20], [40], q_heads=2, kv_heads=1, head_dim=128, page_size=16, dtype=jnp.bfloat16)

    def export(self, to, **parameters):
        """The module, and what the lowering that runs anywhere was given beside the call, if it is in there."""

        def attend(*operands):
            return ragged_paged_prefill(*operands, **parameters)

        with mock.patch.object(XLA, "attend", wraps=XLA.attend) as anywhere:
            module = jax.export.export(jax.jit(attend), platforms=[to])(*self.PACK).mlir_module()
        return module, anywhere.call_args and anywhere.call_args.args[1:]

    def on_a_tpu_host(self):
        here = mock.Mock(spec=["device_kind", "num_cores"], device_kind="TPU v5 lite", num_cores=1)
        devices = jax.devices
        return mock.patch.object(jax, "devices", lambda name=None: [here] if name == "tpu" else devices(name))

    def test_no_kernel_of_this_machine_is_in_it(self):
        _, elsewhere = self.export("tpu")
        with self.on_a_tpu_host():
            module, here = self.export("tpu")
        self.assertNotIn("tpu_custom_call", module)
        self.assertEqual(here, elsewhere)

    def test_a_kernel_that_is_asked_for_is_in_it(self):
        with self.on_a_tpu_host():
            self.assertIn("tpu_custom_call", self.export("tpu", platform="pallas")[0])
        kind = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
            self.assertIn("tpu_custom_call", self.export("tpu")[0])

    def test_no_table_or_timing_of_this_machine_is_in_it(self):
        _, untuned = self.export("cpu")
        folder = self.enter_context(tempfile.TemporaryDirectory())
        self.enter_context(environment(XDG_CACHE_HOME=folder))
        device = device_of("cpu")
        of = tune.problem_of_shape(1, 20, self.PACK.page_indices.size * 16, 2, 1, 128, None, None, page_size=16)
        row = tables.entry_of(tables.key_of(XLA, of, device), Config(block_q=4, block_kv=16), source="timed")
        tables.write(tables.user_path(device.kind), [row])
        self.assertIn("user's table", resolve.resolve(XLA, of, device, None).source)
        with tuning.policy("on"), mock.patch.object(timing, "compare") as compared:
            self.assertEqual(self.export("cpu")[1], untuned)
        compared.assert_not_called()


if __name__ == "__main__":
    absltest.main()
