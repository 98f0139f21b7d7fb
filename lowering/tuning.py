"""Which configuration a kernel runs with.

In this order: the call's `cfg=`; a `with overlay(...)` around the call; the user's table of this device kind; the
table shipped with the package; then, by policy, timing or the kernel's heuristic. Only the first two are settled where
a call is traced (they become the primitive's parameter `config`); the rest where it is lowered, since only then the
device is known.

The policy is the environment variable PAGED_PREFILL_AUTOTUNE, read when used, or a `with policy(...)`:

    off     neither tables nor timing: `cfg`, overlay, heuristic
    cache   tables, else the heuristic (the default)
    on      tables, else timing, whose winner goes into the user's table

With several processes all must compile the same program, so what only one machine knows (the user's table, timing) is
left out there.
"""

from typing import NamedTuple

from absl import logging
import jax

from paged_prefill.lowering import tables, timing
from paged_prefill.lowering.call import Device, Problem
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import POLICY_VARIABLE, current_policy, overlay, policy, with_overlay


class Choice(NamedTuple):
    """A configuration with every size its kernel uses, and where it came from, for people."""

    config: PrefillPageAttentionConfig
    source: str


def resolve(name: str, kernel, problem: Problem, device: Device, asked: PrefillPageAttentionConfig | None) -> Choice:
    """The configuration for a kernel's call, by the order above. `asked` is `cfg=` or the overlay, or both."""
    heuristic = kernel.heuristic(problem, device)
    if asked is not None and asked.sizes():
        return Choice(asked.over(heuristic), "cfg or overlay")
    in_force = current_policy()
    # A symbolic size, as jax.export allows, has no bucket; an unknown device has no table.
    if in_force == "off" or device.kind is None or problem.symbolic:
        return Choice(heuristic, "heuristic")
    key = tables.key_of(name, kernel.version, problem, device)
    alone = jax.process_count() == 1
    if alone and (found := tables.find(tables.read(tables.user_path(device.kind)), key)):
        config, source = found
        return Choice(config.over(heuristic), f"user's table {tables.user_path(device.kind)}, {source}")
    if found := tables.find(tables.read_shipped(device.kind), key):
        config, source = found
        return Choice(config.over(heuristic), f"shipped table {tables.shipped_path(device.kind).name}, {source}")
    if in_force == "on" and alone and (best := tune(name, kernel, problem, device)):
        return Choice(best.over(heuristic), "timed now")
    return Choice(heuristic, "heuristic")


def tune(name: str, kernel, problem: Problem, device: Device) -> PrefillPageAttentionConfig | None:
    """Times the candidates, keeps the best in the user's table, and returns it; None where nothing could be timed."""
    best = timing.compare(name, kernel, problem, device).chosen
    if best is None:
        logging.warning("paged_prefill could not time %s on %s; its heuristic is used", name, device.kind)
        return None
    remember(name, kernel, problem, device, best)
    return best.config


def remember(name: str, kernel, problem: Problem, device: Device, best: timing.Timing) -> bool:
    """Puts a timing into the user's table; False where it cannot be written."""
    return tables.write(tables.user_path(device.kind), [entry_of(name, kernel, problem, device, best)])


def entry_of(name: str, kernel, problem: Problem, device: Device, best: timing.Timing) -> tables.Entry:
    """A timing as a row of a table."""
    key = tables.key_of(name, kernel.version, problem, device)
    return tables.entry_of(key, best.config, milliseconds=round(best.milliseconds, 4), source="timed")
