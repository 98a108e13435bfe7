"""MCTF against its two steps written token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops.attention import Votes


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(prefix: int, length: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, vt.TokenState]:
    x, attn = draw(2, length, 6, seed=seed), draw(2, 3, length, length, seed=seed + 1).softmax(dim=-1)
    size = draw(2, length, 1, seed=seed + 2).abs().mul(3).ceil()
    size[:, :prefix] = 1
    return x, attn, size, vt.TokenState.initial(x, prefix, layer=3, depth=12).changed(size=size)


def loops(
    x: Tensor, attn: Tensor, size: Tensor, r: int, prefix: int, taus: tuple[float, ...], both: bool
) -> list[list[int]]:
    """The groups of one sample, in the order of the released code; x (N, C), attn (H, N, N), size (N, 1)."""
    length = len(x)
    looked = [float(attn[:, :, n].mean()) for n in range(length)]
    info = [(1 / a) / max(1 / b for b in looked) for a in looked]
    small = [(1 / float(s)) / max(1 / float(z) for z in size) for s in size]
    even = [n for n in range(prefix, length) if n % 2 == 0]
    odd = [n for n in range(prefix, length) if n % 2 == 1]

    def fit(a: int, b: int) -> float:
        score = 1.0
        if taus[0]:
            score *= ((float(torch.cosine_similarity(x[a], x[b], dim=0)) + 1) / 2) ** (1 / taus[0])
        if taus[1]:
            score *= (info[a] * info[b]) ** (1 / taus[1])
        if taus[2]:
            score *= (small[a] * small[b]) ** (1 / taus[2])
        return score

    first = r // 2 if both else r
    best = {a: max(odd, key=lambda b: fit(a, b)) for a in even}
    leaving = sorted(even, key=lambda a: -fit(a, best[a]))[:first]
    groups = {n: [n] for n in range(length)}
    for a in leaving:
        groups[best[a]] += groups.pop(a)
    stay = [a for a in even if a not in leaving]
    if not both:
        return [groups[n] for n in [*range(prefix), *stay, *odd]]
    back = {b: max(stay, key=lambda a: fit(a, b)) for b in odd}
    ranked = sorted(odd, key=lambda b: -fit(back[b], b))
    for b in ranked[: r - first]:
        groups[back[b]] += groups.pop(b)
    return [groups[n] for n in [*range(prefix), *stay, *ranked[r - first :]]]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("r", "both"), [(1, True), (4, True), (3, True), (3, False)])
@pytest.mark.parametrize("taus", [(1, 20, 40), (2, 0.5, 0), (0, 1, 1)])
def test_against_loops(prefix: int, r: int, both: bool, taus: tuple[float, ...]) -> None:
    x, attn, size, state = case(prefix, seed=10 * prefix + r)
    names = dict(zip(("tau_sim", "tau_info", "tau_size"), taus))
    reducer = vt.reducers.create("mctf", bidirection=both, **names)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, ATTN_VOTE=Votes.of(attn)), state, budget=r)
    y, after = vt.apply(tm, x, state)
    for b in range(2):
        groups = loops(x[b], attn[b], size[b], r, prefix, taus, both)
        assert [[n for n in range(13) if int(tm.assign[b, n]) == k] for k in range(tm.K)] == [sorted(g) for g in groups]
        assert tm.kept[b].tolist() == [g[0] for g in groups]
        for k, members in enumerate(groups):
            weight = [attn[b, :, :, n].mean() * size[b, n] for n in members]
            expected = sum(w * x[b, n] for w, n in zip(weight, members)) / sum(weight)
            torch.testing.assert_close(y[b, k], expected, rtol=1e-11, atol=1e-11)
            assert float(after.size[b, k]) == float(sum(size[b, n] for n in members))


def test_one_flat_map_is_the_two_steps() -> None:
    x, attn, size, state = case(1, length=14, seed=77)
    reducer = vt.reducers.create("mctf")
    votes = vt.Signals.of(HIDDEN=x, ATTN_VOTE=Votes.of(attn))
    flat = reducer.decide(votes, state, budget=6)
    even, odd = reducer.split(state)
    weight = reducer.attention(votes, x) * size.squeeze(-1)
    scores = reducer.scores(x, reducer.attention(votes, x), size.squeeze(-1), even, odd)
    # The first half alone: with r = 3 of 6 one way, as `bidirection=False` does.
    away = vt.reducers.create("mctf", bidirection=False).places(scores, even, odd, 3, 1)
    half = TokenMap(away.assign, away.K, weight=weight, anchor=away.anchor)
    x1, state1 = vt.apply(half, x, state)
    gathered = torch.zeros(2, away.K, dtype=x.dtype).scatter_add(1, away.assign, weight)
    second = flat.assign.new_full((2, away.K), -1).scatter(1, away.assign, flat.assign)
    x2, state2 = vt.apply(TokenMap(second, flat.K, weight=gathered), x1, state1)
    y, after = vt.apply(flat, x, state)
    torch.testing.assert_close(y, x2, rtol=1e-13, atol=1e-13)
    assert torch.equal(after.size, state2.size)
    # The same by composition, the weights chained: share in the first slot times what the slot holds.
    share = weight / gathered.gather(1, away.assign)
    chained = TokenMap(away.assign, away.K, weight=share).then(TokenMap(second, flat.K, weight=gathered))
    torch.testing.assert_close(chained.weight, flat.weight, rtol=1e-13, atol=1e-13)


def test_the_published_schedules() -> None:
    reducer = vt.reducers.create("mctf", keep={3: 0.65, 6: 0.65, 9: 0.65})
    budgets, left, n = reducer.budgets(12), [], 196
    for layer in range(12):
        if layer in budgets:
            n -= reducer.removed(n, budgets[layer], Where(layer, 12), 1)
        left.append(n)
    # int(n * 0.35) leaves at each: 68, 44, 29.
    assert left == [196] * 3 + [128] * 3 + [84] * 3 + [55] * 3
    assert sorted(vt.reducers.create("mctf", r=16).budgets(12)) == list(range(1, 12))


def test_the_official_floor() -> None:
    sane, official = (vt.reducers.create("mctf", r=16, compat=compat) for compat in (None, "official"))
    budget = sane.budgets(12)[1]
    for n, want in ((40, (16, 16)), (20, (10, 10)), (15, (7, 6)), (9, (4, 0)), (3, (1, 0))):
        assert tuple(red.removed(n, budget, Where(1, 12), 1) for red in (sane, official)) == want


def test_looking_behind_is_a_choice() -> None:
    assert vt.reducers.create("mctf").look == "ahead"
    assert vt.reducers.create("mctf", one_step_ahead=False).look == "behind"


def test_tokens_that_nobody_looks_at() -> None:
    x, attn, _, state = case(1)
    attn[..., 5] = 0
    tm = vt.reducers.create("mctf").decide(vt.Signals.of(HIDDEN=x, ATTN_VOTE=Votes.of(attn)), state, budget=5)
    assert torch.isfinite(vt.apply(tm, x, state)[0]).all()


@pytest.mark.parametrize("value", [-1, True, "1", float("nan")])
def test_bad_temperatures(value: object) -> None:
    with pytest.raises(ParameterError, match="tau_info must be a number >= 0"):
        vt.reducers.create("mctf", tau_info=value)


def test_gradients() -> None:
    x, attn, _, state = case(1, length=8)
    tm = vt.reducers.create("mctf").decide(vt.Signals.of(HIDDEN=x, ATTN_VOTE=Votes.of(attn)), state, budget=3)
    assert torch.autograd.gradcheck(lambda x: vt.apply(tm, x, state)[0], x.requires_grad_())
