"""Chunked prefill attention over a paged KV cache, as one JAX primitive. Start at `prefill_page_attention`."""

from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill import lowering as _lowering
from paged_prefill.sharding import partition as _partition
from paged_prefill.ejkernel import PrefillPageAttention, create_shard_map_wrapper
from paged_prefill.primitive import masks
from paged_prefill.primitive.api import prefill_page_attention, ragged_paged_prefill
from paged_prefill.primitive.append import append_to_pages_p, local_append_to_pages_p
from paged_prefill.primitive.context import sharding_hints
from paged_prefill.primitive.pages import append_to_pages, merge
from paged_prefill.primitive.prefill import local_paged_prefill_p, paged_prefill_p
from paged_prefill.primitive.validate import validate
from paged_prefill.sharding.pages import local_pages, merge_over

__all__ = [
    "PrefillPageAttention",
    "PrefillPageAttentionConfig",
    "append_to_pages",
    "append_to_pages_p",
    "create_shard_map_wrapper",
    "local_append_to_pages_p",
    "local_paged_prefill_p",
    "local_pages",
    "masks",
    "merge",
    "merge_over",
    "paged_prefill_p",
    "prefill_page_attention",
    "ragged_paged_prefill",
    "sharding_hints",
    "validate",
]
__version__ = "0.2.0"
