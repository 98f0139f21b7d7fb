"""One GPU against two, the pages of the caches cut or the heads: python -m paged_prefill.benchmarks.pages_cut.

Prints a row for each case: milliseconds of a call on one GPU, on two with the heads cut, and on two with the pages cut
(medians of loops that take turns in one process), what is how many times as fast, how far the results lie apart, and
the collectives of the program that cuts pages. Cases are decode steps of 4 sequences and a chunk of 512 tokens, over so
many keys in all, with 8 KV heads (which two GPUs can share) and with 1 (of which each holds and reads all).
The last rows time what goes before the kernel where pages are cut: the page tables of 256 sequences with 2048 columns.
"""

import argparse
import functools
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import local_pages, ragged_paged_prefill
from paged_prefill.benchmarks import gpu

KEYS = (2**12, 2**14, 2**16, 2**18, 2**20)
PACKS = {"decode 4": (4, 1), "chunk 512": (1, 512)}  # sequences, new tokens of each
Q_HEADS, HEAD_DIM, PAGE_SIZE = 32, 128, 16
COLLECTIVES = r"(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def operands(keys, seqs, chunk, kv_heads):
    """A random pack in bfloat16; of every sequence each of two devices has half of the pages."""
    columns = keys // seqs // PAGE_SIZE
    num_pages = seqs * columns
    rng = np.random.default_rng(0)
    halves = [rng.permutation(num_pages // 2) + half * (num_pages // 2) for half in range(2)]
    pages = np.stack(halves, axis=-1).reshape(seqs, columns)
    random = [jax.random.key(number) for number in range(3)]
    cache = (kv_heads, num_pages, PAGE_SIZE, HEAD_DIM)
    return (
        jax.random.normal(random[0], (seqs * chunk, Q_HEADS, HEAD_DIM), jnp.bfloat16),
        jax.random.normal(random[1], cache, jnp.bfloat16),
        jax.random.normal(random[2], cache, jnp.bfloat16),
        jnp.full(seqs, keys // seqs, jnp.int32),
        jnp.asarray(pages, jnp.int32),
        jnp.arange(seqs + 1, dtype=jnp.int32) * chunk,
    )


def measure(mesh, name, keys, kv_heads) -> dict:
    """One row of the table."""
    pack = operands(keys, *PACKS[name], kv_heads)
    heads = P("devices") if kv_heads % 2 == 0 else P()
    cuts = {
        "heads": (P(None, "devices"), heads, heads, P(), P(), P()),
        "pages": (P(), P(None, "devices"), P(None, "devices"), P(), P(), P()),
    }
    calls = {"one": pack} | {
        way: [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(pack, specs)]
        for way, specs in cuts.items()
    }
    run = jax.jit(functools.partial(ragged_paged_prefill, return_lse=True))
    collectives = re.findall(COLLECTIVES, run.lower(*calls["pages"]).compile().as_text())
    results = {way: np.asarray(run(*call)[0], np.float32) for way, call in calls.items()}
    apart = {way: float(np.abs(out - results["one"]).max()) for way, out in results.items()}
    ms = gpu.median_ms({way: (functools.partial(run, *call), jax.block_until_ready) for way, call in calls.items()})
    return {
        "case": name, "keys": keys, "KV heads": kv_heads, **{f"{way} ms": round(ms[way], 4) for way in calls},
        "one / pages": round(ms["one"] / ms["pages"], 2), "one / heads": round(ms["one"] / ms["heads"], 2),
        "heads / pages": round(ms["heads"] / ms["pages"], 2), "apart": apart, "collectives": collectives,
    }  # fmt: skip


def measure_tables(mesh, tokens_of_each, seqs=256, columns=2048) -> dict:
    """Milliseconds for what one device makes of the page tables, for decode steps and for chunks."""
    num_pages = seqs * columns
    pages = np.random.default_rng(0).permutation(num_pages).reshape(seqs, columns)
    query = jax.ShapeDtypeStruct((seqs * tokens_of_each, Q_HEADS, HEAD_DIM), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, num_pages // 2, PAGE_SIZE, HEAD_DIM), jnp.bfloat16)
    pack = (
        jnp.full(seqs, columns * PAGE_SIZE, jnp.int32),
        jnp.asarray(pages, jnp.int32),
        jnp.arange(seqs + 1, dtype=jnp.int32) * tokens_of_each,
    )
    local = functools.partial(local_pages, "devices", query, cache)
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("devices"), check_vma=False))
    pack = [jax.device_put(x, NamedSharding(mesh, P())) for x in pack]
    ms = gpu.median_ms({"tables": (functools.partial(mapped, *pack), jax.block_until_ready)})
    return {"case": f"page tables of {seqs} sequences, {columns} columns, {tokens_of_each} new tokens each"} | {
        "ms": round(ms["tables"], 4)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="*", default=KEYS)
    keys = parser.parse_args().keys
    print(json.dumps(dict(jax=jax.__version__, devices=[device.device_kind for device in jax.devices()])), flush=True)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for tokens in (1, 2):
        print(json.dumps(measure_tables(mesh, tokens)), flush=True)
    for kv_heads in (8, 1):
        for name in PACKS:
            for count in keys:
                print(json.dumps(measure(mesh, name, count, kv_heads)), flush=True)


if __name__ == "__main__":
    main()
