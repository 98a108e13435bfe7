"""Small index tensors that depend on shapes only, made once: at batch 1 making them costs as much as using them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visiontok.ops import dispatch

__all__ = ["arange_row", "length_of", "shape_constant", "wide_dtype", "without_autocast"]

_AS_IT_IS = contextlib.nullcontext()
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are compared and summed: at least fp32."""
    return _WIDE.get(dtype) or torch.promote_types(dtype, torch.float32)


def without_autocast(device: str) -> Any:
    """A context in which products keep the dtype of their factors."""
    # Entering autocast costs more than a small op, so it is done only where there is something to switch off.
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


def length_of(x: Tensor, axis: int = 1) -> int:
    """The size of an axis as an int, also under jit.trace, which hands out tensors for sizes."""
    length = x.shape[axis]
    return int(length) if torch._C._get_tracing_state() is not None else length


def shape_constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function of ints and a device return one shared tensor per argument list. Never write to the result."""

    @functools.lru_cache(maxsize=1024)
    def shared(*key: Any) -> Tensor:
        # A tensor made in inference mode could not be used outside it.
        with torch.inference_mode(False):
            return make(*key)

    @functools.wraps(make)
    def get(*key: Any) -> Tensor:
        return shared(*key) if dispatch.cacheable() else make(*key)

    return get


@shape_constant
def arange_row(start: int, stop: int, device: torch.device) -> Tensor:
    """(1, stop - start) int64: start … stop - 1. Shared: never write to it."""
    return torch.arange(start, stop, device=device).unsqueeze(0)
