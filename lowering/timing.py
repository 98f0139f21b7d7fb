"""Times a kernel's candidate configurations on the device that will run them.

Inputs are random arrays made for it, never the caller's, and never traced ones: the work happens in threads of its own,
which know nothing of the trace, mesh or lowering around the call. A candidate is timed only once its values agree with
the XLA lowering's. Candidates take turns, so that a chip that slows down slows them all; the fastest meet the heuristic
once more, and must beat it clearly.
"""

from concurrent import futures
import functools
import os
import statistics
import time
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_prefill.lowering.call import Call, Problem, Sequences
from paged_prefill.lowering.choose import XLA
from paged_prefill.primitive.config import PrefillPageAttentionConfig

BUDGET_SECONDS = 30.0
ROUNDS, FINAL_ROUNDS = 5, 15
FINALISTS = 3
WORTH_IT = 0.98  # of the heuristic's time at most, or the difference may be noise
SAMPLE_SECONDS = 0.005  # one sample repeats the call for about this long, so that launching it does not count
COMPILERS = min(16, os.cpu_count() or 1)
LARGEST_CACHE_BYTES = 2**31
# Relative L2 distance from the XLA lowering in the same dtype: rounding is far below, a wrong mask or page far above.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class Timing(NamedTuple):
    """What came of one candidate: its median milliseconds, or why there are none."""

    config: PrefillPageAttentionConfig
    milliseconds: float | None
    problem: str | None = None


class Comparison(NamedTuple):
    """What came of all candidates, in their order, the heuristic one first; and the one to use, if any could run."""

    timings: list[Timing]
    chosen: Timing | None


def compare(name, kernel, problem, device, *, budget_seconds: float = BUDGET_SECONDS) -> Comparison:
    """Times kernel.candidates(problem, device), as many and as often as the budget (seconds) allows.

    Candidates that fail, compute wrong values or are not reached carry the reason instead of a time.
    """
    with futures.ThreadPoolExecutor(1, thread_name_prefix="paged_prefill_timing") as worker:
        return worker.submit(_compare, name, kernel, problem, device, budget_seconds).result()


def _compare(name, kernel, problem, device, budget_seconds):
    end = time.monotonic() + budget_seconds
    candidates = kernel.candidates(problem, device)
    calls, reasons = _checked_calls(name, kernel, problem, device, candidates, end)
    times = _median_milliseconds(calls, ROUNDS, end)
    finalists = dict.fromkeys([candidates[0], *sorted(times, key=times.get)[:FINALISTS]])
    final = _median_milliseconds({c: calls[c] for c in finalists if c in calls}, FINAL_ROUNDS, end)
    times |= final
    timings = {config: Timing(config, times.get(config), reasons.get(config)) for config in candidates}
    if not final:
        return Comparison([*timings.values()], None)
    best = min(final, key=final.get)
    if final[best] > WORTH_IT * final.get(candidates[0], np.inf):
        best = candidates[0]
    return Comparison([*timings.values()], timings[best])


def _checked_calls(name, kernel, problem, device, candidates, end):
    """Calls of the candidates that give right values, and the reasons against the others."""
    call = sample_call(problem, jax.devices(device.platform)[0])
    calls, reasons = {}, {}
    with futures.ThreadPoolExecutor(COMPILERS) as compilers:
        compiled = functools.partial(compilers.submit, _compiled, call=call)
        reference = compiled(XLA, config=XLA.heuristic(problem, device))
        compiling = {config: compiled(kernel, config=config) for config in candidates}
        expected = reference.result()()
        for config, future in tqdm(compiling.items(), desc=f"timing {name}", leave=False):
            if (calls or reasons) and time.monotonic() > end:
                future.cancel()
                reasons[config] = "not reached within the budget"
                continue
            run, reason = _checked(future, expected, TOLERANCE[problem.dtype])
            if reason is None:
                calls[config] = run
            else:
                reasons[config] = reason
                logging.warning("paged_prefill discards %s with %s: %s", name, config.chosen(), reason)
    return calls, reasons


def _compiled(kernel, *, config, call):
    attend = functools.partial(kernel.attend, config=config)
    return functools.partial(jax.jit(attend).lower(call).compile(), call)


def _checked(future, expected, tolerance):
    """The call that a future holds and None, or None and the reason against it."""
    try:
        call = future.result()
        distance = max(float(_distance(*pair)) for pair in zip(call(), expected, strict=True))
    except Exception as error:  # whatever a compiler or driver raises, the other candidates go on
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not distance <= tolerance:  # NaN included
        return None, f"wrong values, {distance:.2g} away from the XLA lowering's"
    return call, None


def _median_milliseconds(calls, rounds, end) -> dict[PrefillPageAttentionConfig, float]:
    """For each configuration the median of its samples, one a round, until the time `end`."""
    counts = {config: max(1, round(SAMPLE_SECONDS / _seconds(call, 1))) for config, call in calls.items()}
    samples = {config: [] for config in calls}
    for taken in range(rounds):
        if taken and time.monotonic() > end:
            break
        for config, call in calls.items():
            samples[config].append(1e3 * _seconds(call, counts[config]))
    return {config: statistics.median(times) for config, times in samples.items()}


def _seconds(call, count) -> float:
    """Seconds a call takes, where `count` of them follow one another."""
    start = time.perf_counter()
    for _ in range(count):
        results = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / count


@jax.jit
def _distance(got, want):
    """Relative L2 distance, in which -inf is a number as others are."""
    got, want = (jnp.where(jnp.isneginf(x), 0, x).astype(jnp.float32) for x in (got, want))
    return jnp.sqrt(jnp.sum((got - want) ** 2) / jnp.maximum(jnp.sum(want**2), 1e-30))


def sample_call(problem: Problem, device) -> Call:
    """A call with random arrays for a kernel: full contexts, the tokens spread evenly, pages in random order.

    The pool is as large as the sequences need, up to a bound: a kernel's time does not depend on what it does not read.
    """
    slot_bytes = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * jnp.dtype(problem.dtype).itemsize
    most_pages = LARGEST_CACHE_BYTES // (slot_bytes * problem.page_size)
    num_pages = max(1, min(problem.seqs * problem.pages_per_seq, most_pages))
    rng = np.random.default_rng(0)
    columns = problem.seqs * problem.pages_per_seq
    pages = np.resize(rng.permutation(num_pages), columns).reshape(problem.seqs, problem.pages_per_seq)
    start = np.linspace(0, problem.tokens, problem.seqs + 1).astype(np.int32)
    length = np.minimum(np.diff(start), problem.capacity)
    sequences = Sequences(
        start=start[:-1],
        length=length,
        context_len=np.full(problem.seqs, problem.capacity),
        pool=np.zeros(problem.seqs),
        page_indices=pages,
    )
    as_int32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    with jax.default_device(device):
        keys = jax.random.split(jax.random.key(0), 3)
        cache = (1, problem.num_kv_heads, num_pages, problem.page_size)
        shapes = (
            (problem.tokens, problem.q_heads, problem.head_dim),
            (*cache, problem.head_dim),
            (*cache, problem.value_dim),
        )
        arrays = [jax.random.normal(k, shape, problem.dtype) for k, shape in zip(keys, shapes, strict=True)]
        call = Call.of(
            *arrays,
            Sequences(*map(as_int32, sequences)),
            jnp.int32(0),
            num_kv_heads=problem.num_kv_heads,
            attention=problem.attention,
        )
    return jax.device_put(call, device)  # and stay there, whatever another thread's default device is
