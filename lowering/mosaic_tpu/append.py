"""`append_to_pages` on TPU: a Pallas kernel that writes into the caches where they are.

XLA's scatter wants some caches in a layout of its own, and then copies them whole. Here both caches are aliased, in the
row-major layout that the attention reads, and nothing is touched but what is written. The chip moves whole tiles of
`rows` slots, as many as share a register: an item is one such tile of one sequence's pages. It is copied to VMEM, its
new rows are put in, bits of rows side by side in words of 32 bits as the chip packs them, and it is copied back. Several
items are under way at once; where two near each other are the same tile, all go one after the other.

What is written is made beforehand: quantised, as words that hold a row's bits as often as they fit.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged_prefill.lowering.call import Device, pool_of_packs
from paged_prefill.lowering.mosaic_tpu.chips import SMEM_BYTES, kind_reason, vmem_budget
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, SUBLANES, round_up, sublanes
from paged_prefill.lowering.writer import Writer
from paged_prefill.lowering.xla import append as xla
from paged_prefill.primitive.layout import OWN_LAYOUT
from paged_prefill.primitive.operands import CACHES
from paged_prefill.primitive.packing import harmless_contexts, harmless_offsets

MOST_AHEAD = 4  # items that are read before their turn; as many are still written after it


class Items(NamedTuple):
    """The tiles to write, all int32 [items]; those from the count on are empty.

    Attributes:
      pool, page: where.
      slot: the tile's first slot in the page.
      token: the token of the tile's first row, counted from `rows` before the first; it may be another sequence's.
      row_start, row_end: the rows that are written; none where there is no such page.
    """

    pool: Int[Array, " items"]
    page: Int[Array, " items"]
    slot: Int[Array, " items"]
    token: Int[Array, " items"]
    row_start: Int[Array, " items"]
    row_end: Int[Array, " items"]


class MosaicTpuWriter(Writer):
    """Takes pages that are whole tiles of the chip, on v4 and later."""

    name = "mosaic_tpu"
    platforms = ("tpu",)

    def _reason_against(self, operands, device, layout):
        if reason := kind_reason(device):
            return reason
        if layout != OWN_LAYOUT:
            return f"it writes cache_layout={OWN_LAYOUT.name!r}, not {layout.name!r}"
        caches = [operands[name] for name in CACHES if name in operands]
        dtype, page_size = caches[0].dtype, caches[0].shape[-2]
        if dtype.name == "float16":
            return "Mosaic has no float16"
        if dtype != caches[-1].dtype:
            return f"it takes caches of one dtype, not {dtype.name} and {caches[-1].dtype.name}"
        if page_size % sublanes(dtype):
            return f"page_size {page_size} must be a multiple of {sublanes(dtype)} for {dtype.name}"
        if vmem_bytes(caches, 1) > vmem_budget(device) // 2:
            return f"tiles of {caches[0].shape[-4]} KV heads need more than half of {vmem_budget(device)} bytes of VMEM"
        seqs, tokens = math.prod(operands["context_lens"].shape), math.prod(operands["key"].shape[:-2])
        if 4 * len(Items._fields) * round_up(_most_items(tokens, seqs, sublanes(dtype)), LANES) > SMEM_BYTES:
            return f"the tiles of {tokens} tokens of {seqs} sequences are more than {SMEM_BYTES} bytes of SMEM hold"
        return None

    def write(self, operands, cache_batch_dims, device, layout=OWN_LAYOUT):
        """Leading dimensions are folded on the way in and out. Scales, which are small, are scattered by XLA."""
        stored = xla.stored(operands, cache_batch_dims, layout)
        caches = [name for name in stored if name in CACHES]
        key, key_cache = operands["key"], operands["key_cache"]
        lead, (tokens, heads) = key.shape[:-3], key.shape[-3:-1]
        if 0 in (*key.shape, *key_cache.shape, *operands["page_indices"].shape):
            return [operands[name] for name in stored]

        def of_packs(name):
            return operands[name].reshape(-1, *operands[name].shape[len(lead) :])

        written = append_to_pools(
            [x.into.reshape(-1, *x.into.shape[-4:]) for x in map(stored.get, caches)],
            [jnp.moveaxis(x.new, -3, -2).reshape(-1, tokens, heads, x.new.shape[-1]) for x in map(stored.get, caches)],
            *map(of_packs, ("context_lens", "page_indices", "query_offsets")),
            pool_of_packs(operands, lead, lead[:cache_batch_dims]).reshape(-1),
            device,
        )
        scales = {name: x for name, x in stored.items() if name not in CACHES}
        results = [x.reshape(operands[name].shape) for name, x in zip(caches, written, strict=True)]
        return [*results, *xla.scattered(scales, cache_batch_dims, layout).values()]


def vmem_bytes(caches, ahead: int) -> int:
    """VMEM that the buffers of 2 * ahead items take."""
    total = 0
    for cache in caches:
        rows, heads, features = sublanes(cache.dtype), cache.shape[-4], round_up(cache.shape[-1], LANES)
        total += rows * features * (heads * cache.dtype.itemsize + round_up(heads, SUBLANES) * 4)
    return 2 * ahead * total


def append_to_pools(caches, new, context_lens, page_indices, query_offsets, pool, device: Device):
    """The caches [pools, kv_heads, num_pages, page_size, features], all alike but for features, with what is written.

    `new` are the tokens [packs, tokens, kv_heads, features], in the dtype of the caches; the index arrays are those of
    the operation with one dimension `packs` in front, and `pool` [packs] the pool that a pack writes to.
    """
    rows = sublanes(caches[0].dtype)
    items, count = items_of(
        context_lens, page_indices, query_offsets, pool, tokens=new[0].shape[1], num_pages=caches[0].shape[2],
        page_size=caches[0].shape[3], rows=rows,
    )  # fmt: skip
    words = [_words(x.reshape(-1, *x.shape[2:]), rows) for x in new]
    ahead = max(n for n in range(1, MOST_AHEAD + 1) if n == 1 or vmem_bytes(caches, n) <= vmem_budget(device) // 2)
    alone = jnp.stack([count, met_again(items, 2 * ahead).astype(jnp.int32)])
    slots, heads = 2 * ahead, caches[0].shape[1]
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    first_cache = 1 + len(items) + len(words)
    return pl.pallas_call(
        functools.partial(kernel, streams=len(caches), ahead=ahead),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items),
            in_specs=[in_hbm] * 2 * len(caches),
            out_specs=[in_hbm] * len(caches),
            scratch_shapes=[
                *(pltpu.VMEM((slots, len(x), rows * heads, LANES), jnp.uint32) for x in words),
                *(pltpu.VMEM((slots, heads, rows, cache.shape[-1]), cache.dtype) for cache in caches),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SemaphoreType.DMA((slots,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches],
        input_output_aliases={first_cache + i: i for i in range(len(caches))},
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=max(2 * vmem_bytes(caches, ahead), 16 * 2**20),
            disable_bounds_checks=True,  # items that are not wholly inside have no rows
        ),
        name="append_to_pages",
    )(alone, *items, *words, *caches)


def items_of(
    context_lens, page_indices, query_offsets, pool, *, tokens: int, num_pages: int, page_size: int, rows: int
) -> tuple[Items, Int[Array, ""]]:
    """The items of packs, in the order of their tokens, and how many there are."""
    packs, seqs, pages_per_seq = page_indices.shape
    offsets = harmless_offsets(query_offsets, tokens)
    length = jnp.diff(offsets).reshape(-1)
    start = (offsets[:, :-1] + jnp.arange(packs, dtype=jnp.int32)[:, None] * tokens).reshape(-1)
    context = harmless_contexts(context_lens).reshape(-1)
    first = jnp.maximum(context - length, 0)
    capacity = jnp.minimum(jnp.int32(pages_per_seq), 2**31 // page_size - 1) * page_size
    end = jnp.minimum(context, capacity)
    tiles = jnp.where((length > 0) & (first < end), (end - 1) // rows - first // rows + 1, 0)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    item = jnp.arange(_most_items(packs * tokens, packs * seqs, rows), dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), packs * seqs - 1)
    tile = first[seq] // rows + item - (ends[seq] - tiles[seq])
    position = tile * rows
    column = jnp.clip(position // page_size, 0, pages_per_seq - 1)
    page = page_indices.reshape(-1, pages_per_seq)[seq, column]
    exists = (item < ends[-1]) & (page >= 0) & (page <= jax.core.min_dim(num_pages - 1, 2**31 - 1))
    row_start = jnp.clip(first[seq] - position, 0, rows)
    row_end = jnp.clip(end[seq] - position, 0, rows)
    items = Items(
        pool=jnp.broadcast_to(pool[:, None], (packs, seqs)).reshape(-1)[seq],
        page=jnp.where(exists, page, 0),
        slot=jnp.where(exists, position % page_size, 0),
        token=jnp.where(exists, start[seq] + position - (context[seq] - length[seq]) + rows, 0),
        row_start=jnp.where(exists, row_start, 0),
        row_end=jnp.where(exists, row_end, 0),
    )
    return items, ends[-1]


def met_again(items: Items, within: int) -> Bool[Array, ""]:
    """Whether two items that are less than so many apart write the same tile."""
    written = items.row_end > items.row_start
    same = jnp.bool_(False)
    for distance in range(1, min(within, written.size)):
        alike = written[distance:] & written[:-distance]
        for x in (items.pool, items.page, items.slot):
            alike &= x[distance:] == x[:-distance]
        same |= jnp.any(alike)
    return same


def kernel(counts, *refs, streams: int, ahead: int):
    """All items."""
    items = Items(*refs[: len(Items._fields)])
    refs = refs[len(Items._fields) :]
    words, caches, new, tiles = refs[:streams], refs[2 * streams : 3 * streams], *_halves(refs[3 * streams : -2])
    read_sems, write_sems = refs[-2:]
    count, slots = counts[0], 2 * ahead
    heads, rows = tiles[0].shape[1:3]

    def copies_in(item, slot):
        for stream in range(streams):
            window = words[stream].at[:, pl.ds(items.token[item] * heads, rows * heads)]
            yield pltpu.make_async_copy(window, new[stream].at[slot], read_sems.at[slot])
            yield pltpu.make_async_copy(place(stream, item), tiles[stream].at[slot], read_sems.at[slot])

    def copies_out(item, slot):
        for stream in range(streams):
            yield pltpu.make_async_copy(tiles[stream].at[slot], place(stream, item), write_sems.at[slot])

    def place(stream, item):
        first = pl.multiple_of(items.slot[item], rows)
        return caches[stream].at[items.pool[item], :, items.page[item], pl.ds(first, rows)]

    def each(copies, item, act):
        """Does it for the copies of an item, if that writes any row."""

        @pl.when(items.row_end[item] > items.row_start[item])
        def _():
            for copy in copies(item, lax.rem(item, slots)):
                act(copy)

    def start(copy):
        copy.start()

    def wait(copy):
        copy.wait()

    def put(item):
        each(copies_in, item, wait)
        for stream in range(streams):
            slot = lax.rem(item, slots)
            _put_rows(new[stream].at[slot], tiles[stream].at[slot], items.row_start[item], items.row_end[item])
        each(copies_out, item, start)

    def several_at_once():
        pl.loop(0, jnp.minimum(ahead, count))(lambda item: each(copies_in, item, start))

        @pl.loop(0, count)
        def _(item):
            following = item + ahead

            @pl.when(following < count)
            def _():
                pl.when(following >= slots)(lambda: each(copies_out, following - slots, wait))
                each(copies_in, following, start)

            put(item)

        pl.loop(jnp.maximum(count - slots, 0), count)(lambda item: each(copies_out, item, wait))

    @pl.when(counts[1] == 0)
    def _():
        several_at_once()

    @pl.when(counts[1] != 0)
    def one_by_one():
        @pl.loop(0, count)
        def _(item):
            each(copies_in, item, start)
            put(item)
            each(copies_out, item, wait)


def _put_rows(new_ref, tile_ref, row_start, row_end):
    """Puts rows row_start : row_end of `new_ref`, one of `_words`, into `tile_ref` [heads, rows, features]."""
    heads, rows, features = tile_ref.shape
    packing = rows // SUBLANES
    first_row = packing * lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
    bits = 32 // packing
    masks = [
        jnp.where(
            (first_row + i >= row_start) & (first_row + i < row_end),
            jnp.uint32((2**bits - 1) << i * bits),
            jnp.uint32(0),
        )
        for i in range(packing)
    ]
    keep = ~functools.reduce(jnp.bitwise_or, masks)
    for head in range(heads):
        for lane in range(0, features, LANES):
            lanes = pl.ds(lane, min(LANES, features - lane))
            word = pltpu.bitcast(tile_ref[head, :, lanes], jnp.uint32) & keep  # [SUBLANES, lanes]
            for i, mask in enumerate(masks):
                row = new_ref[lane // LANES, pl.ds(i * heads + head, SUBLANES, stride=packing * heads)]
                word |= row[:, : lanes.size] & mask
            tile_ref[head, :, lanes] = pltpu.bitcast(word, tile_ref.dtype)


def _words(new, rows: int):
    """Tokens [tokens, kv_heads, features] as uint32 [features / LANES, (rows + tokens + rows) * kv_heads, LANES].

    Each word holds a number's bits as often as they fit.
    """
    bits = 8 * new.dtype.itemsize
    words = lax.bitcast_convert_type(new, f"uint{bits}").astype(jnp.uint32)
    words = words * jnp.uint32(sum(1 << i for i in range(0, 32, bits)))
    words = jnp.pad(words, ((rows, rows), (0, 0), (0, -new.shape[-1] % LANES)))
    return words.reshape(-1, words.shape[-1] // LANES, LANES).swapaxes(0, 1)


def _halves(refs):
    return refs[: len(refs) // 2], refs[len(refs) // 2 :]


def _most_items(tokens: int, seqs: int, rows: int) -> int:
    """The most tiles that so many tokens lie in: a sequence has one at either end that is not full."""
    return min(tokens, tokens // rows + 2 * seqs)
