"""The kernel that merges the parts of tiles, where their number varies.

A tile of one part has its results already. Of the others, whose first parts stand in a list behind the schedule's
table, a thread block merges a share of a token's numbers at a time, and a thread a few of these: it waits for memory
once for several parts, and reads no part that a tile does not have. Where all numbers are so few that cores have room
for more threads, those of a warp share the parts (`Launch.ways`). Where tiles have few numbers in all, this kernel is
not launched (last_part.py).
"""

from dataclasses import dataclass
import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.lowering.tiles import Tiles
from paged_prefill.primitive.attention import factor_and_lse

THREADS = 128
BLOCKS = 16  # of a core, side by side
NUMBERS = 4  # neighbours of a row that a thread merges
UNROLLED = 8  # parts that are read without waiting for one another
LOOKED_UP = 4  # tiles likewise
WARP, WAYS = 32, 4  # lanes; and in how many groups of them they may share the parts


@dataclass(frozen=True)
class Launch:
    """Everything static about a launch of the merge."""

    cores: int
    tiles: int  # at most
    rows: int  # that the table has room for; behind them is how many there are, and the first of each tile
    columns: int  # of a row
    tokens: int
    tokens_of_tile: int  # of most: they are merged side by side, and others after them
    q_heads: int
    value_dim: int
    most: int  # parts of a tile

    @property
    def numbers(self) -> int:
        """Numbers of a token's output."""
        return self.q_heads * self.value_dim

    @property
    def shares(self) -> int:
        """Shares of a tile's numbers: each is what the threads of a block merge at a time, of one token."""
        return self.tokens_of_tile * self.shares_of_token

    @property
    def shares_of_token(self) -> int:
        return self._shares_by(self.ways)

    def _shares_by(self, ways: int) -> int:
        return -(-self.numbers * ways // (NUMBERS * THREADS))

    @property
    def ways(self) -> int:
        """Groups of a warp's lanes that have the same numbers, and different parts: where there are more of these than a
        thread reads at a time, and all shares are merged side by side even so.
        """
        fits = self.tokens * self._shares_by(WAYS) <= BLOCKS * self.cores
        return WAYS if self.most > UNROLLED and fits else 1

    @property
    def together(self) -> int:
        """Parts that a thread reads without waiting for one another."""
        return min(UNROLLED, -(-self.most // self.ways))

    @property
    def items(self) -> int:
        """Shares of all tiles."""
        return self.tiles * self.shares

    @property
    def blocks(self) -> int:
        """Thread blocks of the launch."""
        return min(self.items, BLOCKS * self.cores)


def merge(launch: Launch, table, of_parts, out, lse):
    """`out` [tokens * q_heads, value_dim] and `lse` [q_heads * tokens] with those of tiles that have several parts.

    `of_parts` are the same of each part, [parts * ...], in float32. Writes in place.
    """
    kernel = plgpu.kernel(
        functools.partial(merge_shares, launch, threads, lambda: lax.axis_index("block")),
        out_type=(),
        grid=(launch.blocks,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_prefill_merge",
    )
    run = compat.takes_references(kernel)
    return pl.run_state(lambda results: run(table, of_parts, results))((out, lse))


def merge_shares(launch: Launch, threads, block, table, of_parts, results):
    """What a thread does. `threads` has the words for it, `block()` is the number of its block."""
    thread, block = threads.number(), block()

    def merge_share(index, row):
        row, share = row * launch.columns, lax.rem(index, launch.shares)
        start, length, parts = (table[row + Tiles._fields.index(name)] for name in ("start", "length", "parts"))
        own, of_token = lax.div(share, launch.shares_of_token), lax.rem(share, launch.shares_of_token)
        first = (of_token * (THREADS // launch.ways) + _place_of(thread, launch.ways)) * NUMBERS

        def token(j, _):
            its_token = start + own + j * launch.tokens_of_tile
            _merge_numbers(launch, threads, parts, its_token, first, of_parts, results)

        length = jnp.maximum(length - own, 0)
        lax.fori_loop(0, lax.div(length + (launch.tokens_of_tile - 1), launch.tokens_of_tile), token, None)

    firsts, turns = launch.rows * launch.columns + 1, -(-launch.items // launch.blocks)
    together = min(LOOKED_UP, turns)

    def turn(i, _):
        """Most tiles have one part: so several are looked up at a time."""
        indices = [block + (i * together + j) * launch.blocks for j in range(together)]
        rows = [table[firsts + jnp.minimum(lax.div(index, launch.shares), launch.tiles - 1)] for index in indices]
        for index, row in zip(indices, rows):
            there = jnp.where((row >= 0) & (index < launch.items), 1, 0)
            lax.fori_loop(0, there, lambda _, carry, its=(index, row): merge_share(*its), None)

    lax.fori_loop(0, -(-turns // together), turn, None)


def _merge_numbers(launch: Launch, threads, parts, token, first, of_parts, results):
    """Numbers of a token from `first` on, if there are so many, and the lse of their row."""
    (out, lse), rows = results, launch.tokens * launch.q_heads
    here, first = first < launch.numbers, jnp.minimum(first, launch.numbers - NUMBERS)
    head, column = lax.div(first, launch.value_dim), lax.rem(first, launch.value_dim)
    row, of_lse = token * launch.q_heads + head, head * launch.tokens + token
    place, ways = [(row, of_lse, column)], launch.ways
    [(numbers, merged)] = merged_numbers(threads, parts, of_parts, rows, place, launch.together, ways)
    here = here & (_way_of(threads, ways) == 0)
    threads.store_numbers(numbers, out, row, column, here)
    threads.store(lse, of_lse, merged, here & (column == 0))


def _place_of(thread, ways: int):
    """Where a thread's numbers are among those of the block, if lanes share the parts in so many groups."""
    lanes = WARP // ways
    return lax.div(thread, jnp.int32(WARP)) * lanes + lax.rem(thread, jnp.int32(lanes))


def _way_of(threads, ways: int):
    """Which of so many groups a thread's lane is in."""
    return lax.div(threads.number() & (WARP - 1), jnp.int32(WARP // ways))


def merged_numbers(threads, parts, of_parts, rows: int, places, together: int, ways: int = 1):
    """([an output's numbers, NUMBERS of them], its row's lse) of each of these places, from those of so many parts.

    `of_parts` are the outputs, a matrix, and the lse, a vector: each part has so many `rows`. A place is a row of the
    outputs, its number among the lse, and a column. Of all places, parts are read `together`, so many at a time, and
    added up in their order: softmaxes add up by exp(lse). Of several `ways`, each has every so many-th part.
    """
    (out, lse), way = of_parts, _way_of(threads, ways) if ways > 1 else 0

    def add(i, sums):
        """Some parts; the last part stands for those that are not, and has no weight there."""
        numbers = [(i * together + j) * ways + way for j in range(together)]
        firsts = [jnp.minimum(part, parts - 1) * rows for part in numbers]
        found = [[threads.load(lse, first + of_lse) for first in firsts] for _, of_lse, _ in places]
        outputs = [
            [threads.load_words(out, first + row, column, NUMBERS) for first in firsts] for row, _, column in places
        ]
        found = [[jnp.where(part < parts, x, -jnp.inf) for part, x in zip(numbers, each)] for each in found]
        return tuple(map(_added, sums, found, outputs))

    nothing = jnp.float32(-jnp.inf), *(jnp.float32(0),) * (1 + NUMBERS)
    turns = lax.div(parts + (ways * together - 1), ways * together)
    merged = []
    for sums in lax.fori_loop(0, turns, add, (nothing,) * len(places)):
        largest, total, *summed = _of_all_ways(threads, sums, ways) if ways > 1 else sums
        factor, merged_lse = factor_and_lse(total, largest)
        merged.append(([jnp.where(total == 0, 0.0, number * factor) for number in summed], merged_lse))
    return merged


def _of_all_ways(threads, sums, ways: int):
    """The sums of all groups of lanes, which the lanes at the same place of each have; in each of these the same bits."""
    lanes = WARP // ways
    first = threads.number() & (lanes - 1)
    every = [[threads.of_lane(x, first + way * lanes) for x in sums] for way in range(ways)]
    largest = functools.reduce(jnp.maximum, [most for most, *_ in every])
    base = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = [jnp.exp(most - base) for most, *_ in every]
    totals = zip(*(rest for _, *rest in every))
    return largest, *(functools.reduce(jnp.add, [w * x for w, x in zip(weights, each)]) for each in totals)


def _added(sums, found, outputs):
    """(largest lse, sum of weights, *weighted sums of a row's numbers) with those of some more parts."""
    most, *sums = sums
    largest = functools.reduce(jnp.maximum, found, most)
    base = jnp.where(largest == -jnp.inf, 0.0, largest)
    fade = jnp.exp(most - base)
    total, *summed = [fade * x for x in sums]
    for its_lse, output in zip(found, outputs):
        weight = jnp.exp(its_lse - base)
        total, summed = total + weight, [x + weight * number for x, number in zip(summed, output)]
    return largest, total, *summed
