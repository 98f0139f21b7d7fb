"""The Triton lowering, for NVIDIA and AMD GPUs."""
