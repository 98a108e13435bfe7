"""Accuracy against compute and against measured speed, static (matplotlib) and interactive (plotly).

Both drawings read the same series, so they can never disagree. Colors are Okabe and Ito's, and every series has a
marker of its own, so the plots survive color blindness and gray printers.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from visiontok.errors import MissingDependencyError, ParameterError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Row = Mapping[str, Any]

AXES = {
    "gmacs": "Compute per image (GMACs)",
    "speedup": "Measured speed (× unreduced)",
}
ACCURACY_AXIS = "Top-1 accuracy (%)"


class Look(NamedTuple):
    """Color and marker of a series, with the marker's name in matplotlib and in plotly."""

    color: str
    static: str
    interactive: str
    dash: bool = False


_LOOKS = (
    Look("#0072B2", "o", "circle"),
    Look("#D55E00", "s", "square"),
    Look("#009E73", "^", "triangle-up"),
    Look("#CC79A7", "D", "diamond"),
    Look("#E69F00", "v", "triangle-down"),
    Look("#56B4E9", "P", "cross"),
)
_BASELINE_LOOKS = {1: Look("#767676", "X", "x", dash=True), 2: Look("#222222", "*", "star", dash=True)}


@dataclass(frozen=True)
class Point:
    """One trial in the plane; a hollow point is one whose speed could not be told from the reference's."""

    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]
    label: str
    hover: str
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """What is drawn in one color: a reducer over its budgets, `random`, or the dense models."""

    name: str
    look: Look
    dense: bool
    points: list[Point]


def pareto_series(rows: Iterable[Row], x: str = "gmacs") -> list[Series]:
    """Sorts result rows into the series of a Pareto plot.

    Args:
        rows: result rows (`visiontok.bench.schema`); failed ones and those without accuracy or `x` are left out.
        x: `gmacs` (compute per image) or `speedup` (measured, against the unreduced model).

    Returns:
        Reducers in alphabetical order, then `random`, then the dense models; points by rising `x`.

    Raises:
        ParameterError: `x` is no axis.
    """
    if x not in AXES:
        raise ParameterError(f"x={x!r} is no axis of a Pareto plot; choose one of {', '.join(AXES)}")
    usable = [row for row in rows if row.get("status") == "ok" and row.get("top1") is not None]
    references = {row["reference"] for row in usable}
    groups: dict[tuple[int, str], list[Point]] = {}
    for row in usable:
        point = _point(row, x)
        if point is not None:
            rank = 2 if row["role"] != "reduced" else int(row["reducer"] == "random")
            name = "dense models" if rank == 2 else str(row["reducer"])
            groups.setdefault((rank, f"{name} · {row['reference']}" if len(references) > 1 else name), []).append(point)
    return [
        Series(name, _LOOKS[index % len(_LOOKS)] if rank == 0 else _BASELINE_LOOKS[rank], rank == 2, _sorted(points))
        for index, ((rank, name), points) in enumerate(sorted(groups.items()))
    ]


def pareto_png(rows: Iterable[Row], x: str = "gmacs", *, title: str | None = None, dpi: int = 150) -> bytes:
    """Draws accuracy against `x` as a PNG on white, readable at the width of a paper's page.

    Args:
        rows: result rows, as in `pareto_series`.
        x: `gmacs` or `speedup`.
        title: text above the plot.
        dpi: dots per inch of the 7 x 4.5 inch figure.

    Returns:
        The bytes of the file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ParameterError: `x` is no axis.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'visiontok[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = pareto_series(rows, x)
    for series in drawn:
        xs, ys = [point.x for point in series.points], [point.y for point in series.points]
        x_bars, y_bars = _spans(series.points, "x"), _spans(series.points, "y")
        color, marker = series.look.color, series.look.static
        name = _literal(series.name)
        axes.errorbar(xs, ys, xerr=x_bars, yerr=y_bars, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.5)
        axes.plot(xs, ys, color=color, linestyle="--" if series.look.dash else "-", linewidth=1.4, zorder=2)
        axes.plot([], [], color=color, marker=marker, linestyle="--" if series.look.dash else "-", label=name)
        for point in series.points:
            size, fill = (13 if marker == "*" else 7), "white" if point.hollow else color
            axes.plot(point.x, point.y, marker=marker, markersize=size, color=color, markerfacecolor=fill, zorder=3)
            if series.dense:
                axes.annotate(
                    _literal(point.label),
                    (point.x, point.y),
                    xytext=(-4 if _side(point, drawn)[0] == "left" else 4, 9),
                    textcoords="offset points",
                    ha=_side(point, drawn)[1],
                )
    axes.set(xlabel=AXES[x], ylabel=ACCURACY_AXIS)
    axes.margins(x=0.1, y=0.12)
    axes.set_title(_literal(title or ""), fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def pareto_figure(rows: Iterable[Row], x: str = "gmacs") -> Figure:
    """Builds the interactive plot of accuracy against `x`; its background is transparent, for light and dark pages.

    Args:
        rows: result rows, as in `pareto_series`.
        x: `gmacs` or `speedup`.

    Returns:
        A plotly figure; every text in it is escaped.

    Raises:
        MissingDependencyError: plotly is not installed.
        ParameterError: `x` is no axis.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingDependencyError("interactive plots need plotly: pip install 'visiontok[bench]'") from error
    figure = go.Figure()
    drawn = pareto_series(rows, x)
    for series in drawn:
        points, look = series.points, series.look
        shared: dict[str, Any] = {
            "name": html.escape(series.name),
            "legendgroup": series.name,
            "line": {"color": look.color, "width": 2, "dash": "dash" if look.dash else "solid"},
            "meta": "ink" if series.dense else None,
        }
        marker = {"size": 15 if look.static == "*" else 10, "color": look.color}
        # The legend copies the first point of a trace, which may be a hollow one: it gets an empty trace of its own.
        key = {"mode": "lines+markers", "marker": {**marker, "symbol": look.interactive}}
        figure.add_scatter(x=[None], y=[None], **key, **shared)
        figure.add_scatter(
            x=[point.x for point in points],
            y=[point.y for point in points],
            showlegend=False,
            mode="lines+markers+text" if series.dense else "lines+markers",
            text=[html.escape(point.label) for point in points],
            textposition=[f"top {_side(point, drawn)[0]}" for point in points],
            hovertext=[point.hover for point in points],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={**marker, "symbol": [look.interactive + "-open" * point.hollow for point in points]},
            error_x=_bars(points, "x"),
            error_y=_bars(points, "y"),
            cliponaxis=False,
            **shared,
        )
    figure.update_layout(
        template="none",
        xaxis={"title": {"text": AXES[x], "font": {"size": 13}}, "zeroline": False, "automargin": True},
        yaxis={"title": {"text": ACCURACY_AXIS, "font": {"size": 13}}, "zeroline": False, "automargin": True},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        margin={"l": 56, "r": 24, "t": 24, "b": 96},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
    )
    return figure


def describe_speed(row: Row) -> str:
    """Says how fast a trial is, or that its speed cannot be told from the reference's.

    Args:
        row: a result row.

    Returns:
        `1.42× [1.38, 1.47]`, `not distinguishable` where the intervals overlap, or an empty string if not timed.
    """
    if row.get("speedup") is None:
        return ""
    if row.get("role") != "unreduced" and not row.get("speedup_clear"):
        return "not distinguishable"
    low, high = row.get("speedup_low"), row.get("speedup_high")
    interval = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
    return f"{row['speedup']:.2f}×{interval}"


def _point(row: Row, x: str) -> Point | None:
    unreduced = row["role"] == "unreduced"
    position = 1.0 if x == "speedup" and unreduced else row.get(x)
    if position is None:
        return None
    label = str(row["model"] if row["role"] != "reduced" else row.get("budget") or "")
    timed = x == "speedup" and not unreduced
    return Point(
        x=position,
        y=row["top1"],
        x_bar=_bar(position, row.get("speedup_low"), row.get("speedup_high")) if timed else (0.0, 0.0),
        y_bar=_bar(row["top1"], row.get("top1_low"), row.get("top1_high")),
        label=label,
        hover=_hover(row),
        hollow=timed and not row.get("speedup_clear"),
    )


def _hover(row: Row) -> str:
    name = row["model"] if row["role"] != "reduced" else f"{row['reducer']} {row.get('budget') or ''} on {row['model']}"
    lines = [f"<b>{html.escape(str(name))}</b>", f"top-1 {row['top1']:.2f} %"]
    if row.get("top1_low") is not None and row.get("top1_high") is not None:
        lines[-1] += f" [{row['top1_low']:.2f}, {row['top1_high']:.2f}]"
    if row.get("gmacs") is not None:
        lines.append(f"{row['gmacs']:.4g} GMACs per image")
    if row.get("tokens_in") is not None and row.get("tokens_out") is not None:
        lines.append(f"tokens {row['tokens_in']} → {row['tokens_out']}")
    if describe_speed(row) and row["role"] != "unreduced":
        lines.append(f"speed {describe_speed(row)}")
    return "<br>".join(lines)


def _bar(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """Distances from the value to the ends of its interval, as plots want them."""
    return (0.0 if low is None else max(0.0, value - low), 0.0 if high is None else max(0.0, high - value))


def _side(point: Point, drawn: list[Series]) -> tuple[str, str]:
    """Where a label stays inside the plot and clear of its own error bar, for plotly (side) and matplotlib (anchor)."""
    xs = [other.x for series in drawn for other in series.points]
    return ("right", "left") if 2 * point.x < min(xs) + max(xs) else ("left", "right")


def _spans(points: list[Point], axis: str) -> list[list[float]]:
    bars = [point.x_bar if axis == "x" else point.y_bar for point in points]
    return [[bar[0] for bar in bars], [bar[1] for bar in bars]]


def _bars(points: list[Point], axis: str) -> dict[str, Any]:
    low, high = _spans(points, axis)
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1, "width": 3}


def _sorted(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda point: (point.x, point.y))


def _literal(text: str) -> str:
    """Keeps matplotlib from reading `$` as mathematics."""
    return text.replace("$", r"\$")
