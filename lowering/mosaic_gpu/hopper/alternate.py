"""What two compute warpgroups do with a piece of wide heads (Plan.alternates): they take its blocks by turns.

They share its 64 rows, and each holds half of the output's columns. The logits and weights of a block are one
warpgroup's work, those of the next block the other's; its half of the output each adds for every block. The owner of a
block multiplies with its weights from registers, and lays them where the other reads them: one place is enough, since
each writes there only once its own product with what lay there has ended.

Blocks come in shares, each multiplied while others are on their way (Plan.block_shares). Of a latent cache, whose keys
are loaded once for both products, there is room for two blocks: the logits of two follow one another, and then their
outputs, so one warpgroup weighs beside the other's logits, and the other beside an output. Of keys and values of 512
features there is room for one block, in halves that make room on their own too: the logits are first there, since the next
keys wait for them, and the other's output runs beside their softmax.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.compute import Merging, store_of_pairs, store_results, zero_unseen
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import meet, post, posted, settled, start_logits
from paged_prefill.lowering.mosaic_gpu.hopper.operations import start_output, start_weighted, store_weights, swapped, wait_for_products
from paged_prefill.lowering.mosaic_gpu.hopper.plan import Plan
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.hopper.softmax import Softmax


def compute(plan: Plan, piece, done, *, warpgroup, shared: Shared, results):
    """One warpgroup's share of a piece, from its first block to its results in global memory."""
    rows, first_column = Rows(plan, piece, warpgroup, shared.optional), warpgroup * plan.output_columns
    if plan.clusters:
        merging = Merging(plan, piece, warpgroup, **shared.scratch)
    found = _Attention(plan, piece, done, warpgroup, rows, shared).run()
    # Both write the lse, the same bits.
    if plan.clusters:
        return merging.store(rows, found, results, first_column)
    store = store_of_pairs if plan.merges_in_pairs else store_results
    store(plan, piece, rows, found, results, first_column)


class _Attention:
    """A warpgroup's way through a piece: `done` blocks went through the ring before it."""

    def __init__(self, plan, piece, done, warpgroup, rows, shared: Shared):
        self.plan, self.piece, self.done, self.warpgroup, self.rows = plan, piece, done, warpgroup, rows
        self.softmax, self.seen = Softmax(plan), rows.seen()
        *_, taken, self.query_here, self.query_free = shared.queries
        self.query = taken.at[0]
        self.keys, self.keys_here, self.keys_free = shared.keys
        self.values, self.values_here, self.values_free = shared.values
        self.weights, self.weighed = shared.scratch["weights"], shared.scratch["weighed"]
        self.maxima, self.sums = (shared.scratch["boards"].at[i] for i in range(2))

    def run(self):
        """Output and lse of the rows, of the warpgroup's columns."""
        end, own = self.piece.steps, self.warpgroup
        edge, clear = self.rows.whole_steps(0, end)
        plgpu.barrier_wait(self.query_here)
        meet(self.plan.warpgroups)  # both have read what they had of one another
        # One of the two has block 0, behind which there is no other.
        if not self.plan.latent:
            running = lax.cond(own == 0, self._first, self.softmax.start)
            return self._finish(end - 1, *self._steps(self._step, own, edge, clear, end, running))

        def second():
            """As if its first block needed a mask: which comes late where memory has just been asked for it."""
            late = jnp.minimum(jnp.maximum(edge, 2), end)
            steps = self._step_from_logits, 1, late, jnp.maximum(clear, late), end
            return self._steps(*steps, self.softmax.start())

        found = lax.cond(own == 0, lambda: self._steps(self._step, 0, edge, clear, end, self._first()), second)
        return self._finish(end - 1, *found)

    def _first(self):
        """What is running after block 0."""
        logits = self._logits(0)
        acc, m, l = self.softmax.start()
        return self._weigh(True, 0, logits, lambda: acc, m, l)

    def _steps(self, whole_step, own, edge, clear, end, running):
        """From block 1 on, those of a warpgroup's blocks that need a mask, those that all rows see, and others that do."""
        masked, whole = functools.partial(self._step, True), functools.partial(whole_step, False)

        def steps(step, first, last, running):
            """Those of the warpgroup's blocks that are from the first to the second of these."""
            first, last = (lax.div(i - own + 1, 2) for i in (first, last))
            return lax.fori_loop(first, last, lambda j, running: step(2 * j + own, *running), running)

        running = steps(masked, 1, edge, running)
        running = steps(whole, edge, clear, running)
        if self.plan.begins_late:
            running = steps(masked, clear, end, running)
        return running

    def _step(self, masked, i, acc, m, l):
        """The output of block i - 1, which is the other's, and all of block i; unless it is masked, all rows see it."""
        acc, m, l = self._with_others(i - 1, acc, m, l)
        if self.plan.latent:  # the last block's place is wanted for the keys after next, and the next ones may not be there
            acc = self._end_output(i - 1, self._start_others(i - 1, acc))
            return self._weigh(masked, i, self._logits(i), lambda: acc, m, l)
        logits, acc = self._start_logits(i, acc)
        acc = self._start_others(i - 1, acc)
        logits = self._end_logits(i, logits, started_since=1)
        return self._weigh(masked, i, logits, lambda: self._end_output(i - 1, acc), m, l)

    def _step_from_logits(self, masked, i, acc, m, l):
        """The same, but the logits come before the other's weights do, and the weights beside the other block's output."""
        logits = self._logits(i)
        acc, m, l = self._with_others(i - 1, acc, m, l)
        acc = self._start_others(i - 1, acc)
        return self._weigh(masked, i, logits, lambda: self._end_output(i - 1, acc), m, l)

    def _finish(self, last, acc, m, l):
        """What is left of block `last`, and the rows' results."""
        plgpu.barrier_arrive(self.query_free)

        def others():
            running, *beside = self._with_others(last, acc, m, l)
            return self._end_output(last, self._start_others(last, running)), *beside

        acc, m, l = lax.cond(lax.rem(last, 2) == self.warpgroup, lambda: (acc, m, l), others)
        total = l.sum(axis=1)
        total = total + swapped(total, self.sums, self.warpgroup)
        return self.softmax.result(acc, m, total, self.rows.sinks())

    def _weigh(self, masked, i, products, output, m, l):
        """Block i's weights, for the other too, and its output, once `output` has ended; no product is running behind."""
        seen = functools.partial(self.seen, i) if masked else None
        weights, acc, m, l = self.softmax.step(products, output, m, l, seen)
        store_weights(weights, self.weights, jnp.int32(0))
        post(m, self.maxima, self.warpgroup)
        if not self.plan.latent:  # else the other reads what this one zeroes
            plgpu.barrier_arrive(self.weighed.at[self.warpgroup])
        self._wait_for_values(i)
        if masked:
            self._clean_values(i)
        if self.plan.latent:
            plgpu.barrier_arrive(self.weighed.at[self.warpgroup])
        return self._end_output(i, start_weighted(acc, weights, *self._own_values(i))), m, l

    def _with_others(self, i, acc, m, l):
        """What is running by the maximum of the other's weights of block i, once those are there."""
        other = 1 - self.warpgroup
        for share in range(self.plan.block_shares):
            self._wait_for_keys(i, share)
        for share in range(self.plan.freed_shares):
            self._let_go_of_keys(i, share)  # before they are the other's weights: so the next keys need not wait for those
        plgpu.barrier_wait(self.weighed.at[other])
        self._wait_for_values(i)
        if not self.plan.latent:
            self._clean_values(i)
        return self.softmax.by_maximum(posted(self.maxima, other), acc, m, l)

    def _start_others(self, i, acc):
        """Starts the output of block i by the other's weights."""
        return start_output(acc, self.weights, *self._own_values(i))

    def _logits(self, i):
        logits, _ = self._start_logits(i)
        return self._end_logits(i, logits)

    def _start_logits(self, i, acc=None):
        """Starts those of block i, share by share; an output that is to be started behind them is settled before."""
        keys, logits = self.keys.at[self._slot_of(i)], None
        for share, parts in enumerate(self.plan.key_groups):
            self._wait_for_keys(i, share)
            query = self.query
            if self.plan.freed_shares > 1:
                query, keys = query.at[pl.ds(parts[0], len(parts))], self.keys.at[self._slot_of(i), share]
                parts = [*range(len(parts))]
            operands = query, keys, jnp.int32(0), 1, parts, logits
            if share == 0 and acc is not None:
                logits, acc = start_logits(*operands, next_output=acc)
            else:
                logits = start_logits(*operands)
        return logits, acc

    def _end_logits(self, i, logits, started_since=0):
        """Waits for those of block i, and lets go of its keys, share by share."""
        last = self.plan.freed_shares - 1
        for share in range(last):
            wait_for_products(last - share + started_since)
            self._let_go_of_keys(i, share)
        logits = settled(logits, still_running=started_since)
        self._let_go_of_keys(i, last)
        return logits

    def _wait_for_keys(self, i, share):
        plgpu.barrier_wait(self.keys_here.at[self._slot_of(i) * self.plan.block_shares + share])

    def _let_go_of_keys(self, i, share):
        if not self.plan.latent:  # whose keys are still to be values
            plgpu.barrier_arrive(self.keys_free.at[self._slot_of(i) * self.plan.freed_shares + share])

    def _wait_for_values(self, i):
        if not self.plan.latent:
            plgpu.barrier_wait(self.values_here.at[self._place_of_values(i)])

    def _own_values(self, i):
        """A block's values, or a share of them, and which part of their columns is the warpgroup's."""
        values = self.values.at[self._slot_of(i)]
        return (values, self.warpgroup) if self.plan.freed_shares == 1 else (values.at[self.warpgroup], jnp.int32(0))

    def _clean_values(self, i):
        """Zeroes, of those that the warpgroup reads, what no row sees."""
        values, _ = self._own_values(i)
        zero = functools.partial(zero_unseen, self.plan, self.rows, None, i, values)
        pl.when(self.rows.may_hold_nothing(i))(zero)

    def _end_output(self, i, acc):
        """Waits for block i's output, and lets go of its values."""
        acc = settled(acc, still_running=0)
        plgpu.barrier_arrive(self.values_free.at[self._place_of_values(i)])
        return acc

    def _place_of_values(self, i):
        """The number of the barriers of those values that the warpgroup reads."""
        return self._slot_of(i) if self.plan.freed_shares == 1 else 2 * self._slot_of(i) + self.warpgroup

    def _slot_of(self, i):
        return lax.rem(self.done + i, self.plan.slots)
