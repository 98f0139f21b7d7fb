"""Products of tiles of few rows: those are their columns, 8 or more, and 64 keys, or features, are rows of a wgmma.

So products, weights and a thread's registers are as few as the tile has rows, where 64 rows of which most are nobody's
take as long as if all were there.
"""

import functools

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.operations import KEYS, ROWS, SWIZZLE_BYTES, TILED, WGMMA, as_word
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS

arith, llvm, nvvm, vector = compat.mlir_dialects("arith", "llvm", "nvvm", "vector")

OF_COLUMNS = KEYS  # the layout of a number for each column
WARPS, GROUP = 4, 8  # of a warpgroup; columns of which a thread has two, of two rows that lie 8 apart
PAD = 4  # numbers behind a row of a turned output, so that threads that write a column meet other banks


def board_shape(rows: int) -> tuple[int, int]:
    """The shape of what the warps of a warpgroup tell each other: a number of each row from each warp, and one more row."""
    return WARPS + 1, rows


def room_shape(rows: int, features: int) -> tuple[int, int]:
    """The shape of an output in shared memory, through which it is transposed."""
    return rows, features + PAD


def start_logits(query, keys):
    """Starts keys @ query.T, to be `settled`: [block_kv, rows].

    `query` [parts of 64 columns, rows, 64] and `keys` [block_kv, features] are tiled references to shared memory.
    """
    its_type = plgpu.ShapeDtypeStruct((keys.shape[0], query.shape[1]), jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), plgpu.RefType(TILED)), return_type=its_type)
    def start(_, query, keys):
        logits = mgpu.WGMMAAccumulator.zero(*its_type.shape)
        for part in range(ir.MemRefType(query.type).shape[0]):
            columns = mgpu.memref_slice(keys, (slice(None), slice(part, part + 1)))
            rows = mgpu.memref_transpose(mgpu.memref_slice(query, part), (1, 0, 3, 2))
            logits = mgpu.wgmma(logits, columns, rows, swizzle=SWIZZLE_BYTES)
        return _started(logits)

    return start(query, keys)


def start_output(acc, weights, values):
    """Starts acc + values.T @ weights.T, to be `settled`.

    `acc` [features, rows] is an array, `weights` [rows, block_kv] and `values` [block_kv, features] are tiled references.
    """
    tiled, its_type = plgpu.RefType(TILED), plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, tiled, tiled), return_type=its_type)
    def start(_, acc, weights, values):
        values, weights = (mgpu.memref_transpose(matrix, (1, 0, 3, 2)) for matrix in (values, weights))
        return _started(mgpu.wgmma(mgpu.WGMMAAccumulator.from_registers(acc), values, weights, swizzle=SWIZZLE_BYTES))

    return start(acc, weights, values)


def _started(product):
    _asm("wgmma.commit_group.sync.aligned;")
    return product.value


def store_weights(weights, target) -> None:
    """Writes [block_kv, rows] of 16 bits to a tiled reference [rows, block_kv] that products read, once all `meet`."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(TILED)))
    def store(_, weights, target):
        warp, lane = _warp_and_lane()
        # Of every 64 keys a warp has 16: two matrices of 8 keys, each a chunk of the row of each of 8 columns, which
        # lies at chunk ^ row. A lane says where one of those goes.
        row, matrix = _rem(lane, GROUP), _rem(arith.divui(lane, _i32(GROUP)), 2)
        chunk = arith.xori(arith.addi(_times(warp, 2), matrix), row)
        start = arith.addi(_times(row, SWIZZLE_BYTES), _times(chunk, 16))
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
    # Pallas uses the first five of 16 barriers.
    _asm("bar.sync $0, 128;", "r", arith.addi(team.registers.item(), _i32(8)))


def largest(numbers, board, team):
    """The largest of each column of [keys, rows], for all threads, which meet; NaN if there is one."""
    its_type = plgpu.ShapeDtypeStruct(numbers.shape[1:], jnp.float32, layout=OF_COLUMNS)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=its_type)
    def find(_, numbers, board, team):
        columns = _of_warp(numbers, arith.maximumf)
        _post(columns, board)
        _meet(team)
        _, lane = _warp_and_lane()
        layout = mgpu.WGMMA_LAYOUT.reduce((0,))
        registers = np.empty(layout.registers_shape(its_type.shape), dtype=object)
        found = registers.reshape(-1)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for group in range(len(found)):
            place = arith.addi(_times(_rem(lane, 4), 2), _i32(group * GROUP))
            of_warps = [_load(pair, board, place, warp * its_type.shape[0]) for warp in range(WARPS)]
            found[group] = functools.reduce(arith.maximumf, of_warps)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return find(numbers, board, jnp.int32(team))


def largest_of_query(query, board, team):
    """The largest magnitude of each row of a loaded query [parts of 64 columns, rows, 64], for all threads, which meet."""
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
        warp, lane = _warp_and_lane()
        for turn, number in enumerate(found):  # all lanes write the same
            _store(number, board, warp, turn * WARPS)
        _meet(team)
        registers = np.empty(mgpu.WGMMA_LAYOUT.reduce((0,)).registers_shape(its_type.shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for group, place in enumerate(np.ndindex(registers.shape)):
            registers[place] = _load(pair, board, _times(_rem(lane, 4), 2), group * GROUP)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT.reduce((0,)), _is_signed=None)

    return find(query, board, jnp.int32(team))


def scale_query(query, factor, board, dtype) -> None:
    """Writes a loaded query's rows times their factors [rows] to where they are, in another dtype of 16 bits."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), OF_COLUMNS, plgpu.RefType()))
    def scale(_, query, factor, board):
        warp, _ = _warp_and_lane()
        _post([*factor.registers.flat], board, 1)  # all warps write the same
        nvvm.bar_warp_sync(_i32(-1))
        columns, its_type = ir.MemRefType(board.type).shape[1], utils.dtype_to_ir_type(jnp.dtype(dtype))
        for turn, places in enumerate(_places_of_query(query)):
            number = _load(ir.F32Type.get(), board, warp, columns + turn * WARPS)
            pair = ir.VectorType.get((2,), ir.F32Type.get())
            for place in places:
                product = arith.mulf(_widened(place), vector.broadcast(pair, number))
                llvm.store(arith.truncf(ir.VectorType.get((2,), its_type), product), place[0])

    scale(query, factor, board)


def turned(acc, m, l, room, board, team):
    """acc [features, rows] as [64, features], m [rows] and the sums over the rows of l [64, rows] as [64], by rows.

    Others than the first rows come to have any numbers.
    """
    features, rows = acc.shape
    types = [plgpu.ShapeDtypeStruct((WARPGROUP_ROWS, features), jnp.float32, layout=WGMMA)]
    types += [plgpu.ShapeDtypeStruct((WARPGROUP_ROWS,), jnp.float32, layout=ROWS)] * 2
    references = (plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(WGMMA, OF_COLUMNS, WGMMA, *references), return_type=types)
    def turn(_, acc, m, l, room, board, team):
        warp, lane = _warp_and_lane()
        quarter, eighth, width = _rem(lane, 4), arith.divui(lane, _i32(4)), features + PAD
        own = arith.addi(_times(warp, 16), eighth)  # of two rows of 64, the first
        start = arith.addi(_times(quarter, 2 * width), own)
        for (part, group, half), pair in np.ndenumerate(acc.registers.reshape(features // WARPGROUP_ROWS, -1, 2)):
            for i in range(2):
                offset = (group * GROUP + i) * width + part * WARPGROUP_ROWS + half * 8
                _store(vector.extract(pair, [], [i]), room, start, offset)
        _post(_of_warp(l, arith.addf), board)
        _post([*m.registers.flat], board, WARPS)  # all warps write the same
        _meet(team)

        pair, single = (ir.VectorType.get((size,), ir.F32Type.get()) for size in (2, 1))
        matrix, of_rows = mgpu.WGMMA_LAYOUT, mgpu.WGMMA_LAYOUT.reduce((1,))
        registers = np.empty(matrix.registers_shape((WARPGROUP_ROWS, features)), dtype=object)
        others = [np.empty(of_rows.registers_shape((WARPGROUP_ROWS,)), dtype=object) for _ in range(2)]
        for half in range(2):
            row = arith.minui(arith.addi(own, _i32(8 * half)), _i32(rows - 1))
            place = arith.addi(_times(row, width), _times(quarter, 2))
            for group, of_group in enumerate(registers.reshape(-1, 2)):
                of_group[half] = _load(pair, room, place, group * GROUP)
            numbers = [_load(ir.F32Type.get(), board, row, warp * rows) for warp in range(WARPS + 1)]
            for found, number in zip(others, (numbers[WARPS], functools.reduce(arith.addf, numbers[:WARPS]))):
                found.reshape(-1)[half] = vector.broadcast(single, number)
        layouts = (matrix, of_rows, of_rows)
        return [
            mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)
            for found, layout in zip((registers, *others), layouts)
        ]

    return turn(acc, m, l, room, board, jnp.int32(team))


def _of_warp(numbers, combine):
    """All rows of a warp's share of [rows, columns], combined: for every 8 columns a thread's two, in all its threads."""
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
    warp, lane = _warp_and_lane()
    columns = ir.MemRefType(board.type).shape[1]
    start = arith.addi(_times(_rem(lane, 4), 2), _times(warp, columns) if place is None else _i32(place * columns))
    for group, pair in enumerate(pairs):
        _store(pair, board, start, group * GROUP)


def _load(its_type, board, place, offset: int):
    start = utils.getelementptr(utils.memref_ptr(board), [place], ir.F32Type.get())
    return llvm.load(its_type, utils.getelementptr(start, [offset], ir.F32Type.get()))


def _store(number, board, place, offset: int) -> None:
    start = utils.getelementptr(utils.memref_ptr(board), [place], ir.F32Type.get())
    llvm.store(number, utils.getelementptr(start, [offset], ir.F32Type.get()))


def _places_of_query(query):
    """Of each row of a query that a warp has, every fourth, a lane's pairs of numbers: (pointer, type of one).

    Which they are of the row's numbers does not matter.
    """
    warp, lane = _warp_and_lane()
    its_type = ir.MemRefType(query.type)
    parts, rows = its_type.shape[0], its_type.shape[1] * GROUP
    start = arith.addi(_times(warp, SWIZZLE_BYTES), _times(lane, 4))
    start = utils.getelementptr(utils.memref_ptr(query), [start], ir.IntegerType.get_signless(8))

    def place(row, part):
        return utils.getelementptr(start, [(part * rows + row) * SWIZZLE_BYTES], ir.IntegerType.get_signless(8))

    return [[(place(row, part), its_type.element_type) for part in range(parts)] for row in range(0, rows, WARPS)]


def _widened(place):
    """A pair of numbers of 16 bits, in 32."""
    pointer, its_type = place
    pair = llvm.load(ir.VectorType.get((2,), its_type), pointer)
    return arith.extf(ir.VectorType.get((2,), ir.F32Type.get()), pair)


def _warp_and_lane():
    thread = _rem(utils.thread_idx(), 32 * WARPS)
    return arith.divui(thread, _i32(32)), _rem(thread, 32)


def _i32(number: int):
    return arith.constant(ir.IntegerType.get_signless(32), number)


def _times(number, factor: int):
    return arith.muli(number, _i32(factor))


def _rem(number, divisor: int):
    return arith.remui(number, _i32(divisor))


def _asm(text: str, constraints: str = "", *operands) -> None:
    constraints = ",".join(filter(None, (constraints, "~{memory}")))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [*operands], text, constraints, has_side_effects=True)
