"""Patched models through the Triton kernels, in the interpreter: the same answers as through plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton_modes import kernels

import visiontok as vt
from visiontok.core.state import TokenState, apply
from visiontok.core.tokens import TokenMap
from visiontok.ops import dispatch

pytest.importorskip("timm")
pytest.importorskip("triton")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

OPS = ("match_slots", "best_match", "plan", "group", "merge", "spread", "energy", "class_rows", "key_votes")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(kernels("merging", interpret=True))
        for name in OPS:
            stack.enter_context(dispatch.use(name, "triton"))
        yield


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, init_values=0.3
    )
    for block in model.blocks:
        nn.init.normal_(block.norm2.weight, 1, 0.2)
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "budget"),
    [("tome", {"r": 3}), ("tofu", {"r": 3}), ("pitome", {"keep": 0.8}), ("evit", {"keep": 0.7}),
     ("topk", {"keep": 0.7}), ("zero_tprune", {"keep": 0.7}), ("diffrate", {"r": 3}), ("vid_tldr", {"r": 3})],
)  # fmt: skip
def test_patched_models_give_the_same(name: str, budget: dict[str, Any]) -> None:
    model = vit()
    vt.patch(model, name, **budget)
    with torch.inference_mode():
        want = model(images())
        with interpreted():
            got = model(images())
    torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


def test_gradients_are_those_of_torch() -> None:
    model = vit().train()
    vt.patch(model, "tome", r=3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    with interpreted():
        got = gradients()
    assert len(want) == len(got) > 20
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "sum", "amax", "absmax", "mlerp"])
@pytest.mark.parametrize("dropped", [False, True])
def test_every_map_is_carried_out_alike(mode: Any, dropped: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 20, generator=generator)
    size = torch.randint(1, 4, (2, 9, 1), generator=generator).float()
    assign = torch.tensor([[0, 1, 1, 2, 0, 3, 3, 3, 4], [0, 0, 0, 0, 1, 2, 3, 4, 4]])
    assign = assign.masked_fill(assign == 3, -1) if dropped else assign
    assign = torch.where(assign == 4, 3, assign) if dropped else assign
    weight = torch.rand(2, 9, generator=generator)
    mass = torch.rand(2, 9, generator=generator)
    for fields in ({}, {"weight": weight}, {"weight": weight, "mass": mass}):
        tm = TokenMap(assign, 4 if dropped else 5, mode=mode, form="any" if dropped else "complete", **fields)
        state = TokenState.initial(x, 1).changed(size=size)
        want, after = apply(tm, x, state)
        with interpreted():
            got, again = apply(tm, x, state)
            full = tm.restore(got)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(again.size, after.size, rtol=0, atol=1e-6)
        torch.testing.assert_close(full, tm.restore(want), rtol=0, atol=1e-6)
