"""The engine of examples/serve/: a soak, and each of its promises by itself."""

import dataclasses
import re
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import PrefillPageAttentionConfig
from paged_prefill.examples.serve import checkpoint, drafts, runner
from paged_prefill.examples.serve.engine import Engine, Sampling
from paged_prefill.lowering import tuning
from paged_prefill.tests import meshes

VOCABULARY = 12  # so few that drafts are right at times
MODEL = checkpoint.seeded(dataclasses.replace(checkpoint.tiny_config(), vocabulary=VOCABULARY))
MAX_LEN = 48
SIZES = dict(num_pages=24, page_size=4, max_seqs=6, max_len=MAX_LEN, token_buckets=(8, 32), max_drafts=5)


def new_engine(**changes) -> Engine:
    return Engine(MODEL, **SIZES | changes)


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def random_requests(rng, count):
    """(prompt, number of new tokens): some begin alike, and some repeat themselves, so that drafts are found."""
    beginnings = [rng.integers(0, VOCABULARY, 17).tolist() for _ in range(3)]
    for number in range(count):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 8)).tolist() * int(rng.integers(1, 3))
        count = int(rng.integers(1, 9)) + 8 * (number % 8 == 0)
        yield (beginnings[number % 3][: rng.integers(1, 18)] if number % 4 else []) + own, count


class EngineTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(tuning.overlay(PrefillPageAttentionConfig(block_q=8, block_kv=16)))

    def assert_pages_have_their_owners(self, engine):
        """Every page is free, idle, or owned by as many requests as hold it; and nobody writes one that has others."""
        for replica in engine.replicas:
            pool, held = replica.pool, np.zeros(replica.pool.num_pages, int)
            for request in replica.running:
                self.assertLen(set(request.pages), len(request.pages))
                held[request.pages] += 1
                written = request.pages[request.cached // engine.page_size :]
                self.assertTrue(all(pool.references[page] == 1 for page in written))
            self.assertEqual(held.tolist(), pool.references)
            self.assertCountEqual([*pool.free, *pool.idle, *np.flatnonzero(held)], range(pool.num_pages))

    def alone(self, requests, **changes):
        """What each request is told with nobody beside it, nothing shared and nothing guessed."""
        engine, outputs = new_engine(**changes), []
        root = lambda tokens, nodes, depth: drafts.Tree([tokens[-1]], [-1], [0])  # noqa: E731
        with mock.patch.object(drafts, "lookup", root):
            for request in requests:
                other = engine.submit([*request.prompt], request.max_new_tokens, request.sampling, request.stop_tokens)
                engine.run()
                outputs.append(other.output)
                engine.replicas[0].pool.__init__(SIZES["num_pages"])
        return outputs

    def test_soak(self):
        """Random lengths and arrivals, a pool too small for all, sharing, drafts, some cancelled and some refused."""
        rng = np.random.default_rng(0)
        engine = new_engine()
        compilations = Compilations()
        jax.jit(lambda x: x + 1)(0)
        self.assertEqual(compilations.count, 1)  # so it counts
        engine.warm_up()
        compilations.count = 0
        arrivals = list(random_requests(rng, 300))
        requests, cancelled, refused, moved = [], set(), [], 0
        while arrivals or engine.busy:
            for prompt, count in [arrivals.pop() for _ in range(min(len(arrivals), rng.integers(0, 5)))]:
                requests.append(engine.submit(prompt, count))
                if len(requests) % 10 == 0:
                    cancelled.add(requests[-1])
                if len(requests) % 50 == 0:
                    refused += [engine.submit([1] * MAX_LEN, 1), engine.submit([5, VOCABULARY], 3)]
            engine.step()
            moved += len(engine.replicas[0].moves)
            for request in cancelled:
                if request.output and not request.finished and rng.random() < 0.5:
                    engine.cancel(request)
            self.assert_pages_have_their_owners(engine)
        self.assertEqual(compilations.count, 0)
        counts, pool = engine.counts, engine.replicas[0].pool
        self.assertEqual(pool.available, pool.num_pages)
        for what in (counts.preempted, counts.shared, counts.accepted, moved):
            self.assertGreater(what, 5)
        self.assertGreater(sum(request.cancelled for request in requests), 5)
        self.assertTrue(all(request.error and not request.output for request in refused))
        for request, output in zip(requests, self.alone(requests), strict=True):
            self.assertIsNone(request.error)
            said = request.output
            self.assertEqual(said, output[: len(said)] if request.cancelled else output)

    def test_sampled_tokens_are_a_requests_own(self):
        """Its seed decides them, and nobody beside it."""
        engine = new_engine()
        others = [engine.submit(*request) for request in random_requests(np.random.default_rng(1), 6)]
        hot = [Sampling(temperature=1.5, seed=seed) for seed in (3, 3, 4)]
        requests = [engine.submit([7, 8, 9], 8, sampling) for sampling in [*hot, Sampling(temperature=9.0, top_k=1)]]
        engine.run()
        outputs = [request.output for request in requests]
        self.assertEqual(outputs[0], outputs[1])
        self.assertNotEqual(outputs[0], outputs[2])
        self.assertEqual([outputs[0], outputs[2]], self.alone([requests[0], requests[2]]))
        greedy = engine.submit([7, 8, 9], 8)
        engine.run()
        self.assertEqual(outputs[3], greedy.output)
        self.assertEqual([request.output for request in others], self.alone(others))

    def test_stop_tokens(self):
        engine = new_engine()
        whole = engine.submit([1, 2, 3], 12)
        engine.run()
        stop = whole.output[5]
        stopped = engine.submit([1, 2, 3], 12, stop_tokens=[stop])
        engine.run()
        self.assertEqual(stopped.output, whole.output[: whole.output.index(stop) + 1])
        self.assertTrue(stopped.finished)

    @parameterized.parameters(
        (([], 3), "the prompt must have 1 to 45 tokens with max_new_tokens=3, got 0"),
        (([1] * 46, 3), "the prompt must have 1 to 45 tokens with max_new_tokens=3, got 46"),
        (([1], 0), "max_new_tokens must be 1 to 47, got 0"),
        (([1], 48), "max_new_tokens must be 1 to 47, got 48"),
        (([1, -1], 3), "tokens must be integers from 0 to 11, got -1"),
        (([1, 2.0], 3), "tokens must be integers from 0 to 11, got 2.0"),
    )
    def test_a_request_that_cannot_be_served_says_why(self, request, words):
        refused = new_engine().submit(*request)
        self.assertTrue(refused.finished)
        self.assertEqual(refused.error, words)

    @parameterized.parameters(
        (dict(max_drafts=32), "max_drafts must be from 0 to 31, got 32"),
        (dict(token_buckets=(4,)), "the largest of token_buckets must be at least max_seqs=6, got"),
    )
    def test_an_engine_that_cannot_be_says_why(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            new_engine(**changes)

    def test_a_quantised_cache(self):
        """Shares, guesses and moves its keys as another does; what it holds is close to what they were."""
        changes = dict(kv_dtype=jnp.float8_e4m3fn, token_buckets=(32,))
        engine = new_engine(**changes)
        self.assertEqual(engine.runner.caches["8"].key.dtype, jnp.float8_e4m3fn)
        requests = [engine.submit(*request) for request in random_requests(np.random.default_rng(2), 30)]
        engine.run()
        self.assertGreater(min(engine.counts.accepted, engine.counts.shared, engine.counts.preempted), 0)
        outputs = [request.output for request in requests]
        self.assertEqual(outputs, self.alone(requests, **changes))
        first = [output[0] == exact[0] for output, exact in zip(outputs, self.alone(requests))]
        self.assertGreater(np.mean(first), 0.8)

    def test_on_several_devices(self):
        """Two replicas of four devices each say what one device says; no cache moves."""
        sizes = dict(batch=2, heads=2, pages=2)
        engine = new_engine(mesh=runner.make_mesh(sizes), token_buckets=(32,), num_pages=64)
        requests = [engine.submit(*request) for request in random_requests(np.random.default_rng(3), 30)]
        while engine.busy:
            engine.step()
            self.assert_pages_have_their_owners(engine)
        self.assertEqual([request.output for request in requests], self.alone(requests))
        run, batch = engine.runner, engine.runner.placed(engine._empty(32))
        with run.contexts():
            step = runner.next_tokens.lower(run.config, run.mesh, run.weights, run.caches, batch).compile()
        of_a_cache = run.caches["8"].key[0, 0, 0].size  # of one head of one layer
        for op, shape in meshes.collectives(step):
            elements = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", shape)]
            self.assertLess(max(elements), of_a_cache, f"{op} {shape}")
        shards = 1, 2, 4 // sizes["heads"], 64 // sizes["pages"], 4, 8
        self.assertEqual(run.caches["8"].key.addressable_shards[0].data.shape, shards)


if __name__ == "__main__":
    absltest.main()
