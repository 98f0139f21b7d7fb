"""Pages cut over devices: what one device holds of a pack, and how partial results become whole.

Of N pages on W devices, page g is on device g // (N / W). Of every sequence, a device holds some columns of the page
table; these in order are its own page table, and the keys in them its own keys, counted from 0. What a row sees of
them is an interval again, since keys stay in order. So a kernel runs as it does on whole caches, and the softmaxes of
disjoint keys add up by their lse.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from paged_prefill.primitive import checks
from paged_prefill.primitive.attention import normalised, part_of_merge, visible_keys
from paged_prefill.primitive.context import AxisHint, current_policy
from paged_prefill.primitive.cut import axes_of
from paged_prefill.primitive.layout import DEFAULT_LAYOUT
from paged_prefill.primitive.masks import BITS
from paged_prefill.primitive.packing import MAX_CONTEXT, Owners, harmless_contexts


def local_pages(
    page_axis: AxisHint,
    query: Float[Array, "*batch tokens q_heads head_dim"],
    key_cache: Float[Array, "*pools kv_heads local_pages page_size head_dim"],
    context_lens: Int[Array, "*batch seqs"],
    page_indices: Int[Array, "*batch seqs pages_per_seq"],
    query_offsets: Int[Array, "*batch seqs_plus_1"],
    *,
    sliding_window: int | None = None,
    key_ranges: Int[Array, "*batch tokens 2"] | None = None,
    tree_mask: UInt32[Array, "*batch tokens words"] | None = None,
    sinks: Float[Array, "*batch q_heads"] | None = None,
    cache_layout: str = DEFAULT_LAYOUT,
) -> dict[str, Array]:
    """What `ragged_paged_prefill` is to be called with on one device, inside a `shard_map` that cuts the caches' pages.

    Two lines attend to caches of which each device along `page_axis` has its part, in the axis' order:

        mine = local_pages("pages", query, key_cache, context_lens, page_indices, query_offsets)
        out, lse = merge_over("pages", *ragged_paged_prefill(query, key_cache, value_cache, return_lse=True, **mine))

    Outside of a `shard_map`, `ragged_paged_prefill` does this by itself.

    Args:
      page_axis: the mesh axis, or tuple of axes, that the pages are cut over.
      query, key_cache: what the device has of them; their shapes are read.
      context_lens, page_indices, query_offsets: the whole pack, with pages numbered as in the whole caches.
      sliding_window, key_ranges, tree_mask, sinks: those of the whole call, which then are given by this alone.
      cache_layout: the order of the cache's dimensions; to be given to the call too.

    Returns:
      The arguments by name: context_lens, page_indices and query_offsets, counted in the pages and keys of this device;
      key_ranges where what rows see takes them, that is in all calls but plain causal ones of no more tokens than
      sequences (decode steps), which go as sequences of one token each; tree_mask where it is given; and sinks where
      they are, -inf on all devices but the first, since they count once.

    Raises:
      ValueError, TypeError: a shape or dtype does not fit; names the argument.
    """
    checks.check_leading("query", query)
    layout = checks.check_layout(cache_layout)
    checks.check_cache_rank("key_cache", key_cache, layout)
    pack = checks.index_arrays(
        context_lens=(context_lens, ("seqs",)),
        page_indices=(page_indices, ("seqs", "pages_per_seq")),
        query_offsets=(query_offsets, ("seqs + 1",)),
    )
    if key_ranges is not None:
        pack |= checks.int32_indices(key_ranges=key_ranges)
    others = dict(query=query, key_cache=key_cache, tree_mask=tree_mask, sinks=sinks)
    held, _ = hold(
        axes_of(page_axis),
        pack | {name: array for name, array in others.items() if array is not None},
        sliding_window,
        layout,
        invariant=current_policy() == "invariant",
    )
    return {name: array for name, array in held.items() if name not in ("query", "key_cache")}


def counted_here(axes, page_indices, num_pages):
    """Page indices of a whole pool as one device, which has `num_pages`, writes by them: -1 where it has not the page."""
    page, held = _here(axes, page_indices, num_pages)
    return jnp.where(held, page, -1)


def _here(axes, page_indices, num_pages):
    """Page indices counted in the pages of the device that has them, and whether that is this one."""
    return page_indices % num_pages, page_indices // num_pages == lax.axis_index(axes)


def hold(axes, operands, sliding_window, layout, *, invariant):
    """The operands of a call as one device has them, by name, and the sliding window that is left to them.

    `operands` are whole but for the caches, whose pages are cut over `axes`. A pack of no more tokens than sequences,
    in which rows see by causality alone, holds decode steps: each token goes as a sequence that ends with it, and every
    kernel takes that. Other packs are told what each row sees. `invariant` says that a pack's sizes must not choose.
    """
    query, page_indices, sizes = operands["query"], operands["page_indices"], layout.sizes(operands["key_cache"].shape)
    tokens, num_pages, page_size = query.shape[-3], sizes["num_pages"], sizes["page_size"]
    held = dict(operands)
    if "sinks" in operands:
        held["sinks"] = jnp.where(lax.axis_index(axes) == 0, operands["sinks"], -jnp.inf)
    if 0 in (tokens, num_pages, *page_indices.shape[-2:]):  # no row sees a key
        return held, sliding_window
    columns = _Columns(page_indices, axes, num_pages, page_size)
    owners = Owners(operands["query_offsets"], tokens)
    context_lens = harmless_contexts(operands["context_lens"])
    masked = sliding_window is not None or "key_ranges" in operands or "tree_mask" in operands
    if not (masked or invariant) and _no_more(tokens, page_indices.shape[-2]):
        return held | _as_decode_steps(columns, owners, context_lens), None
    lengths = jnp.diff(owners.offsets)
    first_new = context_lens - lengths
    if "key_ranges" in operands:
        low, high = jnp.unstack(operands["key_ranges"], axis=-1)
        high = jnp.minimum(high, owners.of(context_lens))
    else:
        low, high = visible_keys(owners.positions(context_lens), sliding_window)
    held["key_ranges"] = jnp.stack([columns.below(owners.seq, low), columns.below(owners.seq, high)], axis=-1)
    # As if all of the chunk lay here, so that `tree_mask` counts from its first key here; ranges say what is seen.
    seq = lax.broadcasted_iota(jnp.int32, first_new.shape, first_new.ndim - 1)
    held["context_lens"] = jnp.where(first_new < 0, first_new, columns.below(seq, first_new)) + lengths
    held["page_indices"] = columns.table()
    if "tree_mask" in operands:
        held["tree_mask"] = _tree_here(operands["tree_mask"], columns, owners, first_new)
    return held, None


def _no_more(tokens, seqs) -> bool:
    """Whether there are no more tokens than sequences, as far as is known."""
    return isinstance(tokens, int) and isinstance(seqs, int) and tokens <= seqs


def _as_decode_steps(columns: "_Columns", owners: Owners, context_lens):
    """Each token as a sequence of its own; those that no sequence owns stay before the first or behind the last."""
    _, end = visible_keys(owners.positions(context_lens), None)
    first, last = owners.offsets[..., :1], owners.offsets[..., -1:]
    tokens = owners.token.shape[-1]
    each = jnp.arange(tokens + 1, dtype=jnp.int32).reshape(*[1] * (first.ndim - 1), tokens + 1)
    return dict(
        context_lens=columns.below(owners.seq, end),
        page_indices=owners.of(columns.table()),
        query_offsets=jnp.clip(each, first, last),
    )


class _Columns:
    """The columns of page tables that a device holds, whose pages are the number axis_index of equal parts.

    Attributes:
      before: how many columns before each, and before the end, it holds.
    """

    before: Int[Array, "*batch seqs columns_plus_1"]

    def __init__(self, page_indices: Int[Array, "*batch seqs columns"], axes, num_pages: int, page_size: int):
        last = jax.core.min_dim(lax.axis_size(axes) * num_pages - 1, 2**31 - 1)
        # An index outside the whole pool counts as the nearest that there is, as everywhere.
        self._page, self._held = _here(axes, jnp.clip(page_indices, 0, last), num_pages)
        held = jnp.cumsum(self._held, axis=-1, dtype=jnp.int32)
        self.before = jnp.pad(held, [(0, 0)] * (held.ndim - 1) + [(1, 0)])
        self._page_size = page_size

    def table(self) -> Int[Array, "*batch seqs columns"]:
        """The device's page table: its columns in order, and behind them 0."""
        return _in_front(self._page, self._held, self.before[..., :-1], behind=0)

    def below(self, seq: Int[Array, "*batch n"], key: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
        """How many of the device's keys of a sequence stand before a key of the whole sequence; 0 below key 0."""
        columns = self._page.shape[-1]
        reachable = jax.core.min_dim(columns, -(-MAX_CONTEXT // self._page_size))
        key = jnp.clip(key, 0, jax.core.min_dim(reachable * self._page_size, MAX_CONTEXT))
        column, slot = key // self._page_size, key % self._page_size
        every = self.before.reshape(*self.before.shape[:-2], -1)
        at = seq * (columns + 1) + column
        before, after = (jnp.take_along_axis(every, i, axis=-1, mode="clip") for i in (at, at + 1))
        return before * self._page_size + (after - before) * slot


def _in_front(values, kept, number, *, behind: int):
    """The values [..., n] that are kept, each where its number says, and `behind` after them."""
    size = math.prod(values.shape)
    row = lax.broadcasted_iota(jnp.int32, (size,), 0) // values.shape[-1] * values.shape[-1]
    outside = size + jnp.arange(size, dtype=jnp.int32)  # a place of its own for each that is not kept
    at = jnp.where(kept.reshape(-1), row + number.reshape(-1), outside)
    placed = jnp.full(size, behind, values.dtype).at[at].set(values.reshape(-1), mode="drop", unique_indices=True)
    return placed.reshape(values.shape)


def _tree_here(tree_mask, columns: _Columns, owners: Owners, first_new):
    """The tree mask over the chunk's tokens whose keys a device holds, in order.

    `first_new` is where each sequence's chunk begins. Tokens before key 0, of a chunk longer than its context, count on
    as they did, and tokens past the mask are seen by their interval alone.
    """
    count = BITS * tree_mask.shape[-1]
    bit = lax.broadcasted_iota(jnp.uint32, (*tree_mask.shape, BITS), tree_mask.ndim)
    token = lax.broadcasted_iota(jnp.int32, (*first_new.shape, count), first_new.ndim)
    key = jnp.expand_dims(first_new, -1) + token
    seq = lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 2)
    flat = (*key.shape[:-2], -1)
    below = functools.partial(columns.below, seq.reshape(flat))
    held = (key < 0) | (below(key.reshape(flat) + 1) > below(key.reshape(flat))).reshape(key.shape)
    number = jnp.cumsum(held, axis=-1, dtype=jnp.int32) - held.astype(jnp.int32)
    source = _in_front(token, held, number, behind=count)
    every = jnp.expand_dims(tree_mask, -1) >> bit & jnp.uint32(1)
    every = every.reshape(*tree_mask.shape[:-1], count)
    every = jnp.pad(every, [(0, 0)] * (every.ndim - 1) + [(0, 1)], constant_values=1)
    here = jnp.take_along_axis(every, owners.of(source), axis=-1, mode="clip")
    return jnp.sum(here.reshape(bit.shape) << bit, axis=-1, dtype=jnp.uint32)


def merge_over(
    page_axis: AxisHint,
    out: Float[Array, "*batch tokens q_heads value_dim"],
    lse: Float[Array, "*batch tokens q_heads"],
    *,
    scatter: bool = False,
) -> tuple[Float[Array, "*batch tokens q_heads value_dim"], Float[Array, "*batch tokens q_heads"]]:
    """Combines what devices along a mesh axis got for the same rows over disjoint keys, inside a `shard_map`.

    The formula of `merge`, summed over devices in float32: a device that saw no key of a row (lse -inf) counts for
    nothing there, whatever its output holds. See `local_pages` for what goes before.

    Args:
      page_axis: the mesh axis, or tuple of axes.
      out, lse: the results of `ragged_paged_prefill` on this device.
      scatter: whether each device gets an equal part of the tokens, in the axis' order, which takes half the traffic,
        in place of all of them.

    Returns:
      The output in `out`'s dtype, and its lse.

    Raises:
      ValueError, TypeError: shapes do not agree, a dtype is no float, or the tokens do not divide; names the argument.
    """
    checks.check_partials(out=out, lse=lse)
    checks.check_flag("scatter", scatter)
    axes, tokens_axis = axes_of(page_axis), lse.ndim - 2
    largest = lax.pmax(lse.astype(jnp.float32), axes)
    shift = jnp.where(jnp.isneginf(largest), 0.0, largest)
    parts = part_of_merge(out, lse, shift)
    if scatter:
        checks.check_parts("out", out.shape[tokens_axis], lax.axis_size(axes))
        part = out.shape[tokens_axis] // lax.axis_size(axes)
        shift = lax.dynamic_slice_in_dim(shift, lax.axis_index(axes) * part, part, tokens_axis)
        summed = lax.psum_scatter(parts, axes, scatter_dimension=tokens_axis, tiled=True)
    else:
        summed = lax.psum(parts, axes)
    merged, merged_lse = normalised(*summed, shift)
    return merged.astype(out.dtype), merged_lse.astype(lse.dtype)
