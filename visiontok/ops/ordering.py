"""Stable orders that also convert to ONNX."""

from __future__ import annotations

import torch
from torch import Tensor

from visiontok.ops import dispatch

__all__ = ["stable_order"]


def stable_order(score: Tensor, *, descending: bool = False) -> Tensor:
    """Indices that sort the last dimension; among equal scores the lower index comes first.

    Args:
        score: (..., N).
        descending: Largest first.

    Returns:
        (..., N) int64.
    """
    if dispatch.tracing() and torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK breaks ties by the lower index.
        return score.topk(score.shape[-1], dim=-1, largest=descending, sorted=True).indices
    return score.argsort(dim=-1, descending=descending, stable=True)
