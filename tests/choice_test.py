"""Protects the choice of a kernel: the device's order, what is passed over and why, and what a call may ask for."""

import os
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.export
import jax.numpy as jnp

from paged_prefill import ragged_paged_prefill, tune
from paged_prefill.lowering import tuning
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import XLA, choose, device_of
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs
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
        self.enter_context(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}))
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
