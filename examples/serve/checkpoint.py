"""Reads a Hugging Face folder into a model: config.json, the tensors of its safetensors files, layers stacked.

Layers whose weights have the same names and shapes are stacked, and run in one scan: a `segment` is a tuple of layers
that repeats, each weight [repeats, ...]. Most models are one segment of one layer.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from paged_prefill.examples.serve.config import Config, Layer, frequencies
from paged_prefill.examples.serve.families import FAMILIES, Tensors, config_of

LONGEST_PATTERN = 12
NO_WINDOW = 2**30
IN_FLOAT32 = ("sinks", "router_correction")


class Model(NamedTuple):
    """A decoder and its weights, which model.py names."""
    config: Config
    weights: dict


def load(folder: str | Path, dtype=None) -> Model:
    """The model of a folder, its weights in `dtype` on the host; None for the dtype of the tensors.

    Raises:
      ValueError: the folder asks for what is not implemented, or its tensors are not those of its family.
    """
    values = json.loads((Path(folder) / "config.json").read_text())
    outer = values
    if "text_config" in values:  # a model of texts and images, of which only texts are served
        values = values["text_config"] | {k: values[k] for k in ("eos_token_id",) if k in values}
    if "quantization_config" in outer:
        raise ValueError("config.json asks for what is not implemented: quantization_config")
    config = config_of(values)
    return Model(config, assemble(config, text_tensors(read_tensors(Path(folder))), dtype))


def read_tensors(folder: Path) -> Tensors:
    """All tensors of the folder's safetensors files, by name."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    tensors = {}
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def text_tensors(tensors: Tensors) -> Tensors:
    """The decoder's tensors as `embed_tokens`, `layers.N`, `norm` and `lm_head`, whatever stands before their names."""
    ends = "embed_tokens.weight"
    prefixes = [name.removesuffix(ends) for name in tensors if name.endswith(ends)]
    if len(prefixes) != 1:
        raise ValueError(f"the checkpoint must have one tensor named *{ends}, got {len(prefixes)}")
    heads = {"lm_head.weight": tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight")}
    return heads | {
        name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items() if name.startswith(prefixes[0])
    }


def assemble(config: Config, tensors: Tensors, dtype=None) -> dict:
    """The weights of a model from its tensors; uses them up, and raises ValueError where some are left or missing."""
    dtype = dtype or tensors["embed_tokens.weight"].dtype
    layers = []
    for number, layer in enumerate(config.layers):
        prefix = f"layers.{number}."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        layers.append(_layer(config, layer, number, own, dtype))
    weights = dict(embedding=_of(tensors, "embed_tokens.weight").astype(dtype))
    weights["segments"] = segments(number_caches(config, layers))
    weights["final_norm"] = _of(tensors, "norm.weight").astype(np.float32) + config.norm_offset
    head = tensors.pop("lm_head.weight", None)
    if not config.tied:
        if head is None:
            raise ValueError("the checkpoint has no lm_head.weight, and config.json does not tie it to the embedding")
        weights["unembedding"] = head.astype(dtype)
    beyond = {name for name in tensors if name.startswith("layers.")}  # what predicts further tokens (DeepSeek)
    if left := sorted({*tensors} - beyond):
        raise ValueError(f"the checkpoint has tensors that nobody takes: {', '.join(left)}")
    return weights


def _of(tensors, name):
    if name not in tensors:
        raise ValueError(f"the checkpoint has no {name}")
    return tensors.pop(name)


def _layer(config: Config, layer: Layer, number: int, tensors: Tensors, dtype) -> dict:
    """A layer's weights by the names of this model, shaped as model.py multiplies them, and its numbers."""
    family = FAMILIES[config.family]
    tensors = family.prepare(tensors, config, number)
    ours = {theirs: ours for ours, theirs in (family.names | family.optional).items()}
    ready = {name: tensors.pop(name) for name in list(tensors) if name not in ours and "." not in name}
    if missing := [name for name in family.names.values() if name not in tensors]:
        raise ValueError(f"layer {number} of the checkpoint has no {', '.join(missing)}")
    if left := sorted({*tensors} - {*ours}):
        raise ValueError(f"layer {number} has tensors that {config.family} does not take: {', '.join(left)}")
    weights = ready | {ours[name]: _shaped(ours[name], tensor, config, layer) for name, tensor in tensors.items()}
    return {name: _kept(name, tensor, config, dtype) for name, tensor in weights.items()} | _numbers(config, layer)


def _shaped(name: str, tensor, config: Config, layer: Layer):
    """A tensor [outputs, inputs] as it is multiplied: [inputs, outputs], with heads in a dimension of their own."""
    heads = config.q_heads if name.startswith(("query", "out")) else layer.kv_heads
    if name in ("query", "key", "value"):
        return tensor.reshape(heads, -1, config.width).transpose(2, 0, 1)
    if name in ("query_bias", "key_bias", "value_bias"):
        return tensor.reshape(heads, -1)
    if name in ("query_norm", "key_norm") and tensor.size > layer.head_dim:
        return tensor.reshape(heads, -1)  # one norm over all heads
    if name == "out":
        return tensor.T.reshape(heads, -1, config.width)
    return tensor.T if tensor.ndim == 2 else tensor


def _kept(name: str, tensor, config: Config, dtype):
    if name.endswith("norm"):
        return tensor.astype(np.float32) + np.float32(config.norm_offset)
    return tensor.astype(np.float32 if name in IN_FLOAT32 else dtype)


def _numbers(config: Config, layer: Layer) -> dict:
    """What differs between layers of one program, as arrays."""
    numbers = dict(frequencies=np.asarray(layer.frequencies, np.float32), rope_scale=np.float32(layer.rope_scale))
    if not config.alike:
        numbers |= dict(window=np.int32(layer.window or NO_WINDOW), chunk=np.int32(layer.chunk or NO_WINDOW))
    if any(layer.temperature for layer in config.layers):
        numbers |= dict(temperature=np.float32(layer.temperature))
    return numbers


def number_caches(config: Config, layers: list[dict]) -> list[dict]:
    """Layers, each with its number among those whose keys have as many features, which share a cache."""
    counts, numbered = {}, []
    for layer, weights in zip(config.layers, layers, strict=True):
        number = counts[layer.head_dim] = counts.get(layer.head_dim, -1) + 1
        numbered.append(weights | dict(cache_layer=np.int32(number)))
    return numbered


def segments(layers: list[dict]) -> list[tuple[dict, ...]]:
    """Layers as few scans: each a pattern of layers that repeats, whose weights are stacked [repeats, ...]."""
    kinds = [tuple((name, np.shape(x)) for name, x in sorted(layer.items())) for layer in layers]
    found, start = [], 0
    while start < len(layers):
        period, repeats = _pattern(kinds[start:])
        stacked = [
            jax.tree.map(lambda *same: np.stack(same), *layers[start + i : start + period * repeats : period])
            for i in range(period)
        ]
        found.append(tuple(stacked))
        start += period * repeats
    return found


def _pattern(kinds) -> tuple[int, int]:
    """The period, and how often it comes, of the beginning that covers most; the shortest of such periods."""

    def repeats(period):
        count = 1
        while kinds[count * period : (count + 1) * period] == kinds[:period]:
            count += 1
        return count

    covered = {p: p * repeats(p) for p in range(1, min(LONGEST_PATTERN, len(kinds)) + 1) if p == 1 or repeats(p) > 1}
    period = max(covered, key=covered.get)
    return period, covered[period] // period


def tiny_config() -> Config:
    """A transformer over bytes, small enough for tests."""
    rotary = frequencies(dict(rope_theta=10_000.0), head_dim=8, max_positions=4096)
    return Config(
        family="llama", vocabulary=256, width=32, q_heads=8, layers=(Layer(4, 8, *rotary),) * 2, softmax_scale=8**-0.5,
        norm_eps=1e-6, max_positions=4096,
    )  # fmt: skip


def seeded(config: Config, draw=None) -> Model:
    """A model like Llama with random weights: what there is without a folder, and for benchmarks.

    `draw(shape)` gives normal numbers, in the dtype that weights are to have; NumPy's in float32 by default.
    """
    draw = draw or functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    layer, count = config.layers[0], len(config.layers)
    width, heads, kv_heads, head_dim = config.width, config.q_heads, layer.kv_heads, layer.head_dim
    hidden = 7 * width // 2  # as Llama 3 8B has it
    shapes = dict(
        query=(width, heads, head_dim), key=(width, kv_heads, head_dim), value=(width, kv_heads, head_dim),
        out=(heads, head_dim, width), gate=(width, hidden), up=(width, hidden), down=(hidden, width),
    )  # fmt: skip

    def random(shape, inputs):
        weight = draw(shape)
        return weight * np.asarray(inputs**-0.5, weight.dtype)

    layers = {
        name: random((count, *shape), math.prod(shape[:-1]) if name == "out" else shape[0])
        for name, shape in shapes.items()
    }
    numbers = number_caches(config, [_numbers(config, layer) for layer in config.layers])
    layers |= jax.tree.map(lambda *same: np.stack(same), *numbers)
    layers |= {name: np.ones((count, width), np.float32) for name in ("attention_norm", "mlp_norm")}
    embedding, unembedding = (random((config.vocabulary, width), inputs) for inputs in (1, width))
    final_norm = np.ones(width, np.float32)
    return Model(
        config, dict(embedding=embedding, segments=[(layers,)], final_norm=final_norm, unembedding=unembedding)
    )
