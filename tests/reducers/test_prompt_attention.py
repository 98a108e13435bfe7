"""VTC-CLS, VisionZip, GlobalCom2 and HiRED against loops over tokens, their budgets, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.visual import Crops
from visiontok.errors import ParameterError

create: Any = vt.reducers.create


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_of(x: Tensor, prefix: int, depth: int = 24) -> Any:
    return vt.TokenState.initial(x, prefix, layer=depth, depth=depth)


def ranked(score: Any) -> list[int]:
    return sorted(range(len(score)), key=lambda j: -float(score[j]))


# ---- VTC-CLS


@pytest.mark.parametrize("prefix", [0, 1])
def test_vtc_keeps_the_best_sums_in_raster_order(prefix: int) -> None:
    attention = noise(3, 2, 4, 1, 11 + prefix).mul(2).softmax(-1)
    x = noise(3, 11 + prefix, 5, seed=1)
    state = state_of(x, prefix)
    tm = create("vtc_cls", token_num=4).decide(vt.Signals.of(ATTN_PREFIX=attention), state)
    for row in range(3):
        score = [sum(float(attention[row, layer, :, 0, prefix + j].mean()) for layer in range(2)) for j in range(11)]
        best = sorted(ranked(score)[:4])
        assert torch.equal(vt.apply(tm, x, state)[0][row], x[row, [prefix + j for j in best]])
        alone = create("vtc_cls", keep=4).decide(
            vt.Signals.of(ATTN_PREFIX=attention[row : row + 1]), state_of(x[row : row + 1], prefix)
        )
        assert torch.equal(alone.kept[0], tm.kept[row])


@pytest.mark.parametrize(
    ("start", "layers"), [(-10, range(14, 23)), (None, range(23)), (22, [22]), (-2, [22]), (0, range(23))]
)
def test_vtc_sums_layers_before_the_last(start: int | None, layers: Any) -> None:
    assert create("vtc_cls", start_layer=start).taps(24) == tuple(layers)


def test_vtc_budgets_and_ties() -> None:
    x = noise(1, 7, 3)
    flat = vt.Signals.of(ATTN_PREFIX=torch.full((1, 1, 2, 1, 7), 1 / 7))
    assert create("vtc_cls", token_num=3).decide(flat, state_of(x, 1)).kept.tolist() == [[1, 2, 3]]
    assert create("vtc_cls", token_num=99).decide(flat, state_of(x, 1)).kept.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert create("vtc_cls").decide(flat, state_of(x, 1), 5).kept.tolist() == [[1]]
    with pytest.raises(ParameterError, match="start_layer must leave .* 24, got 23"):
        create("vtc_cls", start_layer=23).taps(24)
    with pytest.raises(ParameterError, match="one budget"):
        create("vtc_cls", token_num=3, keep=4)


# ---- VisionZip


def zipped(attention: Tensor, metric: Tensor, x: Tensor, dominant: int, contextual: int, prefix: int) -> Tensor:
    n = len(x) - prefix
    score = [float(attention[:, 0, prefix + j].sum()) for j in range(n)]
    best = sorted(ranked(score)[: dominant - prefix])
    rest = [j for j in range(n) if j not in best]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    got: dict[int, list[int]] = {t: [] for t in targets}
    for j in rest:
        if j not in targets and targets:
            close = [float(torch.cosine_similarity(metric[j], metric[t], dim=0)) for t in targets]
            got[targets[close.index(max(close))]].append(j)
    rows = [x[i] for i in range(prefix)] + [x[prefix + j] for j in best]
    for t, members in got.items():
        extra = torch.stack([x[prefix + j] for j in members]).mean(0) if members else torch.zeros_like(x[0])
        rows.append(x[prefix + t] + extra)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("n", "dominant", "contextual"), [(20, 6, 3), (20, 6, 1), (11, 5, 4), (9, 2, 6), (13, 5, 0), (6, 1, 4), (7, 4, 2)]
)
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("metric", ["key", "hidden"])
def test_visionzip_equals_loops(n: int, dominant: int, contextual: int, prefix: int, metric: str) -> None:
    x, key = noise(2, n + prefix, 5), noise(2, 1, 3, n + prefix, 4, seed=1)
    attention = noise(2, 1, 3, 1, n + prefix, seed=2).softmax(-1)
    state = state_of(x, prefix)
    signals = vt.Signals.of(ATTN_PREFIX=attention, KEY=key, HIDDEN=x)
    tm = create("visionzip", dominant=dominant, contextual=contextual, metric=metric).decide(signals, state)
    assert dominant + contextual == tm.K
    for row in range(2):
        by = (key[row, 0].mean(0) if metric == "key" else x[row])[prefix:]
        expected = zipped(attention[row, 0], by, x[row], dominant, contextual, prefix)
        torch.testing.assert_close(vt.apply(tm, x, state)[0][row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("keep", "merged"), [(64, 10), (128, 20), (192, 30), (1, 0), (2, 0), (575, 90)])
def test_visionzip_splits_a_total_as_released(keep: int, merged: int) -> None:
    x = noise(1, 577, 2)
    signals = vt.Signals.of(ATTN_PREFIX=noise(1, 1, 1, 1, 577).softmax(-1), KEY=noise(1, 1, 1, 577, 2, seed=3))
    tm = create("visionzip", keep=keep).decide(signals, state_of(x, 1))
    assert keep == tm.K == tm.kept.shape[1]
    # Dominant tokens ascend from the class token on; the contextual ones start again.
    ascents = (tm.kept[0, 1:] > tm.kept[0, :-1]).long()
    assert tm.kept[0, 0] == 0
    if merged:
        assert bool(ascents[: keep - merged - 1].all())
        assert torch.equal(tm.kept[0, -merged:].sort().values, tm.kept[0, -merged:])


def test_visionzip_keeps_all_patches_without_the_class_token_if_nothing_goes() -> None:
    x = noise(1, 10, 2)
    signals = vt.Signals.of(ATTN_PREFIX=noise(1, 1, 1, 1, 10).softmax(-1), KEY=noise(1, 1, 1, 10, 2))
    for reducer in (create("visionzip"), create("visionzip", keep=9), create("visionzip", keep=1.0)):
        assert reducer.decide(signals, state_of(x, 1)).kept.tolist() == [list(range(1, 10))]
    assert create("visionzip").spec() == (None, 221)
    with pytest.raises(ParameterError, match="contextual goes with dominant"):
        create("visionzip", keep=5, contextual=2)
    with pytest.raises(ParameterError, match="dominant must be an int >= 1, got 0"):
        create("visionzip", dominant=0)
    with pytest.raises(ParameterError, match="metric must be"):
        create("visionzip", metric="value")


# ---- crops


def boxes(crops: Crops) -> tuple[int, int, int, int]:
    height, width = crops.rows * crops.side[0], crops.columns * crops.side[1]
    high, wide = crops.image_size
    if wide / high > width / height:
        pad = (height - int(round(high * width / wide, 7))) // 2
        return pad, height - pad, 0, width
    pad = (width - int(round(wide * height / high, 7))) // 2
    return 0, height, pad, width - pad


def inside(crops: Crops, crop: int, cell: int) -> bool:
    top, bottom, left, right = boxes(crops)
    row = crop // crops.columns * crops.side[0] + cell // crops.side[1]
    column = crop % crops.columns * crops.side[1] + cell % crops.side[1]
    return top <= row < bottom and left <= column < right


def by_claims(weight: list[float], caps: list[int], total: int) -> list[int]:
    got = [0] * len(weight)
    for _ in range(total):
        claims = [-1.0 if g == c else max(w, 1e-9) / (g + 0.5) for w, g, c in zip(weight, got, caps)]
        got[claims.index(max(claims))] += 1
    return got


SHAPES = [
    Crops(2, 2, (6, 6), (60, 60)),
    Crops(2, 2, (6, 6), (60, 38)),
    Crops(1, 3, (5, 5), (20, 90)),
    Crops(3, 1, (4, 4), (70, 30)),
]


def crop_signals(crops: Crops, seed: int = 0) -> tuple[Tensor, Any, Any]:
    rows, n = 1 + crops.number, crops.side[0] * crops.side[1]
    x = noise(rows, n + 1, 4, seed=seed)
    query, key = noise(rows, 1, 2, 1, 3, seed=seed + 1), noise(rows, 1, 2, n + 1, 3, seed=seed + 2)
    attention = noise(rows, 2, 2, 1, n + 1, seed=seed + 3).mul(2).softmax(-1)
    return x, state_of(x, 1), vt.Signals.of(QUERY_PREFIX=query, KEY=key, ATTN_PREFIX=attention, CROPS=crops)


def counted(tm: Any) -> list[list[int]]:
    return [(row[:count] - 1).tolist() for row, count in zip(tm.kept, tm.counts.tolist())]


@pytest.mark.parametrize("crops", SHAPES)
@pytest.mark.parametrize("keep", [1, 17, 41, 0.25, 1.0])
@pytest.mark.parametrize("method", ["globalcom2", "hired"])
def test_crops_keep_exactly_the_budget_and_no_padding(method: str, crops: Crops, keep: Any) -> None:
    x, state, signals = crop_signals(crops)
    n = crops.side[0] * crops.side[1]
    tm = create(method, keep=keep).decide(signals, state)
    valid = n + sum(inside(crops, c, cell) for c in range(crops.number) for cell in range(n))
    want = min(keep if isinstance(keep, int) else math.ceil(keep * len(x) * n), valid)
    kept = counted(tm)
    assert sum(map(len, kept)) == want
    for crop, cells in enumerate(kept[1:]):
        assert cells == sorted(set(cells))
        assert all(inside(crops, crop, cell) for cell in cells)
    assert kept[0] == sorted(kept[0])


def globalcom2_naive(score: Tensor, crops: Crops, keep: int) -> list[list[int]]:
    (height, width), n = crops.side, score.shape[1]
    top, bottom, left, right = boxes(crops)
    caps = [sum(inside(crops, c, cell) for cell in range(n)) for c in range(crops.number)]
    share = keep / (n + sum(caps))
    sums = [0.0] * crops.number
    for j in range(n):
        r = min(j // width // (height // crops.rows), crops.rows - 1)
        c = min(j % width // (width // crops.columns), crops.columns - 1)
        sums[r * crops.columns + c] += float(score[0, j])
    power = [math.exp((s - max(sums)) / 10) for s in sums]
    soft = [p / (sum(power) + 1e-8) for p in power]
    scale = [min(share * (1 + s - sum(soft) / len(soft)), 1) for s in soft]
    first = max(keep * n // (n + sum(caps)), keep - sum(caps))
    counts = by_claims([s * c for s, c in zip(scale, caps)], caps, keep - first)
    big = torch.nn.functional.interpolate(
        score[0].view(1, 1, height, width), size=(bottom - top, right - left), mode="bilinear", align_corners=False
    )[0, 0]
    kept = [sorted(ranked(score[0])[:first])]
    for crop, count in enumerate(counts):
        cells = [cell for cell in range(n) if inside(crops, crop, cell)]
        rows = [crop // crops.columns * height + cell // width - top for cell in cells]
        columns = [crop % crops.columns * width + cell % width - left for cell in cells]
        own = torch.stack([score[1 + crop, cell] for cell in cells])
        outer = torch.stack([big[r, c] for r, c in zip(rows, columns)])
        both = own / own.norm() + outer / outer.norm()
        kept.append(sorted(cells[j] for j in ranked(both)[:count]))
    return kept


@pytest.mark.parametrize("crops", SHAPES)
@pytest.mark.parametrize("keep", [9, 30])
def test_globalcom2_equals_loops(crops: Crops, keep: int) -> None:
    _, state, signals = crop_signals(crops, seed=7)
    reducer = create("globalcom2", keep=keep)
    score = torch.stack(
        [
            torch.stack([(q * k[:, j]).sum(-1).mean() for j in range(1, k.shape[1])])
            for q, k in zip(signals.QUERY_PREFIX[:, 0, :, 0], signals.KEY[:, 0])
        ]
    )
    assert counted(reducer.decide(signals, state)) == globalcom2_naive(score, crops, keep)


def hired_naive(early: Tensor, late: Tensor, crops: Crops, keep: int, alpha: float) -> list[list[int]]:
    (height, width), n = crops.side, late.shape[1]
    top, bottom, left, right = boxes(crops)
    caps = [sum(inside(crops, c, cell) for cell in range(n)) for c in range(crops.number)]
    first = max(min(int(keep * alpha), n), keep - sum(caps))
    hits = [0] * crops.number
    for j in ranked(early)[: int(n * (1 - alpha))]:
        y = top + (j // width + 0.5) * (bottom - top) / height
        x = left + (j % width + 0.5) * (right - left) / width
        hits[int(y // height) * crops.columns + int(x // width)] += 1
    counts = by_claims([float(h) for h in hits], caps, keep - first)
    kept = [sorted(ranked(late[0])[:first])]
    for crop, count in enumerate(counts):
        cells = [cell for cell in range(n) if inside(crops, crop, cell)]
        kept.append(sorted(sorted(cells, key=lambda j: -float(late[1 + crop, j]))[:count]))
    return kept


@pytest.mark.parametrize("crops", SHAPES)
@pytest.mark.parametrize(("keep", "alpha"), [(20, 0.5), (31, 0.3), (20, 1.0), (40, 1.0), (25, 0.0)])
def test_hired_equals_loops(crops: Crops, keep: int, alpha: float) -> None:
    _, state, signals = crop_signals(crops, seed=11)
    rows = signals.ATTN_PREFIX[..., 0, 1:].sum(dim=2)
    tm = create("hired", keep=keep, alpha=alpha).decide(signals, state)
    assert counted(tm) == hired_naive(rows[0, 0], rows[:, 1], crops, keep, alpha)


@pytest.mark.parametrize("crops", SHAPES[:2])
def test_hired_official_counts_runs_of_tokens(crops: Crops) -> None:
    _, state, signals = crop_signals(crops, seed=5)
    rows, n = signals.ATTN_PREFIX[..., 0, 1:].sum(dim=2), 36
    tm = create("hired", rate=0.3, compat="official").decide(signals, state)
    total = int(5 * n * 0.3)
    first = int(total * 0.5)
    hits = [0] * 4
    for j in ranked(rows[0, 0])[: n // 2]:
        hits[j // 9] += 1
    counts = [first, *(min(int(h / sum(hits) * (total - first)), n) for h in hits)]
    expected = [sorted(ranked(rows[i, 1])[:count]) for i, count in enumerate(counts)]
    assert counted(tm) == expected


@pytest.mark.parametrize("method", ["globalcom2", "hired"])
def test_an_image_that_is_not_cut_keeps_the_best(method: str) -> None:
    crops = Crops(0, 0, (4, 4), (4, 4), False)
    _, state, signals = crop_signals(crops, seed=3)
    score = (
        (signals.QUERY_PREFIX[0, 0] @ signals.KEY[0, 0].mT)[:, 0, 1:].mean(0)
        if method == "globalcom2"
        else signals.ATTN_PREFIX[0, 1, :, 0, 1:].sum(0)
    )
    tm = create(method, keep=5).decide(signals, state)
    assert (tm.kept[0] - 1).tolist() == sorted(ranked(score)[:5])
    assert create(method, keep=5).decide(signals, state, 13).K == 3


def test_defaults_and_errors_of_the_crop_methods() -> None:
    assert create("globalcom2").spec() == (None, 0.25)
    assert create("hired").spec() == (None, 0.2)
    assert create("globalcom2", tokens=40).spec() == create("hired", gflops=1.0).spec() == (None, None)
    assert create("globalcom2").taps(24) == (23,)
    assert create("hired").taps(24) == (0, 22)
    for method, field, value in (
        ("globalcom2", "retention_ratio", 0),
        ("globalcom2", "temperature", 0.0),
        ("hired", "rate", 1.5),
        ("hired", "alpha", -0.1),
    ):
        with pytest.raises(ParameterError, match=f"{method}: {field} must be"):
            create(method, **{field: value})
    crops = SHAPES[0]
    _, state, signals = crop_signals(crops)
    for method in ("globalcom2", "hired"):
        with pytest.raises(ParameterError, match="at least 0"):
            create(method).decide(signals, state, -1)
