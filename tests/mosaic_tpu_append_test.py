"""append_to_pages by the TPU kernel: to the bit in interpret mode, and in place under the real compiler."""

import functools
import importlib.util
import unittest

from absl.testing import absltest, parameterized
import chex
import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
import numpy as np

from paged_prefill import append_to_pages
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_tpu.append import MosaicTpuWriter
from paged_prefill.lowering.xla.append import XlaWriter
from paged_prefill.primitive.operands import APPEND
from paged_prefill.tests.appends import assert_written, make_append
from paged_prefill.tests.tpus import TOPOLOGIES, compiling_for, device_of, interpreted

DEVICE = Device("tpu", "TPU v6e")


def run(call, *, cache_batch_dims=0):
    """The call, and what the kernel wrote; holds its copies to the order that they need."""
    operands = {name: jax.device_put(call[name]) for name in APPEND.present(call)}
    writer = MosaicTpuWriter()
    assert writer.supports(operands, DEVICE) is None
    write = functools.partial(writer.write, cache_batch_dims=cache_batch_dims, device=DEVICE)
    written = interpreted(write, operands)
    if call["value_cache"] is None:
        written.insert(1, None)
    return call, written


class WritesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("float32", dict(page_size=8)),
        ("bfloat16", dict(dtype="bfloat16", page_size=32)),
        ("int8", dict(dtype="bfloat16", cache_dtype="int8", key_scale="head", value_scale="tensor", page_size=32)),
        ("e4m3_by_slot", dict(cache_dtype="float8_e4m3fn", key_scale="slot", value_scale="slot", page_size=64)),
        ("wide", dict(dtype="bfloat16", page_size=16, head_dim=192, value_dim=128)),
        ("latent", dict(dtype="bfloat16", latent=True, page_size=16)),
        ("layers_and_pools", dict(layers=3, batch=(2, 2), pools=1, page_size=8)),
    )
    def test_each_token_to_its_slot_and_nothing_else(self, kind):
        # Tiles written whole, at an end, in the middle; no tokens; one before the context.
        sequences = ((70, 90), (0, 3), (3, 2), (1, 14), (1, 65), (5, 64))
        assert_written(*run(make_append(0, sequences, **kind), cache_batch_dims=kind.get("pools", 0)))

    def test_pages_that_there_are_not_and_contexts_past_the_table(self):
        call = make_append(2, ((20, 30), (3, 9)), page_size=8)
        pages = np.array(call["page_indices"])
        pages[0, 1:3] = -1, 2**31 - 1
        call |= dict(page_indices=pages, context_lens=np.array([30, 8 * pages.shape[1] + 2], np.int32))
        operands = {name: jax.device_put(call[name]) for name in APPEND.present(call)}
        wanted = XlaWriter().write(operands, 0, DEVICE)
        chex.assert_trees_all_equal(run(call)[1], wanted)

    def test_sequences_that_write_into_one_tile(self):
        call = make_append(1, ((3, 3), (2, 5), (1, 6), (9, 30)), page_size=8)
        pages = np.array(call["page_indices"])
        pages[1], pages[2] = pages[0], pages[0]
        assert_written(*run(call | dict(page_indices=pages)))


@unittest.skipUnless(importlib.util.find_spec("libtpu"), "needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
class InPlaceTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("head_dim_64_of_256_MiB", "v6e", dict(head_dim=64)),
        ("head_dim_512_layers", "7x", dict(head_dim=512, layers=4)),
        ("int8_in_a_loop", "v5e", dict(cache_dtype="int8", page_size=32, loop=3)),
    )
    def test_no_cache_is_copied(self, generation, case):
        compiled, text = compile_append(generation, **case)
        self.assertIn("append_to_pages", text)
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes // 64)
        self.assertGreater(memory.alias_size_in_bytes, memory.argument_size_in_bytes * 15 // 16)

    @parameterized.parameters((None, False), ("model", True))
    def test_on_several_chips_the_kernel_runs_where_the_cut_is_known(self, head_axis, by_kernel):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v6e"]).devices
        mesh = Mesh(np.array(devices), ("model",))

        def of(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        caches = [of((8, 64, 16, 128), "bfloat16", "model")] * 2
        rest = [of((40, 8, 128), "bfloat16", None, "model")] * 2
        rest += [of(shape, "int32") for shape in ((9,), (9, 40), (10,))]
        write = jax.jit(functools.partial(append_to_pages, head_axis=head_axis), donate_argnums=(0, 1))
        with compiling_for(devices[0]):
            lowered = write.trace(*caches, *rest).lower(lowering_platforms=("tpu",))
            self.assertEqual("tpu_custom_call" in lowered.as_text(), by_kernel)
            self.assertGreater(lowered.compile().memory_analysis().alias_size_in_bytes, 0)

    def test_pages_below_a_tile_are_scattered(self):
        self.assertNotIn("tpu_custom_call", compile_append("v6e", page_size=8, mib=1)[1])


def compile_append(
    generation, *, kv_heads=8, head_dim=128, page_size=16, cache_dtype="bfloat16", layers=0, loop=0, mib=256
):
    """An append to donated caches of `mib` MiB each, compiled, and its program before."""
    device = device_of(generation)
    lead = (layers,) if layers else ()
    in_order = Format(Layout(tuple(range(4 + len(lead)))), SingleDeviceSharding(device))
    num_pages = mib * 2**20 // (max(layers, 1) * kv_heads * page_size * head_dim * jnp.dtype(cache_dtype).itemsize)
    cache = jax.ShapeDtypeStruct((*lead, kv_heads, num_pages, page_size, head_dim), cache_dtype, sharding=in_order)
    rest = [((40, kv_heads, head_dim), "bfloat16")] * 2 + [(shape, "int32") for shape in ((9,), (9, 40), (10,))]
    rest = [jax.ShapeDtypeStruct(*x, sharding=SingleDeviceSharding(device)) for x in rest]

    def write(*caches_and_rest):
        caches, rest = caches_and_rest[:2], caches_and_rest[2:]

        def step(caches, layer):
            return append_to_pages(*caches, *rest, **(dict(layer=layer) if layers else {})), None

        return jax.lax.scan(step, caches, jnp.arange(layers or loop))[0] if layers or loop else step(caches, 0)[0]

    with compiling_for(device):
        donating = jax.jit(write, donate_argnums=(0, 1), out_shardings=(in_order, in_order))
        lowered = donating.trace(cache, cache, *rest).lower(lowering_platforms=("tpu",))
        return lowered.compile(), lowered.as_text()


if __name__ == "__main__":
    absltest.main()
