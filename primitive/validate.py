"""The check of concrete inputs, their values included, which code under `jax.jit` cannot make."""

from collections import defaultdict
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.primitive import checks
from paged_prefill.primitive.api import ragged_paged_prefill
from paged_prefill.primitive.operands import PACK, PREFILL, SCALES

SIGNATURE = inspect.signature(ragged_paged_prefill)
INDICES = tuple(row.name for row in PREFILL.operands if row.dtype == "int32")
NUMBERS = tuple(row.name for row in PREFILL.operands if row.dtype == "float32")
PACK_NAMES = tuple(row.name for row in PACK)
SCALE_NAMES = {row.name for row in SCALES}


def validate(*arguments, **parameters) -> None:
    """Checks a call of `ragged_paged_prefill`, whose arguments these are, values included; not for traced arrays.

    Shapes, dtypes and parameters are held to what the call itself takes, but for what only a kernel or a mesh can tell.
    Index values are in tokens (`context_lens`, `query_offsets`), keys (`key_ranges`) and pages (`page_indices`). Costs
    a copy of the index arrays to the host; neither caches nor scales of single slots are read.

    Raises:
      ValueError: a shape or parameter does not fit, or a value would be made harmless silently under jit: a context that
        is negative, shorter than its chunk or longer than its row of the page table; offsets that decrease or leave
        [0, tokens]; a page that some row of the chunk needs outside [0, num_pages); a layer that is not there. So does
        a page that `append_to_pages` would spoil: one that the new tokens of two sequences go to, one that the new
        tokens of one go to and a row of another needs, or one that a sequence has twice and writes. Pages that nobody
        writes may be shared. Sinks of NaN or +inf, and scales that are negative, NaN or infinite, are errors too.
        Names the argument, the sequence and the value.
      TypeError: a dtype does not fit, or an argument whose values count is traced.
    """
    call = SIGNATURE.bind(*arguments, **parameters)
    call.apply_defaults()
    given = call.arguments
    indices = {name: _indices(name, given[name]) for name in INDICES if given[name] is not None}
    kinds = jnp.floating, jnp.integer
    numbers = {name: _values(name, given[name], *kinds) for name in NUMBERS if given[name] is not None}
    _check_call(given)
    layout = checks.check_layout(given["cache_layout"])
    _check_numbers(numbers, given["key_cache"].ndim)
    attention = checks.attention_of(
        softmax_scale=given["softmax_scale"],
        attn_logits_soft_cap=given["attn_logits_soft_cap"],
        sliding_window=given["sliding_window"],
        head_dim=given["query"].shape[-1],
    )
    _check_indices(indices, attention, given["query"].shape, given["key_cache"].shape, layout)


validate.__signature__ = SIGNATURE.replace(return_annotation=None)


def _values(name, array, *kinds) -> np.ndarray:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"validate needs concrete arrays, but {name} is traced; call it outside jit")
    return np.asarray(checks.check_kind(name, array, *kinds))


def _indices(name, array) -> np.ndarray:
    """The values of an index argument, wide enough that none wraps around."""
    values = _values(name, array, jnp.integer)
    if values.dtype == np.uint64:
        values = values.clip(max=np.iinfo(np.int64).max)
    return values.astype(np.int64)


def _check_call(given) -> None:
    """Raises what the call would raise where it is traced."""
    names = [row.name for row in PREFILL.operands]
    arrays = {name: given[name] for name in names if hasattr(given[name], "shape")}
    others = {name: value for name, value in given.items() if name not in arrays}
    with jax.enable_x64(True):  # or JAX would narrow wide arrays of NumPy's before they are looked at
        jax.eval_shape(lambda arrays: ragged_paged_prefill(**arrays, **others), arrays)


def _check_numbers(numbers, cache_ndim) -> None:
    for name, values in numbers.items():
        if values.ndim == cache_ndim - 1:  # one of each slot, and those in use are not known
            continue
        wrong = ~(values < np.inf) | (values < 0 if name in SCALE_NAMES else False)
        if wrong.any():
            takes = "numbers from 0 on" if name in SCALE_NAMES else "numbers or -inf"
            at = np.argwhere(wrong)[0].tolist()
            raise ValueError(f"{name} must hold {takes}, got {values[*at]} at {at}")


class _Sequence(NamedTuple):
    """What a sequence with new tokens has to do with the pages in its row of the page table.

    Attributes:
      name: what messages call it.
      pages: its row.
      needed: whether a row of the chunk sees a key in that column.
      written: whether a new token goes there, and there is such a page.
    """

    name: object
    pages: np.ndarray
    needed: np.ndarray
    written: np.ndarray


def _check_indices(indices, attention, query_shape, cache_shape, layout) -> None:
    *batch, tokens = query_shape[:-2]
    num_pages, page_size = (layout.sizes(cache_shape)[name] for name in ("num_pages", "page_size"))
    layered = "layer" in indices
    lead = layout.lead(cache_shape)
    pools = lead[: len(lead) - layered]
    layers = np.broadcast_to(indices["layer"], batch) if layered else np.zeros(batch, np.int64)
    for pack in np.ndindex(*batch):
        if layered and not 0 <= layers[pack] < lead[-1]:
            raise ValueError(f"layer{_of(pack)} must lie in [0, {lead[-1]}), got {layers[pack]}")
        lens, pages, offsets = (indices[name][pack] for name in PACK_NAMES)
        _check_offsets(pack, offsets, tokens)
        for seq, length in enumerate(np.diff(offsets)):
            _check_context(_name(pack, seq), lens[seq], length, pages.shape[-1], page_size)
    intervals = _intervals(indices, attention, (*batch, tokens))
    sharing = defaultdict(list)  # by what they could write into
    for pack in np.ndindex(*batch):
        pool = tuple(min(at, size - 1) for at, size in zip(pack, pools))
        in_pack = {name: indices[name][pack] for name in PACK_NAMES}
        sharing[pool, layers[pack]] += _sequences(pack, in_pack, intervals[pack], num_pages, page_size)
    for sequences in sharing.values():
        _check_writes(sequences, num_pages)


def _of(pack) -> str:
    return f" of pack {pack}" if pack else ""


def _name(pack, seq):
    return (*pack, seq) if pack else seq


def _check_offsets(pack, offsets, tokens) -> None:
    for seq, offset in enumerate(offsets):
        if not 0 <= offset <= tokens:
            raise ValueError(
                f"query_offsets[{seq}]{_of(pack)} must be between 0 and the {tokens} tokens of query, got {offset}"
            )
        if seq and offset < offsets[seq - 1]:
            raise ValueError(
                f"query_offsets{_of(pack)} must not decrease, got {offset} after {offsets[seq - 1]} (sequence {seq - 1})"
            )


def _check_context(name, context_len, length, pages_per_seq, page_size) -> None:
    if context_len < 0:
        raise ValueError(f"context_lens of sequence {name} must not be negative, got {context_len}")
    if context_len < length:
        raise ValueError(f"context_lens of sequence {name} must count its {length} new tokens too, got {context_len}")
    if length and context_len > pages_per_seq * page_size:
        raise ValueError(
            f"page_indices of sequence {name} holds {pages_per_seq} pages of {page_size} slots, too few for its "
            f"context_lens of {context_len}"
        )


def _intervals(indices, attention, rows) -> np.ndarray:
    """The keys, first to end, that each token sees, [*batch, tokens, 2]; none where no sequence owns it."""
    if "key_ranges" in indices:
        return indices["key_ranges"]
    position = np.full(rows, -1)
    for pack in np.ndindex(*rows[:-1]):
        lens, offsets = indices["context_lens"][pack], indices["query_offsets"][pack]
        owned = np.arange(offsets[0], offsets[-1])
        position[pack][owned] = owned + np.repeat(lens - offsets[1:], np.diff(offsets))
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.stack(attention.visible_keys(jnp.asarray(position)), axis=-1)


def _sequences(pack, indices, intervals, num_pages, page_size) -> list[_Sequence]:
    """The sequences of a pack that have new tokens, once the pages that they need are there."""
    lens, page_indices, offsets = indices.values()
    found = []
    for seq in np.flatnonzero(np.diff(offsets)).tolist():
        pages, start, end, context_len = page_indices[seq], offsets[seq], offsets[seq + 1], lens[seq]
        there = (pages >= 0) & (pages < num_pages)
        needed = _columns(intervals[start:end].clip(0, context_len), page_size, len(pages))
        if len(missing := np.flatnonzero(needed & ~there)):
            raise ValueError(
                f"page_indices of sequence {_name(pack, seq)} must lie in [0, {num_pages}) where its keys are, "
                f"got {pages[missing[0]]} in column {missing[0]}"
            )
        new = np.array([[context_len - (end - start), context_len]])
        written = there & _columns(new, page_size, len(pages))
        found.append(_Sequence(_name(pack, seq), pages, needed, written))
    return found


def _columns(intervals, page_size, pages_per_seq) -> np.ndarray:
    """Which columns of the page table hold a key of any interval [rows, 2], as truth values."""
    first, end = intervals[intervals[:, 0] < intervals[:, 1]].T
    begins = np.bincount(first // page_size, minlength=pages_per_seq + 1)
    ends = np.bincount(-(-end // page_size), minlength=pages_per_seq + 1)
    return np.cumsum(begins - ends)[:pages_per_seq] > 0


def _check_writes(sequences: list[_Sequence], num_pages: int) -> None:
    """Refuses pages of one pool in which `append_to_pages` would write over what some row needs."""
    nobody = len(sequences)
    writer = np.full(num_pages, nobody)
    for at, seq in enumerate(sequences):
        written = seq.pages[seq.written]
        if len(taken := written[writer[written] != nobody]):
            raise ValueError(
                f"page_indices of sequences {sequences[writer[taken[0]]].name} and {seq.name} both have page {taken[0]} "
                "where their new tokens go: a page that is written must be of one sequence alone"
            )
        writer[written] = at
    for at, seq in enumerate(sequences):
        columns = np.flatnonzero(seq.needed | seq.written)
        writers = writer[seq.pages[columns]]
        if len(others := columns[(writers != at) & (writers != nobody)]):
            page = seq.pages[others[0]]
            raise ValueError(
                f"page_indices of sequence {seq.name} needs page {page}, in column {others[0]}, where the new tokens of "
                f"sequence {sequences[writer[page]].name} go: a page that is shared must not be written"
            )
        own = columns[writers == at]
        pages, counts = np.unique(seq.pages[own], return_counts=True)
        if len(twice := pages[counts > 1]):
            raise ValueError(
                f"page_indices of sequence {seq.name} must not have a page twice where its new tokens go, got page "
                f"{twice[0]} in columns {own[seq.pages[own] == twice[0]].tolist()}"
            )
