"""One self-contained HTML file: plots, table, token maps, environment; nothing is fetched, so it opens from anywhere.

Scripts are pinned by their hash in a content security policy that allows no connection. A value that slipped through
escaping could therefore neither run nor call home.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontok.bench.results import write_atomic
from visiontok.errors import MissingDependencyError
from visiontok.viz.pareto import Row, pareto_figure, pareto_png, pareto_series
from visiontok.viz.report_table import caveats, headline, results_table

if TYPE_CHECKING:
    from PIL import Image

_PLOTS = {"gmacs": "Accuracy against compute", "speedup": "Accuracy against measured speed"}

_EFFICIENCIES = """
<p>A reduction that removes a third of the arithmetic rarely makes a model a third faster. With
S = time of the unreduced model / time of the reduced one, S<sub>ideal</sub> = ratio of their GMACs, and the
<em>oracle</em> = the same token counts obtained for free by cutting <code>x[:, :K]</code>:</p>
<dl>
<dt>E total = S / S<sub>ideal</sub></dt><dd>how much of the saved arithmetic became speed</dd>
<dt>E hw = S<sub>oracle</sub> / S<sub>ideal</sub></dt><dd>what this machine allows at these sizes, for any method</dd>
<dt>E method = S / S<sub>oracle</sub></dt><dd>what choosing and merging the tokens costs; 1 is free</dd>
</dl>
<p class="soft">GMACs are what papers call GFLOPs (DeiT-S: 4.6). The unreduced model always runs fused attention.</p>
"""


def write_report(
    rows: Sequence[Row],
    out: str | Path,
    *,
    title: str = "visiontok sweep",
    token_maps: Sequence[tuple[str, Image.Image]] = (),
    environment: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Path:
    """Writes the report of a sweep as one HTML file, atomically.

    Args:
        rows: result rows in the schema of `visiontok.bench.schema`, failed ones included.
        out: the file to write; folders are created. A folder gets `report.html`.
        title: heading of the page.
        token_maps: `(caption, picture)` pairs.
        environment: versions, device and the like; nested mappings are flattened.
        command: the command line that reproduces the rows.

    Returns:
        The path of the file.

    Raises:
        MissingDependencyError: matplotlib or plotly is not installed.
        OSError: the file cannot be written.
    """
    path = Path(out)
    path = path / "report.html" if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render_report(rows, title=title, token_maps=token_maps, environment=environment, command=command)
    write_atomic(path, page.encode("utf-8"))
    return path


def render_report(
    rows: Sequence[Row],
    *,
    title: str = "visiontok sweep",
    token_maps: Sequence[tuple[str, Image.Image]] = (),
    environment: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> str:
    """Builds the page of `write_report` as text; same arguments."""
    plots = _plots(rows)
    scripts = [_plotly_source()] if plots else []
    scripts.append(_asset("report.js"))
    sections = [
        ("In short", f"<p>{escape(headline(rows))}</p>"),
        ("Accuracy, compute, speed", plots),
        ("All trials", results_table(rows) if rows else '<p class="soft">No trials.</p>'),
        ("Before quoting a number", _list(caveats(rows))),
        ("Where the tokens went", _token_maps(token_maps)),
        ("The three efficiencies", _EFFICIENCIES),
        ("Command", f"<pre>{escape(command)}</pre>" if command else ""),
        ("Environment", _definitions(_flatten(environment or {}))),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    failed = sum(row["status"] != "ok" for row in rows)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    counts = f"{len(rows)} trials" + (f", {failed} failed" if failed else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_asset('report.css')}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{counts} · written {made}</p></header>'
        f"{body}</main>{''.join(f'<script>{source}</script>' for source in scripts)}</body></html>\n"
    )


def _plots(rows: Sequence[Row]) -> str:
    cards = []
    for axis, name in _PLOTS.items():
        if not pareto_series(rows, axis):
            continue
        # JSON inside a script element must not be able to close it.
        data = str(pareto_figure(rows, axis).to_json()).replace("<", "\\u003c")
        cards.append(
            f'<figure class="card" data-plot="{axis}"><h3>{name}</h3><div class="plot"></div>'
            f'<img class="static" alt="{name}" src="{_data_uri(pareto_png(rows, axis), "image/png")}">'
            f'<script type="application/json">{data}</script></figure>'
        )
    if not cards:
        return ""
    note = "Bars are 95 % intervals. Dashed: random removal, and the dense models that a reduction has to beat."
    return f'<div class="plots">{"".join(cards)}</div><p class="soft">{note}</p>'


def _plotly_source() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError("the report needs plotly: pip install 'visiontok[bench]'") from error
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def _token_maps(pictures: Sequence[tuple[str, Image.Image]]) -> str:
    figures = []
    for caption, picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        source = _data_uri(buffer.getvalue(), "image/png")
        # A strip keeps a readable width on a phone and scrolls there instead of shrinking.
        size = f'width="{picture.width}" height="{picture.height}" style="min-width:{min(picture.width, 720)}px"'
        figures.append(
            f'<figure class="card"><div class="pan"><img {size} src="{source}" alt="{escape(caption)}"></div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    if not figures:
        return ""
    note = (
        "Patches of one color share a token; an outlined region holds one token's patches in its mean color, parts "
        "of one group have borders of one color, and hatched gray is dropped (or, in a span, waits)."
    )
    return f'<p class="soft">{note}</p><div class="maps">{"".join(figures)}</div>'


def _list(sentences: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(text)}</li>" for text in sentences)}</ul>' if sentences else ""


def _flatten(values: Mapping[str, Any], head: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{head}{name}"
        pairs += _flatten(value, f"{label} · ") if isinstance(value, Mapping) else [(label, str(value))]
    return pairs


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in pairs)}</dl>" if pairs else ""


def _policy(scripts: Sequence[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode() for source in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"


def _data_uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _asset(name: str) -> str:
    return (resources.files("visiontok.viz") / "assets" / name).read_text(encoding="utf-8")
