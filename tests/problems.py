"""Problems for tests that choose kernels and configurations, by what differs from a usual one."""

from paged_prefill.lowering.call import Problem
from paged_prefill.primitive.attention import Attention

USUAL = dict(
    tokens=512, q_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, pools=1, cache_kv_heads=8, num_pages=64,
    page_size=16, seqs=1, pages_per_seq=64, dtype="bfloat16",
)  # fmt: skip


def problem(*, softmax_scale=0.1, attn_logits_soft_cap=None, sliding_window=None, **changes) -> Problem:
    """The usual problem with `changes` of its fields; the caches have the query's dtype unless one says otherwise."""
    fields = USUAL | changes
    fields.setdefault("cache_dtype", fields["dtype"])
    if "num_pages" not in changes:  # as many as all tables have room for
        fields["num_pages"] = fields["seqs"] * fields["pages_per_seq"]
    return Problem(attention=Attention(softmax_scale, attn_logits_soft_cap, sliding_window), **fields)
