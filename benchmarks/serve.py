"""The example's engine with Llama 3 8B's shapes on a GPU: python -m paged_prefill.benchmarks.serve.

Random bfloat16 weights. Prefill of 16k tokens in chunks of 2k, and decode of 1, 32 and 128 sequences at 4k. Prints a
JSON object for each: milliseconds of a step and tokens a second; the same step with the attention written as a gather
and `jax.nn.dot_product_attention`; the shares of attention and append, by a profile of the step and by a step without
them; and, where there are two devices, how many times as fast the heads on two are. Contenders take turns.
"""

import argparse
import collections
from concurrent import futures
import contextlib
from dataclasses import dataclass
import functools
import json
from pathlib import Path
import re
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.examples.serve import checkpoint, model as model_lib, runner
from paged_prefill.examples.serve.config import Config, Layer, frequencies

PAGE_SIZE = 16
OURS, TWO, DENSE = "paged_prefill", "two devices", "gather and dot_product_attention"
# What is in the names of their kernels, or of the operations that XLA made the kernels from.
PARTS = dict(attention=("paged_prefill",), append=("append_to_pages", "append_tokens"))


def llama_3_8b(layers: int = 32) -> Config:
    rotary = frequencies(dict(rope_theta=500_000.0), head_dim=128, max_positions=8192)
    return Config(
        family="llama", vocabulary=128_256, width=4096, q_heads=32, layers=(Layer(8, 128, *rotary),) * layers,
        softmax_scale=128**-0.5, norm_eps=1e-5, max_positions=2**20,
    )  # fmt: skip


def random_model(config: Config) -> checkpoint.Model:
    """Weights made on the device; by a generator that needs no more memory than they do."""
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 16))
    normal = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    return checkpoint.seeded(config, lambda shape: normal(next(keys), shape))


def dense_attention(query, key_cache, value_cache, context_lens, page_indices, query_offsets, *, layer, **parameters):
    """What one writes without a kernel: all pages gathered, then `jax.nn.dot_product_attention`.

    Every sequence has as many new tokens as the others.
    """
    seqs = context_lens.shape[0]
    rows = query.reshape(seqs, -1, *query.shape[1:])

    def gathered(cache):  # [seqs, keys, kv_heads, features]
        pages = cache[layer][:, page_indices]
        return jnp.moveaxis(pages.reshape(pages.shape[0], seqs, -1, cache.shape[-1]), 0, 2)

    position = context_lens[:, None] - rows.shape[1] + jnp.arange(rows.shape[1])[None]
    keys = jnp.arange(page_indices.shape[1] * cache_page_size(key_cache))
    mask = keys[None, None] <= position[:, :, None]
    out = jax.nn.dot_product_attention(
        rows, gathered(key_cache), gathered(value_cache), mask=mask[:, None], scale=parameters["softmax_scale"]
    )
    return out.reshape(query.shape)


def cache_page_size(cache) -> int:
    return cache.shape[-2]


def batch_of(run: runner.Runner, config: Config, case: dict, columns: int, num_pages: int) -> runner.Batch:
    """`seqs` sequences of `context` tokens, the last `new` of them in this step; pages are shared where too few."""
    seqs, new, context = case["seqs"], case["new"], case["context"]
    rng = np.random.default_rng(0)
    batch = runner.empty_batch(run.replicas, seqs * new, seqs, columns, 1, config.vocabulary)
    batch.tokens[:] = rng.integers(0, config.vocabulary, batch.tokens.shape)
    batch.positions[:] = np.tile(np.arange(context - new, context), seqs)
    batch.context_lens[:] = context
    batch.page_indices[:] = (rng.permutation(seqs * columns) % num_pages).reshape(seqs, columns)
    batch.query_offsets[:] = np.arange(seqs + 1) * new
    batch.rows[:, :, 0] = np.arange(1, seqs + 1) * new - 1
    return run.placed(batch)


def lowered(run: runner.Runner, batch: runner.Batch, changes: dict):
    """A step of such a batch, with `changes` of the model's functions."""
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(mock.patch.object(model_lib, name, change))
        stack.enter_context(run.contexts())
        jax.clear_caches()  # a trace knows nothing of the changes
        return runner.next_tokens.lower(run.config, run.mesh, run.weights, run.caches, batch)


@dataclass
class Contender:
    """A compiled step, and what it is given."""

    run: runner.Runner
    batch: runner.Batch
    step: jax.stages.Compiled

    def __call__(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        tokens, self.run.caches = self.step(self.run.weights, self.run.caches, self.batch)
        tokens.block_until_ready()
        return time.perf_counter() - began


def medians(contenders: dict, times: int) -> dict:
    """Milliseconds of each, in turns; the first turn does not count."""
    seconds = collections.defaultdict(list)
    for _ in range(times + 1):
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return {name: round(1e3 * statistics.median(own[1:]), 3) for name, own in seconds.items()}


# A contender's functions in place of the model's; "no attention" and "no append" show what a step takes without them.
CHANGES = {
    "no attention": dict(ragged_paged_prefill=lambda query, *_, **__: query),
    "no append": dict(append_to_pages=lambda key, value, *_, **__: (key, value)),
    DENSE: dict(ragged_paged_prefill=dense_attention),
}


def part_of(name: str) -> str:
    """The part of a step that a kernel or an operation belongs to, by its name."""
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")


def parts_of(text: str) -> dict[str, str]:
    """The parts of a compiled program's kernels, by the names that XLA gives them."""
    named = re.findall(r"%([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", text)
    return {re.sub("[.-]", "_", name): part_of(operation) for name, operation in named}


def profiled(contender: Contender, steps: int = 3) -> dict:
    """Where a step's time on the first device goes: the share of each part of ours, and the longest kernels by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                contender()
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    spent = collections.Counter()
    for plane in planes:
        if plane.name.startswith("/device:GPU:0"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name] += event.duration_ns / 1e6 / steps
    parts = parts_of(contender.step.as_text())
    shares = collections.Counter()
    for name, ms in spent.items():
        shares[parts.get(name, part_of(name))] += ms
    total = sum(spent.values()) or 1.0
    return {
        "device ms": round(total, 3), "shares": {part: round(ms / total, 3) for part, ms in shares.items()},
        "longest": {name[:60]: [round(ms, 3), parts.get(name)] for name, ms in spent.most_common(12)},
    }  # fmt: skip


def contenders_of(names, runs: dict[str, runner.Runner], config: Config, cases, num_pages: int) -> list[dict]:
    """For each case the contenders by name; XLA compiles all side by side.

    The chunks of a prompt have one program, for the longest context, as in an engine; the dense attention, which reads
    as much as its page table is wide, has one for each chunk.
    """
    programs, found = {}, []
    for case in cases:
        alike = [other for other in cases if other["seqs"] == case["seqs"] and other["new"] == case["new"]]
        longest = max(other["context"] for other in alike)
        found.append({})
        for name in names:
            run = runs["two" if name == TWO else "one"]
            columns = -(-(case["context"] if name == DENSE else longest) // PAGE_SIZE)
            batch = batch_of(run, config, case, columns, num_pages)
            key = name, case["seqs"], case["new"], columns
            if key not in programs:
                programs[key] = lowered(run, batch, CHANGES.get(name, {}))
            found[-1][name] = key, run, batch
    with futures.ThreadPoolExecutor() as pool:
        steps = dict(zip(programs, pool.map(lambda program: program.compile(), programs.values())))
    return [
        {name: Contender(run, batch, steps[key]) for name, (key, run, batch) in of_case.items()} for of_case in found
    ]


def runs_at_all(contender: Contender, name: str) -> bool:
    """Whether it fits into memory, and a line that says why not."""
    try:
        contender()
        return True
    except jax.errors.JaxRuntimeError as error:
        run = contender.run
        run.caches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.caches)  # they had been donated
        print(json.dumps({"failed": name, "why": str(error)[:300]}), flush=True)
        return False


def measure(contenders: dict[str, Contender], case: dict, times: int) -> dict:
    """One line."""
    contenders = {name: each for name, each in contenders.items() if name != DENSE or runs_at_all(each, name)}
    ms = medians(contenders, times)
    tokens, whole = case["seqs"] * case["new"], ms[OURS]
    line = case | {"ms": ms, "tokens a second": {name: round(1e3 * tokens / own) for name, own in ms.items()}}
    line["times as long as ours"] = {name: round(own / whole, 2) for name, own in ms.items()}
    return line | profiled(contenders[OURS])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, to see that it runs")
    parser.add_argument("--cases", choices=("all", "decode", "prefill"), default="all")
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--gigabytes", type=float, default=32.0, help="for all caches on a device (%(default)s)")
    parser.add_argument("--contenders", help=f"by commas; all by default: {', '.join((OURS, TWO, *CHANGES))}")
    options = parser.parse_args()
    config = checkpoint.tiny_config() if options.tiny else llama_3_8b(options.layers)
    names = options.contenders.split(",") if options.contenders else [OURS, TWO, *CHANGES]
    if len(jax.devices()) == 1 and TWO in names:
        names.remove(TWO)
    shrink = 64 if options.tiny else 1
    model = random_model(config)
    layer = config.layers[0]
    of_a_page = len(config.layers) * layer.kv_heads * PAGE_SIZE * layer.head_dim * 2 * 2
    wanted = max(128 * 4096, 16_384) // PAGE_SIZE // shrink
    share = 1.5 if TWO in names else 1.0  # the first of two devices has half of the other cache too
    num_pages = min(wanted, int(options.gigabytes * 1e9 / share / of_a_page)) // 2 * 2
    new_runner = functools.partial(runner.Runner, num_pages=num_pages, page_size=PAGE_SIZE, policy=None)
    runs = {"one": new_runner(model)}
    if TWO in names:
        runs["two"] = new_runner(model, mesh=runner.make_mesh(dict(heads=2)))
    devices = [device.device_kind for device in jax.devices()]
    print(json.dumps(dict(jax=jax.__version__, devices=devices, pages=num_pages, pages_wanted=wanted)), flush=True)
    groups = {
        "decode": [dict(seqs=seqs, new=1, context=4096 // shrink) for seqs in (1, 32, 128)],
        "prefill": [dict(seqs=1, new=2048 // shrink, context=2048 * (i + 1) // shrink) for i in range(8)],
    }
    for group in groups if options.cases == "all" else [options.cases]:
        cases, lines = groups[group], []
        for case, contenders in zip(cases, contenders_of(names, runs, config, cases, num_pages)):
            lines.append(measure(contenders, case, options.times))
            print(json.dumps(lines[-1]), flush=True)
        if group == "prefill":
            whole = [name for name in names if all(name in line["ms"] for line in lines)]
            rates = {name: round(1e3 * 16_384 / shrink / sum(line["ms"][name] for line in lines)) for name in whole}
            print(json.dumps({"prefill of all chunks, tokens a second": rates}))


if __name__ == "__main__":
    main()
