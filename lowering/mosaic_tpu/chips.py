"""What the kernels for TPUs must know of a chip."""

from jax.experimental.pallas import tpu as pltpu

from paged_prefill.lowering.call import Device

SMEM_BYTES = 3 * 2**18  # of the chip's 1 MiB, what items and page tables may take

CHIPS = {
    "TPU v4": pltpu.ChipVersion.TPU_V4,
    "TPU v5e": pltpu.ChipVersion.TPU_V5E,
    "TPU v5 lite": pltpu.ChipVersion.TPU_V5E,
    "TPU v5": pltpu.ChipVersion.TPU_V5P,
    "TPU v5p": pltpu.ChipVersion.TPU_V5P,
    "TPU v6e": pltpu.ChipVersion.TPU_V6E,
    "TPU v6 lite": pltpu.ChipVersion.TPU_V6E,
    "TPU7": pltpu.ChipVersion.TPU_7,
    "TPU7x": pltpu.ChipVersion.TPU_7X,
}


def kind_reason(device: Device) -> str | None:
    """None, or why nothing can be built for this device."""
    if device.kind is None:
        return (
            "Mosaic must know the TPU that it compiles for, and there is none here: lower within "
            "jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, 'tpu')))"
        )
    if device.kind not in CHIPS:
        return f"it is built for {', '.join(CHIPS)}, not for {device.kind}"
    return None


def vmem_budget(device: Device) -> int:
    """Bytes of VMEM a kernel may plan with: what JAX reports for one core, less an eighth for the compiler."""
    return pltpu.get_tpu_info_for_chip(CHIPS[device.kind], 1).vmem_capacity_bytes * 7 // 8
