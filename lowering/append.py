"""How `append_to_pages` runs: by a kernel of the device's, or by XLA's scatter, which runs anywhere."""

import functools

import jax
from jax import export
from jax.interpreters import mlir

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import KERNELS, device_of
from paged_prefill.lowering.mosaic_tpu import append as mosaic_tpu
from paged_prefill.lowering.xla import append as xla
from paged_prefill.primitive.append import local_append_to_pages_p

WRITERS = {"tpu": mosaic_tpu}  # what beats a scatter, by platform


def run(*operands, device: Device, present, by_kernel=True, **parameters):
    """Runs `local_append_to_pages_p` on one device; `by_kernel` says whether more than plain operations of XLA will do."""
    writer = WRITERS.get(device.platform) if by_kernel else None
    named = dict(zip(present, operands, strict=True))
    symbolic = any(export.is_symbolic_dim(size) for x in operands for size in x.shape)
    if writer is not None and not symbolic and writer.reason_against(named, device) is None:
        return writer.append(*operands, device=device, present=present, **parameters)
    as_bits = xla.converted_on_cpu if device.platform == "cpu" else lambda dtype: False
    return xla.append(*operands, present=present, as_bits=as_bits, **parameters)


def _register(platform):
    def lower(ctx, *operands, **parameters):
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        exported = ctx.module_context.lowering_parameters.for_export
        device = device_of(platform, elsewhere=exported)
        # On several devices with automatic axes, XLA is yet to cut what is lowered here: kernels it cannot.
        uncut = getattr(ctx.module_context.axis_context, "num_devices", 1) > 1
        rule = mlir.lower_fun(functools.partial(run, device=device, by_kernel=not uncut, **parameters))
        return rule(ctx.replace(avals_in=plain), *operands)

    mlir.register_lowering(local_append_to_pages_p, lower, platform=platform)


for _platform in KERNELS:
    _register(_platform)
