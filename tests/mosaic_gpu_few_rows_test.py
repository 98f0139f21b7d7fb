"""The loop of tiles of few rows, where no GPU is needed."""

import contextlib
import math
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.call import Device
from paged_prefill.lowering.mosaic_gpu import host, room
from paged_prefill.lowering.mosaic_gpu.hopper import columns, compute, few_bytes, few_rows, masks, scratch, softmax
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.mosaic_gpu.room import rows_of, teams_of
from paged_prefill.lowering.tiles import Slabs, Tiles
from paged_prefill.tests import plans, problems

ROWS, BLOCK, FEATURES, STAGES = 64, 64, 64, 2


class Place:
    """One of a ring's: waiting for it brings its next block, and what is let go of is NaN at once."""

    def __init__(self, array, blocks):
        self.array, self.blocks = array, blocks

    def wait(self):
        self.array[:] = next(self.blocks)

    def arrive(self):
        self.array[:] = np.nan


class Memory:
    """A reference to shared memory."""

    def __init__(self, array):
        self.array, self.at = array, self

    def __getitem__(self, place):
        if place is Ellipsis:
            return jnp.asarray(self.array.copy())
        places = place if isinstance(place, tuple) else (place,)
        slices = [slice(p.start, p.start + p.size) if hasattr(p, "start") and hasattr(p, "size") else p for p in places]
        return Memory(self.array[tuple(slices)])

    def __setitem__(self, place, numbers):
        self.array[place] = numbers


class Scales:
    """Those of the blocks' slots, one block after another, in as many places as there are."""

    def __init__(self, blocks, places):
        self.blocks, self.places, self.at, self.step = blocks, places, self, 0

    def __getitem__(self, place):
        self.step += int(place) != self.step % self.places
        assert int(place) == self.step % self.places
        return {...: jnp.asarray(self.blocks[self.step])}


def _logits(query, keys):
    """A query has its parts one behind the other."""
    return [jnp.asarray(keys.array @ np.concatenate([*query.array], axis=1).T)]


def _output(acc, weights, values):
    """In whole groups of 64 rows: behind the last feature lies NaN."""
    values = values.array[:, : len(acc)]
    return acc + np.pad(values, ((0, 0), (0, len(acc) - values.shape[1])), constant_values=np.nan).T @ weights.array.T


def _turned(acc, features, *_):
    """Rows as many as a warpgroup has."""
    return np.resize(acc[:features].T, (ROWS, features))


@contextlib.contextmanager
def numpy_for_a_warpgroup():
    """The loop's operations, in NumPy."""

    def loop(first, end, step, running):
        for i in range(int(first), int(end)):
            running = step(i, running)
        return running

    threads = SimpleNamespace(
        barrier_wait=lambda barrier: barrier.wait(),
        barrier_arrive=lambda barrier: barrier.arrive(),
        broadcasted_iota=lambda dtype, shape, axis, layout: jnp.asarray(np.indices(shape)[axis], dtype),
        layout_cast=lambda array, layout: array,
        commit_smem=lambda: None,
        Layout=mock.MagicMock(),
    )

    def zero(values, keys, parts, where):
        columns = 64
        for key, part, there in zip(*map(np.asarray, (keys, parts, where))):
            if there:
                values.array[key, part * columns : (part + 1) * columns] = 0

    of_threads = dict(number=lambda: jnp.arange(128, dtype=jnp.int32), load=lambda array, place: array[place], zero=zero)
    when = lambda true: lambda do: do() if true else None
    control = dict(pl=SimpleNamespace(when=when, ds=few_rows.pl.ds), plgpu=threads)
    python = SimpleNamespace(
        cond=lambda true, one, other: one() if true else other(),
        fori_loop=loop,
        broadcast_in_dim=jax.lax.broadcast_in_dim,
    )
    operations = dict(
        start_logits=_logits,
        start_output=_output,
        store_weights=lambda weights, target: np.copyto(target.array, weights.T),
        largest=lambda numbers, board, team: numbers.max(axis=0),
        meet=lambda team: None,
        turned=_turned,
        turned_numbers=lambda m, l, *_: [np.resize(numbers, ROWS) for numbers in (m, l.sum(axis=0))],
        largest_of_query=lambda query, board, team: jnp.abs(query.array).max(axis=(0, 2)),
        scale_query=lambda query, factor, *_: np.multiply(query.array, factor[:, None], out=query.array),
    )

    def taken_values(values, held=None):
        held = np.ones(len(values.array)) if held is None else np.asarray(held)
        return np.where(held[:, None], values.array, 0).T

    of_bytes = dict(
        taken_values=taken_values,
        start_logits=lambda query, keys: _logits(query, keys)[0],
        start_output=lambda acc, weights, values: acc + values @ weights.array.T,
    )
    with (
        mock.patch.multiple(few_rows, lax=python, settled=lambda product, still_running: product, **control),
        mock.patch.object(few_rows, "wait_for_block", lambda plan, name, here, slot, done, i: here.at[slot].wait()),
        mock.patch.object(few_rows, "any_in_warpgroup", lambda flags, team: jnp.any(flags)),
        mock.patch.object(few_rows, "gathered", lambda source, indices, layout: jnp.asarray(source)[indices]),
        mock.patch.multiple(columns, **operations),
        mock.patch.multiple(few_bytes, **of_bytes),
        mock.patch.multiple(compute, **control),
        mock.patch.multiple(compute.threads, **of_threads),
        mock.patch.multiple(masks, plgpu=threads),
        mock.patch.multiple(softmax, plgpu=threads),
    ):
        yield


class FewRowsTest(parameterized.TestCase):
    def attend(self, plan, context, length, query, keys, values, scales=None):
        """(output, lse) of a tile's rows, by `length` tokens at the end of a context.

        `scales` are those of the keys and of the values: of all, or of each. Values of a latent cache are part of its keys.
        """
        position = context - length
        first_key, whole = (max(p - (plan.window or context) + 1, 0) for p in (position, context - 1))
        first, end = first_key // BLOCK, -(-context // BLOCK)
        tile = Tiles(start=0, length=length, position=position, first_new=position, first_block=first, end_block=end,
                     seq=0, first_key=first_key, end_key=context, owned=1, holes=0, part=0, parts=1,
                     slabs=Slabs(first_key, context, whole, position + 1))  # fmt: skip
        piece = SimpleNamespace(tile=tile, last=end - 1, steps=end - first, heads_left=plan.group, cache_head=0,
                                first_row=0)  # fmt: skip
        blocks = [slice(i * BLOCK, (i + 1) * BLOCK) for i in range(end - 1, first - 1, -1)]
        parts = Memory(np.stack(np.split(query, plan.query_parts, axis=1))[None])
        scratch, sources = dict(query_views=[[None], [parts], [parts]]), []
        scratch |= {name: SimpleNamespace(at=[mock.Mock()]) for name in ("query_here", "query_free")}
        for name, numbers in dict(keys=keys, **({} if plan.latent else dict(values=values))).items():
            ring, its_blocks = np.full((plan.slots, BLOCK, numbers.shape[1]), np.nan), iter([numbers[b] for b in blocks])
            places = SimpleNamespace(at=[Place(ring[slot], its_blocks) for slot in range(plan.slots)])
            scratch |= {name: Memory(ring), f"{name}_here": places, f"{name}_free": places}
        for name, its_scales in zip(("keys",) if plan.latent else ("keys", "values"), scales or ()):
            kind = "head" if its_scales.size == 1 else "slot"
            sources.append(SimpleNamespace(scale=kind, scales=its_scales, beside=0))
            if kind == "slot" and plan.widens:
                scratch[f"{name}_scales"] = Scales([its_scales[b] for b in blocks], plan.slots + 1)
        sources = sources or [None]
        weights = Memory(np.full((1, plan.rows, BLOCK), np.nan))
        own, pages = Memory(np.zeros((1, 1))), np.arange(plan.pages_per_seq)
        with numpy_for_a_warpgroup():
            shared = Shared.of(plan, {}, sources, scratch | dict(weights=weights, board=own, room=own))
            attention = few_rows.FewRows(plan, piece, 0, 0, 0, shared, pages)
            acc, lse = attention.run(*attention.rows.seen_steps())
            found = np.concatenate([some() for some in acc], axis=1) if isinstance(acc, list) else acc, lse
        return [np.asarray(numbers)[: length * plan.heads] for numbers in found]

    def operands(self, plan, context):
        """Keys whose logits grow, from the last block to the first, as far as a maximum moves; NaN where nobody looks."""
        rng = np.random.default_rng(0)
        query, size = rng.standard_normal((plan.rows, plan.head_dim)), -(-context // BLOCK) * BLOCK
        keys, values = rng.standard_normal((size, plan.head_dim)), rng.standard_normal((size, plan.value_dim))
        keys *= np.linspace(12, 1, size)[:, None]
        if plan.latent:
            values = keys[:, : plan.value_dim]
        keys[context:] = values[context:] = np.nan
        return query, keys, values

    @parameterized.named_parameters(
        ("steps", dict(rows=8, block_q=1), 261, 1),
        ("drafts", dict(rows=32, block_q=4), 130, 3),
        ("window", dict(rows=32, block_q=4, window=70), 300, 4),
        ("soft_cap", dict(rows=8, block_q=1, soft_cap=5.0), 100, 1),
        ("one_key", dict(rows=8, block_q=1), 1, 1),
        ("heads_of_80", dict(rows=8, block_q=1, head_dim=80, value_dim=80), 130, 1),
        ("keys_of_240_values_of_112", dict(rows=8, block_q=1, head_dim=240, value_dim=112), 130, 1),
        ("values_of_32", dict(rows=8, block_q=1, value_dim=32), 130, 1),
        ("latent", dict(rows=16, block_q=1, group=16, head_dim=384, value_dim=320, latent=True), 261, 1),
        ("latent_drafts", dict(rows=16, block_q=2, head_dim=384, value_dim=64, latent=True, window=70), 300, 2),
    )
    def test_is_attention_whatever_lies_where_nobody_looks(self, changes, context, length):
        plan = plans.plan(**(dict(soft_cap=None, group=8, head_dim=128, value_dim=FEATURES, block_kv=BLOCK, warpgroups=1,
                                  stages=STAGES, dtype="float32", cache_dtype="float32") | changes))  # fmt: skip
        query, keys, values = self.operands(plan, context)
        out, lse = self.attend(plan, context, length, query, keys, values)
        _, token = plan.head_and_token(np.arange(length * plan.heads)[:, None])
        at, position = np.arange(context), context - length + token
        sees = (at <= position) & (at > position - (plan.window or context))
        logits = plan.softmax_scale * query[: len(out)] @ keys[:context].T
        if plan.soft_cap:
            logits = plan.soft_cap * np.tanh(logits / plan.soft_cap)
        weights = np.where(sees, np.exp(logits), 0)
        total = weights.sum(axis=1)
        np.testing.assert_allclose(out, weights @ values[:context] / total[:, None], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(lse, np.log(total), rtol=1e-5, atol=1e-5)

    @parameterized.named_parameters(
        ("heads", dict(key_scale="head", value_scale="head")),
        ("slots", dict(key_scale="slot", value_scale="slot")),
        ("slots_window", dict(key_scale="slot", value_scale="slot", window=70)),
        ("slots_soft_cap", dict(key_scale="slot", value_scale="slot", soft_cap=5.0)),
        ("values_soft_cap", dict(key_scale="head", value_scale="slot", soft_cap=5.0)),
        ("latent", dict(key_scale="head", value_scale=None, latent=True)),
        ("latent_slots", dict(key_scale="slot", value_scale=None, latent=True, soft_cap=5.0)),
    )
    def test_quantised_caches_count_by_their_scales(self, changes):
        plan = plans.plan(**(dict(soft_cap=None, group=8, rows=8, block_q=1, head_dim=128, value_dim=FEATURES, stages=STAGES,
                                  block_kv=BLOCK, warpgroups=1, cache_dtype="int8", fp8_terms=0) | changes))  # fmt: skip
        context, rng = 300, np.random.default_rng(1)
        query, keys, values = self.operands(plan, context)
        scales = []
        for numbers, kind in ((keys, plan.key_scale), (values, plan.value_scale)):
            size = len(numbers) if kind == "slot" else 1
            scales.append(rng.choice([-1, 1], size) * np.exp(2 * rng.standard_normal(size)))
            if numbers is values:  # they grow on the way, by more than float16 has room for
                scales[-1] *= np.exp(np.linspace(30, 0, size))
            numbers[context:] = np.nan
            scales[-1][context:] = np.nan  # of a slot that nobody sees
        if plan.latent:
            scales[1] = scales[0]
        out, lse = self.attend(plan, context, 1, query.copy(), keys, values, scales)
        keys, values = (numbers * scale[:, None] for numbers, scale in zip((keys, values), scales))
        logits = plan.softmax_scale * query @ keys[:context].T
        if plan.soft_cap:
            logits = plan.soft_cap * np.tanh(logits / plan.soft_cap)
        logits[:, : context - (plan.window or context)] = -np.inf
        largest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=1)
        want, most = (weights @ numbers / total[:, None] for numbers in (values[:context], np.abs(values[:context])))
        np.testing.assert_array_less(np.abs(out - want), 1e-3 * most)
        np.testing.assert_allclose(lse, np.log(total) + largest[:, 0], rtol=1e-5, atol=1e-4)

    def test_a_row_has_its_bits_whatever_the_rows_beside_it(self):
        plan = plans.plan(soft_cap=None, group=8, rows=16, block_q=2, head_dim=128, value_dim=FEATURES, block_kv=BLOCK,
                          warpgroups=1, stages=STAGES, dtype="float32", cache_dtype="float32")  # fmt: skip
        query, keys, values = self.operands(plan, 300)
        query /= 8  # so that these maxima move a little
        found = self.attend(plan, 300, 2, query, keys, values)
        query[::2] *= 320
        query[1::4] = np.nan
        others = self.attend(plan, 300, 2, query, keys, values)
        for one, other in zip(found, others):
            np.testing.assert_array_equal(one[3::4], other[3::4])
            self.assertTrue(np.isnan(other[1::4]).all())


class ChoiceTest(parameterized.TestCase):
    @parameterized.parameters((1, 32, 32), (1, 16, 16), (1, 12, 16), (2, 8, 16), (2, 5, 16), (1, 33, 64), (3, 8, 64))
    def test_so_are_those_of_a_latent_cache(self, tokens, heads, rows):
        latent = dict(head_dim=576, value_dim=512, features=("latent",), num_kv_heads=1, cache_kv_heads=1)
        given = problems.problem(tokens=9 * tokens, seqs=9, q_heads=heads, **latent)
        config = host.MosaicGpu().heuristic(given, Device("cuda", "NVIDIA H200", "9.0"))
        self.assertEqual(rows_of(given, config), rows)

    @parameterized.parameters((1, 32, 32), (1, 3, 8), (5, 1, 8), (8, 2, 16), (13, 1, 16), (4, 4, 64), (13, 2, 64), (17, 1, 64))
    def test_few_tokens_of_few_heads_are_columns_of_the_products(self, tokens, group, rows):
        """Of 32 rows, those of several tokens are slower so."""
        given = problems.problem(tokens=9 * tokens, seqs=9, q_heads=2 * group, num_kv_heads=2, cache_kv_heads=2)
        config = host.MosaicGpu().heuristic(given, Device("cuda", "NVIDIA H200", "9.0"))
        self.assertEqual(rows_of(given, config), rows)

    @parameterized.parameters((8, 512, 512), (3, 512, 512), (5, 384, 384), (8, 320, 256), (1, 512, 256), (7, 128, 384))
    def test_few_rows_of_wide_heads_have_a_block_more_of_keys_than_of_values(self, group, head_dim, value_dim):
        """Two of each have no room at 512 features, and with one of each memory waits while it is multiplied."""
        of_heads = dict(q_heads=2 * group, num_kv_heads=2, cache_kv_heads=2, head_dim=head_dim, value_dim=value_dim)
        given = problems.problem(tokens=9, seqs=9, **of_heads)
        config = host.MosaicGpu().heuristic(given, Device("cuda", "NVIDIA H200", "9.0"))
        self.assertEqual((rows_of(given, config), config.num_stages), (8, 2))
        self.assertLessEqual(room.shared_bytes(given, config), room.SHARED_BYTES)
        sizes = dict(rows=8, block_q=1, block_kv=64, warpgroups=1, stages=2, tiles=500, soft_cap=None)
        plan = plans.plan(group=group, head_dim=head_dim, value_dim=value_dim, **sizes)
        rings = scratch.scratch_of(plan)
        self.assertEqual([rings[name].shape[0] for name in ("keys", "values")], [2, 1])
        of_rings = sum(2 * math.prod(rings[name].shape) for name in ("keys", "values"))
        self.assertEqual(room.bytes_of_blocks(given, config), of_rings)

    @parameterized.parameters((64, 8, 128), (16, 8, 128), (64, 4, 256))
    def test_two_teams_read_bytes_whatever_the_steps(self, seqs, kv_heads, dim):
        """As many are on their way as with one, which computes while none waits for it."""
        sizes = dict(q_heads=32, num_kv_heads=kv_heads, cache_kv_heads=kv_heads, head_dim=dim, value_dim=dim)
        given = problems.problem(tokens=seqs, seqs=seqs, cache_dtype="int8", features=("quantised",), **sizes)
        config = host.MosaicGpu().heuristic(given, Device("cuda", "NVIDIA H200", "9.0"))
        self.assertEqual((teams_of(given, config), config.num_stages), (2, 3))


if __name__ == "__main__":
    absltest.main()
