"""The command line of examples/serve/."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from paged_prefill import PrefillPageAttentionConfig
from paged_prefill.examples.serve import bench, main
from paged_prefill.lowering import tuning
from paged_prefill.tests import checkpoints

MISSING = [name for name in ("safetensors", "tokenizers") if importlib.util.find_spec(name) is None]


class MainTest(parameterized.TestCase):
    """All requests are of one page, so that one program serves them all."""

    def setUp(self):
        super().setUp()
        self.enter_context(tuning.overlay(PrefillPageAttentionConfig(block_q=8, block_kv=16)))
        for name, value in dict(TOKEN_BUCKETS=(32,), MAX_SEQS=4).items():
            self.enter_context(mock.patch.object(main, name, value))
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

    def run_main(self, *arguments):
        """(exit status, standard output, standard error)"""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main.main(list(arguments))
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def test_one_prompt(self):
        status, out, err = self.run_main("--prompt", "hello", "--max-new-tokens", "6")
        self.assertEqual(status, 0, err)
        self.assertStartsWith(out, "hello")
        self.assertRegex(out, r"prefill +[\d,]+ tokens/s \(5 tokens, 0 shared\)")
        self.assertRegex(out, r"decode +[\d,]+ tokens/s \(6 tokens, ")
        self.assertRegex(out, r"first token +median [\d,]+ ms")
        self.assertIn("a tiny model with random weights", err)
        self.assertIn("6/6", err)  # the progress bar

    def test_json_of_many_prompts_and_one_that_cannot_be_served(self):
        lines = [dict(prompt="hello"), dict(tokens=[1, 999]), dict(tokens=[*b"hello"], max_new_tokens=3)]
        file = self.folder / "prompts.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        status, out, err = self.run_main("--prompts", str(file), "--max-new-tokens", "6", "--json")
        self.assertEqual(status, 1, err)
        first, refused, short = map(json.loads, out.splitlines())
        self.assertLen(first["tokens"], 6)
        self.assertEqual(short["tokens"], first["tokens"][:3])
        self.assertGreater(first["seconds_to_first_token"], 0)
        self.assertEqual((first["error"], refused["tokens"]), (None, []))
        self.assertIn("tokens must be integers from 0 to 255, got 999", refused["error"])
        self.assertIn("tokens/s", err)

    @absltest.skipIf(MISSING, f"needs {' and '.join(MISSING)}: pip install 'paged_prefill[serve]'")
    def test_a_folder(self):
        """With a tokenizer of words, and without one."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        checkpoints.save(self.folder, checkpoints.LLAMA, checkpoints.tensors())
        arguments = "--model", str(self.folder), "--prompt", "w3 w5 w7", "--max-new-tokens", "6", "--json"
        status, _, err = self.run_main(*arguments)
        self.assertEqual(status, 2)
        self.assertIn("no tokenizer.json: give prompts as lists of tokens", err)

        words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(16)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.save(str(self.folder / "tokenizer.json"))
        status, out, err = self.run_main(*arguments)
        self.assertEqual(status, 0, err)
        answer = json.loads(out)
        self.assertEqual(answer["prompt_tokens"], 3)
        self.assertEqual(answer["text"], " ".join(f"w{token}" for token in answer["tokens"]))

    @parameterized.parameters(
        ((), "one of the arguments --prompt --prompts --bench is required"),
        (("--prompt", "x", "--mesh", "heads"), "must be axes and sizes such as batch=2,heads=4, got 'heads'"),
        (("--prompt", "x", "--mesh", "heads=99"), "needs 99 devices, there are 8"),
        (("--prompt", "x", "--model", "/no/such/folder"), "No such file or directory"),
        (("--prompts", "/no/such/file"), "No such file or directory"),
    )  # fmt: skip
    def test_what_is_wrong_is_said_in_one_line(self, arguments, words):
        status, _, err = self.run_main(*arguments)
        self.assertEqual(status, 2)
        self.assertIn(words, err.splitlines()[-1])
        self.assertStartsWith(err.splitlines()[-1], "serve: ")

    def test_a_line_that_makes_no_sense_is_named(self):
        file = self.folder / "prompts.jsonl"
        for line, words in (
            ('{"prompt": "a", "heat": 1}', "'heat'"),
            ("{", "line 2"),
            ("7", "line 2"),
            ("{}", "line 2"),
        ):
            file.write_text(f'{{"prompt": "a"}}\n{line}\n')
            status, _, err = self.run_main("--prompts", str(file))
            self.assertEqual(status, 2)
            self.assertIn(f"{file}, line 2", err)
            self.assertIn(words, err)

    @absltest.skipIf(
        importlib.util.find_spec("matplotlib") is None, "needs matplotlib: pip install 'paged_prefill[serve]'"
    )
    def test_bench_draws_latency(self):
        file = self.folder / "latency.png"
        small = dict(PROMPT=5, LOADS=(0.5, 2.0), REQUESTS=6)
        with contextlib.ExitStack() as stack:
            for name, value in small.items():
                stack.enter_context(mock.patch.object(bench, name, value))
            status, out, err = self.run_main("--bench", str(file), "--max-new-tokens", "6")
        self.assertEqual(status, 0, err)
        self.assertIn(f"wrote {file}", out)
        self.assertStartsWith(file.read_bytes(), b"\x89PNG")


if __name__ == "__main__":
    absltest.main()
