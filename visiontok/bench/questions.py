"""Rendered scenes with questions: a few small handwritten digits and shapes in colours on a piece of a photograph.

Digits and photographs are those of `visiontok.bench.scenes`, split alike: training and test share neither a digit scan
nor a pixel of a photograph. An object covers about a tenth of the picture, so most visual tokens can go, but not any.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from visiontok.bench import scenes
from visiontok.errors import ParameterError

if TYPE_CHECKING:
    from PIL import Image

SIDE = scenes.SIDE
SHAPES = ("square", "circle", "triangle")
OBJECTS = (*scenes.DIGITS, *SHAPES)
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "center" for row in ROWS for column in COLUMNS)
KINDS = ("digit", "count", "colour", "place", "presence")
MAX_DIGITS, MAX_SHAPES = 4, 2
CELL = 2 / 3  # of a place, where the picture reaches from -1 to 1
QUESTIONS = 4
"""Questions of each fixed scene."""

_SPAN = (19.0, 22.0)  # pixels that the 8x8 scan covers
_SEED = 1
_SHAPE_SIDE = 32
_TEXTS = {
    "digit": "which digit is at the {}?",
    "count": "how many digits are there?",
    "colour": "what colour is the {}?",
    "place": "where is the {}?",
    "presence": "is there any {}?",
}


class Question(NamedTuple):
    """What is asked about a scene, its one right answer, and which of `KINDS` it is."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Questioned:
    """Rendered scenes and what is in them.

    Attributes:
        images: `(n, 3, 64, 64)` uint8.
        objects: `(n, 9)` int64, the index into `OBJECTS` of what is at each place, -1 for nothing.
        colours: `(n, 9)` int64, the index into `scenes.COLOURS`, -1 for nothing.
        questions: Of each scene.
    """

    images: Tensor
    objects: Tensor
    colours: Tensor
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        return len(self.objects)

    def image(self, index: int) -> Image.Image:
        """One scene as a picture."""
        from PIL import Image

        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def vocabulary() -> tuple[str, ...]:
    """Every word and sign of the questions and answers, sorted."""
    answers = ("yes no", *scenes.DIGITS, *scenes.COLOURS, *OBJECTS, *PLACES)
    return tuple(sorted(set(re.findall(r"[a-z]+|\?", " ".join((*_TEXTS.values(), *answers))))))


@functools.cache
def fixed_questions(part: str = "test") -> Questioned:
    """250 fixed scenes with four questions each, of four different kinds.

    Args:
        part: `test`; or `validation`, with every fifth digit scan of `train`.

    Raises:
        ParameterError: Another part.
        MissingDependencyError: scikit-learn is not installed.
    """
    if part not in ("test", "validation"):
        raise ParameterError(f"the questions have the fixed parts 'test' and 'validation', not '{part}'")
    return random_questions(part, 250, QUESTIONS, np.random.RandomState(_SEED))


def random_questions(part: str, count: int, each: int, random: np.random.RandomState) -> Questioned:
    """Random scenes with questions.

    Args:
        part: One of `scenes.PARTS`.
        count: How many scenes.
        each: Questions of a scene; kinds are drawn without repetition until there is none left.
        random: Source of everything random, advanced by the call.
    """
    labels, _ = scenes.digit_scans(part)
    by_digit = [np.flatnonzero(labels.numpy() == digit) for digit in range(len(scenes.DIGITS))]
    objects = np.full((count, len(PLACES)), -1, dtype=np.int64)
    colours, chosen = objects.copy(), objects.copy()
    for row in range(count):
        digits = random.permutation(len(scenes.DIGITS))[: random.randint(1, MAX_DIGITS + 1)]
        shapes = random.permutation(len(SHAPES))[: random.randint(1, MAX_SHAPES + 1)] + len(scenes.DIGITS)
        inside = np.concatenate([digits, shapes])
        places = random.permutation(len(PLACES))[: len(inside)]
        objects[row, places] = inside
        colours[row, places] = random.randint(len(scenes.COLOURS), size=len(inside))
        chosen[row, places[: len(digits)]] = [by_digit[digit][random.randint(len(by_digit[digit]))] for digit in digits]
    images = _render(part, objects, colours, chosen, random)
    asked = tuple(_ask(mine, hues, each, random) for mine, hues in zip(objects, colours))
    return Questioned(images, torch.from_numpy(objects), torch.from_numpy(colours), asked)


def _ask(objects: np.ndarray, colours: np.ndarray, each: int, random: np.random.RandomState) -> tuple[Question, ...]:
    order = np.concatenate([random.permutation(len(KINDS)) for _ in range(-(-each // len(KINDS)))])[:each]
    return tuple(_question(KINDS[kind], objects, colours, random) for kind in order)


def _question(kind: str, objects: np.ndarray, colours: np.ndarray, random: np.random.RandomState) -> Question:
    filled = np.flatnonzero(objects >= 0)
    digits = filled[objects[filled] < len(scenes.DIGITS)]
    about, answer = "", str(scenes.DIGITS[len(digits)])
    if kind == "digit":
        place = random.choice(digits)
        about, answer = PLACES[place], OBJECTS[objects[place]]
    elif kind in ("colour", "place"):
        place = random.choice(filled)
        about = OBJECTS[objects[place]]
        answer = PLACES[place] if kind == "place" else scenes.COLOURS[colours[place]]
    elif kind == "presence":
        there = random.randint(2) == 1
        known = objects[filled] if there else np.setdiff1d(np.arange(len(OBJECTS)), objects)
        about, answer = OBJECTS[random.choice(known)], "yes" if there else "no"
    return Question(_TEXTS[kind].format(about), answer, kind)


def _render(
    part: str, objects: np.ndarray, colours: np.ndarray, chosen: np.ndarray, random: np.random.RandomState
) -> Tensor:
    _, scans = scenes.digit_scans(part)
    row, place = np.nonzero(objects >= 0)
    kind, count = objects[row, place], len(row)
    digit = kind < len(scenes.DIGITS)
    size = torch.from_numpy(random.uniform(*_SPAN, count)).float()
    tilt = torch.from_numpy(random.uniform(-0.1, 0.1, count)).float()
    centre = np.stack([place % 3 - 1, place // 3 - 1], axis=1) * CELL + random.uniform(-0.06, 0.06, (count, 2))
    where = torch.from_numpy(centre).float()
    tint = torch.tensor(scenes.RGB)[colours[row, place]] + torch.from_numpy(random.uniform(-18, 18, (count, 3)))
    ink = torch.empty(count, 1, SIDE, SIDE)
    drawn, stamps = torch.from_numpy(digit), _stamps()[kind[~digit] - len(scenes.DIGITS)]
    handwritten = scans[torch.from_numpy(chosen[row, place][digit])]
    ink[drawn] = scenes.stamp(handwritten, SIDE / size[drawn], tilt[drawn], where[drawn])
    ink[~drawn] = scenes.stamp(stamps, SIDE / size[~drawn], tilt[~drawn], where[~drawn])
    ink = (ink * 1.4).clamp(0, 1)
    # Objects lie apart, so a sum draws them all at once.
    cover = torch.zeros(len(objects), 1, SIDE, SIDE).index_add_(0, torch.from_numpy(row), ink)
    paint = torch.zeros(len(objects), 3, SIDE, SIDE)
    paint.index_add_(0, torch.from_numpy(row), ink * tint.float()[:, :, None, None])
    ground = scenes.backgrounds(part, len(objects), random)
    return (ground * (1 - cover.clamp(max=1)) + paint).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def _stamps() -> Tensor:
    axis = (torch.arange(_SHAPE_SIDE) + 0.5) / _SHAPE_SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    square = torch.maximum(x.abs(), y.abs()) < 0.6
    circle = x**2 + y**2 < 0.7**2
    triangle = (y < 0.6) & (y > 2 * x.abs() - 0.75)
    return torch.stack([square, circle, triangle]).float().unsqueeze(1)
