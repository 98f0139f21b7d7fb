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

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.choose import KERNELS, choose, default_platform, device_of
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.tuning import resolve, tables, timing
from paged_prefill.primitive.attention import Attention
from paged_prefill.primitive.checks import ATTENTION_DTYPES, PLATFORMS
from paged_prefill.primitive.context import current_policy


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 1 where a shape could not be tuned, or none was left to tune."""
    arguments = _parser().parse_args(argv)
    device = device_of(default_platform())
    print(f"device: {device.kind} ({device.platform}), JAX {jax.__version__}")
    problems = list(_problems(arguments))
    failures = 0 if problems else 1
    for problem in problems:
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
            print(f"  {name} with {_choice(kernel, problem, device)}")
        else:
            failures += not _tune(kernel, problem, device, arguments)
    return 1 if failures else 0


def _choice(kernel: Kernel, problem: Problem, device: Device) -> str:
    """What a call would run with, and why; times nothing."""
    policy = current_policy()
    choice = resolve.resolve(kernel, problem, device, None, under="cache" if policy == "on" else policy)
    untimed = policy == "on" and choice.source == "heuristic"
    return f"{choice.config.sizes()}: {choice.source}{', until a call is timed (the policy is on)' if untimed else ''}"


def _tune(kernel: Kernel, problem: Problem, device: Device, arguments) -> bool:
    timings, best, settled = timing.compare(kernel, problem, device, budget_seconds=arguments.budget)
    for t in timings:
        took = f"{t.milliseconds:10.4f} ms" if t.milliseconds is not None else f"{'-':>13}"
        mark = "chosen" if t is best else t.problem or ""
        print(f"  {kernel.name:<10} {took}  {sizes(t.config):<50} {mark}")
    if best is None or not settled:
        print(f"  nothing is kept: {'no candidate could be timed' if best is None else 'the budget was too short'}")
        return False
    if arguments.write is None:
        return resolve.remember(kernel, problem, device, best)
    return tables.write(arguments.write, [resolve.entry_of(kernel, problem, device, best)])


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
        if tokens > context:
            print(f"skipped: {tokens} new tokens are more than their context of {context}")
            continue
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
    seqs: int,
    tokens: int,
    context: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
    soft_cap: float | None = None,
    *,
    value_dim: int | None = None,
    page_size: int,
    dtype: str = "bfloat16",
) -> Problem:
    """The problem of a pack: `seqs` sequences of `tokens` new tokens each, whose contexts are `context` tokens long.

    `value_dim` is head_dim where it is None; `dtype` is that of the query and of the caches.
    """
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
    parser.add_argument("--soft-cap", type=_positive_number)
    parser.add_argument("--dtype", choices=ATTENTION_DTYPES, default="bfloat16")
    parser.add_argument("--platform", choices=PLATFORMS, default="auto", help="the kernel to tune")
    parser.add_argument("--budget", type=_positive_number, default=timing.BUDGET_SECONDS, help="seconds a shape")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write this table, not the user's")
    parser.add_argument("--show", action="store_true", help="only say what a call would use, and why")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
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
