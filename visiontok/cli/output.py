"""What commands print and write: the `--result` line, result files, pairs of name and value."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def say(args: argparse.Namespace, text: str) -> None:
    """Prints for people; silent under `--quiet`."""
    if not args.quiet:
        print(text)


def result_line(value: Any) -> None:
    """Prints the machine-readable end of a run as timm's benchmark does: `--result`, then one line of JSON."""
    from visiontok.bench.results import jsonable

    print(f"--result\n{json.dumps(jsonable(value))}", flush=True)


def write_results(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Writes rows to `--results-file`, atomically, as JSON, JSON lines or CSV.

    Raises:
        StoreError: the file cannot be written.
    """
    if not args.results_file:
        return
    from visiontok.bench.results import ResultStore, jsonable, to_csv, to_jsonl

    path = Path(args.results_file)
    kind = args.results_format or {".csv": "csv", ".jsonl": "jsonl"}.get(path.suffix, "json")
    if kind == "csv":
        text = to_csv(rows)
    elif kind == "jsonl":
        text = to_jsonl(rows)
    else:
        value = rows[0] if len(rows) == 1 else list(rows)
        text = json.dumps(jsonable(value), indent=1) + "\n"
    ResultStore(path.parent).write_text(path.name, text)


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Lines of `name: value` with the values aligned."""
    items = list(items)
    width = max((len(name) for name, _ in items), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in items)
