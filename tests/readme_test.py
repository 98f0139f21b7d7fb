"""The README's examples run as they stand, in order, and its links lead somewhere."""

from pathlib import Path
import re

from absl.testing import absltest

README = Path(__file__).parent.parent / "README.md"


class ReadmeTest(absltest.TestCase):

    def setUp(self):
        super().setUp()
        self.text = README.read_text()

    def test_examples_run(self):
        examples = re.findall(r"^```python\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.assertGreaterEqual(len(examples), 5)
        names = {"__name__": "readme"}
        for number, example in enumerate(examples):
            with self.subTest(example=number):
                exec(compile(example, f"README example {number}", "exec"), names)  # noqa: S102
        self.assertEqual(names["out"].shape[-2:], (8, 128))

    def test_has_one_test_command(self):
        self.assertLen(re.findall("-m pytest", self.text), 1)

    def test_links_lead_somewhere(self):
        for target in re.findall(r"\]\(([^)#]+)\)", self.text):
            self.assertTrue((README.parent / target).exists(), target)


if __name__ == "__main__":
    absltest.main()
