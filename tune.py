"""Times configurations ahead of time: `python -m paged_prefill.tune --heads 32/8 --head-dim 128 --page-size 16`.

Prints a table of candidates for each shape, the heuristic one first, and keeps the one to use in the user's table, or
with --write in a table that can be shipped. With --show it times nothing, and says what a call of each shape would use
and why.
"""

import argparse
import itertools
from pathlib import Path
import sys

import jax

from paged_prefill.lowering import tables, timing, tuning
from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import KERNELS, choose, default_platform, device_of
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.checks import ATTENTION_DTYPES, PLATFORMS


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 1 where a shape could not be tuned."""
    arguments = _parser().parse_args(argv)
    device = device_of(default_platform())
    print(f"device: {device.kind} ({device.platform}), JAX {jax.__version__}")
    failures = 0
    for problem in _problems(arguments):
        print(f"\n{_describe(problem)}")
        try:
            name, passed_over = choose(problem, device, arguments.platform)
        except ValueError as error:
            print(f"  {error}")
            failures += 1
            continue
        for other, reason in passed_over.items():
            print(f"  passed over {other}: {reason}")
        kernel = KERNELS[device.platform][name]
        if arguments.show:
            choice = tuning.resolve(name, kernel, problem, device, None)
            print(f"  {name} with {choice.config.sizes()}: {choice.source}")
        else:
            failures += not _tune(name, kernel, problem, device, arguments)
    return 1 if failures else 0


def _tune(name, kernel, problem: Problem, device: Device, arguments) -> bool:
    timings, best = timing.compare(name, kernel, problem, device, budget_seconds=arguments.budget)
    for t in timings:
        took = f"{t.milliseconds:10.4f} ms" if t.milliseconds is not None else f"{'-':>13}"
        mark = "chosen" if t is best else t.problem or ""
        print(f"  {name:<10} {took}  {sizes(t.config):<50} {mark}")
    if best is None:
        return False
    if arguments.write is None:
        return tuning.remember(name, kernel, problem, device, best)
    return tables.write(arguments.write, [tuning.entry_of(name, kernel, problem, device, best)])


def sizes(config) -> str:
    """A configuration in one line."""
    return " ".join(f"{size}={value}" for size, value in config.sizes().items())


def _describe(p: Problem) -> str:
    window = "" if p.attention.sliding_window is None else f", window {p.attention.sliding_window}"
    return (
        f"{p.seqs} x {p.tokens // p.seqs} tokens at {p.capacity}, {p.q_heads}/{p.num_kv_heads} heads, "
        f"head_dim {p.head_dim}, page_size {p.page_size}, {p.dtype}{window}"
    )


def _problems(arguments):
    for tokens, context in itertools.product(arguments.tokens, arguments.context):
        if tokens <= context:
            yield problem_of_shape(
                arguments.seqs,
                tokens,
                context,
                *arguments.heads,
                arguments.head_dim,
                arguments.window,
                arguments.soft_cap,
                value_dim=arguments.value_dim,
                page_size=arguments.page_size,
                dtype=arguments.dtype,
            )


def problem_of_shape(
    seqs, tokens, context, q_heads, kv_heads, head_dim, window, soft_cap, *, value_dim=None, page_size, dtype="bfloat16"
) -> Problem:
    """The problem of a pack: `seqs` sequences of `tokens` new tokens each, whose contexts are `context` tokens long."""
    pages_per_seq = -(-context // page_size)
    return Problem(
        tokens=tokens * seqs,
        q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        pools=1,
        cache_kv_heads=kv_heads,
        num_pages=pages_per_seq * seqs,
        page_size=page_size,
        seqs=seqs,
        pages_per_seq=pages_per_seq,
        dtype=dtype,
        cache_dtype=dtype,
        attention=Attention(head_dim**-0.5, soft_cap, window),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paged_prefill.tune", description=__doc__)
    parser.add_argument("--heads", type=_heads, required=True, metavar="Q/KV", help="query heads / KV heads, as 32/8")
    parser.add_argument("--head-dim", type=_positive, required=True)
    parser.add_argument("--value-dim", type=_positive, help="default: --head-dim")
    parser.add_argument("--page-size", type=_positive, required=True, help="slots of a page")
    parser.add_argument("--tokens", type=_sizes_list, default=[1, 512, 2048], help="new tokens a sequence, by commas")
    parser.add_argument("--context", type=_sizes_list, default=[4096, 16384], help="tokens a context, by commas")
    parser.add_argument("--seqs", type=_positive, default=1, help="sequences of the pack")
    parser.add_argument("--window", type=_positive, help="sliding window, in keys")
    parser.add_argument("--soft-cap", type=float)
    parser.add_argument("--dtype", choices=ATTENTION_DTYPES, default="bfloat16")
    parser.add_argument("--platform", choices=PLATFORMS, default="auto", help="the kernel to tune")
    parser.add_argument("--budget", type=float, default=timing.BUDGET_SECONDS, help="seconds a shape")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write this table, not the user's")
    parser.add_argument("--show", action="store_true", help="only say what a call would use, and why")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _sizes_list(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _heads(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"must be query heads / KV heads, as 32/8, got {text!r}")
    q_heads, kv_heads = map(_positive, parts)
    if q_heads % kv_heads:
        raise argparse.ArgumentTypeError(f"query heads must be a multiple of KV heads, got {text!r}")
    return q_heads, kv_heads


if __name__ == "__main__":
    sys.exit(main())
