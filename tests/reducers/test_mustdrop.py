"""MustDrop's parts against loops over windows and tokens."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.signals import Site
from visiontok.errors import ParameterError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(**params: Any) -> tuple[Any, ...]:
    return vt.reducers.create("mustdrop", **params).parts()


def tower(rows: int, side: int, width: int = 5) -> Tensor:
    """Class token and tokens of which some windows are alike."""
    noise = draw(rows, side * side, width)
    base = draw(rows, 1, width, seed=1)
    share = torch.linspace(0.75, 1, rows).view(-1, 1, 1)
    alike = torch.rand(rows, side * side, 1, generator=torch.Generator().manual_seed(2)) < share
    return torch.cat((draw(rows, 1, width, seed=3), torch.where(alike, base + 0.1 * noise, noise)), dim=1)


def naive_windows(x: Tensor, side: int, window: tuple[int, int]) -> list[tuple[float, list[int]]]:
    """(mean cosine, tokens) of each window of one sample, class token not counted."""
    made = []
    for top, left in itertools.product(range(0, side, window[0]), range(0, side, window[1])):
        cells = [
            i * side + j
            for i in range(top, min(top + window[0], side))
            for j in range(left, min(left + window[1], side))
        ]
        pairs = [float(torch.cosine_similarity(x[1 + a], x[1 + b], dim=0)) for a, b in itertools.permutations(cells, 2)]
        made.append((sum(pairs) / len(pairs) if pairs else -2.0, cells))
    return made


@pytest.mark.parametrize(("side", "window"), [(6, (3, 3)), (6, (2, 3)), (7, (3, 3)), (4, (2, 2))])
@pytest.mark.parametrize("compat", [None, "official"])
def test_merge(side: int, window: tuple[int, int], compat: str | None) -> None:
    x = tower(3, side)
    state = vt.TokenState.initial(x, 1, (side, side), layer=1, depth=24)
    merge = parts(window=window, spatial_threshold=0.8, compat=compat)[0]
    assert (merge.site, list(merge.layers(24))) == (Site.PRE, [1])
    tm = merge.decide(vt.Signals.of(HIDDEN=x, GRID=(side, side)), state)
    y, after = vt.apply(tm, x, state)
    size: Any = after.size
    windows = [naive_windows(row, side, window) for row in x]
    near = [[w for w in row if w[0] >= 0.8] for row in windows]
    assert len({len(row) for row in near}) > 1, "samples that merge differently are what this is about"
    for b, row in enumerate(near):
        if compat == "official":
            row = sorted(windows[b], key=lambda w: -w[0])[: min(map(len, near))]
        gone = {token for _, cells in row for token in cells}
        groups = [cells for _, cells in row] + [[i] for i in range(side * side) if i not in gone]
        if compat is None:
            groups.sort(key=lambda cells: cells[0])
        want = [x[b, 0], *(x[b, [1 + i for i in cells]].mean(dim=0) for cells in groups)]
        assert int(tm.counts[b]) == len(want)
        torch.testing.assert_close(y[b, : len(want)], torch.stack(want))
        assert size[b, : len(want), 0].tolist() == [1, *map(len, groups)]


@pytest.mark.parametrize("rate", [0.08, 0.5, 0.0])
def test_key_set(rate: float) -> None:
    n = 25
    rows = draw(2, 1, 3, 1, n + 1).softmax(dim=-1)
    part = parts(keep_rate=rate)[1]
    assert (part.site, part.taps(24)) == (Site.POST, (23,))
    state = vt.TokenState.initial(torch.zeros(2, n + 1, 1), 1, layer=24, depth=24)
    tm = part.decide(vt.Signals.of(ATTN_PREFIX=rows), state)
    assert tm.kept.tolist() == [list(range(1, n + 1))] * 2
    assert tm.assign[:, 0].tolist() == [-1, -1]
    for b in range(2):
        score = rows[b, 0, :, 0, 1:].mean(dim=0).tolist()
        want = sorted(sorted(range(n), key=lambda j: -score[j])[: math.ceil(rate * n)])
        assert tm.carry["mustdrop.key"][b].nonzero().squeeze(1).tolist() == want


def test_key_set_counts_live_tokens_only() -> None:
    n, live = 10, torch.tensor([[1.0] * 11, [1.0] * 6 + [0.0] * 5])
    state = vt.TokenState.initial(torch.zeros(2, n + 1, 1), 1, layer=4, depth=4)
    state = state.changed(size=live.unsqueeze(-1), padded=True)
    rows = draw(2, 1, 1, 1, n + 1).softmax(dim=-1)
    key = parts(keep_rate=0.5)[1].decide(vt.Signals.of(ATTN_PREFIX=rows), state).carry["mustdrop.key"]
    assert key.sum(dim=1).tolist() == [5, 3]
    assert not key[1, 5:].any()


def naive_filter(rows: Tensor, share: float, each: float, key: list[int]) -> list[int]:
    """Kept tokens from (H, T, n) attention of one sample."""
    mean = rows.mean(dim=0)
    total = float(mean.sum())
    return [
        j
        for j in range(mean.shape[1])
        if j in key or float(mean[:, j].sum()) >= share * total or float(mean[:, j].max()) >= each
    ]


def start(rows: int, n: int, layer: int = 3, **fields: Any) -> vt.TokenState:
    return vt.TokenState.initial(torch.zeros(rows, n, 1), prefix=0, layer=layer, depth=32, **fields)


def test_filters_one_after_the_other() -> None:
    part = parts(global_thr=0.055, individual_thr=0.1)[2]
    assert (part.site, list(part.layers(32)), part.positions) == (Site.LLM, [3, 7, 11, 15], "compact")
    n, rows = 20, 3
    key = torch.zeros(rows, n, dtype=torch.bool)
    key[0, 4] = key[1, 7] = key[1, 8] = key[2, :6] = True
    x = draw(rows, n, 2)
    state: Any = start(rows, n, carry={"mustdrop.key": key}, carry_rules=part.carry_rules)
    places = [list(range(n))] * rows
    for layer in (3, 7):
        attention = draw(rows, 2, 4, state.n, seed=layer).softmax(dim=-1)
        if state.padded:
            attention = attention * (state.size.squeeze(-1) > 0)[:, None, None]
        tm = part.decide(vt.Signals.of(ATTN_TEXT=attention), state)
        x, state = vt.apply(tm, x, state)
        for b in range(rows):
            held = [j for j, place in enumerate(places[b]) if bool(key[b, place])]
            want = naive_filter(attention[b, :, :, : len(places[b])], 0.055, 0.1, held)
            assert tm.kept[b, : int(tm.counts[b])].tolist() == want
            places[b] = [places[b][j] for j in want]
            carried = state.carry["mustdrop.key"][b].nonzero().squeeze(1).tolist()
            assert [places[b][j] for j in carried] == key[b].nonzero().squeeze(1).tolist()
    assert len({len(p) for p in places}) > 1


@pytest.mark.parametrize("most", [1, 3, 6, 40])
def test_a_cap_keeps_the_key_set_first(most: int) -> None:
    n = 20
    attention = draw(2, 2, 4, n).softmax(dim=-1)
    key = torch.zeros(2, n, dtype=torch.bool)
    key[:, [2, 9]] = True
    reducer: Any = vt.reducers.create("mustdrop", global_thr=0.05, individual_thr=0.1, max_tokens=most)
    tm = reducer.decide(vt.Signals.of(ATTN_TEXT=attention), start(2, n, carry={"mustdrop.key": key}))
    assert min(most, n) == tm.K
    for b in range(2):
        total = attention[b].mean(dim=0).sum(dim=0).tolist()
        want = naive_filter(attention[b], 0.05, 0.1, [2, 9])
        want = sorted(sorted(want, key=lambda j: (j not in (2, 9), -total[j]))[:most])
        assert tm.kept[b, : int(tm.counts[b])].tolist() == want


def test_one_token_stays_where_the_filter_leaves_none() -> None:
    attention = torch.full((1, 1, 2, 8), 0.01)
    attention[0, 0, 1, 5] = 0.02
    reducer: Any = vt.reducers.create("mustdrop", global_thr=0.9, individual_thr=0.9)
    tm = reducer.decide(vt.Signals.of(ATTN_TEXT=attention), start(1, 8))
    assert (tm.counts.tolist(), tm.kept[0, 0].item()) == ([1], 5)


def test_caches_keep_what_survived() -> None:
    part = parts()[3]
    assert (part.site, list(part.layers(32))) == (Site.KV, list(range(2, 15)))
    alive = torch.tensor([[True, False, True, True], [False, False, True, False]])
    tm = part.decide(vt.Signals.of(), start(2, 4, carry={"alive": alive}))
    assert tm.counts.tolist() == [3, 1]
    assert [tm.kept[b, : int(tm.counts[b])].tolist() for b in range(2)] == [[0, 2, 3], [2]]
    assert tm.assign.tolist() == [[0, -1, 1, 2], [-1, -1, 0, -1]]


def test_layers_of_other_depths_and_presets() -> None:
    preset: Any = vt.reducers.create("mustdrop", retained_tokens=64)
    own: Any = vt.reducers.create("mustdrop", global_thr=0.5)
    assert (preset.thresholds, own.thresholds) == ((0.011, 0.01), (0.5, 0.001))
    assert list(preset.layers(16)) == [2, 4, 6, 8]
    assert list(preset.layers(2)) == [1]
    assert list(parts()[3].layers(1)) == []


@pytest.mark.parametrize(
    "bad", [{"keep": 64}, {"tokens": 4}, {"retained_tokens": 100}, {"window": (1, 1)}, {"pruning_layers": [4, 2]},
            {"max_tokens": 0}, {"keep_rate": 1.5}],
)  # fmt: skip
def test_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="mustdrop"):
        vt.reducers.create("mustdrop", **bad)
