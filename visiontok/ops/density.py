"""Density peaks: cluster centres are dense tokens far from any denser one (DPC-KNN)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.constants import wide_dtype
from visiontok.ops.ordering import stable_order

__all__ = ["Peaks", "density", "distances", "peaks", "separation"]


class Peaks(NamedTuple):
    """A clustering.

    Attributes:
        centers: (B, K) int64 tokens, highest score first.
        assign: (B, N) int64 cluster of each token in `[0, K)`.
    """

    centers: Tensor
    assign: Tensor


def distances(x: Tensor) -> Tensor:
    """Distance of every pair of tokens: Euclidean over sqrt(C), in at least fp32; zero on the diagonal.

    Args:
        x: (B, N, C).

    Returns:
        (B, N, N).
    """
    rows = x.to(wide_dtype(x.dtype))
    # Moves the origin into the cloud: the squares below then cancel less.
    rows = rows - rows.mean(dim=1, keepdim=True)
    square = rows.square().sum(dim=-1)
    gaps = square.unsqueeze(2) + square.unsqueeze(1) - 2 * (rows @ rows.transpose(1, 2))
    same = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return (gaps.clamp_min(0).masked_fill(same, 0) / x.shape[2]).sqrt()


def density(distance: Tensor, k: int) -> Tensor:
    """exp of minus the mean squared distance to the k nearest tokens, the token itself among them.

    Args:
        distance: (B, N, N).
        k: Neighbours; at most N are used.

    Returns:
        (B, N) in (0, 1].
    """
    near = distance.topk(min(k, distance.shape[-1]), dim=-1, largest=False).values
    return torch.exp(-near.square().mean(dim=-1))


def separation(distance: Tensor, rho: Tensor) -> Tensor:
    """Distance to the nearest denser token; for the densest, the largest distance of the sample.

    Args:
        distance: (B, N, N).
        rho: (B, N) densities.

    Returns:
        (B, N).
    """
    far = distance.amax(dim=(1, 2)).view(-1, 1, 1)
    denser = rho.unsqueeze(1) > rho.unsqueeze(2)
    return torch.where(denser, distance, far).amin(dim=-1)


def peaks(x: Tensor, count: int, k: int = 5, live: Tensor | None = None) -> Peaks:
    """Density-peak clustering with k nearest neighbours (DPC-KNN), without the random noise of released codes.

    Args:
        x: (B, N, C).
        count: K clusters, 1 … N.
        k: Neighbours of the density.
        live: (B, N) bool, False for padding, which neither adds to a density nor becomes a centre while others can.

    Returns:
        The K tokens of highest density times separation, and the nearest centre of every token. Ties go to the lowest
        index; a centre is in its own cluster.

    Raises:
        ParameterError: count is not in [1, N], or k is below 1.
    """
    if not 1 <= count <= x.shape[1]:
        raise ParameterError(f"count must be in [1, {x.shape[1]}] clusters, got {count!r}.")
    if k < 1:
        raise ParameterError(f"k must be at least 1 neighbour, got {k!r}.")
    distance = distances(x)
    if live is not None:
        # As far from everything as can be, so that padding changes no neighbourhood.
        both = live.unsqueeze(1) & live.unsqueeze(2)
        far = distance.masked_fill(~both, 0).amax(dim=(1, 2)).view(-1, 1, 1)
        distance = torch.where(both, distance, far + 1)
    rho = density(distance, k)
    score = rho * separation(distance, rho)
    if live is not None:
        score = score.masked_fill(~live, -1)
    centers = stable_order(score, descending=True)[:, :count]
    index = centers.unsqueeze(-1).expand(-1, -1, x.shape[1])
    assign = distance.gather(1, index).min(dim=1).indices
    own = torch.arange(count, device=x.device).expand_as(centers)
    return Peaks(centers, assign.scatter(1, centers, own))
