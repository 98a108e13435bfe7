"""R11: gradients through merges are right; every parameter gets one; training reduces the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reliability_support import every_reducer, every_reducer_slowly, images, patch_or_skip, tiny
from torch import Tensor

import visiontok as vt
from visiontok.core.signals import Site
from visiontok.ops import dispatch


def _map(mode: str, weighted: bool, dropped: bool) -> vt.TokenMap:
    assign = torch.tensor([[0, 1, 1, 2, 0, 2, 1], [2, 1, 0, 0, 1, 2, 2]])
    if dropped:
        assign[:, 4] = -1
    weight = (
        torch.rand(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5 if weighted else None
    )
    return vt.TokenMap(assign, 3, mode=mode, weight=weight)


@pytest.mark.parametrize("implementation", ["embedding_bag", "index_add"])
@pytest.mark.parametrize("dropped", [False, True], ids=["complete", "dropped"])
@pytest.mark.parametrize("mode", ["mean", "sum", "amax", "absmax", "mlerp"])
def test_gradcheck_of_a_merge(mode: str, dropped: bool, implementation: str) -> None:
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 7, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    tm = _map(mode, False, dropped)
    with dispatch.use("segment_sum", implementation):
        assert torch.autograd.gradcheck(lambda x: tm.reduce(x, size), (x,))
        assert torch.autograd.gradcheck(lambda x: tm.restore(tm.reduce(x, size), "mean"), (x,))


@pytest.mark.parametrize("implementation", ["embedding_bag", "index_add"])
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_gradcheck_through_weights(mode: str, implementation: str) -> None:
    from dataclasses import replace

    base = _map(mode, True, True)
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    weight = base.weight.clone().requires_grad_()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return replace(base, weight=weight).reduce(x)

    with dispatch.use("segment_sum", implementation):
        assert torch.autograd.gradcheck(run, (x, weight))
        assert torch.autograd.gradgradcheck(run, (x, weight))


def test_gradcheck_through_soft_and_back() -> None:
    soft = torch.rand(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    back = torch.rand(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    x = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def run(x: Tensor, soft: Tensor, back: Tensor) -> Tensor:
        tm = vt.TokenMap(soft.argmax(dim=1), 3, soft=soft, back=back)
        return tm.restore(tm.reduce(x))

    assert torch.autograd.gradcheck(run, (x, soft, back))


@every_reducer
def test_gradcheck_of_a_patched_trunk(name: str) -> None:
    model = tiny(depth=2, embed_dim=6, num_heads=1, num_classes=2, mlp_ratio=1.0).double()
    patch_or_skip(model, name)
    h = torch.randn(1, 17, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # A step this small changes no decision, so the finite difference sees the same merge.
    assert torch.autograd.gradcheck(
        lambda h: model.forward_head(model.norm(model.blocks(h))), (h,), eps=1e-7, atol=1e-5
    )


@every_reducer
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_every_parameter_gets_the_gradient_it_would_get(name: str, pool: str) -> None:
    options: dict[str, Any] = {"class_token": pool == "token", "global_pool": pool}
    dense = tiny(**options).train()
    torch.nn.functional.cross_entropy(dense(images()), torch.tensor([0, 1, 2])).backward()
    reached = {key for key, p in dense.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    model = tiny(**options).train()
    red = patch_or_skip(model, name)
    torch.nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2])).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    if any(part.site is Site.HEAD for reducer in red.reducers for part in reducer.parts()):
        reached = {key for key in reached if not key.startswith(("norm.", "head."))}
    assert all(grads[key] is not None and grads[key].isfinite().all() for key in reached)
    assert {key for key in reached if grads[key].abs().sum() == 0} == set()


@every_reducer_slowly
@pytest.mark.parametrize("compat", [None, "checkpointing", "autocast"])
def test_training_reduces_the_loss(name: str, compat: str | None) -> None:
    model = tiny(depth=2).train()
    patch_or_skip(model, name)
    model.set_grad_checkpointing(compat == "checkpointing")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, y = images(8), torch.arange(8)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compat == "autocast"):
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
