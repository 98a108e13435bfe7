"""Vector quantisation with a learned codebook, optionally on the unit sphere (arXiv:2110.04627)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["lookup", "nearest"]

# Rows whose distances to the codebook are held at once.
_STRIP = 4096


def nearest(z: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    """Index of the nearest codebook row, `(n, d)` to `(n,)` int64; of equals the lowest. At least fp32.

    Args:
        z: `(n, d)`.
        codebook: `(V, d)`.
        l2_norm: Compare directions: rows of both are scaled to length 1.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    rows, entries = lengthless(z.to(wide), l2_norm), lengthless(codebook.to(wide), l2_norm)
    norms = entries.square().sum(1)
    found = [
        (strip.square().sum(1, keepdim=True) + norms - 2 * strip @ entries.T).argmin(1) for strip in rows.split(_STRIP)
    ]
    return torch.cat(found) if found else z.new_zeros(0, dtype=torch.long)


def lookup(ids: Tensor, codebook: Tensor, l2_norm: bool) -> Tensor:
    """Codebook rows of ids, `(...)` to `(..., d)`."""
    return lengthless(F.embedding(ids, codebook), l2_norm)


def lengthless(x: Tensor, l2_norm: bool) -> Tensor:
    """Rows of length 1 where `l2_norm`, else as they are."""
    return F.normalize(x, dim=-1) if l2_norm else x
