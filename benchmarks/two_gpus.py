"""One GPU against two, the heads cut by automatic sharding: python -m paged_prefill.benchmarks.two_gpus.

Prints a row for each case: milliseconds on one GPU and on two (medians of loops that take turns), how many times as
fast two are, whether the results are the same in every bit, and the compiled program's collectives (there are none).
"""

import functools
import json
import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.benchmarks import gpu

CASES = ("8192@8192", "2048@16384", "8x512@4096", "16x1@32768")
COLLECTIVES = r"(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def measure(name, page_size=16) -> dict:
    """One row of the table."""
    (query, *_), others = gpu.operands(page_size, *gpu.CASES[name])
    pack = (query, *others)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    specs = (P(None, "heads"), P("heads"), P("heads"), P(), P(), P())
    cut = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(pack, specs)]
    call = jax.jit(functools.partial(ragged_paged_prefill, return_lse=True))
    collectives = re.findall(COLLECTIVES, call.lower(*cut).compile().as_text())
    results = [jax.tree.map(np.asarray, call(*operands)) for operands in (pack, cut)]
    same = all(np.array_equal(one, two) for one, two in zip(*results))
    contenders = {name: functools.partial(call, *operands) for name, operands in dict(one=pack, two=cut).items()}
    ms = gpu.median_ms({name: (run, jax.block_until_ready) for name, run in contenders.items()})
    row = {"case": name, "one GPU ms": round(ms["one"], 4), "two GPUs ms": round(ms["two"], 4)}
    return row | {"ratio": round(ms["one"] / ms["two"], 2), "same bits": same, "collectives": collectives}


def main():
    print(json.dumps(dict(jax=jax.__version__, devices=[device.device_kind for device in jax.devices()])), flush=True)
    for name in CASES:
        print(json.dumps(measure(name)), flush=True)


if __name__ == "__main__":
    main()
