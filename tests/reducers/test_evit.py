"""EViT and TopK against loops over tokens, and what their budgets mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.errors import IncompatibleError, ParameterError

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create


def setup(batch: int, n: int, prefix: int = 1, layer: int = 3) -> tuple[Tensor, Tensor, Any, Any]:
    noise = torch.Generator().manual_seed(n * 7 + prefix)
    attention = torch.randn(batch, 3, prefix, n + prefix, generator=noise, dtype=torch.float64).mul(2).softmax(-1)
    x = torch.randn(batch, n + prefix, 5, generator=noise, dtype=torch.float64)
    state = vt.TokenState.initial(x, prefix, layer=layer, depth=12)
    return attention, x, state, vt.Signals.of(ATTN_PREFIX=attention)


def naive(attention: Tensor, x: Tensor, left: int, fuse: bool, prefix: int) -> Tensor:
    out = []
    for a, tokens in zip(attention, x):
        n = len(tokens) - prefix
        score = [sum(float(a[h, 0, prefix + j]) for h in range(a.shape[0])) / a.shape[0] for j in range(n)]
        if left == n:
            out.append(tokens)
            continue
        order = sorted(range(n), key=lambda j: -score[j])
        rows = [tokens[i] for i in range(prefix)] + [tokens[prefix + j] for j in order[:left]]
        if fuse:
            rows.append(torch.stack([score[j] * tokens[prefix + j] for j in sorted(order[left:])]).sum(dim=0))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("n", "rate", "prefix"),
    [(16, 0.7, 1), (23, 0.5, 1), (16, 0.99, 1), (16, 0.01, 1), (2, 0.5, 1), (9, 0.9, 2), (12, 0.8, 5), (1, 0.5, 1),
     (13, 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("fuse", [True, False])
def test_values_equal_loops(n: int, rate: float, prefix: int, fuse: bool) -> None:
    attention, x, state, signals = setup(2, n, prefix)
    tm: Any = create("evit", keep_rate=rate, fuse_token=fuse).decide(signals, state)
    expected = naive(attention, x, math.ceil(rate * n), fuse, prefix)
    y = x if tm is None else vt.apply(tm, x, state)[0]
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    if not fuse:
        top: Any = create("topk", keep_rate=rate).decide(signals, state)
        assert (top is None) == (tm is None)
        assert top is None or torch.equal(top.kept, tm.kept)


def test_the_fused_token_counts_what_it_holds_and_carries_the_gradient() -> None:
    attention, x, state, _ = setup(2, 10)
    attention = attention.clone().requires_grad_()
    tm = create("evit", left_tokens=4).decide(vt.Signals.of(ATTN_PREFIX=attention), state)
    y, after = vt.apply(tm, x, state)
    size: Any = after.size
    assert size.squeeze(-1).tolist() == [[1, 1, 1, 1, 1, 6]] * 2
    (grad,) = torch.autograd.grad(y[:, -1].sum(), attention)
    moved = grad[:, 0, 0, 1:] != 0
    assert torch.equal(moved, tm.assign[:, 1:] == 5)


def test_one_token_left_over_is_rescaled_although_nothing_is_removed() -> None:
    attention, x, state, signals = setup(2, 2)
    reducer = create("evit", keep_rate=0.5)
    assert reducer.always
    tm = reducer.decide(signals, state, 0)
    assert tm.K == 3
    torch.testing.assert_close(vt.apply(tm, x, state)[0], naive(attention, x, 1, True, 1))
    assert create("evit", r=0).decide(signals, state, 0) is None
    assert not create("evit", r=1).always


def test_general_budgets_include_the_fused_token_and_official_ones_do_not() -> None:
    _, _, state, signals = setup(2, 10)
    assert create("evit", keep={3: 5}).decide(signals, state).K == 6
    assert create("evit", left_tokens=5).decide(signals, state).K == 7
    assert create("evit", r=3).decide(signals, state).K == 8
    assert create("topk", left_tokens=5).decide(signals, state).K == 6
    assert create("evit", left_tokens=50).decide(signals, state) is None


def test_the_published_counts() -> None:
    reducer = create("evit", keep_rate=0.7)
    budgets, n, found = reducer.budgets(12), 196, []
    for layer, budget in budgets.items():
        n -= reducer.removed(n, budget, Where(layer, 12), 1)
        found.append(n)
    assert list(budgets) == [3, 6, 9]
    assert found == [139, 99, 71]


def test_order_of_slots() -> None:
    attention, _, state, signals = setup(1, 8)
    score = attention.mean(dim=1)[0, 0, 1:]
    order = score.argsort(descending=True)[:3] + 1
    for name in ("topk", "evit"):
        assert create(name, left_tokens=3).decide(signals, state).kept[0, 1:4].tolist() == order.tolist()
        kept = create(name, left_tokens=3, sort=True).decide(signals, state).kept[0, 1:4]
        assert kept.tolist() == sorted(order.tolist())


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.zeros(1, 9, 2)
    state = vt.TokenState.initial(x, 1, layer=3, depth=12)
    tm = create("topk", left_tokens=3).decide(vt.Signals.of(ATTN_PREFIX=torch.full((1, 2, 1, 9), 0.1)), state)
    assert tm.kept.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [{"keep_rate": 0.0}, {"keep_rate": 1.5}, {"keep_rate": [0.5, "x"]}, {"left_tokens": 0},
                                 {"keep_rate": 0.5, "keep": 0.5}, {"left_tokens": 3, "r": 1}])  # fmt: skip
def test_bad_budgets_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        create("evit", **bad)


def test_without_a_prefix_there_is_no_class_row() -> None:
    x = torch.zeros(1, 8, 2)
    state = vt.TokenState.initial(x, 0, layer=3, depth=12)
    with pytest.raises(IncompatibleError, match="topk ranks tokens by the class token's attention"):
        create("topk", left_tokens=3).decide(vt.Signals.of(ATTN_PREFIX=torch.zeros(1, 2, 0, 8)), state)


def test_patched_per_block_rates() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    for rate, tokens in (([1, 0.8, 0.8, 0.8], [17, 15, 14, 13]), ({2: 0.5}, [17, 17, 10, 10]), (1, [17] * 4)):
        with vt.patched(model, "evit", keep_rate=rate) as red, torch.no_grad():
            model(x)
            assert red.tokens == red.plan.tokens == tokens
