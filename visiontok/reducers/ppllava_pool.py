"""PPLLaVA's pooling: windows of space and time become means weighted by how well each token fits the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer, Text
from visiontok.errors import ParameterError
from visiontok.ops import grids, matching, merging

__all__ = ["PPLLaVAPool", "text_cosine"]


def text_cosine(x: Tensor, text: Text) -> Tensor:
    """(R, n) cosine of tokens x (R, n, D) to the mean of the row's live text tokens; 0 where it has none."""
    live = text.live.unsqueeze(-1)
    mean = (text.tokens * live).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp_min(1)
    return (matching.unit(x) @ matching.unit(mean).mT).squeeze(-1)


@dataclass(frozen=True)
class PPLLaVAPool(PromptReducer):
    """Prompt-guided pooling of PPLLaVA (arXiv:2411.02327), without its trained parts.

    The relevance of a token is the softmax over all tokens of its image or video of its cosine to the text, times
    `logit_scale`. Tokens pool in windows of `kernel` that do not overlap, weighted by the softmax of relevance /
    `temperature` inside the window. Frames, rows and columns that fill no window are dropped.

    Args:
        kernel: (frames, rows, columns) of a window; images have one frame.
        temperature: Of the softmax inside a window; large values give plain means.
        logit_scale: Of the cosine; CLIP's is about 100.
        r, keep, tokens: Instead of rows and columns of `kernel`: square windows whose number is nearest to the budget.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: kernel is no triple of ints >= 1, or temperature or logit_scale is not positive.
    """

    name = "ppllava_pool"
    card = Card(
        title="PPLLaVA's prompt-guided pooling",
        summary="Pools windows of space and time, weighted by how close each token is to the text.",
        paper="Liu et al., PPLLaVA: Varied Video Sequence Understanding With Prompt Guidance, 2024",
        url="https://arxiv.org/abs/2411.02327",
        year=2024,
        license="unknown",
        cons=(
            "The paper measures relevance with CLIP's text tower and trains the projector; here the language model's "
            "own embeddings stand in, which are aligned less well.",
            "Depends on the question, so a prompt's tokens cannot be reused for another one.",
            "Only numbers of tokens that windows give.",
        ),
        official="relevance comes from CLIP's (or SigLIP's) two towers and the projector is trained with the pooling.",
    )
    site = Site.EMBED

    kernel: Any = (2, 3, 3)
    temperature: float = 0.01
    logit_scale: float = 100.0

    def __post_init__(self) -> None:
        kernel = self.kernel
        listed = isinstance(kernel, (tuple, list)) and len(kernel) == 3
        if not listed or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in kernel):
            raise ParameterError(f"{self.name}: kernel must be three ints >= 1, got {kernel!r}.")
        for field in ("temperature", "logit_scale"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0 or math.isinf(value):
                raise ParameterError(f"{self.name}: {field} must be a positive number, got {value!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.TEXT, Signal.GRID, Signal.FRAMES)

    @property
    def always(self) -> bool:  # type: ignore[override]
        return all(getattr(self, name) is None for name in self.budget_names)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        removed = super().removed(n, budget, where, prefix)
        if removed == 0 or not where.frames:
            return removed
        shape = grids.frame_grid(n, where.frames, where.grid)
        windows = shape[0] // min(self.kernel[0], shape[0])
        side = grids.pool_side(shape[1:], (n - removed) / windows)
        return n - windows * (shape[1] // side) * (shape[2] // side)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0 and not self.always:
            return None
        shape = grids.frame_grid(state.items, signals.FRAMES, signals.GRID)
        time, rows, columns = (min(part, whole) for part, whole in zip(self.kernel, shape))
        if removed:
            rows = columns = grids.pool_side(shape[1:], (state.items - removed) / (shape[0] // time))
        slot, count = grids.box_slots(shape, (time, rows, columns), state.device)
        if count == state.items:
            return None
        slot = slot.expand(state.batch, -1)
        relevance = (text_cosine(signals.HIDDEN, signals.TEXT) * self.logit_scale).softmax(dim=-1)
        # A softmax per window: its largest entry is taken off, as exp of 1 / temperature would overflow.
        top = merging.segment_max(relevance.unsqueeze(-1), slot, count).squeeze(-1)
        weight = ((relevance - top.gather(1, slot.clamp_min(0))) / self.temperature).exp()
        grid = (shape[0] // time * (shape[1] // rows), shape[2] // columns)
        return TokenMap(slot, count, weight=weight.masked_fill(slot < 0, 0), grid=grid)
