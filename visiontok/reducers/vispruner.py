"""VisPruner: half of the tokens by attention, half by what they do not repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["VisPruner"]

# Tokens that leave per step, as released.
_STEP = 8


@dataclass(frozen=True)
class VisPruner(PromptReducer):
    """VisPruner (arXiv:2412.01818).

    A share of the budget goes to the tokens that the class token attends to most in the last layer but one. Of the
    others, in order of attention, every second one is compared with those between, and the eight most similar leave,
    step by step, until the rest of the budget is met. What stays is in raster order.

    Args:
        visual_token_num: Official budget, tokens kept per crop.
        important_ratio: Share of the budget kept for attention (rounded down).
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: important_ratio is not in [0, 1], or visual_token_num no int >= 1.
    """

    name = "vispruner"
    card = Card(
        title="VisPruner",
        summary="Keeps the tokens of highest class attention, and of the others those least like each other.",
        paper="Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, "
        "ICCV 2025",
        url="https://arxiv.org/abs/2412.01818",
        year=2024,
        license="unknown",
        cons=(
            "One dependent step per eight tokens removed.",
            "Attention sinks of the tower are kept as important.",
        ),
        official="removes too few where fewer than eight tokens can leave in a step only after more steps; sorts "
        "unstably.",
    )
    budget_names = (*PromptReducer.budget_names, "visual_token_num")

    visual_token_num: int | None = None
    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        ratio, count = self.important_ratio, self.visual_token_num
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            raise ParameterError(f"{self.name}: important_ratio must be in [0, 1], got {ratio!r}.")
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ParameterError(f"{self.name}: visual_token_num must be an int >= 1, got {count!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX, Signal.HIDDEN)

    def taps(self, depth: int) -> tuple[int, ...]:
        return (max(depth - 2, 0),)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.visual_token_num is None else (None, self.visual_token_num)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        left = state.items - removed
        important = int(left * self.important_ratio)
        score = signals.ATTN_PREFIX[:, -1, :, 0, state.prefix :].mean(dim=1)
        order = stable_order(score, descending=True)
        rest = order[:, important:]
        if left > important:
            rest = self._diverse(matching.unit(signals.HIDDEN[:, state.prefix :]), rest, left - important)
        else:
            rest = rest[:, :0]
        kept = torch.cat((order[:, :important], rest), dim=1).sort(dim=1).values
        return TokenMap.keep(kept + state.prefix, state.n)

    def _diverse(self, rows: Tensor, rest: Tensor, count: int) -> Tensor:
        while rest.shape[1] > count:
            a, b = matching.alternate(rest)
            r = min(_STEP, rest.shape[1] - count, a.shape[1])
            score, _ = matching.best_match(rows, a, b)
            staying = stable_order(score, descending=True)[:, r:]
            rest = torch.cat((a.gather(1, staying), b), dim=1)
        return rest
