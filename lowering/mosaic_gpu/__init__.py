"""The kernels in Pallas Mosaic GPU, for NVIDIA GPUs."""
