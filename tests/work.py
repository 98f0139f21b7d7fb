"""How much a program does, counted and not timed: the same on every machine, however busy."""

import functools

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

# Writes into an array that is there: the position among the operands of what is written.
IN_PLACE = {"scatter": 2, "dynamic_update_slice": 1}
FREE = ("bitcast_convert_type", "optimization_barrier", "platform_index", "reshape")


def counter(function, *arrays):
    """A function of arrays with these shapes: how many elements the operations of `function` write while it runs.

    Loops count as often as they turn, and of a `cond` the branch that is taken. Products count by what they write.
    """
    closed = jax.make_jaxpr(function)(*arrays)
    evaluate = jax.jit(functools.partial(_evaluate, closed))
    return lambda *arrays: float(evaluate(*arrays)[0])


def _evaluate(closed: core.ClosedJaxpr, *arguments):
    """The count so far, and the results, of a jaxpr."""
    values = dict(zip(closed.jaxpr.constvars, closed.consts)) | dict(zip(closed.jaxpr.invars, arguments, strict=True))
    count = jnp.float32(0)
    for equation in closed.jaxpr.eqns:
        operands = [x.val if isinstance(x, core.Literal) else values[x] for x in equation.invars]
        written, results = _operation(equation, operands)
        count += written
        values |= dict(zip(equation.outvars, results, strict=True))
    return count, [x.val if isinstance(x, core.Literal) else values[x] for x in closed.jaxpr.outvars]


def _operation(equation, operands):
    """What one equation writes, and its results."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return _while(params, operands)
    if name == "cond":
        index, *operands = operands
        return lax.switch(index, [functools.partial(_evaluate, branch) for branch in params["branches"]], *operands)
    if name == "scan":
        return _scan(equation, operands)
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr") if key in params), None)
    if inner is not None:
        return _evaluate(inner, *operands)
    results = equation.primitive.bind(*operands, **params)
    results = results if equation.primitive.multiple_results else [results]
    if name in FREE:
        return 0.0, results
    written = [operands[IN_PLACE[name]]] if name in IN_PLACE else results
    return float(sum(np.size(x) for x in written)), results


def _while(params, operands):
    cond_consts, body_consts, start = _parted(operands, params["cond_nconsts"], params["body_nconsts"])

    def goes_on(carry):
        return _evaluate(params["cond_jaxpr"], *cond_consts, *carry[1])[1][0]

    def body(carry):
        written, results = _evaluate(params["body_jaxpr"], *body_consts, *carry[1])
        return carry[0] + written, results

    return lax.while_loop(goes_on, body, (jnp.float32(0), start))


def _scan(equation, operands):
    params, inner = equation.params, equation.params["jaxpr"].jaxpr

    def same(outer, inner):  # how many are not stacked; versions of JAX differ in how they say it
        return sum(x.aval.shape == y.aval.shape for x, y in zip(outer, inner, strict=True))

    num_carry = same(equation.outvars, inner.outvars)
    consts, start, xs = _parted(operands, same(equation.invars, inner.invars) - num_carry, num_carry)

    def body(carry, x):
        written, results = _evaluate(params["jaxpr"], *consts, *carry[1], *x)
        return (carry[0] + written, results[: len(start)]), results[len(start) :]

    settings = {name: params[name] for name in ("length", "reverse")}
    (written, carry), ys = lax.scan(body, (jnp.float32(0), start), xs, **settings)
    return written, [*carry, *ys]


def _parted(operands, *sizes):
    """The first operands, so many of the two kinds, and the rest."""
    first, both = sizes[0], sum(sizes)
    return operands[:first], operands[first:both], operands[both:]
