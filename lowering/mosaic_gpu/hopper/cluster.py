"""The merge of a tile's parts by the thread blocks of a cluster, a part each: no partial result goes through global memory.

Every block sends each of the others the columns that are theirs, into their shared memory, where a barrier counts the
bytes. Once all have come, it adds up its share of the tile's columns, part by part. So no block reads of another, and
each may end when it has its own. What is sent has a place of its own, or lies where keys and values were. Each block
tells the others when they may send: as soon as its barrier is there, or once it is done with its keys and values.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import arrivals, initialise, wait
from paged_prefill.lowering.mosaic_gpu.hopper.operations import ROWS, WGMMA, meet
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan
from paged_prefill.primitive.attention import factor_and_lse

arith, llvm, scf, vector = compat.mlir_dialects("arith", "llvm", "scf", "vector")

THREADS = 128
STORE = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
GROUP = 8  # columns of which a thread has two, of two rows


def shares(parts: int, value_dim: int) -> tuple[list[int], int]:
    """The first column of each block, and how many it has. Some may be two blocks', which write the same bits."""
    columns = GROUP * -(-value_dim // (GROUP * parts))
    return [min(block * columns, value_dim - columns) for block in range(parts)], columns


def words_of_part(columns: int) -> int:
    """Pairs of numbers that a thread sends of a part to a block with so many columns: the last is the lse of its rows."""
    return 2 * (columns // GROUP) + 1


def exchange_shape(outputs: int, parts: int, value_dim: int) -> tuple[int, ...]:
    """The shape of what a block is sent of so many outputs with so many columns each, in float32."""
    _, columns = shares(parts, value_dim)
    return outputs, parts, words_of_part(columns), THREADS, 2


def exchange_scratch(plan: Plan) -> tuple[dict, dict]:
    """What is in shared memory, by name: what may lie where keys and values were, and what else."""
    outputs = plan.warpgroups * plan.outputs
    room = plgpu.SMEM(exchange_shape(outputs, plan.splits, plan.columns_at_once), jnp.float32)
    ready = plgpu.ClusterBarrier(collective_axes=("part",), num_arrivals=plan.warpgroups)
    return dict(exchange=room, exchanged=arrivals(outputs)), dict(ready=ready)


def start_exchange(plan: Plan, exchanged, ready) -> None:
    """By a warpgroup, before it sends: long before, but where the exchange is in blocks, with which its block is done.

    `exchanged` are its own barriers, and `ready` its block's.
    """
    if plan.exchanges_in_blocks and plan.warpgroups > 1:
        meet(plan.warpgroups)
    initialise(exchanged, THREADS)
    _fence_initialised()
    _tell_all(ready)


def merge_in_cluster(plan: Plan, part, outputs, lse, owns, rooms, exchanged, ready):
    """For each of a warpgroup's outputs (a function that finds ((output, lse) of its rows from all parts), the first of its
    columns): a block's share of the columns.

    `outputs` are functions that find [64, columns], and `lse` [64], of the block's own part, and `owns` says which rows are
    there: others come to have any numbers. `rooms` is the warpgroup's shared memory and `exchanged` its barriers, one for
    each output, and `ready` its block's.
    """
    firsts, columns = shares(plan.splits, plan.columns_at_once)
    if plan.exchanges_in_blocks:
        start_exchange(plan, exchanged, ready)
    plgpu.barrier_wait(ready)
    places = [(rooms.at[i], exchanged.at[pl.ds(i, 1)]) for i in range(len(outputs))]
    for output, (room, barrier) in zip(outputs, places):
        _send(output(), lse, owns, room, barrier, part, firsts, columns)

    def find(room, barrier):
        wait(barrier, jnp.int32(0), jnp.int32(0))
        received = [_receive(room, number, columns) for number in range(plan.splits)]
        return merged(*zip(*received))

    return [functools.partial(find, *place) for place in places], jnp.minimum(part * columns, firsts[-1])


def merged(outputs, lses):
    """Output and lse from those of disjoint parts, in their order: softmaxes add up by exp(lse)."""
    weights, factor, lse = weights_of(lses)
    rows = lambda numbers: lax.broadcast_in_dim(numbers, outputs[0].shape, [0])
    summed = functools.reduce(jnp.add, [rows(weight) * output for weight, output in zip(weights, outputs)])
    return summed * rows(factor), lse


def weights_of(lses):
    """What the outputs of disjoint parts weigh, what their sum is to be multiplied with, and the lse of all."""
    largest = functools.reduce(jnp.maximum, lses)
    base = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = [jnp.exp(lse - base) for lse in lses]
    return weights, *factor_and_lse(functools.reduce(jnp.add, weights), largest)


def _send(acc, lse, owns, room, exchanged, part, firsts: list[int], columns: int) -> None:
    """Writes each block's columns of this part, and the lse, to its shared memory: a thread where the same one reads.

    `firsts` are the first columns of the blocks. As many bytes come from each part as go to each.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS, ROWS, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def send(_, acc, lse, owns, room, exchanged, part):
        i32, nothing = ir.IntegerType.get_signless(32), ir.Type.parse("!llvm.void")
        offset = arith.muli(part.registers.item(), arith.constant(i32, 8 * THREADS * words_of_part(columns)))
        barrier, size = utils.memref_ptr(exchanged), columns // GROUP
        halves = [arith.extui(i32, vector.extract(owned, [], [0])) for owned in owns.registers.flat]
        expected = arith.muli(arith.addi(*halves), arith.constant(i32, len(firsts) * (8 * size + 4)))
        arrive = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
        llvm.inline_asm(nothing, [barrier, expected], arrive, "r,r,~{memory}", has_side_effects=True)
        mapped = lambda place, block: llvm.inline_asm(
            i32, [place, arith.constant(i32, block)], "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r"
        )
        here = _own_place(room, offset)
        places = [[mapped(place, block) for place in (here, barrier)] for block in range(len(firsts))]
        for half, (its_lse, owned) in enumerate(zip(lse.registers.flat, owns.registers.flat)):
            branch = scf.IfOp(vector.extract(owned, [], [0]))
            with ir.InsertionPoint(branch.then_block):
                for place, first in zip(places, firsts):
                    for i, pair in enumerate(acc.registers.reshape(-1, 2)[first // GROUP :][:size, half]):
                        numbers = [vector.extract(pair, [], [i]) for i in range(2)]
                        store = f"{STORE}.v2.f32 [$0 + {8 * THREADS * (2 * i + half)}], {{$2, $3}}, [$1];"
                        llvm.inline_asm(nothing, [*place, *numbers], store, "r,r,f,f,~{memory}", has_side_effects=True)
                    number = vector.extract(its_lse, [], [0])
                    store = f"{STORE}.f32 [$0 + {8 * THREADS * 2 * size + 4 * half}], $2, [$1];"
                    llvm.inline_asm(nothing, [*place, number], store, "r,r,f,~{memory}", has_side_effects=True)
                scf.yield_([])

    send(acc, lse, owns, room, exchanged, part)


def _receive(room, part: int, columns: int):
    """A part's output of this block's columns, and its lse."""
    shape = (WARPGROUP_ROWS, columns)
    types = [
        plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=WGMMA),
        plgpu.ShapeDtypeStruct(shape[:1], jnp.float32, layout=ROWS),
    ]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=types)
    def receive(_, room):
        pair, i8 = ir.VectorType.get((2,), ir.F32Type.get()), ir.IntegerType.get_signless(8)
        number = words_of_part(columns)
        offset = arith.constant(ir.IntegerType.get_signless(32), 8 * THREADS * number * part)
        start = _own_place(room, offset)
        words = [llvm.load(pair, utils.getelementptr(start, [8 * THREADS * i], i8)) for i in range(number)]
        matrix, rows = mgpu.WGMMA_LAYOUT, mgpu.WGMMA_LAYOUT.reduce((1,))
        registers = np.empty(matrix.registers_shape(shape), dtype=object)
        registers.reshape(-1)[:] = words[:-1]
        of_rows = np.empty(rows.registers_shape(shape[:1]), dtype=object)
        single = ir.VectorType.get((1,), ir.F32Type.get())
        for half, place in enumerate(np.ndindex(of_rows.shape)):
            of_rows[place] = vector.broadcast(single, vector.extract(words[-1], [], [half]))
        return [
            mgpu.FragmentedArray(_registers=registers, _layout=matrix, _is_signed=None),
            mgpu.FragmentedArray(_registers=of_rows, _layout=rows, _is_signed=None),
        ]

    return receive(room)


def _own_place(room, offset):
    """A pointer to what this thread of a warpgroup has, so many bytes on."""
    i8, i32 = (ir.IntegerType.get_signless(width) for width in (8, 32))
    thread = arith.remui(utils.thread_idx(), arith.constant(i32, THREADS))
    place = arith.addi(arith.muli(thread, arith.constant(i32, 8)), offset)
    return utils.getelementptr(utils.memref_ptr(room), [place], i8)


def _tell_all(ready) -> None:
    """Arrives at the barrier of each of the cluster's blocks, behind all that the warpgroup did."""

    @plgpu.inline_mgpu()
    def synchronise(_):
        utils.warpgroup_barrier()

    synchronise()
    plgpu.barrier_arrive(ready)


def _fence_initialised() -> None:
    """Blocks of the cluster that are told of a barrier behind this find it initialised."""

    @plgpu.inline_mgpu()
    def fence(_):
        assembly = "fence.mbarrier_init.release.cluster;"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], assembly, "~{memory}", has_side_effects=True)

    fence()
