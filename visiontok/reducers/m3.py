"""M3: average pooling of the projected tokens on their grid, in the scales of Matryoshka multimodal models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import grids

__all__ = ["M3"]


@dataclass(frozen=True)
class M3(PromptReducer):
    """Matryoshka Multimodal Models (arXiv:2405.17430): the token grid of every crop or frame is average-pooled.

    Windows are squares of side `int(sqrt(h * w / scale))` that do not overlap; rows and columns that fill no window are
    dropped, so the number of tokens equals `scale` only where h * w / scale is a square. Crops are pooled before they
    are laid out, so newlines follow the pooled rows.

    Args:
        scale: Official `matryoshka_vis_token_scale`: tokens per crop or frame; released models know 1, 9, 36, 144 and
            576. Any int >= 1 works; more than there are keep all.
        r, keep, tokens: Pools to the number of windows nearest to the budget, which few numbers meet exactly.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: scale is no int >= 1.
    """

    name = "m3"
    aliases = ("matryoshka",)
    card = Card(
        title="M3, Matryoshka multimodal models",
        summary="Average-pools the projected visual tokens on their grid, at a scale chosen per call.",
        paper="Cai et al., Matryoshka Multimodal Models, ICLR 2025",
        url="https://arxiv.org/abs/2405.17430",
        year=2024,
        license="Apache-2.0",
        training_free=False,
        cons=(
            "Models not trained for it see a plain average-pool baseline.",
            "Only numbers of tokens that square windows give.",
            "Ignores what the image shows and what is asked.",
        ),
        official="needs square grids; rectangles are pooled here with windows of the same side.",
    )
    site = Site.EMBED
    budget_names = (*PromptReducer.budget_names, "scale")
    grid_preserving = True

    scale: int | None = None

    def __post_init__(self) -> None:
        scale = self.scale
        if scale is not None and (not isinstance(scale, int) or isinstance(scale, bool) or scale < 1):
            raise ParameterError(f"{self.name}: scale must be an int >= 1, got {scale!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.GRID, Signal.FRAMES)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.scale is None else (None, self.scale)

    def side(self, grid: tuple[int, int], kept: float) -> int:
        """Side of the windows of one (h, w) frame that should keep about `kept` tokens."""
        if self.scale is None:
            return grids.pool_side(grid, kept)
        return min(max(int(math.sqrt(math.prod(grid) / self.scale)), 1), *grid)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        removed = super().removed(n, budget, where, prefix)
        grid, frames = where.grid or grids.squarest(n), where.frames or 1
        if removed == 0 or n not in (math.prod(grid), math.prod(grid) * frames):
            return removed
        frames, height, width = grids.frame_grid(n, frames, grid)
        side = self.side((height, width), (n - removed) / frames)
        return n - frames * (height // side) * (width // side)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        shape = grids.frame_grid(state.items, signals.FRAMES, signals.GRID)
        frames, *grid = shape
        side = self.side((grid[0], grid[1]), (state.items - removed) / frames)
        if side == 1:
            return None
        slot, count = grids.box_slots(shape, (1, side, side), state.device)
        pooled = (frames * (grid[0] // side), grid[1] // side)
        return TokenMap(slot.expand(state.batch, -1), count, grid=pooled)
