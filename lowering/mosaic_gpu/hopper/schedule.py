"""The tiles of a pack in one small kernel, where XLA ends a kernel at every running sum.

What it writes is `table_of(tiles.schedule(...))` to the bit. Each thread has numbers of its own (threads.py): a
sequence at first, then tiles. Every block works out the pack's sequences and the work of all tiles, and ranks its own.
"""

from dataclasses import dataclass
import functools
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
TILES = 64  # that a block ranks and writes; as many threads share the comparisons of one
SHARES = THREADS // TILES
UNROLLED = 8
MOST_TILES = 2**15  # whose work fits the shared memory


@dataclass(frozen=True)
class Launch:
    """Everything static about it."""

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
        """Of all threads over all tiles."""
        return -(-self.tiling.tiles // THREADS)


def fits(tiling: Tiling) -> bool:
    return tiling.seqs <= MOST_SEQUENCES and tiling.tiles <= MOST_TILES


def table_in_one(launch: Launch, indices: Indices):
    """The table, from index arrays as they were given."""
    size = launch.tiling.tiles * launch.columns
    kernel = plgpu.kernel(
        functools.partial(write_table, launch, threads, lambda: lax.axis_index("block")),
        out_type=jax.ShapeDtypeStruct((size,), jnp.int32),
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
    of_sequences = ("starts", "ends", "tile_ends")
    return dict.fromkeys(of_sequences, THREADS) | dict(
        scanned=4 * THREADS, works=launch.rounds * THREADS, counts=THREADS
    )


def write_table(launch: Launch, threads, block, offsets, contexts, table, *, works, counts, **scratch):
    """What a thread does. `threads` has the words for it, `block()` is the number of its block."""
    tiling, thread, block = launch.tiling, threads.number(), block()
    _find_sequences(launch, threads, thread, offsets, **scratch)
    tile_of = functools.partial(_tile_of, launch, threads, contexts, **scratch)

    tile = block * TILES + lax.rem(thread, jnp.int32(TILES))
    row, writes = tile, thread < TILES
    if tiling.ordered and tiling.seqs == 1:
        end, tiles = (threads.load(scratch[name], jnp.int32(0)) for name in ("ends", "tile_ends"))
        tile = tiling.reversed(tile, tiles + tiling.tiles_of(tiling.tokens - end))
    elif tiling.ordered:

        def weigh(i, _):
            each = i * THREADS + thread
            described = tile_of(each)
            threads.store(works, each, tiling.work(described.length, described.slabs))

        lax.fori_loop(0, launch.rounds, weigh, None)
        threads.synchronise()
        row = _rank(launch, threads, thread, tile, works, counts)

    *fields, slabs = tile_of(tile)
    values = [*fields, *(column for field in zip(*slabs) for column in field)]
    exists = writes & (row < tiling.tiles)
    for column, value in enumerate(values):
        threads.store(table, jnp.where(exists, row, 0) * launch.columns + column, value, exists)


def _find_sequences(launch, threads, thread, offsets, starts, ends, tile_ends, scanned) -> None:
    """Where each sequence starts and ends in the pack, and the tiles up to its end: thread by thread."""
    tiling, per_pack = launch.tiling, launch.seqs_of_pack
    seq = jnp.minimum(thread, tiling.seqs - 1)
    pack = lax.div(seq, jnp.int32(per_pack))
    given = seq + pack  # a pack has one offset more than sequences
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
    for step in range((launch.tiling.seqs - 1).bit_length()):
        here = at + step % 2 * THREADS  # the other half is what slower threads still read
        threads.store(scanned, here + thread, value)
        threads.synchronise()
        earlier = threads.load(scanned, here + jnp.maximum(thread - 2**step, 0))
        value = jnp.where(thread >= 2**step, combine(value, earlier), value)
    return value


def _tile_of(launch, threads, contexts, tile, *, starts, ends, tile_ends, **_):
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
        context_len=harmless_contexts(threads.load(contexts, seq)),
    )
    return tiling.tile(stretch, (place - jnp.where(owned, gap_tiles, 0)) * tiling.block_q)


def _rank(launch, threads, thread, tile, works, counts):
    """How many tiles have more work than this one, or as much and come before it."""
    mine, share = threads.load(works, tile), lax.div(thread, jnp.int32(TILES))
    length = launch.rounds * THREADS // SHARES

    def compare(i, count):
        for j in range(UNROLLED):
            other = share * length + i * UNROLLED + j
            work = threads.load(works, other)
            count += jnp.where((work > mine) | ((work == mine) & (other < tile)), 1, 0)
        return count

    threads.store(counts, thread, lax.fori_loop(0, length // UNROLLED, compare, jnp.int32(0)))
    threads.synchronise()
    return sum(threads.load(counts, lax.rem(thread, jnp.int32(TILES)) + i * TILES) for i in range(SHARES))
