"""Trains a model with a reduction in place, alone or with its unreduced self as the teacher; resumable.

  visiontok train --reducer tome --r 5 --epochs 3 --output runs/tome              the embedded model on digits
  visiontok train --recipe configs/sit/tiny_digits.yaml --output runs/sit
  visiontok train -m deit_small_patch16_224 --pretrained --reducer tome --r 13 --data-dir imagenet --lr 1e-5 --amp
                  --device cuda --output runs/deit --resume

With --recipe the flags given here win over its 'train' section. One process, one device. The last epoch is what is
saved and reported, never the best one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from visiontok.cli import options, output
from visiontok.errors import ParameterError

_DEFAULT = argparse.SUPPRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags. Those of a setting are absent unless given, so that a recipe's values stay."""
    options.add_model(parser)
    options.add_reducer(parser)
    _add_data(parser)
    _add_schedule(parser)
    _add_regularisation(parser)
    _add_run(parser)


def run(args: argparse.Namespace) -> int:
    """Trains."""
    from visiontok.training.loop import fit

    recipe = options.load_recipe(args)
    config = settings(args, recipe)
    if args.dry_run:
        print(output.pairs((name, str(value)) for name, value in config.to_dict().items()))
        return 0
    result = fit(config, resume=args.resume, quiet=args.quiet)
    row = _row(config, result)
    output.say(args, describe(row, recipe))
    output.result_line(row)
    return 0


def settings(args: argparse.Namespace, recipe: Any = None) -> Any:
    """The `TrainConfig` that the flags, and a recipe under them, describe.

    Raises:
        ParameterError: there are no images for this model, or a value is out of range.
    """
    from visiontok.bench.models import EMBEDDED
    from visiontok.training.config import TrainConfig

    if args.img_size is not None and args.input_size is not None:
        raise ParameterError("give --img-size or --input-size, not both")
    name = options.model_name(args, recipe)
    reducer, params = options.reduction(args, recipe)
    data = args.data_dir or ("digits" if name in EMBEDDED else None)
    if data is None:
        raise ParameterError(f"{name} needs images; pass a folder of class folders with --data-dir")
    values: dict[str, Any] = {
        key: value for key, value in vars(args).items() if key in TrainConfig.__dataclass_fields__
    }
    size = tuple(args.input_size) if args.input_size else (3, args.img_size, args.img_size) if args.img_size else None
    values |= {"model": name, "reducer": reducer, "params": params, "data": data, "input_size": size}
    if recipe is None:
        return TrainConfig.from_dict(values)
    if recipe.train is None:
        raise ParameterError(f"{args.recipe} has no 'train' section, so it does not say how to train")
    return TrainConfig.from_dict({**recipe.train, **values})


def describe(row: Mapping[str, Any], recipe: Any = None) -> str:
    """The result for people, with a recipe's published numbers beside the measured ones."""
    losses = ", ".join(f"{key} {row[key]:.4f}" for key in row if key.startswith("loss"))
    lines = [("trained", f"{row['model']}, {row['reducer'] or 'unreduced'}, {row['epochs']} epochs")]
    lines.append(("loss", losses))
    for key, label in (("top1", "top-1"), ("top1_ema", "top-1, EMA")):
        if row.get(key) is not None:
            lines.append((label, f"{row[key]:.2f} %"))
    if row["gmacs"] is not None:
        lines.append(("GMACs", f"{row['gmacs']:.4g} of {row['gmacs_base']:.4g}"))
    if recipe is not None:
        from visiontok.cli.eval_command import published

        lines.append(("published", published(recipe.expected)))
    if row["output"] is not None:
        lines.append(("written", row["output"]))
    return output.pairs(lines)


def _row(config: Any, result: Any) -> dict[str, Any]:
    report = None if result.reduction is None else result.reduction.report()
    kept = {key: value for key, value in result.metrics.items() if key.startswith(("loss", "top1"))}
    return {
        "model": config.model,
        "reducer": config.reducer,
        "params": dict(config.params),
        "epochs": config.epochs,
        "distill": config.distill,
        "seed": config.seed,
        **kept,
        "gmacs": None if report is None else report.gmacs_after,
        "gmacs_matcher": None if report is None else report.gmacs_matcher,
        "gmacs_base": None if report is None else report.gmacs_before,
        "output": None if result.output is None else str(result.output),
    }


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder with <split>/<class>/<image>, or 'digits'")
    group.add_argument("--split", default=_DEFAULT, metavar="NAME", help="sub-folder to train on (train)")
    group.add_argument("--val-split", default=_DEFAULT, metavar="NAME", help="sub-folder to report on (validation)")
    group.add_argument("--class-map", default=_DEFAULT, metavar="FILE", help="class folder names, in output order")
    _number(group, "--max-images", options.positive, "train on N evenly spaced images only")
    _number(group, "--max-failed", options.natural, "unreadable images to accept (0)")
    group.add_argument("-j", "--workers", default=_DEFAULT, type=options.natural, help="image loading processes (0)")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("schedule")
    _number(group, "--epochs", options.positive, "epochs (10)")
    group.add_argument(
        "-b", "--batch-size", default=_DEFAULT, type=options.positive, metavar="N", help="images per batch (32)"
    )
    _number(group, "--grad-accum-steps", options.positive, "batches per update (1)")
    _number(group, "--lr", float, "learning rate (5e-4)")
    group.add_argument("--opt", default=_DEFAULT, metavar="NAME", help="timm optimizer (adamw)")
    _number(group, "--weight-decay", float, "weight decay (0.05)")
    _number(group, "--momentum", float, "momentum, where the optimizer has one (0.9)")
    group.add_argument("--sched", default=_DEFAULT, metavar="NAME", help="timm schedule, stepped per update (cosine)")
    _number(group, "--warmup-epochs", options.natural, "epochs of warm-up (0)")
    _number(group, "--warmup-lr", float, "learning rate that the warm-up starts from (1e-6)")
    _number(group, "--min-lr", float, "learning rate that the schedule ends with (1e-6)")
    _number(group, "--cooldown-epochs", options.natural, "epochs at the lowest rate afterwards (0)")
    _number(group, "--clip-grad", float, "largest gradient norm (none)")


def _add_regularisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss and regularisation")
    group.add_argument(
        "--distill", default=_DEFAULT, metavar="none|logits|frd",
        help="learn from the unreduced model: its logits, or SiT's feature recalibration",
    )  # fmt: skip
    group.add_argument("--teacher", default=_DEFAULT, metavar="FILE", help="weights of the teacher (the student's own)")
    _number(group, "--distill-logits", float, "weight of the teacher's logits (2)")
    _number(group, "--distill-tokens", float, "weight of FRD's token loss (2)")
    _number(group, "--distill-tau", float, "temperature (1)")
    _number(group, "--rtsm-lr-scale", float, "learning rate of FRD's own modules over the model's (5)")
    _number(group, "--smoothing", float, "label smoothing (0.1)")
    _number(group, "--mixup", float, "mixup alpha (0 = off)")
    _number(group, "--cutmix", float, "cutmix alpha (0 = off)")
    _number(group, "--drop-path", float, "stochastic depth (0)")
    _number(group, "--shuffle", float, "stochastic layer-wise shuffle: probability at the last block (0 = off)")
    _number(group, "--attentive-mask", float, "A-CLIP: share of patch cells to keep (0 = off); needs --model-ema")
    group.add_argument("--no-aug", dest="augment", default=_DEFAULT, action="store_false", help="no augmentation")
    group.add_argument("--model-ema", default=_DEFAULT, action="store_true", help="track a moving average of weights")
    _number(group, "--model-ema-decay", float, "its decay (0.9998)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--device", default=_DEFAULT, help="torch device (cpu)")
    group.add_argument("--amp", default=_DEFAULT, action=argparse.BooleanOptionalAction, help="train under autocast")
    group.add_argument("--amp-dtype", default=_DEFAULT, choices=("bfloat16", "float16"), help="autocast's dtype")
    _number(group, "--threads", options.positive, "intra-op threads")
    _number(group, "--seed", options.natural, "seed of everything random (42)")
    group.add_argument("--output", default=_DEFAULT, metavar="DIR", help="folder for log, checkpoint and weights")
    group.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="FILE",
        help="continue from --output's checkpoint if there is one, or from FILE",
    )  # fmt: skip
    _number(group, "--checkpoint-every", options.positive, "updates between checkpoints (one per epoch)")
    _number(group, "--log-every", options.positive, "updates between log lines (50)")
    group.add_argument("--quiet", action="store_true", help="no progress, no table; only the --result line")
    group.add_argument("--dry-run", action="store_true", help="print the settings and stop")


def _number(group: Any, flag: str, kind: Any, text: str) -> None:
    group.add_argument(flag, default=_DEFAULT, type=kind, metavar="X" if kind is float else "N", help=text)
