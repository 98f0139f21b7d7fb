"""What tests of tuning share: a chip, a kernel made of parts, and a cache folder of their own."""

import os
from pathlib import Path
import tempfile
import types
from unittest import mock

from absl.testing import parameterized
import jax.numpy as jnp

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.tuning import resolve, tables
from paged_prefill.primitive import context
from paged_prefill.primitive.config import PrefillPageAttentionConfig as Config
from paged_prefill.tests import problems

DEVICE = Device("cpu", "Test Chip 9000")
HEURISTIC = Config(block_q=16, block_kv=64)


def problem(**changes) -> Problem:
    sizes = dict(
        tokens=12, q_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, cache_kv_heads=2, num_pages=16, page_size=8,
        seqs=2, pages_per_seq=8, dtype="float32", softmax_scale=0.25,
    )  # fmt: skip
    return problems.problem(**(sizes | changes))


def attend_to_nothing(call, config, device):
    """Stands in for a kernel's, where only what timing does with it matters: compiles in no time."""
    return call.query * 2, call.query[..., 0].astype(jnp.float32)


def no_splits(problem, device, config):
    return None


def fits(problem, device, config):
    return None


def no_blocks(problem, config):
    return None


def no_choices(problem, device):
    return {}


def kernel(
    *candidates,
    attend=attend_to_nothing,
    version=1,
    num_splits=no_splits,
    misfit=fits,
    blocks=no_blocks,
    choices=no_choices,
):
    """A kernel made of parts."""
    return types.SimpleNamespace(
        name="fake",
        version=version,
        attend=attend,
        supports=lambda problem, device: None,
        heuristic=lambda problem, device: HEURISTIC,
        complete=lambda problem, device, chosen: chosen.over(HEURISTIC),
        candidates=lambda problem, device: [HEURISTIC, *candidates],
        num_splits=num_splits,
        misfit=misfit,
        blocks=blocks,
        choices=choices,
    )


def entry(config, *, version=1, of=None, device=DEVICE, source="timed"):
    return tables.entry_of(tables.key_of(kernel(version=version), of or problem(), device), config, source=source)


def environment(**changes: str | None):
    """Within it, Python reads these variables, and those that are None are not there.

    Python alone: XLA's threads read the environment of the process at any time, and one that reads while another thread
    changes it may end the process, as in glibc before 2.41.
    """
    variables = {name: value for name, value in (os.environ | changes).items() if value is not None}
    return mock.patch.object(os, "environ", variables)


class TuningTestCase(parameterized.TestCase):
    """Gives each test a cache folder and an environment of its own."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.enter_context(environment(**{"XDG_CACHE_HOME": str(self.folder), context.POLICY_VARIABLE: None}))
        self.path = tables.user_path(DEVICE.kind)
        self.assertTrue(self.path.is_relative_to(self.folder))
        self.shipped = self.folder / "shipped.json"
        self.enter_context(mock.patch.object(tables, "shipped_path", lambda kind: self.shipped))
        for cached in (tables.read_shipped, resolve._warn):
            cached.cache_clear()
            self.addCleanup(cached.cache_clear)
        self.enter_context(mock.patch.dict(resolve._timed, clear=True))

    def resolve(self, asked=None, *, kernel=kernel(), under=None, device=DEVICE, **changes):
        return resolve.resolve(kernel, problem(**changes), device, asked, under=under)
