"""Exported calls on a real GPU, run by a process that never saw this package. Without a GPU every test is skipped and says so."""

import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.triton.launch import PTX_TARGET
from paged_prefill.tests import cases
from paged_prefill.tests.gpus import gpus_for

# What docs/tuning.md says that such a process imports.
NEEDS = {"cuda": "jax.experimental.mosaic.gpu", "triton": "jax"}
SERVE = """
import importlib, pathlib, sys
from jax import export
import numpy as np
folder, needs = pathlib.Path(sys.argv[1]), sys.argv[2]
importlib.import_module(needs)
pack = np.load(folder / "pack.npz")
call = export.deserialize((folder / "call").read_bytes()).call
np.savez(folder / "results.npz", *call(*(pack[name] for name in pack.files)))
assert not any(name.startswith("paged_prefill") for name in sys.modules)
"""


class GpuExportTest(parameterized.TestCase):
    @parameterized.parameters(*NEEDS)
    def test_an_exported_call_gives_the_same_bits_in_a_process_of_its_own(self, platform):
        gpus_for(self, hopper=platform == "cuda")
        pack = cases.Case("exported", ((70, 300), (1, 513), (9, 9)), 8, 2, 128, page_size=16, dtype="float16").pack()

        @jax.jit
        def attend(*pack):
            return ragged_paged_prefill(*pack, platform=platform, return_lse=True)

        unchecked = [export.DisabledSafetyCheck.custom_call(PTX_TARGET)]
        exported = export.export(attend, platforms=["cuda"], disabled_checks=unchecked)(*pack)
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "call").write_bytes(exported.serialize())
            np.savez(folder / "pack.npz", *pack)
            subprocess.run([sys.executable, "-c", SERVE, name, NEEDS[platform]], check=True, timeout=300)
            results = np.load(folder / "results.npz")
            # Both by the exported module: its sizes are the heuristic's, where a call traced here may have a table's.
            chex.assert_trees_all_equal([results[name] for name in results.files], list(exported.call(*pack)))
        chex.assert_trees_all_close(exported.call(*pack), attend(*pack), atol=2e-3)


if __name__ == "__main__":
    absltest.main()
