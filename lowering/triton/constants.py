"""The Triton kernel's compile-time constants that no configuration changes: what its call is."""

import math
from typing import NamedTuple

from paged_prefill.lowering.call import Call, Problem, granularity
from paged_prefill.lowering.triton.launch import power_of_2
from paged_prefill.lowering.triton.schedule import PARTS_FIELD, PIECES_FIELD, POOL_FIELD

MAX_FLOAT32_DIM = 256  # whose products of six parts leave no registers for more
MOST_VALUES = 256  # features of a value that a program sums up, if its tile has more rows than LOW_ROWS
LOW_ROWS = 16


class CallSizes(NamedTuple):
    """`CALL`: the sizes of a call."""

    tokens: int
    seqs: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    seqs_of_pack: int | None  # which share their sinks; None without

    @classmethod
    def of(cls, call: Call, sinks) -> "CallSizes":
        p = call.problem
        seqs_of_pack = None if sinks is None else p.seqs // sinks.shape[0]
        return cls(p.tokens, p.seqs, p.num_kv_heads, p.group, p.head_dim, p.value_dim, seqs_of_pack)


class CacheLayout(NamedTuple):
    """`CACHE`: where the slots of the caches lie, in rows; and their scales."""

    kv_heads: int
    pool_rows: int  # from one pool to the next, and so on
    head_rows: int
    page_rows: int
    slot_rows: int
    value_rows: int  # from a key to its value in one array, else 0
    page_size: int
    pages_per_seq: int
    capacity: int
    latent: bool  # whether values are the first features of the keys; then `Widths.value` is `Widths.main`
    key_scale: str  # "one" for none, "tensor", "head" or "slot"
    value_scale: str

    @classmethod
    def of(cls, call: Call) -> "CacheLayout":
        problem, rows, (key_scale, value_scale) = call.problem, call.problem.rows, scales_of(call)
        return cls(
            kv_heads=problem.cache_kv_heads,
            pool_rows=rows["pool"],
            head_rows=rows["kv_heads"],
            page_rows=rows["num_pages"],
            slot_rows=rows["page_size"],
            value_rows=rows.get("2", 0),
            page_size=problem.page_size,
            pages_per_seq=problem.pages_per_seq,
            capacity=problem.capacity,
            latent="latent" in problem.features,
            key_scale=granularity(key_scale) or "one",
            value_scale=granularity(value_scale) or "one",
        )


class Softmax(NamedTuple):
    """`SOFTMAX`: which keys rows see, and what is made of their products."""

    ranges: bool
    tree_words: int  # 0 for no tree
    gaps: bool  # some keys that no row sees may lie between some that are seen
    window: int | None
    scale: float
    negate: bool
    soft_cap: float | None
    to_base_2: float  # from logits as they are compared: before the scale, or with a cap behind it
    precision: str

    @classmethod
    def of(cls, call: Call) -> "Softmax":
        attention, ranges = call.problem.attention, call.ranges is not None
        # The running maximum is taken before the scale, so the scale must be positive. A scale of 0 has the same
        # softmax as one too small to see.
        scale, soft_cap = max(abs(attention.softmax_scale), 1e-30), attention.attn_logits_soft_cap
        return cls(
            ranges=ranges,
            tree_words=0 if call.tree is None else call.tree.shape[1],
            gaps=ranges or call.tree is not None,
            window=attention.sliding_window,
            scale=scale,
            negate=attention.softmax_scale < 0,
            soft_cap=soft_cap,
            to_base_2=math.log2(math.e) * (scale if soft_cap is None else soft_cap),
            # float32 products as six of bfloat16, exact to 24 bits or so; other dtypes have but one way.
            precision="bf16x6",
        )


class ScheduleFields(NamedTuple):
    """`SCHEDULE`: what schedule.py says of pieces, and where."""

    intervals: int
    intervals_padded: int
    most_parts: int  # of a tile
    most_parts_padded: int
    parts_vary: bool
    key_pool_field: int
    value_pool_field: int
    parts_field: int = PARTS_FIELD
    pieces_field: int = PIECES_FIELD
    pool_field: int = POOL_FIELD


class TileSizes(NamedTuple):
    """`TILE`: the sizes of a tile and of its blocks, and how warps share out the work."""

    rows: int
    block_kv: int
    edge_kv: int  # of a block that is masked
    widths: "Widths"
    all_masked: bool  # no block goes without a mask: of few rows it costs nothing, and a second loop its start
    replace_hidden: bool  # whether keys that no row sees are not read but others in their place
    key_shares: int  # of a block, one a warp, which then waits for no other until the end
    sum_last: bool  # whether weights are summed over warps after the loop
    lanes: int  # of a warp, over which a product of few rows shares out its columns
    spread: int  # warps that take features of values by turns, which gives a lane neighbours; 0 for none
    float16_products: bool  # of bfloat16 queries and keys of 8 bits, whose numbers are float16's as they are
    share_columns: bool
    read_again: bool  # to save registers
    ptx: bool  # whether NVIDIA's instructions may be named


def scales_of(call: Call):
    """The scales of keys and of values, which may be one array."""
    problem = call.problem
    of_both = "latent" in problem.features or (problem.layout.combined and granularity(call.key_scale) == "slot")
    return call.key_scale, call.key_scale if of_both else call.value_scale


class Widths(NamedTuple):
    """The powers of two that features are laid out in.

    A head is in parts where one power of two would waste more. A tall tile's values are shared out over programs, each
    of which has MOST_VALUES: its sums have to stay in registers.
    """

    main: int
    other: int
    rest: int
    value: int
    value_parts: int

    @classmethod
    def of(cls, problem: Problem, rows: int, share_columns: bool) -> "Widths":
        latent = "latent" in problem.features
        whole = power_of_2(problem.head_dim)
        main, other, rest = whole // 2, 0, power_of_2(problem.head_dim - whole // 2)
        # The values of a latent cache are the first part of its keys.
        if main < 16 or main + rest >= whole or (latent and problem.value_dim > main):
            main, rest = whole, 0
        if main == MAX_FLOAT32_DIM and problem.dtype == "float32" and not latent:
            main, other, rest = main // 2, main // 4, main // 4  # a product of all six parts at once would spill
        value = main if latent else power_of_2(problem.value_dim)
        most = value if rows <= LOW_ROWS else MOST_VALUES * (2 if share_columns else 1)
        parts = max(1, value // most)
        if parts > 1 and latent:
            main, other = most, main - most
        return cls(main, other, rest, value // parts, parts)
