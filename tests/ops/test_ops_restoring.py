"""restore: nearest kept neighbour in the sequence and on the grid, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.ops.restoring import restore


def nearest_by_loops(assign: Tensor, grid: tuple[int, int]) -> list[list[int]]:
    """Slot of each token: its own, else that of the closest kept token; upper, then left one on a tie."""
    height, width = grid
    out = []
    for row in assign.tolist():
        slots = []
        for token, slot in enumerate(row):
            i, j = divmod(token, width)
            kept = [
                ((i - a) ** 2 + (j - b) ** 2, a, b)
                for a in range(height) for b in range(width) if row[a * width + b] >= 0
            ]  # fmt: skip
            _, a, b = min(kept)
            slots.append(slot if slot >= 0 else row[a * width + b])
        out.append(slots)
    return out


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (4, 4), (3, 5), (6, 4)])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_nearest_on_the_grid_equals_loops(grid: tuple[int, int], share: float, prefix: int) -> None:
    noise = torch.Generator().manual_seed(grid[0] * 10 + grid[1])
    count = grid[0] * grid[1]
    keep = torch.rand(3, count, generator=noise) < share
    keep[:, count // 2] = True
    slots = torch.where(keep, keep.long().cumsum(dim=1) - 1, -1)
    y = torch.arange(prefix + count, dtype=torch.float64).view(1, -1, 1).expand(3, -1, 1)
    lead = torch.arange(prefix).expand(3, -1)
    assign = torch.cat((lead, torch.where(slots < 0, -1, slots + prefix)), dim=1)
    full = restore(y, assign, "nearest", prefix=prefix, grid=grid)
    assert full[:, :prefix, 0].tolist() == lead.tolist()
    assert (full[:, prefix:, 0].long() - prefix).tolist() == nearest_by_loops(slots, grid)


def test_states_remember_the_original_grid() -> None:
    # Token 2, upper right of a 2 x 3 grid, is closer to token 5 below it than to token 0 before it in the sequence.
    x = torch.arange(7.0).view(1, 7, 1)
    state = vt.TokenState.initial(x, prefix=1, grid=(2, 3))
    y, state = vt.apply(vt.TokenMap.keep(torch.tensor([[1, 6]]), 7, 1), x, state)
    assert state.grid is None
    assert state.restore(y, "nearest").flatten().tolist() == [0, 1, 1, 6, 1, 6, 6]
