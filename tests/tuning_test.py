"""Protects the choice of a configuration: the order of the lookups, the tables' files, and timing."""

import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path
import stat
import tempfile
import time
import types
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttention, lowering, prefill_page_attention, ragged_paged_prefill, tune
from paged_prefill.lowering import tables, timing, tuning
from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import KERNELS, XLA, device_of
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs, problems

DEVICE = Device("cpu", "Test Chip 9000")
HEURISTIC = Config(block_q=16, block_kv=64)


def problem(**changes) -> Problem:
    sizes = dict(
        tokens=12, q_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, cache_kv_heads=2, num_pages=16, page_size=8,
        seqs=2, pages_per_seq=8, dtype="float32", softmax_scale=0.25,
    )  # fmt: skip
    return problems.problem(**(sizes | changes))


def attend_to_nothing(call, config):
    """Stands in for a kernel's, where only what timing does with it matters: compiles in no time."""
    return call.query * 2, call.query[..., 0].astype(jnp.float32)


def kernel(*candidates, attend=attend_to_nothing, version=1):
    """A kernel made of parts."""
    return types.SimpleNamespace(
        version=version,
        attend=attend,
        supports=lambda problem, device: None,
        heuristic=lambda problem, device: HEURISTIC,
        candidates=lambda problem, device: [HEURISTIC, *candidates],
        misfit=lambda problem, device, config: None,
    )


def entry(config, *, version=1, of=None, source="timed"):
    return tables.entry_of(tables.key_of("fake", version, of or problem(), DEVICE), config, source=source)


class TuningTestCase(parameterized.TestCase):
    """Gives each test a cache folder and an environment of its own."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.enter_context(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.folder)}))
        os.environ.pop(tuning.POLICY_VARIABLE, None)
        self.path = tables.user_path(DEVICE.kind)
        self.assertTrue(self.path.is_relative_to(self.folder))
        self.shipped = self.folder / "shipped.json"
        self.enter_context(mock.patch.object(tables, "shipped_path", lambda kind: self.shipped))
        tables.read_shipped.cache_clear()
        self.addCleanup(tables.read_shipped.cache_clear)

    def resolve(self, asked=None, **changes):
        return tuning.resolve("fake", kernel(), problem(**changes), DEVICE, asked)


class LookupTest(TuningTestCase):
    def test_each_step_gives_way_to_the_one_before_it(self):
        self.assertEqual(self.resolve(), (HEURISTIC, "heuristic"))
        tables.write(self.shipped, [entry(Config(block_kv=96))])
        tables.read_shipped.cache_clear()
        self.assertEqual(self.resolve().config, Config(block_q=16, block_kv=96))
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(self.resolve().config, Config(block_q=16, block_kv=128))
        self.assertIn("user's table", self.resolve().source)
        self.assertEqual(self.resolve(Config(block_q=8)).config, Config(block_q=8, block_kv=64))

    def test_a_choice_says_whether_it_was_timed_or_read_off_a_schedule(self):
        tables.write(self.shipped, [entry(Config(block_kv=96), source="schedule")])
        self.assertEqual(self.resolve().source, "shipped table shipped.json, schedule")
        tables.write(self.path, [entry(Config(block_kv=96))])
        self.assertEqual(self.resolve().source, f"user's table {self.path}, timed")

    def test_overlay_stands_behind_cfg_and_before_the_tables(self):
        with tuning.overlay(Config(block_q=32, block_kv=32)):
            self.assertEqual(tuning.with_overlay(None, None), Config(block_q=32, block_kv=32))
            self.assertEqual(tuning.with_overlay(Config(block_q=8), None), Config(block_q=8, block_kv=32))
        self.assertIsNone(tuning.with_overlay(None, None))

    def test_an_overlay_of_another_type_is_refused(self):
        with self.assertRaisesRegex(TypeError, "overlay takes a PrefillPageAttentionConfig, got {'block_q': 8}"):
            with tuning.overlay({"block_q": 8}):
                pass

    def test_overlay_reaches_the_traced_call(self):
        pack = packs.make_pack(0, [3], [9])

        def config_of_a_new_trace():
            return jax.make_jaxpr(lambda *operands: ragged_paged_prefill(*operands))(*pack).eqns[0].params["config"]

        with tuning.overlay(Config(block_q=2)):
            self.assertEqual(config_of_a_new_trace(), Config(block_q=2))
        self.assertIsNone(config_of_a_new_trace())

    def test_a_kernel_that_the_call_names_stands_before_the_overlays(self):
        with tuning.overlay(Config(block_q=32, platform="triton")):
            self.assertEqual(tuning.with_overlay(None, "xla"), Config(block_q=32))

    @parameterized.parameters("off", "cache", "on")
    def test_cfg_wins_under_every_policy(self, policy):
        tables.write(self.path, [entry(Config(block_kv=128))])
        with tuning.policy(policy):
            self.assertEqual(self.resolve(Config(block_q=8, block_kv=8)).config, Config(block_q=8, block_kv=8))

    def test_policy_off_reads_no_table(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        with tuning.policy("off"):
            self.assertEqual(self.resolve(), (HEURISTIC, "heuristic"))

    def test_policy_comes_from_the_environment_when_used(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        os.environ[tuning.POLICY_VARIABLE] = "off"
        self.assertEqual(self.resolve().source, "heuristic")
        with tuning.policy("cache"):
            self.assertIn("user's table", self.resolve().source)
        os.environ[tuning.POLICY_VARIABLE] = "sometimes"
        with self.assertRaisesRegex(ValueError, "PAGED_PREFILL_AUTOTUNE must be one of off, cache, on, got 'sometimes'"):
            self.resolve()

    def test_policy_on_times_once_and_remembers(self):
        with tuning.policy("on"), mock.patch.object(
            timing, "compare", return_value=timing.Comparison([], timing.Timing(Config(block_kv=32), 1.5))
        ) as timed:
            self.assertEqual(self.resolve(), (Config(block_q=16, block_kv=32), "timed now"))
            self.assertIn("user's table", self.resolve().source)
            timed.assert_called_once()

    def test_several_processes_leave_out_what_one_machine_knows(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        tables.write(self.shipped, [entry(Config(block_kv=96))])
        with tuning.policy("on"), mock.patch.object(jax, "process_count", return_value=2):
            self.assertEqual(self.resolve().config.block_kv, 96)
            with mock.patch.object(timing, "compare") as timed:
                self.assertEqual(self.resolve(dtype="float16").source, "heuristic")
                timed.assert_not_called()

    def test_unknown_devices_and_symbolic_sizes_take_the_heuristic(self):
        (batch,) = jax.export.symbolic_shape("batch")
        self.assertEqual(self.resolve(tokens=batch).source, "heuristic")
        choice = tuning.resolve("fake", kernel(), problem(), Device("cuda"), None)
        self.assertEqual(choice.source, "heuristic")

    @parameterized.parameters(
        dict(dtype="float16"), dict(head_dim=32), dict(value_dim=8), dict(q_heads=8), dict(page_size=16),
        dict(tokens=512), dict(pages_per_seq=64), dict(sliding_window=7),
    )  # fmt: skip
    def test_an_entry_holds_for_its_own_shapes_only(self, **changes):
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(self.resolve(**changes).source, "heuristic")

    def test_sizes_of_one_bucket_share_an_entry(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(self.resolve(tokens=9, pages_per_seq=5, num_pages=999).config.block_kv, 128)


class TablesTest(TuningTestCase):
    def test_a_new_version_of_a_kernel_forgets_the_old_entries(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        choice = tuning.resolve("fake", kernel(version=2), problem(), DEVICE, None)
        self.assertEqual(choice.source, "heuristic")
        tables.write(self.path, [entry(Config(block_kv=32), version=2)])
        self.assertLen(tables.read(self.path), 1)

    @parameterized.parameters("", "{", "[]", '{"format": 99, "entries": []}', '{"format": 1, "entries": [{"key": 1}, 7]}')
    def test_a_corrupt_file_costs_a_warning(self, text):
        self.path.parent.mkdir(parents=True)
        self.path.write_text(text)
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve().source, "heuristic")
        self.assertIn(str(self.path), logs.output[0])
        self.assertTrue(tables.write(self.path, [entry(Config(block_kv=128))]))
        self.assertEqual(self.resolve().config.block_kv, 128)

    @parameterized.parameters({"block_kv": -1}, {"tile": 3}, {"block_q": "many"})
    def test_an_impossible_entry_costs_a_warning(self, **config):
        row = entry(Config(block_kv=128))
        row["config"] = config
        tables.write(self.path, [row])
        with self.assertLogs(level="WARNING"):
            self.assertEqual(self.resolve().source, "heuristic")

    def test_a_folder_that_cannot_be_written_costs_a_warning(self):
        # A file where the folder should be: permissions do not stop a superuser.
        (self.folder / "paged_prefill").write_text("in the way")
        with self.assertLogs(level="WARNING"):
            self.assertFalse(tables.write(self.path, [entry(Config(block_kv=128))]))
        with self.assertLogs(level="WARNING"):
            self.assertEqual(self.resolve().source, "heuristic")

    def test_a_read_only_folder_costs_a_warning(self):
        if os.geteuid() == 0:
            self.skipTest("a superuser writes into read-only folders; the test above covers the refusal")
        self.folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        self.addCleanup(self.folder.chmod, stat.S_IRWXU)
        with self.assertLogs(level="WARNING"):
            self.assertFalse(tables.write(self.path, [entry(Config(block_kv=128))]))

    def test_processes_that_write_at_once_lose_nothing(self):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            written = list(pool.map(write_rows, [self.path] * 2, (0, 20)))
        self.assertEqual(written, [True, True])
        self.assertLen(tables.read(self.path), 40)

    def test_the_file_is_readable_json_with_the_key_spelled_out(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        row = json.loads(self.path.read_text())["entries"][0]
        self.assertEqual(
            row["key"],
            dict(device=DEVICE.kind, kernel="fake", version=1, dtype="float32", head_dim=16, value_dim=16, group=2,
                 page_size=8, tokens=16, context_capacity=64, sliding_window=None),
        )  # fmt: skip
        self.assertEqual(row["config"], {"block_kv": 128})

    def test_importing_and_calling_make_no_folder(self):
        pack = packs.make_pack(0, [3], [9])
        ragged_paged_prefill(*pack)
        self.assertEmpty(list(self.folder.iterdir()))


def write_rows(path, first) -> bool:
    """Writes twenty rows, one at a time; runs in a process of its own."""
    return all(
        tables.write(path, [entry(Config(block_kv=1), of=problem(head_dim=dim))]) for dim in range(first + 1, first + 21)
    )


class ShippedTest(absltest.TestCase):
    def test_every_shipped_choice_is_one_that_its_kernel_of_today_asks_for(self):
        """A kernel whose version grew forgets its rows; these would then only take room."""
        kernels = {name: kernel for kernels in KERNELS.values() for name, kernel in kernels.items()}
        files = sorted((Path(lowering.__file__).parent / "tuned").glob("*.json"))
        self.assertNotEmpty(files)
        for file in files:
            for key, entry in tables.read(file).items():
                with self.subTest(f"{file.name} {key}"):
                    self.assertEqual(tables.shipped_path(entry["key"]["device"]).name, file.name)
                    self.assertEqual(entry["key"]["version"], kernels[entry["key"]["kernel"]].version)
                    config, source = tables.find({key: entry}, entry["key"])
                    self.assertIn(source, ("timed", "schedule"))
                    self.assertNotEmpty(config.sizes())


class TimingTest(TuningTestCase):
    def compare(self, *candidates, **options):
        attend = options.pop("attend", attend_to_nothing)
        options.setdefault("budget_seconds", 600)  # how slow the machine is is not what is tested
        with mock.patch.object(timing, "SAMPLE_SECONDS", 1e-4), mock.patch.object(timing, "XLA", kernel()):
            return timing.compare("fake", kernel(*candidates, attend=attend), problem(), DEVICE, **options)

    def test_all_candidates_are_timed_and_reported_in_their_order(self):
        timings, chosen = self.compare(Config(block_q=4))
        self.assertEqual([t.config for t in timings], [HEURISTIC, Config(block_q=4)])
        self.assertTrue(all(t.milliseconds > 0 for t in timings))
        self.assertIn(chosen, timings)

    @parameterized.named_parameters(
        ("clearly_faster", (1.0, 0.9, 1.2), (1.1, 0.95, 1.3), 1),
        ("faster_within_the_noise", (1.0, 0.9, 1.2), (1.1, 1.085, 1.2), 0),
        ("fast_only_at_first", (1.0, 0.5, 0.9), (1.1, 1.2, 0.95), 2),
        ("slower", (1.0, 1.3, 1.2), (1.1, 1.3, 1.2), 0),
    )
    def test_the_choice_beats_the_heuristic_twice_and_clearly_or_is_the_heuristic(self, first, final, chosen):
        configs = (HEURISTIC, Config(block_q=4), Config(block_q=8))
        measured = [dict(zip(configs, times)) for times in (first, final)]
        with mock.patch.object(timing, "_median_milliseconds", side_effect=measured):
            comparison = self.compare(*configs[1:])
        self.assertEqual(comparison.chosen, timing.Timing(configs[chosen], final[chosen]))

    def test_the_choice_is_between_the_heuristic_and_the_fastest_measured_again(self):
        slower = [Config(block_q=q) for q in (2, 4, 5, 6, 7)]
        times = dict(zip([HEURISTIC, *slower], (3.0, 9.0, 2.0, 1.0, 8.0, 1.5)))
        finalists = [HEURISTIC, slower[2], slower[4], slower[1]]
        final = dict(zip(finalists, (20.0, 11.0, 12.0, 13.0)))
        with mock.patch.object(timing, "_median_milliseconds", side_effect=[times, final]) as measure:
            comparison = self.compare(*slower)
        self.assertEqual(list(measure.call_args_list[1].args[0]), finalists)
        self.assertEqual(comparison.chosen, timing.Timing(slower[2], 11.0))

    def test_candidates_take_turns(self):
        sampled = []
        with mock.patch.object(timing, "_seconds", lambda call, count: sampled.append(call) or 1.0):
            timing._median_milliseconds({HEURISTIC: "a", Config(): "b"}, 3, time.monotonic() + 60)
        self.assertEqual("".join(sampled), "ab" + 3 * "ab")

    def test_a_spent_budget_leaves_one_sample_each(self):
        with mock.patch.object(timing, "_seconds", return_value=1.0) as sample:
            timing._median_milliseconds({HEURISTIC: "a", Config(): "b"}, 3, time.monotonic())
        self.assertEqual(sample.call_count, 4)  # one each to find out how many calls make a sample

    def test_a_candidate_with_wrong_values_is_discarded_and_reported(self):
        def attend(call, config):
            out, lse = attend_to_nothing(call, config)
            return (out * 1.5, lse) if config.block_q == 4 else (out, lse)

        with self.assertLogs(level="WARNING") as logs:
            timings, chosen = self.compare(Config(block_q=4), attend=attend)
        self.assertIsNone(timings[1].milliseconds)
        self.assertIn("wrong values", timings[1].problem)
        self.assertIn("wrong values", logs.output[0])
        self.assertEqual(chosen.config, HEURISTIC)

    def test_a_candidate_that_gives_nan_is_discarded(self):
        def attend(call, config):
            out, lse = attend_to_nothing(call, config)
            return out.at[0].set(jnp.nan), lse

        self.assertIsNone(self.compare(attend=attend).chosen)

    def test_a_candidate_that_fails_does_not_stop_the_others(self):
        def attend(call, config):
            if config.block_q == 4:
                raise RuntimeError("does not fit")
            return attend_to_nothing(call, config)

        timings, _ = self.compare(Config(block_q=4), Config(block_q=8), attend=attend)
        self.assertIn("does not fit", timings[1].problem)
        self.assertIsNotNone(timings[2].milliseconds)

    def test_a_spent_budget_leaves_the_rest_untimed(self):
        timings, _ = self.compare(Config(block_q=4), budget_seconds=0.0)
        self.assertIsNotNone(timings[0].milliseconds)
        self.assertIn("not reached", timings[1].problem)

    def test_nothing_timed_falls_back_to_the_heuristic(self):
        def attend(call, config):
            raise RuntimeError("never")

        with tuning.policy("on"), self.assertLogs(level="WARNING"):
            choice = tuning.resolve("fake", kernel(attend=attend), problem(), DEVICE, None)
        self.assertEqual(choice, (HEURISTIC, "heuristic"))
        self.assertEmpty(tables.read(self.path))

    def test_a_sample_call_stays_within_the_pool_and_the_query(self):
        call = timing.sample_call(problem(tokens=13, seqs=3), jax.devices()[0])
        self.assertLess(int(call.sequences.page_indices.max()), call.key_pages.shape[2])
        self.assertEqual(int(call.sequences.length.sum()), call.query.shape[0])

    def test_under_jit_timing_sees_no_tracer_and_the_jaxpr_is_one_equation(self):
        pack = packs.make_pack(1, [3, 9], [9, 40], q_heads=2, kv_heads=1, head_dim=8)
        seen = []

        def candidates(problem, device):
            return [XLA.heuristic(problem, device), Config(block_q=4, block_kv=16)]

        def compiled(kernel, *, call, config):
            seen.extend(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(call))
            return real(kernel, call=call, config=config)

        real = timing._compiled
        with (
            tuning.policy("on"),
            mock.patch.object(XLA, "candidates", candidates),
            mock.patch.object(timing, "_compiled", compiled),
            mock.patch.object(timing, "SAMPLE_SECONDS", 1e-4),
        ):
            jaxpr = jax.make_jaxpr(ragged_paged_prefill)(*pack)
            self.assertEmpty(seen)  # tracing alone times nothing
            out = jax.jit(ragged_paged_prefill)(*pack)
        self.assertEqual([eqn.primitive.name for eqn in jaxpr.eqns], ["paged_prefill"])
        self.assertNotEmpty(seen)
        self.assertFalse(any(seen))
        packs.assert_matches_reference(pack, out)
        self.assertLen(tables.read(tables.user_path(device_of("cpu").kind)), 1)


class CommandTest(TuningTestCase):
    ARGUMENTS = "--heads 4/2 --head-dim 16 --page-size 8 --tokens 8 --context 64 --dtype float32".split()

    def test_tunes_writes_and_shows(self):
        table = self.folder / "table.json"
        with (
            mock.patch.object(timing, "SAMPLE_SECONDS", 1e-4),
            mock.patch.object(XLA, "attend", attend_to_nothing),
            mock.patch.object(XLA, "candidates", lambda problem, device: [Config(block_q=8, block_kv=32)]),
        ):
            self.assertEqual(tune.main([*self.ARGUMENTS, "--write", str(table)]), 0)
            self.assertEqual(tune.main(self.ARGUMENTS), 0)
        self.assertLen(tables.read(table), 1)
        self.assertEqual(tables.read(table), tables.read(tables.user_path("cpu")) | tables.read(table))
        with mock.patch("builtins.print") as printed:
            self.assertEqual(tune.main([*self.ARGUMENTS, "--show"]), 0)
        self.assertIn("user's table", printed.call_args.args[0])

    def test_a_kernel_that_cannot_run_is_said_and_fails(self):
        with mock.patch("builtins.print") as printed:
            self.assertEqual(tune.main([*self.ARGUMENTS, "--platform", "triton"]), 1)
        self.assertIn("triton", printed.call_args.args[0])

    @parameterized.parameters("--heads 5/2", "--heads 8", "--page-size 0", "--tokens 1,x", "--dtype int8")
    def test_bad_arguments_end_with_status_2(self, bad):
        with self.assertRaises(SystemExit) as exit, mock.patch("sys.stderr"):
            tune.main([*self.ARGUMENTS, *bad.split()])
        self.assertEqual(exit.exception.code, 2)


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

    def test_shard_map_wrapper_is_the_operation(self):
        mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        heads = jax.sharding.PartitionSpec(None, "model")
        whole = jax.sharding.PartitionSpec()
        function, call_args = self.operation.create_shard_map_wrapper(
            **self.arguments, mesh=mesh, in_specs=(heads, whole, whole, whole, whole), out_specs=heads
        )
        chex.assert_trees_all_close(function(*call_args), self.expected, atol=1e-6)


class ConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(block_q=0), "cfg.block_q must be a positive integer or None, got 0"),
        (dict(num_warps=True), "cfg.num_warps must be a positive integer or None, got True"),
        (dict(platform="vulkan"), "cfg.platform must be one of auto, xla, .* got 'vulkan'"),
        (dict(backend="gpu"), "cfg.backend must be one of any or None, got 'gpu'"),
    )
    def test_impossible_values_are_named(self, fields, message):
        with self.assertRaisesRegex(ValueError, message):
            Config(**fields)

    def test_cfg_of_another_type_is_refused(self):
        pack = packs.make_pack(0, [3], [9])
        with self.assertRaisesRegex(TypeError, "cfg must be a PrefillPageAttentionConfig or None, got {'block_q': 8}"):
            ragged_paged_prefill(*pack, cfg={"block_q": 8})

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
