"""torchvision's ViTs by name: what recipes write, what the weights imply, what cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import visiontok as vt
from visiontok.bench import models, torchvision_models
from visiontok.cli import main
from visiontok.core.recipe import load_recipe
from visiontok.errors import ParameterError, UnknownNameError, VisionTokError

pytest.importorskip("torchvision")

CONFIGS = Path(__file__).parents[2] / "configs"
NAME, SMALL = "torchvision/vit_b_32", (3, 64, 64)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vit_b_32 of two narrow blocks; building and saving the real one takes seconds."""
    library = torchvision_models._library()

    def narrow(name: str, **options: Any) -> Any:
        assert name == "vit_b_32"
        sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
        return library.vision_transformer.VisionTransformer(patch_size=32, **sizes, **options)

    monkeypatch.setattr(library, "get_model", narrow)
    return models.load(NAME, input_size=SMALL, seed=3)


def test_weights_decide_size_and_preparation() -> None:
    with torch.device("meta"):
        swag = models.load("torchvision/vit_l_16.imagenet1k_swag_e2e_v1")
        plain = models.load("torchvision/vit_l_16")
    assert models.input_size(swag) == (3, 512, 512)
    assert models.input_size(plain) == (3, 224, 224)
    picture = Image.new("RGB", (700, 600), (255, 0, 0))
    for built, name in ((swag, "torchvision/vit_l_16.imagenet1k_swag_e2e_v1"), (plain, "torchvision/vit_l_16")):
        _, weights = torchvision_models._resolve(name)
        ours: Any = models.transform(built, name)(picture)
        assert torch.allclose(ours, weights.transforms()(picture), atol=1e-4)


def test_every_recipe_names_a_model_that_exists() -> None:
    names = {recipe.model for path in CONFIGS.rglob("*.yaml") if (recipe := load_recipe(path))}
    theirs = {name for name in names if name.startswith("torchvision/")}
    assert theirs
    for name in theirs:
        assert torchvision_models._resolve(name)[1].name.lower() == name.partition(".")[2]


def test_a_seed_is_a_model_and_patches(model: Any) -> None:
    again: Any = models.load(NAME, input_size=SMALL, seed=3)
    assert torch.equal(again.conv_proj.weight, model.conv_proj.weight)
    with vt.patched(again, "tome", r={1: 2}) as red:
        assert again(torch.zeros(1, *SMALL)).shape == (1, 1000)
        assert red.tokens[-1] == 3


def test_a_file_takes_the_place_of_the_hub(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_models, "_fetch", lambda *_: pytest.fail("asked the hub"))
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    swag = {
        name.replace("encoder_layer_", "layer_").replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
        .replace("heads.", "head.layers."): value
        for name, value in model.state_dict().items()
    }  # fmt: skip
    swag["encoder.pos_embedding"] = swag["encoder.pos_embedding"].transpose(0, 1).contiguous()
    save_file(swag, tmp_path / "swag.safetensors")
    for file in ("ours", "swag"):
        path = tmp_path / f"{file}.safetensors"
        loaded = models.load(NAME, pretrained=True, checkpoint=path, input_size=SMALL, seed=9)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torchvision.models as library

    def unreachable(*args: Any, **options: Any) -> Any:
        raise URLError("no route")

    monkeypatch.setattr(library.WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(VisionTokError, match=r"vit_b_32' cannot be fetched: .*no route.*--checkpoint"):
        models.load(NAME, pretrained=True)
    assert main(["info", "-m", NAME, "--pretrained", "--reducer", "tome"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("torchvision/vit_b_61", {}, UnknownNameError, "Did you mean 'vit_b_16'.*vit_l_32"),
        ("torchvision/resnet18", {}, UnknownNameError, "unknown model 'torchvision/resnet18'"),
        ("torchvision/vit_b_32.swag", {}, UnknownNameError, "unknown weights 'swag'.*Known: imagenet1k_v1"),
        (NAME, {"input_size": (3, 50, 50)}, ParameterError, r"multiple of 32, got \(3, 50, 50\)"),
        (NAME, {"input_size": SMALL, "pretrained": True}, ParameterError, r"are for 224 x 224 images, got \(3, 64"),
    ],
)
def test_refusals(name: str, options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        models.load(name, **options)


def test_listed_and_compared() -> None:
    assert NAME in models.list_models("torchvision/*")
    assert models.smaller_sibling("torchvision/vit_l_16") == "torchvision/vit_b_16"
    linear = "torchvision/vit_{}_16.imagenet1k_swag_linear_v1"
    assert models.smaller_sibling(linear.format("l")) == linear.format("b")
    # Its end-to-end weights are for other sizes, so one batch does not fit both.
    assert models.smaller_sibling("torchvision/vit_l_16.imagenet1k_swag_e2e_v1") is None
    assert models.smaller_sibling("torchvision/vit_b_16") is None


def test_a_recipe_runs_from_the_command_line(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = CONFIGS / "tome" / "vit_l_16.swag.yaml"
    assert main(["info", "--recipe", str(recipe), "-m", NAME, "--img-size", "64", "--r", "{1: 1}"]) == 0
    assert "torchvision/vit_b_32, tome" in capsys.readouterr().out
