"""The device's side of the engine: caches, one jitted step, and how both are cut over a mesh.

A step is one call for all replicas: the model under `vmap`, each replica with a pack and a pool of its own.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

import paged_prefill
from paged_prefill import masks
from paged_prefill.examples.serve import model as model_lib
from paged_prefill.examples.serve.checkpoint import Model
from paged_prefill.examples.serve.config import Config
from paged_prefill.lowering import tuning

AXES = ("batch", "heads", "pages")
MOST_DRAFTS = 31  # a tree mask of one word, less the root

# Which dimension of a weight is cut over the axis "heads", without that of the layers.
CUT = dict(
    query=1, key=1, value=1, query_bias=0, key_bias=0, value_bias=0, out=0, sinks=0,
    query_up=1, key_up=0, value_up=0, gate=1, up=1, down=0,
)  # fmt: skip


class Batch(NamedTuple):
    """All that a step is told. Shapes depend on the number of tokens alone."""

    tokens: np.ndarray  # [replicas, tokens]
    positions: np.ndarray  # [replicas, tokens]; a draft's by its depth, -1 where nobody owns the token
    parents: np.ndarray  # [replicas, tokens], counted from the first new token of the sequence; -1 for none
    context_lens: np.ndarray  # [replicas, seqs]
    page_indices: np.ndarray  # [replicas, seqs, pages_per_seq]
    query_offsets: np.ndarray  # [replicas, seqs + 1]
    rows: np.ndarray  # [replicas, seqs, nodes]: behind which tokens the next one is wanted
    temperature: np.ndarray  # [replicas, seqs]; 0 takes the likeliest
    top_k: np.ndarray  # [replicas, seqs]; the vocabulary for all
    top_p: np.ndarray  # [replicas, seqs]
    seed: np.ndarray  # [replicas, seqs]
    moves: np.ndarray  # [replicas, moves, 4]: page and slot of a key, page and slot where it belongs


def empty_batch(replicas, tokens, seqs, pages_per_seq, nodes, vocabulary) -> Batch:
    """A batch in which nobody owns anything."""

    def full(*shape, value=0, dtype=np.int32):
        return np.full((replicas, *shape), value, dtype)

    return Batch(
        tokens=full(tokens),
        positions=full(tokens, value=-1),
        parents=full(tokens, value=-1),
        context_lens=full(seqs),
        page_indices=full(seqs, pages_per_seq, value=-1),
        query_offsets=full(seqs + 1),
        rows=full(seqs, nodes),
        temperature=full(seqs, dtype=np.float32),
        top_k=full(seqs, value=vocabulary),
        top_p=full(seqs, value=1, dtype=np.float32),
        seed=full(seqs),
        moves=full(seqs * (nodes - 1), 4, value=np.iinfo(np.int32).max),
    )


def logits_of(config: Config, weights, caches, batch: Batch, rows):
    """float32 logits behind the tokens `rows` of one replica, [rows, vocabulary], and its caches."""
    tree_mask = None
    if batch.moves.shape[0]:  # drafts are on
        caches = moved(caches, batch.moves)
        tree_mask = masks.tree(batch.parents, batch.query_offsets, words=1)
    pack = model_lib.Pack(batch.context_lens, batch.page_indices, batch.query_offsets)
    step = model_lib.Step(pack, batch.positions, tree_mask)
    x, caches = model_lib.forward(config, weights, caches, batch.tokens, step)
    return model_lib.unembed(config, weights, x[rows]), caches


def moved(caches, moves):
    """Caches with the keys of accepted drafts where they belong: they were written where they stood in their tree."""
    from_page, from_slot, to_page, to_slot = moves.T

    def move(array):
        taken = array.at[:, :, from_page, from_slot].get(mode="clip")
        return array.at[:, :, to_page, to_slot].set(taken, mode="drop")

    return jax.tree.map(move, caches)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="caches")
def next_tokens(config: Config, mesh, weights, caches, batch: Batch):
    """A step: the tokens that follow those of `batch.rows`, [replicas, seqs, nodes], and the caches (donated)."""

    def replica(caches, batch):
        return logits_of(config, weights, caches, batch, batch.rows.reshape(-1))

    logits, caches = jax.vmap(replica)(caches, batch)
    logits = logits.reshape(*batch.rows.shape, -1)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sampled():
        position = jnp.take_along_axis(batch.positions, batch.rows[:, :, 0], axis=1)
        options = batch.temperature, batch.top_k, batch.top_p, batch.seed, position
        drawn = jax.vmap(jax.vmap(sample))(logits[:, :, 0], *options)
        return jnp.where(batch.temperature[:, :, None] > 0, drawn[:, :, None], greedy)

    tokens = lax.cond(jnp.any(batch.temperature > 0), sampled, lambda: greedy)
    if mesh:  # where they were, or the compiler may choose and copy
        shardings = NamedSharding(mesh, P()), cache_shardings(mesh, caches)
        tokens, caches = lax.with_sharding_constraint((tokens, caches), shardings)
    return tokens, caches


def sample(logits, temperature, top_k, top_p, seed, position):
    """A token by its logits [vocabulary]: of the likeliest `top_k`, and of those that make up `top_p` of all."""
    order = jnp.argsort(-logits)
    scaled = logits[order] / jnp.maximum(temperature, 1e-6)
    before = jnp.cumsum(jax.nn.softmax(scaled)) - jax.nn.softmax(scaled)
    kept = (jnp.arange(logits.shape[0]) < top_k) & (before < top_p)
    key = jax.random.fold_in(jax.random.key(seed), position)
    return order[jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))].astype(jnp.int32)


def make_mesh(sizes: dict[str, int]):
    """A mesh over the first devices, from axes of `AXES` and their sizes; None for no axes."""
    if unknown := sorted({*sizes} - {*AXES}):
        raise ValueError(f"mesh axes are {', '.join(AXES)}, got {', '.join(unknown)}")
    count = int(np.prod(list(sizes.values())))
    if count > len(jax.devices()):
        raise ValueError(f"mesh {sizes} needs {count} devices, there are {len(jax.devices())}")
    types = (AxisType.Auto,) * len(sizes)
    return (
        jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count])
        if sizes
        else None
    )


def _cut(mesh, axis: str, size: int) -> str | None:
    """The mesh axis, if there is one that divides the size."""
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def cache_shardings(mesh, caches):
    """How caches [replicas, layers, kv_heads, num_pages, page_size, ...] lie on a mesh; too few KV heads are whole."""

    def sharding(cache):
        replicas, _, heads, pages, *_ = cache.shape
        batch, heads, pages = (_cut(mesh, *cut) for cut in (("batch", replicas), ("heads", heads), ("pages", pages)))
        return NamedSharding(mesh, P(batch, None, heads, pages))

    return jax.tree.map(sharding, caches)


def placed_weights(mesh, weights):
    """Weights on the devices: heads and hidden features cut over "heads" where they can be, the rest whole."""
    if not mesh:
        return jax.device_put(weights)

    def placed(path, weight):
        dimension = CUT.get(getattr(path[-1], "key", None))
        if dimension is None or len(path) == 1:
            return jax.device_put(weight, NamedSharding(mesh, P()))
        before = (None,) * (1 + dimension)  # a weight of a layer has the layers in front
        return jax.device_put(weight, NamedSharding(mesh, P(*before, _cut(mesh, "heads", weight.shape[1 + dimension]))))

    return jax.tree.map_with_path(placed, weights)


class Runner:
    """A model with its caches on its devices; `run` takes one step.

    Attributes:
      replicas: how many packs a step takes, each with a pool of its own: the size of the mesh axis "batch".
    """

    def __init__(self, model: Model, *, num_pages: int, page_size: int, kv_dtype=None, mesh=None, policy="invariant"):
        self.config, self.mesh, self.policy = model.config, mesh, policy
        self.sizes = dict(mesh.shape) if mesh else {}
        self.replicas = self.sizes.get("batch", 1)
        if num_pages % self.sizes.get("pages", 1):
            raise ValueError(f"num_pages must be divisible by the mesh axis 'pages', got {num_pages}")
        self.weights = placed_weights(mesh, model.weights)
        dtype = self.weights["embedding"].dtype

        def empty():
            caches = model_lib.new_caches(self.config, num_pages, page_size, dtype, quantised=kv_dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.replicas, *x.shape)), caches)

        self.caches = jax.jit(empty, out_shardings=mesh and cache_shardings(mesh, jax.eval_shape(empty)))()

    def run(self, batch: Batch) -> np.ndarray:
        """Takes a step; the tokens that follow those of `batch.rows`."""
        with self.contexts():
            tokens, self.caches = next_tokens(self.config, self.mesh, self.weights, self.caches, self.placed(batch))
        return np.asarray(tokens)

    def placed(self, batch: Batch) -> Batch:
        """The batch where the step wants it."""
        if not self.mesh:
            return batch
        return jax.device_put(batch, NamedSharding(self.mesh, P("batch" if "batch" in self.sizes else None)))

    @contextlib.contextmanager
    def contexts(self):
        """What is said around the step and not in it: how calls are cut, and that sizes do not follow the pack."""
        with contextlib.ExitStack() as stack:
            names = dict(batch="batch_axis", heads="head_axis", pages="page_axis")
            if self.mesh:
                stack.enter_context(jax.set_mesh(self.mesh))
                stack.enter_context(paged_prefill.sharding_hints(**{names[axis]: axis for axis in self.sizes}))
            if self.policy:
                stack.enter_context(tuning.policy(self.policy))
            yield
