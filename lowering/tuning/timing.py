"""Times a kernel's candidate configurations on the device that will run them.

Inputs are random arrays made for it, never the caller's, and never traced ones: the work happens in threads of its own,
which know nothing of the trace, mesh or lowering around the call. A candidate is timed only once its values agree with
the XLA lowering's. Candidates take turns, so that a chip that slows down slows them all; the fastest meet the heuristic
once more, and must beat it clearly.

What is chosen holds for all calls of the same key (tables.py). So candidates are compared by the kind of pack that each
suits least, and the winner must not lose at either end of the key's buckets.
"""

from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import statistics
import time
from typing import NamedTuple

from absl import logging
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_prefill.lowering.call import Call, Device, Problem, Sequences
from paged_prefill.lowering.choose import XLA
from paged_prefill.lowering.splits import most_keys
from paged_prefill.lowering.tuning import tables
from paged_prefill.primitive.config import PrefillPageAttentionConfig

BUDGET_SECONDS = 30.0
ROUNDS, FINAL_ROUNDS = 5, 15
FINALISTS = 3
WORTH_IT = 0.97  # of the heuristic's time at most, or the difference may be noise
SAMPLE_SECONDS = 0.005  # one sample repeats the function for about this long, so that launching it does not count
CALLS = 4  # in a row in a compiled function, as of a model's layers
# Short calls are repeated so often in the function: the host takes longer to start it than the device for four of them.
TURNS, SHORT_CALL_FLOPS = 8, 2**34
COMPILERS = min(16, os.cpu_count() or 1)
LARGEST_CACHE_BYTES = 2**31
# Relative L2 distance from the XLA lowering in the same dtype: rounding is far below, a wrong mask or page far above.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class Timing(NamedTuple):
    """What came of one candidate: its milliseconds, the mean over kinds of packs, or why there are none."""

    config: PrefillPageAttentionConfig
    milliseconds: float | None
    problem: str | None = None


class Comparison(NamedTuple):
    """What came of all candidates, in their order, the heuristic one first; and the one to use, if any could run.

    `settled` says that the time sufficed for the choice, which is then worth keeping.
    """

    timings: list[Timing]
    chosen: Timing | None
    settled: bool = True


def compare(
    kernel, problem, device, *, budget_seconds: float = BUDGET_SECONDS, turn=contextlib.nullcontext()
) -> Comparison:
    """Times kernel.candidates(problem, device), as many and as often as the budget (seconds) allows.

    Never raises: candidates that fail, compute wrong values or are not reached carry the reason instead of a time.
    `turn` is entered, perhaps several times, whenever the device is in use.
    """
    with futures.ThreadPoolExecutor(1, thread_name_prefix="paged_prefill_timing") as worker:
        try:
            return worker.submit(_compare, kernel, problem, device, budget_seconds, turn).result()
        except Exception as error:  # no memory for the samples, say
            logging.warning("paged_prefill cannot time %s: %s", kernel.name, _in_a_line(error))
            return Comparison([], None, settled=False)


def race(kernel, problem, device, configs, *, turn=contextlib.nullcontext()) -> dict:
    """Milliseconds of configurations, of each kind of pack, without a look at their values: the last round of `compare`."""
    with futures.ThreadPoolExecutor(COMPILERS) as compilers:
        compiled = list(compilers.map(lambda config: _compiled(kernel, problem, device, config), configs))
    with turn:
        packs = sample_packs(problem, jax.devices(device.platform)[0])
        calls = {c: _on_packs(call, packs) for c, call in zip(configs, compiled, strict=True)}
        return _median_milliseconds(calls, FINAL_ROUNDS, np.inf, calls_each(problem, device))


def relative(times, config, to) -> float:
    """The time of `config` over that of `to`, for the kind of pack where that ratio is largest."""
    return max(t / base for t, base in zip(times[config], times[to], strict=True))


def _compare(kernel, problem, device, budget_seconds, turn):
    end, each = time.monotonic() + budget_seconds, calls_each(problem, device)
    candidates = kernel.candidates(problem, device)
    heuristic = candidates[0]
    functions, reasons = _compiled_in_time(kernel, problem, device, candidates, end)
    with turn:
        packs = sample_packs(problem, jax.devices(device.platform)[0])
        calls = _checked(kernel, functions, reasons, packs, TOLERANCE[problem.dtype])
        times = _median_milliseconds(calls, ROUNDS, end, each)
        finalists = dict.fromkeys([heuristic, *sorted(times, key=lambda c: sum(times[c]))[:FINALISTS]])
        final = _median_milliseconds({c: calls[c] for c in finalists if c in calls}, FINAL_ROUNDS, end, each)
    times |= final
    timings = {c: Timing(c, statistics.mean(times[c]) if c in times else None, reasons.get(c)) for c in candidates}
    if not final:
        return Comparison([*timings.values()], None, settled=False)
    if heuristic not in final:
        return Comparison([*timings.values()], timings[min(final, key=lambda c: sum(final[c]))])
    best = min(final, key=lambda c: relative(final, c, heuristic))
    settled = NOT_REACHED not in reasons.values()
    if relative(final, best, heuristic) > WORTH_IT or not _holds(kernel, problem, device, best, turn):
        best = heuristic
    return Comparison([*timings.values()], timings[best], settled or best != heuristic)


NOT_REACHED = "not reached within the budget"


def _compiled_in_time(kernel, problem, device, candidates, end):
    """Functions of a pack for the candidates, with the XLA lowering's under None, and the reasons against others."""
    functions, reasons = {}, {}
    with futures.ThreadPoolExecutor(COMPILERS) as compilers:
        submit = functools.partial(compilers.submit, _compiled)
        reference = submit(XLA, problem, device, XLA.heuristic(problem, device), once=True)
        compiling = {config: submit(kernel, problem, device, config) for config in candidates}
        functions[None] = reference.result()
        for config, future in tqdm(compiling.items(), desc=f"compiling {kernel.name}", leave=False):
            if (len(functions) > 1 or reasons) and time.monotonic() > end:
                future.cancel()
                reasons[config] = NOT_REACHED
                continue
            try:
                functions[config] = future.result()
            except Exception as error:  # whatever a compiler raises, the other candidates go on
                _discard(kernel, config, _in_a_line(error), reasons)
    return functions, reasons


def _checked(kernel, functions, reasons, packs, tolerance):
    """For each candidate that gives right values, its calls, one a pack; adds to the reasons against the others."""
    reference = functions.pop(None)
    expected = [reference(queries[:1], call) for queries, call in packs]
    checked = {}
    for config, function in functions.items():
        calls = _on_packs(function, packs)
        try:
            distance = max(float(_distance(call()[0], want[0])) for call, want in zip(calls, expected, strict=True))
        except Exception as error:  # a driver's, as above
            _discard(kernel, config, _in_a_line(error), reasons)
            continue
        if distance <= tolerance:
            checked[config] = calls
        else:  # NaN included
            _discard(kernel, config, f"wrong values, {distance:.2g} away from the XLA lowering's", reasons)
    return checked


def _holds(kernel, problem, device, best, turn) -> bool:
    """Whether a choice for one problem is no slower than the heuristic at both ends of the key's buckets."""
    for other in ends_of(problem):
        heuristic = kernel.heuristic(other, device)
        there = _resized(kernel, other, device, best)
        if there == heuristic:
            continue
        if kernel.misfit(other, device, there) is not None:
            continue  # the heuristic runs there
        try:
            times = race(kernel, other, device, [heuristic, there], turn=turn)
        except Exception as error:  # no memory for that end's samples, say
            logging.warning("paged_prefill cannot time %s: %s", other, _in_a_line(error))
            return False
        if relative(times, there, heuristic) > 1:
            return False
    return True


def _resized(kernel, problem, device, config):
    """The tile sizes of a configuration, with the splits of another problem."""
    sizes = tables.tile_sizes(config)
    return dataclasses.replace(sizes, num_splits=kernel.num_splits(problem, device, sizes))


def ends_of(problem: Problem) -> list[Problem]:
    """The smallest and the largest problem that share a key with this one, without itself."""
    largest = [tables.bucket(n) for n in (problem.seqs, problem.tokens_per_seq, problem.capacity)]
    ends = []
    for seqs, tokens_per_seq, capacity in ([n // 2 + 1 for n in largest], largest):
        pages = max(1, min(-(-capacity // problem.page_size), largest[2] // problem.page_size))
        sizes = dict(seqs=seqs, tokens=seqs * tokens_per_seq, pages_per_seq=pages, num_pages=seqs * pages)
        ends.append(dataclasses.replace(problem, **sizes))
    alike = [dataclasses.replace(problem, num_pages=end.num_pages) == end for end in ends]
    return [end for end, same in zip(ends, alike) if not same]


def _discard(kernel, config, reason, reasons):
    reasons[config] = reason
    logging.warning("paged_prefill discards %s with %s: %s", kernel.name, config.chosen(), reason)


def _in_a_line(error) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _turns(problem, device) -> int:
    """How often a function goes over its calls. On CPU the host is the device: it waits for nobody."""
    seen = min(problem.tokens, problem.seqs) * most_keys(problem, problem.tokens)  # by one token of each sequence
    flops = 2 * seen * problem.tokens_per_seq * problem.q_heads * (problem.head_dim + problem.value_dim)
    return 1 if device.platform == "cpu" or flops > SHORT_CALL_FLOPS else TURNS


def calls_each(problem: Problem, device: Device) -> int:
    """Calls of the kernel in one of a compiled function."""
    return CALLS * _turns(problem, device)


def _compiled(kernel, problem, device, config, once=False):
    """The compiled function of a pack, placed on the device: calls of the kernel, each with its query, over and over.

    With `once`, one call.
    """
    attend = jax.jit(functools.partial(kernel.attend, config=config, device=device))  # traced once for all calls
    place = jax.sharding.SingleDeviceSharding(jax.devices(device.platform)[0])
    shapes = jax.eval_shape(functools.partial(_random_pack, problem))
    queries, call = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def in_a_row(queries, call):
        return [attend(dataclasses.replace(call, query=query)) for query in queries]

    def in_turns(queries, call):
        def turn(number, _):
            # Pools are 0, which no compiler knows: what did not change would be taken out of the loop.
            sequences = call.sequences
            sequences = sequences._replace(context_len=sequences.context_len + number * sequences.pool)
            return in_a_row(queries, dataclasses.replace(call, sequences=sequences))

        nothing_yet = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(in_a_row, queries, call))
        return lax.fori_loop(0, _turns(problem, device), turn, nothing_yet)

    function, queries = (in_a_row, queries[:1]) if once else (in_turns, queries)
    return jax.jit(function).lower(queries, call).compile()


def _on_packs(function, packs):
    return [functools.partial(function, *pack) for pack in packs]


def _median_milliseconds(calls, rounds, end, calls_each) -> dict[PrefillPageAttentionConfig, tuple[float, ...]]:
    """For each configuration, pack by pack, the median of its samples, one a round, until the time `end`.

    A sample is of a function that makes `calls_each` calls of the kernel; the milliseconds are of one.
    All samples of a pack repeat their function as often: launching and waiting cost each the same.
    """
    each = [(config, pack, call) for config, of_packs in calls.items() for pack, call in enumerate(of_packs)]
    for *_, call in each:
        _seconds(call, 1)  # the first call also loads the code
    once = {(c, pack): _seconds(call, 1) for c, pack, call in each}
    fastest = {pack: min(once[c, p] for c, p in once if p == pack) for _, pack in once}
    samples = {place: [] for place in once}
    for taken in range(rounds):
        if taken and time.monotonic() > end:
            break
        for config, pack, call in each[:: -1 if taken % 2 else 1]:  # to and fro: nobody always follows the same one
            count = max(1, round(SAMPLE_SECONDS / fastest[pack]))
            samples[config, pack].append(1e3 / calls_each * _seconds(call, count))
    return {c: tuple(statistics.median(samples[c, pack]) for pack in range(len(of))) for c, of in calls.items()}


def _seconds(call, count) -> float:
    """Seconds a function takes, where `count` of them follow one another."""
    start = time.perf_counter()
    for _ in range(count):
        results = call()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / count


@jax.jit
def _distance(got, want):
    """Relative L2 distance of out or lse, whichever is more; -inf is a number as others are."""

    def distance(got, want):
        got, want = (jnp.where(jnp.isneginf(x), 0, x).astype(jnp.float32) for x in (got, want))
        return jnp.sqrt(jnp.sum((got - want) ** 2) / jnp.maximum(jnp.sum(want**2), 1e-30))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(distance, got, want))))


def sample_packs(problem: Problem, device) -> list[tuple[list[jax.Array], Call]]:
    """For each kind of pack that a call of this problem may bring, several queries and a call that has the first.

    Random numbers, full contexts, pages in random order. The pool is as large as the sequences need, up to a bound: a
    kernel's time does not depend on what it does not read.
    """
    with jax.default_device(device):
        queries, call = _random_pack(problem)
        kinds = [call.sequences._replace(**_places(length)) for length in _lengths(problem)]
        packs = [(queries, dataclasses.replace(call, sequences=sequences)) for sequences in kinds]
    # They stay there, whatever another thread's default device is; and no call is timed while they are being made.
    return jax.block_until_ready(jax.device_put(packs, device))


def _lengths(problem) -> list[np.ndarray]:
    """Tokens of each sequence, by kinds of packs: spread evenly; and a long chunk beside sequences of one token."""
    even = np.diff(np.linspace(0, problem.tokens, problem.seqs + 1).astype(np.int32))
    kinds = [even]
    if problem.tokens > problem.seqs > 1:
        kinds.append(np.append(problem.tokens - problem.seqs + 1, np.ones(problem.seqs - 1, np.int32)))
    return [np.minimum(length, problem.capacity) for length in kinds]


def _places(length) -> dict:
    start = np.cumsum(np.append(0, length[:-1]))
    return dict(start=jnp.asarray(start, jnp.int32), length=jnp.asarray(length, jnp.int32))


def _random_pack(problem):
    slot_bytes = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * jnp.dtype(problem.dtype).itemsize
    most_pages = LARGEST_CACHE_BYTES // (slot_bytes * problem.page_size)
    columns = problem.seqs * problem.pages_per_seq
    num_pages = max(1, min(columns, most_pages))
    pages = np.resize(np.random.default_rng(0).permutation(num_pages), columns)
    sequences = Sequences(
        **_places(_lengths(problem)[0]),
        context_len=jnp.full(problem.seqs, problem.capacity, jnp.int32),
        pool=jnp.zeros(problem.seqs, jnp.int32),
        page_indices=jnp.asarray(pages.reshape(problem.seqs, problem.pages_per_seq), jnp.int32),
    )
    cache = (1, problem.num_kv_heads, num_pages, problem.page_size)
    shapes = (
        *[(problem.tokens, problem.q_heads, problem.head_dim)] * CALLS,
        (*cache, problem.head_dim),
        (*cache, problem.value_dim),
    )
    keys = jax.random.split(jax.random.key(0), len(shapes))
    *queries, key, value = [jax.random.normal(k, shape, problem.dtype) for k, shape in zip(keys, shapes, strict=True)]
    heads = dict(num_kv_heads=problem.num_kv_heads, attention=problem.attention)
    return queries, Call.of(queries[0], key, value, sequences, jnp.int32(0), **heads)
