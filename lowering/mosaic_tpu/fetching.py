"""How the kernels for TPUs bring pages into VMEM: blocks of keys and values by asynchronous copies, one block ahead.

An item walks over its keys in blocks, from its window's start to its causal limit; blocks lie on one fixed grid of a
sequence's keys, so the bits of a row do not depend on the pack it is in. Two buffers hold blocks: while one is computed
with, the pages of the next block, be it this item's or the next one's, are copied into the other, each page by one
strided copy for all KV heads. The page table stays in HBM, however large: an item's row of it is copied to SMEM while
the item before it computes.

Scales of slots are gathered by XLA before the kernel starts, and a block's are one copy. XLA lays such arrays out with the
pages on the lanes, so a page's are strewn over registers and no kernel could fetch them. What is gathered has
4 / head_dim of the numbers of the keys that are read.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_prefill.lowering.call import Call, Problem
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Sizes, round_up

COPIES_AT_ONCE = 4  # page copies started in one step of a loop, for the scalar unit to overlap


class Held(NamedTuple):
    """How the caches are held: static.

    Attributes:
      latent: whether values are part of the keys.
      combined: whether keys and values are one array.
      pages_first: whether pages stand before heads.
      kv_heads: of the caches.
      scaled: "key" and "value" where each head has a scale of them.
      slots_scaled: "key" and "value" where each slot has a scale of them that is fetched; not values that are keys.
    """

    latent: bool
    combined: bool
    pages_first: bool
    kv_heads: int
    scaled: tuple[str, ...]
    slots_scaled: tuple[str, ...]

    @classmethod
    def by(cls, call: Call) -> "Held":
        """Those of a call."""
        problem, latent = call.problem, "latent" in call.problem.features
        dims, combined = problem.layout.apart, problem.layout.combined
        pages_first = dims.index("num_pages") < dims.index("kv_heads")
        of_slots = {name for name, scale in _scales(call).items() if scale.ndim > 2}
        scaled = tuple(name for name in _scales(call) if name not in of_slots)
        slots_scaled = tuple(name for name in sorted(of_slots) if not (latent and name == "value"))
        return cls(latent, combined, pages_first, problem.cache_kv_heads, scaled, slots_scaled)


class Pages(NamedTuple):
    """What is fetched, and whereto. The values are None where they have no array of their own.

    Attributes:
      keys, values: HBM [pools, kv_heads, runs, run, features]; with pages before heads
        [pools, num_pages, kv_heads, runs_per_page, run, features], and the values' heads behind the keys' in one array.
      table: HBM [seqs, 1, pages_per_seq], in whole registers.
      key_scales, value_scales: those of slots, or None, HBM [seqs, kv_heads of all cores, chunks, 1, chunk].
    """

    keys: object
    values: object
    table: object
    key_scales: object
    value_scales: object

    @classmethod
    def of(cls, refs: Iterator, held: Held) -> "Pages":
        """The next of the references that a kernel is given."""
        keys, values, table = next(refs), None if held.latent or held.combined else next(refs), next(refs)
        return cls(keys, values, table, *(next(refs) if name in held.slots_scaled else None for name in ("key", "value")))


class Scales(NamedTuple):
    """The scales of keys and of values of each head, None where there are none: SMEM [pools * cache_kv_heads]."""

    key: object
    value: object
    cache_kv_heads: int

    @classmethod
    def of(cls, refs: Iterator, held: Held) -> "Scales":
        """The next of the references that a kernel is given, of those that there are."""
        return cls(*(next(refs) if name in held.scaled else None for name in ("key", "value")), held.kv_heads)

    def of_head(self, pool, first_head, name: str, head):
        """The scale of "key" or "value" of a head counted from the first, or None."""
        ref = getattr(self, name)
        return None if ref is None else ref[pool * self.cache_kv_heads + first_head + head]


class Buffers(NamedTuple):
    """What is kept on the chip from one grid step to the next."""

    keys: object  # VMEM [2, kv_heads, keys of a block, head_dim]
    values: object  # VMEM [2, kv_heads, keys of a block, value_dim]
    key_scales: object  # VMEM [2, kv_heads, chunks_per_block, 1, chunk], or None like the next
    value_scales: object
    table: object  # SMEM [2 * pages_per_seq]
    slot: object  # SMEM [1], the buffer that holds the next block to compute with
    page_sems: object  # DMA [2]
    table_sems: object  # DMA [2]

    def scales_of_slots(self, held: Held, slot, name: str, head, chunk):
        """The scales of "key" or "value" of each slot of a chunk, [1, chunk], or None."""
        ref = self.key_scales if name == "key" or held.latent else self.value_scales
        return None if ref is None else ref[slot, head, chunk]


class Block(NamedTuple):
    """A block of an item's keys."""

    item: object
    number: object


class LoadedBlock(NamedTuple):
    """A block in VMEM, and what attends to it.

    Attributes:
      query_ref, keys_ref, values_ref: VMEM; the values may be the keys.
      scratch, static: the kernel's own.
      scale_of: a function of "key" or "value" and a KV head that gives its scale, None where there is none.
      slot_scales_of: the same of a chunk too, that gives the scales of its slots [1, chunk].
    """

    query_ref: object
    keys_ref: object
    values_ref: object
    scratch: object
    static: object
    scale_of: object
    slot_scales_of: object


class Fetcher:
    """The copies of one grid step, which works on an item.

    `items` has each item's seq, key_pool, value_pool, key_start and key_end.
    """

    def __init__(
        self, items, item, num_items, pages: Pages, held: Held, buffers: Buffers, first_head, kv_heads, sizes: Sizes
    ):
        self.items, self.item, self.num_items, self.pages_first = items, item, num_items, held.pages_first
        self.pages, self.buffers, self.sizes = pages, buffers, sizes
        heads = pl.ds(first_head, kv_heads)
        self.streams = [(pages.keys, heads, buffers.keys, items.key_pool)]
        if held.combined:
            value_heads = pl.ds(held.kv_heads + first_head, kv_heads)
            self.streams.append((pages.keys, value_heads, buffers.values, items.key_pool))
        elif not held.latent:
            self.streams.append((pages.values, heads, buffers.values, items.value_pool))
        of_core = pl.ds(pl.program_id(0) * kv_heads, kv_heads)
        scales = (pages.key_scales, buffers.key_scales), (pages.value_scales, buffers.value_scales)
        self.scales = [(array.at[:, of_core], buffer) for array, buffer in scales if array is not None]
        self.first_block = lax.div(items.key_start[item], self.sizes.block_kv)
        self.last_block = jnp.maximum(lax.div(items.key_end[item] - 1, self.sizes.block_kv), self.first_block)

    def begin(self):
        """What comes before the blocks of the item: the very first fetch, and the next item's row of the table."""

        @pl.when(self.item == 0)
        def _():
            self._table_copy(0).start()
            self._table_copy(0).wait()
            self.buffers.slot[0] = 0
            self.start(Block(0, self.first_block), 0)

        @pl.when(self.item + 1 < self.num_items)
        def _():
            self._table_copy(self.item + 1).start()

    def turn(self):
        """The buffer of the block that comes to be computed with; the other one is free from now on."""
        slot = self.buffers.slot[0]
        self.buffers.slot[0] = 1 - slot
        return slot

    def following(self, block):
        """The block to fetch beside this one of the item, which may be the next item's first, and whether there is one.

        The row of the table that it needs is there.
        """
        last = block == self.last_block
        exists = jnp.logical_not(last) | (self.item + 1 < self.num_items)

        @pl.when(last & exists)
        def _():
            self._table_copy(self.item + 1).wait()

        next_item = jnp.where(last & exists, self.item + 1, self.item)
        first_block = lax.div(self.items.key_start[next_item], self.sizes.block_kv)
        return Block(next_item, jnp.where(last, first_block, block + 1)), exists

    def whole(self, block: Block):
        """Whether keys are needed from every run of a block."""
        return self._needed(block)[2]

    def start(self, block: Block, slot):
        """Starts the copies of what is needed of a block."""
        start, end, _ = self._needed(block)
        copy = self.copier(block, slot)
        rest = end - lax.rem(jnp.maximum(end - start, 0), COPIES_AT_ONCE)

        @pl.loop(start, rest, step=COPIES_AT_ONCE)
        def _(at):
            for i in range(COPIES_AT_ONCE):
                copy(at, i)

        pl.loop(rest, end)(copy)

    def copier(self, block: Block, slot):
        """Starts to copy a block's scales. Returns the function that starts to copy run `at + i` of it.

        `i` is static, and `at` is added up but once. So are the pool and the first head.
        """
        for copy in self._scale_copies(block, slot):
            copy.start()
        runs_per_page, sem = self.sizes.runs_per_page, self.buffers.page_sems.at[slot]
        first = block.number * self.sizes.runs_per_block
        table = self._table_slot(block.item)[0]
        before_heads = (slice(None),) if self.pages_first else ()
        streams = [
            (pages.at[(pool[block.item], *before_heads, heads)], buffer.at[slot])
            for pages, heads, buffer, pool in self.streams
        ]

        def start(at, i=0):
            if runs_per_page == 1:
                page, run = self.buffers.table[(table + first + at) + i], 0
            else:
                number = first + at + i
                page, run = self.buffers.table[table + lax.div(number, runs_per_page)], lax.rem(number, runs_per_page)
            for pages, buffer in streams:
                there = pages.at[page, :, run] if self.pages_first else pages.at[:, page * runs_per_page + run]
                pltpu.make_async_copy(there, buffer.at[:, self.sizes.slots_of_run(at + i)], sem).start()

        return start

    def wait(self, block, slot):
        """Waits for what was started of a block of the item."""
        start, end, whole = self._needed(Block(self.item, block))
        for copy in self._scale_copies(Block(self.item, block), slot):
            copy.wait()

        def wait(slots):  # a copy of the same size stands for the ones that were started
            for buffer in (self.buffers.keys, self.buffers.values):
                if buffer is not None:
                    there = buffer.at[slot, :, slots]
                    pltpu.make_async_copy(there, there, self.buffers.page_sems.at[slot]).wait()

        def wait_for_runs():
            pl.loop(start, end)(lambda run: wait(self.sizes.slots_of_run(run)))

        pl.when(whole)(lambda: wait(slice(None)))
        pl.when(jnp.logical_not(whole))(wait_for_runs)

    def _needed(self, block: Block):
        """Which of a block's runs hold needed keys, as [start, end), and whether that is all of them."""
        first, runs = block.number * self.sizes.runs_per_block, self.sizes.runs_per_block
        start = jnp.maximum(lax.div(self.items.key_start[block.item], self.sizes.run) - first, 0)
        end = jnp.minimum(pl.cdiv(self.items.key_end[block.item], self.sizes.run) - first, runs)
        return start, end, (start == 0) & (end == runs)

    def _scale_copies(self, block: Block, slot):
        """The copies of the scales of a block's slots."""
        chunks = self.sizes.chunks_per_block
        for array, buffer in self.scales:
            of_block = array.at[self.items.seq[block.item], :, pl.ds(block.number * chunks, chunks)]
            yield pltpu.make_async_copy(of_block, buffer.at[slot], self.buffers.page_sems.at[slot])

    def _table_slot(self, item):
        width = self.pages.table.shape[-1]
        return pl.multiple_of(lax.rem(item, 2) * width, LANES), width

    def _table_copy(self, item):
        slot = self.buffers.table.at[pl.ds(*self._table_slot(item))]
        sem = self.buffers.table_sems.at[lax.rem(item, 2)]
        return pltpu.make_async_copy(self.pages.table.at[self.items.seq[item], 0], slot, sem)


def pages_of(call: Call, sizes: Sizes) -> Pages:
    """The arrays that a kernel is given to fetch from."""
    sequences, width, held = call.sequences, call.problem.pages_per_seq, Held.by(call)

    def in_runs(pages):
        if pages is None:
            return None
        runs, problem = (sizes.run, pages.shape[-1]), call.problem
        if held.pages_first:  # heads of keys and values as one dimension
            return pages.reshape(pages.shape[0], problem.num_pages, -1, sizes.runs_per_page, *runs)
        return pages.reshape(pages.shape[0], -1, problem.num_pages * sizes.runs_per_page, *runs)

    table = jnp.pad(sequences.page_indices, ((0, 0), (0, -width % LANES)))[:, None]
    scales = [_gathered(call, name, sizes) if name in held.slots_scaled else None for name in ("key", "value")]
    return Pages(in_runs(call.key_pages), in_runs(call.value_pages), table, *scales)


def scales_of(call: Call) -> dict[str, Array]:
    """The scales of heads that a call has, by "key" and "value", as a kernel takes them."""

    def of_heads(scale):
        by_pool = scale.reshape(scale.shape[0], -1)
        return jnp.broadcast_to(by_pool, (scale.shape[0], call.problem.cache_kv_heads)).reshape(-1)

    scales = _scales(call)
    return {name: of_heads(scales[name]) for name in Held.by(call).scaled}


def _scales(call: Call) -> dict[str, Array]:
    """The scales of a call by what they are of, "key" and "value"; those of slots with values apart from keys."""
    key_scale, value_scale = call.key_scale, call.value_scale
    if "latent" in call.problem.features:
        value_scale = key_scale
    elif call.problem.layout.combined and key_scale is not None and key_scale.ndim > 2:
        key_scale, value_scale = jnp.unstack(key_scale, axis=1 + call.problem.layout.apart.index("2"))
    return {name: x for name, x in (("key", key_scale), ("value", value_scale)) if x is not None}


def _gathered(call: Call, name: str, sizes: Sizes) -> Float[Array, "seqs kv_heads chunks 1 chunk"]:
    """The scales of each slot of the sequences' pages, in the order of their keys, of the heads that are attended to."""
    problem, sequences = call.problem, call.sequences
    dims = [dim for dim in problem.layout.apart if dim in ("kv_heads", "num_pages", "page_size")]
    pages = sequences.page_indices[:, : problem.columns]
    at = (sequences.pool[:, None], *(pages if dim == "num_pages" else slice(None) for dim in dims))
    scales = _scales(call)[name].at[at].get(mode="promise_in_bounds")  # [seqs, pages, cache_kv_heads, page_size]
    scales = lax.dynamic_slice_in_dim(scales, call.kv_head_start, problem.num_kv_heads, axis=2)
    scales = scales.swapaxes(1, 2).reshape(problem.seqs, problem.num_kv_heads, -1)
    scales = jnp.pad(scales, ((0, 0), (0, 0), (0, -scales.shape[2] % (sizes.chunk * sizes.chunks_per_block))))
    return scales.reshape(problem.seqs, problem.num_kv_heads, -1, 1, sizes.chunk)


def in_hbm(pages: Pages):
    """The block specs of the arrays in `pages`, which a kernel fetches from by itself."""
    return [pl.BlockSpec(memory_space=pltpu.HBM) for array in pages if array is not None]


def buffers_of(problem: Problem, held: Held, sizes: Sizes, heads: int) -> Buffers:
    """The buffers for so many KV heads."""

    def scales(name):
        shape = (2, heads, sizes.chunks_per_block, 1, sizes.chunk)
        return pltpu.VMEM(shape, jnp.float32) if name in held.slots_scaled else None

    def buffer(features):
        return pltpu.VMEM((2, heads, sizes.block_kv, features), jnp.dtype(problem.cache_dtype))

    return Buffers(
        keys=buffer(problem.head_dim),
        values=None if held.latent else buffer(problem.value_dim),
        key_scales=scales("key"),
        value_scales=scales("value"),
        table=pltpu.SMEM((2 * round_up(problem.pages_per_seq, LANES),), jnp.int32),
        slot=pltpu.SMEM((1,), jnp.int32),
        page_sems=pltpu.SemaphoreType.DMA((2,)),
        table_sems=pltpu.SemaphoreType.DMA((2,)),
    )


def vmem_bytes(problem: Problem, sizes: Sizes) -> int:
    """VMEM that the buffers of all KV heads take."""
    value_dim = 0 if "latent" in problem.features else problem.value_dim
    features = round_up(problem.head_dim, LANES) + round_up(value_dim, LANES)
    of_head_bytes = features * jnp.dtype(problem.cache_dtype).itemsize * sizes.block_kv
    if "slot_scales" in problem.features:
        of_head_bytes += 2 * 4 * sizes.chunks_per_block * round_up(sizes.chunk, LANES)
    return 2 * problem.num_kv_heads * of_head_bytes
