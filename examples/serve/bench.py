"""A synthetic load: how long requests take as more of them come."""

from pathlib import Path
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from paged_prefill.examples.serve.engine import Engine

PROMPT = 128  # tokens
REQUESTS = 32  # at each load
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # of what the engine serves when all come at once


class Point(NamedTuple):
    """What requests saw at one load."""

    offered: float  # requests a second
    first_token: np.ndarray  # seconds, of each request
    whole: np.ndarray


def measure(engine: Engine, new_tokens: int, requests: int = REQUESTS, seed: int = 0) -> list[Point]:
    """Offers random prompts at times drawn from a Poisson process, at several loads."""
    engine.warm_up()
    rng = np.random.default_rng(seed)
    at_once = _offered(engine, np.zeros(requests), new_tokens, rng)
    capacity = requests / max(at_once.whole)
    return [
        _offered(engine, np.cumsum(rng.exponential(1 / (load * capacity), requests)), new_tokens, rng)
        for load in tqdm(LOADS, desc="bench", unit="load")
    ]


def _offered(engine: Engine, arrivals, new_tokens: int, rng) -> Point:
    """Requests that come at these times, in seconds from now."""
    prompts = rng.integers(0, engine.config.vocabulary, (len(arrivals), PROMPT)).tolist()
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
    return Point(len(arrivals) / max(arrivals[-1], 1e-9), first - came, last - came)


def draw(points: list[Point], file: Path) -> None:
    """Latency against offered load, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="offered load (requests/s)", ylabel="seconds", yscale="log")
    offered = [point.offered for point in points]
    for color, name, label in (("C0", "first_token", "to the first token"), ("C1", "whole", "to the last token")):
        for share, style in ((50, "-o"), (95, "--o")):
            seconds = [np.percentile(getattr(point, name), share) for point in points]
            axes.plot(offered, seconds, style, color=color, label=f"{label}, {share}% of requests")
    axes.legend()
    axes.grid(True, alpha=0.3)
    figure.savefig(file, dpi=150)
