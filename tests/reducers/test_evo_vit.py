"""Evo-ViT against a plain re-run of a timm model that moves tokens by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import IncompatibleError, ParameterError

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create


def build(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: Any = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3, num_classes=3, **options
    )
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    return model.eval().double()


def naive(model: Any, image: Tensor, removed: dict[int, int], prefix: int, t: float) -> Tensor:
    """(N, C) features of one image after the last block; `removed` names the tokens that skip each block."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None]))))[0]
    score: Any = None
    for layer, block in enumerate(model.blocks):
        active = list(range(len(x)))
        if removed.get(layer):
            ranked = sorted(range(prefix, len(x)), key=lambda j: -float(score[j]))
            active = [*range(prefix), *ranked[: len(x) - prefix - removed[layer]]]
        rows = x[active]
        attn = block.attn
        q, k, _ = attn.qkv(block.norm1(rows[None])).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        row = (q[0, :, 0] * attn.scale).unsqueeze(1).mul(k[0]).sum(-1).softmax(-1).sum(0)
        if layer == min(removed) - 1:
            score = row
        elif score is not None:
            score = score.clone()
            score[active] = (1 - t) * score[active] + t * row
        x = x.clone()
        x[active] = block(rows[None])[0]
    return x


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}], ids=["cls", "registers"])
@pytest.mark.parametrize(("params", "removed", "t"), [
    ({"keep": 0.5}, {2: 8, 3: 8, 4: 8, 5: 8}, 0.5),
    ({"r": 11, "tradeoff": 0.2}, {2: 11, 3: 11, 4: 11, 5: 11}, 0.2),
    ({"r": {1: 3, 4: 9}}, {1: 3, 4: 9}, 0.5),
])  # fmt: skip
def test_features_equal_moving_tokens_by_hand(options: dict[str, Any], params: Any, removed: Any, t: float) -> None:
    model = build(**options)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        expected = model.norm(torch.stack([naive(model, image, removed, prefix, t) for image in x]))
        plain = model.forward_features(x)
        with vt.patched(model, "evo_vit", **params) as red:
            found = model.forward_features(x)
            assert red.tokens == red.plan.tokens
    assert found.shape == plain.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, plain)


def test_nothing_to_skip_leaves_the_model_alone() -> None:
    model = build()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        for params in ({"r": 0}, {"keep": 1.0}):
            with vt.patched(model, "evo_vit", **params) as red:
                assert torch.equal(model(x), plain)
                assert all(point.before == point.after for point in red.plan.points)


def test_by_hand_the_score_is_the_class_row() -> None:
    attention = torch.rand(2, 3, 2, 10, generator=torch.Generator().manual_seed(0)).softmax(-1)
    state = vt.TokenState.initial(torch.zeros(2, 10, 4), 2, layer=4, depth=12)
    tm = create("evo_vit", keep=3).decide(vt.Signals.of(ATTN_PREFIX=attention), state)
    order = attention[:, :, 0, 2:].sum(1).argsort(descending=True)[:, :3].sort().values + 2
    assert torch.equal(tm.kept[:, 2:], order)
    bare = vt.TokenState.initial(torch.zeros(2, 10, 4), 0, layer=4, depth=12)
    with pytest.raises(IncompatibleError, match="class token"):
        create("evo_vit", keep=3).decide(vt.Signals.of(ATTN_PREFIX=attention[:, :, :0]), bare)


@pytest.mark.parametrize("bad", [{"tradeoff": 2}, {"gflops": 1.0}, {"tokens": 4}, {"r": 1, "keep": 0.5}])
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="evo_vit"):
        create("evo_vit", **bad)
