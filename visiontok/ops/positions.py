"""Position tables for tokens that have moved: rows of rotary embeddings, rows and columns of attention biases."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontok.ops import merging
from visiontok.ops.constants import wide_dtype

__all__ = ["gather_bias", "gather_rows", "mean_bias", "turn"]


def gather_rows(table: Tensor, index: Tensor, blank: float | None = None) -> Tensor:
    """Rows of a table for tokens that stand at `index`.

    Args:
        table: (N0, D), (H, N0, D) or (B, 1 | H, N0, D).
        index: (B, N) int64 rows.
        blank: What a token without a position gets, which has row -1. None if there is none.

    Returns:
        (B, 1 | H, N, D).
    """
    table = table.view(*[1] * (4 - table.dim()), *table.shape)
    batch, heads, _, width = torch.broadcast_shapes(table.shape, (index.shape[0], 1, 1, 1))
    full = table.expand(batch, heads, -1, -1)
    place = index if blank is None else index.clamp_min(0)
    rows = full.gather(2, place[:, None, :, None].expand(-1, heads, -1, width))
    return rows if blank is None else rows.masked_fill((index < 0)[:, None, :, None], blank)


def turn(sin: Tensor, cos: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary rows turned further by an angle.

    Args:
        sin: (B, H, N, D).
        cos: (B, H, N, D).
        angle: (B, 1 | H, N, D) in radians, one per channel in the table's own layout. Zero changes no bit.

    Returns:
        The sines and cosines of the sums, in the dtype of the table.
    """
    wide = wide_dtype(sin.dtype)
    a, b = sin.to(wide), cos.to(wide)
    more, rest = angle.to(wide).sin(), angle.to(wide).cos()
    return (a * rest + b * more).to(sin.dtype), (b * rest - a * more).to(cos.dtype)


def gather_bias(table: Tensor, index: Tensor, blank: float | None = None) -> Tensor:
    """Rows and columns of a bias between tokens.

    Args:
        table: (N0, N0), (H, N0, N0) or (B, 1 | H, N0, N0).
        index: (B, N) int64.
        blank: Bias from and to a token without a position, which has index -1. None if there is none.

    Returns:
        (B, 1 | H, N, N).
    """
    rows = gather_rows(table, index, blank)
    heads, length = rows.shape[1], rows.shape[2]
    place = index if blank is None else index.clamp_min(0)
    found = rows.gather(3, place[:, None, None].expand(-1, heads, length, -1))
    return found if blank is None else found.masked_fill((index < 0)[:, None, None], blank)


def mean_bias(table: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """The mean of a bias over the members of each pair of slots; that of two single tokens is their own, bit for bit.

    Args:
        table: (N0, N0), (H, N0, N0) or (B, 1 | H, N0, N0).
        slot: (B, N0) int64 slot of each original token, -1 for a dropped one.
        num_slots: K.

    Returns:
        (B, 1 | H, K, K); 0 from and to a slot without members.
    """
    table = table.view(*[1] * (4 - table.dim()), *table.shape)
    batch, length, heads = *slot.shape, table.shape[1]
    counts = merging.segment_count(torch.ones_like(slot, dtype=wide_dtype(table.dtype)), slot, num_slots).clamp_min(1)
    # Sums over rows, then over columns: a product with a matrix of shares would cost K times as much.
    rows = table.expand(batch, -1, -1, -1).transpose(1, 2).reshape(batch, length, heads * length)
    rows = merging.segment_sum(rows, slot, num_slots).view(batch, num_slots, heads, length)
    columns = rows.permute(0, 3, 1, 2).reshape(batch, length, num_slots * heads)
    both = merging.segment_sum(columns, slot, num_slots).view(batch, num_slots, num_slots, heads)
    both = both / (counts.unsqueeze(1) * counts.unsqueeze(2)).unsqueeze(3)
    # Sums have columns before rows.
    return both.permute(0, 3, 2, 1).to(table.dtype)
