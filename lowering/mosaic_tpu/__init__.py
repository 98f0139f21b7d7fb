"""The TPU kernels, in Pallas Mosaic."""
