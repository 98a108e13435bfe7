"""ATC: agglomerative clustering of tokens, batched and on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.reducers.tome import KeyMerger

__all__ = ["ATC"]

# Distance of a union to every other cluster, from those of its parts and their sizes (Lance & Williams, 1967).
_LINKAGES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "single": lambda a, b, na, nb: torch.minimum(a, b),
    "complete": lambda a, b, na, nb: torch.maximum(a, b),
    "average": lambda a, b, na, nb: (na * a + nb * b) / (na + nb),
}


@dataclass(frozen=True)
class ATC(KeyMerger):
    """Agglomerative Token Clustering (arXiv:2409.11923): the two closest clusters unite until K are left.

    Args:
        r: Tokens removed at every block (the official off-the-shelf setting).
        keep: Kept at a quarter, half and three quarters of the depth (the official fine-tuned setting: blocks 3, 6, 9).
        linkage: Distance of two clusters: `average` (default), `single` or `complete` linkage of cosine distances.
        prop_attn: Whether attention adds log(size) to the keys.
        metric: What tokens are compared by instead of `key`; see `KeyMerger`.

    Raises:
        ParameterError: An unknown linkage.
    """

    name = "atc"
    card = Card(
        title="Agglomerative Token Clustering",
        summary="Bottom-up hierarchical clustering of attention keys down to K tokens.",
        paper="Haurum et al., Agglomerative Token Clustering, ECCV 2024",
        url="https://arxiv.org/abs/2409.11923",
        year=2024,
        license="MIT",
        cons=(
            "Inherently sequential: one step per removed token, each of which reads all pairwise distances.",
            "Memory grows with the square of the number of tokens.",
        ),
        official="clusters on the CPU with scikit-learn, image by image; clusters are the same here (ties aside), "
        "slots are ordered by their first token. Its kept counts are shares of the first block's tokens, rounded down.",
    )

    linkage: str = "average"

    def __post_init__(self) -> None:
        if self.linkage not in _LINKAGES:
            raise ParameterError(f"atc: linkage must be one of {', '.join(_LINKAGES)}, got {self.linkage!r}.")
        super().__post_init__()

    def layers(self, depth: int) -> Sequence[int]:
        return self.span(depth) if self.r is not None else quarters(depth)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if budget.ratio is not None:
            return min(n - math.floor(n * budget.ratio), self.limit(n))
        return super().removed(n, budget, where, prefix)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        first = self.clusters(self.measure(signals)[:, state.prefix :], r)
        leads = first == torch.arange(state.items, device=first.device)
        slots = (leads.cumsum(dim=1) - 1).gather(1, first) + state.prefix
        lead = torch.arange(state.prefix, device=slots.device).expand(state.batch, -1)
        return TokenMap(torch.cat((lead, slots), dim=1), state.n - r, form="complete")

    def clusters(self, metric: Tensor, r: int) -> Tensor:
        """(B, n) the first token of each token's cluster after r unions.

        Args:
            metric: (B, n, d).
            r: At most n - 1.
        """
        rows, join = matching.unit(metric), _LINKAGES[self.linkage]
        batch, n = rows.shape[:2]
        place = torch.arange(n, device=rows.device)
        apart = 1 - rows @ rows.transpose(1, 2)
        # A product of matrices need not be symmetric to the last bit; NaN would sort first.
        apart = ((apart + apart.transpose(1, 2)) / 2).nan_to_num(nan=4.0)
        apart = apart.masked_fill(place.unsqueeze(1) == place, math.inf)
        count, first = rows.new_ones(batch, n), place.expand(batch, n)
        for _ in range(r):
            # Of equal distances the first row wins, so the row is the smaller index of the pair.
            pair = apart.flatten(1).argmin(dim=1, keepdim=True)
            low, high = pair.div(n, rounding_mode="floor"), pair % n
            a, b = _row(apart, low), _row(apart, high)
            na, nb = count.gather(1, low), count.gather(1, high)
            # Itself and clusters that are no more stay infinitely far away.
            far = (place == low) | (place == high) | a.isinf()
            union = join(a, b, na, nb).masked_fill(far, math.inf)
            _write(apart, low, union)
            _write(apart, high, torch.full_like(union, math.inf))
            count.scatter_(1, low, na + nb)
            first = torch.where(first == high, low, first)
        return first


def _row(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix.gather(1, index.unsqueeze(2).expand(-1, -1, matrix.shape[2])).squeeze(1)


def _write(matrix: Tensor, index: Tensor, values: Tensor) -> None:
    at = index.unsqueeze(2)
    matrix.scatter_(1, at.expand(-1, -1, matrix.shape[2]), values.unsqueeze(1))
    matrix.scatter_(2, at.expand(-1, matrix.shape[1], -1), values.unsqueeze(2))
