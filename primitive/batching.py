"""The vmap rule: dimensions are added, never folded, since a reshape would lose a sharding.

A vmapped axis joins *C (in front) when a cache carries it, and else *B (in front), so that a cache which is not
vmapped is neither broadcast nor copied. What is known of the cut (`hint`) follows the dimensions, and vmap's
`spmd_axis_name` is the cut of the new one.
"""

from jax.interpreters import batching
import jax.numpy as jnp

from paged_prefill.primitive import hints
from paged_prefill.primitive.prefill import paged_prefill_p, typed_paged_prefill_p
from paged_prefill.primitive.cut import axes_of


def _batch(axis_data, operands, axes, *, cache_batch_dims, hint=None, **params):
    size = axis_data.size
    caches_batched = axes[1] is not None or axes[2] is not None
    position = 0 if caches_batched else cache_batch_dims

    def with_axis(operand, axis):
        if axis is not None:
            return jnp.moveaxis(operand, axis, position)
        shape = (*operand.shape[:position], size, *operand.shape[position:])
        return jnp.broadcast_to(jnp.expand_dims(operand, position), shape)

    is_cache = (False, True, True, False, False, False)
    batched = [
        x if cache and not caches_batched else with_axis(x, axis)
        for x, axis, cache in zip(operands, axes, is_cache, strict=True)
    ]
    batch_dims = batched[0].ndim - 4  # before this one
    results = paged_prefill_p.bind(
        *batched,
        cache_batch_dims=cache_batch_dims + caches_batched,
        hint=hints.with_dimension(hint, position, axes_of(axis_data.spmd_name), batch_dims),
        **params,
    )
    return results, (position, position)


for primitive in (paged_prefill_p, typed_paged_prefill_p):
    batching.fancy_primitive_batchers[primitive] = _batch
