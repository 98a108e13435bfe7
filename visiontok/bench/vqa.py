"""Questions about images: reading them, answering them, and exact match after normalization.

An answer is right if it equals any of the accepted ones once both are normalized as VQA evaluations do: lower case,
without articles and punctuation, number words as digits.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from visiontok.bench.accuracy import Accuracy, Paired, mcnemar, wilson
from visiontok.bench.data import Failure, UnreadableImageError, evenly, open_image
from visiontok.bench.mllm_models import Mllm
from visiontok.errors import FormatError, ParameterError

KEYS = ("image", "question", "answers")
MAX_NEW_TOKENS = 16
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS: dict[str, str] = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")


class Item(NamedTuple):
    """A question about an image, given as such or as a path, and the accepted answers."""

    image: Path | Image.Image
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: Its answers, in the order of the questions whose image could be read.
        right: `(n,)` bool.
        failures: Images that could not be read, once each; their questions are not in `texts`.
    """

    texts: tuple[str, ...]
    right: np.ndarray
    failures: tuple[Failure, ...] = ()


def read_jsonl(path: str | os.PathLike[str]) -> list[Item]:
    """Questions of a file with one JSON object per line: `{"image": path, "question": text, "answers": [text, ...]}`.

    Paths are relative to the file; `answers` may be a single text; other keys and empty lines are passed over.

    Raises:
        ParameterError: No such file.
        FormatError: A line is no such object, with its number; or there is none.
    """
    source = Path(path)
    if not source.is_file():
        raise ParameterError(f"'{source}' does not exist; a VQA run reads a .jsonl with the keys {', '.join(KEYS)}")
    items = []
    try:
        with open(source, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    items.append(_item(line, source.parent, f"'{source}', line {number}"))
    except UnicodeDecodeError as error:
        raise FormatError(f"'{source}' is not UTF-8 text: {error}") from None
    if not items:
        raise FormatError(f"'{source}' holds no question")
    return items


def embedded_items(part: str = "test") -> list[Item]:
    """The questions of `visiontok.bench.questions.fixed_questions`."""
    from visiontok.bench.questions import fixed_questions

    found = fixed_questions(part)
    return [
        Item(found.image(row), question.text, (question.answer,))
        for row, asked in enumerate(found.questions)
        for question in asked
    ]


def answer(
    mllm: Mllm,
    items: Sequence[Item],
    batch_size: int,
    *,
    max_items: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> Answers:
    """Asks a model, greedily, in batches that are padded on the left.

    Args:
        mllm: The model.
        items: The questions.
        batch_size: Questions per batch; unreadable images make a batch smaller.
        max_items: Ask only n, evenly spaced.
        max_new_tokens: The longest answer.
        on_batch: Called with the number of questions done.

    Raises:
        ParameterError: No image could be read.
    """
    asked = [items[number] for number in evenly(len(items), max_items)]
    texts: list[str] = []
    right: list[bool] = []
    failures: dict[str, Failure] = {}
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        opened = [(item, image) for item in batch if (image := _open(item.image, failures)) is not None]
        if opened:
            inputs = mllm.inputs([image for _, image in opened], [item.question for item, _ in opened])
            said = mllm.texts(mllm.generate(mllm.move(inputs), max_new_tokens=max_new_tokens))
            texts += said
            right += [matches(text, item.answers) for (item, _), text in zip(opened, said)]
        if on_batch is not None:
            on_batch(len(batch))
    if not texts:
        shown = "; ".join(f"{failure.path}: {failure.reason}" for failure in list(failures.values())[:3])
        raise ParameterError(f"no image could be read ({len(failures)} failed: {shown})")
    return Answers(tuple(texts), np.array(right), tuple(failures.values()))


def normalize(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, no punctuation but that within numbers."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|['’`]", "", text.lower())
    words: list[str] = re.findall(r"\d+(?:[.:]\d+)*|[^\W_]+", text)
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def matches(text: str, answers: Sequence[str]) -> bool:
    """Whether a text equals any of the accepted answers, both normalized."""
    said = normalize(text)
    return any(said == normalize(accepted) for accepted in answers)


def exact_match(found: Answers) -> Accuracy:
    """Share of right answers in percent with its 95 % Wilson interval."""
    hits, n = int(found.right.sum()), len(found.right)
    low, high = wilson(hits, n)
    return Accuracy(100 * hits / n, 100 * low, 100 * high, n)


def compare(found: Answers, reference: Answers) -> Paired:
    """Compares two models, question by question; agreement counts equal normalized answers, right or wrong.

    Raises:
        ParameterError: The two did not answer the same number of questions.
    """
    n = len(found.texts)
    if n != len(reference.texts):
        raise ParameterError(f"a paired comparison needs the same questions: {n} here, {len(reference.texts)} there")
    won, lost = int((found.right & ~reference.right).sum()), int((~found.right & reference.right).sum())
    equal = sum(normalize(mine) == normalize(other) for mine, other in zip(found.texts, reference.texts))
    return Paired(100 * (won - lost) / n, mcnemar(won, lost), lost, won, 100 * equal / n)


def _item(line: str, folder: Path, where: str) -> Item:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error})") from None
    missing = [key for key in KEYS if key not in value] if isinstance(value, dict) else list(KEYS)
    if missing:
        raise FormatError(f"{where}: no '{missing[0]}'; expected an object with {', '.join(KEYS)}")
    answers = [value["answers"]] if isinstance(value["answers"], str) else value["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise FormatError(f"{where}: 'answers' must be a text or a list of texts, at least one")
    for key in KEYS[:2]:
        if not isinstance(value[key], str) or not value[key].strip():
            raise FormatError(f"{where}: '{key}' must be a text that is not empty")
    return Item(folder / value["image"], value["question"], tuple(answers))


def _open(image: Path | Image.Image, failures: dict[str, Failure]) -> Image.Image | None:
    if isinstance(image, Image.Image):
        return image
    name = str(image)
    if name in failures:
        return None
    try:
        return open_image(image)
    except UnreadableImageError as error:
        failures[name] = Failure(name, str(error).removeprefix(f"{name}: "))
        return None
