"""The one form every kernel takes, and the way there from the operands of the primitive.

A kernel module has a VERSION, an integer that grows with every change that may move its timings (tables of tuned
configurations forget what an older one measured), and five functions:

    attend(query [tokens, q_heads, head_dim],
           key_pages [pools, kv_heads, num_pages, page_size, head_dim],
           value_pages [pools, kv_heads, num_pages, page_size, value_dim],
           sequences, kv_head_start, *,
           num_kv_heads, softmax_scale, attn_logits_soft_cap, sliding_window, config)
        -> (out [tokens, q_heads, value_dim] in query's dtype, lse [tokens, q_heads] float32)
    supports(problem, device) -> None, or the reason why not, in words a user can act on
    heuristic_config(problem, device) -> PrefillPageAttentionConfig with every size the kernel uses
    candidate_configs(problem, device) -> the configurations worth timing, the heuristic one first
    misfit(problem, device, config) -> None, or what is wrong with sizes that someone chose: then they do not get here

Sequence s owns rows start[s] : start[s] + length[s] of the query; no two share a row, and start ascends. Its row i
stands at position p = context_len[s] - length[s] + i and sees key j when 0 <= j <= p, with a window W also j > p - W,
and only where the page table has a page for it. Query head h attends to KV head kv_head_start + h // (q_heads //
num_kv_heads). Rows that no sequence owns, and rows that see no key, have out 0 and lse -inf. `flatten` has made the
indices harmless, so a kernel needs no bounds check on them: every page index lies inside the pool, every row inside
the query.
"""

from dataclasses import dataclass
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# A context longer than this cannot exist in memory; bounding it keeps sums of positions inside int32.
MAX_CONTEXT = 2**30

# Up to so many sequences, GPU kernels and `flatten` write out what they do over them: XLA fuses that, where a
# reduction, or an array that several gathers share, is one more kernel before ours, of 2 us and its launch.
FEW_SEQUENCES = 8


class Sequences(NamedTuple):
    """The sequences of a flat pack, all int32; see the module's docstring for what they mean."""

    start: Int[Array, " seqs"]
    length: Int[Array, " seqs"]
    context_len: Int[Array, " seqs"]
    pool: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]


class Device(NamedTuple):
    """What a kernel may depend on. `kind` and `compute_capability` are None where no such device is known."""

    platform: str
    kind: str | None = None
    compute_capability: str | None = None

    @property
    def known(self) -> bool:
        """Whether this says enough to build for the device and no other."""
        return self.kind is not None and (self.platform != "cuda" or self.compute_capability is not None)


@dataclass(frozen=True)
class Problem:
    """Everything static about one call of a kernel: hashable, and enough to choose a kernel and a configuration."""

    tokens: int
    q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    pools: int
    cache_kv_heads: int
    num_pages: int
    page_size: int
    seqs: int
    pages_per_seq: int
    dtype: str
    softmax_scale: float
    attn_logits_soft_cap: float | None
    sliding_window: int | None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.num_kv_heads

    @property
    def capacity(self) -> int:
        """Keys that one row of the page table can hold."""
        return self.pages_per_seq * self.page_size

    @property
    def symbolic(self) -> bool:
        """Whether a size is a variable, as jax.export allows."""
        return not all(isinstance(size, int) for size in (self.tokens, self.seqs, self.pools, self.num_pages))

    @property
    def empty(self) -> bool:
        """Whether no row can see a key, whatever the index arrays hold."""
        return 0 in (self.tokens, self.seqs, self.pages_per_seq, self.pools, self.num_pages)


def problem_of(
    query, key_pages, value_pages, sequences, *, num_kv_heads, softmax_scale, attn_logits_soft_cap, sliding_window
) -> Problem:
    """The static description of a kernel's flat operands, which may be traced."""
    tokens, q_heads, head_dim = query.shape
    pools, cache_kv_heads, num_pages, page_size, _ = key_pages.shape
    seqs, pages_per_seq = sequences.page_indices.shape
    return Problem(
        tokens=tokens,
        q_heads=q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_pages.shape[-1],
        pools=pools,
        cache_kv_heads=cache_kv_heads,
        num_pages=num_pages,
        page_size=page_size,
        seqs=seqs,
        pages_per_seq=pages_per_seq,
        dtype=query.dtype.name,
        softmax_scale=softmax_scale,
        attn_logits_soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
    )


def flatten(query, key_cache, value_cache, context_lens, page_indices, query_offsets, *, cache_batch_dims):
    """Folds *C and *B into one pack over a number of pools, and makes the index arrays harmless.

    Runs on one device, where folding costs nothing. Returns (query, key_pages, value_pages, sequences).
    """
    lead, (tokens, q_heads, head_dim) = query.shape[:-3], query.shape[-3:]
    packs, pools = math.prod(lead), math.prod(lead[:cache_batch_dims])
    seqs, pages_per_seq = page_indices.shape[-2:]
    num_pages = key_cache.shape[-3]

    def pages(cache):
        return cache.reshape(pools, *cache.shape[cache_batch_dims:])

    def per_sequence(array):
        return array.reshape(packs * seqs, *array.shape[len(lead) + 1 :])

    offsets = jnp.clip(query_offsets, 0, tokens)
    if seqs <= FEW_SEQUENCES:
        offsets = jnp.stack(list(itertools.accumulate(jnp.unstack(offsets, axis=-1), jnp.maximum)), axis=-1)
    else:
        offsets = jax.lax.cummax(offsets, axis=offsets.ndim - 1)
    pack = jax.lax.broadcasted_iota(jnp.int32, (packs, seqs), 0)
    start = offsets[..., :-1].reshape(packs, seqs) + pack * tokens
    sequences = Sequences(
        start=start.reshape(-1),
        length=per_sequence(jnp.diff(offsets)),
        context_len=jnp.clip(per_sequence(context_lens), 0, MAX_CONTEXT),
        pool=(pack // (packs // max(pools, 1)) if packs else pack).reshape(-1),
        page_indices=jnp.clip(per_sequence(page_indices), 0, max(num_pages - 1, 0)),
    )
    return query.reshape(packs * tokens, q_heads, head_dim), pages(key_cache), pages(value_cache), sequences


def nothing_seen(problem: Problem):
    """The results of rows that see no key."""
    out = jnp.zeros((problem.tokens, problem.q_heads, problem.value_dim), problem.dtype)
    return out, jnp.full((problem.tokens, problem.q_heads), -jnp.inf, jnp.float32)


def unflatten(out, lse, query_shape):
    """Gives the flat results of a kernel the leading dimensions of the query they answer."""
    return out.reshape(*query_shape[:-1], out.shape[-1]), lse.reshape(query_shape[:-1])
