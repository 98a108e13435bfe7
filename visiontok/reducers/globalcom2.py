"""GlobalCom2: the thumbnail of a cut image says how many tokens each crop keeps, and helps to choose them."""

from __future__ import annotations

import dataclasses
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
from visiontok.ops.anyres import valid_area
from visiontok.ops.cropping import apportion, thumbnail_on_crops, valid_cells
from visiontok.ops.ordering import stable_order

__all__ = ["GlobalCom2", "keep_counts", "kept_of_image", "layout"]

Layout = tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]


def layout(crops: Crops, exact: bool = True) -> Layout:
    """The image on the canvas (top, bottom, left, right), the canvas (h, w) in tokens, and the crops (down, across).

    Args:
        crops: How the image was cut.
        exact: See `valid_area`.
    """
    canvas = (crops.rows * crops.side[0], crops.columns * crops.side[1])
    return valid_area(crops.image_size, canvas, exact), canvas, (crops.rows, crops.columns)


def keep_counts(score: Tensor, counts: Tensor, most: int, state: TokenState) -> TokenMap:
    """Keeps the `counts` best tokens of each row in raster order and drops the prefix.

    Args:
        score: (R, n) of the non-prefix tokens, -inf for those that must go.
        counts: (R,) int64.
        most: No count is larger.
        state: Of the rows.
    """
    rank = stable_order(stable_order(score, descending=True))
    # Kept tokens first, each group in raster order.
    order = stable_order((rank >= counts.unsqueeze(1)).int())[:, :most]
    return TokenMap.keep(order + state.prefix, state.n, counts=counts)


def kept_of_image(reducer: PromptReducer, budget: int | None, n: int, state: TokenState) -> int:
    """Tokens to keep out of the n of all rows of an image; see `Reducer.amount`."""
    if budget is None:
        budget = reducer.budgets(state.depth)[state.depth].removed(n)
    elif budget < 0:
        raise ParameterError(f"{reducer.name}: budget must be at least 0 (tokens to remove), got {budget!r}.")
    return n - max(min(budget, reducer.limit(n)), 0)


@dataclass(frozen=True)
class GlobalCom2(PromptReducer):
    """GlobalCom2 (arXiv:2501.05179), for images that are cut into a thumbnail and crops.

    A token's score is the class token's logit (before the softmax, mean over heads) in the tower's last layer. The
    thumbnail keeps its share of the best tokens. A crop keeps a larger share the larger the sum of scores of its region
    of the thumbnail, by a softmax over crops; which tokens it keeps is decided by its own scores and those of the
    thumbnail there, each scaled to length one.

    By default the kept tokens are exactly as many as the budget says, stay where they stand in the image, and none is
    padding. Images that are not cut keep the best of their tokens.

    Args:
        retention_ratio: Share of tokens kept. Default 0.25 if no other budget is given.
        temperature: Of the softmax over crops; smaller is more uneven.
        compat: `"official"`: the thumbnail's tokens in order of falling score, counts cut off to whole numbers per
            crop, a crop's tokens placed by their index in the list of its unpadded tokens, and newlines for padding
            rows too.

    Raises:
        ParameterError: `retention_ratio` outside (0, 1], or `temperature` not positive.
    """

    name = "globalcom2"
    scope = "image"
    ragged = True
    budget_names = (*PromptReducer.budget_names, "retention_ratio")
    card = Card(
        title="GlobalCom2, global compression commander",
        summary="Shares tokens among an image's crops by what its thumbnail finds important, and picks them by both.",
        paper="Liu et al., Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution "
        "Large Vision-Language Models, AAAI 2026",
        url="https://arxiv.org/abs/2501.05179",
        year=2025,
        license="not stated (built on LLaVA, Apache-2.0)",
        cons=(
            "Does not read the question.",
            "Region sums of many logits make the softmax nearly one-hot: one crop gets most of what is shared.",
            "Newlines are not pruned; at 10 % they are a sixth of the tokens on top.",
        ),
        official="places a crop's tokens by the wrong index, orders the thumbnail by score, casts features to float16 "
        "and is wrong for several images; here the cast is left out always, the rest under compat='official'.",
    )

    retention_ratio: float | None = None
    temperature: float = 10.0

    def __post_init__(self) -> None:
        share, heat = self.retention_ratio, self.temperature
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise ParameterError(f"{self.name}: retention_ratio must be in (0, 1], got {share!r}.")
        if isinstance(heat, bool) or not isinstance(heat, (int, float)) or not heat > 0:
            raise ParameterError(f"{self.name}: temperature must be > 0, got {heat!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.QUERY_PREFIX, Signal.KEY, Signal.CROPS

    @property
    def padded(self) -> bool:
        return self.compat == "official"

    def spec(self) -> tuple[Any, Any]:
        if any(getattr(self, name) is not None for name in PromptReducer.budget_names):
            return self.r, self.keep
        return None, float(0.25 if self.retention_ratio is None else self.retention_ratio)

    def taps(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def scores(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n) logits of the class token, mean over heads."""
        logits = (signals.QUERY_PREFIX[:, 0] @ signals.KEY[:, 0].mT).mean(dim=1)
        return logits[:, 0, state.prefix :]

    def scales(self, score: Tensor, crops: Crops, share: float) -> Tensor:
        """(crops,) fp64 share of each crop.

        Args:
            score: (n,) of the thumbnail.
            crops: How the image was cut.
            share: What a crop of average importance keeps.
        """
        (rows, columns), (height, width) = (crops.rows, crops.columns), crops.side
        down = torch.arange(height, device=score.device).div(height // rows, rounding_mode="floor").clamp_max(rows - 1)
        across = torch.arange(width, device=score.device).div(width // columns, rounding_mode="floor")
        region = (down.unsqueeze(1) * columns + across.clamp_max(columns - 1)).flatten()
        total = score.new_zeros(rows * columns, dtype=torch.float64).index_add(0, region, score.double())
        power = ((total - total.amax()) / self.temperature).exp()
        soft = power / (power.sum() + 1e-8)
        return (share * (1 + soft - soft.mean())).clamp_max(1)

    def combined(self, score: Tensor, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """(crops, n) scores inside the crops, the thumbnail's part before scaling, and bool, what is no padding.

        Args:
            score: (1 + crops, n).
            crops: How the image was cut.
        """
        place = layout(crops, exact=not self.padded)
        valid = valid_cells(*place, device=score.device)
        outer = thumbnail_on_crops(score[0].view(crops.side), *place)
        own = score[1:].masked_fill(~valid, 0)
        return _unit(own) + _unit(outer), outer, valid

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        crops, score, n = signals.CROPS, self.scores(signals, state), state.items
        left = kept_of_image(self, budget, state.batch * n, state)
        if crops.number == 0:
            return self._uncut(score, left, state)
        inside, _, valid = self.combined(score, crops)
        inside = torch.cat((score[:1], inside.masked_fill(~valid, -torch.inf)))
        if self.padded:
            return self._official(inside, valid, self._share(left, state.batch * n), crops, state)
        (top, bottom, west, east), *_ = layout(crops)
        cells = (bottom - top) * (east - west)
        left = min(left, n + cells)
        # The thumbnail gets its share of the budget, and what the crops cannot hold.
        first = max(left * n // (n + cells), left - cells)
        weight = self.scales(score[0], crops, left / (n + cells)) * valid.sum(dim=1)
        counts = torch.cat((valid.new_full((1,), first, dtype=torch.int64), apportion(weight, valid, left - first)))
        return keep_counts(inside, counts, min(left, n), state)

    def _share(self, left: int, n: int) -> float:
        keep = self.spec()[1]
        return keep if isinstance(keep, float) else left / n

    def _uncut(self, score: Tensor, left: int, state: TokenState) -> TokenMap:
        if not self.padded:
            return keep_top(score, left, state)
        count = max(int(score.shape[1] * self._share(left, score.shape[1])), 1)
        return TokenMap.keep(stable_order(score, descending=True)[:, :count] + state.prefix, state.n)

    def _official(self, inside: Tensor, valid: Tensor, share: float, crops: Crops, state: TokenState) -> TokenMap:
        n = state.items
        order = stable_order(inside, descending=True)
        scales = self.scales(inside[0], crops, share)
        counts = torch.cat((valid.new_full((1,), int(n * share), dtype=torch.int64), (valid.sum(1) * scales).long()))
        listed = torch.cat((torch.arange(n, device=valid.device).unsqueeze(0), valid.cumsum(dim=1) - 1))
        tm = TokenMap.keep(order + state.prefix, state.n, counts=counts)
        return dataclasses.replace(tm, anchor=listed.gather(1, order).clamp_min(0) + state.prefix, form="any")


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
