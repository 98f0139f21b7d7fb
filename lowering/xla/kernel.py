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
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from paged_prefill.lowering.call import Call, sinks_joined
from paged_prefill.lowering.xla import softmax
from paged_prefill.lowering.xla.walks import Turns, Walk, heights_of, shared, tiles_of, walks
from paged_prefill.primitive.attention import normalised
from paged_prefill.primitive.config import PrefillPageAttentionConfig


def attend(call: Call, config: PrefillPageAttentionConfig, product_dtype, turns: Turns):
    """The results of a call; `product_dtype` is that of the operands of its matrix products."""
    problem, heights = call.problem, heights_of(config.block_q, turns.part_heights)
    out = _scattered(jnp.zeros((problem.tokens, problem.q_heads, problem.value_dim), call.query.dtype))
    results = out, jnp.full((problem.tokens, problem.q_heads), -jnp.inf, jnp.float32)
    walkers = [Walker(call, walk, heights, product_dtype) for walk in walks(problem, config, turns)]
    for some in (walkers[:-1], walkers[-1:]):  # tiles of more rows, and single rows: many calls have only one kind
        results = _attend(some, results)
    out, lse = results
    return _floats(out, call.query.dtype), lse


def _attend(walkers: "list[Walker]", results):
    """Adds the results of all tiles of these heights, if there are any."""

    def attend_all(results):
        for walker in walkers:
            results = walker.attend(results)
        return results

    if not any(walker.walk.skips for walker in walkers):
        return attend_all(results)
    tiles = sum(walker.tiles()[0] for walker in walkers)
    return lax.cond(jnp.any(tiles > 0), attend_all, lambda results: results, results)


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

    def tiles(self):
        """How many tiles each sequence has, and its first row that is in one."""
        return tiles_of(self.call.sequences.length, self.walk.height, self.heights)

    def attend(self, results):
        """Adds the results of all tiles of this height, group by group."""
        groups, tiles_of_group = self._groups()
        head_blocks = self.problem.num_kv_heads // self.walk.heads
        shapes = [x.shape for x in results]
        results = tuple(x.reshape(x.shape[0] * head_blocks, -1, *x.shape[2:]) for x in results)

        def body(turn, results):
            turn, *arrays = _kept_in_loop(turn, *self.of_tokens.values())
            group = _divided(turn, head_blocks)
            head_block = turn - group * head_blocks
            by_token = dict(zip(self.of_tokens, arrays))
            return self._attend_group(turn, *tiles_of_group(group), head_block, by_token, results)

        turns = groups * head_blocks
        if isinstance(turns, int) and turns == 1:
            results = body(jnp.int32(0), results)
        else:
            results = lax.fori_loop(0, turns, body, results)
        return tuple(x.reshape(shape) for x, shape in zip(results, shapes))

    def _groups(self):
        """How many groups of tiles walk one after the other, and which: each lane's sequence, and a number in it."""
        sequences, lanes = self._sequences(), self.walk.lanes
        if self.walk.at_once and lanes == self.problem.seqs:  # no loop, and so nothing to take together
            return 1, lambda group: (sequences, jnp.zeros(lanes, jnp.int32))
        # XLA compiles a kernel for every array that a loop's body takes from outside: these are taken together.
        all_numbers = _packed(sequences)

        def numbers_in_loop(group):
            # What does not follow the loop's counter is computed ahead of the loop, even if that has no turn.
            group, numbers = _kept_in_loop(group, all_numbers)
            return group * lanes + jnp.arange(lanes, dtype=jnp.int32), numbers

        if self.lane_of_each:

            def lane_of_each(group):
                seq, numbers = numbers_in_loop(group)
                sequence = _Sequence(*jnp.unstack(_taken(numbers, seq), axis=1))
                return sequence, (seq >= self.problem.seqs).astype(jnp.int32)

            # A token alone is such a tile, or is in none.
            return 1 if self.problem.tokens == 1 else jnp.max(sequences.tiles, initial=0), lane_of_each

        def tiles_of_group(group):
            number, numbers = numbers_in_loop(group)
            first, tiles = (numbers[None, :, _Sequence._fields.index(name)] for name in ("first_tile", "tiles"))
            own = (first <= number[:, None]) & (number[:, None] < first + tiles)
            # As a sum of all numbers, what is found is computed once for all that needs it.
            found = jnp.sum(jnp.where(own[:, :, None], numbers[None], 0), axis=1, dtype=jnp.int32)
            sequence = _Sequence(*jnp.unstack(found, axis=1))
            return sequence, number - sequence.first_tile

        return _divided(jnp.sum(sequences.tiles, dtype=jnp.int32) + (lanes - 1), lanes), tiles_of_group

    def _sequences(self) -> "_Sequence":
        """The sequences, how many tiles of this height each has, and in which order these are taken."""
        call, seqs = self.call, self.call.sequences
        pools = [seqs.pool if x is None else x for x in (call.key_pool, call.value_pool)]
        tiles, first_row = self.tiles()
        seq = jnp.arange(seqs.length.shape[0], dtype=jnp.int32)
        none, one, height = (jnp.full_like(tiles, x) for x in (0, 1, self.walk.height))
        sequences = _Sequence(seq, *seqs[:4], *pools, first_row, tiles, none, one, height)
        before = seq[:, None] < seq[None, :]
        if self.walk.lanes > 1 and self.walk.most_blocks != 1:
            ranges = None if call.ranges is None else _taken(call.ranges, seqs.start + first_row)[:, None]
            tile, _, _ = self._tile(sequences, none, tiles, ranges)
            blocks = jnp.where(tiles > 0, self._blocks(tile), 0)
            splits = jnp.where(shared(blocks, self.walk.splits), self.walk.splits, 1)
            if call.sinks is None:  # else a row that sees no key has a result too
                tiles = jnp.where(blocks > 0, tiles, 0)
            sequences = sequences._replace(tiles=tiles * splits, splits=splits)
            more = blocks[:, None] > blocks[None, :]
            before = more | (before & (blocks[:, None] == blocks[None, :]))
        # A sum over all pairs is one kernel, where a sort and a running sum are ten.
        first_tile = jnp.sum(jnp.where(before, sequences.tiles[:, None], 0), axis=0, dtype=jnp.int32)
        return sequences._replace(first_tile=first_tile)

    def _attend_group(self, turn, sequence: "_Sequence", number, head_block, by_token, results):
        """Adds the results of tiles that walk side by side: of each lane's sequence that with this number."""
        problem, walk, softmax_scale = self.problem, self.walk, self.attention.softmax_scale
        height, lanes, group = walk.height, walk.lanes, problem.group
        split = jnp.zeros_like(number)
        live = number < sequence.tiles
        if walk.splits > 1:  # lanes of one sequence have its one tile of this height
            number, split = split, number
        # Which tile is computed from the height as a number like others: then XLA compiles it once for all heights.
        first = sequence.first_row + number * sequence.height
        rows = jnp.where(live, jnp.minimum(sequence.height, sequence.length - first), 0)
        row = jnp.arange(height, dtype=jnp.int32)[None, :]
        exists = row < rows[:, None]
        token = jnp.where(exists, (sequence.start + first)[:, None] + row, problem.tokens)
        here = {name: _taken(x, token) for name, x in by_token.items() if name != "query"}
        tile, low, high = self._tile(sequence, number, rows, here.get("ranges"))
        seen = _Seen(low, high, here.get("tree"))

        head_blocks = problem.num_kv_heads // walk.heads
        place = token * head_blocks + head_block
        query = by_token["query"].reshape(problem.tokens * head_blocks, walk.heads, group, problem.head_dim)
        queries = _taken(query, place)
        queries = queries.transpose(0, 2, 1, 3, 4).reshape(lanes, walk.heads, -1, problem.head_dim)
        if queries.shape[2] == 1:  # XLA multiplies by a single row one number after the other
            queries = jnp.broadcast_to(queries, (lanes, walk.heads, 2, problem.head_dim))
        queries, scale = queries.astype(self.product_dtype), softmax_scale
        if walk.in_place and walk.most_blocks == 1:
            # In a loop, as longer tables have one: else XLA scales and converts them anew for every key.
            queries, scale = queries.astype(jnp.float32), 1.0
            queries = softmax.where_needed(jnp.any(live), lambda x: x * softmax_scale, queries)
        elif self.product_dtype == jnp.float32:
            queries, scale = queries * softmax_scale, 1.0  # once for each query, not for each logit
        first_head = self.call.kv_head_start + head_block * walk.heads

        # Of a single block once, of however many lengths it may be.
        runs = self._runs(tile, tile.first_run) if walk.most_blocks == 1 else None

        def step(i, running, tile=tile, number=split, walker=self):
            _, *pages = _kept_in_loop(i, *self.pages.values())
            block, visible, hidden = walker._block(tile, number, seen, first_head, pages, runs)
            soft_cap = self.attention.attn_logits_soft_cap
            # Where the results are copied in the end, there would be too little room for weights beside logits.
            in_use = jnp.any(live) if walker.walk.skips_masks and HOLDS_BITS else None
            return softmax.fold(
                running, queries, block, visible, hidden, scale, soft_cap, walk.in_place, walk.at_once, in_use
            )

        def all_blocks():
            if walk.most_blocks == 1:
                return step(turn, None)
            # A loop is handed its tiles packed into one array.
            packed = lax.optimization_barrier(jnp.stack([*tile, split, sequence.splits], axis=1))

            def step_of_loop(i, running):
                *tile, split, splits = jnp.unstack(packed, axis=1)
                return step(i, running, _Tile(*tile), i * splits + split)

            left = self._blocks(tile) - split
            turns = jnp.max(_divided(jnp.maximum(left + (sequence.splits - 1), 0), sequence.splits))
            return lax.fori_loop(0, turns, step_of_loop, softmax.start(queries, problem.value_dim))

        running = self._shortest(tile, lambda few: step(turn, None, walker=few), all_blocks)
        if walk.splits > 1:
            running = softmax.merge_lanes(running, sequence.splits > 1, walk.splits)
            place = jnp.where(split[:, None] > 0, problem.tokens * head_blocks, place)  # the first has it all
        out, lse = normalised(running.unnormalised, running.total, running.largest)
        if self.call.sinks is not None:
            out, lse = sinks_joined(out, lse, self._sinks(sequence.seq, head_block))

        def rows_first(x):
            x = x.reshape(lanes, walk.heads, height, -1, *x.shape[3:])[:, :, :, :group]
            return jnp.moveaxis(x, 1, 2).reshape(lanes * height, walk.heads * group, *x.shape[4:])

        place = place.reshape(-1)
        return tuple(
            result.at[place].set(rows_first(x), mode="drop", unique_indices=True, wrap_negative_indices=False)
            for result, x in zip(results, (_scattered(out.astype(self.call.query.dtype)), lse), strict=True)
        )

    def _shortest(self, tile: "_Tile", attend_few, attend_all):
        """What comes of the shortest block that holds all keys of these tiles: of a `Walker` with fewer runs, if any."""
        if not self.walk.few_runs:
            return attend_all()
        shorter = [self.walk._replace(runs=runs, skips_masks=False) for runs in self.walk.few_runs]
        shorter = [Walker(self.call, walk, self.heights, self.product_dtype) for walk in shorter]
        too_short = sum(jnp.any(few._blocks(tile) > 1).astype(jnp.int32) for few in shorter)
        return lax.switch(too_short, [*(functools.partial(attend_few, few) for few in shorter), attend_all])

    def _sinks(self, seq, head_block):
        """The sinks of each row of a group, [lanes, kv_heads, height * group]."""
        walk, packs = self.walk, self.call.sinks.shape[0]
        sinks = self.call.sinks.reshape(packs, -1, walk.heads, 1, self.problem.group)
        sinks = _taken(sinks, _divided(seq, self.problem.seqs // packs), head_block)
        shape = walk.lanes, walk.heads, walk.height, self.problem.group
        return jnp.broadcast_to(sinks, shape).reshape(*shape[:2], -1)

    def _blocks(self, tile: "_Tile"):
        """How many blocks tiles walk over."""
        keys = jnp.maximum(tile.end_key - tile.first_run * self.walk.run, 0)
        return _divided(keys + (self.walk.block_kv - 1), self.walk.block_kv)

    def _tile(self, sequence: "_Sequence", number, rows, ranges):
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
        tile = _Tile(
            sequence.seq, sequence.pool, sequence.key_pool, sequence.value_pool, start_key, end_key,
            _divided(start_key, self.walk.run), first_new,
        )  # fmt: skip
        return tile, low, jnp.minimum(high, end_key[:, None])

    def _block(self, tile: "_Tile", number, seen: "_Seen", first_head, pages, runs):
        """Blocks of tiles with these numbers, which tokens see which keys, and whether any is hidden, if asked."""
        first_run = tile.first_run + number * self.walk.runs
        block = self._fetch(tile, self._runs(tile, first_run) if runs is None else runs, first_head, pages)
        key = (first_run * self.walk.run)[:, None] + jnp.arange(self.walk.block_kv, dtype=jnp.int32)[None, :]
        visible = seen.visible(key, tile.first_new)
        # Slots that no row sees may hold anything, and 0 * NaN is NaN: a weight of zero is not enough.
        if self.call.ranges is None and self.call.tree is None:
            some = (key >= tile.start_key[:, None]) & (key < tile.end_key[:, None])
        else:
            some = jnp.any(visible, axis=1)
        hidden = None
        if self.walk.skips_masks and seen.tree is None:
            hidden = jnp.any(key[:, -1:] >= seen.high)
            if seen.low is not None:
                hidden |= jnp.any(key[:, :1] < seen.low)
        values = softmax.where_needed(hidden, lambda x: jnp.where(some[:, None, :, None], x, 0), _bits(block.values))
        block = block._replace(values=_floats(values, block.values.dtype))
        if block.value_scale is not None:
            block = block._replace(value_scale=jnp.where(some[:, None, :], block.value_scale, 0.0))
        return block, visible, hidden

    def _runs(self, tile: "_Tile", first_run):
        """Where the runs of a block of each lane lie: their pages, and their numbers in these."""
        index = first_run[:, None] + jnp.arange(self.walk.runs, dtype=jnp.int32)[None, :]
        column = _divided(index, self.runs_per_page)
        page = _taken(
            self.call.sequences.page_indices, tile.seq[:, None], jnp.minimum(column, self.problem.columns - 1)
        )
        return page, index - column * self.runs_per_page

    def _fetch(self, tile: "_Tile", runs, first_head, pages) -> softmax.Block:
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

    def _scale(self, tile: "_Tile", first_head, scale, of_each_slot):
        """A block's scales, [lanes, kv_heads or 1, keys or 1], or None."""
        if of_each_slot is not None or scale is None:
            return of_each_slot
        here = _taken(scale, tile.pool)
        if here.ndim == 2:
            here = lax.dynamic_slice_in_dim(here, first_head, self.walk.heads, axis=1)
        return here.reshape(self.walk.lanes, -1, 1)


def _of_each_slot(scale):
    """Scales of slots, which are pages too; None for others."""
    return None if scale is None or scale.ndim <= 2 else scale


class _Sequence(NamedTuple):
    """What there is to know of sequences, all int32."""

    seq: Int[Array, " seqs"]
    start: Int[Array, " seqs"]
    length: Int[Array, " seqs"]
    context_len: Int[Array, " seqs"]
    pool: Int[Array, " seqs"]
    key_pool: Int[Array, " seqs"]
    value_pool: Int[Array, " seqs"]
    first_row: Int[Array, " seqs"]  # that is in a tile of this height
    tiles: Int[Array, " seqs"]  # of this height; a tile in several lanes counts as many
    first_tile: Int[Array, " seqs"]  # its number among those of all sequences
    splits: Int[Array, " seqs"]  # lanes that share a tile
    height: Int[Array, " seqs"]


class _Tile(NamedTuple):
    """What there is to know of tiles, all int32."""

    seq: Int[Array, " lanes"]
    pool: Int[Array, " lanes"]
    key_pool: Int[Array, " lanes"]
    value_pool: Int[Array, " lanes"]
    start_key: Int[Array, " lanes"]  # no row looks at keys outside start_key : end_key
    end_key: Int[Array, " lanes"]
    first_run: Int[Array, " lanes"]  # that holds start_key
    first_new: Int[Array, " lanes"]  # where the sequence's first new token stands


class _Seen(NamedTuple):
    """What each token of a tile sees: keys low <= j < high, and of its chunk those with a bit in `tree`, if given."""

    low: Int[Array, "lanes height"] | None
    high: Int[Array, "lanes height"]
    tree: UInt32[Array, "lanes height words"] | None

    def visible(self, key: Int[Array, "lanes keys"], first_new) -> Bool[Array, "lanes height keys"]:
        """Which tokens see which keys."""
        key = key[:, None, :]
        visible = key < self.high[:, :, None]
        if self.low is not None:
            visible &= key >= self.low[:, :, None]
        if self.tree is None:
            return visible
        new = key - first_new[:, None, None]
        word = jnp.take_along_axis(self.tree, jnp.maximum(new, 0) >> 5, axis=2, mode="clip")
        bit = (word >> (new & 31).astype(jnp.uint32)) & jnp.uint32(1)
        in_tree = (new >= 0) & (new < 32 * self.tree.shape[2])
        return visible & ((bit != 0) | ~in_tree)


def _taken(array, *indices):
    """array[indices], for indices that are not negative; those too large count as the largest."""
    return array.at[indices].get(mode="clip", wrap_negative_indices=False)


def _packed(columns):
    """Vectors of integers as the columns of one array, by choices: XLA's CPU compiler fuses those, and no `stack`."""
    at = jnp.arange(len(columns), dtype=jnp.int32)[None, :]
    packed = columns[0][:, None]
    for i, column in enumerate(columns[1:], 1):
        packed = jnp.where(at < i, packed, column[:, None])
    return packed


def _divided(number, by):
    """number // by, neither negative: one operation, where rounding down for negative numbers would take seven."""
    return lax.div(number, jnp.asarray(by, number.dtype))


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
