"""Several GPUs of one host beside one, by automatic sharding: python -m paged_prefill.benchmarks.many_gpus

Prints a JSON object for each case: milliseconds of a layer on one GPU, and on N of them with the heads cut, the pages,
a batch of packs, or two of these; how many times as fast that is; what each program exchanges; how far results lie
from one GPU's, and whether the bits are the same under the policy "invariant". Layers follow one another as in a model,
each with the output of the one before it in its query, over caches of their own as far as memory goes. A "step" also
writes the new tokens, into donated caches. Contenders take turns in one process; times are medians of loops.

A case is [PACKS*][SEQSx]NEW@CONTEXT[/KV_HEADS]: so many packs over one pool, of so many sequences with so many new
tokens each, and their contexts. There are 64 query heads of 128, as in Llama 3 70B, over 8 KV heads unless it says so.
"""

import argparse
import collections
from concurrent import futures
from dataclasses import dataclass
import functools
import json
import math
import re
import time

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill import append_to_pages, local_pages, ragged_paged_prefill
from paged_prefill.benchmarks import gpu
from paged_prefill.lowering import tuning

CASES = (
    "4096@32768", "128x1@8192", "4x1@1048576", "512@1048576", "step 128x1@8192", "8*2048@8192", "8192@8192",
)  # fmt: skip
SWEEP = (2**14, 2**16, 2**18, 2**12)  # contexts, beside 2^20 above, for where pages win
SWEPT = tuple(f"{new}@{context}/{heads}" for context in SWEEP for heads in (8, 1) for new in ("4x1", "512"))
LONGEST = ("4x1@1048576/1", "512@1048576/1")
Q_HEADS, HEAD_DIM, PAGE_SIZE = 64, 128, 16
RANDOM_PAGES = 1021  # caches repeat them: random numbers for all take several times a cache's memory
MOST_LAYERS, FUNCTION_MS = 32, 20.0
BYTES_OF_A_MS, FLOPS_OF_A_MS = 3e9, 6e11  # of one GPU, about
COLLECTIVES = r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@dataclass(frozen=True)
class Case:
    """One shape, and whether its layers append."""

    name: str
    packs: int
    seqs: int
    new: int
    context: int
    kv_heads: int

    @classmethod
    def parse(cls, name: str) -> "Case":
        found = re.fullmatch(r"(?:step )?(?:(\d+)\*)?(?:(\d+)x)?(\d+)@(\d+)(?:/(\d+))?", name)
        if found is None:
            raise ValueError(f"a case is [step ][PACKS*][SEQSx]NEW@CONTEXT[/KV_HEADS], got {name!r}")
        packs, seqs, new, context, kv_heads = (int(text) if text else None for text in found.groups())
        return cls(name, packs or 1, seqs or 1, new, context, kv_heads or 8)

    @property
    def appends(self) -> bool:
        return self.name.startswith("step ")

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading dimensions of a call."""
        return () if self.packs == 1 else (self.packs,)

    @property
    def cache_bytes(self) -> int:
        """Of both caches of a layer."""
        return 2 * 2 * self.kv_heads * self.packs * self.seqs * self.context * HEAD_DIM

    @property
    def layers(self) -> int:
        """How many follow one another in a function: enough for the host not to be waited for."""
        seen = np.arange(self.context - self.new + 1, self.context + 1)
        flops = 4.0 * self.packs * self.seqs * Q_HEADS * HEAD_DIM * float(seen.sum())
        ms = max(self.cache_bytes / BYTES_OF_A_MS, flops / FLOPS_OF_A_MS)
        return int(np.clip(FUNCTION_MS / ms, 1, MOST_LAYERS))

    def stack(self, gigabytes: float) -> int:
        """How many layers have caches of their own."""
        return int(np.clip(gigabytes * 1e9 / self.cache_bytes, 1, self.layers))

    def cuts(self, counts) -> list[dict[str, int]]:
        """Mesh axes and their sizes: one of them over each number of devices, and two."""
        axes = ["heads", "pages"] if self.packs == 1 else ["batch", "heads"]
        pairs = [dict(zip(axes, (2, n // 2))) for n in counts if n > 2 and n % 2 == 0]
        return [{axis: n} for n in counts for axis in axes] + pairs


def random_call(case: Case, parts: int):
    """A random call in bfloat16 on one device, with the pages that its caches repeat.

    The columns of a sequence lie in turn in each of `parts` equal parts of the pool.
    """
    columns, rows = case.context // PAGE_SIZE, case.packs * case.seqs
    if columns % parts:
        raise ValueError(f"{case.name}: pages of {PAGE_SIZE} must divide into {parts} parts, got {columns} pages")
    size = rows * columns // parts
    rng = np.random.default_rng(0)
    of_part = [rng.permutation(size) + part * size for part in range(parts)]
    tokens, keys = (*case.batch, case.seqs * case.new), jax.random.split(jax.random.key(0), 5)
    normal = lambda number, *shape: jax.random.normal(keys[number], shape, jnp.bfloat16)
    pack = (
        np.full((*case.batch, case.seqs), case.context),
        np.stack(of_part, axis=-1).reshape(*case.batch, case.seqs, columns),
        np.broadcast_to(np.arange(case.seqs + 1) * case.new, (*case.batch, case.seqs + 1)),
    )
    return dict(
        query=normal(0, *tokens, Q_HEADS, HEAD_DIM),
        new=[normal(number, *tokens, case.kv_heads, HEAD_DIM) for number in (1, 2)],
        pack=[np.asarray(indices, np.int32) for indices in pack],
    ), [normal(number, case.kv_heads, RANDOM_PAGES, PAGE_SIZE, HEAD_DIM) for number in (3, 4)]


def caches_of(case: Case, stack: int, pages, shardings):
    """Both caches [stack, kv_heads, num_pages, page_size, head_dim], each layer's pages in another order."""
    num_pages = case.packs * case.seqs * case.context // PAGE_SIZE
    order = (np.arange(num_pages) + 13 * np.arange(stack)[:, None]) % RANDOM_PAGES
    whole = NamedSharding(shardings[0].mesh, P())
    repeat = jax.jit(jax.vmap(lambda pages, order: pages[:, order], in_axes=(None, 0)), out_shardings=shardings[0])
    return [repeat(*jax.device_put((each, order.astype(np.int32)), whole)) for each in pages]


def placed(case: Case, sizes: dict[str, int]):
    """Shardings of a call's arrays over the first devices, for mesh axes and their sizes."""
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )  # fmt: skip
    batch, heads, pages = (axis if axis in sizes else None for axis in ("batch", "heads", "pages"))
    kv_heads = heads if case.kv_heads % sizes.get("heads", 1) == 0 else None
    of_pack = [batch] if case.batch else []
    one_pool = [None] if case.batch and case.appends else of_pack  # all packs write to it, on each device
    cache, tokens = P(None, kv_heads, pages), P(*one_pool, None, kv_heads)
    specs = dict(
        caches=[cache] * 2, query=P(*of_pack, None, heads), new=[tokens] * 2, pack=[P(*of_pack)] * 3
    )  # fmt: skip
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def layers(case: Case, count: int, stack: int):
    """The function that is timed: layers whose queries hold the outputs before them."""

    def run(caches, query, new, pack):
        def layer(carry, number):
            query, caches = carry
            if case.appends:
                caches = append_to_pages(*caches, *new, *pack, layer=number % stack)
            return (query + ragged_paged_prefill(query, *caches, *pack, layer=number % stack), list(caches)), None

        (query, caches), _ = lax.scan(layer, (query, caches), jnp.arange(count, dtype=jnp.int32))
        return query, caches

    return run


def lowered(case: Case, count: int, stack: int, arrays):
    shardings = arrays["query"].sharding, [cache.sharding for cache in arrays["caches"]]
    return jax.jit(layers(case, count, stack), donate_argnames="caches", out_shardings=shardings).lower(**arrays)


class Contender:
    """One way to run a case: its arrays, and its programs by policy."""

    def __init__(self, case: Case, stack: int, call, pages, sizes: dict[str, int], bits: bool):
        shardings = placed(case, sizes)
        self.arrays = {name: jax.device_put(arrays, shardings[name]) for name, arrays in call.items()}
        self.arrays["caches"] = caches_of(case, stack, pages, shardings["caches"])
        self.programs = {"fast": lowered(case, case.layers, stack, self.arrays)}
        if bits and "pages" not in sizes:
            with tuning.policy("invariant"):
                self.programs["invariant"] = lowered(case, 1, stack, self.arrays)

    def run(self, program: str = "fast"):
        """The last layer's query; the caches are donated, and taken back."""
        query, self.arrays["caches"] = self.programs[program](**self.arrays)
        return query

    def collectives(self) -> list[str]:
        """Of a layer: what each is, and of which shapes."""
        found = re.findall(COLLECTIVES, self.programs["fast"].as_text())
        return [f"{what} {re.sub(r'{[^}]*}', '', shapes)}" for shapes, what in found]


def contenders_of(case: Case, counts, gigabytes: float, bits: bool) -> dict[str, Contender]:
    """One device, and every cut; XLA compiles all programs side by side."""
    ways = {"one": dict(heads=1)} | {
        " x ".join(f"{axis} {size}" for axis, size in cut.items()): cut for cut in case.cuts(counts)
    }
    call, pages = random_call(case, math.lcm(*counts))
    own = {name: Contender(case, case.stack(gigabytes), call, pages, sizes, bits) for name, sizes in ways.items()}
    programs = [(each.programs, policy) for each in own.values() for policy in each.programs]
    with futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda at: at[0][at[1]].compile(), programs)
        for (of_contender, policy), program in zip(programs, compiled):
            of_contender[policy] = program
    return own


def measure(case: Case, counts, gigabytes: float, bits: bool) -> dict:
    """One line; `bits` says whether to compare them under the policy "invariant"."""
    began = time.perf_counter()
    own = contenders_of(case, counts, gigabytes, bits)

    def results(policy):
        return {name: np.asarray(each.run(policy), np.float32) for name, each in own.items() if policy in each.programs}

    out, invariant = results("fast"), results("invariant")
    ready = time.perf_counter()
    ms = gpu.median_ms({name: (contender.run, jax.block_until_ready) for name, contender in own.items()})
    cuts = [name for name in own if name != "one"]
    same = {name: bool(np.array_equal(own, invariant["one"])) for name, own in invariant.items() if name != "one"}
    temporary = {name: each.programs["fast"].memory_analysis().temp_size_in_bytes for name, each in own.items()}
    return {
        "case": case.name, "layers": case.layers, "layers with caches of their own": case.stack(gigabytes),
        "ms": {name: round(each / case.layers, 4) for name, each in ms.items()},
        "times one": {name: round(ms["one"] / ms[name], 2) for name in cuts},
        "same bits under invariant": same,
        "apart": {name: round(float(np.abs(out[name] - out["one"]).max()), 5) for name in cuts},
        "collectives": {name: own[name].collectives() for name in cuts},
        "temporaries MB": {name: round(size / 1e6, 1) for name, size in temporary.items()},
        "cache MB of a layer": round(case.cache_bytes / 1e6, 1),
        "seconds": [round(ready - began, 1), round(time.perf_counter() - ready, 1)],
    }  # fmt: skip


def measure_tables(count: int, new: int, seqs: int = 256, columns: int = 2048) -> dict:
    """What goes before the kernel where pages are cut: milliseconds that a device takes for the page tables."""
    num_pages = seqs * columns
    pages = np.random.default_rng(0).permutation(num_pages).reshape(seqs, columns).astype(np.int32)
    query = jax.ShapeDtypeStruct((seqs * new, Q_HEADS, HEAD_DIM), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((8, num_pages // count, PAGE_SIZE, HEAD_DIM), jnp.bfloat16)
    mesh = jax.make_mesh((count,), ("pages",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    pack = np.full(seqs, columns * PAGE_SIZE, np.int32), pages, np.arange(seqs + 1, dtype=np.int32) * new

    def tables(*pack):  # as many as layers
        def layer(pages, _):
            return pages ^ local_pages("pages", query, cache, pack[0], pages, pack[2])["page_indices"].sum() % 2, None

        return lax.scan(layer, pack[1], None, length=MOST_LAYERS)[0]

    mapped = jax.jit(jax.shard_map(tables, mesh=mesh, in_specs=P(), out_specs=P("pages"), check_vma=False))
    arrays = [jax.device_put(x, NamedSharding(mesh, P())) for x in pack]
    ms = gpu.median_ms({"tables": (functools.partial(mapped, *arrays), jax.block_until_ready)})["tables"]
    return {"page tables": f"{seqs} x {new}, {columns} columns, {count} devices", "ms": round(ms / MOST_LAYERS, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", help="numbers of them, by commas: by default 2 and all")
    parser.add_argument("--cases", default=",".join((*CASES, *LONGEST, *SWEPT)), help="by commas")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of caches of a case, unless a layer has more")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no case is begun")
    arguments = parser.parse_args()
    counts = sorted({2, len(jax.devices())})
    if arguments.devices:
        counts = [int(text) for text in arguments.devices.split(",")]
    ends = time.monotonic() + arguments.seconds
    cases = [Case.parse(name) for name in arguments.cases.split(",")]
    print(json.dumps(dict(jax=jax.__version__, devices=[each.device_kind for each in jax.devices()])), flush=True)
    left = collections.deque(cases)
    while left and time.monotonic() < ends:
        case = left.popleft()
        try:
            row = measure(case, counts, arguments.gigabytes, bits=case.name in CASES)
        except Exception as error:  # what does not run is a row too
            row = {"case": case.name, "failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(row), flush=True)
    print(json.dumps({"not begun": [case.name for case in left]}), flush=True)
    if not left:
        for count in counts:
            for new in (1, 2):
                print(json.dumps(measure_tables(count, new)), flush=True)


if __name__ == "__main__":
    main()
