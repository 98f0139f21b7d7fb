"""How the operation runs: its registration, and what happens to a call on one device."""

import functools

import jax
from jax.interpreters import mlir

from paged_prefill.lowering import tuning
from paged_prefill.lowering.call import flatten, nothing_seen, unflatten
from paged_prefill.lowering.choose import KERNELS, choose, device_of, log_passed_over
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.prefill import local_paged_prefill_p


def run_kernel(*operands, device, cache_batch_dims, num_kv_heads, platform, config, **attention):
    """Runs `local_paged_prefill_p` on one device: flattens the operands, chooses the kernel, calls it."""
    query_shape = operands[0].shape
    call = flatten(
        *operands, cache_batch_dims=cache_batch_dims, num_kv_heads=num_kv_heads, attention=Attention(**attention)
    )
    problem = call.problem
    if problem.empty:
        return unflatten(*nothing_seen(problem), query_shape)
    name, passed_over = choose(problem, device, platform)
    log_passed_over(device, name, passed_over)
    kernel = KERNELS[device.platform][name]
    choice = tuning.resolve(name, kernel, problem, device, config)
    if wrong := kernel.misfit(problem, device, choice.config):
        raise ValueError(f"{name}: {wrong} (sizes from: {choice.source})")
    return unflatten(*kernel.attend(call, choice.config), query_shape)


def _register(platform):
    def lower(ctx, *operands, matmul_precision=None, **params):
        # Kernels are given plain arrays: what the types say about meshes is settled by now.
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        rule = mlir.lower_fun(functools.partial(run_kernel, device=device_of(platform), **params))
        with jax.default_matmul_precision(matmul_precision or jax.config.jax_default_matmul_precision):
            return rule(ctx.replace(avals_in=plain), *operands)

    mlir.register_lowering(local_paged_prefill_p, lower, platform=platform)


for _platform in KERNELS:
    _register(_platform)
