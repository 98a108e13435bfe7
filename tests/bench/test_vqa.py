"""Questions about images: reading files, normalizing answers, counting broken images, comparing models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from visiontok.bench import mllm_models, vqa  # noqa: E402
from visiontok.bench.data import Failure  # noqa: E402
from visiontok.errors import FormatError, ParameterError, UnknownNameError  # noqa: E402


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Square.", "square"),
        ("a red, big ball", "red big ball"),
        ("Three", "3"),
        ("none", "0"),
        ("1,200.5 m", "1200.5 m"),
        ("3.", "3"),
        ("10:30", "10:30"),
        ("don't", "dont"),
        ("top-left", "top left"),
        ("Émile", "émile"),
        ("...", ""),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert vqa.normalize(text) == normal
    assert vqa.normalize(normal) == normal


def test_any_of_several_answers_is_right() -> None:
    assert vqa.matches("The two.", ("three", "2"))
    assert not vqa.matches("two men", ("two", "men"))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_reads_lines_relative_to_the_file(tmp_path: Path) -> None:
    row = {"image": "a/b.png", "question": "what?", "answers": ["x", "y"], "id": 7}
    path = write(tmp_path / "q.jsonl", row, "", row | {"answers": "z"})
    first, second = vqa.read_jsonl(path)
    assert first == (tmp_path / "a/b.png", "what?", ("x", "y"))
    assert second.answers == ("z",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: no 'image'"),
        ({"image": "a", "answers": ["b"]}, "line 2: no 'question'"),
        ({"image": "a", "question": " ", "answers": ["b"]}, "line 2: 'question' must be a text"),
        ({"image": 3, "question": "q", "answers": ["b"]}, "line 2: 'image' must be a text"),
        ({"image": "a", "question": "q", "answers": []}, "line 2: 'answers' must be"),
        ({"image": "a", "question": "q", "answers": [1]}, "line 2: 'answers' must be"),
    ],
)
def test_bad_lines_are_named(line: Any, reason: str, tmp_path: Path) -> None:
    good = {"image": "a", "question": "q", "answers": ["b"]}
    with pytest.raises(FormatError, match=reason):
        vqa.read_jsonl(write(tmp_path / "q.jsonl", good, line))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="does not exist"):
        vqa.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match="holds no question"):
        vqa.read_jsonl(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not UTF-8"):
        vqa.read_jsonl(tmp_path / "b.jsonl")


class Parrot:
    """Answers with the colour of the image's first pixel and notes the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def inputs(self, images: list[Image.Image], questions: list[str]) -> list[tuple[int, ...]]:
        assert len(images) == len(questions)
        return [image.getpixel((0, 0)) for image in images]  # pyright: ignore

    def move(self, inputs: Any) -> Any:
        return inputs

    def generate(self, inputs: Any, **options: Any) -> Any:
        self.batches.append(len(inputs))
        return inputs

    def texts(self, ids: Any) -> list[str]:
        return ["red" if pixel[0] else "black" for pixel in ids]


def test_broken_images_are_counted_once_and_never_replaced(tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("black", (0, 0, 0))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    names = ["red", "broken", "black", "broken", "missing", "red"]
    items = [vqa.Item(tmp_path / f"{name}.png", "q", ("red",)) for name in names]
    model, seen = Parrot(), []
    found = vqa.answer(model, items, 2, on_batch=seen.append)  # pyright: ignore[reportArgumentType]
    assert found.texts == ("red", "black", "red")
    assert found.right.tolist() == [True, False, True]
    assert [Path(failure.path).name for failure in found.failures] == ["broken.png", "missing.png"]
    assert "FileNotFoundError" in found.failures[1].reason
    assert (model.batches, sum(seen)) == ([1, 1, 1], 6)
    with pytest.raises(ParameterError, match=r"no image could be read \(2 failed"):
        vqa.answer(model, [items[1], items[4]], 2)  # pyright: ignore[reportArgumentType]


def test_max_items_are_spread_evenly() -> None:
    pictures = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in (0, 1, 0, 1, 0, 1)]
    items = [vqa.Item(picture, "q", ("red",)) for picture in pictures]
    found = vqa.answer(Parrot(), items, 4, max_items=3)  # pyright: ignore[reportArgumentType]
    assert len(found.texts) == 3


def test_comparison_is_by_question() -> None:
    one = vqa.Answers(("2", "red", "left", "x"), np.array([True, True, False, False]))
    two = vqa.Answers(("two", "blue", "right", "y"), np.array([True, False, True, False]), (Failure("a", "b"),))
    paired = vqa.compare(one, two)
    assert paired == (0.0, 1.0, 1, 1, 25.0)
    assert vqa.exact_match(one)[::3] == (50.0, 4)
    with pytest.raises(ParameterError, match="4 here, 3 there"):
        vqa.compare(one, vqa.Answers(two.texts[:3], two.right[:3]))


class Template:
    chat_template = "x"

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        parts = messages[0]["content"]
        return "|".join(part["type"] for part in parts) + parts[1]["text"]


def test_prompts_follow_the_processor() -> None:
    model = torch.nn.Linear(1, 1)
    assert mllm_models.Mllm(model, Template()).prompt("why?") == "image|textwhy?"
    plain = type("Plain", (), {"chat_template": None, "image_token": "<i>"})()
    assert mllm_models.Mllm(model, plain).prompt("why?") == "USER: <i>\nwhy? ASSISTANT:"
    with pytest.raises(ParameterError, match="neither a chat template nor an image token"):
        mllm_models.Mllm(model, type("None", (), {})()).prompt("why?")


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown multimodal model 'llava'"):
        mllm_models.load("llava")
    with pytest.raises(ParameterError, match="nothing is downloaded"):
        mllm_models.load("hf:org/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="transformers cannot load"):
        mllm_models.load(f"hf:{tmp_path}")
    assert mllm_models.is_mllm("tiny-llava")
    assert mllm_models.is_mllm("tiny_llava")
    assert not mllm_models.is_mllm("tiny_vit")
