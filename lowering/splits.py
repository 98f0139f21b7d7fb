"""What kernels have in common that split the keys of a tile: how many keys there are, and the merge of the parts."""

import functools

import jax.numpy as jnp

from paged_prefill.lowering.call import Problem
from paged_prefill.primitive.attention import normalised


def most_keys(problem: Problem, tokens: int) -> int:
    """The most keys that so many neighbouring tokens of a sequence see together."""
    window = problem.attention.sliding_window
    return problem.capacity if window is None else min(problem.capacity, window + tokens)


def merge_splits(out, lse, dtype):
    """The attention to all keys from those to disjoint parts of them [splits, ...]: softmaxes add up by exp(lse).

    A part that sees no key has output 0 here, so that NaN in an output is the row's own and stays; `merge`, which takes
    what users bring, drops it with the part.
    """
    largest = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(largest), 0.0, largest)[None])
    total = jnp.sum(weights, axis=0)
    # Written out: XLA fuses sums, where every reduction is one more kernel.
    summed = functools.reduce(jnp.add, [w[..., None] * o for w, o in zip(weights, out)])
    merged, lse = normalised(summed, total, largest)
    return merged.astype(dtype), lse
