"""`append_to_pages` in plain XLA operations, in place where the cache is donated. What is stored is the token, or its
quantised form.

A scatter goes to slots [.., page, slot]. The pools of *C are batch dimensions of it, and so are the heads where they
lie before the slots; where they lie behind, a slot holds them all. XLA's CPU compiler scatters some floats in wider
copies of the whole cache: there a loop writes them token by token.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import last_index
from paged_prefill.lowering.writer import Writer
from paged_prefill.primitive.layout import OWN_LAYOUT, CacheLayout
from paged_prefill.primitive.operands import APPEND
from paged_prefill.primitive.packing import Owners
from paged_prefill.primitive.quantised import quantised, scale_of

RESULTS = tuple(row.name for row in APPEND.results)
PLACES = ("layers", "num_pages", "page_size")
HEADS = ("kv_heads", "2", "2 * kv_heads")


class XlaWriter(Writer):
    """Runs every call, anywhere."""

    name = "xla"
    platforms = ("cpu", "tpu", "cuda", "rocm")
    any_call = True

    def _reason_against(self, operands, device, layout):
        return None

    def write(self, operands, cache_batch_dims, device, layout=OWN_LAYOUT):
        """By scatters, or token by token; see the module's docstring."""
        # Else XLA for GPU draws a product that makes them, for one token, into the scatter: a loop for each element.
        new = {name: operands[name] for name in ("key", "value") if name in operands}
        operands = operands | lax.optimization_barrier(new)
        all_stored = stored(operands, cache_batch_dims, layout)
        in_turn = {name: x for name, x in all_stored.items() if device.platform == "cpu" and _widened(x.into.dtype)}
        rest = {name: x for name, x in all_stored.items() if name not in in_turn}
        written = scattered(rest, cache_batch_dims, layout) | written_in_turn(in_turn, layout)
        return [written[name] for name in all_stored]


class Stored(NamedTuple):
    """What an append stores in an operand: `new` [*C, kv_heads, tokens of all packs, ...] in `into`, token i at at[:, i].

    `at` [*C, tokens, (layer,) page and slot]; the page is -1 for a token that has none. Where keys and values lie in
    one array, `new` has a dimension of 2 behind the heads.
    """

    into: Array
    new: Array
    at: Int[Array, "*C tokens places"]


def stored(operands, cache_batch_dims, layout: CacheLayout) -> dict[str, Stored]:
    """What goes where, by the name of the operand, in the order of the results; quantised where the cache is."""
    of_pool = functools.partial(_new_of_pool, layout)
    for _ in range(cache_batch_dims):
        of_pool = jax.vmap(of_pool)
    new, at = of_pool(dict(operands))
    return {name: Stored(operands[name], new[name], at) for name in RESULTS if name in new}


def scattered(stored: dict[str, Stored], cache_batch_dims, layout: CacheLayout) -> dict[str, Array]:
    """The operands, by name, with what is stored in them, by scatters."""
    scatter = functools.partial(_scatter, layout)
    for _ in range(cache_batch_dims):
        scatter = jax.vmap(scatter)
    return {name: scatter(*x) for name, x in stored.items()}


def written_in_turn(stored: dict[str, Stored], layout: CacheLayout) -> dict[str, Array]:
    """The operands, which are caches, with what is stored in them, token by token.

    XLA's CPU compiler updates a slice in place, whatever the dtype, if the whole is cast to integers just before and
    back just after, and is in use nowhere else.
    """
    if not stored:
        return {}
    into, all_new, (at, *_) = zip(*stored.values())
    *own, tokens, places = at.shape
    if 0 in (*own, tokens, *into[0].shape):
        return dict(zip(stored, into))
    pool = [lax.broadcasted_iota(jnp.int32, (*own, tokens, 1), axis) for axis in range(len(own))]
    corners = jnp.concatenate([*pool, at], axis=-1).reshape(-1, len(own) + places)
    of_slot = [dim for dim in layout.dims if dim not in ("num_pages", "page_size")]
    ordered = functools.partial(_ordered, layout, dims=["tokens", *of_slot])
    for _ in own:
        ordered = jax.vmap(ordered)
    rows = [new.reshape(-1, *new.shape[len(own) + 1 :]) for new in map(ordered, map(_bits, all_new))]
    exists = corners[:, -2] >= 0
    # A token without a page repeats one that has one.
    token = jnp.where(exists, jnp.arange(exists.shape[0], dtype=jnp.int32), lax.argmax(exists, 0, jnp.int32))
    one_wide = [places + len(own) - 2 + layout.dims.index(dim) for dim in ("num_pages", "page_size")]

    def write(i, arrays):
        *lead, page, slot = jnp.unstack(corners[token[i]])
        corner = (*lead, *(dict(num_pages=page, page_size=slot).get(dim, 0) for dim in layout.dims))

        def with_row(array, row):
            row = lax.expand_dims(row[token[i]], (*range(len(lead)), *one_wide))
            return lax.bitcast_convert_type(lax.dynamic_update_slice(_bits(array), row, corner), array.dtype)

        return tuple(map(with_row, arrays, rows))

    return dict(zip(stored, lax.fori_loop(0, jnp.where(jnp.any(exists), exists.shape[0], 0), write, into)))


def _new_of_pool(layout: CacheLayout, named):
    """What the packs [*B] of one pool store, by the name of what it goes into, and where."""
    sizes, key = layout.sizes(named["key_cache"].shape), named["key"]
    num_pages, page_size = sizes["num_pages"], sizes["page_size"]
    locate = functools.partial(slots, tokens=key.shape[-3], num_pages=num_pages, page_size=page_size)
    for _ in range(key.ndim - 3):
        locate = jax.vmap(locate)
    page, slot = locate(named["context_lens"], named["page_indices"], named["query_offsets"])
    at = [page, slot]
    if "layer" in named:
        layer = jnp.clip(named["layer"], 0, named["key_cache"].shape[0] - 1)
        at.insert(0, jnp.broadcast_to(jnp.expand_dims(layer, -1), page.shape))
    at = [x.reshape(-1) for x in at]
    stored = {}
    for name in ("key", "value"):
        if name not in named:
            continue
        holder = "key" if layout.combined else name  # whose arrays hold it
        cache, scale = named[f"{holder}_cache"], named.get(f"{name}_scale")
        of_slots = named.get(f"{holder}_scale")
        new = jnp.moveaxis(named[name].reshape(-1, *named[name].shape[-2:]), 1, 0)  # [kv_heads, tokens, features]
        if cache.dtype != new.dtype:
            per_slot = of_slots is not None and of_slots.ndim == cache.ndim - 1
            own = scale_of(new, cache.dtype) if per_slot else _given_scale(scale, at, "layer" in named)
            new = quantised(new, own, cache.dtype)
            if per_slot:
                stored[f"{name}_scale"] = own
        stored[f"{name}_cache"] = new
    if layout.combined:
        kinds = [kind for kind in ("cache", "scale") if f"key_{kind}" in stored]
        stored = {f"key_{kind}": jnp.stack([stored[f"{x}_{kind}"] for x in ("key", "value")], 1) for kind in kinds}
    return stored, jnp.stack(at, axis=-1)


def _given_scale(scale, at, layered):
    """The scale of each head and token that is written, [kv_heads or 1, tokens or 1]."""
    if scale is None:
        return jnp.ones((1, 1), jnp.float32)
    by_token = jnp.moveaxis(scale.at[at[0]].get(mode="clip"), 0, -1) if layered else scale[..., None]
    return jnp.atleast_2d(by_token)


def _scatter(layout: CacheLayout, cache, new, at):
    """`cache` [(layers,) *layout's dimensions], maybe without features, with `new` [kv_heads, (2,) tokens, ...]."""
    dims = ["layers"] * (at.shape[-1] - 2) + [*layout.dims]
    dims = dims[: cache.ndim]  # scales have no features
    before, behind = dims[: dims.index("page_size")], dims[dims.index("page_size") + 1 :]
    # Heads are a batch dimension of the indices too, or XLA's TPU compiler copies the cache in a loop. Written out,
    # since vmap would bring the heads before the layers, which copies it too.
    batch = [dim for dim in before if dim in HEADS]
    places = [dim for dim in PLACES if dim in dims]
    new = _ordered(layout, new, [*batch, "tokens", *behind])
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(len(batch) + 1, new.ndim)),
        inserted_window_dims=tuple(map(dims.index, places)),
        scatter_dims_to_operand_dims=tuple(map(dims.index, places)),
        operand_batching_dims=tuple(map(dims.index, batch)),
        scatter_indices_batching_dims=tuple(range(len(batch))),
    )
    indices = jnp.broadcast_to(at, (*new.shape[: len(batch)], *at.shape))
    return lax.scatter(cache, indices, new, dimensions, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _ordered(layout: CacheLayout, new, dims):
    """Tokens [kv_heads, (2,) tokens, ...] with these dimensions; "2 * kv_heads" are the first two as one."""
    own = ["kv_heads", *["2"] * layout.combined, "tokens", *["features"] * ("features" in dims)]
    if "2 * kv_heads" in dims:
        new, own = lax.collapse(new, 0, 2), ["2 * kv_heads", *own[2:]]
    return new.transpose(*map(own.index, dims))


def slots(context_lens, page_indices, query_offsets, *, tokens, num_pages, page_size):
    """The page and slot of each token of one pack; page -1 for those without one."""
    seqs, pages_per_seq = page_indices.shape
    if 0 in (seqs, pages_per_seq):
        return jnp.full(tokens, -1, jnp.int32), jnp.zeros(tokens, jnp.int32)
    owners = Owners(query_offsets, tokens)
    position = owners.positions(context_lens)
    column = lax.div(position, jnp.int32(page_size))
    last_column = last_index(pages_per_seq)
    exists = owners.owned & (position >= 0) & (column <= last_column)
    at = owners.seq, jnp.clip(column, 0, last_column)
    page = page_indices.at[at].get(mode="clip", wrap_negative_indices=False)
    exists &= (0 <= page) & (page <= last_index(num_pages))
    return jnp.where(exists, page, -1), jnp.where(exists, lax.rem(position, jnp.int32(page_size)), 0)


def _bits(x):
    """Floats as the integers of their size."""
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _widened(dtype) -> bool:
    """Whether XLA's CPU compiler scatters a dtype in wider copies of the cache."""
    return dtype.name.startswith("float8") or (dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11))
