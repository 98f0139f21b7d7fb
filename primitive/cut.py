"""Which mesh axes cut the operation: one plan, used by every way in.

This module knows meshes and shapes only, and stands below both the primitive, whose types it decides under explicit
axes, and the lowering. Wishes are served first come, first served, the caches' before all others: a cache is big and
stays where it is, while queries and outputs are small and may move.
"""

from collections.abc import Iterable, Mapping
import math
from typing import NamedTuple

from jax.sharding import PartitionSpec

Axes = tuple[str, ...]  # the mesh axes that cut one dimension, major to minor

OPERANDS = ("query", "key_cache", "value_cache", "context_lens", "page_indices", "query_offsets")
RESULTS = ("out", "lse")
CACHES = OPERANDS[1:3]


class Cut(NamedTuple):
    """The mesh axes that cut each dimension which may be cut; also what one operand wishes for.

    Attributes:
      batch: those of each batch dimension of the query, [*C, *B].
      heads: those of the query heads. They begin with those of the KV heads.
      kv_heads: those of the caches' heads. Where there are fewer, each device picks its KV heads from a larger cache.
    """

    batch: tuple[Axes, ...]
    heads: Axes = ()
    kv_heads: Axes = ()

    def specs(self, cache_batch_dims: int) -> dict[str, PartitionSpec]:
        """The full PartitionSpec of each operand and result, by name."""
        batch = [entry(axes) for axes in self.batch]
        heads, cache = entry(self.heads), (*batch[:cache_batch_dims], entry(self.kv_heads), None, None, None)
        return dict(
            query=PartitionSpec(*batch, None, heads, None),
            key_cache=PartitionSpec(*cache),
            value_cache=PartitionSpec(*cache),
            context_lens=PartitionSpec(*batch, None),
            page_indices=PartitionSpec(*batch, None, None),
            query_offsets=PartitionSpec(*batch, None),
            out=PartitionSpec(*batch, None, heads, None),
            lse=PartitionSpec(*batch, None, heads),
        )


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


def plan(mesh: Mapping[str, int], query, key_cache, cache_batch_dims: int, wishes: Iterable[Cut]) -> Cut:
    """Settles wishes, the most important first, into a cut that every device can run by itself.

    `query` and `key_cache` are anything with the global shape. A wish gets the longest leading part of its axes that is
    free and divides the dimension; KV heads are never cut by an axis that does not cut the query heads.
    """
    sizes, q_heads, kv_heads = query.shape[:-3], query.shape[-2], key_cache.shape[cache_batch_dims]
    group = q_heads // kv_heads
    batch: list[Axes] = [()] * len(sizes)
    cut_heads: Axes = ()
    cut_kv_heads: Axes = ()

    def free(axes):
        used = {*cut_heads}.union(*batch)
        return tuple(axis for axis in axes if axis not in used)

    def divides(size):
        return lambda axes: size % ways(mesh, axes) == 0

    def keeps_groups(axes):  # a part must hold whole groups of query heads, or lie inside one
        if q_heads % ways(mesh, axes):
            return False
        part = q_heads // ways(mesh, axes)
        return part % group == 0 or group % part == 0

    for wish in wishes:
        if not cut_heads:
            cut_heads = cut_kv_heads = _longest(free(wish.kv_heads), divides(kv_heads))
        for dim, axes in enumerate(wish.batch):
            if not batch[dim]:
                batch[dim] = _longest(free(axes), divides(sizes[dim]))
        if cut_heads == cut_kv_heads:
            cut_heads = _longest((*cut_heads, *free(wish.heads)), keeps_groups, at_least=len(cut_kv_heads))
    return Cut(tuple(batch), cut_heads, cut_kv_heads)


def _longest(axes: Axes, fits, at_least: int = 0) -> Axes:
    lengths = range(len(axes), at_least, -1)
    return next((axes[:length] for length in lengths if fits(axes[:length])), axes[:at_least])


def wishes_of(specs: Mapping[str, PartitionSpec], batch_dims: int, cache_batch_dims: int) -> list[Cut]:
    """What operands and results wish for, by how they are cut (`specs`, by name), the most important first."""
    wishes = []
    for name in (*CACHES, "query", *RESULTS, *OPERANDS[3:]):
        if name in specs:
            dims = cache_batch_dims if name in CACHES else batch_dims
            axes = _axes(specs[name], dims + 2)
            wish = Cut((*axes[:dims], *[()] * (batch_dims - dims)))
            if name in CACHES:
                wish = wish._replace(kv_heads=axes[dims])
            elif name in ("query", *RESULTS):
                wish = wish._replace(heads=axes[dims + 1])
            wishes.append(wish)
    return wishes


def cut_of_specs(mesh: Mapping[str, int], query, key_cache, specs: Mapping[str, PartitionSpec]) -> Cut:
    """The cut that a caller's specs of a call without batch dimensions describe, by name.

    ValueError where no device could run its part by itself, and names the first spec that is the reason.
    """
    cut = plan(mesh, query, key_cache, 0, wishes_of(specs, 0, 0))
    wanted = cut.specs(0)
    for name, spec in specs.items():
        ndim = max(len(spec), len(wanted[name]))
        if _axes(spec, ndim) != _axes(wanted[name], ndim):
            raise ValueError(
                f"the spec of {name} must be {wanted[name]} to go with the others, got {spec}: only heads can be cut, "
                f"query and output alike and the caches at most as far, in parts of whole groups or inside one "
                f"({query.shape[-2]} query heads, {key_cache.shape[0]} KV heads)"
            )
    return cut


def check_stays(name: str, spec: PartitionSpec, wanted: PartitionSpec, mesh: Mapping[str, int]) -> None:
    """ValueError where an operand cut as `spec` would have to move between devices to be cut as `wanted`.

    A dimension may be cut further than it is, since that takes no communication.
    """
    for have, want in zip(_axes(spec, len(wanted)), _axes(wanted, len(wanted)), strict=True):
        have, want = ([axis for axis in axes if mesh[axis] > 1] for axes in (have, want))
        if have != want[: len(have)]:
            raise ValueError(
                f"{name} is cut as {spec} and would have to move between devices to be cut as {wanted}: paged_prefill "
                "cuts batch dimensions and heads only, alike in all operands, and query heads only where each part "
                "holds whole groups of them (those that share a KV head) or lies inside one. Reshard it before the call"
            )
