"""The TPU kernel under the real TPU compiler, ahead of time, on a machine without a TPU."""

import dataclasses
import functools
import importlib.util
import unittest

from absl.testing import absltest, parameterized
import jax
from jax.experimental.layout import Format, Layout
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np

import paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import KERNELS, choose
from paged_prefill.lowering.mosaic_tpu.chips import CHIPS
from paged_prefill.lowering.mosaic_tpu.host import MosaicTpu
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.tests import calls, problems
from paged_prefill.tests.tpus import TOPOLOGIES, compiling_for, device_of

KERNEL = MosaicTpu()
HEURISTIC = ("v4", "v5e", "7x")  # compiled with the heuristic's sizes, which takes longest
OF_SLOTS = ("quantised", "slot_scales")

# Small tiles keep the compiler's time short; what the tiling refuses does not depend on them.
SMALL = PrefillPageAttentionConfig(block_q=32, block_kv=256)


def compile_for(
    generation, *, tokens=100, seqs=3, pages=20, q_heads=4, kv_heads=2, head_dim=128, value_dim=None, page_size=16,
    pages_per_seq=40, dtype="bfloat16", cache_dtype=None, config=SMALL, platform="pallas", row_major=False,
    cache_layout="kpsd", tree_words=0, **parameters,
):  # fmt: skip
    """Compiles the public call; with `row_major`, for caches in row-major layout, else in the one that XLA chooses.

    Caches of a dtype of their own have scales of each slot.
    """
    device = device_of(generation)
    cache = tuple(dict(k=kv_heads, p=pages, s=page_size, **{"2": 2})[dim] for dim in cache_layout[:-1])
    shapes = [(tokens, q_heads, head_dim), (*cache, head_dim), (*cache, value_dim or head_dim)]
    shapes += [(seqs,), (seqs, pages_per_seq), (seqs + 1,)]
    sharding = SingleDeviceSharding(device)
    of_cache = Format(Layout((0, 1, 2, 3)), sharding) if row_major else sharding
    dtypes = [dtype] + 2 * [cache_dtype or dtype] + 3 * ["int32"]
    operands = [
        jax.ShapeDtypeStruct(shape, dtypes[i], sharding=of_cache if i in (1, 2) else sharding)
        for i, shape in enumerate(shapes)
    ]
    if "2" in cache_layout:
        operands[2] = None
    scale = jax.ShapeDtypeStruct(cache, "float32", sharding=sharding)
    others = dict(key_scale=scale, value_scale=scale) if cache_dtype else {}
    if tree_words:
        others["tree_mask"] = jax.ShapeDtypeStruct((tokens, tree_words), "uint32", sharding=sharding)
    parameters |= dict(return_lse=True, platform=platform, cfg=config, cache_layout=cache_layout)
    call = functools.partial(paged_prefill.ragged_paged_prefill, **parameters)
    with compiling_for(device):
        return jax.jit(call).trace(*operands, **others).lower(lowering_platforms=("tpu",)).compile()


@unittest.skipUnless(importlib.util.find_spec("libtpu"), "needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
class CompileTest(parameterized.TestCase):
    def check(self, compiled):
        self.assertIn("paged_prefill", compiled.as_text())

    @parameterized.parameters(*(name for name in TOPOLOGIES if name not in HEURISTIC))
    def test_other_generations(self, generation):
        self.check(compile_for(generation, sliding_window=100, attn_logits_soft_cap=30.0))

    @parameterized.parameters(("v5e", "float8_e4m3fn"), ("v6e", "int8"), ("7x", "float8_e5m2"))
    def test_scales_of_each_slot_take_less_than_the_caches(self, generation, cache_dtype):
        compiled = compile_for(generation, pages=2**17, cache_dtype=cache_dtype)
        self.check(compiled)
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes // 7)

    @parameterized.named_parameters(
        ("head_dim_96_value_dim_64", dict(head_dim=96, value_dim=64)),
        ("head_dim_256", dict(head_dim=256)),
        ("group_of_5_and_page_of_48", dict(q_heads=5, kv_heads=1, page_size=48)),
        ("group_of_64", dict(q_heads=64, kv_heads=1, config=PrefillPageAttentionConfig(block_q=8, block_kv=256))),
        ("page_of_8_float32", dict(page_size=8, dtype="float32", head_dim=256, value_dim=128)),
        ("decode_in_groups_of_1", dict(tokens=3, q_heads=2)),
        # Where pages are smaller than native tiles, several share one.
        ("int8_page_of_48", dict(page_size=48, cache_dtype="int8", pages=64)),
        ("int8_head_dim_256_and_page_of_16", dict(head_dim=256, cache_dtype="int8", pages=64)),
        ("float32_over_int8_page_of_8", dict(page_size=8, dtype="float32", cache_dtype="int8", pages=64)),
        ("table_larger_than_scalar_memory", dict(seqs=64, pages_per_seq=8192, tokens=64)),
    )
    def test_shapes(self, shape):  # head_dim 64, 80 and 192 and large pages are compiled below
        self.check(compile_for("v5e", **shape))

    @parameterized.named_parameters(  # v5e's head_dim 64 and 128 are in the loop below
        ("v5e_head_dim_80_page_of_1024", "v5e", dict(head_dim=80, page_size=1024)),
        ("v4_head_dim_96_float32", "v4", dict(head_dim=96, page_size=8, dtype="float32")),
        ("7x_head_dim_192", "7x", dict(head_dim=192, value_dim=128)),
        ("v6e_head_dim_512_of_1_GiB", "v6e", dict(head_dim=512, pages=2**15)),
    )
    def test_a_row_major_cache_is_not_copied(self, generation, shape):
        pages = shape.pop("pages", 2**17 // shape.get("page_size", 16))
        compiled = compile_for(generation, pages=pages, row_major=True, **shape)
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes // 16)

    @parameterized.parameters("pksd", "p2ksd")
    def test_a_cache_with_pages_before_heads_is_not_copied(self, cache_layout):
        compiled = compile_for("v5e", pages=2**13, cache_layout=cache_layout)
        self.check(compiled)
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes // 16)

    def test_a_cache_in_the_layout_of_jnp_zeros_is_copied_where_head_dim_is_no_multiple_of_128(self):
        # XLA would put the pages on the lanes, 64 features being half of them, and no kernel can fetch a page then. If
        # this fails, XLA has learned better, and what docs/serving.md says of it can go.
        memory = compile_for("v5e", pages=2**13, head_dim=64).memory_analysis()
        self.assertGreater(memory.temp_size_in_bytes, memory.argument_size_in_bytes // 2)

    @parameterized.parameters((64, 0), (64, 6), (128, 6))
    def test_a_loop_of_appending_and_attending_works_in_place(self, head_dim, layers):
        """Over steps, and over the layers of stacked caches, of which none is set aside."""

        def steps(key_cache, value_cache, query, key, value, *pack):
            def step(caches, number):
                layer = dict(layer=number) if layers else {}
                caches = paged_prefill.append_to_pages(*caches, key, value, *pack, **layer)
                out = paged_prefill.ragged_paged_prefill(query, *caches, *pack, platform="pallas", cfg=SMALL, **layer)
                return caches, out

            return jax.lax.scan(step, (key_cache, value_cache), jax.numpy.arange(layers or 3, dtype="int32"))

        device = device_of("v5e")
        lead = (layers,) if layers else ()
        row_major = Format(Layout(tuple(range(4 + len(lead)))), SingleDeviceSharding(device))
        cache = jax.ShapeDtypeStruct((*lead, 2, 2**13, 16, head_dim), "bfloat16", sharding=row_major)
        rest = [((100, heads, head_dim), "bfloat16") for heads in (4, 2, 2)]
        rest += [(shape, "int32") for shape in ((3,), (3, 40), (4,))]
        rest = [jax.ShapeDtypeStruct(*x, sharding=SingleDeviceSharding(device)) for x in rest]
        donating = jax.jit(steps, donate_argnums=(0, 1), out_shardings=((row_major, row_major), None))
        with compiling_for(device):
            compiled = donating.trace(cache, cache, *rest).lower(lowering_platforms=("tpu",)).compile()
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, memory.argument_size_in_bytes // (16 * max(layers, 1)))
        self.assertGreater(memory.alias_size_in_bytes, memory.argument_size_in_bytes * 15 // 16)

    @parameterized.parameters(*HEURISTIC)
    def test_heuristic_sizes_fit(self, generation):
        sizes = dict(tokens=512, q_heads=16, kv_heads=4, pages_per_seq=128, sliding_window=600, attn_logits_soft_cap=30.0)
        self.check(compile_for(generation, **sizes, config=None))

    def test_what_masks_of_each_row_spill_fits(self):
        heads = dict(q_heads=32, kv_heads=32, head_dim=64, value_dim=128)
        pack = dict(tokens=35, seqs=13, page_size=256, tree_words=1, attn_logits_soft_cap=30.0)
        self.check(compile_for("v6e", **heads, **pack, config=None))

    def test_programs_are_the_same_with_x64_on(self):
        shape, ints = jax.ShapeDtypeStruct, [jax.ShapeDtypeStruct(s, "int32") for s in ((3,), (3, 40), (4,))]
        cache, new = shape((2, 64, 16, 128), "bfloat16"), shape((40, 2, 128), "bfloat16")
        attend = functools.partial(paged_prefill.ragged_paged_prefill, platform="pallas", return_lse=True)
        calls = [(attend, shape((40, 4, 128), "bfloat16"), cache, cache), (paged_prefill.append_to_pages, cache, cache, new, new)]

        def programs():
            with compiling_for(device_of("v6e")):
                for call, *operands in calls:
                    yield jax.jit(call).trace(*operands, *ints).lower(lowering_platforms=("tpu",)).as_text()

        narrow = [*programs()]
        with jax.enable_x64(True):
            self.assertEqual([*programs()], narrow)

    def test_without_a_known_tpu_the_xla_kernel_runs(self):
        operands = [jnp.zeros(s, "bfloat16") for s in ((4, 2, 128), (2, 3, 16, 128), (2, 3, 16, 128))]
        operands += [jnp.zeros(s, "int32") for s in ((1,), (1, 2), (2,))]
        lowered = jax.jit(paged_prefill.ragged_paged_prefill).trace(*operands).lower(lowering_platforms=("tpu",))
        self.assertNotIn("tpu_custom_call", lowered.as_text())


class SupportsTest(parameterized.TestCase):
    """Refusals are said before the compiler is asked; these need no compiler."""

    SIZES = dict(tokens=64, q_heads=8, num_kv_heads=2, cache_kv_heads=2, num_pages=9, pages_per_seq=8)

    @parameterized.named_parameters(
        ("float16", dict(dtype="float16"), "TPU v5e", "not float16"),
        ("page_below_the_tile", dict(page_size=8), "TPU v5e", "page_size 8 must be a multiple of 16"),
        ("page_below_the_tile_float32", dict(page_size=4, dtype="float32"), "TPU v5e", "must be a multiple of 8 for"),
        ("no_tpu", {}, None, "use_abstract_mesh"),
        ("old_tpu", {}, "TPU v3", "not for TPU v3"),
        ("heads_past_vmem", dict(q_heads=4096, num_kv_heads=4096, cache_kv_heads=4096), "TPU v4", "VMEM"),
        ("tables_larger_than_the_caches", dict(seqs=3, cache_dtype="int8", features=OF_SLOTS), "TPU v5e", "fewer columns"),
        ("sequences_past_smem", dict(seqs=10**5, tokens=10**5), "TPU v5e", "SMEM"),
    )
    def test_reason(self, changes, kind, words):
        problem = problems.problem(**(self.SIZES | changes))
        self.assertIn(words, KERNEL.supports(problem, Device("tpu", kind)))
        name, passed_over = choose(problem, Device("tpu", kind))
        self.assertEqual((name, list(passed_over)), ("xla", ["mosaic_tpu"]))

    @parameterized.parameters((dict(block_q=2**16), "block_q 65536 "), (dict(block_kv=2**20), "block_kv 1048576, "))
    def test_sizes_past_the_memories_are_named(self, sizes, words):
        device = Device("tpu", "TPU v5e")
        problem = problems.problem(**self.SIZES)
        config = PrefillPageAttentionConfig(**sizes).over(KERNEL.heuristic(problem, device))
        self.assertRegex(KERNEL.misfit(problem, device, config), words + ".*bytes of VMEM")

    @parameterized.parameters(*CHIPS)
    def test_configurations_fit(self, kind):
        device = Device("tpu", kind)
        for q_heads, kv_heads, head_dim in ((32, 8, 128), (64, 64, 256), (1, 1, 64), (64, 2, 192)):
            changes = dict(q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, tokens=2048, pages_per_seq=1024)
            problem = problems.problem(**(self.SIZES | changes))
            self.assertIsNone(KERNEL.supports(problem, device))
            candidates = KERNEL.candidates(problem, device)
            self.assertEqual(candidates[0], KERNEL.heuristic(problem, device))
            self.assertLen(set(candidates), len(candidates))
            self.assertEqual({KERNEL.misfit(problem, device, candidate) for candidate in candidates}, {None})

    @parameterized.parameters("TPU v5e", "TPU v6e", "TPU7x")
    def test_the_heuristic_fits_random_calls(self, kind):
        rng, device, asked = np.random.default_rng(0), Device("tpu", kind), 0
        for _ in range(500):
            problem = calls.random_problem(rng)
            if problem.page_size % 16:
                continue
            if problem.head_dim == 576:
                problem = dataclasses.replace(problem, features=("latent",))
            quantised = dict(features=tuple(sorted((*problem.features, "quantised"))), cache_dtype="int8")
            of_slots = dict(quantised, features=tuple(sorted((*problem.features, *OF_SLOTS))))
            of_slots["num_pages"] = problem.seqs * problem.pages_per_seq
            for each in (problem, *(dataclasses.replace(problem, **changes) for changes in (quantised, of_slots))):
                self.assertIsNone(KERNEL.supports(each, device), each)
                self.assertIsNone(KERNEL.misfit(each, device, KERNEL.heuristic(each, device)), each)
                asked += 1
        self.assertGreater(asked, 500)

    def test_it_is_the_first_choice(self):
        self.assertEqual(list(KERNELS["tpu"]), ["mosaic_tpu", "xla"])
        self.assertEqual(choose(problems.problem(), Device("tpu", "TPU v6e"))[0], "mosaic_tpu")


if __name__ == "__main__":
    absltest.main()
