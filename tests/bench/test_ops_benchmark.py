"""The benchmarks of ops and models: they agree before they time (K5), store by key, and their tables fill the page."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from visiontok.bench import kernel_calls, tune
from visiontok.errors import MissingDependencyError, ParameterError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("shapes", "store", "limits", "official", "implementations", "op_cases", "ops", "models")
OPS = ("match", "merge", "match_merge", "merge_add_norm", "best_match", "restore", "attention", "votes", "class_row")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The scripts of benchmarks/, which import one another by plain names; forgotten afterwards."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture
def small(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shapes that take no time."""
    shape = bench.shapes.Shape
    shapes = {"flat": shape("flat", 19, 24, 3, 4, cpu=(2,)), "grid": shape("grid", 96, 16, 2, 40, 0, (8, 12), (2,))}
    for module in (bench.shapes, bench.ops):
        monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(bench.limits, "copy_bandwidth", lambda device, nbytes: 1e9)
    monkeypatch.setattr(bench.limits, "product_rate", lambda device, dtype: 1e9)
    return bench


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contestants_agree(small: Any, op: str, dtype: torch.dtype) -> None:
    shape = small.ops.SHAPES["grid" if op in small.op_cases.ON_GRIDS else "flat"]
    case = small.op_cases.build(op, shape, 2, dtype, "cpu")
    assert {"torch", "official"} <= set(case.runs)
    assert set(small.ops.check(case, dtype)) == set(case.runs) - {"slice", "unpatched"}


def test_every_op_is_tested(bench: Any) -> None:
    assert tuple(bench.op_cases.OPS) == OPS
    assert all(any(bench.op_cases.fits(op, shape) for shape in bench.shapes.SHAPES.values()) for op in OPS)


@pytest.mark.parametrize("spoil", [lambda out: out + 0.1, lambda out: out * math.nan])
def test_what_is_wrong_is_not_timed(
    small: Any, spoil: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = small.op_cases.OPS["merge"]

    def wrong(*args: Any) -> Any:
        case = right(*args)
        case.runs["cpp"] = lambda planned: spoil(case.runs["torch"](planned))
        return case

    monkeypatch.setitem(small.op_cases.OPS, "merge", wrong)
    monkeypatch.setattr(small.ops, "FILE", tmp_path / "ops.csv")
    arguments = ["--op", "merge", "match", "--shape", "flat", "--rounds", "2", "--store"]
    assert small.ops.main(arguments) == 1
    printed = capsys.readouterr()
    assert "merge, flat" not in printed.out
    assert "merge, flat, batch 2, float32: not timed, differs from the reference: cpp:" in printed.err
    assert {row["op"] for row in small.store.read(tmp_path / "ops.csv")} == {"match"}


def test_a_run_is_stored_and_drawn(small: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small.ops, "FILE", tmp_path / "ops.csv")
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py", "--store"])
    arguments = ["--op", "merge_add_norm", "--shape", "flat", "--rounds", "2", "--store", "--plot", str(tmp_path)]
    assert small.ops.main(arguments) == 0
    assert small.ops.main(arguments) == 0
    rows = small.store.read(tmp_path / "ops.csv")
    names = [row["implementation"] for row in rows]
    assert len(names) == len(set(names))
    assert {"torch", "official", "slice", "unpatched"} <= set(names)
    first = rows[0]
    assert first["command"] == "python benchmarks/ops.py --store"
    assert first["threads"] == "1"
    assert f"torch={torch.__version__.partition('+')[0]}" in first["versions"]
    # Tokens twice in and slots twice out, four bytes each, and the plan, at the patched 1e9 bytes per second.
    nbytes = 2 * (2 * (19 + 15) * 24 * 4 + 4 * (2 * 19 + 15))
    assert float(first["floor_bytes"]) == nbytes
    assert float(first["floor_ms"]) == pytest.approx(1e-6 * nbytes)
    assert (tmp_path / "ops_flat_b2_float32.png").stat().st_size > 1000


def test_put_replaces_by_key(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    bench.store.put(path, [{"a": 1, "b": "x, y", "ms": 0.123456789}, {"a": 2, "b": "z", "ms": None}], ("a", "b"))
    bench.store.put(path, [{"a": 1, "b": "x, y", "ms": 2.0, "new": True}], ("a", "b"))
    assert bench.store.read(path) == [
        {"a": "1", "b": "x, y", "ms": "2", "new": "True"},
        {"a": "2", "b": "z", "ms": "", "new": ""},
    ]


def test_models_are_checked_timed_and_stored(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.models, "FILE", tmp_path / "models.csv")
    arguments = ["-m", "test_vit", "--r", "8", "-b", "1", "--rounds", "2", "--warm", "1", "--store"]
    assert bench.models.main(arguments) == 0
    rows = {row["implementation"]: row for row in bench.store.read(tmp_path / "models.csv")}
    assert set(rows) == {"baseline", "official", "reference", "automatic", "slice"}
    assert float(rows["baseline"]["speedup"]) == 1
    assert float(rows["official"]["gap"]) < 1e-3
    assert rows["reference"]["uses"] == "torch"
    assert rows["slice"]["tokens"] == "101-53"
    assert float(rows["slice"]["e_method"]) == 1


def test_models_that_differ_are_refused(bench: Any) -> None:
    calls = {"reference": lambda: torch.ones(2, 3), "automatic": lambda: torch.ones(2, 3) + 0.01}
    with pytest.raises(bench.models.Disagreement, match="automatic is 1.0e-02 from reference"):
        bench.models.check(calls, ["reference", "automatic"], torch.float32)
    assert bench.models.check(calls, ["reference", "automatic"], torch.bfloat16)["automatic"] == pytest.approx(0.01)


def test_selected_hides_kernels_and_gives_them_back(bench: Any) -> None:
    from visiontok.ops import dispatch

    op = dispatch.op("match_slots")
    before = [found.name for found in op.implementations]
    with bench.models.selected("reference"):
        assert [found.name for found in op.implementations] == ["torch"]
    assert [found.name for found in op.implementations] == before


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "visiontok_performance_tables", ROOT / "docs" / "performance_tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    tables = _tables()
    assert tables.page() == tables.PAGE.read_text(encoding="utf-8"), "run python docs/build.py"


def test_tables_of_stored_rows(small: Any, bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = _tables()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "_module", lambda name: small.shapes)
    assert set(tables.ops().split()) == {"Nothing", "is", "stored", "yet."}
    base = {"op": "merge", "shape": "flat", "dtype": "float32", "batch": 2, "device": "cpu: X", "isa": "avx2",
            "threads": 1, "versions": "torch=2", "command": "python benchmarks/ops.py", "floor_ms": 0.1}  # fmt: skip
    old = {**base, "implementation": "cpp", "p50_ms": 9.0, "date": "2026-01-01T00:00Z", "versions": "torch=1"}
    rows = [{**base, "implementation": name, "p50_ms": ms, "date": "2026-02-01T00:00Z"}
            for name, ms in (("torch", 0.5), ("cpp", 0.25), ("official", 3.0))]  # fmt: skip
    small.store.put(tmp_path / "ops.csv", [old, *rows], small.ops.KEY)
    last = tables.ops().splitlines()[-1]
    assert last == "| merge | flat | 2 | float32 | 0.500 | 0.250 | 3.000 | 0.100 | 12.0 |"
    with pytest.raises(LookupError, match="no marks <!-- ops: begin -->"):
        tables.filled("nothing", {"ops": "x"})


@pytest.fixture
def table() -> dict[str, Any]:
    """The launch table; skips where it cannot be read."""
    try:
        return tune.shipped()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_every_kernel_of_the_launch_table_can_be_called(table: dict[str, Any]) -> None:
    assert {name.removesuffix("_fp32") for name in table} <= set(kernel_calls.KERNELS)
    with pytest.raises(UnknownNameError, match="Did you mean 'merge'"):
        kernel_calls.call("merj", torch.device("cpu"), torch.float32, 64)


def _times(best: dict[str, int], broken: dict[str, int]) -> Any:
    def of(options: list[dict[str, int]]) -> list[float | None]:
        return [
            None if all(found[name] == value for name, value in broken.items())
            else 1 + sum(abs(math.log2(found[name] / best[name])) for name in best)
            for found in options
        ]  # fmt: skip

    return of


def test_climb_finds_the_best_past_what_fails() -> None:
    first, best = {"tile": 64, "num_warps": 2, "num_stages": 2}, {"tile": 256, "num_warps": 8, "num_stages": 3}
    found = tune.climb(first, _times(best, {"tile": 512}))
    assert found.options == best
    assert found.seconds == 1
    assert found.before == pytest.approx(1 + 2 + 2 + math.log2(1.5))
    assert found.failed > 0


def test_climb_stays_where_nothing_is_clearly_faster() -> None:
    first = {"tile": 64, "num_warps": 4}
    counter = itertools.count()
    found = tune.climb(first, lambda options: [1.0 - 0.01 * (next(counter) % 2) for _ in options])
    assert found.options == first
    with pytest.raises(tune.TuningError, match="fail here"):
        tune.climb(first, lambda options: [None] * len(options))


def test_entries_join_equal_neighbours_and_cover_every_width(tmp_path: Path, table: dict[str, Any]) -> None:
    a, b = {"tile": 1, "num_warps": 4}, {"tile": 2, "num_warps": 4}
    found = [tune.Found("merge", width, options, 1.0, 1.0, 1, 0) for width, options in ((1024, b), (384, a), (768, a))]
    made = tune.entries(found)
    assert made == {"merge": [{"upto": 768, "options": a}, {"upto": None, "options": b}]}
    path = tmp_path / "configs.json"
    changed = tune.merged(path, "sm_90", made)
    assert changed == {**table, "merge": {**table["merge"], "sm_90": made["merge"]}}
    assert tune.shipped()["merge"].get("sm_90") != made["merge"]
    path.write_text("[1]")
    with pytest.raises(ParameterError, match="is no launch table"):
        tune.merged(path, "sm_90", made)
