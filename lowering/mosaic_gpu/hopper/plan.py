"""Everything static about a launch of the Hopper kernel, and what follows from it. Its words are in __init__.py."""

from dataclasses import dataclass
import functools
import math

from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.registers import GATHERING_REGISTERS, REGISTERS, WIDE_REGISTERS, Registers
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import COLUMNS, columns_of, lie_apart
from paged_prefill.lowering.mosaic_gpu.hopper.soft_cap import Polynomial, polynomial
from paged_prefill.lowering.tiles import Parts, Slabs, Tiles

WARPGROUP_ROWS, WARPGROUP_THREADS = 64, 128  # rows of a wgmma, and threads that compute it
WARP_LANES, MATES = 32, 2  # lanes of a warp, and thread blocks that copy keys for one another (mates.py)
FEW_TOKENS = 8  # of a tile, on average: with fewer they are no prompts
WARPGROUP_COLUMNS = 256  # of an output of so many rows, at most, that the registers of a warpgroup have room for
MOST_WIDENED_KEYS = 8192  # of a sequence over a widened cache, up to which pieces are a chain
TILE_COLUMNS = len(Tiles._fields) - 1  # of the table: what slabs see follows
LOG2_E = math.log2(math.e)
# How small and large a fixed maximum may make weights, as exponents of 2: bfloat16 has all its bits down to -126, and
# products of weights up to 2^40 with values up to 1e20 have finite sums in float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = -110.0, 40.0


def is_wide(head_dim: int, value_dim: int, latent: bool) -> bool:
    """Whether two warpgroups share rows, and each computes one half of their output's columns.

    They share blocks of keys too (wide.py), or take them by turns (alternate.py). Few rows of a latent cache are one's.
    """
    return latent or max(head_dim, value_dim) > WARPGROUP_COLUMNS


def reads_bytes(quantised: bool, few_rows: bool, latent: bool) -> bool:
    """Whether products of few rows widen the keys and values of a quantised cache in registers (few_bytes.py)."""
    return quantised and few_rows and not latent


def value_stages(stages: int, head_dim: int, value_dim: int) -> int:
    """Of few rows, of so many of keys: of wide heads one less, so that two blocks are on their way beside products."""
    return max(stages - is_wide(head_dim, value_dim, False), 1)


MOST_ARRIVING = 3  # parts of latent keys that are waited for together
FP8_SLOTS = 4  # blocks of transposed values that lie ready for products in 8 bits


def widened(block_kv: int, features: int, wide: bool) -> int:
    """Blocks of a quantised cache in 16 bits: one for the products, one that is widened, and a third if they are small.

    Without it, the values of a block have their place only from when all warpgroups are done with those of the last but
    one, until the first of them needs them. Of wide heads there is room for the keys of one block, and then its values.
    """
    if wide:
        return 1
    return 3 if block_kv * features <= 64 * 256 else 2


def are_gathered(page: int, block: int) -> bool:
    """Whether keys are copied one by one (gather.py): a page is no whole part of a block, and no block of a page."""
    return page % 8 > 0 or (block % page > 0 and page % block > 0)


@dataclass(frozen=True)
class Plan:
    """Everything static about a launch."""

    cores: int  # as many blocks are launched at most: any other number is right too, and less balanced
    group: int  # query heads of a KV head
    num_kv_heads: int
    cache_kv_heads: int  # of which this call reads some
    seqs_of_pack: int  # which share their sinks
    seqs_of_pool: int  # that have one entry among the pools
    head_dim: int
    value_dim: int
    page_size: int
    tokens: int
    tiles: int
    num_pages: int
    pages_per_seq: int
    pools: int
    pool_rows: int  # in a cache as a matrix of rows, from one pool to the next; likewise of heads, pages, slots,
    head_rows: int
    page_rows: int
    slot_rows: int
    value_rows: int  # and from a key to its value, where they lie in one array
    rows: int  # of a tile, a head and a token each
    block_q: int
    block_kv: int
    warpgroups: int  # that compute a tile
    teams: int  # tiles that a thread block goes through side by side, each a team of its own
    stages: int
    parts: Parts  # of a tile's keys
    clusters: bool  # of the blocks that have a tile's parts, one each: they merge them in shared memory (cluster.py)
    last_merges: bool  # whether a tile's parts are merged where the last of them ends (last_part.py, pairs.py)
    exchanges_in_blocks: bool  # where keys and values were, since there is no room beside them
    softmax_scale: float
    soft_cap: float | None
    window: int | None
    has_ranges: bool  # each row says which keys it sees
    tree_words: int  # of 32 new tokens each, of which a row says which it sees; 0 where it sees all
    latent: bool  # the first value_dim features of a key are its value
    dtype: str
    cache_dtype: str  # another one in a quantised cache
    key_scale: str | None  # one for a "tensor", a "head" or a "slot"
    value_scale: str | None
    fp8_terms: int  # whose sum is a query, where products are of 8 bits; 0 where caches are widened
    mates: bool  # whether two thread blocks copy keys for one another (mates.py)
    rows_together: int  # of the table, whose tiles of a head come one after another (../rounds.py); 1 if each has its turn

    @property
    def quantised(self) -> bool:
        """Whether the caches hold 8 bits a number, which one more warpgroup widens (widen.py)."""
        return self.cache_dtype != self.dtype

    @property
    def reads_bytes(self) -> bool:
        return reads_bytes(self.quantised, self.few_rows, self.latent)

    @property
    def widens(self) -> bool:
        """Whether one more warpgroup does."""
        return self.quantised and not self.reads_bytes

    @property
    def slots(self) -> int:
        """Blocks of values that lie ready for products; and of keys, but where those are multiplied as they come."""
        if self.few_rows and not (self.widens or self.latent):
            return value_stages(self.stages, self.head_dim, self.value_dim)
        if not self.widens:
            return self.stages - (self.query_places - 1)
        if self.fp8_terms:
            return FP8_SLOTS
        return widened(self.block_kv, self.head_dim + self.value_dim, self.wide or self.latent)

    @property
    def key_slots(self) -> int:
        return self.stages if self.fp8_terms or not self.widens else self.slots

    @property
    def rings(self) -> list[str]:
        """Names of the shared memory that blocks go through: as products read them, and as they come."""
        products = ["keys"] if self.latent else ["keys", "values"]
        come = [name for name in products if self.widens_keys or (self.widens and name == "values")]
        return [*products, *(f"raw_{name}" for name in come)]

    @property
    def query_terms(self) -> int:
        """Factors of products, whose sum a query is."""
        return self.fp8_terms or 1

    @property
    def query_matrices(self) -> int:
        """Matrices of a part, as products take them, that 64 rows of a query have room for, whatever terms there are.

        The rooms of all warpgroups are one behind the other, and a warpgroup may be done with its own before another.
        """
        loaded, taken = (jnp.dtype(dtype).itemsize for dtype in (self.dtype, self.product_dtype))
        return self.query_parts * loaded // taken

    @property
    def widens_keys(self) -> bool:
        return self.widens and not self.fp8_terms

    @property
    def block_dtype(self) -> str:
        """That of the blocks that products read."""
        return self.product_dtype if self.widens else self.cache_dtype

    @property
    def product_dtype(self) -> str:
        """That of products' factors. Unless they are of 8 bits themselves, 8 bits are widened to float16.

        It holds them exactly, and is the least to do for a number. Their scales join logits and weights where each slot
        has its own, and else the softmax's unit and results.
        """
        if self.fp8_terms:
            return self.cache_dtype
        return "float16" if self.quantised else self.dtype

    @property
    def widening_warps(self) -> int:
        """A warpgroup of their own, or those of the loading one but the first: no thread has registers for five."""
        return 4 if self.loading_warpgroups == 2 else 3

    @property
    def loading_warpgroups(self) -> int:
        """Those that do not compute."""
        return 2 if self.widens and (self.warpgroups < 2 or self.wide) else 1

    @property
    def computing_warpgroups(self) -> int:
        """Those of all teams."""
        return self.teams * self.warpgroups

    @property
    def registers(self) -> Registers:
        if self.wide:
            return WIDE_REGISTERS[self.quantised]
        gathering = self.gathers and self.computing_warpgroups == 2
        return GATHERING_REGISTERS if gathering else REGISTERS[self.computing_warpgroups, self.widens]

    @property
    def q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def wide(self) -> bool:
        return is_wide(self.head_dim, self.value_dim, self.latent) and not self.few_rows

    @property
    def alternates(self) -> bool:
        """Whether two warpgroups that share rows take blocks of keys by turns (alternate.py)."""
        return self.wide and not self.quantised

    @property
    def block_shares(self) -> int:
        """Shares of a block's features, of as many parts each, that come on their own, and whose keys are multiplied then."""
        if not self.alternates or self.gathers:
            return 1
        if self.latent:
            return next(self.query_parts // size for size in range(MOST_ARRIVING, 0, -1) if self.query_parts % size == 0)
        return 2 if self.head_dim % (2 * COLUMNS) == 0 else 1

    @property
    def freed_shares(self) -> int:
        """How many of those lie apart, and make room on their own: latent keys are to be values."""
        return 1 if self.latent else self.block_shares

    @property
    def shares_place(self) -> bool:
        """Whether values are widened to where the keys of their block were, and keys to where the last values were."""
        return self.wide and self.quantised and not self.latent

    @property
    def output_turns(self) -> int:
        """Turns in which a warpgroup starts its output: two where keys are widened to where its values lie, so that some may
        be while the second runs. And with so many threads ptxas has no registers for 256 columns at once."""
        return 2 if self.wide and self.quantised and self.value_dim % (4 * COLUMNS) == 0 else 1

    @property
    def keys_come_apart(self) -> bool:
        """Whether parts of latent keys come by copies of their own, and are multiplied while others are on their way: there is
        room for two blocks, so that products wait for the next one."""
        return self.alternates and self.latent and not self.gathers

    @property
    def key_groups(self) -> list[list[int]]:
        """Parts of keys that are there together: wide ones are widened while products with others of a block run.

        Those come first that have no values in their place, or those of an output's first turn.
        """
        parts, own = range(self.query_parts), self.value_dim // COLUMNS // 2  # of a warpgroup
        if not (self.wide and self.quantised):
            size = len(parts) // self.block_shares
            return [[*parts[first : first + size]] for first in range(0, len(parts), size)]
        first = [part for part in parts if part >= 2 * own or 2 * (part % own) < own]
        return [group for group in (first, [part for part in parts if part not in first]) if group]

    @property
    def turns_before_keys(self) -> list[int]:
        """The turns of the last block's output that groups of widened keys wait for: if it is one, the first group."""
        same_places = self.latent or self.head_dim == self.value_dim
        return [*range(self.output_turns)] if same_places else [self.output_turns - 1]

    @property
    def query_comes_first(self) -> bool:
        """Whether a thread block's first loads, but for a block of keys, wait for its first query.

        All at once take as long as the rings are large. That is well where memory is what all wait for, as in decode
        steps and in parts of tiles; but products can begin with a query and a block of keys.
        """
        return (self.splits == 1 or self.parts.vary) and self.of_prompts

    @property
    def of_prompts(self) -> bool:
        """Whether tiles have so many tokens that some are a prompt's."""
        return self.tokens >= FEW_TOKENS * self.tiles

    @property
    def asks_ahead(self) -> bool:
        """Whether the next query is brought into the second cache while the last one has its place, to come sooner. With a
        window, 8192 tokens of wide heads are slower with it, and no call is much faster."""
        return self.query_comes_first and self.pieces > self.cores and self.window is None

    @property
    def asks_for_blocks(self) -> bool:
        """Whether a block of keys is brought into the second cache while the one before it is copied.

        Of latent caches two have room in a thread block, and their way from memory would be waited for where several
        tiles share them, and so products bind. Where memory does, as with one tile, or in 8 bits, it is 2 to 6% slower.
        """
        in_runs = not (self.quantised or self.gathers)
        return self.latent and in_runs and self.head_tiles_per_group > 1 and not self.query_comes_first

    @property
    def values_before_query(self) -> bool:
        """Whether a piece's first values are asked for before its query, but those of a block's first piece.

        Where steps are as short as with heads of 64 features, they are wanted soon after. Longer ones are slower with it.
        Parts of latent contexts wait for their first block longer than for their query, whose place is free later.
        """
        if self.alternates and self.latent and self.parts.most > 1 and not self.query_comes_first:
            return self.pieces > self.cores
        return self.asks_ahead and not self.quantised and self.head_dim == COLUMNS

    @property
    def query_groups(self) -> int:
        """Parts of a team's queries that come, and make room, on their own: each warpgroup's own where three or four go apart.

        One that is done first goes on with its next tile, or asks for its next query. Where any block may be masked, no
        thread of three has a register left for it.
        """
        return self.warpgroups if self.chains or (self.warpgroups > 2 and not self.masks_any_block) else 1

    @property
    def query_places(self) -> int:
        """Queries of a warpgroup that there is room for. In a chain a second one, in the place of a block of values, is
        there before the last logits of the first. Where any block may be masked, nothing is gained; keys that are gathered
        are on their way for longer, and want all places.
        """
        takes = self.chains and not (self.quantised or self.masks_any_block or self.gathers)
        return 2 if takes and self.stages > 2 and self.rows <= self.block_kv else 1

    @property
    def copies_results(self) -> bool:
        """Whether a whole tile's output leaves by copies, from where its query was, while the next one has another place."""
        whole = self.results == 1 or self.final_beside_parts
        return self.query_places > 1 and self.value_dim == self.head_dim and whole and not self.by_token

    @property
    def row_groups(self) -> int:
        """Groups of 64 rows: each warpgroup has one, or all share one."""
        return 1 if self.wide else self.warpgroups

    @property
    def few_rows(self) -> bool:
        """Whether a tile's rows are columns of its products (few_rows.py)."""
        return self.rows < WARPGROUP_ROWS

    @property
    def logit_columns(self) -> int:
        """Keys of a block whose logits a warpgroup computes."""
        return self.block_kv if self.alternates else self.block_kv * self.row_groups // self.warpgroups

    @property
    def output_columns(self) -> int:
        """Of its rows' output, those that a warpgroup computes."""
        return self.value_dim * self.row_groups // self.warpgroups

    @property
    def outputs(self) -> int:
        """Arrays that a warpgroup's output is, where it is 64 rows: no thread has registers for more columns of them."""
        return -(-self.output_columns // WARPGROUP_COLUMNS)

    @property
    def columns_at_once(self) -> int:
        """Columns of each of these arrays."""
        return self.output_columns // self.outputs

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
    def splits(self) -> int:
        """The most parts of a tile: places for the results of each."""
        return self.parts.most

    @property
    def results(self) -> int:
        """Of each tile, in global memory."""
        return 1 if self.clusters or self.merges_in_pairs else self.splits

    @property
    def merges_in_pairs(self) -> bool:
        """Whether two of a tile's parts are merged where the later of them ends, and then such pairs (pairs.py)."""
        return self.last_merges and self.wide

    @property
    def final_beside_parts(self) -> bool:
        """Whether there are results of whole tiles, beside those of each part."""
        return (self.parts.vary or self.last_merges) and not self.merges_in_pairs

    @property
    def rows_of_table(self) -> int:
        """Those that the table of tiles, or of their parts, has room for. Behind those of parts is their number."""
        return self.tiles * (self.splits if self.parts.vary else 1)

    @property
    def pieces_together(self) -> int:
        """Those of rows that have their turn together: of rows that there are, however the tokens are spread."""
        rows = -(-self.tokens // self.block_q)
        return (rows - rows % self.rows_together) * self.head_tiles

    @property
    def pieces(self) -> int:
        """At most."""
        return self.tiles * self.splits * self.head_tiles

    @property
    def thread_blocks(self) -> int:
        """But for clusters: more than there are cores would wait for one another."""
        return min(self.pieces, self.cores)

    @property
    def announces_runs(self) -> bool:
        """Whether all runs of a block that a warp copies are announced together (arrivals.py): prompts without ranges gain."""
        return self.warpgroups > 1 and not (self.quantised or self.wide or self.gathers or self.masks_any_block)

    @property
    def announced_together(self) -> list[str]:
        """Rings whose copies are: those also whose parts lie apart. What is gathered is announced otherwise."""
        rings = dict(keys=self.head_dim) if self.latent else dict(keys=self.head_dim, values=self.value_dim)
        return [name for name in rings if self.announces_runs or (lie_apart(rings[name]) and not self.gathers)]

    def lies_apart(self, name: str) -> bool:
        """Whether the parts of a block of keys, or of values, do (tiling.py)."""
        come_apart = name == "keys" and self.keys_come_apart
        return come_apart or lie_apart(self.head_dim if name == "keys" else self.value_dim)

    @property
    def query_parts(self) -> int:
        """Of one width, a swizzled row each; likewise of keys where they do not lie apart."""
        return self.head_dim // self.query_columns

    @property
    def query_columns(self) -> int:
        """Numbers of a swizzled row of a query."""
        return columns_of(self.head_dim)

    @property
    def takes_turns(self) -> bool:
        """Two warpgroups are faster in turns, but where steps are short, by a polynomial or in 8 bits; more without."""
        return self.warpgroups == 2 and not self.wide and self.polynomial is None and not self.fp8_terms

    @property
    def follow_one_another(self) -> bool:
        """Whether a thread block has several pieces, so long that the next is looked up beside each: not parts of steps."""
        return self.pieces > self.cores and not self.clusters and (self.of_prompts or not self.parts.vary)

    @property
    def chains(self) -> bool:
        """Whether a piece's first logits are computed beside the last product of the piece before, and its results.

        Warpgroups that go apart have other work beside a piece's end; those in turns have none but this. A block of a
        cluster has no piece but one, however many there are. With heads of 65 to 128 features alone it is faster: of 64,
        steps are short, even with two places for queries; of more, results and next logits want the same registers. Over
        widened caches its steps take 2% longer: so only where pieces are short. Not measured with scales of slots.
        """
        if not self.takes_turns or not self.follow_one_another:
            return False
        long = self.pages_per_seq * self.page_size > MOST_WIDENED_KEYS
        if self.quantised and (long or "slot" in (self.key_scale, self.value_scale)):
            return False
        return all(COLUMNS < size <= 128 for size in (self.head_dim, self.value_dim))

    @property
    def looks_ahead(self) -> bool:
        """Whether a piece is looked up beside the results of the one before, where pieces are no chain.

        With a window they are short. Without one nothing is gained, and up to 4% lost with a soft cap.
        """
        return self.window is not None and self.follow_one_another

    @property
    def rounds_late(self) -> bool:
        """Whether a thread has registers for logits and weights in 32 bits, beside the output and the last weights."""
        needed = self.value_dim // 2 + self.block_kv + self.block_kv // 4
        return self.warpgroups < 3 and needed + 40 <= (self.registers.computes or 255)

    @property
    def waits_first(self) -> bool:
        """Whether a warpgroup waits for its output before it weighs the next block: four have no registers for more.

        Of wide heads with a window, short pieces are faster with what two spill less by it; longer ones are not.
        """
        return self.warpgroups > 3 or (self.value_dim > 2 * WARPGROUP_ROWS and self.window is not None)

    @property
    def fixed_maximum(self) -> float | None:
        """What stands for every row's maximum, in units of the soft cap, where capped logits allow one for all.

        A key seen alone has weight 1 by its own maximum, and a rounded one by this. So it stands only where tiles of
        several warpgroups wait for their arithmetic, and not for memory.
        """
        if self.soft_cap is None or self.product_dtype != "bfloat16" or self.warpgroups == 1 or self.wide:
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

    def slot_of(self, team, step):
        """Where a step's block of values, and of keys with them, lies among those of all teams."""
        return team * self.slots + lax.rem(step, self.slots)

    def key_slot_of(self, team, step):
        """Likewise its keys, which may have more places."""
        return team * self.key_slots + lax.rem(step, self.key_slots)

    def queries_of(self, piece, team, row_group):
        """Which of all teams' groups of queries a piece's 64 rows are in."""
        group = team if self.query_groups == 1 else team * self.query_groups + row_group
        return group + self._place_of_query(piece) * (self.teams * self.query_groups)

    def query_of(self, piece, team, row_group):
        """Where a piece's query of 64 rows lies."""
        group = team * self.row_groups + row_group
        return group + self._place_of_query(piece) * (self.teams * self.row_groups)

    def _place_of_query(self, piece):
        return 0 if self.query_places == 1 else lax.rem(piece.number, self.query_places)

    def page_of(self, piece, key):
        """Where in the page table a key's page stands."""
        return piece.tile.seq * self.pages_per_seq + jnp.minimum(lax.div(key, self.page_size), self.pages_per_seq - 1)

    def row_of(self, piece, page, key, beside=0):
        """The row of a key in that page, or of what lies so many rows beside it, in a cache as rows of whole slots."""
        page = jnp.clip(page, 0, self.num_pages - 1)
        first = lax.div(piece.first_row + beside, self.slot_rows)
        return first + page * (self.page_rows // self.slot_rows) + lax.rem(key, self.page_size)

    def in_slot(self, piece, beside=0):
        """How many others of its slot lie before a key, or what lies so many rows beside it: those of other heads."""
        return lax.rem(piece.first_row + beside, self.slot_rows)

    def place_of_scale(self, piece, page, key, beside=0):
        """Where a slot's own scale stands: scales lie as the cache does."""
        return self.row_of(piece, page, key, beside) * self.slot_rows + self.in_slot(piece, beside)

    @property
    def gathers(self) -> bool:
        return are_gathered(self.page_size, self.block_kv)

    @property
    def run(self) -> int:
        """Keys of one copy: they lie together, in one page. Or those that a warp gathers."""
        return WARP_LANES if self.gathers else min(self.page_size, self.block_kv // (MATES if self.mates else 1))

    @property
    def by_token(self) -> bool:
        """Whether rows are a token's heads, then the next one's, and not a head's tokens: 8 at least lie together."""
        return self.block_q < 8

    @property
    def slab(self) -> int:
        """Rows of a warpgroup that belong to one head, or to one token, and lie together in the query."""
        return self.heads if self.by_token else min(self.block_q, WARPGROUP_ROWS)

    def head_and_token(self, row, divide=divmod):
        """(head in the tile, token in the tile) of rows of the tile."""
        if self.by_token:
            token, head = divide(row, self.heads)
            return head, token
        return divide(row, self.block_q)

    @property
    def slabs(self) -> int:
        """Slabs of a tile's tokens. Where there are several, a warpgroup has one, and may see less than the tile.

        Warpgroups that take turns go through the tile's blocks together, and so its tokens are one slab.
        """
        return 1 if self.takes_turns or self.wide or self.by_token else self.block_q // self.slab

    @property
    def slab_tokens(self) -> int:
        return self.block_q // self.slabs

    @property
    def columns(self) -> int:
        """Numbers of a row of the table that describes the tiles."""
        return TILE_COLUMNS + len(Slabs._fields) * self.slabs
