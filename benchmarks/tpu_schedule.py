"""The static schedule of TPU kernels, read from the real compiler on a machine without a TPU.

    python benchmarks/tpu_schedule.py [--generations v5e,v6e,7x] [--shapes llama_page_16,...] [--kernels ...]

Compiles this project's kernel and, beside it, JAX's ragged_paged_attention and, where the environment's TPU_INFERENCE
names the directory of an unpacked wheel, tpu-inference's v3, each for the same attention, and has the compiler write
its final bundles. A bundle is one cycle when nothing stalls; what waiting for copies costs is not in it. Prints, of the
loop that does the matrix products of unmasked keys: multiply-adds of q . k and p . v (what the attention needs, not
what the matrix unit pads it to) per bundle, as a share of the chip's peak; its bundles and the vector registers spilled
in it, both per 2**28 multiply-adds so that they compare; and the bundles outside it that one key block costs, for 1024
keys and 256 query tokens. With --decode, all bundles that one sequence of a decoding step takes in this project's
kernel, loops times their trips, beside the cycles that HBM needs. Needs `pip install "jax[tpu]"`.
"""

import argparse
import dataclasses
import functools
import glob
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import types

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}

# Multiply-adds a cycle of one core's matrix units. Up to v5 four units of 128 x 128; from v6 on two of 256 x 256, which
# take two rows a cycle: the data sheet's 918 TFLOP/s at 1.75 GHz.
PEAK = {"v4": 65536, "v5e": 65536, "v5p": 65536, "v6e": 262144, "7x": 262144}

SHAPES = {
    "llama_page_16": dict(q_heads=32, kv_heads=8, head_dim=128, page_size=16),
    "llama_page_64": dict(q_heads=32, kv_heads=8, head_dim=128, page_size=64),
    "head_dim_64": dict(q_heads=32, kv_heads=8, head_dim=64, page_size=16),
    "head_dim_256": dict(q_heads=16, kv_heads=8, head_dim=256, page_size=16),
}
CHUNK_TOKENS, CONTEXT = 2048, 16384
# Of the same caches, a token each of 64 sequences.
DECODING = {
    f"decode_{q_heads}_{kv_heads}_page_{page_size}{name}": dict(
        q_heads=q_heads, kv_heads=kv_heads, head_dim=128, page_size=page_size, cache_dtype=cache_dtype
    )
    for q_heads, kv_heads in ((32, 8), (8, 1))
    for name, cache_dtype in (("", "bfloat16"), ("_int8", "int8"), ("_e5m2", "float8_e5m2"))
    for page_size in (16, 64, 256)
}
DECODING_CONTEXT = 4096
HBM_BYTES_A_CYCLE = {"v5e": 545, "v6e": 937, "7x": 1677}


def paged_prefill(device, *, q_heads, kv_heads, head_dim, page_size, block_q=None, block_kv=None):
    shape = dict(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    attend, operands, sizes = _ours(device, CHUNK_TOKENS, 1, CONTEXT, shape, block_q=block_q, block_kv=block_kv)
    about = {}

    def attend_and_tell(*operands):
        results = attend(*operands)
        found, group = sizes[0], q_heads // kv_heads
        about.update(
            # A step of the hot loop takes some of the heads, all parts of the tile and one chunk.
            macs=found.heads_at_once(kv_heads) * group * found.block_q * found.chunk * 2 * head_dim,
            inner_loops=(found.chunks_per_block,) if found.chunks_per_block > 1 else (),
            tile=(found.block_q, found.chunk * found.chunks_per_block),
        )
        return results

    return attend_and_tell, operands, about


def paged_decode(device, *, cache_dtype, **shape):
    """The other kernel of this project, for sequences of one new token."""
    attend, operands, sizes = _ours(device, 64, 64, DECODING_CONTEXT, shape, cache_dtype=cache_dtype)
    about = {}

    def attend_and_tell(*operands):
        results = attend(*operands)
        chunks = sizes[0].chunks_per_block
        about.update(chunks=chunks, blocks=DECODING_CONTEXT // (sizes[0].chunk * chunks))
        return results

    return attend_and_tell, operands, about


def _ours(device, tokens, seqs, context, shape, cache_dtype="bfloat16", **chosen):
    """The function of one call, its operands, and a list that holds the sizes it runs with, once it was traced."""
    import jax.numpy as jnp

    from paged_prefill.lowering.call import Device, flatten
    from paged_prefill.lowering.mosaic_tpu import schedule
    from paged_prefill.lowering.mosaic_tpu.host import MosaicTpu
    from paged_prefill.primitive.attention import Attention
    from paged_prefill.primitive.config import PrefillPageAttentionConfig

    kernel, described = MosaicTpu(), Device("tpu", device.device_kind, core_count=1)
    q_heads, kv_heads, head_dim, page_size = (shape[x] for x in ("q_heads", "kv_heads", "head_dim", "page_size"))
    # Of 512 MiB: the compiler would keep a small pool on the chip.
    num_pages = 2**29 // (kv_heads * page_size * head_dim * jnp.dtype(cache_dtype).itemsize)
    cache = ((kv_heads, num_pages, page_size, head_dim), cache_dtype)
    operands = dict(
        query=((tokens, q_heads, head_dim), "bfloat16"),
        key_cache=cache,
        value_cache=cache,
        context_lens=((seqs,), "int32"),
        page_indices=((seqs, context // page_size), "int32"),
        query_offsets=((seqs + 1,), "int32"),
    )
    if cache_dtype != "bfloat16":
        operands |= dict(key_scale=((), "float32"), value_scale=((), "float32"))
    sizes = []

    def attend(*arrays):
        named = dict(zip(operands, arrays, strict=True)) | dict(kv_head_start=jnp.int32(0))
        call = flatten(named, cache_batch_dims=0, num_kv_heads=kv_heads, attention=Attention(head_dim**-0.5))
        config = PrefillPageAttentionConfig(**chosen).over(kernel.heuristic(call.problem, described))
        sizes.append(schedule.sizes_of(config, call.problem.group, page_size, "bfloat16"))
        return kernel.attend(call, config, described)

    return attend, [*operands.values()], sizes


def jax_ragged_paged_attention(device, *, q_heads, kv_heads, head_dim, page_size, block_q=64, block_kv=512):
    """The kernel that comes with JAX, with the sizes of its tuning table for v5e."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = CONTEXT // page_size
    attend = functools.partial(
        ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        num_queries_per_block=block_q,
        num_kv_pages_per_block=block_kv // page_size,
        vmem_limit_bytes=60 * 2**20,
    )
    operands = [
        ((CHUNK_TOKENS, q_heads, head_dim), "bfloat16"),
        ((pages, page_size, 2 * kv_heads, head_dim), "bfloat16"),
        *(((1,), "int32"), ((1, pages), "int32"), ((2,), "int32"), ((1,), "int32")),
    ]
    about = dict(macs=block_q * q_heads * block_kv * 2 * head_dim, inner_loops=(), tile=(block_q, block_kv))
    return attend, operands, about


def tpu_inference_v3(device, *, q_heads, kv_heads, head_dim, page_size):
    """tpu-inference's kernel, of which only the files are loaded, not the package around them.

    With its default sizes for v5 and v6, on 7x too: of its own there, 512 queries x 2048 keys, it needs more VMEM than
    the 64 MiB that JAX reports.
    """
    import jax.numpy as jnp

    for name in ("tpu_inference", "tpu_inference.kernels"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(os.environ["TPU_INFERENCE"], *name.split("."))]
        sys.modules[name] = package
    v3 = importlib.import_module("tpu_inference.kernels.ragged_paged_attention.v3.kernel")
    v3.get_tpu_version = lambda: 6 if "6" in device.device_kind or "7" in device.device_kind else 5
    group, block_kv, chunk = q_heads // kv_heads, 1024, 512
    block_q, pages = 1024 // group, CONTEXT // page_size
    attend = functools.partial(
        v3.ragged_paged_attention,
        sm_scale=head_dim**-0.5,
        m_block_sizes=(block_q, block_kv, 512 // group, chunk),
        d_block_sizes=(1, 128, 1, 128),  # of its kernel for decoding, which has no work here: small, to compile fast
        vmem_limit_bytes=60 * 2**20,
    )
    new = ((CHUNK_TOKENS, kv_heads, head_dim), "bfloat16")
    operands = [((CHUNK_TOKENS, q_heads, head_dim), "bfloat16"), new, new]
    operands += [(v3.get_kv_cache_shape(pages, page_size, kv_heads, head_dim, jnp.bfloat16), "bfloat16")]
    operands += [((1,), "int32"), ((pages,), "int32"), ((2,), "int32"), ((3,), "int32")]
    about = dict(macs=block_q * q_heads * chunk * 2 * head_dim, inner_loops=(), tile=(block_q, block_kv))
    return attend, operands, about


KERNELS = {k.__name__: k for k in (paged_prefill, paged_decode, jax_ragged_paged_attention, tpu_inference_v3)}


def compile_one(generation, kernel, shape):
    """Compiles in this process, and prints what the kernel's sizes are as the last line."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        attend, operands, about = KERNELS[kernel](device, **(SHAPES | DECODING)[shape])
        operands = [jax.ShapeDtypeStruct(*o, sharding=SingleDeviceSharding(device)) for o in operands]
        started = time.perf_counter()
        jax.jit(attend).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
    print(json.dumps({**about, "seconds": time.perf_counter() - started}))


@dataclasses.dataclass(eq=False)
class Loop:
    depth: int
    parent: "Loop | None"
    bundles: int = 0
    products: int = 0
    copies: int = 0
    spills: int = 0


BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s*((?:(?:LH|LB|LE|PB|PF|CT)\s*)*):\s*((?:> ?)*)\s*\{(.*)")


def loops_of(path):
    """The loops of a program's final bundles, and in the order of the text each bundle's loop."""
    innermost = {0: Loop(0, None)}  # of each depth, the loop that the text is in, or was in last
    loops, order, depth = [innermost[0]], [], 0
    with open(path, errors="replace") as lines:
        for match in filter(None, map(BUNDLE.match, lines)):
            labels, marks, slots = match.groups()
            if not slots.startswith("}"):  # an empty bundle has no marks
                depth = marks.count(">")
            if "LB" in labels:
                innermost[depth] = Loop(depth, innermost[depth - 1])
                loops.append(innermost[depth])
            loop = innermost[depth]
            loop.bundles += 1
            loop.products += len(re.findall(r"= vmatmul", slots))
            loop.copies += slots.count("dma.hbm_to_vmem")
            loop.spills += len(re.findall(r"vst \[vmem:\[#allocation\d+_spill", slots))
            order.append(loop)
    return loops, order


def hot_loop(dump, program=""):
    """The hot loop of the kernel in a dump, and the bundles that run around it, by loop, from the inside out."""
    paths = glob.glob(f"{dump}/*{program}*final_bundles.txt")
    programs = [loops_of(path) for path in paths if "schedule-analysis" not in path]
    # Of the loops with the most matrix products, it is the one that starts copies beside them, or the shortest, which
    # is the unmasked one. A kernel for decoding alone has few.
    hot, order = min(
        ((loop, order) for loops, order in programs for loop in loops),
        key=lambda x: (-x[0].products, not x[0].copies, x[0].bundles),
    )
    # What follows the hot loop up to the next one belongs to it; then comes what runs instead of it.
    seen = []
    for loop in order:
        if hot in seen and loop not in seen:
            break
        seen = seen if loop in seen else [*seen, loop]
    end = order.index(loop, order.index(hot)) if loop is not order[-1] else len(order)
    around, parent = [], hot.parent
    while parent is not None:
        around.append(order[:end].count(parent))
        parent = parent.parent
    return hot, around


def measure(generation, kernel, shape):
    """One row of the table, as a dict, or the compiler's last words."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        flags += " --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=flags,
        )
        command = [sys.executable, __file__, "--child", generation, kernel, shape]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            return dict(error=child.stderr.strip().splitlines()[-1])
        about = json.loads(child.stdout.strip().splitlines()[-1])
        hot, around = hot_loop(dump, kernel if kernel.startswith("paged") else "")
    if kernel == "paged_decode":
        whole = hot.bundles * about["chunks"] * about["blocks"] + around[0] * about["blocks"] + around[1]
        return dict(seconds=about["seconds"], bundles=whole, spills=hot.spills * about["chunks"] * about["blocks"])
    trips = (*about["inner_loops"], 1)  # of the loops around the hot one, from the inside out, for one key block
    outside = sum(bundles * math.prod(trips[level:]) for level, bundles in enumerate(around[: len(trips)]))
    block_q, block_kv = about["tile"]
    rate = about["macs"] / hot.bundles
    return dict(
        seconds=about["seconds"],
        bundles=2**28 / rate,
        rate=rate,
        share=rate / PEAK[generation],
        spills=hot.spills * 2**28 / about["macs"],
        outside=outside * (256 / block_q) * (1024 / block_kv),
    )


def decoding_table(generations, shapes):
    """Bundles of one sequence of a call of 64, each of one new token, beside the cycles that HBM needs for its keys."""
    print("| call | TPU | bundles of a sequence | spills in them | cycles of HBM | compile s |")
    print("|---|---|---|---|---|---|")
    for shape in shapes:
        sizes = DECODING[shape]
        for generation in generations:
            row = measure(generation, "paged_decode", shape)
            itemsize = 2 if sizes["cache_dtype"] == "bfloat16" else 1
            bytes_read = 2 * DECODING_CONTEXT * sizes["kv_heads"] * sizes["head_dim"] * itemsize
            cells = "{bundles:,} | {spills:,} | {hbm:,.0f} | {seconds:.0f}"
            cells = row.get("error") or cells.format(**row, hbm=bytes_read / HBM_BYTES_A_CYCLE[generation])
            print(f"| {shape} | {generation} | {cells} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", default="v5e,v6e,7x")
    parser.add_argument("--shapes", help="all by default")
    parser.add_argument("--kernels", default=",".join(k for k in KERNELS if k != "paged_decode"))
    parser.add_argument("--decode", action="store_true", help="the table of decoding instead")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return compile_one(*arguments.child)
    if arguments.decode:
        shapes = arguments.shapes.split(",") if arguments.shapes else [*DECODING]
        return decoding_table(arguments.generations.split(","), shapes)
    kernels = [k for k in arguments.kernels.split(",") if k != "tpu_inference_v3" or "TPU_INFERENCE" in os.environ]
    print("| shape | TPU | kernel | multiply-adds per bundle | of peak | bundles | spills | outside | compile s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in arguments.shapes.split(",") if arguments.shapes else SHAPES:
        for generation in arguments.generations.split(","):
            for kernel in kernels:
                row = measure(generation, kernel, shape)
                cells = "{rate:,.0f} | {share:.0%} | {bundles:,.0f} | {spills:,.0f} | {outside:,.0f} | {seconds:.0f}"
                cells = row.get("error") or cells.format(**row)
                print(f"| {shape} | {generation} | {kernel} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
