"""What the primitives have in common: how they are bound, and the rules that are read off the table of operands."""

from functools import partial
import inspect

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, xla
import jax.numpy as jnp
from jax.sharding import NamedSharding

from paged_prefill.primitive import checks, context
from paged_prefill.primitive.cut import Cut, axes_of, check_stays, settle
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.operands import POOLS, Operation, Shapes


class OperationPrimitive(Primitive):
    """A primitive of one operation, whose `bind` takes operands by position or name, and fills in and checks the rest.

    In a jaxpr the operands that are there stand in the table's order, and the parameter `present` lists their names.
    Who binds an equation of a jaxpr again gives both in that form, and `bind` passes them on as they are.
    """

    multiple_results = True

    def __init__(
        self, operation: Operation, name: str, parameters, *, typed: "OperationPrimitive | None" = None, **own_parameters
    ):
        """`parameters(operands, **given)` are the parameters of a call, and `own_parameters` check those that this
        primitive has beside; `typed` takes over where types tell the cut."""
        super().__init__(name)
        self.operation, self._typed = operation, typed
        self._parameters, self._own_parameters = parameters, own_parameters
        self._takes = [*list(inspect.signature(parameters).parameters)[1:], *own_parameters]

    def bind(self, *operands, **given):
        """Binds a call: operands by position or by name, and parameters by name; or as they stand in a jaxpr, with `present`."""
        if "present" not in given:
            named, given = self._by_name(operands, given)
            own = {name: check(given.pop(name, None)) for name, check in self._own_parameters.items()}
            given = self._parameters(named, **given) | own | dict(present=self.operation.present(named))
            operands = [named[name] for name in given["present"]]
        types = [jax.typeof(x) for x in operands]
        primitive = self._typed if self._typed is not None and _types_tell(types) else self
        return Primitive.bind(primitive, *_varying_alike(operands, types), **given)

    def _by_name(self, operands, given):
        """The operands by name, and the other arguments."""
        names = [row.name for row in self.operation.operands]
        if len(operands) > len(names):
            raise TypeError(f"{self.name} takes at most the operands {', '.join(names)}, got {len(operands)}")
        named = dict(zip(names, operands))
        for name in [name for name in names if name in given]:
            if name in named:
                raise TypeError(f"{self.name} got {name} twice, by position and by name")
            named[name] = given.pop(name)
        for name in given:
            if name not in self._takes:
                takes = ", ".join(self._takes)
                raise TypeError(f"{self.name} has no operand or parameter {name}; its parameters are {takes}")
        for row in self.operation.operands:
            array = named.get(row.name)
            a_number = () in row.forms and isinstance(array, (int, float))
            if not (a_number or (array is None and row.optional)):
                checks.check_array(row.name, array)
        return named, given


def shapes_of(operation: Operation, present, operands, cache_batch_dims: int, cache_layout: str) -> Shapes:
    """The shapes of operands as they stand in a jaxpr."""
    shapes = {name: tuple(x.shape) for name, x in zip(present, operands, strict=True)}
    return Shapes(operation, shapes, cache_batch_dims, LAYOUTS[cache_layout])


def _varying_alike(operands, types):
    """Under shard_map(check_vma=True) the operands of a primitive must vary over the same mesh axes."""
    varying = [aval.manual_axis_type.varying for aval in types]
    union = frozenset().union(*varying)
    return [
        x if axes == union else lax.pcast(x, tuple(sorted(union - axes)), to="varying")
        for x, axes in zip(operands, varying)
    ]


def _types_tell(types) -> bool:
    """Whether the types of the operands say how each is cut: every axis of their mesh is explicit or manual."""
    mesh = mesh_of(*types)
    return not mesh.empty and not mesh.auto_axes


def mesh_of(*avals):
    """The mesh that types speak of, or an empty one."""
    return next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), avals[0].sharding.mesh)


# ---- Abstract evaluation: only explicit axes show in types. Results follow the plan, and no operand may have to move.


def specs_by_plan(operation: Operation, operands, *, present, **form):
    """How each operand and result of a call with global shapes is cut, by name, given the operands' types.

    `form` are cache_batch_dims and cache_layout.
    """
    mesh = mesh_of(*operands)
    checks.check_mesh(operation.name, mesh)
    call = shapes_of(operation, present, operands, **form)
    types = {name: aval.sharding.spec for name, aval in zip(present, operands, strict=True)}
    specs = settle(mesh.shape, call, types).specs(call)
    for name, spec in types.items():
        check_stays(call, name, spec, specs[name], mesh.shape)
    return specs


def specs_of_one_device(operation: Operation, operands, *, present, **form):
    """The same for what one device runs."""
    call = shapes_of(operation, present, operands, **form)
    return Cut(((),) * len(call.batch)).specs(call)


def typed_result(like, shape, dtype, spec):
    """The type of a result, on the mesh of an operand's type."""
    sharding = NamedSharding(like.sharding.mesh, spec)
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


# ---- vmap: dimensions are added, never folded, since a reshape would lose a sharding.


def batch_rule(primitive: OperationPrimitive):
    """The vmap rule. A vmapped axis joins *C (in front) when a cache carries it, and else *B (in front).

    So a cache that is not vmapped is neither broadcast nor copied: beside one that is, it gets a dimension of 1. Caches
    that are written are each element's own. What is known of the cut (`hint`) follows the dimensions, and vmap's
    `spmd_axis_name` is the cut of the new one.
    """
    operation = primitive.operation

    def rule(axis_data, operands, axes, *, present, cache_batch_dims, cache_layout, hint=None, **parameters):
        rows = operation.table(present)
        own_pools = operation.writes or any(
            axis is not None for row, axis in zip(rows, axes, strict=True) if row.lead == POOLS
        )
        position = 0 if own_pools else cache_batch_dims

        def with_axis(row, operand, axis):
            if axis is not None:
                return jnp.moveaxis(operand, axis, position)
            if row.lead == POOLS and not operation.writes:
                return jnp.expand_dims(operand, position) if own_pools else operand
            shape = (*operand.shape[:position], axis_data.size, *operand.shape[position:])
            return jnp.broadcast_to(jnp.expand_dims(operand, position), shape)

        batched = [with_axis(*each) for each in zip(rows, operands, axes, strict=True)]
        form = dict(cache_batch_dims=cache_batch_dims + own_pools, cache_layout=cache_layout)
        call = shapes_of(operation, present, batched, **form)
        hint = context.with_dimension(hint, position, axes_of(axis_data.spmd_name), len(call.batch) - 1)
        results = primitive.bind(*batched, present=present, hint=hint, **form, **parameters)
        return results, (position,) * len(results)

    return rule


# ---- Differentiation: a clear refusal, since these operations serve inference.


def jvp_rule(primitive: OperationPrimitive):
    """Passes what does not move, and refuses the rest with the way out."""

    def moves(tangent):
        return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0

    def rule(primals, tangents, **parameters):
        if any(map(moves, tangents)):
            raise NotImplementedError(
                f"{primitive.operation.name} serves inference and has no derivative; "
                "apply jax.lax.stop_gradient to its floating-point arguments, the caches included"
            )
        results = primitive.bind(*primals, **parameters)
        return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) for result in results]

    return rule


def define(primitive: OperationPrimitive, abstract) -> None:
    """Registers how a primitive is typed and how it runs when called eagerly."""
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(partial(xla.apply_primitive, primitive))


def define_transformations(primitive: OperationPrimitive, binds: OperationPrimitive) -> None:
    """Registers the rules of vmap and differentiation, which bind `binds`."""
    batching.fancy_primitive_batchers[primitive] = batch_rule(binds)
    ad.primitive_jvps[primitive] = jvp_rule(binds)
