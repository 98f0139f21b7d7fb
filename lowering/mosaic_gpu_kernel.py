"""The body of the Hopper kernel: how a thread block loads pages, and how its warpgroups attend to them.

The block takes a *tile*: some tokens of one sequence, for some of the query heads that share a KV head, 64 rows (a head
and a token) to each compute warpgroup. One more warpgroup only loads: its warps copy keys and values page by page, from
where they lie into the rows of a swizzled tile in shared memory.

The warpgroups pass a turn around, FlashAttention-3's ping-pong (arXiv 2407.08608): the one whose turn it is issues the
output of block j - 1 and the logits of block j, and while it works out their softmax, the tensor cores are another's.
The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), with exp2 for exp. Its maximum is any number near the
largest logit: it follows only where a logit passes it by SLACK, so that most blocks leave the output unscaled.
"""

from dataclasses import dataclass
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.tiles import Tiles

WARPGROUP_ROWS = 64  # rows of a wgmma
SWIZZLE_BYTES = 128
COLUMNS = 64  # 16-bit elements in a swizzled row
MULTIPROCESSORS = 132  # of an H100 or H200 SXM: any other number is right too, and less balanced
# Registers of a thread that computes and of one that loads; one computing warpgroup has all it can use from the start.
REGISTERS = {2: (232, 40), 3: (160, 32)}
LOG2_E = math.log2(math.e)
SLACK = 8.0  # in powers of 2: weights of at most 256, which 16 bits hold as well as weights of at most 1
WGMMA, ROWS = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Plan:
    """Everything static about a launch."""

    group: int  # query heads of a KV head
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    pages_per_seq: int
    keys_per_head: int  # slots of one head of one pool
    block_q: int
    block_kv: int
    warpgroups: int
    stages: int
    splits: int
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    dtype: str

    @property
    def rows(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def heads(self) -> int:
        """Query heads of a tile."""
        return self.rows // self.block_q

    @property
    def head_tiles_per_group(self) -> int:
        return -(-self.group // self.heads)

    @property
    def head_tiles(self) -> int:
        return self.num_kv_heads * self.head_tiles_per_group

    @property
    def run(self) -> int:
        """Keys of one copy: they lie together, in one page."""
        return min(self.page_size, self.block_kv)

    @property
    def slab(self) -> int:
        """Rows of a warpgroup that belong to one head, and lie together in the query."""
        return min(self.block_q, WARPGROUP_ROWS)


def launch(plan: Plan, records, page_indices, query, key_rows, value_rows):
    """Runs the kernel. Returns out and lse [splits, tiles, rows]; split, out has lse's shape and value_dim."""
    dtype = jnp.dtype(plan.dtype)
    blocks = records.shape[0] * plan.head_tiles
    lse_type = jax.ShapeDtypeStruct((plan.splits, blocks, plan.rows), jnp.float32)
    out_type = jax.ShapeDtypeStruct((*query.shape[:2], plan.value_dim), dtype)
    if plan.splits > 1:
        out_type = jax.ShapeDtypeStruct((*lse_type.shape, plan.value_dim), jnp.float32)

    tiled = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(SWIZZLE_BYTES))
    plain = (plgpu.SwizzleTransform(SWIZZLE_BYTES),)

    def shared(features, transforms):
        shape = (plan.warpgroups, features // COLUMNS, WARPGROUP_ROWS, COLUMNS)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def ring(features):
        return plgpu.SMEM((plan.stages, plan.block_kv, features), dtype, transforms=tiled)

    # The same bytes seen in two ways: wgmma takes tiles of 8 rows; the copies start at any row, so not at a tile's.
    rows_of_tile = plgpu.RefUnion(
        [shared(plan.head_dim, plain)],
        [shared(plan.head_dim, tiled)],
        [shared(plan.value_dim, plain)],
        [shared(plan.value_dim, tiled)],
    )
    slabs = WARPGROUP_ROWS // plan.slab
    copies = plan.block_kv // plan.run
    scratch = dict(
        rows_of_tile=rows_of_tile,
        keys=ring(plan.head_dim),
        values=ring(plan.value_dim),
        query_here=plgpu.Barrier(num_arrivals=slabs * (plan.head_dim // COLUMNS), num_barriers=plan.warpgroups),
        keys_here=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        values_here=plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        keys_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        values_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        turn=plgpu.Barrier(num_barriers=plan.warpgroups),
        cleaned=plgpu.Barrier(num_arrivals=plan.warpgroups),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(out_type, lse_type),
        scratch_types=scratch,
        grid=(min(blocks * plan.splits, MULTIPROCESSORS),),
        grid_names=("block",),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_prefill",
    )
    return kernel(records, page_indices, query, key_rows, value_rows)


def _kernel(plan: Plan, records, page_indices, query, key_rows, value_rows, out, lse, **scratch):
    """A thread block: one warpgroup loads and the others compute, each going through the block's share of the work.

    The loads run ahead from one piece of work into the next: the steps of the rings are counted on from piece to piece.
    """
    pieces = records.shape[0] * plan.splits * plan.head_tiles
    blocks = min(pieces, MULTIPROCESSORS)
    block = lax.axis_index("block")

    def each_piece(do):
        """Calls do(piece, steps already done) for this block's pieces: longest first, to and fro over the blocks."""

        def turn(i, done):
            index = i * blocks + jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
            piece = _piece(plan, records, jnp.minimum(index, pieces - 1))
            exists = (index < pieces) & (piece.tile.length > 0)
            pl.when(exists)(lambda: do(piece, done))
            return done + jnp.where(exists, piece.steps, 0)

        lax.fori_loop(0, -(-pieces // blocks), turn, jnp.int32(0))

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.warpgroups)
    def _():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[plan.warpgroups][0], action="increase")
            # The first turn is the first warpgroup's.
            pl.when(warpgroup == plan.warpgroups - 1)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))
        each_piece(lambda piece, done: _compute(plan, piece, done, warpgroup, query, out, lse, **scratch))

    @pl.when(warpgroup == plan.warpgroups)
    def _():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(REGISTERS[plan.warpgroups][1], action="decrease")
        _load(plan, each_piece, page_indices, key_rows, value_rows, **scratch)


class Piece(NamedTuple):
    """A share of a tile's blocks of keys: the work between two visits to the schedule. All scalars, but the tile."""

    tile: Tiles
    split: Int[Array, ""]
    head_tile: Int[Array, ""]
    first: Int[Array, ""]  # block of keys
    steps: Int[Array, ""]  # blocks; at least one, all of it masked if need be, so that there is always a result
    head: Int[Array, ""]  # first query head
    heads_left: Int[Array, ""]  # heads from there to the end of the group
    first_row: Int[Array, ""]  # of the KV head, in the caches as matrices of rows


def _piece(plan: Plan, records, index) -> Piece:
    head_tile = lax.rem(index, plan.head_tiles)
    split = lax.rem(lax.div(index, plan.head_tiles), plan.splits)
    record = lax.div(index, plan.head_tiles * plan.splits)
    *fields, first_row = [records[record, i] for i in range(len(Tiles._fields) + 1)]
    tile = Tiles(*fields)
    kv_head = lax.div(head_tile, plan.head_tiles_per_group)
    in_group = lax.rem(head_tile, plan.head_tiles_per_group) * plan.heads
    share = lax.div(tile.end_block - tile.first_block + plan.splits - 1, plan.splits)
    first = tile.first_block + split * share
    return Piece(
        tile=tile,
        split=split,
        head_tile=head_tile,
        first=first,
        steps=jnp.maximum(jnp.minimum(share, tile.end_block - first), 1),
        head=kv_head * plan.group + in_group,
        heads_left=plan.group - in_group,
        first_row=first_row + kv_head * plan.keys_per_head,
    )


def _load(
    plan, each_piece, page_indices, key_rows, value_rows, *,
    keys, values, keys_here, values_here, keys_free, values_free, **_
):
    """Copies the blocks of keys and values, page by page: half of a block is one warp's work."""

    def copy(offsets, source, ring, here, free):
        """Copies the runs at these offsets of every block."""

        def row_of(piece, key):
            column = jnp.minimum(lax.div(key, plan.page_size), plan.pages_per_seq - 1)
            page = page_indices[piece.tile.seq, column]
            return piece.first_row + page * plan.page_size + lax.rem(key, plan.page_size)

        def copy_piece(piece, done):
            def step(i, _):
                slot = lax.rem(done + i, plan.stages)
                rows = [row_of(piece, (piece.first + i) * plan.block_kv + offset) for offset in offsets]

                @pl.when(done + i >= plan.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                for offset, row in zip(offsets, rows):
                    slots = ring.at[slot, pl.ds(offset, plan.run)]
                    plgpu.copy_gmem_to_smem(source.at[pl.ds(row, plan.run)], slots, here.at[slot])

            lax.fori_loop(0, piece.steps, step, None)

        each_piece(copy_piece)

    offsets = range(0, plan.block_kv, plan.run)
    half = -(-len(offsets) // 2)

    @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
    def _():
        warp = lax.axis_index("warp")
        for part, share in enumerate((offsets[:half], offsets[half:])):
            if share:
                copy_keys = functools.partial(copy, share, key_rows, keys, keys_here, keys_free)
                copy_values = functools.partial(copy, share, value_rows, values, values_here, values_free)
                pl.when(warp == 2 * part)(copy_keys)
                pl.when(warp == 2 * part + 1)(copy_values)


def _compute(
    plan, piece, done, warpgroup, query, out, lse, *,
    rows_of_tile, keys, values, query_here, keys_here, values_here, keys_free, values_free, turn, cleaned
):
    """One compute warpgroup's 64 rows: `slab` tokens of one head, then of the next."""
    dtype = jnp.dtype(plan.dtype)
    tile, first, steps = piece.tile, piece.first, piece.steps
    [query_rows], [query_tile], [out_rows], [out_tile] = rows_of_tile
    shape = (WARPGROUP_ROWS, plan.block_kv)

    def slabs():
        """(first row in the warpgroup, head in the group, first token in the tile) of each slab."""
        for row in range(0, WARPGROUP_ROWS, plan.slab):
            in_tile = warpgroup * WARPGROUP_ROWS + row
            yield row, lax.div(in_tile, plan.block_q), lax.rem(in_tile, plan.block_q)

    def load_query():
        for row, in_group, token in slabs():
            for c in range(plan.head_dim // COLUMNS):
                place = (pl.ds(tile.start + token, plan.slab), piece.head + in_group, pl.ds(c * COLUMNS, COLUMNS))
                source = query.at[place]
                target = query_rows.at[warpgroup, c, pl.ds(row, plan.slab)]
                plgpu.copy_gmem_to_smem(source, target, query_here.at[warpgroup])
        plgpu.barrier_wait(query_here.at[warpgroup])

    def take_turn():
        if plan.warpgroups > 1:
            plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn():
        if plan.warpgroups > 1:
            plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, plan.warpgroups)])

    def slot_of(i):
        return lax.rem(done + i, plan.stages)

    def multiply_keys(logits, i):
        for c in range(plan.head_dim // COLUMNS):
            columns = keys.at[slot_of(i), :, pl.ds(c * COLUMNS, COLUMNS)]
            plgpu.wgmma(logits, query_tile.at[warpgroup, c], columns.transpose((1, 0)))

    def visible(i):
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + lax.rem(
            warpgroup * WARPGROUP_ROWS, plan.block_q
        )
        if plan.block_q < WARPGROUP_ROWS:
            row = lax.rem(row, plan.block_q)
        # Positions relative to the tile's first token.
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + (
            (first + i) * plan.block_kv - tile.position
        )
        seen = (key <= row) & (key < tile.end_key - tile.position)
        return seen if plan.window is None else seen & (key > row - plan.window)

    def softmax(logits, m, l, i, masked):
        """Weights, and what the rows know now: the maximum m and the sum l."""
        # `unit` turns logits into units of log 2, and is positive: so their maximum can be taken before, and the
        # difference be one fused operation. That errs by 2^-24 of the product, too much where products are huge.
        if plan.soft_cap is not None:
            logits, unit, largest = jnp.tanh(logits * (plan.softmax_scale / plan.soft_cap)), plan.soft_cap * LOG2_E, 1
        elif plan.softmax_scale > 0:
            unit, largest = plan.softmax_scale * LOG2_E, 4096
        else:
            logits, unit, largest = logits * plan.softmax_scale, LOG2_E, math.inf
        if masked:
            logits = jnp.where(visible(i), logits, -jnp.inf)
        m_next = jnp.maximum(m, _fold(jnp.maximum, logits).max(axis=1))
        # A maximum that is passed by less than SLACK stays, so that the output need not be scaled: any will do.
        m_next = jnp.where(m_next - m > SLACK / unit, m_next, m)
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next) if masked else m_next
        if unit * largest <= 4096:
            exponents = logits * unit - lax.broadcast_in_dim(shift * unit, shape, [0])
        else:
            exponents = (logits - lax.broadcast_in_dim(shift, shape, [0])) * unit
        fade = jnp.exp2((m - shift) * unit)
        weights = jnp.exp2(exponents)
        return weights.astype(dtype), m_next, l * lax.broadcast_in_dim(fade, l.shape, [0]) + _fold(jnp.add, weights), fade

    def clean_values(i):
        """Zeroes values that no row may see: they may hold NaN, and 0 * NaN is NaN."""
        start = (first + i) * plan.block_kv

        @pl.when((start < tile.first_key) | (start + plan.block_kv > tile.end_key))
        def _():
            layout = plgpu.Layout.SMEM_GMEM_COPY((plan.block_kv, COLUMNS), dtype, SWIZZLE_BYTES)
            key = start + plgpu.broadcasted_iota(jnp.int32, (plan.block_kv, COLUMNS), 0, layout=layout)
            holds = (key >= tile.first_key) & (key < tile.end_key)
            for c in range(plan.value_dim // COLUMNS):

                @pl.when(warpgroup == c % plan.warpgroups)
                def _(c=c):
                    part = values.at[slot_of(i), :, pl.ds(c * COLUMNS, COLUMNS)]
                    part[...] = jnp.where(holds, plgpu.layout_cast(part[...], layout), 0)

            plgpu.commit_smem()
            plgpu.barrier_arrive(cleaned)
            plgpu.barrier_wait(cleaned)

    def start():
        """Block 0: its logits, and no output yet."""
        plgpu.barrier_wait(keys_here.at[slot_of(0)])
        take_turn()

        def products(logits):
            multiply_keys(logits, 0)
            pass_turn()
            return logits[...]

        logits = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(keys_free.at[slot_of(0)])
        m = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), -jnp.inf, jnp.float32), ROWS)
        l = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, 8), jnp.float32), WGMMA)
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, plan.value_dim), jnp.float32), WGMMA)
        weights, m, l, _ = softmax(logits, m, l, 0, masked=True)
        plgpu.barrier_wait(values_here.at[slot_of(0)])
        clean_values(0)
        return acc, m, l, weights

    def step(masked, i, running):
        """Block i's logits and weights, and behind them the output of block i - 1."""
        acc, m, l, weights = running
        plgpu.barrier_wait(keys_here.at[slot_of(i)])
        take_turn()

        def products(accumulators):
            output, logits = accumulators
            plgpu.wgmma(output, weights, values.at[slot_of(i - 1)])
            multiply_keys(logits, i)
            pass_turn()

        logits = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
        acc, logits = pl.run_state(products)((plgpu.ACC.init(acc), plgpu.ACC.init(logits)))
        plgpu.barrier_arrive(values_free.at[slot_of(i - 1)])
        plgpu.barrier_arrive(keys_free.at[slot_of(i)])
        weights, m, l, fade = softmax(logits, m, l, i, masked)
        plgpu.barrier_wait(values_here.at[slot_of(i)])
        return _scale_rows(acc, fade), m, l, weights

    def finish(running):
        """The output of the last block, and the rows' results."""
        acc, m, l, weights = running
        clean_values(steps - 1)
        take_turn()

        def product(output):
            plgpu.wgmma(output, weights, values.at[slot_of(steps - 1)])
            pass_turn()

        acc = pl.run_state(product)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(values_free.at[slot_of(steps - 1)])
        l = l.sum(axis=1)
        acc *= lax.broadcast_in_dim(jnp.where(l > 0, 1 / l, 0.0), acc.shape, [0])
        to_natural = plan.soft_cap or (plan.softmax_scale if plan.softmax_scale > 0 else 1.0)
        return acc, jnp.where(l > 0, m * to_natural + jnp.log(l), -jnp.inf)

    def store(acc):
        """Writes the rows that are the tile's own: as many as are left, in copies of 64, 32, ... 1 of them."""
        for c in range(plan.value_dim // COLUMNS):
            out_tile[warpgroup, c] = acc[:, c * COLUMNS : (c + 1) * COLUMNS].astype(dtype)
        plgpu.commit_smem()
        for row, in_group, token in slabs():
            left = jnp.where(in_group < piece.heads_left, jnp.clip(tile.length - token, 0, plan.slab), 0)
            for bit in range(plan.slab.bit_length()):
                size = 1 << bit
                done = lax.shift_left(lax.shift_right_logical(left, bit + 1), bit + 1)
                for c in range(plan.value_dim // COLUMNS):
                    source = out_rows.at[warpgroup, c, pl.ds(row + done, size)]
                    place = (pl.ds(tile.start + token + done, size), piece.head + in_group, pl.ds(c * COLUMNS, COLUMNS))
                    plgpu.copy_smem_to_gmem(source, out.at[place], lax.bitwise_and(left, size) != 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    load_query()
    # Blocks that every row sees whole need no mask: they lie from `clear` to `edge`.
    clear = 1
    if plan.window is not None:
        last_window = tile.position + tile.length - plan.window
        clear = jnp.clip(lax.div(last_window + plan.block_kv - 1, plan.block_kv) - first, 1, steps)
    edge = jnp.clip(lax.div(jnp.minimum(tile.position + 1, tile.end_key), plan.block_kv) - first, clear, steps)
    running = start()
    if plan.window is not None:
        running = lax.fori_loop(1, clear, functools.partial(step, True), running)
    running = lax.fori_loop(clear, edge, functools.partial(step, False), running)
    running = lax.fori_loop(edge, steps, functools.partial(step, True), running)
    acc, row_lse = finish(running)
    own_tile = (piece.split, tile.index * plan.head_tiles + piece.head_tile)
    own_rows = (*own_tile, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS))
    lse[own_rows] = row_lse
    if plan.splits == 1:
        store(acc)
    else:
        out[own_rows] = acc


def _fold(combine, array):
    """[rows, columns] as [rows, 8]: columns that lie 8 apart, and so in one thread, combined pair by pair.

    A thread waits for no other's share this way, and its own operations need not wait for one another.
    """
    parts = [array[:, c : c + 8] for c in range(0, array.shape[1], 8)]
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def _scale_rows(array, factors):
    """array * factors[:, None]. A warp whose factors are all 1 does nothing: Pallas has no such vote, Mosaic GPU has."""
    arith, llvm, scf, vector = compat.mlir_dialects("arith", "llvm", "scf", "vector")
    like = plgpu.ShapeDtypeStruct(array.shape, array.dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, ROWS), return_type=like)
    def scale(_, array, factors):
        one = mgpu.FragmentedArray.splat(arith.constant(ir.F32Type.get(), 1.0), factors.shape, factors.layout)
        differs = [vector.extract(flag, [], [0]) for flag in (factors != one).registers.flat]
        i32 = ir.IntegerType.get_signless(32)
        mine = arith.extui(i32, functools.reduce(arith.ori, differs))
        vote = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        anyone = arith.trunci(differs[0].type, llvm.inline_asm(i32, [mine], vote, "=r,r", has_side_effects=True))
        kept = list(array.registers.flat)
        branch = scf.IfOp(anyone, [register.type for register in kept], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = array * factors.broadcast_in_dim(array.shape, (0,), array.layout)
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(kept)
        registers = np.asarray(branch.results, dtype=object).reshape(array.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return scale(array, factors)
