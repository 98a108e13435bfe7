"""The command line. Sub-commands import torch only when they run, so `--help` answers at once.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 3 nothing matched (no such name, or a model that no method fits).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import visiontok
from visiontok import errors

OK, FAILED, USAGE, NOTHING = 0, 1, 2, 3
_INTERRUPTED = 130

_COMMANDS = {
    "list": "reducers, backbones and models, by pattern",
    "info": "the card of a reducer, or the plan of a reduction on a model",
    "bench": "speed of a reduced model against the unreduced one and the free-slice oracle",
    "eval": "accuracy of a reduced model, paired with the unreduced one",
    "sweep": "accuracy and speed over a grid, with baselines, plots and a report; resumable",
    "train": "trains a model with a reduction in place, with its unreduced self as teacher if wanted; resumable",
    "encode": "pictures to a few tokens each: .vtok files, or shards of Parquet or webdataset; resumable",
    "decode": "stored tokens to pictures",
    "train-tokenizer": "trains a 1D tokenizer from a recipe; resumable",
    "report": "draws the report of a stored sweep again",
    "viz": "draws which tokens of an image were merged or dropped",
    "demo": "starts a demo in the browser",
    "tune-kernels": "launch options of the Triton kernels for the GPU at hand",
    "doctor": "versions, hardware, and which implementations are used and why",
}
_USAGE_ERRORS = (errors.ParameterError, errors.UnknownNameError, errors.FormatError)
_NOTHING_ERRORS = (errors.IncompatibleError, errors.NothingPatchedError)


class NothingMatched(errors.VisionTokError, LookupError):
    """A pattern or a request matched nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show_warning, args.command)
            return args.run(args) or OK
    except errors.VisionTokError as error:
        if args.debug:
            raise
        print(f"visiontok {args.command}: error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(f"visiontok {args.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _show_warning(command: str, message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, as errors are; where the code is that warns helps nobody at a prompt."""
    print(f"visiontok {command}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def exit_code(error: errors.VisionTokError) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, (NothingMatched, *_NOTHING_ERRORS)):
        return NOTHING
    return USAGE if isinstance(error, _USAGE_ERRORS) else FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser with all sub-commands; imports no torch."""
    parser = argparse.ArgumentParser(
        prog="visiontok",
        description="Fewer tokens for vision models: merge, prune, measure.",
        epilog="Exit codes: 0 done, 1 run failed, 2 usage, 3 nothing matched.",
    )
    parser.add_argument("--version", action="version", version=f"visiontok {visiontok.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        module = importlib.import_module(f"visiontok.cli.{name.replace('-', '_')}_command")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser
