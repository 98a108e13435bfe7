"""EVS: of a video, only what changed since the previous frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer, keep_top
from visiontok.errors import ParameterError
from visiontok.ops import grids, matching

__all__ = ["EVS"]


@dataclass(frozen=True)
class EVS(PromptReducer):
    """Efficient Video Sampling (arXiv:2510.14624): drops tokens that repeat the previous frame.

    Every token is scored by one minus its cosine to the same cell of the previous frame; the most novel ones of the
    whole video stay, and all of the first frame does. The number is exact and known beforehand. Images, which are one
    frame, are left alone.

    Args:
        q: Official pruning rate in [0, 1): `int(n * (1 - q))` of n tokens stay.
        r, keep, tokens: Budget of the whole video; never less than one frame stays.
        positions: Default and official: `original`, tokens keep their place in time.
        per: See `PromptReducer`.

    Raises:
        ParameterError: q is not in [0, 1).
    """

    name = "evs"
    card = Card(
        title="EVS, efficient video sampling",
        summary="Drops the video tokens that changed least since the previous frame.",
        paper="Bagrov et al., Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, "
        "2025",
        url="https://arxiv.org/abs/2510.14624",
        year=2025,
        license="Apache-2.0",
        cons=(
            "Nothing for images.",
            "A moving camera makes every token new.",
            "Encoding still runs in full, which limits the gain where the encoder is the bottleneck.",
        ),
        official="part of serving engines, which also compute the positions of what stays anew.",
    )
    site = Site.EMBED
    budget_names = (*PromptReducer.budget_names, "q")

    q: float | None = None
    positions: str = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        q = self.q
        number = isinstance(q, (int, float)) and not isinstance(q, bool)
        if q is not None and (not number or not 0 <= q < 1):
            raise ParameterError(f"{self.name}: q must be in [0, 1), got {q!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.FRAMES)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.q is None else (None, 1.0 - self.q)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        # The first frame stays.
        most = n - n // where.frames if where.frames else n
        if self.q is None:
            return min(super().removed(n, budget, where, prefix), most)
        return min(n - max(int(n * (1.0 - self.q)), 1), most)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        frames, *_ = grids.frame_grid(state.items, signals.FRAMES, None)
        each = state.items // frames
        left = max(state.items - self.amount(budget, state), each)
        if left == state.items:
            return None
        rows = matching.unit(signals.HIDDEN[:, state.prefix :])
        change = 1 - (rows[:, each:] * rows[:, :-each]).sum(dim=-1)
        first = change.new_full((state.batch, each), torch.inf)
        return keep_top(torch.cat((first, change), dim=1), left, state)
