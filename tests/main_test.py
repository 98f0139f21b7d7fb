"""The main job: what it prints, when it fails, and the parts an engine would take from it."""

import contextlib
import functools
import io
from pathlib import Path
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np

from paged_prefill import __main__ as job
from paged_prefill import ragged_paged_prefill
from paged_prefill.tests import compiling

TEXT = bytes(range(256)) + "A real text, with ümlauts.\n".encode() * 5


def run_main(*arguments):
    """(exit status, stdout, stderr) of the main job."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = job.main(list(map(str, arguments)))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


class MainJobTest(parameterized.TestCase):

    def setUp(self):
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.text = self.folder / "text.txt"
        self.text.write_bytes(TEXT)
        # One layer compiles faster, and the wheel's test runs the job as it is.
        self.enterContext(mock.patch.object(job, "Model", functools.partial(job.Model, layers=1)))

    @parameterized.parameters(
        dict(chunk=64, page_size=16),  # the last chunk is short
        dict(chunk=10_000, page_size=7),  # one chunk
        dict(chunk=1, page_size=1, tokens=20),
    )
    def test_agrees_with_one_dense_pass(self, chunk, page_size, tokens=300):
        status, out, err = run_main(
            "--text", self.text, "--chunk", chunk, "--page-size", page_size, "--tokens", tokens, "--decode", 3
        )
        self.assertEqual(status, 0, out + err)
        self.assertRegex(out, r"machine +\d+ x cpu \(cpu\), JAX [\d.]+, Python 3")
        self.assertRegex(out, rf"prompt +{tokens} tokens, the bytes of text.txt")
        self.assertRegex(out, r"kernel +prefill: xla, the first of cpu's kernels")
        self.assertRegex(out, rf"prefill +[\d,]+ tokens/s \({tokens} tokens")
        self.assertRegex(out, r"decode +[\d,]+ tokens/s \(3 tokens")
        self.assertRegex(out, r"difference +\d\.\de-\d\d of the largest logit")
        self.assertIn(f"{-(-tokens // chunk)}/{-(-tokens // chunk)}", err)  # the progress bar counts chunks

    @parameterized.parameters((1e-5, 0), (1e-3, 1), (float("nan"), 1))
    def test_exit_status_tells_whether_the_difference_is_small(self, difference, expected):
        with mock.patch.object(job, "run", return_value=difference):
            status, out, _ = run_main("--text", self.text)
        self.assertEqual(status, expected)
        self.assertEqual("MORE THAN" in out, bool(expected))

    @parameterized.parameters(
        lambda query, *pack, platform: np.nan * query,
        lambda *pack, platform: ragged_paged_prefill(*pack, platform=platform, sliding_window=30),
    )
    def test_wrong_attention_is_exit_1(self, attention):
        job.paged_step.clear_cache()  # of the right one
        self.addCleanup(job.paged_step.clear_cache)
        with mock.patch.object(job, "ragged_paged_prefill", attention):
            status, out, _ = run_main("--text", self.text, "--tokens", 40, "--decode", 1)
        self.assertEqual(status, 1, out)

    @mock.patch.object(job, "run", return_value=0.0)
    def test_says_which_kernel_runs_and_why(self, _):
        _, out, _ = run_main("--text", self.text, "--platform", "xla")
        self.assertIn("xla, as --platform xla asks", out)
        with mock.patch.object(job, "choose", return_value=("xla", {"triton": "heads are too wide"})):
            _, out, _ = run_main("--text", self.text)
        self.assertIn("triton cannot: heads are too wide", out)

    @parameterized.parameters(
        (("--chunk", "0"), ("--chunk", "integer from 1", "'0'")),
        (("--chunk", "-3"), ("--chunk",)),
        (("--chunk", "many"), ("--chunk", "'many'")),
        (("--decode", "1.5"), ("--decode", "'1.5'")),
        (("--page-size", "9999999999"), ("--page-size", "9999999999")),
        (("--tolerance", "small"), ("--tolerance", "'small'")),
        (("--platform", "abacus"), ("--platform", "abacus", "xla")),
        (("--platform", "cuda"), ("platform='cuda'", "cpu")),
        (("--speed", "fast"), ("--speed",)),
        (("--text", "/no/such/file"), ("/no/such/file", "No such file")),
        (("--text", "/"), ("cannot read /", "directory")),
    )
    def test_bad_arguments_get_one_line(self, arguments, named):
        status, out, err = run_main(*arguments)
        self.assertEqual(status, 2)
        self.assertEqual(out, "")
        self.assertEqual(err.count("\n"), 1, err)
        for word in named:
            self.assertIn(word, err)

    def test_an_empty_text_gets_one_line(self):
        empty = self.folder / "empty.txt"
        empty.touch()
        status, _, err = run_main("--text", empty)
        self.assertEqual((status, err), (2, f"paged_prefill: {empty} is empty: there is no prompt to read\n"))


class EngineTest(absltest.TestCase):

    def test_pages_are_handed_out_once_and_in_random_order(self):
        table = job.PageTable(tokens=1000, page_size=10)
        pages = table.cover(1000)
        self.assertLen(set(pages), 100)
        self.assertNotEqual(list(pages), sorted(pages))
        self.assertTrue(np.all((0 <= pages) & (pages < table.num_pages)))

    def test_pages_are_handed_out_when_they_are_needed_and_stay(self):
        table = job.PageTable(tokens=100, page_size=10)
        self.assertEqual([np.sum(table.cover(n) >= 0) for n in (0, 1, 10, 11, 100)], [0, 1, 1, 2, 10])
        np.testing.assert_array_equal(table.cover(100), table.cover(1))

    def test_a_step_updates_its_caches_in_place(self):
        model, table = job.Model(), job.PageTable(tokens=5000, page_size=16)
        weights, caches = job.init_weights(model), job.new_caches(model, table)
        arguments = np.zeros(16, np.int32), np.int32(16), np.int32(16), table.cover(16)
        lowered = job.paged_step.lower(weights, caches, *arguments, platform="auto")
        memory = lowered.compile(compiler_options=compiling.FUSED_AS_USERS_DO).memory_analysis()
        caches_size = sum(x.nbytes for x in jax.tree.leaves(caches))
        self.assertGreaterEqual(memory.alias_size_in_bytes, caches_size)
        self.assertLess(memory.temp_size_in_bytes, caches_size / 4)


if __name__ == "__main__":
    absltest.main()
