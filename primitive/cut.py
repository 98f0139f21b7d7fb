"""Which mesh axes cut an operation: one plan, used by every way in.

This module knows meshes and shapes only, and stands below both the primitives, whose types it decides under explicit
axes, and the lowering. Wishes are served first come, first served, the caches' before all others: a cache is big and
stays where it is, while queries and outputs are small and may move.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import NamedTuple

from jax.sharding import PartitionSpec

from paged_prefill.primitive.operands import CACHES, Shapes

Axes = tuple[str, ...]  # the mesh axes that cut one dimension, major to minor
KV_HEADS = ("kv_heads", "2 * kv_heads")  # by either name, in parts of whole heads


class Cut(NamedTuple):
    """The mesh axes that cut each dimension which may be cut; also what one operand wishes for.

    Attributes:
      batch: those of each batch dimension, [*C, *B].
      heads: those of the query heads. They begin with those of the KV heads.
      kv_heads: those of the caches' heads. Where there are fewer, each device picks its KV heads from a larger cache.
      pages: those of the caches' pages. Each device has partial results then, which are summed over these axes.
      tokens: those of the results' tokens, which are the pages' or none: each device then gets its part of the sum.
    """

    batch: tuple[Axes, ...]
    heads: Axes = ()
    kv_heads: Axes = ()
    pages: Axes = ()
    tokens: Axes = ()

    def specs(self, call: Shapes) -> dict[str, PartitionSpec]:
        """The full PartitionSpec of each operand and result, by name."""
        everywhere = {"q_heads": self.heads, "num_pages": self.pages} | dict.fromkeys(KV_HEADS, self.kv_heads)
        in_results = everywhere | dict(tokens=self.tokens)

        def spec(row):
            # A pool that serves all of a dimension is whole along it.
            lead = [() if size == 1 else axes for axes, size in zip(self.batch, call.lead(row))]
            axes_of_dim = in_results if row in call.operation.results else everywhere
            rest = [axes_of_dim.get(dim, ()) for dim in call.dims(row)]
            return PartitionSpec(*map(entry, lead + rest))

        return {row.name: spec(row) for row in call.rows()}


def axes_of(spec_entry) -> Axes:
    """An entry of a PartitionSpec, or an argument like `head_axis=`, as a tuple of axis names."""
    if spec_entry is None:
        return ()
    return tuple(spec_entry) if isinstance(spec_entry, tuple | list) else (spec_entry,)


def entry(axes: Axes):
    """Axes as JAX writes them in a PartitionSpec."""
    return axes[0] if len(axes) == 1 else axes or None


def _axes(spec: PartitionSpec, ndim: int) -> list[Axes]:
    return [axes_of(e) for e in (*spec, *(None,) * (ndim - len(spec)))]


def ways(mesh: Mapping[str, int], axes: Axes) -> int:
    """Into how many parts `axes` cut a dimension; `mesh` holds the sizes of the axes, as `Mesh.shape` does."""
    return math.prod(mesh[axis] for axis in axes)


def plan(
    mesh: Mapping[str, int], batch: Sequence[int], heads: int, kv_heads: int, num_pages: int, wishes: Iterable[Cut]
) -> Cut:
    """Settles wishes, the most important first, into a cut that every device can run by itself.

    `batch`, `heads`, `kv_heads` and `num_pages` are the sizes of the whole. A wish gets the longest leading part of its
    axes that is free and divides the dimension; KV heads are never cut by an axis that does not cut the query heads.
    """
    group = heads // kv_heads
    cut_batch: list[Axes] = [()] * len(batch)
    cut_heads: Axes = ()
    cut_kv_heads: Axes = ()
    cut_pages: Axes = ()

    def free(axes):
        used = {*cut_heads, *cut_pages}.union(*cut_batch)
        return tuple(axis for axis in axes if axis not in used)

    def divides(size):
        return lambda axes: size % ways(mesh, axes) == 0

    def keeps_groups(axes):  # a part must hold whole groups of query heads, or lie inside one
        if heads % ways(mesh, axes):
            return False
        part = heads // ways(mesh, axes)
        return part % group == 0 or group % part == 0

    for wish in wishes:
        if not cut_heads:
            cut_heads = cut_kv_heads = _longest(free(wish.kv_heads), divides(kv_heads))
        for dim, axes in enumerate(wish.batch):
            if not cut_batch[dim]:
                cut_batch[dim] = _longest(free(axes), divides(batch[dim]))
        if not cut_pages:
            cut_pages = _longest(free(wish.pages), divides(num_pages))
        if cut_heads == cut_kv_heads:
            cut_heads = _longest((*cut_heads, *free(wish.heads)), keeps_groups, at_least=len(cut_kv_heads))
    return Cut(tuple(cut_batch), cut_heads, cut_kv_heads, cut_pages)


def _longest(axes: Axes, fits, at_least: int = 0) -> Axes:
    lengths = range(len(axes), at_least, -1)
    return next((axes[:length] for length in lengths if fits(axes[:length])), axes[:at_least])


def wishes_of(call: Shapes, specs: Mapping[str, PartitionSpec]) -> list[Cut]:
    """What operands and results wish for, by how they are cut (`specs`, by name), the most important first."""
    batch_dims = len(call.batch)
    first = [*CACHES, call.operation.leading, *(row.name for row in call.operation.results)]
    rows = sorted(call.rows(), key=lambda row: first.index(row.name) if row.name in first else len(first))
    wishes = []
    for row in rows:
        if row.name in specs:
            lead, dims = len(call.lead(row)), call.dims(row)
            axes = _axes(specs[row.name], lead + len(dims))
            named = dict(zip(dims, axes[lead:], strict=True))
            batch = (*axes[:lead], *[()] * (batch_dims - lead))
            tokens = named.get("tokens", ()) if row in call.operation.results else ()
            kv_heads = next((named[dim] for dim in KV_HEADS if dim in named), ())
            wishes.append(Cut(batch, named.get("q_heads", ()), kv_heads, named.get("num_pages", ()), tokens))
    return wishes


def settle(
    mesh: Mapping[str, int], call: Shapes, specs: Mapping[str, PartitionSpec], hinted: Cut | None = None
) -> Cut:
    """The plan of a call whose operands and results are cut as `specs` say; `hinted` stands behind the caches'."""
    wishes = wishes_of(call, specs)
    if hinted is not None:
        wishes.insert(len([name for name in CACHES if name in specs]), hinted)
    if call.operation.writes:
        own, whole = call.cache_batch_dims, ((),) * (len(call.batch) - call.cache_batch_dims)
        wishes = [wish._replace(batch=(*wish.batch[:own], *whole)) for wish in wishes]
    cut = plan(mesh, call.batch, call.heads, call.kv_heads, call.num_pages, wishes)
    # A sum over devices may as well be left scattered over them, where that is how a result is wanted.
    wanted = any(wish.tokens[: len(cut.pages)] == cut.pages for wish in wishes)
    scattered = cut.pages and wanted and call.tokens % ways(mesh, cut.pages) == 0
    return cut._replace(tokens=cut.pages) if scattered else cut


def cut_of_specs(mesh: Mapping[str, int], call: Shapes, specs: Mapping[str, PartitionSpec]) -> Cut:
    """The cut that a caller's specs of a call without batch dimensions describe, by name.

    ValueError where no device could run its part by itself, and names the first spec that is the reason.
    """
    cut = settle(mesh, call, specs)
    wanted = cut.specs(call)
    for name, spec in specs.items():
        ndim = max(len(spec), len(wanted[name]))
        if _axes(spec, ndim) != _axes(wanted[name], ndim):
            raise ValueError(
                f"the spec of {name} must be {wanted[name]} to go with the others, got {spec}: only heads and pages "
                "can be cut, heads of query and output alike and of the caches at most as far, in parts of whole groups "
                f"or inside one ({call.heads} query heads, {call.kv_heads} KV heads), pages of both caches alike"
            )
    return cut


def check_stays(
    call: Shapes, name: str, spec: PartitionSpec, wanted: PartitionSpec, mesh: Mapping[str, int]
) -> None:
    """ValueError where an operand cut as `spec` would have to move between devices to be cut as `wanted`.

    A dimension may be cut further than it is, since that takes no communication.
    """
    for have, want in zip(_axes(spec, len(wanted)), _axes(wanted, len(wanted)), strict=True):
        have, want = ([axis for axis in axes if mesh[axis] > 1] for axes in (have, want))
        if have != want[: len(have)]:
            raise ValueError(
                f"{name} is cut as {spec} and would have to move between devices to be cut as {wanted}: "
                f"{call.operation.name} cuts {call.operation.cuts}. Reshard it before the call"
            )


def check_honoured(mesh: Mapping[str, int], call: Shapes, cut: Cut, hinted: Cut) -> None:
    """ValueError where a cut is not as far as the caller's hint says, and would leave work undivided in silence."""
    for dim, (have, want) in enumerate(zip(cut.batch, hinted.batch, strict=True)):
        if dim < call.cache_batch_dims or not call.operation.writes:
            _check_honoured(mesh, "batch_axis", have, want, f"a batch dimension of {call.batch[dim]}")
    if not call.operation.writes:
        heads = f"{call.heads} query heads over {call.kv_heads} KV heads, in parts of whole groups or inside one,"
        _check_honoured(mesh, "head_axis", cut.heads, hinted.heads, heads)
    _check_honoured(mesh, "page_axis", cut.pages, hinted.pages, f"a pool of {call.num_pages} pages")


def _check_honoured(mesh, argument, have, want, what) -> None:
    have, want = (tuple(axis for axis in axes if mesh[axis] > 1) for axes in (have, want))
    if have != want:
        raise ValueError(
            f"{argument}={entry(want)!r} cuts into {ways(mesh, want)} parts, and {what} cannot be cut so: give the axes "
            "that divide it, or leave it whole"
        )
