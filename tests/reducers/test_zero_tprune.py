"""Zero-TPrune against loops, and how a budget splits between its two stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError
from visiontok.ops import attention
from visiontok.ops.attention import Votes

# Typed loosely: a decision may be None.
create: Any = vt.reducers.create


def setup(n: int, prefix: int, sharp: float = 1.5, batch: int = 2, layer: int = 1) -> tuple[Tensor, Tensor, Any, Any]:
    noise = torch.Generator().manual_seed(n * 11 + prefix)
    total = n + prefix
    attention = torch.randn(batch, 3, total, total, generator=noise, dtype=torch.float64).mul(sharp).softmax(-1)
    key = torch.randn(batch, 3, total, 4, generator=noise, dtype=torch.float64)
    state = vt.TokenState.initial(key[:, 0], prefix, layer=layer, depth=12)
    return attention, key, state, vt.Signals.of(ATTN_VOTE=Votes.of(attention), KEY=key)


def naive_scores(a: Tensor, turns: int, boost: bool, v_min: float, v_max: float) -> list[float]:
    heads, total = a.shape[:2]
    kept, others = [], []
    for h in range(heads):
        s = torch.ones(total, dtype=a.dtype)
        if boost:
            s[0] = math.sqrt(total)
        s = s * total / s.sum()
        for _ in range(turns):
            s = (a[h] * s.unsqueeze(1)).sum(dim=0)
        (kept if v_min <= float(s.var(correction=0)) <= v_max else others).append(s)
    used = torch.stack(kept or others)
    return used.square().mean(dim=0).sqrt().tolist()


def naive(a: Tensor, key: Tensor, prefix: int, entry: Any, fields: dict[str, Any]) -> list[int]:
    retention, turns, r = entry
    n, boost, feat = a.shape[1] - prefix, fields.get("boost", True), fields.get("feat", "mean")
    v = (fields.get("v_min", 0.01), fields.get("v_max", 0.7))
    first = naive_scores(a, 1, boost and prefix > 0, *v)
    rows = key.mean(dim=0) if feat == "mean" else key.transpose(0, 1).flatten(1)
    ranked = sorted(range(prefix, prefix + n), key=lambda j: -first[j])
    low, high = ranked[n - n // 2 :], ranked[: n - n // 2]
    best = {i: max(float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for j in high) for i in low}
    gone = set(sorted(low, key=lambda i: -best[i])[:r])
    live = [j for j in range(prefix + n) if j not in gone]
    inner = a[:, live][:, :, live]
    second = naive_scores(inner / inner.sum(dim=-1, keepdim=True), turns, boost and prefix > 0, *v)
    score = dict(zip(live, second))
    patches = [j for j in live if j >= prefix]
    count = max(1, math.floor(len(patches) * retention + 0.5))
    return [*range(prefix), *sorted(sorted(patches, key=lambda j: -score[j])[:count])]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("n", "entry"), [(12, (0.7, 3, 3)), (9, (0.5, 1, 2)), (8, (1.0, 1, 100)), (2, (0.5, 2, 1)),
                                          (7, (0.8, 30, 0)), (1, (0.5, 1, 4))])  # fmt: skip
def test_kept_tokens_equal_loops(n: int, entry: tuple[float, int, int], prefix: int) -> None:
    variants: Any = ({}, {"boost": False}, {"feat": "concat"}, {"v_min": 0.2, "v_max": 0.3})
    for fields in variants:
        attention, key, state, signals = setup(n, prefix)
        tm: Any = create("zero_tprune", schedule={1: entry}, **fields).decide(signals, state)
        for b in range(2):
            want = naive(attention[b], key[b], prefix, entry, fields)
            assert (list(range(n + prefix)) if tm is None else tm.kept[b].tolist()) == want, (fields, b)


def test_the_papers_schedule_gives_its_token_counts() -> None:
    schedule = {1: (1, 30, 10), 3: (0.9, 5, 10), 6: (0.8, 5, 10), 9: (0.7, 1, 10), 11: (1, 1, 10)}
    reducer = create("zero_tprune", schedule=schedule)
    n, counts = 196, []
    for layer, budget in reducer.budgets(12).items():
        n -= reducer.removed(n, budget, Where(layer, 12), 1)
        counts.append(n + 1)
    assert counts == [187, 159, 119, 77, 67]
    assert list(reducer.layers(12)) == [1, 3, 6, 9, 11]
    assert [reducer.turns(Where(layer, 12)) for layer in (1, 3, 6, 9, 11)] == [30, 5, 5, 1, 1]
    default = create("zero_tprune")
    assert [default.turns(Where(layer, 12)) for layer in (1, 3, 6, 9, 11)] == [30, 5, 5, 1, 1]
    listed = create("zero_tprune", iters=[7, 8])
    assert [listed.turns(Where(layer, 12)) for layer in (1, 2, 3)] == [7, 8, 5]
    assert create("zero_tprune", iters={3: 9}).turns(Where(3, 12)) == 9


def test_a_total_budget_takes_similar_tokens_first() -> None:
    attention, key, state, signals = setup(30, 1)
    for total, similar in ((6, 10), (14, 10), (14, 4), (20, 0), (20, 99)):
        s = min(similar, 15, total)
        want = {1: ((30 - total) / (30 - s), 2, s)}
        split = create("zero_tprune", schedule=want).decide(signals, state)
        whole = create("zero_tprune", r=total, similar=similar, iters=2).decide(signals, state)
        assert 31 - total == whole.K
        assert torch.equal(whole.assign, split.assign)


@pytest.mark.parametrize(("n", "prefix", "padded"), [(39, 1, 0), (130, 2, 0), (70, 0, 9)])
def test_a_large_map_is_never_formed_for_one_round_and_a_small_one_gives_the_same(
    monkeypatch: Any, n: int, prefix: int, padded: int
) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n + prefix, 8, generator=noise, dtype=torch.float64) for _ in range(2))
    state = vt.TokenState.initial(k[:, 0], prefix, layer=9, depth=12)
    bias = torch.zeros(2, 1, 1, n + prefix, dtype=torch.float64)
    bias[1, ..., n + prefix - padded :] = -math.inf
    reducer, kept = create("zero_tprune", r=n // 2), []
    live = torch.ones(2, n + prefix, dtype=torch.float64)
    live[:, prefix + 3 : prefix + 9] = 0
    found = []
    for most in (0, 2**22):
        monkeypatch.setattr(attention, "_SMALL", most)
        votes = Votes(q, k, 0.35, bias)
        kept.append(reducer.decide(vt.Signals.of(ATTN_VOTE=votes, KEY=k), state).kept)
        assert (votes._map is None) is (most == 0)
        found.append(reducer.importance(votes, live, n + prefix - 6, prefix))
    assert torch.equal(*kept)
    for lean, whole in zip(*found):
        torch.testing.assert_close(lean, whole)
    repeated = create("zero_tprune", r=n // 2, iters=2)
    votes = Votes(q, k, 0.35, bias)
    repeated.decide(vt.Signals.of(ATTN_VOTE=votes, KEY=k), state)
    assert votes._map is not None


def test_every_head_is_used_when_all_would_be_filtered() -> None:
    votes = Votes.of(torch.full((1, 2, 6, 6), 1 / 6))
    found = create("zero_tprune").importance(votes, torch.ones(1, 6), 6, 1)
    assert found.used.all()
    torch.testing.assert_close(found.score, torch.ones(1, 6))


@pytest.mark.parametrize(
    "bad",
    [{"feat": "sum"}, {"similar": -1}, {"iters": 0}, {"iters": [1, 0]}, {"schedule": {1: (0.5, 1)}}, {"schedule": 3},
     {"schedule": {1: (1.5, 1, 1)}}, {"schedule": {1: (0.5, 1, 1)}, "r": 3}],
)  # fmt: skip
def test_bad_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="zero_tprune"):
        create("zero_tprune", **bad)


def test_a_point_that_removes_nothing_does_not_hide_the_next_one() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model: Any = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=4, num_heads=2, num_classes=5).eval()
    image = torch.randn(1, 3, 16, 16)
    alone = vt.patch(model, "zero_tprune", schedule={3: (0.6, 1, 2)})
    with torch.no_grad():
        want = model(image)
        alone.unpatch()
        red = vt.patch(model, "zero_tprune", schedule={2: (1.0, 5, 0), 3: (0.6, 1, 2)})
        assert torch.equal(model(image), want)
    assert red.tokens == red.plan.tokens == [17, 17, 9, 9]
