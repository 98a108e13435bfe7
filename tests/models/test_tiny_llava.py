"""The shipped tiny LLaVA, its processor and its questions: what is in the package, and how good it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from visiontok.bench import mllm_models, questions, scenes, vqa  # noqa: E402
from visiontok.errors import FormatError, ParameterError  # noqa: E402
from visiontok.models import tiny_llava as tl  # noqa: E402
from visiontok.models.tiny import METADATA_KEY, MissingWeightsError  # noqa: E402

ANSWERS_SHA256 = "8a86e4075c1d8f02"


@pytest.fixture(scope="module")
def mllm() -> mllm_models.Mllm:
    return mllm_models.load("tiny-llava")


def test_weights_are_small_and_half_precision_and_load_as_transformers_class(mllm: mllm_models.Mllm) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    state = load_file(tl.tiny_llava_path())
    assert tl.tiny_llava_path().stat().st_size < 3e6
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert type(mllm.model) is LlavaForConditionalGeneration
    assert type(mllm.processor) is LlavaProcessor
    assert not mllm.model.training
    assert {value.dtype for value in mllm.model.parameters()} == {torch.float32}
    info = tl.tiny_llava_info()
    assert info["config"] == tl.configuration(tl.vocabulary())
    assert tuple(info["vocabulary"]) == tl.vocabulary(False)
    assert info["sha256"] == tl.checksum(state)
    assert info["command"].startswith("python benchmarks/train_tiny_llava.py --steps ")


def test_answers_are_as_good_as_the_weights_file_claims(mllm: mllm_models.Mllm) -> None:
    measured = tl.tiny_llava_info()["measured"]
    assert measured["exact_match"] > measured["chance"] + 0.3
    found = vqa.answer(mllm, vqa.embedded_items(), 50, max_items=200, max_new_tokens=4)
    assert abs(found.right.mean() - measured["exact_match"]) < 0.08


def test_the_class_token_looks_at_what_is_there(mllm: mllm_models.Mllm) -> None:
    """Methods rank patches by the class token's attention, so it must tell objects from background."""
    found = questions.fixed_questions()
    pixels = mllm.processor.image_processor([found.image(row) for row in range(40)], return_tensors="pt").pixel_values
    tower = mllm.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = tower(pixels, output_attentions=True).attentions[-2]
    tower.set_attn_implementation("sdpa")
    paid = attention[:, :, 0, 1:].mean(1).view(-1, 8, 8)
    column = ((torch.arange(8) + 0.5) / 8 * 3).long()
    place = column[:, None] * 3 + column[None]
    there = found.objects[:40][:, place] >= 0
    assert paid[there].mean() > 1.2 * paid[~there].mean()


def test_processor_puts_one_token_per_patch_and_pads_on_the_left(mllm: mllm_models.Mllm) -> None:
    tokenizer = mllm.processor.tokenizer
    pictures = [Image.new("L", (30, 50)), Image.new("RGB", (200, 90))]
    inputs = mllm.inputs(pictures, ["where is the nine?", "how many digits are there?"])
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [64, 64]
    assert inputs["attention_mask"].sum(1).tolist() == [74, 75]
    assert inputs["input_ids"][0, :2].tolist() == [tokenizer.pad_token_id, tokenizer.bos_token_id]
    text = mllm.texts(inputs["input_ids"])[0]
    assert text == "user : where is the nine ? assistant :"
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert tokenizer("zebra")["input_ids"][-1] == tokenizer.unk_token_id


def test_processor_normalizes_as_the_training_did(mllm: mllm_models.Mllm) -> None:
    image = questions.fixed_questions().images[0]
    picture = questions.fixed_questions().image(0)
    inputs = mllm.inputs([picture], ["where is the nine?"])
    assert torch.allclose(inputs["pixel_values"][0], image.float() / 127.5 - 1, atol=1e-6)


def test_answers_do_not_depend_on_the_batch(mllm: mllm_models.Mllm) -> None:
    items = vqa.embedded_items()[:6]
    together = vqa.answer(mllm, items, 6, max_new_tokens=4)
    alone = vqa.answer(mllm, items, 1, max_new_tokens=4)
    assert together.texts == alone.texts


def test_saves_and_loads_as_a_directory_of_transformers(mllm: mllm_models.Mllm, tmp_path: Path) -> None:
    mllm.model.save_pretrained(tmp_path)
    mllm.processor.save_pretrained(tmp_path)
    again = mllm_models.load(f"hf:{tmp_path}")
    items = vqa.embedded_items()[:4]
    assert vqa.answer(again, items, 4, max_new_tokens=4).texts == vqa.answer(mllm, items, 4, max_new_tokens=4).texts


def test_broken_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    path = tl.tiny_llava_path()
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {METADATA_KEY: file.metadata()[METADATA_KEY]}
    state = load_file(path)
    state["lm_head.weight"][0, 0] += 1
    broken = tmp_path / "w.safetensors"
    save_file(state, broken, metadata)
    monkeypatch.setattr(tl, "tiny_llava_path", lambda: broken)
    with pytest.raises(FormatError, match="checksum of the weights differs"):
        tl.tiny_llava()
    broken.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="does not hold the weights of tiny_llava"):
        tl.tiny_llava()
    broken.unlink()
    with pytest.raises(MissingWeightsError, match=r"train_tiny_llava\.py --out"):
        tl.tiny_llava()


# ---- the questions


def test_questions_never_change() -> None:
    asked = questions.fixed_questions().questions
    digest = hashlib.sha256(repr([[tuple(one) for one in mine] for mine in asked]).encode()).hexdigest()
    assert digest[:16] == ANSWERS_SHA256
    assert len(asked) == 250
    assert {len(mine) for mine in asked} == {questions.QUESTIONS}


def test_answers_follow_from_the_objects() -> None:
    """A second reading of every answer, from the labels alone."""
    found = questions.random_questions("test", 60, 5, np.random.RandomState(3))
    for objects, colours, asked in zip(found.objects.tolist(), found.colours.tolist(), found.questions):
        at = {questions.PLACES[place]: questions.OBJECTS[kind] for place, kind in enumerate(objects) if kind >= 0}
        hue = {
            questions.OBJECTS[kind]: scenes.COLOURS[colours[place]] for place, kind in enumerate(objects) if kind >= 0
        }
        digits = [name for name in at.values() if name in scenes.DIGITS]
        assert {one.kind for one in asked} == set(questions.KINDS)
        for text, answer, kind in asked:
            about = text.rstrip("?").split(" the ")[-1]
            if kind == "digit":
                assert answer == at[about]
            elif kind == "count":
                assert answer == scenes.DIGITS[len(digits)]
            elif kind == "colour":
                assert answer == hue[about]
            elif kind == "place":
                assert at[answer] == about
            else:
                assert answer == ("yes" if text.rstrip("?").split()[-1] in at.values() else "no")


def test_objects_are_drawn_where_and_as_the_labels_say() -> None:
    found = questions.random_questions("test", 30, 1, np.random.RandomState(4))
    pixels = found.images.float()
    for row in range(30):
        for place in range(9):
            y, x = (int(32 + (part - 1) * 64 / 3) for part in divmod(place, 3))
            patch = pixels[row, :, max(0, y - 7) : y + 7, max(0, x - 7) : x + 7].flatten(1)
            colour = int(found.colours[row, place])
            near = (patch - torch.tensor(scenes.RGB)[colour].float()[:, None]).abs().amax(0) < 45
            assert near.any() if colour >= 0 else patch.amax(0).median() < 110


def test_training_and_test_share_no_scan() -> None:
    drawn = {part: {scan.numpy().tobytes() for scan in scenes.digit_scans(part)[1]} for part in ("train", "test")}
    assert not drawn["train"] & drawn["test"]
    with pytest.raises(ParameterError, match="'test' and 'validation', not 'train'"):
        questions.fixed_questions("train")
