"""The engine of examples/serve/: a soak, and each of its promises by itself."""

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

MODEL = checkpoint.seeded(checkpoint.tiny_config())
VOCABULARY = MODEL.config.vocabulary
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
    """(prompt, number of new tokens): of some that begin alike, and that repeat themselves, so that drafts are found."""
    beginnings = [rng.integers(0, VOCABULARY, 17).tolist() for _ in range(3)]
    for number in range(count):
        own = rng.integers(0, VOCABULARY, rng.integers(1, 8)).tolist() * int(rng.integers(1, 3))
        yield (beginnings[number % 3][: rng.integers(1, 18)] if number % 4 else []) + own, int(rng.integers(1, 12))


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

    def alone(self, requests):
        """What each request is told with nobody beside it, nothing shared and nothing guessed."""
        engine, outputs = new_engine(), []
        root = lambda tokens, nodes, depth: drafts.Tree([tokens[-1]], [-1], [0])  # noqa: E731
        with mock.patch.object(drafts, "lookup", root):
            for request in requests:
                other = engine.submit([*request.prompt], request.max_new_tokens, request.sampling, request.stop_tokens)
                engine.run()
                outputs.append(other.output)
                engine.replicas[0].pool.__init__(SIZES["num_pages"])
        return outputs

    def test_soak(self):
        """Random lengths and arrivals, a pool too small for all, sharing, drafts, one in ten cancelled, some not served."""
        rng = np.random.default_rng(0)
        engine = new_engine()
        engine.warm_up()
        compilations = Compilations()
        arrivals = list(random_requests(rng, 300))
        requests, cancelled, refused = [], set(), []
        while arrivals or engine.busy:
            for prompt, count in [arrivals.pop() for _ in range(min(len(arrivals), rng.integers(0, 5)))]:
                requests.append(engine.submit(prompt, count))
                if len(requests) % 10 == 0:
                    cancelled.add(requests[-1])
                if len(requests) % 50 == 0:
                    refused += [engine.submit([1] * MAX_LEN, 1), engine.submit([5, VOCABULARY], 3)]
            engine.step()
            for request in cancelled:
                if request.output and not request.finished and rng.random() < 0.5:
                    engine.cancel(request)
            self.assert_pages_have_their_owners(engine)
        self.assertEqual(compilations.count, 0)
        counts, pool = engine.counts, engine.replicas[0].pool
        self.assertEqual(pool.available, pool.num_pages)
        for what in (counts.preempted, counts.shared, counts.accepted):
            self.assertGreater(what, 20)
        self.assertGreater(sum(request.cancelled for request in requests), 5)
        self.assertTrue(all(request.error and not request.output for request in refused))
        for request, output in zip(requests, self.alone(requests), strict=True):
            self.assertIsNone(request.error)
            said = request.output
            self.assertEqual(said, output[: len(said)] if request.cancelled else output)


if __name__ == "__main__":
    absltest.main()
