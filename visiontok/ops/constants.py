"""Small index tensors that depend on shapes only, made once: at batch 1 making them costs as much as using them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from visiontok.ops import dispatch

__all__ = ["arange_rows", "wide_dtype"]

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are compared and summed: at least fp32."""
    return _WIDE.get(dtype) or torch.promote_types(dtype, torch.float32)


def arange_rows(rows: int, count: int, device: torch.device, start: int = 0) -> Tensor:
    """(rows, count) int64, each row start … start + count - 1. Shared: never write to it."""
    if not dispatch.cacheable() or not (isinstance(rows, int) and isinstance(count, int)):
        return torch.arange(start, start + count, device=device).repeat(rows, 1)
    return _arange_rows(rows, count, device, start)


@functools.lru_cache(maxsize=1024)
def _arange_rows(rows: int, count: int, device: torch.device, start: int) -> Tensor:
    # A tensor made in inference mode could not be used outside it.
    with torch.inference_mode(False):
        return torch.arange(start, start + count, device=device).repeat(rows, 1)
