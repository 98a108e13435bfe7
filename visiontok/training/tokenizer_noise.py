"""What the training of tokenizers draws: noise levels of a rectified flow, and numbers of tokens to keep."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from visiontok.errors import ParameterError

__all__ = ["KEEPS", "LEVELS", "keep_lengths", "noise_levels", "noised", "tail_token_drop"]

LEVELS = ("logit_normal", "logit_normal_stratified", "uniform", "mode")
KEEPS = ("uniform", "pow2", "uniform_pow2")


def noise_levels(kind: str, raw: Tensor, mode_scale: float = 0.25) -> Tensor:
    """Noise levels in (0, 1) from raw draws `(B,)` (arXiv:2403.03206, section 3.1).

    Args:
        kind: "logit_normal": sigmoid of normal draws. "logit_normal_stratified": likewise, but one uniform draw
            falls in each of B equal shares of the normal distribution. "uniform": the uniform draws. "mode": uniform
            draws pushed to the middle, 1 - u - s (cos(pi u / 2)^2 - 1 + u).
        raw: Normal or uniform draws.
        mode_scale: s of "mode".

    Raises:
        ParameterError: Another kind.
    """
    if kind not in LEVELS:
        raise ParameterError(f"kind must be one of {', '.join(LEVELS)}, got {kind!r}.")
    if kind == "uniform":
        return raw
    if kind == "mode":
        return 1 - raw - mode_scale * ((math.pi / 2 * raw).cos() ** 2 - 1 + raw)
    if kind == "logit_normal_stratified":
        place = (torch.arange(len(raw), dtype=raw.dtype, device=raw.device) + raw) / len(raw)
        raw = torch.special.ndtri(place)
    return raw.sigmoid()


def noised(clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """x_t = level * noise + (1 - level) * clean, for `(B, ...)` and levels `(B,)`."""
    share = levels.view(-1, *(1 for _ in clean.shape[1:])).to(clean.dtype)
    return share * noise + (1 - share) * clean


def keep_lengths(kind: str, count: int, length: int, rng: np.random.RandomState) -> Tensor:
    """How many leading tokens each of `count` images keeps, 1 to `length`: FlexTok's nested dropout.

    Args:
        kind: "uniform"; "pow2", a uniform choice of powers of two; "uniform_pow2", uniform and then rounded up to a
            power of two, so that half of the images keep more than half.
        count: Images.
        length: Most tokens; a power of two for the last two kinds.
        rng: Source of draws.

    Raises:
        ParameterError: Another kind, or a length that is no power of two where one is needed.
    """
    if kind not in KEEPS:
        raise ParameterError(f"kind must be one of {', '.join(KEEPS)}, got {kind!r}.")
    if kind != "uniform" and length & (length - 1):
        raise ParameterError(f"length must be a power of two for {kind}, got {length}.")
    if kind == "pow2":
        return torch.from_numpy(2 ** rng.randint(0, length.bit_length(), size=count))
    kept = rng.randint(1, length + 1, size=count)
    return torch.from_numpy(kept if kind == "uniform" else 2 ** np.ceil(np.log2(kept)).astype(np.int64))


def tail_token_drop(length: int, rng: np.random.RandomState) -> int:
    """How many leading tokens a whole batch keeps, 1 to `length`: One-D-Piece's tail token drop."""
    return int(rng.randint(1, length + 1))
