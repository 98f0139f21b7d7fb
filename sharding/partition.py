"""How an operation becomes what each device runs: the ways there, and the choice of one.

    a user's shard_map           nothing to do, the call is local
    explicit mesh axes           shard_map, cut as the types say
    one device                   nothing to do
    a complete hint              shard_map, cut as the caller says
    automatic axes, CPU and GPU  custom_partitioning: the compiler asks `_partition`, once it knows how operands are cut
    automatic axes, TPU, export  the attention: an error, since XLA:TPU has no custom partitioning (jax-ml/jax#38196);
                                 append_to_pages: plain operations of XLA, which it cuts by itself
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from paged_prefill import compat
from paged_prefill.primitive.append import append_to_pages_p, local_append_to_pages_p, typed_append_to_pages_p
from paged_prefill.primitive.binding import mesh_of, shapes_of
from paged_prefill.primitive.context import Hint, current_policy
from paged_prefill.primitive.cut import Cut, check_honoured, check_stays, entry, settle, ways
from paged_prefill.primitive.operands import APPEND, CACHES, PREFILL, Operation, Shapes
from paged_prefill.primitive.prefill import (
    local_paged_prefill_p,
    lowering_reads,
    paged_prefill_p,
    typed_paged_prefill_p,
)
from paged_prefill.sharding import pages
from paged_prefill.sharding.rule import sharding_rule


class Call(NamedTuple):
    """All that is static about one call, hashable; `parameters` are those of the local primitive, as pairs."""

    operation: Operation
    present: tuple[str, ...]
    cache_batch_dims: int
    parameters: tuple[tuple[str, object], ...]

    def shapes(self, arrays) -> Shapes:
        """The global shapes of operands."""
        cache_layout = dict(self.parameters)["cache_layout"]
        return shapes_of(self.operation, self.present, arrays, self.cache_batch_dims, cache_layout)


def _lower(operation, ctx, *operands, present, cache_batch_dims, hint=None, **parameters):
    call = Call(operation, present, cache_batch_dims, tuple((parameters | _settings(operation)).items()))
    shapes = call.shapes(ctx.avals_in)
    where = ctx.module_context.axis_context
    mesh = mesh_of(*ctx.avals_in)
    if mesh.empty:  # automatic axes do not show in types
        mesh = getattr(where, "abstract_mesh", None) or _mesh_entered(where)
    if hint is not None and {*hint.pages} & {*mesh.manual_axes}:
        raise ValueError(
            f"page_axis={entry(hint.pages)!r} inside a shard_map, where {operation.name} is local to a device: there, "
            "paged_prefill.local_pages and merge_over do what it asks for"
        )
    explicit = bool(mesh.explicit_axes) and not mesh.auto_axes
    if mesh.manual_axes or (getattr(where, "num_devices", 1) == 1 and not explicit):
        run = on_one_device(mesh.shape, _uncut(shapes), shapes, call)
    elif explicit or (hint is not None and hint.complete):
        run = _known_cut(mesh, ctx.avals_in, call, None if explicit else hint)  # types have the last word
    elif operation.writes and _cannot_be_asked(ctx):  # plain operations of XLA, which it cuts by itself
        run = on_one_device(mesh.shape, _uncut(shapes), shapes, call)
    else:
        _refuse_where_it_cannot_be_asked(operation.name, ctx)
        run = lambda *arrays: _automatic(len(present))(*_constrained(mesh, hint, call, arrays), call)
        results = mlir.lower_fun(run)(_told_of(mesh, ctx), *operands)
        _sign(results, call)
        return results
    return mlir.lower_fun(run)(ctx, *operands)


def _mesh_entered(where):
    """The mesh of jax.set_mesh, where it has the computation's devices; else an empty one.

    No sharding of a computation's arguments and results speaks of a mesh where these are NumPy's, say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size == getattr(where, "num_devices", mesh.size) else AbstractMesh((), ())


def _told_of(mesh, ctx):
    """The context with this mesh, by which JAX tells the compiler's callback how arrays are cut."""
    where = ctx.module_context.axis_context
    if mesh.empty or where.abstract_mesh is not None:
        return ctx
    where = dataclasses.replace(where, abstract_mesh=mesh)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=where))


def _settings(operation) -> dict:
    """The caller's settings that lowering depends on: the compiler may call back from a thread that lacks them."""
    if operation is not PREFILL:
        return {}
    return dict(matmul_precision=jax.config.jax_default_matmul_precision, policy=current_policy())


def _uncut(shapes: Shapes) -> Cut:
    return Cut(((),) * len(shapes.batch))


def on_one_device(mesh, cut: Cut, shapes: Shapes, call: Call):
    """The function of local operands that one device runs. `shapes` are the global ones."""
    run = _append_on_one_device if call.operation is APPEND else _attend_on_one_device
    return lambda *operands: run(mesh, cut, shapes, call, dict(zip(call.present, operands, strict=True)))


def _append_on_one_device(mesh, cut: Cut, shapes: Shapes, call: Call, named):
    if ways(mesh, cut.pages) > 1:
        num_pages = shapes.num_pages // ways(mesh, cut.pages)
        named |= dict(page_indices=pages.counted_here(cut.pages, named["page_indices"], num_pages))
    return _bind_local(local_append_to_pages_p, call, named)


def _attend_on_one_device(mesh, cut: Cut, shapes: Shapes, call: Call, named):
    group = shapes.heads // shapes.kv_heads
    part = shapes.heads // ways(mesh, cut.heads)  # query heads of one device
    finer = cut.heads[len(cut.kv_heads) :]  # axes that cut query heads but not the caches
    first = lax.axis_index(finer) * part // group if finer else 0
    named |= dict(kv_head_start=jnp.asarray(first, jnp.int32))
    changes = dict(num_kv_heads=max(1, part // group))
    if ways(mesh, cut.pages) == 1:
        return _bind_local(local_paged_prefill_p, call, named, **changes)
    parameters = dict(call.parameters)
    attention, invariant = parameters["attention"], parameters.get("policy") == "invariant"
    named, window = pages.hold(cut.pages, named, attention.sliding_window, shapes.layout, invariant=invariant)
    changes["attention"] = dataclasses.replace(attention, sliding_window=window)
    results = _bind_local(local_paged_prefill_p, call, named, **changes)
    return pages.merge_over(cut.pages, *results, scatter=bool(cut.tokens))


def _bind_local(primitive, call: Call, named, **changes):
    """Binds what one device runs, with one device's operands by name, and the call's parameters but for `changes`."""
    present = primitive.operation.present(named)
    parameters = dict(call.parameters, cache_batch_dims=call.cache_batch_dims) | changes
    return tuple(primitive.bind(*(named[name] for name in present), present=present, **parameters))


def _settle(mesh, shapes: Shapes, specs, hint: Hint | None = None) -> Cut:
    """The plan for operands and results that are cut as `specs` say, by name, and for a hint."""
    if hint is None:
        return settle(mesh.shape, shapes, specs)
    unknown = {*hint.heads, *hint.pages}.union(*hint.batch) - {*mesh.axis_names}
    if unknown:
        raise ValueError(
            f"head_axis, batch_axis and page_axis must name axes of the mesh {tuple(mesh.axis_names)}, "
            f"got {sorted(unknown)}; the mesh comes from jax.set_mesh or from the NamedShardings of the computation's "
            "arguments"
        )
    hinted = Cut(hint.batch, hint.heads, hint.heads, hint.pages)
    cut = settle(mesh.shape, shapes, specs, hinted)
    check_honoured(mesh.shape, shapes, cut, hinted)
    return cut


# ---- The cut is known: shard_map, which works on every platform and can be exported.


def _known_cut(mesh, avals, call: Call, hint: Hint | None):
    shapes = call.shapes(avals)
    types = {name: aval.sharding.spec for name, aval in zip(call.present, avals, strict=True)}
    cut = _settle(mesh, shapes, types, hint)
    specs = cut.specs(shapes)
    mapped = jax.shard_map(
        on_one_device(mesh.shape, cut, shapes, call),
        mesh=mesh,
        in_specs=tuple(specs[name] for name in call.present),
        out_specs=tuple(specs[row.name] for row in shapes.results()),
        check_vma=False,
    )
    if not mesh.explicit_axes:
        return mapped

    def run(*operands):  # shard_map takes an operand whose type says less than its spec only once it is cut
        return mapped(*(_reshard(mesh, x, specs[name]) for name, x in zip(call.present, operands, strict=True)))

    return run


def _reshard(mesh, x, spec):
    explicit = {*mesh.explicit_axes}
    entries = (e if isinstance(e, tuple) else (e,) for e in spec)
    spec = PartitionSpec(*(tuple(axis for axis in e if axis in explicit) for e in entries))
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


# ---- The compiler finds the cut: custom_partitioning.


@functools.cache
def _automatic(operands: int):
    """The function of so many operands and a `Call` that the compiler asks how to cut."""

    @functools.partial(custom_partitioning, static_argnums=(operands,))
    def automatic(*operands_and_call):
        *arrays, call = operands_and_call
        shapes = call.shapes(arrays)
        return on_one_device({}, _uncut(shapes), shapes, call)(*arrays)

    automatic.def_partition(_partition, _infer, sharding_rule=_rule)
    return automatic


def _constrained(mesh, hint, call: Call, operands):
    """The operands, the leading one cut along its batch as vmap's `spmd_axis_name` says; the rule carries it to others."""
    if hint is None:
        return operands
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(entry(axes) or free for axes in hint.batch), free, free, free)
    number = call.present.index(call.operation.leading)
    leading = lax.with_sharding_constraint(operands[number], NamedSharding(mesh, spec))
    return (*operands[:number], leading, *operands[number + 1 :])


def _rule(call: Call, mesh, operands, results):
    return sharding_rule(call.shapes(operands), mesh)


def _partition(call: Call, mesh, operands, results):
    """What each device runs, and how every operand and result is cut; the compiler moves what is cut otherwise."""
    shapes = call.shapes(operands)
    names = [row.name for row in shapes.results()]
    given = _specs(call, names, results) | _specs(call, call.present, operands)
    cut = _settle(mesh, shapes, given)
    specs = cut.specs(shapes)
    for name in CACHES:
        if name in given:
            check_stays(shapes, name, given[name], specs[name], mesh.shape)
    run = on_one_device(mesh.shape, cut, shapes, call)

    def run_without_mesh(*local):  # JAX 0.12 keeps the caller's mesh in the thread that the compiler calls from
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return run(*local)

    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return (
        mesh,
        run_without_mesh,
        tuple(shardings[name] for name in names),
        tuple(shardings[name] for name in call.present),
    )


def _infer(call: Call, mesh, operands, results):
    """How the results are cut. Only GSPMD asks (jax_use_shardy_partitioner=False); JAX 0.10 aborts without it."""
    shapes = call.shapes(operands)
    specs = _settle(mesh, shapes, _specs(call, call.present, operands)).specs(shapes)
    return tuple(NamedSharding(mesh, specs[row.name]) for row in shapes.results())


def _specs(call: Call, names, arrays):
    if not all(isinstance(x.sharding, NamedSharding | None) for x in arrays):
        raise ValueError(
            f"{call.operation.name} on several devices needs to know their mesh: give the computation's arguments "
            "NamedShardings, or enter jax.set_mesh"
        )
    return {name: x.sharding.spec if x.sharding else PartitionSpec() for name, x in zip(names, arrays, strict=True)}


def _cannot_be_asked(ctx) -> str | None:
    """Why the compiler cannot ask this process how to cut a call, or None."""
    if "tpu" in (ctx.platforms or ctx.module_context.platforms):
        return "on several TPUs with automatic mesh axes: XLA for TPU cannot ask how to cut it (jax-ml/jax#38196)"
    if ctx.module_context.lowering_parameters.for_export:
        return (
            "on several devices with automatic mesh axes cannot be exported: the compiler would have to ask this "
            "process how to cut it"
        )
    return None


def _refuse_where_it_cannot_be_asked(name, ctx) -> None:
    if reason := _cannot_be_asked(ctx):
        raise NotImplementedError(
            f"{name} {reason}. Say how it is cut: by head_axis=, batch_axis= and page_axis= (or sharding_hints), by "
            "explicit mesh axes, or by calling it inside jax.shard_map"
        )


def _sign(results, call: Call) -> None:
    """Writes what the compiler would run into the module, which else holds only a pointer to the callback.

    A persistent cache that leaves the pointer out of its key (jax_remove_custom_partitioning_ptr_from_cache_key) can
    then not take another call's executable, nor that of older code or of other tables, for this one.
    """
    operation = results[0].owner.operation
    attributes = {"paged_prefill": repr(call), "paged_prefill_code": _code_version()}
    if call.operation is PREFILL:
        attributes["paged_prefill_reads"] = " ".join(read() for read in lowering_reads)
    operation.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(
        {name: mlir.ir.StringAttr.get(value) for name, value in attributes.items()}
    )


@functools.cache
def _code_version(package: pathlib.Path = pathlib.Path(__file__).parents[1]) -> str:
    """A digest of a package's code and tables, as far as they decide what is compiled."""
    files = [path for folder in ("primitive", "lowering", "sharding") for path in (package / folder).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted([package / "compat.py", *files]):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


for _operation, _primitive, _typed in (
    (PREFILL, paged_prefill_p, typed_paged_prefill_p),
    (APPEND, append_to_pages_p, typed_append_to_pages_p),
):
    for _each in (_primitive, _typed):
        mlir.register_lowering(_each, functools.partial(_lower, _operation))
    compat.require_devices_during_lowering(_primitive)
