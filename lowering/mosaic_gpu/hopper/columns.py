"""Products of tiles of few rows: those are their columns, 8 or more, and 64 keys, or features, are rows of a wgmma.

So products, weights and a thread's registers are as few as the tile has rows, where 64 rows of which most are nobody's
take as long as if all were there.
"""

import functools

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import narrow
from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS, KEYS, ROWS, SWIZZLE_BYTES, TILED, WGMMA
from paged_prefill.lowering.mosaic_gpu.hopper.operations import OWN_BARRIER, anew, as_word
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_COLUMNS, WARPGROUP_ROWS
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import matrix_of, tiled, whole

arith, llvm, nvvm, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "vector")

OF_COLUMNS = KEYS  # the layout of a number for each column
WARPS, GROUP = 4, 8  # of a warpgroup; columns of which a thread has two, of two rows that lie 8 apart
SUMS = 3  # of products whose sum logits of wide heads are: steps of one would wait for one another
PAD = 4  # numbers behind a row of a turned output, so that threads that write a column meet other banks


def board_shape(rows: int) -> tuple[int, int]:
    """Of what the warps of a warpgroup tell each other: a number of each row from each warp, and a row more."""
    return WARPS + 1, rows


def room_shape(rows: int, features: int) -> tuple[int, int]:
    """The shape of an output in shared memory, through which it is transposed, so many features at a time."""
    return rows, whole(min(features, WARPGROUP_COLUMNS)) + PAD


def start_logits(query, keys):
    """Starts keys @ query.T, to be `settled`: arrays [block_kv, rows] whose sum it is.

    `query` [parts, rows, columns] and `keys` [block_kv, features], or their parts apart, are tiled references to shared
    memory.
    """
    sums, apart = SUMS if keys.shape[-1] > WARPGROUP_COLUMNS else 1, query.shape[-1] < COLUMNS
    its_type = plgpu.ShapeDtypeStruct((keys.shape[-2], query.shape[1]), jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(tiled(query), tiled(keys)), return_type=[its_type] * sums)
    def start(_, *operands):
        if sums > 1:
            operands = [*map(_anew, operands)]
        query, keys = operands[0], matrix_of(operands[1])
        logits = [mgpu.WGMMAAccumulator.zero(*its_type.shape).value for _ in range(sums)]
        factors, firsts = [], []
        for place in range(ir.MemRefType(query.type).shape[0]):
            part, first = narrow.place_of(query, keys, place)
            columns = mgpu.memref_slice(keys, (slice(None), slice(part, part + 1)))
            factors.append((columns, mgpu.memref_transpose(mgpu.memref_slice(query, place), (1, 0, 3, 2))))
            firsts.append(first)
        if sums > 1:
            for first in range(0, len(factors), sums):
                some = factors[first : first + sums]
                logits[: len(some)] = multiply_in_turns(logits[: len(some)], some)
        elif apart:
            acc = mgpu.WGMMAAccumulator.from_registers(*logits)
            for matrices, first in zip(factors, firsts):
                acc = narrow.multiply(acc, *matrices, first_of_a=first)
            logits = [acc.value]
        else:
            for matrices in factors:
                logits = [_multiply(*logits, *matrices)]
        start_group()
        return logits

    return start(query, keys)


def start_output(acc, weights, values):
    """Starts acc + values.T @ weights.T, to be `settled`.

    `acc` [`whole` of features, rows] is an array, `weights` [rows, block_kv] and `values` [block_kv, features], or
    their parts apart, are tiled references. Values may have other features behind these. Rows for which there are none
    come to have any numbers: a wgmma reads 64 features, and behind the last of a part lies what nobody wrote.
    """
    its_type = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, tiled(weights), tiled(values)), return_type=its_type)
    def start(_, acc, weights, values):
        weights, is_wide, values = _transposed(weights), acc.shape[0] > WARPGROUP_COLUMNS, matrix_of(values)
        parts = acc.shape[0] // COLUMNS
        values = mgpu.memref_slice(values, (slice(None), slice(0, parts)))
        values = _transposed(_anew(values) if is_wide else values)
        if is_wide:
            matrices = [mgpu.memref_slice(values, slice(part, part + 1)) for part in range(parts)]
            sums = [acc[row : row + WARPGROUP_ROWS] for row in range(0, acc.shape[0], WARPGROUP_ROWS)]
            acc = joined(multiply_in_turns(sums, [(matrix, weights) for matrix in matrices]))
        else:
            acc = _multiply(acc, values, weights)
        start_group()
        return acc

    return start(acc, weights, values)


def _transposed(matrix):
    return mgpu.memref_transpose(matrix, (1, 0, 3, 2))


def joined(sums):
    """Arrays of 64 rows each as one."""
    registers = np.concatenate([some.registers for some in sums])
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def multiply_in_turns(sums, factors):
    """Each of these sums, of 64 rows, plus a product, as mgpu.wgmma has them, but step by step in turns: none waits for
    what the step before it adds. First factors may be in registers, which are settled (operations.py).
    """
    group, depth_of_step = COLUMNS, 16  # of the depth: how much a swizzled row of `b` has, and a step takes
    found = [mgpu.WGMMAAccumulator.from_registers(array)._value for array in sums]
    layout, found, i64 = found[0].layout, [array.registers for array in found], ir.IntegerType.get_signless(64)
    described = []
    for a, b in factors:
        (depth, width), element_type = mma_utils.tiled_memref_shape(b)
        matrices = [(b, dict(group_size=(group, width), logical_k_major=True))]
        if not isinstance(a, mgpu.FragmentedArray):
            matrices.append((a, dict(group_size=(WARPGROUP_ROWS, group), logical_k_major=False)))
        swizzle = lambda matrix: 2 * max(ir.MemRefType(matrix.type).shape[2:])
        described.append([mma_utils.create_descriptor(matrix, swizzle(matrix), **how) for matrix, how in matrices])
    for part, step in np.ndindex(depth // group, group // depth_of_step):
        for i, matrices in enumerate(described):
            places, steps, transposes = [], [], []
            for (start, (_, (step_bytes, *_))), (_, part_bytes), fastest in matrices:
                offset = arith.constant(i64, mma_utils.encode_addr(part * part_bytes + step * step_bytes))
                places.append(llvm.add(start, offset, overflow_flags=llvm.IntegerOverflowFlags.none))
                steps.append(step_bytes)
                transposes.append(fastest != mma_utils.Dim.K)
            if len(matrices) == 1:
                column = part * group + step * depth_of_step
                places.append(factors[i][0][:, column : column + depth_of_step])
                steps.append(None)
                transposes.append(None)
            found[i] = compat.wgmma_m64(
                found[i],
                *places[::-1],
                a_transpose=transposes[1],
                b_transpose=transposes[0],
                a_k_stride=steps[1],
                b_k_stride=steps[0],
                n=width,
                swizzle=2 * depth_of_step,  # so many bytes at a time
                element_type=element_type,
            )
    arrays = [mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None) for registers in found]
    return [array.to_layout(mgpu.WGMMA_LAYOUT) for array in arrays]


def _multiply(acc, a, b):
    swizzle = 2 * max(ir.MemRefType(b.type).shape[2:])
    return mgpu.wgmma(mgpu.WGMMAAccumulator.from_registers(acc), a, b, swizzle=swizzle).value


def start_group():
    """Makes a group of the products that were started, to be `settled`."""
    _asm("wgmma.commit_group.sync.aligned;")


def _anew(reference):
    """The same reference, whose descriptors are worked out each time (operations.anew): wide ones have too many."""
    return mgpu.memref_slice(reference, mgpu.ds(anew(i32(0)), ir.MemRefType(reference.type).shape[0]))


def store_weights(weights, target) -> None:
    """Writes [block_kv, rows] of 16 bits to a tiled reference [rows, block_kv] that products read, once all `meet`."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(TILED)))
    def store(_, weights, target):
        warp, lane = warp_and_lane()
        # Of every 64 keys a warp has 16: two matrices of 8 keys, each a chunk of the row of each of 8 columns, which
        # lies at chunk ^ row. A lane says where one of those goes.
        row, matrix = rem(lane, GROUP), rem(arith.divui(lane, i32(GROUP)), 2)
        chunk = arith.xori(arith.addi(times(warp, 2), matrix), row)
        start = arith.addi(times(row, SWIZZLE_BYTES), times(chunk, 16))
        start = utils.getelementptr(utils.memref_ptr(target), [start], ir.IntegerType.get_signless(8))
        groups = weights.registers.reshape(weights.shape[0] // WARPGROUP_ROWS, weights.shape[1] // GROUP, 2)
        for keys, columns in np.ndindex(groups.shape[:2]):
            offset = (columns * groups.shape[0] + keys) * GROUP * SWIZZLE_BYTES
            words = [as_word(pair) for pair in groups[keys, columns]]
            _asm(f"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0 + {offset}], {{$1, $2}};", "r,r,r", start, *words)
        # Products read by another way than threads write.
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    store(weights, target)


def meet(team) -> None:
    """The threads of a team's warpgroup wait for one another, and see what all have written."""
    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))(lambda _, team: _meet(team))(jnp.int32(team))


def _meet(team):
    _asm("bar.sync $0, 128;", "r", arith.addi(team.registers.item(), i32(OWN_BARRIER)))


def largest(numbers, board, team):
    """The largest of each column of [keys, rows], for all threads, which meet; NaN if there is one."""
    its_type = plgpu.ShapeDtypeStruct(numbers.shape[1:], jnp.float32, layout=OF_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def find(_, numbers, board, team):
        columns = _of_warp(numbers, arith.maximumf)
        _post(columns, board)
        _meet(team)
        _, lane = warp_and_lane()
        layout = mgpu.WGMMA_LAYOUT.reduce((0,))
        registers = np.empty(layout.registers_shape(its_type.shape), dtype=object)
        found = registers.reshape(-1)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for group in range(len(found)):
            place = arith.addi(times(rem(lane, 4), 2), i32(group * GROUP))
            of_warps = [_load(pair, board, place, warp * its_type.shape[0]) for warp in range(WARPS)]
            found[group] = functools.reduce(arith.maximumf, of_warps)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return find(numbers, board, jnp.int32(team))


def largest_of_query(query, board, team):
    """The largest magnitude of each row of a query [parts of 64 columns, rows, 64], for all threads, which meet."""
    rows = query.shape[1]
    its_type = plgpu.ShapeDtypeStruct((rows,), jnp.float32, layout=OF_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def find(_, query, board, team):
        found = []
        for places in _places_of_query(query):
            pairs = [_widened(place) for place in places]
            numbers = [vector.extract(pair, [], [i]) for pair in pairs for i in range(2)]
            number = functools.reduce(arith.maximumf, [arith.maximumf(x, arith.negf(x)) for x in numbers])
            for distance in (1, 2, 4, 8, 16):
                number = arith.maximumf(number, utils.shfl_bfly(number, distance))
            found.append(number)
        _meet(team)  # all have read what was there
        warp, lane = warp_and_lane()
        for turn, number in enumerate(found):  # all lanes write the same
            _store(number, board, warp, turn * WARPS)
        _meet(team)
        registers = np.empty(mgpu.WGMMA_LAYOUT.reduce((0,)).registers_shape(its_type.shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for group, place in enumerate(np.ndindex(registers.shape)):
            registers[place] = _load(pair, board, times(rem(lane, 4), 2), group * GROUP)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT.reduce((0,)), _is_signed=None)

    return find(query, board, jnp.int32(team))


def scale_query(query, factor, board, dtype, sorts=0) -> None:
    """Writes a loaded query's rows times their factors [rows] to where they are, in another dtype of 16 bits.

    Pairs of features of so many parts together change places where it `sorts` them: from the first one on, four that
    are a quarter of all apart, then from the second one on, and so on.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), OF_COLUMNS, plgpu.RefType()))
    def scale(_, query, factor, board):
        warp, _ = warp_and_lane()
        _post([*factor.registers.flat], board, 1)  # all warps write the same
        nvvm.bar_warp_sync(i32(-1))
        columns, its_type = ir.MemRefType(board.type).shape[1], utils.dtype_to_ir_type(jnp.dtype(dtype))
        taken = [[_widened(place) for place in places] for places in _places_of_query(query)]
        if sorts:
            nvvm.bar_warp_sync(i32(-1))
        for turn, (numbers, places) in enumerate(zip(taken, _places_of_query(query, sorts))):
            number = _load(ir.F32Type.get(), board, warp, columns + turn * WARPS)
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            for numbers_of_pair, (place, _) in zip(numbers, places):
                product = arith.mulf(numbers_of_pair, vector.broadcast(pair, number))
                llvm.store(arith.truncf(ir.VectorType.get((2,), its_type), product), place)

    scale(query, factor, board)


def turned(acc, features: int, room, team, sorted_by=(1, 8)):
    """The first features of acc [features, rows] as [64, features]. Others than the first rows come to have any
    numbers.

    `sorted_by` says how far features lie apart of a warp's neighbouring rows, and of its row 0 and row 8.
    """
    rows = acc.shape[1]
    its_type = plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, features), jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def turn(_, acc, room, team):
        quarter, own = _quarter_and_row()
        width = ir.MemRefType(room.type).shape[1]
        warp, lane = warp_and_lane()
        feature = arith.addi(times(warp, 16), times(arith.divui(lane, i32(4)), sorted_by[0]))
        start = arith.addi(times(quarter, 2 * width), feature)
        _meet(team)  # all have read what was there
        for (part, group, half), pair in np.ndenumerate(acc.registers.reshape(acc.shape[0] // WARPGROUP_ROWS, -1, 2)):
            for i in range(2):
                offset = (group * GROUP + i) * width + part * WARPGROUP_ROWS + half * sorted_by[1]
                _store(vector.extract(pair, [], [i]), room, start, offset)
        _meet(team)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((WARPGROUP_ROWS, features)), dtype=object)
        for half in range(2):
            row = arith.minui(arith.addi(own, i32(8 * half)), i32(rows - 1))
            place = arith.addi(times(row, width), times(quarter, 2))
            for group, of_group in enumerate(registers.reshape(-1, 2)):
                of_group[half] = _load(pair, room, place, group * GROUP)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return turn(acc, room, jnp.int32(team))


def turned_numbers(m, l, board, team):
    """m [rows] and the sums over the rows of l [64, rows], as [64], by rows; of others than the first anything."""
    types = [plgpu.ShapeDtypeStruct((WARPGROUP_ROWS,), jnp.float32, layout=ROWS)] * 2

    @plgpu.inline_mgpu(arg_types=(OF_COLUMNS, WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=types)
    def turn(_, m, l, board, team):
        _, own = _quarter_and_row()
        _post(_of_warp(l, arith.addf), board)
        _post([*m.registers.flat], board, WARPS)  # all warps write the same
        _meet(team)
        layout, rows = mgpu.WGMMA_LAYOUT.reduce((1,)), l.shape[1]
        found = [np.empty(layout.registers_shape((WARPGROUP_ROWS,)), dtype=object) for _ in types]
        single = ir.VectorType.get((1,), ir.F32Type.get())
        for half in range(2):
            row = arith.minui(arith.addi(own, i32(8 * half)), i32(rows - 1))
            numbers = [_load(ir.F32Type.get(), board, row, warp * rows) for warp in range(WARPS + 1)]
            for registers, number in zip(found, (numbers[WARPS], functools.reduce(arith.addf, numbers[:WARPS]))):
                registers.reshape(-1)[half] = vector.broadcast(single, number)
        return [mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None) for registers in found]

    return turn(m, l, board, jnp.int32(team))


def _quarter_and_row():
    """Which of a row's threads this is, and the first of its two rows of 64."""
    warp, lane = warp_and_lane()
    return rem(lane, 4), arith.addi(times(warp, 16), arith.divui(lane, i32(4)))


def _of_warp(numbers, combine):
    """All rows of a warp's [rows, columns], combined: a thread's two of every 8 columns, in all its threads."""
    columns = numbers.registers.reshape(-1, numbers.shape[1] // GROUP, 2)
    found = [functools.reduce(combine, columns[:, group].flat) for group in range(columns.shape[1])]
    for distance in (4, 8, 16):  # lanes that hold the same columns
        found = [combine(pair, _of_other_lane(pair, distance)) for pair in found]
    return found


def _of_other_lane(pair, distance: int):
    other = llvm.mlir_undef(pair.type)
    for i in range(2):
        number = utils.shfl_bfly(vector.extract(pair, [], [i]), distance)
        other = vector.insert(number, other, [], [i])
    return other


def _post(pairs, board, place: int | None = None) -> None:
    """Writes two of every 8 columns to a row of the board: that of the warp, if none is given."""
    warp, lane = warp_and_lane()
    columns = ir.MemRefType(board.type).shape[1]
    start = arith.addi(times(rem(lane, 4), 2), times(warp, columns) if place is None else i32(place * columns))
    for group, pair in enumerate(pairs):
        _store(pair, board, start, group * GROUP)


def _load(its_type, board, place, offset: int):
    start = utils.getelementptr(utils.memref_ptr(board), [place], ir.F32Type.get())
    return llvm.load(its_type, utils.getelementptr(start, [offset], ir.F32Type.get()))


def _store(number, board, place, offset: int) -> None:
    start = utils.getelementptr(utils.memref_ptr(board), [place], ir.F32Type.get())
    llvm.store(number, utils.getelementptr(start, [offset], ir.F32Type.get()))


def _places_of_query(query, sorts=0):
    """Of each row of a query that a warp has, every fourth, a lane's pairs of numbers: (pointer, type of one).

    Which they are of the row's numbers does not matter; or where `scale_query` has them, if it `sorts`.
    """
    warp, lane = warp_and_lane()
    its_type, lanes = ir.MemRefType(query.type), 32
    parts, rows = its_type.shape[0], its_type.shape[1] * GROUP

    def place(row, part):
        place = times(lane, 4)
        if sorts:  # a chunk of 4 pairs lies at chunk ^ row
            swizzle = times(arith.addi(warp, i32(row % GROUP)), 4)
            pair = arith.addi(arith.xori(lane, swizzle), i32(part % sorts * lanes))
            quarter = GROUP * sorts
            pair = arith.addi(times(rem(pair, quarter), 4), arith.divui(pair, i32(quarter)))
            part -= part % sorts
            place = times(arith.divui(pair, i32(lanes)), rows * SWIZZLE_BYTES)
            place = arith.addi(place, times(arith.xori(rem(pair, lanes), swizzle), 4))
        start = arith.addi(times(warp, SWIZZLE_BYTES), place)
        start = utils.getelementptr(utils.memref_ptr(query), [start], ir.IntegerType.get_signless(8))
        return utils.getelementptr(start, [(part * rows + row) * SWIZZLE_BYTES], ir.IntegerType.get_signless(8))

    return [[(place(row, part), its_type.element_type) for part in range(parts)] for row in range(0, rows, WARPS)]


def _widened(place):
    """A pair of numbers of 16 bits, in 32."""
    pointer, its_type = place
    pair = llvm.load(ir.VectorType.get((2,), its_type), pointer)
    return arith.extf(ir.VectorType.get((2,), ir.F32Type.get()), pair)


def warp_and_lane():
    thread = rem(utils.thread_idx(), 32 * WARPS)
    return arith.divui(thread, i32(32)), rem(thread, 32)


def i32(number: int):
    return arith.constant(ir.IntegerType.get_signless(32), number)


def times(number, factor: int):
    return arith.muli(number, i32(factor))


def rem(number, divisor: int):
    return arith.remui(number, i32(divisor))


def _asm(text: str, constraints: str = "", *operands) -> None:
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [*operands], text, constraints, has_side_effects=True)
