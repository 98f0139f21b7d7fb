"""The main job: a small transformer reads a text chunk by chunk through a paged KV cache, then writes a few tokens.

Also the example of how an engine uses the package: `paged_step` is one model step over a page pool, `PageTable` hands
out pages, and `prefill` and `decode` are the engine's two loops, which differ in nothing but the size of the chunk.
"""

import argparse
import functools
import math
from pathlib import Path
import platform as python_platform
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_prefill import append_to_pages, ragged_paged_prefill
from paged_prefill.lowering.call import Call, Sequences
from paged_prefill.lowering.choose import choose, default_platform, device_of
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.checks import PLATFORMS

README = Path(__file__).with_name("README.md")
LARGEST_COUNT = 65_536  # the dense pass takes time in the square of the prompt
SPARE_PAGES = 8


class Model(NamedTuple):
    """A transformer over bytes with grouped-query attention (GQA)."""

    layers: int = 2
    width: int = 256
    hidden: int = 512
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 256


def init_weights(model: Model, seed: int = 0):
    """Seeded float32 weights, each matrix scaled by the square root of its inputs."""
    keys = iter(jax.random.split(jax.random.key(seed), 7 * model.layers + 2))

    def matrix(*shape, inputs):
        return jax.random.normal(next(keys), shape, jnp.float32) / math.sqrt(inputs)

    width, heads = model.width, model.q_heads * model.head_dim
    layers = [
        dict(
            query=matrix(width, model.q_heads, model.head_dim, inputs=width),
            key=matrix(width, model.kv_heads, model.head_dim, inputs=width),
            value=matrix(width, model.kv_heads, model.head_dim, inputs=width),
            out=matrix(model.q_heads, model.head_dim, width, inputs=heads),
            gate=matrix(width, model.hidden, inputs=width),
            up=matrix(width, model.hidden, inputs=width),
            down=matrix(model.hidden, width, inputs=model.hidden),
            attention_norm=jnp.ones(width),
            mlp_norm=jnp.ones(width),
        )
        for _ in range(model.layers)
    ]
    return dict(
        embedding=matrix(model.vocabulary, width, inputs=1),
        layers=layers,
        final_norm=jnp.ones(width),
        unembedding=matrix(width, model.vocabulary, inputs=width),
    )


def rms_norm(x, scale):
    """RMSNorm (arXiv 1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale[None, :]


def rope(x, position):
    """Rotary position embedding (arXiv 2104.09864) of x [tokens, heads, head_dim]: halves rotated against each other."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = position.astype(x.dtype)[:, None, None] * frequency[None, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)], axis=-1
    )


def transformer(weights, tokens, position, attend):
    """Logits [tokens, vocabulary] of tokens at the given positions.

    `attend(layer number, query [tokens, q_heads, head_dim], key, value [tokens, kv_heads, head_dim])` is all that the
    paged and the dense pass do not share.
    """
    x = weights["embedding"][tokens]
    for number, layer in enumerate(weights["layers"]):
        h = rms_norm(x, layer["attention_norm"])
        query, key, value = (jnp.einsum("tw,whd->thd", h, layer[name]) for name in ("query", "key", "value"))
        attended = attend(number, rope(query, position), rope(key, position), value)
        x += jnp.einsum("thd,hdw->tw", attended, layer["out"])
        h = rms_norm(x, layer["mlp_norm"])
        x += (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return rms_norm(x, weights["final_norm"]) @ weights["unembedding"]


@functools.partial(jax.jit, static_argnames="platform", donate_argnames="caches")
def paged_step(weights, caches, tokens, new_tokens, context_len, page_indices, *, platform):
    """One step of the engine: the first `new_tokens` of `tokens` join the cache and attend to it.

    `context_len` counts them already. The rest of `tokens` is padding, which no sequence owns: every chunk of a prompt
    has the same shape, so that one compilation serves them all. Returns (logits, caches); the caches are donated, and
    updated in place.
    """
    position = context_len - new_tokens + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    pack = (context_len[None], page_indices[None], jnp.stack([jnp.zeros_like(new_tokens), new_tokens]))
    caches = list(caches)

    def attend(layer, query, key, value):
        caches[layer] = append_to_pages(*caches[layer], key, value, *pack)
        return ragged_paged_prefill(query, *caches[layer], *pack, platform=platform)

    logits = transformer(weights, tokens, position, attend)
    return logits, caches


@jax.jit
def dense_pass(weights, tokens):
    """The same transformer over all tokens at once, with attention written out: no pages, no chunks, no kernel."""

    def attend(layer, query, key, value):
        count, q_heads, head_dim = query.shape
        grouped = query.reshape(count, key.shape[1], -1, head_dim)

        def one_row(row):
            logits = jnp.einsum("kgd,jkd->kgj", grouped[row], key) / math.sqrt(head_dim)
            weights = jax.nn.softmax(jnp.where(jnp.arange(count) <= row, logits, -jnp.inf), axis=-1)
            return jnp.einsum("kgj,jkd->kgd", weights, value)

        rows = jnp.arange(count)
        return jax.lax.map(one_row, rows, batch_size=min(count, 128)).reshape(count, q_heads, head_dim)

    return transformer(weights, tokens, jnp.arange(tokens.shape[0]), attend)


class PageTable:
    """The pages of one sequence: handed out in random order, as a pool that many requests share would."""

    def __init__(self, tokens: int, page_size: int, seed: int = 0):
        self.page_size = page_size
        self.num_pages = math.ceil(tokens / page_size) + SPARE_PAGES
        self._free = list(np.random.default_rng(seed).permutation(self.num_pages))
        self._pages = []
        self._capacity = math.ceil(tokens / page_size)

    def cover(self, context_len: int) -> np.ndarray:
        """page_indices [pages_per_seq] with enough pages for a context; entries past them are -1."""
        while len(self._pages) * self.page_size < context_len:
            self._pages.append(self._free.pop())
        return np.asarray(self._pages + [-1] * (self._capacity - len(self._pages)), np.int32)


def new_caches(model: Model, table: PageTable):
    """A page pool for each layer, full of NaN: slots that nobody wrote must have no effect."""
    shape = (model.kv_heads, table.num_pages, table.page_size, model.head_dim)
    return [(jnp.full(shape, jnp.nan), jnp.full(shape, jnp.nan)) for _ in range(model.layers)]


def prefill(step, weights, caches, table, prompt, chunk):
    """Reads the prompt a chunk at a time. Returns (logits [prompt, vocabulary], caches, seconds)."""
    logits = []
    begin = time.perf_counter()
    for start in tqdm(range(0, len(prompt), chunk), desc="prefill", unit="chunk"):
        tokens = prompt[start : start + chunk]
        new_tokens, context_len = len(tokens), start + len(tokens)
        padded = np.pad(tokens, (0, chunk - new_tokens))
        out, caches = step(
            weights, caches, padded, np.int32(new_tokens), np.int32(context_len), table.cover(context_len)
        )
        logits.append(out[:new_tokens].block_until_ready())
    return jnp.concatenate(logits), caches, time.perf_counter() - begin


def decode(step, weights, caches, table, context_len, token, count):
    """Writes `count` tokens, each the likeliest after those before it. Returns (tokens, logits, seconds)."""
    tokens, logits = [], []
    begin = time.perf_counter()
    for _ in range(count):
        tokens.append(int(token))
        context_len += 1
        one_token = np.full(1, token, np.int32)
        out, caches = step(
            weights, caches, one_token, np.int32(1), np.int32(context_len), table.cover(context_len)
        )
        logits.append(out)
        token = jnp.argmax(out[0])
    jax.block_until_ready(logits)
    return tokens, jnp.concatenate(logits), time.perf_counter() - begin


def kernel_and_why(model: Model, tokens: int, table: PageTable, page_indices, platform: str) -> str:
    """Which kernel runs a chunk of `tokens`, and why that one. Raises ValueError where the one asked for cannot."""
    device = device_of(default_platform())
    cache = jax.ShapeDtypeStruct((1, model.kv_heads, table.num_pages, table.page_size, model.head_dim), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = Call.of(
        jax.ShapeDtypeStruct((tokens, model.q_heads, model.head_dim), jnp.float32),
        cache,
        cache,
        Sequences(one, one, one, one, page_indices[None]),
        jax.ShapeDtypeStruct((), jnp.int32),
        num_kv_heads=model.kv_heads,
        attention=Attention(model.head_dim**-0.5),
    )
    name, passed_over = choose(call.problem, device, platform)
    if platform != "auto":
        return f"{name}, as --platform {platform} asks"
    reasons = "".join(f"; {other} cannot: {reason}" for other, reason in passed_over.items())
    return f"{name}, the first of {device.platform}'s kernels that supports the call{reasons}"


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message):
        self.exit(2, f"paged_prefill: {message}\n")


def count(text: str) -> int:
    """The type of arguments that count something."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= LARGEST_COUNT):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {LARGEST_COUNT}, got {text!r}")
    return int(text)


def parse_arguments(arguments):
    """The parser, for its `error`, and the arguments."""
    parser = OneLineParser(prog="python -m paged_prefill", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=README, metavar="FILE", help="what to read (the README)")
    parser.add_argument("--tokens", type=count, default=16_384, metavar="N", help="bytes to read of it (%(default)s)")
    parser.add_argument("--chunk", type=count, default=512, metavar="N", help="tokens of one chunk (%(default)s)")
    parser.add_argument("--decode", type=count, default=32, metavar="N", help="tokens to write (%(default)s)")
    parser.add_argument("--page-size", type=count, default=16, metavar="N", help="keys in a page (%(default)s)")
    parser.add_argument(
        "--platform", choices=PLATFORMS, default="auto", help="the kernel to run, as in the public functions"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X",
        help="largest difference from the dense pass that is no failure, relative to the largest logit (%(default)s)",
    )
    return parser, parser.parse_args(arguments)


def read_prompt(parser, path: Path, tokens: int) -> np.ndarray:
    """The first bytes of a file as tokens; one clear line where there are none."""
    try:
        with path.open("rb") as file:
            prompt = np.frombuffer(file.read(tokens), np.uint8).astype(np.int32)
    except OSError as error:
        parser.error(f"cannot read {path}: {error.strerror}")
    if not prompt.size:
        parser.error(f"{path} is empty: there is no prompt to read")
    return prompt


def say(name: str, what: str) -> None:
    """Prints a line of the report."""
    print(f"{name:<12}{what}", flush=True)


def describe(model: Model, table: PageTable, prompt, chunk: int, options) -> None:
    """Prints what is about to run, and on what. Raises ValueError where the kernel asked for cannot run."""
    no_pages = table.cover(0)
    prefill_kernel, decode_kernel = (
        kernel_and_why(model, tokens, table, no_pages, options.platform) for tokens in (chunk, 1)
    )
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({default_platform()})"
    heads = f"{model.q_heads} query and {model.kv_heads} KV heads of {model.head_dim}"
    say("machine", f"{devices}, JAX {jax.__version__}, Python {python_platform.python_version()}")
    say("prompt", f"{len(prompt)} tokens, the bytes of {options.text.name}")
    say("model", f"{model.layers} layers, {heads}, float32")
    say("cache", f"{table.num_pages} pages of {table.page_size} keys, handed out in random order")
    say("kernel", f"prefill: {prefill_kernel}")
    say("kernel", f"decode: {decode_kernel}")


def run(model: Model, table: PageTable, prompt, chunk: int, options) -> float:
    """Prefill, decode, and the dense pass. Returns the largest difference, relative to the largest logit."""
    weights, caches = init_weights(model), new_caches(model, table)

    def compiled(tokens):
        arguments = np.zeros(tokens, np.int32), np.int32(0), np.int32(0), table.cover(0)
        return paged_step.lower(weights, caches, *arguments, platform=options.platform).compile()

    prefill_step, decode_step = compiled(chunk), compiled(1)
    prompt_logits, caches, seconds = prefill(prefill_step, weights, caches, table, prompt, chunk)
    say("prefill", f"{len(prompt) / seconds:,.0f} tokens/s ({len(prompt)} tokens in chunks of {chunk})")
    first = jnp.argmax(prompt_logits[-1])
    reply, reply_logits, seconds = decode(decode_step, weights, caches, table, len(prompt), first, options.decode)
    say("decode", f"{len(reply) / seconds:,.0f} tokens/s ({len(reply)} tokens, one at a time)")

    dense = dense_pass(weights, np.concatenate([prompt, np.asarray(reply, np.int32)]))
    paged = jnp.concatenate([prompt_logits, reply_logits])
    # In NumPy: a NaN must come through, and the maximum of JAX 0.10.2 on CPU can lose it.
    return float(np.max(np.abs(np.asarray(paged) - np.asarray(dense))) / np.max(np.abs(dense)))


def main(arguments=None) -> int:
    """Runs the main job; returns the exit status, 1 where the paged and the dense pass differ by too much."""
    parser, options = parse_arguments(arguments)
    prompt = read_prompt(parser, options.text, options.tokens)
    table = PageTable(len(prompt) + options.decode, options.page_size)
    job = Model(), table, prompt, min(options.chunk, len(prompt)), options
    try:
        describe(*job)
    except ValueError as error:
        parser.error(str(error))
    # Full float32 products: on GPU and TPU the default rounds their operands.
    with jax.default_matmul_precision("highest"):
        difference = run(*job)
    within = difference <= options.tolerance  # False for NaN
    verdict = "within" if within else "MORE THAN"
    say("difference", f"{difference:.1e} of the largest logit, from one dense pass: {verdict} {options.tolerance:.1e}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
