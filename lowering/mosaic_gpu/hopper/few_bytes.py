"""Products of tiles of few rows over a quantised cache: its numbers are widened in registers, on their way to a wgmma.

Keys, and features of values, are rows of those products (columns.py), and rows may come from registers. So blocks lie
as they came, half as large as those of 16 bits, and nobody writes them again and reads them twice.

Rows in shared memory are as wide as they can be: of rows of 64 bytes a chip loads some 3.3 TB/s, of 128 as much as it
has. Which features of a key a thread takes for a step of the product is free, as long as the query has them in the same
order: those of 16 or 32 that lie together (columns.scale_query). Values are transposed by `ldmatrix`, which takes two
features of a key for one number. So the even ones of 16 features are the first eight rows of a warp's 16, and the odd
ones the others.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import columns
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, KEYS, WGMMA
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import columns_of_bytes, tiled, tiling_of_bytes
from paged_prefill.lowering.mosaic_gpu.hopper.widen import HALVES, SORTED_HALVES

arith, llvm, vector = compat.mlir_dialects("arith", "llvm", "vector")

CHUNK, WORDS = 16, 4  # bytes, and words, that a thread reads at a time
TILE_ROWS, WARP_ROWS = 8, 16  # of a wgmma's 64
QUAD = 4  # threads that share a row of it
KEYS_AT_ONCE = 32  # of four matrices
FEATURES = ((2, 1),)  # how far those of an output's rows lie apart: `sorted_by` of columns.turned


def start_logits(query, keys):
    """columns.start_logits, of keys [block_kv, features] in 8 bits and a query sorted by `columns.scale_query`."""
    dtype = str(keys.dtype)
    its_type = plgpu.ShapeDtypeStruct((keys.shape[0], query.shape[1]), jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(tiled(query), _tiled_bytes(keys)), return_type=its_type)
    def start(_, query, keys):
        query = mgpu.memref_transpose(mgpu.memref_slice(query, (slice(None), slice(None), 0)), (0, 1, 3, 2))
        sums = [mgpu.WGMMAAccumulator.zero(WARPGROUP_ROWS, its_type.shape[1]).value]
        return _multiply(sums * (its_type.shape[0] // WARPGROUP_ROWS), _rows_of_keys(keys, dtype), query)

    return start(query, keys)


def taken_values(values, held=None):
    """Values [block_kv, features] in 8 bits as features by keys in float16, a factor of `start_output`.

    Keys that are not `held` [block_kv] are zeros: they may be NaN, and 0 * NaN is NaN.
    """
    dtype, shape = str(values.dtype), values.shape[::-1]
    its_type = plgpu.ShapeDtypeStruct(shape, jnp.float16, layout=WGMMA)
    masks = () if held is None else (jnp.where(held, jnp.int32(0xFFFF), jnp.int32(0)),)

    @plgpu.inline_mgpu(arg_types=(_tiled_bytes(values), *[KEYS] * len(masks)), return_type=its_type)
    def take(_, values, *masks):
        return columns.joined(_rows_of_features(values, dtype, *masks))

    return take(values, *masks)


def start_output(acc, weights, values):
    """columns.start_output, of `taken_values`. Rows of the output are in an order of their own."""
    its_type = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, tiled(weights), WGMMA), return_type=its_type)
    def start(_, acc, weights, values):
        rows = [slice(first, first + WARPGROUP_ROWS) for first in range(0, acc.shape[0], WARPGROUP_ROWS)]
        sums, factors = ([array[some] for some in rows] for array in (acc, values))
        return _multiply(sums, factors, mgpu.memref_transpose(weights, (1, 0, 3, 2)))

    return start(acc, weights, values)


def parts_together(features: int) -> int:
    """Parts of 64 features whose pairs `columns.scale_query` sorts together: those of a row of shared memory."""
    return columns_of_bytes(features) // COLUMNS


def _tiled_bytes(reference):
    return plgpu.RefType(tiling_of_bytes(reference.shape[-1]))


def _multiply(sums, factors, other):
    """Starts sums + factors @ other, as one array. Factors are settled before the first product (operations.py)."""
    factors = mgpu.optimization_barrier(*factors) if len(factors) > 1 else [mgpu.optimization_barrier(*factors)]
    product = columns.joined(columns.multiply_in_turns(sums, [(factor, other) for factor in factors]))
    columns.start_group()
    return product


class _Block:
    """A block of rows of bytes in shared memory, in tiles of 8 rows."""

    def __init__(self, reference):
        self.start = utils.memref_ptr(reference)
        self.tile_rows, self.across, _, self.width = ir.MemRefType(reference.type).shape
        self.chunks = self.width // CHUNK  # of a row of a tile

    def pointer(self, row, chunk):
        """To a chunk of a row's first tile: in its tile, it lies at chunk ^ row, or half the row where there are 4."""
        in_tile = columns.rem(row, TILE_ROWS)
        place = arith.xori(chunk, arith.divui(in_tile, columns.i32(TILE_ROWS // self.chunks)))
        byte = arith.addi(columns.times(in_tile, self.width), columns.times(place, CHUNK))
        tiles = columns.times(arith.divui(row, columns.i32(TILE_ROWS)), self.across * TILE_ROWS * self.width)
        return utils.getelementptr(self.start, [arith.addi(tiles, byte)], _i8())

    def further(self, pointer, tile_rows, tiles):
        """So many tiles down and across from there."""
        return utils.getelementptr(pointer, [(tile_rows * self.across + tiles) * TILE_ROWS * self.width], _i8())


def _rows_of_keys(keys, dtype):
    """A block's keys in float16, 64 rows each."""
    block, found = _Block(keys), []
    warp, lane = columns.warp_and_lane()
    row = arith.addi(columns.times(warp, WARP_ROWS), arith.divui(lane, columns.i32(QUAD)))
    each = block.chunks // QUAD  # of a row, lie together
    first = columns.times(columns.rem(lane, QUAD), each)
    chunks = [block.pointer(row, arith.addi(first, columns.i32(i))) for i in range(each)]
    for first in range(0, block.tile_rows, WARPGROUP_ROWS // TILE_ROWS):
        # Of a step of the product, two of every 8 of its features; rows 8 apart.
        factor = np.empty((block.across, len(chunks), WORDS, 2, 2), dtype=object)
        for tile, half, number in np.ndindex(block.across, 2, len(chunks)):
            place = block.further(chunks[number], first + half, tile)
            words = llvm.load(ir.VectorType.get((WORDS,), _word()), place)
            for i in range(WORDS):
                factor[tile, number, i, :, half] = _widened(vector.extract(words, [], [i]), HALVES[dtype])
        found.append(_array(factor))
    return found


def _rows_of_features(values, dtype, held=None):
    """A block's values in float16, features by keys, 64 rows each; of keys that are not `held` zeros."""
    block, found, kept = _Block(values), [], None
    if held is not None:  # of every 8 keys, the two that a word of this thread has
        pairs = [[vector.extract(pair, [], [i]) for i in range(2)] for pair in held.registers.flat]
        kept = [arith.ori(low, columns.times(high, 1 << 16)) for low, high in pairs]
    warp, lane = columns.warp_and_lane()
    chunks = [block.pointer(lane, arith.addi(warp, columns.i32(first))) for first in range(0, block.chunks, QUAD)]
    four = llvm.StructType.get_literal([_word()] * 4)
    assembly = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    for tile, chunk in np.ndindex(block.across, len(chunks)):
        # two of every 8 keys, of an even feature and of an odd one
        factor = np.empty((block.tile_rows, 2), dtype=object)
        for first in range(0, block.tile_rows, KEYS_AT_ONCE // TILE_ROWS):
            place = block.further(chunks[chunk], first, tile)
            words = llvm.inline_asm(four, [place], assembly, "=r,=r,=r,=r,r", has_side_effects=True)
            for i in range(4):
                pair = _widened(llvm.extractvalue(_word(), words, [i]), SORTED_HALVES[dtype])
                factor[first + i] = pair if kept is None else [arith.andi(word, kept[first + i]) for word in pair]
        found.append(_array(factor))
    return found


def _widened(word, assembly):
    """4 numbers of 8 bits, as two words of float16."""
    pair = llvm.StructType.get_literal([_word()] * 2)
    found = llvm.inline_asm(pair, [word], "{" + assembly + "}", "=&r,=&r,r")
    return [llvm.extractvalue(_word(), found, [i]) for i in range(2)]


def _array(words):
    """[64, columns] in float16 of a thread's words of it: for every 8 columns one of each of its two rows."""
    shape = WARPGROUP_ROWS, words.size // 2 * TILE_ROWS
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    pair, flat = ir.VectorType.get((2,), ir.F16Type.get()), registers.reshape(-1)
    for i, word in enumerate(words.reshape(-1)):
        flat[i] = llvm.bitcast(pair, word)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _i8():
    return ir.IntegerType.get_signless(8)


def _word():
    return ir.IntegerType.get_signless(32)
