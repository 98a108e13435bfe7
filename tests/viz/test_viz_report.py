"""Plots and the HTML report: what they show, that they fetch nothing, and that user text stays text."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

from visiontok.bench.schema import check_row
from visiontok.errors import ParameterError
from visiontok.viz import pareto_figure, pareto_png, write_report
from visiontok.viz.pareto import describe_speed, pareto_series
from visiontok.viz.report_table import caveats, headline

EVIL = "<img src=x onerror=alert(1)>"


def test_synthetic_rows_follow_the_schema(sweep: Any) -> None:
    assert [check_row(one) for one in sweep] == [[]] * len(sweep)


def test_series_put_baselines_last_and_leave_failures_out(sweep: Any) -> None:
    series = pareto_series(sweep, "gmacs")
    assert [one.name for one in series] == ["pitome", "tome", "random", "dense models"]
    assert [len(one.points) for one in series] == [4, 4, 4, 2]
    assert all(a.x <= b.x for one in series for a, b in zip(one.points, one.points[1:]))
    assert len({one.look.static for one in series}) == 4, "told apart without color"


def test_unclear_speeds_are_hollow_and_the_reference_sits_at_one(sweep: Any) -> None:
    by_name = {one.name: one.points for one in pareto_series(sweep, "speedup")}
    assert [point.hollow for point in by_name["tome"]] == [True, False, False, False]
    assert by_name["dense models"][0].x == 1.0
    assert by_name["dense models"][0].x_bar == (0.0, 0.0)
    assert by_name["tome"][1].x_bar == pytest.approx((0.04, 0.05))


def test_several_references_are_told_apart(row: Any) -> None:
    rows = [row(), row(model="deit_small", reference="deit_small")]
    assert [one.name for one in pareto_series(rows)] == ["tome · deit_small", "tome · tiny_vit"]


def test_unknown_axis_is_named() -> None:
    with pytest.raises(ParameterError, match="x='watts' is no axis"):
        pareto_series([], "watts")


@pytest.mark.parametrize("axis", ["gmacs", "speedup"])
def test_both_drawings_carry_titles_with_units(axis: str, sweep: Any) -> None:
    figure = pareto_figure(sweep, axis)
    assert "(%)" in figure.layout.yaxis.title.text
    assert ("GMACs" if axis == "gmacs" else "×") in figure.layout.xaxis.title.text
    picture = Image.open(io.BytesIO(pareto_png(sweep, axis, title="$x^2$ is text")))
    assert picture.size == (1050, 675)
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_no_speed_up_is_printed_where_intervals_overlap(row: Any) -> None:
    assert describe_speed(row()) == "1.31× [1.27, 1.35]"
    assert describe_speed(row(speedup_clear=False)) == "not distinguishable"
    assert describe_speed(row(speedup=None)) == ""
    page_rows = [row(speedup=1.7531, speedup_low=1.7, speedup_high=1.8, speedup_clear=False)]
    assert headline(page_rows).startswith("No reduced model was measurably faster")
    assert any("no speed-up to report" in text for text in caveats(page_rows))


def test_headline_of_what_was_not_timed(row: Any) -> None:
    assert headline([row(speedup=None, speedup_clear=None)]).startswith("Speed was not measured")


def test_headline_names_the_fastest_that_statistics_support(row: Any, sweep: Any) -> None:
    assert "tome r=3, 1.19× [1.15, 1.24] at -0.40 points" in headline(sweep)
    assert "see its accuracy" in headline([row(mcnemar_p=0.001)])


def test_caveats_name_what_is_missing(row: Any, sweep: Any) -> None:
    text = " ".join(caveats([row(), row(n_failed=2, launch_bound=True, oracle_note="no oracle for PRE")]))
    for said in ("No random baseline", "No smaller dense model", "2 images could not be read", "launch-bound", "PRE"):
        assert said in text
    assert caveats([]) == []
    assert "1 of 15 trials failed" in " ".join(caveats(sweep))


class Links(HTMLParser):
    """Collects everything in a page that a browser could load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = ("src", "href", "srcset", "action", "data", "poster", "formaction")
        self.urls += [value or "" for name, value in attrs if name in loading]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, row: Any, new_sweep: Any) -> Path:
    """A report in which every text that a user controls is hostile."""
    rows = [*new_sweep(), row(reducer=EVIL, budget=EVIL, model=f"</script>{EVIL}", oracle_note=EVIL)]
    rows.append(row(status="error", error=f"cannot read {EVIL}.jpg", top1=None, gmacs=None, speedup=None))
    maps = [(f"{EVIL}.jpg", Image.fromarray(np.zeros((32, 32), np.uint8)))]
    return write_report(
        rows,
        tmp_path_factory.mktemp("report") / "new folder" / "report.html",
        title=EVIL,
        token_maps=maps,
        environment={"device": EVIL, "versions": {EVIL: "</dl>"}},
        command=f"visiontok sweep --data-dir '{EVIL}'",
    )


def test_report_loads_nothing_and_escapes_everything(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.handlers == []
    assert [url for url in links.urls if not url.startswith("data:")] == []
    assert EVIL not in text
    assert f"{EVIL}.jpg".replace("<", "&lt;").replace(">", "&gt;") in text
    assert "default-src 'none'" in text


def test_report_goes_into_a_folder_and_survives_no_rows(tmp_path: Path) -> None:
    path = write_report([], tmp_path)
    assert path == tmp_path / "report.html"
    assert "No trials" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_report_without_plots_stays_small(tmp_path: Path, row: Any) -> None:
    path = write_report([row(top1=None)], tmp_path / "timing.html")
    assert path.stat().st_size < 50_000, "plotly is inlined only where it draws"


@pytest.mark.browser
def test_report_opens_from_a_file(report: Path, watched: Any, tmp_path: Path) -> None:
    page = watched.page
    page.goto(report.as_uri())
    page.wait_for_selector("figure.live .main-svg")
    page.wait_for_timeout(300)
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert page.title() == EVIL
    assert page.locator("figure.live").count() == 2
    assert page.locator(".maps img").evaluate_all("all => all.every(one => one.naturalWidth > 0)")
    assert page.locator("img[src=x]").count() == 0
    assert watched.errors == []
    assert watched.external(report.as_uri()) == []


@pytest.mark.browser
def test_report_table_sorts_both_ways_with_failures_last(report: Path, watched: Any) -> None:
    page = watched.page
    page.goto(report.as_uri())
    head = page.get_by_role("columnheader", name="Compute")
    column = head.evaluate("one => one.cellIndex")
    read = f"all => all.map(one => one.cells[{column}]?.dataset.value ?? '')"
    for direction in ("ascending", "descending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = page.locator("tbody tr").evaluate_all(read)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=direction == "descending")
        assert values[-2:] == ["", ""]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_report_never_scrolls_sideways(report: Path, watched: Any, width: int) -> None:
    watched.page.set_viewport_size({"width": width, "height": 800})
    watched.page.goto(report.as_uri())
    watched.page.wait_for_selector("figure.live .main-svg")
    assert watched.page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_report_shows_static_plots_without_scripts(report: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert [page.locator("img.static").nth(index).is_visible() for index in range(2)] == [True, True]
    context.close()


def test_plot_data_is_valid_json_inside_its_element(report: Path) -> None:
    chunks = report.read_text(encoding="utf-8").split('<script type="application/json">')[1:]
    assert len(chunks) == 2
    for chunk in chunks:
        assert json.loads(chunk.split("</script>")[0])["data"]
