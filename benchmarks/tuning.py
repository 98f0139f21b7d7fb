"""Tunes a GPU, and measures what came of it: python -m paged_prefill.benchmarks.tuning --out FOLDER [--seconds 500].

For each shape and kernel, times the heuristic's sizes beside the kernel's candidates as `paged_prefill.tune` does.
Where another choice is clearly faster, and again when the two are timed anew (`again`), a row goes into the table
FOLDER/paged_prefill/DEVICE.json, which can be shipped. Then times what a call uses with that table against the
heuristic: once more on those shapes, and on shapes between them, which no row was timed for; how good the number of
splits is, which no table holds; and calls that tables before format 2 gave other shapes' sizes, with those sizes
(`before`). Prints a line as each is done, and at last what they come to:

    tuned / heuristic             at most 1.02 on the shapes, 1.03 between them, and at most 1.00 in the geometric mean
    heuristic / best candidate    at most 1.05 on 7 shapes of 8, and so the number of splits

Compiling takes turns on no GPU: it is spread over processes, which share one for timing, one at a time. They leave
some of the host's cores free, which starts the calls that are timed.
"""

import argparse
from concurrent import futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
from pathlib import Path
import sys
import time

import jax

from paged_prefill.lowering.choose import KERNELS, device_of
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.config import SIZES, PrefillPageAttentionConfig
from paged_prefill.tune import problem_of_shape, sizes

PAGE_SIZE = 16
FREE_CORES = 4  # of the host, for what is timed

# Sequences, new tokens of each on average, and context; then query heads, KV heads and head_dim of one device.
HEADS = {
    "32/8 d128": ((1, 1, 32768), (16, 1, 4096), (64, 1, 4096), (256, 1, 1024), (1, 16, 32768), (1, 64, 8192),
                  (1, 128, 32768), (1, 512, 8192), (1, 2048, 2048), (1, 2048, 16384), (1, 8192, 8192), (8, 512, 4096),
                  (65, 32, 4096)),
    "16/4 d128": ((8, 1, 8192), (128, 1, 2048), (1, 128, 8192), (1, 1024, 16384), (1, 4096, 4096), (33, 16, 8192)),
    "8/2 d128": ((2, 1, 32768), (32, 1, 8192), (1, 16, 8192), (1, 256, 32768), (1, 2048, 16384), (17, 64, 4096)),
    "4/1 d128": ((1, 1, 32768), (16, 1, 32768), (64, 1, 4096), (256, 1, 2048), (1, 16, 32768), (1, 128, 32768),
                 (1, 512, 8192), (1, 2048, 16384), (1, 8192, 8192), (65, 32, 4096)),
    "64/8 d64": ((64, 1, 4096), (1, 512, 8192), (1, 2048, 16384)),
    "8/1 d64": ((16, 1, 8192), (1, 128, 32768)),
    "16/8 d256": ((32, 1, 4096), (1, 2048, 16384)),
    "2/1 d256": ((1, 128, 16384), (1, 4096, 4096)),
}  # fmt: skip
SHAPES = [(heads, *pack) for heads, packs in HEADS.items() for pack in packs]
# Every second shape, somewhere within the buckets of its key.
BETWEEN = [
    (heads, seqs - seqs // 4, tokens - tokens // 3, context - context // 5 - 7)
    for heads, seqs, tokens, context in SHAPES[::2]
]  # fmt: skip
# For the Hopper kernel: block_q, block_kv, num_warps, num_stages and num_splits of the row that such a call was given.
BEFORE = {
    ("32/8 d128", 1, 16, 32768): (16, 128, 8, 3, 1),
    ("4/1 d128", 16, 1, 32768): (16, 128, 8, 3, 1),
    ("4/1 d128", 1, 128, 32768): (128, 128, 12, 3, 4),
    ("32/8 d128", 512, 1, 8192): (128, 128, 12, 3, 1),
}


def problem_of(shape):
    heads, seqs, tokens, context = shape
    (q_heads, kv_heads), head_dim = map(int, heads.split()[0].split("/")), int(heads.split(" d")[1])
    return problem_of_shape(seqs, tokens, context, q_heads, kv_heads, head_dim, None, None, page_size=PAGE_SIZE)


def described(shape) -> str:
    heads, seqs, tokens, context = shape
    return f"{seqs}x{tokens}@{context} {heads}"


# ---- What runs in a process of its own; each returns a row of results.

_turn = None  # whose holder may use the GPU
_deadline = math.inf


def start(turn, deadline, compilers):
    global _turn, _deadline  # pylint: disable=global-statement
    _turn, _deadline = turn, deadline
    tables.read_shipped = lambda kind: {}  # what is measured is the new table alone
    timing.COMPILERS = compilers


def run(measure, name, shape, *arguments) -> dict:
    """A row of results, or why there is none."""
    row = {"measure": measure.__name__, "kernel": name, "shape": described(shape)}
    if time.time() > _deadline:
        return row | {"error": "not reached"}
    kernel, problem = KERNELS["cuda"][name], problem_of(shape)
    device = device_of("cuda")
    if reason := kernel.supports(problem, device):
        return row | {"error": reason}
    try:
        return row | measure(kernel, problem, device, *arguments)
    except Exception as error:  # the other rows go on
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}


def tune(kernel, problem, device) -> dict:
    """The candidates against each other."""
    began = time.monotonic()
    timings, chosen, settled = timing.compare(kernel, problem, device, budget_seconds=60, turn=_turn)
    if chosen is None or timings[0].milliseconds is None:
        return {"error": "; ".join(f"{sizes(t.config)}: {t.problem}" for t in timings)}
    heuristic, best = timings[0], min((t for t in timings if t.milliseconds), key=lambda t: t.milliseconds)
    row = {"heuristic": sizes(heuristic.config), "best": sizes(best.config), "chosen": sizes(chosen.config)}
    row |= {"ms": [round(t.milliseconds, 5) for t in (heuristic, best, chosen)]}
    row |= {"ratio": round(heuristic.milliseconds / best.milliseconds, 4)}
    if settled and chosen is not heuristic:
        row["again"] = _against(kernel, problem, device, chosen.config)["ratio"]
        if row["again"] <= timing.WORTH_IT:
            row["entry"] = resolve.entry_of(kernel, problem, device, chosen)
    row["failed"] = {sizes(t.config): t.problem for t in timings if t.problem}
    return row | {"seconds": round(time.monotonic() - began, 1)}


def tuned(kernel, problem, device) -> dict:
    """What a call uses against the heuristic."""
    config, source = resolve.resolve(kernel, problem, device, None, under="cache")
    return _against(kernel, problem, device, config) | {"source": source}


def splits(kernel, problem, device) -> dict:
    """The heuristic's number of splits against the best of half, the same and twice as many."""
    heuristic = resolve.completed(kernel, problem, device)
    others = {max(1, heuristic.num_splits // 2), 2 * heuristic.num_splits} - {heuristic.num_splits}
    configs = [heuristic, *(dataclasses.replace(heuristic, num_splits=n) for n in sorted(others))]
    times = timing.race(kernel, problem, device, configs, turn=_turn)
    ratios = {c.num_splits: round(timing.relative(times, c, heuristic), 4) for c in configs}
    row = {"heuristic": sizes(heuristic), "by splits": ratios, "ms": [times[c] for c in configs]}
    return row | {"ratio": round(1 / min(ratios.values()), 4)}


def before(kernel, problem, device, old) -> dict:
    """What a call uses now against the sizes it had."""
    config, source = resolve.resolve(kernel, problem, device, None, under="cache")
    old = PrefillPageAttentionConfig(**dict(zip(SIZES, old)))
    times = timing.race(kernel, problem, device, [old, config], turn=_turn)
    row = {"old": sizes(old), "now": sizes(config), "source": source, "ms": [round(times[c][0], 5) for c in times]}
    return row | {"ratio": round(timing.relative(times, config, old), 4)}


def _against(kernel, problem, device, config) -> dict:
    heuristic = resolve.completed(kernel, problem, device)
    row = {"config": sizes(config), "heuristic": sizes(heuristic), "ratio": 1.0}
    if config == heuristic:
        return row
    times = timing.race(kernel, problem, device, [heuristic, config], turn=_turn)
    return row | {"ms": [times[heuristic], times[config]], "ratio": round(timing.relative(times, config, heuristic), 4)}


# ---- What the main process does.


def report(rows) -> bool:
    """Prints what rows come to; whether they are all there and within the goals."""
    by_measure, good = {}, True
    for row in rows:
        by_measure.setdefault((row["kernel"], row["measure"]), []).append(row)
    for (kernel, measure), group in by_measure.items():
        ratios = [row["ratio"] for row in group if "ratio" in row]
        if not ratios:
            print(f"{kernel} {measure}: nothing of {len(group)} shapes", flush=True)
            continue
        limit, most_over = {
            "tune": (1.05, len(group) // 8),
            "tuned": (1.02, 0),
            "between": (1.03, 0),
            "splits": (1.05, len(group) // 8),
        }.get(measure, (math.inf, 0))
        over = sum(ratio > limit for ratio in ratios)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(
            f"{kernel} {measure}: {len(ratios)} of {len(group)} shapes, ratios {min(ratios)} to {max(ratios)}, geometric "
            f"mean {mean:.4f}, {over} over {limit}; not 1: {sum(ratio != 1 for ratio in ratios)}",
            flush=True,
        )
        good &= over <= most_over and len(ratios) == len(group) and not (measure == "between" and mean > 1)
    return good


def between(*arguments) -> dict:
    """`tuned`, on a shape that no row was timed for."""
    return tuned(*arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="mosaic_gpu,triton")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the table goes")
    parser.add_argument("--seconds", type=float, default=500, help="for all of it; what is not reached is left out")
    parser.add_argument("--processes", type=int, default=6, help="that compile beside each other")
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    os.environ |= {
        "XDG_CACHE_HOME": str(arguments.out.resolve()),
        "TQDM_DISABLE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(round(0.9 / (arguments.processes + 1), 3)),
        # XLA would time products of the XLA lowering on the GPU while a kernel is timed.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
        " --xla_gpu_force_compilation_parallelism=1",
    }
    device = device_of("cuda")
    table = tables.user_path(device.kind)
    print(json.dumps(dict(jax=jax.__version__, device=device.kind, cores=device.cores, table=str(table))), flush=True)
    kernels = arguments.kernels.split(",")
    phases = [[(tune, k, shape) for shape in SHAPES for k in kernels]]
    phases += [[(before, k, *call) for k in kernels if k == "mosaic_gpu" for call in BEFORE.items()]]
    phases += [[(tuned, k, shape) for shape in SHAPES for k in kernels]]
    phases += [[(between, k, shape) for shape in BETWEEN for k in kernels]]
    phases += [[(splits, k, shape) for shape in SHAPES for k in kernels]]
    rows = []
    compilers = max(1, (os.cpu_count() - FREE_CORES) // arguments.processes)
    context = multiprocessing.get_context("spawn")
    # Nothing may be lost where this is stopped from outside, so it stops in time by itself.
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            futures.ProcessPoolExecutor(
                arguments.processes, context, initializer=start, initargs=(context.Lock(), deadline, compilers)
            )
        )
        for phase in phases:
            for future in futures.as_completed([pool.submit(run, *task) for task in phase]):
                row = future.result()
                rows.append(row)
                if "entry" in row:
                    tables.write(table, [row["entry"]])
                print(json.dumps({"at": round(time.time() - deadline + arguments.seconds), **row}), flush=True)
            report(rows[-len(phase) :])
    print("all of it:", flush=True)
    return 0 if report(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
