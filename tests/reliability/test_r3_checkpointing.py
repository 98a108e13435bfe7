"""R3: gradient checkpointing gives the same gradients; the reentrant kind fails with advice, never with nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reliability_support import assert_same, every_reducer_slowly, gradients, images, patched_tiny
from timm.models._manipulate import checkpoint_seq
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visiontok.errors import StateLostError

TARGET = torch.tensor([0, 1, 2])


def _loss(logits: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, TARGET)


def _by_hand(model: Any, x: Tensor, wrap: Callable[..., Tensor]) -> Tensor:
    h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return model.forward_head(model.norm(wrap(model.blocks, h)))


def _each(blocks: Any, h: Tensor) -> Tensor:
    for block in blocks:
        h = checkpoint(block, h, use_reentrant=False)
    return h


def _pairs(blocks: Any, h: Tensor) -> Tensor:
    return checkpoint_seq(blocks, h, every=2, use_reentrant=False)


def _count_recomputed(model: Any) -> list[int]:
    counts: list[int] = []
    # A forward hook sees recomputation too: twice the blocks if checkpointing is on.
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(1))
    return counts


@every_reducer_slowly
@pytest.mark.parametrize("how", ["timm", "each", "pairs"])
def test_gradients_are_those_without_checkpointing(name: str, how: str) -> None:
    plain, _ = patched_tiny(name)
    _loss(plain(images())).backward()
    model, _ = patched_tiny(name)
    counts = _count_recomputed(model)
    if how == "timm":
        model.set_grad_checkpointing(True)
        out = model(images())
    else:
        out = _by_hand(model, images(), _each if how == "each" else _pairs)
    assert len(counts) == 4
    _loss(out).backward()
    assert len(counts) == 8, "nothing was recomputed: checkpointing is silently off"
    assert_same(gradients(model), gradients(plain))


def test_two_forwards_before_one_backward() -> None:
    plain, _ = patched_tiny()
    (_loss(plain(images(seed=1))) + _loss(plain(images(seed=2)))).backward()
    model, _ = patched_tiny()
    model.set_grad_checkpointing(True)
    first = _by_hand(model, images(seed=1), _each)
    second = model(images(seed=2))
    (_loss(first) + _loss(second)).backward()
    assert_same(gradients(model), gradients(plain))


def test_recomputation_leaves_tokens_and_trace_of_the_forward_alone() -> None:
    model, _ = patched_tiny()
    red = model._visiontok
    red._chain.trace = True
    model.set_grad_checkpointing(True)
    loss = _loss(model(images()))
    tokens, trace = red.tokens, red.trace
    loss.backward()
    assert red.tokens == tokens == [14, 11, 8, 5]
    assert [step.layer for step in red.trace] == [step.layer for step in trace] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["tome", "random"])
@pytest.mark.parametrize("every", [1, 2])
def test_reentrant_checkpointing_raises_with_the_remedy(name: str, every: int) -> None:
    model, _ = patched_tiny(name)
    x = images().requires_grad_()
    with pytest.raises(StateLostError, match="use_reentrant=False"):  # noqa: PT012 (lost in forward or in backward)
        _loss(_by_hand(model, x, lambda b, h: checkpoint_seq(b, h, every=every, use_reentrant=True))).backward()
    # The failure leaves nothing behind.
    clean, _ = patched_tiny(name)
    with torch.no_grad():
        assert torch.equal(model(images()), clean(images()))


def test_reentrant_over_the_whole_trunk_is_fine() -> None:
    plain, _ = patched_tiny()
    x = images().requires_grad_()
    _loss(plain(x)).backward()
    model, _ = patched_tiny()
    y = images().requires_grad_()
    _loss(_by_hand(model, y, lambda b, h: checkpoint(b, h, use_reentrant=True))).backward()
    torch.testing.assert_close(y.grad, x.grad)
    assert_same(gradients(model), gradients(plain))
