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
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import arrivals, wait
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, TILED
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan

arith, llvm, nvvm, scf, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "scf", "vector")

CHUNK = 8  # numbers that a thread turns at a time: 8 bytes to 16
LOADED = {1: 3, 2: 4}  # chunks that it holds meanwhile, and as many after them, by Plan.loading_warpgroups
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
    found = dict(raw_here=arrivals(2, plan.stages), started=plgpu.Barrier())
    for name, features, scale in (
        ("keys", plan.head_dim, plan.key_scale), ("values", plan.value_dim, plan.value_scale)
    ):  # fmt: skip
        found |= {
            f"raw_{name}": plgpu.SMEM((plan.stages, plan.block_kv, features), jnp.dtype(plan.cache_dtype)),
            f"raw_{name}_free": plgpu.Barrier(num_arrivals=plan.widening_warps, num_barriers=plan.stages),
        }
        if scale == "slot":
            found[f"{name}_scales"] = plgpu.SMEM(scales_shape(plan), jnp.float32)
    return found


def widen(plan: Plan, each_piece, sources, warp) -> None:
    """One warp's share of all blocks of keys and values (kernel.Source), in the order in which they are copied."""

    def widen_piece(piece, done):
        scales = [None if plan.exact else scale_of(plan, source, piece) for source in sources]

        def step(i, _):
            stage, slot = lax.rem(done + i, plan.stages), lax.rem(done + i, plan.slots)
            for source, scale in zip(sources, scales):
                wait(source.here, stage, lax.div(done + i, plan.stages))

                @pl.when(done + i >= plan.slots)
                def _(source=source):
                    plgpu.barrier_wait(source.wide_free.at[slot])

                of_slots = source.scale_blocks.at[stage] if source.scale == "slot" else None
                blocks = source.blocks.at[stage], source.wide_blocks.at[slot]
                _widen_block(plan, source.features, warp, *blocks, scale, of_slots)
                plgpu.barrier_arrive(source.free.at[stage])
                plgpu.barrier_arrive(source.wide_here.at[slot])

        lax.fori_loop(0, piece.steps, step, None)

    each_piece(widen_piece)


def scale_of(plan: Plan, source, piece):
    """The scale of all that a piece sees, or None where there is none or each slot has its own."""
    match source.scale:
        case "tensor":
            return source.scales[piece.pool]
        case "head":
            return source.scales[lax.div(piece.first_row, plan.head_rows)]
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


def _widen_block(plan: Plan, features, warp, raw, wide, scale, of_slots) -> None:
    """The share of a block of one of the warps that widen: 8 rows, a row of tiles, in turns.

    Neighbouring lanes take neighbouring chunks: so neither reads nor writes meet in a bank.
    """
    width = features if 32 % (features // CHUNK) == 0 else COLUMNS  # columns that are taken together
    lanes = width // CHUNK  # of a row
    rows = 32 // lanes  # at a time
    others = [x for x in (scale, of_slots) if x is not None]
    assembly = _assembly(plan, scaled=len(others) > 0)
    types = [plgpu.RefType() if x is of_slots else plgpu.Layout.WG_SPLAT for x in others]
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TILED), plgpu.Layout.WG_SPLAT, *types))
    def go(_, raw, wide, warp, *others):
        f32, i8, i32 = ir.F32Type.get(), *(ir.IntegerType.get_signless(width) for width in (8, 32))
        constant = lambda x: arith.constant(i32, x)
        times = lambda x, n: arith.muli(x, constant(n))
        start, target, warp = utils.memref_ptr(raw), utils.memref_ptr(wide), warp.registers.item()
        thread = arith.remui(utils.thread_idx(), constant(32))
        row, lane = arith.divui(thread, constant(lanes)), arith.remui(thread, constant(lanes))
        first_row = arith.addi(times(warp, TILE_ROWS), row)
        source = arith.addi(times(first_row, features), times(lane, CHUNK))
        # A chunk of 8 columns lies at column ^ row of its tile's row, both counted in the tile.
        tile = arith.addi(times(warp, features // COLUMNS), arith.divui(lane, constant(COLUMNS // CHUNK)))
        column = arith.xori(arith.remui(lane, constant(COLUMNS // CHUNK)), row)
        place = arith.addi(times(tile, TILE_BYTES), times(row, 2 * COLUMNS))
        places = {
            shift: arith.addi(place, times(arith.xori(column, constant(shift)), 2 * CHUNK))
            for shift in range(0, TILE_ROWS, rows)
        }

        def scale_at(first):
            """The scale of the thread's row, `first` rows on."""
            if of_slots is None:
                return [x.registers.item() for x in others]
            slot = arith.addi(first_row, constant(first))
            copy, within = (op(slot, constant(plan.run)) for op in (arith.divui, arith.remui))
            index = arith.addi(times(copy, scales_shape(plan)[-1]), within)
            return [llvm.load(f32, utils.getelementptr(utils.memref_ptr(others[0]), [index], f32))]

        def load(first, part):
            words = ir.VectorType.get((2,), i32)
            pointer = utils.getelementptr(start, [source], i8)
            return llvm.load(words, utils.getelementptr(pointer, [first * features + part], i8))

        def turn(words, factor):
            pair = llvm.StructType.get_literal([i32, i32])
            result = llvm.mlir_undef(ir.VectorType.get((4,), i32))
            for i in range(2):
                operands = [vector.extract(words, [], [i]), *factor]
                turned = llvm.inline_asm(pair, operands, assembly, "=r,=r,r" + ",f" * len(factor))
                for j in range(2):
                    result = vector.insert(llvm.extractvalue(i32, turned, [j]), result, [], [2 * i + j])
            return result

        def store(first, part, words):
            tiles = first // TILE_ROWS * (features // COLUMNS) + part // COLUMNS
            pointer = utils.getelementptr(target, [places[first % TILE_ROWS]], i8)
            offset = tiles * TILE_BYTES + first % TILE_ROWS * 2 * COLUMNS
            llvm.store(words, utils.getelementptr(pointer, [offset], i8))

        def widen_rows(firsts):
            chunks = [(first, part) for first in firsts for part in range(0, features, width)]
            size = LOADED[plan.loading_warpgroups]
            batches = [chunks[i : i + size] for i in range(0, len(chunks), size)]
            loaded = [(load(*chunk), scale_at(chunk[0])) for chunk in batches[0]]
            for batch, following in zip(batches, [*batches[1:], []]):
                ahead = [(load(*chunk), scale_at(chunk[0])) for chunk in following]
                for chunk, (words, factor) in zip(batch, loaded):
                    store(*chunk, turn(words, factor))
                loaded = ahead

        tile_rows = plan.block_kv // TILE_ROWS
        whole, left = divmod(tile_rows, plan.widening_warps)
        step = plan.widening_warps * TILE_ROWS
        widen_rows([first + i for first in range(0, whole * step, step) for i in range(0, TILE_ROWS, rows)])
        if left:
            here = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, warp, constant(left)))
            with ir.InsertionPoint(here.then_block):
                widen_rows(range(whole * step, whole * step + TILE_ROWS, rows))
                scf.yield_([])
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    go(raw, wide, warp, *others)
