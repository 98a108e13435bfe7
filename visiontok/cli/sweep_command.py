"""Accuracy and speed over a grid of models, reducers and budgets; prints a table and draws a report.

  visiontok sweep                      the embedded model on digits: tome, pitome and random at three budgets
  visiontok sweep -m deit_small_patch16_224 --pretrained --data-dir imagenet --reducer tome --r 8 13 16

The unreduced model, a smaller dense model and random dropping are always included. Trials that are finished are read,
so an interrupted sweep continues where it was when the same command is given again; any number of launchers may share
one results folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from visiontok.cli import options, output
from visiontok.errors import ParameterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    options.add_model(parser, several=True)
    parser.add_argument("--smaller-model", metavar="NAME", help="smaller dense baseline, 'none' for none")
    options.add_reducer(parser, several=True)
    parser.add_argument(
        "--share", type=_share, nargs="+", metavar="X", help="budgets as shares of the model's GMACs (0.7 0.5 0.3)"
    )
    options.add_data(parser, loaders="--load-workers")
    options.add_run(parser, batch=16, warm=3, rounds=20)
    parser.add_argument("--no-timing", action="store_true", help="accuracy only")
    options.add_output(parser)
    group = parser.add_argument_group("sweep")
    group.add_argument("--name", help="name of the sweep (default: the models' names)")
    group.add_argument("--results-dir", metavar="DIR", help="where results are kept (default: results/NAME)")
    group.add_argument("--launcher", default="local", help="local | ray | submitit (default: local)")
    group.add_argument(
        "--workers",
        type=options.natural,
        default=0,
        metavar="N",
        help="parallel trials; they disturb wall-clock timing",
    )
    group.add_argument("--cluster", metavar="NAME", help="submitit's cluster; 'local' runs without Slurm")
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="read finished trials instead of running them (default); --no-resume refuses a folder that has any",
    )  # fmt: skip
    group.add_argument("--retry-errors", action="store_true", help="run failed trials again")
    group.add_argument("--no-report", action="store_true", help="do not draw report.html")
    group.add_argument("--dry-run", action="store_true", help="list the trials and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep; exit code 1 where a trial failed or too many images were unreadable."""
    from visiontok.bench.launch import LaunchOptions
    from visiontok.bench.results import ResultStore
    from visiontok.bench.sweep import run_sweep
    from visiontok.bench.table import table

    models, specs = _specs(args)
    store = ResultStore(args.results_dir or Path("results", args.name or "+".join(models).replace("/", "_")))
    if args.dry_run:
        return _dry_run(specs, store)
    if not args.resume and store.rows():
        raise ParameterError(
            f"{store.root} holds results already; choose another --results-dir or leave out --no-resume"
        )
    launch = LaunchOptions(workers=args.workers, retry_errors=args.retry_errors, cluster=args.cluster)
    rows = run_sweep(specs, store, args.launcher, launch, quiet=args.quiet)
    output.say(args, table(rows))
    output.say(args, _footnote(rows))
    report = None if args.no_report else _draw(args, rows, store, models)
    output.write_results(args, rows)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "oom", "error")}
    output.result_line(
        {"trials": len(rows), **counts, "results": str(store.root), "report": None if report is None else str(report)}
    )
    return _verdict(rows, args.max_failed)


def _specs(args: argparse.Namespace) -> tuple[list[str], list[Any]]:
    import visiontok as vt
    from visiontok.bench.models import DEFAULT_MODEL
    from visiontok.bench.sweep import DEFAULT_REDUCERS, DEFAULT_SHARES, grid

    recipe = options.load_recipe(args)
    models = options.model_names(args, [recipe.model if recipe is not None else DEFAULT_MODEL])
    budgets = [{name: options.budget(text)} for name in options.BUDGETS for text in (getattr(args, name) or ())]
    params: dict[str, Any] = dict(args.set)
    reducers = args.reducer or ([recipe.method] if recipe is not None else DEFAULT_REDUCERS)
    for name in reducers:
        # A name that does not exist would fail in every one of its trials, after all others have run.
        vt.describe(name)
    if recipe is not None:
        params = {**recipe.fields, **params}
        budgets = budgets or ([dict(recipe.schedule)] if recipe.schedule else [])
    shares = args.share or (() if budgets else DEFAULT_SHARES)
    common = options.common(args, models[0])
    if common["threads"] is None and common["device"] == "cpu":
        # One thread makes CPU time meaningful, which neighbours on the machine do not disturb.
        common["threads"] = 1
    smaller = None
    if args.smaller_model is not None:
        dense = None if args.smaller_model.lower() == "none" else args.smaller_model
        smaller = dict.fromkeys(models, dense)
    specs: list[Any] = []
    for model in models:
        fields = common | options._data(args, model) | {"timing": not args.no_timing}
        specs += grid([model], reducers, budgets, shares=shares, params=params, smaller=smaller, **fields)
    return models, specs


def _dry_run(specs: list[Any], store: Any) -> int:
    from visiontok.bench.launch import finished

    for spec in specs:
        state = "done" if finished(store, spec) else "to run"
        print(f"{spec.key[:12]}  {state:6}  {spec.model} {spec.reducer or spec.role} {spec.budget}".rstrip())
    return 0


def _draw(args: argparse.Namespace, rows: list[Any], store: Any, models: list[str]) -> Path:
    from visiontok.bench.sweep import draw_report

    command = shlex.join(["visiontok", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith("visiontok") else None
    path = draw_report(rows, store.root / "report.html", title=f"Sweep: {', '.join(models)}", command=command)
    output.say(args, f"report: {path}")
    return path


def _footnote(rows: list[Any]) -> str:
    timed = next((row for row in rows if row.get("clock")), None)
    if timed is None:
        return ""
    clock = {"process": "CPU time", "wall": "wall time", "cuda": "GPU events"}[timed["clock"]]
    return (
        f"Speed: {clock}, {timed['device']}, {timed['threads']} thread(s), {timed['dtype']}, batch "
        f"{timed['batch_size']}, medians of {timed['rounds']} interleaved rounds; '=' where the intervals overlap.\n"
        "E_total = S / ratio of MACs = E_hw (what the machine allows) x E_method (what the method leaves of it)."
    )


def _verdict(rows: list[Any], max_failed: int) -> int:
    failed = [row for row in rows if row["status"] != "ok"]
    unreadable = max((row.get("n_failed") or 0 for row in rows), default=0)
    if failed:
        print(f"visiontok sweep: error: {len(failed)} trial(s) failed; --retry-errors runs them again", file=sys.stderr)
    if unreadable > max_failed:
        print(
            f"visiontok sweep: error: {unreadable} unreadable image(s), --max-failed is {max_failed}", file=sys.stderr
        )
    return int(bool(failed) or unreadable > max_failed)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a share of GMACs is in (0, 1], got {text}")
    return value
