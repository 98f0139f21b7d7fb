"""The online softmax of a warpgroup's rows: the weights of a block of keys, and what is running with them.

It is Milakov and Gimelshein's (arXiv 1805.02867), with exp2 for exp. Its maximum is any number near the largest logit.
So a block's weights are taken by the maximum so far, and where their sums show that a logit has passed it by far, once
more by the new one: most blocks look for no maximum, and scale no output. Logits with a soft cap are bounded, and
bfloat16 has room for weights by one maximum that never changes.
"""

import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.operations import ROWS, WGMMA, any_in_warp, moved, packed
from paged_prefill.lowering.mosaic_gpu.hopper.plan import LOG2_E, WARPGROUP_ROWS, Plan
from paged_prefill.primitive.attention import factor_and_lse, with_logit

# Of 16 weights: none of which is too large for 16 bits then, and the largest is more than 16 where the sum is more.
LARGEST_SUM = 256.0
# Where weights are in float16 for the caches' sake, their maximum lies so far below the largest logit, in units of
# log 2: so weights down to 2^-31 of the largest count, and those of the largest sum are within range.
HEADROOM = 7
# In float8_e4m3fn, which ends at 448, 16 weights as large as the largest have a sum that each could be.
FP8_HEADROOM, LARGEST_FP8_SUM = 4, 448.0
LARGEST_EXPONENT = 7  # of a row's largest number in float8_e4m3fn: one that is rounded up stays below 448
MANTISSA, BIAS = 23, 127  # bits of a float32, and of its exponent what stands for 0
SMALLEST = 1e-30  # that scales and rows of a query count as
# Where each value has a scale of its own, 16 bits hold weights times scales, and the maximum is of these. It takes all
# scales for ones from 2^-64 to 2^64: so that sums of weights without them are finite too.
LARGEST_SCALE = 2.0**64
LARGEST_SUM_WITHOUT_SCALES = 2.0**96


class Running(NamedTuple):
    """What goes from block to block: the last block's weights, and the output and sums of those before and with it."""

    weights: jax.Array  # [64, block_kv], 16 bits
    acc: jax.Array  # [64, value_dim], without the last block
    m: jax.Array  # [64], a maximum, in units of the logits
    l: jax.Array  # [64, 8], sums over every eighth column


def scaled_rows(plan: Plan, largest, key_scale):
    """(factors of a query's rows, what turns its products to logits), where caches are quantised.

    Rows with these largest magnitudes come to have one of 1, so that float16 has room, or one from 128 to 256 where
    they become sums of 8 bits. Both are of rows; the second is positive.
    """
    # Nobody may look at a scale that is not finite where no row sees a key; `scaled_results` does where one does.
    scale = jnp.where(jnp.abs(key_scale) < jnp.inf, key_scale, 1.0) * plan.softmax_scale
    largest = jnp.maximum(largest, SMALLEST)
    if plan.fp8_terms:  # by a power of 2: so two terms are exactly the 8 bits of a bfloat16
        exponent = lax.shift_right_logical(lax.bitcast_convert_type(largest, jnp.int32), MANTISSA) - LARGEST_EXPONENT
        size, inverse = (
            lax.bitcast_convert_type(bits << MANTISSA, jnp.float32) for bits in (exponent, 2 * BIAS - exponent)
        )
        # 8 bits have no infinity.
        inverse = jnp.where(largest < jnp.inf, inverse, jnp.nan)
        return jnp.where(scale < 0, -1.0, 1.0) * inverse, jnp.maximum(size * jnp.abs(scale), SMALLEST)
    # A scale of 0 has the same softmax as one too small to see.
    to_logits = jnp.maximum(largest * jnp.abs(scale), SMALLEST)
    return jnp.where(scale < 0, -1.0, 1.0) / largest, to_logits


def scaled_results(factor, lse, seen, key_scale, value_scale):
    """What to multiply the output of rows with, and their lse; NaN in a scale is only for rows that see keys."""
    poison = jnp.where(jnp.abs(key_scale) < jnp.inf, 0.0, jnp.nan)
    factor *= jnp.where(seen, value_scale, 1.0)
    return [x + jnp.where(seen, poison, 0.0) for x in (factor, lse)]


class Softmax:
    """The steps of a plan's softmax; `to_logits` turns each row's products to logits where caches are quantised.

    Rows are the columns of logits where `columns` says how many there are.
    """

    def __init__(self, plan: Plan, to_logits=None, columns: int | None = None):
        self.plan, self.dtype, self.to_logits = plan, jnp.dtype(plan.product_dtype), to_logits
        self.shape, self.axis = (WARPGROUP_ROWS, plan.logit_columns), 0
        if columns is not None:
            self.shape, self.axis = (plan.block_kv, columns), 1
        # `unit` turns logits into units of log 2, and is positive: so their maximum can be taken before.
        if plan.soft_cap is not None:
            self.unit, largest = plan.soft_cap * LOG2_E, 1
        elif plan.softmax_scale > 0:
            self.unit, largest = plan.softmax_scale * LOG2_E, 4096
        else:
            self.unit, largest = LOG2_E, math.inf
        # One fused operation for a weight errs by 2^-24 of the product: too much where it is huge.
        self.fuses = self.unit * largest <= 4096
        self.largest_sum, self.headroom = LARGEST_SUM, HEADROOM
        if plan.fp8_terms:
            self.largest_sum, self.headroom = LARGEST_FP8_SUM, FP8_HEADROOM
        elif plan.quantised:
            self.largest_sum = LARGEST_SUM * 2**HEADROOM
        self.has_units = plan.quantised and plan.soft_cap is None  # of its own, each row
        if self.has_units:
            self.unit, self.fuses = to_logits * LOG2_E, abs(plan.softmax_scale) * LOG2_E <= 1

    def start(self):
        """(acc, m, l) before the first block."""
        m = -jnp.inf if self.plan.fixed_maximum is None else self.plan.fixed_maximum
        m = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), m, jnp.float32), ROWS)
        l = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, 8), jnp.float32), WGMMA)
        acc = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, self.plan.output_columns), jnp.float32), WGMMA)
        return acc, m, l

    def step(self, logits, output, m, l, visible=None, key_scales=None, value_scales=None) -> Running:
        """What is running after a block with these products of queries and keys.

        `output` waits for the output so far. `visible` says which rows see which keys; where it is None, all see all.
        The last two load the scales of the block's slots, where each has its own.
        """
        if self.plan.waits_first:
            acc = output()
            output = lambda: acc
        if key_scales is not None:
            logits = self.times(logits, key_scales)
        logits = self.logits(logits)
        if visible is not None:
            logits = jnp.where(visible(), logits, -jnp.inf)
        if self.plan.fixed_maximum is not None:
            weights, sums = self._weigh(logits, m)
            acc = output()
            return Running(self.rounded(weights), acc, m, l + sums)
        if visible is not None:
            weights, *others = self._follow(logits, output(), m, l, value_scales)
            return Running(self.narrow(weights), *others)
        return self._step_by_old_maximum(logits, output, m, l, value_scales)

    def result(self, acc, m, total, sinks=None, scales=None):
        """The rows' output and lse, from the sums of their weights.

        `sinks` are logits that have a part in their softmax and no value; `scales` those of keys and values where
        caches are quantised.
        """
        plan = self.plan
        to_natural = plan.soft_cap or (plan.softmax_scale if plan.softmax_scale > 0 else 1.0)
        m, fade = m * (self.to_logits if self.has_units else to_natural), 1.0
        seen = total != 0
        if sinks is not None:
            total, m, fade = with_logit(total, m, sinks)
        factor, lse = factor_and_lse(total, m)
        factor *= fade
        if plan.quantised:
            factor, lse = scaled_results(factor, lse, seen, *scales)
        return jax.tree.map(lambda array: array * lax.broadcast_in_dim(factor, array.shape, [0]), acc), lse

    def times(self, logits, scales):
        """Logits times the scales of their slots, which `scales` loads."""
        return logits * self._of_keys(scales())

    def largest(self, logits, value_scales=None):
        """What a maximum of rows with these logits would be; with scales that `value_scales` loads, of both."""
        counted = logits if value_scales is None else self.with_scales(logits, value_scales())
        return self.below(fold(jnp.maximum, counted).max(axis=1))

    def below(self, largest):
        """The maximum that weights are taken by where these are the largest logits."""
        if not self.plan.quantised:
            return largest
        unit = lax.optimization_barrier(self.unit) if self.has_units else self.unit  # so that it is worked out here
        return largest - self.headroom / unit

    def step_together(self, logits, largest, acc, m, l, value_scales=None):
        """The weights of these logits, and the output, m and l by the same maximum, where warpgroups share rows.

        `largest` are those of all logits of the rows. The maximum so far stays where none has passed it by far. `acc`
        are arrays of the output's columns.
        """
        passed = (largest - m) * self.unit > math.log2(LARGEST_SUM)
        m_next = jnp.where(passed, largest, m)
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # of a row that has seen no key
        weights, sums = self._weigh(logits, shift)

        acc, l = self._faded(passed, shift, acc, m, l)
        if value_scales is not None:
            weights = self.scaled(weights, logits, value_scales)
        return weights, acc, m_next, l + sums

    def by_maximum(self, m_next, acc, m, l):
        """The output, m and l by a maximum that another warpgroup found, where they take blocks by turns."""
        shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # of a row that has seen no key
        acc, l = self._faded(m_next != m, shift, acc, m, l)
        return acc, m_next, l

    def by_polynomial(self, logits, m):
        """Weights of small logits under a soft cap, and their sums, which tell where they are not small."""
        weights = jnp.exp2(self.plan.polynomial(logits) - lax.broadcast_in_dim(m * self.unit, self.shape, [0]))
        return weights, fold(jnp.add, weights)

    def rounded(self, weights):
        """Behind the wait for the last products: so the next ones may begin with the results."""
        return self.narrow(lax.optimization_barrier(weights))

    def narrow(self, weights):
        """As the product with values takes them."""
        return packed(weights) if self.plan.fp8_terms else weights.astype(self.dtype)

    def logits(self, products):
        """In units of the maximum, from products of queries and keys."""
        plan = self.plan
        if plan.polynomial is not None:
            return jnp.tanh(products * plan.polynomial.to_tanh)
        if plan.soft_cap is not None and plan.quantised:
            return jnp.tanh(products * self._of_rows(self.to_logits / plan.soft_cap))
        if plan.soft_cap is not None:
            return jnp.tanh(products * (plan.softmax_scale / plan.soft_cap))
        if plan.softmax_scale <= 0 and not plan.quantised:
            return lax.optimization_barrier(products * plan.softmax_scale)
        return products

    def _of_rows(self, rows):
        """Numbers of rows, for each of their logits."""
        return lax.broadcast_in_dim(rows, self.shape, [self.axis])

    def _weigh(self, logits, m):
        """Weights by the maximum m, and their sums over every eighth column."""
        weights = self.weights(logits, m)
        return weights, fold(jnp.add, weights)

    def weights(self, logits, m):
        """By the maximum m."""
        unit = self._of_rows(self.unit) if self.has_units else self.unit
        if self.fuses:
            # The barriers here and in `step` settle which product is fused, so that a row's bits are the same whichever
            # way its warp goes.
            exponents = logits * unit - self._of_rows(lax.optimization_barrier(m * self.unit))
        else:
            exponents = (logits - self._of_rows(m)) * unit
        return jnp.exp2(exponents)

    def _of_keys(self, keys):
        """Numbers of keys, for each of their logits."""
        return lax.broadcast_in_dim(keys, self.shape, [1 - self.axis])

    def _faded(self, passed, shift, acc, m, l):
        """The output and l by `shift`, which is m but for rows that have `passed` theirs."""

        def fade():
            # 1 for rows that have not passed theirs: their bits do not depend on the other rows of their warp.
            factor = jnp.exp2((m - shift) * self.unit)
            return jax.tree.map(lambda array: array * lax.broadcast_in_dim(factor, array.shape, [0]), (acc, l))

        passed = lax.broadcast_in_dim(passed, l.shape, [0])
        return lax.cond(any_in_warp(passed, after=None), fade, lambda: (acc, l))

    def _follow(self, logits, acc, m, l, value_scales, passed=None):
        """Weights by the new maximum of all rows, or of those that `passed` theirs; and the output, m and l by it."""
        m_next = jnp.maximum(m, self.largest(logits, value_scales))
        if passed is None:
            shift = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # of a row that has seen no key
        else:
            shift = m_next = jnp.where(passed, m_next, m)
        weights, sums = self._weigh(logits, shift)
        fade = jnp.exp2((m - shift) * self.unit)
        acc, l = (array * lax.broadcast_in_dim(fade, array.shape, [0]) for array in (acc, l))
        if value_scales is not None:
            weights = self.scaled(weights, logits, value_scales)
        return weights, acc, m_next, l + sums

    def scaled(self, weights, logits, value_scales):
        """Weights times their values' scales: one that nobody may look at may be NaN."""
        return jnp.where(logits == -jnp.inf, 0.0, weights * self._of_keys(value_scales()))

    def with_scales(self, logits, value_scales):
        """Logits of weights times their values' scales."""
        unit = self.unit
        if self.has_units:
            unit = self._of_rows(unit)
        magnitudes = jnp.clip(jnp.abs(value_scales), 1 / LARGEST_SCALE, LARGEST_SCALE)
        return jnp.where(logits == -jnp.inf, logits, logits + self._of_keys(jnp.log(magnitudes)) * (LOG2_E / unit))

    def _step_by_old_maximum(self, logits, output, m, l, value_scales) -> Running:
        """A block that every row sees: by the maximum so far, unless a warp's sums say that a logit has passed it."""
        late = self.plan.rounds_late
        weights, sums = self._weigh(logits, m)
        if value_scales is None:
            passed = ~(sums <= self.largest_sum)  # also where a sum is NaN
            if not late:
                weights = self.narrow(weights)
        else:
            late, weights = False, (weights * self._of_keys(value_scales())).astype(self.dtype)
            # Of rounded weights, so that they are there before the vote.
            largest = fold(jnp.maximum, jnp.abs(weights)).astype(jnp.float32)
            passed = ~(largest <= self.largest_sum) | ~(sums <= LARGEST_SUM_WITHOUT_SCALES)
        anyone = any_in_warp(passed, after=None if late or value_scales is not None else weights)
        acc = output()
        if not late:
            weights = moved(weights)

        def again():
            # A row's bits do not depend on the other rows of its warp.
            own = jnp.where(passed, 1.0, 0.0).max(axis=1) > 0
            new, *others = self._follow(logits, acc, m, l, value_scales, passed=own)
            return new if late else self.narrow(new), *others

        weights, *others = lax.cond(anyone, again, lambda: (weights, acc, m, l + sums))
        return Running(self.rounded(weights) if late else weights, *others)


def fold(combine, array):
    """[rows, columns] as [rows, 8]: columns that lie 8 apart, and so in one thread, combined pair by pair.

    A thread waits for no other's share this way, and its own operations need not wait for one another.
    """
    parts = [array[:, c : c + 8] for c in range(0, array.shape[1], 8)]
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]
