"""Every golden file: compared completely, or skipped for a reason that is on record and can only go away."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_case import BUNDLED, Case, discover, flat, golden_folder, implemented_names

# `golden_<method>.py` runs the files of a method: `run_op` and `run_model`, optionally `ATOL32` and
# `missing_backbone(case)`, the family that a golden model needs and the package lacks.
_MODULES = {
    path.stem.removeprefix("golden_"): importlib.import_module(path.stem)
    for path in sorted(Path(__file__).parent.glob("golden_*.py"))
    if path.stem not in ("golden_case", "golden_models")
}
RUNNERS: dict[str, dict[str, Callable[[Case], None]]] = {
    method: {level: getattr(module, f"run_{level}") for level in ("op", "model") if hasattr(module, f"run_{level}")}
    for method, module in _MODULES.items()
}
EXPECTED_SKIPS: dict[str, str] = json.loads((Path(__file__).parent / "skips.json").read_text())

CASES = discover(golden_folder())


def skip_reason(case: Case) -> tuple[str, str] | None:
    """`(key, reason)` if the case cannot run yet: its method, or the model family that it needs, is not there."""
    if case.method not in RUNNERS and flat(case.method) not in implemented_names():
        return case.method, f"method {case.method} is not implemented yet"
    missing = getattr(_MODULES.get(case.method), "missing_backbone", None)
    family = None if missing is None else missing(case)
    if family is None:
        return None
    return f"{case.method}/{case.params['patch']}", f"needs a backbone that does not exist yet: {family}"


def run(case: Case) -> None:
    """Compares every `out.*` tensor of a case; an implemented method without a runner fails."""
    runner = RUNNERS.get(case.method, {}).get(case.level)
    assert runner is not None, f"method {case.method} is implemented, but nothing runs its {case.level} files"
    case.atol32 = getattr(_MODULES[case.method], "ATOL32", case.atol32)
    runner(case.load())
    case.finish()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden(case: Case) -> None:
    skip = skip_reason(case)
    if skip is not None:
        pytest.skip(skip[1])
    run(case)


def test_skips_only_shrink() -> None:
    found = dict(skip for skip in map(skip_reason, CASES) if skip is not None)
    new = {key: reason for key, reason in found.items() if EXPECTED_SKIPS.get(key) != reason}
    assert not new, f"golden files that used to run, or were never seen, are skipped: {new}"
    present = {case.method for case in CASES} | {f"{c.method}/{c.params.get('patch')}" for c in CASES}
    stale = sorted(key for key in EXPECTED_SKIPS if key in present and key not in found)
    assert not stale, f"these run now; take them out of tests/golden/skips.json: {stale}"


def test_bundled_files_are_copies() -> None:
    bundled = discover(BUNDLED)
    assert {(case.method, case.level) for case in bundled} >= {(m, "op") for m in RUNNERS if "op" in RUNNERS[m]}
    assert sum(case.path.stat().st_size for case in bundled) < 1_000_000
    for case in bundled:
        original = golden_folder() / case.path.relative_to(BUNDLED)
        assert not original.exists() or original.read_bytes() == case.path.read_bytes(), case.id


@pytest.mark.parametrize("case", discover(BUNDLED), ids=lambda case: case.id)
def test_bundled(case: Case) -> None:
    run(case)
