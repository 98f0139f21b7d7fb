"""The merge of a tile's parts two by two, by warpgroups that have them in their registers; where two share 64 rows.

Parts are leaves of a binary tree, which follows their number alone. Of two neighbours, the warpgroup that ends first
leaves its results in global memory, thread by thread, and goes on with its next piece; the other takes them from the
second cache, adds them to its own, and is one of two itself, until it has the whole tile. So as many results are written
and read as a tile has parts, less one. Who ends last moves no bit: sums of two are the same either way round. Nobody
waits, but for results that are being written.

Each pair has a counter and a place, known by the first part of its second half. The counters are an array of the call's
own, of zeros, and are left as they were.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import weights_of
from paged_prefill.lowering.mosaic_gpu.hopper.operations import OWN_BARRIER, ROWS, WGMMA
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, WARPGROUP_THREADS, Plan

arith, llvm, vector = compat.mlir_dialects("arith", "llvm", "vector")

SCALAR = plgpu.Layout.WG_SPLAT
WORDS = 4  # that a thread writes at once: two neighbours of each of two rows
# What a pair's counter says: one has come, both have, and the first has written its results.
WRITTEN = 3


def counters_shape(plan: Plan) -> tuple[int, ...]:
    """Of int32."""
    return (max(plan.splits - 1, 1) * plan.tiles * plan.head_tiles * plan.warpgroups,)


def places_shape(plan: Plan) -> tuple[int, ...]:
    """Of float32: a row of each pair, of what a warpgroup's threads have of its output and of its rows' lse."""
    return *counters_shape(plan), (WARPGROUP_ROWS * plan.output_columns + WORDS * WARPGROUP_THREADS)


def number_of_tile(plan: Plan, tile):
    """Tiles of a pack differ in it; it is less than their number."""
    return tile.start if plan.tiles >= plan.tokens else lax.div(tile.start, plan.block_q) + tile.seq


def merge_in_pairs(plan: Plan, piece, warpgroup, found, places, counters):
    """(output, lse) of a warpgroup's rows, from `found`, those of one part; and whether they are of the whole tile."""
    part, parts = piece.tile.part, piece.tile.parts
    of_tile = (number_of_tile(plan, piece.tile) * plan.head_tiles + piece.head_tile) * (plan.splits - 1)
    outputs, structure = jax.tree.flatten(found[0])

    def pair(carry):
        """One level of the tree, whose nodes have `size` parts."""
        size, _, outputs, lse = carry
        node = lax.div(part, size)
        second = lax.rem(node, 2)
        has_other = (node + 1 - 2 * second) * size < parts
        number = (of_tile + (node + 1 - second) * size - 1) * plan.warpgroups + warpgroup
        is_last = _comes_last(counters, number, has_other, warpgroup)
        is_first = has_other & ~is_last
        pl.when(is_first)(lambda: _leave(outputs, lse, places, counters, number, warpgroup))
        merge = lambda: _with_other(outputs, lse, places, counters, number, warpgroup)
        return size * 2, ~is_first, *lax.cond(is_last, merge, lambda: (outputs, lse))

    goes_on = lambda carry: carry[1] & (carry[0] < parts)
    _, whole, outputs, lse = lax.while_loop(goes_on, pair, (jnp.int32(1), jnp.bool_(True), outputs, found[1]))
    return (jax.tree.unflatten(structure, outputs), lse), whole


def _comes_last(counters, number, counts, warpgroup):
    """Counts a warpgroup in at a pair, if it `counts`, and says whether the other one came before."""
    i32 = ir.IntegerType.get_signless

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def count(_, counters, number, counts, warpgroup):
        text = (
            "{ .reg .pred p, q; .reg .b32 n; setp.ne.u32 p, $2, 0; mov.b32 n, 0; "
            "@p atom.relaxed.gpu.global.add.u32 n, [$1], 1; setp.ne.u32 q, n, 0; bar.red.or.pred q, $3, 128, q; "
            "vote.sync.any.pred q, q, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        )
        does = arith.andi(counts.registers.item(), arith.extui(i32(32), _is_first_thread()))
        operands = [_place(counters, number), does, _barrier(warpgroup)]
        found = llvm.inline_asm(i32(32), operands, text, "=r,l,r,r,~{memory}", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return count(counters, number, jnp.where(counts, jnp.int32(1), jnp.int32(0)), warpgroup) > 0


def _leave(outputs, lse, places, counters, number, warpgroup) -> None:
    """Writes a warpgroup's results to a pair's place, and says that they are there."""

    types = plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR, ROWS, *[WGMMA] * len(outputs)

    @plgpu.inline_mgpu(arg_types=types)
    def leave(_, places, counters, number, warpgroup, lse, *outputs):
        own, groups = _own_place(places, number), np.concatenate([x.registers.reshape(-1, 2) for x in outputs])
        for i, pairs in enumerate(groups):
            llvm.store(_joined(*pairs), _later(own, i))
        llvm.store(_joined(*lse.registers.flat), _later(own, len(groups)))
        text = (
            "{ .reg .pred p; setp.ne.u32 p, $1, 0; bar.sync $2, 128; @p red.release.gpu.global.add.u32 [$0], 1; }"
        )
        first = arith.extui(ir.IntegerType.get_signless(32), _is_first_thread())
        _instruct(text, "l,r,r", _place(counters, number), first, _barrier(warpgroup))

    leave(places, counters, number, warpgroup, lse, *outputs)


def _with_other(outputs, lse, places, counters, number, warpgroup):
    """A warpgroup's results and those of its pair's other part, which has come before and may still be writing them."""
    weights, factor, merged = weights_of((lse, _lse_of_other(places, counters, number, warpgroup)))
    factors = [weight * factor for weight in weights]
    types = plgpu.RefType(), SCALAR, ROWS, ROWS, *[WGMMA] * len(outputs)
    found = [plgpu.ShapeDtypeStruct(output.shape, jnp.float32, layout=WGMMA) for output in outputs]

    @plgpu.inline_mgpu(arg_types=types, return_type=found)
    def add(_, places, number, own_factor, its_factor, *outputs):
        four, two = (ir.VectorType.get((n,), ir.F32Type.get()) for n in (WORDS, WORDS // 2))
        own, groups = _own_place(places, number), [x.registers.reshape(-1, 2) for x in outputs]
        factors = [_joined(*(vector.broadcast(two, vector.extract(x, [], [0])) for x in of_rows.registers.flat))
                   for of_rows in (own_factor, its_factor)]
        registers = np.empty_like(np.concatenate(groups))
        for i, pairs in enumerate(np.concatenate(groups)):
            each = _joined(*pairs), llvm.load(four, _later(own, i))
            # Products are rounded before they are added, so that none comes first: no operation here may be fused.
            total = arith.addf(*(arith.mulf(numbers, factor) for numbers, factor in zip(each, factors)))
            for half in range(2):
                registers[i, half] = vector.extract_strided_slice(two, total, [2 * half], [2], [1])
        each = np.split(registers, np.cumsum([len(group) for group in groups])[:-1])
        of_outputs = [(own.reshape(output.registers.shape), output.layout) for own, output in zip(each, outputs)]
        return [mgpu.FragmentedArray(_registers=own, _layout=way, _is_signed=None) for own, way in of_outputs]

    return add(places, number, *factors, *outputs), merged


def _lse_of_other(places, counters, number, warpgroup):
    """The lse of the rows that the other one has left, once they and its output are there; nobody asks again."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP_ROWS,), jnp.float32, layout=ROWS),
    )
    def wait(_, places, counters, number, warpgroup):
        text = (
            f"{{ .reg .pred p; .reg .b32 n; AGAIN: ld.acquire.gpu.global.u32 n, [$0]; setp.ne.u32 p, n, {WRITTEN}; "
            "@p bra AGAIN; bar.warp.sync 0xffffffff; bar.sync $2, 128; setp.ne.u32 p, $1, 0; "
            "@p st.relaxed.gpu.global.u32 [$0], 0; }"
        )
        first = arith.extui(ir.IntegerType.get_signless(32), _is_first_thread())
        _instruct(text, "l,r,r", _place(counters, number), first, _barrier(warpgroup))
        four, one = (ir.VectorType.get((n,), ir.F32Type.get()) for n in (WORDS, 1))
        numbers = ir.MemRefType(places.type).shape[-1]
        words = llvm.load(four, _later(_own_place(places, number), numbers // (WORDS * WARPGROUP_THREADS) - 1))
        rows = mgpu.WGMMA_LAYOUT.reduce((1,))
        registers = np.empty(rows.registers_shape((WARPGROUP_ROWS,)), dtype=object)
        for i, place in enumerate(np.ndindex(registers.shape)):
            registers[place] = vector.broadcast(one, vector.extract(words, [], [i]))
        return mgpu.FragmentedArray(_registers=registers, _layout=rows, _is_signed=None)

    return wait(places, counters, number, warpgroup)


def _joined(*registers):
    """The numbers of some registers in one vector; behind them any, up to WORDS."""
    numbers = [vector.extract(x, [], [i]) for x in registers for i in range(ir.VectorType(x.type).shape[0])]
    together = llvm.mlir_undef(ir.VectorType.get((WORDS,), ir.F32Type.get()))
    for i, number in enumerate(numbers):
        together = vector.insert(number, together, [], [i])
    return together


def _own_place(places, number):
    """A pointer to the first words of this thread in a pair's place."""
    i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
    size = ir.MemRefType(places.type).shape[-1]
    thread = arith.remui(utils.thread_idx(), _number(WARPGROUP_THREADS))
    offset = arith.muli(arith.extui(i64, number.registers.item()), arith.constant(i64, size))
    offset = arith.addi(offset, arith.extui(i64, arith.muli(thread, arith.constant(i32, WORDS))))
    return utils.getelementptr(utils.memref_ptr(places), [offset], ir.F32Type.get())


def _later(own, i: int):
    """This thread's i-th words: those of all threads lie together."""
    return utils.getelementptr(own, [i * WORDS * WARPGROUP_THREADS], ir.F32Type.get())


def _place(counters, number):
    offset = arith.extui(ir.IntegerType.get_signless(64), number.registers.item())
    return utils.getelementptr(utils.memref_ptr(counters), [offset], ir.IntegerType.get_signless(32))


def _is_first_thread():
    """Of its warpgroup."""
    thread = arith.remui(utils.thread_idx(), _number(WARPGROUP_THREADS))
    return arith.cmpi(arith.CmpIPredicate.eq, thread, _number(0))


def _barrier(warpgroup):
    return arith.addi(warpgroup.registers.item(), _number(OWN_BARRIER))


def _number(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def _instruct(text: str, constraints: str, *operands) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), text, f"{constraints},~{{memory}}", has_side_effects=True)
