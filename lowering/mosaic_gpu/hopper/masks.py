"""Which rows of a compute warpgroup are there, and which keys they see."""

from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.mlir import ir
import jax.numpy as jnp
import numpy as np

from paged_prefill import compat
from paged_prefill.lowering.mosaic_gpu.hopper.operations import KEYS, QUAD, ROWS, WGMMA, gathered
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan

arith, llvm, vector = compat.mlir_dialects("arith", "llvm", "vector")

ALL = -1  # a word of 32 bits that are set
SIGN = -(2**31)  # what numbers without a sign are ordered by, once it is added to each


class Rows:
    """The 64 rows of a warpgroup: `slab` tokens of one head, then of the next, or heads of one token.

    They are rows of its arrays of logits, and blocks of keys the columns.

    Where warpgroups share rows and blocks, each asks for its own share of a block's keys. `optional` are the ranges,
    the words of the trees, and the sinks that there are in global memory, as vectors.
    """

    layout, axis = ROWS, 0  # of a number for each; and theirs in an array of logits

    def __init__(self, plan: Plan, piece, warpgroup, optional):
        self.plan, self.piece, self.tile = plan, piece, piece.tile
        self.first_row = 0 if plan.wide else warpgroup * WARPGROUP_ROWS
        self.first_column = warpgroup * plan.logit_columns if plan.logit_columns < plan.block_kv else 0
        self.ranges, self.tree, self.all_sinks = (optional.get(name) for name in ("ranges", "tree", "sinks"))
        self.shape = WARPGROUP_ROWS, plan.logit_columns

    def rows(self):
        """These, as rows of the tile."""
        return plgpu.broadcasted_iota(jnp.int32, (self.shape[self.axis],), 0, layout=self.layout) + self.first_row

    def of_rows(self, numbers):
        """A number of each row, for each of its logits."""
        return lax.broadcast_in_dim(numbers, self.shape, [self.axis])

    def head_and_token(self, row):
        """(head in the tile, token in the tile) of rows of the tile."""
        return self.plan.head_and_token(row, lambda x, n: (lax.div(x, n), lax.rem(x, n)))

    def owns(self, row):
        """Whether rows of the tile are there: its tokens and heads may be fewer than it has room for."""
        head, token = self.head_and_token(row)
        return (token < self.tile.length) & (head < self.piece.heads_left)

    def there(self):
        """((first head, heads), (first token, tokens)) of the tile whose rows these are, of those that are there."""
        first_head, first_token = self.head_and_token(self.first_row)
        rows, tokens = min(self.plan.rows, WARPGROUP_ROWS), min(self.plan.block_q, WARPGROUP_ROWS)
        heads = jnp.clip(self.piece.heads_left - first_head, 0, max(rows // tokens, 1))
        return (first_head, heads), (first_token, jnp.clip(self.tile.length - first_token, 0, tokens))

    def sinks(self):
        """The logit of each row's sink, or None: -inf where no sequence owns the tokens, or another part has it."""
        if self.all_sinks is None:
            return None
        pack = lax.div(self.tile.seq, self.plan.seqs_of_pack)
        head, _ = self.head_and_token(self.rows())
        head = self.piece.head + jnp.minimum(head, self.piece.heads_left - 1)
        sinks = gathered(self.all_sinks, pack * self.plan.q_heads + head, self.layout)
        return jnp.where((self.tile.owned > 0) & (self.tile.part == 0), sinks, -jnp.inf)

    def first_key_of(self, i):
        """The first key of the piece's block i."""
        return (self.piece.last - i) * self.plan.block_kv

    def seen_steps(self):
        """No row sees a key but in the piece's blocks from the first to the second of these; one at least."""
        plan, slab, steps, end_block = self.plan, self.tile.slabs, self.piece.steps, self.piece.last + 1
        if plan.slabs == 1:
            return 0, steps
        first = jnp.clip(end_block - lax.div(slab.seen_end + plan.block_kv - 1, plan.block_kv), 0, steps - 1)
        if not plan.begins_late:
            return first, steps
        return first, jnp.clip(end_block - lax.div(slab.seen_start, plan.block_kv), first + 1, steps)

    def whole_steps(self, first, end):
        """Every row sees all keys of the blocks from the first to the second of these, within first + 1 : end."""
        plan, slab, end_block = self.plan, self.tile.slabs, self.piece.last + 1
        whole_end = slab.whole_end if self.tree is None else jnp.minimum(slab.whole_end, self.tile.first_new)
        edge = jnp.clip(end_block - lax.div(whole_end, plan.block_kv), first + 1, end)
        if not plan.begins_late:
            return edge, end
        return edge, jnp.clip(end_block - lax.div(slab.whole_start + plan.block_kv - 1, plan.block_kv), edge, end)

    def seen(self):
        """A function of i: which rows see which keys of its share of block i. What is to be asked, is asked here.

        Beside wide outputs no thread has registers for ranges: they are asked for each time.
        """
        plan, tile = self.plan, self.tile
        _, token = self.head_and_token(self.rows())
        here = jnp.minimum(token, tile.length - 1)  # others have no ranges of their own, and see whatever they like

        def limits():
            """(The first key counted; each row's last; and the last before its first, if it has one.)"""
            if self.ranges is None:  # positions relative to the tile's first token
                before = None if plan.window is None else token - plan.window
                return tile.position, jnp.minimum(token, tile.end_key - tile.position - 1), before
            place = 2 * (tile.start + here)
            last = jnp.clip(gathered(self.ranges, place + 1, self.layout), 0, tile.end_key) - 1
            return 0, last, jnp.maximum(gathered(self.ranges, place, self.layout), 0) - 1

        known = None if plan.wide else limits()

        def visible(i):
            origin, last, before = known or limits()
            start = self.first_key_of(i) + self.first_column
            key = plgpu.broadcasted_iota(jnp.int32, self.shape, 1 - self.axis, layout=WGMMA)
            last -= start - origin
            if before is not None:
                before -= start - origin
            if plan.wide:
                seen = columns_up_to(last, self.shape)
                seen = seen if before is None else seen & ~columns_up_to(before, self.shape)
            elif before is None:
                seen = key <= self.of_rows(last)
            else:
                # One comparison without signs, of 0 <= key - first < keys: two take a second selection too.
                first, keys = before + 1, jnp.maximum(last - before, 0)
                seen = key + self.of_rows(SIGN - first) < self.of_rows(SIGN + keys)
            return seen if self.tree is None else seen & self._in_tree(here, key, start)

        return visible

    def _in_tree(self, token, key, start):
        """Whether tokens of the tile see the keys from `start` on, as far as trees decide."""
        first = start - self.tile.first_new  # the first key, counted in new tokens
        shift = first & 31
        words = [self._word(token, (first >> 5) + j) for j in range(self.plan.logit_columns // 32 + 1)]
        bits = jnp.zeros_like(key)
        for j, (word, following) in enumerate(zip(words, words[1:])):
            # The 32 keys from there on: bits of two words, unless the first word begins with them.
            both = lax.shift_right_logical(word, shift) | jnp.where(shift == 0, 0, following << (32 - shift & 31))
            here = (key >= 32 * j) & (key < 32 * (j + 1))
            bits = jnp.where(here, self.of_rows(both), bits)
        return (lax.shift_right_logical(bits, key & 31) & 1) != 0

    def _word(self, token, number):
        """A word of each of these tokens' trees: all bits where a tree says nothing."""
        words = self.plan.tree_words
        place = (self.tile.start + token) * words + jnp.clip(number, 0, words - 1)
        return jnp.where((number >= 0) & (number < words), gathered(self.tree, place, self.layout), ALL)

    def may_hold_nothing(self, i):
        """Whether block i has keys that no row of the tile may look at."""
        tile, start = self.tile, self.first_key_of(i)
        ends = (start < tile.first_key) | (start + self.plan.block_kv > tile.end_key)
        return (ends | self._asks(start)) if self.plan.masks_any_block else ends

    def _asks(self, start):
        """Whether tokens must be asked one by one which keys they see, of the block that begins at `start`."""
        asks = self.tile.holes > 0
        if self.tree is None:
            return asks
        first = start - self.tile.first_new
        return asks | ((first + self.plan.block_kv > 0) & (first < 32 * self.plan.tree_words))

    def held(self, i, key, load):
        """Whether some row may look at keys of block i, counted from its first; `load(array, places)` reads."""
        tile, start = self.tile, self.first_key_of(i)
        holds = (start + key >= tile.first_key) & (start + key < tile.end_key)
        return holds & (self._seen_by_some(start, key, load) != 0) if self.plan.masks_any_block else holds

    def _seen_by_some(self, start, key, load):
        """Whether tokens of the tile see these keys from `start` on, where they must be asked: numbers, 0 where not."""
        tile, plan = self.tile, self.plan

        def ask(token, seen):
            low, end = self._interval_of_one(token, start)
            sees = (key >= low) & (key < end)
            if self.tree is not None:
                new = key + (start - tile.first_new)
                place = (tile.start + token) * plan.tree_words + jnp.clip(new >> 5, 0, plan.tree_words - 1)
                bit = lax.shift_right_logical(load(self.tree, place), new & 31) & 1
                sees &= (bit != 0) | (new < 0) | (new >= 32 * plan.tree_words)
            return seen | sees.astype(jnp.int32)

        asks = self._asks(start)
        return lax.fori_loop(0, jnp.where(asks, tile.length, 0), ask, (key & 0) | jnp.where(asks, 0, 1))

    def _interval_of_one(self, token, start):
        """The keys that one token of the tile sees, low <= key < end, counted from key `start`."""
        tile, window = self.tile, self.plan.window
        if self.ranges is not None:
            place = 2 * (tile.start + token)
            low, end = jnp.maximum(self.ranges[place], 0), jnp.clip(self.ranges[place + 1], 0, tile.end_key)
            return low - start, end - start
        position = tile.position + token - start
        low = -start if window is None else position - window + 1
        return low, jnp.minimum(position + 1, tile.end_key - start)


def columns_up_to(numbers, shape):
    """Whether each of a warpgroup's columns has a number of at most the row's: columns need no registers so."""

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.bool_, layout=WGMMA))
    def find(_, numbers):
        i1, i32 = (ir.IntegerType.get_signless(width) for width in (1, 32))
        constant = lambda x: arith.constant(i32, x)
        # Of every 8 columns a thread has two that are neighbours, of two rows.
        quarter = arith.remui(utils.thread_idx(), constant(QUAD))
        own = arith.muli(quarter, constant(2))
        left = [arith.subi(vector.extract(number, [], [0]), own) for number in numbers.registers.flat]
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        pairs = registers.reshape(-1, 2)
        for group, half in np.ndindex(pairs.shape):
            pairs[group, half] = llvm.mlir_undef(ir.VectorType.get((2,), i1))
            for i in range(2):
                found = arith.cmpi(arith.CmpIPredicate.sge, left[half], constant(8 * group + i))
                pairs[group, half] = vector.insert(found, pairs[group, half], [], [i])
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=False)

    return find(numbers)


class Columns(Rows):
    """The rows of a tile of few, which are columns of its arrays of logits."""

    layout, axis = KEYS, 1

    def __init__(self, plan: Plan, piece, warpgroup, optional):
        super().__init__(plan, piece, warpgroup, optional)
        self.shape = plan.block_kv, plan.rows
