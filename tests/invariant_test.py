"""Protects the policy "invariant": a sequence's bits are the same alone, in any pack and batch, and on any number of
devices."""

import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import KERNELS, choose
from paged_prefill.lowering.mosaic_gpu.host import MosaicGpu
from paged_prefill.lowering.mosaic_gpu.scheduling import WHOLE_OF
from paged_prefill.lowering.tuning.resolve import completed
from paged_prefill.primitive.context import policy
from paged_prefill.tests import cases, compiling
from paged_prefill.tests.problems import problem

# More tokens than a tile holds, a few, and one.
CASE = cases.Case(
    "invariant", ((300, 700), (1, 90), (7, 40), (33, 33)), q_heads=8, kv_heads=8, head_dim=16, page_size=16, dtype="bfloat16"
)


def attend(*pack):
    return ragged_paged_prefill(*pack, return_lse=True)


@functools.cache
def whole():
    """The pack of the case, and its results as one call on one device."""
    pack = CASE.pack(poison=0.0)
    with policy("invariant"):
        return pack, jax.jit(attend)(*pack)


class InvariantTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(policy("invariant"))

    def assert_same_bits(self, got, want, rows=slice(None)):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)[rows])

    def test_alone(self):
        """Each sequence as a pack of its own, with a table of its own width."""
        pack, want = whole()
        offsets = np.asarray(pack.query_offsets)
        for seq, context in enumerate(np.asarray(pack.context_lens)):
            rows = slice(offsets[seq], offsets[seq + 1])
            columns = -(-int(context) // CASE.page_size)
            got = jax.jit(attend)(
                pack.query[rows],
                *pack[1:3],
                pack.context_lens[seq : seq + 1],
                pack.page_indices[seq : seq + 1, :columns],
                jnp.asarray([0, rows.stop - rows.start]),
            )
            self.assert_same_bits(got, want, rows)

    def test_under_vmap(self):
        pack, want = whole()
        got = jax.jit(jax.vmap(attend, (0, None, None, 0, 0, 0)))(
            *(x if i in (1, 2) else np.stack([x] * 3) for i, x in enumerate(pack))
        )
        for element in range(3):
            self.assert_same_bits([np.asarray(x)[element] for x in got], want)

    @parameterized.parameters(2, 4, 8)
    def test_on_several_devices(self, devices):
        mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        specs = (P(None, "model"), P("model"), P("model"), P(), P(), P())
        pack, want = whole()
        on_mesh = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(pack, specs)]
        self.assert_same_bits(jax.jit(attend)(*on_mesh), want)

    @parameterized.product(group=(1, 4), dtype=("float32", "bfloat16"))
    def test_a_share_of_the_heads(self, group, dtype):
        """As users compile: products of other shapes may round differently there."""
        sequences = ((1, 700), (40, 300), (5, 90))
        case = cases.Case("heads", sequences, q_heads=4 * group, kv_heads=4, head_dim=64, page_size=16, dtype=dtype)
        pack = case.pack(poison=0.0)

        def compiled(*pack):
            return jax.jit(attend).lower(*pack).compile(compiler_options=compiling.AS_USERS_DO)(*pack)

        out, lse = compiled(*pack)
        query, key_cache, value_cache, *rest = pack
        mine = slice(group, 2 * group)
        self.assert_same_bits(compiled(query[:, mine], key_cache[1:2], value_cache[1:2], *rest), (out[:, mine], lse[:, mine]))


class ShortTablesTest(parameterized.TestCase):
    """Single rows whose table is one block of keys, which walk side by side, several sequences in each turn."""

    MOST, WIDTH, NUM_PAGES = 64, 12, 40  # sequences, pages of 16 for each, and in all

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        pages = (2, self.NUM_PAGES, 16, 64)
        self.arrays = [rng.standard_normal(shape, np.float32) for shape in ((self.MOST, 16, 64), pages, pages)]
        self.context_lens = rng.integers(1, 16 * self.WIDTH + 1, self.MOST).astype(np.int32)
        self.table = rng.integers(0, self.NUM_PAGES, (self.MOST, self.WIDTH)).astype(np.int32)

    def operands(self, dtype, *packs):
        """Of packs of these sequences, one beside the other if there are several."""
        query, *caches = (x.astype(dtype) for x in self.arrays)  # NumPy's, for JAX compiles a program for each shape
        of_each = [
            (query[seqs], self.context_lens[seqs], self.table[seqs], np.arange(len(seqs) + 1, dtype=np.int32))
            for seqs in map(np.asarray, packs)
        ]
        query, *rest = of_each[0] if len(packs) == 1 else map(np.stack, zip(*of_each))
        return query, *caches, *rest

    @parameterized.parameters(
        ("cache", "bfloat16", 8),
        ("cache", "float32", 2),
        ("cache", "float32", 14),
        ("cache", "float32", 16),
        ("invariant", "float32", 8),
    )
    def test_bits_are_the_same_alone_and_in_any_pack(self, name, dtype, heads):
        self.enter_context(policy(name))
        self.arrays[0] = self.arrays[0][:, :heads]
        every, attend_pack = range(self.MOST), jax.jit(attend)
        want = [np.concatenate(x) for x in zip(*(attend_pack(*self.operands(dtype, [seq])) for seq in every))]

        self.assertTrue(all(np.isfinite(np.asarray(x, np.float32)).all() for x in want))

        def assert_same(got, seqs):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)[np.asarray(seqs)])

        for seqs in (every[8:0:-1], every[1:10], every):
            with self.subTest(f"{len(seqs)}_sequences"):
                assert_same(attend_pack(*self.operands(dtype, seqs)), seqs)
        with self.subTest("under_vmap"):
            packs = every[:3], every[40:43], every[7:4:-1]
            got = jax.jit(jax.vmap(attend, (0, None, None, 0, 0, 0)))(*self.operands(dtype, *packs))
            for element, seqs in enumerate(packs):
                assert_same([np.asarray(x)[element] for x in got], seqs)


class ChoiceTest(parameterized.TestCase):
    HOPPER = Device("cuda", "NVIDIA H200", "9.0")

    def test_kernels_whose_sizes_follow_the_pack_give_way(self):
        self.enter_context(mock.patch.object(MosaicGpu, "invariant", False))
        self.assertEqual(choose(problem(), self.HOPPER)[0], "mosaic_gpu")
        with policy("invariant"):
            _, passed_over = choose(problem(), self.HOPPER)
            self.assertIn('the policy is "invariant"', passed_over["mosaic_gpu"])
            with self.assertRaisesRegex(ValueError, "cannot run this call on cuda: .*invariant"):
                choose(problem(), self.HOPPER, "cuda")

    @parameterized.parameters(
        ({}, True), (dict(head_dim=64, value_dim=64), False), (dict(attn_logits_soft_cap=50.0), False),
        (dict(features=frozenset({"key_ranges"})), False), (dict(num_kv_heads=1, q_heads=16), True),
        (dict(features=frozenset({"quantised"}), cache_dtype="int8"), False),
    )  # fmt: skip
    def test_the_hopper_kernel_has_sizes_that_move_no_bit(self, changes, several):
        """In every pack the same blocks of keys; tiles of another height only where rows go through the same steps."""
        packs = dict(tokens=1, seqs=1), dict(tokens=64, seqs=64), dict(tokens=8192, seqs=1), dict(tokens=3000, seqs=7)
        contexts = dict(pages_per_seq=4), dict(pages_per_seq=8192, num_pages=8192)
        with policy("invariant"):
            kernel = KERNELS["cuda"][choose(problem(), self.HOPPER)[0]]
            self.assertEqual(kernel.name, "mosaic_gpu")
            shares = [] if "q_heads" in changes else [dict(num_kv_heads=4, q_heads=16)]  # of the heads
            for pack in packs:
                others = [problem(**pack, **other, **changes) for other in (*contexts, *shares)]
                self.assertLen({completed(kernel, each, self.HOPPER) for each in others}, 1)
            problems = [problem(**pack, **context, **changes) for pack in packs for context in contexts]
            found = {completed(kernel, each, self.HOPPER) for each in problems}
        self.assertEqual(len(found) > 1, several)
        self.assertLen({(config.block_kv, config.num_splits, WHOLE_OF % config.block_q) for config in found}, 1)

    def test_the_tpu_kernel_takes_one_size_of_chunks(self):
        """Tokens, table, KV heads of a device and block of queries follow the call, and move no bit."""
        kernel, device = KERNELS["tpu"]["mosaic_tpu"], Device("tpu", "TPU v6e")
        of_pack = (dict(), dict(tokens=1, pages_per_seq=3), dict(seqs=64, tokens=64))
        for changes in (*of_pack, dict(num_kv_heads=1, q_heads=4)):
            with policy("invariant"):
                self.assertEqual(choose(problem(**changes), device)[0], "mosaic_tpu")
                self.assertEqual(kernel.heuristic(problem(**changes), device).block_kv, 512)
        with policy("invariant"):
            too_large = problem(num_kv_heads=256, q_heads=256, cache_kv_heads=256, head_dim=512, value_dim=512)
            self.assertEqual(choose(too_large, Device("tpu", "TPU v4"))[0], "xla")


if __name__ == "__main__":
    absltest.main()
