"""Hints: the mesh axes that a caller says the operation is cut over, and how they follow the dimensions of vmap."""

import contextlib
import contextvars
from typing import NamedTuple

from paged_prefill.primitive.cut import Axes, axes_of

AxisHint = str | tuple[str, ...] | None


class Hint(NamedTuple):
    """What is known of the cut before the compiler decides; a static parameter of `paged_prefill_p`.

    Attributes:
      batch: the mesh axes of each batch dimension of the query.
      heads: those of the heads.
      waiting: those of the first batch dimension that vmap adds, for a call that has none of its own.
      complete: whether this is the whole cut. Not so where only vmap's `spmd_axis_name` spoke: heads may be cut too.
    """

    batch: tuple[Axes, ...]
    heads: Axes = ()
    waiting: Axes = ()
    complete: bool = True


_default = contextvars.ContextVar("paged_prefill_sharding_hints", default=(None, None))


@contextlib.contextmanager
def sharding_hints(*, head_axis: AxisHint = None, batch_axis: AxisHint = None):
    """Gives every call traced inside the `head_axis` and `batch_axis` that it does not give itself; nests.

    So a model need not pass them down. Hints are read while tracing: enter this inside the jitted function, since
    `jax.jit` does not trace again where only a hint has changed.

        @jax.jit
        def step(...):
            with paged_prefill.sharding_hints(head_axis="model", batch_axis="data"):
                return model(...)

    Args:
      head_axis, batch_axis: as in `ragged_paged_prefill`; () says that they are not cut.

    Raises:
      TypeError, ValueError: an axis is no name, or is given twice.
    """
    token = _default.set(_with_defaults(head_axis, batch_axis))
    try:
        yield
    finally:
        _default.reset(token)


def hint_of(head_axis: AxisHint, batch_axis: AxisHint, batch_dims: int) -> Hint | None:
    """The hint of one call whose query has `batch_dims` batch dimensions; None where nobody said anything."""
    head_axis, batch_axis = _with_defaults(head_axis, batch_axis)
    if head_axis is None and batch_axis is None:
        return None
    heads, batch = axes_of(head_axis), axes_of(batch_axis)
    if batch_dims:
        return Hint((batch, *[()] * (batch_dims - 1)), heads)
    return Hint((), heads, waiting=batch)


def with_dimension(hint: Hint | None, position: int, spmd_axes: Axes, batch_dims: int) -> Hint | None:
    """The hint once vmap has added a batch dimension at `position` to a query that had `batch_dims`."""
    if hint is None:
        if not spmd_axes:
            return None
        hint = Hint(((),) * batch_dims, complete=False)
    new = spmd_axes or hint.waiting
    waiting = tuple(axis for axis in hint.waiting if axis not in new)
    return hint._replace(batch=(*hint.batch[:position], new, *hint.batch[position:]), waiting=waiting)


def _with_defaults(head_axis, batch_axis):
    """Both hints, with those of `sharding_hints` where one is None."""
    head_default, batch_default = _default.get()
    head_axis = head_default if head_axis is None else head_axis
    batch_axis = batch_default if batch_axis is None else batch_axis
    for name, value in (("head_axis", head_axis), ("batch_axis", batch_axis)):
        if not all(isinstance(axis, str) for axis in axes_of(value)):
            raise TypeError(f"{name} must be the name of a mesh axis, a tuple of names, or None, got {value!r}")
    axes = axes_of(head_axis) + axes_of(batch_axis)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"a mesh axis can cut one dimension once, got head_axis={head_axis!r} and batch_axis={batch_axis!r}"
        )
    return head_axis, batch_axis
