"""vid-TLDR against saliency, matching and merging written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.ops.attention import Votes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy(attention: Tensor) -> list[float]:
    """Entropy of the head-averaged rows of one sample (H, N, N)."""
    mean = attention.mean(dim=0)
    return [-sum(float(p) * math.log(float(p)) for p in row if float(p) > 0) for row in mean]


def saliency(values: list[float]) -> list[float]:
    sharp = [-v for v in values]
    sharp = [s - min(sharp) for s in sharp]
    sharp = [s / max(sharp) for s in sharp]
    mean = sum(sharp) / len(sharp)
    above = [s - mean for s in sharp]
    return [a / max(above) if s >= mean else 0.0 for a, s in zip(above, sharp)]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("sized", [False, True])
def test_sources_count_by_saliency_and_size(prefix: int, sized: bool) -> None:
    length, r = prefix + 14, 5
    x, logits = draw(2, length, 4, seed=3), 2 * draw(2, 3, length, length, seed=4)
    size = torch.ones(2, length, 1, dtype=torch.float64)
    if sized:
        size[:, prefix:] += torch.arange(14).remainder(3).view(1, -1, 1)
    state = vt.TokenState.initial(x, prefix, layer=0, depth=12, proportional=True)
    state = state.changed(size=size) if sized else state
    biased = (logits + size.transpose(1, 2).unsqueeze(1).log()).softmax(dim=-1)
    reducer = vt.reducers.create("vid_tldr")
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, ATTN_VOTE=Votes.of(biased)), state, budget=r)
    y, after = vt.apply(tm, x, state)
    assert reducer.proportional
    background = 0
    for b in range(2):
        # The attention that is judged has no log-size bias, whatever the model used.
        salient = saliency(entropy(logits[b].softmax(dim=-1))[prefix:])
        odd = [t for t in range(prefix, length) if t % 2]
        best = {}
        for t in range(prefix, length):
            if t % 2 == 0:
                values = [float(torch.cosine_similarity(x[b, t], x[b, o], dim=0)) for o in odd]
                best[t] = (max(values), odd[values.index(max(values))])
        leaving = sorted(best, key=lambda t: -best[t][0])[:r]
        order = [*range(prefix), *(t for t in sorted(best) if t not in leaving), *odd]
        for slot, t in enumerate(order):
            own = float(size[b, t])
            value, mass = own * x[b, t], own
            for s in leaving:
                if best[s][1] == t:
                    share = salient[s - prefix] * float(size[b, s])
                    value, mass = value + share * x[b, s], mass + share
                    background += share == 0
                    assert int(tm.assign[b, s]) == slot
            torch.testing.assert_close(y[b, slot], value / mass, rtol=1e-10, atol=1e-10)
            assert float(after.size[b, slot, 0]) == pytest.approx(mass, rel=1e-10)
    assert background > 0, "some source was meant to be background"


def test_the_entropy_in_strips_equals_the_map() -> None:
    query, key = draw(2, 3, 150, 4, seed=1), draw(2, 3, 150, 4, seed=2)
    bias = torch.rand(2, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1
    bias[1, 140:] = 0
    votes = Votes(query, key, 0.7, bias.log()[:, None, None])
    attention = (0.7 * query @ key.transpose(-2, -1) + bias.log()[:, None, None]).softmax(dim=-1)
    expected = torch.tensor([entropy(attention[b]) for b in range(2)], dtype=torch.float64)
    torch.testing.assert_close(votes.mean_entropy(), expected)
    assert votes._map is None
    plain = (0.7 * query @ key.transpose(-2, -1)).masked_fill(bias[:, None, None] == 0, -math.inf).softmax(dim=-1)
    expected = torch.tensor([entropy(plain[b]) for b in range(2)], dtype=torch.float64)
    torch.testing.assert_close(votes.mean_entropy(bias), expected)
    torch.testing.assert_close(Votes.of(attention).mean_entropy(bias), expected)


def test_uniform_attention_makes_everything_background() -> None:
    x = draw(1, 9, 4)
    votes = Votes.of(torch.full((1, 2, 9, 9), 1 / 9, dtype=torch.float64))
    state = vt.TokenState.initial(x, 1, layer=0, depth=12)
    tm = vt.reducers.create("vid_tldr").decide(vt.Signals.of(HIDDEN=x, ATTN_VOTE=votes), state, budget=3)
    y, after = vt.apply(tm, x, state)
    torch.testing.assert_close(y, x.gather(1, tm.kept.unsqueeze(-1).expand(-1, -1, 4)))
    assert (after.size == 1).all()


def test_a_single_budget_acts_early() -> None:
    assert list(vt.reducers.create("vid_tldr", r=4).layers(12)) == [0, 1, 2]
    assert list(vt.reducers.create("vid_tldr", r=[600, 200, 100]).budgets(12)) == list(range(12))
