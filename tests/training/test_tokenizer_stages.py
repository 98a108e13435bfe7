"""Stages and losses of tokenizer training beside those that the shipped weights were made with."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.training.adversarial import Adversary, Discriminator, hinge, lecam
from visiontok.training.tokenizer_config import TokenizerRecipe, load_tokenizer_recipe
from visiontok.training.tokenizer_loop import fit_tokenizer


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen models of timm with random weights, the same ones every time."""
    create = timm.create_model

    def made(name: str, pretrained: bool, **options: Any) -> Any:
        torch.manual_seed(7)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", made)


def recipe(name: str, **changes: Any) -> TokenizerRecipe:
    return load_tokenizer_recipe(name, **{"updates": 3, "batch_size": 4, "log_every": 1, **changes})


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_losses_of_a_discriminator_follow_their_definitions() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge(real, made).item() == pytest.approx((0.5 / 2 + 2.0 / 2) / 2)
    value = lecam(torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(0.5), torch.tensor(0.25))
    assert value.item() == pytest.approx(0.75**2 + 1.5**2)
    assert Discriminator(width=8)(torch.rand(2, 3, 64, 64)).shape == (2, 1, 16, 16)


def test_a_discriminator_learns_to_tell_images_apart() -> None:
    torch.manual_seed(0)
    adversary = Adversary(1, 0.001, (0.9, 0.999), 1e-4, 1.0)
    real, made = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32) * 0.2
    before = [p.clone() for p in adversary.network.parameters()]
    adversary.step(real, made, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.network.parameters()))
    assert adversary.acts
    for _ in range(6):
        adversary.step(real, made, 1e-3)
    with torch.no_grad():
        assert adversary.network(real).mean() > adversary.network(made).mean() + 0.1
    assert not any(p.requires_grad for p in adversary.network.parameters())


@functools.cache
def decoder_stage() -> TokenizerRecipe:
    return recipe(
        "tiny_one_d_piece", stage="decoder", updates=4, checkpoint_every=2, restart_every=0, ema=0.0, warmup=1,
        perceptual="test_convnext.r160_in1k", adversarial_weight=0.01, adversarial_start=1,
    )  # fmt: skip


def test_the_second_stage_trains_the_decoder_alone_and_resumes_exactly(tmp_path: Path) -> None:
    start = fit_tokenizer(recipe("tiny_one_d_piece", updates=1)).tokenizer
    before = {name: value.clone() for name, value in start.state_dict().items()}
    whole = fit_tokenizer(decoder_stage(), initial=start, output=tmp_path / "whole").tokenizer.state_dict()
    changed = {name.split(".")[0] for name, value in whole.items() if not torch.equal(value, before[name])}
    assert changed == {"decoder"} | ({"pixel_decoder", "pixel_quantize"} & {name.split(".")[0] for name in whole})
    rows = log(tmp_path / "whole")
    assert "adversarial" not in rows[0]
    assert all({"l2", "perceptual", "adversarial"} <= set(row) for row in rows[1:])

    def stop(updates: int) -> None:
        if updates == 3:
            raise KeyboardInterrupt

    start.load_state_dict(before)
    with pytest.raises(KeyboardInterrupt):
        fit_tokenizer(decoder_stage(), initial=start, output=tmp_path / "part", on_update=stop)
    start.load_state_dict(before)
    again = fit_tokenizer(decoder_stage(), initial=start, output=tmp_path / "part", resume=True).tokenizer.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_weights_of_losses_count() -> None:
    values = []
    for weight in (0.0, 0.5):
        made = recipe("tiny_one_d_piece", updates=1, perceptual="test_convnext.r160_in1k", perceptual_weight=weight)
        values.append(fit_tokenizer(made).records[0])
    assert values[0]["perceptual"] == values[1]["perceptual"] > 0
    assert values[1]["loss"] - values[0]["loss"] == pytest.approx(0.5 * values[0]["perceptual"], rel=1e-3)


def test_features_of_another_model_guide_the_flow(tmp_path: Path) -> None:
    made = recipe("tiny_flextok", repa="test_vit.r160_in1k", repa_layer=1, lr=1e-3, warmup=1, updates=6)
    fit_tokenizer(made, output=tmp_path)
    found = [row["repa"] for row in log(tmp_path)]
    assert found[-1] < found[0]


def test_the_first_stage_learns_a_teachers_codes(tmp_path: Path) -> None:
    pixel = {"codes": 16, "z_channels": 8, "hidden_channels": 32, "channel_mult": [1, 2], "res_blocks": 1}
    tiny = load_tokenizer_recipe("tiny_one_d_piece").model
    size = tiny["patch_size"]
    pixel["channel_mult"] = [1] * size.bit_length()
    model = {**tiny, "pixel": {**pixel, "out_channels": 3}}

    def codes(images: Tensor) -> Tensor:
        return (torch.nn.functional.avg_pool2d(images.mean(1), size).flatten(1) * 15).long()

    made = recipe("tiny_one_d_piece", stage="proxy", model=model, lr=1e-3, warmup=1, updates=6)
    fit_tokenizer(made, codes=codes, output=tmp_path)
    found = [row["cross_entropy"] for row in log(tmp_path)]
    assert found[-1] < found[0]
    with pytest.raises(ParameterError, match="codes"):
        fit_tokenizer(made)


def test_losses_on_images_need_images() -> None:
    for name, stage in (("tiny_flextok", "flow"), ("tiny_one_d_piece", "proxy")):
        with pytest.raises(ParameterError, match="adversarial_weight"):
            recipe(name, stage=stage, adversarial_weight=0.1)
