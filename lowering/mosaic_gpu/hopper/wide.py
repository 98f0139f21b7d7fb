"""What two compute warpgroups do with a piece over a quantised cache whose output is wider than the registers of one.

They share its 64 rows (Plan.wide), and its blocks, which those of other caches take by turns (alternate.py). Each
computes the logits of one half of a block's keys, and weights by maxima of both halves. The weights meet in shared
memory, where both read them all, and each multiplies them with half of the values' columns: so no product is computed
twice. The values of a latent cache are the first features of its keys, loaded once.

A step computes the output of block i - 1 and then the logits of block i, whose keys are widened to where those values
were. The tensor cores rest while both warpgroups weigh; loads run on meanwhile.
"""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.compute import store_of_pairs, store_results, zero_unseen
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import KEYS, ROWS, TILED, WGMMA, meet, settled
from paged_prefill.lowering.mosaic_gpu.hopper.operations import start_logits, start_output, store_weights, swapped
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.hopper.softmax import Softmax, scaled_rows
from paged_prefill.lowering.mosaic_gpu.hopper.widen import scales_of, slot_of_scales


def wide_scratch(plan: Plan) -> dict:
    """What is in shared memory for this alone, by name."""
    return dict(
        weights=plgpu.SMEM((WARPGROUP_ROWS, plan.block_kv), jnp.dtype(plan.product_dtype), transforms=TILED),
        boards=plgpu.SMEM((2, plan.warpgroups * WARPGROUP_ROWS), jnp.float32),
        weighed=plgpu.Barrier(num_barriers=2),
    )


def compute(plan: Plan, piece, done, *, warpgroup, shared: Shared, results):
    """One warpgroup's share of a piece, from its first block to its results in global memory."""
    rows = Rows(plan, piece, warpgroup, shared.optional)
    found = _Attention(plan, piece, done, warpgroup, rows, shared).run()
    # Both write the lse, the same bits.
    store = store_of_pairs if plan.merges_in_pairs else store_results
    store(plan, piece, rows, found, results, warpgroup * plan.output_columns)


class _Attention:
    """A warpgroup's way through a piece: `done` blocks went through the rings before it."""

    def __init__(self, plan, piece, done, warpgroup, rows, shared: Shared):
        self.plan, self.piece, self.done, self.warpgroup, self.rows = plan, piece, done, warpgroup, rows
        # A latent cache's values are scaled as its keys are.
        self.sources, self.turns = [shared.sources[0], shared.sources[-1]], plan.output_turns
        self.key_scales, self.value_scales = shared.scales
        self.seen = rows.seen()
        self.loaded_query, self.query = shared.queries.loaded.at[0], shared.queries.taken.at[0]
        self.query_here, self.query_free = shared.queries.here, shared.queries.free
        self.keys, self.keys_here, self.keys_free = shared.keys
        self.values, self.values_here, self.values_free = shared.values
        self.weights = shared.scratch["weights"]
        self.maxima, self.sums = (shared.scratch["boards"].at[i] for i in range(2))

    def run(self):
        """Output and lse of the rows, of the warpgroup's columns."""
        end = self.piece.steps
        edge, clear = self.rows.whole_steps(0, end)
        running = self._start()
        masked = functools.partial(self._step, True)
        running = lax.fori_loop(1, edge, masked, running)
        running = lax.fori_loop(edge, clear, functools.partial(self._step, False), running)
        if self.plan.begins_late:
            running = lax.fori_loop(clear, end, masked, running)
        return self._finish(end - 1, *running)

    def _start(self):
        """The weights of block 0."""
        key_scale, _ = scales_of(self.plan, self.sources, self.piece)
        plgpu.barrier_wait(self.query_here)
        self.softmax = Softmax(self.plan, self._scale_rows(key_scale))
        products = self._products_of(self._start_logits(0), 0)
        acc, m, l = self.softmax.start()
        columns = self.plan.output_columns // self.turns
        acc = tuple(acc[:, c : c + columns] for c in range(0, self.plan.output_columns, columns))
        return self._weigh(True, 0, products, acc, m, l)

    def _step(self, masked, i, running):
        """The output of block i - 1, and the weights of block i; unless it is masked, every row sees all of it."""
        acc, m, l = running
        acc = self._end_output(i - 1, self._start_output(i - 1, acc))
        return self._weigh(masked, i, self._products_of(self._start_logits(i), i), acc, m, l)

    def _finish(self, last, acc, m, l):
        """The output of block `last`, and the rows' results."""
        plgpu.barrier_arrive(self.query_free)
        scales = scales_of(self.plan, self.sources, self.piece)
        acc = self._end_output(last, self._start_output(last, acc))
        total = self._of_both(jnp.add, l.sum(axis=1), self.sums)
        return self.softmax.result(acc, m, total, self.rows.sinks(), scales)

    def _weigh(self, masked, i, products, acc, m, l):
        """Lays block i's weights where both warpgroups read them; what is running by a maximum of both."""
        key_scales, value_scales = (self._scales_of(i, scales) for scales in (self.key_scales, self.value_scales))
        logits = self.softmax.logits(products if key_scales is None else self.softmax.times(products, key_scales))
        if masked:
            logits = jnp.where(self.seen(i), logits, -jnp.inf)
        # Where both have met, the last block's weights have been read.
        largest = self._of_both(jnp.maximum, self.softmax.largest(logits, value_scales), self.maxima)
        weights, acc, m, l = self.softmax.step_together(logits, largest, acc, m, l, value_scales)
        store_weights(weights.astype(self.plan.product_dtype), self.weights, self.warpgroup)
        if not self.plan.latent:
            plgpu.barrier_wait(self.values_here.at[self._slot_of(i)])
        if masked:
            values = self.values.at[self._slot_of(i)]
            unseen = functools.partial(zero_unseen, self.plan, self.rows, self.warpgroup, i, values)
            pl.when(self.rows.may_hold_nothing(i))(unseen)
        meet(self.plan.warpgroups)
        return acc, m, l

    def _scales_of(self, i, scales):
        """Those of the warpgroup's share of block i, where each slot has its own; each use loads them."""
        if scales is None:
            return None
        share = pl.ds(self.rows.first_column, self.plan.logit_columns)
        place = slot_of_scales(self.plan, self.done + i)
        return lambda: plgpu.layout_cast(scales.at[place, share][...], KEYS)

    def _scale_rows(self, key_scale):
        """Turns the query into float16, as compute.scale_rows does: each warpgroup one half, by what both have read."""
        plan, parts = self.plan, range(self.plan.query_parts)
        largest = jnp.zeros((WARPGROUP_ROWS,), jnp.float32)
        largest = plgpu.layout_cast(largest, ROWS)
        for part in parts:
            numbers = self._loaded(part)
            largest = jnp.maximum(largest, jnp.maximum(numbers, -numbers).max(axis=1))
        factor, to_logits = scaled_rows(plan, largest, key_scale)
        meet(plan.warpgroups)
        for part in parts:

            @pl.when(self.warpgroup == part % plan.warpgroups)
            def _(part=part):
                numbers = self._loaded(part)
                scaled = numbers * lax.broadcast_in_dim(factor, numbers.shape, [0])
                self.query.at[part][...] = scaled.astype(plan.product_dtype)

        plgpu.commit_smem()
        meet(plan.warpgroups)
        return to_logits

    def _loaded(self, part):
        return plgpu.layout_cast(self.loaded_query.at[part][...], WGMMA).astype(jnp.float32)

    def _of_both(self, combine, numbers, board):
        """Numbers of rows, combined with the other warpgroup's."""
        return combine(numbers, swapped(numbers, board, self.warpgroup))

    def _products_of(self, products, i):
        """Those of queries and keys, once they are there; a latent cache's keys are still to be values."""
        products = settled(products, still_running=0)
        if not self.plan.latent:
            plgpu.barrier_arrive(self.keys_free.at[self._slot_of(i)])
        return products

    def _start_logits(self, i):
        slot, groups, logits = self._slot_of(i), self.plan.key_groups, None
        for number, parts in enumerate(groups):
            plgpu.barrier_wait(self.keys_here.at[slot * len(groups) + number])
            shares = self.warpgroup, self.plan.warpgroups
            logits = start_logits(self.query, self.keys.at[slot], *shares, parts, logits)
        return logits

    def _start_output(self, i, acc):
        """In as many turns as `acc` has arrays, each with its share of the warpgroup's columns."""
        values, first = self.values.at[self._slot_of(i)], self.warpgroup * self.turns
        return tuple(start_output(part, self.weights, values, first + turn) for turn, part in enumerate(acc))

    def _end_output(self, i, acc):
        """Waits for each turn of block i's output, and lets go of its values."""
        done, slot = [], self._slot_of(i) * self.turns
        for turn, part in enumerate(acc):
            done.append(settled(part, still_running=self.turns - 1 - turn))
            plgpu.barrier_arrive(self.values_free.at[slot + turn])
        return tuple(done)

    def _slot_of(self, i):
        return lax.rem(self.done + i, self.plan.slots)
