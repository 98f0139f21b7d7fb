"""How the operation runs: its registration, and what happens to a call on one device."""

import contextlib
import functools

import jax
from jax.interpreters import mlir

from paged_prefill.lowering.call import flatten, nothing_seen, unflatten
from paged_prefill.lowering.choose import (
    KERNELS,
    XLA_WRITER,
    check_backend,
    choose,
    choose_writer,
    device_of,
    log_passed_over,
)
from paged_prefill.lowering.tuning.resolve import resolve, signature
from paged_prefill.primitive import context
from paged_prefill.primitive.append import local_append_to_pages_p
from paged_prefill.primitive.layout import LAYOUTS
from paged_prefill.primitive.prefill import local_paged_prefill_p, lowering_reads


def run(*operands, device, exported=False, present, platform, config, **parameters):
    """Runs `local_paged_prefill_p` on one device; `exported` says that what comes of it is for other machines."""
    named = dict(zip(present, operands, strict=True))
    call = flatten(named, **parameters)
    kernel = None if call.problem.empty else _kernel_of(call.problem, device, platform, config)
    if kernel is None:
        results = call.with_sinks(*nothing_seen(call.problem))
    else:
        choice = resolve(kernel, call.problem, device, config, under="off" if exported else None)
        results = kernel.attend(call, choice.config, device)
    return unflatten(*results, named["query"].shape)


def _kernel_of(problem, device, platform, config):
    """The kernel that runs a problem, said in the log where another would be faster."""
    name, passed_over = choose(problem, device, platform)
    check_backend(device, name, config)
    log_passed_over(device, name, passed_over)
    return KERNELS[device.platform][name]


def append(*operands, device, present, cache_batch_dims, cache_layout, to_be_cut=False):
    """Runs `local_append_to_pages_p` on one device; `to_be_cut` says that XLA will cut it, which it cannot kernels."""
    named, layout = dict(zip(present, operands, strict=True)), LAYOUTS[cache_layout]
    if to_be_cut:
        return XLA_WRITER.write(named, cache_batch_dims, device, layout)
    writer, passed_over = choose_writer(named, device, layout)
    log_passed_over(device, writer.name, passed_over, "append_to_pages")
    return writer.write(named, cache_batch_dims, device, layout)


def _lower(ctx, operands, function, **parameters):
    """Lowers a function of plain arrays: what the types say about meshes is settled by now.

    No operand is wider than 32 bits. So no constant of a kernel is either, whatever `jax_enable_x64` says, but among
    symbolic sizes, which are as wide as it says.
    """
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    symbolic = not all(isinstance(size, int) for aval in plain for size in aval.shape)
    with contextlib.nullcontext() if symbolic else jax.enable_x64(False):
        return mlir.lower_fun(functools.partial(function, **parameters))(ctx.replace(avals_in=plain), *operands)


def _register(platform):
    def lower(ctx, *operands, matmul_precision=None, policy=None, **params):
        # An exported module is the same wherever it is made: of the devices, tables and timing of this machine it takes
        # nothing, but the device where the call asks for a kernel that is built for one.
        exported = ctx.module_context.lowering_parameters.for_export
        device = device_of(platform, elsewhere=exported and params["platform"] == "auto")
        # The compiler may call from a thread that lacks the caller's settings.
        policy = context.policy(policy) if policy else contextlib.nullcontext()
        with policy, jax.default_matmul_precision(matmul_precision or jax.config.jax_default_matmul_precision):
            return _lower(ctx, operands, run, device=device, exported=exported, **params)

    def lower_append(ctx, *operands, **params):
        device = device_of(platform, elsewhere=ctx.module_context.lowering_parameters.for_export)
        # On TPUs with automatic mesh axes; elsewhere, and inside shard_map, what comes here is cut.
        to_be_cut = platform == "tpu" and getattr(ctx.module_context.axis_context, "num_devices", 1) > 1
        return _lower(ctx, operands, append, device=device, to_be_cut=to_be_cut, **params)

    mlir.register_lowering(local_paged_prefill_p, lower, platform=platform)
    mlir.register_lowering(local_append_to_pages_p, lower_append, platform=platform)


for _platform in KERNELS:
    _register(_platform)
lowering_reads.append(signature)
