"""What a Hopper warpgroup can do and Pallas has no operation of: products that run on beside other work, and more.

A wgmma's operands in registers must be settled before the first product of a *stage*, which ends when every product
is waited for. ptxas waits after each single instruction otherwise (its remark C7513), and nothing runs beside
anything. So `start_products` settles the registers of both its products first, where Pallas settles those of each
product just before it; and what is computed during a stage reaches the next one's operands through `moved`.
"""

import contextlib
import functools

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import narrow
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, SWIZZLE_BYTES, TILED, TILED_BYTES
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import matrix_of, tiled

arith, llvm, nvvm, scf, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "scf", "vector")

QUAD = 4  # threads that hold the same rows of a wgmma
# Named barriers, of 16; Pallas uses the first five. The first warpgroup's own, behind which the others' are; and one
# for several together, which one may wait at while another is still at its own.
OWN_BARRIER, MEETING_BARRIER = 8, 12
WGMMA = plgpu.Layout.WGMMA
ROWS, KEYS = WGMMA.reduce(1), WGMMA.reduce(0)  # numbers of its rows, and of its columns


def start_products(query, keys, acc, weights, values, between=None):
    """Starts query @ keys.T and, behind it, acc + weights @ values. Returns both, to be read only once `settled`.

    `between`, if given, is called when the first is started, and the second is not.

    `query` [parts, 64, `columns_of` features], `keys` and `values` [block_kv, features], or their parts apart, are
    tiled references to shared memory, `acc` and `weights` arrays in registers. A query of more parts than the keys is a
    sum, one term of 8 bits behind the other; values of 8 bits are [features, block_kv], and weights `packed`.
    """
    shape = (weights.shape[0], keys.shape[-2])
    types = [plgpu.ShapeDtypeStruct(s, jnp.float32, layout=WGMMA) for s in (shape, acc.shape)]
    as_settled = plgpu.ShapeDtypeStruct(weights.shape, weights.dtype, layout=WGMMA)

    def first(query, keys, acc, weights):
        weights = mgpu.optimization_barrier(weights)
        output = mgpu.WGMMAAccumulator.from_registers(acc)
        logits = mgpu.WGMMAAccumulator.zero(*shape)
        for place in range(ir.MemRefType(query.type).shape[0]):
            logits = narrow.add_part(logits, query, keys, place)
        _asm("wgmma.commit_group.sync.aligned;")
        return logits.value, output, weights

    def second(output, weights, values):
        output = _multiply_settled(output, weights, values)
        _asm("wgmma.commit_group.sync.aligned;")
        return output

    @plgpu.inline_mgpu(arg_types=(tiled(query), tiled(keys), WGMMA, WGMMA, tiled(values)), return_type=types)
    def both(_, query, keys, acc, weights, values):
        logits, output, weights = first(query, keys, acc, weights)
        return [logits, second(output, weights, values)]

    @plgpu.inline_mgpu(arg_types=(tiled(query), tiled(keys), WGMMA, WGMMA), return_type=[*types, as_settled])
    def start_first(_, query, keys, acc, weights):
        logits, output, weights = first(query, keys, acc, weights)
        return [logits, output.value, weights]

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA, tiled(values)), return_type=types[1])
    def start_second(_, acc, weights, values):
        return second(mgpu.WGMMAAccumulator.from_registers(acc), weights, values)

    if between is None:
        return both(query, keys, acc, weights, values)
    logits, acc, weights = start_first(query, keys, acc, weights)
    between()
    return logits, start_second(acc, weights, values)


def start_weighted(acc, weights, values, share=None):
    """Starts acc + weights @ values alone, the second of `start_products`; or for a share of the values' columns."""
    its_type = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)
    shares = () if share is None else (share,)
    types = WGMMA, WGMMA, tiled(values), *(plgpu.Layout.WG_SPLAT for _ in shares)

    @plgpu.inline_mgpu(arg_types=types, return_type=its_type)
    def start(_, acc, weights, values, *shares):
        acc, weights = mgpu.optimization_barrier(acc), mgpu.optimization_barrier(weights)
        for share in shares:
            values = mgpu.memref_slice(matrix_of(values), (slice(None), _share(share, acc.shape[1] // COLUMNS)))
        output = _multiply_settled(mgpu.WGMMAAccumulator.from_registers(acc), weights, values)
        _asm("wgmma.commit_group.sync.aligned;")
        return output

    return start(acc, weights, values, *shares)


def _multiply_settled(acc, a, b):
    """acc + a @ b, as mgpu.wgmma has it, but for registers of `a` that are settled already.

    Of the last part of `b` there are the columns that acc has.
    """
    b = matrix_of(b)
    columns = ir.MemRefType(b.type).shape[-1]
    swizzle = 2 * columns
    if a.mlir_dtype == ir.IntegerType.get_signless(32):
        a, b, swizzle = _unpacked(a), mgpu.memref_transpose(b, (1, 0, 3, 2)), columns
    (depth, width), element_type = mma_utils.tiled_memref_shape(b)
    (start, step), (_, part_step), fastest = mma_utils.create_descriptor(
        b, swizzle=swizzle, large_tile=(columns, columns), group_size=(columns, width), logical_k_major=True
    )
    i64 = ir.IntegerType.get_signless(64)
    registers = acc._value.registers
    for part in range(depth // columns):
        offset = arith.constant(i64, mma_utils.encode_addr(part * part_step))
        registers = compat.wgmma_m64(
            registers,
            a[:, part * columns : (part + 1) * columns],
            llvm.add(start, offset, overflow_flags=llvm.IntegerOverflowFlags.none),
            a_transpose=None,
            b_transpose=fastest != mma_utils.Dim.K,
            a_k_stride=None,
            b_k_stride=step[1][0],
            n=acc._value.shape[1],
            swizzle=swizzle,
            element_type=element_type,
        )
    product = mgpu.FragmentedArray(_registers=registers, _layout=acc._value.layout, _is_signed=None)
    return product.to_layout(mgpu.WGMMA_LAYOUT)


def packed(weights):
    """[64, keys] float32 as float8_e4m3fn, four to a word of [64, keys / 4]: what a thread has of 16 keys.

    As a factor of products it has the keys in an order of its own, that of `transpose`.
    """
    its_type = plgpu.ShapeDtypeStruct((weights.shape[0], weights.shape[1] // 4), jnp.int32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=its_type)
    def pack(_, weights):
        i32 = ir.IntegerType.get_signless(32)
        assembly = (
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
        )
        pairs = weights.registers.reshape(-1, 2)
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((weights.shape[0], weights.shape[1] // 4)), dtype=object)
        found = registers.reshape(-1, 2)
        for place in np.ndindex(found.shape):
            found[place] = llvm.mlir_undef(ir.VectorType.get((2,), i32))
        for chunk in range(len(pairs) // 2):
            for half in range(2):
                four = [
                    vector.extract(pair, [], [i]) for pair in pairs[2 * chunk : 2 * chunk + 2, half] for i in range(2)
                ]
                word = llvm.inline_asm(i32, four, assembly, "=r,f,f,f,f")
                found[chunk // 2, half] = vector.insert(word, found[chunk // 2, half], [], [chunk % 2])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return pack(weights)


def _unpacked(words):
    """`packed` weights as the float8_e4m3fn that they are."""
    fp8 = ir.Float8E4M3FNType.get()
    shape = words.shape[0], 4 * words.shape[1]
    registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(shape), dtype=object)
    found = registers.reshape(-1, 2)
    pairs = words.registers.reshape(-1, 2)
    one, four = ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), ir.VectorType.get((4,), fp8)
    for chunk, half in np.ndindex(found.shape):
        word = vector.extract(pairs[chunk // 2, half], [], [chunk % 2])
        found[chunk, half] = vector.bitcast(four, vector.broadcast(one, word))
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None)


def start_logits(query, keys, share, shares: int, parts: list[int], started=None, next_output=None):
    """Starts query @ keys.T for a share of the keys: the second of `start_products`' operands, or a part of its rows.

    Both lie in shared memory; to be read only once `settled`. Of their columns these parts are multiplied, and added to
    the product `started` with others, which may be running. An output that is started next is settled before, and returned.
    """
    shape = (query.shape[1], keys.shape[-2] // shares)
    before, behind = ([x for x in [array] if x is not None] for array in (started, next_output))
    types = tiled(query), tiled(keys), plgpu.Layout.WG_SPLAT, *(WGMMA for _ in before + behind)
    found = [plgpu.ShapeDtypeStruct(s, jnp.float32, layout=WGMMA) for s in (shape, *(x.shape for x in behind))]

    @plgpu.inline_mgpu(arg_types=types, return_type=found)
    def start(_, query, keys, share, *arrays):
        before, behind = arrays[: len(arrays) - len(found) + 1], arrays[len(arrays) - len(found) + 1 :]
        behind = [mgpu.WGMMAAccumulator.from_registers(array).value for array in behind]
        keys, all_parts = matrix_of(keys), ir.MemRefType(query.type).shape[0]
        own = _share(share, ir.MemRefType(keys.type).shape[0] // shares)
        query = mgpu.memref_slice(query, mgpu.ds(anew(arith.constant(ir.IntegerType.get_signless(32), 0)), all_parts))
        logits = mgpu.WGMMAAccumulator.from_registers(*before) if before else _zero(shape)
        for part in parts:
            logits = narrow.add_part(logits, query, keys, part, own)
        _asm("wgmma.commit_group.sync.aligned;")
        return [logits.value, *behind]

    logits, *behind = start(query, keys, share, *before, *behind)
    return (logits, *behind) if behind else logits


def start_output(acc, weights, values, share):
    """Starts acc + weights @ values for a share of the values' columns, as many as acc has, to be `settled`.

    `weights` [64, block_kv] and `values` [block_kv, features] are tiled references to shared memory.
    """
    its_type = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, tiled(weights), tiled(values), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def start(_, acc, weights, values, share):
        own = mgpu.memref_slice(matrix_of(values), (slice(None), _share(share, acc.shape[1] // COLUMNS)))
        output = mgpu.wgmma(mgpu.WGMMAAccumulator.from_registers(acc), weights, own, swizzle=SWIZZLE_BYTES)
        _asm("wgmma.commit_group.sync.aligned;")
        return output.value

    return start(acc, weights, values, share)


def _zero(shape):
    """An accumulator whose zeros are nothing else's.

    LLVM keeps one register for all zeros of a function, a barrier's parity among them. Where that one is in a product
    too, ptxas takes its other readers for those of a running product, and runs no two at once (its remark C7514).
    """
    zeros = mgpu.WGMMAAccumulator.zero(*shape).value
    registers = np.empty_like(zeros.registers)
    f32 = ir.F32Type.get()
    for place, register in np.ndenumerate(zeros.registers):
        size = ir.VectorType(register.type).shape[0]
        registers[place] = llvm.mlir_undef(register.type)
        for i in range(size):
            zero = llvm.inline_asm(f32, [], "mov.b32 $0, 0;", "=f", has_side_effects=True)
            registers[place] = vector.insert(zero, registers[place], [], [i])
    return mgpu.WGMMAAccumulator.from_registers(
        mgpu.FragmentedArray(_registers=registers, _layout=zeros.layout, _is_signed=None)
    )


def _share(number, size: int):
    """The slice of a share: so many tiles."""
    first = arith.muli(number.registers.item(), arith.constant(ir.IntegerType.get_signless(32), size))
    return mgpu.ds(anew(first), size)


def anew(number):
    """The same as an index, of which ptxas knows nothing: so what depends on it is worked out each time.

    Else the descriptors of all of a loop's products are kept from step to step, and spilled.
    """
    i32 = ir.IntegerType.get_signless(32)
    number = llvm.inline_asm(i32, [number], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
    return arith.index_cast(ir.IndexType.get(), number)


def store_weights(weights, target, share) -> None:
    """Writes [64, columns] of 16 bits to a share of the columns of a tiled reference [64, 64] that products read."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(TILED), plgpu.Layout.WG_SPLAT))
    def store(_, weights, target, share):
        i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
        constant = lambda x: arith.constant(i32, x)
        times = lambda x, n: arith.muli(x, constant(n))
        thread = arith.remui(utils.thread_idx(), constant(128))
        warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
        row, quarter = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
        # Of every 8 columns a thread holds two that are neighbours, of two rows that lie 8 apart. A chunk of 8 columns
        # lies at column ^ row of its tile's row, both counted in the tile.
        pairs = weights.registers.reshape(-1, 2)
        start = arith.addi(times(warp, 16 * SWIZZLE_BYTES), arith.addi(times(row, SWIZZLE_BYTES), times(quarter, 4)))
        first = times(share.registers.item(), len(pairs))
        for column in range(len(pairs)):
            chunk = arith.xori(arith.addi(first, constant(column)), row)
            place = utils.getelementptr(utils.memref_ptr(target), [arith.addi(start, times(chunk, 16))], i8)
            for half, pair in enumerate(pairs[column]):
                llvm.store(pair, utils.getelementptr(place, [half * 8 * SWIZZLE_BYTES], i8))
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    store(weights, target, share)


def store_terms(numbers, targets) -> None:
    """Writes [64, 64] float32 as sums of float8_e4m3fn, a term to each tiled reference [64, 64] that products read."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, *(plgpu.RefType(TILED_BYTES) for _ in targets)))
    def store(_, numbers, *targets):
        i8, i16, i32 = (ir.IntegerType.get_signless(width) for width in (8, 16, 32))
        constant = lambda x: arith.constant(i32, x)
        times = lambda x, n: arith.muli(x, constant(n))
        thread = arith.remui(utils.thread_idx(), constant(128))
        warp, lane = arith.divui(thread, constant(32)), arith.remui(thread, constant(32))
        row, quarter = arith.divui(lane, constant(4)), arith.remui(lane, constant(4))
        # Of 8 columns a thread holds what `store_weights` says. A chunk of 16 lies at column ^ half the row of its
        # tile.
        start = arith.addi(times(warp, 16 * COLUMNS), arith.addi(times(row, COLUMNS), times(quarter, 2)))
        for column, pairs in enumerate(numbers.registers.reshape(-1, 2)):
            chunk = arith.xori(constant(column // 2), arith.shrui(row, constant(1)))
            offset = arith.addi(start, times(chunk, 16))
            for half, pair in enumerate(pairs):
                left = [vector.extract(pair, [], [i]) for i in range(2)]
                for target in targets:
                    term = llvm.inline_asm(i16, left[::-1], "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f")
                    place = utils.getelementptr(utils.memref_ptr(target), [offset], i8)
                    llvm.store(term, utils.getelementptr(place, [8 * (column % 2) + half * 8 * COLUMNS], i8))
                    rounded = llvm.inline_asm(i32, [term], "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h")
                    rounded = vector.broadcast(ir.VectorType.get((1,), i32), rounded)
                    rounded = vector.bitcast(ir.VectorType.get((2,), ir.F16Type.get()), rounded)
                    for i in range(2):
                        number = arith.extf(left[i].type, vector.extract(rounded, [], [i]))
                        left[i] = arith.subf(left[i], number)
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    store(numbers, *targets)


def meet(warpgroups: int) -> None:
    """The threads of the first so many warpgroups wait for one another, and see what all have written."""
    plgpu.inline_mgpu(arg_types=())(lambda _: _meet(warpgroups))()


def _meet(warpgroups: int):
    _asm(f"bar.sync {MEETING_BARRIER}, {128 * warpgroups};", "~{memory}")


def swapped(numbers, board, warpgroup):
    """Numbers of rows of the other of two warpgroups, for a warpgroup's own: both `meet`.

    `board` is shared memory for both, which each may write again once both have met once more.
    """
    post(numbers, board, warpgroup)
    meet(2)
    return posted(board, 1 - warpgroup)


def post(numbers, board, warpgroup) -> None:
    """Writes a warpgroup's numbers of rows to its share of `board`, which is in shared memory."""

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def store(_, numbers, board, warpgroup):
        for place, register in zip(_places_of_rows(board, warpgroup), numbers.registers.flat):
            llvm.store(vector.extract(register, [], [0]), place)

    store(numbers, board, warpgroup)


def posted(board, warpgroup):
    """The numbers that a warpgroup has posted."""
    its_type = plgpu.ShapeDtypeStruct((board.shape[0] // 2,), board.dtype, layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def load(_, board, warpgroup):
        number_type = ir.MemRefType(board.type).element_type
        registers = np.empty(mgpu.WGMMA_ROW_LAYOUT.registers_shape(its_type.shape), dtype=object)
        taken = [llvm.load(number_type, place) for place in _places_of_rows(board, warpgroup)]
        for place, number in zip(np.ndindex(registers.shape), taken):
            registers[place] = vector.broadcast(ir.VectorType.get((1,), number_type), number)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=None)

    return load(board, warpgroup)


def _places_of_rows(board, warpgroup):
    """Pointers to a thread's two rows of a warpgroup's share."""
    i32, kind = ir.IntegerType.get_signless(32), ir.MemRefType(board.type)
    constant = lambda x: arith.constant(i32, x)
    thread = arith.remui(utils.thread_idx(), constant(128))
    # 4 neighbouring threads hold the same two rows, 8 apart; a warp has 16.
    warp, row = arith.divui(thread, constant(32)), arith.divui(arith.remui(thread, constant(32)), constant(4))
    row = arith.addi(arith.muli(warp, constant(16)), row)
    row = arith.addi(row, arith.muli(warpgroup.registers.item(), constant(kind.shape[0] // 2)))
    start = utils.memref_ptr(board)
    return [utils.getelementptr(start, [arith.addi(row, constant(8 * half))], kind.element_type) for half in range(2)]


def settled(product, still_running: int):
    """A product, once no more than so many of those started last are running."""

    def wait(_, product):
        _asm(f"wgmma.wait_group.sync.aligned {still_running};")
        return mgpu.optimization_barrier(product)

    return _same_type(wait, product)


def wait_for_products(still_running: int) -> None:
    """Until no more than so many of those started last are running; nothing is read of the others."""
    plgpu.inline_mgpu(arg_types=())(lambda _: _asm(f"wgmma.wait_group.sync.aligned {still_running};", "~{memory}"))()


def moved(array):
    """A 16-bit array, or a packed one, in other registers, so that a stage may begin with them."""

    def move(_, array):
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty_like(array.registers)
        for place, register in np.ndenumerate(array.registers):
            words = _words(register)
            for i in range(ir.VectorType(words.type).shape[0]):
                word = vector.extract(words, [], [i])
                word = llvm.inline_asm(i32, [word], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
                words = vector.insert(word, words, [], [i])
            registers[place] = vector.bitcast(register.type, words)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=array.is_signed)

    return _same_type(move, array)


def any_in_warpgroup(flags, warpgroup):
    """Whether any element of `flags` is set: a scalar, for which the threads of the warpgroup wait for one another."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(_, flags, warpgroup):
        i32 = ir.IntegerType.get_signless(32)
        mine = arith.extui(i32, functools.reduce(arith.ori, _elements(flags)))
        # The vote of the warp tells ptxas that all of it goes one way.
        barrier = arith.addi(warpgroup.registers.item(), arith.constant(i32, OWN_BARRIER))
        ballot = (
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; bar.red.or.pred p, $2, 128, p; "
            "vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        )
        anyone = llvm.inline_asm(i32, [mine, barrier], ballot, "=r,r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(anyone, (), is_signed=True)

    return vote(flags, warpgroup) > 0


def _elements(array):
    """A thread's elements, one by one."""
    for register in array.registers.flat:
        for i in range(ir.VectorType(register.type).shape[0]):
            yield vector.extract(register, [], [i])


def any_in_warp(flags, after):
    """Whether any of a warp's elements of `flags` is set: a scalar, and another one for each warp.

    `after`, if given, are weights of 16 or 8 bits, none negative, which must be there first: else ptxas rounds them
    behind the vote, and until then the numbers take twice the registers. Their signs have a part in the vote: all
    zero, which ptxas cannot know.
    """
    arrays = (flags,) if after is None else (flags, after)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(_, flags, *after):
        i32 = ir.IntegerType.get_signless(32)
        mine = arith.extui(i32, functools.reduce(arith.ori, _elements(flags)))
        for array in after:
            words = functools.reduce(arith.ori, map(_words, array.registers.flat))
            for i in range(ir.VectorType(words.type).shape[0]):
                signs = arith.constant(i32, 0x8000_8000 - 2**32)
                mine = arith.ori(mine, arith.andi(vector.extract(words, [], [i]), signs))
        ballot = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        anyone = llvm.inline_asm(i32, [mine], ballot, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(anyone, (), is_signed=True)

    return vote(*arrays) > 0


def as_word(pair):
    """The 32 bits of two 16-bit numbers."""
    return vector.extract(_words(pair), [], [0])


def _words(register):
    """Its bits, as a vector of 32 bits each."""
    bits = ir.VectorType(register.type).shape[0] * utils.bitwidth(ir.VectorType(register.type).element_type)
    return vector.bitcast(ir.VectorType.get((bits // 32,), ir.IntegerType.get_signless(32)), register)


def gathered(source, indices, layout):
    """source[indices]: numbers of 32 bits from a vector in global memory, to registers of that layout."""
    is_float = jnp.issubdtype(source.dtype, jnp.floating)
    its_type = plgpu.ShapeDtypeStruct(indices.shape, source.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=its_type)
    def gather(_, source, indices):
        i64, number_type = ir.IntegerType.get_signless(64), ir.MemRefType(source.type).element_type
        start = utils.memref_ptr(source)
        registers = np.empty_like(indices.registers)
        for place, register in np.ndenumerate(indices.registers):
            size = ir.VectorType(register.type).shape
            taken = llvm.mlir_undef(ir.VectorType.get(size, number_type))
            for i in range(size[0]):
                index = arith.extsi(i64, vector.extract(register, [], [i]))
                number = llvm.load(number_type, utils.getelementptr(start, [index], number_type))
                taken = vector.insert(number, taken, [], [i])
            registers[place] = taken
        return mgpu.FragmentedArray(_registers=registers, _layout=indices.layout, _is_signed=None if is_float else True)

    return gather(source, indices)


def store_rows(array, rows, out, first_column=0) -> None:
    """Writes row i of an array to row rows[i] of an array in global memory, unless that is negative.

    Its last dimension is a row: the array's columns are its from `first_column` on.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS, plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def store(_, array, rows, column, out):
        i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
        features, start = ir.MemRefType(out.type).shape[-1], utils.memref_ptr(out)

        # Of every 8 columns a thread holds two that are neighbours, of two rows that lie 8 apart.
        pairs = array.registers.reshape(-1, 2)
        quarter = arith.remui(utils.thread_idx(), arith.constant(i32, QUAD))
        exchanges = utils.bitwidth(array.mlir_dtype) == 16 and len(pairs) % QUAD == 0
        together = 2 * QUAD if exchanges else 2  # columns of a store
        first_column = arith.addi(column.registers.item(), arith.muli(quarter, arith.constant(i32, together)))
        for half, register in enumerate(rows.registers.flat):
            row, pieces = vector.extract(register, [], [0]), list(pairs[:, half])
            if exchanges:
                pieces = [_of_one_group(pieces[i : i + QUAD], quarter) for i in range(0, len(pieces), QUAD)]
            with _where_not_negative(row):
                offset = arith.muli(arith.extsi(i64, row), arith.constant(i64, features))
                own = utils.getelementptr(start, [arith.addi(offset, arith.extui(i64, first_column))], array.mlir_dtype)
                for i, piece in enumerate(pieces):
                    llvm.store(piece, utils.getelementptr(own, [QUAD * together * i], array.mlir_dtype))

    store(array, rows, jnp.int32(first_column), out)


def _of_one_group(pairs, quarter):
    """A row's 8 columns in one thread: of 4 groups of 8, of which each of 4 threads has a pair, that of its number.

    A store of them writes 64 bytes of each row that a warp has. With 16 it takes as long, and there are four of them.
    """
    i32 = ir.IntegerType.get_signless(32)

    def has(bit):
        return arith.cmpi(
            arith.CmpIPredicate.ne, arith.andi(quarter, arith.constant(i32, bit)), arith.constant(i32, 0)
        )

    group = llvm.mlir_undef(ir.VectorType.get((QUAD,), i32))
    for i, word in enumerate(exchanged([as_word(pair) for pair in pairs], has, arith.select, utils.shfl_bfly)):
        group = vector.insert(word, group, [], [i])
    return group


def exchanged(words, has, select, from_other):
    """Words i of 4 threads, for thread i, in the order of the threads.

    `has(bit)` says whether a thread's number has that bit, and `from_other(word, bit)` is a word of the thread whose
    number differs in that bit alone.
    """
    words = [*words]
    for bit in (1, 2):
        upper = has(bit)
        for low in (i for i in range(QUAD) if not i & bit):
            high = low + bit
            taken = from_other(select(upper, words[low], words[high]), bit)
            kept = select(upper, words[high], words[low])
            words[low], words[high] = select(upper, taken, kept), select(upper, kept, taken)
    return words


def store_numbers(numbers, places, out) -> None:
    """Writes number i to places[i] of a vector in global memory, unless that is negative. There is one a row."""

    @plgpu.inline_mgpu(arg_types=(ROWS, ROWS, plgpu.RefType()))
    def store(_, numbers, places, out):
        i64, start = ir.IntegerType.get_signless(64), utils.memref_ptr(out)
        for registers in zip(numbers.registers.flat, places.registers.flat):
            number, place = (vector.extract(register, [], [0]) for register in registers)
            with _where_not_negative(place):
                llvm.store(number, utils.getelementptr(start, [arith.extsi(i64, place)], numbers.mlir_dtype))

    store(numbers, places, out)


@contextlib.contextmanager
def _where_not_negative(number):
    branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, number, arith.constant(number.type, 0)))
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.yield_([])


def _same_type(function, array):
    """Applies a function of Mosaic GPU to an array, which keeps its type."""
    its_type = plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=WGMMA)
    return plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=its_type)(function)(array)


def _asm(text: str, constraints: str = ""):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, constraints, has_side_effects=True)
