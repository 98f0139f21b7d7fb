"""Protects the timing of candidates, what a choice must hold for, and the command that tunes."""

import time
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

from paged_prefill import ragged_paged_prefill, tune
from paged_prefill.lowering import tuning
from paged_prefill.lowering.choose import XLA, device_of
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import packs
from paged_prefill.tests.tuning_stand_ins import DEVICE, HEURISTIC, TuningTestCase, attend_to_nothing, kernel, problem


class TimingTest(TuningTestCase):
    def no_ends(self):
        return mock.patch.object(timing, "ends_of", lambda problem: [])

    def compare(self, *candidates, **options):
        attend = options.pop("attend", attend_to_nothing)
        options.setdefault("budget_seconds", 600)  # how slow the machine is is not what is tested
        with mock.patch.object(timing, "SAMPLE_SECONDS", 1e-4), mock.patch.object(timing, "XLA", kernel()):
            return timing.compare(kernel(*candidates, attend=attend), problem(), DEVICE, **options)

    def test_all_candidates_are_timed_and_reported_in_their_order(self):
        timings, chosen, _ = self.compare(Config(block_q=4))
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
        measured = [{c: (t, t) for c, t in zip(configs, times)} for times in (first, final)]
        with mock.patch.object(timing, "_median_milliseconds", side_effect=measured), self.no_ends():
            comparison = self.compare(*configs[1:])
        self.assertEqual(comparison.chosen, timing.Timing(configs[chosen], final[chosen]))
        self.assertTrue(comparison.settled)

    def test_the_choice_is_between_the_heuristic_and_the_fastest_measured_again(self):
        slower = [Config(block_q=q) for q in (2, 4, 5, 6, 7)]
        times = {c: (t, t) for c, t in zip([HEURISTIC, *slower], (3.0, 9.0, 2.0, 1.0, 8.0, 1.5))}
        finalists = [HEURISTIC, slower[2], slower[4], slower[1]]
        final = {c: (t, t) for c, t in zip(finalists, (20.0, 11.0, 12.0, 13.0))}
        with mock.patch.object(timing, "_median_milliseconds", side_effect=[times, final]) as measure, self.no_ends():
            comparison = self.compare(*slower)
        self.assertEqual(list(measure.call_args_list[1].args[0]), finalists)
        self.assertEqual(comparison.chosen, timing.Timing(slower[2], 11.0))

    def test_the_pack_that_a_candidate_suits_least_decides(self):
        times = {HEURISTIC: (1.0, 3.0), Config(block_q=4): (0.1, 3.1), Config(block_q=8): (0.9, 2.8)}
        with mock.patch.object(timing, "_median_milliseconds", return_value=times), self.no_ends():
            comparison = self.compare(*[*times][1:])
        self.assertEqual(comparison.chosen.config, Config(block_q=8))

    @parameterized.parameters((1.0, True), (1.01, False))
    def test_a_choice_must_hold_at_the_ends_of_its_key(self, at_an_end, holds):
        times = {HEURISTIC: (1.0, 1.0), Config(block_q=4): (0.5, 0.5)}
        there = {HEURISTIC: (1.0, 1.0), Config(block_q=4): (0.5, at_an_end)}
        with mock.patch.object(timing, "_median_milliseconds", side_effect=[times, times, there, there]) as measure:
            comparison = self.compare(Config(block_q=4))
        self.assertEqual(comparison.chosen.config, Config(block_q=4) if holds else HEURISTIC)
        self.assertEqual(measure.call_count, 4 if holds else 3)

    def test_an_end_that_cannot_be_timed_holds_nothing(self):
        times = {HEURISTIC: (1.0, 1.0), Config(block_q=4): (0.5, 0.5)}
        with (
            mock.patch.object(timing, "_median_milliseconds", return_value=times),
            mock.patch.object(timing, "race", side_effect=MemoryError("no room")),
            self.assertLogs(level="WARNING"),
        ):
            self.assertEqual(self.compare(Config(block_q=4)).chosen.config, HEURISTIC)

    @parameterized.product(tokens=(1, 5, 12, 16, 17), seqs=(1, 2, 5), pages_per_seq=(1, 5, 8), page_size=(8, 24))
    def test_the_ends_share_the_key(self, **sizes):
        given = problem(**sizes)
        key = tables.key_of(kernel(), given, DEVICE)
        for end in timing.ends_of(given):
            self.assertEqual(tables.key_of(kernel(), end, DEVICE), key, end)

    def test_candidates_take_turns(self):
        sampled = []
        with mock.patch.object(timing, "_seconds", lambda call, count: sampled.append(call) or 1.0):
            timing._median_milliseconds({HEURISTIC: "aA", Config(): "b"}, 3, time.monotonic() + 60, 4)
        self.assertEqual("".join(sampled), 2 * "aAb" + "aAb" + "bAa" + "aAb")

    def test_a_slow_first_call_does_not_shorten_the_samples(self):
        """It loads the code. Samples of fewer calls would have more of the launch and the wait in each call's share."""
        counts = {"a": [], "b": []}

        def seconds(call, count):
            counts[call].append(count)
            slow = len(counts[call]) == 1
            return 1.0 if slow else count * {"a": 1e-3, "b": 2e-3}[call]

        with mock.patch.object(timing, "_seconds", seconds):
            timing._median_milliseconds({HEURISTIC: "a", Config(): "b"}, 3, time.monotonic() + 60, 4)
        self.assertEqual(counts, {"a": [1, 1, 5, 5, 5], "b": [1, 1, 5, 5, 5]})

    @parameterized.parameters(("tpu", 64, timing.TURNS), ("tpu", 8192, 1), ("cpu", 64, 1))
    def test_short_calls_fill_a_function_on_a_device_that_a_host_feeds(self, platform, tokens, turns):
        """What is timed would be the host otherwise. On CPU it is, and a function of many calls takes seconds."""
        shape = problem(tokens=tokens, pages_per_seq=1024, num_pages=2048, q_heads=64)
        self.assertEqual(timing.calls_each(shape, DEVICE._replace(platform=platform)), 4 * turns)

    def test_calls_that_repeat_are_all_made(self):
        """A compiler takes what is the same in every turn out of a loop."""
        shape, config = problem(tokens=8), XLA.heuristic(problem(tokens=8), DEVICE)
        with mock.patch.object(timing, "_turns", return_value=5):
            text = timing._compiled(XLA, shape, DEVICE, config).as_text()
        before_the_loop = text[text.index("\nENTRY") : text.index('known_trip_count":{"n":"5"}')]
        self.assertEqual(before_the_loop.count(" while("), 1)  # the loop itself, and none of a call's

    def test_a_spent_budget_leaves_one_sample_each(self):
        with mock.patch.object(timing, "_seconds", return_value=1.0) as sample:
            timing._median_milliseconds({HEURISTIC: "a", Config(): "b"}, 3, time.monotonic(), 4)
        self.assertEqual(sample.call_count, 6)  # two each to find out how many calls make a sample

    def test_a_candidate_with_wrong_values_is_discarded_and_reported(self):
        def attend(call, config, device):
            out, lse = attend_to_nothing(call, config, device)
            return (out * 1.5, lse) if config.block_q == 4 else (out, lse)

        with self.assertLogs(level="WARNING") as logs:
            timings, chosen, _ = self.compare(Config(block_q=4), attend=attend)
        self.assertIsNone(timings[1].milliseconds)
        self.assertIn("wrong values", timings[1].problem)
        self.assertIn("wrong values", logs.output[0])
        self.assertEqual(chosen.config, HEURISTIC)

    def test_a_candidate_that_gives_nan_is_discarded(self):
        def attend(call, config, device):
            out, lse = attend_to_nothing(call, config, device)
            return out.at[0].set(jnp.nan), lse

        self.assertIsNone(self.compare(attend=attend).chosen)

    def test_a_candidate_that_fails_does_not_stop_the_others(self):
        def attend(call, config, device):
            if config.block_q == 4:
                raise RuntimeError("does not fit")
            return attend_to_nothing(call, config, device)

        timings, *_ = self.compare(Config(block_q=4), Config(block_q=8), attend=attend)
        self.assertIn("does not fit", timings[1].problem)
        self.assertIsNotNone(timings[2].milliseconds)

    def test_a_spent_budget_leaves_the_rest_untimed(self):
        timings, chosen, settled = self.compare(Config(block_q=4), budget_seconds=0.0)
        self.assertIsNotNone(timings[0].milliseconds)
        self.assertIn("not reached", timings[1].problem)
        self.assertEqual((chosen.config, settled), (HEURISTIC, False))

    def test_a_choice_that_the_budget_was_too_short_for_is_not_kept(self):
        unsettled = timing.Comparison([], timing.Timing(HEURISTIC, 1.5), settled=False)
        with tuning.policy("on"), mock.patch.object(timing, "compare", return_value=unsettled) as compared:
            for _ in range(2):  # but a call that is lowered again does not spend it again
                self.assertEqual(self.resolve().config, HEURISTIC)
            compared.assert_called_once()
        self.assertEmpty(tables.read(self.path))

    @parameterized.parameters("sample_packs", "_compiled", "_median_milliseconds")
    def test_timing_that_fails_costs_a_warning(self, step):
        full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        failing = mock.patch.object(timing, step, side_effect=full)
        with tuning.policy("on"), failing, self.assertLogs(level="WARNING") as logs:
            self.assertEqual(self.resolve(), (HEURISTIC, "heuristic"))
        self.assertTrue(any("RESOURCE_EXHAUSTED" in line for line in logs.output))
        self.assertEmpty(tables.read(self.path))

    def test_candidates_that_fail_cost_a_warning(self):
        made = kernel()
        made.candidates = mock.Mock(side_effect=ZeroDivisionError)
        with tuning.policy("on"), self.assertLogs(level="WARNING"):
            self.assertEqual(self.resolve(kernel=made), (HEURISTIC, "heuristic"))

    def test_what_was_timed_for_another_call_of_the_key_and_does_not_fit_gives_way(self):
        made = kernel(misfit=lambda problem, device, config: "no" if config.block_kv > 64 and problem.tokens > 14 else None)
        best = timing.Comparison([], timing.Timing(Config(block_kv=128), 1.5), settled=False)
        with tuning.policy("on"), mock.patch.object(timing, "compare", return_value=best):
            self.assertEqual(self.resolve(kernel=made).source, "timed now")
            self.assertEqual(self.resolve(kernel=made, tokens=16), (HEURISTIC, "heuristic"))

    def test_nothing_timed_falls_back_to_the_heuristic(self):
        def attend(call, config, device):
            raise RuntimeError("never")

        with tuning.policy("on"), self.assertLogs(level="WARNING"):
            choice = resolve.resolve(kernel(attend=attend), problem(), DEVICE, None)
        self.assertEqual(choice, (HEURISTIC, "heuristic"))
        self.assertEmpty(tables.read(self.path))

    @parameterized.parameters((13, 3, [[4, 4, 5], [11, 1, 1]]), (3, 3, [[1, 1, 1]]), (1, 2, [[0, 1]]), (7, 1, [[7]]))
    def test_samples_are_of_every_kind_and_stay_within_the_pool_and_the_query(self, tokens, seqs, lengths):
        samples = timing.sample_packs(problem(tokens=tokens, seqs=seqs), jax.devices()[0])
        self.assertEqual([call.sequences.length.tolist() for _, call in samples], lengths)
        for queries, call in samples:
            sequences = call.sequences
            self.assertLess(int(sequences.page_indices.max()), call.key_pages.shape[2])
            ends = sequences.start + sequences.length
            self.assertEqual(ends[:-1].tolist(), sequences.start[1:].tolist())
            self.assertEqual(int(ends[-1]), tokens)
            self.assertEqual({query.shape[0] for query in queries}, {tokens})

    def test_under_jit_timing_sees_no_tracer_and_the_jaxpr_is_one_equation(self):
        pack = packs.make_pack(1, [3, 9], [9, 40], q_heads=2, kv_heads=1, head_dim=8)
        seen = []

        def candidates(problem, device):
            return [XLA.heuristic(problem, device), Config(block_q=4, block_kv=16)]

        def on_packs(function, sampled):
            seen.extend(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(sampled))
            return real(function, sampled)

        real = timing._on_packs
        with (
            tuning.policy("on"),
            mock.patch.object(XLA, "candidates", candidates),
            mock.patch.object(timing, "_on_packs", on_packs),
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

    def test_show_under_on_times_and_writes_nothing(self):
        with (
            tuning.policy("on"),
            mock.patch.object(timing, "compare") as compared,
            mock.patch("builtins.print") as printed,
        ):
            self.assertEqual(tune.main([*self.ARGUMENTS, "--show"]), 0)
        compared.assert_not_called()
        self.assertIn("heuristic, until a call is timed", printed.call_args.args[0])
        self.assertEmpty([*self.folder.rglob("*.json")])

    def test_a_choice_that_the_budget_was_too_short_for_is_said_and_fails(self):
        unsettled = timing.Comparison([], timing.Timing(HEURISTIC, 1.5), settled=False)
        with mock.patch.object(timing, "compare", return_value=unsettled), mock.patch("builtins.print") as printed:
            self.assertEqual(tune.main(self.ARGUMENTS), 1)
        self.assertIn("budget was too short", printed.call_args.args[0])
        self.assertEmpty([*self.folder.rglob("*.json")])

    @parameterized.parameters(("512", "64", 1, 1), ("8,512", "64", 0, 1), ("8", "64", 0, 0))
    def test_shapes_that_cannot_be_are_said(self, tokens, contexts, status, skipped):
        arguments = [*self.ARGUMENTS, "--tokens", tokens, "--context", contexts, "--show"]
        with mock.patch("builtins.print") as printed:
            self.assertEqual(tune.main(arguments), status)
        said = [call.args[0] for call in printed.call_args_list]
        self.assertLen([line for line in said if "skipped: 512 new tokens are more than" in line], skipped)

    def test_a_kernel_that_cannot_run_is_said_and_fails(self):
        with mock.patch("builtins.print") as printed:
            self.assertEqual(tune.main([*self.ARGUMENTS, "--platform", "triton"]), 1)
        self.assertIn("triton", printed.call_args.args[0])

    @parameterized.parameters(
        "--heads 5/2", "--heads 8", "--page-size 0", "--tokens 1,x", "--dtype int8", "--soft-cap 0", "--soft-cap nan",
        "--budget -1",
    )  # fmt: skip
    def test_bad_arguments_end_with_status_2(self, bad):
        with self.assertRaises(SystemExit) as exit, mock.patch("sys.stderr"):
            tune.main([*self.ARGUMENTS, *bad.split()])
        self.assertEqual(exit.exception.code, 2)


if __name__ == "__main__":
    absltest.main()
