"""Random calls with any of the operands, poisoned wherever no row may look; and calls as serving makes them, in small.

Operands are host arrays by name, as `ragged_paged_prefill` and `paged_prefill_p.bind` take them.
"""

import functools

import chex
import ml_dtypes  # noqa: F401  NumPy knows bfloat16 and float8 by it
import numpy as np

from paged_prefill.primitive.quantised import largest_number
from paged_prefill.tests import oracle, packs

GRANULARITIES = ("tensor", "head", "slot")
# Chunks of several tiles and blocks of small sizes, decode steps, no tokens, no keys, and fewer keys than tokens.
SEQUENCES = ((21, 34), (0, 7), (5, 0), (1, 44), (7, 3), (9, 9))
# No sink, two that make a head's rows NaN, those that see no key included, and one far above every logit.
EXTREME_SINKS = (-np.inf, np.inf, np.nan, 1e4)


def make_call(
    seed: int,
    sequences=SEQUENCES,
    *,
    batch: tuple[int, ...] = (),
    pools: int = 0,
    layers: int | None = None,
    value_dim: int | None = None,
    dtype="float32",
    cache_dtype=None,
    key_scale: str | None = None,
    value_scale: str | None = None,
    latent: bool = False,
    key_ranges: bool = False,
    tree_words: int = 0,
    sinks: bool | tuple[float, ...] = False,
    sliding_window: int | None = None,
    poison: bool = True,
    **of_pack,
) -> dict[str, np.ndarray]:
    """A call on random packs [*batch] of these sequences, pairs (new tokens, context).

    The first `pools` dimensions of `batch` have pools of their own; packs that share one have pages of their own in it.
    With `layers`, each pack reads a layer of its own. `key_scale` and `value_scale` are one of GRANULARITIES. A latent
    cache takes its `value_dim` as a parameter of the call too. `sinks` are random, or those of each head. Other arguments are those of `packs.make_pack`.

    Unless told otherwise, whatever no row sees is poison: NaN, infinities or the largest numbers, in slots and in their
    scales, in the layers and heads' scales that nobody reads, in ranges and trees of tokens that no sequence owns.
    """
    rng = np.random.default_rng(seed)
    lengths, contexts = zip(*sequences)
    made = functools.partial(packs.make_pack, poison=1.0, value_dim=value_dim, **of_pack)
    # Every pack with pages of its own, which then come to lie in pools and layers.
    every = [made(rng.integers(2**31), lengths, contexts) for _ in np.ndindex(batch)]
    operands = {
        name: np.stack([np.asarray(getattr(pack, name)) for pack in every]).reshape(
            *batch, *getattr(every[0], name).shape
        )
        for name in packs.Pack._fields
    }
    own, shared = batch[:pools], batch[pools:]
    packs_of_pool, num_pages = int(np.prod(shared, dtype=int)), every[0].key_cache.shape[1]
    first_page = num_pages * np.arange(packs_of_pool, dtype=np.int32).reshape((1,) * pools + shared + (1, 1))
    indices = operands["page_indices"]
    operands["page_indices"] = np.where(np.isin(indices, packs.JUNK_PAGES), indices, indices + first_page)
    for name in ("key_cache", "value_cache"):
        kv_heads, _, page_size, features = getattr(every[0], name).shape
        cache = operands[name].reshape(*own, packs_of_pool, kv_heads, num_pages, page_size, features)
        cache = np.moveaxis(cache, pools, pools + 1).reshape(*own, kv_heads, -1, page_size, features)
        if layers:
            cache = np.stack([cache] * layers, axis=pools)
        operands[name] = _stored(rng, cache, np.dtype(cache_dtype or dtype))
    operands["query"] = operands["query"].astype(dtype)
    tokens, q_heads = operands["query"].shape[-3:-1]
    if layers:
        operands["layer"] = rng.integers(0, layers, batch, dtype=np.int32)
    if key_ranges:
        operands["key_ranges"] = random_ranges(rng, (*batch, tokens), max(contexts))
    if tree_words:
        operands["tree_mask"] = rng.integers(0, 2**32, (*batch, tokens, tree_words), dtype=np.uint32)
    if sinks:
        operands["sinks"] = 2 * rng.standard_normal((*batch, q_heads), np.float32)
        if isinstance(sinks, tuple):
            operands["sinks"][:] = sinks
    if latent:
        operands["value_cache"] = None
    for name, granularity in dict(key=key_scale, value=value_scale).items():
        if granularity:
            shape = operands[f"{name}_cache"].shape
            shape = shape[: dict(tensor=-4, head=-3, slot=-1)[granularity]]
            scale = rng.uniform(0.5, 2.0, shape) / largest_number(np.dtype(cache_dtype)) * 3
            operands[f"{name}_scale"] = scale.astype(np.float32)
    if poison:
        poison_unseen(rng, operands, sliding_window)
    return operands


def _stored(rng, cache, dtype):
    """Random numbers as a cache of that dtype stores them: in a quantised one all of its range."""
    if dtype.itemsize > 1:
        return rng.standard_normal(cache.shape, np.float32).astype(dtype)
    largest = largest_number(dtype)
    return np.clip(rng.standard_normal(cache.shape) * largest / 3, -largest, largest).astype(dtype)


def random_ranges(rng, lead, most_keys) -> np.ndarray:
    """Intervals of keys: some, all, none, back to front, before key 0 and past any context."""
    low, high = np.sort(rng.integers(0, most_keys + 1, (2, *lead)), axis=0)
    kinds = [
        (low, high),
        (low, low + 2),
        (0 * low, high),
        (-low - 3, high + most_keys),
        (high + 1, low),
        (low, low),
        (0 * low - 2**31, 0 * low + 2**31 - 1),
        (high + most_keys, high + 2 * most_keys),
    ]
    chosen = rng.choice(len(kinds), lead, p=[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    return np.choose(chosen[..., None], [np.stack(kind, -1) for kind in kinds]).astype(np.int32)


def poison_unseen(rng, operands, sliding_window=None) -> None:
    """Puts poison wherever no row of any pack looks, in place."""
    arrays = [
        name for name in ("key_cache", "value_cache", "key_scale", "value_scale") if operands.get(name) is not None
    ]
    slots = {name: operands[name].shape[:-1] if name.endswith("cache") else operands[name].shape for name in arrays}
    needed = {name: np.zeros(shape, bool) for name, shape in slots.items()}
    owned = np.zeros(operands["query"].shape[:-2], bool)
    for pack, sequence in oracle.sequences(operands, sliding_window=sliding_window):
        rows = np.arange(sequence.start, sequence.end)
        owned[pack][rows] = True
        seen = np.flatnonzero(sequence.visible(rows, np.arange(len(sequence.page))).any(0))
        for name in arrays:
            pool = oracle.pool_of(operands, name, pack)
            of_slots = needed[name].ndim - len(pool) == 3
            needed[name][(*pool, slice(None), sequence.page[seen], sequence.slot[seen]) if of_slots else pool] = True
    for name in arrays:
        operands[name] = _with_poison(rng, operands[name], needed[name])
    for name in ("key_ranges", "tree_mask"):
        if name in operands:
            junk = rng.integers(0, 2**32, operands[name].shape, dtype=np.uint32).view(operands[name].dtype)
            operands[name] = np.where(owned[..., None], operands[name], junk)


def _with_poison(rng, array, needed):
    if array.dtype == np.int8:
        kinds = [-128, 127]
    else:
        kinds = [np.nan, np.inf, -np.inf, largest_number(array.dtype), -largest_number(array.dtype)]
    poison = rng.choice(np.asarray(kinds, np.float64).astype(array.dtype), array.shape)
    return np.where(needed.reshape(needed.shape + (1,) * (array.ndim - needed.ndim)), array, poison)


# ---- Calls as serving makes them: heads and dims of real models, cut to 1 / 16 of their sizes.

# query heads, KV heads, head_dim, value_dim, and what else the model asks for
MODELS = {
    "llama": dict(q_heads=4, kv_heads=1, head_dim=8),
    "qwen": dict(q_heads=7, kv_heads=1, head_dim=8),
    "falcon": dict(q_heads=71, kv_heads=1, head_dim=4),
    "gemma-2": dict(q_heads=2, kv_heads=1, head_dim=16, attn_logits_soft_cap=50.0, sliding_window=19),
    "gemma-4": dict(q_heads=4, kv_heads=2, head_dim=32, key_ranges=True),
    "llama-4": dict(q_heads=5, kv_heads=1, head_dim=8, key_ranges=True),
    "gpt-oss": dict(q_heads=8, kv_heads=1, head_dim=4, sinks=True, sliding_window=8),
    "deepseek": dict(q_heads=8, kv_heads=1, head_dim=36, value_dim=32, latent=True),
}


def sample(rng) -> tuple[dict[str, np.ndarray], dict]:
    """One call of a small model, as (operands, parameters): prefill, chunks, decode, all of it, drafts with trees."""
    model = dict(MODELS[rng.choice(list(MODELS))])
    parameters = {name: model.pop(name) for name in ("attn_logits_soft_cap",) if name in model} | {
        name: model[name] for name in ("sliding_window",) if name in model
    }
    if model.get("latent"):
        parameters["value_dim"] = model["value_dim"]
    kind = rng.choice(["prefill", "chunk", "decode", "mixed", "drafts", "many short"])
    sequences = []
    if kind == "prefill":
        sequences = [(n := _skewed(rng, 2, 60), n)]
    if kind in ("chunk", "mixed"):
        sequences = [(n := _skewed(rng, 2, 40), n + _skewed(rng, 1, 90))]
    if kind in ("decode", "mixed"):
        sequences += [(1, _skewed(rng, 2, 90)) for _ in range(_skewed(rng, 1, 12))]
    if kind == "drafts":
        sequences = [(n := int(rng.integers(2, 9)), n + _skewed(rng, 1, 60)) for _ in range(_skewed(rng, 1, 8))]
        model["tree_words"] = 1
    if kind == "many short":
        sequences = [(n := _skewed(rng, 1, 20), n) for _ in range(_skewed(rng, 2, 8))]
    if rng.random() < 0.4:
        granularity = str(rng.choice(GRANULARITIES))
        model |= dict(cache_dtype=str(rng.choice(("float8_e4m3fn", "float8_e5m2", "int8"))), key_scale=granularity)
        model |= {} if model.get("latent") else dict(value_scale=granularity)
    if rng.random() < 0.3:
        model["layers"] = int(rng.integers(1, 4))
    dtype, page_size = str(rng.choice(("float32", "bfloat16", "float16"))), int(rng.choice((1, 2, 4, 8, 16)))
    columns = int(rng.choice((0, 0, 2, 20)))
    call = make_call(
        rng.integers(2**31), sequences, dtype=dtype, page_size=page_size, spare_columns=columns,
        tokens_before=int(rng.integers(3)), tokens_after=int(rng.integers(3)), **model,
    )  # fmt: skip
    return call, parameters


def _skewed(rng, low, high) -> int:
    """From low to high, small numbers as often as large ones."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def assert_no_bit_changes(run, call, found) -> None:
    """`found` is what `run` makes of a call: so it is ten times again, and for other contexts of every other sequence."""
    for _ in range(10):
        chex.assert_trees_all_equal(run(**call), found)

    lengths = np.diff(call["query_offsets"])
    odd = np.arange(len(lengths)) % 2 == 1
    fewer = np.where(odd, np.maximum(lengths, call["context_lens"] // 3), call["context_lens"]).astype(np.int32)
    others = run(**dict(call, context_lens=fewer))
    start, end = call["query_offsets"][[0, -1]]
    own = np.zeros(len(call["query"]), bool)
    own[start:end] = ~np.repeat(odd, lengths)
    chex.assert_trees_all_equal(*[[np.asarray(array)[own] for array in result] for result in (found, others)])
