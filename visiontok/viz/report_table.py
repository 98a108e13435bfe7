"""The table of a report and the sentences that keep its reader from over-reading it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from visiontok.viz.pareto import Row, describe_speed

_FAILURES = {"oom": "out of memory", "error": "failed"}
_NONE = "–"


class Column(NamedTuple):
    """One column: its header, the unit below it, the text of a row's cell, and what it is sorted by."""

    title: str
    unit: str
    text: Callable[[Row], str]
    key: Callable[[Row], Any]


def _number(title: str, unit: str, name: str, form: str) -> Column:
    return Column(title, unit, lambda row: _format(row.get(name), form), lambda row: row.get(name))


def _ranged(row: Row, name: str, form: str) -> str:
    ends = [_format(row.get(name + end), form) for end in ("_low", "_high")]
    return _format(row.get(name), form) + ("" if _NONE in ends else f" [{ends[0]}, {ends[1]}]")


def _latency(row: Row) -> str:
    ends = [_format(row.get(f"latency_ms_{end}"), ".3g") for end in ("p20", "p80")]
    return _format(row.get("latency_ms_p50"), ".3g") + ("" if _NONE in ends else f" [{ends[0]}, {ends[1]}]")


def _speed(row: Row) -> str:
    return "1 (reference)" if row["role"] == "unreduced" else describe_speed(row) or _NONE


IDENTITY = (
    Column("Reducer", "", lambda row: row_name(row), lambda row: row_name(row)),
    Column("Budget", "", lambda row: row.get("budget") or _NONE, lambda row: row.get("budget")),
    Column("Model", "", lambda row: row["model"], lambda row: row["model"]),
)
MEASURED = (
    Column("Tokens", "in → out", lambda row: _tokens(row), lambda row: row.get("tokens_out")),
    _number("Compute", "GMACs / image", "gmacs", ".4g"),
    Column("Top-1", "% [95 % interval]", lambda row: _ranged(row, "top1", ".1f"), lambda row: row.get("top1")),
    _number("Change", "points", "delta", "+.2f"),
    Column("Speed-up", "measured [95 % interval]", _speed, lambda row: row.get("speedup")),
    _number("Ideal", "speed-up, ×", "ideal_speedup", ".2f"),
    _number("E total", "", "e_total", ".2f"),
    _number("E hw", "", "e_hw", ".2f"),
    _number("E method", "", "e_method", ".2f"),
    Column("Latency", "ms / batch [p20, p80]", _latency, lambda row: row.get("latency_ms_p50")),
    _number("McNemar", "p-value", "mcnemar_p", ".2g"),
    _number("Throughput", "images / s", "images_per_s", ".4g"),
)


def results_table(rows: Sequence[Row]) -> str:
    """Renders all rows, failed ones included, as a table whose headers sort it.

    Args:
        rows: result rows (`visiontok.bench.schema`).

    Returns:
        An HTML fragment; every value is escaped.
    """
    columns = IDENTITY + MEASURED
    # A column that no row fills would only push the others off a phone's screen.
    shown = [column for column in columns if any(column.key(row) not in (None, "") for row in rows)]
    heads = "".join(_head(column) for column in shown)
    body = "".join(_row(row, shown) for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def row_name(row: Row) -> str:
    """What a row is called in tables: its reducer, or which dense model it is."""
    return {"unreduced": "unreduced", "smaller": "smaller dense model"}.get(row["role"]) or str(row.get("reducer"))


def headline(rows: Iterable[Row]) -> str:
    """Names the best measured result that the statistics support, in one sentence.

    Args:
        rows: result rows.

    Returns:
        Plain text; says so where nothing qualifies.
    """
    reduced = [row for row in rows if row["status"] == "ok" and row["role"] == "reduced"]
    if not any(row.get("speedup") is not None for row in reduced):
        return "Speed was not measured; compare accuracy and compute below."
    timed = [row for row in reduced if row.get("speedup_clear") and (row.get("speedup") or 0) > 1]
    if not timed:
        return "No reduced model was measurably faster than the unreduced one on this machine."
    kept = [row for row in timed if row.get("mcnemar_p") is not None and row["mcnemar_p"] >= 0.05]
    if not kept:
        best = max(timed, key=lambda row: row["speedup"])
        return (
            f"Fastest: {row_name(best)} {best.get('budget') or ''} at {describe_speed(best)}, see its accuracy below."
        )
    best = max(kept, key=lambda row: row["speedup"])
    name = f"{row_name(best)} {best.get('budget') or ''}".strip()
    return (
        "Fastest reduced model whose accuracy cannot be told from the unreduced model's (McNemar p ≥ 0.05): "
        f"{name}, {describe_speed(best)} at {_format(best.get('delta'), '+.2f')} points."
    )


def caveats(rows: Sequence[Row]) -> list[str]:
    """Lists what a reader must know before quoting a number from these rows.

    Args:
        rows: result rows.

    Returns:
        Plain sentences, none of them escaped.
    """
    good = [row for row in rows if row["status"] == "ok"]
    notes = [f"{len(rows) - len(good)} of {len(rows)} trials failed; they stay in the table."] * (len(rows) > len(good))
    return notes + _timing_notes(good) + _accuracy_notes(good) + _own_notes(good)


def _own_notes(good: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row['reducer']}: {row['note']}." for row in good if row.get("note")))


def _timing_notes(good: Sequence[Row]) -> list[str]:
    timed = [row for row in good if row.get("speedup") is not None and row["role"] != "unreduced"]
    unclear = sum(not row.get("speedup_clear") for row in timed)
    bound = sum(bool(row.get("launch_bound")) for row in good)
    notes = []
    if unclear:
        notes.append(
            f"{unclear} trials have no speed-up to report: their time spans (p20 to p80) overlap the reference's. "
            "The table says 'not distinguishable', the plot draws them hollow."
        )
    if bound:
        notes.append(
            f"{bound} trials are launch-bound: the GPU waits for kernels to be launched, so fewer tokens cannot help. "
            "Use a larger batch or torch.compile."
        )
    if any(row.get("clock") == "process" for row in timed):
        notes.append("Time is process CPU time: other programs on the machine do not count, nor does waiting.")
    if timed:
        notes.append(
            "Speed-ups hold for this machine, batch size and data type; each is a ratio of medians, timed in turns "
            "with the unreduced model."
        )
    notes += sorted({row["oracle_note"] for row in good if row.get("oracle_note")})
    return notes


def _accuracy_notes(good: Sequence[Row]) -> list[str]:
    images = sorted({row["n_images"] for row in good if row.get("n_images")})
    unread = max((row.get("n_failed") or 0 for row in good), default=0)
    compared = sum(row["role"] == "reduced" and row.get("mcnemar_p") is not None for row in good)
    notes = []
    if images:
        notes.append(f"Accuracy is over {' or '.join(map(str, images))} images; intervals are Wilson's at 95 %.")
    if unread:
        notes.append(f"{unread} images could not be read. They were left out and counted, not replaced.")
    if compared > 1:
        notes.append(f"{compared} reduced models are compared at once: by chance, one in twenty crosses p = 0.05.")
    if good and not any(row.get("reducer") == "random" for row in good):
        notes.append("No random baseline was run: a method has to beat random removal at equal compute.")
    if good and not any(row["role"] == "smaller" for row in good):
        notes.append("No smaller dense model was run: it is the alternative that every reduction has to beat.")
    return notes


def _head(column: Column) -> str:
    unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
    css = ' class="text"' if column in IDENTITY else ""
    return f'<th scope="col"{css}><button type="button">{escape(column.title)}</button>{unit}</th>'


def _row(row: Row, shown: Sequence[Column]) -> str:
    cells = [column for column in shown if column in IDENTITY]
    failed = row["status"] != "ok"
    css = "failed" if failed else "baseline" if row["role"] != "reduced" or row.get("reducer") == "random" else ""
    out = [_cell(column, row, "th" if index == 0 else "td") for index, column in enumerate(cells)]
    if failed:
        text = f"{_FAILURES.get(row['status'], row['status'])}: {row.get('error') or 'no message'}"
        out.append(f'<td class="wide" colspan="{len(shown) - len(cells)}">{escape(text)}</td>')
    else:
        out += [_cell(column, row, "td") for column in shown[len(cells) :]]
    return f'<tr class="{css}">{"".join(out)}</tr>' if css else f"<tr>{''.join(out)}</tr>"


def _cell(column: Column, row: Row, tag: str) -> str:
    key = column.key(row)
    value = "" if key is None else escape(str(key))
    css = ' class="text"' if column in IDENTITY else ""
    scope = ' scope="row"' if tag == "th" else ""
    return f'<{tag}{scope}{css} data-value="{value}">{escape(str(column.text(row)))}</{tag}>'


def _tokens(row: Row) -> str:
    return f"{_format(row.get('tokens_in'), 'd')} → {_format(row.get('tokens_out'), 'd')}"


def _format(value: Any, form: str) -> str:
    return _NONE if value is None else format(value, form)
