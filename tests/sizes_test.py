"""Protects the sizes that calls run with: chips are full, and no table makes a call fail or leaves its chip idle."""

import collections
import dataclasses
import importlib.util
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import KERNELS, device_of
from paged_prefill.lowering.cores import CORES
from paged_prefill.lowering.mosaic_gpu import host as mosaic_gpu_host
from paged_prefill.lowering.splits import most_keys
from paged_prefill.lowering.triton import parts as triton_parts
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.tests import calls
from paged_prefill.tests.tuning_stand_ins import environment
from paged_prefill.tune import problem_of_shape

DEVICES = (
    ("h100", Device("cuda", "NVIDIA H100 80GB HBM3", "9.0")),
    ("h200", Device("cuda", "NVIDIA H200", "9.0")),
    ("h20", Device("cuda", "NVIDIA H20", "9.0")),
    ("mi300x", Device("rocm", "AMD Instinct MI300X", "gfx942")),
    ("v5e", Device("tpu", "TPU v5 lite")),
    ("v6e", Device("tpu", "TPU v6 lite")),
    ("7x", Device("tpu", "TPU7x")),
)
CALLS = 800  # of each device, others for each
GPU_KERNELS = [KERNELS["cuda"]["mosaic_gpu"], KERNELS["cuda"]["triton"]]
PACKAGES = mock.patch.object(importlib.util, "find_spec", lambda name: name)  # choosing sizes needs none


def kernels_of(problem, device):
    """Those that run a call, but for the one that runs anywhere and fills no chip by itself."""
    kernels = KERNELS[device.platform].values()
    return [kernel for kernel in kernels if kernel.name != "xla" and kernel.supports(problem, device) is None]


def filled(kernel, problem, device, config) -> int:
    """Cores that a launch over contexts as long as the table has work for at a time; 1 on TPUs, whose cores a grid does not fill."""
    if device.platform == "tpu":
        return 1
    host = mosaic_gpu_host if kernel.name == "mosaic_gpu" else triton_parts
    parts, blocks = host.parts_of_tiles(problem, device, config), -(-most_keys(problem, config.block_q) // config.block_kv)
    of_tile = int(parts.number(np.int32(blocks))) if parts.vary else parts.least
    return min(device.cores, host.programs(problem, config) * of_tile)


def problem_of_key(key) -> Problem:
    """The largest call that a row of a table is for."""
    sizes = [key[name] for name in ("sequences", "tokens_per_sequence", "context_capacity", "group", "kv_heads")]
    seqs, tokens, context, group, kv_heads = sizes
    others = [key[name] for name in ("head_dim", "sliding_window", "soft_cap")]
    by_name = {name: key[name] for name in ("value_dim", "page_size", "dtype")}
    return problem_of_shape(seqs, tokens, context, group * kv_heads, kv_heads, *others, **by_name)


def with_heads_and_sequences_of(other, problem) -> Problem:
    """As many tokens, keys and features, but the KV heads, the sequences and the soft cap of another call."""
    kv_heads, seqs = other.num_kv_heads, min(other.seqs, problem.tokens)
    heads = dict(q_heads=problem.group * kv_heads, num_kv_heads=kv_heads, cache_kv_heads=kv_heads)
    cap = other.attention.attn_logits_soft_cap
    attention = dataclasses.replace(problem.attention, attn_logits_soft_cap=cap)
    return dataclasses.replace(
        problem, **heads, seqs=seqs, num_pages=seqs * problem.pages_per_seq, attention=attention
    )


class TablesDoNoHarmTest(parameterized.TestCase):
    """Over random calls: no call fails, or fills less than half of what the heuristic fills, because of a table."""

    def setUp(self):
        super().setUp()
        self.enter_context(PACKAGES)
        no_user = self.enter_context(tempfile.TemporaryDirectory())
        self.enter_context(environment(XDG_CACHE_HOME=no_user))

    def check(self, device, problems):
        """How many calls a table had sizes for, of each kernel."""
        followed = collections.Counter()
        for problem in problems:
            for kernel in kernels_of(problem, device):
                config, source = resolve.resolve(kernel, problem, device, None, under="cache")
                self.assertIsNone(kernel.misfit(problem, device, config), (source, problem))
                fills = filled(kernel, problem, device, config)
                if source != "heuristic":  # whose half is less than what it fills
                    followed[kernel.name] += 1
                    heuristic = resolve.completed(kernel, problem, device)
                    least = filled(kernel, problem, device, heuristic) / 2
                    self.assertGreaterEqual(fills, least, (source, config, problem))
        return followed

    @parameterized.named_parameters(*DEVICES)
    def test_what_is_shipped(self, device):
        rng = np.random.default_rng([*device.kind.encode()])
        problems = [calls.random_problem(rng) for _ in range(CALLS)]
        self.check(device, problems)
        # Few of those meet a row. These do, the ends of each row's key; and these nearly.
        for row in tables.read_shipped(device.kind).values():
            largest = problem_of_key(row["key"])
            ends = [largest, *timing.ends_of(largest)]
            self.assertEqual(self.check(device, ends)[row["key"]["kernel"]], len(ends), row)
            self.check(device, [with_heads_and_sequences_of(problem, largest) for problem in problems[:100]])

    @parameterized.named_parameters(DEVICES[0], *DEVICES[2:])
    def test_whatever_was_chosen_for_other_calls_of_the_same_key(self, device):
        rng = np.random.default_rng([1, *device.kind.encode()])
        problems = [calls.random_problem(rng) for _ in range(CALLS // 2)]
        table = {}
        for problem in problems:
            for kernel in kernels_of(problem, device):
                others = [other for other in timing.ends_of(problem) if kernel.supports(other, device) is None]
                other = others[rng.integers(len(others))] if others else problem
                candidates = kernel.candidates(other, device)
                config = candidates[rng.integers(len(candidates))]
                key = tables.key_of(kernel, problem, device)
                table[tables.canonical(key)] = tables.entry_of(key, config, source="timed")
        with mock.patch.object(tables, "read_shipped", return_value=table):
            self.assertGreater(self.check(device, problems).total(), len(problems) / 3)


class ContextsHaveRoomInThePoolTest(parameterized.TestCase):
    def test_a_wider_table_than_the_pool_changes_no_size(self):
        """Tables are as wide as a model's longest context: no context is longer than the pool."""
        rng, device = np.random.default_rng(6), DEVICES[1][1]
        kernel, cut = KERNELS["cuda"]["mosaic_gpu"], 0
        for problem in [calls.random_problem(rng) for _ in range(120)]:
            tables_of = [problem.num_pages * times for times in (1, 2, 9)]
            narrow, *wider = [dataclasses.replace(problem, pages_per_seq=columns) for columns in tables_of]
            sizes = kernel.heuristic(narrow, device)
            parts = mosaic_gpu_host.parts_of_tiles(narrow, device, sizes)
            for each in wider:
                self.assertEqual(kernel.heuristic(each, device), sizes, each)
                self.assertEqual(mosaic_gpu_host.parts_of_tiles(each, device, sizes), parts, each)
            cut += parts.most > 1
        self.assertGreater(cut, 20)


class CandidatesTest(parameterized.TestCase):
    """What tuning times: each candidate fits, and is the heuristic or near it."""

    # How many times the heuristic's sizes; Hopper's tiles also hold one head's tokens instead of a group's.
    NEAR = dict(block_q=(1 / 4, 2), block_kv=(1 / 2, 2), num_warps=(1 / 2, 2), num_stages=(1 / 2, 2))
    NEAR_ON_HOPPER = NEAR | dict(block_q=(1 / 4, 16))

    @parameterized.named_parameters(*DEVICES, ("cpu", Device("cpu", "cpu")))
    def test_candidates_fit_and_are_near_the_heuristic(self, device):
        rng = np.random.default_rng(3)
        with PACKAGES:
            for problem in [calls.random_problem(rng) for _ in range(50)]:
                for kernel in KERNELS[device.platform].values():
                    if kernel.supports(problem, device) is None:
                        with self.subTest(kernel=kernel.name, problem=problem):
                            self.check(kernel, problem, device)

    @parameterized.named_parameters(*DEVICES)
    def test_any_of_their_sizes_may_be_chosen_alone(self, device):
        """What a caller leaves open follows: by these sizes there is some configuration that fits."""
        rng, open_ones = np.random.default_rng(4), set()
        with PACKAGES:
            for problem in [calls.random_problem(rng) for _ in range(60)]:
                for kernel in kernels_of(problem, device):
                    for candidate in kernel.candidates(problem, device):
                        for name, size in candidate.sizes().items():
                            asked = PrefillPageAttentionConfig(**{name: size})
                            config, _ = resolve.resolve(kernel, problem, device, asked)
                            self.assertIsNone(kernel.misfit(problem, device, config), (asked, problem))
                            self.assertEqual(getattr(config, name), size)
                            open_ones.add(kernel.misfit(problem, device, asked.over(kernel.heuristic(problem, device))))
        if device.platform == "cuda":
            self.assertGreater(len(open_ones), 1)  # some did not go with the heuristic's

    def check(self, kernel, problem, device):
        heuristic, candidates = kernel.heuristic(problem, device), kernel.candidates(problem, device)
        self.assertEqual(candidates[0], heuristic)
        self.assertBetween(len(candidates), 2, 9)
        self.assertLen(set(candidates), len(candidates))
        near = self.NEAR_ON_HOPPER if kernel.name == "mosaic_gpu" else self.NEAR
        for config in candidates:
            self.assertIsNone(kernel.misfit(problem, device, config))
            self.assertEqual([*config.chosen()], [*heuristic.chosen()])  # what the kernel uses, and nothing else
            self.assertEqual(config.num_splits, kernel.num_splits(problem, device, config))
            self.assertEqual(config.block_kv % 8, 0)
            for name, (least, most) in near.items():
                if size := getattr(heuristic, name):
                    self.assertBetween(getattr(config, name), least * size, most * size, name)


class FillTest(parameterized.TestCase):
    """Each chip is filled, and by what it is, not by what its name resembles."""

    SHAPES = ((1, 16, 32768, 32, 8), (16, 1, 32768, 4, 1), (1, 128, 32768, 4, 1), (4, 1, 65536, 32, 8), (64, 1, 4096, 32, 8))

    @parameterized.parameters(
        ("NVIDIA H100 80GB HBM3", "9.0", 132), ("NVIDIA H100 PCIe", "9.0", 114), ("NVIDIA H20", "9.0", 78),
        ("NVIDIA GH200 480GB", "9.0", 132), ("NVIDIA H200", "9.0", 132), ("NVIDIA L4", "8.9", 58),
        ("NVIDIA L40S", "8.9", 142), ("NVIDIA A100-SXM4-80GB", "8.0", 108), ("NVIDIA B200", "10.0", 148),
        ("AMD Instinct MI300X", "gfx942", 304), ("AMD Instinct MI355X", "gfx950", 256), ("NVIDIA Unheard Of", "9.0", 148),
    )  # fmt: skip
    def test_every_chip_is_filled(self, kind, capability, cores):
        device = Device("rocm" if "AMD" in kind else "cuda", kind, capability)
        self.assertEqual(device.cores, cores)
        for kernel in GPU_KERNELS[capability != "9.0" :]:
            for seqs, tokens, context, q_heads, kv_heads in self.SHAPES:
                problem = problem_of_shape(seqs, tokens, context, q_heads, kv_heads, 128, None, None, page_size=16)
                config = resolve.completed(kernel, problem, device)
                with self.subTest(f"{kernel.name} {problem}"):
                    self.assertGreaterEqual(filled(kernel, problem, device, config), 0.7 * cores, config)

    def test_splits_make_no_second_wave_that_is_nearly_empty(self):
        """Where one wave would do."""
        for kind in CORES:
            device = Device("cuda", kind, "9.0")
            for kernel, tiles_a_core in zip(GPU_KERNELS, (1, 2)):
                for shape in self.SHAPES[:4]:
                    problem = problem_of_shape(*shape, 128, None, None, page_size=16)
                    config = resolve.completed(kernel, problem, device)
                    waves = kernel.blocks(problem, config) / (device.cores * tiles_a_core)
                    with self.subTest(f"{kind} {kernel.name} {shape}"):
                        self.assertFalse(1 < waves < 1.5, config)

    def test_one_long_context_is_no_single_cores_work(self):
        """Over random decode steps: its parts hold all its blocks, and few contexts are left whole."""
        rng, device, kernel = np.random.default_rng(0), DEVICES[0][1], GPU_KERNELS[0]
        long, whole = 0, []
        for _ in range(300):
            seqs, kv_heads, group = int(rng.integers(2, 257)), 2 ** int(rng.integers(0, 4)), int(rng.integers(1, 17))
            context = int(2 ** rng.uniform(6, 17))
            problem = problem_of_shape(seqs, 1, context, group * kv_heads, kv_heads, 128, None, None, page_size=16)
            config = resolve.completed(kernel, problem, device)
            parts = mosaic_gpu_host.parts_of_tiles(problem, device, config)
            blocks = -(-context // config.block_kv)
            share, number = int(parts.share(np.int32(blocks))), int(parts.number(np.int32(blocks)))
            with self.subTest(f"{seqs} x 1 at {context}, {group * kv_heads} heads over {kv_heads}: {parts}"):
                self.assertIn(parts.least, (1, config.num_splits))  # 1: of contexts too short to be worth more
                self.assertBetween(number, min(parts.least, 1 + blocks // 2), parts.most)
                self.assertBetween(blocks, (number - 1) * share + 1, number * share)
                if parts.most > parts.least:
                    self.assertGreaterEqual(parts.blocks * config.block_kv * 512, 2**17)
                    self.assertLessEqual(parts.most * problem.tokens * problem.q_heads * 128 * 4, 2**26)
            if context * 512 > 1.5 * 2**21:  # of a part; blocks are of 64 keys or of 128
                long += 1
                whole += [(seqs, kv_heads, context)] * (number == 1)
        self.assertGreater(long, 100)
        self.assertLess(len(whole), long / 8, whole)

    @parameterized.parameters(
        (64, 4096, 1), (256, 1024, 1), (8, 1024, 2), (1, 131072, 16), (29, 25600, 13), (32, 100000, 23)
    )  # fmt: skip
    def test_parts_of_decode_steps(self, seqs, context, most):
        problem = problem_of_shape(seqs, 1, context, 32, 8, 128, None, None, page_size=16)
        config = GPU_KERNELS[0].heuristic(problem, DEVICES[0][1])
        self.assertEqual(mosaic_gpu_host.parts_of_tiles(problem, DEVICES[0][1], config).most, most)

    @parameterized.parameters((10, 1, 55000, 3, 32), (59, 1, 32256, 8, 32), (9, 10, 83968, 8, 13), (13, 1, 16384, 1, 8))
    def test_parts_are_small_where_tiles_are_few(self, seqs, kv_heads, context, blocks, most):
        """But a cluster that merges them is not given up for some more of them."""
        problem = problem_of_shape(seqs, 1, context, 4 * kv_heads, kv_heads, 128, None, None, page_size=16)
        config = GPU_KERNELS[0].heuristic(problem, DEVICES[0][1])
        parts = mosaic_gpu_host.parts_of_tiles(problem, DEVICES[0][1], config)
        self.assertEqual((parts.blocks, parts.most), (blocks, most))

    @parameterized.parameters(
        (64, 4096, 1), (256, 1024, 1), (8, 1024, 4), (1, 131072, 33), (29, 8192, 8), (64, 32768, 8), (256, 32768, 3)
    )  # fmt: skip
    def test_parts_of_decode_steps_of_triton(self, seqs, context, most):
        """Where contexts are as long as the table of 4096 keys and fill the cores, there is one part, and no merge."""
        problem = problem_of_shape(seqs, 1, context, 32, 8, 128, None, None, page_size=16)
        kernel, device = GPU_KERNELS[1], DEVICES[0][1]
        parts = triton_parts.parts_of_tiles(problem, device, kernel.heuristic(problem, device))
        self.assertEqual(parts.most, most)
        absent = (parts.most - parts.least) * seqs * 8 if parts.vary else 0
        self.assertLessEqual(absent, triton_parts.MOST_ABSENT + seqs * 8)

    @parameterized.parameters((16, 1216, 24), (71, 640, 32))
    def test_parts_of_tall_tiles_of_triton(self, q_heads, keys, most):
        """Where a token's heads fill a tile, its products take as long as its loads: then fewer keys are a part."""
        problem = problem_of_shape(77, 1, 28700, q_heads, 1, 64, None, None, page_size=16)
        kernel, device = GPU_KERNELS[1], DEVICES[0][1]
        config = kernel.heuristic(problem, device)
        parts = triton_parts.parts_of_tiles(problem, device, config)
        self.assertEqual((parts.blocks * config.block_kv, parts.most), (keys, most))

    def test_a_device_says_itself_how_many_cores_it_has(self):
        self.assertEqual(Device("cuda", "NVIDIA H100 80GB HBM3", "9.0", core_count=66).cores, 66)
        self.assertEqual(Device("cpu", "cpu").cores, 1)
        self.assertEqual(Device("tpu", "TPU v4").cores, 2)

    @parameterized.parameters(("core_count", 114), ("num_cores", 2))
    def test_cores_are_read_off_the_device(self, attribute, cores):
        here = mock.Mock(spec=["device_kind", "compute_capability", attribute], device_kind="Chip", **{attribute: cores})
        with mock.patch.object(jax, "devices", return_value=[here]):
            self.assertEqual(device_of("cuda").cores, cores)

    def test_three_warpgroups_are_for_launches_of_several_rounds_on_this_chip(self):
        problem = problem_of_shape(1, 2048, 16384, 32, 8, 128, None, None, page_size=16)
        few, many = (Device("cuda", "H", "9.0", core_count=cores) for cores in (90, 132))
        self.assertEqual(GPU_KERNELS[0].heuristic(problem, few).num_warps, 16)
        self.assertEqual(GPU_KERNELS[0].heuristic(problem, many).num_warps, 12)


class MemoryTest(parameterized.TestCase):
    """A row for few KV heads needs less memory than a call of many: it is not for that call."""

    @parameterized.product(kind=("TPU v5 lite", "TPU v6 lite", "TPU7x"), kv_heads=(1, 2, 4, 8, 14, 16, 24, 32), head_dim=(128, 256))
    def test_shipped_rows_fit_every_number_of_heads(self, kind, kv_heads, head_dim):
        device = Device("tpu", kind)
        group = 4 if head_dim == 128 else 2
        problem = problem_of_shape(1, 2048, 16384, group * kv_heads, kv_heads, head_dim, None, None, page_size=16)
        [kernel] = kernels_of(problem, device)
        with self.assertNoLogs(level="WARNING"):
            config, source = resolve.resolve(kernel, problem, device, None, under="cache")
        self.assertIsNone(kernel.misfit(problem, device, config))
        # What is shipped was read off the schedule of 8 heads.
        self.assertEqual(source, f"shipped table {tables.shipped_path(kind).name}, schedule" if kv_heads == 8 else "heuristic")


if __name__ == "__main__":
    absltest.main()
