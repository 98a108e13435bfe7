"""Launchers over one store: resuming, concurrency and kill -9 (W1, W2, W4), with trials that need no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visiontok.bench.launch import LaunchOptions, complete, launch
from visiontok.bench.results import ResultStore, TrialSpec
from visiontok.errors import MissingDependencyError, ParameterError

SPECS = [TrialSpec("tiny_vit", "tome", {"r": r}) for r in range(6)]
CHILD = Path(__file__).parent / "launch_child.py"


def measure(spec: TrialSpec, cache: Path) -> dict:
    with open(cache.parent / "runs.log", "a", encoding="utf-8") as log:
        log.write(f"{spec.params['r']}\n")
    return spec.identity_row() | {"status": "ok", "top1": float(spec.params["r"])}


def fail_odd(spec: TrialSpec, cache: Path) -> dict:
    row = measure(spec, cache)
    return row | {"status": "oom", "error": "out of memory"} if spec.params["r"] % 2 else row


def child(root: Path, mode: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(CHILD), str(root), mode], stderr=subprocess.PIPE)


def ran(root: Path) -> list[int]:
    log = root / "runs.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def check_complete(root: Path) -> None:
    names = sorted(path.name for path in (root / "trials").iterdir() if not path.name.startswith("."))
    assert names == sorted(f"{spec.key}.json" for spec in SPECS)
    rows = [json.loads((root / "trials" / name).read_text()) for name in names]
    assert sorted(row["top1"] for row in rows) == [0, 1, 2, 3, 4, 5]


def test_finished_trials_are_read_not_run(tmp_path: Path) -> None:
    store, options = ResultStore(tmp_path), LaunchOptions(run=measure)
    first = list(launch(SPECS[:3], store, options=options))
    again = list(launch(SPECS, store, options=options))
    assert [row["top1"] for row in first] == [0, 1, 2]
    assert [row["top1"] for row in again] == [0, 1, 2, 3, 4, 5]
    assert ran(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_equal_specs_are_one_trial(tmp_path: Path) -> None:
    assert len(list(launch([SPECS[0], SPECS[0]], ResultStore(tmp_path), options=LaunchOptions(run=measure)))) == 1


def test_failures_are_rows_and_run_again_only_on_request(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    rows = list(launch(SPECS[:2], store, options=LaunchOptions(run=fail_odd)))
    assert [row["status"] for row in rows] == ["ok", "oom"]
    rows = list(launch(SPECS[:2], store, options=LaunchOptions(run=measure)))
    assert [row["status"] for row in rows] == ["ok", "oom"]
    rows = list(launch(SPECS[:2], store, options=LaunchOptions(run=measure, retry_errors=True)))
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert ran(tmp_path) == [0, 1, 1]


@pytest.mark.parametrize("moment", ["in_trial", "before_rename", "after_rename", "half_written"])
@pytest.mark.parametrize("after", [0, 3])
def test_killed_sweep_continues_where_it_was(tmp_path: Path, moment: str, after: int) -> None:
    process = child(tmp_path, f"{moment}:{after}")
    assert process.wait(60) == -signal.SIGKILL, process.communicate()[1]
    done = list((tmp_path / "trials").glob("*.json"))
    assert len(done) == after + (moment == "after_rename")
    for path in done:
        json.loads(path.read_text())
    list(launch(SPECS, ResultStore(tmp_path), options=LaunchOptions(run=measure)))
    check_complete(tmp_path)
    assert not list((tmp_path / "trials").glob(".*.tmp"))
    finished_once = {0, 1, 2, 3, 4, 5} - {after}
    assert all(ran(tmp_path).count(r) == 1 for r in finished_once)


def test_concurrent_launchers_share_the_work(tmp_path: Path) -> None:
    processes = [child(tmp_path, "slow") for _ in range(3)]
    for process in processes:
        assert process.wait(60) == 0, process.communicate()[1]
    check_complete(tmp_path)
    assert sorted(ran(tmp_path)) == [0, 1, 2, 3, 4, 5]


def test_trial_held_by_another_launcher_is_waited_for(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.prepare()
    with store.lock(SPECS[0].key) as mine:
        assert mine
        probe = subprocess.run([sys.executable, str(CHILD), str(tmp_path), "probe"], capture_output=True, check=True)
    assert probe.stdout.split() == [b"None"]
    assert complete(SPECS[0], str(tmp_path), run=measure) is not None


def test_lock_of_a_killed_launcher_does_not_block(tmp_path: Path) -> None:
    process = child(tmp_path, "hold")
    deadline = time.monotonic() + 60
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    row = complete(SPECS[0], str(tmp_path), wait=False, run=measure)
    assert row is not None


def test_pool_of_processes(tmp_path: Path) -> None:
    rows = list(launch(SPECS, ResultStore(tmp_path), options=LaunchOptions(workers=2, run=measure)))
    assert len(rows) == 6
    check_complete(tmp_path)


@pytest.mark.parametrize(("name", "cluster"), [("submitit", "local"), ("ray", None)])
def test_cluster_launchers_fill_the_same_store(
    tmp_path: Path, name: str, cluster: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed (extra: dist)")
    # Workers import the trial function by its module's name.
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(CHILD.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    list(launch(SPECS[:2], ResultStore(tmp_path), options=LaunchOptions(run=measure)))
    options = LaunchOptions(run=measure, cluster=cluster, workers=2)
    assert len(list(launch(SPECS, ResultStore(tmp_path), name, options))) == 6
    check_complete(tmp_path)
    assert sorted(ran(tmp_path)) == [0, 1, 2, 3, 4, 5]


def test_unknown_and_missing_launchers(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="unknown launcher 'rai'. Did you mean 'ray'?"):
        list(launch(SPECS, ResultStore(tmp_path), "rai"))
    for name in ("ray", "submitit"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(MissingDependencyError, match=rf"needs {name}: pip install 'visiontok\[dist\]'"):
                list(launch(SPECS, ResultStore(tmp_path), name))
