"""What a caller says around a call and not in it: hints how it is cut, a configuration, and the policy of choice.

Each is a context of JAX's own (`jax.make_user_context`), part of the key of every trace: a function that was traced
under other hints, or without any, is traced again, also inside a warm `jax.jit`, a scan or a checkpoint.
"""

import contextlib
import dataclasses
import os
from typing import NamedTuple

import jax

from paged_prefill.primitive import checks
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.cut import Axes, axes_of

AxisHint = str | tuple[str, ...] | None
POLICIES = ("off", "cache", "on", "invariant")
POLICY_VARIABLE = "PAGED_PREFILL_AUTOTUNE"

_hints = jax.make_user_context((None, None, None))
_overlay = jax.make_user_context(None)
_policy = jax.make_user_context(None)


class Hint(NamedTuple):
    """What is known of the cut before the compiler decides; a static parameter of the primitives.

    Attributes:
      batch: the mesh axes of each batch dimension of the query.
      heads: those of the heads.
      pages: those of the caches' pages.
      waiting: those of the first batch dimension that vmap adds, for a call that has none of its own.
      complete: whether this is the whole cut. Not so where only vmap's `spmd_axis_name` spoke: heads may be cut too.
    """

    batch: tuple[Axes, ...]
    heads: Axes = ()
    pages: Axes = ()
    waiting: Axes = ()
    complete: bool = True


def check_hint(hint) -> Hint | None:
    """The hint that a primitive is bound with."""
    if not (hint is None or isinstance(hint, Hint)):
        raise TypeError(f"hint must be a Hint (primitive/context.py) or None, got {checks.shown(hint)}")
    return hint


@contextlib.contextmanager
def sharding_hints(*, head_axis: AxisHint = None, batch_axis: AxisHint = None, page_axis: AxisHint = None):
    """Gives every call traced inside the `head_axis`, `batch_axis` and `page_axis` that it does not give itself; nests.

    So a model need not pass them down. It may stand inside a jitted function or around its call: `jax.jit` traces
    again where hints have changed.

        with paged_prefill.sharding_hints(head_axis="model", batch_axis="data"):
            logits = jitted_model(...)

    Args:
      head_axis, batch_axis, page_axis: as in `ragged_paged_prefill`; () says that they are not cut.

    Raises:
      TypeError, ValueError: an axis is no name, or is given twice.
    """
    with _hints(_with_defaults(head_axis=head_axis, batch_axis=batch_axis, page_axis=page_axis)):
        yield


def hint_of(head_axis: AxisHint, batch_axis: AxisHint, page_axis: AxisHint, batch_dims: int) -> Hint | None:
    """The hint of one call whose query has `batch_dims` batch dimensions; None where nobody said anything."""
    given = _with_defaults(head_axis=head_axis, batch_axis=batch_axis, page_axis=page_axis)
    if given == (None, None, None):
        return None
    heads, batch, pages = map(axes_of, given)
    if batch_dims:
        return Hint((batch, *[()] * (batch_dims - 1)), heads, pages)
    return Hint((), heads, pages, waiting=batch)


def with_dimension(hint: Hint | None, position: int, spmd_axes: Axes, batch_dims: int) -> Hint | None:
    """The hint once vmap has added a batch dimension at `position` to a query that had `batch_dims`."""
    if hint is None:
        if not spmd_axes:
            return None
        hint = Hint(((),) * batch_dims, complete=False)
    new = spmd_axes or hint.waiting
    waiting = tuple(axis for axis in hint.waiting if axis not in new)
    return hint._replace(batch=(*hint.batch[:position], new, *hint.batch[position:]), waiting=waiting)


def _with_defaults(**given):
    """The hints, with those of `sharding_hints` where one is None; lists as the tuples that they stand for."""
    defaults = zip(given.items(), _hints.value, strict=True)
    given = {name: default if value is None else value for (name, value), default in defaults}
    for name, value in given.items():
        if not all(isinstance(axis, str) for axis in axes_of(value)):
            value = checks.shown(value)
            raise TypeError(f"{name} must be the name of a mesh axis, a tuple of names, or None, got {value}")
    axes = [axis for value in given.values() for axis in axes_of(value)]
    if len(set(axes)) < len(axes):
        said = " and ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ValueError(f"a mesh axis can cut one dimension once, got {said}")
    return tuple(axes_of(value) if isinstance(value, list) else value for value in given.values())


@contextlib.contextmanager
def overlay(config: PrefillPageAttentionConfig):
    """Calls traced inside run with `config`, unless their own `cfg=` says otherwise, field by field.

    Raises:
      TypeError: `config` is no PrefillPageAttentionConfig. What the sizes do not fit is an error of the call.
    """
    if not isinstance(config, PrefillPageAttentionConfig):
        raise TypeError(f"overlay takes a PrefillPageAttentionConfig, got {checks.shown(config)}")
    with _overlay(config):
        yield


def with_overlay(config: PrefillPageAttentionConfig | None, platform: str) -> PrefillPageAttentionConfig | None:
    """A call's configuration, completed by the overlay around it, which does not change what kernel a call asks for."""
    around = _overlay.value
    if around is None:
        return config
    if platform != "auto":
        around = dataclasses.replace(around, platform=None)
    return (config or PrefillPageAttentionConfig()).over(around)


@contextlib.contextmanager
def policy(name: str):
    """Sets the policy for all that is traced inside: "off", "cache", "on" or "invariant" (lowering/tuning/resolve.py).

    Raises:
      ValueError: there is no policy of that name.
    """
    with _policy(_checked_policy(name, "policy")):
        yield


def current_policy() -> str:
    """The policy in force; ValueError where the environment, which is read at each use, names none that there is."""
    return _policy.value or _checked_policy(os.environ.get(POLICY_VARIABLE, "cache"), POLICY_VARIABLE)


def _checked_policy(name, where):
    if not checks.is_one_of(name, POLICIES):
        raise ValueError(f"{where} must be one of {', '.join(POLICIES)}, got {checks.shown(name)}")
    return name
