"""Stored results: CSV files under benchmarks/results, one row per measurement, replaced when it is measured again."""

from __future__ import annotations

import csv
import datetime
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# What every row says about where it comes from.
MACHINE = ("device", "threads", "isa", "versions", "command", "date", "commit")

Row = Mapping[str, Any]


def machine(device: str) -> dict[str, str]:
    """The columns of `MACHINE` for this process."""
    import torch

    from visiontok.bench.environment import ISA_FLAGS, cpu, device_name, git_sha, usable_cores, versions

    flags = cpu()[1]
    # What is missing decides as much as what is there.
    absent = [flag for flag in ("avx512f", "amx_tile") if flag in ISA_FLAGS and flag not in flags]
    isa = " ".join((*flags, *(f"no-{flag}" for flag in absent))) if device == "cpu" else ""
    names = ("visiontok", "torch", "timm", *(("triton",) if device != "cpu" else ()))
    return {
        "device": device_name(device) + (f" ({usable_cores()} cores)" if device == "cpu" else ""),
        "threads": str(torch.get_num_threads()),
        "isa": isa,
        "versions": " ".join(f"{name}={version}" for name, version in versions(names).items()),
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": (git_sha() or "")[:12] + ("-dirty" if (git_sha() or "").endswith("-dirty") else ""),
    }


def command() -> str:
    """The command line of this process, as it is repeated from the repository's root."""
    return f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".rstrip()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def put(path: Path, rows: Iterable[Row], key: Sequence[str]) -> None:
    """Adds rows to a file; those with the same key as a new one give way.

    Args:
        path: Made if it does not exist; written atomically.
        rows: New rows, all with the same columns.
        key: Columns that name a measurement.
    """
    kept = {tuple(row.get(name, "") for name in key): row for row in read(path)}
    for row in rows:
        text = {name: _text(value) for name, value in row.items()}
        kept[tuple(text.get(name, "") for name in key)] = text
    ordered = [kept[name] for name in sorted(kept)]
    columns = list(dict.fromkeys(name for row in ordered for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    os.chmod(name, 0o644)
    os.replace(name, path)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
