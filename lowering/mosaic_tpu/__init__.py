"""The TPU kernel, in Pallas Mosaic."""
