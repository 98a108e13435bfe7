"""DivPrune: a subset of tokens whose smallest distance to each other is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import matching

__all__ = ["DivPrune"]

# Rows of the cosine matrix that exist at once while the first token is chosen.
_ROWS = 512


def _nearest(rows: Tensor) -> Tensor:
    # (R, n) largest cosine of each token to another one.
    n, found = rows.shape[1], []
    for start in range(0, n, _ROWS):
        cosine = rows[:, start : start + _ROWS] @ rows.mT
        own = torch.arange(start, start + cosine.shape[1], device=rows.device).view(1, -1, 1)
        found.append(cosine.scatter(2, own.expand(rows.shape[0], -1, -1), -torch.inf).amax(dim=2))
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class DivPrune(PromptReducer):
    """DivPrune (arXiv:2503.02175): greedy max-min selection by cosine distance of the projected tokens.

    The first token is the one farthest from its nearest neighbour; each further one is farthest from those chosen.
    Chosen tokens stay in raster order.

    Args:
        subset_ratio: Official budget, the share kept; the number is rounded (half to even), at least 1.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: subset_ratio is not in (0, 1].
    """

    name = "divprune"
    card = Card(
        title="DivPrune",
        summary="Keeps the most diverse tokens: greedy max-min cosine distance, no attention and no text needed.",
        paper="Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025",
        url="https://arxiv.org/abs/2503.02175",
        year=2025,
        license="unknown",
        cons=(
            "As many dependent steps as tokens are kept.",
            "Diverse is not relevant: outliers and noise are kept too.",
        ),
        official="finds the image at a fixed offset of the prompt, holds the whole distance matrix, batch of one.",
    )
    site = Site.EMBED
    budget_names = (*PromptReducer.budget_names, "subset_ratio")

    subset_ratio: float | None = None

    def __post_init__(self) -> None:
        ratio = self.subset_ratio
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if ratio is not None and (not number or not 0 < ratio <= 1):
            raise ParameterError(f"{self.name}: subset_ratio must be in (0, 1], got {ratio!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.subset_ratio is None else (None, float(self.subset_ratio))

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.subset_ratio is None:
            return super().removed(n, budget, where, prefix)
        return n - min(max(round(n * self.subset_ratio), 1), n)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        rows = matching.unit(signals.HIDDEN[:, state.prefix :])
        near = _nearest(rows)
        pick = near.argmin(dim=1, keepdim=True)
        chosen = [pick]
        near = torch.full_like(near, -torch.inf)
        for _ in range(state.items - removed - 1):
            row = rows.gather(1, pick.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            near = torch.maximum(near, (rows @ row.mT).squeeze(-1)).scatter(1, pick, torch.inf)
            pick = near.argmin(dim=1, keepdim=True)
            chosen.append(pick)
        return TokenMap.keep(torch.cat(chosen, dim=1).sort(dim=1).values + state.prefix, state.n)
