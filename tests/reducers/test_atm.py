"""ATM against thresholds, groups and merges written token by token."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok import backbones
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(prefix: int, live: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, vt.TokenState]:
    """Samples of different length, padded with tokens of size 0 at the end."""
    length = prefix + max(live)
    x, key = draw(len(live), length, 4, seed=seed), draw(len(live), 2, length, 3, seed=seed + 1)
    size = draw(len(live), length, 1, seed=seed + 2).abs().mul(3).ceil()
    size[:, :prefix] = 1
    for b, count in enumerate(live):
        size[b, prefix + count :] = 0
    state = vt.TokenState.initial(x, prefix, layer=5, depth=8)
    return x, key, state.changed(size=size, padded=len(set(live)) > 1)


def loops(key: Tensor, size: Tensor, prefix: int, live: int, theta: float, r: int, late: bool) -> list[list[int]]:
    """The groups of one sample; key (N, d), size (N,)."""
    tokens = list(range(prefix, prefix + live))
    if late:
        ranked = sorted(tokens, key=lambda n: -float(size[n]))
        target, source = ranked[: live - live // 2], sorted(ranked[live - live // 2 :])
    else:
        source, target = [n for n in tokens if n % 2 == 0], [n for n in tokens if n % 2 == 1]

    def cosine(a: int, b: int) -> float:
        return float(torch.cosine_similarity(key[a], key[b], dim=0))

    best = {a: max(sorted(target), key=lambda b: cosine(a, b)) for a in source} if target else {}
    close = [a for a in best if cosine(a, best[a]) > theta]
    count = min(max(len(close), r), live // 2)
    leaving = sorted(best, key=lambda a: -cosine(a, best[a]))[:count]
    groups = {n: [n] for n in tokens}
    for a in leaving:
        groups[best[a]] += groups.pop(a)
    order = sorted(groups) if late else [n for n in sorted(groups) if n % 2 == 0] + [n for n in sorted(groups) if n % 2]
    return [[n] for n in range(prefix)] + [sorted(groups[n]) for n in order]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("theta", "r"), [(0.6, 0), (2.0, 2), (-2.0, 0), (0.9, 3)])
def test_adaptive_against_loops(prefix: int, late: bool, theta: float, r: int) -> None:
    live = (12, 9, 1, 6)
    x, key, state = case(prefix, live, seed=prefix)
    reducer = vt.reducers.create("atm", adaptive=True, alpha=theta, beta=0, theta_min=-3.0, split=5 if late else 8)
    tm = reducer.decide(vt.Signals.of(KEY=key), state, budget=r)
    y, after = vt.apply(tm, x, state)
    assert (tm.K, after.padded) == (state.n - r, True)
    for b, count in enumerate(live):
        size = state.size[b, :, 0]
        groups = loops(key[b].mean(dim=0), size, prefix, count, theta, r, late)
        assert int(tm.counts[b]) == len(groups)
        members = [[n for n in range(state.n) if int(tm.assign[b, n]) == k] for k in range(tm.K)]
        assert members == groups + [[]] * (tm.K - len(groups))
        for k, group in enumerate(groups):
            held = sum(size[n] for n in group)
            torch.testing.assert_close(y[b, k], sum(size[n] * x[b, n] for n in group) / held, rtol=1e-12, atol=1e-12)
            assert after.size[b, k] == held
        assert not after.size[b, len(groups) :].any()


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_static_late_layers_against_loops(prefix: int) -> None:
    x, key, state = case(prefix, (11, 11), seed=4)
    for r in (1, 3, 5):
        tm = vt.reducers.create("atm", split=0.5).decide(vt.Signals.of(KEY=key), state, budget=r)
        assert tm.counts is None
        for b in range(2):
            groups = loops(key[b].mean(dim=0), state.size[b, :, 0], prefix, 11, 2.0, r, True)
            assert [[n for n in range(state.n) if int(tm.assign[b, n]) == k] for k in range(tm.K)] == groups
            # The larger token stands for its pair.
            assert all(state.size[b, n, 0] == max(state.size[b, g, 0]) for n, g in zip(tm.kept[b].tolist(), groups))


def test_static_early_layers_are_tome() -> None:
    _, key, state = case(1, (12, 12))
    ours, tome = (vt.reducers.create(name).decide(vt.Signals.of(KEY=key), state, budget=4) for name in ("atm", "tome"))
    assert torch.equal(ours.assign, tome.assign)


def test_thresholds() -> None:
    reducer = vt.reducers.create("atm", alpha=0.9, beta=0.05, theta_min=0.6)
    for block in range(1, 13):
        expected = max(0.9 - (math.exp(0.05 * (block - 1)) - 1), 0.6)
        assert reducer.threshold(block - 1) == pytest.approx(expected, rel=1e-12)
    assert [reducer.by_size(Where(layer, 12)) for layer in (8, 9)] == [False, True]


@pytest.mark.parametrize("compact", [True, False])
def test_a_model_gives_each_image_its_own_count_whatever_the_batch(compact: bool) -> None:
    model, inputs = backbones.registry.get("timm_vit")().examples()["cls"]
    model = copy.deepcopy(model).double()
    noise = draw(3, *inputs.shape[1:], seed=9)
    # A nearly constant, a smooth and a noisy image.
    images = torch.stack([noise[0] * 1e-3 + 1, noise[1] * 0.2, noise[2] * 3])
    params: dict[str, Any] = {"adaptive": True, "alpha": 0.9, "theta_min": 0.5, "beta": 0.1, "split": 0.5}
    with torch.no_grad(), vt.patched(model, "atm", trace=True, compact=compact, **params) as red:
        together = model(images)
        counts = [
            step.map.assign.new_tensor([len(set(row.tolist()) - {-1}) for row in step.origin]) for step in red.trace
        ]
        for i in range(3):
            torch.testing.assert_close(model(images[i : i + 1]), together[i : i + 1], rtol=1e-10, atol=1e-10)
        length = red.plan.length
    assert len(set(counts[-1].tolist())) > 1
    assert int(counts[-1][0]) < length


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"beta": -0.1}, "beta must be a finite number >= 0"),
        ({"theta_min": True}, "theta_min must be"),
        ({"split": 1.5}, "split must be a layer"),
    ],
)
def test_errors(params: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        vt.reducers.create("atm", **params)


@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients(adaptive: bool) -> None:
    x, key, state = case(1, (7, 7))
    reducer = vt.reducers.create("atm", adaptive=adaptive, alpha=0.5, theta_min=0.1, split=0.5)
    tm = reducer.decide(vt.Signals.of(KEY=key), state, budget=2)
    assert torch.autograd.gradcheck(lambda x: vt.apply(tm, x, state)[0], x.requires_grad_())
