"""Protects the choice of a configuration: the order of the lookups, and the tables' files."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
import stat
import threading
from unittest import mock

from absl.testing import absltest, parameterized
import jax

from paged_prefill import lowering, ragged_paged_prefill
from paged_prefill.lowering import tuning
from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import KERNELS, device_of
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive import context
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs
from paged_prefill.tests.tuning_stand_ins import DEVICE, HEURISTIC, TuningTestCase, entry, environment, kernel, problem


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
            self.assertEqual(context.with_overlay(None, "auto"), Config(block_q=32, block_kv=32))
            self.assertEqual(context.with_overlay(Config(block_q=8), "auto"), Config(block_q=8, block_kv=32))
        self.assertIsNone(context.with_overlay(None, "auto"))

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
            self.assertEqual(context.with_overlay(None, "xla"), Config(block_q=32))

    @parameterized.parameters("off", "cache", "on", "invariant")
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
        with environment(**{tuning.POLICY_VARIABLE: "off"}):
            self.assertEqual(self.resolve().source, "heuristic")
            with tuning.policy("cache"):
                self.assertIn("user's table", self.resolve().source)
        unknown = environment(**{tuning.POLICY_VARIABLE: "sometimes"})
        with unknown, self.assertRaisesRegex(ValueError, "PAGED_PREFILL_AUTOTUNE must be one of off, cache, on, invariant, got 'sometimes'"):
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
        choice = resolve.resolve(kernel(), problem(), Device("cuda"), None)
        self.assertEqual(choice.source, "heuristic")

    @parameterized.parameters(
        dict(dtype="float16"), dict(head_dim=32), dict(value_dim=8), dict(q_heads=8), dict(page_size=16),
        dict(tokens=512), dict(pages_per_seq=64), dict(sliding_window=7), dict(attn_logits_soft_cap=50.0),
        dict(q_heads=8, num_kv_heads=4, cache_kv_heads=4), dict(tokens=24, seqs=4), dict(seqs=1), dict(seqs=12),
    )  # fmt: skip
    def test_an_entry_holds_for_its_own_shapes_only(self, **changes):
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(self.resolve(**changes).source, "heuristic")

    def test_an_entry_holds_for_as_many_cores_only(self):
        tables.write(self.path, [entry(Config(block_kv=128), device=DEVICE._replace(core_count=7))])
        self.assertEqual(self.resolve().source, "heuristic")

    def test_sizes_of_one_bucket_share_an_entry(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(self.resolve(tokens=10, pages_per_seq=5, num_pages=999).config.block_kv, 128)

    def test_splits_are_those_that_the_tile_sizes_need(self):
        made = kernel(num_splits=lambda problem, device, config: config.block_kv // 16)
        self.assertEqual(self.resolve(kernel=made).config.num_splits, 4)
        self.assertEqual(self.resolve(Config(block_kv=32), kernel=made).config.num_splits, 2)
        self.assertEqual(self.resolve(Config(block_kv=32, num_splits=9), kernel=made).config.num_splits, 9)
        tables.write(self.path, [entry(Config(block_kv=128, num_splits=9))])
        self.assertEqual(self.resolve(kernel=made).config, Config(block_q=16, block_kv=128, num_splits=8))

    def test_a_row_that_does_not_fit_gives_way_with_one_warning(self):
        made = kernel(misfit=lambda problem, device, config: "too large" if config.block_kv > 100 else None)
        tables.write(self.shipped, [entry(Config(block_kv=96))])
        tables.write(self.path, [entry(Config(block_kv=128))])
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve(kernel=made), (Config(block_q=16, block_kv=96), "shipped table shipped.json, timed"))
            tables.write(self.shipped, [entry(Config(block_kv=160))])
            tables.read_shipped.cache_clear()
            for _ in range(2):
                self.assertEqual(self.resolve(kernel=made), (HEURISTIC, "heuristic"))
        self.assertLen(logs.output, 2)  # one for each table
        self.assertIn("which does not fit: fake: too large", logs.output[0])

    def test_a_row_that_leaves_cores_idle_gives_way_with_a_warning(self):
        made = kernel(blocks=lambda problem, config: 640 // config.block_kv)  # the heuristic's 64 make 10
        device = DEVICE._replace(core_count=8)
        tables.write(self.path, [entry(Config(block_kv=160), device=device)])
        self.assertEqual(self.resolve(kernel=made, device=device).config.block_kv, 160)  # 4 of 8
        tables.write(self.path, [entry(Config(block_kv=192), device=device)])
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve(kernel=made, device=device), (HEURISTIC, "heuristic"))
        self.assertIn("leaves cores idle: fake: 3 of 8 have work, by the heuristic 8", logs.output[0])

    def test_what_the_caller_chose_and_does_not_fit_is_an_error(self):
        made = kernel(misfit=lambda problem, device, config: "too large" if config.block_kv > 100 else None)
        with self.assertRaisesRegex(ValueError, "fake: too large .sizes from: cfg or overlay"):
            self.resolve(Config(block_kv=128), kernel=made)

    def test_sizes_left_open_follow_those_that_the_caller_chose(self):
        """Those nearest to the heuristic's that fit; else the error is of the heuristic's."""
        limit = lambda problem, device, config: "too large" if config.block_q * config.block_kv > 1024 else None
        choices = lambda problem, device: dict(block_q=(1, 4, 8), block_kv=(8, 16, 32, 64))
        made = kernel(misfit=limit, choices=choices, num_splits=lambda problem, device, config: config.block_q)
        sizes = lambda **chosen: self.resolve(Config(**chosen), kernel=made).config
        self.assertEqual(sizes(block_kv=128), Config(block_q=8, block_kv=128, num_splits=8))
        self.assertEqual(sizes(block_q=32), Config(block_q=32, block_kv=32, num_splits=32))
        self.assertEqual(sizes(block_q=32, num_splits=3), Config(block_q=32, block_kv=32, num_splits=3))
        self.assertEqual(sizes(block_q=1), Config(block_q=1, block_kv=64, num_splits=1))  # fits as it is
        for chosen in (dict(block_q=256), dict(block_q=32, block_kv=64)):
            with self.assertRaisesRegex(ValueError, "fake: too large .sizes from: cfg or overlay"):
                sizes(**chosen)

    def test_a_policy_is_its_threads_own(self):
        in_a, in_b = threading.Event(), threading.Event()
        seen = []

        def enters_b():
            in_a.wait()
            with tuning.policy("off"):
                in_b.set()
                a.join()
                seen.append(context.current_policy())

        def enters_a():
            with tuning.policy("on"):
                in_a.set()
                in_b.wait()

        a, b = threading.Thread(target=enters_a), threading.Thread(target=enters_b)
        b.start()
        a.start()
        b.join()
        self.assertEqual(seen + [context.current_policy()], ["off", "cache"])

    def test_a_policy_is_followed_by_what_was_lowered_before(self):
        """As it decides what a call becomes, jit may not take what another policy made."""
        pack = packs.make_pack(0, [3], [9], q_heads=2, kv_heads=1, head_dim=8)
        device = device_of("cpu")
        step = jax.jit(lambda *operands: ragged_paged_prefill(*operands))
        with mock.patch.object(lowering, "resolve", wraps=resolve.resolve) as resolved:
            step(*pack)
            step(*pack)
            with tuning.policy("off"):
                step(*pack)
        self.assertEqual(resolved.call_count, 2)
        self.assertEqual(resolved.call_args.args[2], device)


class TablesTest(TuningTestCase):
    def test_a_new_version_of_a_kernel_forgets_the_old_entries(self):
        tables.write(self.path, [entry(Config(block_kv=128))])
        choice = resolve.resolve(kernel(version=2), problem(), DEVICE, None)
        self.assertEqual(choice.source, "heuristic")
        tables.write(self.path, [entry(Config(block_kv=32), version=2)])
        self.assertLen(tables.read(self.path), 1)

    @parameterized.parameters(
        "", "{", "[]", '{"format": 99, "entries": []}', '{"format": 2, "entries": 7}', '{"format": 2}',
        '{"format": 2, "entries": [{"key": {}}]}', '{"format": 2, "entries": [{"key": 1}, 7]}',
        '{"format": 2, "entries": [{"key": {"kernel": [], "version": "x"}, "config": {"block_q": 1}, "source": ""}]}',
        '{"format": 2, "entries": [{"key": {"a": 0, "kernel": "fake", "version": 1}, "config": {"block_q": 1}, "source": ""}]}',
        "[" * 10**5,
    )  # fmt: skip
    def test_a_corrupt_file_costs_a_warning(self, text):
        self.path.parent.mkdir(parents=True)
        self.path.write_text(text)
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve().source, "heuristic")
        self.assertIn(str(self.path), logs.output[0])
        self.assertTrue(tables.write(self.path, [entry(Config(block_kv=128))]))
        self.assertEqual(self.resolve().config.block_kv, 128)

    @parameterized.parameters({"block_kv": -1}, {"tile": 3}, {"block_q": "many"}, {"num_splits": 2}, {})
    def test_an_impossible_entry_costs_a_warning(self, **config):
        other = entry(Config(block_kv=32), of=problem(head_dim=32))
        tables.write(self.path, [entry(Config(block_kv=128)) | {"config": config}, other])
        with self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve().source, "heuristic")
        self.assertIn(str(self.path), logs.output[0])
        with self.assertLogs(level="WARNING"):
            self.assertEqual(self.resolve(head_dim=32).config.block_kv, 32)

    def test_a_table_of_an_older_format_is_forgotten_in_silence(self):
        self.path.parent.mkdir(parents=True)
        self.path.write_text(json.dumps({"format": 1, "entries": [entry(Config(block_kv=128)), {"key": {}}]}))
        with self.assertNoLogs(level="WARNING"):
            self.assertEqual(self.resolve().source, "heuristic")
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertLen(tables.read(self.path), 1)

    def test_a_table_may_be_read_by_whom_the_user_allows(self):
        self.addCleanup(os.umask, os.umask(0o022))
        tables.write(self.path, [entry(Config(block_kv=128))])
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o644)
        os.umask(0o077)
        tables.write(self.shipped, [entry(Config(block_kv=128))])
        self.assertEqual(stat.S_IMODE(self.shipped.stat().st_mode), 0o600)

    def test_nothing_is_left_beside_a_table(self):
        table = self.folder / "elsewhere" / "table.json"
        tables.write(table, [entry(Config(block_kv=128))])
        self.assertEqual(list(table.parent.iterdir()), [table])

    def test_what_a_key_leaves_out_decides_no_sizes(self):
        """A new field of Problem is part of the key, or of this list."""
        free = {"pools", "num_pages", "cache_kv_heads", "softmax_scale"}
        key = tables.key_of(kernel(), problem(), DEVICE)
        attention = {field.name: 9 for field in dataclasses.fields(Attention)}
        for name in {field.name for field in dataclasses.fields(Problem)} - {"attention"} | {*attention}:
            other = attention | dict(dtype="float16", cache_dtype="float16", features=("latent",))
            changed = problem(**{name: other[name] if name in other else 4 * getattr(problem(), name)})
            with self.subTest(name):
                self.assertEqual(tables.key_of(kernel(), changed, DEVICE) == key, name in free)

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
            dict(device=DEVICE.kind, cores=1, kernel="fake", version=1, dtype="float32", head_dim=16, value_dim=16,
                 kv_heads=2, cache_dtype="float32", features=[], group=2, page_size=8, sequences=2, tokens_per_sequence=8, context_capacity=64,
                 sliding_window=None, soft_cap=None),
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
        files = sorted((Path(tables.__file__).parent / "tuned").glob("*.json"))
        self.assertNotEmpty(files)
        for file in files:
            for key, entry in tables.read(file).items():
                with self.subTest(f"{file.name} {key}"):
                    self.assertEqual(tables.shipped_path(entry["key"]["device"]).name, file.name)
                    self.assertEqual(entry["key"]["version"], kernels[entry["key"]["kernel"]].version)
                    config, source = tables.find({key: entry}, entry["key"])
                    self.assertIn(source, ("timed", "schedule"))
                    self.assertNotEmpty(config.sizes())


if __name__ == "__main__":
    absltest.main()
