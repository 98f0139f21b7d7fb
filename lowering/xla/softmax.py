"""The online softmax of Milakov and Gimelshein (arXiv 1805.02867) over blocks of keys, lane by lane.

What is running of a tile is the largest logit m, the sum l of the weights exp(logit - m), and the output before it is
divided by that sum.
"""

import itertools
from typing import NamedTuple

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from paged_prefill.lowering.xla.walks import largest_divisor
from paged_prefill.primitive.attention import factor_and_lse

# Products of so few rows are made from keys times queries: the other way round, XLA's CPU compiler transposes the keys.
FEW_ROWS = 8
# What one vector of a CPU holds, and how many sums side by side, times the terms of each, LLVM still writes out. Those
# become vectors; a loop would add number by number.
VECTOR, WRITTEN_OUT = 8, 64
# The most terms of a sum of values for up to four rows: fewer, since what no row sees is left out of them.
VALUES_AT_ONCE = 8


class Block(NamedTuple):
    """A block of keys and their values, and what either is multiplied by."""

    keys: Float[Array, "lanes kv_heads keys head_dim"]
    values: Float[Array, "lanes kv_heads keys value_dim"]
    key_scale: Float[Array, "lanes heads keys"] | None
    value_scale: Float[Array, "lanes heads keys"] | None


class Running(NamedTuple):
    """The softmax of each row over the blocks so far."""

    largest: Float[Array, "lanes kv_heads rows"]
    total: Float[Array, "lanes kv_heads rows"]
    factor: Float[Array, "lanes kv_heads rows"]  # of the output in the end
    unnormalised: Float[Array, "lanes kv_heads rows value_dim"]


def start(shape):
    """The numbers before the first block, of so many lanes, KV heads and rows."""
    total = jnp.zeros(shape, jnp.float32)
    return jnp.full(shape, -jnp.inf, jnp.float32), total, total


def fold(
    running: Running | None,
    queries: Float[Array, "lanes kv_heads rows head_dim"],
    block: Block,
    mask,
    scale: float,
    soft_cap: float | None,
    in_place: bool,
    any_lanes: bool,
    live: Bool[Array, ""] | None,
    in_one,
) -> Running:
    """What is running once a block has joined, the first of all where nothing runs yet.

    `mask(logits)` makes those -inf that are not seen. `in_place` is whether keys and values are multiplied where they
    lie in the pages, which pays for a few rows. `any_lanes` is whether a row's bits may not depend on how many lanes
    there are. `live` is whether any lane is in use, if that is given: then weights are made where the logits lie.
    `in_one(function, *arrays)` computes small arrays. The scale is positive, so that the largest logit is the largest
    before it is scaled too, and weights are scaled where they are made.
    """
    logits = (_logits_in_place if in_place else _logits)(queries, block.keys)
    if block.key_scale is not None:
        logits *= block.key_scale[:, :, None, :]
    if soft_cap is not None:
        logits, scale = soft_cap * jnp.tanh(logits * (scale / soft_cap)), 1.0
    logits = mask(logits)
    before, block_largest = None if running is None else running.largest, jnp.max(logits, axis=-1)
    _, shift = _largest(before, block_largest, scale)
    weights = where_needed(live, lambda x: jnp.exp(x * scale - shift[..., None]), logits)
    if any_lanes:  # a library's sum, and a product whose rows are those of all lanes, follow how many there are
        ones = jnp.ones((*weights.shape[:2], weights.shape[3]), jnp.float32)
        total = _product("lhqk,lhk->lhq", weights, ones)
    else:
        total = jnp.sum(weights, axis=-1)
    value_scale = block.value_scale
    if value_scale is not None and value_scale.shape[-1] > 1:
        # By their share of the largest: times a small scale, weights would leave the normal numbers of float16.
        share, value_scale = value_scale, jnp.max(jnp.abs(value_scale), axis=-1, keepdims=True)
        weights *= (share / jnp.where(value_scale == 0, 1.0, value_scale))[:, :, None, :]
    if in_place:
        update = _weighed_in_place(weights, block.values)
    else:
        update = _product("lhqk,lhkd->lhqd", weights.astype(block.values.dtype), block.values)
    if value_scale is not None:
        update *= value_scale[..., None]
    if running is None:
        largest, _ = _largest(None, block_largest, scale)
        return Running(largest, total, factor_and_lse(total, largest)[0], update)

    def joined(before, total_before, block_largest, block_total):
        largest, shift = _largest(before, block_largest, scale)
        fade = jnp.exp(before - shift)
        total = total_before * fade + block_total
        return largest, total, factor_and_lse(total, largest)[0], fade

    # In one dimension: LLVM writes out short loops within others.
    numbers = (x.reshape(-1) for x in (before, running.total, block_largest, total))
    largest, total, factor, fade = (x.reshape(before.shape) for x in in_one(joined, *numbers))
    return Running(largest, total, factor, running.unnormalised * fade[..., None] + update)


def _largest(before, of_block, scale):
    """The largest logits, and what they all are reduced by: finite, even where no key was seen."""
    largest = of_block * scale
    if before is not None:
        largest = jnp.maximum(before, largest)
    return largest, jnp.where(jnp.isneginf(largest), 0.0, largest)


def where_needed(needed, change, array):
    """change(array) where it is needed, in a loop of one turn, which changes it in place; at once if that is None."""
    if needed is None:
        return change(array)
    return lax.while_loop(lambda x: x[0], lambda x: (jnp.bool_(False), change(x[1])), (needed, array))[1]


def merge_lanes(running: Running, shared: Bool[Array, " lanes"], splits: int) -> Running:
    """Joins each `splits` lanes that share a tile; the first of them has what comes of it. Others stay as they are."""

    def of_splits(x):
        return x.reshape(-1, splits, *x.shape[1:])

    parts = Running(*map(of_splits, running))
    shared = of_splits(shared)[:, :, None, None]
    largest = jnp.where(shared, jnp.max(parts.largest, axis=1, keepdims=True), parts.largest)
    weights = jnp.exp(parts.largest - jnp.where(jnp.isneginf(largest), 0.0, largest))
    unnormalised = parts.unnormalised * weights[..., None]
    totals = jnp.broadcast_to((parts.total * weights)[..., None], unnormalised.shape)  # both are one kernel so
    unnormalised, totals = _sums([unnormalised, totals], 1)

    def joined(merged, x, shared):
        return jnp.where(shared, merged[:, None], x).reshape(-1, *x.shape[2:])

    total = joined(totals[..., 0], parts.total, shared)
    largest = largest.reshape(total.shape)
    unnormalised = joined(unnormalised, parts.unnormalised, shared[..., None])
    return Running(largest, total, factor_and_lse(total, largest)[0], unnormalised)


def _logits(queries, keys):
    if queries.shape[2] > FEW_ROWS:
        return _product("lhqd,lhkd->lhqk", queries, keys)
    # Behind the barrier, since XLA would turn the product round.
    return jnp.swapaxes(lax.optimization_barrier(_product("lhkd,lhqd->lhkq", keys, queries)), 2, 3)


def _logits_in_place(queries, keys):
    lanes, heads, rows, head_dim = queries.shape
    terms = largest_divisor(head_dim // VECTOR, WRITTEN_OUT // rows)
    keys = keys.astype(jnp.float32).reshape(lanes, heads, -1, terms, head_dim // terms)
    queries = queries.astype(jnp.float32).reshape(lanes, heads, rows, 1, terms, head_dim // terms)
    return jnp.stack(_sums(_sums([keys * queries[:, :, row] for row in range(rows)], 3), 3), axis=2)


def _weighed_in_place(weights, values):
    lanes, heads, rows, keys = weights.shape
    terms = largest_divisor(keys, VALUES_AT_ONCE)
    values = values.astype(jnp.float32).reshape(lanes, heads, -1, terms, values.shape[-1])
    weights = weights.reshape(lanes, heads, rows, -1, terms, 1)
    return jnp.stack(_sums(_sums([values * weights[:, :, row] for row in range(rows)], 3), 2), axis=2)


def _sums(arrays, axis):
    """Each array's sum over an axis.

    XLA's CPU compiler hands the sum of one array to a library, which wants it in memory and adds in an order that follows
    the number of lanes. With the sums of several at once it fuses all that the arrays are made of, up to the gather from
    the pages. So no array is left alone.
    """

    def added(sums, terms):
        return tuple(map(jnp.add, sums, terms))

    at_once = max(2, WRITTEN_OUT // arrays[0].shape[axis])
    ends = [*range(0, len(arrays) - 1, at_once), len(arrays)]
    parts = (arrays[first:end] for first, end in itertools.pairwise(ends))
    return [x for part in parts for x in lax.reduce(tuple(part), (jnp.float32(0),) * len(part), added, (axis,))]


def _product(subscripts, a, b):
    """A product accumulated in float32; of float32 operands in full, where GPUs and TPUs would round them."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
