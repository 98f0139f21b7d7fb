"""Which configuration a kernel runs with.

In this order: the call's `cfg=`; a `with overlay(...)` around the call; the user's table of this device kind; the
table shipped with the package; then, by policy, timing or the kernel's heuristic. Only the first two are settled where
a call is traced (they become the primitive's parameter `config`); the rest where it is lowered, since only then the
device is known. Tile sizes that do not fit the call are an error where the caller chose them. Where a table did, or
where they would give work to less than half of the cores that the heuristic's do, it gives way to what comes next, with
one warning.

The policy is the environment variable PAGED_PREFILL_AUTOTUNE, read when used, or a `with policy(...)`:

    off     neither tables nor timing: `cfg`, overlay, heuristic
    cache   tables, else the heuristic (the default)
    on      tables, else timing, whose winner goes into the user's table
    invariant  `cfg`, overlay, heuristic, of kernels whose heuristic does not follow the pack: a sequence's bits are the
               same in any pack, batch and cut over heads

With several processes all must compile the same program, so what only one machine knows (the user's table, timing) is
left out there. An exported module is for machines that are not here, so nothing of this one's is in it: "off".
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from absl import logging
import jax

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.lowering.tuning import tables, timing
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import current_policy

# What timing chose in this process, None where it came to nothing: a call that is lowered again is not timed again.
_timed: dict[str, PrefillPageAttentionConfig | None] = {}


class Choice(NamedTuple):
    """A configuration with every size its kernel uses, and where it came from, for people."""

    config: PrefillPageAttentionConfig
    source: str


def resolve(
    kernel: Kernel,
    problem: Problem,
    device: Device,
    asked: PrefillPageAttentionConfig | None,
    *,
    under: str | None = None,
) -> Choice:
    """The configuration for a kernel's call, by the order above.

    Args:
      asked: `cfg=` or the overlay, or both.
      under: the policy; the one in force where None.

    Raises:
      ValueError: `asked` does not fit the call.
    """
    if asked is not None and (asked.sizes() or asked.fp8_terms is not None):
        config = completed(kernel, problem, device, asked)
        if wrong := kernel.misfit(problem, device, config):
            if nearest := _nearest(kernel, problem, device, asked, config):
                return Choice(completed(kernel, problem, device, nearest), "cfg or overlay")
            raise ValueError(f"{kernel.name}: {wrong} (sizes from: cfg or overlay)")
        return Choice(config, "cfg or overlay")
    heuristic = Choice(completed(kernel, problem, device), "heuristic")
    under = under or current_policy()
    # A symbolic size, as jax.export allows, has no bucket; an unknown device has no table.
    if under in ("off", "invariant") or device.kind is None or problem.symbolic:
        return heuristic
    if found := _look_up(kernel, problem, device, heuristic.config):
        return found
    # Samples have no optional operands, so that calls which have some cannot be timed.
    timed = under == "on" and jax.process_count() == 1 and not problem.features
    if timed and (best := _tune(kernel, problem, device)):
        config = completed(kernel, problem, device, best)
        if _against(kernel, problem, device, config, heuristic.config) is None:
            return Choice(config, "timed now")
    return heuristic


def completed(
    kernel: Kernel, problem: Problem, device: Device, chosen: PrefillPageAttentionConfig = PrefillPageAttentionConfig()
) -> PrefillPageAttentionConfig:
    """`chosen` with the heuristic's sizes where it leaves them open, and as many splits as those sizes need, if they fit."""
    config = kernel.complete(problem, device, chosen)
    if chosen.num_splits is None and kernel.misfit(problem, device, config) is None:
        config = dataclasses.replace(config, num_splits=kernel.num_splits(problem, device, config))
    return config


def _nearest(kernel, problem, device, asked, config) -> PrefillPageAttentionConfig | None:
    """What was asked for, with other sizes than `config`'s where it leaves them open, so that all fit.

    The fewest others, and of these the least far from `config`'s. None where there are none.
    """
    choices = kernel.choices(problem, device)
    names = [name for name in choices if getattr(asked, name) is None]

    def distance(other):
        steps = [abs(math.log2(getattr(other, name) / getattr(config, name))) for name in names]
        return sum(step > 0 for step in steps), sum(steps)

    every = itertools.product(*(sorted({getattr(config, name), *choices[name]}) for name in names))
    configs = [dataclasses.replace(config, **dict(zip(names, sizes))) for sizes in every]
    fitting = [each for each in configs if kernel.misfit(problem, device, each) is None]
    found = min(fitting, key=distance, default=None)
    return found and dataclasses.replace(found, num_splits=asked.num_splits)


def signature() -> str:
    """What sizes depend on beside the call, the policy and the shipped tables: an entry of `prefill.lowering_reads`."""
    return tables.user_digest() if jax.process_count() == 1 else ""


def _against(kernel, problem, device, config, heuristic) -> str | None:
    """Why sizes that were timed for another call of the same key are not for this one, or None."""
    if wrong := kernel.misfit(problem, device, config):
        return f"does not fit: {kernel.name}: {wrong}"
    busy, could_be = (min(kernel.blocks(problem, each) or 0, device.cores) for each in (config, heuristic))
    if 2 * busy < could_be:
        return f"leaves cores idle: {kernel.name}: {busy} of {device.cores} have work, by the heuristic {could_be}"
    return None


def _look_up(kernel, problem, device, heuristic) -> Choice | None:
    """The first row of a table that is for a call."""
    key = tables.key_of(kernel, problem, device)
    sources = []
    if jax.process_count() == 1:
        path = tables.user_path(device.kind)
        sources.append((tables.read(path), f"user's table {path}"))
    sources.append((tables.read_shipped(device.kind), f"shipped table {tables.shipped_path(device.kind).name}"))
    for table, where in sources:
        if found := tables.find(table, key):
            config = completed(kernel, problem, device, found[0])
            if (reason := _against(kernel, problem, device, config, heuristic)) is None:
                return Choice(config, f"{where}, {found[1]}")
            _warn(f"paged_prefill passes over a row of the {where}, which {reason}")
    return None


@functools.cache  # once for each
def _warn(message: str) -> None:
    logging.warning("%s", message)


def _tune(kernel, problem, device) -> PrefillPageAttentionConfig | None:
    """Times the candidates, keeps the best in the user's table, and returns it; None where nothing could be timed."""
    key = tables.canonical(tables.key_of(kernel, problem, device))
    if key not in _timed:
        comparison = timing.compare(kernel, problem, device)
        _timed[key] = comparison.chosen and tables.tile_sizes(comparison.chosen.config)
        if comparison.chosen is None:
            logging.warning("paged_prefill could not time %s on %s; its heuristic is used", kernel.name, device.kind)
        elif comparison.settled:
            remember(kernel, problem, device, comparison.chosen)
    return _timed[key]


def remember(kernel: Kernel, problem: Problem, device: Device, best: timing.Timing) -> bool:
    """Puts a timing into the user's table; False where it cannot be written."""
    return tables.write(tables.user_path(device.kind), [entry_of(kernel, problem, device, best)])


def entry_of(kernel: Kernel, problem: Problem, device: Device, best: timing.Timing) -> tables.Entry:
    """A timing as a row of a table."""
    key = tables.key_of(kernel, problem, device)
    return tables.entry_of(key, best.config, milliseconds=round(best.milliseconds, 4), source="timed")
