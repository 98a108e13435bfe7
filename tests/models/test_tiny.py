"""The shipped tiny ViTs: what is in the package, how accurate it is, and that its data never move."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visiontok.errors import FormatError, MissingDependencyError, ParameterError, UnknownNameError, VisionTokError
from visiontok.models import tiny

pytest.importorskip("timm")
pytest.importorskip("sklearn")

NAMES = list(tiny.TINY_MODELS)
TEST_INDICES_SHA256 = "f42dd45be7b485935b0f9277f2c1e0fb4f604fadd1b156f9855001513d46640a"


@pytest.fixture(scope="module")
def split():
    return tiny.digits_split()


def _predict(model, images):
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in images.split(100)])


@pytest.mark.parametrize("name", NAMES)
def test_weights_load_as_an_fp32_model_in_eval_mode(name):
    from timm.models.vision_transformer import VisionTransformer

    model = tiny.TINY_MODELS[name](True)
    assert type(model) is VisionTransformer
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_what_the_weights_file_claims(name, split):
    predicted = _predict(tiny.TINY_MODELS[name](True), split.test_images)
    accuracy = (predicted == split.test_labels).float().mean().item()
    info = tiny.tiny_weights_info(name)
    assert accuracy >= 0.96
    # Two images of slack: another CPU or torch may round a borderline logit the other way.
    assert accuracy == pytest.approx(float(info["test_accuracy"]), abs=2 / len(split.test_labels) + 1e-6)
    assert info["test_images"] == str(len(split.test_labels))


@pytest.mark.parametrize("name", NAMES)
def test_weights_file_records_how_it_was_made(name):
    info = tiny.tiny_weights_info(name)
    assert info["command"].startswith(f"python benchmarks/train_tiny.py --model {name} ")
    assert f"--seed {info['seed']}" in info["command"]
    assert "load_digits" in info["data"]
    assert "torch==" in info["versions"]


def test_weights_are_small_and_half_precision():
    from safetensors.torch import load_file

    paths = [tiny.tiny_weights_path(name) for name in NAMES]
    sizes = [path.stat().st_size for path in paths]
    assert sizes[0] <= 1.2e6
    assert sum(sizes) <= 1.6e6
    assert {tensor.dtype for path in paths for tensor in load_file(path).values()} == {torch.float16}


def test_models_see_64_patches_and_a_class_token():
    images = torch.zeros(2, *tiny.INPUT_SIZE)
    for build in tiny.TINY_MODELS.values():
        model = build(False)
        assert model.forward_features(images).shape == (2, 65, 64)
        assert model.patch_embed.grid_size == (8, 8)
        assert model.num_prefix_tokens == 1
        assert model(images).shape == (2, 10)


def test_small_dense_model_has_about_half_the_compute():
    from torch.utils.flop_counter import FlopCounterMode

    macs = []
    for name in NAMES:
        model = tiny.TINY_MODELS[name](False)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, *tiny.INPUT_SIZE))
        macs.append(counter.get_total_flops() / 2)
    assert 0.5 <= macs[1] / macs[0] <= 0.6


def test_split_is_fixed_stratified_and_disjoint(split):
    assert hashlib.sha256(split.test_indices.numpy().astype("<i8").tobytes()).hexdigest() == TEST_INDICES_SHA256
    together = torch.cat([split.train_indices, split.test_indices]).sort().values
    assert torch.equal(together, torch.arange(1797))
    assert torch.bincount(split.test_labels).tolist() == [50] * 10
    scans = split.scans.reshape(-1, 64)
    train, test = scans[split.train_indices.numpy()], scans[split.test_indices.numpy()]
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in test}


def test_split_does_not_depend_on_the_global_seed(split):
    np.random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(tiny.digits_split().test_indices, split.test_indices)


def test_split_images_are_the_transformed_scans(split):
    assert split.test_images.shape == (500, 3, 32, 32)
    assert split.train_images.shape == (1297, 3, 32, 32)
    assert split.test_images.min() == -1
    assert split.test_images.max() == 1
    image = split.image(3)
    assert (image.mode, image.size) == ("L", (8, 8))
    assert torch.equal(tiny.tiny_transform()(image), split.test_images[3])
    assert torch.equal(tiny.tiny_transform()(split.image(5, part="train")), split.train_images[5])
    with pytest.raises(ParameterError, match="'test' or 'train'"):
        split.image(0, part="val")


def _ramp():
    return np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV", "I", "F", "RGBX"]
)
def test_transform_takes_every_mode(mode):
    image = Image.fromarray(_ramp())
    for step in {"RGBa": ["RGBA"], "La": ["LA"], "HSV": ["RGB"], "PA": []}.get(mode, []):
        image = image.convert(step)
    image = Image.frombytes("PA", (16, 16), bytes(512)) if mode == "PA" else image.convert(mode)
    out = tiny.tiny_transform()(image)
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.float32
    assert out.min() >= -1
    assert out.max() <= 1
    if mode in ("L", "RGB", "RGBA", "RGBa", "LA", "La", "I", "F", "RGBX", "P"):
        torch.testing.assert_close(out, tiny.tiny_transform()(Image.fromarray(_ramp())), rtol=0, atol=2 / 127.5)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_transform_scales_16_bit_gray_instead_of_clipping_it(dtype):
    mode = {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[dtype]
    image = Image.frombytes(mode, (16, 16), (_ramp().astype(np.int64) * 257).astype(dtype).tobytes())
    torch.testing.assert_close(tiny.tiny_transform()(image), tiny.tiny_transform()(Image.fromarray(_ramp())))


def test_transform_lays_transparency_over_black_and_honors_exif():
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert (tiny.tiny_transform()(clear) == -1).all()
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 255, 255])
    palette.info["transparency"] = 0
    assert (tiny.tiny_transform()(palette) == -1).all()

    upright = Image.fromarray(_ramp())
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    torch.testing.assert_close(tiny.tiny_transform()(turned), tiny.tiny_transform()(upright))


def test_timm_derives_the_same_transform_from_the_model(split):
    from timm.data import create_transform, resolve_model_data_config

    model = tiny.tiny_vit(False)
    theirs = create_transform(**resolve_model_data_config(model))
    for image in (split.image(0).convert("RGB"), Image.fromarray(_ramp()[:10]).convert("RGB")):
        torch.testing.assert_close(theirs(image), tiny.tiny_transform()(image))
    assert model.default_cfg["label_names"] == split.class_names


def test_transform_and_models_pickle(split):
    transform = pickle.loads(pickle.dumps(tiny.tiny_transform()))
    assert transform == tiny.tiny_transform()
    model = tiny.tiny_vit()
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(split.test_images[:2]), model(split.test_images[:2]))


def test_missing_and_broken_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "WEIGHTS_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Reinstall visiontok.*train_tiny.py --model tiny_vit") as caught:
        tiny.tiny_vit()
    assert isinstance(caught.value, VisionTokError)
    tiny.tiny_vit(pretrained=False)

    tiny.tiny_weights_path("tiny_vit").write_bytes(b"\x00" * 100)
    with pytest.raises(FormatError, match="reinstall"):
        tiny.tiny_vit()
    with pytest.raises(UnknownNameError, match="tiny_vit_small_dense"):
        tiny.tiny_weights_path("tiny")


def test_weights_of_the_other_model_are_refused(tmp_path, monkeypatch):
    other = tiny.tiny_weights_path("tiny_vit_small_dense").read_bytes()
    monkeypatch.setattr(tiny, "WEIGHTS_DIR", tmp_path)
    tiny.tiny_weights_path("tiny_vit").write_bytes(other)
    with pytest.raises(FormatError, match="Missing key"):
        tiny.tiny_vit()


@pytest.mark.parametrize(
    ("module", "call"),
    [("timm.models.vision_transformer", tiny.tiny_vit), ("sklearn.datasets", tiny.digits_split)],
)
def test_missing_library_names_the_extra(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "visiontok\[timm,bench\]"'):
        call()


def test_import_is_cheap():
    heavy = "{'torch', 'timm', 'sklearn', 'numpy', 'PIL', 'safetensors'}"
    code = f"import sys, visiontok.models.tiny; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
