"""Shows the card of a reducer, or what a reduction would do to a model.

visiontok info tome
visiontok info -m deit_small_patch16_224 --reducer tome --r 13
visiontok info -m deit_small_patch16_224        which reducers fit the model
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from visiontok.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("name", nargs="?", help="a reducer: prints its card")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_model(parser)
    options.add_reducer(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the card, the plan with its report, or the reducers that fit."""
    import visiontok as vt

    if args.name is not None and args.model is None and args.recipe is None:
        card = vt.describe(args.name)
        print(json.dumps(vars(card), default=str) if args.json else card)
        return 0
    args.reducer = args.reducer or args.name
    if args.reducer is None and args.recipe is None:
        options.reduction(args)
        return _fitting(args)
    return _plan(args)


def _plan(args: argparse.Namespace) -> int:
    import visiontok as vt
    from visiontok.bench.models import input_size

    model, name = _model(args)
    recipe = options.load_recipe(args)
    reducer, params = options.reduction(args, recipe)
    reduction = vt.patch(model, reducer, **params)
    report = reduction.report(input_size=input_size(model))
    if args.json:
        print(json.dumps({"model": name, "reducer": reducer, "params": params, **report.to_dict()}, default=str))
    else:
        print(f"{name}, {reducer}\n\n{reduction.plan}\n\n{report}")
    return 0


def _fitting(args: argparse.Namespace) -> int:
    import visiontok as vt
    from visiontok.cli import NothingMatched, output

    model, name = _model(args)
    support = {reducer: vt.supports(reducer, model) for reducer in vt.list_reducers()}
    if args.json:
        rows: Any = {reducer: {"ok": found.ok, "reason": found.reason} for reducer, found in support.items()}
        print(json.dumps({"model": name, "reducers": rows}))
    else:
        print(
            output.pairs((reducer, "yes" if found.ok else f"no: {found.reason}") for reducer, found in support.items())
        )
    if not any(found.ok for found in support.values()):
        raise NothingMatched(f"no reducer fits {name}")
    return 0


def _model(args: argparse.Namespace) -> tuple[Any, str]:
    from visiontok.bench.models import load

    name = options.model_name(args, options.load_recipe(args))
    size = tuple(args.input_size) if args.input_size else (3, args.img_size, args.img_size) if args.img_size else None
    return load(name, pretrained=args.pretrained, checkpoint=args.checkpoint, input_size=size), name
