"""Times a kernel's candidate configurations on the device that will run them.

Inputs are random arrays made for it, never the caller's, and never traced ones: the work happens in a thread of its
own, which knows nothing of the trace, mesh or lowering around the call. A candidate is timed only once its values agree
with the XLA lowering's.
"""

from concurrent import futures
import functools
import statistics
import time
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_prefill.lowering import contract, xla
from paged_prefill.lowering.config import PrefillPageAttentionConfig

BUDGET_SECONDS = 30.0
WARM_UPS = 2
REPEATS = 9
SAMPLE_SECONDS = 0.005  # one sample repeats the call for about this long, so that launching it does not count
LARGEST_CACHE_BYTES = 2**30
# Relative L2 distance from the XLA lowering in the same dtype: rounding stays far below, a wrong mask or page far above.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class Timing(NamedTuple):
    """What came of one candidate: its median milliseconds, or why there are none."""

    config: PrefillPageAttentionConfig
    milliseconds: float | None
    problem: str | None = None


def fastest(timings: list[Timing]) -> Timing | None:
    """The candidate with the least time, or None where none could be timed."""
    return min((t for t in timings if t.milliseconds is not None), key=lambda t: t.milliseconds, default=None)


def time_candidates(name, kernel, problem, device, *, budget_seconds: float = BUDGET_SECONDS) -> list[Timing]:
    """Times kernel.candidate_configs(problem, device), in their order, until the budget (seconds) is spent.

    Candidates that fail, compute wrong values or are not reached carry the reason instead of a time.
    """
    with futures.ThreadPoolExecutor(1, thread_name_prefix="paged_prefill_timing") as worker:
        return worker.submit(_time_candidates, name, kernel, problem, device, budget_seconds).result()


def _time_candidates(name, kernel, problem, device, budget_seconds):
    end = time.monotonic() + budget_seconds
    operands = sample_operands(problem, jax.devices(device.platform)[0])
    expected = _call(xla, problem, xla.heuristic_config(problem, device))(*operands)
    timings = []
    for config in tqdm(kernel.candidate_configs(problem, device), desc=f"timing {name}", leave=False):
        if timings and time.monotonic() > end:
            timings.append(Timing(config, None, f"not reached within {budget_seconds:g} s"))
            continue
        timings.append(_time_one(kernel, problem, config, operands, expected))
        if timings[-1].problem:
            logging.warning("paged_prefill discards %s with %s: %s", name, config.chosen(), timings[-1].problem)
    return timings


def _time_one(kernel, problem, config, operands, expected) -> Timing:
    call = _call(kernel, problem, config)
    try:
        results = jax.block_until_ready(call(*operands))
        distance = max(map(_distance, results, expected))
        if not distance <= TOLERANCE[problem.dtype]:
            return Timing(config, None, f"wrong values, {distance:.2g} away from the XLA lowering's")
        return Timing(config, _median_milliseconds(lambda: call(*operands)))
    except Exception as error:  # whatever a compiler or driver raises, the other candidates go on
        return Timing(config, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _call(kernel, problem, config):
    attend = functools.partial(
        kernel.attend,
        num_kv_heads=problem.num_kv_heads,
        softmax_scale=problem.softmax_scale,
        attn_logits_soft_cap=problem.attn_logits_soft_cap,
        sliding_window=problem.sliding_window,
        config=config,
    )
    return jax.jit(attend)


def _median_milliseconds(call) -> float:
    for _ in range(WARM_UPS):
        jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-9)))
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            results = call()
        jax.block_until_ready(results)
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(samples)


def _distance(got, want) -> float:
    got, want = (np.nan_to_num(np.asarray(x, np.float32), nan=np.inf, neginf=0.0) for x in (got, want))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def sample_operands(problem: contract.Problem, device):
    """Random operands for a kernel: full contexts, the tokens spread evenly, pages in random order.

    The pool is as large as the sequences need, up to a bound: a kernel's time does not depend on what it does not read.
    """
    page_bytes = problem.num_kv_heads * problem.page_size * (problem.head_dim + problem.value_dim) * 4
    num_pages = max(1, min(problem.seqs * problem.pages_per_seq, LARGEST_CACHE_BYTES // page_bytes))
    rng = np.random.default_rng(0)
    columns = problem.seqs * problem.pages_per_seq
    pages = np.resize(rng.permutation(num_pages), columns).reshape(problem.seqs, problem.pages_per_seq)
    start = np.linspace(0, problem.tokens, problem.seqs + 1).astype(np.int32)
    length = np.minimum(np.diff(start), problem.capacity)
    sequences = contract.Sequences(
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
        return *arrays, contract.Sequences(*map(as_int32, sequences)), jnp.int32(0)
