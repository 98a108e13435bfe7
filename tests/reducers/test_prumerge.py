"""PruMerge and token_corr, whose counts depend on the image, against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import visiontok as vt
from visiontok.core.visual import Crops
from visiontok.errors import ParameterError
from visiontok.ops.scoring import outliers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fence(values: list[float]) -> float:
    """Upper quartile plus 1.5 interquartile ranges."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return float(high + 1.5 * (high - low))


def test_outliers_agree_with_quantiles_and_skip_padding() -> None:
    score = draw(3, 2, 37).exp()
    want = [[[v > fence(row) for v in row] for row in part] for part in score.tolist()]
    assert outliers(score).tolist() == want
    live = draw(3, 2, 37, seed=1) > -0.5
    for row, mask, got in zip(score.flatten(0, 1), live.flatten(0, 1), outliers(score, live).flatten(0, 1)):
        bound = fence(row[mask].tolist())
        assert got.tolist() == [bool(m) and float(v) > bound for v, m in zip(row, mask)]
    assert not outliers(torch.ones(1, 8)).any()


class Tower:
    """Signals of a random tower layer: R rows, n patches behind a class token."""

    def __init__(self, rows: int, n: int, heads: int = 2, seed: int = 0, sharp: float = 3.0) -> None:
        self.x = draw(rows, n + 1, 5, seed=seed)
        self.key = draw(rows, 1, heads, n + 1, 3, seed=seed + 1)
        self.query = draw(rows, 1, heads, 1, 3, seed=seed + 2) * sharp * 3**-0.5
        self.state = vt.TokenState.initial(self.x, prefix=1, depth=4, layer=4)

    @property
    def signals(self) -> Any:
        rows = (self.query @ self.key.mT).softmax(dim=-1)
        return vt.Signals.of(HIDDEN=self.x, KEY=self.key, QUERY_PREFIX=self.query, ATTN_PREFIX=rows)

    def score(self, official: bool) -> Tensor:
        """(R, n)."""
        if not official:
            return (self.query @ self.key.mT).softmax(dim=-1)[:, 0, :, 0, 1:].mean(dim=1)
        heads = self.key.shape[2]
        q, k = self.query[:, 0].transpose(1, 2).flatten(2), self.key[:, 0].transpose(1, 2).flatten(2)
        # As one wide head: the scale of a narrow one is taken out first.
        return (q * 3**0.5 @ k.mT * (3 * heads) ** -0.5).softmax(dim=-1)[:, 0, 1:]


def merged(x: Tensor, key: Tensor, score: Tensor, kept: list[int], neighbors: int) -> Tensor:
    """Tokens of one image; x (n, C), key (n, d)."""
    unit = key / key.norm(dim=1, keepdim=True)
    out = []
    for i in kept:
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:neighbors]
        out.append(x[i] + sum((score[j] * x[j] for j in near), torch.zeros(x.shape[1], dtype=x.dtype)))
    rest = [score[j] * x[j] for j in range(len(x)) if j not in kept]
    return torch.stack([*out, sum(rest, torch.zeros(x.shape[1], dtype=x.dtype))])


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("n", [36, 50])
def test_adaptive(n: int, plus: bool, compat: str | None) -> None:
    tower = Tower(3, n, seed=n)
    reducer: Any = vt.reducers.create("prumerge", plus=plus, neighbors=4, compat=compat)
    tm = reducer.decide(tower.signals, tower.state, 0)
    score = tower.score(bool(compat))
    got, _ = vt.apply(tm, tower.x, tower.state)
    counts = []
    for b in range(3):
        flat = score.flatten().tolist() if compat else score[b].tolist()
        bound = fence(flat)
        ratio = max(sum(v > bound for v in flat) / len(flat), 1 / n)
        order = sorted(range(n), key=lambda i: (-float(score[b, i]), i))
        kept = order[: int(n * ratio + 1e-9)]
        if plus:
            step = int(1 / ratio)
            kept += [i for i in range(step // 6, n - 1, max(step // 3, 1)) if i not in kept]
        if len(kept) == n:
            kept.remove(order[-1])
        kept = kept if compat else sorted(kept)
        counts.append(len(kept) + 1)
        keys = tower.key[b, 0, :, 1:].transpose(0, 1).flatten(1)
        want = merged(tower.x[b, 1:], keys, score[b], kept, 4)
        assert int(tm.counts[b]) == counts[-1]
        torch.testing.assert_close(got[b, : counts[-1]], want)
        assert not got[b, counts[-1] :].any()
        assert tm.kept[b, : len(kept)].tolist() == [1 + i for i in kept]
        assert [int(tm.assign[b, 1 + i]) for i in kept] == list(range(len(kept)))
    assert (tm.assign[:, 0] == -1).all()


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("left", [2, 3, 8, 19])
def test_exact_number(left: int, plus: bool) -> None:
    tower = Tower(2, 20)
    reducer: Any = vt.reducers.create("prumerge", plus=plus, neighbors=3, keep=left)
    tm = reducer.decide(tower.signals, tower.state)
    assert left == tm.K
    assert tm.counts is None
    got, _ = vt.apply(tm, tower.x, tower.state)
    score = tower.score(False)
    for b in range(2):
        order = sorted(range(20), key=lambda i: (-float(score[b, i]), i))
        best = (left - 1 + 1) // 2 if plus else left - 1
        kept, more = order[:best], left - 1 - best
        free = [i for i in range(20) if i not in kept]
        kept = sorted(kept + [free[(2 * j + 1) * len(free) // (2 * more)] for j in range(more)])
        assert len(set(kept)) == left - 1
        keys = tower.key[b, 0, :, 1:].transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[b], merged(tower.x[b, 1:], keys, score[b], kept, 3))


def test_cap_and_single_rows() -> None:
    tower = Tower(3, 40)
    free: Any = vt.reducers.create("prumerge", plus=True)
    capped: Any = vt.reducers.create("prumerge", plus=True, max_tokens=4)
    tm = capped.decide(tower.signals, tower.state)
    assert tm.K == 4
    assert (tm.counts <= 4).all()
    wide = free.decide(tower.signals, tower.state)
    alone = Tower(3, 40)
    alone.x, alone.key, alone.query = alone.x[1:2], alone.key[1:2], alone.query[1:2]
    alone.state = vt.TokenState.initial(alone.x, prefix=1, depth=4, layer=4)
    single = free.decide(alone.signals, alone.state)
    assert single.counts.tolist() == wide.counts[1:2].tolist()
    assert torch.equal(single.assign[0], wide.assign[1])
    for bad in ({"neighbors": -1}, {"max_tokens": 1}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            vt.reducers.create("prumerge", **bad)


def corr(**params: Any) -> Any:
    return vt.reducers.create("token_corr", low_layer=0, deep_layer=1, tau=0.6, min_repeats=2, **params)


def pages(rows: int, side: int, crops: Crops, seed: int = 0) -> tuple[Any, Any, Tensor]:
    n = side * side
    x = draw(rows, n + 1, 4, seed=seed)
    key, query = draw(rows, 2, 1, n + 1, 3, seed=seed + 1), draw(rows, 2, 1, 1, 3, seed=seed + 2) * 3
    state = vt.TokenState.initial(x, prefix=1, depth=2, layer=2)
    return vt.Signals.of(KEY=key, QUERY_PREFIX=query, CROPS=crops), state, x


# 2 x 2 crops of 4 x 4 tokens; a 50 x 100 image leaves two rows of padding above and below.
CROPS = Crops(2, 2, (4, 4), (50, 100))


def valid_cells(crop: int) -> set[int]:
    rows = range(2, 4) if crop < 2 else range(2)
    return {y * 4 + x for y in rows for x in range(4)}


def naive_corr(key: Tensor, query: Tensor, cells: list[int]) -> set[int]:
    low, deep = key[0, 0, 1:], key[1, 0, 1:]
    unit = low / low.norm(dim=1, keepdim=True)
    repeated = [sum(float(unit[i] @ unit[j]) > 0.6 for j in cells if j != i) >= 2 for i in cells]
    attend = [(query[at, 0, 0] @ k[torch.tensor(cells)].T).softmax(dim=0).tolist() for at, k in enumerate((low, deep))]
    best = sorted(range(len(cells)), key=lambda i: (-attend[0][i], i))[: max(repeated.count(False), 1)]
    bound = fence(attend[1])
    return {cells[i] for i in best} | {c for c, p in zip(cells, attend[1]) if p > bound}


def test_crops_are_compressed_and_the_thumbnail_is_not() -> None:
    signals, state, x = pages(5, 4, CROPS)
    tm = corr().decide(signals, state, 0)
    assert tm.counts[0] == 16
    assert tm.kept[0].tolist() == list(range(1, 17))
    for crop in range(4):
        want = naive_corr(signals.KEY[crop + 1], signals.QUERY_PREFIX[crop + 1], sorted(valid_cells(crop)))
        assert {int(i) - 1 for i in tm.kept[crop + 1, : int(tm.counts[crop + 1])]} == want
    got, _ = vt.apply(tm, x, state)
    torch.testing.assert_close(got[0], x[0, 1:])


@pytest.mark.parametrize("left", [20, 30, 48])
def test_budget_is_exact_over_all_crops(left: int) -> None:
    signals, state, _ = pages(5, 4, CROPS)
    for aggregate in ("none", "nearest_mean"):
        tm = corr(aggregate=aggregate).decide(signals, state, 80 - left)
        assert int(tm.counts.sum()) == left
        assert (tm.counts >= 1).all()
        for crop in range(4):
            kept = {int(i) - 1 for i in tm.kept[crop + 1, : int(tm.counts[crop + 1])]}
            assert kept <= valid_cells(crop)
    # A thumbnail and one token of each crop stay whatever the budget says.
    assert int(corr().decide(signals, state, 79).counts.sum()) == 16 + 4


def test_single_image_cap_and_sampling() -> None:
    signals, state, _ = pages(1, 6, Crops(0, 0, (6, 6), (6, 6)))
    free = corr().decide(signals, state, 0)
    capped = corr(max_tokens=3).decide(signals, state, 0)
    assert capped.K == 3
    assert set(capped.kept[0].tolist()) <= set(free.kept[0, : int(free.counts[0])].tolist())
    assert corr(keep=7).decide(signals, state).counts.tolist() == [7]
    drawn = [corr(sampling="sample", seed=seed).decide(signals, state, 0) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].assign, drawn[1].assign)
    assert not torch.equal(drawn[0].assign, drawn[2].assign)
    for bad in ({"aggregate": "sum"}, {"sampling": "random"}, {"max_tokens": 0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            vt.reducers.create("token_corr", **bad)


def test_nearest_mean_gathers_what_is_dropped() -> None:
    signals, state, x = pages(1, 5, Crops(0, 0, (5, 5), (5, 5)))
    tm = corr(aggregate="nearest_mean").decide(signals, state, 0)
    count = int(tm.counts[0])
    got, _ = vt.apply(tm, x, state)
    kept = (tm.kept[0, :count] - 1).tolist()
    unit = F.normalize(signals.KEY[0, 0, 0, 1:], dim=-1)
    groups: dict[int, list[int]] = {i: [i] for i in kept}
    for j in set(range(25)) - set(kept):
        groups[max(kept, key=lambda i: float(unit[j] @ unit[i]))].append(j)
    want = torch.stack([x[0, [1 + m for m in groups[i]]].mean(dim=0) for i in kept])
    torch.testing.assert_close(got[0, :count], want)
    assert math.isclose(float(tm.sizes(None, torch.float64)[0].sum()), 25)


def test_layers_are_clamped() -> None:
    reducer: Any = vt.reducers.create("token_corr")
    assert reducer.taps(24) == (2, 22)
    assert reducer.taps(4) == (2,)
    assert reducer.taps(1) == (0,)
