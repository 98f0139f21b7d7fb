"""The kernel that merges tiles of several parts, where the number of parts varies.

A tile of one part has its results already. Of the others, rows of the schedule's table, thread blocks have a share of a
token's numbers each, and a thread has few: it waits for memory, twice for a few parts, and reads none that there is not.
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
UNROLLED = (8, 16)  # parts that are read without waiting for one another, of tiles with few and with many


@dataclass(frozen=True)
class Launch:
    """Everything static about it."""

    cores: int
    rows: int  # that the table has room for; behind them is how many there are
    columns: int  # of a row
    most_parts: int  # of a tile
    tokens: int
    tokens_of_tile: int  # of most: they are merged side by side, and others after them
    q_heads: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Of a token's output."""
        return self.q_heads * self.value_dim

    @property
    def unrolled(self) -> int:
        few, many = UNROLLED
        return few if self.most_parts <= few else many

    @property
    def shares(self) -> int:
        """Of a tile's numbers: of a token, as many as all threads of a block merge at a time."""
        return self.tokens_of_tile * self.shares_of_token

    @property
    def shares_of_token(self) -> int:
        return -(-self.numbers // (NUMBERS * THREADS))

    @property
    def blocks(self) -> int:
        return min(self.rows * self.shares, BLOCKS * self.cores)


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
    run, (out_of, lse_of), shape = compat.takes_references(kernel), of_parts, out.shape
    of_parts = [out_of.reshape(-1, launch.value_dim), lse_of.reshape(-1)]
    out, lse = pl.run_state(lambda results: run(table, of_parts, results))((out.reshape(-1), lse))
    return out.reshape(shape), lse


def merge_shares(launch: Launch, threads, block, table, of_parts, results):
    """What a thread does. `threads` has the words for it, `block()` is the number of its block."""
    thread, block = threads.number(), block()

    def turn(i, _):
        index = block + i * launch.blocks
        row, share = lax.div(index, launch.shares) * launch.columns, lax.rem(index, launch.shares)
        start, length, part, parts = (
            table[row + Tiles._fields.index(name)] for name in ("start", "length", "part", "parts")
        )
        own, of_token = lax.div(share, launch.shares_of_token), lax.rem(share, launch.shares_of_token)
        first = (of_token * THREADS + thread) * NUMBERS

        def token(j, _):
            its_token = start + own + j * launch.tokens_of_tile
            _merge_numbers(launch, threads, parts, its_token, first, of_parts, results)

        length = jnp.where((part == 0) & (parts > 1), length - own, 0)
        lax.fori_loop(0, lax.div(jnp.maximum(length, 0) + (launch.tokens_of_tile - 1), launch.tokens_of_tile), token, None)

    number = table[launch.rows * launch.columns] * launch.shares
    lax.fori_loop(0, lax.div(jnp.maximum(number - block, 0) + (launch.blocks - 1), launch.blocks), turn, None)


def _merge_numbers(launch: Launch, threads, parts, token, first, of_parts, results):
    """Numbers of a token from `first` on, if there are so many, and the lse of their row: softmaxes add up by exp(lse)."""
    (out_of, lse_of), (out, lse), rows = of_parts, results, launch.tokens * launch.q_heads
    here, first = first < launch.numbers, jnp.minimum(first, launch.numbers - NUMBERS)
    head, column = lax.div(first, launch.value_dim), lax.rem(first, launch.value_dim)
    row = head * launch.tokens + token

    def some(i):
        """Some parts, and the lse of each; the last part stands for those that are not, and has no weight there."""
        numbers = [i * launch.unrolled + j for j in range(launch.unrolled)]
        places = [jnp.minimum(part, parts - 1) for part in numbers]
        loaded = [threads.load(lse_of, place * rows + row) for place in places]
        return places, [jnp.where(part < parts, x, -jnp.inf) for part, x in zip(numbers, loaded)]

    def add(i, sums):
        total, *summed = sums
        for place, its_lse in zip(*some(i)):
            weight = jnp.exp(its_lse - base)
            its_numbers = threads.load_words(out_of, place * rows + token * launch.q_heads + head, column, NUMBERS)
            total += weight
            summed = [x + weight * number for x, number in zip(summed, its_numbers)]
        return total, *summed

    largest = lambda i: functools.reduce(jnp.maximum, some(i)[1])
    turns = lax.div(parts + (launch.unrolled - 1), launch.unrolled)
    most = lax.fori_loop(1, turns, lambda i, most: jnp.maximum(most, largest(i)), largest(0))
    base = jnp.where(most == -jnp.inf, 0.0, most)
    total, *summed = lax.fori_loop(0, turns, add, (jnp.zeros_like(most),) * (1 + NUMBERS))
    factor, merged = factor_and_lse(total, most)
    for i, number in enumerate(summed):
        place = token * launch.numbers + first + i
        threads.store(out, place, jnp.where(total == 0, 0.0, number * factor), here)
    threads.store(lse, row, merged, here & (column == 0))
