"""How the operation runs: which kernel for this platform, device and shape, and its registration."""

import functools

from absl import logging
import jax
from jax.interpreters import mlir

from paged_prefill.lowering import append, contract, mosaic_gpu, mosaic_tpu, triton, tuning, xla
from paged_prefill.primitive.prefill import local_paged_prefill_p

# The kernels of each platform, the fastest first. A new kernel is one module and its name here.
KERNELS = {
    "cpu": {"xla": xla},
    "tpu": {"mosaic_tpu": mosaic_tpu, "xla": xla},
    "cuda": {"mosaic_gpu": mosaic_gpu, "triton": triton, "xla": xla},
    "rocm": {"triton": triton, "xla": xla},
}

# What `platform=` asks for, as the kernels that answer to it.
ANSWERS = {"xla": ("xla",), "triton": ("triton",), "pallas": ("mosaic_tpu", "mosaic_gpu"), "cuda": ("mosaic_gpu",)}


def default_platform() -> str:
    """The platform of JAX's default device, by its name in `KERNELS`: JAX calls both CUDA and ROCm "gpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def device_of(platform: str) -> contract.Device:
    """The device that code lowered for `platform` will run on, as far as this process can tell."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == platform:  # compiling ahead of time
        return contract.Device(platform, abstract.device_kind)
    try:
        device = jax.devices(platform)[0]
    except RuntimeError:  # lowering for a machine that is not here
        return contract.Device(platform)
    return contract.Device(platform, device.device_kind, getattr(device, "compute_capability", None))


def choose(problem: contract.Problem, device: contract.Device, platform: str = "auto") -> tuple[str, dict[str, str]]:
    """The kernel that runs a problem, and why each one before it in the device's order was passed over.

    `platform` is "auto", or asks for one kernel by a name in `ANSWERS`; ValueError with the reason where it cannot run.
    """
    kernels = KERNELS[device.platform]
    passed_over = {}
    for name, kernel in kernels.items():
        if platform != "auto" and name not in ANSWERS[platform]:
            continue
        reason = _reason_against(kernel, problem, device, asked_for=platform != "auto")
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    if not passed_over:
        passed_over = {platform: f"there is no such kernel for {device.platform}, only {', '.join(kernels)}"}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise ValueError(f"platform={platform!r} cannot run this call on {device.platform}: {reasons}")


def _reason_against(kernel, problem, device, *, asked_for) -> str | None:
    if kernel is not xla and problem.symbolic:
        return "it is built for sizes that are numbers, and the call has symbolic ones"
    if kernel is not xla and not device.known and not asked_for:
        return "it is built for one kind of device, and which will run this is not known here; ask for it by platform="
    return kernel.supports(problem, device)


@functools.cache  # once for each reason
def _log_passed_over(device, chosen, name, reason):
    logging.info("paged_prefill on %s: %s runs, since %s cannot: %s", device.platform, chosen, name, reason)


def run_kernel(
    *operands, device, present, attention, value_dim, cache_batch_dims, num_kv_heads, platform, config
):
    """Runs `local_paged_prefill_p` on one device: flattens the operands, chooses the kernel, calls it."""
    *operands, kv_head_start = operands
    sliding_window = attention.sliding_window
    scaling = dict(softmax_scale=attention.softmax_scale, attn_logits_soft_cap=attention.attn_logits_soft_cap)
    query_shape = operands[0].shape
    flat = contract.flatten(*operands, cache_batch_dims=cache_batch_dims)
    if sliding_window is not None and sliding_window >= contract.MAX_CONTEXT:
        sliding_window = None  # wider than any context
    parameters = dict(num_kv_heads=num_kv_heads, sliding_window=sliding_window, **scaling)
    problem = contract.problem_of(*flat, **parameters)
    if problem.empty:
        out, lse = contract.nothing_seen(problem)
        return contract.unflatten(out, lse, query_shape)
    name, passed_over = choose(problem, device, platform)
    for other, reason in passed_over.items():
        _log_passed_over(device, name, other, reason)
    kernel = KERNELS[device.platform][name]
    choice = tuning.resolve(name, kernel, problem, device, config)
    if wrong := kernel.misfit(problem, device, choice.config):
        raise ValueError(f"{name}: {wrong} (sizes from: {choice.source})")
    out, lse = kernel.attend(*flat, kv_head_start, **parameters, config=choice.config)
    return contract.unflatten(out, lse, query_shape)


def _register(platform):
    def lower(ctx, *operands, matmul_precision=None, policy=None, **params):
        # Kernels are given plain arrays: what the types say about meshes is settled by now.
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        rule = mlir.lower_fun(functools.partial(run_kernel, device=device_of(platform), **params))
        with jax.default_matmul_precision(matmul_precision or jax.config.jax_default_matmul_precision):
            return rule(ctx.replace(avals_in=plain), *operands)

    mlir.register_lowering(local_paged_prefill_p, lower, platform=platform)


for _platform in KERNELS:
    _register(_platform)
