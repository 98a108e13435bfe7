"""Finite scalar quantisation (FSQ, arXiv:2309.15505), in the scale and order of FlexTok's codes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visiontok.errors import ParameterError

__all__ = ["bound", "codebook_size", "quantize", "to_codes", "to_ids"]

_EPS = 1e-3


def codebook_size(levels: Sequence[int]) -> int:
    """Number of different ids."""
    return math.prod(levels)


def bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Squeezes every dimension between its levels, `(..., d)` to `(..., d)`: rounding gives whole levels around 0.

    Args:
        z: `(..., d)`; at least fp32 inside.
        levels: Number of levels of each dimension.

    Raises:
        ParameterError: `levels` and the last axis differ in length.
    """
    if z.shape[-1] != len(levels):
        raise ParameterError(f"levels must name the {z.shape[-1]} dimensions of z, got {tuple(levels)!r}.")
    wide = z.double() if z.dtype == torch.float64 else z.float()
    half, offset, shift = (torch.tensor(row, dtype=wide.dtype, device=z.device) for row in _bounds(tuple(levels)))
    return (wide + shift).tanh() * half - offset


def quantize(z: Tensor, levels: Sequence[int]) -> Tensor:
    """Codes `(..., d)`: whole levels over `level // 2`, so -1 to 1 (0.75 for 8 levels); gradient straight through."""
    bounded = bound(z, levels)
    return (bounded + (bounded.round() - bounded).detach()) / _half(levels, bounded)


def to_ids(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Ids `(...)` int64 of codes `(..., d)`; the first dimension counts least."""
    half = _half(levels, codes)
    # Rounded: what a division and a multiplication leave of a whole number may lie just below it.
    digits = (codes * half + half).round().long()
    return (digits * _basis(levels, codes.device)).sum(-1)


def to_codes(ids: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes `(..., d)` of ids `(...)` in [0, `codebook_size`)."""
    sizes = torch.tensor(tuple(levels), device=ids.device)
    digits = ids[..., None] // _basis(levels, ids.device) % sizes
    return (digits - sizes // 2).to(dtype) / (sizes // 2)


@functools.cache
def _bounds(levels: tuple[int, ...]) -> tuple[list[float], list[float], list[float]]:
    half = [(level - 1) * (1 + _EPS) / 2 for level in levels]
    offset = [0.5 if level % 2 == 0 else 0.0 for level in levels]
    return half, offset, [math.atanh(o / h) for o, h in zip(offset, half)]


def _half(levels: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([level // 2 for level in levels], dtype=like.dtype, device=like.device)


def _basis(levels: Sequence[int], device: torch.device) -> Tensor:
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    return torch.tensor(basis, device=device)
