"""HiRED: the thumbnail of a cut image shares a fixed budget among the crops; class attention picks the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import Crops, PromptReducer, keep_top
from visiontok.errors import ParameterError
from visiontok.ops.cropping import apportion, region_of, valid_cells
from visiontok.ops.ordering import stable_order
from visiontok.reducers.globalcom2 import keep_counts, kept_of_image, layout

__all__ = ["HiRED"]


@dataclass(frozen=True)
class HiRED(PromptReducer):
    """High-resolution early dropping (arXiv:2408.10945), for images that are cut into a thumbnail and crops.

    A share `alpha` of the budget goes to the thumbnail. The rest is shared among the crops by how many of the
    thumbnail's tokens with most class attention in the tower's first layer, a share of 1 - alpha of them, lie in their
    region. Inside each row the tokens with most class attention in the last but one layer stay. Attention is summed
    over heads. Images that are not cut keep the best of their tokens.

    By default the kept tokens are exactly as many as the budget says and none is padding.

    Args:
        rate: Share of all tokens kept. Default 0.2, as in the released scripts, if no other budget is given.
        alpha: The thumbnail's share of the budget. 0.5 as in the paper and the released scripts; the released model
            class falls back to 1.
        compat: `"official"`: a region is a run of consecutive tokens of the thumbnail instead of a rectangle, counts
            are cut off to whole numbers per crop, and padding counts as image and may be chosen.

    Raises:
        ParameterError: `rate` outside (0, 1] or `alpha` outside [0, 1].
    """

    name = "hired"
    scope = "image"
    ragged = True
    budget_names = (*PromptReducer.budget_names, "rate")
    card = Card(
        title="HiRED, high-resolution early dropping",
        summary="Shares a fixed budget among an image's crops by early class attention, picks tokens by late one.",
        paper="Hasan et al., HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution "
        "Vision-Language Models, AAAI 2025",
        url="https://arxiv.org/abs/2408.10945",
        year=2024,
        license="MIT",
        cons=(
            "Does not read the question.",
            "Early class attention is a weak hint of where content is.",
            "Newlines are not pruned.",
        ),
        official="cuts the thumbnail into runs of tokens although crops are rectangles, loses tokens to rounding and "
        "to padding, and divides by zero for alpha = 1 with a rate above one row's.",
    )

    rate: float | None = None
    alpha: float = 0.5

    def __post_init__(self) -> None:
        rate, alpha = self.rate, self.alpha
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1):
            raise ParameterError(f"{self.name}: rate must be in (0, 1], got {rate!r}.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ParameterError(f"{self.name}: alpha must be in [0, 1], got {alpha!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.ATTN_PREFIX, Signal.CROPS

    def spec(self) -> tuple[Any, Any]:
        if any(getattr(self, name) is not None for name in PromptReducer.budget_names):
            return self.r, self.keep
        return None, float(0.2 if self.rate is None else self.rate)

    def taps(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({0, max(depth - 2, 0)}))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        crops, n = signals.CROPS, state.items
        rows = signals.ATTN_PREFIX[..., 0, state.prefix :].sum(dim=2)
        early, late = rows[:, 0], rows[:, -1]
        left = kept_of_image(self, budget, state.batch * n, state)
        if crops.number == 0:
            return keep_top(late, left, state)
        return (self._official if self.compat == "official" else self._exact)(early[0], late, left, crops, state)

    def _exact(self, early: Tensor, late: Tensor, left: int, crops: Crops, state: TokenState) -> TokenMap:
        place, n = layout(crops), state.items
        valid = valid_cells(*place, device=late.device)
        (top, bottom, west, east), *_ = place
        cells = (bottom - top) * (east - west)
        left = min(left, n + cells)
        first = max(min(int(left * self.alpha), n), left - cells)
        hits = self._hits(early, region_of(crops.side, *place, device=late.device), crops.number)
        counts = torch.cat((valid.new_full((1,), first, dtype=torch.int64), apportion(hits, valid, left - first)))
        score = torch.cat((late[:1], late[1:].masked_fill(~valid, -torch.inf)))
        return keep_counts(score, counts, min(left, n), state)

    def _official(self, early: Tensor, late: Tensor, left: int, crops: Crops, state: TokenState) -> TokenMap:
        n = state.items
        keep = self.spec()[1]
        total = int(state.batch * n * keep) if isinstance(keep, float) else left
        first = min(int(total * self.alpha), n)
        runs = torch.arange(n, device=late.device).div(n // crops.number, rounding_mode="floor")
        hits = self._hits(early, runs.clamp_max(crops.number - 1), crops.number)
        shares = hits / hits.sum().clamp_min(1) * min(total - first, crops.number * n)
        counts = torch.cat((shares.new_full((1,), first), shares)).long().clamp_max(n)
        return keep_counts(late, counts, n, state)

    def _hits(self, early: Tensor, region: Tensor, count: int) -> Tensor:
        best = stable_order(early, descending=True)[: int(early.shape[0] * (1 - self.alpha))]
        return early.new_zeros(count).index_add(0, region[best], torch.ones_like(best, dtype=early.dtype))
