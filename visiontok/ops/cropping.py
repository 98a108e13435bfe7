"""Crops of one image: which of their tokens show the image, and how a budget is shared among them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.ops.ordering import stable_order

__all__ = ["apportion", "into_crops", "region_of", "thumbnail_on_crops", "valid_cells"]

# Weight of a row that got none: it is served last, and rows like it alike.
_LEAST = 1e-9


def into_crops(canvas: Tensor, crops: tuple[int, int]) -> Tensor:
    """(crops, n) tokens of each crop in raster order, crops row by row.

    Args:
        canvas: (h, w) map over all crops.
        crops: Crops from top to bottom and from left to right; they divide h and w.
    """
    (height, width), (rows, columns) = canvas.shape, crops
    cut = canvas.reshape(rows, height // rows, columns, width // columns).transpose(1, 2)
    return cut.reshape(rows * columns, -1)


def valid_cells(area: tuple[int, int, int, int], canvas: tuple[int, int], crops: tuple[int, int],
                device: torch.device | None = None) -> Tensor:  # fmt: skip
    """(crops, n) bool, which tokens of each crop show the image and no padding.

    Args:
        area: Top, bottom, left, right of the image on the canvas, as `anyres.valid_area` gives it.
        canvas: (h, w) tokens of all crops.
        crops: Crops from top to bottom and from left to right.
        device: Of the result.
    """
    top, bottom, left, right = area
    down, across = torch.arange(canvas[0], device=device), torch.arange(canvas[1], device=device)
    inside = ((down >= top) & (down < bottom)).unsqueeze(1) & (across >= left) & (across < right)
    return into_crops(inside, crops)


def thumbnail_on_crops(score: Tensor, area: tuple[int, int, int, int], canvas: tuple[int, int],
                       crops: tuple[int, int]) -> Tensor:  # fmt: skip
    """(crops, n) a map of the thumbnail, bilinearly resized to the image on the canvas, cut into crops; 0 on padding.

    Args:
        score: (h, w) one number per token of the thumbnail.
        area, canvas, crops: See `valid_cells`.
    """
    top, bottom, left, right = area
    resized = F.interpolate(score[None, None], size=(bottom - top, right - left), mode="bilinear", align_corners=False)
    padded = F.pad(resized[0, 0], (left, canvas[1] - right, top, canvas[0] - bottom))
    return into_crops(padded, crops)


def region_of(side: tuple[int, int], area: tuple[int, int, int, int], canvas: tuple[int, int], crops: tuple[int, int],
              device: torch.device | None = None) -> Tensor:  # fmt: skip
    """(n,) int64, the crop that shows the centre of each token of the thumbnail.

    Args:
        side: (h, w) tokens of the thumbnail.
        area, canvas, crops, device: See `valid_cells`.
    """
    top, bottom, left, right = area
    down = torch.arange(side[0], device=device) * 2 + 1
    across = torch.arange(side[1], device=device) * 2 + 1
    # Twice the coordinates, so that centres stay whole numbers until the last division.
    row = (2 * side[0] * top + down * (bottom - top)) * crops[0] // (2 * side[0] * canvas[0])
    column = (2 * side[1] * left + across * (right - left)) * crops[1] // (2 * side[1] * canvas[1])
    return (row.unsqueeze(1) * crops[1] + column).flatten()


def apportion(weight: Tensor, valid: Tensor, total: int) -> Tensor:
    """Shares whole tokens among rows in proportion to their weights, exactly, and no more than a row has.

    The Webster / Sainte-Lague rule: a row that has j tokens has a claim of weight / (j + 1/2) on the next one; ties go
    to the lower row.

    Args:
        weight: (R,) at least 0.
        valid: (R, n) bool, tokens that each row has.
        total: Tokens to share, at most all.

    Returns:
        (R,) int64 with sum `total`.
    """
    rows, length = valid.shape
    step = torch.arange(length, device=valid.device) + 0.5
    claim = weight.double().clamp_min(_LEAST).unsqueeze(1) / step
    claim = claim.masked_fill(step > valid.sum(dim=1, keepdim=True), -1)
    winners = stable_order(claim.flatten(), descending=True)[:total]
    return (
        torch.zeros(rows * length, dtype=torch.int64, device=valid.device)
        .index_fill(0, winners, 1)
        .view(rows, length)
        .sum(dim=1)
    )
