"""The TPU kernel for sequences of more than one new token: how one grid step attends, and the call.

One pallas_call runs all of them. Its grid walks over the items of schedule.py, the rows of one sequence in one tile of
the query; fetching.py brings the keys and values of an item, block by block.

A block is computed in chunks of keys. The rows of a part of the tile times the query heads of a group are the rows of
one matrix product with the chunk's keys; an item of few rows takes only the slice of the tile that holds them. Blocks
that every row sees whole are not masked, and the copies of the next one's pages are started within the loop of the
matrix products, where the scalar unit has nothing else to do.

The mathematics is in step.py. The products of one KV head overlap with the softmax of another, as in tpu-inference's
ragged paged attention (arXiv 2604.15464). The logits of a product are four times what the registers hold, so logits,
weights and weighted values pass through buffers in VMEM, of which two are in turn.
"""

import functools
import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from paged_prefill.lowering.call import Call, Problem
from paged_prefill.lowering.mosaic_tpu import fetching, schedule
from paged_prefill.lowering.mosaic_tpu.fetching import Fetcher, Pages, Scales
from paged_prefill.lowering.mosaic_tpu.masks import Mask, MaskByRow, Rows, zero_outside
from paged_prefill.lowering.mosaic_tpu.registers import widen
from paged_prefill.lowering.mosaic_tpu.schedule import LANES, Items, Sizes, largest_divisor, round_up, sublanes
from paged_prefill.lowering.mosaic_tpu.step import Product, Scratch, Static, Step
from paged_prefill.primitive.attention import factor_and_lse


def kernel(head_start_ref, *refs, static: Static):
    """One grid step: one item, and the KV heads of one core."""
    sizes = static.sizes
    refs = iter(refs)
    items = Items(*itertools.islice(refs, len(Items._fields)))
    scales = Scales.of(refs, static.held)
    query_ref = next(refs)
    seen_refs = (next(refs), next(refs)) if static.by_row else None
    pages = Pages.of(refs, static.held)
    out_ref, lse_ref, buffers, scratch = refs
    kv_heads, group = query_ref.shape[:2]
    first_head = head_start_ref[0] + pl.program_id(0) * kv_heads
    item = pl.program_id(1)
    fetcher = Fetcher(items, item, pl.num_programs(1), pages, static.held, buffers, first_head, kv_heads, sizes)
    block_kv, position = sizes.block_kv, items.position[item]
    row_start, row_end = items.row_start[item], items.row_end[item]
    key_start, key_end = items.key_start[item], items.key_end[item]
    scale_of = functools.partial(scales.of_head, items.pool[item], first_head)

    def mask_of(first_key, rows, first, causal=True, window=static.window):
        """Of the keys from the first-th on of a chunk that starts at `first_key`."""
        if static.by_row:
            first_new = items.first_new[item] if static.tree else None
            return MaskByRow(*seen_refs, rows, first_key + first, row_start, row_end, first_new)
        return Mask(scratch.ends, rows, first_key + first, key_start, key_end, causal, window)

    def seen_whole(first_key, keys):
        return (items.whole_start[item] <= first_key) & (first_key + keys <= items.whole_end[item])

    # In no chunk do keys both start for some rows and end for others, unless the window is shorter.
    one_edge = not static.by_row and sizes.chunk_is_cut and static.window is not None and static.window >= sizes.chunk

    def windows_start_in(first_key):
        """Whether the window of the tile's first row starts in a chunk, and no row's keys end before it does."""
        if not one_edge:
            return False
        return (first_key <= position + 1 - static.window) & (first_key + sizes.chunk <= key_end)

    def attend_block(block, parts, all_parts, fresh, rows_of):
        """Waits for a block, starts the copies of the one after it, and folds it into the running values."""
        slot, first_key = fetcher.turn(), block * block_kv
        following, exists = fetcher.following(block)
        keys_ref = buffers.keys.at[slot]
        values_ref = keys_ref if static.held.latent else buffers.values.at[slot]
        slot_scales_of = functools.partial(buffers.scales_of_slots, static.held, slot)
        step = Step(query_ref, keys_ref, values_ref, scratch, static, scale_of, slot_scales_of)

        def tile_chunk(chunk, mask_of=None, keys_of_parts=None, copy=None, fresh=False):
            """All parts of the tile side by side; `copy` starts to copy a run of the next block."""
            keys_of_parts = keys_of_parts or [sizes.whole_chunk] * sizes.parts
            at_once = sizes.heads_at_once(kv_heads)
            steps, first_run = kv_heads // at_once, chunk * sizes.runs_per_chunk
            share = sizes.runs_per_chunk // steps if sizes.runs_per_chunk % steps == 0 else 0
            for run in range(0 if share or copy is None else sizes.runs_per_chunk):
                copy(first_run, run)

            @pl.loop(0, steps)
            def _(heads):
                first = first_run + heads * share
                copies = [functools.partial(copy, first, run) for run in range(share if copy else 0)]

                def product(number, head, part, keys):
                    return Product(number & 1, heads * at_once + head, part_rows(part), keys)

                of_heads = enumerate(keys_of_parts * at_once)
                products = [product(number, *divmod(number, sizes.parts), keys) for number, keys in of_heads]
                if mask_of is not None or fresh:
                    return step.attend(chunk, products, mask_of, fresh, copies)
                passed = step.attend_by_old_maximum(chunk, products, copies)

                def attend_passed(head, part):
                    number = head * sizes.parts + part
                    step.attend_passed(chunk, number, product(number, head, part, sizes.whole_chunk))

                @pl.when(passed)
                def _():
                    pl.loop(0, at_once)(lambda head: pl.loop(0, sizes.parts)(lambda part: attend_passed(head, part)))

        def part_chunk(chunk, part, mask_of, keys):
            """One part of the tile."""
            at_once = 1 if all_parts is not None else largest_divisor(kv_heads, schedule.PRODUCTS_AT_ONCE)

            @pl.loop(0, kv_heads // at_once)
            def _(heads):
                # If every buffer's number were known when compiling, the compiler would keep the buffers in
                # registers, of which there are too few, and spill.
                rows, head = rows_of(part), heads * at_once
                products = [Product(lax.rem(part + i, 2), head + i, rows, keys) for i in range(at_once)]
                step.attend(chunk, products, mask_of)

        def first_chunk_of_windows(chunk):
            """Where rows' windows start: later parts see fewer of its keys."""
            first = first_key + chunk * sizes.chunk
            zero_outside(values_ref, chunk, (key_start - first, key_end - first), sizes)
            tile_chunk(chunk, functools.partial(mask_of, first, causal=False), sizes.keys_in_window(), fresh=True)

        def masked_chunk(chunk):
            first = first_key + chunk * sizes.chunk
            mask_of_rows = functools.partial(mask_of, first)
            if not static.by_row:
                zero_outside(values_ref, chunk, (key_start - first, key_end - first), sizes)

            def of_keys(attend, end):
                """What lies behind the last key that rows see adds zeros, which change no bit of sums by lanes."""
                if not sizes.chunk_is_cut:
                    return attend(sizes.whole_chunk)
                ends_early = end - first <= schedule.DEPTH
                pl.when(ends_early)(lambda: attend(slice(0, schedule.DEPTH)))
                pl.when(jnp.logical_not(ends_early))(lambda: attend(sizes.whole_chunk))

            def tile():
                """Parts before the last see fewer keys, if the last does not see past the chunk."""

                def attend(keys):
                    tile_chunk(chunk, mask_of_rows, [keys] * sizes.parts)

                def attend_staggered(keys):
                    window = None if one_edge else static.window
                    tile_chunk(chunk, functools.partial(mask_of_rows, window=window), sizes.keys_up_to(keys.stop))

                if static.by_row or not sizes.chunk_is_cut or sizes.part * (sizes.parts - 1) < LANES:
                    return of_keys(attend, key_end)
                end = position + sizes.block_q
                ends_within = end - first <= sizes.chunk
                pl.when(ends_within)(lambda: of_keys(attend_staggered, end))
                pl.when(jnp.logical_not(ends_within))(lambda: attend(sizes.whole_chunk))

            def part_by_part():
                @pl.loop(*parts)
                def _(part):
                    rows = rows_of(part)
                    end = key_end if static.by_row else jnp.minimum(key_end, position + rows.first + rows.count)
                    of_keys(functools.partial(part_chunk, chunk, part, mask_of_rows), end)

            if all_parts is None:
                return part_by_part()
            pl.when(all_parts)(tile)
            pl.when(jnp.logical_not(all_parts))(part_by_part)

        def whole_block():
            """No chunk needs a mask, and every run of the next block is needed."""
            fetcher.wait(block, slot)
            copy = fetcher.copier(following, 1 - slot)
            pl.loop(0, sizes.chunks_per_block)(lambda chunk: tile_chunk(chunk, copy=copy))

        def any_block():
            pl.when(exists)(lambda: fetcher.start(following, 1 - slot))
            fetcher.wait(block, slot)
            low = lax.div(jnp.maximum(key_start - first_key, 0), sizes.chunk)
            high = jnp.minimum(pl.cdiv(key_end - first_key, sizes.chunk), sizes.chunks_per_block)

            @pl.loop(low, high)
            def _(chunk):
                if all_parts is None:
                    return masked_chunk(chunk)
                whole = all_parts & seen_whole(first_key + chunk * sizes.chunk, sizes.chunk)
                is_fresh = fresh & (block == fetcher.first_block) & (chunk == low)
                pl.when(is_fresh & whole)(lambda: tile_chunk(chunk, fresh=True))
                if one_edge:
                    pl.when(is_fresh & jnp.logical_not(whole))(lambda: first_chunk_of_windows(chunk))
                pl.when(whole & jnp.logical_not(is_fresh))(lambda: tile_chunk(chunk))
                pl.when(jnp.logical_not(whole | is_fresh))(lambda: masked_chunk(chunk))

        if all_parts is None:
            return any_block()
        hot = all_parts & (block > fetcher.first_block) & seen_whole(first_key, block_kv)
        hot &= exists & fetcher.whole(following)
        pl.when(hot)(whole_block)
        pl.when(jnp.logical_not(hot))(any_block)

    def part_rows(part):
        first = pl.multiple_of(part * sizes.part, sizes.part)
        return Rows(first, sizes.part, pl.ds(pl.multiple_of(part * group * sizes.part, sizes.part), group * sizes.part))

    def attend_tile():
        """The parts of the tile that hold the item's rows."""
        parts = lax.div(row_start, sizes.part), pl.cdiv(row_end, sizes.part)
        attend_rows(parts, (parts[0] == 0) & (parts[1] == sizes.parts), part_rows)

    def attend_few_rows():
        """Only the slice of the tile that holds the item's rows."""
        rows = Rows(pl.multiple_of(lax.div(row_start, few) * few, few), few, pl.ds(0, group * few))
        attend_rows((0, 1), None, lambda _: rows)

    def attend_rows(parts, all_parts, rows_of):
        """Attends the rows rows_of(part) for every part in [start, end).

        `all_parts` says whether those are all parts of the tile, None that it takes other slices of it.
        """

        if not static.by_row:
            pl.loop(*parts)(lambda part: Mask.fill(scratch.ends, rows_of(part), group, position))

        def clear():
            pl.loop(*parts)(lambda part: pl.loop(0, kv_heads)(lambda head: scratch.clear(head, rows_of(part).at)))

        # A chunk of which all parts are attended together needs no running values before it.
        fresh = None
        if all_parts is not None:
            first_key = lax.div(key_start, sizes.chunk) * sizes.chunk
            fresh = all_parts & (key_start < key_end)
            fresh &= seen_whole(first_key, sizes.chunk) | windows_start_in(first_key)
        clear() if fresh is None else pl.when(jnp.logical_not(fresh))(clear)

        @pl.loop(fetcher.first_block, fetcher.last_block + 1)
        def _(block):
            attend_block(block, parts, all_parts, fresh, rows_of)

        @pl.loop(*parts)
        def _(part):
            scale = static.softmax_scale if static.soft_cap is None else static.soft_cap
            _write(out_ref, lse_ref, scratch, rows_of(part), row_start, row_end, scale, scale_of)

    fetcher.begin()
    few = sublanes(query_ref.dtype)
    if sizes.block_q > few:
        is_few = row_end - lax.div(row_start, few) * few <= few
        pl.when(is_few)(attend_few_rows)
        pl.when(jnp.logical_not(is_few))(attend_tile)
    else:
        attend_tile()


def _write(out_ref, lse_ref, scratch: Scratch, rows: Rows, row_start, row_end, scale, scale_of):
    """Divides, and writes the rows of the item, and no other's."""
    kv_heads, group, _, value_dim = out_ref.shape
    row = rows.first + lax.broadcasted_iota(jnp.int32, (rows.count, 1), 0)
    lane = lax.broadcasted_iota(jnp.int32, (1, lse_ref.shape[1]), 1)
    by_lane_ref = scratch.by_lane

    def write(mine):
        """`mine` are the rows to write, None if all."""

        @pl.loop(0, kv_heads)
        def _(head):
            m, l = scratch.m[head, rows.at], jnp.sum(scratch.l[head, rows.at], axis=1, keepdims=True)
            l = jnp.broadcast_to(l, m.shape)
            factor, _ = factor_and_lse(l, m)
            if (value_scale := scale_of("value", head)) is not None:
                factor = factor * value_scale
            out = (scratch.acc[head, rows.at] * widen(factor, value_dim)).astype(out_ref.dtype)
            out = out.reshape(group, rows.count, value_dim)
            if mine is not None:
                out = jnp.where(mine[None], out, out_ref[head, :, rows.slice])
            out_ref[head, :, rows.slice] = out
            # A logarithm for each query head in a lane of its own, not one for each of the lanes that hold the same.
            for of_head, by_lane in ((l, by_lane_ref.at[0]), (m, by_lane_ref.at[1])):
                of_head, x = widen(of_head, lane.shape[1]).reshape(group, rows.count, -1), by_lane[: rows.count]
                for i in range(group):
                    x = jnp.where(lane == head * group + i, of_head[i], x)
                by_lane[: rows.count] = x

        l, m = by_lane_ref[0, : rows.count], by_lane_ref[1, : rows.count]
        _, lse = factor_and_lse(l, m * scale)
        lse_ref[rows.slice] = lse if mine is None else jnp.where(mine, lse, lse_ref[rows.slice])

    all_mine = (row_start <= rows.first) & (rows.first + rows.count <= row_end)
    pl.when(all_mine)(lambda: write(None))
    pl.when(jnp.logical_not(all_mine))(lambda: write((row >= row_start) & (row < row_end)))


def attend(call: Call, sizes: Sizes, splits: int, vmem_limit_bytes: int):
    """The results of sequences of more than one new token; the rows of others are anything.

    `splits` are the cores that share the KV heads.
    """
    problem, sequences = call.problem, call.sequences
    tokens, q_heads, num_kv_heads, group = problem.tokens, problem.q_heads, problem.num_kv_heads, problem.group
    block_q, attention, heads = sizes.block_q, problem.attention, num_kv_heads // splits
    first_row = schedule.first_row(call, block_q)
    items, count = schedule.work_items(call, block_q, first_row)
    tiles, packing = -(-tokens // block_q), sublanes(call.query.dtype)
    rows = tiles * block_q + (block_q - packing if problem.seqs > 1 else 0)  # the last tile may start so much later
    query = jnp.pad(call.query, ((0, rows - tokens), (0, 0), (0, 0)))
    query = query.reshape(-1, num_kv_heads, group, problem.head_dim).transpose(1, 2, 0, 3)
    pages, scales, held = fetching.pages_of(call, sizes), fetching.scales_of(call), fetching.Held.by(call)
    by_row = call.ranges is not None or call.tree is not None
    seen = _seen(call, tiles, block_q, first_row) if by_row else []

    def in_elements(*sizes):
        return [pl.Element(size) for size in sizes]

    def tile_of(split, item, head_start, tile, first_token, *_):
        return (split * heads, 0, pl.multiple_of(first_token[item], packing), 0)

    def lse_tile_of(split, item, head_start, tile, first_token, *_):
        return (split, pl.multiple_of(first_token[item], packing), 0)

    def seen_tile_of(split, item, head_start, tile, *_):
        return (tile[item], 0, 0)

    out, lse = pl.pallas_call(
        functools.partial(
            kernel,
            static=Static(
                sizes=sizes,
                softmax_scale=abs(attention.softmax_scale) or 1.0,
                soft_cap=attention.attn_logits_soft_cap,
                window=attention.sliding_window,
                value_dim=problem.value_dim,
                held=held,
                by_row=by_row,
                tree=call.tree is not None,
            ),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(items) + len(scales),
            grid=(splits, jnp.maximum(count, 1)),
            in_specs=[
                pl.BlockSpec(in_elements(heads, group, block_q, problem.head_dim), tile_of),
                *(pl.BlockSpec((None, *x.shape[1:]), seen_tile_of) for x in seen),
                *fetching.in_hbm(pages),
            ],
            out_specs=[
                pl.BlockSpec(in_elements(heads, group, block_q, problem.value_dim), tile_of),
                pl.BlockSpec([None, *in_elements(block_q, q_heads // splits)], lse_tile_of),
            ],
            scratch_shapes=[fetching.buffers_of(problem, held, sizes, heads), Scratch.of(problem, sizes, heads)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_kv_heads, group, rows, problem.value_dim), query.dtype),
            jax.ShapeDtypeStruct((splits, rows, q_heads // splits), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # every index was clamped by call.flatten
        ),
        name="paged_prefill",
    )(call.kv_head_start.reshape(1), *items, *scales.values(), query, *seen, *(x for x in pages if x is not None))
    _, owned = schedule.owners(sequences, tokens)
    # Before the heads go back: XLA made both as one from a copy in HBM, and keeps on the chip what lies between two.
    out = jnp.where(owned[:, None], out[:, :, :tokens], 0)
    out = out.transpose(2, 0, 1, 3).reshape(tokens, q_heads, problem.value_dim)
    return out, lse[:, :tokens].transpose(1, 0, 2).reshape(tokens, q_heads)


def _seen(call: Call, tiles: int, block_q: int, first_row) -> list:
    """What each row sees, int32 [tiles, block_q, 2 + words], and the same with the rows last."""
    seen = schedule.seen_by_rows(call)
    if call.tree is not None:
        seen = jnp.concatenate([seen, lax.bitcast_convert_type(call.tree, jnp.int32)], axis=1)
    seen = jnp.pad(seen, ((0, (tiles + 1) * block_q - len(seen)), (0, 0)))
    seen = lax.dynamic_slice_in_dim(seen, first_row, tiles * block_q).reshape(tiles, block_q, -1)
    return [seen, seen.swapaxes(1, 2)]


def vmem_bytes(problem: Problem, sizes: Sizes) -> int:
    """VMEM that a call takes beside the buffers of pages, from above: running values and one step's intermediates."""
    itemsize = jnp.dtype(problem.dtype).itemsize
    value_dim = round_up(problem.value_dim, LANES)
    features = round_up(problem.head_dim, LANES) + value_dim
    rows = problem.q_heads * sizes.block_q
    tiles = 2 * rows * features * itemsize + 2 * sizes.block_q * round_up(problem.q_heads, LANES) * 4
    running = rows * (value_dim + 2 * LANES) * 4 + problem.group * sizes.block_q * LANES * 4
    per_row = sizes.chunk * (4 + itemsize)
    per_row += -(-sizes.chunk // schedule.DEPTH) * value_dim * 4
    by_row = problem.group * max(sizes.block_q, 2 * sizes.part) * LANES * 4
    buffers = by_row + 2 * problem.group * sizes.part * per_row + 2 * sizes.part * round_up(problem.q_heads, LANES) * 4
    # What the compiler keeps of a masked step besides.
    step = 2 * problem.group * sizes.part * (round_up(sizes.chunk, LANES) + features) * 4
    return tiles + running + buffers + step
