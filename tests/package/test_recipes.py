"""Every shipped recipe patches the model that it names, and the published compute is met where it can be counted.

Models are made without storage, so neither weights nor memory are needed. Accuracies need ImageNet and are not checked.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import visiontok as vt
from visiontok.core.recipe import Recipe, load_recipe

timm = pytest.importorskip("timm")

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.rglob("*.yaml"))}
# Counting costs a second, so only one of each kind. `matcher` where the published number counts it too.
COUNTED = {
    "diffrate/deit_small_patch16_224": "",
    "expedite/vit_l_16.swag.6_529": "matcher",
    "sit/lvvit_tiny": "matcher",
    "zero_tprune/deit_small_patch16_224.recalled": "",
}
SIZES = {"vit_l_16": 512, "vit_h_14": 518}


@functools.cache
def build(name: str, dataset: str) -> Any:
    """The named model on the meta device; every call for a name gets the same one, so patches must be undone."""
    with torch.device("meta"):
        if name.startswith("hf:"):
            return llava(name)
        if name.startswith("torchvision/"):
            models = pytest.importorskip("torchvision.models")
            name = name.removeprefix("torchvision/").partition(".")[0]
            return getattr(models, name)(image_size=SIZES[name]).eval()
        if name.startswith("lvvit_"):
            from visiontok.models.lvvit import lvvit

            return lvvit(name.removeprefix("lvvit_"))
        if name == "tiny_vit":
            from visiontok.models.tiny import tiny_vit

            return tiny_vit(pretrained=False)
        options = {"img_size": 640} if dataset == "ade20k" else {}
        return timm.create_model(name, pretrained=False, num_classes=1000, **options).eval()


def llava(name: str) -> Any:
    """A LLaVA of 7B of the version that a recipe names."""
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    kind = "LlavaNext" if "v1.6" in name else "Llava"
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=transformers.LlamaConfig())
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def model_of(recipe: Recipe) -> Any:
    """The model of a recipe."""
    return build(recipe.model, recipe.dataset)


def different() -> list[str]:
    """One recipe of each model, method and set of parameters; others differ in numbers only, and solving takes time."""
    recipes = {name: load_recipe(path) for name, path in RECIPES.items()}
    return list({(r.method, r.model, *r.params): name for name, r in recipes.items()}.values())


# Making a model of this size takes ten seconds and more.
HUGE = ("vit_large", "vit_huge", "vit_h_14", "vit_l_16", "lvvit_large")


def sized() -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.full) if any(size in n for size in HUGE) else n for n in different()]


@pytest.mark.parametrize("name", sized())
def test_a_recipe_patches_its_model(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vt.patched(model_of(recipe), recipe=RECIPES[name]) as red:
            assert red.plan.points
            # The budget, and not a clamp, decides: data-dependent methods plan nothing.
            removes = any(point.after < point.before for point in red.plan.points)
    assert removes or recipe.method in ("ats", "mustdrop")


@pytest.mark.parametrize("name", COUNTED)
def test_a_recipe_reaches_the_published_compute(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    with vt.patched(model_of(recipe), recipe=RECIPES[name]) as red:
        report = red.report()
    matcher = report.gmacs_matcher if COUNTED[name] else 0.0
    assert report.gmacs_after + matcher == pytest.approx(recipe.expected.gflops, rel=0.03)


def test_tokens_and_compute_of_evit() -> None:
    # The released counts at keep rate 0.7: 138, 98 and 70 tokens, each with a fused and the class token.
    path = RECIPES["evit/deit_small_patch16_224.keep0.7"]
    recipe = load_recipe(path)
    with vt.patched(model_of(recipe), recipe=path) as red:
        report = red.report()
    assert report.tokens == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3
    assert report.gmacs_after == pytest.approx(recipe.expected.gflops, rel=0.03)


# Multiply-accumulates of the visual tokens in the decoder; an image of GlobalCom2's has a thumbnail and four crops.
@pytest.mark.parametrize(("name", "crops"), [("pyramiddrop/llava_1_5_7b", 1), ("globalcom2/llava_next_7b", 5)])
def test_a_multimodal_recipe_reaches_the_published_compute(name: str, crops: int) -> None:
    recipe = load_recipe(RECIPES[name])
    with vt.patched(model_of(recipe), recipe=RECIPES[name]) as red:
        report = red.report(images=crops)
    assert report.paper_tflops.after / 2 * 1e3 == pytest.approx(recipe.expected.gflops, rel=0.03)
