"""How numbers are stored in a quantised cache: as their quotient by a scale, in float8_e4m3fn, float8_e5m2 or int8."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def largest_number(dtype) -> float:
    """The largest number that a quantised cache stores; of int8, 127, so that signs are alike."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def scale_of(tokens: Float[Array, "*rows features"], dtype) -> Float[Array, "*rows"]:
    """The scale by which each row's largest magnitude becomes the dtype's largest number."""
    return jnp.max(jnp.abs(tokens.astype(jnp.float32)), axis=-1) / largest_number(dtype)


def quantised(tokens: Float[Array, "*rows features"], scale: Float[Array, "*rows"], dtype) -> Array:
    """Rows over their scales, clipped to what the dtype holds and rounded to the nearest, ties to even."""
    largest = largest_number(dtype)
    divisor = jnp.where(scale == 0, 1.0, scale)[..., None]  # of a row of zeros
    numbers = jnp.clip(tokens.astype(jnp.float32) / divisor, -largest, largest)
    return (jnp.rint(numbers) if jnp.issubdtype(dtype, jnp.integer) else numbers).astype(dtype)
