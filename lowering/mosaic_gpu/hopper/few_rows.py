"""What a compute warpgroup does with a piece of a tile of few rows (Plan.few_rows), as decode steps have.

Its products have their operands changed: keys, and features of values, are rows of a wgmma, and the tile's rows
columns. So all that is computed is as little as there are rows, and a short call, which waits for each step, is
shorter. The steps of a block follow one another: other blocks come meanwhile. A latent cache's keys are its values too.

A row's maximum stays until a logit has passed it by far. It is the same for all threads, which hold different keys:
they vote on whether any has, and only then tell each other their largest.

Blocks of a quantised cache are read as they came (few_bytes.py), but for a latent one, whose blocks are widened.
"""

import functools
import math

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper import columns, few_bytes
from paged_prefill.lowering.mosaic_gpu.hopper.arrivals import wait_for_block
from paged_prefill.lowering.mosaic_gpu.hopper.columns import OF_COLUMNS
from paged_prefill.lowering.mosaic_gpu.hopper.compute import zero_unseen
from paged_prefill.lowering.mosaic_gpu.hopper.masks import Columns, Rows
from paged_prefill.lowering.mosaic_gpu.hopper.operations import KEYS, ROWS, TILED, WGMMA, any_in_warpgroup, gathered, settled
from paged_prefill.lowering.mosaic_gpu.hopper.plan import WARPGROUP_ROWS, Plan
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.hopper.softmax import Softmax, scaled_rows
from paged_prefill.lowering.mosaic_gpu.hopper.tiling import whole
from paged_prefill.lowering.mosaic_gpu.hopper.widen import scales_of, slot_of_scales


def few_rows_scratch(plan: Plan) -> dict:
    """Shared memory of all teams, by name."""
    shapes = dict(board=columns.board_shape(plan.rows), room=columns.room_shape(plan.rows, plan.value_dim))
    found = {name: plgpu.SMEM((plan.teams, *shape), jnp.float32) for name, shape in shapes.items()}
    weights = (plan.teams, plan.rows, plan.block_kv)
    return found | dict(weights=plgpu.SMEM(weights, jnp.dtype(plan.product_dtype), transforms=TILED))


class FewRows:
    """A warpgroup's way through a piece: `done` blocks went through its team's rings before it."""

    def __init__(self, plan, piece, done, team, warpgroup, shared: Shared, pages):
        self.plan, self.piece, self.done, self.team = plan, piece, done, team
        self.sources = [shared.sources[0], shared.sources[-1]]  # a latent cache's values are scaled as its keys are
        self.rows, columns_of_tile = (kind(plan, piece, warpgroup, shared.optional) for kind in (Rows, Columns))
        _, loaded, taken, *barriers = shared.queries
        self.loaded_query, self.query = loaded.at[team], taken.at[team]
        self.query_here, self.query_free = (barrier.at[team] for barrier in barriers)
        self.keys, self.keys_here, self.keys_free = shared.keys
        self.values, self.values_here, self.values_free = shared.values
        self.weights, self.board, self.room = (shared.scratch[name].at[team] for name in ("weights", "board", "room"))
        self.key_scales, self.value_scales = shared.scales
        self.fetches = _Scales(plan, piece, pages, shared.sources) if plan.reads_bytes else None
        self.seen, self.owned = columns_of_tile.seen(), columns_of_tile.owns(columns_of_tile.rows())

    def pass_over(self, first, end):
        """Nothing: its rows see all blocks of the piece."""

    def run(self, first, end):
        """Output and lse of 64 rows, the first of which are the tile's."""
        edge, clear = self.rows.whole_steps(first, end)
        scales = scales_of(self.plan, self.sources, self.piece)
        plgpu.barrier_wait(self.query_here)
        self.softmax = Softmax(self.plan, self._scale_rows(scales[0]) if self.plan.quantised else None, self.plan.rows)
        running = self._start(), self.fetches.start(first) if self.plan.reads_bytes else ()
        running = lax.fori_loop(first, edge, functools.partial(self._step, True), running)
        running = lax.fori_loop(edge, clear, functools.partial(self._step, False), running)
        if self.plan.begins_late:
            running = lax.fori_loop(clear, end, functools.partial(self._step, True), running)
        plgpu.barrier_arrive(self.query_free)
        (acc, m, l), _ = running
        if self.softmax.has_units:  # behind this, all rows have the same
            m *= self.softmax.to_logits
        m, total = columns.turned_numbers(m, l, self.board, self.team)
        sinks, softmax = self.rows.sinks(), Softmax(self.plan, 1.0)

        def result(first=0, end=0):
            """The output of some features and the lse."""
            rows = slice(first, whole(end))
            order = few_bytes.FEATURES if self.plan.reads_bytes else ()
            some = columns.turned(acc[rows], end - first, self.room, self.team, *order) if end else ()
            return softmax.result(some, m, total, sinks, scales)

        features = self.plan.columns_at_once
        if self.plan.outputs == 1:
            return result(0, features)
        # Turned, there are four times as many numbers or more: no thread has registers for all.
        firsts = range(0, self.plan.value_dim, features)
        return [lambda first=first: result(first, first + features)[0] for first in firsts], result()[1]

    def _start(self):
        """(acc, m, l) before the first block: [features, rows], [rows], and for every 64th key [64, rows].

        Of acc, rows that are no feature's have any numbers later (columns.start_output).
        """
        rows = self.plan.rows
        m = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), OF_COLUMNS)
        shapes = (whole(self.plan.value_dim), rows), (WARPGROUP_ROWS, rows)
        acc, l = (plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA) for shape in shapes)
        return acc, m, l

    def _step(self, masked, i, carry):
        """Block i: its logits, weights and output; unless it is masked, all rows see it."""
        running, fetched = carry
        key_slot, slot = self.plan.key_slot_of(self.team, self.done + i), self.plan.slot_of(self.team, self.done + i)
        wait = functools.partial(wait_for_block, self.plan, done=self.done, i=i)
        if self.plan.reads_bytes:
            (key_scales, value_scales), fetched = self.fetches.next(i, fetched)
        else:
            key_scales, value_scales = (self._scales_of(i, scales) for scales in (self.key_scales, self.value_scales))
        wait("keys", self.keys_here, key_slot)
        sums = self._start_logits(self.keys.at[key_slot])
        logits = functools.reduce(jnp.add, [settled(some, still_running=0) for some in sums])
        if not self.plan.latent:  # whose keys are still to be values
            plgpu.barrier_arrive(self.keys_free.at[key_slot])
        values = self.values.at[slot]
        if self.plan.reads_bytes:  # and turned while weights are computed
            wait("values", self.values_here, slot)
            values = few_bytes.taken_values(values, self._held(i) if masked else None)
            plgpu.barrier_arrive(self.values_free.at[slot])
        logits = self.softmax.logits(logits if key_scales is None else self.softmax.times(logits, key_scales))
        if masked:
            logits = jnp.where(self.seen(i), logits, -jnp.inf)

        counted = logits if value_scales is None else self.softmax.with_scales(logits, value_scales())
        acc, m, l = self._follow(counted, *running)
        weights = self.softmax.weights(logits, jnp.where(m == -jnp.inf, 0.0, m))  # of a row that has seen no key
        l += functools.reduce(jnp.add, (weights[k : k + WARPGROUP_ROWS] for k in range(0, len(weights), WARPGROUP_ROWS)))
        if value_scales is not None:
            weights = self.softmax.scaled(weights, logits, value_scales)
        columns.store_weights(weights.astype(self.plan.product_dtype), self.weights)

        if self.plan.reads_bytes:
            columns.meet(self.team)
            return (settled(few_bytes.start_output(acc, self.weights, values), still_running=0), m, l), fetched
        if not self.plan.latent:
            wait("values", self.values_here, slot)
        if masked:

            @pl.when(self.rows.may_hold_nothing(i))
            def _():
                zero_unseen(self.plan, self.rows, None, i, values)

        columns.meet(self.team)
        acc = settled(columns.start_output(acc, self.weights, values), still_running=0)
        plgpu.barrier_arrive(self.values_free.at[slot])
        return (acc, m, l), fetched

    def _held(self, i):
        """Which keys of block i some row may look at."""
        key = plgpu.broadcasted_iota(jnp.int32, (self.plan.block_kv,), 0, layout=KEYS)
        return self.rows.held(i, key, functools.partial(gathered, layout=KEYS))

    def _start_logits(self, keys):
        """Arrays whose sum they are: those of keys that are read as bytes are one."""
        if self.plan.reads_bytes:
            return [few_bytes.start_logits(self.query, keys)]
        return columns.start_logits(self.query, keys)

    def _follow(self, logits, acc, m, l):
        """acc, m and l by the maximum that these logits' weights are taken by.

        The vote is also what weights wait for: behind it, all warps have read the last ones.
        """
        rows = lambda numbers, shape: lax.broadcast_in_dim(numbers, shape, [1])
        bound = m + math.log2(self.softmax.largest_sum) / self.softmax.unit
        passed = ~(logits <= rows(bound, logits.shape)) & rows(self.owned, logits.shape)  # also where one is NaN

        def follow():
            # A row's bits do not depend on the other rows.
            largest = columns.largest(logits, self.board, self.team)
            own = ~(largest <= bound)
            m_next = jnp.where(own, jnp.maximum(m, self.softmax.below(largest)), m)
            fade = jnp.where(own, jnp.exp2((m - m_next) * self.softmax.unit), 1.0)
            return acc * rows(fade, acc.shape), m_next, l * rows(fade, l.shape)

        return lax.cond(any_in_warpgroup(passed, self.team), follow, lambda: (acc, m, l))

    def _scales_of(self, i, scales):
        """Those of block i's slots, where each has its own; each use loads them."""
        if scales is None:
            return None
        place = slot_of_scales(self.plan, self.done + i)
        return lambda: plgpu.layout_cast(scales.at[place][...], ROWS)

    def _scale_rows(self, key_scale):
        """Turns the query into float16, as compute.scale_rows does; what turns products with it to logits."""
        loaded = self.loaded_query
        largest = columns.largest_of_query(loaded, self.board, self.team)
        factor, to_logits = scaled_rows(self.plan, largest, key_scale)
        sorts = few_bytes.parts_together(self.plan.head_dim) if self.plan.reads_bytes else 0
        columns.scale_query(loaded, factor, self.board, self.plan.product_dtype, sorts)
        plgpu.commit_smem()
        return to_logits


class _Scales:
    """Scales of a block's slots, where each has its own: a thread has those of its keys, as they lie.

    They are few bytes of many pages. So the numbers of pages are asked for two blocks ahead and the scales one.
    """

    def __init__(self, plan: Plan, piece, pages, sources):
        self.plan, self.piece, self.pages = plan, piece, pages
        self.sources = [source for source in sources if source.scale == "slot"]
        self.places = [source.scale == "slot" for source in sources]

    def start(self, i):
        """What is fetched before block i."""
        if not self.sources:
            return ()
        return self._pages_of(i + 1), self._scales_of(i, self._pages_of(i))

    def next(self, i, fetched):
        """(Functions that give block i's scales of keys and values, or None; what is fetched before the next)."""
        if not self.sources:
            return (None, None), ()
        pages, scales = fetched
        found = iter(scales)
        given = [(lambda its=next(found): its) if is_there else None for is_there in self.places]
        return given, (self._pages_of(i + 2), self._scales_of(i + 1, pages))

    def _keys_of(self, i):
        first = (self.piece.last - i) * self.plan.block_kv
        return jnp.maximum(first + plgpu.broadcasted_iota(jnp.int32, (self.plan.block_kv,), 0, layout=ROWS), 0)

    def _pages_of(self, i):
        return gathered(self.pages, self.plan.page_of(self.piece, self._keys_of(i)), ROWS)

    def _scales_of(self, i, pages):
        keys = self._keys_of(i)
        places = [self.plan.place_of_scale(self.piece, pages, keys, source.beside) for source in self.sources]
        return [gathered(source.scales, place, ROWS) for source, place in zip(self.sources, places)]
