"""Token maps of example images: for the report of a sweep and for `visiontok viz`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.bench import data, models
from visiontok.bench.results import TrialSpec
from visiontok.bench.table import label
from visiontok.bench.trial import DIGITS, NO_DATA, Subject
from visiontok.errors import VisionTokError

if TYPE_CHECKING:
    from PIL import Image

EXAMPLE = 0


def picture(image: Tensor, model: nn.Module) -> np.ndarray:
    """What the model saw: a normalized `(C, H, W)` tensor back as `(H, W, C)` floats in [0, 1]."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (torch.tensor(config.get(name, 0.5)).view(-1, 1, 1) for name in ("mean", "std"))
    return (image.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def trace(model: nn.Module, image: Tensor, reducer: str, params: Mapping[str, Any]) -> Sequence[Any]:
    """The trace of one forward of `image (C, H, W)`; the model is unpatched again."""
    with vt.patched(model, reducer, **params, trace=True) as reduction, torch.inference_mode():
        model(image.unsqueeze(0))
        return list(reduction.trace)


def digits(count: int = 1) -> list[Tensor]:
    """The first test digits as the embedded models want them, `(3, 32, 32)` each."""
    from visiontok.models.tiny import digits_split

    return list(digits_split().test_images[:count])


def token_maps(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, Image.Image]]:
    """One strip over the layers per reducer, at its middle budget, on the first image of the data.

    Args:
        rows: result rows; those without data or without a reducer are left out.

    Returns:
        `(caption, picture)` pairs.
    """
    chosen: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("reducer") and row["spec"]["data"] != NO_DATA:
            chosen.setdefault((row["model"], row["reducer"]), []).append(row)
    maps = []
    for group in chosen.values():
        group.sort(key=lambda row: -(row.get("gmacs") or 0.0))
        row = group[len(group) // 2]
        maps.append((f"{label(row)}: tokens over the layers", _strip(TrialSpec.from_dict(row["spec"]))))
    return maps


def _strip(spec: TrialSpec) -> Image.Image:
    from visiontok.viz import token_strip

    plain = TrialSpec.from_dict(spec.to_dict() | {"reducer": None, "params": {}, "device": "cpu", "dtype": "float32"})
    subject = Subject(plain)
    image = _first_image(subject, spec)
    steps = trace(subject.model, image, spec.reducer or "", spec.arguments())
    return token_strip(picture(image, subject.model), steps)


def _first_image(subject: Subject, spec: TrialSpec) -> Tensor:
    if spec.data == DIGITS:
        return digits(EXAMPLE + 1)[EXAMPLE]
    dataset = subject.dataset(spec.model, subject.model)
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, data.Failure):
            return item[0]
    raise VisionTokError(f"no image of '{spec.data}' can be read")


def load_images(paths: Sequence[Path], model: nn.Module, name: str) -> list[Tensor]:
    """Reads images as a model wants them, `(C, H, W)` each.

    Raises:
        UnreadableImageError: an image cannot be read.
    """
    transform = models.transform(model, name)
    return [transform(data.open_image(path)) for path in paths]
