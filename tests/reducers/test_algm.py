"""ALGM against windows and pairs compared one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import ParameterError


def tokens(batch: int, length: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> list[tuple[float, list[int]]]:
    """Mean pairwise cosine and tokens of every window of one sample, most similar first."""
    found = []
    for top in range(0, grid[0], size[0]):
        for left in range(0, grid[1], size[1]):
            inside = [
                y * grid[1] + z
                for y in range(top, min(top + size[0], grid[0]))
                for z in range(left, min(left + size[1], grid[1]))
            ]
            pairs = [cosine(x[i], x[j]) for i in inside for j in inside if i != j]
            found.append((sum(pairs) / len(pairs) if pairs else -2.0, inside))
    return sorted(found, key=lambda item: -item[0])


def local_groups(x: Tensor, grid: tuple[int, int], size: tuple[int, int], r: int) -> list[list[int]]:
    merged, gone = [], 0
    for _, inside in windows(x, grid, size):
        take = min(len(inside) - 1, r - gone)
        if take > 0:
            merged.append([*inside[:take], inside[-1]])
            gone += take
    used = {token for group in merged for token in group}
    return [*merged, *([token] for token in range(len(x)) if token not in used)]


def decided(x: Tensor, prefix: int, grid: tuple[int, int], r: int, layer: int = 0, **params: Any) -> Any:
    state = vt.TokenState.initial(x, prefix, layer=layer, depth=12)
    state = state.changed(grid=grid)
    tm = vt.reducers.create("algm", **params).decide(vt.Signals.of(HIDDEN=x, GRID=grid), state, budget=r)
    return tm, vt.apply(tm, x, state)


def slots(tm: Any, b: int, prefix: int) -> list[list[int]]:
    assign, live = tm.assign[b].tolist(), tm.K if tm.counts is None else int(tm.counts[b])
    return [[t - prefix for t in range(prefix, len(assign)) if assign[t] == k] for k in range(prefix, live)]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 7)])
@pytest.mark.parametrize("r", [1, 3])
def test_windows_merge_in_order_of_similarity(prefix: int, grid: tuple[int, int], r: int) -> None:
    n = grid[0] * grid[1]
    x = tokens(2, prefix + n, seed=n)
    for budget in (r, n // 2):
        tm, (y, _) = decided(x, prefix, grid, budget)
        assert prefix + n - budget == tm.K
        for b in range(2):
            expected = local_groups(x[b, prefix:], grid, (2, 2), budget)
            assert slots(tm, b, prefix) == [sorted(group) for group in expected]
            for k, group in enumerate(expected):
                mean = x[b, [prefix + t for t in group]].mean(dim=0)
                torch.testing.assert_close(y[b, prefix + k], mean, rtol=1e-12, atol=1e-12)


def smooth(seed: int) -> Tensor:
    """Tokens of a 6 x 6 grid whose windows are alike to very different degrees."""
    base = tokens(3, 9, seed=seed).view(3, 3, 1, 3, 1, -1).expand(3, 3, 2, 3, 2, 6).reshape(3, 36, 6)
    return base + tokens(3, 36, seed=seed + 1) * torch.linspace(0.05, 0.9, 36, dtype=torch.float64).view(1, 36, 1)


def test_the_threshold_decides_per_sample() -> None:
    x = smooth(2)
    tm, (y, _) = decided(torch.cat((x[:, :1], x), dim=1), 1, (6, 6), 0, adaptive=True)
    counts = []
    for b in range(3):
        hits = sum(value >= 0.88 for value, _ in windows(x[b], (6, 6), (2, 2)))
        expected = local_groups(x[b], (6, 6), (2, 2), 3 * hits)
        assert slots(tm, b, 1) == [sorted(group) for group in expected]
        counts.append(1 + 36 - 3 * hits)
        for k, group in enumerate(expected, start=1):
            torch.testing.assert_close(y[b, k], x[b, group].mean(dim=0))
    assert tm.counts.tolist() == counts
    assert len(set(counts)) > 1


def test_official_takes_the_smallest_count_of_the_batch() -> None:
    x = smooth(2)
    tm, _ = decided(torch.cat((x[:, :1], x), dim=1), 1, (6, 6), 0, compat="official")
    hits = min(sum(value >= 0.88 for value, _ in windows(x[b], (6, 6), (2, 2))) for b in range(3))
    assert tm.counts.tolist() == [37 - 3 * hits] * 3
    assert slots(tm, 0, 1) == [sorted(g) for g in local_groups(x[0], (6, 6), (2, 2), 3 * hits)]


def bests(x: Tensor, prefix: int) -> list[tuple[float, int, int]]:
    """Best similarity of each token at an even position to those at odd positions: (value, token, partner)."""
    odd = [t for t in range(prefix, len(x)) if t % 2]
    found = []
    for token in range(prefix, len(x)):
        if token % 2 == 0:
            values = [cosine(x[token], x[other]) for other in odd]
            found.append((max(values), token, odd[values.index(max(values))]))
    return found


def global_groups(x: Tensor, prefix: int, r: int) -> list[list[int]]:
    found = sorted(bests(x, prefix), key=lambda item: -item[0])
    joined = {token: partner for _, token, partner in found[:r]}
    even = [token for _, token, _ in found[r:]]
    order = [*(sorted(even) if prefix else even), *(t for t in range(prefix, len(x)) if t % 2)]
    return [sorted([t, *(s for s, d in joined.items() if d == t)]) for t in order]


def above(found: list[float], number: int) -> float:
    mean = sum(found) / len(found)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in found) / max(len(found) - 1, 1)) / number


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_later_layers_merge_globally(prefix: int) -> None:
    x = tokens(2, prefix + 15, seed=9)
    tm, _ = decided(x, prefix, (3, 5), 4, layer=4)
    for b in range(2):
        expected = [[t - prefix for t in group] for group in global_groups(x[b], prefix, 4)]
        assert slots(tm, b, prefix) == expected


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("official", [False, True])
def test_the_global_threshold_is_mean_plus_deviation_over_the_layer(prefix: int, official: bool) -> None:
    x = tokens(4, prefix + 20, seed=12)
    tm, _ = decided(x, prefix, (4, 5), 0, layer=4, adaptive=True, compat="official" if official else None)
    found = [[value for value, *_ in bests(x[b], prefix)] for b in range(4)]
    counts = [sum(v >= above(values, 5) for v in values) for values in found]
    if official:
        # As released: the first even token never counts in the statistics, a class token or not.
        known = found if prefix else [values[1:] for values in found]
        means = [sum(v) / len(v) for v in known]
        limit = sum(means) / 4 + sum(above(v, 5) - m for v, m in zip(known, means)) / 4
        counts = [min(sum(v >= limit for v in values) for values in found)] * 4
    else:
        assert len(set(counts)) > 1
    assert tm.counts.tolist() == [prefix + 20 - count for count in counts]
    for b in range(4):
        assert slots(tm, b, prefix) == [[t - prefix for t in g] for g in global_groups(x[b], prefix, counts[b])]


def test_padding_takes_no_part_in_the_global_step() -> None:
    x = tokens(2, 1 + 13, seed=14)
    size = torch.ones(2, 14, 1, dtype=torch.float64)
    size[1, 10:] = 0
    state = vt.TokenState.initial(x, 1, layer=4, depth=12).changed(size=size, padded=True)
    reducer = vt.reducers.create("algm", adaptive=True)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x), state, budget=0)
    # The even token at 10 and the odd ones beyond are padding, which must not change the other ten.
    alone = vt.TokenState.initial(x[1:, :10], 1, layer=4, depth=12)
    single = reducer.decide(vt.Signals.of(HIDDEN=x[1:, :10]), alone, budget=0)
    found = [value for value, *_ in bests(x[1, :10], 1)]
    leaving = sum(v >= above(found, 5) for v in found)
    assert int(single.counts[0]) == 10 - leaving
    kept = [t for t in range(1, 10) if int(tm.kept[1, tm.assign[1, t]]) == t]
    assert len(kept) == 9 - leaving
    groups = [[int(t) for t in range(1, 10) if tm.assign[1, t] == tm.assign[1, k]] for k in kept]
    expected = [[int(t) for t in range(1, 10) if single.assign[0, t] == single.assign[0, k]] for k in kept]
    assert groups == expected


def test_on_a_model_batches_do_not_matter() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, embed_dim=48, num_heads=2).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad(), vt.patched(model, "algm", adaptive=True, threshold=0.5, trace=True) as red:
        together = model(x)
        assert [step.layer for step in red.trace] == [0, 2]
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], together[b], rtol=1e-4, atol=1e-5)


def test_layers_and_parameters() -> None:
    assert list(vt.reducers.create("algm").layers(12)) == [0, 4]
    assert list(vt.reducers.create("algm", selected_layers=[1, 7]).layers(24)) == [0, 6]
    for params, message in (
        ({"selected_layers": [0]}, "selected_layers must be ascending ints >= 1"),
        ({"selected_layers": [5, 1]}, "selected_layers must be ascending ints >= 1"),
        ({"window_size": (1, 2)}, "window_size must be"),
    ):
        with pytest.raises(ParameterError, match=message):
            vt.reducers.create("algm", **params)


def test_the_deviation_is_the_unbiased_one() -> None:
    x = tokens(60, 1 + 8, seed=21)
    tm, _ = decided(x, 1, (2, 4), 0, layer=1, adaptive=True)
    found = [[value for value, *_ in bests(sample, 1)] for sample in x]
    expected = [sum(v >= above(values, 2) for v in values) for values in found]
    assert tm.counts.tolist() == [9 - count for count in expected]
    means = [sum(values) / len(values) for values in found]
    biased = [m + (above(values, 2) - m) * math.sqrt(1 - 1 / len(values)) for m, values in zip(means, found)]
    assert expected != [sum(v >= limit for v in values) for limit, values in zip(biased, found)]
