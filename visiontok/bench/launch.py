"""Launchers: they all run `complete` on every spec and differ only in where.

Because a trial is a pure function and the store locks it, launchers may be mixed, killed and started again: what is
finished is read, what another launcher holds is waited for, the rest is run.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontok.bench.results import ResultStore, TrialSpec
from visiontok.errors import MissingDependencyError, ParameterError, VisionTokError, did_you_mean

Row = dict[str, Any]
Run = Callable[[TrialSpec, Path], Row]


class LaunchError(VisionTokError, RuntimeError):
    """A worker died; finished trials are stored."""


@dataclass(frozen=True)
class LaunchOptions:
    """What launchers need to know besides the trials.

    Attributes:
        workers: processes (local) or array parallelism (submitit); 0 or 1 runs trials in this process one by one.
        retry_errors: run trials again whose stored row is `oom` or `error`.
        run: the trial function, picklable; None means `visiontok.bench.trial.attempt`.
        cluster: submitit's `cluster`: None detects Slurm, `local` runs on this machine.
        timeout_min: submitit's time limit of one trial, minutes.
    """

    workers: int = 0
    retry_errors: bool = False
    run: Run | None = None
    cluster: str | None = None
    timeout_min: int = 240


Launcher = Callable[[Sequence[TrialSpec], ResultStore, LaunchOptions], Iterator[Row]]


def launch(
    specs: Sequence[TrialSpec], store: ResultStore, launcher: str = "local", options: LaunchOptions | None = None
) -> Iterator[Row]:
    """Completes trials and yields their rows as they become known, in any order.

    Args:
        specs: the trials; equal ones are run once.
        store: where rows are kept.
        launcher: `local`, `ray` or `submitit`.
        options: see `LaunchOptions`.

    Raises:
        ParameterError: unknown launcher.
        MissingDependencyError: the launcher's library is not installed.
        StoreError: the store cannot be written.
    """
    if launcher not in LAUNCHERS:
        raise ParameterError(
            f"unknown launcher '{launcher}'.{did_you_mean(launcher, LAUNCHERS)} Known: {', '.join(LAUNCHERS)}"
        )
    store.prepare()
    unique = list({spec.key: spec for spec in specs}.values())
    yield from LAUNCHERS[launcher](unique, store, options or LaunchOptions())


def finished(store: ResultStore, spec: TrialSpec, retry_errors: bool = False) -> Row | None:
    """The stored row of a trial, None where it has to be run."""
    row = store.read(spec.key)
    return None if row is not None and retry_errors and row["status"] != "ok" else row


def complete(
    spec: TrialSpec, root: str, retry_errors: bool = False, wait: bool = True, run: Run | None = None
) -> Row | None:
    """Reads or runs one trial: the unit of work of every launcher, safe to call from anywhere at once.

    Args:
        spec: the trial.
        root: folder of the store.
        retry_errors: as in `LaunchOptions`.
        wait: wait for another launcher that is running the trial.
        run: as in `LaunchOptions`.

    Returns:
        The row, or None where another launcher has the trial and `wait` is off.
    """
    store = ResultStore(root)
    row = finished(store, spec, retry_errors)
    if row is not None:
        return row
    with store.lock(spec.key, wait) as mine:
        if not mine:
            return None
        # Between the look above and the lock another launcher may have finished it.
        row = finished(store, spec, retry_errors)
        if row is None:
            row = (run or _attempt)(spec, store.root / "cache")
            store.write(row)
        return row


def launch_local(specs: Sequence[TrialSpec], store: ResultStore, options: LaunchOptions) -> Iterator[Row]:
    """Runs trials in this process one by one, or in a pool of spawned processes."""
    if options.workers > 1:
        yield from _launch_pool(specs, store, options)
        return
    waiting: deque[TrialSpec] = deque()
    for spec in specs:
        row = complete(spec, str(store.root), options.retry_errors, wait=False, run=options.run)
        if row is None:
            waiting.append(spec)
        else:
            yield row
    # What others were running: their rows, or our own run where they died.
    for spec in waiting:
        yield _certain(complete(spec, str(store.root), run=options.run))


def launch_ray(specs: Sequence[TrialSpec], store: ResultStore, options: LaunchOptions) -> Iterator[Row]:
    """Runs trials as Ray tasks, one GPU each where a trial asks for CUDA; the store must be on a shared disk."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _require("ray")
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(complete)
    root = str(store.root.resolve())
    pending = [
        task.options(num_cpus=spec.threads or 1, num_gpus=int(spec.device.startswith("cuda")), max_retries=2).remote(
            spec, root, options.retry_errors, True, options.run
        )
        for spec in specs
    ]
    try:
        while pending:
            ready, pending = ray.wait(pending)
            yield _certain(ray.get(ready[0]))
    finally:
        if ours:
            ray.shutdown()


def launch_submitit(specs: Sequence[TrialSpec], store: ResultStore, options: LaunchOptions) -> Iterator[Row]:
    """Runs trials as a Slurm array; the store must be on a shared disk."""
    submitit = _require("submitit")
    executor = submitit.AutoExecutor(folder=store.root.resolve() / "submitit", cluster=options.cluster)
    limits: dict[str, Any] = {"timeout_min": options.timeout_min, "cpus_per_task": max(s.threads or 1 for s in specs)}
    if any(spec.device.startswith("cuda") for spec in specs):
        limits["gpus_per_node"] = 1
    executor.update_parameters(**limits, slurm_array_parallelism=max(options.workers, 1))
    root, count = str(store.root.resolve()), len(specs)
    jobs = executor.map_array(
        complete, specs, [root] * count, [options.retry_errors] * count, [True] * count, [options.run] * count
    )
    for job in submitit.helpers.as_completed(jobs):
        yield _certain(job.result())


LAUNCHERS: Mapping[str, Launcher] = {"local": launch_local, "ray": launch_ray, "submitit": launch_submitit}


def _launch_pool(specs: Sequence[TrialSpec], store: ResultStore, options: LaunchOptions) -> Iterator[Row]:
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for name in _gpu_names(specs, options.workers):
        devices.put(name)
    with ProcessPoolExecutor(options.workers, context, initializer=_take_gpu, initargs=(devices,)) as pool:
        jobs = [pool.submit(complete, spec, str(store.root), options.retry_errors, True, options.run) for spec in specs]
        try:
            for job in as_completed(jobs):
                yield _certain(job.result())
        except BrokenProcessPool as error:
            raise LaunchError(
                "a worker process died (killed, or out of memory); finished trials are kept, run the same command "
                "again to continue, with fewer --workers if memory ran out"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _gpu_names(specs: Sequence[TrialSpec], workers: int) -> list[str]:
    if not any(spec.device == "cuda" for spec in specs):
        return [""] * workers
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return [names[worker % len(names)] if names else "" for worker in range(workers)]


def _take_gpu(devices: Any) -> None:
    # Before torch is imported in the worker, so that "cuda" means this one GPU there.
    name = devices.get()
    if name:
        os.environ["CUDA_VISIBLE_DEVICES"] = name


def _certain(row: Row | None) -> Row:
    if row is None:
        raise LaunchError("a trial was skipped although it was to be waited for; run the same command again")
    return row


def _attempt(spec: TrialSpec, cache: Path) -> Row:
    from visiontok.bench.trial import attempt

    return attempt(spec, cache)


def _require(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"launcher '{name}' needs {name}: pip install 'visiontok[dist]' ({error})"
        ) from error
