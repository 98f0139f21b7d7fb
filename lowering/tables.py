"""Tables of configurations: readable JSON, one file per device kind, shipped with the package or kept for the user.

    {"format": 1, "device": "NVIDIA H200",
     "entries": [{"key": {...}, "config": {"block_q": 128, ...}, "milliseconds": 0.91, "source": "timed"}]}

A key says what the timing depends on; see `key_of`. `source` is "timed", or "schedule" for a choice made from the
compiler's static schedule. A file that cannot be read or written costs a warning, never a call.
"""

import functools
from importlib import resources
import json
import os
from pathlib import Path
import re
import tempfile
from typing import Any

from absl import logging
from filelock import FileLock, Timeout
import platformdirs

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.primitive.config import PrefillPageAttentionConfig

FORMAT = 1
LOCK_TIMEOUT_SECONDS = 10.0

Entry = dict[str, Any]
Table = dict[str, Entry]  # by the key as canonical JSON


def key_of(name: str, version: int, problem: Problem, device: Device) -> dict[str, Any]:
    """What a configuration depends on. Sizes that vary from call to call are rounded up to powers of two."""
    window = problem.attention.sliding_window
    return {
        "device": device.kind,
        "kernel": name,
        "version": version,
        "dtype": problem.dtype,
        "head_dim": problem.head_dim,
        "value_dim": problem.value_dim,
        "group": problem.group,
        "page_size": problem.page_size,
        "tokens": _bucket(problem.tokens),
        "context_capacity": _bucket(problem.capacity),
        "sliding_window": None if window is None else _bucket(window),
    }


def entry_of(key: dict[str, Any], config: PrefillPageAttentionConfig, *, source: str, **facts) -> Entry:
    """A row of a table: where it applies, what it says, and how that is known."""
    return {"key": key, "config": config.chosen(), **facts, "source": source}


def find(table: Table, key: dict[str, Any]) -> tuple[PrefillPageAttentionConfig, str] | None:
    """The configuration that a table holds for a key and how it is known ("timed" or "schedule"), or None."""
    entry = table.get(_canonical(key))
    try:
        return entry and (PrefillPageAttentionConfig(**entry["config"]), entry["source"])
    except (TypeError, ValueError, KeyError) as error:
        logging.warning("paged_prefill passes over a table's entry for %s: %s", key, error)
        return None


def shipped_path(device_kind: str) -> Path:
    """Where the package keeps the table of a device kind."""
    return Path(str(resources.files("paged_prefill.lowering"))) / "tuned" / _file_name(device_kind)


def user_path(device_kind: str) -> Path:
    """Where the user's own table of a device kind lives: the platform's folder for caches."""
    return platformdirs.user_cache_path("paged_prefill") / _file_name(device_kind)


def read(path: Path) -> Table:
    """The table in a file; empty where there is no file, and with a warning where it makes no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        return {_canonical(entry["key"]): entry for entry in content["entries"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        logging.warning("paged_prefill does without the table %s, which cannot be read: %r", path, error)
        return {}


@functools.cache
def read_shipped(device_kind: str) -> Table:
    """The package's table of a device kind, read once."""
    return read(shipped_path(device_kind))


def write(path: Path, entries: list[Entry]) -> bool:
    """Adds entries to a table's file, keeping what others wrote; False, with a warning, where that is not possible.

    The file is replaced as a whole under a lock, so that no reader sees half of it and no writer loses another's rows.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_SECONDS):
            table = read(path)
            table.update((_canonical(entry["key"]), entry) for entry in entries)
            _replace(path, [entry for _, entry in sorted(_without_older(table).items())])
    except (OSError, Timeout) as error:
        logging.warning("paged_prefill could not write the table %s: %r", path, error)
        return False
    return True


def _replace(path: Path, entries: list[Entry]) -> None:
    device = entries[0]["key"]["device"] if entries else None
    text = json.dumps({"format": FORMAT, "device": device, "entries": entries}, indent=1) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, text=True)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _without_older(table: Table) -> Table:
    """Drops the rows of kernels that have a later version in the table: nothing asks for them any more."""
    latest: dict[str, int] = {}
    for entry in table.values():
        kernel, version = entry["key"]["kernel"], entry["key"]["version"]
        latest[kernel] = max(latest.get(kernel, version), version)
    return {k: e for k, e in table.items() if e["key"]["version"] == latest[e["key"]["kernel"]]}


def _canonical(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _bucket(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _file_name(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"
