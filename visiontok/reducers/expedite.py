"""Expedite: cluster the token map for a span of blocks, then rebuild the full map for the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import clustering

__all__ = ["Expedite"]


@dataclass(frozen=True)
class Expedite(Reducer):
    """Token clustering and reconstruction for dense prediction (arXiv:2210.01035).

    Before block `start` the H x W map becomes h x w soft clusters. Later blocks run on these. Before block `end`, or
    for the head, every original token is rebuilt from the clusters that were nearest to it when they were made.

    Args:
        clusters: Clusters: (h, w), or an int that is a perfect square. `keep`, `r` and the other budgets take the
            largest grid with about the map's proportions that keeps no more tokens.
        start: Blocks run on the full map; official `clustering_location`. Default: half of the model.
        end: Blocks run when the full map is rebuilt. Default: after the final norm, for the consumer.
        iters: Clustering steps; official `cluster_iters`.
        temperature: Multiplies squared distances. Official: 0.02 Segmenter, 0.005 or 0.01 SAM, 1 SWAG and DPT.
        window: Odd side, in clusters, of the neighbourhood that a token may join; official `cluster_window_size`.
        k: Clusters that rebuild a token, -1 for all; official `reconstruction_k`.
        norm: `l1`: a rebuilt token is an average of clusters (the paper). `l2`: scaled by up to sqrt(k) (the code).
        reconstruct: False leaves the map small to the end, as for classification.
    """

    name = "expedite"
    card = Card(
        title="Expedite, token clustering and reconstruction",
        summary="Runs the later blocks on a smaller map of soft clusters and rebuilds the full map for dense heads.",
        paper="Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, "
        "NeurIPS 2022",
        url="https://arxiv.org/abs/2210.01035",
        year=2022,
        license="MIT",
        cons=(
            "Clusters once, so blocks before it cost as much as ever.",
            "The temperature must suit the scale of the features of the model and layer.",
            "For classification, pruning and merging reach the same accuracy.",
            "The clustering steps are sequential.",
        ),
        official="divides reconstruction weights by their L2 norm (norm='l2'), underflows for large distances, keeps "
        "all ties at the k-th weight (compat='official'), takes square cluster counts only, computes all distances.",
    )
    grid_preserving = True
    budget_names = (*Reducer.budget_names, "clusters")

    clusters: Any = None
    start: int | None = None
    end: int | None = None
    iters: int = 5
    temperature: float = 0.02
    window: int = 5
    k: int = 20
    norm: str = "l1"
    reconstruct: bool = True

    def __post_init__(self) -> None:
        if self.clusters is not None:
            _cells(self.clusters)
        for name, value, low in (("start", self.start, 0), ("end", self.end, 1), ("iters", self.iters, 0)):
            if value is not None and value < low:
                raise ParameterError(f"expedite: {name} must be an int >= {low}, got {value!r}.")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ParameterError(f"expedite: end must be above start={self.start}, got {self.end!r}.")
        if self.end is not None and not self.reconstruct:
            raise ParameterError(f"expedite: end={self.end!r} has no meaning with reconstruct=False.")
        if self.window < 1 or self.window % 2 == 0:
            raise ParameterError(f"expedite: window must be an odd int >= 1, got {self.window!r}.")
        if self.k < 1 and self.k != -1:
            raise ParameterError(f"expedite: k must be an int >= 1, or -1 for all clusters, got {self.k!r}.")
        if not 0 < self.temperature < math.inf:
            raise ParameterError(f"expedite: temperature must be a positive number, got {self.temperature!r}.")
        if self.norm not in ("l1", "l2"):
            raise ParameterError(f"expedite: norm must be 'l1' or 'l2', got {self.norm!r}.")
        super().__post_init__()

    @property
    def site(self) -> Site:  # type: ignore[override]
        return Site.AROUND if self.reconstruct else Site.PRE

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.GRID)

    def spec(self) -> tuple[Any, Any]:
        return self.r, self.keep if self.clusters is None else math.prod(_cells(self.clusters))

    def span(self, depth: int) -> range:
        # One place only: clusters of clusters have no meaning in the method.
        start = depth // 2 if self.start is None else self.start
        if start > depth:
            raise ParameterError(f"expedite: start={start} but the model has {depth} blocks.")
        return range(start, start + 1)

    def layers(self, depth: int) -> Sequence[int]:
        return self.span(depth)

    def until(self, layer: int, depth: int) -> int | None:
        if self.end is not None and not layer < self.end <= depth:
            raise ParameterError(f"expedite: end must be above start={layer} and at most {depth}, got {self.end!r}.")
        return self.end

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        left = n - super().removed(n, budget, where, prefix)
        return n - math.prod(self._target(where.grid or _squarest(n), left))

    def regrid(self, n: int, budget: Budget, where: Where) -> tuple[int, int] | None:
        return self._target(where.grid or _squarest(n), n - super().removed(n, budget, where))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        grid, skip = signals.GRID, state.prefix
        cells = self._target(grid, state.items - r)
        x = signals.HIDDEN[:, skip:]
        official = self.compat == "official"
        made = clustering.cluster(x, grid, cells, self.iters, self.temperature, self.window, official)
        if not self.reconstruct:
            nearest = clustering.hard_labels(x.detach(), made.centroids.detach())
            return _mapped(nearest, made.share, None, cells, skip)
        norm: Any = self.norm
        back = clustering.reconstruct_weights(x, made.centroids, self.k, self.temperature, norm, official)
        return _mapped(back.argmax(dim=-1), made.share, back, cells, skip)

    def _target(self, grid: tuple[int, int], left: int) -> tuple[int, int]:
        if self.clusters is not None:
            h, w = _cells(self.clusters)
            if h > grid[0] or w > grid[1]:
                size = f"{grid[0]} x {grid[1]}"
                raise ParameterError(f"expedite: clusters={self.clusters!r} do not fit a map of {size}; give fewer.")
            if h * w <= left:
                return h, w
        return clustering.fit_cells(grid, left)


def _cells(clusters: Any) -> tuple[int, int]:
    if isinstance(clusters, int) and not isinstance(clusters, bool) and clusters > 0:
        side = math.isqrt(clusters)
        clusters = (side, side) if side * side == clusters else clusters
    pair = tuple(clusters) if isinstance(clusters, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(c, int) and not isinstance(c, bool) and c > 0 for c in pair):
        raise ParameterError(f"expedite: clusters must be (h, w) or a perfect square, got {clusters!r}.")
    return pair[0], pair[1]


def _squarest(n: int) -> tuple[int, int]:
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0) if n else 0
    return height, n // max(height, 1)


def _mapped(nearest: Tensor, share: Tensor, back: Tensor | None, cells: tuple[int, int], prefix: int) -> TokenMap:
    lead = torch.arange(prefix, device=nearest.device).expand(nearest.shape[0], -1)
    assign = torch.cat((lead, nearest + prefix), dim=1)
    anchor = torch.cat((lead, share.argmax(dim=-1) + prefix), dim=1)
    soft = _beside_prefix(share, prefix)
    back = None if back is None else _beside_prefix(back, prefix)
    return TokenMap(assign, soft.shape[1], anchor=anchor, grid=cells, soft=soft, back=back)


def _beside_prefix(matrix: Tensor, prefix: int) -> Tensor:
    """(B, M, N) to (B, P + M, P + N): prefix tokens pass as they are."""
    if prefix == 0:
        return matrix
    whole = torch.nn.functional.pad(matrix, (prefix, 0, prefix, 0))
    own = torch.arange(prefix, device=matrix.device)
    whole[:, own, own] = 1
    return whole
