"""What two compute warpgroups do with a piece of wide heads (Plan.alternates): they take its blocks by turns.

They share its 64 rows, and each holds half of the output's columns. The logits and weights of a block are one
warpgroup's work, those of the next block the other's; its half of the output each adds for every block. The owner of a
block multiplies with its weights from registers, and lays them where the other reads them: one place is enough, since
each writes there only once its own product with what lay there has ended. So tensor cores go on with one block's
output and the next one's logits while little else is to be done, and blocks make room as soon as they can: there is
room for two blocks of a latent cache, whose keys are loaded once for both products, and for one of 512 features.

Over latent keys the logits of two blocks follow one another, and then their outputs: so one warpgroup weighs beside the
other's logits, and the other beside an output. Meanwhile come the next keys, which are multiplied part by part.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.compute import Merging, store_of_pairs, store_results, zero_unseen
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import meet, post, posted, settled, start_logits
from paged_prefill.lowering.mosaic_gpu.hopper.operations import start_output, start_weighted, store_weights, swapped
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
        first = lambda: self._weigh(True, 0, self._logits(0), *self.softmax.start())
        if not self.plan.latent:
            running = lax.cond(own == 0, first, self.softmax.start)
            return self._finish(end - 1, *self._steps(self._step, own, edge, clear, end, running))

        def second():
            """As if its first block needed a mask: which comes late where memory has just been asked for it."""
            late = jnp.minimum(jnp.maximum(edge, 2), end)
            steps = self._step_from_logits, 1, late, jnp.maximum(clear, late), end
            return self._steps(*steps, self.softmax.start())

        found = lax.cond(own == 0, lambda: self._steps(self._step, 0, edge, clear, end, first()), second)
        return self._finish(end - 1, *found)

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
        acc, m, l = self._start_others(i - 1, acc, m, l)
        if self.plan.latent:  # its place is wanted for the keys after next, and the next ones may not be there
            acc, logits = self._end_output(i - 1, acc), self._start_logits(i)
        else:
            logits = self._start_logits(i)
            acc = self._end_output(i - 1, acc, started_since=1)
        return self._weigh(masked, i, self._end_logits(i, logits), acc, m, l)

    def _step_from_logits(self, masked, i, acc, m, l):
        """The same, but the logits come before the other's weights do, and the weights beside the other block's output."""
        logits = self._logits(i)
        acc, m, l = self._start_others(i - 1, acc, m, l)
        return self._weigh(masked, i, logits, acc, m, l, others=i - 1)

    def _finish(self, last, acc, m, l):
        """What is left of block `last`, and the rows' results."""
        plgpu.barrier_arrive(self.query_free)

        def others():
            running, *beside = self._start_others(last, acc, m, l)
            return self._end_output(last, running), *beside

        acc, m, l = lax.cond(lax.rem(last, 2) == self.warpgroup, lambda: (acc, m, l), others)
        total = l.sum(axis=1)
        total = total + swapped(total, self.sums, self.warpgroup)
        return self.softmax.result(acc, m, total, self.rows.sinks())

    def _weigh(self, masked, i, products, acc, m, l, others=None):
        """Block i's weights, for the other too, and its output; no product is running before and after, but for the output
        of the block `others`."""
        seen = functools.partial(self.seen, i) if masked else None
        output = lambda: acc if others is None else self._end_output(others, acc)
        weights, acc, m, l = self.softmax.step(products, output, m, l, seen)
        store_weights(weights, self.weights, jnp.int32(0))
        post(m, self.maxima, self.warpgroup)
        self._wait_for_values(i)
        values = self.values.at[self._slot_of(i)]
        if masked:
            unseen = functools.partial(zero_unseen, self.plan, self.rows, None, i, values)
            pl.when(self.rows.may_hold_nothing(i))(unseen)
        plgpu.barrier_arrive(self.weighed.at[self.warpgroup])
        return self._end_output(i, start_weighted(acc, weights, values, self.warpgroup)), m, l

    def _start_others(self, i, acc, m, l):
        """Starts the output of block i by the other's weights, and goes on by their maximum."""
        other = 1 - self.warpgroup
        for group in range(len(self.plan.key_groups)):
            self._wait_for_keys(i, group)
        self._let_go_of_keys(i)  # before they are the other's weights: so the next keys need not wait for those
        plgpu.barrier_wait(self.weighed.at[other])
        self._wait_for_values(i)
        acc, m, l = self.softmax.by_maximum(posted(self.maxima, other), acc, m, l)
        return start_output(acc, self.weights, self.values.at[self._slot_of(i)], self.warpgroup), m, l

    def _logits(self, i):
        return self._end_logits(i, self._start_logits(i))

    def _start_logits(self, i):
        keys, logits = self.keys.at[self._slot_of(i)], None
        for group, parts in enumerate(self.plan.key_groups):
            self._wait_for_keys(i, group)
            logits = start_logits(self.query, keys, jnp.int32(0), 1, parts, logits)
        return logits

    def _end_logits(self, i, logits):
        logits = settled(logits, still_running=0)
        self._let_go_of_keys(i)
        return logits

    def _wait_for_keys(self, i, group):
        plgpu.barrier_wait(self.keys_here.at[self._slot_of(i) * len(self.plan.key_groups) + group])

    def _let_go_of_keys(self, i):
        if not self.plan.latent:  # whose keys are still to be values
            plgpu.barrier_arrive(self.keys_free.at[self._slot_of(i)])

    def _wait_for_values(self, i):
        if not self.plan.latent:
            plgpu.barrier_wait(self.values_here.at[self._slot_of(i)])

    def _end_output(self, i, acc, started_since=0):
        """Waits for block i's output, and lets go of its values."""
        acc = settled(acc, still_running=started_since)
        plgpu.barrier_arrive(self.values_free.at[self._slot_of(i)])
        return acc

    def _slot_of(self, i):
        return lax.rem(self.done + i, self.plan.slots)
