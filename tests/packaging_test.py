"""The wheel: what it holds, and that the main job runs from it in an empty folder."""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile

from absl.testing import absltest

ROOT = Path(__file__).parent.parent
NOT_SOURCES = shutil.ignore_patterns(".*", "bazel-*", "build", "*.egg-info", "__pycache__")


def run_python(*arguments, folder, **environment):
    """The exit status and the output, standard error included, of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | environment, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


class DependenciesTest(absltest.TestCase):
    def test_triton_and_its_bridge_are_a_pair_that_was_run(self):
        """A newer jax-triton wants a newer Triton, and neither was run on a GPU; `INSTALL` in triton/host.py names the extra."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        self.assertContainsSubset({"jax-triton==0.3.1", "triton==3.6.*"}, set(extras["cuda"]))


class WheelTest(absltest.TestCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        # A build leaves files beside its sources, so it gets a copy.
        shutil.copytree(ROOT, folder / "sources", ignore=NOT_SOURCES)
        build = "from setuptools import build_meta; build_meta.build_wheel('..')"
        status, output = run_python("-c", build, folder=folder / "sources", PYTHONPATH="")
        assert status == 0, output
        [wheel] = folder.glob("*.whl")
        cls.installed, cls.empty = folder / "installed", folder / "empty"
        cls.empty.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            cls.names = set(archive.namelist())
            archive.extractall(cls.installed)

    def run_installed(self, *arguments):
        return run_python(*arguments, folder=self.empty, PYTHONPATH=str(self.installed), XLA_FLAGS="")

    def test_holds_the_package_and_its_data(self):
        expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")} | {"py.typed", "README.md"}
        for folder in ("primitive", "lowering", "sharding"):
            expected |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        tables = {str(path.relative_to(ROOT)) for path in (ROOT / "lowering" / "tuning" / "tuned").glob("*.json")}
        self.assertNotEmpty(tables)
        expected |= tables
        self.assertContainsSubset({f"paged_prefill/{name}" for name in expected}, self.names)
        self.assertTrue(any(name.endswith("licenses/LICENSE") for name in self.names))

    def test_holds_nothing_else(self):
        folders = {Path(name).parts[1] for name in self.names if name.count("/") > 1 and "dist-info" not in name}
        self.assertContainsSubset(folders, {"primitive", "lowering", "sharding"})

    def test_main_job_runs_from_it_in_an_empty_folder(self):
        status, output = self.run_installed("-m", "paged_prefill", "--tokens", "100", "--decode", "1")
        self.assertEqual(status, 0, output)
        self.assertIn("100 tokens, the bytes of README.md", output)
        self.assertEmpty(list(self.empty.iterdir()))
        status, output = self.run_installed("-c", "import paged_prefill; print(paged_prefill.__file__)")
        self.assertEqual(Path(output.strip()).parent, self.installed / "paged_prefill")

    def test_needs_only_its_core_dependencies(self):
        # A module of the test or accelerator extras that is imported shows up here.
        extras = ("chex", "hypothesis", "pytest", "triton", "jax_triton", "torch")
        forbid = f"import sys; sys.modules.update(dict.fromkeys({extras})); import paged_prefill.__main__"
        status, output = self.run_installed("-c", forbid)
        self.assertEqual(status, 0, output)


if __name__ == "__main__":
    absltest.main()
