"""A synthetic load: how long requests take as more of them come."""

from pathlib import Path
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from paged_prefill.examples.serve.engine import Engine

PROMPT = 128  # tokens
REQUESTS = 64  # at each load
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of what the engine serves when all come at once


class Point(NamedTuple):
    """What requests saw at one load."""

    first_token: np.ndarray  # seconds, of each request
    whole: np.ndarray
    load: float = np.inf  # requests a second


def measure(engine: Engine, new_tokens: int, seed: int = 0) -> list[Point]:
    """Offers random prompts at times drawn from a Poisson process, at several loads."""
    engine.warm_up()
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, engine.config.vocabulary, (len(LOADS) + 1, REQUESTS, PROMPT)).tolist()
    gaps = rng.exponential(size=REQUESTS)
    at_once = _offered(engine, prompts.pop(), np.zeros(REQUESTS), new_tokens)
    capacity = REQUESTS / max(at_once.whole)
    loads = capacity * np.asarray(LOADS)
    arrivals = [np.cumsum(gaps / gaps.mean()) / load for load in loads]  # alike but for their pace
    offered = tqdm(zip(loads, prompts, arrivals), total=len(LOADS), desc="bench", unit="load")
    return [_offered(engine, own, came, new_tokens)._replace(load=float(load)) for load, own, came in offered]


def _offered(engine: Engine, prompts, arrivals, new_tokens: int) -> Point:
    """Serves prompts that come at these times, in seconds from now."""
    requests, began = [], time.perf_counter()
    while len(requests) < len(arrivals) or engine.busy:
        now = time.perf_counter() - began
        while len(requests) < len(arrivals) and arrivals[len(requests)] <= now:
            requests.append(engine.submit(prompts[len(requests)], new_tokens, stop_tokens=()))
        if engine.busy:
            engine.step()
        else:
            time.sleep(max(0.0, arrivals[len(requests)] - now))
    came = began + np.asarray(arrivals)
    first, last = (np.asarray([getattr(r, name) for r in requests]) for name in ("first_token", "last_token"))
    return Point(first - came, last - came)


def draw(points: list[Point], file: Path) -> None:
    """Latency against offered load, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="offered load (requests/s)", ylabel="seconds", yscale="log")
    loads = [point.load for point in points]
    for color, name, label in (("C0", "first_token", "to the first token"), ("C1", "whole", "to the last token")):
        for share, style in ((50, "-o"), (95, "--o")):
            seconds = [np.percentile(getattr(point, name), share) for point in points]
            axes.plot(loads, seconds, style, color=color, label=f"{label}, {share}% of requests")
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(True, alpha=0.3)
    figure.savefig(file, dpi=150)
