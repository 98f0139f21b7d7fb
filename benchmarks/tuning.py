"""Tuned against heuristic configurations: python -m paged_prefill.benchmarks.tuning --platform triton --out FOLDER.

For each of 12 shapes, times the heuristic configuration of a kernel beside its candidates as `paged_prefill.tune` does,
and writes the choices as a table that can be shipped into FOLDER. Then measures the choice once more beside the
heuristic, through the public call. Prints a row for each shape, and what the rows come to:

    tuned / heuristic   at most 1.02 on every shape
    heuristic / best    at most 1.07 on 10 shapes of 12, where best is the fastest candidate of all
"""

import argparse
import json
from pathlib import Path
import sys
import time

import jax

from paged_prefill.benchmarks import gpu
from paged_prefill.lowering import tables, timing, tuning
from paged_prefill.lowering.choose import KERNELS, choose, default_platform, device_of
from paged_prefill.tune import problem_of_shape, sizes

SHAPES = [(case, 16) for case in gpu.CASES if "cap" not in case] + [("2048@16384", 128), ("16x1@32768", 128)]


def measure(case, page_size, platform, device, out) -> dict:
    """One row: times in milliseconds. The choice goes into the table in `out`."""
    problem = problem_of_shape(*gpu.CASES[case], page_size=page_size)
    name, _ = choose(problem, device, platform)
    kernel = KERNELS[device.platform][name]
    start = time.monotonic()
    timings, chosen = timing.compare(name, kernel, problem, device)
    row = {"case": case, "page": page_size, "seconds": round(time.monotonic() - start, 1)}
    row["failed"] = {sizes(t.config): t.problem for t in timings if t.problem}
    if chosen is None:
        return row
    heuristic, best = timings[0], min((t for t in timings if t.milliseconds), key=lambda t: t.milliseconds)
    if heuristic.milliseconds is None:
        return row
    tables.write(out / tables.shipped_path(device.kind).name, [tuning.entry_of(name, kernel, problem, device, chosen)])
    row |= {"heuristic": sizes(heuristic.config), "heuristic ms": heuristic.milliseconds}
    row |= {"best": sizes(best.config), "best ms": best.milliseconds, "tuned": sizes(chosen.config)}
    row["heuristic / best"] = heuristic.milliseconds / best.milliseconds
    row["tuned / heuristic"] = 1.0
    if chosen.config != heuristic.config:
        both = {"tuned": chosen.config, "heuristic": heuristic.config}
        ms = gpu.median_ms({k: gpu.ours(platform, page_size, gpu.CASES[case], cfg) for k, cfg in both.items()})
        row["tuned / heuristic"] = ms["tuned"] / ms["heuristic"]
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the table goes")
    arguments = parser.parse_args()
    device = device_of(default_platform())
    print(json.dumps(dict(jax=jax.__version__, device=device.kind, platform=arguments.platform)), flush=True)
    rows = []
    for case, page_size in SHAPES:
        rows.append(measure(case, page_size, arguments.platform, device, arguments.out))
        print(json.dumps(rows[-1]), flush=True)
    complete = [row for row in rows if "heuristic / best" in row]
    slower = [row for row in complete if row["tuned / heuristic"] > 1.02]
    near = [row for row in complete if row["heuristic / best"] <= 1.07]
    print(f"{len(complete)} of {len(rows)} shapes measured")
    print(f"tuned slower than 1.02 x heuristic: {len(slower)}; heuristic within 1.07 x best: {len(near)}")
    return 0 if len(complete) == len(rows) and not slower and len(near) >= len(rows) - 2 else 1


if __name__ == "__main__":
    sys.exit(main())
