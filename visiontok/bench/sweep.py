"""Sweeps: a grid of trials with its baselines, run by any launcher, exported and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visiontok.bench.launch import LaunchOptions, Row, launch
from visiontok.bench.results import ResultStore, TrialSpec, to_csv, to_jsonl
from visiontok.bench.table import order

DEFAULT_REDUCERS = ("tome", "pitome", "evit")
DEFAULT_SHARES = (0.7, 0.5, 0.3)
BASELINE_REDUCER = "random"


def grid(
    models: Sequence[str],
    reducers: Sequence[str],
    budgets: Sequence[Mapping[str, Any]],
    *,
    shares: Sequence[float] = (),
    params: Mapping[str, Any] | None = None,
    smaller: Mapping[str, str | None] | None = None,
    **common: Any,
) -> list[TrialSpec]:
    """All trials of a sweep; the unreduced model, a smaller dense one and `random` are always among them.

    Args:
        models: model names.
        reducers: registry names; `random` is added.
        budgets: one mapping per budget, such as `{"r": 13}`.
        shares: budgets as shares of the unreduced model's GMACs, in (0, 1]; they become `gflops` targets.
        params: further parameters of every reducer but `random`.
        smaller: smaller dense model of each model, None for none; without an entry it is chosen by name.
        common: further fields of every `TrialSpec`.

    Returns:
        The specs, baselines of a model first.
    """
    from visiontok.bench.models import smaller_sibling

    specs: list[TrialSpec] = []
    names = [BASELINE_REDUCER, *(name for name in dict.fromkeys(reducers) if name != BASELINE_REDUCER)]
    for model in models:
        dense = smaller[model] if smaller and model in smaller else smaller_sibling(model)
        specs.append(TrialSpec(model, **common))
        if dense is not None:
            specs.append(TrialSpec(dense, reference=model, **{**common, "checkpoint": None}))
        targets = [*budgets, *({"gflops": target} for target in _targets(model, shares, common))]
        for name in names:
            extra = {} if name == BASELINE_REDUCER or params is None else params
            specs += [TrialSpec(model, name, {**budget, **extra}, **common) for budget in targets]
    return specs


def run_sweep(
    specs: Sequence[TrialSpec],
    store: ResultStore,
    launcher: str = "local",
    options: LaunchOptions | None = None,
    quiet: bool = True,
) -> list[Row]:
    """Completes the trials, then exports the store as `results.jsonl` and `results.csv`.

    Args:
        specs: the trials, as `grid` lists them.
        store: where rows are kept; finished trials are not run again.
        launcher: `local`, `ray` or `submitit`.
        options: see `LaunchOptions`.
        quiet: no progress bar.

    Returns:
        The rows of `specs`, sorted for reading.
    """
    from visiontok.bench.progress import bar

    rows: list[Row] = []
    with bar(len(specs), "sweep", quiet) as progress:
        for row in launch(specs, store, launcher, options):
            rows.append(row)
            progress.update()
    export(store)
    return sorted(rows, key=order)


def export(store: ResultStore) -> None:
    """Writes all rows of a store to `results.jsonl` and `results.csv` beside its trials."""
    rows = sorted(store.rows(), key=order)
    store.write_text("results.jsonl", to_jsonl(rows))
    store.write_text("results.csv", to_csv(rows))


def draw_report(rows: Sequence[Row], out: Path, *, title: str, command: str | None = None) -> Path:
    """Writes the HTML report with the token maps of one example per reducer.

    Args:
        rows: result rows.
        out: the file to write.
        title: heading.
        command: the command line that reproduces the rows.

    Returns:
        The path of the report.
    """
    from visiontok.bench.environment import describe
    from visiontok.bench.examples import token_maps
    from visiontok.viz import write_report

    device = next((row["spec"]["device"] for row in rows if row["status"] == "ok"), "cpu")
    return write_report(
        rows, out, title=title, token_maps=token_maps(rows), environment=describe(device), command=command
    )


def _targets(model: str, shares: Iterable[float], common: Mapping[str, Any]) -> list[float]:
    shares = list(shares)
    if not shares:
        return []
    from visiontok.bench.models import input_size, load
    from visiontok.core.flops import count_macs

    size = common.get("input_size")
    network = load(model, input_size=size, seed=common.get("seed", 42))
    gmacs = count_macs(network, size or input_size(network)) / 1e9
    # Six digits: the key of a trial must not hang on the last bit of a sum.
    return [float(f"{share * gmacs:.6g}") for share in shares]
