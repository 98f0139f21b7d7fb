"""Which sizes a kernel runs with: `overlay` and `policy` for users, and the tables and timing behind them."""

from paged_prefill.primitive.context import POLICY_VARIABLE, overlay, policy

__all__ = ["POLICY_VARIABLE", "overlay", "policy"]
