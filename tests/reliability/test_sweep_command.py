"""`visiontok sweep` as a whole: baselines, resuming, exports, the report (W1, W3, W5, W7)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visiontok.bench import sweep, trial
from visiontok.bench.results import TrialSpec
from visiontok.bench.schema import COLUMNS
from visiontok.bench.table import table
from visiontok.cli import main

pytest.importorskip("timm")
pytest.importorskip("sklearn")

QUICK = ["--max-images", "20", "--num-warm-iter", "1", "--num-bench-iter", "2", "-b", "10"]
FIXED = ("trial_key", "role", "reducer", "budget", "tokens", "gmacs", "top1", "top5", "delta", "n_images", "agreement")


def run(folder: Path, *extra: str) -> int:
    return main(["sweep", "--results-dir", str(folder), "--reducer", "tome", "--r", "4", *QUICK, *extra])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def fixed(folder: Path) -> list[dict]:
    return [{name: row.get(name) for name in FIXED} for row in rows(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert run(folder, "--no-report", "--quiet") == 0
    return folder


def test_baselines_are_always_there(finished: Path) -> None:
    found = [(row["role"], row["model"], row["reducer"]) for row in rows(finished)]
    assert found == [
        ("unreduced", "tiny_vit", None),
        ("smaller", "tiny_vit_small_dense", None),
        ("reduced", "tiny_vit", "random"),
        ("reduced", "tiny_vit", "tome"),
    ]
    assert (finished / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_second_run_reads_everything(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (finished / "trials").iterdir()}
    monkeypatch.setattr(trial, "attempt", lambda *_: pytest.fail("a finished trial was run again"))
    assert run(finished, "--no-report", "--quiet") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (finished / "trials").iterdir()} == before


def test_interrupted_sweep_ends_in_the_same_rows(finished: Path, tmp_path: Path) -> None:
    real, count = trial.attempt, [0]

    class Killed(BaseException):
        pass

    def interrupted(spec: TrialSpec, cache: Path, quiet: bool = True) -> dict:
        count[0] += 1
        if count[0] == 3:
            raise Killed
        return real(spec, cache, quiet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "attempt", interrupted)
        with pytest.raises(Killed):
            run(tmp_path, "--no-report", "--quiet")
    assert len(list((tmp_path / "trials").iterdir())) == 2
    assert run(tmp_path, "--no-report", "--quiet") == 0
    assert fixed(tmp_path) == fixed(finished)


def test_dry_run_runs_nothing(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "new", "--dry-run") == 0
    assert capsys.readouterr().out.count("to run") == 4
    assert not (tmp_path / "new").exists()
    assert run(finished, "--dry-run") == 0
    assert capsys.readouterr().out.count("done") == 4


def test_no_resume_refuses_old_results(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(finished, "--no-resume") == 2
    assert "holds results already" in capsys.readouterr().err


def test_failed_trials_fail_the_run_but_not_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--results-dir", str(tmp_path), "--reducer", "cubist", "--tokens", "37", "--no-report", *QUICK]
    assert main([*command, "--no-timing"]) == 1
    captured = capsys.readouterr()
    assert "1 trial(s) failed; --retry-errors runs them again" in captured.err
    assert "ERROR: tiny_vit cubist tokens=37: " in captured.out
    assert json.loads(captured.out.splitlines()[-1])["ok"] == 3


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "results") == 1
    assert "cannot create results in" in capsys.readouterr().err


def test_report_command_draws_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    out = tmp_path / "again.html"
    assert main(["report", str(finished), "-o", str(out)]) == 0
    assert "E_method" in capsys.readouterr().out
    page = out.read_text()
    assert "<html" in page
    assert "tome" in page
    assert "data:image/png;base64," in page


def test_grid_of_a_timm_model() -> None:
    specs = sweep.grid(["deit_small_patch16_224"], ["tome", "random"], [{"r": 8}, {"r": (16, -1.0)}], data="none")
    assert [(spec.model, spec.reducer, spec.budget) for spec in specs] == [
        ("deit_small_patch16_224", None, ""),
        ("deit_tiny_patch16_224", None, ""),
        ("deit_small_patch16_224", "random", "r=8"),
        ("deit_small_patch16_224", "random", "r=(16,-1.0)"),
        ("deit_small_patch16_224", "tome", "r=8"),
        ("deit_small_patch16_224", "tome", "r=(16,-1.0)"),
    ]
    assert specs[1].reference == "deit_small_patch16_224"
    assert len({spec.key for spec in specs}) == 6


def test_shares_become_targets() -> None:
    specs = sweep.grid(
        ["tiny_vit"], ["tome"], [], shares=[0.7], smaller={"tiny_vit": None}, params={"prop_attn": False}
    )
    assert [spec.reducer for spec in specs] == [None, "random", "tome"]
    assert specs[2].params == {"gflops": specs[1].params["gflops"], "prop_attn": False}
    assert 0.02 < specs[1].params["gflops"] < 0.03


def test_table_prints_no_speedup_it_cannot_tell() -> None:
    spec = TrialSpec("tiny_vit", "tome", {"r": 4})
    row = spec.identity_row() | {
        "status": "ok", "tokens_in": 65, "tokens_out": 17, "gmacs": 0.5, "gmacs_base": 1.0, "top1": 97.5,
        "top1_low": 96.0, "top1_high": 98.5, "delta": -0.25, "speedup": 1.3, "speedup_low": 1.2, "speedup_high": 1.4,
        "speedup_clear": True, "e_total": 0.65, "e_hw": 0.9, "e_method": 0.72,
    }  # fmt: skip
    failed = TrialSpec("tiny_vit", "tome", {"r": 5}).identity_row() | {"status": "oom", "error": "out of memory"}
    assert table([row, row | {"speedup_clear": False}, failed]) == (
        "model     reducer  budget  tokens  GMACs  ratio         top1 [95 %]  delta     speed-up [95 %]"
        "  E_total  E_hw  E_method\n"
        "--------  -------  ------  ------  -----  -----  ------------------  -----  ------------------"
        "  -------  ----  --------\n"
        "tiny_vit  tome     r=4     65->17    0.5    50%  97.50 [96.0, 98.5]  -0.25  1.30x [1.20, 1.40]"
        "     0.65  0.90      0.72\n"
        "tiny_vit  tome     r=4     65->17    0.5    50%  97.50 [96.0, 98.5]  -0.25                   ="
        "     0.65  0.90      0.72\n"
        "OOM: tiny_vit tome r=5: out of memory"
    )
