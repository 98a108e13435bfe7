"""Randomness without a generator: an integer hash in plain tensor arithmetic that compiles and ignores batch splits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "mixed", "rank_keys"]

_PRIME = 2_147_483_647


def rank_keys(count: int, *, seed: int, layer: int, step: int = 0, device: torch.device | None = None) -> Tensor:
    """Pseudo-random keys whose order is a random permutation.

    Args:
        count: Number of keys.
        seed, layer, step: What the keys depend on besides the index.
        device: Where to make them.

    Returns:
        (count,) int64 in [0, 2**31 - 1).
    """
    start = (seed * 1_000_003 + layer * 7_919 + step * 104_729 + 12_345) % _PRIME
    return mixed(torch.arange(count, device=device) + start)


def mixed(index: Tensor) -> Tensor:
    """Pseudo-random keys of integers; equal integers get equal keys.

    Args:
        index: (...) int64, at least 0.

    Returns:
        (...) int64 in [0, 2**31 - 1).
    """
    key = index % _PRIME
    # Rounds of multiply-and-fold modulo a prime; each product stays below 2**62, so int64 never overflows.
    for factor in (1_103_515_245, 747_796_405, 1_664_525):
        key = (key * factor + 1_013_904_223) % _PRIME
        key = (key ^ (key >> 15)) % _PRIME
    return key


def gumbel(key: Tensor) -> Tensor:
    """Standard Gumbel noise (mean 0.577, variance pi**2 / 6) from keys of `mixed`.

    Args:
        key: (...) int64 in [0, 2**31 - 1).

    Returns:
        (...) fp32, finite.
    """
    # 23 bits and a half are exact in fp32, so that the uniform number is never 0 or 1.
    uniform = ((key >> 8).float() + 0.5) / 2**23
    return -(-uniform.log()).log()
