"""The tiles of a pack in one small kernel, where XLA ends a kernel at every running sum.

What it writes is `table_of(*tiles.schedule(...))` to the bit, but for rows behind the last part. Each thread has
numbers of its own (threads.py): a sequence at first, then tiles. Every block works out the pack's sequences and the
work of all tiles, and ranks its own.
"""

from dataclasses import dataclass
import functools
import itertools
import operator

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.call import Indices
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.lowering.tiles import Stretch, Tiling
from paged_prefill.primitive.packing import harmless_contexts

WARPGROUPS = 2
THREADS = 128 * WARPGROUPS
MOST_SEQUENCES = THREADS
TILES = 32  # that a block ranks and writes: the threads that share the comparisons of one are in different warps
SHARES = THREADS // TILES
UNROLLED = 8
SCANNED = 4  # values that a step of a running sum takes together: waiting for one another takes longer than to add
MOST_TILES = 2**15  # whose work fits the shared memory


@dataclass(frozen=True)
class Launch:
    """Everything static about a launch that writes the table."""

    tiling: Tiling
    packs: int
    columns: int  # of the table

    @property
    def seqs_of_pack(self) -> int:
        return self.tiling.seqs // self.packs

    @property
    def tokens_of_pack(self) -> int:
        return self.tiling.tokens // self.packs

    @property
    def rounds(self) -> int:
        """How often all threads take a tile each, for all to be taken."""
        return -(-self.tiling.tiles // THREADS)

    @property
    def size(self) -> int:
        """Numbers of the table: where parts vary, how many there are stands behind their rows, and first parts' rows."""
        return self.number_at + (1 + self.tiling.tiles if self.tiling.parts.vary else 0)

    @property
    def number_at(self) -> int:
        """Where the number of parts stands."""
        return self.tiling.rows * self.columns


def fits(tiling: Tiling) -> bool:
    """Whether one kernel can write the table of a pack: it has a thread for each sequence, and room for each tile."""
    return tiling.seqs <= MOST_SEQUENCES and tiling.tiles * (1 + tiling.parts.vary) <= MOST_TILES


def table_in_one(launch: Launch, indices: Indices):
    """The table, from index arrays as they were given."""
    kernel = plgpu.kernel(
        functools.partial(write_table, launch, threads, lambda: lax.axis_index("block")),
        out_type=jax.ShapeDtypeStruct((launch.size,), jnp.int32),
        scratch_types={name: plgpu.SMEM((length,), jnp.int32) for name, length in scratch(launch).items()},
        grid=(-(-launch.tiling.tiles // TILES),),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_prefill_schedule",
    )
    return kernel(indices.query_offsets.reshape(-1), indices.context_lens)


def scratch(launch: Launch) -> dict[str, int]:
    """Shared memory by name, in numbers."""
    of_tiles = ["works", "numbers"] if launch.tiling.parts.vary else ["works"]
    of_sequences = ["starts", "ends", "tile_ends", "lengths"]
    sizes = dict.fromkeys(of_sequences, THREADS) | dict.fromkeys(of_tiles, launch.rounds * THREADS)
    return sizes | dict(scanned=4 * THREADS, sums=2 * THREADS)


def write_table(launch: Launch, threads, block, offsets, contexts, table, **scratch):
    """What a thread does. `threads` has the words for it, `block()` is the number of its block."""
    tiling, thread, block = launch.tiling, threads.number(), block()
    _find_sequences(launch, threads, thread, offsets, contexts, **scratch)
    tile_of = functools.partial(_tile_of, launch, threads, **scratch)

    # As many threads as there are shares have the same tile, and different parts of it.
    tile, share = block * TILES + lax.rem(thread, jnp.int32(TILES)), lax.div(thread, jnp.int32(TILES))
    row, number = tile, jnp.int32(1)
    if tiling.parts.vary or (tiling.ordered and tiling.seqs > 1):
        _weigh(launch, threads, thread, tile_of, **scratch)
        row, number, of_all = _rank(launch, threads, thread, tile, share, **scratch)
        if tiling.parts.vary:
            threads.store(table, jnp.int32(launch.number_at), of_all, (block == 0) & (thread == 0))
            its_place = launch.number_at + 1 + jnp.minimum(tile, tiling.tiles - 1)
            threads.store(table, its_place, jnp.where(number > 1, row, -1), (share == 0) & (tile < tiling.tiles))
    elif tiling.ordered:
        end, tiles = (threads.load(scratch[name], jnp.int32(0)) for name in ("ends", "tile_ends"))
        tile = tiling.reversed(tile, tiles + tiling.tiles_of(tiling.tokens - end))

    described = tile_of(tile)

    def write(i, _):
        part = share + i * SHARES
        *fields, slabs = tiling.parts.part(described, part, number) if tiling.parts.vary else described
        values = [*fields, *(column for field in zip(*slabs) for column in field)]
        exists = (part < number) & (row + part < tiling.rows)
        for column, value in enumerate(values):
            threads.store(table, jnp.where(exists, row + part, 0) * launch.columns + column, value, exists)

    lax.fori_loop(0, -(-tiling.rows // (tiling.tiles * SHARES)), write, None)


def _find_sequences(launch, threads, thread, offsets, contexts, *, starts, ends, tile_ends, lengths, scanned, **_):
    """Where each sequence starts and ends in the pack, the tiles up to its end, and its context: thread by thread.

    All that comes from memory is asked for at once.
    """
    tiling, per_pack = launch.tiling, launch.seqs_of_pack
    seq = jnp.minimum(thread, tiling.seqs - 1)
    pack = lax.div(seq, jnp.int32(per_pack))
    given = seq + pack  # a pack has one offset more than sequences
    threads.store(lengths, thread, harmless_contexts(threads.load(contexts, seq)))
    low, high = (
        pack * launch.tokens_of_pack + jnp.clip(threads.load(offsets, given + i), 0, launch.tokens_of_pack)
        for i in range(2)
    )
    end = _scan(launch, threads, thread, jnp.maximum, jnp.maximum(low, high), scanned, 0)
    threads.store(ends, thread, end)
    threads.synchronise()
    before = jnp.where(thread > 0, threads.load(ends, jnp.maximum(thread - 1, 0)), 0)
    start = jnp.maximum(before, low)
    threads.store(starts, thread, start)
    tiles = tiling.tiles_of(start - before) + tiling.tiles_of(end - start)
    tile_end = _scan(launch, threads, thread, operator.add, tiles, scanned, 2 * THREADS)
    threads.store(tile_ends, thread, tile_end)
    threads.synchronise()


def _scan(launch, threads, thread, combine, value, scanned, at):
    """The combination of the values of all threads up to this one, among those that have a sequence."""
    for step in itertools.count():
        reach = SCANNED**step  # threads whose values each has
        if reach >= launch.tiling.seqs:
            return value
        here = at + step % 2 * THREADS  # the other half is what slower threads still read
        threads.store(scanned, here + thread, value)
        threads.synchronise()
        for i in range(1, SCANNED):
            earlier = threads.load(scanned, here + jnp.maximum(thread - i * reach, 0))
            value = jnp.where(thread >= i * reach, combine(value, earlier), value)


def _tile_of(launch, threads, tile, *, starts, ends, tile_ends, lengths, **_):
    """A tile by its number in the order of its tokens."""
    tiling = launch.tiling
    passed = jnp.int32(0)  # sequences that lie before it: their tiles end at or before it
    for step in reversed(range(tiling.seqs.bit_length())):
        further = passed + 2**step
        its_end = threads.load(tile_ends, jnp.minimum(further, tiling.seqs) - 1)
        passed = jnp.where((further <= tiling.seqs) & (its_end <= tile), further, passed)
    seq, last, some = jnp.minimum(passed, tiling.seqs - 1), jnp.maximum(passed - 1, 0), passed > 0
    gap_begin = jnp.where(some, threads.load(ends, last), 0)
    begin = jnp.where(passed < tiling.seqs, threads.load(starts, seq), tiling.tokens)
    gap_tiles = tiling.tiles_of(begin - gap_begin)
    place = tile - jnp.where(some, threads.load(tile_ends, last), 0)
    owned = (passed < tiling.seqs) & (place >= gap_tiles)
    stretch = Stretch(
        begin=jnp.where(owned, begin, gap_begin),
        size=jnp.where(owned, threads.load(ends, seq), begin) - jnp.where(owned, begin, gap_begin),
        owned=owned,
        seq=seq,
        context_len=threads.load(lengths, seq),
    )
    return tiling.tile(stretch, (place - jnp.where(owned, gap_tiles, 0)) * tiling.block_q)


def _weigh(launch, threads, thread, tile_of, *, works, numbers=None, **_) -> None:
    """The work of every tile, or the size of its parts and their number."""
    tiling = launch.tiling

    def weigh(i, _):
        each = i * THREADS + thread
        described = tile_of(each)
        if not tiling.parts.vary:
            return threads.store(works, each, tiling.work(described.length, described.slabs))
        blocks = described.end_block - described.first_block
        share, number = (find(blocks, described.parts) for find in (tiling.parts.share, tiling.parts.number))
        threads.store(works, each, share)
        threads.store(numbers, each, jnp.where(described.length > 0, number, 0))

    lax.fori_loop(0, launch.rounds, weigh, None)
    threads.synchronise()


def _rank(launch, threads, thread, tile, share, *, works, sums, numbers=None, **_):
    """How many rows come before those of this tile, since there is more work in them, or as much and they come before.

    And its own number of rows, and that of all tiles.
    """
    mine, length = threads.load(works, tile), UNROLLED * -(-launch.tiling.tiles // (UNROLLED * SHARES))

    def compare(i, counts):
        before, of_all = counts
        for j in range(UNROLLED):
            other = share * length + i * UNROLLED + j
            work = threads.load(works, other)
            number = 1 if numbers is None else threads.load(numbers, other)
            before += jnp.where((work > mine) | ((work == mine) & (other < tile)), number, 0)
            of_all += number
        return before, of_all

    counts = lax.fori_loop(0, length // UNROLLED, compare, (jnp.int32(0), jnp.int32(0)))
    for i, count in enumerate(counts):
        threads.store(sums, i * THREADS + thread, count)
    threads.synchronise()
    before, of_all = (
        sum(threads.load(sums, i * THREADS + j * TILES + lax.rem(thread, jnp.int32(TILES))) for j in range(SHARES))
        for i in range(len(counts))
    )
    return before, jnp.int32(1) if numbers is None else threads.load(numbers, tile), of_all
