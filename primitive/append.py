"""The two primitives that write new keys and values into their pages; what they take and give is in operands.py.

`append_to_pages_p` has global shapes; `local_append_to_pages_p` is what one device runs. An operation of its own, since
its types say how the caches that come back are cut: as those that went in.
"""

from functools import partial

from paged_prefill.primitive import checks, context
from paged_prefill.primitive.binding import (
    OperationPrimitive,
    define,
    define_transformations,
    shapes_of,
    specs_by_plan,
    specs_of_one_device,
    typed_result,
)
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.operands import APPEND

LOCAL = APPEND._replace(name="local_append_to_pages")


def _parameters(operands, *, cache_batch_dims: int = 0, cache_layout: str = DEFAULT_LAYOUT) -> dict:
    cache_batch_dims = checks.integer("cache_batch_dims", cache_batch_dims)
    return dict(cache_batch_dims=cache_batch_dims, cache_layout=checks.check_layout(cache_layout).name)


# Twins for the same reason as those of the attention.
_bound = partial(OperationPrimitive, APPEND, "append_to_pages", _parameters, hint=context.check_hint)
typed_append_to_pages_p = _bound()
append_to_pages_p = _bound(typed=typed_append_to_pages_p)
local_append_to_pages_p = OperationPrimitive(LOCAL, "local_append_to_pages", _parameters)


def _abstract_by(operation, specs_of):
    def abstract(*operands, present, hint=None, **form):
        named = dict(zip(present, operands, strict=True))
        checks.check_append_operands(operation, named, **form)
        specs = specs_of(operation, operands, present=present, **form)
        written = shapes_of(operation, present, operands, **form).results()
        return [typed_result(x, x.shape, x.dtype, specs[row.name]) for row in written for x in [named[row.name]]]

    return abstract


define(local_append_to_pages_p, _abstract_by(LOCAL, specs_of_one_device))
for _primitive in (append_to_pages_p, typed_append_to_pages_p):
    define(_primitive, _abstract_by(APPEND, specs_by_plan))
    define_transformations(_primitive, binds=append_to_pages_p)
