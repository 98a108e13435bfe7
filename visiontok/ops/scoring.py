"""How much a token matters or repeats its neighbours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["energy", "gaussian_energy"]

# Rows of the similarity that exist at once; bounds memory at N x _ROWS instead of N x N.
_ROWS = 1024


def energy(rows: Tensor, margin: float, alpha: float = 1.0, *, hinge: bool = False) -> Tensor:
    """PiToMe's energy: mean over tokens of ELU(cosine - margin); high means many near neighbours (redundant).

    Args:
        rows: (B, N, d) unit rows; each token counts itself.
        margin: Similarity from which a neighbour counts fully.
        alpha: Slope of the negative part.
        hinge: The paper's equation 4, which keeps the cosine itself above the margin; the released code subtracts the
            margin there too.

    Returns:
        (B, N). Similarities are formed in strips of rows, never N x N for long sequences.
    """
    strips = [_near(strip, margin, alpha, hinge).mean(dim=-1) for strip in _strips(rows)]
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)


def _near(cosine: Tensor, margin: float, alpha: float, hinge: bool) -> Tensor:
    if hinge:
        return torch.where(cosine >= margin, cosine, alpha * torch.expm1(cosine - margin))
    return F.elu(cosine - margin, alpha=alpha)


def gaussian_energy(rows: Tensor, margin: float) -> Tensor:
    """PiToMe's energy for text: mean Gaussian density of 1 - cosine with deviation 1 - margin.

    Args:
        rows: (B, N, d) unit rows.
        margin: In [0, 1).

    Returns:
        (B, N).
    """
    deviation = 1.0 - margin
    norm = deviation * math.sqrt(2 * math.pi)
    strips = [torch.exp(-(((1 - strip) / deviation) ** 2) / 2).mean(dim=-1) / norm for strip in _strips(rows)]
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)


def _strips(rows: Tensor) -> list[Tensor]:
    columns = rows.transpose(1, 2)
    if rows.shape[1] <= _ROWS:
        return [rows @ columns]
    return [strip @ columns for strip in rows.split(_ROWS, dim=1)]
