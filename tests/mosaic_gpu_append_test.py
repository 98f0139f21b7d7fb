"""append_to_pages through Mosaic GPU without a GPU: what its kernel writes, thread by thread, and its choice.

On GPUs, gpu_append_test.py runs it.
"""

from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np

from paged_prefill import append_to_pages
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import XLA_WRITER, choose_writer
from paged_prefill.lowering.mosaic_gpu.append import MosaicGpuWriter
from paged_prefill.lowering.mosaic_gpu.hopper import append
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.tests import appends, layouts
from paged_prefill.tests.gpu_threads import Shared, Threads, counted

H100 = Device("cuda", "NVIDIA H100", "9.0")
SIZES = dict(head_dim=16, value_dim=24)


def written_by_threads(launch, indices, new, caches):
    """What `append.append` returns, block by block."""
    indices = [Shared(0, np.asarray(x)) for x in indices]
    new, caches = [np.asarray(x) for x in new], [np.array(x) for x in caches]
    blocks = max(-(-launch.chunks(x) // append.THREADS) for x in new)
    threads = Threads(append.THREADS, [])
    with mock.patch.object(append.lax, "fori_loop", counted):
        for token in range(launch.packs * launch.tokens):
            for share in range(blocks):
                block = lambda: (jnp.int32(token), jnp.int32(share))
                append.write_chunks(launch, threads, block, indices, new, caches)
    return caches


class WritesTest(parameterized.TestCase):
    """Each token to its slot, to the bit, and nothing else."""

    def write(self, call, layout="kpsd"):
        lead = call["key_cache"].ndim - 4 - ("layer" in call)
        operands = {name: x for name, x in call.items() if x is not None}
        writer = MosaicGpuWriter()
        self.assertTrue(writer.pays(operands))
        self.assertIsNone(writer.supports(operands, H100, LAYOUTS[layout]))
        with mock.patch("paged_prefill.lowering.mosaic_gpu.append.append", written_by_threads):
            return writer.write(operands, lead, H100, LAYOUTS[layout])

    def check(self, *args, **kind):
        call = appends.make_append(*args, **SIZES | kind)
        written = self.write(call)
        appends.assert_written(call, [*written, *[None] * (2 - len(written))])

    @parameterized.parameters("float32", "bfloat16", "float16")
    def test_tokens_before_between_and_after_sequences_and_more_than_a_context_holds(self, dtype):
        self.check(0, dtype=dtype)

    @parameterized.named_parameters(
        ("layers_and_pools", dict(layers=3, batch=(2, 2), pools=1)),
        ("latent", dict(latent=True, layers=2)),
        ("more_sequences_than_are_looked_at_at_once", dict(sequences=tuple((i % 2, 2 + i % 5) for i in range(70)))),
        ("more_chunks_than_threads", dict(kv_heads=40, q_heads=40, value_dim=32)),
    )
    def test_forms(self, kind):
        self.check(**dict(seed=1) | kind)

    @parameterized.parameters(*layouts.NAMES)
    def test_caches_as_others_lay_them(self, name):
        """Keys and values of one size, where one array holds both."""
        call = appends.make_append(2, layers=2, **SIZES | dict(value_dim=16))
        written = self.write(layouts.lay(call, name), name)
        written += [None] * (2 - len(written))
        appends.assert_written(call, layouts.in_order(written, name, call["key_cache"].ndim - 4))

    def test_indices_that_no_one_should_give(self):
        rng = np.random.default_rng(0)
        for seed in range(4):
            call = appends.make_append(seed, layers=2, batch=(2,), pools=1, **SIZES)
            for name in ("context_lens", "page_indices", "query_offsets", "layer") if seed else ():
                junk = rng.choice([-(2**31), -1, 2, 3, 40, 2**31 - 1], call[name].shape)
                call[name] = np.where(rng.random(call[name].shape) < 0.3, junk, call[name]).astype(np.int32)
            call["query_offsets"][..., -1] = 2**31 - 1  # the last sequence has all the rest
            want = XLA_WRITER.write({name: jnp.asarray(x) for name, x in call.items()}, 1, Device("cpu", "cpu"))
            for a, b in zip(self.write(call), want, strict=True):
                np.testing.assert_array_equal(a, b)


class LoweredTest(parameterized.TestCase):
    @parameterized.parameters("jit", "shard_map")
    def test_one_launch_in_the_memory_of_both_caches(self, way):
        call = {name: jnp.asarray(x) for name, x in appends.make_append(0, layers=2, **SIZES).items()}
        self.enterContext(mock.patch("paged_prefill.lowering.device_of", lambda *_, **__: H100))
        run = lambda call: append_to_pages(**call)
        if way == "shard_map":
            mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
            run = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())
        text = jax.jit(run).trace(call).lower(lowering_platforms=("cuda",)).as_text()
        launches = [line for line in text.splitlines() if "mosaic_gpu" in line]
        self.assertLen(launches, 1)
        self.assertEqual(launches[0].count("output_operand_alias<"), 2)
        self.assertNotIn("scatter", text)


class ChoiceTest(parameterized.TestCase):
    def choose(self, device, **kind):
        kind = SIZES | dict(dtype="bfloat16", sequences=((3, 9),)) | kind
        call = {name: x for name, x in appends.make_append(0, **kind).items() if x is not None}
        return choose_writer(call, device)

    @parameterized.named_parameters(
        ("float16", dict(dtype="float16")), ("float32", dict(dtype="float32")), ("latent", dict(latent=True))
    )
    def test_hopper_takes_it_for_few_tokens(self, kind):
        self.assertEqual(self.choose(H100, **kind)[0].name, "mosaic_gpu")

    @parameterized.named_parameters(
        ("many_tokens", dict(sequences=((126, 150),))),
        ("quantised", dict(cache_dtype="int8")),
        ("rows_that_are_no_whole_chunks", dict(head_dim=12)),
    )
    def test_others_go_elsewhere_without_a_word(self, kind):
        writer, passed_over = self.choose(H100, **kind)
        self.assertNotEqual(writer.name, "mosaic_gpu")
        self.assertNotIn("mosaic_gpu", passed_over)

    @parameterized.parameters(("cuda", "NVIDIA A100", "8.0"), ("cuda", "NVIDIA B200", "10.0"), ("cpu", "cpu", None))
    def test_elsewhere_it_is_not_asked(self, *device):
        writer, passed_over = self.choose(Device(*device))
        self.assertEqual((writer.name, passed_over.get("mosaic_gpu")), ("xla", None))

    def test_a_cache_of_too_many_rows(self):
        shape = jax.ShapeDtypeStruct
        cache = shape((8, 2**24, 16, 64), jnp.bfloat16)
        call = dict(key_cache=cache, value_cache=cache, key=shape((1, 8, 64), jnp.bfloat16))
        self.assertIn("at most 2147483647 rows", MosaicGpuWriter().supports(call, H100))


if __name__ == "__main__":
    absltest.main()
