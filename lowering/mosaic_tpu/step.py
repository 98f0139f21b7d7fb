"""One step of the TPU kernel for sequences of several new tokens: a chunk of keys, and rows that attend to it.

The running maximum m, sum l and unnormalised output are those of the online softmax (Milakov and Gimelshein,
arXiv 1805.02867), in powers of 2, which is what the chip computes:

    p_j = 2^(c (s_j - m'))    fade = 2^(c (m - m'))    l' = fade l + sum_j p_j    out' = fade out + p v

with s = q . k and c = softmax_scale log2(e), or s = tanh(softmax_scale q . k / cap) and c = cap log2(e) with a soft
cap. A row's m' is m while c (max_j s_j - m) is at most HEADROOM, else max_j s_j: any m near the largest logit will do.
So where every row sees every key, weights are taken by the maximum so far, and no maximum is looked for but in rows
whose sum of weights shows that a logit may have passed it. Both ways give a row the same bits.
"""

import functools
import itertools
import math
import operator
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.call import Problem
from paged_prefill.lowering.mosaic_tpu import fetching, schedule
from paged_prefill.lowering.mosaic_tpu.masks import Rows
from paged_prefill.lowering.mosaic_tpu.registers import lane_sums, widen
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Sizes, round_up

LOWEST = float(jnp.finfo(jnp.float32).min)  # of logits: from infinity, no infinity could be subtracted
# In units of log 2, how far a logit may be above the maximum that weights are taken by. The rest of float32's 128 are
# for values, and for sums.
HEADROOM = 24


class Scratch(NamedTuple):
    """What is kept on the chip beside the buffers of pages."""

    acc: object  # VMEM [kv_heads, rows, value_dim] float32
    m: object  # VMEM [kv_heads, rows, LANES] float32, the same in every lane
    l: object  # VMEM [kv_heads, rows, LANES] float32, to be summed over the lanes
    logits: object  # VMEM [2, rows of a part, chunk] float32
    weights: object  # VMEM [2, rows of a part, chunk]
    # VMEM [products of a step or 2, rows of a part, LANES] float32: of two buffers in turn the fade, the same in every
    # lane; or of all products the sums of their weights by the old maximum, to be summed over the lanes.
    fade: object
    ends: object  # VMEM [rows, LANES] int32, where the keys of each row end, the same in every lane
    by_lane: object  # VMEM [2, rows of a part / group, kv_heads * group] float32, l and m with a query head in each lane
    sums: object  # VMEM [2, chunk / DEPTH, rows of a part, value_dim] float32, weights times values

    @classmethod
    def of(cls, problem: Problem, sizes: Sizes, heads: int) -> "Scratch":
        """The scratch for so many KV heads."""
        rows, part_rows = problem.group * sizes.block_q, problem.group * sizes.part
        products = max(sizes.parts * sizes.heads_at_once(heads), 2)
        return cls(
            acc=pltpu.VMEM((heads, rows, problem.value_dim), jnp.float32),
            m=pltpu.VMEM((heads, rows, LANES), jnp.float32),
            l=pltpu.VMEM((heads, rows, LANES), jnp.float32),
            logits=pltpu.VMEM((2, part_rows, sizes.chunk), jnp.float32),
            weights=pltpu.VMEM((2, part_rows, sizes.chunk), jnp.dtype(problem.dtype)),
            fade=pltpu.VMEM((products, part_rows, LANES), jnp.float32),
            ends=pltpu.VMEM((rows, LANES), jnp.int32),
            by_lane=pltpu.VMEM((2, sizes.part, heads * problem.group), jnp.float32),
            sums=pltpu.VMEM((2, -(-sizes.chunk // schedule.DEPTH), part_rows, problem.value_dim), jnp.float32),
        )

    def clear(self, head, at):
        """Running values of a KV head that have seen no key."""
        for ref, value in ((self.m, LOWEST), (self.l, 0.0), (self.acc, 0.0)):
            ref[head, at] = jnp.full_like(ref[head, at], value)


class Static(NamedTuple):
    """What is static about a launch."""

    sizes: Sizes
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    value_dim: int
    held: fetching.Held
    by_row: bool  # whether what rows see is read from arrays
    tree: bool


class Product(NamedTuple):
    """A matrix product with some of a chunk's keys, `keys` a slice of them, and the softmax and values behind it."""

    buffer: object
    head: object
    rows: Rows
    keys: slice

    @property
    def num_keys(self) -> int:
        """How many keys it takes."""
        return self.keys.stop - self.keys.start


class Step(fetching.LoadedBlock):
    """Folds chunks of a block of keys into the running values."""

    def attend(self, chunk, products, mask_of=None, fresh=False, beside=()):
        """Products of which neighbours have different buffers.

        `mask_of` gives the mask of Rows and of the first of their keys, or is None where they see every key. `fresh` says
        that there are no running values yet; `beside` are functions that start copies.
        """
        masks = [None if mask_of is None else mask_of(product.rows, product.keys.start) for product in products]

        def rest(product, mask):
            self._softmax(chunk, product, mask, fresh)
            acc, sums = self.scratch.acc, self._weighted_values(chunk, product, mask)
            acc[product.head, product.rows.at] = sums if fresh else self._faded(product) + sums

        first = functools.partial(self._store_logits, chunk)
        self._in_turn(first, rest, [*zip(products, masks, strict=True)], beside)

    def attend_by_old_maximum(self, chunk, products, beside=()):
        """The same where rows see every key and have running values; but for rows with a logit past their maximum.

        Returns whether there may be any: they are left as they are, for `attend_passed`.
        """
        votes = []

        def add(product, number):
            totals, at = self._totals(number), (product.head, product.rows.at)
            sums = self._weighted_values(chunk, product, None)
            for ref, more in ((self.scratch.l, self.scratch.fade[number]), (self.scratch.acc, sums)):
                ref[at] = jnp.where(past(totals, more.shape[1]), ref[at], ref[at] + more)
            votes.append(jnp.max(jnp.where(past(totals, LANES), 1.0, 0.0)) > 0)

        numbered = [(product, number) for number, product in enumerate(products)]
        self._in_turn(functools.partial(self._weigh, chunk), add, numbered, beside)
        return functools.reduce(operator.or_, votes)

    def attend_passed(self, chunk, number, product):
        """The rows that `attend_by_old_maximum` left of its product of this number.

        From the first product to the last: their fades take the place of sums that were looked at.
        """
        totals, at = self._totals(number), (product.head, product.rows.at)
        self._store_logits(chunk, product, None)
        self._softmax(chunk, product, None, only=past(totals, LANES))
        sums, acc = self._weighted_values(chunk, product, None), self.scratch.acc
        acc[at] = jnp.where(past(totals, acc.shape[2]), self._faded(product) + sums, acc[at])

    def _in_turn(self, first, rest, products, beside):
        """The first of the next product comes before the rest: the matrix unit does it while the vector unit works."""
        first(*products[0])
        for start in beside:  # behind the loads of the first product, which wait for nothing else
            start()
        for current, following in zip(products, [*products[1:], None]):
            if following is not None:
                first(*following)
            rest(*current)

    @property
    def _to_exponent(self) -> float:
        static = self.static
        return (static.softmax_scale if static.soft_cap is None else static.soft_cap) * math.log2(math.e)

    def _count(self, product: Product) -> int:
        """Rows of a product."""
        return self.query_ref.shape[1] * product.rows.count

    def _multiply(self, x, y, contract):
        dimensions = (((1,), (contract,)), ((), ()))
        precision = lax.Precision.HIGHEST if self.query_ref.dtype == jnp.float32 else None
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def _of_keys(self, ref, chunk, product: Product):
        """What the product's keys have in `ref`, [keys, features]."""
        keys = self.static.sizes.keys_of_chunk(chunk, product.keys.start, product.num_keys)
        return ref[product.head, keys].astype(self.query_ref.dtype)

    def _times_slot_scales(self, x, name, chunk, product: Product, seen=lambda scales: scales):
        """Logits or weights [rows, keys] times the scales of slots, if there are any; `seen` zeroes other keys'."""
        scales = self.slot_scales_of(name, product.head, chunk)
        return x if scales is None else x * seen(scales[:, product.keys])

    def _logits(self, chunk, product: Product):
        """Pairs of a strip of the product's rows, a slice, and its logits."""
        static, count = self.static, self._count(product)
        query = self.query_ref[product.head, :, product.rows.slice].reshape(count, -1)
        of_head = self._of_keys(self.keys_ref, chunk, product)
        for row in range(0, count, schedule.LOGIT_ROWS):
            strip = slice(row, min(row + schedule.LOGIT_ROWS, count))
            s = self._times_slot_scales(self._multiply(query[strip], of_head, 1), "key", chunk, product)
            if (scale := self.scale_of("key", product.head)) is not None:
                s = s * scale
            if static.soft_cap is not None:
                s = jnp.tanh(s * (static.softmax_scale / static.soft_cap))
            yield strip, s

    def _store_logits(self, chunk, product: Product, mask):
        """Finished before they are stored: the softmax reads them twice, and would keep in registers what it changes."""
        for strip, s in self._logits(chunk, product):
            s = s if mask is None else mask.hide(s, self.query_ref.shape[1], strip)
            self.scratch.logits[product.buffer, strip, : product.num_keys] = s

    def _store_weights(self, p, chunk, product: Product, strip: slice, mask):
        # Keys that are not seen have weights of 0, and 0 * NaN is NaN.
        seen = (lambda scales: scales) if mask is None else mask.zero_scales
        p = self._times_slot_scales(p, "value", chunk, product, seen)
        self.scratch.weights[product.buffer, strip, : product.num_keys] = p.astype(self.query_ref.dtype)

    def _softmax(self, chunk, product: Product, mask, fresh=False, only=None):
        """Weights of the stored logits, and what becomes of m and l, of the rows that `only` says if it is there."""
        scratch, count, at = self.scratch, self._count(product), (product.head, product.rows.at)
        s = scratch.logits[product.buffer, :count, : product.num_keys]
        m = jnp.full((count, LANES), LOWEST) if fresh else scratch.m[at]
        largest = jnp.max(s, axis=1, keepdims=True)
        if fresh:
            m_next = jnp.maximum(m, largest)
        else:
            moves = (largest - m) * self._to_exponent > HEADROOM
            if only is not None:
                moves &= only
            m_next = jnp.where(moves, largest, m)
        p = jnp.exp2((s - widen(m_next, product.num_keys)) * self._to_exponent)
        scratch.m[at], l = m_next, lane_sums(p)
        if not fresh:
            fade = jnp.where(moves, jnp.exp2((m - m_next) * self._to_exponent), 1.0)
            l += scratch.l[at] * fade
            scratch.fade[product.buffer, :count] = fade
        scratch.l[at] = l if only is None else jnp.where(only, l, scratch.l[at])
        self._store_weights(p, chunk, product, slice(0, count), mask)

    def _weigh(self, chunk, product: Product, number):
        """Weights by the old maximum, and their sums."""
        scratch, first = self.scratch, product.rows.at.start
        for strip, s in self._logits(chunk, product):
            m = scratch.m[product.head, pl.ds(first + strip.start, strip.stop - strip.start)]
            p = jnp.exp2((s - widen(m, product.num_keys)) * self._to_exponent)
            scratch.fade[number, strip] = lane_sums(p)
            self._store_weights(p, chunk, product, strip, None)

    def _totals(self, number):
        """The sums of a product's weights by the old maximum, [rows, 1]."""
        return jnp.sum(self.scratch.fade[number], axis=1, keepdims=True)

    def _faded(self, product: Product):
        acc, fade = self.scratch.acc, self.scratch.fade[product.buffer, : self._count(product)]
        return acc[product.head, product.rows.at] * widen(fade, acc.shape[2])

    def _weighted_values(self, chunk, product: Product, mask) -> jax.Array:
        """The stored weights times the values, summed."""
        scratch, keys, count = self.scratch, product.keys, self._count(product)
        values = self._of_keys(self.values_ref, chunk, product)[:, : self.static.value_dim]
        if mask is not None:
            values = mask.zero(values)
        # Cut at the same keys of the chunk whichever are taken, so that each sum has the same bits.
        depth = schedule.DEPTH
        cuts = [keys.start, *range(round_up(keys.start + 1, depth), keys.stop, depth), keys.stop]
        parts = [slice(first - keys.start, end - keys.start) for first, end in itertools.pairwise(cuts)]
        for i, part in enumerate(parts):
            weights = scratch.weights[product.buffer, :count, part]
            scratch.sums[product.buffer, i, :count] = self._multiply(weights, values[part], 0)
        return sum(scratch.sums[product.buffer, i, :count] for i in range(len(parts)))


def past(totals, width: int):
    """Which rows' sums of weights are past what they can be where no logit is past its maximum, [rows, width]."""
    # Half of what the weight of a logit at the headroom is: none that is past it may count as within.
    return jnp.broadcast_to(totals, (len(totals), width)) > 2.0 ** (HEADROOM - 1)
