"""Serves a model: reads prompts, writes what it says to them, and how fast that was.

python examples/serve/main.py --model DIR --prompt "Once upon a time" --max-new-tokens 64
"""

import argparse
import json
import os
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged_prefill.examples.serve import bench, checkpoint, runner
from paged_prefill.examples.serve.engine import Engine, Request, Sampling
from paged_prefill.lowering import tuning

PAGE_SIZE = 16
MAX_SEQS = 16
MAX_DRAFTS = 4
TOKEN_BUCKETS = (16, 128, 512)
MEMORY_WITHOUT_STATS = 2**30  # for the caches, where a device does not say what it has
KV_DTYPES = dict(fp8=jnp.float8_e4m3fn, int8=jnp.int8)


class Bytes:
    """The tokenizer of the tiny model."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Tokenizer:
    """A folder's tokenizer.json; without one, prompts are lists of tokens."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Reader

        file = folder / "tokenizer.json"
        self._tokenizer = Reader.from_file(str(file)) if file.exists() else None

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("the folder has no tokenizer.json: give prompts as lists of tokens")
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode(tokens)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message):
        self.exit(2, f"serve: {message}\n")


def parser() -> OneLineParser:
    """The parser of the command line."""
    made = OneLineParser(prog="main.py", description=__doc__.splitlines()[0])
    made.add_argument(
        "--model", type=Path, metavar="DIR", help="a Hugging Face folder (a tiny model with random weights)"
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one prompt")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl",
        help='a prompt a line: {"prompt": TEXT} or {"tokens": [...]}, and as one likes max_new_tokens, temperature, '
        "top_k, top_p, seed",
    )  # fmt: skip
    what.add_argument(
        "--bench", type=Path, nargs="?", const=Path("latency.png"), metavar="FILE.png",
        help="offer a synthetic load, and draw latency against it (%(const)s)",
    )  # fmt: skip
    made.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="the longest answer (%(default)s)")
    made.add_argument(
        "--mesh",
        type=mesh_sizes,
        default={},
        metavar="AXIS=N,...",
        help="heads=8, pages=8, batch=2,heads=4: what is cut",
    )
    made.add_argument("--kv-dtype", choices=KV_DTYPES, help="a quantised cache (the dtype of the weights)")
    made.add_argument("--json", action="store_true", help="print one JSON object a request")
    return made


def mesh_sizes(text: str) -> dict[str, int]:
    """heads=4,batch=2 as a dict."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(size.isdigit() and int(size) > 0 for _, _, size in pairs):
        raise argparse.ArgumentTypeError(f"must be axes and sizes such as batch=2,heads=4, got {text!r}")
    return {axis: int(size) for axis, _, size in pairs}


def read_requests(options, tokenizer) -> list[tuple[list[int], int, Sampling]]:
    """(tokens, number of new ones, how they are chosen) of each request; ValueError where a line makes no sense."""
    if options.prompt is not None:
        return [(tokenizer.encode(options.prompt), options.max_new_tokens, Sampling())]
    requests = []
    for number, line in enumerate(options.prompts.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            tokens = fields.pop("tokens", None)
            text = fields.pop("prompt", None)
            count = fields.pop("max_new_tokens", options.max_new_tokens)
            tokens = tokenizer.encode(text) if tokens is None else tokens
            requests.append((tokens, count, Sampling(**fields)))
        except (AttributeError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{options.prompts}, line {number}: {error}") from error
    return requests


def pages_for(config, lengths, max_seqs: int, dtype, kv_dtype, devices: int) -> int:
    """Pages for as many sequences of the longest length as run at a time, or what the devices' free memory holds."""
    itemsize = jnp.dtype(kv_dtype or dtype).itemsize
    sides = 1 if config.latent else 2
    scales = 4 * sides * bool(kv_dtype)
    features = sum(layer.kv_heads * (sides * layer.head_dim * itemsize + scales) for layer in config.layers)
    stats = jax.devices()[0].memory_stats()
    free = 0.8 * (stats["bytes_limit"] - stats["bytes_in_use"]) * devices if stats else MEMORY_WITHOUT_STATS
    wanted = max_seqs * -(-(max(lengths) + MAX_DRAFTS) // PAGE_SIZE)
    fitting = int(free / (features * PAGE_SIZE))
    return max(1, min(wanted, fitting) // devices) * devices


def new_engine(model: checkpoint.Model, lengths: list[int], options) -> Engine:
    """An engine for requests of these lengths, prompt and answer together."""
    mesh, kv_dtype = runner.make_mesh(options.mesh), KV_DTYPES.get(options.kv_dtype)
    devices = int(np.prod([*options.mesh.values()], dtype=int))
    dtype = model.weights["embedding"].dtype
    num_pages = pages_for(model.config, lengths, MAX_SEQS, dtype, kv_dtype, devices)
    # The environment variable wins: fast kernels whose sizes follow the pack, for the same bits in any pack.
    policy = None if tuning.POLICY_VARIABLE in os.environ else "invariant"
    return Engine(
        model, num_pages=num_pages, page_size=PAGE_SIZE, max_seqs=MAX_SEQS, max_len=max(lengths),
        token_buckets=TOKEN_BUCKETS, max_drafts=MAX_DRAFTS, kv_dtype=kv_dtype, mesh=mesh, policy=policy,
    )  # fmt: skip


def serve(engine: Engine, requests) -> list[Request]:
    """Runs requests that come all at once, under a progress bar."""
    engine.warm_up()
    submitted = [engine.submit(*request) for request in requests]
    total = sum(request.max_new_tokens for request in submitted if not request.error)
    with tqdm(total=total, desc="serve", unit="token") as bar:
        while engine.busy:
            finished = engine.step()
            bar.update(engine.counts.decoded - bar.n + sum(request.room for request in finished))
        bar.update(total - bar.n)
    return submitted


def report(requests: list[Request], tokenizer, as_json: bool) -> None:
    """Prints what was said."""
    for request in requests:
        seconds = request.first_token and request.first_token - request.submitted
        if as_json:
            text = tokenizer.decode(request.output)
            answer = dict(tokens=request.output, text=text, error=request.error, seconds_to_first_token=seconds)
            print(json.dumps(dict(prompt_tokens=len(request.prompt)) | answer), flush=True)
        elif request.error:
            print(f"error: {request.error}")
        else:
            text = tokenizer.decode(request.tokens)
            print(request.output if text is None else text)


def rates(engine: Engine, requests: list[Request]) -> str:
    """How fast it was, in a few lines."""
    counts = engine.counts
    waits = [1e3 * (request.first_token - request.submitted) for request in requests if request.first_token]

    def rate(tokens, seconds):
        return f"{tokens / seconds:,.0f} tokens/s" if seconds else "none"

    lines = [
        f"prefill      {rate(counts.prefilled, counts.prefill_seconds)} "
        f"({counts.prefilled} tokens, {counts.shared} shared)",
        f"decode       {rate(counts.decoded_in_those, counts.decode_seconds)} "
        f"({counts.decoded} tokens, {counts.accepted} of {counts.drafted} drafts accepted)",
    ]
    if waits:
        lines.append(f"first token  median {np.median(waits):,.0f} ms, last {max(waits):,.0f} ms")
    return "\n".join(lines)


def main(arguments=None) -> int:
    """Runs the command line; 1 where some request was not served."""
    made = parser()
    options = made.parse_args(arguments)
    try:
        if options.model is None:
            print("no --model: a tiny model with random weights, over bytes", file=sys.stderr)
            model, tokenizer = checkpoint.seeded(checkpoint.tiny_config()), Bytes()
        else:
            model, tokenizer = checkpoint.load(options.model), Tokenizer(options.model)
        if options.bench:
            engine = new_engine(model, [bench.PROMPT + options.max_new_tokens], options)
            bench.draw(bench.measure(engine, options.max_new_tokens), options.bench)
            print(f"wrote {options.bench}")
            return 0
        requests = read_requests(options, tokenizer)
        engine = new_engine(model, [len(tokens) + max(count, 1) for tokens, count, _ in requests], options)
    except (ValueError, OSError) as error:
        made.error(str(error))
    served = serve(engine, requests)
    report(served, tokenizer, options.json)
    print(rates(engine, served), file=sys.stderr if options.json else sys.stdout)
    return int(any(request.error for request in served))


if __name__ == "__main__":
    sys.exit(main())
