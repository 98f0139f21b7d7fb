"""The example's engine with Llama 3 8B's shapes on a GPU: python -m paged_prefill.benchmarks.serve.

Random bfloat16 weights. Prefill of 16k tokens in chunks of 2k, and decode of 1, 32 and 128 sequences at 4k. Prints a
JSON object for each: milliseconds of a step and tokens a second; the same step with the attention written as a gather
and `jax.nn.dot_product_attention`; the shares of attention and append, by a profile of the step and by a step without
them; and, where there are two devices, how many times as fast the heads on two are. Contenders take turns.
"""

import argparse
import collections
import contextlib
import functools
import json
from pathlib import Path
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
DENSE = "gather and dot_product_attention"
OURS = ("paged_prefill", "append_to_pages", "scatter")  # in names of kernels and of what XLA made them from


def llama_3_8b(layers: int = 32) -> Config:
    rotary = frequencies(dict(rope_theta=500_000.0), head_dim=128, max_positions=8192)
    return Config(
        family="llama", vocabulary=128_256, width=4096, q_heads=32, layers=(Layer(8, 128, *rotary),) * layers,
        softmax_scale=128**-0.5, norm_eps=1e-5, max_positions=2**20,
    )  # fmt: skip


def random_model(config: Config) -> checkpoint.Model:
    """Weights made on the device."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
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


def batch_of(run: runner.Runner, config: Config, *, seqs: int, new: int, context: int, num_pages: int) -> runner.Batch:
    """`seqs` sequences of `context` tokens, the last `new` of them in this step; pages are shared where too few."""
    columns = -(-context // PAGE_SIZE)
    rng = np.random.default_rng(0)
    batch = runner.empty_batch(run.replicas, seqs * new, seqs, columns, 1, config.vocabulary)
    batch.tokens[:] = rng.integers(0, config.vocabulary, batch.tokens.shape)
    batch.positions[:] = np.tile(np.arange(context - new, context), seqs)
    batch.context_lens[:] = context
    batch.page_indices[:] = (rng.permutation(seqs * columns) % num_pages).reshape(seqs, columns)
    batch.query_offsets[:] = np.arange(seqs + 1) * new
    batch.rows[:, :, 0] = np.arange(1, seqs + 1) * new - 1
    return batch


class Contender:
    """A step, compiled with `changes` of the model's functions."""

    def __init__(self, run: runner.Runner, batch: runner.Batch, **changes):
        self.run, self.batch = run, run.placed(batch)
        with contextlib.ExitStack() as stack:
            for name, change in changes.items():
                stack.enter_context(mock.patch.object(model_lib, name, change))
            stack.enter_context(run.contexts())
            jax.clear_caches()  # a trace knows nothing of the changes
            arguments = run.config, run.mesh, run.weights, run.caches, self.batch
            self.step = runner.next_tokens.lower(*arguments).compile()

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


def profiled(contender: Contender, steps: int = 5) -> dict:
    """Where a step's time on the device goes: the share of kernels of ours, and the longest kernels by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                contender()
        [file] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        spent = collections.Counter()
        for plane in planes:
            if plane.name.startswith("/device:GPU:0"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            said = f"{event.name} {dict(event.stats).get('name', '')}"
                            spent[said] += event.duration_ns / 1e6 / steps
    total = sum(spent.values()) or 1.0
    ours = sum(ms for name, ms in spent.items() if any(word in name for word in OURS))
    longest = {name[:160]: round(ms, 3) for name, ms in spent.most_common(15)}
    return {"device ms": round(total, 3), "share of ours by name": round(ours / total, 3), "longest": longest}


def contenders_of(runs: dict[str, runner.Runner], config: Config, case: dict, num_pages: int) -> dict[str, Contender]:
    """A step as it is, on two devices, without its parts, and with a dense attention if that fits into memory."""
    one = runs["one"]
    batches = {name: batch_of(run, config, num_pages=num_pages, **case) for name, run in runs.items()}
    found = {"paged_prefill": Contender(one, batches["one"])}
    if "two" in runs:
        found["two devices"] = Contender(runs["two"], batches["two"])
    found["no attention"] = Contender(one, batches["one"], ragged_paged_prefill=lambda query, *_, **__: query)
    found["no append"] = Contender(one, batches["one"], append_to_pages=lambda key, value, *_, **__: (key, value))
    try:
        dense = Contender(one, batches["one"], ragged_paged_prefill=dense_attention)
        dense()
        found[DENSE] = dense
    except jax.errors.JaxRuntimeError as error:
        one.caches = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one.caches)  # they had been donated
        print(json.dumps({"failed": DENSE, "why": str(error)[:300]}), flush=True)
    return found


def measure(runs: dict[str, runner.Runner], config: Config, case: dict, num_pages: int, times: int) -> dict:
    """One line."""
    contenders = contenders_of(runs, config, case, num_pages)
    ms = medians(contenders, times)
    tokens, whole = case["seqs"] * case["new"], ms["paged_prefill"]
    line = case | {"ms": ms, "tokens a second": {name: round(1e3 * tokens / own) for name, own in ms.items()}}
    line |= {f"share of {what}": round(1 - ms[f"no {what}"] / whole, 3) for what in ("attention", "append")}
    return line | profiled(contenders["paged_prefill"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, to see that it runs")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--gigabytes", type=float, default=40.0, help="for all caches on a device (%(default)s)")
    options = parser.parse_args()
    config = checkpoint.tiny_config() if options.tiny else llama_3_8b(options.layers)
    shrink = 64 if options.tiny else 1
    model = random_model(config)
    layer = config.layers[0]
    of_a_page = len(config.layers) * layer.kv_heads * PAGE_SIZE * layer.head_dim * 2 * 2
    wanted = max(128 * 4096, 16_384) // PAGE_SIZE // shrink
    share = 1.5 if len(jax.devices()) > 1 else 1.0  # the first of two devices has half of the other cache too
    num_pages = min(wanted, int(options.gigabytes * 1e9 / share / of_a_page)) // 2 * 2
    new_runner = functools.partial(runner.Runner, num_pages=num_pages, page_size=PAGE_SIZE, policy=None)
    runs = {"one": new_runner(model)}
    if len(jax.devices()) > 1:
        runs["two"] = new_runner(model, mesh=runner.make_mesh(dict(heads=2)))
    devices = [device.device_kind for device in jax.devices()]
    print(json.dumps(dict(jax=jax.__version__, devices=devices, pages=num_pages, pages_wanted=wanted)), flush=True)
    prefill = [dict(seqs=1, new=2048 // shrink, context=2048 * (i + 1) // shrink) for i in range(8)]
    decode = [dict(seqs=seqs, new=1, context=4096 // shrink) for seqs in (1, 32, 128)]
    lines = []
    for case in [*decode, *prefill]:
        lines.append(measure(runs, config, case, num_pages, options.times))
        print(json.dumps(lines[-1]), flush=True)
    chunks = lines[len(decode) :]
    names = set.intersection(*({*line["ms"]} for line in chunks))
    rates = {name: round(1e3 * 16_384 / shrink / sum(line["ms"][name] for line in chunks)) for name in sorted(names)}
    print(json.dumps({"prefill of all chunks, tokens a second": rates}))


if __name__ == "__main__":
    main()
