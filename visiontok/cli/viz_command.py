"""Draws which tokens of an image were merged (one colour, one border) or dropped (hatched).

  visiontok viz photo.jpg -m deit_small_patch16_224 --pretrained --reducer tome --r 13 -o photo_tokens.png
  visiontok viz --reducer pitome --keep 0.9 -o digit.png        a test digit, with the embedded model

By default the picture is a strip over the layers; --last draws the last layer only. Without a reducer ToMe is drawn,
keeping 90 % of the tokens in every block.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from visiontok.cli import options, output
from visiontok.errors import ParameterError

_DEFAULT = ("tome", {"keep": 0.9})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files (default: an embedded test digit)")
    parser.add_argument(
        "-o", "--output", default="tokens.png", metavar="FILE", help="picture to write; NAME_2.png, ... for more images"
    )
    parser.add_argument("--last", action="store_true", help="the last layer only, not a strip over the layers")
    parser.add_argument("--style", default="mean", choices=("mean", "label", "heat"), help="how groups are filled")
    parser.add_argument("--scale", type=options.positive, metavar="N", help="enlarge by a whole factor")
    parser.add_argument("--quiet", action="store_true", help="print only the --result line")
    options.add_model(parser)
    options.add_reducer(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the pictures."""
    from visiontok.bench import examples, models

    if Path(args.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ParameterError(f"-o {args.output}: expected a .png, .jpg or .webp file")
    recipe = options.load_recipe(args)
    name = options.model_name(args, recipe)
    reducer, params = options.reduction(args, recipe)
    if reducer is None:
        reducer, params = _DEFAULT
    size = tuple(args.input_size) if args.input_size else (3, args.img_size, args.img_size) if args.img_size else None
    model = models.load(name, pretrained=args.pretrained, checkpoint=args.checkpoint, input_size=size)
    paths = [Path(image) for image in args.images]
    if not paths and name not in models.EMBEDDED:
        raise ParameterError(f"{name} needs an image: visiontok viz photo.jpg -m {name}")
    images = examples.load_images(paths, model, name) if paths else examples.digits()
    written = []
    for index, image in enumerate(images):
        target = _target(Path(args.output), index)
        steps = examples.trace(model, image, reducer, params)
        if not steps:
            raise ParameterError(f"{reducer} moved no token, so there is nothing to draw; give it a budget")
        _draw(args, examples.picture(image, model), steps).save(target)
        output.say(args, f"{paths[index] if paths else 'test digit'} -> {target}")
        written.append(str(target))
    output.result_line({"model": name, "reducer": reducer, "params": params, "files": written})
    return 0


def _draw(args: argparse.Namespace, picture: Any, steps: Any) -> Any:
    from visiontok.viz import layer_maps, token_strip

    if not args.last:
        return token_strip(picture, steps, style=args.style, scale=args.scale)
    return layer_maps(picture, steps[-1:], style=args.style, scale=args.scale)[-1][1]


def _target(path: Path, index: int) -> Path:
    target = path if index == 0 else path.with_name(f"{path.stem}_{index + 1}{path.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"cannot write '{target}': {error.strerror}; choose another -o") from error
    return target
