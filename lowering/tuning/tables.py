"""Tables of tile sizes: readable JSON, one file per device kind, shipped with the package or kept for the user.

    {"format": 2, "device": "NVIDIA H200",
     "entries": [{"key": {...}, "config": {"block_q": 128, ...}, "milliseconds": 0.91, "source": "timed"}]}

A key holds all that decides the sizes; see `key_of`. `source` is "timed", or "schedule" for a choice made from the
compiler's static schedule. Numbers of splits are no part of a row: a kernel works them out for the call it runs. A file
or a row that makes no sense, or a file that cannot be written, costs a warning, never a call.
"""

import contextlib
import functools
import hashlib
from importlib import resources
import json
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
from filelock import FileLock, Timeout
import platformdirs

from paged_prefill.lowering.call import Device, Problem
from paged_prefill.lowering.kernel import Kernel
from paged_prefill.primitive.config import PrefillPageAttentionConfig

FORMAT = 2
LOCK_TIMEOUT_SECONDS = 10.0
TILE_SIZES = ("block_q", "block_kv", "num_warps", "num_stages")

Entry = dict[str, Any]
Table = dict[str, Entry]  # by the key as canonical JSON


def key_of(kernel: Kernel, problem: Problem, device: Device) -> dict[str, Any]:
    """All that tile sizes depend on. Sizes that vary from call to call are rounded up to powers of two.

    So a row holds for calls of more than half and at most all of each such size; timing looks at both ends.
    """
    return {
        "device": device.kind,
        "cores": device.cores,
        "kernel": kernel.name,
        "version": kernel.version,
        "dtype": problem.dtype,
        "cache_dtype": problem.cache_dtype,
        "features": [*problem.features],
        "head_dim": problem.head_dim,
        "value_dim": problem.value_dim,
        "kv_heads": problem.num_kv_heads,
        "group": problem.group,
        "page_size": problem.page_size,
        "sequences": bucket(problem.seqs),
        "tokens_per_sequence": bucket(problem.tokens_per_seq),
        "context_capacity": bucket(problem.capacity),
        "sliding_window": problem.attention.sliding_window,
        "soft_cap": problem.attention.attn_logits_soft_cap,
    }


def bucket(size: int) -> int:
    """The largest size that shares a row with this one: the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def entry_of(key: dict[str, Any], config: PrefillPageAttentionConfig, *, source: str, **facts) -> Entry:
    """A row of a table: where it applies, what it says, and how that is known."""
    return {"key": key, "config": tile_sizes(config).sizes(), **facts, "source": source}


def tile_sizes(config: PrefillPageAttentionConfig) -> PrefillPageAttentionConfig:
    """What a table may hold of a configuration."""
    return PrefillPageAttentionConfig(**{name: getattr(config, name) for name in TILE_SIZES})


def find(table: Table, key: dict[str, Any]) -> tuple[PrefillPageAttentionConfig, str] | None:
    """The tile sizes that a table holds for a key and how they are known ("timed" or "schedule"), or None."""
    entry = table.get(canonical(key))
    return entry and (PrefillPageAttentionConfig(**entry["config"]), entry["source"])


def shipped_path(device_kind: str) -> Path:
    """Where the package keeps the table of a device kind."""
    return Path(str(resources.files("paged_prefill.lowering.tuning"))) / "tuned" / _file_name(device_kind)


def user_path(device_kind: str) -> Path:
    """Where the user's own table of a device kind lives: the platform's folder for caches."""
    return _user_folder() / _file_name(device_kind)


def user_digest() -> str:
    """A digest of all the user's tables."""
    digest = hashlib.sha256()
    for path in sorted(_user_folder().glob("*.json")):
        with contextlib.suppress(OSError):  # it cannot be read as a table either
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def read(path: Path) -> Table:
    """The table in a file; empty where there is no file. What makes no sense costs a warning; older formats do not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] in range(FORMAT):
            return {}
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        entries = [*content["entries"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logging.warning("paged_prefill does without the table %s, which cannot be read: %r", path, error)
        return {}
    table = {}
    for entry in entries:
        try:
            _check(entry)
        except (ValueError, TypeError, KeyError) as error:
            logging.warning("paged_prefill does without a row of the table %s, %r: %r", path, entry, error)
        else:
            table[canonical(entry["key"])] = entry
    return table


@functools.cache
def read_shipped(device_kind: str) -> Table:
    """The table that the package ships for a device kind."""
    return read(shipped_path(device_kind))


def write(path: Path, entries: list[Entry]) -> bool:
    """Adds entries to a table's file, keeping what others wrote; False, with a warning, where that is not possible.

    The file is replaced as a whole under a lock, so that no reader sees half of it and no writer loses another's rows.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            table = read(path)
            table.update((canonical(entry["key"]), entry) for entry in entries)
            _replace(path, [entry for _, entry in sorted(_without_older(table).items())])
    except (OSError, Timeout) as error:
        logging.warning("paged_prefill could not write the table %s: %r", path, error)
        return False
    return True


def canonical(key: dict[str, Any]) -> str:
    """A key as the text by which a table knows it."""
    return json.dumps(key, sort_keys=True)


def _check(entry: Entry) -> None:
    """Raises ValueError, TypeError or KeyError where an entry is no row of a table."""
    key, config, source = entry["key"], entry["config"], entry["source"]
    if not isinstance(key["version"], int) or not all(isinstance(x, str) for x in (key["device"], key["kernel"], source)):
        raise TypeError("device, kernel and source must be strings, and version an integer")
    if not config or not {*config} <= {*TILE_SIZES}:
        raise ValueError(f"a row holds some of {', '.join(TILE_SIZES)}, got {config!r}")
    PrefillPageAttentionConfig(**config)


def _lock(path: Path) -> FileLock:
    """The lock of a table's file. It stays when it is free, so it lies in the user's folder, not beside the table."""
    folder = _user_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return FileLock(folder / f"{name}.lock", timeout=LOCK_TIMEOUT_SECONDS)


def _replace(path: Path, entries: list[Entry]) -> None:
    device = entries[0]["key"]["device"] if entries else None
    text = json.dumps({"format": FORMAT, "device": device, "entries": entries}, indent=1) + "\n"
    # Not by tempfile, whose files nobody else may read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _without_older(table: Table) -> Table:
    """Drops the rows of kernels that have a later version in the table: nothing asks for them any more."""
    latest: dict[str, int] = {}
    for entry in table.values():
        kernel, version = entry["key"]["kernel"], entry["key"]["version"]
        latest[kernel] = max(latest.get(kernel, version), version)
    return {k: e for k, e in table.items() if e["key"]["version"] == latest[e["key"]["kernel"]]}


def _user_folder() -> Path:
    return platformdirs.user_cache_path("paged_prefill")


def _file_name(device_kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"
