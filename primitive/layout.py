"""In which order the dimensions of a cache lie: `cache_layout=`, for caches that an engine has already.

A layout's name spells the dimensions behind the leading ones: k KV heads, p pages, s slots of a page, d features; 2
stands for keys and values in one array, key_cache, and (k2) for heads of which each key's is followed by its value's.

    kpsd    [kv_heads, num_pages, page_size, d]        this project's; JAX's older kernels, MaxText
    pskd    [num_pages, page_size, kv_heads, d]        vLLM, ejKernel's unified_attention, FlashInfer's "NHD"
    pksd    [num_pages, kv_heads, page_size, d]        FlashInfer's "HND", TensorRT-LLM
    ps(k2)d [num_pages, page_size, 2 * kv_heads, d]    JAX's ragged_paged_attention
    p2ksd   [num_pages, 2, kv_heads, page_size, d]     FlashInfer's "HND", stacked
    p2skd   [num_pages, 2, page_size, kv_heads, d]     FlashInfer's "NHD", stacked

Scales of single slots lie as the cache does, without d. The table of operands takes its names of dimensions from here,
and so do the checks, the cut over a mesh and the kernels: none of them moves a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import functools
import math
import re

import jax
import jax.numpy as jnp

NAMES = {
    "k": "kv_heads", "p": "num_pages", "s": "page_size", "d": "features", "2": "2", "(k2)": "2 * kv_heads"
}  # fmt: skip
DEFAULT_LAYOUT = "kpsd"


@dataclass(frozen=True)
class CacheLayout:
    """One layout, by its name."""

    name: str

    @functools.cached_property
    def dims(self) -> tuple[str, ...]:
        """The names of a cache's dimensions behind the leading ones; the last are its features."""
        return tuple(NAMES[letter] for letter in re.findall(r"\(k2\)|.", self.name))

    @functools.cached_property
    def apart(self) -> tuple[str, ...]:
        """The same with keys and values in a dimension of their own, as `split` puts them."""
        return tuple(NAMES[letter] for letter in self.name if letter not in "()")

    @property
    def combined(self) -> bool:
        """Whether keys and values lie in one array."""
        return "2" in self.name

    def ordered(self, form: tuple[str, ...]) -> tuple[str, ...]:
        """The names of an operand's dimensions in this order; what has no slots stays as it is."""
        if "page_size" not in form:
            return form
        others = tuple(dim for dim in form if dim not in NAMES.values())  # what features are called, if there are any
        return (*self.dims[:-1], *others)

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """The sizes of a cache of this shape, leading dimensions or none: those of `dims`, and of kv_heads."""
        sizes = dict(zip(self.dims, shape[len(shape) - len(self.dims) :], strict=True))
        if "2 * kv_heads" in sizes:
            sizes["kv_heads"] = sizes["2 * kv_heads"] // 2
        return sizes

    def lead(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The leading dimensions of a cache of this shape, layers included."""
        return tuple(shape[: len(shape) - len(self.dims)])

    def split(self, array: jax.Array, lead_dims: int) -> jax.Array:
        """A cache, or scales of its slots, with the dimensions `apart`, which moves nothing."""
        if "2 * kv_heads" not in self.dims:
            return array
        at = lead_dims + self.dims.index("2 * kv_heads")
        return array.reshape(*array.shape[:at], array.shape[at] // 2, 2, *array.shape[at + 1 :])

    def rows(self, sizes) -> dict[str, int]:
        """The strides of a cache's dimensions by name, in rows of features; "pool" is the size of a whole pool.

        `sizes` are those of kv_heads, num_pages and page_size.
        """
        sizes = {"2": 2} | {name: sizes[name] for name in ("kv_heads", "num_pages", "page_size")}
        dims = self.apart[:-1]
        return {"pool": math.prod(sizes[dim] for dim in dims)} | {
            dim: math.prod(sizes[inner] for inner in dims[i + 1 :]) for i, dim in enumerate(dims)
        }

    def to_default(self, array: jax.Array, lead_dims: int) -> tuple[jax.Array, ...]:
        """A cache or scales of its slots in this project's own order, keys and values apart. For definitions: it copies."""
        array = self.split(array, lead_dims)
        dims = self.apart[: array.ndim - lead_dims]
        order = [dim for dim in ("2", "kv_heads", "num_pages", "page_size", "features") if dim in dims]
        array = array.transpose(*range(lead_dims), *(lead_dims + dims.index(dim) for dim in order))
        return tuple(jnp.unstack(array, axis=lead_dims)) if self.combined else (array,)


LAYOUTS = {name: CacheLayout(name) for name in (DEFAULT_LAYOUT, "pskd", "pksd", "ps(k2)d", "p2ksd", "p2skd")}
OWN_LAYOUT = LAYOUTS[DEFAULT_LAYOUT]
