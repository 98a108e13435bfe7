"""Rendered scenes with captions: one handwritten digit in a colour, a size and a place on a piece of a photograph.

Digits and photographs come with scikit-learn, so nothing is downloaded. Training and test scenes share neither a digit
scan (the split is `visiontok.models.tiny.digits_split`) nor a pixel of a photograph (left and right part of each).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visiontok.errors import MissingDependencyError, ParameterError

if TYPE_CHECKING:
    from PIL import Image

    from visiontok.models.tiny import DigitsSplit

SIDE = 64
PARTS = ("train", "test", "fit", "validation")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
SIZES = ("small", "big")
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
OPENINGS = ("a", "a photo of a", "there is a", "an image of a")
TEMPLATES = tuple(f"{opening} {{}}" for opening in OPENINGS)
"""Prompts for zero-shot classification by digit, in words that `tiny_clip` knows."""

RGB = ((225, 45, 45), (45, 195, 65), (65, 95, 250), (245, 225, 55), (245, 245, 245), (205, 75, 225))
_SPAN = (44.0, 58.0)  # pixels that the 8x8 scan covers
_CENTRES = ((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0))  # as (x, y), times _SHIFT
_SHIFT = 7 / 32  # from the middle, where half the side is 1
_TRAIN_SHARE = 0.6  # of the width of a photograph
_CROP = (40, 160)  # side of the piece of a photograph, pixels
_SEED = 0
_AT, _SIZED = "at the", "and it is"


@dataclass(frozen=True, eq=False)
class Scenes:
    """Rendered scenes and what is in them.

    Attributes:
        images: `(n, 3, 64, 64)` uint8.
        labels: `(n, 4)` int64, indices into `DIGITS`, `COLOURS`, `SIZES` and `PLACES`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """One scene as a picture."""
        from PIL import Image

        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())

    def captions(self) -> list[tuple[str, str]]:
        """Two captions of each scene that name everything in it."""
        rows = self.labels.tolist()
        return [(caption(row), caption(row, opening=1, order=1)) for row in rows]


def caption(labels: list[int], said: Sequence[bool] = (True, True, True), opening: int = 0, order: int = 0) -> str:
    """Words for a scene: `a small red three at the top left`.

    Args:
        labels: digit, colour, size and place, as in `Scenes.labels`.
        said: whether colour, size and place are named; the digit always is.
        opening: which of four openings.
        order: 1 puts the size behind the place.
    """
    digit, colour, size, place = labels
    words = [OPENINGS[opening]]
    words += [SIZES[size]] if said[1] and not order else []
    words += [COLOURS[colour]] if said[0] else []
    words += [DIGITS[digit]]
    words += [_AT, PLACES[place]] if said[2] else []
    words += [_SIZED, SIZES[size]] if said[1] and order else []
    return " ".join(words)


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption or a prompt may have, sorted."""
    return tuple(sorted(set(" ".join((*OPENINGS, *DIGITS, *COLOURS, *SIZES, *PLACES, _AT, _SIZED)).split())))


@functools.cache
def fixed_scenes(part: str = "test") -> Scenes:
    """Fixed scenes, no two with the same caption; each scan of the part occurs once.

    Args:
        part: `test`, 500 scenes, 50 of each digit; or `validation`, every fifth scan of `train`.

    Raises:
        ParameterError: another part.
        MissingDependencyError: scikit-learn is not installed.
    """
    if part not in ("test", "validation"):
        raise ParameterError(f"the scenes have the fixed parts 'test' and 'validation', not '{part}'")
    random = np.random.RandomState(_SEED)
    digits, _ = digit_scans(part)
    rest = np.array([(c, s, p) for c in range(len(COLOURS)) for s in range(len(SIZES)) for p in range(len(PLACES))])
    labels = np.zeros((len(digits), 4), dtype=np.int64)
    labels[:, 0] = digits.numpy()
    for digit in range(len(DIGITS)):
        rows = np.flatnonzero(labels[:, 0] == digit)
        labels[rows, 1:] = rest[random.permutation(len(rest))[: len(rows)]]
    return render(part, np.arange(len(digits)), labels, random)


def random_scenes(part: str, count: int, random: np.random.RandomState) -> Scenes:
    """Random scenes, for training.

    Args:
        part: `train`, or `fit`: those scans of it that are not in `validation`.
        count: how many.
        random: source of everything random, advanced by the call.
    """
    digits, _ = digit_scans(part)
    chosen = random.randint(len(digits), size=count)
    parts = [random.randint(len(words), size=count) for words in (COLOURS, SIZES, PLACES)]
    return render(part, chosen, np.stack([digits.numpy()[chosen], *parts], axis=1), random)


def render(part: str, chosen: np.ndarray, labels: np.ndarray, random: np.random.RandomState) -> Scenes:
    """Draws scenes.

    Args:
        part: `train`, `fit`, `validation` or `test`: which scans and which side of the photographs.
        chosen: `(n,)` scans of that part.
        labels: `(n, 4)` what to draw, as in `Scenes.labels`.
        random: place within limits, tilt, tint and background.
    """
    _, scans = digit_scans(part)
    count = len(chosen)
    size = torch.from_numpy(np.take(_SPAN, labels[:, 2]) * random.uniform(0.95, 1.05, count)).float()
    tilt = torch.from_numpy(random.uniform(-0.1, 0.1, count)).float()
    centre = torch.tensor(_CENTRES)[labels[:, 3]] * _SHIFT
    centre += torch.from_numpy(random.uniform(-0.03, 0.03, (count, 2)))
    ink = stamp(scans[torch.from_numpy(chosen)], SIDE / size, tilt, centre)  # (n, 1, 64, 64)
    ink = (ink * 1.4).clamp(0, 1)
    tint = torch.tensor(RGB)[labels[:, 1]] + torch.from_numpy(random.uniform(-18, 18, (count, 3)))
    ground = backgrounds(part, count, random)
    pictures = ground + ink * (tint[:, :, None, None] - ground)
    return Scenes(pictures.round().clamp(0, 255).to(torch.uint8), torch.from_numpy(labels))


def backgrounds(part: str, count: int, random: np.random.RandomState) -> Tensor:
    """`(count, 3, 64, 64)` float32 in [0, 255]: random pieces of the part's photographs, dimmed."""
    photos = _photographs(part)
    height, width = photos.shape[2:]
    side = random.uniform(*_CROP, count)
    left, top = (random.uniform(0, 1, count) * (length - side) for length in (width, height))
    which = torch.from_numpy(random.randint(len(photos), size=count))
    theta = np.zeros((count, 2, 3))
    theta[:, 0, 0], theta[:, 1, 1] = side / width, side / height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * left + side) / width - 1, (2 * top + side) / height - 1
    boxes = torch.from_numpy(theta).float()
    ground = torch.empty(count, 3, SIDE, SIDE)
    for index in range(len(photos)):
        mine = which == index
        grid = F.affine_grid(boxes[mine], [int(mine.sum()), 3, SIDE, SIDE], align_corners=False)
        # As one image whose height is all the outputs: the photograph is not copied for each of them.
        flat = grid.reshape(1, -1, SIDE, 2)
        drawn = F.grid_sample(photos[index : index + 1], flat, padding_mode="border", align_corners=False)
        ground[mine] = drawn.reshape(3, -1, SIDE, SIDE).transpose(0, 1)
    return ground


def stamp(scans: Tensor, scale: Tensor, tilt: Tensor, centre: Tensor) -> Tensor:
    """Lays small pictures onto the canvas.

    Args:
        scans: `(n, 1, h, w)` in [0, 1].
        scale: `(n,)` side of the canvas over that of the laid picture.
        tilt: `(n,)` radians.
        centre: `(n, 2)` x and y of the middle, from -1 to 1.

    Returns:
        `(n, 1, 64, 64)`, slightly beyond [0, 1] where the interpolation overshoots.
    """
    cos, sin = tilt.cos() * scale, tilt.sin() * scale
    x, y = centre.unbind(1)
    theta = torch.stack([cos, -sin, -(cos * x - sin * y), sin, cos, -(sin * x + cos * y)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(scans), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(scans, grid, mode="bicubic", align_corners=False)


@functools.cache
def digit_scans(part: str) -> tuple[Tensor, Tensor]:
    """Labels `(n,)` and scans `(n, 1, 8, 8)` in [0, 1] of one of `PARTS`.

    Raises:
        ParameterError: another part.
        MissingDependencyError: scikit-learn is not installed.
    """
    if part not in PARTS:
        raise ParameterError(f"the scenes have the parts {', '.join(PARTS)}, not '{part}'")
    split = _digits()
    labels, indices = (
        (split.test_labels, split.test_indices) if part == "test" else (split.train_labels, split.train_indices)
    )
    fifth = torch.arange(len(labels)) % 5 == 0
    chosen = {"fit": ~fifth, "validation": fifth}.get(part, slice(None))
    labels, indices = labels[chosen], indices[chosen]
    scans = torch.from_numpy(split.scans[indices.numpy()]).float() / 16
    return labels, scans[:, None]


@functools.cache
def _digits() -> DigitsSplit:
    from visiontok.models.tiny import digits_split

    return digits_split()


@functools.cache
def _photographs(part: str) -> Tensor:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-learn is not installed (the scenes are drawn on its photographs): pip install 'visiontok[bench]'"
        ) from error
    found: Any = load_sample_images()
    photos = torch.from_numpy(np.stack(found.images)).permute(0, 3, 1, 2).float()  # (2, 3, H, W)
    border = math.floor(photos.shape[3] * _TRAIN_SHARE)
    side = photos[..., border:] if part == "test" else photos[..., :border]
    # Darker than the digits, so that white and yellow ones stay visible on the sky.
    return side * 0.3 + 10
