"""The TPU kernel, in Pallas Mosaic: flash attention with pages fetched by asynchronous copies.

One pallas_call runs a whole pack. Its grid walks over the items of mosaic_tpu_schedule.py: the rows of one sequence in
one tile of the query. An item walks over its keys in blocks, from its window's start to its causal limit; blocks lie on
one fixed grid of a sequence's keys, so the bits of a row do not depend on the pack it is in. Two buffers hold
blocks: while one is computed with, the pages of the next block, be it this item's or the next one's, are copied into
the other, each page by one strided copy for all KV heads. The page table stays in HBM, however large: an item's row of
it is copied to SMEM while the item before it computes.

A block is computed in chunks of keys. The rows of the tile times the query heads of a group are the rows of one matrix
product with the chunk's keys; an item of few rows, as in decoding, takes only the slice of the tile that holds them.
Only chunks that some row sees in part are masked. The running maximum m, sum l and unnormalised output are those of the
online softmax (Milakov and Gimelshein, arXiv 1805.02867), in powers of 2, which is what the chip computes:

    m' = max(m, max_j s_j)    p_j = 2^(c (s_j - m'))    l' = 2^(c (m - m')) l + sum_j p_j    out' = 2^(c (m - m')) out + p v

where s = q . k and c = softmax_scale log2(e), or s = tanh(softmax_scale q . k / cap) and c = cap log2(e) with a soft cap.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.config import PrefillPageAttentionConfig
from paged_prefill.lowering.contract import Device, Problem, Sequences
from paged_prefill.lowering.mosaic_tpu_schedule import Items, max_items, work_items

LANES = 128
CHUNK = 512  # keys of one matrix product
ROWS = 512  # rows of one matrix product that the heuristics aim at
BYTES_IN_FLIGHT = 4 * 2**20  # keys and values of one block that the heuristics aim at
PRODUCTS_AT_ONCE = 4  # matrix products of one step, whose softmaxes overlap with the next one's products
COPIES_AT_ONCE = 4  # page copies started in one step of a loop, for the scalar unit to overlap
SMEM_BYTES = 3 * 2**18  # of the chip's 1 MiB, what items and page tables may take

CHIPS = {
    "TPU v4": pltpu.ChipVersion.TPU_V4,
    "TPU v5e": pltpu.ChipVersion.TPU_V5E,
    "TPU v5 lite": pltpu.ChipVersion.TPU_V5E,
    "TPU v5": pltpu.ChipVersion.TPU_V5P,
    "TPU v5p": pltpu.ChipVersion.TPU_V5P,
    "TPU v6e": pltpu.ChipVersion.TPU_V6E,
    "TPU v6 lite": pltpu.ChipVersion.TPU_V6E,
    "TPU7": pltpu.ChipVersion.TPU_7,
    "TPU7x": pltpu.ChipVersion.TPU_7X,
}


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
        return self.part * self.parts

    @property
    def chunk(self) -> int:
        return self.run * self.runs_per_chunk

    @property
    def runs_per_block(self) -> int:
        return self.runs_per_chunk * self.chunks_per_block

    def heads_at_once(self, kv_heads: int) -> int:
        """KV heads of one step over the whole tile."""
        return _divisor(kv_heads, max(PRODUCTS_AT_ONCE // self.parts, 1))


def sizes_of(config: PrefillPageAttentionConfig, group: int, page_size: int, dtype) -> Sizes:
    """Rounds block_q up to whole parts, and block_kv to whole chunks of whole pages."""
    packing = sublanes(dtype)
    part = min(_round_up(config.block_q, packing), max(_power_of_2(ROWS // group), packing))
    chunk = max(packing, min(CHUNK, config.block_kv))
    run = max(r for r in range(packing, page_size + 1, packing) if page_size % r == 0 and r <= chunk)
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
    """Rows of the chip's native tile: 8 of 32 bits, 16 of 16 bits."""
    return 32 // jnp.dtype(dtype).itemsize


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16 and float32, page sizes that are multiples of the chip's tile, on v4 and later."""
    if device.kind is None:
        return (
            "Mosaic must know the TPU that it compiles for, and there is none here: lower within "
            "jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(device_kind, 1, 'tpu')))"
        )
    if device.kind not in CHIPS:
        return f"it is built for {', '.join(CHIPS)}, not for {device.kind}"
    if problem.dtype not in ("bfloat16", "float32"):
        return f"TPU matrix units take bfloat16 and float32, not {problem.dtype}"
    packing = sublanes(problem.dtype)
    if problem.page_size % packing:
        return f"page_size {problem.page_size} must be a multiple of {packing} for {problem.dtype}"
    config = heuristic_config(problem, device)
    if vmem_bytes(problem, config) > _vmem_budget(device):
        return (
            f"{problem.q_heads} query heads and {problem.num_kv_heads} KV heads of head_dim {problem.head_dim} and value_dim "
            f"{problem.value_dim} need {vmem_bytes(problem, config)} bytes of VMEM, more than the {_vmem_budget(device)} here"
        )
    if smem_bytes(problem, config) > SMEM_BYTES:
        return (
            f"{problem.seqs} sequences of {problem.tokens} tokens with {problem.pages_per_seq} pages each need "
            f"{smem_bytes(problem, config)} bytes of SMEM, more than {SMEM_BYTES}"
        )
    return None


def _vmem_budget(device: Device) -> int:
    """Bytes of VMEM the kernel may plan with: what JAX reports for one core, less an eighth for the compiler."""
    return pltpu.get_tpu_info_for_chip(CHIPS[device.kind], 1).vmem_capacity_bytes * 7 // 8


def vmem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """VMEM that a configuration takes, an estimate from above: buffers, running values, and one step's intermediates."""
    sizes = sizes_of(config, problem.group, problem.page_size, problem.dtype)
    itemsize = jnp.dtype(problem.dtype).itemsize
    features = _round_up(problem.head_dim, LANES) + _round_up(problem.value_dim, LANES)
    rows = problem.q_heads * sizes.block_q
    pages = 2 * problem.num_kv_heads * sizes.run * sizes.runs_per_block * features * itemsize
    tiles = 2 * rows * features * itemsize + 2 * sizes.block_q * _round_up(problem.q_heads, LANES) * 4
    running = rows * (_round_up(problem.value_dim, LANES) + 2 * LANES) * 4
    step = PRODUCTS_AT_ONCE * problem.group * sizes.part * (_round_up(sizes.chunk, LANES) + features) * 4
    return pages + tiles + running + step


def smem_bytes(problem: Problem, config: PrefillPageAttentionConfig) -> int:
    """SMEM that the items and two rows of the page table take."""
    items = max_items(problem.tokens, problem.seqs, sizes_of(config, problem.group, problem.page_size, problem.dtype).block_q)
    return 4 * (len(Items._fields) * _round_up(items, LANES) + 2 * _round_up(problem.pages_per_seq, LANES))


def heuristic_config(problem: Problem, device: Device) -> PrefillPageAttentionConfig:
    """Rows enough to keep the matrix unit's weights busy, keys enough to hide the latency of memory, within VMEM."""
    packing = sublanes(problem.dtype)
    block_q = 2 * max(_power_of_2(ROWS // problem.group), packing)
    block_q = min(block_q, _round_up(problem.tokens, packing))
    itemsize = jnp.dtype(problem.dtype).itemsize
    bytes_per_key = problem.num_kv_heads * (problem.head_dim + problem.value_dim) * itemsize
    block_kv = min(max(_power_of_2(BYTES_IN_FLIGHT // bytes_per_key), CHUNK), 4 * CHUNK)
    block_kv = min(block_kv, _round_up(problem.capacity, LANES))
    config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
    while vmem_bytes(problem, config) > _vmem_budget(device):
        if block_kv > CHUNK or block_q <= packing < block_kv:
            block_kv = _round_up(block_kv // 2, packing)
        elif block_q > packing:
            block_q = _round_up(block_q // 2, packing)
        else:
            break
        config = PrefillPageAttentionConfig(block_q=block_q, block_kv=block_kv)
    return config


def candidate_configs(problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
    """The heuristic configuration and its neighbours, of those that fit VMEM."""
    best = heuristic_config(problem, device)
    candidates = [best]
    for rows in (1, 2, 0.5):
        for keys in (1, 2, 0.5):
            config = PrefillPageAttentionConfig(
                block_q=_round_up(int(best.block_q * rows), sublanes(problem.dtype)),
                block_kv=_round_up(int(best.block_kv * keys), LANES),
            )
            if config not in candidates and vmem_bytes(problem, config) <= _vmem_budget(device):
                candidates.append(config)
    return candidates


def _power_of_2(x: int) -> int:
    """The largest power of 2 that is at most x."""
    return 1 << (max(x, 1).bit_length() - 1)


def attend(
    query,
    key_pages,
    value_pages,
    sequences: Sequences,
    kv_head_start,
    *,
    num_kv_heads: int,
    softmax_scale: float,
    attn_logits_soft_cap: float | None,
    sliding_window: int | None,
    config: PrefillPageAttentionConfig,
):
    """See contract.py. Uses block_q and block_kv."""
    tokens, q_heads, head_dim = query.shape
    *_, page_size, value_dim = value_pages.shape
    group = q_heads // num_kv_heads
    seqs, pages_per_seq = sequences.page_indices.shape
    sizes = sizes_of(config, group, page_size, query.dtype)
    block_q, rows = sizes.block_q, group * sizes.block_q
    items, count = work_items(sequences, tokens, pages_per_seq * page_size, block_q, sliding_window)

    # With a scale that is not positive, the sign goes to the query: the maximum is taken before scaling.
    if softmax_scale <= 0:
        query = query * jnp.sign(softmax_scale).astype(query.dtype)
    tiles = -(-tokens // block_q)
    query = jnp.pad(query, ((0, tiles * block_q - tokens), (0, 0), (0, 0)))
    query = query.reshape(-1, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    table = jnp.pad(sequences.page_indices, ((0, 0), (0, -pages_per_seq % LANES)))[:, None]

    def in_runs(pages):
        pools, heads, num_pages, _, features = pages.shape
        return pages.reshape(pools, heads, num_pages * sizes.runs_per_page, sizes.run, features)

    # A chip whose two cores are one device splits the KV heads between them.
    splits = _divisor(num_kv_heads, _cores())
    heads = num_kv_heads // splits

    def buffer(features):
        return pltpu.VMEM((2, sizes.runs_per_block, heads, sizes.run, features), key_pages.dtype)

    scratch = Scratch(
        keys=buffer(head_dim),
        values=buffer(value_dim),
        table=pltpu.SMEM((2 * table.shape[-1],), jnp.int32),
        acc=pltpu.VMEM((heads, rows, value_dim), jnp.float32),
        m=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        l=pltpu.VMEM((heads, rows, LANES), jnp.float32),
        slot=pltpu.SMEM((1,), jnp.int32),
        page_sems=pltpu.SemaphoreType.DMA((2,)),
        table_sems=pltpu.SemaphoreType.DMA((2,)),
    )

    def tile_of(split, item, head_start, tile, *_):
        return (split, 0, tile[item], 0)

    def lse_tile_of(split, item, head_start, tile, *_):
        return (split, tile[item], 0)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    problem = Problem(
        tokens, q_heads, num_kv_heads, head_dim, value_dim, *key_pages.shape[:3], page_size, seqs, pages_per_seq,
        query.dtype.name, softmax_scale, attn_logits_soft_cap, sliding_window,
    )  # fmt: skip
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            sizes=sizes,
            softmax_scale=abs(softmax_scale) or 1.0,
            soft_cap=attn_logits_soft_cap,
            window=sliding_window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items),
            grid=(splits, jnp.maximum(count, 1)),
            in_specs=[pl.BlockSpec((heads, group, block_q, head_dim), tile_of), in_hbm, in_hbm, in_hbm],
            out_specs=[
                pl.BlockSpec((heads, group, block_q, value_dim), tile_of),
                pl.BlockSpec((None, block_q, q_heads // splits), lse_tile_of),
            ],
            scratch_shapes=list(scratch),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, group, tiles * block_q, value_dim), query.dtype),
            jax.ShapeDtypeStruct((splits, tiles * block_q, q_heads // splits), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(vmem_bytes(problem, config), 16 * 2**20),
            disable_bounds_checks=True,  # every index was clamped by contract.flatten
        ),
        name="paged_prefill",
    )(kv_head_start.reshape(1), *items, query, in_runs(key_pages), in_runs(value_pages), table)

    # Rows that no sequence owns were not written.
    token = jnp.arange(tokens, dtype=jnp.int32)
    owned = jnp.any((sequences.start <= token[:, None]) & (token[:, None] < sequences.start + sequences.length), axis=1)
    out = out[:, :, :tokens].transpose(2, 0, 1, 3).reshape(tokens, q_heads, value_dim)
    lse = lse[:, :tokens].transpose(1, 0, 2).reshape(tokens, q_heads)
    return jnp.where(owned[:, None, None], out, 0), jnp.where(owned[:, None], lse, -jnp.inf)


def _cores() -> int:
    """Cores of one device, over which a grid's parallel dimension is spread: 2 on a v4 or v5p in megacore mode, else 1."""
    return pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1


class Scratch(NamedTuple):
    """What the kernel keeps on the chip from one grid step to the next."""

    keys: object  # VMEM [2, runs_per_block, kv_heads, run, head_dim]
    values: object  # VMEM [2, runs_per_block, kv_heads, run, value_dim]
    table: object  # SMEM [2 * pages_per_seq]
    acc: object  # VMEM [kv_heads, rows, value_dim] float32
    m: object  # VMEM [kv_heads, rows, LANES] float32, the same in every lane
    l: object  # VMEM [kv_heads, rows, LANES] float32, to be summed over the lanes
    slot: object  # SMEM [1], the buffer that holds the next block to compute with
    page_sems: object  # DMA [2]
    table_sems: object  # DMA [2]


class Rows(NamedTuple):
    """The slice of a tile that takes part in one matrix product. `at` is where its running values are kept."""

    first: object
    count: int
    at: object

    @property
    def slice(self):
        return pl.ds(self.first, self.count)


def _kernel(head_start_ref, *refs, sizes: Sizes, softmax_scale, soft_cap, window):
    """One grid step: one item, and the KV heads of one core."""
    items = Items(*refs[: len(Items._fields)])
    query_ref, key_pages, value_pages, table_hbm, out_ref, lse_ref, *scratch = refs[len(Items._fields) :]
    scratch = Scratch(*scratch)
    kv_heads, group = query_ref.shape[:2]
    runs_per_block = sizes.runs_per_block
    block_kv = runs_per_block * sizes.run
    item, num_items = pl.program_id(1), pl.num_programs(1)
    first_head = head_start_ref[0] + pl.program_id(0) * kv_heads
    position = items.position[item]
    row_start, row_end = items.row_start[item], items.row_end[item]
    key_start, key_end = items.key_start[item], items.key_end[item]
    first_block = lax.div(key_start, block_kv)
    last_block = jnp.maximum(lax.div(key_end - 1, block_kv), first_block)

    def table_slot(item):
        width = table_hbm.shape[-1]
        return pl.multiple_of(lax.rem(item, 2) * width, LANES), width

    def table_copy(item):
        slot = scratch.table.at[pl.ds(*table_slot(item))]
        return pltpu.make_async_copy(table_hbm.at[items.seq[item], 0], slot, scratch.table_sems.at[lax.rem(item, 2)])

    def run_copier(item, block, slot):
        """The function that starts to copy a run of a block."""
        heads = pl.ds(first_head, kv_heads)
        pool, sem, table = items.pool[item], scratch.page_sems.at[slot], table_slot(item)[0]

        def start(at):
            run = block * runs_per_block + at
            index = scratch.table[table + lax.div(run, sizes.runs_per_page)]
            if sizes.runs_per_page > 1:
                index = index * sizes.runs_per_page + lax.rem(run, sizes.runs_per_page)
            for pages, buffer in ((key_pages, scratch.keys), (value_pages, scratch.values)):
                pltpu.make_async_copy(pages.at[pool, heads, index], buffer.at[slot, at], sem).start()

        return start

    def needed_runs(item, block):
        """Which of the block's runs hold needed keys, as [start, end), and whether that is all of them."""
        first = block * runs_per_block
        start = jnp.maximum(lax.div(items.key_start[item], sizes.run) - first, 0)
        end = jnp.minimum(pl.cdiv(items.key_end[item], sizes.run) - first, runs_per_block)
        return start, end, (start == 0) & (end == runs_per_block)

    def start_fetch(item, block, slot):
        start, end, _ = needed_runs(item, block)
        copy = run_copier(item, block, slot)
        rest = end - lax.rem(jnp.maximum(end - start, 0), COPIES_AT_ONCE)

        @pl.loop(start, rest, step=COPIES_AT_ONCE)
        def _(at):
            for i in range(COPIES_AT_ONCE):
                copy(at + i)

        pl.loop(rest, end)(copy)

    def fetch_next(block, slot):
        """Starts to fetch the block after this one, which may be the next item's first."""

        @pl.when(block < last_block)
        def _():
            start_fetch(item, block + 1, slot)

        @pl.when((block == last_block) & (item + 1 < num_items))
        def _():
            table_copy(item + 1).wait()
            start_fetch(item + 1, lax.div(items.key_start[item + 1], block_kv), slot)

    def wait_fetch(block, slot):
        start, end, whole = needed_runs(item, block)

        def wait(*at):  # a copy of the same size stands for the ones that were started
            for buffer in (scratch.keys, scratch.values):
                there = buffer.at[slot, *at]
                pltpu.make_async_copy(there, there, scratch.page_sems.at[slot]).wait()

        pl.when(whole)(wait)
        pl.when(jnp.logical_not(whole))(lambda: pl.loop(start, end)(wait))

    def attend_block(block, parts, whole_block, masked_rows, masked_at_once):
        slot = scratch.slot[0]
        scratch.slot[0] = 1 - slot
        step = functools.partial(
            _attend_step,
            query_ref=query_ref,
            keys_ref=scratch.keys.at[slot],
            values_ref=scratch.values.at[slot],
            running=(scratch.m, scratch.l, scratch.acc),
            sizes=sizes,
            softmax_scale=softmax_scale,
            soft_cap=soft_cap,
        )
        first_key = block * block_kv

        def unmasked():
            """Every row of the tile sees every key, and all pages of the next block are needed: they are fetched on the way."""
            wait_fetch(block, slot)
            at_once = sizes.heads_at_once(kv_heads)
            steps = kv_heads // at_once
            copy = run_copier(item, block + 1, 1 - slot)
            share = sizes.runs_per_chunk // steps if sizes.runs_per_chunk % steps == 0 else 0

            @pl.loop(0, sizes.chunks_per_block)
            def _(chunk):
                if not share:
                    for run in range(sizes.runs_per_chunk):
                        copy(chunk * sizes.runs_per_chunk + run)

                @pl.loop(0, steps)
                def _(heads):
                    for run in range(share):
                        copy(chunk * sizes.runs_per_chunk + heads * share + run)
                    step(chunk, [(heads * at_once + i, part_rows(part)) for i in range(at_once) for part in range(sizes.parts)])

        def masked():
            fetch_next(block, 1 - slot)
            wait_fetch(block, slot)
            at_once = _divisor(kv_heads, masked_at_once)
            low = lax.div(jnp.maximum(key_start - first_key, 0), sizes.chunk)
            high = jnp.minimum(pl.cdiv(key_end - first_key, sizes.chunk), sizes.chunks_per_block)

            @pl.loop(low, high)
            def _(chunk):
                @pl.loop(*parts)
                def _(part):
                    rows = masked_rows(part)
                    mask = Mask(first_key + chunk * sizes.chunk, position + rows.first, key_start, key_end, window)

                    @pl.loop(0, kv_heads // at_once)
                    def _(heads):
                        step(chunk, [(heads * at_once + i, rows) for i in range(at_once)], mask)

        if whole_block is None:
            return masked()
        whole = whole_block(first_key)
        pl.when(whole)(unmasked)
        pl.when(jnp.logical_not(whole))(masked)

    def part_rows(part):
        first = pl.multiple_of(part * sizes.part, sizes.part)
        return Rows(first, sizes.part, pl.ds(pl.multiple_of(part * group * sizes.part, sizes.part), group * sizes.part))

    def attend_tile():
        parts = lax.div(row_start, sizes.part), pl.cdiv(row_end, sizes.part)
        all_parts = (parts[0] == 0) & (parts[1] == sizes.parts)

        def whole_block(first_key):
            end = first_key + block_kv
            whole = all_parts & (end <= position + row_start + 1) & (end + block_kv <= key_end)
            return whole if window is None else whole & (first_key > position + row_end - 1 - window)

        attend_rows(parts, whole_block, part_rows, PRODUCTS_AT_ONCE // 2)

    def attend_few_rows():
        rows = Rows(pl.multiple_of(lax.div(row_start, few) * few, few), few, pl.ds(0, group * few))
        attend_rows((0, 1), None, lambda _: rows, PRODUCTS_AT_ONCE)

    def attend_rows(parts, whole_block, rows_of, masked_at_once):
        running = scratch.m, scratch.l, scratch.acc

        @pl.loop(*parts)
        def _(part):
            for ref, value in zip(running, (-jnp.inf, 0.0, 0.0)):
                at = rows_of(part).at
                ref[:, at] = jnp.full((kv_heads, at.size, ref.shape[-1]), value, jnp.float32)

        @pl.loop(first_block, last_block + 1)
        def _(block):
            attend_block(block, parts, whole_block, rows_of, masked_at_once)

        @pl.loop(*parts)
        def _(part):
            scale = softmax_scale if soft_cap is None else soft_cap
            _write(out_ref, lse_ref, running, rows_of(part), row_start, row_end, scale=scale)

    @pl.when(item == 0)
    def first_fetch():
        table_copy(0).start()
        table_copy(0).wait()
        scratch.slot[0] = 0
        start_fetch(0, first_block, 0)

    @pl.when(item + 1 < num_items)
    def fetch_next_table():
        table_copy(item + 1).start()

    few = sublanes(query_ref.dtype)
    if sizes.block_q > few:
        is_few = row_end - lax.div(row_start, few) * few <= few
        pl.when(is_few)(attend_few_rows)
        pl.when(jnp.logical_not(is_few))(attend_tile)
    else:
        attend_tile()


class Mask(NamedTuple):
    """What decides which keys of a chunk are visible: positions of its first key and first row, and the item's keys."""

    first_key: object
    first_position: object
    key_start: object
    key_end: object
    window: int | None

    def hide(self, s, group):
        """Logits [group * rows, keys] with -inf where a row does not see a key."""
        rows, keys = s.shape
        row = lax.broadcasted_iota(jnp.int32, (group, rows // group, 1), 1).reshape(rows, 1)
        end = jnp.minimum(self.first_position + row + 1, self.key_end) - self.first_key
        key = lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        visible = key < end
        if self.window is not None:
            visible &= key >= self.first_position + row + 1 - self.window - self.first_key
        return jnp.where(visible, s, -jnp.inf)

    def zero(self, values):
        """Values [keys, value_dim] with zeros for keys that no row sees: they may be anything, and 0 * NaN is NaN."""
        key = self.first_key + lax.broadcasted_iota(jnp.int32, (values.shape[0], 1), 0)
        return jnp.where((key >= self.key_start) & (key < self.key_end), values, 0)


def _attend_step(
    chunk, products, mask: Mask | None = None, *, query_ref, keys_ref, values_ref, running, sizes: Sizes, softmax_scale, soft_cap
):  # fmt: skip
    """Folds a chunk of keys into the running values of `products`: pairs of a KV head and Rows."""
    m_ref, l_ref, acc_ref = running
    group = query_ref.shape[1]
    runs = pl.ds(chunk * sizes.runs_per_chunk, sizes.runs_per_chunk)
    precision = lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    to_exponent = (softmax_scale if soft_cap is None else soft_cap) * math.log2(math.e)

    def product(x, y, contract):
        dimensions = (((1,), (contract,)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def softmax(head, rows):
        query = query_ref[head, :, rows.slice].reshape(group * rows.count, -1)
        s = product(query, keys_ref[runs, head].reshape(sizes.chunk, -1), 1)
        if soft_cap is not None:
            s = jnp.tanh(s * (softmax_scale / soft_cap))
        if mask is not None:
            s = mask.hide(s, group)
        m = m_ref[head, rows.at]
        m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        # A row that has seen no key yet would subtract infinity from itself.
        shift = m_next if mask is None else jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = jnp.exp2((s - _widen(shift, sizes.chunk)) * to_exponent)
        fade = jnp.exp2((m - shift) * to_exponent)
        m_ref[head, rows.at] = m_next
        l_ref[head, rows.at] = l_ref[head, rows.at] * fade + _lane_sums(p)
        return p.astype(values_ref.dtype), fade

    def add_values(head, rows, p, fade):
        values = values_ref[runs, head].reshape(sizes.chunk, -1)
        if mask is not None:
            values = mask.zero(values)
        acc = acc_ref[head, rows.at]
        acc_ref[head, rows.at] = acc * _widen(fade, acc.shape[1]) + product(p, values, 0)

    # The values of one product are added while the softmax of the next one runs.
    previous = None
    for head, rows in products:
        current = head, rows, *softmax(head, rows)
        if previous is not None:
            add_values(*previous)
        previous = current
    add_values(*previous)


def _write(out_ref, lse_ref, running, rows: Rows, row_start, row_end, *, scale):
    """Divides, and writes the rows of the item, and no other's."""
    m_ref, l_ref, acc_ref = running
    kv_heads, group, _, value_dim = out_ref.shape
    row = rows.first + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    mine = (row >= row_start) & (row < row_end)
    lane = lax.broadcasted_iota(jnp.int32, (1, lse_ref.shape[1]), 1)

    @pl.loop(0, kv_heads)
    def _(head):
        l = jnp.sum(l_ref[head, rows.at], axis=1, keepdims=True)
        l = jnp.broadcast_to(l, (l.shape[0], LANES))
        seen = jnp.where(l > 0, l, 1.0)
        out = (acc_ref[head, rows.at] * _widen(1.0 / seen, value_dim)).astype(out_ref.dtype)
        out = out.reshape(group, rows.count, value_dim)
        out_ref[head, :, rows.slice] = jnp.where(mine[None], out, out_ref[head, :, rows.slice])
        head_lse = jnp.where(l > 0, m_ref[head, rows.at] * scale + jnp.log(seen), -jnp.inf)
        head_lse = _widen(head_lse, lse_ref.shape[1]).reshape(group, rows.count, -1)
        lse = lse_ref[rows.slice]
        for i in range(group):
            lse = jnp.where(mine & (lane == head * group + i), head_lse[i], lse)
        lse_ref[rows.slice] = lse


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


def _widen(x, width):
    """[rows, LANES], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def _lane_sums(p):
    """[rows, keys] as [rows, LANES] with the same sum over the lanes."""
    keys = p.shape[1]
    if keys % LANES == 0:
        return sum(p[:, i : i + LANES] for i in range(0, keys, LANES))
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane == 0, jnp.sum(p, axis=1, keepdims=True), 0.0)
