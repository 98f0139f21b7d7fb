"""The streaming lowering that runs anywhere XLA does: flash attention over pages, written with plain XLA operations.

A tile of query rows walks over its keys a block at a time, from the first that some row sees to the last, and keeps the
softmax of what it has seen (softmax.py). Only a tile and a block of pages are ever materialised, and only a block in
hand is turned from a quantised cache's numbers into those that are multiplied.

Tiles of one row walk side by side, each in a lane. Those with many blocks take several lanes, which share the blocks
out and are merged in the end; the others take one. Lanes are filled in order of their blocks, so that neighbours have
as many, and what a sequence costs follows from its own keys. Where a single block holds all keys of a table there is
nothing to order, and a pack of no more sequences than lanes gives each its own; on a CPU it has as many lanes, and tall
tiles that look at half of the block at most take half, or what a prompt's first tile looks at.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from paged_prefill.lowering.call import Call, sinks_joined, stretches
from paged_prefill.lowering.xla import softmax
from paged_prefill.lowering.xla.plan import Plan, Seen, Sequence, Table, Tile
from paged_prefill.lowering.xla.plan import divided, in_one, not_in_one, packed, sum_of, taken
from paged_prefill.lowering.xla.walks import Turns, Walk, heights_of_call, of_tokens, shared, tiles_of, walks
from paged_prefill.primitive.attention import factor_and_lse
from paged_prefill.primitive.config import PrefillPageAttentionConfig


def attend(call: Call, config: PrefillPageAttentionConfig, product_dtype, turns: Turns):
    """The results of a call; `product_dtype` is that of the operands of its matrix products."""
    problem, heights = call.problem, heights_of_call(call.problem, config, turns)
    out = _scattered(jnp.zeros((problem.tokens, problem.q_heads, problem.value_dim), call.query.dtype))
    results = out, jnp.full((problem.tokens, problem.q_heads), -jnp.inf, jnp.float32)
    walkers = [Walker(call, walk, heights, product_dtype) for walk in walks(problem, config, turns)]
    made, given = None, call.sequences[:3]  # start, length and context_len
    if call.indices is not None:
        packs = call.indices.query_offsets.shape[0]
        made, given = functools.partial(stretches, tokens=problem.tokens // packs), call.indices[:2]
    tables = in_one(
        turns.in_one,
        functools.partial(_tables, walkers, made),
        given,
        [pool if pool is not None else call.sequences.pool for pool in (None, call.key_pool, call.value_pool)],
        call.ranges if any(walker.orders for walker in walkers) else None,
    )
    walks_of = list(zip(walkers, tables, strict=True))
    for some in (walks_of[:-1], walks_of[-1:]):  # tiles of more rows, and single rows: many calls have only one kind
        results = _attend(some, results)
    out, lse = results
    return _floats(out, call.query.dtype), lse


def _attend(walks_of: "list[tuple[Walker, Table]]", results):
    """Adds the results of all tiles of these heights, if there are any."""

    def attend_all(results):
        for walker, table in walks_of:
            results = walker.attend(table, results)
        return results

    if not any(walker.walk.skips for walker, _ in walks_of):
        return attend_all(results)
    any_tiles = functools.reduce(jnp.logical_or, [table.any_tiles for _, table in walks_of])
    return lax.cond(any_tiles, attend_all, lambda results: results, results)


# Whether XLA's CPU compiler scatters floats of 16 bits in wider ones, so that results are bits until all is done.
HOLDS_BITS = jax.__version_info__ < (0, 11)
PARTNERS = {"keys": "values", "key_scale": "value_scale"}  # what lies beside what in one array


class Walker:
    """One walk of a call: what does not change from tile to tile, and its steps, from the whole to a block of keys."""

    def __init__(self, call: Call, walk: Walk, heights: tuple[int, ...], product_dtype):
        self.call, self.problem, self.attention = call, call.problem, call.problem.attention
        self.walk, self.heights, self.product_dtype = walk, heights, product_dtype
        seqs = self.problem.seqs
        self.lane_of_each = walk.alone and walk.most_blocks == 1 and isinstance(seqs, int) and seqs <= walk.lanes
        self.orders = walk.lanes > 1 and walk.most_blocks != 1
        self.runs_per_page = self.problem.page_size // walk.run
        self.pages = {
            name: self._in_runs(array)
            for name, array in dict(
                keys=call.key_pages,
                values=call.value_pages,
                key_scale=_of_each_slot(call.key_scale),
                value_scale=_of_each_slot(call.value_scale),
            ).items()
            if array is not None
        }
        of_tokens = dict(query=call.query, ranges=call.ranges, tree=call.tree)
        self.of_tokens = {name: array for name, array in of_tokens.items() if array is not None}

    def _in_runs(self, pages):
        """Pages, or scales of their slots, with the slots in runs: a dimension of them before that of the slots."""
        if self.runs_per_page == 1:
            return pages
        at = 1 + self.problem.layout.apart.index("page_size")
        return pages.reshape(*pages.shape[:at], self.runs_per_page, self.walk.run, *pages.shape[at + 1 :])

    def attend(self, table: Table, results):
        """Adds the results of all tiles of this height, group by group."""
        head_blocks = self.problem.num_kv_heads // self.walk.heads
        shapes = [x.shape for x in results]
        results = tuple(x.reshape(x.shape[0] * head_blocks, -1, *x.shape[2:]) for x in results)

        def body(turn, results):
            turn, *arrays = _kept_in_loop(turn, *self.of_tokens.values())
            return self._attend_group(turn, table, dict(zip(self.of_tokens, arrays)), results)

        alone = self.lane_of_each and self.problem.tokens == 1
        if head_blocks == 1 and (alone or (self.walk.at_once and self.walk.lanes == self.problem.seqs)):
            results = body(jnp.int32(0), results)
        else:
            results = lax.fori_loop(0, table.turns, body, results)
        return tuple(x.reshape(shape) for x, shape in zip(results, shapes))

    def table(self, numbers, tiles, ranges) -> Table:
        """What its turns are told from; of the numbers of its sequences, and of how many tiles there are."""
        lanes, any_tiles = self.walk.lanes, tiles > 0
        if self.orders:
            numbers, tiles = self._ordered(numbers, ranges)
        groups = divided(tiles + (lanes - 1), lanes)
        if self.lane_of_each:  # a token alone is such a tile, or is in none
            groups = jnp.int32(1) if self.problem.tokens == 1 else jnp.minimum(tiles, 1)
        return Table(numbers, groups * (self.problem.num_kv_heads // self.walk.heads), any_tiles)

    def _ordered(self, numbers, ranges):
        """The numbers of sequences of which those with most blocks are taken first, by as many lanes as these need."""

        def counted(numbers, ranges):
            sequences = Sequence.of(numbers)
            tiles = sequences.tiles
            ranges = None if ranges is None else taken(ranges, sequences.start + sequences.first_row)[:, None]
            tile, _, _ = self._tile(sequences, jnp.zeros_like(tiles), tiles, ranges)
            blocks = jnp.where(tiles > 0, self._blocks(tile), 0)
            splits = jnp.where(shared(blocks, self.walk.splits), self.walk.splits, 1)
            if self.call.sinks is None:  # else a row that sees no key has a result too
                tiles = jnp.where(blocks > 0, tiles, 0)
            return blocks, splits, tiles * splits

        blocks, splits, tiles = in_one(self.walk.in_one, counted, numbers, ranges)
        number = jnp.arange(numbers.shape[0], dtype=jnp.int32)
        more, as_many = blocks[:, None] > blocks[None, :], blocks[:, None] == blocks[None, :]
        before = more | (as_many & (number[:, None] < number[None, :]))
        sequences = Sequence.of(numbers)._replace(tiles=tiles, splits=splits, first_tile=sum_of(before, tiles))
        return packed(sequences), jnp.sum(tiles, dtype=jnp.int32)

    def _lanes(self, group, numbers):
        """The numbers of each lane's sequence in a group, and the number of its tile in that."""
        lanes = self.walk.lanes
        number = group * lanes + jnp.arange(lanes, dtype=jnp.int32)
        if self.lane_of_each:
            return taken(numbers, number), (number >= self.problem.seqs).astype(jnp.int32)
        first, tiles = (numbers[None, :, Sequence._fields.index(name)] for name in ("first_tile", "tiles"))
        own = (first <= number[:, None]) & (number[:, None] < first + tiles)
        seq = jnp.arange(numbers.shape[0], dtype=jnp.int32)[None, :]
        found = taken(numbers, jnp.sum(jnp.where(own, seq, 0), axis=1, dtype=jnp.int32))
        return found, number - Sequence.of(found).first_tile

    def _plan(self, turn, numbers, kv_head_start, page_indices, by_token) -> Plan:
        """What there is to know of the tiles of a turn, and of their results."""
        problem, walk = self.problem, self.walk
        head_blocks = problem.num_kv_heads // walk.heads
        group = divided(turn, head_blocks)
        head_block = turn - group * head_blocks
        numbers, number = self._lanes(group, numbers)
        sequence = Sequence.of(numbers)
        split = jnp.zeros_like(number)
        live = number < sequence.tiles
        if walk.splits > 1:  # lanes of one sequence have its one tile of this height
            number, split = split, number
        first = sequence.first_row + number * sequence.height
        rows = jnp.where(live, jnp.minimum(sequence.height, sequence.length - first), 0)
        row = jnp.arange(walk.height, dtype=jnp.int32)[None, :]
        token = jnp.where(row < rows[:, None], (sequence.start + first)[:, None] + row, problem.tokens)
        here = {name: taken(x, token) for name, x in by_token.items()}
        tile, low, high = self._tile(sequence, number, rows, here.get("ranges"))
        place = token * head_blocks + head_block
        result = place
        if walk.splits > 1:  # the first has it all
            result = jnp.where(split[:, None] > 0, problem.tokens * head_blocks, place)
        few = [jnp.any(self._blocks(tile, shorter) > 1).astype(jnp.int32) for shorter in self._shorter()]
        plan = Plan(
            tile, Seen(low, high, here.get("tree")), jnp.any(live), place.reshape(-1), result.reshape(-1),
            head_block, kv_head_start + head_block * walk.heads, too_short=sum(few) if few else None,
        )  # fmt: skip
        if walk.most_blocks == 1:
            return plan._replace(runs=self._runs(page_indices, tile, tile.first_run))
        left = self._blocks(tile) - split
        return plan._replace(
            turns=jnp.max(divided(jnp.maximum(left + (sequence.splits - 1), 0), sequence.splits)),
            split=split if walk.splits > 1 else None,
            splits=sequence.splits if walk.splits > 1 else None,
            seen_by_all=(None if low is None else jnp.max(low, axis=1), jnp.min(high, axis=1)),
            start=softmax.start((walk.lanes, walk.heads, self._rows())),
        )

    def _attend_group(self, turn, table: Table, by_token, results):
        """Adds the results of tiles that walk side by side: of each lane's sequence that with this number."""
        problem, walk, softmax_scale = self.problem, self.walk, self.attention.softmax_scale
        height, lanes, group = walk.height, walk.lanes, problem.group
        head_blocks = problem.num_kv_heads // walk.heads
        query = by_token.pop("query")
        plan = in_one(
            walk.in_one,
            self._plan,
            turn,
            table.numbers,
            self.call.kv_head_start,
            self.call.sequences.page_indices if walk.most_blocks == 1 else None,
            by_token,
        )

        query = query.reshape(problem.tokens * head_blocks, walk.heads, group, problem.head_dim)
        queries = taken(query, plan.place)
        queries = queries.reshape(lanes, height, *queries.shape[1:])
        queries = queries.transpose(0, 2, 1, 3, 4).reshape(lanes, walk.heads, -1, problem.head_dim)
        queries = jnp.broadcast_to(queries, (lanes, walk.heads, self._rows(), problem.head_dim))
        queries, scale = queries.astype(self.product_dtype), softmax_scale
        if walk.in_place and walk.most_blocks == 1:
            # In a loop, as longer tables have one: else XLA scales and converts them anew for every key.
            queries, scale = queries.astype(jnp.float32), 1.0
            queries = softmax.where_needed(plan.live, lambda x: x * softmax_scale, queries)
        elif self.product_dtype == jnp.float32:
            queries, scale = queries * softmax_scale, 1.0  # once for each query, not for each logit
        elif softmax_scale <= 0:
            queries, scale = queries * math.copysign(bool(softmax_scale), softmax_scale), abs(softmax_scale) or 1.0

        def step(i, running, number=None, walker=self):
            _, *pages = _kept_in_loop(i, *self.pages.values())
            block, mask = walker._block(plan, number, pages)
            soft_cap = self.attention.attn_logits_soft_cap
            # Where the results are copied in the end, there would be too little room for weights beside logits.
            in_use = plan.live if walker.walk.skips_masks and HOLDS_BITS else None
            return softmax.fold(
                running, queries, block, mask, scale, soft_cap, walk.in_place, walk.at_once, in_use,
                functools.partial(in_one, walk.in_one),
            )  # fmt: skip

        def all_blocks():
            if walk.most_blocks == 1:
                return step(turn, None)

            def step_of_loop(i, running):
                i = not_in_one(walk.in_place, i)
                return step(i, running, i if plan.split is None else i * plan.splits + plan.split)

            nothing = jnp.zeros((*queries.shape[:-1], problem.value_dim), jnp.float32)
            return lax.fori_loop(0, plan.turns, step_of_loop, softmax.Running(*plan.start, nothing))

        shorter = [Walker(self.call, walk, self.heights, self.product_dtype) for walk in self._shorter()]
        few = [functools.partial(step, turn, None, walker=walker) for walker in shorter]
        running = lax.switch(plan.too_short, [*few, all_blocks]) if few else all_blocks()
        if walk.splits > 1:
            running = softmax.merge_lanes(running, plan.splits > 1, walk.splits)
        largest, total, factor, _ = running
        out = jnp.where((total == 0)[..., None], 0.0, running.unnormalised * factor[..., None])
        lse = factor_and_lse(total, largest)[1]
        if self.call.sinks is not None:
            out, lse = sinks_joined(out, lse, self._sinks(plan.tile.seq, plan.head_block))

        def rows_first(x):
            x = x.reshape(lanes, walk.heads, height, -1, *x.shape[3:])[:, :, :, :group]
            return jnp.moveaxis(x, 1, 2).reshape(lanes * height, walk.heads * group, *x.shape[4:])

        return tuple(
            result.at[plan.result].set(rows_first(x), mode="drop", unique_indices=True, wrap_negative_indices=False)
            for result, x in zip(results, (_scattered(out.astype(self.call.query.dtype)), lse), strict=True)
        )

    def _shorter(self) -> list[Walk]:
        """Those with fewer runs, the fewest first: the shortest block that holds all keys of some tiles will do."""
        return [self.walk._replace(runs=runs, few_runs=(), skips_masks=False) for runs in self.walk.few_runs]

    def _rows(self) -> int:
        """Rows of a tile and a KV head: two for one, by which XLA would multiply one number after the other."""
        return max(2, self.walk.height * self.problem.group)

    def _sinks(self, seq, head_block):
        """The sinks of each row of a group, [lanes, kv_heads, height * group]."""
        walk, packs = self.walk, self.call.sinks.shape[0]
        sinks = self.call.sinks.reshape(packs, -1, walk.heads, 1, self.problem.group)
        sinks = taken(sinks, divided(seq, self.problem.seqs // packs), head_block)
        shape = walk.lanes, walk.heads, walk.height, self.problem.group
        return jnp.broadcast_to(sinks, shape).reshape(*shape[:2], -1)

    def _blocks(self, tile: Tile, walk: Walk | None = None):
        """How many blocks tiles walk over; those of another walk if that is given."""
        walk = walk or self.walk
        keys = jnp.maximum(tile.end_key - tile.first_run * walk.run, 0)
        return divided(keys + (walk.block_kv - 1), walk.block_kv)

    def _tile(self, sequence: Sequence, number, rows, ranges):
        """What there is to know of tiles, and the keys low <= j < high that each of their rows sees; low None for 0.

        By causality and window both ends grow with the row, so that the first row and the last say it for all.
        """
        row = jnp.arange(self.walk.height, dtype=jnp.int32)[None, :]
        end = jnp.minimum(sequence.context_len, self.problem.capacity)
        first_new = sequence.context_len - sequence.length
        position = first_new + sequence.first_row + number * sequence.height
        if ranges is None:
            low, high = self.attention.visible_keys(position[:, None] + row)
            start_key, _ = self.attention.visible_keys(position)
            _, end_key = self.attention.visible_keys(position + rows - 1)
            low = None if self.attention.sliding_window is None else low
        else:
            low, high = jnp.maximum(ranges[..., 0], 0), jnp.minimum(ranges[..., 1], end[:, None])
            sees = (row < rows[:, None]) & (low < high)
            start_key = jnp.min(jnp.where(sees, low, end[:, None]), axis=1)
            end_key = jnp.max(jnp.where(sees, high, 0), axis=1)
        if self.call.ranges is not None or self.call.tree is not None:
            high = jnp.where(row < rows[:, None], high, 0)  # rows past the sequence's are another's: they see nothing
        start_key, end_key = jnp.minimum(start_key, end), jnp.where(rows > 0, jnp.minimum(end_key, end), 0)
        tile = Tile(
            sequence.seq, sequence.pool, sequence.key_pool, sequence.value_pool, start_key, end_key,
            divided(start_key, self.walk.run), first_new,
        )  # fmt: skip
        return tile, low, jnp.minimum(high, end_key[:, None])

    def _block(self, plan: Plan, number, pages):
        """Blocks of tiles with these numbers, which tokens see which keys, and whether any is hidden, if asked.

        The first, where there is no number.
        """
        tile = plan.tile
        first_run = tile.first_run if number is None else tile.first_run + number * self.walk.runs
        runs = self._runs(self.call.sequences.page_indices, tile, first_run) if plan.runs is None else plan.runs
        block = self._fetch(tile, runs, plan.first_head, pages)
        key = (first_run * self.walk.run)[:, None] + jnp.arange(self.walk.block_kv, dtype=jnp.int32)[None, :]
        # Slots that no row sees may hold anything, and 0 * NaN is NaN: a weight of zero is not enough.
        if self.call.ranges is None and self.call.tree is None:
            some = (key >= tile.start_key[:, None]) & (key < tile.end_key[:, None])
        else:
            some = jnp.any(plan.seen.visible(key, tile.first_new), axis=1)
        hidden = None
        if self.walk.skips_masks and plan.seen.tree is None:
            low, high = plan.seen_by_all
            hidden = jnp.any(key[:, -1] >= high)
            if low is not None:
                hidden |= jnp.any(key[:, 0] < low)
        values = softmax.where_needed(hidden, lambda x: jnp.where(some[:, None, :, None], x, 0), _bits(block.values))
        block = block._replace(values=_floats(values, block.values.dtype))
        if block.value_scale is not None:
            block = block._replace(value_scale=jnp.where(some[:, None, :], block.value_scale, 0.0))

        def mask(logits):
            lanes, kv_heads, _, keys = logits.shape
            of_tokens = logits.reshape(lanes, kv_heads, self.walk.height, -1, keys)
            masked = softmax.where_needed(
                hidden,
                lambda x: jnp.where(plan.seen.visible(key, tile.first_new)[:, None, :, None, :], x, -jnp.inf),
                of_tokens,
            )
            return masked.reshape(logits.shape)

        return block, mask

    def _runs(self, page_indices, tile: Tile, first_run):
        """Where the runs of a block of each lane lie: their pages, and their numbers in these."""
        index = first_run[:, None] + jnp.arange(self.walk.runs, dtype=jnp.int32)[None, :]
        column = divided(index, self.runs_per_page)
        page = taken(
            page_indices, tile.seq[:, None], jnp.minimum(column, self.problem.columns - 1)
        )
        return page, index - column * self.runs_per_page

    def _fetch(self, tile: Tile, runs, first_head, pages) -> softmax.Block:
        """A block of keys and values of each lane, as they are multiplied, from the arrays `self.pages`.

        Of `runs`, which `_runs` says, those of its own length.
        """
        page, run = (x[:, : self.walk.runs] for x in runs)
        pools = dict(keys=tile.key_pool, values=tile.value_pool)
        gathered = {}
        for name, array in zip(self.pages, pages, strict=True):
            at = dict(pool=pools.get(name, tile.pool)[:, None], num_pages=page, kv_heads=first_head, run=run)
            gathered |= self._gather(name, array, at)
        keys = gathered["keys"].astype(self.product_dtype)
        key_scale = self._scale(tile, first_head, self.call.key_scale, gathered.get("key_scale"))
        if "values" not in gathered:  # a latent cache
            return softmax.Block(keys, keys[..., : self.problem.value_dim], key_scale, key_scale)
        value_scale = self._scale(tile, first_head, self.call.value_scale, gathered.get("value_scale"))
        return softmax.Block(keys, gathered["values"].astype(self.product_dtype), key_scale, value_scale)

    def _gather(self, name, array, at):
        """Runs of one of `self.pages`, [lanes, heads, keys, ...], by name; also its values, if it holds both.

        `at` says where by dimension, for lanes and runs. What is gathered lies in the array's own order, lanes in front
        and runs before their slots, so that only a block is ever brought into another.
        """
        walk, layout = self.walk, self.problem.layout
        dims = ["pool", *layout.apart]
        if self.runs_per_page > 1:
            dims.insert(dims.index("page_size"), "run")
        dims = dims[: array.ndim]  # scales have no features
        starts = [dim for dim in dims if dim in at]
        single = [dim for dim in ("pool", "num_pages", "run") if dim in dims]
        offset = [dim for dim in dims if dim not in single]
        result = ["lanes", *offset]
        result.insert(result.index("page_size"), "runs")
        shape = (walk.lanes, walk.runs)
        gathered = lax.gather(
            _bits(array),
            jnp.stack([jnp.broadcast_to(at[dim], shape) for dim in starts], axis=-1),
            lax.GatherDimensionNumbers(
                offset_dims=tuple(map(result.index, offset)),
                collapsed_slice_dims=tuple(sorted(map(dims.index, single))),
                start_index_map=tuple(map(dims.index, starts)),
            ),
            [{"kv_heads": walk.heads}.get(dim, 1 if dim in single else size) for dim, size in zip(dims, array.shape)],
            mode=lax.GatherScatterMode.CLIP,
        )
        order = [dim for dim in ("2", "lanes", "kv_heads", "runs", "page_size", "features") if dim in result]
        gathered = gathered.transpose(*map(result.index, order))
        both = gathered.reshape(-1, walk.lanes, walk.heads, walk.block_kv, *gathered.shape[order.index("page_size") + 1 :])
        both = _floats(both, array.dtype)
        return dict(zip((name, PARTNERS[name]), both)) if layout.combined else {name: both[0]}

    def _scale(self, tile: Tile, first_head, scale, of_each_slot):
        """A block's scales, [lanes, kv_heads or 1, keys or 1], or None."""
        if of_each_slot is not None or scale is None:
            return of_each_slot
        here = taken(scale, tile.pool)
        if here.ndim == 2:
            here = lax.dynamic_slice_in_dim(here, first_head, self.walk.heads, axis=1)
        return here.reshape(self.walk.lanes, -1, 1)


def _tables(walkers: "list[Walker]", made, given, pools, ranges) -> "list[Table]":
    """What the turns of each walk are told from; `made` makes of what is given where each sequence lies, if need be."""
    start, length, context_len = given if made is None else in_one(walkers[0].walk.in_one, made, *given)
    number = seq = jnp.arange(length.shape[0], dtype=jnp.int32)

    def described(tiles, first_row, height):
        first_tile = sum_of(number[:, None] < number[None, :], tiles)
        one, height = jnp.ones_like(tiles), jnp.broadcast_to(height, tiles.shape)
        sequences = Sequence(seq, start, length, context_len, *pools, first_row, tiles, first_tile, one, height)
        return packed(sequences), jnp.sum(tiles, dtype=jnp.int32)

    if of_tokens(walkers[0].problem, walkers[0].heights):  # each has a row of the table
        own = (start[None, :] <= number[:, None]) & (number[:, None] < (start + length)[None, :])
        seq = jnp.sum(jnp.where(own, number[None, :], 0), axis=1, dtype=jnp.int32)
        start, length, context_len, *pools = (taken(x, seq) for x in (start, length, context_len, *pools))
        tiles, first_row = jnp.any(own, axis=1).astype(jnp.int32), number - start
        return [walkers[0].table(*described(tiles, first_row, jnp.int32(1)), ranges)]
    numbers, tiles = tiles_of(length, walkers[0].heights, [walker.walk.height for walker in walkers], described)
    return [walker.table(*of_walk, ranges) for walker, *of_walk in zip(walkers, numbers, tiles)]


def _of_each_slot(scale):
    """Scales of slots, which are pages too; None for others."""
    return None if scale is None or scale.ndim <= 2 else scale


def _kept_in_loop(i, *arrays):
    """Arrays that a loop's body gathers from, tied to its counter: else whole caches would be converted ahead of it."""
    return lax.optimization_barrier((i, *arrays))


def _bits(x):
    """Floats of 8 and 16 bits as integers: XLA's CPU compiler gathers and scatters those as they are.

    Others it does in wider floats, bfloat16 with jaxlib 0.10 too: a gather takes half as long again, and so does
    choosing between them.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 2:
        return x
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8)


def _scattered(x):
    """Results as they are scattered: as they are where that is as fast, for XLA copies all bits to make floats of them."""
    return x if x.dtype.itemsize == 2 and not HOLDS_BITS else _bits(x)


def _floats(bits, dtype):
    """The floats that `_bits` took."""
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits
