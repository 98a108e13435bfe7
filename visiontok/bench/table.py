"""Result rows as a plain text table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_NONE = "-"
_HEADER = (
    "model", "reducer", "budget", "tokens", "GMACs", "ratio", "top1 [95 %]", "delta",
    "speed-up [95 %]", "E_total", "E_hw", "E_method",
)  # fmt: skip
_LEFT = 3


def table(rows: Iterable[Row]) -> str:
    """Draws rows as aligned columns; notes and failed trials with their reason follow below.

    Where no speed-up may be claimed (the p20-p80 intervals overlap) the column shows `=`.
    """
    rows = list(rows)
    done = [row for row in rows if row["status"] == "ok"]
    lines = columns([_HEADER, *map(_cells, done)], left=_LEFT) if done else []
    lines += [
        f"{name}: {note}" for name, note in dict.fromkeys((r["reducer"], r["note"]) for r in done if r.get("note"))
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['status'].upper()}: {label(row)}: {row.get('error')}")
    return "\n".join(lines)


def columns(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Pads cells to columns: the first `left` to the left, the others to the right; a rule follows the first row."""
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = [f"{text:{'<' if index < left else '>'}{widths[index]}}" for index, text in enumerate(row)]
        lines.append("  ".join(parts).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def label(row: Row) -> str:
    """`tiny_vit tome gflops=0.02`."""
    return " ".join(part for part in (row["model"], row.get("reducer"), row.get("budget")) if part)


def order(row: Row) -> tuple[Any, ...]:
    """Sort key: by reference model, dense models first, `random` before the methods, less reduction first."""
    rank = {"unreduced": 0, "smaller": 1}.get(row["role"], 2 if row.get("reducer") == "random" else 3)
    return row["reference"], rank, row.get("reducer") or "", -(row.get("gmacs") or 0.0), row.get("budget") or ""


def speedup_text(row: Row) -> str:
    """`1.42x [1.38, 1.47]`, `=` where no speed-up may be claimed, `-` where nothing was compared."""
    if row.get("speedup") is None:
        return _NONE
    if not row.get("speedup_clear"):
        return "="
    return f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def accuracy_text(row: Row) -> str:
    """`97.40 [95.9, 98.4]`."""
    if row.get("top1") is None:
        return _NONE
    return f"{row['top1']:.2f} [{row['top1_low']:.1f}, {row['top1_high']:.1f}]"


def _cells(row: Row) -> list[str]:
    name = row.get("reducer") or ("(unreduced)" if row["role"] == "unreduced" else "(smaller model)")
    tokens = _NONE if row.get("tokens_out") is None else f"{row['tokens_in']}->{row['tokens_out']}"
    ratio = _NONE if row.get("gmacs") is None else f"{100 * row['gmacs'] / row['gmacs_base']:.0f}%"
    delta = _NONE if row["role"] == "unreduced" else _number(row.get("delta"), "+.2f")
    return [
        row["model"], name, row.get("budget") or _NONE, tokens, _number(row.get("gmacs"), ".4g"), ratio,
        accuracy_text(row), delta, speedup_text(row),
        _number(row.get("e_total"), ".2f"), _number(row.get("e_hw"), ".2f"), _number(row.get("e_method"), ".2f"),
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)
