"""Times the GPU kernels beside others: python -m paged_prefill.benchmarks.gpu [--cases ...] [--pages ...] [--peers ...]

Prints a row for each case and page size: TFLOP/s of this project's kernels and of peers over the same pages, and the
ratios; with a soft cap, how much longer it takes than without; over caches in 8 bits, microseconds and how many times
shorter than in bfloat16; for `append_to_pages`, microseconds. Peers are FlashInfer's FA3 and FA2 (`fa3`, `fa2`), its
decode kernel in a CUDA graph (`fidecode`), upstream's FA3 by the package flash-attn3-jax (`fa3jax`), and over keys that
lie dense, where all of a context is new, that FA3 (`fa3dense`) and cuDNN by JAX (`cudnndense`).

Every number is the median of several loops of calls that follow one another without a pause, the contenders taking
turns in one process. A jitted function makes 4 calls with 4 queries, as the layers of a model do: so that the host,
which takes about 60 us for a function, does not wait longer than the GPU; and XLA works out the schedule that the calls
share once, as FlashInfer's plan is made once (and not timed). Of single tokens a function makes 32 calls, each with the
output of the one before it as its query, and is given its own result, in the same memory: XLA launches a CUDA graph as
it is only where no array has moved since, as in an engine's step, and else updates each of its nodes for longer than
short calls take. Peers are optional.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, ragged_paged_prefill

# name: sequences, new tokens of each, context of each, q_heads, kv_heads, head_dim, window, soft cap
CASES = {
    "8192@8192": (1, 8192, 8192, 32, 8, 128, None, None),
    "2048@16384": (1, 2048, 16384, 32, 8, 128, None, None),
    "512@8192": (1, 512, 8192, 32, 8, 128, None, None),
    "2048@2048": (1, 2048, 2048, 32, 8, 128, None, None),
    "8x512@4096": (8, 512, 4096, 32, 8, 128, None, None),
    "2048@16384 window 4096": (1, 2048, 16384, 32, 8, 128, 4096, None),
    "2048@16384 d64": (1, 2048, 16384, 32, 8, 64, None, None),
    "2048@16384 d256": (1, 2048, 16384, 16, 8, 256, None, None),
    "128@32768": (1, 128, 32768, 32, 8, 128, None, None),
    "16x1@32768": (16, 1, 32768, 32, 8, 128, None, None),
    "2048@16384 cap 50": (1, 2048, 16384, 32, 8, 128, None, 50.0),
    "8x1@1024": (8, 1, 1024, 32, 8, 128, None, None),
    "1x1@8192": (1, 1, 8192, 32, 8, 128, None, None),
    "4x1@512": (4, 1, 512, 32, 8, 128, None, None),
    "64x1@4096": (64, 1, 4096, 32, 8, 128, None, None),
    "256x1@1024": (256, 1, 1024, 32, 8, 128, None, None),
    "1x1@131072": (1, 1, 131072, 32, 8, 128, None, None),
    "32x4@8192": (32, 4, 8192, 32, 8, 128, None, None),
    "4096@4096": (1, 4096, 4096, 32, 8, 128, None, None),
    "8192@8192 d64": (1, 8192, 8192, 32, 8, 64, None, None),
    "8192@8192 d256": (1, 8192, 8192, 16, 8, 256, None, None),
}
# Over caches in 8 bits with a scale a head, and in bfloat16.
IN_8_BITS = {f"{name} in 8 bits": CASES[name] for name in ("64x1@4096", "16x1@32768", "2048@16384", "8192@8192")}
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
# name: sequences, new tokens of each, context of each; 8 heads of 128, in 8 layers
APPENDS = {"append 2048": (1, 2048, 2048), "append 8": (8, 1, 1024)}
LAYERS = 8
ROUNDS = 8  # that a function goes through them: the host takes longer to launch one than eight appends take
LOOPS, MILLISECONDS = 8, 30.0


def calls_of(case) -> int:
    """Calls of a function: many of few tokens, as many as a model has layers."""
    return 32 if case[1] == 1 else 4


def flops(seqs, chunk, context, q_heads, kv_heads, head_dim, window, soft_cap) -> float:
    """Operations of both products over the keys that rows see."""
    seen = np.arange(context - chunk + 1, context + 1)
    return 4.0 * seqs * q_heads * head_dim * float(np.sum(seen if window is None else np.minimum(seen, window)))


@functools.lru_cache(maxsize=1)
def operands(page_size, seqs, chunk, context, q_heads, kv_heads, head_dim, window, soft_cap):
    """Random packs in bfloat16 over a random permutation of a larger pool: several queries, and the other operands."""
    per_seq = -(-context // page_size)
    num_pages = seqs * per_seq + 8
    keys = jax.random.split(jax.random.key(0), 3)
    cache = (kv_heads, num_pages, page_size, head_dim)
    pages = np.random.default_rng(0).permutation(num_pages)[: seqs * per_seq].reshape(seqs, per_seq)
    query = (seqs * chunk, q_heads, head_dim)
    queries = [jax.random.normal(key, query, jnp.bfloat16) for key in jax.random.split(keys[0], 4)]
    return queries, (
        jax.random.normal(keys[1], cache, jnp.bfloat16),
        jax.random.normal(keys[2], cache, jnp.bfloat16),
        jnp.full(seqs, context, jnp.int32),
        jnp.asarray(pages, jnp.int32),
        jnp.arange(seqs + 1, dtype=jnp.int32) * chunk,
    )


def ours(platform, page_size, case, cfg=None, cache_dtype=None):
    """Calls of this project's kernel, and what waits for their results; over caches quantised to `cache_dtype`, if given."""
    queries, others = operands(page_size, *case)
    if cache_dtype is not None:
        others = tuple((32 * cache).astype(cache_dtype) for cache in others[:2]) + others[2:]
    run = functools.partial(
        ragged_paged_prefill, sliding_window=case[-2], attn_logits_soft_cap=case[-1], platform=platform, cfg=cfg
    )
    scale = jnp.full(case[4], 1 / 32, jnp.float32)
    return layers(run, queries, others, case, {} if cache_dtype is None else dict(key_scale=scale, value_scale=scale))


def layers(run, queries, others, case, scales=None):
    """A function that makes calls as the layers of a model do, and what waits for its results.

    For all that the function knows, calls have `scales` of their own: else a cache would be widened for all of them
    once.
    """
    one, scales = jax.jit(run), scales or {}  # traced once
    if case[1] > 1:
        of_calls = list(zip(queries, [scales] * len(queries)))
        function = jax.jit(lambda of_calls, *others: [one(query, *others, **scales) for query, scales in of_calls])
        return lambda: function(of_calls, *others), jax.block_until_ready

    @functools.partial(jax.jit, donate_argnums=0)
    def step(query, scales, *others):
        for _ in range(calls_of(case)):
            query = one(query, *others, **scales)
        return query

    query = jnp.array(queries[0])  # a copy, to be given away

    def call():
        nonlocal query
        query = step(query, scales, *others)
        return query

    return call, jax.block_until_ready


def fa3jax(page_size, case):
    """Calls of upstream's FA3, which takes its caches as [pages, page_size, kv_heads, head_dim]."""
    from flash_attn3_jax.kvcache import flash_mha_with_kvcache  # pylint: disable=import-outside-toplevel

    seqs, chunk, _, q_heads, _, head_dim, window, _ = case
    queries, (keys, values, contexts, pages, _) = operands(page_size, *case)
    queries = [query.reshape(seqs, chunk, q_heads, head_dim) for query in queries]
    caches = [jnp.moveaxis(cache, 0, 2) for cache in (keys, values)]
    kind = dict(is_causal=True, num_splits=1 if chunk > 64 else 16)

    def run(query, keys, values, contexts, pages):
        sees = (-1, -1) if window is None else (window - 1, 0)
        return flash_mha_with_kvcache(
            query, keys, values, cache_seqlens=contexts, page_table=pages, window_size=sees, **kind
        )

    return layers(run, queries, (*caches, contexts, pages), case)


def dense(attend, page_size, case):
    """Calls of a kernel over keys and values of prompts that lie dense, [seqs, context, heads, head_dim]."""
    seqs, chunk, context, q_heads, kv_heads, head_dim, window, _ = case
    if chunk < context or window is not None:
        raise ValueError("takes whole prompts without a window")
    queries, _ = operands(page_size, *case)
    queries = [query.reshape(seqs, chunk, q_heads, head_dim) for query in queries]
    keys, values = jax.random.normal(jax.random.key(1), (2, seqs, context, kv_heads, head_dim), jnp.bfloat16)
    return layers(attend, queries, (keys, values), case)


def fa3dense(page_size, case):
    """Calls of upstream's FA3."""
    from flash_attn3_jax import flash_mha  # pylint: disable=import-outside-toplevel

    return dense(functools.partial(flash_mha, is_causal=True), page_size, case)


def cudnndense(page_size, case):
    """Calls of cuDNN's kernel."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return dense(attend, page_size, case)


def flashinfer(backend, page_size, case):
    """Calls of FlashInfer's kernel, planned beforehand, and what waits for their results."""
    import flashinfer as fi  # pylint: disable=import-outside-toplevel
    import torch  # pylint: disable=import-outside-toplevel

    seqs, chunk, context, q_heads, kv_heads, head_dim, window, soft_cap = case
    per_seq = -(-context // page_size)
    like = dict(device="cuda", dtype=torch.bfloat16)
    queries = torch.randn(calls_of(case), seqs * chunk, q_heads, head_dim, **like)
    cache = torch.randn(seqs * per_seq + 8, 2, kv_heads, page_size, head_dim, **like)
    ints = dict(device="cuda", dtype=torch.int32)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "HND", backend=backend)
    wrapper.plan(
        torch.arange(seqs + 1, **ints) * chunk,
        torch.arange(seqs + 1, **ints) * per_seq,
        torch.randperm(seqs * per_seq + 8, device="cuda")[: seqs * per_seq].int(),
        torch.full((seqs,), (context - 1) % page_size + 1, **ints),
        q_heads, kv_heads, head_dim, page_size, causal=True, window_left=-1 if window is None else window - 1,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )
    return lambda: [wrapper.run(query, cache) for query in queries], lambda _: torch.cuda.synchronize()


def fidecode(page_size, case):
    """Calls of FlashInfer's decode kernel, planned beforehand, as one CUDA graph; and what waits for their results."""
    import flashinfer as fi  # pylint: disable=import-outside-toplevel
    import torch  # pylint: disable=import-outside-toplevel

    seqs, chunk, context, q_heads, kv_heads, head_dim, window, _ = case
    if chunk > 1:
        raise ValueError("takes single tokens")
    per_seq = -(-context // page_size)
    like = dict(device="cuda", dtype=torch.bfloat16)
    queries = torch.randn(calls_of(case), seqs, q_heads, head_dim, **like)
    outs = torch.empty_like(queries)
    cache = torch.randn(seqs * per_seq + 8, 2, kv_heads, page_size, head_dim, **like)
    ints = dict(device="cuda", dtype=torch.int32)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(seqs + 1, **ints) * per_seq,
        torch.randperm(seqs * per_seq + 8, device="cuda")[: seqs * per_seq].int(),
        torch.full((seqs,), (context - 1) % page_size + 1, **ints),
        q_heads, kv_heads, head_dim, page_size, window_left=-1 if window is None else window - 1,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )

    def run():
        for query, out in zip(queries, outs):
            wrapper.run(query, cache, out=out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # What was planned must outlive the graph.
    return lambda: (graph.replay(), wrapper), lambda _: torch.cuda.synchronize()


@functools.cache
def _workspace():
    import torch  # pylint: disable=import-outside-toplevel

    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def matmul():
    """A product of two 8192 x 8192 bfloat16 matrices: what the chip gives today."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    call = jax.jit(jnp.matmul)
    return lambda: call(a, b), jax.block_until_ready


def median_ms(contenders: dict) -> dict[str, float]:
    """Milliseconds a function call: for each contender the median over loops, the contenders taking turns.

    Every other turn goes backwards, so that none follows the same other, which may have heated the chip, every time.
    """

    def loop(call, wait, count):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / count * 1e3

    counts = {}
    for name, contender in contenders.items():
        loop(*contender, 3)
        counts[name] = max(3, int(MILLISECONDS / loop(*contender, 5)))
    times = {name: [] for name in contenders}
    for turn in range(LOOPS):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            times[name].append(loop(*contenders[name], counts[name]))
    return {name: float(np.median(t)) for name, t in times.items()}


def measure(name, page_size, platforms=("cuda",), peers=("fa3", "fa2")) -> dict:
    """One row of the table: TFLOP/s of every contender that runs, or why it does not."""
    case = CASES[name]
    makers = {platform: functools.partial(ours, platform, page_size, case) for platform in platforms}
    if case[-1] is None:
        own = dict(fidecode=fidecode, fa3jax=fa3jax, fa3dense=fa3dense, cudnndense=cudnndense)
        of_flashinfer = {peer: functools.partial(flashinfer, peer) for peer in peers if peer not in own}
        makers |= {peer: functools.partial((own | of_flashinfer)[peer], page_size, case) for peer in peers}
    else:
        without = (*case[:-1], None)
        for platform in platforms:
            makers[f"{platform} without"] = functools.partial(ours, platform, page_size, without)
    contenders, row = {}, dict(case=name, page_size=page_size)
    for label, make in makers.items():
        try:
            call, wait = contenders[label] = make()
            wait(call())  # compiles
        except Exception as error:  # a kernel that cannot run a case is a row of the table too
            row[label] = f"{type(error).__name__}: {error}"[:200]
            contenders.pop(label, None)
    for label, ms in median_ms(contenders).items():
        ms /= calls_of(case)
        row[f"{label} ms"], row[label] = round(ms, 4), round(flops(*case) / ms / 1e9, 1)
    timed = [label for label in makers if label in contenders]
    pairs = [(own, peer) for own in platforms for peer in peers if own in timed and peer in timed]
    row |= {f"{own} / {peer}": round(row[own] / row[peer], 3) for own, peer in pairs}
    capped = [own for own in platforms if own in timed and f"{own} without" in timed]
    return row | {f"{own}, time / without": round(row[f"{own} ms"] / row[f"{own} without ms"], 3) for own in capped}


def measure_in_8_bits(name, page_size, platforms) -> dict:
    """One row: microseconds of each kernel and cache dtype, or why it does not run; how many times shorter than bfloat16's."""
    contenders, row = {}, dict(case=name, page_size=page_size)
    for platform in platforms:
        for dtype in (None, *QUANTISED):
            label = f"{platform} {dtype or 'bfloat16'}"
            try:
                call, wait = ours(platform, page_size, IN_8_BITS[name], cache_dtype=dtype)
                wait(call())  # compiles
                contenders[label] = call, wait
            except Exception as error:  # a kernel that cannot run a case is a row of the table too
                row[label] = f"{type(error).__name__}: {error}"[:200]
    times = {label: ms / calls_of(IN_8_BITS[name]) * 1e3 for label, ms in median_ms(contenders).items()}
    for label, microseconds in times.items():
        row[f"{label} us"] = round(microseconds, 2)
        plain = times.get(f"{label.split()[0]} bfloat16")
        row[label] = plain and round(plain / microseconds, 3)
    return row


def measure_append(name, page_size) -> dict:
    """One row: microseconds of an append of keys and values, of some that follow one another into donated caches."""
    seqs, chunk, context = APPENDS[name]
    per_seq = -(-context // page_size)
    num_pages = seqs * per_seq + 8
    pages = np.random.default_rng(0).permutation(num_pages)[: seqs * per_seq].reshape(seqs, per_seq)
    pack = (
        jnp.full(seqs, context, jnp.int32),
        jnp.asarray(pages, jnp.int32),
        jnp.arange(seqs + 1, dtype=jnp.int32) * chunk,
    )
    keys = jax.random.split(jax.random.key(0), (LAYERS, 2))
    new = [[jax.random.normal(key, (seqs * chunk, 8, 128), jnp.bfloat16) for key in pair] for pair in keys]
    caches = [jnp.zeros((LAYERS, 8, num_pages, page_size, 128), jnp.bfloat16) for _ in range(2)]

    def write(caches, new):
        for layer, tokens in [*enumerate(new)] * ROUNDS:
            caches = append_to_pages(*caches, *tokens, *pack, layer=jnp.int32(layer))
        return caches

    run = jax.jit(write, donate_argnums=0)

    def call():
        nonlocal caches
        caches = run(caches, new)
        return caches

    ms = median_ms({"ours": (call, jax.block_until_ready)})["ours"]
    return dict(case=name, page_size=page_size, us=round(ms / LAYERS / ROUNDS * 1e3, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join([*CASES, *IN_8_BITS, *APPENDS]))
    parser.add_argument("--pages", default="16,128")
    parser.add_argument("--platforms", default="cuda", help="this project's kernels, by commas: cuda, triton, xla")
    parser.add_argument("--peers", default="fa3,fa2", help="by commas, as above; empty for none")
    arguments = parser.parse_args()
    peers = tuple(filter(None, arguments.peers.split(",")))
    print(json.dumps(dict(jax=jax.__version__, device=jax.devices()[0].device_kind)), flush=True)
    print(json.dumps({"matmul": round(2 * 8192**3 / median_ms({"m": matmul()})["m"] / 1e9, 1)}), flush=True)
    platforms = tuple(arguments.platforms.split(","))
    for page_size in map(int, arguments.pages.split(",")):
        for name in arguments.cases.split(","):
            if name in APPENDS:
                row = measure_append(name, page_size)
            elif name in IN_8_BITS:
                row = measure_in_8_bits(name, page_size, platforms)
            else:
                row = measure(name, page_size, platforms, peers)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
