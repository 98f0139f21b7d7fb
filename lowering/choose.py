"""What runs a call: the first kernel of the device's order that can, or the one that the call asks for."""

import functools

from absl import logging
import jax

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.mosaic_gpu.append import MosaicGpuWriter
from paged_prefill.lowering.mosaic_gpu.host import MosaicGpu
from paged_prefill.lowering.mosaic_tpu.append import MosaicTpuWriter
from paged_prefill.lowering.mosaic_tpu.host import MosaicTpu
from paged_prefill.lowering.triton.append import TritonWriter
from paged_prefill.lowering.triton.host import Triton
from paged_prefill.lowering.writer import Writer
from paged_prefill.lowering.xla.append import XlaWriter
from paged_prefill.lowering.xla.host import Xla
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy
from paged_prefill.primitive.layout import OWN_LAYOUT, CacheLayout

XLA = Xla()  # which runs every call

# The kernels of each platform by their names, the fastest first. A new kernel is one class and its place here.
_FASTEST_FIRST = (MosaicTpu(), MosaicGpu(), Triton(), XLA)
KERNELS: dict[str, dict[str, Kernel]] = {
    platform: {kernel.name: kernel for kernel in _FASTEST_FIRST if platform in kernel.platforms}
    for platform in XLA.platforms
}

# The lowerings of `append_to_pages`, likewise.
XLA_WRITER = XlaWriter()
WRITERS = (MosaicTpuWriter(), MosaicGpuWriter(), TritonWriter(), XLA_WRITER)

# What `platform=` asks for, as the kernels that answer to it.
ANSWERS = {"xla": ("xla",), "triton": ("triton",), "pallas": ("mosaic_tpu", "mosaic_gpu"), "cuda": ("mosaic_gpu",)}


def default_platform() -> str:
    """The platform of JAX's default device, by its name in `KERNELS`: JAX calls both CUDA and ROCm "gpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def device_of(platform: str, *, elsewhere: bool = False) -> Device:
    """The device that code lowered for `platform` will run on, as far as this process can tell.

    `elsewhere` says that the devices of this process tell nothing.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == platform:  # compiling ahead of time
        return Device(platform, abstract.device_kind, core_count=abstract.num_cores)
    try:
        device = None if elsewhere else jax.devices(platform)[0]
    except RuntimeError:  # lowering for a machine that is not here
        device = None
    if device is None:
        return Device(platform)
    cores = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    return Device(platform, device.device_kind, getattr(device, "compute_capability", None), cores)


def choose(problem: Problem, device: Device, platform: str = "auto") -> tuple[str, dict[str, str]]:
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


def _reason_against(kernel: Kernel, problem: Problem, device: Device, *, asked_for: bool) -> str | None:
    if kernel is not XLA and problem.symbolic:
        return "it is built for sizes that are numbers, and the call has symbolic ones"
    if kernel is not XLA and not device.known and not asked_for:
        return "it is built for one kind of device, and which will run this is not known here; ask for it by platform="
    if not kernel.invariant and current_policy() == "invariant":
        return 'its sizes follow the pack, and the policy is "invariant"'
    return kernel.supports(problem, device)


def choose_writer(operands, device: Device, layout: CacheLayout = OWN_LAYOUT) -> tuple[Writer, dict[str, str]]:
    """What runs an `append_to_pages` with these operands, by name, and why each one before it was passed over."""
    passed_over = {}
    for writer in WRITERS:
        if writer.is_for(device):
            reason = writer.supports(operands, device, layout)
            if reason is not None:
                passed_over[writer.name] = reason
            elif writer.pays(operands):
                return writer, passed_over
    raise AssertionError(f"nothing writes on {device.platform}")


def check_backend(device: Device, name: str, config: PrefillPageAttentionConfig | None) -> None:
    """Refuses a kernel that is not for the backend that a configuration names; XLA's is for each."""
    backend = config.backend if config is not None else None
    here = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    if name != XLA.name and backend not in (None, "any", here):
        raise ValueError(f"cfg.backend={backend!r} asks for a kernel of that backend, but {name} would run on {here}")


def log_passed_over(
    device: Device, chosen: str, passed_over: dict[str, str], operation: str = "paged_prefill"
) -> None:
    """Logs why kernels before the chosen one were passed over, once for each set of reasons.

    A warning where only XLA is left: it runs anywhere, and far slower than a kernel that is built for the device.
    """
    if passed_over:
        level = logging.WARNING if chosen == XLA.name else logging.INFO
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        _log_once(level, operation, device, chosen, reasons)


@functools.cache
def _log_once(level, operation, device, chosen, reasons):
    where = device.kind or f"a {device.platform} device"
    logging.log(level, "%s runs this call by %s on %s. Faster kernels cannot: %s", operation, chosen, where, reasons)
