"""The Hopper kernel: what a thread block does."""
