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
    prefix: int = 0,
) -> Tensor:  # fmt: skip
    """Full-length tokens from slots for any assignment, one map or many composed ones.

    Args:
        y: (B, K, C).
        assign: (B, N) integer slot of each token, -1 dropped.
        fill: `zero`, `mean`, `self`, `nearest`.
        x: (B, N, C) for `self`.
        live: (B, K) bool, the slots that `mean` averages; None for all.
        prefix: Leading tokens that are no neighbours of the others for `nearest`.

    Returns:
        (B, N, C).
    """
    if fill not in ("zero", "mean", "self", "nearest"):
        raise ParameterError(f"fill must be zero, mean, self or nearest, got {fill!r}.")
    assign = assign.long()
    if fill == "nearest":
        return merging.spread(y, torch.cat((assign[:, :prefix], _nearest(assign[:, prefix:])), dim=1))
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
