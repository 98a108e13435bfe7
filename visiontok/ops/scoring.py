"""How much a token matters or repeats its neighbours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.ops import dispatch, library

__all__ = ["energy", "gaussian_energy", "outliers"]

# Rows of the similarity that exist at once; bounds memory at N x _ROWS instead of N x N.
_ROWS = 1024

_energy = dispatch.op("energy")


def energy(rows: Tensor, margin: float, alpha: float = 1.0, *, hinge: bool = False) -> Tensor:
    """PiToMe's energy: mean over tokens of ELU(cosine - margin); high means many near neighbours (redundant).

    Args:
        rows: (B, N, d) unit rows; each token counts itself.
        margin: Similarity from which a neighbour counts fully.
        alpha: Slope of the negative part.
        hinge: The paper's equation 4, which keeps the cosine itself above the margin; the released code subtracts the
            margin there too.

    Returns:
        (B, N). Similarities are formed in strips of rows, or stay in registers, never N x N for long sequences.
    """
    return _energy(rows, margin, alpha, "hinge" if hinge else "elu")


def gaussian_energy(rows: Tensor, margin: float) -> Tensor:
    """PiToMe's energy for text: mean Gaussian density of 1 - cosine with deviation 1 - margin.

    Args:
        rows: (B, N, d) unit rows.
        margin: In [0, 1).

    Returns:
        (B, N).
    """
    return _energy(rows, margin, 1.0, "gauss")


def _energy_torch(rows: Tensor, margin: float, alpha: float, kind: str) -> Tensor:
    strips = [_near(strip, margin, alpha, kind).mean(dim=-1) for strip in _strips(rows)]
    total = strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)
    return total / ((1.0 - margin) * math.sqrt(2 * math.pi)) if kind == "gauss" else total


def _near(cosine: Tensor, margin: float, alpha: float, kind: str) -> Tensor:
    if kind == "gauss":
        return torch.exp(-(((1 - cosine) / (1.0 - margin)) ** 2) / 2)
    if kind == "hinge":
        return torch.where(cosine >= margin, cosine, alpha * torch.expm1(cosine - margin))
    return F.elu(cosine - margin, alpha=alpha)


def _strips(rows: Tensor) -> list[Tensor]:
    columns = rows.transpose(1, 2)
    if rows.shape[1] <= _ROWS:
        return [rows @ columns]
    return [strip @ columns for strip in rows.split(_ROWS, dim=1)]


# Rows with a gradient (a learned metric) need the torch formulation.
_energy.implementation(
    "triton",
    lambda x: "with gradients" if torch.is_grad_enabled() and x.requires_grad else dispatch.triton_refuses(x),
    "row sums while similarities stay in registers",
)(
    library.define(
        "energy(Tensor rows, float margin, float alpha, str kind) -> Tensor",
        _energy_torch,
        lambda rows, margin, alpha, kind: rows.new_empty(rows.shape[:2]),
        "scoring.energy",
    )
)
_energy.implementation("torch", lambda x: None, "strips of a matrix product")(_energy_torch)


def outliers(score: Tensor, live: Tensor | None = None) -> Tensor:
    """Which entries lie above the upper quartile by more than 1.5 interquartile ranges; at most a quarter do.

    Args:
        score: (..., n); quartiles are interpolated linearly, in double precision where the device has it.
        live: (..., n) bool entries that count, at least one; None for all.

    Returns:
        (..., n) bool.
    """
    wide = score if score.device.type == "mps" else score.double()
    shown = wide if live is None else wide.masked_fill(~live, torch.inf)
    count = torch.full_like(wide[..., :1], wide.shape[-1]) if live is None else live.sum(dim=-1, keepdim=True)
    ordered = shown.sort(dim=-1).values
    low, high = (_quantile(ordered, count, share) for share in (0.25, 0.75))
    above = wide > high + 1.5 * (high - low)
    return above if live is None else above & live


def _quantile(ordered: Tensor, count: Tensor, share: float) -> Tensor:
    place = share * (count.to(ordered.dtype) - 1)
    below = place.floor()
    a, b = ordered.gather(-1, below.long()), ordered.gather(-1, place.ceil().long())
    return a + (b - a) * (place - below)
