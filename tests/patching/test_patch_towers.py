"""What patch() takes: pipelines, models with two towers, nested hosts; and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.core.backbone import class_paths
from visiontok.errors import IncompatibleError, NothingPatchedError, ParameterError, UnknownNameError


class Pipeline:
    """As transformers' pipelines: no module, with a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


class Pair(nn.Module):
    """Two towers; which is which is decided by the backbone of each."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual, self.text = visual, text


@pytest.fixture
def pair(vit: nn.Module, make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A model whose second ViT passes for a text tower."""
    from visiontok import backbones
    from visiontok.backbones.timm_vit import TimmViT

    class Text(TimmViT):
        name = "text"
        tower = "text"

    class TextViT(type(vit)):  # type: ignore[misc]
        pass

    both = Pair(vit, make_vit(depth=2))
    both.text.__class__ = TextViT
    real = backbones.find
    monkeypatch.setattr(backbones, "find", lambda m: Text() if isinstance(m, TextViT) else real(m))
    return both


def test_a_pipeline_is_its_model(vit: nn.Module, image: Tensor) -> None:
    plain = vit(image)
    red = vt.patch(Pipeline(vit), "tome", r=2)
    assert red.model is vit
    assert not torch.equal(vit(image), plain)
    vt.unpatch(Pipeline(vit))  # type: ignore[arg-type]
    assert torch.equal(vit(image), plain)
    assert vt.supports("tome", Pipeline(vit))  # type: ignore[arg-type]


def test_the_visual_tower_is_the_default(pair: Pair) -> None:
    with vt.patched(pair, "tome", r=2) as red:
        assert red.model is pair.visual
    with vt.patched(pair, "tome", r=2, tower="text") as red:
        assert red.model is pair.text


def test_both_towers_are_two_handles(pair: Pair, image: Tensor) -> None:
    plain = pair.visual(image), pair.text(image)
    red = vt.patch(pair, "tome", r=2, tower="both")
    assert list(red) == ["visual", "text"]
    assert "visual: " in str(red)
    red["text"].set(r=1)
    assert red["visual"].plan.tokens != plain
    assert [point.before - point.after for point in red["text"].plan.points] == [1, 1]
    with pytest.raises(UnknownNameError, match="no tower 'audio'; patched: visual, text"):
        red["audio"]
    red.unpatch()
    assert torch.equal(pair.visual(image), plain[0])
    assert torch.equal(pair.text(image), plain[1])


def test_a_reducer_for_each_tower(pair: Pair) -> None:
    with pytest.warns(UserWarning, match="pitome was patched without a budget") as said:
        red = vt.patch(pair, {"visual": ("tome", {"r": 2}), "text": ["pitome"]})
    assert [Path(warning.filename).name for warning in said] == [Path(__file__).name]
    assert [red[tower].reducers[0].name for tower in red] == ["tome", "pitome"]
    vt.unpatch(pair)


def test_nothing_stays_patched_if_one_tower_fails(pair: Pair) -> None:
    kinds = [type(module) for module in pair.modules()]
    with pytest.raises(ParameterError, match="r has 3 entries"):
        vt.patch(pair, {"visual": ("tome", {"r": 2}), "text": ("tome", {"r": [1, 1, 1]})})
    assert [type(module) for module in pair.modules()] == kinds
    with pytest.raises(ParameterError, match="tower must be 'visual' or 'text', got 'audio'"):
        vt.patch(pair, {"visual": "identity", "audio": "identity"})
    assert [type(module) for module in pair.modules()] == kinds


@pytest.mark.parametrize(
    ("reducer", "options", "message"),
    [
        ("tome", {"tower": "audio"}, "tower must be 'visual' or 'text', got 'audio'"),
        ({"visual": "tome"}, {"r": 2}, "a dict of reducers names its towers and parameters itself"),
        ({}, {}, "the dict of reducers is empty"),
    ],
)
def test_towers_are_checked(pair: Pair, reducer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        vt.patch(pair, reducer, **options)


def test_a_model_without_that_tower(vit: nn.Module) -> None:
    with pytest.raises(ParameterError, match="VisionTransformer has no text tower that can be patched; it has: visual"):
        vt.patch(vit, "tome", r=2, tower="text")


def test_two_models_of_one_tower_are_not_guessed(vit: nn.Module, make_vit: Any) -> None:
    with pytest.raises(NothingPatchedError, match=r"holds several models .* \(0, 1\)"):
        vt.patch(nn.Sequential(vit, make_vit()), "tome", r=2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_windowed_models_are_refused_with_the_reason(wrapped: bool) -> None:
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4)
    assert "timm.models.swin_transformer.SwinTransformer" in class_paths(swin)
    model = nn.Sequential(swin) if wrapped else swin
    with pytest.raises(IncompatibleError, match="cannot be patched: its blocks attend in shifted windows"):
        vt.patch(model, "tome", r=2)
    assert "shifted windows" in vt.supports("cubist", model).reason


@pytest.mark.parametrize("tower", [None, "both"])
def test_a_tower_that_cannot_be_patched_is_never_left_out_silently(tower: str | None) -> None:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(8, {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}, text)
    error, said = (IncompatibleError, "visual .ModifiedResNet. cannot be patched") if tower is None else (
        ParameterError, "CLIP has no visual tower"
    )  # fmt: skip
    with pytest.raises(error, match=said):
        vt.patch(clip, "tome", r=2, tower=tower)
    clip.visual = nn.Conv2d(3, 8, 32)
    if tower is None:
        with pytest.raises(IncompatibleError, match="visual tower of CLIP is of no known family"):
            vt.patch(clip, "tome", r=2)
    assert vt.patch(clip, "tome", r=2, tower="text").unpatch() is clip


def test_compatibility_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from visiontok import backbones
    from visiontok.backbones.open_clip import OpenClip

    def absent(self: Any) -> Any:
        raise ModuleNotFoundError("No module named 'open_clip'")

    monkeypatch.setattr(backbones.registry, "classes", lambda: [OpenClip])
    monkeypatch.setattr(OpenClip, "example", absent)
    rows = vt.compatibility()
    assert [row["reducer"] for row in rows] == vt.list_reducers()
    assert {row["reason"] for row in rows} == {"open_clip is not installed."}
