"""Times caches as others lay them beside this project's own: python -m paged_prefill.benchmarks.layouts [--pages ...]

Prints a row for each case and page size: milliseconds of a call for each layout, and how many times as fast as "kpsd"
it is; and the same of ejKernel's `unified_attention` over the arrays that are laid out as "pskd", by its defaults and
as EasyDeL calls it, where the package is installed. Caches are laid out before; the contenders take turns in one
process (gpu.py says how they are timed).
"""

import argparse
import functools
import itertools
import json

import jax
import jax.numpy as jnp

from paged_prefill import ragged_paged_prefill
from paged_prefill.benchmarks import gpu
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.quantised import quantised

CASES = ("2048@16384", "64x1@4096")
SCALE = 1 / 32  # of all numbers of quantised caches


def laid(key_cache, value_cache, name) -> tuple:
    """Caches of this project's order as a layout has them."""
    both = jnp.stack([key_cache, value_cache])
    order = dict(pskd="2psk", pksd="2pks", p2ksd="p2ks", p2skd="p2sk").get(name, "psk2" if "(" in name else "2kps")
    moved = both.transpose(*("2kps".index(letter) for letter in order), 4)
    if name == "ps(k2)d":
        moved = moved.reshape(*moved.shape[:2], -1, moved.shape[-1])
    return (moved, None) if LAYOUTS[name].combined else (moved[0], moved[1])


def contender(name, page_size, case, platform, cache_dtype=None, granularity=None):
    """Calls of this project's kernel over caches in a layout, quantised or not, and what waits for their results."""
    queries, (key_cache, value_cache, *pack) = gpu.operands(page_size, *case)
    scales = (None, None)
    if cache_dtype is not None:
        of_slots = jnp.full(key_cache.shape[:-1], SCALE)
        key_cache, value_cache = (quantised(x, of_slots, cache_dtype) for x in (key_cache, value_cache))
        scales = [of_slots if granularity == "slot" else of_slots[:, 0, 0]] * 2
    if granularity == "slot":
        scales = [x if x is None else x[..., 0] for x in laid(*(x[..., None] for x in scales), name)]
    caches = jax.block_until_ready(laid(key_cache, value_cache, name))
    run = functools.partial(ragged_paged_prefill, platform=platform, cache_layout=name)
    return gpu.layers(run, queries, (*caches, *pack), case, dict(zip(("key_scale", "value_scale"), scales)))


def ejkernel(page_size, case, **config):
    """Calls of ejKernel's function, and what waits for their results."""
    from ejkernel.modules import UnifiedAttentionConfig, unified_attention  # pylint: disable=import-outside-toplevel

    queries, (key_cache, value_cache, *pack) = gpu.operands(page_size, *case)
    caches = jax.block_until_ready(laid(key_cache, value_cache, "pskd"))
    if len(pack[0]) == 1:  # its kernel does not compile for a single sequence: an empty one beside it
        context_lens, pages, offsets = pack
        pack = jnp.pad(context_lens, (0, 1)), jnp.pad(pages, ((0, 1), (0, 0))), jnp.pad(offsets, (0, 1), mode="edge")
    cfg = UnifiedAttentionConfig(platform="triton", **config) if config else None
    run = functools.partial(unified_attention, platform="triton", cfg=cfg)
    return gpu.layers(run, queries, (*caches, *pack), case)


def _peers(page_size, case) -> dict:
    as_easydel = dict(num_warps=8, num_stages=2, num_par_softmax_segments=4, seq_threshold_3d=64)
    return {
        "ejkernel": functools.partial(ejkernel, page_size, case),
        "ejkernel by EasyDeL": functools.partial(ejkernel, page_size, case, **as_easydel),
    }


def measure(name, page_size, layouts, platform, *of_caches) -> dict:
    """One row: of every contender that runs, or why it does not.

    `of_caches` are the dtype of quantised caches, and what has a scale of its own.
    """
    case, row = gpu.CASES[name], dict(case=name, page_size=page_size, caches=of_caches)
    makers = {
        layout: functools.partial(contender, layout, page_size, case, platform, *of_caches)
        for layout in ("kpsd", *layouts)
    }
    if not of_caches:
        makers |= _peers(page_size, case)
    contenders, results = {}, {}
    for label, make in makers.items():
        try:
            call, wait = contenders[label] = make()
            results[label] = wait(call())  # compiles
        except Exception as error:  # what cannot run is in the table too
            row[label] = f"{type(error).__name__}: {error}"[:200]
            contenders.pop(label, None)
    row |= {f"{label} off": _distance(result, results["kpsd"]) for label, result in results.items() if label != "kpsd"}
    milliseconds = {label: ms / gpu.calls_of(case) for label, ms in gpu.median_ms(contenders).items()}
    for label, ms in milliseconds.items():
        row |= {f"{label} ms": round(ms, 4), label: round(milliseconds["kpsd"] / ms, 3)}
    return row


def _distance(results, others) -> float:
    """The largest difference of two results, of a call's first where there are several."""
    a, b = (jax.tree.leaves(x)[0].astype(jnp.float32) for x in (results, others))
    return round(float(jnp.max(jnp.abs(a - b))), 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--pages", default="16,64,128")
    parser.add_argument("--layouts", default="pskd,pksd,ps(k2)d")
    parser.add_argument("--cache_dtype", help="of quantised caches")
    parser.add_argument("--scales", default="head,slot", help="of quantised caches")
    parser.add_argument("--platform", default="cuda", help="this project's kernel: cuda, triton or xla")
    arguments = parser.parse_args()
    print(json.dumps(dict(jax=jax.__version__, device=jax.devices()[0].device_kind)), flush=True)
    kinds = [()]
    if arguments.cache_dtype:
        kinds = [(arguments.cache_dtype, granularity) for granularity in arguments.scales.split(",")]
    for page_size in map(int, arguments.pages.split(",")):
        for name, of_caches in itertools.product(arguments.cases.split(","), kinds):
            row = measure(name, page_size, arguments.layouts.split(","), arguments.platform, *of_caches)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
