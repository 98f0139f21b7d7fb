"""Quantised caches: one more warpgroup turns the numbers of 8 bits into float16.

Copies bring blocks of keys and values as they lie in the caches, rows of bytes. Each warp of the widening warpgroup
turns its share of a block into rows of the swizzled tiles that products read. A number is what it was: the scales are
left to those that compute, who have a logit and a weight of a slot where widening has hundreds of numbers.

Where products are of 8 bits, keys come as they are, and values are transposed (transpose.py).
"""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import arrivals, wait
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, TILED, TILED_BYTES
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.transpose import transpose_block

arith, llvm, nvvm, scf, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "scf", "vector")

CHUNK = 8  # numbers that a thread turns at a time: 8 bytes to 16
LANES = 32
# Chunks that it holds meanwhile, and as many after them.
LOADED = {40: 3, 32: 3, 168: 4, 56: 3}  # by the registers that it has
TILE_ROWS, TILE_BYTES = 8, 8 * 2 * COLUMNS

def _halves(dtype: str, low: tuple[int, int], high: tuple[int, int]) -> str:
    """Assembly: of 4 bytes in $2 those numbered `low` to two numbers of float16 in $0, and `high` to two in $1."""
    (a, b), (c, d) = low, high
    match dtype:
        case "float8_e4m3fn":
            return f"""
                .reg .b32 bytes;
                .reg .b16 low, high;
                prmt.b32 bytes, $2, 0, 0x{d}{c}{b}{a};
                mov.b32 {{low, high}}, bytes;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
            """
        case "float8_e5m2":  # the first 8 bits of a float16
            return f"""
                prmt.b32 $0, $2, 0, 0x{b}4{a}4;
                prmt.b32 $1, $2, 0, 0x{d}4{c}4;
            """
        case "int8":  # b + 128 are the last bits of a float16 from 1024 on
            return f"""
                .reg .b32 bytes, pair0, pair1, offset;
                xor.b32 bytes, $2, 0x80808080;
                prmt.b32 pair0, bytes, 0x64646464, 0x5{b}5{a};
                prmt.b32 pair1, bytes, 0x64646464, 0x5{d}5{c};
                mov.b32 offset, 0x64806480;
                sub.rn.f16x2 $0, pair0, offset;
                sub.rn.f16x2 $1, pair1, offset;
            """


QUANTISED = "float8_e4m3fn", "float8_e5m2", "int8"
HALVES = {dtype: _halves(dtype, (0, 1), (2, 3)) for dtype in QUANTISED}
SORTED_HALVES = {dtype: _halves(dtype, (0, 2), (1, 3)) for dtype in QUANTISED}  # of every second number


def slot_of_scales(plan: Plan, step):
    """Where the scales of a step's slots lie, in order.

    One more than widened blocks: keys are let go of before their logits are weighed, and then those of the block after
    the next may come.
    """
    return lax.rem(step, plan.slots + 1)


def raw_rings(plan: Plan) -> dict:
    """The shared memory, by name, that blocks of quantised caches come to."""
    transforms = TILED_BYTES if plan.fp8_terms else ()

    def ring(features):
        return plgpu.SMEM((plan.stages, plan.block_kv, features), jnp.dtype(plan.cache_dtype), transforms=transforms)

    return {f"raw_{name}": ring(features) for name, features, _ in _widened(plan)}


def widening_scratch(plan: Plan) -> dict:
    """What is in shared memory for widening alone but for these, by name."""
    found = dict(raw_here=arrivals(2, plan.stages), started=plgpu.Barrier())
    for name, _, scale in _widened(plan):
        found[f"raw_{name}_free"] = plgpu.Barrier(num_arrivals=plan.widening_warps, num_barriers=plan.stages)
        if scale == "slot":
            found[f"{name}_scales"] = plgpu.SMEM((plan.slots + 1, plan.block_kv), jnp.float32)
    return found


def _widened(plan: Plan) -> list:
    """Of what is widened, or transposed, its name, its features and what has a scale of its own."""
    kinds = [("keys", plan.head_dim, plan.key_scale), ("values", plan.value_dim, plan.value_scale)]
    return kinds[0 if plan.widens_keys else 1 : 1 if plan.latent else 2] if plan.widens else []


def widen(plan: Plan, each_piece, pages, sources, warp) -> None:
    """One warp's share of all blocks of keys and values (loading.Source), in the order in which they are copied."""

    def widen_piece(piece, done):
        scales = _SlotScales(plan, pages, sources[0].slot_scales, piece, warp)

        def step(i, fetched):
            stage, slot = lax.rem(done + i, plan.stages), lax.rem(done + i, plan.slots)
            following = scales.fetch(i, fetched)
            for source in sources:
                if source.wide_blocks is None:
                    continue
                wait(source.here, stage, lax.div(done + i, plan.stages))

                for number, parts in enumerate(source.groups):
                    if number < len(source.turns):

                        @pl.when(done + i >= source.free_before)
                        def _(source=source, turn=source.turns[number]):
                            # Where there are several turns, there is one slot.
                            plgpu.barrier_wait(source.wide_free.at[slot + turn])

                    if source is sources[0] and number == 0:
                        scales.store(slot_of_scales(plan, done + i), fetched)
                    raw, wide = source.blocks.at[stage], source.wide_blocks.at[slot]
                    if plan.fp8_terms:
                        transpose_block(plan, warp, raw, wide)
                    else:
                        _widen_block(plan, source.features, parts, warp, raw, wide)
                    if number + 1 == len(source.groups):
                        plgpu.barrier_arrive(source.free.at[stage])
                    plgpu.barrier_arrive(source.wide_here.at[slot * len(source.groups) + number])
            return following

        lax.fori_loop(0, piece.steps, step, scales.start())

    each_piece(widen_piece)


class _SlotScales:
    """A warp's share of a piece's scales, where each slot has its own: a lane has every 32nd slot of a part.

    They are few bytes of many pages, for which copies cost as much as for the numbers. So lanes load them, the numbers
    of pages two blocks ahead and the scales one: nobody waits for either.
    """

    def __init__(self, plan: Plan, pages, slot_scales, piece, warp):
        self.plan, self.pages, self.slot_scales, self.piece = plan, pages, slot_scales, piece
        parts = plan.block_kv // LANES
        turns = -(-parts // plan.widening_warps) if slot_scales else 0
        # Warps without a part of their own, at a turn, have another's: they load, and do not store.
        mine = [warp + turn * plan.widening_warps for turn in range(turns)]
        lane = threads.number() & (LANES - 1) if turns else 0
        self.slots = [(jnp.minimum(part, parts - 1) * LANES + lane, part < parts) for part in mine]

    def start(self):
        """What is fetched before block 0."""
        pages = self._pages_of(0)
        return self._pages_of(1), self._scales_of(0, pages)

    def fetch(self, i, fetched):
        """Likewise before block i + 1, from what was before block i."""
        pages, _ = fetched
        return self._pages_of(i + 2), self._scales_of(i + 1, pages)

    def store(self, place, fetched):
        """Puts the scales of a block where those that compute read them."""
        _, scales = fetched
        for (*_, ordered), numbers in zip(self.slot_scales, scales):
            for (slot, is_mine), number in zip(self.slots, numbers):
                threads.store(ordered.at[place], slot, number, is_mine)

    def _keys_of(self, i):
        first = (self.piece.last - i) * self.plan.block_kv
        return [jnp.maximum(first + slot, 0) for slot, _ in self.slots]

    def _pages_of(self, i):
        return [threads.load(self.pages, self.plan.page_of(self.piece, key)) for key in self._keys_of(i)]

    def _scales_of(self, i, pages):
        slots = list(zip(pages, self._keys_of(i)))
        return [
            [threads.load(scales, self.plan.place_of_scale(self.piece, *slot, beside)) for slot in slots]
            for scales, beside, _ in self.slot_scales
        ]


def scale_of(plan: Plan, source, piece):
    """The scale of all that a piece sees, or None where there is none or each slot has its own."""
    match source.scale:
        case "tensor":
            return source.scales[piece.pool]
        case "head":
            return source.scales[piece.cache_head]
    return None


def scales_of(plan: Plan, sources, piece):
    """Those of `scale_of`, as numbers, where caches are quantised.

    They come from memory: so they are asked for before something else is waited for.
    """
    if not plan.quantised:
        return None
    found = [scale_of(plan, source, piece) for source in sources]
    return [jnp.float32(1) if scale is None else scale for scale in found]


def _taken_together(parts: list[int]):
    """(First columns of as many parts as a warp can take together, the number of those columns)."""
    for number in (4, 2, 1):
        runs = [parts[i : i + number] for i in range(0, len(parts), number)]
        if all(run == [*range(run[0], run[0] + number)] for run in runs):
            return [run[0] * COLUMNS for run in runs], number * COLUMNS


def _widen_block(plan: Plan, features, parts, warp, raw, wide) -> None:
    """The share of some parts of a block of one of the warps that widen: 8 rows, a row of tiles, in turns.

    Neighbouring lanes take neighbouring chunks: so neither reads nor writes meet in a bank.
    """
    starts, width = _taken_together(parts)
    lanes = width // CHUNK  # of a row
    rows = 32 // lanes  # at a time
    assembly = "{" + HALVES[plan.cache_dtype] + "}"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TILED), plgpu.Layout.WG_SPLAT))
    def go(_, raw, wide, warp):
        i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
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

        def load(first, part):
            words = ir.VectorType.get((2,), i32)
            pointer = utils.getelementptr(start, [source], i8)
            return llvm.load(words, utils.getelementptr(pointer, [first * features + part], i8))

        def turn(words):
            pair = llvm.StructType.get_literal([i32, i32])
            result = llvm.mlir_undef(ir.VectorType.get((4,), i32))
            for i in range(2):
                turned = llvm.inline_asm(pair, [vector.extract(words, [], [i])], assembly, "=&r,=&r,r")
                for j in range(2):
                    result = vector.insert(llvm.extractvalue(i32, turned, [j]), result, [], [2 * i + j])
            return result

        def store(first, part, words):
            tiles = first // TILE_ROWS * (features // COLUMNS) + part // COLUMNS
            pointer = utils.getelementptr(target, [places[first % TILE_ROWS]], i8)
            offset = tiles * TILE_BYTES + first % TILE_ROWS * 2 * COLUMNS
            llvm.store(words, utils.getelementptr(pointer, [offset], i8))

        def widen_rows(firsts):
            chunks = [(first, part) for first in firsts for part in starts]
            size = LOADED[plan.registers.widens or plan.registers.loads]
            batches = [chunks[i : i + size] for i in range(0, len(chunks), size)]
            loaded = [load(*chunk) for chunk in batches[0]]
            for batch, following in zip(batches, [*batches[1:], []]):
                ahead = [load(*chunk) for chunk in following]
                for chunk, words in zip(batch, loaded):
                    store(*chunk, turn(words))
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

    go(raw, wide, warp)
