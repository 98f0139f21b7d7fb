"""How the operation runs: its registration, and what happens to a call on one device."""

import contextlib
import functools

import jax
from jax.interpreters import mlir

from paged_prefill.lowering import tuning
from paged_prefill.lowering.call import flatten, nothing_seen, unflatten, with_sinks
from paged_prefill.lowering.choose import KERNELS, choose, device_of, log_passed_over
from paged_prefill.lowering.xla import append as _append
from paged_prefill.primitive import context
from paged_prefill.primitive.prefill import local_paged_prefill_p


def run(*operands, device, present, platform, config, **parameters):
    """Runs `local_paged_prefill_p` on one device."""
    named = dict(zip(present, operands, strict=True))
    out, lse = unflatten(*_run_kernel(flatten(named, **parameters), device, platform, config), named["query"].shape)
    if "sinks" in named:
        out, lse = with_sinks(out, lse, named["sinks"], named["query_offsets"])
    return out, lse


def _run_kernel(call, device, platform, config):
    """Chooses the kernel and its configuration for a call, and calls it."""
    problem = call.problem
    if problem.empty:
        return nothing_seen(problem)
    name, passed_over = choose(problem, device, platform)
    log_passed_over(device, name, passed_over)
    kernel = KERNELS[device.platform][name]
    choice = tuning.resolve(name, kernel, problem, device, config)
    if wrong := kernel.misfit(problem, device, choice.config):
        raise ValueError(f"{name}: {wrong} (sizes from: {choice.source})")
    return kernel.attend(call, choice.config)


def _register(platform):
    def lower(ctx, *operands, matmul_precision=None, policy=None, **params):
        # Kernels are given plain arrays: what the types say about meshes is settled by now.
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        rule = mlir.lower_fun(functools.partial(run, device=device_of(platform), **params))
        # The compiler may call from a thread that lacks the caller's settings.
        policy = context.policy(policy) if policy else contextlib.nullcontext()
        with policy, jax.default_matmul_precision(matmul_precision or jax.config.jax_default_matmul_precision):
            return rule(ctx.replace(avals_in=plain), *operands)

    mlir.register_lowering(local_paged_prefill_p, lower, platform=platform)


for _platform in KERNELS:
    _register(_platform)
