"""Random calls as serving makes them: heads of real models, whole or one shard of a mesh, and packs of every kind."""

import dataclasses

import numpy as np

from paged_prefill.lowering.call import Problem
from paged_prefill.primitive.attention import Attention


@dataclasses.dataclass(frozen=True)
class Layer:
    """What attention of a model's layer looks like."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    value_dim: int | None = None
    window: int | None = None
    soft_cap: float | None = None


MODELS = {
    "Llama 3 8B": Layer(32, 8),
    "Llama 3 70B": Layer(64, 8),
    "Llama 3 405B": Layer(128, 8),
    "Qwen 2.5 7B": Layer(28, 4),
    "Qwen 2.5 14B": Layer(40, 8),
    "Qwen 3 0.6B": Layer(16, 8),
    "Qwen 3 235B": Layer(64, 4),
    "Mistral 7B": Layer(32, 8, window=4096),
    "StarCoder 2 15B": Layer(48, 4, window=4096),
    "Gemma 2 9B": Layer(16, 8, 256, window=4096, soft_cap=50.0),
    "Gemma 2 27B": Layer(32, 16, window=4096, soft_cap=50.0),
    "Gemma 3 4B": Layer(8, 4, 256, window=1024),
    "Gemma 3 27B": Layer(32, 16, window=1024),
    "Gemma 4 31B, global": Layer(32, 4, 512),
    "gpt-oss": Layer(64, 8, 64, window=128),
    "Phi 3 mini": Layer(32, 32, 96),
    "Phi 4": Layer(40, 10),
    "Falcon 7B": Layer(71, 1, 64),
    "OLMo 2 7B": Layer(32, 32),
    "SmolLM 2 135M": Layer(9, 3, 64),
    "DeepSeek V3, expanded": Layer(128, 128, 192, 128),
    "DeepSeek V3, latent": Layer(128, 1, 576, 512),
}
PAGE_SIZES = (1, 8, 16, 16, 16, 16, 32, 64, 64, 128, 128, 256)
MOST_KEYS, MOST_TOKENS = 2**20, 8192


def random_problem(rng: np.random.Generator) -> Problem:
    """One call; its contexts add up to at most MOST_KEYS, its new tokens to at most MOST_TOKENS, or it has one sequence."""
    layer = MODELS[rng.choice([*MODELS])]
    shards = [n for n in (1, 1, 2, 4, 8) if layer.q_heads % n == 0 and 0 in (layer.kv_heads % n, n % layer.kv_heads)]
    shard = int(rng.choice(shards))
    lengths, contexts = _pack(rng)
    page_size = int(rng.choice(PAGE_SIZES))
    pages_per_seq = -(-int(max(contexts) * rng.choice([1, 1, 1.5, 8])) // page_size)  # tables have columns to spare
    kv_heads = max(1, layer.kv_heads // shard)
    return Problem(
        tokens=sum(lengths),
        q_heads=layer.q_heads // shard,
        num_kv_heads=kv_heads,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim or layer.head_dim,
        pools=1,
        cache_kv_heads=kv_heads,
        num_pages=sum(-(-context // page_size) for context in contexts),
        page_size=page_size,
        seqs=len(lengths),
        pages_per_seq=pages_per_seq,
        dtype="bfloat16",
        cache_dtype="bfloat16",
        # Every other layer has a window.
        attention=Attention(layer.head_dim**-0.5, layer.soft_cap, layer.window if rng.random() < 0.5 else None),
    )


def _pack(rng) -> tuple[list[int], list[int]]:
    """New tokens and contexts of the sequences of a pack."""
    kind = rng.choice(["prefill", "chunk", "decode", "decode", "mixed", "drafts", "many short"])
    seqs = []
    if kind == "prefill":
        seqs = [(_size(rng, 8, MOST_TOKENS), 0)]
    if kind in ("chunk", "mixed"):
        seqs = [(_size(rng, 16, MOST_TOKENS // 2), _size(rng, 1, 32768))]
    if kind in ("decode", "mixed"):
        seqs += [(1, _size(rng, 16, 32768)) for _ in range(_size(rng, 1, 256))]
    if kind == "drafts":
        seqs = [(int(rng.integers(2, 9)), _size(rng, 16, 16384)) for _ in range(_size(rng, 1, 64))]
    if kind == "many short":
        seqs = [(_size(rng, 4, 512), 0) for _ in range(_size(rng, 2, 64))]
    lengths, contexts = zip(*((new, new + old) for new, old in seqs))
    kept = (np.cumsum(lengths) <= MOST_TOKENS) & (np.cumsum(contexts) <= MOST_KEYS)
    count = max(1, int(kept.sum()))
    return [*lengths[:count]], [*contexts[:count]]


def _size(rng, low, high) -> int:
    """Evenly spread over orders of magnitude."""
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
