"""Tokens as a grid: windows of it, and rows and columns that shrink alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["Windows", "box_slots", "frame_grid", "lines", "pool_side", "row_slots", "squarest"]


class Windows(NamedTuple):
    """The windows of a grid, in raster order.

    Attributes:
        window: (1, n) int64 window of each token.
        rank: (1, n) int64 rank of each token in its window, in raster order.
        sizes: (1, M) int64 tokens of each window.
        last: (1, M) int64 last token of each window.
        members: (M, m) int64 tokens of each window, -1 where the border cuts it.
    """

    window: Tensor
    rank: Tensor
    sizes: Tensor
    last: Tensor
    members: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> Windows:
        """Cuts an (h, w) grid into windows of `size`."""
        (height, width), (rows, columns) = grid, size
        down, across = -(-height // rows), -(-width // columns)
        cells = torch.arange(height * width, device=device).view(height, width)
        cells = F.pad(cells, (0, across * columns - width, 0, down * rows - height), value=-1)
        members = cells.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, rows * columns)
        place = torch.arange(height * width, device=device)
        window = (place // width // rows) * across + place % width // columns
        found = members[window]
        rank = ((found < place.unsqueeze(1)) & (found >= 0)).sum(dim=1)
        sizes, last = (members >= 0).sum(dim=1), members.amax(dim=1)
        return cls(window.unsqueeze(0), rank.unsqueeze(0), sizes.unsqueeze(0), last.unsqueeze(0), members)

    def similarity(self, rows: Tensor) -> Tensor:
        """(B, M) mean cosine of all pairs of different tokens of a window; -2 for a single token.

        Args:
            rows: (B, n, C) unit rows.
        """
        batch = rows.shape[0]
        held = (self.members >= 0).view(1, *self.members.shape, 1)
        inside = rows[:, self.members.clamp_min(0).flatten()].view(batch, *self.members.shape, rows.shape[-1]) * held
        # The sum of all dot products is the squared length of the sum.
        total = inside.sum(dim=2).square().sum(dim=-1) - inside.square().sum(dim=(2, 3))
        pairs = self.sizes * (self.sizes - 1)
        return torch.where(pairs > 0, total / pairs.clamp_min(1), -2)


def row_slots(x: Tensor, r: int) -> Tensor:
    """Merges r tokens of each row into direct neighbours, keeping the order.

    Args:
        x: (R, n, C) rows.
        r: Tokens at odd positions that merge, 0 … n // 2.

    Returns:
        (R, n) int64 slot of each token in `[0, n - r)`.
    """
    batch, length, _ = x.shape
    place = torch.arange(length, device=x.device).expand(batch, -1)
    if r == 0:
        return place
    rows = matching.unit(x)
    beside = (rows[:, :-1] * rows[:, 1:]).sum(dim=-1)
    before, after = beside[:, 0::2], beside[:, 1::2]
    if after.shape[1] < before.shape[1]:
        after = torch.cat((after, after.new_full((batch, 1), -torch.inf)), dim=1)
    best = torch.maximum(before, after)
    sources = stable_order(best, descending=True)[:, :r]
    # Right only if that is strictly closer; a tie goes to the lower position.
    step = torch.where(after > before, 1, -1).gather(1, sources)
    leaving = 2 * sources + 1
    slot = torch.ones_like(place).scatter(1, leaving, 0).cumsum(dim=1) - 1
    return slot.scatter(1, leaving, slot.gather(1, leaving + step))


def lines(height: int, width: int, r: int) -> tuple[int, int]:
    """Rows and columns to take from a grid so that at least r tokens go, or as many as can.

    Of all pairs whose sides shrink by shares that differ by at most one line of the shorter side, the one that removes
    fewest; then the more even one, then the one with fewer rows.
    """
    cells, slack = height * width, max(height, width)
    left = cells - min(r, cells - (height - height // 2) * (width - width // 2))
    found = [(cells - (height - height // 2) * (width - width // 2), cells, height // 2, width // 2)]
    for rh in range(height // 2 + 1):
        # The fewest columns that suffice and are not too few beside the rows; shares are compared times the cells.
        rw = max(width - left // (height - rh), -(-(rh * width - slack) // height), 0)
        uneven = abs(rh * width - rw * height)
        if rw <= width // 2 and uneven <= slack:
            found.append((cells - (height - rh) * (width - rw), uneven, rh, rw))
    return min(found)[2:]


def squarest(n: int) -> tuple[int, int]:
    """(h, w) with h * w = n and h <= w, as near to a square as n allows: a guess where the grid is not known."""
    height = next((h for h in range(math.isqrt(n), 0, -1) if n % h == 0), 1)
    return height, n // height


def frame_grid(n: int, frames: int, grid: tuple[int, int] | None) -> tuple[int, int, int]:
    """(F, h, w) of n tokens that are `frames` frames of equal length.

    Args:
        n: Tokens.
        frames: F.
        grid: (h, w) of one frame or of all frames below each other; None: as square as they can be.

    Raises:
        ParameterError: The frames, or the grid, do not hold n tokens.
    """
    if frames < 1 or n % frames:
        raise ParameterError(f"{n} tokens are no {frames} frames of equal length.")
    height, width = squarest(n // frames) if grid is None else grid
    if frames > 1 and height * width == n and height % frames == 0:
        height //= frames
    if frames * height * width != n:
        raise ParameterError(f"grid {grid} in {frames} frames does not hold {n} tokens.")
    return frames, height, width


def box_slots(shape: tuple[int, int, int], box: tuple[int, int, int], device: torch.device) -> tuple[Tensor, int]:
    """Cuts (F, h, w) tokens into boxes that do not overlap; what is left over at the far borders is in none.

    Args:
        shape: (F, h, w).
        box: (frames, rows, columns) of each box; each is clamped to what there is.
        device: Where to make the indices.

    Returns:
        (n,) int64 box of each token in raster order, -1 for none; and the number of boxes.
    """
    sides = [min(part, whole) for part, whole in zip(box, shape)]
    many = [whole // side for side, whole in zip(sides, shape)]
    axes = [torch.arange(whole, device=device) // side for side, whole in zip(sides, shape)]
    slot, inside = torch.zeros((), dtype=torch.int64, device=device), torch.ones((), dtype=torch.bool, device=device)
    for place, count in zip(axes, many):
        slot = slot.unsqueeze(-1) * count + place
        inside = inside.unsqueeze(-1) & (place < count)
    return torch.where(inside, slot, -1).flatten(), math.prod(many)


def pool_side(grid: tuple[int, int], target: float) -> int:
    """Side of the square windows of an (h, w) grid whose number, leftovers dropped, is nearest to `target`.

    Of two numbers equally near the larger wins; of windows that give the same number, the largest, which drops least.
    """
    height, width = grid
    numbers = [(side, (height // side) * (width // side)) for side in range(1, min(grid) + 1)]
    return min(numbers, key=lambda pair: (abs(pair[1] - target), -pair[1], -pair[0]))[0]
