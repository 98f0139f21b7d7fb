"""Soft caps without tanh, while logits are small: the polynomial, how it is scaled, and when it is in doubt.

A weight is 2^(unit * (tanh(y) - maximum)), where y is a logit over the cap and `unit` the cap over log 2. The chip has
as many units for tanh as for 2^x, and they are what a step with a cap waits for. Up to |y| = 0.6 (logits of 30 at a cap
of 50) a polynomial of degree 5 errs by less than 2e-5, the chip's own tanh by up to 3e-4.

It is monic in x = g * y, g = (c5 * unit)^(1/5): unit * tanh(y) = ((x^2 + a)^2 + b) * x, three fused operations. The
queries are multiplied by what makes the products with the keys come out as x, which rounds them once more.

Beyond 0.6 it grows faster than tanh, both ways. So the sums of a few weights tell whether it may be used: one logit
that is too large makes its sum too large. Logits that are too small count for nothing beside one of -0.3 * cap, for
caps of at least 20; and if there is none, the sum is too small.
"""

import math
from typing import NamedTuple

LARGEST, SMALLEST = 0.6, -0.3  # of a sum's largest logit over the cap
SMALLEST_CAP = 20.0
# Of y, y^3 and y^5: tanh's best approximation up to LARGEST, by the largest error.
C1, C3, C5 = 0.99979377, -0.32855202, 0.10491063


class Polynomial(NamedTuple):
    """In units of log 2, of logits of queries that were multiplied by `query_factor`."""

    query_factor: float
    to_tanh: float  # a logit times this is tanh's argument
    a: float  # of ((x^2 + a)^2 + b) * x
    b: float
    largest_sum: float  # of weights, that is not in doubt
    smallest_sum: float

    def __call__(self, x):
        square = x * x + self.a
        return (square * square + self.b) * x

    def doubts(self, sums):
        """Where sums of weights say that a logit may be out of range, or are NaN."""
        return ~((sums >= self.smallest_sum) & (sums <= self.largest_sum))


def polynomial(softmax_scale: float, soft_cap: float, maximum: float) -> Polynomial | None:
    """For weights by a fixed maximum, in units of the cap; None for caps so small that all logits count."""
    if soft_cap < SMALLEST_CAP:
        return None
    unit = soft_cap / math.log(2)
    g = (C5 * unit) ** 0.2
    a = C3 * unit / g**3 / 2
    return Polynomial(
        query_factor=softmax_scale / soft_cap * g,
        to_tanh=1 / g,
        a=a,
        b=C1 * unit / g - a * a,
        largest_sum=2 ** (unit * (math.tanh(LARGEST) - maximum)),
        smallest_sum=2 ** (unit * (math.tanh(SMALLEST) - maximum)),
    )
