"""CubistMerge against rows and columns merged one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import ParameterError
from visiontok.ops.grids import lines


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strongest(rows: list[Tensor]) -> Tensor:
    """Per channel the entry of largest magnitude."""
    return torch.stack([max((row[c] for row in rows), key=lambda v: abs(float(v))) for c in range(len(rows[0]))])


Token = tuple[Tensor, list[int]]


def shrink(line: list[Token], r: int) -> list[Token]:
    """One row or column less r tokens: odd positions into their more similar neighbour."""
    best = []
    for i in range(1, len(line), 2):
        beside = [j for j in (i - 1, i + 1) if j < len(line)]
        found = [float(torch.cosine_similarity(line[i][0], line[j][0], dim=0)) for j in beside]
        best.append((max(found), i, beside[found.index(max(found))]))
    gone = {i: j for _, i, j in sorted(best, key=lambda item: -item[0])[:r]}
    out = []
    for j, (value, members) in enumerate(line):
        if j not in gone:
            joined = [line[i] for i, target in gone.items() if target == j]
            rows = [value, *(row for row, _ in joined)]
            out.append((strongest(rows), sorted(members + [m for _, more in joined for m in more])))
    return out


def naive(x: Tensor, grid: tuple[int, int], rh: int, rw: int) -> list[list[Token]]:
    """Slots (value, members) of one sample as rows of the new grid."""
    rows = [[(x[r * grid[1] + c], [r * grid[1] + c]) for c in range(grid[1])] for r in range(grid[0])]
    rows = [shrink(row, rw) for row in rows]
    columns = [shrink([row[c] for row in rows], rh) for c in range(len(rows[0]))]
    return [[column[r] for column in columns] for r in range(len(columns[0]))]


def decided(x: Tensor, prefix: int, grid: tuple[int, int], r: int, **params: Any) -> Any:
    state = vt.TokenState.initial(x, prefix, grid, layer=3, depth=12)
    tm = vt.reducers.create("cubist", **params).decide(vt.Signals.of(HIDDEN=x, GRID=grid), state, budget=r)
    return tm, vt.apply(tm, x, state)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    ("grid", "rh", "rw"), [((4, 6), 1, 2), ((5, 7), 2, 3), ((6, 3), 0, 1), ((6, 3), 3, 0), ((1, 8), 0, 4)]
)
def test_rows_then_columns(prefix: int, grid: tuple[int, int], rh: int, rw: int) -> None:
    n = grid[0] * grid[1]
    x = draw(2, prefix + n, 5, seed=n + rh)
    tm, (y, after) = decided(x, prefix, grid, 1, rh=rh, rw=rw)
    assert tm.grid == after.grid == (grid[0] - rh, grid[1] - rw)
    for b in range(2):
        expected = [token for row in naive(x[b, prefix:], grid, rh, rw) for token in row]
        assert prefix + len(expected) == tm.K
        for slot, (value, members) in enumerate(expected, start=prefix):
            torch.testing.assert_close(y[b, slot], value, rtol=0, atol=0)
            found = [t - prefix for t in range(prefix, prefix + n) if int(tm.assign[b, t]) == slot]
            assert found == members
            norms = [float(x[b, prefix + m].norm()) for m in members]
            assert int(tm.kept[b, slot]) == prefix + members[norms.index(max(norms))]
            assert float(after.size[b, slot, 0] if after.size is not None else 1) == len(members)
    assert torch.equal(y[:, :prefix], x[:, :prefix])


def test_budgets_come_in_lines() -> None:
    assert lines(14, 14, 27) == (1, 1)
    assert lines(14, 14, 1) == (0, 1)
    assert lines(14, 14, 28) == (1, 2)
    assert lines(14, 14, 10**6) == (7, 7)
    assert lines(1, 5, 2) == (0, 2)
    for height in range(1, 7):
        for width in range(1, 7):
            most = height * width - (height - height // 2) * (width - width // 2)
            for r in range(most + 1):
                rh, rw = lines(height, width, r)
                assert height * width - (height - rh) * (width - rw) >= r
                assert 0 <= rh <= height // 2
                assert 0 <= rw <= width // 2


def test_ties_go_to_the_left_and_the_lowest() -> None:
    x = torch.ones(1, 6, 3, dtype=torch.float64)
    tm, _ = decided(x, 0, (1, 6), 2)
    assert tm.assign.tolist() == [[0, 0, 1, 1, 2, 3]]


def test_on_a_model_the_grid_survives() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4, embed_dim=48, num_heads=2).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad(), vt.patched(model, "cubist", rh=1, rw=2, trace=True) as red:
        model(x)
        assert red.tokens == red.plan.tokens == [1 + 5 * 4] * 4
        assert red.trace[0].map.grid == (5, 4)
    with torch.no_grad(), vt.patched(model, "cubist", r={1: 6, 2: 5}, trace=True) as red:
        model(x)
        assert [step.map.grid for step in red.trace] == [(6, 5), (5, 5)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rh": -1}, "rh must be an int >= 0"),
        ({"rw": 1.5}, "rw must be an int >= 0"),
        ({"rh": 1, "r": 3}, "give one budget, got rh=1, rw=None and r"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        vt.reducers.create("cubist", **params)
