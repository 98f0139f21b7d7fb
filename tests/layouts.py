"""Calls of tests in other layouts of the caches, made from those in this project's own in NumPy."""

import functools

import jax
import numpy as np

from paged_prefill import append_to_pages
from paged_prefill.tests import appends

NAMES = ("pskd", "pksd", "ps(k2)d", "p2ksd", "p2skd")
COMBINED = NAMES[2:]


def lay(call, name):
    """The operands of a call, of attention or append, as `cache_layout=name` has them."""
    laid, lead_dims = dict(call), call["key_cache"].ndim - 4
    for kind in ("cache", "scale"):
        arrays = [call.get(f"{x}_{kind}") for x in ("key", "value")]
        arrays = [None if x is None or x.ndim < lead_dims + 3 else np.asarray(x) for x in arrays]
        if name in COMBINED:
            if arrays[0] is not None:
                laid |= {f"key_{kind}": _together(arrays, name, lead_dims), f"value_{kind}": None}
        else:
            named = zip((f"key_{kind}", f"value_{kind}"), arrays)
            laid |= {x: _moved(array, "kpsd", name, lead_dims) for x, array in named if array is not None}
    return laid


def check_written(call, name, append=append_to_pages):
    """Holds an append, as `appends.make_append` makes it, in this layout to what it should write, to the bit."""
    got = jax.jit(functools.partial(append, cache_layout=name))(**lay(call, name))
    appends.assert_written(call, in_order(got, name, call["key_cache"].ndim - 4))


def in_order(written, name, lead_dims):
    """What an append gave in this layout, in this project's."""
    written = [None if x is None else np.asarray(x) for x in written]
    if name in COMBINED:
        assert all(x is None for x in written[1::2])
        return [half for x in written[::2] for half in take_apart(x, name, lead_dims)]
    return [x if x is None or x.ndim < lead_dims + 3 else take_apart(x, name, lead_dims)[0] for x in written]


def take_apart(array, name, lead_dims):
    """A cache or scales in this project's order: keys and, of one array with both, values."""
    if name not in COMBINED:
        return [_moved(array, name, "kpsd", lead_dims)]
    if name == "ps(k2)d":
        at = lead_dims + 2
        array = array.reshape(*array.shape[:at], -1, 2, *array.shape[at + 1 :])
    both = _moved(array, name.replace("(", "").replace(")", ""), "2kpsd", lead_dims)
    return [np.take(both, i, axis=lead_dims) for i in (0, 1)]


def _together(arrays, name, lead_dims):
    both = _moved(np.stack(arrays, axis=lead_dims), "2kpsd", name.replace("(", "").replace(")", ""), lead_dims)
    if name == "ps(k2)d":
        at = lead_dims + 2
        both = both.reshape(*both.shape[:at], -1, *both.shape[at + 2 :])
    return both


def _moved(array, before, after, lead_dims):
    """An array whose dimensions behind the leading ones are `before`, one letter each, as `after`; maybe without d."""
    count = array.ndim - lead_dims
    return array.transpose(*range(lead_dims), *(lead_dims + before.index(letter) for letter in after[:count]))
