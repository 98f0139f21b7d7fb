"""What a compute warpgroup does with a piece of work: its 64 rows attend to the blocks of keys, one after another.

It starts the logits of block i and, behind them, the output of block i - 1, which runs on beside its softmax of block
i. Two warpgroups do so in turns, FlashAttention-3's ping-pong (arXiv 2407.08608); where there are four, the work of others
runs beside it. Blocks are taken from the last to the first, so that those which need a mask come first; where any may
need one, those that all rows see whole lie between. Blocks of the tile that no row of the warpgroup sees, it passes over.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper import mates, threads
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import wait_for_block
from paged_prefill.lowering.mosaic_gpu.hopper.cluster import merge_in_cluster, start_exchange
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import KEYS, WGMMA
from paged_prefill.lowering.mosaic_gpu.hopper.operations import any_in_warpgroup, gathered, settled, store_numbers, store_rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import start_logits, start_products, start_weighted, store_terms
from paged_prefill.lowering.mosaic_gpu.hopper.pairs import merge_in_pairs
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, WARPGROUP_THREADS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.hopper.softmax import Running, Softmax, scaled_rows
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import lie_apart, parts_of
from paged_prefill.lowering.mosaic_gpu.hopper.transpose import FEATURES_AT_ONCE, keep_keys
from paged_prefill.lowering.mosaic_gpu.hopper.widen import scales_of, slot_of_scales


def compute(plan: Plan, piece, done, *, team, warpgroup, shared, results, beside_results=lambda: None, way=None):
    """One warpgroup's share of a piece, from its first block to its results in global memory.

    `way` makes what goes through the blocks: that of tiles of few rows, in place of the usual one.
    `beside_results` asks for what takes a while to come, and what it returns, this returns.
    """
    if plan.clusters:
        merging = Merging(plan, piece, warpgroup, **shared.scratch)
    attention = (way or _Attention)(plan, piece, done, team, warpgroup, shared)
    rows = attention.rows
    first, end = rows.seen_steps()
    attention.pass_over(0, first)
    found = attention.run(first, end)
    if plan.clusters:
        attention.pass_over(end, piece.steps)  # what is sent may lie where blocks come
        return merging.store(rows, found, results)
    asked = beside_results()
    store_results(plan, piece, rows, found, results)
    attention.pass_over(end, piece.steps)
    return asked


class Merging:
    """A warpgroup's merge of a tile's parts with the other blocks of its cluster, where it has several."""

    def __init__(self, plan: Plan, piece, warpgroup, *, exchange, exchanged, ready, **_):
        self.plan, self.piece, self.several = plan, piece, piece.tile.parts > 1
        own = pl.ds(warpgroup * plan.outputs, plan.outputs)
        self.places = exchange.at[own], exchanged.at[own], ready
        if not plan.exchanges_in_blocks:
            pl.when(self.several)(lambda: start_exchange(plan, *self.places[1:]))

    def store(self, rows: Rows, found, results, first_column=0):
        """Writes what a block has of the results of all parts, from `found`, those of its own; or those, if it is alone."""
        plan, piece = self.plan, self.piece
        pl.when(~self.several)(lambda: store_results(plan, piece, rows, found, results, first_column))

        @pl.when(self.several)
        def _():
            outputs, lse = jax.tree.leaves(found[0]), found[1]
            outputs = [array if callable(array) else (lambda array=array: array) for array in outputs]
            owns = rows.owns(rows.rows())
            shares, first = merge_in_cluster(plan, piece.tile.part, outputs, lse, owns, *self.places)
            for i, find in enumerate(shares):
                store_results(plan, piece, rows, find(), results, first_column + i * plan.columns_at_once + first)


def compute_each(plan: Plan, piece_of, *, team, **others):
    """One warpgroup's share of all pieces, each looked up beside the results of the one before."""

    def one(carry):
        i, done, piece, _ = carry
        following = compute(plan, piece, done, team=team, beside_results=lambda: piece_of(i + 1, team), **others)
        return i + 1, done + piece.steps, *following

    lax.while_loop(lambda carry: carry[3], one, (jnp.int32(0), jnp.int32(0), *piece_of(jnp.int32(0), team)))


def compute_chain(plan: Plan, piece_of, *, warpgroup, shared: Shared, results):
    """One warpgroup's share of all pieces: each one's first logits come beside the last product of the one before."""

    def attention_of(piece, done):
        return _Attention(plan, piece, done, 0, warpgroup, shared)

    def one(carry):
        i, done, piece, _, first = carry
        attention = attention_of(piece, done)
        found, following, first = attention.run_on(first, functools.partial(piece_of, i + 1))
        copy_out = attention.copy_out if plan.copies_results else None
        store_results(plan, piece, attention.rows, found, results, copy_out=copy_out)
        return i + 1, done + piece.steps, *following, first()

    piece, exists = piece_of(0)
    first = attention_of(piece, 0).first_logits(exists)
    lax.while_loop(lambda carry: carry[3], one, (jnp.int32(0), jnp.int32(0), piece, exists, first))
    if plan.copies_results:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store_results(plan: Plan, piece, rows: Rows, found, results, first_column=0, copy_out=None):
    """Writes a warpgroup's output, from that column on, and the lse of its rows.

    Where there are final results beside those of parts, those of tiles of one part are final. `copy_out`, if given, writes
    the output of a tile whose rows are all there. Functions among an output's arrays work them out when they are wanted.
    """
    acc, row_lse = found
    head, token = rows.head_and_token(rows.rows())
    head, token = piece.head + head, piece.tile.start + token
    owns = rows.owns(rows.rows())

    def store(out, lse, part, copy_out=copy_out):
        def place_of(within):
            return jnp.where(owns, part * (plan.tokens * plan.q_heads) + within, -1)

        # Outputs lie token by token, and the lse head by head: so neighbouring rows of a tile are neighbours there.
        def store_each():
            column = first_column
            for array in jax.tree.leaves(acc):
                array = array() if callable(array) else array
                store_rows(array.astype(out.dtype), place_of(token * plan.q_heads + head), out, column)
                column += array.shape[1]

        if copy_out is None:
            store_each()
        else:
            whole = (piece.tile.length == plan.block_q) & (piece.heads_left >= plan.heads)
            pl.when(whole)(lambda: copy_out(acc.astype(out.dtype), out))
            pl.when(~whole)(store_each)
        store_numbers(row_lse, place_of(head * plan.tokens + token), lse)

    if not plan.final_beside_parts:
        return store(*results, piece.tile.part if plan.results > 1 else 0)
    pl.when(piece.tile.parts == 1)(lambda: store(*results[:2], 0))
    pl.when(piece.tile.parts > 1)(lambda: store(*results[2:], piece.tile.part, copy_out=None))


def store_of_pairs(plan: Plan, piece, rows: Rows, found, results, first_column):
    """Writes the results of a tile's rows, where these columns of all its parts have come together: once, by the last.

    `results` are those of tiles, and the places and counters of pairs (pairs.py).
    """
    (out, lse, *of_pairs), warpgroup = results, lax.div(first_column, plan.output_columns)
    found, whole = merge_in_pairs(plan, piece, warpgroup, found, *of_pairs)
    pl.when(whole)(lambda: store_results(plan, piece, rows, found, (out, lse), first_column))


def zero_unseen(plan: Plan, rows: Rows, warpgroup, i, values):
    """Zeroes block i's values that no row may see: they may hold NaN, and 0 * NaN is NaN.

    A warpgroup's part of them; all where it is None, or of a share of their features. A thread has a key: so this is little code, and what is seldom done
    pushes nothing else out of the instructions' cache.
    """
    sharing = WARPGROUP_THREADS * (1 if warpgroup is None else plan.warpgroups)
    thread = lax.rem(threads.number(), jnp.int32(sharing))
    key, part = lax.rem(thread, jnp.int32(plan.block_kv)), lax.div(thread, jnp.int32(plan.block_kv))
    unseen = ~rows.held(i, key, threads.load)
    parts = len(parts_of(plan.value_dim // plan.freed_shares))
    for first in range(0, parts, sharing // plan.block_kv):
        threads.zero(values, key, part + first, unseen & (part + first < parts))
    plgpu.commit_smem()


def zero_unseen_transposed(plan: Plan, rows: Rows, warpgroup, i, values):
    """The same where values lie transposed, in 8 bits."""
    key = plgpu.broadcasted_iota(jnp.int32, (plan.block_kv,), 0, layout=KEYS)
    held = jnp.where(rows.held(i, key, functools.partial(gathered, layout=KEYS)), jnp.int32(1), jnp.int32(0))
    for number in range(plan.value_dim // FEATURES_AT_ONCE):

        @pl.when(warpgroup == number % plan.warpgroups)
        def _(number=number):
            keep_keys(held, values.at[pl.ds(number * FEATURES_AT_ONCE, FEATURES_AT_ONCE)])

    plgpu.commit_smem()


def store_query(plan: Plan, query, part, numbers):
    """Writes a part's numbers as the products with keys take them."""
    if plan.fp8_terms:
        store_terms(numbers, [query.at[part + term * plan.query_parts] for term in range(plan.fp8_terms)])
    else:
        query.at[part][...] = numbers.astype(plan.product_dtype)


class _Attention:
    """A warpgroup's way through a piece: `done` blocks went through its team's rings before it."""

    def __init__(self, plan, piece, done, team, warpgroup, shared: Shared):
        self.plan, self.piece, self.done, self.team, self.warpgroup = plan, piece, done, team, warpgroup
        self.rows = Rows(plan, piece, warpgroup, shared.optional)
        self.sources, self.queries = shared.sources, shared.queries
        self.loaded_query, self.query = self._query_of(piece)
        self.query_free = self.queries.free.at[plan.queries_of(piece, team, warpgroup)]
        self.keys, self.keys_here, self.keys_free = shared.keys
        self.values, self.values_here, self.values_free = shared.values
        self.turn, self.cleaned = shared.scratch["turn"], shared.scratch["cleaned"].at[team]
        self.slot_scales = dict(zip(("key_scales", "value_scales"), shared.scales))

    def pass_over(self, first, end):
        """Lets go of blocks `first` to `end`; what all warpgroups do together with a block, it does too."""
        if first is end:  # none of any tile
            return

        def step(i, _):
            slot, key_slot = self._slot_of(i), self._key_slot_of(i)
            wait_for_block(self.plan, "keys", self.keys_here, key_slot, self.done, i)
            self._let_go(self.keys_free, key_slot)
            wait_for_block(self.plan, "values", self.values_here, slot, self.done, i)
            self._clean_values(i)
            self._let_go(self.values_free, slot)

        lax.fori_loop(first, end, step, None)

    def run(self, first, end):
        """Output and lse of the rows, which see no key but in blocks `first` to `end`."""
        return self._finish(first, end - 1, self._steps(first, end, self._start))

    def run_on(self, first_logits, find_following):
        """The same of a piece in a chain, from its first logits on; what is found to follow it; and a function that waits
        for the following's first logits.

        They run beside the last output and whatever is done with the results; if nothing follows, they are of nothing.
        `find_following` asks for a piece and whether there is one, which takes a while: it does so beside a product.
        """
        logits, to_logits = first_logits
        self.softmax, last = Softmax(self.plan, to_logits), self.piece.steps - 1

        def start(first):
            if not self.plan.copies_results:
                pl.when(last == 0)(lambda: plgpu.barrier_arrive(self.query_free))
            running = self._begin(first, logits)
            if self.plan.copies_results:
                pl.when(self.piece.number > 0)(self._let_go_of_last_results)
            return running

        weights, acc, m, l = self._steps(0, last + 1, start)
        if not self.plan.masks_any_block:  # else it is clean
            pl.when(last > 0)(lambda: self._clean_values(last))

        to_logits = None
        if self.plan.quantised:  # before its turn: so the other warpgroup's products run meanwhile
            following, more = find_following()
            to_logits = self._scale_rows(following, more)
        self._take_turn()
        acc = start_weighted(acc, weights, self.values.at[self._slot_of(last)])
        if not self.plan.quantised:
            following, more = find_following()

        @pl.when(more)
        def _():
            if not self.plan.quantised:
                self._wait_for_query(following)
            self._wait_for_keys(last + 1)

        parts, (_, query) = [*range(self.plan.query_parts)], self._query_of(following)
        logits = start_logits(query, self.keys.at[self._key_slot_of(last + 1)], jnp.int32(0), 1, parts)
        self._pass_turn()
        scales = scales_of(self.plan, self.sources, self.piece)
        acc = settled(acc, still_running=1)
        self._let_go(self.values_free, self._slot_of(last))
        results = self._results(acc, m, l, scales)

        def next_logits():
            found = settled(logits, still_running=0)
            pl.when(more)(lambda: self._let_go(self.keys_free, self._key_slot_of(last + 1)))
            return found, to_logits

        return results, (following, more), next_logits

    def first_logits(self, exists):
        """Those of a chain's first piece."""

        to_logits = self._scale_rows(self.piece, exists) if self.plan.quantised else None

        @pl.when(exists)
        def _():
            if not self.plan.quantised:
                self._wait_for_query(self.piece)
            self._wait_for_keys(0)

        self._take_turn()
        logits = self._logits_of(0)
        pl.when(exists)(lambda: self._let_go(self.keys_free, self._key_slot_of(0)))
        return logits, to_logits

    def _steps(self, first, end, start) -> Running:
        """From what `start` makes of block `first` through the others."""
        self.seen = self.rows.seen()
        edge, clear = self.rows.whole_steps(first, end)
        running = start(first)
        running = self._masked_steps(first + 1, edge, running)
        if self.plan.polynomial is not None:
            edge, running = self._steps_by_polynomial(edge, clear, running)
        running = lax.fori_loop(edge, clear, functools.partial(self._step, None), running)
        return self._masked_steps(clear, end, running) if self.plan.begins_late else running

    def _start(self, i) -> Running:
        """Block i, the first: its logits, and no output yet."""
        if self.plan.quantised:
            self.softmax = Softmax(self.plan, self._scale_rows(self.piece))
        else:
            self._wait_for_query(self.piece)
            self.softmax = Softmax(self.plan)
        if self.plan.polynomial is not None:
            self._scale_query(self.plan.polynomial.query_factor)
        self._wait_for_keys(i)
        self._take_turn()
        logits = self._logits_of(i)
        self._let_go(self.keys_free, self._key_slot_of(i))
        return self._begin(i, logits)

    def _begin(self, i, logits) -> Running:
        """What is running after block i, the first, from its logits on."""
        acc, m, l = self.softmax.start()
        running = self._weigh(i, logits, lambda: acc, m, l, self.seen)
        self._wait_for_values(i)
        self._clean_values(i)
        return running

    def _masked_steps(self, first, end, running: Running) -> Running:
        return lax.fori_loop(first, end, functools.partial(self._step, self.seen), running)

    def _step(self, seen, i, running: Running) -> Running:
        """Block i's logits and weights, and the output of block i - 1; without `seen`, every row sees the block."""
        weights, acc, m, l = running
        logits, output = self._products_of(i, weights, acc)
        self._let_go(self.keys_free, self._key_slot_of(i))
        if self.plan.chains and not self.plan.copies_results:
            pl.when(i == self.piece.steps - 1)(lambda: plgpu.barrier_arrive(self.query_free))
        running = self._weigh(i, logits, output, m, l, seen)
        if seen and self.plan.masks_any_block:
            self._clean_values(i)
        return running

    def _weigh(self, i, logits, output, m, l, seen=None) -> Running:
        """The softmax's step over block i."""
        place = slot_of_scales(self.plan, self.done + i)
        scales = {
            name: lambda numbers=numbers: plgpu.layout_cast(numbers.at[place][...], KEYS)
            for name, numbers in self.slot_scales.items()
            if numbers is not None
        }
        return self.softmax.step(logits, output, m, l, seen and functools.partial(seen, i), **scales)

    def _steps_by_polynomial(self, first, end, running: Running):
        """Steps from block `first` to `end`, or to the first block with logits that are not small; and where it ended.

        Whether they are is seen in the weights. So that block is weighed again, by tanh, from logits computed again.
        All rows of the warpgroup change together: so a row's last bits may depend on the rows beside it, which are of
        the same sequence, and of the same KV head.
        """

        def one(carry):
            i, _, (weights, acc, m, l) = carry
            logits, output = self._products_of(i, weights, acc)
            weights, sums = self.softmax.by_polynomial(logits, m)
            small = ~any_in_warpgroup(self.plan.polynomial.doubts(sums), self.warpgroup)
            acc = output()
            pl.when(small)(lambda: self._let_go(self.keys_free, self._key_slot_of(i)))
            weights = self.softmax.rounded(weights)
            return i + 1, small, Running(weights, acc, m, l + jnp.where(small, sums, 0.0))

        def again(i, running):
            _, acc, m, l = running
            logits = self._logits_of(i)
            self._let_go(self.keys_free, self._key_slot_of(i))
            return self._weigh(i, logits, lambda: acc, m, l)

        carry = first, jnp.bool_(True), running
        end, small, running = lax.while_loop(lambda carry: (carry[0] < end) & carry[1], one, carry)
        return end, lax.cond(small, lambda running: running, functools.partial(again, end - 1), running)

    def _finish(self, first, last, running: Running):
        """The output of block `last`, and the rows' results."""
        weights, acc, m, l = running
        plgpu.barrier_arrive(self.query_free)
        if not self.plan.masks_any_block:  # else it is clean
            pl.when(last > first)(lambda: self._clean_values(last))
        self._take_turn()

        def product(output):
            plgpu.wgmma(output, weights, self.values.at[self._slot_of(last)])
            self._pass_turn()

        scales = scales_of(self.plan, self.sources, self.piece)
        if self.plan.fp8_terms or lie_apart(self.plan.value_dim):
            acc = start_weighted(acc, weights, self.values.at[self._slot_of(last)])
            self._pass_turn()
            acc = settled(acc, still_running=0)
        else:
            acc = pl.run_state(product)(plgpu.ACC.init(acc))
        self._let_go(self.values_free, self._slot_of(last))
        return self._results(acc, m, l, scales)

    def _results(self, acc, m, l, scales):
        return self.softmax.result(acc, m, l.sum(axis=1), self.rows.sinks(), scales)

    def _logits_of(self, i):
        """Block i's logits, with no other product beside them."""
        if lie_apart(self.plan.head_dim):
            parts = [*range(self.plan.query_parts)]
            logits = start_logits(self.query, self.keys.at[self._key_slot_of(i)], jnp.int32(0), 1, parts)
            self._pass_turn()
            return settled(logits, still_running=0)

        def products(logits):
            parts, size = self.plan.query_parts, self.plan.query_columns
            for place in range(parts * self.plan.query_terms):
                columns = self.keys.at[self._key_slot_of(i), :, pl.ds(place % parts * size, size)]
                plgpu.wgmma(logits, self.query.at[place], columns.transpose((1, 0)))
            self._pass_turn()
            return logits[...]

        return pl.run_scoped(products, plgpu.ACC((WARPGROUP_ROWS, self.plan.block_kv), jnp.float32))

    def _products_of(self, i, weights, acc):
        """Block i's logits; and a function that waits for the output of block i - 1, which is still being computed."""
        self._wait_for_keys(i)
        self._take_turn()
        keys, values = self.keys.at[self._key_slot_of(i)], self.values.at[self._slot_of(i - 1)]
        if self.plan.chains:  # the other's logits may run between these and the output: over large heads it is no faster
            logits, acc = start_products(self.query, keys, acc, weights, values, self._pass_turn)
        else:
            logits, acc = start_products(self.query, keys, acc, weights, values)
            self._pass_turn()

        def output():
            # The wait for the next values is a loop: ptxas moves no wait for products across it, so none comes early.
            self._wait_for_values(i)
            done = settled(acc, still_running=0)
            self._let_go(self.values_free, self._slot_of(i - 1))
            return done

        return settled(logits, still_running=1), output

    def _clean_values(self, i):
        """Zeroes values that no row may see, together with the other warpgroups."""

        @pl.when(self.rows.may_hold_nothing(i))
        def _():
            zero = zero_unseen_transposed if self.plan.fp8_terms else zero_unseen
            zero(self.plan, self.rows, self.warpgroup, i, self.values.at[self._slot_of(i)])
            plgpu.barrier_arrive(self.cleaned)
            plgpu.barrier_wait(self.cleaned)

    def _scale_query(self, factor):
        """And rows that the tile does not own become 0: then their logits cast no doubt on those of the others."""
        dtype, shape = jnp.dtype(self.plan.dtype), (WARPGROUP_ROWS, self.plan.query_columns)
        layout = plgpu.Layout.SMEM_GMEM_COPY(shape, dtype, self.plan.query_columns * dtype.itemsize)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        owned = self.rows.owns(row + self.warpgroup * WARPGROUP_ROWS)
        for part in range(self.plan.query_parts):
            columns = self.query.at[part]
            scaled = plgpu.layout_cast(columns[...], layout).astype(jnp.float32) * factor
            columns[...] = jnp.where(owned, scaled, 0.0).astype(dtype)
        plgpu.commit_smem()

    def _scale_rows(self, piece, exists=True):
        """Turns a piece's query into what products take, each row by its largest number; what turns those to logits.

        It is waited for, if the piece exists.
        """
        plan, [key_scale] = self.plan, scales_of(self.plan, self.sources[:1], piece)
        pl.when(exists)(lambda: self._wait_for_query(piece))
        parts = [
            plgpu.layout_cast(self.loaded_query.at[part][...], WGMMA).astype(jnp.float32)
            for part in range(plan.query_parts)
        ]
        largest = functools.reduce(jnp.maximum, [jnp.maximum(part, -part) for part in parts]).max(axis=1)
        factor, to_logits = scaled_rows(plan, largest, key_scale)
        if plan.fp8_terms:
            plgpu.commit_smem()  # all threads have read what they are about to write over
        for part, numbers in enumerate(parts):
            store_query(plan, self.query, part, numbers * lax.broadcast_in_dim(factor, numbers.shape, [0]))
        plgpu.commit_smem()
        return to_logits

    def copy_out(self, output, out):
        """Starts to copy the output, of a tile whose rows are all there, to global memory from where the query was."""
        plan, place = self.plan, self.plan.query_of(self.piece, self.team, self.warpgroup)
        size = plan.query_columns
        for part in range(plan.query_parts):
            self.loaded_query.at[part][...] = output[:, part * size : (part + 1) * size]
        plgpu.commit_smem()
        for row in range(0, WARPGROUP_ROWS, plan.slab):
            head, token = self.rows.head_and_token(row + self.warpgroup * WARPGROUP_ROWS)
            tokens, head = pl.ds(self.piece.tile.start + token, plan.slab), self.piece.head + head
            for part in range(plan.query_parts):
                slots = self.queries.slots.at[place, part, pl.ds(row, plan.slab)]
                plgpu.copy_smem_to_gmem(slots, out.at[tokens, head, pl.ds(part * size, size)])

    def _let_go_of_last_results(self):
        """The place of the last piece's query is free once its results have left it."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        last = self.piece._replace(number=self.piece.number - 1)
        plgpu.barrier_arrive(self.queries.free.at[self.plan.queries_of(last, self.team, self.warpgroup)])

    def _query_of(self, piece):
        """A piece's query, as it was loaded and as products take it."""
        views = self.queries.loaded, self.queries.taken
        loaded, query = (view.at[self.plan.query_of(piece, self.team, self.warpgroup)] for view in views)
        return loaded, query.at[pl.ds(0, self.plan.query_terms * self.plan.query_parts)]

    def _wait_for_query(self, piece):
        plgpu.barrier_wait(self.queries.here.at[self.plan.queries_of(piece, self.team, self.warpgroup)])

    def _wait_for_keys(self, i):
        wait_for_block(self.plan, "keys", self.keys_here, self._key_slot_of(i), self.done, i)

    def _wait_for_values(self, i):
        wait_for_block(self.plan, "values", self.values_here, self._slot_of(i), self.done, i)

    def _slot_of(self, i):
        return self.plan.slot_of(self.team, self.done + i)

    def _key_slot_of(self, i):
        return self.plan.key_slot_of(self.team, self.done + i)

    def _let_go(self, free, place):
        """Of what a place of a ring holds: it may be filled again."""
        if self.plan.mates:
            mates.let_go(free, place)
        else:
            plgpu.barrier_arrive(free.at[place])

    def _take_turn(self):
        if self.plan.takes_turns:
            plgpu.barrier_wait(self.turn.at[self.warpgroup])

    def _pass_turn(self):
        if self.plan.takes_turns:
            plgpu.barrier_arrive(self.turn.at[lax.rem(self.warpgroup + 1, self.plan.warpgroups)])
