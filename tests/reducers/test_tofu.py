"""ToFu against a matching and a merge written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError


def tokens(batch: int, length: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(key: Tensor, r: int, prefix: int) -> dict[int, int]:
    """ToMe's r best pairs of one sample: source -> destination."""
    best = {}
    for a in range(prefix, len(key)):
        if a % 2 == 0:
            others = [b for b in range(prefix, len(key)) if b % 2 == 1]
            cosines = [float(torch.cosine_similarity(key[a], key[b], dim=0)) for b in others]
            best[a] = (max(cosines), others[cosines.index(max(cosines))])
    leaving = sorted(best, key=lambda a: -best[a][0])[:r]
    return {a: best[a][1] for a in leaving}


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("layer", [2, 9])
def test_against_loops(prefix: int, layer: int) -> None:
    x, key = tokens(2, 12, 6, 1), tokens(2, 12, 4, 2)
    size = torch.arange(12, dtype=torch.float64).remainder(3).add(1).expand(2, -1).unsqueeze(-1)
    state = vt.TokenState.initial(x, prefix, layer=layer, depth=12).changed(size=size)
    tm = vt.reducers.create("tofu").decide(vt.Signals.of(KEY=key.unsqueeze(1)), state, budget=3)
    y, after = vt.apply(tm, x, state)
    for b in range(2):
        joined = pairs(key[b], 3, prefix)
        for dst in set(range(12)) - set(joined):
            members = [dst, *(a for a in joined if joined[a] == dst)]
            slot = int(tm.assign[b, dst])
            assert [n for n in range(12) if int(tm.assign[b, n]) == slot] == sorted(members)
            assert float(after.size[b, slot]) == sum(float(size[b, n]) for n in members)
            expected = x[b, dst]
            if layer == 9 and len(members) > 1:
                mean = sum(size[b, n] * x[b, n] for n in members)
                expected = mean / mean.norm() * max(x[b, n].norm() for n in members)
            torch.testing.assert_close(y[b, slot], expected, rtol=1e-12, atol=1e-12)


def test_dropped_tokens_come_back_as_their_destination() -> None:
    x, key = tokens(1, 9, 5), tokens(1, 9, 4, 3)
    state = vt.TokenState.initial(x, 1, layer=0, depth=4)
    tm = vt.reducers.create("tofu").decide(vt.Signals.of(KEY=key.unsqueeze(1)), state, budget=2)
    full = tm.restore(tm.reduce(x))
    joined = pairs(key[0], 2, 1)
    for n in range(9):
        assert torch.equal(full[0, n], x[0, joined.get(n, n)])


@pytest.mark.parametrize(
    ("switch", "depth", "first"),
    [(0.5, 12, 6), (0.5, 5, 3), (0.0, 8, 0), (1.0, 8, 8), (0, 8, 0), (1, 8, 1), (7, 12, 7)],
)
def test_switch(switch: float, depth: int, first: int) -> None:
    reducer = vt.reducers.create("tofu", switch=switch)
    assert [reducer.merges_at(Where(layer, depth)) for layer in range(depth)] == [i >= first for i in range(depth)]


@pytest.mark.parametrize("switch", [-1, 1.5, True, "half", math.nan])
def test_bad_switch(switch: object) -> None:
    with pytest.raises(ParameterError, match=r"switch must be a layer .*, got"):
        vt.reducers.create("tofu", switch=switch)


@pytest.mark.parametrize("layer", [0, 3])
def test_gradients(layer: int) -> None:
    x, key = tokens(1, 7, 3, 4), tokens(1, 7, 4, 5)
    state = vt.TokenState.initial(x, 1, layer=layer, depth=4)
    tm = vt.reducers.create("tofu").decide(vt.Signals.of(KEY=key.unsqueeze(1)), state, budget=3)
    assert torch.autograd.gradcheck(lambda x: vt.apply(tm, x, state)[0], x.requires_grad_())
