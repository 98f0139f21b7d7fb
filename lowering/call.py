"""The one form in which kernels are given their work (`Call`), and the way there from the primitive's operands (`flatten`).

Sequence s owns rows start[s] : start[s] + length[s] of the query; no two share a row, and start ascends. Its row i
stands at position p = context_len[s] - length[s] + i and sees key j when 0 <= j <= p, with a window W also j > p - W,
and only where the page table has a page for it. Query head h attends to KV head kv_head_start + h // (q_heads //
num_kv_heads). `flatten` has made the indices harmless, so a kernel needs no bounds check on them: every page index lies
inside the pool, every row inside the query.
"""

from collections.abc import Mapping
import dataclasses
from dataclasses import dataclass
import functools
import math
from typing import NamedTuple

import jax
from jax import export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from paged_prefill.lowering.cores import cores_of
from paged_prefill.primitive.attention import Attention, factor_and_lse, with_logit
from paged_prefill.primitive.layout import DEFAULT_LAYOUT, LAYOUTS, OWN_LAYOUT, CacheLayout
from paged_prefill.primitive.packing import FEW_SEQUENCES, MAX_CONTEXT, harmless_contexts, harmless_offsets

# What a call may have and not every kernel takes, as users know it.
FEATURES = {
    "key_ranges": "key_ranges",
    "latent": "a latent cache (value_cache=None)",
    "pools_apart": "caches of which one has pools of its own and the other serves all (vmap over one of them)",
    "quantised": "quantised caches",
    "slot_scales": "scales of each slot",
    "tree_mask": "tree_mask",
} | {name: f'cache_layout="{name}"' for name in LAYOUTS if name != DEFAULT_LAYOUT}


class Sequences(NamedTuple):
    """The sequences of a flat pack, all int32; see the module's docstring for what they mean."""

    start: Int[Array, " seqs"]
    length: Int[Array, " seqs"]
    context_len: Int[Array, " seqs"]
    pool: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]


class Indices(NamedTuple):
    """The index arrays of a call as they were given, for a kernel that makes them harmless itself.

    That spares a launch: whatever XLA computes from them before the kernel is one more small kernel.
    """

    query_offsets: Int[Array, "packs seqs_of_pack_plus_1"]
    context_lens: Int[Array, " seqs"]
    page_indices: Int[Array, "seqs pages_per_seq"]
    pools: Int[Array, " packs"]  # may hold a pool that does not exist where there is one pack


class Device(NamedTuple):
    """What a kernel may depend on. `kind` and `compute_capability` are None where no such device is known.

    `core_count` is what a device that is here says itself; kernels ask for `cores`.
    """

    platform: str
    kind: str | None = None
    compute_capability: str | None = None
    core_count: int | None = None

    @property
    def cores(self) -> int:
        """Streaming multiprocessors, compute units or TensorCores: what works at the same time."""
        return self.core_count or cores_of(self.platform, self.kind)

    @property
    def known(self) -> bool:
        """Whether this says enough to build for the device and no other."""
        return self.kind is not None and (self.platform != "cuda" or self.compute_capability is not None)


@dataclass(frozen=True)
class Problem:
    """Everything static about a call: hashable, and enough to choose a kernel and a configuration.

    Attributes:
      dtype, cache_dtype: those of the query and the caches, by name.
      features: which of `FEATURES` the call has, sorted.
    """

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
    cache_dtype: str
    attention: Attention
    features: tuple[str, ...] = ()

    @property
    def layout(self) -> CacheLayout:
        """In which order the caches lie behind the pools."""
        return LAYOUTS[next((name for name in self.features if name in LAYOUTS), DEFAULT_LAYOUT)]

    @property
    def rows(self) -> dict[str, int]:
        """The strides of the caches' dimensions by name, in rows of features; "pool" is the size of a whole pool."""
        sizes = dict(kv_heads=self.cache_kv_heads, num_pages=self.num_pages, page_size=self.page_size)
        return self.layout.rows(sizes)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.num_kv_heads

    @property
    def tokens_per_seq(self) -> int:
        """New tokens of each sequence, were they spread evenly."""
        return -(-self.tokens // max(self.seqs, 1))

    @property
    def columns(self) -> int:
        """Columns of the page table that a context can need."""
        return jax.core.min_dim(self.pages_per_seq, -(-MAX_CONTEXT // self.page_size))

    @property
    def capacity(self) -> int:
        """Keys that one row of the page table can hold; a number of int32, since no context is longer."""
        return jax.core.min_dim(self.columns * self.page_size, MAX_CONTEXT)

    @property
    def longest(self) -> int:
        """Keys of the longest context that there is room for, in the table and in the page pool."""
        return jax.core.min_dim(self.capacity, self.num_pages * self.page_size)

    @property
    def symbolic(self) -> bool:
        """Whether a size is a variable, as jax.export allows."""
        return any(map(export.is_symbolic_dim, vars(self).values()))

    @property
    def empty(self) -> bool:
        """Whether no row can see a key, whatever the index arrays hold."""
        return 0 in (self.tokens, self.seqs, self.pages_per_seq, self.pools, self.num_pages)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Call:
    """The arrays that a kernel is given, a pytree; made by `Call.of`. What is None, this call does without.

    Attributes:
      query: the rows of all packs, back to back.
      key_pages, value_pages: the caches, in the order problem.layout.apart. No values where they are the first
        problem.value_dim features of the keys, or have a place in key_pages by the layout.
      kv_head_start: the KV head of the caches that the first query head attends to, a scalar.
      problem: all that is static about the call.
      ranges: the keys lo <= j < hi that each row sees, in place of those that causality and a window leave.
      tree: bit k % 32 of word k // 32 says whether a row sees token k of its own chunk.
      key_scale, value_scale: what the numbers in the caches are multiplied by: one of each pool, of each pool and head,
        or of each pool, head, page and slot; the last in the caches' order, and in key_scale for both where keys and
        values are one array.
      sinks: the logit of each head's sink, for each pack.
      key_pool, value_pool: the pool of each sequence in a cache that has fewer pools than sequences.pool counts.
      indices: what `sequences` were made of, where that is at hand.
    """

    query: Float[Array, "tokens q_heads head_dim"]
    key_pages: Array  # [pools, *(kv_heads, num_pages, page_size in any order), head_dim]
    value_pages: Array | None  # [pools, ..., value_dim]
    sequences: Sequences
    kv_head_start: Int[Array, ""]
    problem: Problem = dataclasses.field(metadata=dict(static=True))
    ranges: Int[Array, "tokens 2"] | None = None
    tree: UInt[Array, "tokens words"] | None = None
    sinks: Float[Array, "packs q_heads"] | None = None
    key_scale: Float[Array, "pools ..."] | None = None
    value_scale: Float[Array, "pools ..."] | None = None
    key_pool: Int[Array, " seqs"] | None = None
    value_pool: Int[Array, " seqs"] | None = None
    indices: Indices | None = None

    @classmethod
    def of(
        cls,
        query,
        key_pages,
        value_pages,
        sequences: Sequences,
        kv_head_start,
        *,
        num_kv_heads: int,
        attention: Attention,
        value_dim: int | None = None,
        layout: CacheLayout = OWN_LAYOUT,
        **optional,
    ) -> "Call":
        """A call with its problem, from arrays or their shapes. `value_dim` is told where there are no value_pages.

        `optional` are the fields of `Call` that may be None.
        """
        there = {name for name, array in optional.items() if array is not None}
        features = {
            "key_ranges": "ranges" in there,
            "latent": value_pages is None and not layout.combined,
            "pools_apart": bool(there & {"key_pool", "value_pool"}),
            "quantised": key_pages.dtype != query.dtype,
            "slot_scales": "slot" in (granularity(optional.get(name)) for name in ("key_scale", "value_scale")),
            "tree_mask": "tree" in there,
            layout.name: layout.name != DEFAULT_LAYOUT,
        }
        tokens, q_heads, head_dim = query.shape
        sizes = dict(zip(layout.apart, key_pages.shape[1:], strict=True))
        seqs, pages_per_seq = sequences.page_indices.shape
        problem = Problem(
            tokens=tokens,
            q_heads=q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim if value_pages is None else value_pages.shape[-1],
            pools=key_pages.shape[0],
            cache_kv_heads=sizes["kv_heads"],
            num_pages=sizes["num_pages"],
            page_size=sizes["page_size"],
            seqs=seqs,
            pages_per_seq=pages_per_seq,
            dtype=query.dtype.name,
            cache_dtype=key_pages.dtype.name,
            attention=attention,
            features=tuple(sorted(name for name, has in features.items() if has)),
        )
        return cls(query, key_pages, value_pages, sequences, kv_head_start, problem, **optional)

    def with_sinks(self, out, lse):
        """Results that leave the sinks out with their part in each softmax; an output of 16 bits is rounded twice."""
        if self.sinks is None:
            return out, lse
        joined, lse = sinks_joined(out.astype(jnp.float32), lse, self.sinks_of_rows())
        return joined.astype(out.dtype), lse

    def sinks_of_rows(self) -> Float[Array, "tokens q_heads"] | None:
        """The sink of each row's softmax: -inf where no sequence owns the token. None without sinks."""
        if self.sinks is None:
            return None
        tokens, seqs, (packs, q_heads) = self.problem.tokens, self.problem.seqs, self.sinks.shape
        token, (starts, lengths, *_) = jnp.arange(tokens, dtype=jnp.int32), self.sequences
        if isinstance(seqs, int) and 0 < seqs <= FEW_SEQUENCES:
            owned = functools.reduce(jnp.logical_or, (_within(token, *seq) for seq in zip(starts, lengths)))
        else:
            owned = jnp.any(_within(token[:, None], starts[None], lengths[None]), axis=1)
        of_packs = (packs, tokens // jax.core.max_dim(packs, 1), q_heads)
        sinks = jnp.broadcast_to(self.sinks[:, None], of_packs).reshape(tokens, q_heads)
        return jnp.where(owned[:, None], sinks, -jnp.inf)


def granularity(scale) -> str | None:
    """What has one of a call's scales of its own, beside a pool: itself alone, a head or a slot. None for no scale."""
    return None if scale is None else {1: "tensor", 2: "head"}.get(scale.ndim, "slot")


def _within(token, start, length):
    return (token >= start) & (token < start + length)


def flatten(
    operands: Mapping[str, jax.Array],
    *,
    cache_batch_dims: int,
    num_kv_heads: int,
    attention: Attention,
    value_dim: int | None = None,
    cache_layout: str = DEFAULT_LAYOUT,
) -> Call:
    """Folds *C, layers and *B into one pack over a number of pools, and makes the index arrays harmless.

    `operands` are those of `local_paged_prefill_p` by name. Runs on one device, where folding costs nothing.
    """
    folded = _Folded(operands, cache_batch_dims, LAYOUTS[cache_layout])
    layout, query, packs, seqs = folded.layout, operands["query"], folded.packs, folded.seqs
    tokens, q_heads, head_dim = query.shape[-3:]
    sizes = layout.sizes(operands["key_cache"].shape)
    key_cache, value_cache = (operands.get(name) for name in ("key_cache", "value_cache"))
    indices = folded.indices()
    start, length, context_len = stretches(indices.query_offsets, indices.context_lens, tokens)
    sequences = Sequences(
        start=start,
        length=length,
        context_len=context_len,
        pool=folded.pool_among(folded.own),
        page_indices=jnp.clip(folded.per_sequence("page_indices"), 0, jax.core.max_dim(last_index(sizes["num_pages"]), 0)),
    )
    if attention.sliding_window is not None and attention.sliding_window >= MAX_CONTEXT:
        attention = dataclasses.replace(attention, sliding_window=None)  # wider than any context
    return Call.of(
        query.reshape(packs * tokens, q_heads, head_dim),
        folded.pages(key_cache),
        folded.pages(value_cache),
        sequences,
        jnp.clip(operands["kv_head_start"], 0, sizes["kv_heads"] - num_kv_heads),
        num_kv_heads=num_kv_heads,
        attention=attention,
        value_dim=head_dim if layout.combined else value_dim,
        layout=layout,
        ranges=folded.per_token("key_ranges"),
        tree=folded.per_token("tree_mask"),
        sinks=None if "sinks" not in operands else operands["sinks"].reshape(packs, q_heads),
        key_scale=folded.scale("key_scale"),
        value_scale=folded.scale("value_scale"),
        key_pool=folded.pool_apart(key_cache),
        value_pool=folded.pool_apart(value_cache),
        indices=indices,
    )


def stretches(query_offsets: Int[Array, "packs seqs_of_pack_plus_1"], context_lens: Int[Array, " seqs"], tokens):
    """Where in the flat pack each sequence starts, its length and its context, made harmless; of packs of `tokens`."""
    offsets = harmless_offsets(query_offsets, tokens)
    pack = jax.lax.broadcasted_iota(jnp.int32, jnp.diff(offsets).shape, 0)
    start = (offsets[:, :-1] + pack * tokens).reshape(-1)
    return start, jnp.diff(offsets).reshape(-1), harmless_contexts(context_lens)


class _Folded:
    """The operands of a call with leading dimensions folded: one dimension each of packs, sequences, tokens and pools.

    Attributes:
      packs, seqs: the packs of a call, and the sequences of each.
      own: the leading dimensions *C, for whose elements caches may have pools of their own.
    """

    def __init__(self, operands: Mapping[str, jax.Array], cache_batch_dims: int, layout: CacheLayout):
        self.operands, self.layout = operands, layout
        self.lead, self.tokens = operands["query"].shape[:-3], operands["query"].shape[-3]
        self.packs, self.seqs = math.prod(self.lead), operands["page_indices"].shape[-2]
        self.own, self.layered = self.lead[:cache_batch_dims], "layer" in operands

    def per_sequence(self, name: str) -> jax.Array:
        """An operand that each sequence has its own of."""
        array = self.operands[name]
        return array.reshape(self.packs * self.seqs, *array.shape[len(self.lead) + 1 :])

    def per_token(self, name: str) -> jax.Array | None:
        """An operand that each token has its own of, if it is there."""
        array = self.operands.get(name)
        return None if array is None else array.reshape(self.packs * self.tokens, array.shape[-1])

    def pages(self, cache: jax.Array | None) -> jax.Array | None:
        """A cache, with its pools in front."""
        if cache is None:
            return None
        lead = self.layout.lead(cache.shape)
        return self.layout.split(cache.reshape(math.prod(lead), *cache.shape[len(lead) :]), 1)

    def scale(self, name: str) -> jax.Array | None:
        """A scale of each pool, and of what else it has, if it is there."""
        if name not in self.operands:
            return None
        scale = self.operands[name]
        rest = scale.shape[len(self.own) :]
        folded = jnp.broadcast_to(scale, (*self.own, *rest))
        folded = folded.reshape(math.prod(folded.shape[: len(self.own) + self.layered]), *rest[self.layered :])
        return self.layout.split(folded, 1) if folded.ndim > 2 else folded

    def pools_among(self, sizes) -> jax.Array:
        """The pool of each pack; see `pool_of_packs`."""
        return pool_of_packs(self.operands, self.lead, sizes).reshape(self.packs)

    def pool_among(self, sizes) -> jax.Array:
        """The pool of each sequence."""
        return jnp.broadcast_to(self.pools_among(sizes)[:, None], (self.packs, self.seqs)).reshape(-1)

    def pool_apart(self, cache: jax.Array | None) -> jax.Array | None:
        """The pool of each sequence in a cache that has fewer pools than the call, or None."""
        own = self.own
        return None if cache is None or cache.shape[: len(own)] == own else self.pool_among(cache.shape[: len(own)])

    def indices(self) -> Indices:
        """The index arrays as they were given."""
        one_layer = self.layered and isinstance(self.packs, int) and self.packs == 1
        return Indices(
            self.operands["query_offsets"].reshape(self.packs, self.seqs + 1),
            self.per_sequence("context_lens"),
            self.per_sequence("page_indices"),
            self.operands["layer"].reshape(1) if one_layer else self.pools_among(self.own),
        )


def pool_of_packs(operands: Mapping[str, jax.Array], lead, sizes):
    """Which pool each pack of `lead` reads or writes, where *C has these sizes; each layer is a pool.

    The sizes are those of the first dimensions of `lead`, or 1 where a pool serves all of a dimension.
    """
    pool = jnp.zeros(lead, jnp.int32)
    for dim, size in enumerate(sizes):
        if not (isinstance(size, int) and size == 1):
            pool = pool * size + jax.lax.broadcasted_iota(jnp.int32, lead, dim)
    if "layer" not in operands:
        return pool
    layers = operands["key_cache"].shape[len(sizes)]
    return pool * layers + jnp.clip(operands["layer"], 0, layers - 1)


def last_index(size: int) -> int:
    """Of a dimension that may be symbolic, the last index that int32 holds; -1 where there is none."""
    return jax.core.min_dim(size - 1, 2**31 - 1)


def sinks_joined(out, lse, sinks):
    """Outputs and lse of rows, in float32, with a sink in each: their softmax is one logit, and the sink another."""
    total, largest, fade = with_logit(jnp.where(jnp.isneginf(lse), 0.0, 1.0), lse, sinks)
    factor, lse = factor_and_lse(total, largest)
    return out * (fade * factor)[..., None], lse


def nothing_seen(problem: Problem):
    """The results of rows that see no key."""
    out = jnp.zeros((problem.tokens, problem.q_heads, problem.value_dim), problem.dtype)
    return out, jnp.full((problem.tokens, problem.q_heads), -jnp.inf, jnp.float32)


def unflatten(out, lse, query_shape):
    """Gives the flat results of a kernel the leading dimensions of the query they answer."""
    return out.reshape(*query_shape[:-1], out.shape[-1]), lse.reshape(query_shape[:-1])
