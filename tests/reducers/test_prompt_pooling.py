"""Pooling and merging of visual tokens before the language model (m3, ppllava_pool, evs, frame_tome) against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.core.visual import Text
from visiontok.errors import ParameterError
from visiontok.ops import grids


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decide(
    name: str, x: Tensor, budget: int | None = None, params: dict[str, Any] | None = None, **signals: Any
) -> Any:
    state = vt.TokenState.initial(x, prefix=0, depth=4, layer=4)
    return vt.reducers.create(name, **(params or {})).decide(vt.Signals.of(HIDDEN=x, **signals), state, budget)


def reduced(tm: Any, x: Tensor) -> Tensor:
    return vt.apply(tm, x, vt.TokenState.initial(x, prefix=0, depth=4))[0]


def boxes(frames: int, h: int, w: int, box: tuple[int, int, int]) -> list[list[int]]:
    t, a, b = box
    return [
        [(f * t + i) * h * w + (y * a + j) * w + z * b + k for i in range(t) for j in range(a) for k in range(b)]
        for f in range(frames // t) for y in range(h // a) for z in range(w // b)
    ]  # fmt: skip


@pytest.mark.parametrize(("frames", "h", "w", "scale"), [(1, 6, 6, 9), (1, 7, 7, 9), (1, 4, 10, 10), (3, 6, 5, 4)])
def test_m3_pools_windows(frames: int, h: int, w: int, scale: int) -> None:
    x = draw(2, frames * h * w, 3)
    side = int(math.sqrt(h * w / scale))
    tm = decide("m3", x, params={"scale": scale}, GRID=(h, w), FRAMES=frames)
    want = torch.stack([x[:, members].mean(dim=1) for members in boxes(frames, h, w, (1, side, side))], dim=1)
    torch.testing.assert_close(reduced(tm, x), want)
    assert tm.grid == (frames * (h // side), w // side)
    left_over = frames * (h * w - (h // side) * (w // side) * side**2)
    assert int((tm.assign < 0).sum()) == 2 * left_over


def test_m3_takes_the_window_nearest_to_a_budget() -> None:
    x = draw(1, 576, 2)
    for keep, left in ((576, 576), (100, 64 + 80), (150, 144), (40, 36), (1, 1), (0.25, 144), (66, 64)):
        found = decide("m3", x, params={"keep": keep}, GRID=(24, 24), FRAMES=1)
        number = 576 if found is None else found.K
        options = [(24 // side) ** 2 for side in range(1, 25)]
        target = keep if isinstance(keep, int) else 576 * keep
        assert abs(number - target) == min(abs(o - target) for o in options), (keep, left)
        reducer: Any = vt.reducers.create("m3", keep=keep)
        (own,) = reducer.budgets(4).values()
        assert reducer.removed(576, own, Where(4, 4, start=576, grid=(24, 24))) == 576 - number


def test_m3_scale_beyond_the_grid_keeps_all() -> None:
    assert decide("m3", draw(1, 36, 2), params={"scale": 576}, GRID=(6, 6), FRAMES=1) is None
    with pytest.raises(ParameterError, match="scale must be an int >= 1"):
        vt.reducers.create("m3", scale=0)
    with pytest.raises(ParameterError, match="one budget"):
        vt.reducers.create("m3", scale=9, keep=4)


def test_m3_plans_official_scales() -> None:
    reducer: Any = vt.reducers.create("m3", scale=9)
    assert reducer.removed(49, Budget(count=9), Where(4, 4, start=49, grid=(7, 7))) == 49 - 9
    assert reducer.removed(576, Budget(count=9), Where(4, 4, start=576, grid=(24, 24))) == 576 - 9


def naive_ppllava(x: Tensor, words: Tensor, members: list[list[int]], scale: float, heat: float) -> Tensor:
    mean = words.mean(dim=0)
    cosine = torch.stack([torch.dot(t, mean) / (t.norm() * mean.norm()) for t in x])
    relevance = (cosine * scale).softmax(dim=0)
    return torch.stack([((relevance[m] / heat).softmax(dim=0).unsqueeze(1) * x[m]).sum(dim=0) for m in members])


@pytest.mark.parametrize(("frames", "h", "w"), [(1, 6, 6), (4, 3, 7), (3, 2, 2)])
def test_ppllava_weighs_windows_by_text(frames: int, h: int, w: int) -> None:
    x, words = draw(2, frames * h * w, 5), draw(2, 4, 5, seed=1)
    live = torch.tensor([[True] * 4, [True, False, True, False]])
    params = {"temperature": 0.05, "logit_scale": 7.0}
    text = Text(words * live.unsqueeze(-1), live)
    tm = decide("ppllava_pool", x, params=params, GRID=(h, w), FRAMES=frames, TEXT=text)
    members = boxes(frames, h, w, (min(2, frames), min(3, h), min(3, w)))
    got = reduced(tm, x)
    for b in range(2):
        want = naive_ppllava(x[b], words[b][live[b]], members, 7.0, 0.05)
        torch.testing.assert_close(got[b], want)


def test_ppllava_survives_a_cold_softmax_and_no_text() -> None:
    x = draw(1, 36, 5).float()
    none = Text(torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.bool))
    tm = decide("ppllava_pool", x, GRID=(6, 6), FRAMES=1, TEXT=none)
    torch.testing.assert_close(reduced(tm, x)[0, 0], x[0, boxes(1, 6, 6, (1, 3, 3))[0]].mean(dim=0))
    text = Text(x[:, :1] * 3, torch.ones(1, 1, dtype=torch.bool))
    cold = decide("ppllava_pool", x, params={"temperature": 1e-4}, GRID=(6, 6), FRAMES=1, TEXT=text)
    torch.testing.assert_close(reduced(cold, x)[0, 0], x[0, 0])


def test_ppllava_budget_sets_the_window() -> None:
    x = draw(1, 72, 5)
    text = Text(draw(1, 2, 5), torch.ones(1, 2, dtype=torch.bool))
    tm = decide("ppllava_pool", x, budget=72 - 9, GRID=(6, 6), FRAMES=2, TEXT=text)
    assert tm.K == 9
    for bad in ({"kernel": (1, 2)}, {"kernel": (0, 1, 1)}, {"temperature": 0.0}, {"logit_scale": -1.0}):
        with pytest.raises(ParameterError):
            vt.reducers.create("ppllava_pool", **bad)


@pytest.mark.parametrize("left", [4, 5, 9, 15])
def test_evs_keeps_what_changed(left: int) -> None:
    frames, each = 4, 4
    x = draw(2, frames * each, 3)
    tm = decide("evs", x, budget=16 - left, FRAMES=frames)
    for b in range(2):
        change = [math.inf] * each
        change += [1 - float(torch.cosine_similarity(x[b, i], x[b, i - each], dim=0)) for i in range(each, 16)]
        want = sorted(sorted(range(16), key=lambda i: (-change[i], i))[:left])
        assert tm.kept[b].tolist() == want


def test_evs_leaves_a_frame_and_images() -> None:
    x = draw(1, 12, 3)
    assert decide("evs", x, budget=11, FRAMES=3).kept.tolist() == [[0, 1, 2, 3]]
    assert decide("evs", x, budget=11, FRAMES=1) is None
    assert decide("evs", x, params={"q": 0.5}, FRAMES=3).K == 6
    still = x[:, :4].repeat(1, 3, 1)
    assert decide("evs", still, budget=6, FRAMES=3).kept.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ParameterError, match="q must be in"):
        vt.reducers.create("evs", q=1.0)


def naive_frame_tome(x: Tensor, frames: int, removed: int) -> tuple[list[set[int]], Tensor]:
    n = len(x)
    groups, values = [{i} for i in range(n)], [x[i] for i in range(n)]
    half = [(i // (n // frames) if frames > 1 else i) % 2 == 0 for i in range(n)]
    while removed:
        a, b = [i for i, even in enumerate(half) if even], [i for i, even in enumerate(half) if not even]
        unit = [v / v.norm() for v in values]
        best = {i: max(b, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in a}
        leaving = sorted(a, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[: min(removed, len(a))]
        for i in leaving:
            groups[best[i]] |= groups[i]
        stay = [i for i in range(len(values)) if i not in leaving]
        groups = [groups[i] for i in stay]
        values = [torch.stack([x[m] for m in sorted(group)]).mean(dim=0) for group in groups]
        removed -= len(leaving)
        half = [i % 2 == 0 for i in range(len(values))]
    return groups, torch.stack(values)


@pytest.mark.parametrize(("frames", "each"), [(1, 9), (2, 6), (3, 4), (4, 3)])
@pytest.mark.parametrize("left", [8, 3, 1])
def test_frame_tome_merges_across_frames(frames: int, each: int, left: int) -> None:
    n = frames * each
    x = draw(2, n, 4, seed=frames)
    tm = decide("frame_tome", x, budget=n - left, FRAMES=frames)
    assert left == tm.K
    got = reduced(tm, x)
    for b in range(2):
        groups, values = naive_frame_tome(x[b], frames, n - left)
        torch.testing.assert_close(got[b], values)
        for slot, group in enumerate(groups):
            assert {i for i in range(n) if tm.assign[b, i] == slot} == group
        assert tm.kept[b].tolist() == sorted(tm.kept[b].tolist())


def test_first_round_of_frame_tome_leaves_odd_frames_whole() -> None:
    x = draw(1, 16, 4)
    tm = decide("frame_tome", x, budget=8, FRAMES=4)
    assert tm.kept.tolist() == [[4, 5, 6, 7, 12, 13, 14, 15]]


def test_no_budget_removes_nothing() -> None:
    x = draw(1, 16, 4)
    for name in ("m3", "evs", "frame_tome"):
        assert decide(name, x, GRID=(4, 4), FRAMES=1) is None
        assert decide(name, x, budget=0, GRID=(4, 4), FRAMES=1) is None


def test_frame_grid() -> None:
    assert grids.frame_grid(24, 2, (3, 4)) == (2, 3, 4)
    assert grids.frame_grid(24, 2, (6, 4)) == (2, 3, 4)
    assert grids.frame_grid(24, 2, None) == (2, 3, 4)
    for bad in ((24, 5, None), (24, 1, (3, 4))):
        with pytest.raises(ParameterError):
            grids.frame_grid(*bad)
