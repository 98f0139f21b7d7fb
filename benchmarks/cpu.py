"""Times the XLA lowering on this machine's CPU beside its peers, and holds it to its goals.

    python -m paged_prefill.benchmarks.cpu [--case NAME ...] [--rounds N]

Needs ejKernel 0.0.80.3 (without its GPU extras) and PyTorch beside JAX; a peer that is missing is left out, and said
so. Every round runs each peer once, in turn, on the same arrays in one process, so that what disturbs the machine
disturbs all; times are medians over the rounds. Prints a Markdown table, and exits 1 where a goal is missed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
import importlib.metadata
import os
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import ragged_paged_prefill

# PyTorch's idle threads would else spin into the turn of the contender that follows it: this project's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 16
LARGEST_TEMPORARIES = 64  # MiB
SLOWEST_BESIDE_TORCH = 1.1


@dataclass(frozen=True)
class Case:
    """One shape: (new tokens, context) of each sequence, and how many times faster than ejKernel it must be."""

    name: str
    dtype: str
    sequences: tuple[tuple[int, int], ...]
    goal: float | None = None
    sliding_window: int | None = None
    page_table_times: int = 1

    @property
    def single(self) -> bool:
        """Whether the peers, which take one sequence, can run it."""
        return len(self.sequences) == 1


MIXED = ((512, 4096), (1, 4096), (1, 1024), (1, 300), (100, 700), (17, 2000))


def _cases():
    for dtype, goal in (("float32", 2.0), ("bfloat16", 3.0)):
        yield Case("512 at 4096", dtype, ((512, 4096),), goal)
        yield Case("512 at 4096, page table 4x", dtype, ((512, 4096),), 10.0, page_table_times=4)
        yield Case("2048 at 16384", dtype, ((2048, 16384),), 3.0)
        yield Case("2048 at 16384, window 256", dtype, ((2048, 16384),), 10.0, sliding_window=256)
        yield Case("1 at 4096", dtype, ((1, 4096),))
        yield Case("1 at 32768", dtype, ((1, 32768),))
        yield Case("mixed pack", dtype, MIXED)
        for sequence in MIXED:
            yield Case(f"part {sequence[0]} at {sequence[1]}", dtype, (sequence,))


CASES = list(_cases())


def make_operands(case: Case):
    """A pack over a pool of which every page is in use, in random order."""
    rng = np.random.default_rng(0)
    pages = [-(-context // PAGE_SIZE) for _, context in case.sequences]
    num_pages = max(pages) * case.page_table_times * len(pages)
    offsets = np.cumsum([0] + [length for length, _ in case.sequences])
    query = rng.standard_normal((offsets[-1], Q_HEADS, HEAD_DIM), np.float32)
    cache = rng.standard_normal((2, KV_HEADS, num_pages, PAGE_SIZE, HEAD_DIM), np.float32)
    return (
        jnp.asarray(query, case.dtype),
        *(jnp.asarray(c, case.dtype) for c in cache),
        jnp.asarray([context for _, context in case.sequences], jnp.int32),
        jnp.asarray(rng.permutation(num_pages).reshape(len(pages), -1), jnp.int32),
        jnp.asarray(offsets, jnp.int32),
    )


def this_project(case, *operands):
    return ragged_paged_prefill(*operands, sliding_window=case.sliding_window)


def plain_jnp(case, query, key_cache, value_cache, context_lens, page_indices, query_offsets):
    """What one would write first: gather every page, grouped einsums, a dense masked softmax."""
    chunk = query.shape[0]
    keys, values = (c[:, page_indices[0]].reshape(KV_HEADS, -1, HEAD_DIM) for c in (key_cache, value_cache))
    position = context_lens[0] - chunk + jnp.arange(chunk)[:, None]
    key = jnp.arange(keys.shape[1])
    visible = key <= position
    if case.sliding_window is not None:
        visible &= key > position - case.sliding_window
    grouped = query.reshape(chunk, KV_HEADS, -1, HEAD_DIM)
    logits = jnp.einsum("qhgd,hkd->hgqk", grouped, keys, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("hgqk,hkd->qhgd", weights, values).reshape(query.shape)


def ejkernel(case, query, key_cache, value_cache, context_lens, page_indices, query_offsets):
    # The kernel itself: nothing is tuned or looked up on the way.
    from ejkernel.kernels._xla.prefill_page_attention import prefill_page_attention

    return prefill_page_attention(
        query, key_cache, value_cache, context_lens, page_indices[0], sliding_window=case.sliding_window
    )


def compiled(peer, case, operands) -> tuple[Callable, float]:
    """The jitted peer as a function of nothing, and its temporaries in MiB."""
    executable = jax.jit(lambda *operands: peer(case, *operands)).lower(*operands).compile()
    temporaries = executable.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: jax.block_until_ready(executable(*operands)), temporaries


def torch_dense(case, query, key_cache, value_cache, context_lens, page_indices, query_offsets) -> Callable:
    """PyTorch's attention as a function of nothing: the keys gathered, the heads repeated and the mask made beforehand.

    Of its forms (grouped heads or repeated, boolean, float or causal mask) this was the fastest on the whole.
    """
    import torch

    chunk, context = query.shape[0], case.sequences[0][1]

    def tensor(x):
        return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, case.dtype))

    def dense(cache):
        gathered = np.asarray(cache)[:, np.asarray(page_indices)[0]].reshape(KV_HEADS, -1, HEAD_DIM)
        return tensor(gathered[:, :context]).repeat_interleave(Q_HEADS // KV_HEADS, 0)[None]

    position = context - chunk + np.arange(chunk)[:, None]
    visible = np.arange(context) <= position
    if case.sliding_window is not None:
        visible &= np.arange(context) > position - case.sliding_window
    mask = tensor(np.where(visible, 0, -np.inf))
    tensors = tensor(query).transpose(0, 1)[None].contiguous(), dense(key_cache), dense(value_cache)

    @torch.inference_mode()
    def run():
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
        return out[0].transpose(0, 1).float()

    return run


JITTED = {"this project": this_project, "ejKernel": ejkernel, "plain jnp": plain_jnp}


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, temporaries (MiB) and largest difference from plain jnp of each peer that can run."""
    operands = jax.block_until_ready(make_operands(case))
    runs, rows = {}, {}
    for name, peer in JITTED.items():
        if name != "this project" and not case.single:
            continue
        try:
            runs[name], temporaries = compiled(peer, case, operands)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        rows[name] = {"temporaries": temporaries}
    if case.single:
        try:
            runs["PyTorch, dense"] = torch_dense(case, *operands)
            rows["PyTorch, dense"] = {"temporaries": float("nan")}
        except ImportError as error:
            print(f"PyTorch is left out: {error}", file=sys.stderr)
    results = {name: np.asarray(run(), np.float32) for name, run in runs.items()}
    for name in results:
        if "plain jnp" in results:
            rows[name]["difference"] = float(np.max(np.abs(results[name] - results["plain jnp"])))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    for name in runs:
        rows[name]["ms"] = statistics.median(times[name])
    return rows


def verdicts(case: Case, rows) -> list[tuple[str, float, bool]]:
    """The goals a case is held to: what was compared, the value, and whether it was reached."""
    mine = rows["this project"]
    found = [("temporaries, MiB", mine["temporaries"], mine["temporaries"] <= LARGEST_TEMPORARIES)]
    if case.goal and "ejKernel" in rows:
        ratio = rows["ejKernel"]["ms"] / mine["ms"]
        found.append((f"ejKernel's time / ours, at least {case.goal:g}", ratio, ratio >= case.goal))
    if case.goal and "PyTorch, dense" in rows:
        ratio = mine["ms"] / rows["PyTorch, dense"]["ms"]
        found.append((f"our time / PyTorch's, at most {SLOWEST_BESIDE_TORCH:g}", ratio, ratio <= SLOWEST_BESIDE_TORCH))
    return found


def _machine() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _versions() -> str:
    def version(package):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {package}"

    return ", ".join([f"Python {platform.python_version()}", *map(version, ("jax", "jaxlib", "ejkernel", "torch"))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="run only cases whose name and dtype hold this text")
    parser.add_argument("--rounds", type=int, default=7, help="how often each peer is timed (default 7)")
    arguments = parser.parse_args()
    chosen = [c for c in CASES if not arguments.case or any(text in f"{c.name} {c.dtype}" for text in arguments.case)]
    print(f"{_machine()}; {_versions()}; medians of {arguments.rounds} rounds\n")
    peers = ["this project", "ejKernel", "plain jnp", "PyTorch, dense"]
    print("| case | dtype | " + " | ".join(f"{peer}, ms" for peer in peers) + " | temporaries, MiB (same order) | goals |")
    print("|---" * (len(peers) + 4) + "|")
    missed = 0
    for case in chosen:
        rows = measure(case, arguments.rounds)
        goals = verdicts(case, rows)
        missed += sum(not reached for *_, reached in goals)
        times = [f"{rows[peer]['ms']:.2f}" if peer in rows else "" for peer in peers]
        temporaries = ", ".join(f"{rows[peer]['temporaries']:.1f}" for peer in peers[:3] if peer in rows)
        said = "; ".join(f"{what}: {value:.2f} {'ok' if reached else 'MISSED'}" for what, value, reached in goals)
        print("| " + " | ".join([case.name, case.dtype, *times, temporaries, said]) + " |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
