"""Prints the table of a stored sweep and draws its HTML report again.

visiontok report results/tiny_vit
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontok.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("results", metavar="DIR", help="results folder of a sweep")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write (default: DIR/report.html)")
    parser.add_argument("--quiet", action="store_true", help="no table")


def run(args: argparse.Namespace) -> int:
    """Draws the report.

    Raises:
        NothingMatched: the folder holds no results.
    """
    from visiontok.bench.results import ResultStore
    from visiontok.bench.sweep import draw_report, export
    from visiontok.bench.table import order, table
    from visiontok.cli import NothingMatched

    store = ResultStore(args.results)
    rows = sorted(store.rows(), key=order)
    if not rows:
        raise NothingMatched(
            f"no results in '{args.results}'; run 'visiontok sweep --results-dir {args.results}' first"
        )
    output.say(args, table(rows))
    export(store)
    names = dict.fromkeys(row["reference"] for row in rows)
    out = Path(args.output) if args.output else store.root / "report.html"
    path = draw_report(rows, out, title=f"Sweep: {', '.join(names)}")
    output.say(args, f"report: {path}")
    output.result_line({"trials": len(rows), "report": str(path)})
    return 0
