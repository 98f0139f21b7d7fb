"""The one table of what the operations take and give.

Shape checks, abstract evaluation, batching, the cut over a mesh and the sharding rule are read off it. An operation is
given its operands by name, None for those that are absent; in a jaxpr, those that are there stand in the table's order,
and the static parameter `present` lists their names.

Dimensions have names, and equal names are equal sizes. In front stand leading dimensions: [*C, *B] where there is one
of each pack, [*C] where all packs of *B share one. A cache may have a 1 where *C has more: then it serves all of them.
In which order a cache's other dimensions lie is said by a `CacheLayout`; here they stand in this project's own.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paged_prefill.primitive.layout import OWN_LAYOUT, CacheLayout

ATTENTION_DTYPES = ("float32", "bfloat16", "float16")
QUANTISED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")

BATCH, POOLS, ONE = "*C *B", "*C", ""  # the leading dimensions of an operand


class Operand(NamedTuple):
    """One operand or result.

    Attributes:
      name: what callers know it by.
      forms: the names of its dimensions behind the leading ones; several where the rank says which.
      lead: BATCH, POOLS or ONE, for one of all packs.
      dtype: its dtype; "attention" is one of ATTENTION_DTYPES, "cache" one of them or of QUANTISED_DTYPES.
      optional: whether it may be absent.
      layered: whether it has a dimension `layers` before its others where the operand `layer` is present.
    """

    name: str
    forms: tuple[tuple[str, ...], ...]
    lead: str
    dtype: str
    optional: bool = False
    layered: bool = False

    def lead_dims(self, batch_dims: int, cache_batch_dims: int) -> int:
        """How many leading dimensions it has."""
        return {BATCH: batch_dims, POOLS: cache_batch_dims, ONE: 0}[self.lead]

    def dims(
        self, ndim: int, lead_dims: int, present: Sequence[str], layout: CacheLayout
    ) -> tuple[str, ...] | None:
        """The names of its dimensions behind the leading ones, given its rank; None where no form has that rank."""
        return next((form for form in self.all_dims(present, layout) if lead_dims + len(form) == ndim), None)

    def all_dims(self, present: Sequence[str], layout: CacheLayout) -> list[tuple[str, ...]]:
        """The names of its dimensions behind the leading ones, in each of its forms."""
        layers = ("layers",) if self.layered and "layer" in present else ()
        return [layers + layout.ordered(form) for form in self.forms]


CACHE_DIMS = ("kv_heads", "num_pages", "page_size")
PACK = (
    Operand("context_lens", (("seqs",),), BATCH, "int32"),
    Operand("page_indices", (("seqs", "pages_per_seq"),), BATCH, "int32"),
    Operand("query_offsets", (("seqs + 1",),), BATCH, "int32"),
)
LAYER = Operand("layer", ((),), BATCH, "int32", optional=True)
SCALES = tuple(
    Operand(name, ((), ("kv_heads",), CACHE_DIMS), POOLS, "float32", optional=True, layered=True)
    for name in ("key_scale", "value_scale")
)
KEY_CACHE = Operand("key_cache", ((*CACHE_DIMS, "head_dim"),), POOLS, "cache", layered=True)
VALUE_CACHE = Operand("value_cache", ((*CACHE_DIMS, "value_dim"),), POOLS, "cache", optional=True, layered=True)
CACHES = ("key_cache", "value_cache")


class Operation(NamedTuple):
    """What one operation takes and gives.

    Attributes:
      name: of its primitive.
      operands, results: in order.
      leading: the operand whose leading dimensions are [*C, *B].
      writes: whether it writes the caches. Then it follows their cut: its heads are theirs, and packs of *B, which write
        into one pool, are whole wherever that is.
      cuts: what may be cut over a mesh, in words.
    """

    name: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]
    leading: str
    writes: bool
    cuts: str

    def __repr__(self):
        return self.name

    def present(self, operands: Mapping[str, object]) -> tuple[str, ...]:
        """The names of the operands that are there, in order."""
        return tuple(x.name for x in self.operands if operands.get(x.name) is not None)

    def table(self, present: Sequence[str]) -> tuple[Operand, ...]:
        """The rows of the operands that are there."""
        return tuple(x for x in self.operands if x.name in present)


class Shapes(NamedTuple):
    """The shapes of one call, by name, and what follows from them.

    Attributes:
      operation: which one.
      shapes: those of the operands that are there.
      cache_batch_dims: the number of *C.
      layout: in which order the caches lie.
    """

    operation: Operation
    shapes: Mapping[str, tuple[int, ...]]
    cache_batch_dims: int
    layout: CacheLayout = OWN_LAYOUT

    @property
    def batch(self) -> tuple[int, ...]:
        """[*C, *B]."""
        return tuple(self.shapes[self.operation.leading][:-3])

    @property
    def heads(self) -> int:
        """The heads that a device's share of the work is counted in: the query's, or those that are written."""
        return self.shapes[self.operation.leading][-2]

    @property
    def kv_heads(self) -> int:
        """The heads of the caches."""
        return self.layout.sizes(self.shapes["key_cache"])["kv_heads"]

    @property
    def num_pages(self) -> int:
        """The pages of the caches."""
        return self.layout.sizes(self.shapes["key_cache"])["num_pages"]

    @property
    def tokens(self) -> int:
        """The tokens of a pack."""
        return self.shapes[self.operation.leading][-3]

    def lead(self, row: Operand) -> tuple[int, ...]:
        """The leading dimensions of an operand or result."""
        count = row.lead_dims(len(self.batch), self.cache_batch_dims)
        return tuple(self.shapes[row.name][:count]) if row.name in self.shapes else self.batch[:count]

    def dims(self, row: Operand) -> tuple[str, ...]:
        """The names of the other dimensions of an operand or result."""
        if row.name not in self.shapes:
            return row.forms[0]
        return row.dims(len(self.shapes[row.name]), len(self.lead(row)), tuple(self.shapes), self.layout)

    def results(self) -> tuple[Operand, ...]:
        """The results; one that has an operand's name is that operand written, where it has slots to write."""
        operands = {row.name for row in self.operation.operands}

        def is_there(row):
            return row.name not in operands or (row.name in self.shapes and "page_size" in self.dims(row))

        return tuple(filter(is_there, self.operation.results))

    def rows(self) -> tuple[Operand, ...]:
        """All operands and results, each name once."""
        rows = self.operation.table(tuple(self.shapes)) + self.results()
        return tuple({row.name: row for row in rows}.values())


PREFILL = Operation(
    name="paged_prefill",
    operands=(
        Operand("query", (("tokens", "q_heads", "head_dim"),), BATCH, "attention"),
        KEY_CACHE,
        VALUE_CACHE,
        *PACK,
        Operand("key_ranges", (("tokens", "2"),), BATCH, "int32", optional=True),
        Operand("tree_mask", (("tokens", "words"),), BATCH, "uint32", optional=True),
        Operand("sinks", (("q_heads",),), BATCH, "float32", optional=True),
        *SCALES,
        LAYER,
    ),
    results=(
        Operand("out", (("tokens", "q_heads", "value_dim"),), BATCH, "attention"),
        Operand("lse", (("tokens", "q_heads"),), BATCH, "float32"),
    ),
    leading="query",
    writes=False,
    cuts="batch dimensions, heads and pages only, alike in all operands, and query heads only where each part holds "
    "whole groups of them (those that share a KV head) or lies inside one",
)
APPEND = Operation(
    name="append_to_pages",
    operands=(
        KEY_CACHE,
        VALUE_CACHE,
        Operand("key", (("tokens", "kv_heads", "head_dim"),), BATCH, "attention"),
        Operand("value", (("tokens", "kv_heads", "value_dim"),), BATCH, "attention", optional=True),
        *PACK,
        *SCALES,
        LAYER,
    ),
    results=(KEY_CACHE, VALUE_CACHE, *SCALES),
    leading="key",
    writes=True,
    cuts="heads, pages, and batch dimensions where each element has a pool of its own, alike in all operands",
)
