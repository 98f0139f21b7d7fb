"""What there is to know of tiles: of each sequence once a call, of those that walk side by side once a turn.

These are integers, in some thirty small steps. XLA's CPU compiler would compile a kernel for each, 8 to 20 ms of CPU,
which takes longer than all it computes; `in_one` has it make one of them all.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32


class Sequence(NamedTuple):
    """What there is to know of sequences, all int32."""

    seq: Int[Array, " seqs"]
    start: Int[Array, " seqs"]
    length: Int[Array, " seqs"]
    context_len: Int[Array, " seqs"]
    pool: Int[Array, " seqs"]
    key_pool: Int[Array, " seqs"]
    value_pool: Int[Array, " seqs"]
    first_row: Int[Array, " seqs"]  # that is in a tile of this height
    tiles: Int[Array, " seqs"]  # of this height; a tile in several lanes counts as many
    first_tile: Int[Array, " seqs"]  # its number among those of all sequences
    splits: Int[Array, " seqs"]  # lanes that share a tile
    height: Int[Array, " seqs"]

    @classmethod
    def of(cls, numbers):
        """Those of an array that has them side by side."""
        return cls(*jnp.unstack(numbers, axis=1))


class Tile(NamedTuple):
    """What there is to know of tiles, all int32."""

    seq: Int[Array, " lanes"]
    pool: Int[Array, " lanes"]
    key_pool: Int[Array, " lanes"]
    value_pool: Int[Array, " lanes"]
    start_key: Int[Array, " lanes"]  # no row looks at keys outside start_key : end_key
    end_key: Int[Array, " lanes"]
    first_run: Int[Array, " lanes"]  # that holds start_key
    first_new: Int[Array, " lanes"]  # where the sequence's first new token stands


class Seen(NamedTuple):
    """What each token of a tile sees: keys low <= j < high, and of its chunk those with a bit in `tree`, if given."""

    low: Int[Array, "lanes height"] | None
    high: Int[Array, "lanes height"]
    tree: UInt32[Array, "lanes height words"] | None

    def visible(self, key: Int[Array, "lanes keys"], first_new) -> Bool[Array, "lanes height keys"]:
        """Which tokens see which keys."""
        key = key[:, None, :]
        visible = key < self.high[:, :, None]
        if self.low is not None:
            visible &= key >= self.low[:, :, None]
        if self.tree is None:
            return visible
        new = key - first_new[:, None, None]
        word = jnp.take_along_axis(self.tree, jnp.maximum(new, 0) >> 5, axis=2, mode="clip")
        bit = (word >> (new & 31).astype(jnp.uint32)) & jnp.uint32(1)
        in_tree = (new >= 0) & (new < 32 * self.tree.shape[2])
        return visible & ((bit != 0) | ~in_tree)


class Table(NamedTuple):
    """What a walk's turns are told from."""

    numbers: Int[Array, "seqs numbers"]  # those of `Sequence`
    turns: Int[Array, ""]
    any_tiles: Bool[Array, ""]


class Plan(NamedTuple):
    """What there is to know of the tiles of a turn, and of their results."""

    tile: Tile
    seen: Seen
    live: Bool[Array, ""]  # whether any lane is in use
    place: Int[Array, " rows"]  # of their queries
    result: Int[Array, " rows"]  # of their results
    head_block: Int[Array, ""]
    first_head: Int[Array, ""]
    too_short: Int[Array, ""] | None  # how many of the shorter blocks are, if there are any
    runs: tuple | None = None  # of the only block, or what follows
    turns: Int[Array, ""] | None = None  # over their blocks
    split: Int[Array, " lanes"] | None = None  # which of the lanes that share a tile, if any do
    splits: Int[Array, " lanes"] | None = None  # how many these are
    seen_by_all: tuple | None = None  # the keys low <= j < high that each row of a tile sees; low None for 0
    start: tuple | None = None  # what is running before the first block


# XLA has no public name for this. Where a version knows another, kernels are as many as there are steps.
HAS_SMALL_CALLS = jax.__version_info__ < (0, 13)


def in_one(wanted: bool, function, *arguments):
    """function(*arguments) as one kernel of XLA's CPU compiler, on one thread, where that is wanted.

    Within another, it is a function of that kernel: what it returns is computed once for all that needs it.

    The results must depend on each argument: XLA ends the process where an argument of such a call has no use. That is
    also why it may not see which arguments are constants, of which it would make copies within.
    """
    if not (wanted and HAS_SMALL_CALLS):
        return function(*arguments)
    arguments = lax.optimization_barrier(arguments)
    return set_xla_metadata(jax.jit(function)(*arguments), xla_cpu_small_call="true", inlineable="false")


# Whether XLA makes such a kernel, which has one thread, of every loop that calls no library.
LOOPS_ARE_ONE = jax.__version_info__ >= (0, 12)


def not_in_one(wanted: bool, counter):
    """A loop's counter, not negative; where several threads are wanted for the loop, a library's sort gives it back."""
    if not (wanted and LOOPS_ARE_ONE):
        return counter
    return lax.sort(jnp.stack([counter, jnp.full_like(counter, jnp.iinfo(counter.dtype).max)]))[0]


def taken(array, *indices):
    """array[indices], for indices that are not negative; those too large count as the largest."""
    return array.at[indices].get(mode="clip", wrap_negative_indices=False)


def packed(columns):
    """Vectors of integers as the columns of one array, by choices: XLA's CPU compiler fuses those, and no `stack`."""
    at = jnp.arange(len(columns), dtype=jnp.int32)[None, :]
    packed = columns[0][:, None]
    for i, column in enumerate(columns[1:], 1):
        packed = jnp.where(at < i, packed, column[:, None])
    return packed


def divided(number, by):
    """number // by, neither negative: one operation, where rounding down for negative numbers would take seven."""
    return lax.div(number, jnp.asarray(by, number.dtype))


def sum_of(before, tiles):
    """How many tiles come before those of each sequence: one kernel, where a running sum is ten."""
    return jnp.sum(jnp.where(before, tiles[:, None], 0), axis=0, dtype=jnp.int32)
