"""What two compute warpgroups do with a piece of wide heads (Plan.alternates): they take its blocks by turns.

They share its 64 rows, and each holds half of the output's columns. The logits and weights of a block are one
warpgroup's work, those of the next block the other's; its half of the output each adds for every block. The owner of a
block multiplies with its weights from registers, and lays them where the other reads them: one place is enough, since
each writes there only once its own product with what lay there has ended.

There is room for two blocks of a latent cache, whose keys are loaded once for both products: its output of one block is
started before the logits of the next, and makes room. Of keys and values of 512 features there is room for one block, in
halves that come and make room on their own (Plan.block_shares): the logits are first there, since the next keys wait for
them, and the output runs beside their softmax.
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
        running = self.softmax.start()
        acc, m, l = running
        begun = lambda: self._weigh(True, 0, self._logits(0), lambda: acc, m, l)
        running = lax.cond(own == 0, begun, lambda: running)

        def steps(masked, first, last, running):
            """Those of the warpgroup's blocks that are from the first to the second of these."""
            first, last = (lax.div(i - own + 1, 2) for i in (first, last))
            step = lambda j, running: self._step(masked, 2 * j + own, *running)
            return lax.fori_loop(first, last, step, running)

        running = steps(True, 1, edge, running)
        running = steps(False, edge, clear, running)
        if self.plan.begins_late:
            running = steps(True, clear, end, running)
        return self._finish(end - 1, *running)

    def _step(self, masked, i, acc, m, l):
        """The output of block i - 1, which is the other's, and all of block i; unless it is masked, all rows see it."""
        acc, m, l = self._with_others(i - 1, acc, m, l)
        if self.plan.latent:
            acc = self._start_others(i - 1, acc)
            logits, _ = self._start_logits(i)
            acc = self._end_output(i - 1, acc, started_since=1)
            return self._weigh(masked, i, self._end_logits(i, logits), lambda: acc, m, l)
        logits, acc = self._start_logits(i, acc)
        acc = self._start_others(i - 1, acc)
        logits = self._end_logits(i, logits, started_since=1)
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
        for place in self._places(i):
            plgpu.barrier_wait(self.keys_here.at[place])
        self._let_go_of_keys(self._places(i))  # before they are the other's weights: so the next keys need not wait for those
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
        shares, logits = self.plan.block_shares, None
        parts = self.plan.query_parts // shares
        for share, place in enumerate(self._places(i)):
            plgpu.barrier_wait(self.keys_here.at[place])
            query, keys = self.query.at[pl.ds(share * parts, parts)], self.keys.at[self._slot_of(i)]
            operands = query, keys if shares == 1 else keys.at[share], jnp.int32(0), 1, [*range(parts)], logits
            if share == 0 and acc is not None:
                logits, acc = start_logits(*operands, next_output=acc)
            else:
                logits = start_logits(*operands)
        return logits, acc

    def _end_logits(self, i, logits, started_since=0):
        """Waits for those of block i, and lets go of its keys, share by share."""
        *firsts, last = self._places(i)
        for left, place in zip(range(len(firsts), 0, -1), firsts):
            wait_for_products(left + started_since)
            self._let_go_of_keys([place])
        logits = settled(logits, still_running=started_since)
        self._let_go_of_keys([last])
        return logits

    def _let_go_of_keys(self, places):
        if not self.plan.latent:  # whose keys are still to be values
            for place in places:
                plgpu.barrier_arrive(self.keys_free.at[place])

    def _wait_for_values(self, i):
        if not self.plan.latent:
            plgpu.barrier_wait(self.values_here.at[self._place_of_values(i)])

    def _own_values(self, i):
        """A block's values, or a share of them, and which part of their columns is the warpgroup's."""
        values = self.values.at[self._slot_of(i)]
        return (values, self.warpgroup) if self.plan.block_shares == 1 else (values.at[self.warpgroup], jnp.int32(0))

    def _clean_values(self, i):
        """Zeroes, of those that the warpgroup reads, what no row sees."""
        values, _ = self._own_values(i)
        zero = functools.partial(zero_unseen, self.plan, self.rows, None, i, values)
        pl.when(self.rows.may_hold_nothing(i))(zero)

    def _end_output(self, i, acc, started_since=0):
        """Waits for block i's output, and lets go of its values."""
        acc = settled(acc, still_running=started_since)
        plgpu.barrier_arrive(self.values_free.at[self._place_of_values(i)])
        return acc

    def _places(self, i):
        """The barriers' numbers of block i's shares."""
        shares = self.plan.block_shares
        return [self._slot_of(i) * shares + share for share in range(shares)]

    def _place_of_values(self, i):
        """Likewise, of the values that the warpgroup reads."""
        return self._slot_of(i) if self.plan.block_shares == 1 else 2 * self._slot_of(i) + self.warpgroup

    def _slot_of(self, i):
        return lax.rem(self.done + i, self.plan.slots)
