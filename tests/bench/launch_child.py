"""A launcher in a process of its own that is told when to die; started by `test_launch.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from visiontok.bench import results
from visiontok.bench.launch import LaunchOptions, complete, launch
from visiontok.bench.results import ResultStore, TrialSpec

SPECS = [TrialSpec("tiny_vit", "tome", {"r": r}) for r in range(6)]


def measure(spec: TrialSpec, cache: Path) -> dict:
    with open(cache.parent / "runs.log", "a", encoding="utf-8") as log:
        log.write(f"{spec.params['r']}\n")
    return spec.identity_row() | {"status": "ok", "top1": float(spec.params["r"])}


def measure_slowly(spec: TrialSpec, cache: Path) -> dict:
    time.sleep(0.05)
    return measure(spec, cache)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_trial(after: int):
    def run(spec: TrialSpec, cache: Path) -> dict:
        row = measure(spec, cache)
        if spec.params["r"] == after:
            die()
        return row

    return run


def die_at_rename(after: int, *, done: bool) -> None:
    rename, count = os.replace, [0]

    def replace(source, target) -> None:
        if count[0] == after and not done:
            die()
        rename(source, target)
        if count[0] == after:
            die()
        count[0] += 1

    os.replace = replace


def die_half_written(after: int) -> None:
    write, count = results.write_atomic, [0]

    def half(target: Path, data: bytes) -> None:
        if count[0] == after:
            (target.parent / f".{target.name}.{os.getpid()}.tmp").write_bytes(data[: len(data) // 2])
            die()
        write(target, data)
        count[0] += 1

    results.write_atomic = half


def main(root: str, mode: str) -> None:
    store = ResultStore(root)
    name, _, after = mode.partition(":")
    run = measure
    if name == "probe":
        print(complete(SPECS[0], root, wait=False, run=measure))
        return
    if name == "hold":
        store.prepare()
        with store.lock(SPECS[0].key):
            Path(root, "held").touch()
            time.sleep(600)
    if name == "slow":
        run = measure_slowly
    elif name == "in_trial":
        run = die_in_trial(int(after))
    elif name == "half_written":
        die_half_written(int(after))
    else:
        die_at_rename(int(after), done=name == "after_rename")
    assert len(list(launch(SPECS, store, options=LaunchOptions(run=run)))) == len(SPECS)


if __name__ == "__main__":
    main(*sys.argv[1:])
