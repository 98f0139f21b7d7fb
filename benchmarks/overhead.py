"""What a call costs beside the bare primitive: python -m paged_prefill.benchmarks.overhead [--rounds N].

Tiny operands on the CPU, so that the calls' own work is what is seen. The contenders take turns, one call each, and the
medians and minima of many rounds are printed in microseconds: eager calls beside `paged_prefill_p.bind` on operands
that are ready, and calls under jit with a table of the user's beside such calls without any.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from paged_prefill import paged_prefill_p, prefill_page_attention, ragged_paged_prefill
from paged_prefill.lowering import tuning
from paged_prefill.lowering.choose import XLA, device_of
from paged_prefill.lowering.tuning import resolve, tables
from paged_prefill.tune import problem_of_shape


def operands():
    """A chunk of 4 tokens at 16, and the same as a pack."""
    query = jnp.ones((4, 2, 8))
    cache = jnp.ones((1, 4, 8, 8))
    pages = jnp.arange(2, dtype=jnp.int32)
    call = (query, cache, cache, jnp.asarray([16], jnp.int32), pages)
    return call, (query, cache, cache, call[3], pages[None], jnp.asarray([0, 4], jnp.int32))


def microseconds(contenders: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """(median, minimum) of each contender's rounds."""
    for call in contenders.values():
        for _ in range(20):
            jax.block_until_ready(call())
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            result = call()
            times[name].append(1e6 * (time.perf_counter() - start))
            jax.block_until_ready(result)
    return {name: (statistics.median(taken), min(taken)) for name, taken in times.items()}


def eager() -> dict:
    """The public functions beside the primitive."""
    call, pack = operands()
    return {
        "paged_prefill_p.bind": functools.partial(paged_prefill_p.bind, *pack),
        "ragged_paged_prefill": functools.partial(ragged_paged_prefill, *pack),
        "prefill_page_attention": functools.partial(prefill_page_attention, *call),
    }


def under_jit() -> dict:
    """The same call compiled without a table, and with one that holds its configuration."""
    _, pack = operands()
    plain, tabled = (jax.jit(lambda *x: ragged_paged_prefill(*x)) for _ in range(2))
    with tuning.policy("off"):
        plain(*pack)
        program = plain.lower(*pack).as_text()
    device = device_of("cpu")
    problem = problem_of_shape(1, 4, 16, 2, 1, 8, None, None, page_size=8, dtype="float32")
    key = tables.key_of(XLA, problem, device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        entry = tables.entry_of(key, XLA.heuristic(problem, device), source="timed")
        tables.write(tables.user_path(device.kind), [entry])
        assert "user's table" in resolve.resolve(XLA, problem, device, None).source
        tabled(*pack)
        assert tabled.lower(*pack).as_text() == program
    return {"jit, no table": functools.partial(plain, *pack), "jit, warm table": functools.partial(tabled, *pack)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3000, help="how often each call is timed (%(default)s)")
    rounds = parser.parse_args().rounds
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {rounds} rounds, microseconds")
    print("| call | median | minimum | median over the first | minimum over the first |\n|---|---|---|---|---|")
    for contenders in (eager(), under_jit()):
        times = microseconds(contenders, rounds)
        median, least = next(iter(times.values()))
        for name, (a, b) in times.items():
            print(f"| {name} | {a:.1f} | {b:.1f} | {a - median:+.1f} | {b - least:+.1f} |")


if __name__ == "__main__":
    main()
