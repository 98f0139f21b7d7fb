"""Quantised caches: one more warpgroup turns the numbers of 8 bits into the query's dtype, times their scales.

Copies bring blocks of keys and values as they lie in the caches, rows of bytes. Each warp of the widening warpgroup
turns its share of a block into rows of the swizzled tiles that products read. Where float16 serves (Plan.exact), a
number is what it was, and the scales are left to those that compute. Otherwise it becomes 32 bits wide on the way, is
multiplied by its scale, and is rounded once: for a warpgroup that computes, nothing is new.
"""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, TILED
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan

arith, llvm, nvvm, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "vector")

WARPS = 4  # that widen
CHUNK = 8  # numbers that a thread turns at a time: 8 bytes to 16
LOADED = 4  # chunks that it holds meanwhile
TILE_ROWS, TILE_BYTES = 8, 8 * 2 * COLUMNS
COPY_FLOATS = 32  # at least: 128 bytes, at a multiple of which a copy's place in shared memory begins

# From 4 bytes in $2 to numbers of float16, two and two; on to float32; times a scale.
_FROM_FLOAT = """
    .reg .b16 low, high; .reg .b32 pair0, pair1;
    mov.b32 {{low, high}}, $2;
    cvt.rn.f16x2.{name}x2 pair0, low;
    cvt.rn.f16x2.{name}x2 pair1, high;
"""
# b + 128 are the last bits of a float16 from 1024 on.
_FROM_INT = """
    .reg .b32 bytes, pair0, pair1, offset;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 pair0, bytes, 0x64646464, 0x5150;
    prmt.b32 pair1, bytes, 0x64646464, 0x5352;
    mov.b32 offset, 0x64806480;
    sub.rn.f16x2 pair0, pair0, offset;
    sub.rn.f16x2 pair1, pair1, offset;
"""
_HALVES = {
    "float8_e4m3fn": _FROM_FLOAT.format(name="e4m3"),
    "float8_e5m2": _FROM_FLOAT.format(name="e5m2"),
    "int8": _FROM_INT,
}
QUANTISED = tuple(_HALVES)
_SINGLES = """
    .reg .b16 h<4>; .reg .f32 f<4>;
    mov.b32 {h0, h1}, pair0;
    mov.b32 {h2, h3}, pair1;
""" + "".join(f"cvt.f32.f16 f{i}, h{i};\n" for i in range(4))
_SCALED = "".join(f"mul.rn.f32 f{i}, f{i}, $3;\n" for i in range(4))
_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def copies_of(plan: Plan) -> int:
    """Copies of a block of keys."""
    return plan.block_kv // plan.run


def scales_shape(plan: Plan) -> tuple[int, int, int]:
    """Of the scales of raw blocks: a row a copy, which brings those of other slots too where pages are small."""
    return plan.stages, copies_of(plan), max(plan.run, COPY_FLOATS)


def widening_scratch(plan: Plan) -> dict:
    """What is in shared memory for widening alone, by the names of `kernel.launch`."""
    found = {}
    for name, features, scale in (
        ("keys", plan.head_dim, plan.key_scale), ("values", plan.value_dim, plan.value_scale)
    ):  # fmt: skip
        arrivals = copies_of(plan) * (2 if scale == "slot" else 1)
        found |= {
            f"raw_{name}": plgpu.SMEM((plan.stages, plan.block_kv, features), jnp.dtype(plan.cache_dtype)),
            f"raw_{name}_here": plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages),
            f"raw_{name}_free": plgpu.Barrier(num_arrivals=WARPS, num_barriers=plan.stages),
        }
        if scale == "slot":
            found[f"{name}_scales"] = plgpu.SMEM(scales_shape(plan), jnp.float32)
    return found


def widen(plan: Plan, each_piece, sources) -> None:
    """All of this thread block's blocks of keys and values (kernel.Source), in the order in which they are copied."""

    @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
    def each_warp():
        def widen_piece(piece, done):
            scales = [None if plan.exact else scale_of(plan, source, piece) for source in sources]

            def step(i, _):
                stage, slot = lax.rem(done + i, plan.stages), lax.rem(done + i, plan.slots)
                for source, scale in zip(sources, scales):
                    plgpu.barrier_wait(source.here.at[stage])

                    @pl.when(done + i >= plan.slots)
                    def _(source=source):
                        plgpu.barrier_wait(source.wide_free.at[slot])

                    of_slots = source.scale_blocks.at[stage] if source.scale == "slot" else None
                    blocks = source.blocks.at[stage], source.wide_blocks.at[slot]
                    _widen_block(plan, source.features, *blocks, scale, of_slots)
                    plgpu.barrier_arrive(source.free.at[stage])
                    plgpu.barrier_arrive(source.wide_here.at[slot])

            lax.fori_loop(0, piece.steps, step, None)

        each_piece(widen_piece)

    each_warp()


def scale_of(plan: Plan, source, piece):
    """The scale of all that a piece sees, or None where there is none or each slot has its own."""
    match source.scale:
        case "tensor":
            return source.scales[piece.tile.pool]
        case "head":
            return source.scales[lax.div(piece.first_row, plan.keys_per_head)]
    return None


def _assembly(plan: Plan, scaled: bool) -> str:
    """What turns 4 bytes in $2, times $3, into the words $0 and $1."""
    if plan.exact:
        last = "".join(f"mov.b32 ${i}, pair{i};\n" for i in range(2))
    else:
        name = _NAMES[plan.dtype]
        last = _SINGLES + _SCALED * scaled
        last += "".join(f"cvt.rn.{name}x2.f32 ${i}, f{2 * i + 1}, f{2 * i};\n" for i in range(2))
    return "{" + _HALVES[plan.cache_dtype] + last + "}"


def _widen_block(plan: Plan, features, raw, wide, scale, of_slots) -> None:
    """This warp's share of a block: neighbouring lanes take neighbouring chunks, and so do the warps."""
    width = features if 128 % (features // CHUNK) == 0 else COLUMNS  # columns that are taken together
    lanes = width // CHUNK  # of a row
    rows = 32 * WARPS // lanes  # of all warps at a time
    others = [x for x in (scale, of_slots) if x is not None]
    assembly = _assembly(plan, scaled=len(others) > 0)
    types = [plgpu.RefType() if x is of_slots else plgpu.Layout.WG_SPLAT for x in others]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TILED), *types))
    def go(_, raw, wide, *others):
        i32 = ir.IntegerType.get_signless(32)
        word2, word4 = (ir.VectorType.get((n,), i32) for n in (2, 4))
        constant = lambda x: arith.constant(i32, x)
        start, target = utils.memref_ptr(raw), utils.memref_ptr(wide)

        def at(pointer, offset, static=0):
            return utils.getelementptr(utils.getelementptr(pointer, [offset], i8), [static], i8)

        i8 = ir.IntegerType.get_signless(8)
        thread = arith.remui(utils.thread_idx(), constant(32 * WARPS))
        row, lane = arith.divui(thread, constant(lanes)), arith.remui(thread, constant(lanes))
        source = arith.addi(arith.muli(row, constant(features)), arith.muli(lane, constant(CHUNK)))
        # Of a chunk in its first tile: 16 bytes at lane ^ row of the 8 in a row, where both count within the tile.
        tile = arith.divui(lane, constant(COLUMNS // CHUNK))
        tile = arith.addi(tile, arith.muli(arith.divui(row, constant(TILE_ROWS)), constant(features // COLUMNS)))
        in_tile = arith.remui(row, constant(TILE_ROWS))
        swizzled = arith.xori(arith.remui(lane, constant(COLUMNS // CHUNK)), in_tile)
        place = arith.addi(arith.muli(tile, constant(TILE_BYTES)), arith.muli(in_tile, constant(2 * COLUMNS)))
        places = {
            shift: arith.addi(place, arith.muli(arith.xori(swizzled, constant(shift)), constant(2 * CHUNK)))
            for shift in range(0, TILE_ROWS, min(rows, TILE_ROWS))
        }

        def scale_at(first):
            """The scale of the thread's row, `first` rows on."""
            if not others:
                return []
            if of_slots is None:
                return [others[0].registers.item()]
            slot = arith.addi(row, constant(first))
            copy, within = (op(slot, constant(plan.run)) for op in (arith.divui, arith.remui))
            index = arith.addi(arith.muli(copy, constant(scales_shape(plan)[-1])), within)
            return [llvm.load(ir.F32Type.get(), utils.getelementptr(utils.memref_ptr(others[0]), [index], ir.F32Type.get()))]

        chunks = [
            (part, first) for first in range(0, plan.block_kv, rows) for part in range(0, features, width)
        ]
        for i in range(0, len(chunks), LOADED):
            batch = [
                (part, first, llvm.load(word2, at(start, source, first * features + part)), scale_at(first))
                for part, first in chunks[i : i + LOADED]
            ]
            for part, first, words, factor in batch:
                turned = []
                for j in range(2):
                    pair = llvm.inline_asm(
                        llvm.StructType.get_literal([i32, i32]), [vector.extract(words, [], [j]), *factor], assembly,
                        "=r,=r,r" + ",f" * len(factor),
                    )  # fmt: skip
                    turned += [llvm.extractvalue(i32, pair, [k]) for k in range(2)]
                result = llvm.mlir_undef(word4)
                for j, word in enumerate(turned):
                    result = vector.insert(word, result, [], [j])
                tiles = first // TILE_ROWS * (features // COLUMNS) + part // COLUMNS
                within = first % TILE_ROWS
                llvm.store(result, at(target, places[within], tiles * TILE_BYTES + within * 2 * COLUMNS))
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    go(raw, wide, *others)
