"""Which keys of a chunk are seen: what hides logits, and zeroes what weights of zero meet, since 0 * NaN is NaN."""

from typing import NamedTuple

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from paged_prefill.lowering.mosaic_tpu.registers import widen
from paged_prefill.lowering.mosaic_tpu.schedule import Sizes, sublanes
from paged_prefill.primitive.packing import MAX_CONTEXT


class Rows(NamedTuple):
    """The slice of a tile that takes part in one matrix product. `at` is where its running values are kept."""

    first: object
    count: int
    at: object

    @property
    def slice(self):
        """The rows, as tokens of the tile."""
        return pl.ds(self.first, self.count)


def is_inside(interval, shape, axis):
    """Which keys, counted along an axis, lie in [start, end)."""
    key = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (key >= interval[0]) & (key < interval[1])


def hide_outside(s, interval):
    """Logits [rows, keys] with -inf outside an interval of keys that is the same for all rows."""
    return jnp.where(is_inside(interval, (1, s.shape[1]), 1), s, -jnp.inf)


def zero_outside(values_ref, chunk, interval, sizes: Sizes):
    """Zeroes the values of a chunk that lie outside an interval of its keys: 0 * NaN is NaN."""
    start, end = interval
    keys = max(sizes.run, sublanes(values_ref.dtype))  # what is stored at once fills native tiles

    @pl.loop(0, sizes.chunk // keys)
    def _(i):
        first = i * keys

        @pl.when((first < start) | (first + keys > end))
        def _():
            at = slice(None), pl.ds(pl.multiple_of(chunk * sizes.chunk + first, keys), keys)
            inside = is_inside((start - first, end - first), (1, keys, 1), 1)
            values_ref[at] = jnp.where(inside, values_ref[at], 0)


def zero_scales_outside(scales, interval):
    """A chunk's scales [1, chunk], zeroed outside an interval of its keys."""
    return jnp.where(is_inside(interval, scales.shape, 1), scales, 0.0)


class Mask(NamedTuple):
    """Causality and window, of rows some of which see other keys than others.

    Attributes:
      ends_ref: VMEM [rows of a tile, LANES] int32: where the keys of each row end, the same in every lane.
      rows: those that take part.
      first_key: of the chunk.
      key_start, key_end: no row of the item sees a key outside.
      causal: whether some row's keys may end before the last that it is asked of.
      window: None where every row's window starts before the first.
    """

    ends_ref: object
    rows: Rows
    first_key: object
    key_start: object
    key_end: object
    causal: bool
    window: int | None

    @staticmethod
    def fill(ends_ref, rows: Rows, group: int, position):
        """Writes where the keys of rows end, the first row of the tile standing at a position."""
        shape = (group, rows.count, ends_ref.shape[1])
        end = position + rows.first + 1 + lax.broadcasted_iota(jnp.int32, shape, 1)
        ends_ref[rows.at] = end.reshape(-1, shape[2])

    def hide(self, s, group, strip):
        """Logits with -inf where a row does not see a key, of a strip of the rows of a group's heads."""
        ends = self.ends_ref[pl.ds(self.rows.at.start + strip.start, strip.stop - strip.start)]
        end = widen(ends, s.shape[1])
        key = self.first_key + lax.broadcasted_iota(jnp.int32, (1, s.shape[1]), 1)
        if self.causal:
            key = jnp.where(key < self.key_end, key, MAX_CONTEXT)
            s = jnp.where(key < end, s, -jnp.inf)
        return s if self.window is None else jnp.where(key >= end - self.window, s, -jnp.inf)

    def zero(self, values):
        """The values of keys that no row sees, zeroed: already done, where they lie."""
        return values

    def zero_scales(self, scales):
        """Scales [1, keys] with zeros for keys that no row of the item sees."""
        return zero_scales_outside(scales, (self.key_start - self.first_key, self.key_end - self.first_key))


class MaskByRow(NamedTuple):
    """The same where what each row sees is read from arrays: lo and hi of its keys, and the words of its tree.

    Attributes:
      seen_ref: VMEM [block_q, 2 + words]; `turned_ref` the same with the rows in lanes.
      rows: those that take part.
      row_start, row_end: the item's rows in the tile.
      first_new: where the sequence's first new token stands; None where there is no tree.
    """

    seen_ref: object
    turned_ref: object
    rows: Rows
    first_key: object
    row_start: object
    row_end: object
    first_new: object

    def hide(self, s, group, strip):
        """Logits with -inf where a row does not see a key, of a strip of the rows of a group's heads."""
        seen = jnp.concatenate([self.seen_ref[self.rows.slice]] * group)[strip]
        row = self.rows.first + lax.broadcasted_iota(jnp.int32, (group, self.rows.count, 1), 1).reshape(-1, 1)[strip]
        columns = [seen[:, i : i + 1] for i in range(seen.shape[1])]
        return jnp.where(self._sees(columns, row, 1, s.shape[1]), s, -jnp.inf)

    def zero(self, values):
        """Values [keys, value_dim] with zeros for keys that no row of the item sees."""
        row = lax.broadcasted_iota(jnp.int32, (1, self.turned_ref.shape[1]), 1)
        columns = [self.turned_ref[i : i + 1] for i in range(self.turned_ref.shape[0])]
        sees = jnp.where(self._sees(columns, row, 0, values.shape[0]), 1, 0)
        return jnp.where(jnp.max(sees, axis=1, keepdims=True) > 0, values, 0)

    def zero_scales(self, scales):
        """Scales [1, keys] with zeros for keys that no row of the item sees."""
        row = lax.broadcasted_iota(jnp.int32, (self.seen_ref.shape[0], 1), 0)
        columns = [self.seen_ref[:, i : i + 1] for i in range(self.seen_ref.shape[1])]
        sees = jnp.where(self._sees(columns, row, 1, scales.shape[1]), 1, 0)
        return jnp.where(jnp.max(sees, axis=0, keepdims=True) > 0, scales, 0.0)

    def _sees(self, columns, row, keys_axis, keys):
        lo, hi, *words = columns
        shape = (1, keys) if keys_axis else (keys, 1)
        key = self.first_key + lax.broadcasted_iota(jnp.int32, shape, keys_axis)
        sees = (key >= lo) & (key < hi) & (row >= self.row_start) & (row < self.row_end)
        for number, word in enumerate(words):
            bit = key - self.first_new - 32 * number
            there = lax.shift_right_logical(word + jnp.zeros_like(bit), jnp.clip(bit, 0, 31) + jnp.zeros_like(word))
            sees &= (bit < 0) | (bit > 31) | ((there & 1) == 1)
        return sees
