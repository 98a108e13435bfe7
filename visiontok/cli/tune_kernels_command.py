"""Searches launch options of the Triton kernels for the GPU at hand, and writes them as entries of their launch table.

  visiontok tune-kernels --dry-run
  visiontok tune-kernels --kernel merge match --out configs.json

Nothing is tuned while models run: entries belong into visiontok/ops/triton/configs.json, which `--out` may name. A new
file starts as a copy of the shipped table. Without --out the entries are printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="names of the launch table; default: all")
    parser.add_argument("--device", default="cuda", help="the GPU (default: cuda)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the activations")
    parser.add_argument("--out", metavar="FILE", help="launch table to make or to change")
    parser.add_argument("--dry-run", action="store_true", help="list where each search starts and stop; needs no GPU")


def run(args: argparse.Namespace) -> int:
    """Tunes, or lists what would be tried."""
    from visiontok.bench import tune
    from visiontok.errors import UnknownNameError, did_you_mean

    table = tune.shipped()
    names = args.kernel or sorted(table)
    for name in names:
        if name not in table:
            raise UnknownNameError(f"no kernel {name!r}; known: {', '.join(sorted(table))}.{did_you_mean(name, table)}")
    if args.dry_run:
        for name in names:
            for width in tune.widths(name):
                first = tune.start(name, width)
                listed = tune.neighbours(first)
                print(f"{name} width {width}: {len(listed)} candidates for a first step from {json.dumps(first)}")
                print("\n".join(f"  {json.dumps(options)}" for options in listed))
        return 0
    import torch

    if not torch.cuda.is_available():
        raise tune.TuningError("no CUDA device here; tune on the GPU that is to run the kernels, or use --dry-run.")
    device = torch.device(args.device)
    found = []
    for name in names:
        for width in tune.widths(name):
            best = tune.search(name, width, device, getattr(torch, args.dtype))
            print(f"{name} width {width}: {best.before:.4f} -> {best.milliseconds:.4f} ms with "
                  f"{json.dumps(best.options)} ({best.tried} ran, {best.failed} did not)", flush=True)  # fmt: skip
            found.append(best)
    from visiontok.ops.triton.configuring import architecture

    made = tune.entries(found)
    if not args.out:
        print(json.dumps({kernel: {architecture(device): rows} for kernel, rows in made.items()}, indent=2))
        return 0
    from visiontok.bench.results import ResultStore

    path = Path(args.out)
    text = json.dumps(tune.merged(path, architecture(device), made), indent=2, sort_keys=True) + "\n"
    ResultStore(path.parent).write_text(path.name, text)
    print(f"wrote {path}")
    return 0
