"""How `paged_prefill_p` becomes what each device runs: the ways there, and the choice of one.

    a user's shard_map           nothing to do, the call is local
    explicit mesh axes           shard_map, cut as the types say
    one device                   nothing to do
    a complete hint              shard_map, cut as the caller says
    automatic axes, CPU and GPU  custom_partitioning: the compiler asks `_partition`, once it knows how operands are cut
    automatic axes, TPU          an error: XLA:TPU has no custom partitioning (github.com/jax-ml/jax/issues/38196)
"""

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
from paged_prefill.primitive.hints import Hint
from paged_prefill.primitive.prefill import local_paged_prefill_p, mesh_of, paged_prefill_p, typed_paged_prefill_p
from paged_prefill.primitive.cut import CACHES, OPERANDS, RESULTS, Cut, check_stays, entry, plan, ways, wishes_of
from paged_prefill.sharding.rule import sharding_rule


class Call(NamedTuple):
    """All that is static about one call, hashable; `parameters` are those of `local_paged_prefill_p`, as pairs."""

    cache_batch_dims: int
    parameters: tuple[tuple[str, object], ...]


def _lower(ctx, *operands, cache_batch_dims, hint=None, **parameters):
    # The compiler calls back from a thread that lacks the caller's settings, so what matters goes along.
    parameters |= dict(cache_batch_dims=cache_batch_dims, matmul_precision=jax.config.jax_default_matmul_precision)
    call = Call(cache_batch_dims, tuple(parameters.items()))
    query, key_cache = ctx.avals_in[:2]
    where = ctx.module_context.axis_context
    mesh = mesh_of(*ctx.avals_in)
    if mesh.empty:  # automatic axes do not show in types
        mesh = getattr(where, "abstract_mesh", None) or mesh
    explicit = bool(mesh.explicit_axes) and not mesh.auto_axes
    if mesh.manual_axes or (getattr(where, "num_devices", 1) == 1 and not explicit):
        run = on_one_device(mesh.shape, Cut(((),) * (query.ndim - 3)), query, key_cache, call.parameters)
    elif explicit or (hint is not None and hint.complete):
        run = _known_cut(mesh, ctx.avals_in, call, None if explicit else hint)  # types have the last word
    else:
        _refuse_what_the_compiler_cannot(ctx)
        run = lambda query, *others: _automatic(_constrained(mesh, hint, query), *others, call)
        results = mlir.lower_fun(run)(ctx, *operands)
        _sign(results, call)
        return results
    return mlir.lower_fun(run)(ctx, *operands)


def on_one_device(mesh, cut: Cut, query, key_cache, parameters):
    """The function of local operands that one device runs. `query` and `key_cache` have the global shapes."""
    kv_heads = key_cache.shape[-4]
    group = query.shape[-2] // kv_heads
    part = query.shape[-2] // ways(mesh, cut.heads)  # query heads of one device
    finer = cut.heads[len(cut.kv_heads) :]  # axes that cut query heads but not the caches

    def run(*operands):
        first = lax.axis_index(finer) * part // group if finer else 0
        start = jnp.asarray(first, jnp.int32)
        num_kv_heads = max(1, part // group)
        return tuple(local_paged_prefill_p.bind(*operands, start, num_kv_heads=num_kv_heads, **dict(parameters)))

    return run


def _settle(mesh, call: Call, query, key_cache, specs, hint: Hint | None = None) -> Cut:
    """The plan for operands and results that are cut as `specs` say, by name, and for a hint."""
    wishes = wishes_of(specs, len(query.shape) - 3, call.cache_batch_dims)
    if hint is not None:
        unknown = {*hint.heads}.union(*hint.batch) - {*mesh.axis_names}
        if unknown:
            raise ValueError(
                f"head_axis and batch_axis must name axes of the mesh {tuple(mesh.axis_names)}, got {sorted(unknown)}; "
                "the mesh comes from jax.set_mesh or from the NamedShardings of the computation's arguments"
            )
        wishes.insert(len(CACHES), Cut(hint.batch, hint.heads, hint.heads))
    return plan(mesh.shape, query, key_cache, call.cache_batch_dims, wishes)


# ---- The cut is known: shard_map, which works on every platform and can be exported.


def _known_cut(mesh, avals, call: Call, hint: Hint | None):
    query, key_cache = avals[:2]
    types = {name: aval.sharding.spec for name, aval in zip(OPERANDS, avals, strict=True)}
    cut = _settle(mesh, call, query, key_cache, types, hint)
    specs = cut.specs(call.cache_batch_dims)
    mapped = jax.shard_map(
        on_one_device(mesh.shape, cut, query, key_cache, call.parameters),
        mesh=mesh,
        in_specs=tuple(specs[name] for name in OPERANDS),
        out_specs=tuple(specs[name] for name in RESULTS),
        check_vma=False,
    )
    if not mesh.explicit_axes:
        return mapped

    def run(*operands):  # shard_map takes an operand whose type says less than its spec only once it is cut
        return mapped(*(_reshard(mesh, x, specs[name]) for name, x in zip(OPERANDS, operands, strict=True)))

    return run


def _reshard(mesh, x, spec):
    explicit = {*mesh.explicit_axes}
    entries = (e if isinstance(e, tuple) else (e,) for e in spec)
    spec = PartitionSpec(*(tuple(axis for axis in e if axis in explicit) for e in entries))
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


# ---- The compiler finds the cut: custom_partitioning.


@functools.partial(custom_partitioning, static_argnums=(len(OPERANDS),))
def _automatic(*operands_and_call):
    *operands, call = operands_and_call
    uncut = Cut(((),) * (operands[0].ndim - 3))
    return on_one_device({}, uncut, operands[0], operands[1], call.parameters)(*operands)


def _constrained(mesh, hint, query):
    """The query, cut along its batch as vmap's `spmd_axis_name` says; the rule carries it to the other operands."""
    if hint is None:
        return query
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(entry(axes) or free for axes in hint.batch), free, free, free)
    return lax.with_sharding_constraint(query, NamedSharding(mesh, spec))


def _rule(call: Call, mesh, operands, results):
    return sharding_rule(call.cache_batch_dims, mesh, operands, results)


def _partition(call: Call, mesh, operands, results):
    """What each device runs, and how every operand and result is cut; the compiler moves what is cut otherwise."""
    query, key_cache = operands[:2]
    given = _specs(OPERANDS + RESULTS, (*operands, *results))
    cut = _settle(mesh, call, query, key_cache, given)
    specs = cut.specs(call.cache_batch_dims)
    for name in CACHES:
        check_stays(name, given[name], specs[name], mesh.shape)
    run = on_one_device(mesh.shape, cut, query, key_cache, call.parameters)

    def run_without_mesh(*local):  # JAX 0.12 keeps the caller's mesh in the thread that the compiler calls from
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return run(*local)

    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return (
        mesh,
        run_without_mesh,
        tuple(shardings[name] for name in RESULTS),
        tuple(shardings[name] for name in OPERANDS),
    )


def _infer(call: Call, mesh, operands, results):
    """How the results are cut. Only GSPMD asks (jax_use_shardy_partitioner=False); JAX 0.10 aborts without it."""
    cut = _settle(mesh, call, *operands[:2], _specs(OPERANDS, operands))
    return tuple(NamedSharding(mesh, cut.specs(call.cache_batch_dims)[name]) for name in RESULTS)


def _specs(names, arrays):
    if not all(isinstance(x.sharding, NamedSharding | None) for x in arrays):
        raise ValueError(
            "paged_prefill on several devices needs to know their mesh: give the computation's arguments "
            "NamedShardings, or enter jax.set_mesh"
        )
    return {name: x.sharding.spec if x.sharding else PartitionSpec() for name, x in zip(names, arrays, strict=True)}


_automatic.def_partition(_partition, _infer, sharding_rule=_rule)


def _refuse_what_the_compiler_cannot(ctx) -> None:
    say_how = (
        "Say how it is cut: by head_axis= and batch_axis= (or sharding_hints), by explicit mesh axes, or by calling it "
        "inside jax.shard_map"
    )
    if "tpu" in (ctx.platforms or ctx.module_context.platforms):
        raise NotImplementedError(
            "paged_prefill on several TPUs with automatic mesh axes: XLA for TPU cannot ask how to cut it "
            f"(github.com/jax-ml/jax/issues/38196). {say_how}"
        )
    if ctx.module_context.lowering_parameters.for_export:
        raise NotImplementedError(
            "paged_prefill on several devices with automatic mesh axes cannot be exported: the compiler would have to "
            f"ask this process how to cut it. {say_how}"
        )


def _sign(results, call: Call) -> None:
    """Writes what the compiler would run into the module, which else holds only a pointer to the callback.

    A persistent cache that leaves the pointer out of its key (jax_remove_custom_partitioning_ptr_from_cache_key) can
    then not take another call's executable, nor that of older code, for this one.
    """
    operation = results[0].owner.operation
    attributes = {"paged_prefill": repr(call), "paged_prefill_code": _code_version()}
    operation.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(
        {name: mlir.ir.StringAttr.get(value) for name, value in attributes.items()}
    )


@functools.cache
def _code_version() -> str:
    """A digest of this package's code and tables."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("primitive", "lowering", "sharding"):
        for path in sorted((package / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cu"):
                digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


mlir.register_lowering(paged_prefill_p, _lower)
mlir.register_lowering(typed_paged_prefill_p, _lower)
compat.require_devices_during_lowering(paged_prefill_p)
