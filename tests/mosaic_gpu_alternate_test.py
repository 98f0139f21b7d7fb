"""The loop of two warpgroups that take blocks by turns, where no GPU is needed: a thread for each, others that load."""

from concurrent import futures
import contextlib
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

from paged_prefill.lowering.mosaic_gpu.hopper import alternate, compute, masks, softmax
from paged_prefill.lowering.mosaic_gpu.hopper.shared import Shared
from paged_prefill.lowering.tiles import Slabs, Tiles
from paged_prefill.tests import plans

PATIENCE = 100  # seconds that a thread waits for others
TOKENS, ROWS, BLOCK, PART = 8, 64, 64, 64


class Barrier:
    """Of the phase that it waits for, a thread knows whether it is even or odd, and no more."""

    def __init__(self, arrivals):
        self.arrivals, self.arrived, self.phases, self.waited = arrivals, 0, 0, {}
        self.changed = threading.Condition()

    def arrive(self):
        with self.changed:
            self.arrived += 1
            if self.arrived == self.arrivals:
                self.arrived, self.phases = 0, self.phases + 1
                self.changed.notify_all()

    def wait(self):
        with self.changed:
            waited = self.waited.get(threading.get_ident(), 0)
            if not self.changed.wait_for(lambda: (self.phases - waited) % 2, PATIENCE):
                raise TimeoutError("a barrier that nobody reached")
            self.waited[threading.get_ident()] = waited + 1


class Memory:
    """A reference to shared memory, or to barriers there."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.at = array, array.shape, array.dtype, _Places(array)

    def __getitem__(self, place):
        return jnp.asarray(self.array[place].copy())

    def __setitem__(self, place, numbers):
        self.array[place] = numbers


class _Places(NamedTuple):
    array: np.ndarray

    def __getitem__(self, place):
        places = place if isinstance(place, tuple) else (place,)
        found = self.array[tuple(slice(p.start, p.start + p.size) if hasattr(p, "size") and hasattr(p, "start") else p
                                 for p in places)]  # fmt: skip
        return Memory(found) if isinstance(found, np.ndarray) else found


def barriers(number, arrivals):
    return Memory(np.array([Barrier(arrivals) for _ in range(number)], object))


class Products:
    """Those that each thread has started, oldest first. One reads what it multiplies as early and as late as it may: when it
    is started, and when it is waited for. What is not there then is NaN."""

    def __init__(self):
        self.of_threads = {}

    def start(self, multiply, shape):
        early = multiply()
        found = SimpleNamespace(multiply=lambda: multiply() + 0 * early, number=None, shape=shape)
        self.of_threads.setdefault(threading.get_ident(), []).append(found)
        return found

    def wait(self, still_running):
        running = self.of_threads.get(threading.get_ident(), [])
        while len(running) > still_running:
            ended = running.pop(0)
            ended.number = ended.multiply()

    def settled(self, product, still_running):
        self.wait(still_running)
        return jnp.asarray(product.number)


@contextlib.contextmanager
def threads_for_warpgroups():
    """The loop's operations in NumPy."""
    both, products = threading.Barrier(2), Products()

    def matrix(block):
        """A block, whether its parts lie apart or not."""
        return block.array if block.array.ndim == 2 else np.concatenate([*block.array], axis=1)

    def product(acc, weights, values, share):
        columns = slice(share * acc.shape[1], (share + 1) * acc.shape[1])
        multiply = lambda: acc + np.array(getattr(weights, "array", weights)) @ matrix(values)[:, columns]
        return products.start(multiply, acc.shape)

    def start_logits(query, keys, share, shares, parts, started=None, next_output=None):
        columns = np.concatenate([np.arange(part * PART, (part + 1) * PART) for part in parts])

        def multiply():
            number = np.concatenate([query.array[part] for part in parts], axis=1) @ matrix(keys)[:, columns].T
            return number if started is None or started.number is None else started.number + number

        found = products.start(multiply, (ROWS, BLOCK))
        return found if next_output is None else (found, next_output)

    def post(numbers, board, warpgroup):
        board.array[warpgroup * ROWS : (warpgroup + 1) * ROWS] = numbers

    def posted(board, warpgroup):
        return jnp.asarray(board.array[warpgroup * ROWS : (warpgroup + 1) * ROWS].copy())

    def swapped(numbers, board, warpgroup):
        post(numbers, board, warpgroup)
        both.wait(PATIENCE)
        return posted(board, 1 - warpgroup)

    def loop(first, end, step, running):
        for i in range(int(first), int(end)):
            running = step(i, running)
        return running

    def zero(values, keys, parts, where):
        for key, part, there in zip(*map(np.asarray, (keys, parts, where))):
            if there and values.array.ndim == 3:
                values.array[part, key] = 0
            elif there:
                values.array[key, part * PART : (part + 1) * PART] = 0

    iota = lambda dtype, shape, axis, layout: jnp.asarray(np.indices(shape)[axis], dtype)
    threads = SimpleNamespace(
        barrier_wait=lambda barrier: barrier.wait(),
        barrier_arrive=lambda barrier: barrier.arrive(),
        broadcasted_iota=iota,
        layout_cast=lambda array, layout: array,
        commit_smem=lambda: None,
        Layout=mock.MagicMock(),
    )
    control = dict(
        pl=SimpleNamespace(when=lambda true: lambda do: do() if true else None, ds=alternate.pl.ds),
        plgpu=threads,
    )
    python = SimpleNamespace(
        cond=lambda true, one, other: one() if true else other(),
        fori_loop=loop,
        div=lambda a, b: a // b,
        rem=lambda a, b: a % b,
    )
    operations = dict(
        meet=lambda _: both.wait(PATIENCE),
        post=post,
        posted=posted,
        swapped=swapped,
        settled=products.settled,
        wait_for_products=products.wait,
        start_logits=start_logits,
        start_output=product,
        start_weighted=product,
        store_weights=lambda weights, target, share: np.copyto(target.array, weights),
    )
    with (
        mock.patch.multiple(alternate, lax=python, **control, **operations),
        mock.patch.multiple(compute, **control),
        mock.patch.multiple(compute.threads, number=lambda: jnp.arange(2 * 128), zero=zero),
        mock.patch.multiple(masks, plgpu=threads, columns_up_to=lambda n, shape: np.indices(shape)[1] <= n[:, None]),
        mock.patch.multiple(softmax, plgpu=threads, moved=lambda array: array, any_in_warp=lambda x, after: jnp.any(x)),
    ):
        yield


def piece_of(context, window):
    """The last tokens of a sequence, of which a tile has as many as it has room for."""
    position = context - TOKENS
    first_key, whole = (0, 0) if window is None else (max(p - window + 1, 0) for p in (position, context - 1))
    first, end = first_key // BLOCK, -(-context // BLOCK)
    tile = Tiles(start=0, length=TOKENS, position=position, first_new=position, first_block=first, end_block=end, seq=0,
                 first_key=first_key, end_key=context, owned=1, holes=0, part=0, parts=1,
                 slabs=Slabs(first_key, context, whole, position + 1))  # fmt: skip
    return SimpleNamespace(tile=tile, last=end - 1, steps=end - first, heads_left=ROWS // TOKENS)


class AlternateTest(parameterized.TestCase):
    def attend(self, plan, contexts, queries, keys, values):
        """(output, lse) of each sequence's piece, one after the other, as in one thread block."""
        pieces = [piece_of(context, plan.window) for context in contexts]
        parts, slots = plan.query_parts, plan.slots
        query, weights, boards = np.empty((1, parts, ROWS, BLOCK)), np.empty((ROWS, BLOCK)), np.empty((2, 2 * ROWS))
        scratch = dict(query_views=[[None], [None], [Memory(query)]], weights=Memory(weights), boards=Memory(boards))
        scratch |= dict(query_here=Barrier(1), query_free=Barrier(2), weighed=barriers(2, 1))
        sources = dict(keys=keys) if plan.latent else dict(keys=keys, values=values)
        freed = plan.freed_shares
        for name, numbers in sources.items():
            shape, came = (BLOCK, numbers[0].shape[1]), plan.block_shares
            if plan.lies_apart(name):
                shape = shape[1] // PART, BLOCK, PART
            elif freed > 1:
                shape = freed, BLOCK, shape[1] // freed
            readers = 2 if name == "keys" or freed == 1 else 1
            scratch[name] = Memory(np.full((slots, *shape), np.nan))
            scratch |= {f"{name}_here": barriers(slots * came, 1), f"{name}_free": barriers(slots * freed, readers)}

        def load(name):
            step = 0
            for piece, numbers in zip(pieces, sources[name]):
                for i in range(piece.steps):
                    slot, first = step % slots, (piece.last - i) * BLOCK
                    for share, columns in enumerate(np.split(numbers[first : first + BLOCK], plan.block_shares, axis=1)):
                        if step >= slots and share < freed:
                            scratch[f"{name}_free"].at[slot * freed + share].wait()
                        come(name, slot, share, columns)
                    step += 1

        def come(name, slot, share, columns):
            """A share, which tells that it is there; with the first of those that have no room of their own, all go."""
            time.sleep(0.01 * (share > 0))  # that who waits for fewer finds them
            place = scratch[name].array[slot]
            if share < freed:
                (place if freed == 1 else place[share])[...] = np.nan
            if plan.lies_apart(name):
                parts = plan.key_groups[share]
                place[parts[0] : parts[-1] + 1] = np.stack(np.split(columns, len(parts), axis=1))
            else:
                (place if freed == 1 else place[share])[...] = columns
            scratch[f"{name}_here"].at[slot * plan.block_shares + share].arrive()

        def load_queries():
            for i, numbers in enumerate(queries):
                if i:
                    scratch["query_free"].wait()
                query[0] = np.nan
                query[0] = np.stack(np.split(numbers, parts, axis=1))
                scratch["query_here"].arrive()

        results, shared = {}, Shared.of(plan, {}, None, scratch)

        def store(plan, piece, rows, found, warpgroup, first_column):
            results[pieces.index(piece), warpgroup] = [np.asarray(array) for array in found]
            assert first_column == warpgroup * plan.output_columns

        def compute_all(warpgroup):
            done = 0
            for piece in pieces:
                alternate.compute(plan, piece, done, warpgroup=warpgroup, shared=shared, results=warpgroup)
                done += piece.steps

        stored = mock.patch.object(alternate, "store_results", store)
        with threads_for_warpgroups(), stored, futures.ThreadPoolExecutor(5) as pool:
            jobs = [pool.submit(load, name) for name in sources] + [pool.submit(load_queries)]
            jobs += [pool.submit(compute_all, warpgroup) for warpgroup in range(2)]
            for job in jobs:
                job.result()
        found = []
        for i in range(len(pieces)):
            halves, both = zip(*(results[i, warpgroup] for warpgroup in range(2)))
            np.testing.assert_array_equal(*both)
            found.append((np.concatenate(halves, axis=1), both[0]))
        return found

    @parameterized.named_parameters(
        ("one_place", dict(head_dim=320, stages=1)),
        ("halves_of_a_place", dict(head_dim=384, stages=1)),
        ("two_places", dict(head_dim=384, stages=2)),
        ("gathered", dict(head_dim=384, stages=1, page_size=3)),
        ("latent", dict(head_dim=192, stages=2, latent=True)),
        ("window", dict(head_dim=320, stages=1, window=100)),
        ("latent_window", dict(head_dim=192, stages=2, latent=True, window=70)),
        ("latent_in_groups", dict(head_dim=256, stages=2, latent=True)),
    )
    def test_is_attention_whatever_lies_where_nobody_looks(self, changes):
        """Pieces of one block to five. Unseen slots are NaN, and so is a place as soon as it is let go of."""
        plan = plans.plan(soft_cap=None, group=8, value_dim=128, block_q=TOKENS, block_kv=BLOCK, dtype="float32",
                          cache_dtype="float32", **changes)  # fmt: skip
        self.assertTrue(plan.alternates)
        rng, contexts = np.random.default_rng(0), [261, 20, 100]
        queries, keys, values = [], [], []
        for context in contexts:
            tile = piece_of(context, plan.window).tile
            queries.append(3 * rng.standard_normal((ROWS, plan.head_dim)))
            keys.append(rng.standard_normal((tile.end_block * BLOCK, plan.head_dim)))
            values.append(keys[-1][:, :128] if plan.latent else rng.standard_normal((len(keys[-1]), 128)))
            for numbers in (keys[-1], values[-1]):
                numbers[: tile.first_key] = numbers[context:] = np.nan
        found = self.attend(plan, contexts, queries, keys, values)
        for context, query, key, value, (out, lse) in zip(contexts, queries, keys, values, found):
            position, at = context - TOKENS + np.arange(ROWS)[:, None] % TOKENS, np.arange(len(key))
            sees = (at <= position) & (at > position - (plan.window or context))
            logits = np.where(sees, plan.softmax_scale * query @ key.T, -np.inf)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            total = weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(out, weights @ np.nan_to_num(value) / total, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(lse, (logits.max(axis=1, keepdims=True) + np.log(total))[:, 0], rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
