"""Trains a 1D tokenizer; resumable.

  visiontok train-tokenizer --recipe tiny_one_d_piece --output runs/odp            as the shipped one, on the digits
  visiontok train-tokenizer --recipe mine.yaml --data-dir photos --output runs/mine --device cuda --set amp=true
  visiontok train-tokenizer --recipe tiny_flextok --updates 8000 --output runs/flex --resume

The output folder holds model.safetensors, which `visiontok encode -t FAMILY --weights FOLDER` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontok.cli import output
from visiontok.cli.values import natural, positive, setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--recipe", required=True, metavar="NAME", help="shipped recipe or YAML file")
    parser.add_argument("--output", metavar="DIR", help="folder for log, checkpoint and weights")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of images, at any depth (default: the digits)")
    parser.add_argument("--updates", type=positive, metavar="N", help="in place of the recipe's")
    parser.add_argument("-b", "--batch-size", type=positive, metavar="N", help="in place of the recipe's")
    parser.add_argument("--lr", type=float, metavar="X", help="in place of the recipe's")
    parser.add_argument("--seed", type=natural, metavar="N", help="in place of the recipe's")
    parser.add_argument(
        "--set", dest="settings", action="append", type=setting, default=[], metavar="NAME=VALUE",
        help="any other field of the recipe",
    )  # fmt: skip
    parser.add_argument("--initial", metavar="PATH", help="weights to begin with, as for a second stage")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    parser.add_argument("--dry-run", action="store_true", help="print the recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table; only the --result line")


def run(args: argparse.Namespace) -> int:
    """Trains."""
    from visiontok.errors import ParameterError
    from visiontok.tokenizers import loading
    from visiontok.training.tokenizer_config import load_tokenizer_recipe
    from visiontok.training.tokenizer_loop import FolderImages, fit_tokenizer

    names = ("updates", "batch_size", "lr", "seed")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = load_tokenizer_recipe(args.recipe, **{**dict(args.settings), **changes})
    if args.dry_run:
        print(output.pairs((name, str(value)) for name, value in recipe.to_dict().items()))
        return 0
    if args.resume and args.output is None:
        raise ParameterError("--resume needs --output, where the checkpoint is")
    size = int(recipe.model["image_size"])
    data = None if args.data_dir is None else FolderImages(Path(args.data_dir), size)
    initial = None if args.initial is None else loading.load(recipe.family, args.initial)
    result = fit_tokenizer(
        recipe, data=data, output=args.output, resume=args.resume, initial=initial, device=args.device,
        quiet=args.quiet,
    )  # fmt: skip
    last = result.records[-1] if result.records else {}
    row = {"family": recipe.family, "model_id": result.tokenizer.model_id, "output": args.output, **last}
    output.say(args, output.pairs((name, str(value)) for name, value in row.items()))
    output.result_line(row)
    return 0
