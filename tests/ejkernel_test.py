"""Protects what is there for ejKernel's callers: its class, and its configuration in every form that it takes."""

import dataclasses
import functools
import types

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttention, prefill_page_attention, ragged_paged_prefill
from paged_prefill.ejkernel import _problem
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import KERNELS, check_backend
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs


class OperationTest(parameterized.TestCase):
    """ejKernel's class: code written for it moves over."""

    def setUp(self):
        super().setUp()
        pack = packs.make_pack(4, [5], [20], q_heads=2, kv_heads=1, head_dim=8)
        self.arguments = dict(
            query=pack.query,
            key_cache=pack.key_cache,
            value_cache=pack.value_cache,
            context_len=pack.context_lens,
            page_indices=pack.page_indices[0],
        )
        self.invocation = types.SimpleNamespace(kwargs=self.arguments)
        self.operation = PrefillPageAttention()
        self.expected = prefill_page_attention(*self.arguments.values())

    def test_run_and_get_impl_are_the_operation(self):
        configuration = self.operation.heuristic_cfg(None)
        chex.assert_trees_all_equal(self.operation.run(**self.arguments, cfg=configuration), self.expected)
        chex.assert_trees_all_equal(self.operation.get_impl(configuration)(**self.arguments), self.expected)

    def test_configurations_are_the_kernels(self):
        heuristic = self.operation.heuristic_cfg(self.invocation)
        self.assertNotEmpty(heuristic.sizes())
        self.assertEqual(self.operation.candidate_cfgs(self.invocation)[0], heuristic)

    def test_get_impl_takes_sizes(self):
        """As ejKernel's `run` passes them; they stand before those of the configuration."""
        run = self.operation.get_impl(Config("xla", block_q=4, block_kv=16))
        sizes = dict(block_k=8, num_warps=None, num_stages=3)
        jaxpr = jax.make_jaxpr(lambda: run(**self.arguments, **sizes))()
        self.assertEqual(_config_of(jaxpr), Config("xla", block_q=4, block_kv=8, num_stages=3))
        jaxpr = jax.make_jaxpr(lambda: self.operation.get_impl(None)(**self.arguments, block_k=8))()
        self.assertEqual(_config_of(jaxpr), Config(block_kv=8))

    def test_candidates_for_other_devices(self):
        problem = _problem(self.arguments)  # that XLA alone takes
        for platform, method in (("cuda", "candidate_cfgs_gpu"), ("tpu", "candidate_cfgs_tpu")):
            found = getattr(self.operation, method)(self.invocation)
            self.assertEqual(found, KERNELS[platform]["xla"].candidates(problem, Device(platform)))
        pack = packs.make_pack(4, [16], [32], head_dim=128, page_size=16, dtype=jnp.bfloat16)
        arguments = dict(zip(self.arguments, (*pack[:4], pack.page_indices[0])))
        invocation = types.SimpleNamespace(kwargs=arguments)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu"))
        with jax.sharding.use_abstract_mesh(mesh):
            found = self.operation.candidate_cfgs_tpu(invocation)
        problem = _problem(arguments)
        self.assertEqual(found, KERNELS["tpu"]["mosaic_tpu"].candidates(problem, Device("tpu", "TPU v6 lite", None, 1)))
        invocation = types.SimpleNamespace(kwargs=arguments | dict(platform="cuda"))
        found = self.operation.candidate_cfgs_gpu(invocation)
        self.assertEqual(found, KERNELS["cuda"]["mosaic_gpu"].candidates(problem, Device("cuda")))

    def test_shard_map_wrapper_is_the_operation(self):
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        heads = jax.sharding.PartitionSpec(None, "model")
        whole = jax.sharding.PartitionSpec()
        function, call_args = self.operation.create_shard_map_wrapper(
            **self.arguments, mesh=mesh, in_specs=(heads, whole, whole, whole, whole), out_specs=heads
        )
        chex.assert_trees_all_close(function(*call_args), self.expected, atol=1e-6)


def _config_of(jaxpr):
    """The configuration in a jaxpr's one call, which JAX may have left inside a jit."""
    [equation] = [e for e in jaxpr.eqns if e.primitive.name == "paged_prefill" or "jaxpr" in e.params]
    return equation.params["config"] if "config" in equation.params else _config_of(equation.params["jaxpr"])


class ConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(block_q=0), "cfg.block_q must be a positive integer or None, got 0"),
        (dict(num_warps=True), "cfg.num_warps must be a positive integer or None, got True"),
        (dict(platform="vulkan"), "cfg.platform must be one of auto, xla, .* got 'vulkan'"),
        (dict(platform="tilelang"), "cfg.platform must be one of auto, .* got 'tilelang', which is a kernel of ejKernel's"),
        (dict(platform="cute"), "cfg.platform must be one of .* got 'cute', which is a kernel of ejKernel's: \"auto\" takes"),
        (dict(backend="mps"), "cfg.backend must be one of any, gpu, tpu, cpu or None, got 'mps'"),
        (dict(block_k=0), "cfg.block_k must be a positive integer or None, got 0"),
        (dict(block_k=64, block_kv=32), "cfg.block_k is cfg.block_kv by ejKernel's name, got 64 and 32"),
    )
    def test_impossible_values_are_named(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            Config(**fields)

    def test_takes_the_forms_of_ejkernel(self):
        """As its tests and its files of tuned configurations have them."""
        saved = '{"platform": "auto", "backend": "any", "block_k": 128, "num_warps": 4, "num_stages": 1}'
        config = Config("auto", "any", 128, 4, 1)
        self.assertEqual(config, Config(platform="auto", backend="any", block_kv=128, num_warps=4, num_stages=1))
        self.assertEqual(config, Config.from_json(saved))
        self.assertEqual(hash(config), hash(Config.from_json(saved)))
        self.assertEqual((config.block_k, config.block_kv), (128, 128))
        self.assertEqual(Config(block_k=64, block_kv=64), Config(block_kv=64))
        with self.assertRaisesRegex(TypeError, "block_x"):
            Config.from_dict({"block_x": 3})

    def test_is_saved_and_read_again(self):
        for config in (Config(), Config("xla", "cpu", 64, 2, 3, 16, 5)):
            self.assertEqual(Config.from_dict(config.to_dict()), config)
            self.assertEqual(Config.from_json(config.to_json()), config)
            self.assertEqual(eval(repr(config), {"PrefillPageAttentionConfig": Config}), config)
            self.assertEqual(dataclasses.replace(config, block_kv=7).block_k, 7)

    def test_a_platform_of_ejkernel_only(self):
        pack = packs.make_pack(0, [3], [9])
        with self.assertRaisesRegex(ValueError, "^platform must be one of .* got 'cute', which is a kernel of ejKernel's"):
            ragged_paged_prefill(*pack, platform="cute")

    def test_a_backend_refuses_kernels_of_other_devices(self):
        pack = packs.make_pack(0, [3], [9])
        for backend in (None, "any", "cpu", "gpu", "tpu"):  # XLA's kernel is for each
            jax.eval_shape(functools.partial(ragged_paged_prefill, cfg=Config("xla", backend)), *pack)
            self.assertIsNone(check_backend(Device("cpu"), "xla", Config(backend=backend)))
        check_backend(Device("cuda"), "triton", None)
        for platform, name, mine in (("cuda", "mosaic_gpu", "gpu"), ("rocm", "triton", "gpu"), ("tpu", "mosaic_tpu", "tpu")):
            check_backend(Device(platform), name, Config(backend=mine))
            for other in {"gpu", "tpu", "cpu"} - {mine}:
                message = f"cfg.backend='{other}' asks for a kernel of that backend, but {name} would run on {mine}"
                with self.assertRaisesRegex(ValueError, message):
                    check_backend(Device(platform), name, Config(backend=other))

    def test_a_call_asks_its_backend(self):
        """For a TPU that is not here."""
        pack = packs.make_pack(0, [16], [32], head_dim=128, page_size=16, dtype=jnp.bfloat16, poison=0.0)
        here = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu"))

        def lower(backend):
            call = jax.jit(functools.partial(ragged_paged_prefill, cfg=Config("pallas", backend)))
            with jax.sharding.use_abstract_mesh(here):
                return call.trace(*pack).lower(lowering_platforms=("tpu",))

        with self.assertRaisesRegex(ValueError, "cfg.backend='gpu' asks for a kernel of that backend, but mosaic_tpu would"):
            lower("gpu")
        lower("tpu")

    def test_cfg_of_another_type_is_refused(self):
        pack = packs.make_pack(0, [3], [9])
        with self.assertRaisesRegex(TypeError, "cfg must be a PrefillPageAttentionConfig or None, got {'block_q': 8}"):
            ragged_paged_prefill(*pack, cfg={"block_q": 8})
        theirs = dataclasses.make_dataclass("PrefillPageAttentionConfig", ["block_k"])
        theirs.__module__ = "ejkernel"
        with self.assertRaisesRegex(TypeError, "got .*Config.* of ejkernel: the class of this package takes the same"):
            ragged_paged_prefill(*pack, cfg=theirs(64))

    def test_cfg_and_argument_that_disagree_are_refused(self):
        pack = packs.make_pack(0, [3], [9])
        with self.assertRaisesRegex(ValueError, "platform='xla' and cfg.platform='triton' ask for different kernels"):
            ragged_paged_prefill(*pack, platform="xla", cfg=Config(platform="triton"))

    def test_cfg_changes_nothing_but_rounding(self):
        pack = packs.make_pack(3, [12], [50])
        arguments = (pack.query, pack.key_cache, pack.value_cache, pack.context_lens, pack.page_indices[0])
        out = prefill_page_attention(*arguments, cfg=Config(block_q=3, block_kv=5))
        chex.assert_trees_all_close(out, prefill_page_attention(*arguments), atol=1e-5)
        self.assertFalse(np.isnan(out).any())


if __name__ == "__main__":
    absltest.main()
