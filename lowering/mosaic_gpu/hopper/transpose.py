"""Values of 8 bits as their products read them: features of all keys of a block, where caches have keys of all
features.

Tensor cores transpose numbers of 16 bits alone, so the warps that widen do it here. `ldmatrix` transposes pairs of
bytes, two features of a key: what a thread then has of two matrices are four keys of either feature, and `prmt` sorts
them. Of every 16 keys, 0, 1, 8 and 9 come to lie together, then 2, 3, 10 and 11: as threads hold weights
(operations.packed).
"""

import functools

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, KEYS, TILED_BYTES
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan

arith, llvm, nvvm, scf, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "scf", "vector")

TILE_BYTES = 8 * COLUMNS
KEYS_AT_ONCE, CHUNK = 32, 16  # keys and features of four matrices; bytes of a row of one
LOADED = 2  # fours of matrices that a thread has in registers, and as many after them
FEATURES_AT_ONCE = 32  # features that a warpgroup's threads take in turn, four threads each


def _constant(x):
    return arith.constant(ir.IntegerType.get_signless(32), x - 2**32 if x >= 2**31 else x)


def _times(x, n):
    return arith.muli(x, _constant(n))


def _over(x, n):
    return arith.divui(x, _constant(n))


def _rest(x, n):
    return arith.remui(x, _constant(n))


def _sum(*numbers):
    return functools.reduce(arith.addi, numbers)


def _place(row, chunk, columns):
    """The byte of a chunk of a row within tiles of 8 rows, of so many columns in all."""
    tile = _sum(_times(_over(row, 8), columns // COLUMNS), _over(chunk, COLUMNS // CHUNK))
    row = _rest(row, 8)
    # A chunk lies at column ^ half the row of its tile.
    column = arith.xori(_rest(chunk, COLUMNS // CHUNK), _over(row, 2))
    return _sum(_times(tile, TILE_BYTES), _times(row, COLUMNS), _times(column, CHUNK))


def transpose_block(plan: Plan, warp, raw, turned) -> None:
    """One warp's share of a block: `raw` [keys, features] to `turned` [features, keys], both in tiles of bytes."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED_BYTES), plgpu.RefType(TILED_BYTES), plgpu.Layout.WG_SPLAT))
    def go(_, raw, turned, warp):
        i8, i32, void = *(ir.IntegerType.get_signless(width) for width in (8, 32)), ir.Type.parse("!llvm.void")
        source, target, warp = utils.memref_ptr(raw), utils.memref_ptr(turned), warp.registers.item()
        lane = _rest(utils.thread_idx(), 32)
        matrix, row = _over(lane, 8), _rest(lane, 8)
        # Each lane says where a row of one of four matrices is. When they are read, rows are keys; when they are
        # written, features, the even ones of 16 in one matrix and the odd ones in the next, for 16 keys each. Half of
        # them change places, so that rows of a matrix do not meet in a bank: which they are is known to a lane that
        # says where one is, and to one that holds its bytes.
        swaps = lambda row: _over(row, 4)
        feature = _sum(_times(row, 2), arith.xori(_rest(matrix, 2), swaps(row)))
        swapped = swaps(_over(lane, 4))
        orders = [_sum(_constant(0x6420), _times(arith.xori(swapped, _constant(i)), 0x1111)) for i in range(2)]
        groups, chunks = range(plan.block_kv // KEYS_AT_ONCE), plan.value_dim // CHUNK
        starts = [_place(feature, _sum(_over(matrix, 2), _constant(2 * i)), plan.block_kv) for i in range(2)]
        group_bytes = KEYS_AT_ONCE * plan.value_dim
        four = llvm.StructType.get_literal([i32] * 4)

        def places(number):
            """Where a chunk of features is read, and written, of every second group of keys."""
            # Worked out each time: there are no registers to keep it.
            its_warp = llvm.inline_asm(i32, [warp], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
            chunk = _sum(its_warp, _constant(number * plan.widening_warps))
            down = _times(chunk, CHUNK * plan.block_kv)
            return _place(lane, chunk, plan.value_dim), [_sum(start, down) for start in starts]

        def load(group, place):
            assembly = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
            address = utils.getelementptr(utils.getelementptr(source, [place], i8), [group * group_bytes], i8)
            found = llvm.inline_asm(four, [address], assembly, "=r,=r,=r,=r,r", has_side_effects=True)
            return [llvm.extractvalue(i32, found, [i]) for i in range(4)]

        def store(group, places, words):
            assembly = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
            address = utils.getelementptr(target, [places[group % 2]], i8)
            address = utils.getelementptr(address, [group // 2 * TILE_BYTES], i8)
            pairs = [
                llvm.inline_asm(i32, [*words[i : i + 2], order], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
                for i in (0, 2)
                for order in orders
            ]
            llvm.inline_asm(void, [address, *pairs], assembly, "r,r,r,r,r,~{memory}", has_side_effects=True)

        def turn(number):
            """All keys of a chunk of the warp's."""
            start, ends = places(number)
            loaded = [load(group, start) for group in groups[:LOADED]]
            for i in range(0, len(groups), LOADED):
                ahead = [load(group, start) for group in groups[i + LOADED : i + 2 * LOADED]]
                for group, words in zip(groups[i:], loaded):
                    store(group, ends, words)
                loaded = ahead

        whole, left = divmod(chunks, plan.widening_warps)
        for number in range(whole):
            turn(number)
        if left:
            here = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, warp, _constant(left)))
            with ir.InsertionPoint(here.then_block):
                turn(whole)
                scf.yield_([])
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    go(raw, turned, warp)


def keep_keys(held, values) -> None:
    """Zeroes, of FEATURES_AT_ONCE features of a block's transposed values, those keys where `held` is 0."""

    @plgpu.inline_mgpu(arg_types=(KEYS, plgpu.RefType(TILED_BYTES)))
    def go(_, held, values):
        i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
        keys = held.shape[0]
        thread = _rest(utils.thread_idx(), 128)
        row, quarter = _over(thread, 4), _rest(thread, 4)
        pairs = list(held.registers.flat)  # of every 8 keys, the two that a word of this thread's place has
        for chunk in range(keys // CHUNK):
            kept = _constant(0)
            for i, pair in enumerate(pairs[2 * chunk : 2 * chunk + 2]):
                for j in range(2):
                    kept = arith.ori(kept, _times(vector.extract(pair, [], [j]), 0xFF << 8 * (2 * i + j)))
            place = _sum(_place(row, _constant(chunk), keys), _times(quarter, 4))
            word = utils.getelementptr(utils.memref_ptr(values), [place], i8)
            llvm.store(arith.andi(llvm.load(i32, word), kept), word)

    go(held, values)
