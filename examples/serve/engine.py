"""The engine: requests in, tokens out. Continuous batching over a page pool, as vLLM (arXiv 2309.06180) has it.

Each `step` admits what fits, gives every running request some of the step's tokens (a decode step and its drafts, or a
chunk of what is not in the cache yet), runs them as one pack, and takes in what comes back. Where pages run out, the
youngest request gives its own up and waits; what it had said is computed again later.
"""

import collections
import dataclasses
import time
from typing import NamedTuple

import numpy as np

from paged_prefill.examples.serve import drafts
from paged_prefill.examples.serve.checkpoint import Model
from paged_prefill.examples.serve.drafts import Tree
from paged_prefill.examples.serve.pages import PagePool, block_names
from paged_prefill.examples.serve.runner import MOST_DRAFTS, Runner, empty_batch


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; a temperature of 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(eq=False)
class Request:
    """What was asked, and how far it got.

    Attributes:
      tokens: the prompt and what was said since.
      cached: how many of the tokens have their keys in the cache.
      pages: where those are.
      error: why it was not served; None if it was, or will be.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    names: list[bytes] = dataclasses.field(default_factory=list)  # of its full pages
    finished: bool = False
    cancelled: bool = False
    error: str | None = None
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_token: float | None = None  # when it came
    last_token: float | None = None

    @property
    def output(self) -> list[int]:
        """What it has said so far."""
        return self.tokens[len(self.prompt) :]

    @property
    def decoding(self) -> bool:
        """Whether all but its last token is in the cache."""
        return len(self.tokens) - self.cached == 1

    @property
    def room(self) -> int:
        """How many tokens it may still say."""
        return self.max_new_tokens - len(self.output)


class Chunk(NamedTuple):
    """A request's share of a step: new tokens, as a tree whose first tokens are a chain if it is a prompt's."""

    request: Request
    tree: Tree
    drafted: bool


@dataclasses.dataclass
class Replica:
    """One pool, and the requests that run in it, the oldest first."""

    pool: PagePool
    running: list[Request] = dataclasses.field(default_factory=list)
    moves: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)  # for the next step


@dataclasses.dataclass
class Counts:
    """What the engine did so far."""

    steps: int = 0
    prefilled: int = 0  # tokens of prompts, and of preempted requests, that were computed
    decoded: int = 0  # tokens that requests were given
    shared: int = 0  # tokens that were in the cache when their request came
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0  # of those drafted
    prefill_seconds: float = 0.0  # of steps with some prefill in them
    decode_seconds: float = 0.0  # of the others
    decoded_in_those: int = 0


class Engine:
    """Serves a model.

    Args:
      num_pages, page_size: of each replica's pool.
      max_seqs: how many requests run in a replica at a time.
      max_len: the longest prompt and answer together.
      token_buckets: numbers of tokens that a step may have; each is one compilation. The largest is the most that a
        replica computes in a step.
      max_drafts: how many drafts a request that takes the likeliest tokens has checked in a step; 0 for none.
      kv_dtype: float8_e4m3fn, float8_e5m2 or int8 for a quantised cache; None for the weights' dtype.
      mesh: from `runner.make_mesh`.
      policy: how kernels get their sizes; by "invariant" the bits of a request's attention do not depend on its
        neighbours. None leaves it to the library.
    """

    def __init__(
        self, model: Model, *, num_pages: int, page_size: int = 16, max_seqs: int = 16, max_len: int | None = None,
        token_buckets: tuple[int, ...] = (16, 128, 512), max_drafts: int = 0, kv_dtype=None, mesh=None,
        policy: str | None = "invariant",
    ):  # fmt: skip
        capacity = num_pages * page_size
        self.max_len = min(max_len or capacity, model.config.max_positions, capacity)
        if not 0 <= max_drafts <= MOST_DRAFTS:
            raise ValueError(f"max_drafts must be from 0 to {MOST_DRAFTS}, got {max_drafts}")
        if max(token_buckets) < max_seqs:
            raise ValueError(f"the largest of token_buckets must be at least max_seqs={max_seqs}, got {token_buckets}")
        self.config, self.page_size, self.max_seqs = model.config, page_size, max_seqs
        self.token_buckets, self.nodes = tuple(sorted(token_buckets)), 1 + max_drafts
        self.runner = Runner(
            model, num_pages=num_pages, page_size=page_size, kv_dtype=kv_dtype, mesh=mesh, policy=policy
        )
        self.replicas = [Replica(PagePool(num_pages)) for _ in range(self.runner.replicas)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.counts = Counts()

    def submit(
        self, prompt: list[int], max_new_tokens: int, sampling: Sampling = Sampling(), stop_tokens=None
    ) -> Request:
        """Queues a request; one that cannot be served is finished at once, with its `error`."""
        stop = self.config.stop_tokens if stop_tokens is None else stop_tokens
        request = Request(list(prompt), max_new_tokens, sampling, frozenset(stop), list(prompt))
        request.error = self._reason_against(request)
        if request.error:
            request.finished = True
        else:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request with what it has said so far."""
        if request.finished:
            return
        request.finished = request.cancelled = True
        if request in self.waiting:
            self.waiting.remove(request)
        for replica in self.replicas:
            if request in replica.running:
                self._leave(replica, request)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(replica.running for replica in self.replicas)

    def step(self) -> list[Request]:
        """Takes one step; the requests that it finished."""
        self._admit()
        plans = [self._plan(replica) for replica in self.replicas]
        if not any(plans):
            return []
        began = time.perf_counter()
        following = self.runner.run(self._batch(plans))
        now = time.perf_counter()
        prefilled = sum(len(c.tree.tokens) for plan in plans for c in plan if not c.request.decoding)
        decoded = self.counts.decoded
        for replica, plan, rows in zip(self.replicas, plans, following, strict=True):
            for chunk, row in zip(plan, rows):
                self._take(replica, chunk, row.tolist(), now)
        self._count(prefilled, self.counts.decoded - decoded, now - began)
        return [chunk.request for plan in plans for chunk in plan if chunk.request.finished]

    def run(self) -> None:
        """Steps until all is finished."""
        while self.busy:
            self.step()

    def warm_up(self) -> None:
        """Compiles all there is to compile."""
        for tokens in self.token_buckets:
            self.runner.run(self._empty(tokens))

    def _reason_against(self, request: Request) -> str | None:
        count, new, vocabulary = len(request.prompt), request.max_new_tokens, self.config.vocabulary
        if not 1 <= new < self.max_len:
            return f"max_new_tokens must be 1 to {self.max_len - 1}, got {new}"
        if not 1 <= count <= self.max_len - new:
            return f"the prompt must have 1 to {self.max_len - new} tokens with max_new_tokens={new}, got {count}"
        bad = [x for x in request.prompt if not isinstance(x, (int, np.integer)) or not 0 <= x < vocabulary]
        return f"tokens must be integers from 0 to {vocabulary - 1}, got {bad[0]!r}" if bad else None

    def _admit(self) -> None:
        """Lets requests in that wait, in order, while there is room for all that they have said or asked."""
        while self.waiting:
            request = self.waiting[0]
            request.names = block_names(request.tokens, self.page_size, request.names)
            # One token at least is computed, to know what follows it.
            names = request.names[: (len(request.tokens) - 1) // self.page_size]
            open_to = [(replica, replica.pool.find(names)) for replica in self.replicas]
            open_to = [(replica, pages) for replica, pages in open_to if self._fits(replica, request, pages)]
            if not open_to:
                return
            replica, pages = max(open_to, key=lambda pair: (len(pair[1]), -len(pair[0].running)))
            self._enter(replica, self.waiting.popleft(), pages)

    def _fits(self, replica: Replica, request: Request, shared: list[int]) -> bool:
        needed = len(request.tokens) // self.page_size + 1 - len(shared)
        idle = sum(page in replica.pool.idle for page in shared)
        return len(replica.running) < self.max_seqs and replica.pool.available - idle >= needed

    def _enter(self, replica: Replica, request: Request, shared: list[int]) -> None:
        for page in shared:
            replica.pool.share(page)
        request.pages = list(shared)
        request.cached = len(shared) * self.page_size
        self.counts.shared += request.cached
        replica.running.append(request)
        replica.running.sort(key=lambda request: request.submitted)

    def _leave(self, replica: Replica, request: Request) -> None:
        for page in request.pages:
            replica.pool.release(page)
        request.pages, request.cached = [], 0
        replica.running.remove(request)

    def _plan(self, replica: Replica) -> list[Chunk]:
        """Who gets which tokens of a step, the oldest first; each request that is decoding gets one at least."""
        plan, budget = [], self.token_buckets[-1]
        reserved = sum(request.decoding for request in replica.running)
        for request in list(replica.running):
            if request not in replica.running:  # an older one needed its pages
                continue
            reserved -= request.decoding
            chunk = self._chunk(replica, request, budget - reserved)
            if chunk.tree.tokens and self._cover(replica, request, request.cached + len(chunk.tree.tokens)):
                plan.append(chunk)
                budget -= len(chunk.tree.tokens)
        return plan

    def _chunk(self, replica: Replica, request: Request, most: int) -> Chunk:
        """The next tokens of a request, at most so many: of what is not in the cache, or its last one and drafts."""
        if not request.decoding or request.sampling.temperature > 0 or self.nodes == 1:
            tokens = request.tokens[request.cached : request.cached + most]
            return Chunk(request, Tree(tokens, list(range(-1, len(tokens) - 1)), list(range(len(tokens)))), False)
        # Nobody gives up pages for drafts.
        in_pages = (len(request.pages) + replica.pool.available) * self.page_size - request.cached
        depth = min(request.room - 1, self.config.draft_depth(request.cached))
        return Chunk(request, drafts.lookup(request.tokens, min(self.nodes, most, in_pages), depth), True)

    def _cover(self, replica: Replica, request: Request, count: int) -> bool:
        """Gives a request pages for so many tokens, the youngest's where none is left; False if it is the youngest."""
        while len(request.pages) * self.page_size < count:
            page = replica.pool.allocate()
            if page is not None:
                request.pages.append(page)
                continue
            youngest = replica.running[-1]
            self._leave(replica, youngest)
            self.waiting.appendleft(youngest)
            self.counts.preempted += 1
            if youngest is request:
                return False
        return True

    def _empty(self, tokens: int):
        columns = -(-(self.max_len + self.nodes - 1) // self.page_size)
        sizes = tokens, self.max_seqs, columns, self.nodes, self.config.vocabulary
        return empty_batch(len(self.replicas), *sizes)

    def _batch(self, plans: list[list[Chunk]]):
        """The plans as arrays, in the smallest of the token buckets that takes them."""
        most = max(sum(len(chunk.tree.tokens) for chunk in plan) for plan in plans)
        batch = self._empty(next(tokens for tokens in self.token_buckets if tokens >= most))
        for r, (replica, plan) in enumerate(zip(self.replicas, plans, strict=True)):
            start = 0
            for s, (request, tree, drafted) in enumerate(plan):
                end = start + len(tree.tokens)
                batch.tokens[r, start:end] = tree.tokens
                batch.positions[r, start:end] = request.cached + np.asarray(tree.depths)
                batch.parents[r, start:end] = tree.parents
                batch.context_lens[r, s] = request.cached + len(tree.tokens)
                batch.page_indices[r, s, : len(request.pages)] = request.pages
                batch.rows[r, s, : end - start if drafted else 1] = np.arange(start, end) if drafted else end - 1
                sampling = request.sampling
                batch.temperature[r, s], batch.top_p[r, s] = sampling.temperature, sampling.top_p
                batch.top_k[r, s], batch.seed[r, s] = sampling.top_k or self.config.vocabulary, sampling.seed
                batch.query_offsets[r, s + 1 :] = start = end
            if replica.moves:
                batch.moves[r, : len(replica.moves)] = replica.moves
                replica.moves.clear()
        return batch

    def _take(self, replica: Replica, chunk: Chunk, following: list[int], now: float) -> None:
        """Takes in what followed a request's chunk."""
        request, tree, drafted = chunk
        if drafted:
            path = drafts.accepted(tree, following)
            self._move(replica, request, path)
            request.cached += len(path)
            self.counts.drafted += len(tree.tokens) - 1
            self.counts.accepted += len(path) - 1
            self._say(request, [following[node] for node in path], now)
        else:
            request.cached += len(tree.tokens)
            if request.cached == len(request.tokens):
                self._say(request, following[:1], now)
        self._publish(replica, request)
        if request.finished:
            self._leave(replica, request)

    def _move(self, replica: Replica, request: Request, path: list[int]) -> None:
        """Has the next step move the keys of accepted drafts from their places in the tree to their positions."""

        def slot(number):
            return request.pages[number // self.page_size], number % self.page_size

        for place, node in enumerate(path):
            if node != place:
                replica.moves.append((*slot(request.cached + node), *slot(request.cached + place)))

    def _say(self, request: Request, tokens: list[int], now: float) -> None:
        request.first_token = request.first_token or now
        request.last_token = now
        for token in tokens:
            request.tokens.append(token)
            self.counts.decoded += 1
            if token in request.stop_tokens or request.room == 0:
                request.finished = True
                return

    def _publish(self, replica: Replica, request: Request) -> None:
        """Lets others share the pages that are full."""
        known = min(request.cached, len(request.tokens))
        request.names = block_names(request.tokens[:known], self.page_size, request.names[: known // self.page_size])
        for page, name in zip(request.pages, request.names):
            replica.pool.publish(page, name)

    def _count(self, prefilled: int, decoded: int, seconds: float) -> None:
        self.counts.steps += 1
        self.counts.prefilled += prefilled
        if prefilled:
            self.counts.prefill_seconds += seconds
        else:
            self.counts.decode_seconds += seconds
            self.counts.decoded_in_those += decoded
