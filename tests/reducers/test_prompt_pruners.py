"""Selection of visual tokens before the language model (divprune, cdpruner, vispruner, holov) against loops."""

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


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decide(name: str, x: Tensor, left: int, params: dict[str, Any] | None = None, prefix: int = 0,
           **signals: Any) -> Any:  # fmt: skip
    state = vt.TokenState.initial(x, prefix=prefix, depth=4, layer=4)
    reducer: Any = vt.reducers.create(name, **(params or {}))
    return reducer.decide(vt.Signals.of(HIDDEN=x, **signals), state, state.items - left)


def cosines(x: Tensor) -> list[list[float]]:
    rows = x / x.norm(dim=1, keepdim=True)
    return (rows @ rows.T).tolist()


def rows_attention(batch: int, n: int, heads: int = 2, seed: int = 5) -> Tensor:
    """(R, 1, H, 1, 1 + n) softmax rows of a class token."""
    return draw(batch, 1, heads, 1, n + 1, seed=seed).mul(2).softmax(dim=-1)


def naive_divprune(x: Tensor, left: int) -> list[int]:
    cos, n = cosines(x), range(len(x))
    chosen = [max(n, key=lambda i: (sorted(1 - c for c in cos[i])[1], -i))]
    while len(chosen) < left:
        free = [i for i in n if i not in chosen]
        chosen.append(max(free, key=lambda i: (min(1 - cos[i][j] for j in chosen), -i)))
    return sorted(chosen)


@pytest.mark.parametrize("left", [1, 2, 7, 19])
def test_divprune(left: int) -> None:
    x = draw(3, 20, 6)
    tm = decide("divprune", x, left)
    assert tm.kept.tolist() == [naive_divprune(row, left) for row in x]


def test_divprune_repeated_tokens_leave_first() -> None:
    x = draw(1, 5, 8).repeat(1, 3, 1)
    assert decide("divprune", x, 5).kept.tolist()[0] == sorted(decide("divprune", x, 5).kept.tolist()[0])
    assert sorted(i % 5 for i in decide("divprune", x, 5).kept.tolist()[0]) == [0, 1, 2, 3, 4]
    assert decide("divprune", torch.ones(1, 6, 3), 4).kept.tolist() == [[0, 1, 2, 3]]


def test_divprune_ratio_rounds_half_to_even() -> None:
    reducer: Any = vt.reducers.create("divprune", subset_ratio=0.25)
    where = Where(4, 4, start=10)
    assert reducer.removed(10, Budget(ratio=0.25), where) == 10 - 2
    assert reducer.removed(14, Budget(ratio=0.25), where) == 14 - 4
    assert reducer.removed(1, Budget(ratio=0.25), where) == 0
    with pytest.raises(ParameterError, match="subset_ratio"):
        vt.reducers.create("divprune", subset_ratio=0.0)


def naive_dpp(x: Tensor, relevance: Tensor, left: int) -> list[int]:
    """Greedy MAP by determinants of growing submatrices."""
    rows = x / x.norm(dim=1, keepdim=True) * relevance.unsqueeze(1)
    kernel, chosen = rows @ rows.T, []
    while len(chosen) < left:

        def gain(i: int) -> float:
            at = torch.tensor([*chosen, i])
            return float(torch.linalg.slogdet(kernel[at][:, at])[1])

        free = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(free, key=lambda i: (gain(i), -i)))
    return sorted(chosen)


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("left", [1, 3, 8])
def test_cdpruner(left: int, compat: str | None) -> None:
    x, words = draw(2, 12, 9), draw(2, 3, 9, seed=1)
    live = torch.tensor([[True] * 3, [True, False, True]])
    text = Text(words * live.unsqueeze(-1), live)
    tm = decide("cdpruner", x, left, {"compat": compat}, TEXT=text)
    mean = [
        torch.stack([torch.cosine_similarity(x[b], w, dim=1) for w in words[b][live[b]]]).mean(dim=0) for b in range(2)
    ]
    if compat:
        mean = [-m for m in mean]
    for b in range(2):
        around = torch.cat(mean) if compat else mean[b]
        relevance = (mean[b] - around.min() + 1e-6) / (around.max() - around.min())
        assert tm.kept[b].tolist() == naive_dpp(x[b], relevance, left)


def test_cdpruner_does_not_couple_rows_and_bears_low_rank() -> None:
    x, words = draw(2, 20, 4).float(), draw(2, 3, 4, seed=1).float()
    live = torch.ones(2, 3, dtype=torch.bool)
    both = decide("cdpruner", x, 12, TEXT=Text(words, live))
    one = decide("cdpruner", x[:1], 12, TEXT=Text(words[:1], live[:1]))
    assert both.kept[0].tolist() == one.kept[0].tolist()
    # More tokens than dimensions: the kernel is singular, and still every row keeps as many different ones.
    assert all(len(set(row)) == 12 for row in both.kept.tolist())
    silent = decide("cdpruner", x, 3, TEXT=Text(words * 0, ~live))
    assert silent.kept.shape == (2, 3)


def naive_vispruner(x: Tensor, score: Tensor, left: int, share: float) -> list[int]:
    cos = cosines(x)
    order = sorted(range(len(x)), key=lambda i: (-float(score[i]), i))
    best, rest = order[: int(left * share)], order[int(left * share) :]
    want = left - len(best)
    while len(rest) > want and want:
        a, b = rest[::2], rest[1::2]
        r = min(8, len(rest) - want, len(a))
        like = {i: max(cos[i][j] for j in b) for i in a}
        rest = sorted(a, key=lambda i: (-like[i], a.index(i)))[r:] + b
    return sorted(best + (rest if want else []))


@pytest.mark.parametrize(("left", "share"), [(1, 0.5), (2, 0.5), (9, 0.3), (30, 0.5), (5, 1.0), (6, 0.0), (39, 0.5)])
def test_vispruner(left: int, share: float) -> None:
    x, rows = draw(2, 41, 5), rows_attention(2, 40)
    tm = decide("vispruner", x, left, {"important_ratio": share}, prefix=1, ATTN_PREFIX=rows)
    score = rows[:, 0, :, 0, 1:].mean(dim=1)
    for b in range(2):
        want = naive_vispruner(x[b, 1:], score[b], left, share)
        assert tm.kept[b].tolist() == [1 + i for i in want]
    assert (tm.assign[:, 0] == -1).all()


def naive_holov(x: Tensor, score: Tensor, left: int, parts: int, alpha: float) -> list[int]:
    n, cos = len(x), cosines(x)
    sizes = [n // parts + (p < n % parts) for p in range(parts)]
    members = [list(range(sum(sizes[:p]), sum(sizes[: p + 1]))) for p in range(parts)]
    means = []
    for part in members:
        variance = []
        for i in part:
            row = [0.0 if i == j else cos[i][j] for j in part]
            mean = sum(row) / (len(part) - 1)
            variance.append(sum((c - mean) ** 2 for c in row) / (len(part) - 1))
        lifted = [1e3 * float(score[i]) for i in part]
        factor = sum(map(abs, lifted)) / len(part) / (sum(variance) / len(part) + 1e-6)
        means.append(sum(a + alpha * v * factor for a, v in zip(lifted, variance)) / len(part))
    share = [m / (sum(means) + 1e-6) for m in means]
    allotted = [math.floor(s * left) for s in share]
    for p in sorted(range(parts), key=lambda p: (-share[p], p))[: left - sum(allotted)]:
        allotted[p] += 1
    kept: list[int] = []
    for part, count in zip(members, allotted):
        kept += sorted(part, key=lambda i: (-float(score[i]), i))[:count]
    free = sorted(set(range(n)) - set(kept), key=lambda i: (-float(score[i]), i))
    return sorted(kept + free[: left - len(kept)])


@pytest.mark.parametrize(("n", "parts", "left"), [(32, 4, 10), (30, 4, 7), (30, 4, 26), (24, 3, 1), (37, 8, 20)])
def test_holov(n: int, parts: int, left: int) -> None:
    x, rows = draw(2, n + 1, 5), rows_attention(2, n)
    params = {"num_patches": parts, "alpha": 0.3}
    tm = decide("holov", x, left, params, prefix=1, ATTN_PREFIX=rows)
    score = rows[:, 0, :, 0, 1:].mean(dim=1)
    for b in range(2):
        assert tm.kept[b].tolist() == [1 + i for i in naive_holov(x[b, 1:], score[b], left, parts, 0.3)]


def test_holov_is_exact_with_more_stretches_than_tokens() -> None:
    x, rows = draw(1, 6, 5), rows_attention(1, 5)
    tm = decide("holov", x, 3, prefix=1, ATTN_PREFIX=rows)
    assert len(set(tm.kept[0].tolist())) == 3


@pytest.mark.parametrize(
    ("name", "bad"),
    [("vispruner", {"important_ratio": 1.5}), ("vispruner", {"visual_token_num": 0}), 
     ("cdpruner", {"visual_token_num": 0.5}),
     ("holov", {"num_patches": 0}), ("holov", {"alpha": -1.0}), ("holov", {"new_image_token_num": 0})],
)  # fmt: skip
def test_values_out_of_range(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(bad))):
        vt.reducers.create(name, **bad)


@pytest.mark.parametrize(
    ("name", "field"),
    [("vispruner", "visual_token_num"), ("cdpruner", "visual_token_num"), ("holov", "new_image_token_num")],
)  # fmt: skip
def test_official_budgets_are_counts(name: str, field: str) -> None:
    assert vt.reducers.create(name, **{field: 7}).spec() == (None, 7)
    with pytest.raises(ParameterError, match="one budget"):
        vt.reducers.create(name, **{field: 7, "keep": 0.5})


def test_rows_do_not_depend_on_their_mates() -> None:
    x, rows = draw(3, 25, 5), rows_attention(3, 24)
    for name in ("divprune", "vispruner", "holov"):
        every = decide(name, x, 9, prefix=1, ATTN_PREFIX=rows)
        alone = decide(name, x[1:2], 9, prefix=1, ATTN_PREFIX=rows[1:2])
        assert every.kept[1].tolist() == alone.kept[0].tolist()
