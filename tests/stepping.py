"""Programs run operation by operation on CPU, in NumPy where NumPy gives the same numbers: nothing to compile."""

import contextlib
import functools

import jax
from jax.extend.core import jaxpr_as_fun, primitives
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat


def _select(which, *cases):
    return np.where(which, cases[1], cases[0]) if len(cases) == 2 else NotImplemented


def _divide(x, y):
    return np.divide(x, y) if jnp.issubdtype(x.dtype, jnp.floating) else NotImplemented


def _convert(x, *, new_dtype, **_):
    both = x.dtype, np.dtype(new_dtype)
    of_8_bits = any(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1 for dtype in both)
    if of_8_bits or (jnp.issubdtype(both[0], jnp.floating) and jnp.issubdtype(both[1], jnp.integer)):
        return NotImplemented  # NumPy neither rounds nor clips as XLA does
    return x.astype(new_dtype)


def _broadcast(x, *, shape, broadcast_dimensions, **_):
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape):
        sizes[axis] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _iota(*, dtype, shape, dimension, **_):
    sizes = [1] * len(shape)
    sizes[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape)


def _pad(x, value, *, padding_config):
    low, high, between = zip(*padding_config) if padding_config else ((), (), ())
    if any(between) or min(low + high, default=0) < 0:
        return NotImplemented
    return np.pad(x, tuple(zip(low, high)), constant_values=value)


def _window(x, starts, sizes):
    starts = (min(max(int(start), 0), whole - size) for start, whole, size in zip(starts, x.shape, sizes))
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes))


def _update(x, update, *starts):
    x = x.copy()
    x[_window(x, starts, update.shape)] = update
    return x


def _elementwise(function):
    return lambda *operands, out_dtype=None, **_: NotImplemented if out_dtype else function(*operands)


# What is exact, moves numbers, or is rounded once, as IEEE 754 says.
_IN_NUMPY = {
    primitive: _elementwise(function)
    for primitive, function in (
        (primitives.add_p, np.add),
        (primitives.sub_p, np.subtract),
        (primitives.mul_p, np.multiply),
        (primitives.div_p, _divide),
        (primitives.max_p, np.maximum),
        (primitives.min_p, np.minimum),
        (primitives.neg_p, np.negative),
        (primitives.sign_p, np.sign),
        (primitives.not_p, np.invert),
        (primitives.and_p, np.bitwise_and),
        (primitives.or_p, np.bitwise_or),
        (primitives.eq_p, np.equal),
        (primitives.ne_p, np.not_equal),
        (primitives.lt_p, np.less),
        (primitives.le_p, np.less_equal),
        (primitives.gt_p, np.greater),
        (primitives.ge_p, np.greater_equal),
    )
} | {
    primitives.select_n_p: _select,
    primitives.clamp_p: lambda low, x, high: np.minimum(np.maximum(low, x), high),
    primitives.convert_element_type_p: _convert,
    primitives.broadcast_in_dim_p: _broadcast,
    primitives.iota_p: _iota,
    primitives.reshape_p: lambda x, *, new_sizes, dimensions, **_: np.reshape(x, new_sizes),
    primitives.squeeze_p: lambda x, *, dimensions: np.squeeze(x, dimensions),
    primitives.transpose_p: lambda x, *, permutation: np.transpose(x, permutation),
    primitives.pad_p: _pad,
    primitives.concatenate_p: lambda *arrays, dimension: np.concatenate(arrays, dimension),
    primitives.slice_p: lambda x, *, start_indices, limit_indices, strides: x[
        tuple(map(slice, start_indices, limit_indices, strides or [None] * len(start_indices)))
    ],
    primitives.dynamic_slice_p: lambda x, *starts, slice_sizes: x[_window(x, starts, slice_sizes)],
    primitives.dynamic_update_slice_p: _update,
    primitives.reduce_max_p: lambda x, *, axes, **_: np.max(x, axes),
    primitives.reduce_min_p: lambda x, *, axes, **_: np.min(x, axes),
    primitives.reduce_or_p: lambda x, *, axes, **_: np.bitwise_or.reduce(x, axes),
}


def _step(rule, compiled, *operands, **parameters):
    result = rule(*(np.asarray(x, getattr(x, "dtype", None)) for x in operands), **parameters)
    return compiled(*operands, **parameters) if result is NotImplemented else result


def _holds_a_kernel(jaxpr):
    return any(
        eqn.primitive.name == "pallas_call" or "jaxpr" in eqn.params and _holds_a_kernel(eqn.params["jaxpr"])
        for eqn in jaxpr.eqns
    )


def _call(compiled, *operands, jaxpr, **parameters):
    return compiled(*operands, jaxpr=jaxpr, **parameters) if _holds_a_kernel(jaxpr) else jaxpr_as_fun(jaxpr)(*operands)


@contextlib.contextmanager
def _in_numpy():
    rules = {primitive: functools.partial(_step, rule) for primitive, rule in _IN_NUMPY.items()}
    rules |= {primitives.jit_p: _call, compat.stage_primitive(): lambda compiled, x: jax.device_put(x)}
    compiled = {primitive: primitive.impl for primitive in rules}
    for primitive, rule in rules.items():
        primitive.def_impl(functools.partial(rule, compiled[primitive]))
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for primitive, implementation in compiled.items():
            primitive.def_impl(implementation)


def run(function, *arguments):
    """What `function` gives, traced whole as under `jax.jit`, and then run operation by operation.

    In NumPy where they are exact, move numbers, or round once, and else in JAX. A function in it that is jitted and holds
    a kernel is compiled, as one program for all its calls.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    with _in_numpy():
        results = jax.block_until_ready(jaxpr_as_fun(jaxpr)(*jax.tree.leaves(arguments)))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)
