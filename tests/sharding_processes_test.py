"""Sharding where one process does not see it all: several processes at once, and one after the other with a cache."""

import os
import pathlib
import socket
import tempfile

from absl.testing import absltest, parameterized

from paged_prefill.sharding import partition
from paged_prefill.tests import meshes

TWO_PROCESSES = """
import functools, itertools, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + sys.argv[2], 2, int(sys.argv[1]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.choose import XLA
from paged_prefill.tests import cases, covering, meshes
from paged_prefill.tests.packs import Pack, exact

XLA.attend = meshes.dense_kernel  # compiles fast
assert jax.process_count() == 2 and jax.local_device_count() == 4
attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
KINDS, SHAPES = (AxisType.Auto, AxisType.Explicit), ((2, 4), (1, 8))  # the heads inside each process, and across both


def put(pack, over, cut):
    return Pack(*(
        jax.make_array_from_callback(x.shape, NamedSharding(over, spec), lambda i, x=x: x[i]) for x, spec in zip(pack, cut)
    ))


def check(results, pack):
    for result, right in zip(results, exact(pack)):
        assert not result.is_fully_addressable
        for shard in result.addressable_shards:
            np.testing.assert_allclose(shard.data, right[shard.index], atol=1e-5, rtol=1e-5)


for kind, shape, kv_heads in covering.pairs(kind=KINDS, shape=SHAPES, kv_heads=(8, 2)):
    pack = meshes.batched_pack(q_heads=8, kv_heads=kv_heads)
    cut = meshes.specs("data", "model", "model" if kv_heads == 8 else None)
    operands = put(pack, meshes.mesh(shape, kind), cut)
    compiled = jax.jit(attend).lower(*operands).compile()
    assert not meshes.collectives(compiled), meshes.collectives(compiled)
    check(compiled(*operands), pack)
    check(attend(*operands), pack)
    print("RIGHT", kind.name, shape, kv_heads, flush=True)

for kind, shape in itertools.product(KINDS, SHAPES):  # and the pages, inside each process and across both
    pack, cache = meshes.batched_pack(num_pages=16), P(None, "model")
    cut = meshes.specs("data")._replace(key_cache=cache, value_cache=cache)
    check(jax.jit(attend)(*put(pack, meshes.mesh(shape, kind), cut)), pack)
    print("RIGHT", kind.name, shape, "pages", flush=True)
"""

CACHED = """
import functools, sys
import jax
directory, way, scales = sys.argv[1], sys.argv[2], map(float, sys.argv[3:])
jax.config.update("jax_compilation_cache_dir", directory)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
from paged_prefill import ragged_paged_prefill
from paged_prefill.tests import cases, meshes
from paged_prefill.tests.packs import exact

pack = meshes.batched_pack(q_heads=8, kv_heads=4)
attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
if way == "hint":
    attend = functools.partial(attend, head_axis="model", batch_axis="data")
operands = meshes.put(meshes.mesh(), pack, meshes.specs("data", "model", "model"))
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
for scale in scales:
    want = exact(pack, softmax_scale=scale)
    events.clear()
    meshes.assert_close(jax.jit(functools.partial(attend, softmax_scale=scale))(*operands), want)
    hits, misses = (events.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses"))
    print("HITS", hits, "MISSES", misses)
"""


def finish(process) -> str:
    output, _ = process.communicate(timeout=240)
    if process.returncode:
        raise AssertionError(output)
    return output


class CodeVersionTest(absltest.TestCase):
    def test_follows_code_and_tables_and_where_they_lie(self):
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

        def version(name, files):
            for path, text in files.items():
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / name / path).write_text(text)
            return partition._code_version(folder / name)

        first = {"compat.py": "0", "primitive/a.py": "1", "lowering/tuning/tuned/b.json": "2"}
        versions = [
            version("first", first),
            version("code", first | {"primitive/a.py": "3"}),
            version("compat", first | {"compat.py": "3"}),
            version("table", first | {"lowering/tuning/tuned/b.json": "3"}),
            version("more", first | {"sharding/c.py": ""}),
            version("moved", {"compat.py": "0", "primitive/c.py": "1", "lowering/tuning/tuned/b.json": "2"}),
        ]
        self.assertLen(set(versions), len(versions))
        self.assertEqual(version("same", first | {"tests/a_test.py": "1", "lowering/__pycache__/a.pyc": "1"}), versions[0])


class TwoProcessesTest(absltest.TestCase):
    def test_automatic_and_explicit_eager_and_jitted(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last one counts
        processes = [meshes.run_python(TWO_PROCESSES, str(number), port, XLA_FLAGS=flags) for number in range(2)]
        for output in map(finish, processes):
            self.assertEqual(output.count("RIGHT"), 8, output)


class PersistentCacheTest(parameterized.TestCase):
    @parameterized.parameters("hint", "automatic")
    def test_hits_for_the_same_call_only(self, way):
        """In a new process, which checks its values; the automatic way hits where JAX is told to leave the callback's
        address out of the key."""
        with tempfile.TemporaryDirectory() as directory:
            outputs = [finish(meshes.run_python(CACHED, directory, way, *scales)) for scales in (["0.25"], ["0.25", "0.5"])]
        found = [line for output in outputs for line in output.splitlines() if line.startswith("HITS")]
        self.assertEqual(found, ["HITS 0 MISSES 1", "HITS 1 MISSES 0", "HITS 0 MISSES 1"])


if __name__ == "__main__":
    absltest.main()
