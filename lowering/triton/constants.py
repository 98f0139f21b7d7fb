"""The Triton kernel's compile-time constants that no configuration changes: what its call is."""

from typing import NamedTuple

from paged_prefill.lowering.call import Call, Problem, granularity
from paged_prefill.lowering.triton.launch import power_of_2
from paged_prefill.lowering.triton.schedule import PARTS_FIELD, PIECES_FIELD, POOL_FIELD

MAX_FLOAT32_DIM = 256  # whose products of six parts leave no registers for more
MOST_VALUES = 256  # features of a value that a program sums up, if its tile has more rows than LOW_ROWS
LOW_ROWS = 16


def constants(call: Call, widths: "Widths") -> dict:
    """Those by name, for a head whose features are laid out in `widths`."""
    problem, attention = call.problem, call.problem.attention
    latent, rows, (key_scale, value_scale) = "latent" in problem.features, problem.rows, scales_of(call)
    return dict(
        TOKENS=problem.tokens,
        SEQS=problem.seqs,
        PARTS_FIELD=PARTS_FIELD,
        PIECES_FIELD=PIECES_FIELD,
        POOL_FIELD=POOL_FIELD,
        KEY_POOL_FIELD=POOL_FIELD if call.key_pool is None else POOL_FIELD + 1,
        VALUE_POOL_FIELD=POOL_FIELD if call.value_pool is None else POOL_FIELD + 2,
        KV_HEADS=problem.num_kv_heads,
        GROUP=problem.group,
        CACHE_KV_HEADS=problem.cache_kv_heads,
        POOL_ROWS=rows["pool"],
        HEAD_ROWS=rows["kv_heads"],
        PAGE_ROWS=rows["num_pages"],
        SLOT_ROWS=rows["page_size"],
        VALUE_ROWS=rows.get("2", 0),
        PAGE_SIZE=problem.page_size,
        PAGES_PER_SEQ=problem.pages_per_seq,
        CAPACITY=problem.capacity,
        HEAD_DIM=problem.head_dim,
        HEAD_MAIN=widths.main,
        HEAD_OTHER=widths.other,
        HEAD_REST=widths.rest,
        VALUE_DIM=problem.value_dim,
        VALUE_WIDTH=widths.value,
        VALUE_PARTS=widths.value_parts,
        LATENT=latent,
        KEY_SCALE=granularity(key_scale) or "one",
        VALUE_SCALE=granularity(value_scale) or "one",
        RANGES=call.ranges is not None,
        TREE_WORDS=0 if call.tree is None else call.tree.shape[1],
        # The running maximum is taken before the scale, so the scale must be positive. A scale of 0 has the same
        # softmax as one too small to see.
        SCALE=max(abs(attention.softmax_scale), 1e-30),
        NEGATE=attention.softmax_scale < 0,
        SOFT_CAP=attention.attn_logits_soft_cap,
        WINDOW=attention.sliding_window,
        # float32 products as six of bfloat16, exact to 24 bits or so; other dtypes have but one way.
        PRECISION="bf16x6",
    )


def scales_of(call: Call):
    """The scales of keys and of values, which may be one array."""
    problem = call.problem
    of_both = "latent" in problem.features or (problem.layout.combined and granularity(call.key_scale) == "slot")
    return call.key_scale, call.key_scale if of_both else call.value_scale


class Widths(NamedTuple):
    """The powers of two that features are laid out in.

    A head is in parts where one power of two would waste more. A tall tile's values are shared out over programs, each of
    which has MOST_VALUES: its sums have to stay in registers.
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
