"""Plans of the Hopper kernel for tests, by what differs from a usual one."""

from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan, is_wide
from paged_prefill.lowering.tiles import Parts


def plan(**changes) -> Plan:
    """The usual plan with `changes` of its fields."""
    fields = dict(cores=132, group=4, num_kv_heads=2, cache_kv_heads=2, seqs_of_pack=1,
                  head_dim=128, value_dim=128, page_size=16, tokens=100, tiles=3, num_pages=64, pages_per_seq=20,
                  pools=1, pool_rows=2048, seqs_of_pool=1, head_rows=1024, page_rows=16, slot_rows=1, value_rows=0,
                  block_q=64, block_kv=128, warpgroups=2, teams=1, stages=3, parts=Parts(), clusters=False, last_merges=False,
                  exchanges_in_blocks=False, softmax_scale=0.1, soft_cap=50.0, window=None, has_ranges=False, tree_words=0, latent=False, dtype="bfloat16",
                  cache_dtype="bfloat16", key_scale=None, value_scale=None, fp8_terms=0,
                  mates=False, rows_together=1)
    fields |= changes
    wide = is_wide(*(fields[name] for name in ("head_dim", "value_dim", "latent")))
    return Plan(**(dict(rows=WARPGROUP_ROWS * (1 if wide else fields["warpgroups"])) | fields))
