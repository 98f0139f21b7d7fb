"""The examples of the README and of docs/ run as they stand, in order, and their links lead somewhere."""

from pathlib import Path
import re
from unittest import mock

from absl.testing import absltest, parameterized

from paged_prefill.lowering import tuning
from paged_prefill.lowering.choose import XLA
from paged_prefill.tests import cases, meshes

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/operation.md", "docs/sharding.md", "docs/tuning.md", "docs/serving.md", "docs/development.md")


def examples(page: str) -> list[tuple[int, str]]:
    """The Python examples of a page, each with the line it begins in."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def anchors(page: Path) -> set[str]:
    """What a link may name behind a # in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class PagesTest(parameterized.TestCase):

    @parameterized.parameters(*PAGES)
    def test_examples_run(self, page):
        found = examples(page)
        self.assertNotEmpty(found)
        self.assertLen(found, (ROOT / page).read_text().count("```python"))
        if page != "docs/tuning.md":  # which says where sizes come from; else they and the kernel only cost time to compile
            self.enter_context(tuning.overlay(cases.ONE_HEIGHT))
            self.enter_context(mock.patch.object(XLA, "attend", meshes.dense_kernel))
        names = {"__name__": page}  # one namespace a page
        for line, example in found:
            code = "\n" * line + example  # so that a traceback names the page's own line
            exec(compile(code, str(ROOT / page), "exec"), names)  # noqa: S102

    @parameterized.parameters(*PAGES, "CHANGELOG.md", "examples/serve/README.md", "benchmarks/results/README.md")
    def test_links_lead_somewhere(self, page):
        for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", (ROOT / page).read_text()):
            if target.startswith("https://"):
                continue
            path = (ROOT / page).parent / target if target else ROOT / page
            self.assertTrue(path.exists(), target)
            if anchor:
                self.assertIn(anchor.removeprefix("#"), anchors(path), target)

    def test_rows_of_moving_over_are_run(self):
        """Each row's name is one that the section's example passes, but where a row says that there is nothing to pass."""
        _, text = (ROOT / "docs/serving.md").read_text().split("## Moving over\n")
        sections = re.split(r"^### (.*)$", text, flags=re.MULTILINE)[1:]
        checked = 0
        for title, section in zip(sections[::2], sections[1::2], strict=True):
            code = "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
            rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", section, re.MULTILINE)
            self.assertNotEmpty(rows, title)
            for theirs, here in rows:
                names = re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", theirs)))
                if not here.startswith(("nothing", "not there", "accepted, without effect", "its platform", "as they are")):
                    run = [name for name in names if re.search(rf"\b{name}\b ?[=(]", code)]
                    self.assertNotEmpty(run, f"{title}: {theirs}")
                    checked += 1
        self.assertGreater(checked, 40)

    def test_every_page_is_read(self):
        self.assertEqual({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"}, set(PAGES))

    def test_readme_has_one_test_command(self):
        self.assertLen(re.findall("-m pytest", (ROOT / "README.md").read_text()), 1)


if __name__ == "__main__":
    absltest.main()
