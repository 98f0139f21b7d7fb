"""Arrays as registers hold them: columns of numbers that are the same in every lane."""

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_tpu.schedule import LANES


def widen(x, width):
    """[rows, LANES], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def lane_sums(p):
    """[rows, keys] as [rows, LANES] with the same sum over the lanes."""
    keys = p.shape[1]
    if keys % LANES == 0:
        return sum(p[:, i : i + LANES] for i in range(0, keys, LANES))
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane == 0, jnp.sum(p, axis=1, keepdims=True), 0.0)
