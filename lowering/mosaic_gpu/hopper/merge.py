"""The kernel that merges tiles of several parts, where the number of parts varies.

A tile of one part has its results already. Of the others each part, a row of the schedule's table, brings a thread block
that merges its share of the tile's numbers: so long tiles have many blocks, and only parts that there are are read.
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


@dataclass(frozen=True)
class Launch:
    """Everything static about it."""

    cores: int
    rows: int  # that the table has room for; behind them is how many there are
    columns: int  # of a row
    tokens: int
    q_heads: int
    value_dim: int

    @property
    def blocks(self) -> int:
        return min(self.rows, BLOCKS * self.cores)

    @property
    def numbers(self) -> int:
        """Of a token's output."""
        return self.q_heads * self.value_dim


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
    run, shape = compat.takes_references(kernel), out.shape
    of_parts = [x.reshape(-1) for x in of_parts]
    out, lse = pl.run_state(lambda results: run(table, of_parts, results))((out.reshape(-1), lse))
    return out.reshape(shape), lse


def merge_shares(launch: Launch, threads, block, table, of_parts, results):
    """What a thread does. `threads` has the words for it, `block()` is the number of its block."""
    thread, block = threads.number(), block()

    def share(i, _):
        row = (block + i * launch.blocks) * launch.columns
        start, length, part, parts = (
            table[row + Tiles._fields.index(name)] for name in ("start", "length", "part", "parts")
        )
        of_tile = length * launch.numbers
        size = lax.div(of_tile + (parts - 1), parts)
        end = jnp.minimum(of_tile, (part + 1) * size)
        turns = jnp.where(parts > 1, lax.div(jnp.maximum(end - part * size, 0) + (THREADS - 1), THREADS), 0)

        def number(j, _):
            at = part * size + j * THREADS + thread
            _merge_number(launch, threads, parts, start * launch.numbers + at, at < end, of_parts, results)

        lax.fori_loop(0, turns, number, None)

    number = table[launch.rows * launch.columns]
    lax.fori_loop(0, lax.div(jnp.maximum(number - block, 0) + (launch.blocks - 1), launch.blocks), share, None)


def _merge_number(launch: Launch, threads, parts, at, here, of_parts, results):
    """The number `at` of all outputs, and the lse of its row: softmaxes add up by exp(lse)."""
    (out_of, lse_of), (out, lse) = of_parts, results
    at = jnp.minimum(at, launch.tokens * launch.numbers - 1)
    token, within = lax.div(at, launch.numbers), lax.rem(at, launch.numbers)
    row = lax.div(within, launch.value_dim) * launch.tokens + token

    def its_lse(part):
        return threads.load(lse_of, part * (launch.tokens * launch.q_heads) + row)

    def add(part, sums):
        total, summed = sums
        weight = jnp.exp(its_lse(part) - base)
        number = threads.load(out_of, part * (launch.tokens * launch.numbers) + at)
        return total + weight, summed + weight * number

    largest = lax.fori_loop(1, parts, lambda part, most: jnp.maximum(most, its_lse(part)), its_lse(0))
    base = jnp.where(largest == -jnp.inf, 0.0, largest)
    nothing = jnp.zeros_like(largest)
    total, summed = lax.fori_loop(0, parts, add, (nothing, nothing))
    factor, merged = factor_and_lse(total, largest)
    threads.store(out, at, jnp.where(total == 0, 0.0, summed * factor), here)
    threads.store(lse, row, merged, here & (lax.rem(within, launch.value_dim) == 0))
