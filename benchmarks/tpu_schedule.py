"""The static schedule of TPU kernels, read from the real compiler on a machine without a TPU.

    python benchmarks/tpu_schedule.py [--calls 2048_at_2048,...] [--generations v5e,v6e,7x] [--kernels ...]

Compiles this project's kernels and, beside them, JAX's ragged_paged_attention and those of other projects that can be
had, each for the same attention, has the compiler write its final bundles, and counts all that the call runs, each
loop's bundles times its trips (bundles.py). A bundle is one cycle when nothing stalls; what waiting for copies costs is
not in it, nor what XLA does before and after the kernels. Prints of each call: its bundles; the vector registers
spilled in them; the multiply-adds of q . k and p . v that the attention needs, masked ones not counted, as a share of
what the matrix units do in so many cycles; and the cycles in which HBM gives the keys and values.

Needs `pip install "jax[tpu]"`. The environment's TPU_INFERENCE and TOKAMAX name directories of unpacked wheels
(`pip download --no-deps tpu-inference==0.32.0 tokamax==0.0.17`), of which only the kernels' files are loaded.
"""

import argparse
import glob
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from typing import NamedTuple

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}

# Multiply-adds a cycle of one core's matrix units. Up to v5 four units of 128 x 128; from v6 on two of 256 x 256, which
# take two rows a cycle: the data sheet's 918 TFLOP/s at 1.75 GHz.
PEAK = {"v4": 65536, "v5e": 65536, "v5p": 65536, "v6e": 262144, "7x": 262144}
HBM_BYTES_A_CYCLE = {"v5e": 545, "v6e": 937, "7x": 1677}
# Bundles behind a branch that run before it is taken; on 7x as many as there are up to the next region.
BRANCH_DELAY = {"v4": 4, "v5e": 4, "v5p": 4, "v6e": 4, "7x": None}
POOL_BYTES = 2**29  # of a cache: the compiler would keep a small one on the chip


class Attention(NamedTuple):
    """A call: sequences of (new tokens, context), and their attention."""

    sequences: tuple[tuple[int, int], ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    window: int | None = None
    cache_dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.sequences)

    @property
    def pages_per_seq(self) -> int:
        return max(context for _, context in self.sequences) // self.page_size

    @property
    def num_pages(self) -> int:
        itemsize = 2 if self.cache_dtype == "bfloat16" else 1
        return POOL_BYTES // (self.kv_heads * self.page_size * self.head_dim * itemsize)

    def integers(self):
        """context_lens, page_indices and query_offsets."""
        import numpy as np

        new, context = np.array(self.sequences, np.int32).T
        pages = np.arange(len(new) * self.pages_per_seq, dtype=np.int32).reshape(len(new), -1)
        return context, pages, np.cumsum([0, *new], dtype=np.int32)

    def multiply_adds(self) -> int:
        """Of the keys that are seen, not of those that are masked."""
        seen = 0
        for new, context in self.sequences:
            positions = range(context - new, context)
            seen += sum(min(position + 1, self.window or context) for position in positions)
        return 2 * seen * self.q_heads * self.head_dim

    def bytes_read(self) -> int:
        """Of keys and values, each but once."""
        itemsize = 2 if self.cache_dtype == "bfloat16" else 1
        keys = sum(min(context, (self.window or context) + new - 1) for new, context in self.sequences)
        return 2 * keys * self.kv_heads * self.head_dim * itemsize


CALLS = {
    **{f"2048_at_{context}": Attention(((2048, context),)) for context in (2048, 4096, 16384)},
    "window_1024_d256": Attention(((2048, 8192),), 16, 8, 256, window=1024),
    "d64": Attention(((2048, 8192),), 64, 8, 64),
    "mixed": Attention(((1, 4096),) * 32 + ((1024, 4096),)),
    "mixed_only_prefill": Attention(((1024, 4096),)),
    "mixed_only_decode": Attention(((1, 4096),) * 32),
    "decode_32_8": Attention(((1, 4096),) * 64),
    "decode_8_1": Attention(((1, 4096),) * 64, 8, 1),
    "decode_32_8_int8": Attention(((1, 4096),) * 64, cache_dtype="int8"),
    "decode_32_8_e5m2": Attention(((1, 4096),) * 64, cache_dtype="float8_e5m2"),
}


def paged_prefill(call: Attention, device):
    """This project's kernels."""
    import jax.numpy as jnp

    from paged_prefill.lowering.call import Device, flatten
    from paged_prefill.lowering.mosaic_tpu.host import MosaicTpu
    from paged_prefill.primitive.attention import Attention as Parameters

    kernel, described = MosaicTpu(), Device("tpu", device.device_kind, core_count=1)
    cache = ((call.kv_heads, call.num_pages, call.page_size, call.head_dim), call.cache_dtype)
    context_lens, page_indices, query_offsets = call.integers()
    operands = dict(
        query=((call.tokens, call.q_heads, call.head_dim), "bfloat16"),
        key_cache=cache,
        value_cache=cache,
        context_lens=context_lens,
        page_indices=page_indices,
        query_offsets=query_offsets,
    )
    if call.cache_dtype != "bfloat16":
        operands |= dict(key_scale=((), "float32"), value_scale=((), "float32"))
    attention = Parameters(call.head_dim**-0.5, None, call.window)

    def attend(*arrays):
        named = dict(zip(operands, arrays, strict=True)) | dict(kv_head_start=jnp.int32(0))
        flat = flatten(named, cache_batch_dims=0, num_kv_heads=call.kv_heads, attention=attention)
        return kernel.attend(flat, kernel.heuristic(flat.problem, described), described)

    return attend, [*operands.values()]


def jax_ragged_paged_attention(call: Attention, device):
    """The kernel that comes with JAX, with the sizes of its tuning table for v5e."""
    import numpy as np

    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def attend(*arrays):
        return ragged_paged_attention(
            *arrays,
            sm_scale=call.head_dim**-0.5,
            sliding_window=call.window,
            num_queries_per_block=64,
            num_kv_pages_per_block=512 // call.page_size,
            vmem_limit_bytes=60 * 2**20,
        )

    context_lens, page_indices, query_offsets = call.integers()
    operands = [
        ((call.tokens, call.q_heads, call.head_dim), "bfloat16"),
        ((call.num_pages, call.page_size, 2 * call.kv_heads, call.head_dim), call.cache_dtype),
        *(context_lens, page_indices, query_offsets, np.array([len(context_lens)], np.int32)),
    ]
    return attend, operands


def tpu_inference_v3(call: Attention, device):
    """tpu-inference's kernel, with its default sizes for v5 and v6, or its other one where head_dim is 64.

    On 7x too: of its own there, 512 queries x 2048 keys, it needs more VMEM than the 64 MiB that JAX reports.
    """
    import jax.numpy as jnp

    if call.head_dim == 64:
        return _tpu_inference_v3_of_64(call)
    name = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
    v3 = _loaded("TPU_INFERENCE", name, "tpu_inference.kernels")
    v3.get_tpu_version = lambda: 6 if "6" in device.device_kind or "7" in device.device_kind else 5
    group = call.q_heads // call.kv_heads
    # Of its kernel for decoding, where that has no work: small, to compile fast.
    keys = max(128, call.page_size)
    decoding = None if any(new == 1 for new, _ in call.sequences) else (1, keys, 1, keys)

    def attend(*arrays):
        return v3.ragged_paged_attention(
            *arrays,
            sm_scale=call.head_dim**-0.5,
            sliding_window=call.window,
            d_block_sizes=decoding,
            m_block_sizes=(1024 // group, 1024, 512 // group, 512),
        )

    shape = v3.get_kv_cache_shape(call.num_pages, call.page_size, call.kv_heads, call.head_dim, jnp.bfloat16)
    return attend, _with_new_keys(call, shape)


def _tpu_inference_v3_of_64(call: Attention):
    """With the sizes that it takes on v5 and v6 where its table has none, and all of the chip's VMEM, like the other."""
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu

    package = "tpu_inference.kernels.ragged_paged_attention.v3"
    table = types.ModuleType(f"{package}.tuned_block_sizes_hd64")  # the real one needs vLLM
    sys.modules[table.__name__], table.get_tuned_block_sizes = table, None
    v3 = _loaded("TPU_INFERENCE", f"{package}.kernel_hd64", "tpu_inference.kernels")

    def attend(*arrays):
        return v3.ragged_paged_attention_hd64(
            *arrays,
            sm_scale=call.head_dim**-0.5,
            sliding_window=call.window,
            num_kv_pages_per_block=2048 // call.page_size,
            num_queries_per_block=32,
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes,
        )

    shape = v3.get_kv_cache_shape(call.num_pages, call.page_size, call.kv_heads, call.head_dim, jnp.bfloat16)
    return attend, _with_new_keys(call, shape)


def tpu_inference_stacked_rpa(call: Attention, device):
    """tpu-inference's experimental kernel, with the sizes that it computes for a chip. Its pages have 128 slots or more."""
    name = "tpu_inference.kernels.experimental.stacked_rpa.wrapper"
    return _with_its_own_sizes(call, _loaded("TPU_INFERENCE", name, "tpu_inference.kernels"))


def tokamax_batched_rpa(call: Attention, device):
    """tokamax's kernel, with the sizes that it computes for a chip."""
    name = "tokamax._src.ops.batched_rpa.kernel.wrapper"
    return _with_its_own_sizes(call, _loaded("TOKAMAX", name, "tokamax._src.ops.batched_rpa.kernel"))


def _with_its_own_sizes(call: Attention, wrapper):
    """The kernel of a module that computes sizes for a chip, and its operands."""
    import jax.numpy as jnp

    def attend(*arrays):
        return wrapper.ragged_paged_attention(*arrays, sm_scale=call.head_dim**-0.5, sliding_window=call.window)

    shape = wrapper.get_kv_cache_shape(call.num_pages, call.page_size, call.kv_heads, call.head_dim, jnp.bfloat16)
    return attend, _with_new_keys(call, shape)


def _with_new_keys(call: Attention, cache_shape):
    """The operands of a kernel that also writes the new keys and values, and wants decoding sequences first."""
    import numpy as np

    context_lens, page_indices, query_offsets = call.integers()
    new = ((call.tokens, call.kv_heads, call.head_dim), "bfloat16")
    decoding = sum(tokens == 1 for tokens, _ in call.sequences)
    distribution = np.array([decoding, decoding, len(context_lens)], np.int32)
    cache = (cache_shape, call.cache_dtype)
    query = ((call.tokens, call.q_heads, call.head_dim), "bfloat16")
    return [query, new, new, cache, context_lens, page_indices.reshape(-1), query_offsets, distribution]


def _loaded(variable: str, module: str, package: str):
    """A module from an unpacked wheel, without running the packages around it."""
    parts = package.split(".")
    for i in range(1, len(parts) + 1):
        around = types.ModuleType(".".join(parts[:i]))
        around.__path__ = [os.path.join(os.environ[variable], *parts[:i])]
        sys.modules[around.__name__] = around
    return importlib.import_module(module)


OF_WHEELS = {
    tpu_inference_v3: "TPU_INFERENCE",
    tpu_inference_stacked_rpa: "TPU_INFERENCE",
    tokamax_batched_rpa: "TOKAMAX",
}
KERNELS = {k.__name__: k for k in (paged_prefill, jax_ragged_paged_attention, *OF_WHEELS)}
FROM_WHEELS = {k.__name__: variable for k, variable in OF_WHEELS.items()}


def measure_here(generation, kernel, call, dump):
    """Compiles a call in this process, whose compiler writes to `dump`, and counts what it runs."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding
    import numpy as np

    from paged_prefill.benchmarks import bundles

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        attend, operands = KERNELS[kernel](call, device)
        programs = _operands_of_programs(attend, operands)
        on_device = SingleDeviceSharding(device)
        shapes = [(x.shape, x.dtype) if isinstance(x, np.ndarray) else x for x in operands]
        shapes = [jax.ShapeDtypeStruct(*x, sharding=on_device) for x in shapes]
        started = time.perf_counter()
        jax.jit(attend).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
        seconds = time.perf_counter() - started
    counts = {}
    for name, calls in programs.items():
        runs = runs_of_files(name, files_of(name, dump), calls)
        each = [bundles.count(path, integers, BRANCH_DELAY[generation]) for path, integers in runs]
        counts[name] = bundles.Count(sum(x.bundles for x in each), sum(x.spills for x in each))
    total = {key: sum(getattr(x, key) for x in counts.values()) for key in ("bundles", "spills")}
    return dict(seconds=seconds, parts={name: x.bundles for name, x in counts.items()}, **total)


def runs_of_files(name, paths, calls):
    """Pairs each run's integers with the file of its program.

    `calls` has a list of runs for each place that calls programs of this name, none where a branch was not taken. A
    function that is traced once and called often has one place, and may have as many files as runs.
    """
    if len(paths) == len(calls):
        return [(path, run) for path, runs in zip(paths, calls) for run in runs]
    runs = [run for runs in calls for run in runs]
    if len(paths) != len(runs):
        raise ValueError(f"{name} runs {len(runs)} times, and its final bundles are in {len(paths)} files: {paths}")
    return list(zip(paths, runs))


def files_of(name: str, dump: str) -> list[str]:
    """The final bundles of the programs of a name, in the order of the call; not of those whose names it begins."""
    found = {}
    for path in glob.glob(f"{glob.escape(dump)}/*-final_bundles.txt"):
        if match := re.search(rf"-{re.escape(name)}(?:\.(\d+))?-\d+-final_bundles\.txt$", path):
            found[path] = int(match[1] or 0)
    return sorted(found, key=found.get)


def _operands_of_programs(attend, operands):
    """The integers among the operands of each Pallas program of a call, by their numbers.

    A dict of the programs' names; for each of its places in the code, a list of its runs.
    """
    import jax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    import jax.numpy as jnp
    import numpy as np

    found, pallas_call = {}, pl.pallas_call

    def recorded(body, *, out_shape, grid_spec=None, name=None, **others):
        out_shape = tuple(out_shape) if isinstance(out_shape, list) else out_shape  # as the real one gives it

        def run(*arrays):
            runs = []
            found.setdefault(name or body.__name__, []).append(runs)
            results, arrays_given = jax.tree.leaves(out_shape), jax.tree.leaves(arrays)
            grid = (x for x in (grid_spec.grid if grid_spec else ()) if not isinstance(x, int))
            integers = {i: x for i, x in enumerate([*grid, *arrays_given]) if jnp.issubdtype(x.dtype, jnp.integer)}
            jax.debug.callback(runs.append, integers, ordered=True)
            if all(jnp.issubdtype(x.dtype, jnp.integer) for x in [*arrays_given, *results]):  # it makes a schedule
                interpreted = dict(out_shape=out_shape, grid_spec=grid_spec, interpret=pltpu.InterpretParams())
                return pallas_call(body, **interpreted)(*arrays)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return run

    def attend_to_zeros(given):
        given = iter(given)
        return attend(*(next(given) if isinstance(x, np.ndarray) else jnp.zeros(*x) for x in operands))

    pl.pallas_call = recorded
    jax.block_until_ready(jax.jit(attend_to_zeros)([x for x in operands if isinstance(x, np.ndarray)]))
    jax.effects_barrier()
    pl.pallas_call = pallas_call
    jax.clear_caches()  # functions that are jitted inside would keep to what was put in the programs' place
    return jax.tree.map(np.asarray, found)


def measure(generation, kernel, name):
    """One row of the table, as a dict, or the compiler's last words."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            JAX_TRACEBACK_FILTERING="off",  # what it says of filtering would be the last words
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=flags,
        )
        command = [sys.executable, __file__, "--child", generation, kernel, name, dump]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            return dict(error=(child.stderr.strip().splitlines() or ["it was killed"])[-1])
        return json.loads(child.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", default="v5e,v6e,7x")
    parser.add_argument("--calls", default=",".join(CALLS))
    parser.add_argument("--page-sizes", default="16")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        generation, kernel, name, dump = arguments.child
        return print(json.dumps(measure_here(generation, kernel, call_of(name), dump)))
    kernels = [k for k in arguments.kernels.split(",") if FROM_WHEELS.get(k, "PATH") in os.environ]
    print("| call | page | TPU | kernel | bundles | spills | of peak | cycles of HBM | compile s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.calls.split(","):
        for page_size in arguments.page_sizes.split(","):
            call = call_of(f"{name}/{page_size}")
            for generation in arguments.generations.split(","):
                for kernel in kernels:
                    row = measure(generation, kernel, f"{name}/{page_size}")
                    cells = row.get("error")
                    if cells is None:
                        share = call.multiply_adds() / row["bundles"] / PEAK[generation]
                        hbm = call.bytes_read() / HBM_BYTES_A_CYCLE[generation]
                        cells = f"{row['bundles']:,} | {row['spills']:,} | {share:.0%} | {hbm:,.0f}"
                        cells += f" | {row['seconds']:.0f}"
                    print(f"| {name} | {page_size} | {generation} | {kernel} | {cells} |", flush=True)


def call_of(name: str) -> Attention:
    """A call by its name and page size."""
    name, page_size = name.split("/")
    return CALLS[name]._replace(page_size=int(page_size))


if __name__ == "__main__":
    main()
