"""How many cores a device has, by its name: streaming multiprocessors of NVIDIA, compute units of AMD, TensorCores.

A device that is here says so itself. This is for code that is made ahead of time, for a device that is not.
"""

# By the exact name that the driver gives a device, from its maker's data sheets.
CORES = {
    "NVIDIA A10": 72,
    "NVIDIA A10G": 80,
    "NVIDIA A30": 56,
    "NVIDIA A40": 84,
    "NVIDIA A100-PCIE-40GB": 108,
    "NVIDIA A100-SXM4-40GB": 108,
    "NVIDIA A100-SXM4-80GB": 108,
    "NVIDIA A100 80GB PCIe": 108,
    "NVIDIA A800-SXM4-80GB": 108,
    "NVIDIA RTX A6000": 84,
    "NVIDIA L4": 58,
    "NVIDIA L40": 142,
    "NVIDIA L40S": 142,
    "NVIDIA GeForce RTX 3090": 82,
    "NVIDIA GeForce RTX 4090": 128,
    "NVIDIA GeForce RTX 5090": 170,
    "NVIDIA RTX 6000 Ada Generation": 142,
    "NVIDIA H20": 78,
    "NVIDIA H100 80GB HBM3": 132,
    "NVIDIA H100 NVL": 132,
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H200": 132,
    "NVIDIA H200 NVL": 132,
    "NVIDIA H800": 132,
    "NVIDIA GH200 120GB": 132,
    "NVIDIA GH200 144G HBM3e": 132,
    "NVIDIA GH200 480GB": 132,
    "NVIDIA B200": 148,
    "NVIDIA GB200": 152,
    "NVIDIA B300 SXM6 AC": 148,
    "NVIDIA GB300": 152,
    "AMD Instinct MI210": 104,
    "AMD Instinct MI250X": 110,
    "AMD Instinct MI300A": 228,
    "AMD Instinct MI300X": 304,
    "AMD Instinct MI325X": 304,
    "AMD Instinct MI350X": 256,
    "AMD Instinct MI355X": 256,
    "TPU v4": 2,
    "TPU v5": 2,
    "TPU v5p": 2,
}
# Of a device that is not listed, by platform: as many as the large ones have, since an idle core costs more than a
# second wave.
UNLISTED = {"cuda": 148, "rocm": 304}


def cores_of(platform: str, kind: str | None) -> int:
    """The cores of the device of that name; 1 where neither it nor its platform is known to have more."""
    return CORES.get(kind, UNLISTED.get(platform, 1))
