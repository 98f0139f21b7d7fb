"""What every lowering of `append_to_pages` is; choose.py takes the first that can."""

import abc
from collections.abc import Mapping
import math
from typing import ClassVar

from jax import export

from paged_prefill.lowering.call import Device
from paged_prefill.primitive.layout import OWN_LAYOUT, CacheLayout


MANY_TOKENS = 128  # of an append: with fewer, kernels for few tokens are asked, and with as many those for many


class Writer(abc.ABC):
    """A way to run `local_append_to_pages_p`. A new one fills in what is abstract here, and is named in choose.py.

    Attributes:
      name: what messages call it.
      platforms: those it runs on, as `Device.platform` has them.
      any_call: whether it runs every call: those too of symbolic sizes, and for a device that is not known.
    """

    name: ClassVar[str]
    platforms: ClassVar[tuple[str, ...]]
    any_call: ClassVar[bool] = False

    def is_for(self, device: Device) -> bool:
        """Whether it is asked at all on a device."""
        return device.platform in self.platforms

    def supports(self, operands: Mapping, device: Device, layout: CacheLayout = OWN_LAYOUT) -> str | None:
        """None, or the reason why it cannot run a call with these operands, in words that a user can act on."""
        if self.any_call:
            return None
        if any(export.is_symbolic_dim(size) for x in operands.values() for size in x.shape):
            return "it is built for sizes that are numbers, and the call has symbolic ones"
        if not device.known:
            return "it is built for one kind of device, and which will run this is not known here"
        return self._reason_against(operands, device, layout)

    def pays(self, operands: Mapping) -> bool:
        """Whether it is the faster one for a call of this size; then nothing is said of it."""
        return True

    @abc.abstractmethod
    def _reason_against(self, operands: Mapping, device: Device, layout: CacheLayout) -> str | None:
        """What `supports` says of a call whose sizes are numbers, on a device that is known."""

    @abc.abstractmethod
    def write(
        self, operands: Mapping, cache_batch_dims: int, device: Device, layout: CacheLayout = OWN_LAYOUT
    ) -> list:
        """The results by the table of operands: what was written, in its order. In place where it may be."""


def places_of(operands: Mapping, cache_batch_dims: int, layout: CacheLayout) -> dict[str, int | None]:
    """Sizes and strides of an append, by name, with leading dimensions folded and caches as matrices of rows of features.

    `*_rows` are strides in such rows: from one pool to the next, and so on; `value_rows` from a key to its value, None
    where they have arrays of their own. `layers` are those of each pool, None without the operand `layer`.
    """
    key, cache = operands["key"], operands["key_cache"]
    lead, (tokens, kv_heads, _) = key.shape[:-3], key.shape[-3:]
    sizes = layout.sizes(cache.shape)
    rows = layout.rows(sizes)
    seqs, pages_per_seq = operands["page_indices"].shape[-2:]
    packs = math.prod(lead)
    return dict(
        packs=packs,
        packs_of_pool=packs // math.prod(lead[:cache_batch_dims]),
        tokens=tokens,
        seqs=seqs,
        pages_per_seq=pages_per_seq,
        layers=cache.shape[cache_batch_dims] if "layer" in operands else None,
        kv_heads=kv_heads,
        num_pages=sizes["num_pages"],
        page_size=sizes["page_size"],
        pool_rows=rows["pool"],
        head_rows=rows["kv_heads"],
        page_rows=rows["num_pages"],
        slot_rows=rows["page_size"],
        value_rows=rows.get("2"),
    )
