"""How the TPU kernel cuts the work of a pack: its sizes, and the list of items that the grid walks over.

The tokens of a pack are cut into tiles of `block_q`, wherever its sequences start and end, so that every tile is
aligned and the kernel's grid can fetch it as a block. An item is the part of one sequence inside one tile. Items are in
the order of the tokens, so a tile's items follow one another, and so do a sequence's. They are made by plain XLA
operations before the kernel starts.
"""

from typing import NamedTuple

from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged_prefill.lowering.call import Call, Problem, Sequences
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.packing import MAX_CONTEXT

LANES, SUBLANES = 128, 8  # of a register of 32 bits
CHUNK = 512  # keys of one matrix product
ROWS = 512  # rows of one matrix product: few would leave the matrix unit waiting for its weights
LOGIT_ROWS = 256  # rows whose logits one product computes: more would hold up registers that the values need
DEPTH = 256  # keys whose weighted values one product adds up
DECODE_KEYS = 16384  # keys that a step of decoding takes, over its KV heads and chunks
PRODUCTS_AT_ONCE = 2  # pairs of products in one step, each with a buffer of its own so that they overlap


class Sizes(NamedTuple):
    """A configuration made to fit the tiling of the chip and the pages of a cache.

    A page longer than a chunk is treated as `runs_per_page` pages of `run` slots each.
    """

    part: int  # tokens of one matrix product
    parts: int  # parts of a tile
    run: int
    runs_per_page: int
    runs_per_chunk: int
    chunks_per_block: int

    @property
    def block_q(self) -> int:
        """Tokens of a tile."""
        return self.part * self.parts

    @property
    def chunk(self) -> int:
        """Keys of one matrix product."""
        return self.run * self.runs_per_chunk

    @property
    def block_kv(self) -> int:
        """Keys of a block."""
        return self.chunk * self.chunks_per_block

    @property
    def runs_per_block(self) -> int:
        """Runs of a block."""
        return self.runs_per_chunk * self.chunks_per_block

    def slots_of_run(self, run):
        """Where the slots of a block's run lie among the block's keys."""
        return pl.ds(pl.multiple_of(run * self.run, self.run), self.run)

    def keys_of_chunk(self, chunk, first: int, keys: int):
        """Where so many of a chunk's keys, from its first-th on, lie among the block's."""
        return pl.ds(pl.multiple_of(chunk * self.chunk, self.chunk) + first, keys)

    @property
    def whole_chunk(self) -> slice:
        """All keys of a chunk."""
        return slice(0, self.chunk)

    @property
    def chunk_is_cut(self) -> bool:
        """Whether a masked product may take a part of a chunk's keys."""
        return self.chunk > DEPTH and self.chunk % LANES == 0

    def keys_up_to(self, keys: int) -> list[slice]:
        """Those of a chunk that rows of each part see at most, where the last row sees the first `keys`.

        In whole registers, like the next.
        """
        tokens_behind = range((self.parts - 1) * self.part, -1, -self.part)
        return [slice(0, max(keys - tokens // LANES * LANES, LANES)) for tokens in tokens_behind]

    def keys_in_window(self) -> list[slice]:
        """Those of a chunk that rows of each part see at most, where the window of the first row starts in it."""
        tokens_before = range(0, self.block_q, self.part)
        return [slice(min(tokens // LANES * LANES, self.chunk - LANES), self.chunk) for tokens in tokens_before]

    def heads_at_once(self, kv_heads: int) -> int:
        """KV heads of one step over the whole tile."""
        return largest_divisor(kv_heads, max(PRODUCTS_AT_ONCE // self.parts, 1))


def sizes_of(config: PrefillPageAttentionConfig, problem: Problem) -> Sizes:
    """Rounds block_q up to whole parts, and block_kv to whole chunks of whole pages.

    Runs fill native tiles of the caches, or several fill one.
    """
    packing, tile, page_size = sublanes(problem.dtype), sublanes(problem.cache_dtype), problem.page_size
    part = min(round_up(config.block_q, packing), max(power_of_2_up_to(ROWS // problem.group), packing))
    chunk = max(packing, round_up(min(CHUNK, config.block_kv), tile))
    runs = [r for r in range(packing, page_size + 1, packing) if page_size % r == 0 and (r % tile == 0 or tile % r == 0)]
    run = max(r for r in runs if r <= chunk)
    runs_per_chunk = chunk // run
    return Sizes(
        part=part,
        parts=-(-config.block_q // part),
        run=run,
        runs_per_page=page_size // run,
        runs_per_chunk=runs_per_chunk,
        chunks_per_block=max(1, config.block_kv // (runs_per_chunk * run)),
    )


def sublanes(dtype) -> int:
    """Rows of the chip's native tile: 8 of 32 bits, 16 of 16 bits, 32 of 8 bits."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def power_of_2_up_to(x: int) -> int:
    """The largest power of 2 that is at most x, and at least 1."""
    return 1 << (max(x, 1).bit_length() - 1)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


class Items(NamedTuple):
    """The items of a pack, all int32 [items]; those from the count of items on are empty.

    Attributes:
      tile: which tile of `block_q` tokens; `first_token` where it starts in the pack.
      seq: which sequence; `pool` its pool, `key_pool` and `value_pool` where these are of their own.
      row_start, row_end: the item's rows within the tile.
      position: where row 0 of the tile would stand in the sequence (negative where the sequence starts later).
      first_new: where the sequence's first new token stands.
      key_start, key_end: no row sees a key outside; both 0 where none sees any.
      whole_start, whole_end: every row sees the keys within.
    """

    tile: Int[Array, " items"]
    first_token: Int[Array, " items"]
    seq: Int[Array, " items"]
    pool: Int[Array, " items"]
    key_pool: Int[Array, " items"]
    value_pool: Int[Array, " items"]
    row_start: Int[Array, " items"]
    row_end: Int[Array, " items"]
    position: Int[Array, " items"]
    first_new: Int[Array, " items"]
    key_start: Int[Array, " items"]
    key_end: Int[Array, " items"]
    whole_start: Int[Array, " items"]
    whole_end: Int[Array, " items"]


def pools_of(call: Call, seq) -> dict[str, Int[Array, " items"]]:
    """The pools of items by the name that they have there."""
    pool = call.sequences.pool
    pools = dict(pool=pool, key_pool=call.key_pool, value_pool=call.value_pool)
    return {name: (pool if x is None else x)[seq] for name, x in pools.items()}


def seen_by_rows(call: Call) -> Int[Array, "tokens 2"]:
    """The keys lo <= j < hi that each token sees, but for a tree; none where no sequence owns it."""
    sequences, problem = call.sequences, call.problem
    token = jnp.arange(problem.tokens, dtype=jnp.int32)
    seq, owned = owners(sequences, problem.tokens)
    context_len = sequences.context_len[seq]
    if call.ranges is None:
        lo, hi = problem.attention.visible_keys(context_len - sequences.length[seq] + token - sequences.start[seq])
    else:
        lo, hi = jnp.maximum(call.ranges[:, 0], 0), jnp.minimum(call.ranges[:, 1], context_len)
    hi = jnp.minimum(hi, problem.capacity)
    sees = owned & (lo < hi)
    return jnp.stack([jnp.where(sees, lo, 0), jnp.where(sees, hi, 0)], axis=1)


def max_items(tokens: int, seqs: int, block_q: int) -> int:
    """The most items that a pack can have: each tile has one, and each further sequence in a tile one more."""
    return min(-(-tokens // block_q) + seqs, tokens)


def first_row(call: Call, block_q: int):
    """Where tiles start: at the first sequence of several new tokens, which may stand behind others of one token.

    In whole registers, and at most a tile from the pack's start.
    """
    sequences, packing = call.sequences, sublanes(call.problem.dtype)
    first = jnp.min(jnp.where(sequences.length > 1, sequences.start, call.problem.tokens))
    return first % block_q // packing * packing


def work_items(call: Call, block_q: int, first_row):
    """Returns (Items, count) for sequences of more than one new token, in tiles from a row on."""
    sequences, problem = call.sequences, call.problem
    start, length, context_len = sequences.start, sequences.length, sequences.context_len
    first_tile = (start - first_row) // block_q
    per_sequence = jnp.where(length > 1, (start + length - 1 - first_row) // block_q - first_tile + 1, 0)
    ends = jnp.cumsum(per_sequence, dtype=jnp.int32)

    item = jnp.arange(max_items(problem.tokens, start.size, block_q), dtype=jnp.int32)
    exists = item < ends[-1]
    seq = jnp.minimum(jnp.searchsorted(ends, item, side="right").astype(jnp.int32), start.size - 1)
    tile = jnp.where(exists, first_tile[seq] + item - (ends[seq] - per_sequence[seq]), 0)
    base = first_row + tile * block_q
    row_start = jnp.maximum(start[seq] - base, 0)
    row_end = jnp.minimum(start[seq] + length[seq] - base, block_q)
    first_new = context_len[seq] - length[seq]
    position = first_new - (start[seq] - base)
    if call.ranges is None:  # both ends grow with the row: the first and the last say it for all
        first = problem.attention.visible_keys(position + row_start)
        last = problem.attention.visible_keys(position + row_end - 1)
        key_start, key_end, whole_start, whole_end = first[0], last[1], last[0], first[1]
    else:
        row = jnp.arange(block_q, dtype=jnp.int32)[None]
        lo, hi = jnp.moveaxis(seen_by_rows(call)[jnp.minimum(base[:, None] + row, problem.tokens - 1)], -1, 0)
        mine = (row >= row_start[:, None]) & (row < row_end[:, None])
        key_start = jnp.min(jnp.where(mine & (lo < hi), lo, MAX_CONTEXT), axis=1)
        key_end = jnp.max(jnp.where(mine, hi, 0), axis=1)
        whole_start = jnp.max(jnp.where(mine, lo, 0), axis=1)
        whole_end = jnp.min(jnp.where(mine, hi, MAX_CONTEXT), axis=1)
    if call.tree is not None:
        whole_end = jnp.minimum(whole_end, first_new)
    key_end, whole_end = (jnp.minimum(x, problem.capacity) for x in (key_end, whole_end))
    sees = exists & (key_end > key_start)
    items = Items(
        tile=tile,
        first_token=base,
        seq=seq,
        **pools_of(call, seq),
        row_start=jnp.where(exists, row_start, 0),
        row_end=jnp.where(exists, row_end, 0),
        position=position,
        first_new=first_new,
        key_start=jnp.where(sees, key_start, 0),
        key_end=jnp.where(sees, key_end, 0),
        whole_start=whole_start,
        whole_end=whole_end,
    )
    return items, ends[-1]


def owners(sequences: Sequences, tokens: int):
    """The sequence of each token, and whether it is owned by it: int32 and bool [tokens]."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    ends = sequences.start + sequences.length
    seq = jnp.minimum(jnp.searchsorted(ends, token, side="right"), ends.size - 1).astype(jnp.int32)
    return seq, (sequences.start[seq] <= token) & (token < ends[seq])
