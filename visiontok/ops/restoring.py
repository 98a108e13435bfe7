"""Full-length tokens from reduced ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import merging
from visiontok.ops.constants import wide_dtype

__all__ = ["Fill", "restore"]

Fill = Literal["zero", "mean", "self", "nearest"]


def restore(
    y: Tensor, assign: Tensor, fill: Fill = "zero", *, x: Tensor | None = None, live: Tensor | None = None,
    prefix: int = 0, grid: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Full-length tokens from slots for any assignment, one map or many composed ones.

    Args:
        y: (B, K, C).
        assign: (B, N) integer slot of each token, -1 dropped.
        fill: `zero`, `mean`, `self`, `nearest`.
        x: (B, N, C) for `self`.
        live: (B, K) bool, the slots that `mean` averages; None for all.
        prefix: Leading tokens that are no neighbours of the others for `nearest`.
        grid: (h, w) of the other tokens in raster order, where `nearest` shall mean on the grid instead of in the
            sequence.

    Returns:
        (B, N, C).
    """
    if fill not in ("zero", "mean", "self", "nearest"):
        raise ParameterError(f"fill must be zero, mean, self or nearest, got {fill!r}.")
    assign = assign.long()
    if fill == "nearest":
        rest = assign[:, prefix:]
        found = _nearest(rest) if grid is None else _nearest_on_grid(rest, grid)
        return merging.spread(y, torch.cat((assign[:, :prefix], found), dim=1))
    full = merging.spread(y, assign)
    if fill == "zero":
        return full
    if fill == "self" and x is None:
        raise ParameterError("fill='self' needs x, the (B, N, C) tokens before the reduction.")
    other = _mean(y, live) if x is None or fill == "mean" else x
    return torch.where((assign < 0).unsqueeze(-1), other.to(full.dtype), full)


def _mean(y: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return y.mean(dim=1, keepdim=True)
    total = y.masked_fill(~live.unsqueeze(-1), 0).sum(dim=1, keepdim=True, dtype=wide_dtype(y.dtype))
    return total / live.sum(dim=1).clamp_min(1).view(-1, 1, 1)


def _nearest(assign: Tensor) -> Tensor:
    # The closest kept token on either side in sequence order, the left one on a tie; running maxima, no N x N matrix.
    length = assign.shape[1]
    place = torch.arange(length, device=assign.device).expand_as(assign)
    kept = assign >= 0
    left = torch.where(kept, place, -length).cummax(dim=1).values
    right = torch.where(kept, place, 3 * length).flip(1).cummin(dim=1).values.flip(1)
    closest = torch.where(place - left <= right - place, left, right).clamp(0, length - 1)
    return assign.gather(1, closest).clamp_min(0)


def _nearest_on_grid(assign: Tensor, grid: tuple[int, int]) -> Tensor:
    # Exact by rows, then columns: the closest kept token of each row, then the best row. On a tie the upper one, then
    # the left one. (B, h, h, w) at most, never N x N.
    height, width = grid
    batch, far = assign.shape[0], 4 * (height + width)
    rows = assign.unflatten(1, grid)
    column = torch.arange(width, device=assign.device).expand(batch, height, width)
    kept = rows >= 0
    left = torch.where(kept, column, -far).cummax(dim=2).values
    right = torch.where(kept, column, 2 * far).flip(2).cummin(dim=2).values.flip(2)
    in_row = torch.where(column - left <= right - column, left, right)
    along = (in_row - column).abs().clamp_max(far).square()
    row = torch.arange(height, device=assign.device)
    across = (row.unsqueeze(1) - row).square().view(1, height, height, 1)
    best = (across + along.unsqueeze(1)).argmin(dim=2)
    place = in_row.clamp(0, width - 1).gather(1, best) + best * width
    return assign.gather(1, place.flatten(1)).clamp_min(0)
