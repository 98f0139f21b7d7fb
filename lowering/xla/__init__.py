"""The streaming lowering, in plain XLA operations, which runs anywhere."""
