"""The kernel that writes new tokens into their pages on Hopper: a thread moves 16 bytes of a token's keys, and of its
values.

A block finds the sequence that owns its token, and its slot, from the index arrays as users give them, so that nothing
runs before it. A token without a slot is not stored; nothing else of the caches is touched.
"""

from dataclasses import dataclass
import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper import threads
from paged_prefill.primitive.packing import harmless_contexts

THREADS = 128
CHUNK_BYTES = 16  # that a thread moves
UNROLLED = 32  # sequences that are looked at without waiting for one another


@dataclass(frozen=True)
class Launch:
    """Everything static about a launch. A cache is a matrix of rows of features; `*_rows` are strides in such rows."""

    packs: int
    packs_of_pool: int
    tokens: int  # of a pack
    seqs: int  # of a pack
    pages_per_seq: int
    layers: int | None  # of each pool; None without the operand `layer`
    kv_heads: int
    num_pages: int
    page_size: int
    pool_rows: int
    head_rows: int
    page_rows: int
    slot_rows: int
    value_rows: int | None  # from a key to its value, where one array holds both

    def chunks(self, array) -> int:
        """In a token of all heads, of which `array` holds rows."""
        return self.kv_heads * array.shape[-1] // chunk(array)


def chunk(array) -> int:
    """Elements that a thread moves."""
    return CHUNK_BYTES // jnp.dtype(array.dtype).itemsize


def append(launch: Launch, indices, new, caches):
    """Writes `new` keys and maybe values [rows, features] into `caches` [rows, features], which are given back.

    `indices` are context_lens, page_indices, query_offsets, and maybe layer, each in one dimension.
    """
    blocks_of_token = max(-(-launch.chunks(array) // THREADS) for array in new)
    kernel = plgpu.kernel(
        functools.partial(write_chunks, launch, threads, lambda: [lax.axis_index(axis) for axis in ("token", "share")]),
        out_type=(),
        grid=(launch.packs * launch.tokens, blocks_of_token),
        grid_names=("token", "share"),
        num_threads=THREADS // 128,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="append_to_pages",
    )
    run = compat.takes_references(kernel)
    return pl.run_state(lambda caches: run(indices, new, caches))(caches)


def write_chunks(launch: Launch, threads, block, indices, new, caches):
    """What a thread does.

    `threads` has the words for it, `block()` is (the token of all packs, the share of its chunks).
    """
    token, share = block()
    number = share * THREADS + threads.number()
    # What is written is on its way while its place is being found.
    moved = []
    for i, array in enumerate(new):
        size, chunks = chunk(array), launch.chunks(array)
        within = jnp.minimum(number, chunks - 1)
        chunks_of_head = chunks // launch.kv_heads
        head, column = lax.div(within, chunks_of_head), lax.rem(within, chunks_of_head) * size
        words = threads.load_words(array, token * launch.kv_heads + head, column, CHUNK_BYTES // 4)
        cache, beside = (caches[0], i * launch.value_rows) if launch.value_rows else (caches[i], 0)
        moved.append((words, cache, head * launch.head_rows + beside, column, number < chunks))
    row, exists = _row_of(launch, token, *indices)
    for words, cache, of_head, column, here in moved:
        threads.store_words(words, cache, row + of_head, column, here & exists)


def _row_of(launch: Launch, token, contexts, pages, offsets, layer=None):
    """The row of a token's first head in a cache, and whether it has one."""
    pack, token = lax.div(token, launch.tokens), lax.rem(token, launch.tokens)
    seq, end, context = _owner(launch, token, pack, contexts, offsets)
    owned = (seq >= 0) & (seq < launch.seqs)
    position = harmless_contexts(context) - jnp.minimum(end, launch.tokens) + token
    column = lax.div(jnp.maximum(position, 0), launch.page_size)
    exists = owned & (position >= 0) & (column < launch.pages_per_seq)
    place = (pack * launch.seqs + seq) * launch.pages_per_seq + column
    page = pages[jnp.where(exists, place, 0)]
    exists &= (page >= 0) & (page < launch.num_pages)
    pool = lax.div(pack, launch.packs_of_pool)
    if layer is not None:
        pool = pool * launch.layers + jnp.clip(layer[pack], 0, launch.layers - 1)
    slot = lax.rem(jnp.maximum(position, 0), launch.page_size)
    row = pool * launch.pool_rows + jnp.where(exists, page, 0) * launch.page_rows + slot * launch.slot_rows
    return row, exists


def _owner(launch: Launch, token, pack, contexts, offsets):
    """The sequence that a token of a pack belongs to, its end and its context; -1 or `seqs` where none owns it.

    The first offset past a token ends its sequence, whatever lies behind: offsets may not decrease. What there is to
    know of sequences is read with the offsets, so that nothing but the page waits for it.
    """
    none = jnp.int32(launch.seqs), jnp.int32(0), jnp.int32(0)

    def look(i, found):
        seq, end, context = found
        for j in range(UNROLLED) if launch.seqs >= UNROLLED else range(launch.seqs + 1):
            last = jnp.minimum(i * UNROLLED + j, launch.seqs)  # the number of an offset
            offset = offsets[pack * (launch.seqs + 1) + last]
            its_context = contexts[pack * launch.seqs + jnp.maximum(last - 1, 0)]
            here = (seq == launch.seqs) & (offset > token)
            seq, end, context = (
                jnp.where(here, mine, other) for mine, other in zip((last - 1, offset, its_context), (seq, end, context))
            )
        return seq, end, context

    return lax.fori_loop(0, -(-(launch.seqs + 1) // UNROLLED), look, none)
