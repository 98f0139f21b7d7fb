"""Everything static about a launch of the Hopper kernel, and what follows from it."""

from dataclasses import dataclass
import functools
import math

from paged_prefill.lowering.mosaic_gpu.hopper.operations import COLUMNS
from paged_prefill.lowering.mosaic_gpu.hopper.soft_cap import Polynomial, polynomial
from paged_prefill.lowering.tiles import Slabs, Tiles

WARPGROUP_ROWS = 64  # rows of a wgmma
LOG2_E = math.log2(math.e)
# How small and large a fixed maximum may make weights, as exponents of 2: bfloat16 has all its bits down to -126, and
# products of weights up to 2^40 with values up to 1e20 have finite sums in float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = -110.0, 40.0


@dataclass(frozen=True)
class Plan:
    """Everything static about a launch."""

    cores: int  # as many blocks are launched at most: any other number is right too, and less balanced
    group: int  # query heads of a KV head
    num_kv_heads: int
    seqs_of_pack: int  # which share their sinks
    head_dim: int
    value_dim: int
    page_size: int
    tokens: int
    tiles: int
    pages_per_seq: int
    head_rows: int  # in a cache as a matrix of rows, from one head to the next; likewise of pages, slots,
    page_rows: int
    slot_rows: int
    value_rows: int  # and from a key to its value, where they lie in one array
    block_q: int
    block_kv: int
    warpgroups: int
    stages: int
    splits: int
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    has_ranges: bool  # each row says which keys it sees
    tree_words: int  # of 32 new tokens each, of which a row says which it sees; 0 where it sees all
    dtype: str

    @property
    def q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def rows(self) -> int:
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def heads(self) -> int:
        """Query heads of a tile."""
        return self.rows // self.block_q

    @property
    def head_tiles_per_group(self) -> int:
        return -(-self.group // self.heads)

    @property
    def head_tiles(self) -> int:
        return self.num_kv_heads * self.head_tiles_per_group

    @property
    def pieces(self) -> int:
        return self.tiles * self.splits * self.head_tiles

    @property
    def query_parts(self) -> int:
        """Parts of 64 columns, a swizzled row each."""
        return self.head_dim // COLUMNS

    @property
    def takes_turns(self) -> bool:
        """Two warpgroups are faster in turns, three without, and two without where a polynomial makes a step short."""
        return self.warpgroups == 2 and self.polynomial is None

    @property
    def rounds_late(self) -> bool:
        """Whether a thread has registers for logits and weights in 32 bits, beside the output and the last weights."""
        needed = self.value_dim // 2 + self.block_kv + self.block_kv // 4
        return self.warpgroups < 3 and needed <= 200  # of 240, and 255 for one warpgroup

    @property
    def fixed_maximum(self) -> float | None:
        """What stands for every row's maximum, in units of the soft cap, where capped logits allow one for all."""
        if self.soft_cap is None or self.dtype != "bfloat16":
            return None
        largest = self.soft_cap * LOG2_E
        maximum = min(largest, -SMALLEST_WEIGHT - largest)
        return maximum / largest if largest - maximum <= LARGEST_WEIGHT else None

    @functools.cached_property
    def polynomial(self) -> Polynomial | None:
        """What stands for tanh where logits are small."""
        if self.fixed_maximum is None:
            return None
        return polynomial(self.softmax_scale, self.soft_cap, self.fixed_maximum)

    @property
    def masks_any_block(self) -> bool:
        """And not only those at the ends of what a tile's rows see."""
        return self.has_ranges or self.tree_words > 0

    @property
    def begins_late(self) -> bool:
        """Whether rows may not see the first keys of their sequence."""
        return self.has_ranges or self.window is not None

    @property
    def run(self) -> int:
        """Keys of one copy: they lie together, in one page."""
        return min(self.page_size, self.block_kv)

    @property
    def slab(self) -> int:
        """Rows of a warpgroup that belong to one head, and lie together in the query."""
        return min(self.block_q, WARPGROUP_ROWS)

    @property
    def slabs(self) -> int:
        """Slabs of a tile's tokens. Where there are several, a warpgroup has one, and may see less than the tile.

        Warpgroups that take turns go through the tile's blocks together, and so its tokens are one slab.
        """
        return 1 if self.takes_turns else self.block_q // self.slab

    @property
    def slab_tokens(self) -> int:
        return self.block_q // self.slabs

    @property
    def columns(self) -> int:
        """Numbers of a row of the table that describes the tiles."""
        return len(Tiles._fields) + len(Slabs._fields) * self.slabs
