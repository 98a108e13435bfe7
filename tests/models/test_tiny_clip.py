"""The shipped tiny CLIP and its scenes: what is in the package, how good it is, and that its data never move."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")

from torch.nn import functional as F  # noqa: E402

from visiontok.bench import scenes  # noqa: E402
from visiontok.errors import FormatError, MissingDependencyError, ParameterError  # noqa: E402
from visiontok.models import tiny_clip as tc  # noqa: E402
from visiontok.models.tiny import MissingWeightsError  # noqa: E402

LABELS_SHA256 = "bb668e69d8c0e8f3"
PIXEL_MEAN = 68.425


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tc.tiny_clip()


@pytest.fixture(scope="module")
def found() -> scenes.Scenes:
    return scenes.fixed_scenes()


def test_weights_are_small_and_half_precision_and_load_as_open_clips_class(model: torch.nn.Module) -> None:
    from open_clip.model import CLIP
    from safetensors.torch import load_file

    assert tc.tiny_clip_path().stat().st_size < 1.5e6
    assert {value.dtype for value in load_file(tc.tiny_clip_path()).values()} == {torch.float16}
    assert type(model) is CLIP
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    info = tc.tiny_clip_info()
    assert info["config"] == tc.configuration(tc.tiny_tokenizer())
    assert info["command"].startswith("python benchmarks/train_tiny_clip.py --steps ")
    assert tuple(info["vocabulary"]) == scenes.vocabulary()


@torch.inference_mode()
def test_accuracy_and_recall_are_what_the_weights_file_claims(model: torch.nn.Module, found: scenes.Scenes) -> None:
    tokenizer, chosen = tc.tiny_tokenizer(), slice(0, 200)
    images = model.encode_image(tc.normalize(found.images[chosen]), normalize=True)
    prompts = [template.format(digit) for digit in scenes.DIGITS for template in scenes.TEMPLATES]
    classes = model.encode_text(tokenizer(prompts), normalize=True).view(10, len(scenes.TEMPLATES), -1).mean(1)
    right = (images @ F.normalize(classes, dim=-1).T).argmax(1) == found.labels[chosen, 0]
    claimed = tc.tiny_clip_info()["measured"]
    accuracy = right.float().mean().item()
    assert accuracy > 0.85
    # 200 of the 500 scenes: three standard errors of a share of 200.
    assert accuracy == pytest.approx(claimed["zeroshot_top1"], abs=0.06)
    texts = model.encode_text(tokenizer([first for first, _ in found.captions()]), normalize=True)
    recall = ((images @ texts.T).argmax(1) == torch.arange(200)).float().mean().item()
    assert recall == pytest.approx(claimed["image_to_text_r1"], abs=0.1)
    assert 0.3 < recall < 0.99


def test_tokenizer_is_called_like_open_clips() -> None:
    tokenizer = tc.WordTokenizer(["a", "red", "three"], context_length=6)
    ids = tokenizer(["A red, THREE!", "a blue three a red three a"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 3, 4, 5, 6, 0], [1, 3, 2, 5, 3, 6]]
    assert (ids.argmax(1) == torch.tensor([4, 5])).all()
    assert tokenizer("a").shape == (1, 6)
    assert tokenizer(["a"], context_length=4).tolist() == [[1, 3, 6, 0]]
    assert tokenizer.vocab_size == 7


def test_scenes_are_fixed_and_no_caption_repeats(found: scenes.Scenes) -> None:
    assert found.images.shape == (500, 3, 64, 64)
    assert found.images.dtype == torch.uint8
    assert torch.bincount(found.labels[:, 0]).tolist() == [50] * 10
    assert len({first for first, _ in found.captions()}) == 500
    assert len({second for _, second in found.captions()}) == 500
    digest = hashlib.sha256(found.labels.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest.startswith(LABELS_SHA256)
    assert found.images.float().mean().item() == pytest.approx(PIXEL_MEAN, abs=0.05)
    scenes.fixed_scenes.cache_clear()
    assert torch.equal(scenes.fixed_scenes().images, found.images)


def test_training_scenes_share_no_scan_and_no_pixel_of_a_photograph_with_the_test() -> None:
    scans = {part: {scan.numpy().tobytes() for scan in scenes.digit_scans(part)[1]} for part in scenes.PARTS}
    assert not scans["train"] & scans["test"]
    assert not scans["fit"] & scans["validation"]
    assert scans["fit"] | scans["validation"] == scans["train"]
    widths = [scenes._photographs(part).shape[3] for part in ("train", "test")]
    assert sum(widths) == 640
    with pytest.raises(ParameterError, match="'test' and 'validation', not 'train'"):
        scenes.fixed_scenes("train")
    with pytest.raises(ParameterError, match="not 'val'"):
        scenes.random_scenes("val", 1, np.random.RandomState(0))


def test_what_is_drawn_is_what_is_said() -> None:
    """A red digit is red where it is said to be, and its size is the one that is said."""
    random = np.random.RandomState(1)
    labels = np.array([[3, 0, size, place] for size in range(2) for place in range(5)] * 4)
    batch = scenes.render("test", random.randint(500, size=len(labels)), labels, random)
    pixels = batch.images.double()
    ink = (pixels[:, 0] > 150) & (pixels[:, 1] < 100) & (pixels[:, 2] < 100)
    area = ink.sum(dim=(1, 2)).double().view(4, 2, 5).mean(dim=(0, 2))
    assert area[1] > 1.4 * area[0]
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    count = ink.sum(dim=(1, 2)).clamp_min(1)
    y, x = ((ink * grid).sum(dim=(1, 2)) / count - 31.5 for grid in (rows, columns))
    for place, (wanted_x, wanted_y) in enumerate(((-1, -1), (1, -1), (-1, 1), (1, 1))):
        mine = torch.from_numpy(labels[:, 3] == place)
        assert (x[mine] * wanted_x).mean() > 4
        assert (y[mine] * wanted_y).mean() > 4
    assert scenes.caption([3, 0, 1, 4], opening=1, order=1) == "a photo of a red three at the center and it is big"
    assert scenes.caption([3, 0, 0, 0], said=(True, False, False)) == "a red three"


def test_missing_open_clip_and_weights_say_what_to_do(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "open_clip.model", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'visiontok\[clip\]'"):
            tc.tiny_clip()
    monkeypatch.setattr(tc, "WEIGHTS_DIR", tmp_path)
    with pytest.raises(MissingWeightsError, match=r"Reinstall visiontok.*train_tiny_clip.py --out"):
        tc.tiny_clip()
    tc.tiny_clip(pretrained=False)
    tc.tiny_clip_path().write_bytes(b"\x00" * 100)
    with pytest.raises(FormatError, match="reinstall"):
        tc.tiny_clip()


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'open_clip', 'sklearn', 'numpy', 'PIL', 'safetensors'}"
    code = f"import sys, visiontok.models.tiny_clip; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
