"""Token-level correlation-guided compression: crops keep tokens in proportion to what they do not repeat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import Crops, PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.anyres import valid_area
from visiontok.ops.hashing import rank_keys
from visiontok.ops.ordering import stable_order
from visiontok.ops.scoring import outliers

__all__ = ["TokenCorr"]


def _valid(crops: Crops, device: torch.device) -> Tensor:
    # (crops, n) bool: cells that do not only pad the image.
    height, width = crops.rows * crops.side[0], crops.columns * crops.side[1]
    top, bottom, left, right = valid_area(crops.image_size, (height, width))
    canvas = torch.zeros(height, width, dtype=torch.bool, device=device)
    canvas[top:bottom, left:right] = True
    parts = canvas.view(crops.rows, crops.side[0], crops.columns, crops.side[1]).transpose(1, 2)
    return parts.reshape(crops.number, crops.side[0] * crops.side[1])


@dataclass(frozen=True)
class TokenCorr(PromptReducer):
    """Token-level Correlation-guided Compression (arXiv:2407.14439). Experimental: no code of the authors exists.

    A patch is redundant if at least `min_repeats` others have a low-layer key with cosine above `tau`. Each crop keeps
    as many patches as are not redundant, those that the class token of the low layer attends to most (local), and the
    outliers (above the upper quartile by 1.5 interquartile ranges) of its attention in the deep layer (global). The
    thumbnail of an image with crops stays whole; an image without crops is treated like one crop.

    Args:
        tau, min_repeats: When a patch is redundant; unknown in the paper.
        low_layer, deep_layer: Layers of the tower, from the end if negative, clamped to those that exist; unknown too.
        aggregate: `none`, or `nearest_mean`: a dropped token joins the mean of the kept one with the nearest low key.
        sampling: Local tokens: `topk`, or `sample` without replacement, with the attention as odds, by a hash.
        seed: Of the hash.
        max_tokens: Most tokens kept per crop, global ones first.
        r, keep, tokens: Exact number instead, over the thumbnail and all crops of an image: all of the thumbnail, the
            best local token of each crop, then global tokens, then local ones.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: A value outside its range.
    """

    name = "token_corr"
    card = Card(
        title="Token-level correlation-guided compression (experimental)",
        summary="Keeps as many tokens of each crop as do not repeat others, chosen by low- and deep-layer attention.",
        paper="Zhang et al., Token-level Correlation-guided Compression for Efficient Multimodal Document "
        "Understanding, 2024",
        url="https://arxiv.org/abs/2407.14439",
        year=2024,
        license="unknown",
        cons=(
            "Our reading of a figure and an abstract: thresholds, layers and aggregation are guesses.",
            "Without a budget the saving depends on the data.",
            "Made for documents with large empty areas; needs a class token.",
        ),
        official="no public code; the paper samples local tokens at random.",
    )
    ragged = True
    scope = "image"

    tau: float = 0.8
    min_repeats: int = 3
    low_layer: int = 2
    deep_layer: int = -2
    aggregate: str = "none"
    sampling: str = "topk"
    seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for field, low in (("min_repeats", 1), ("max_tokens", 1)):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ParameterError(f"{self.name}: {field} must be an int >= {low}, got {value!r}.")
        for field, known in (("aggregate", ("none", "nearest_mean")), ("sampling", ("topk", "sample"))):
            if getattr(self, field) not in known:
                said = " or ".join(map(repr, known))
                raise ParameterError(f"{self.name}: {field} must be {said}, got {getattr(self, field)!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.QUERY_PREFIX, Signal.KEY, Signal.CROPS)

    @property
    def always(self) -> bool:  # type: ignore[override]
        return all(getattr(self, name) is None for name in self.budget_names)

    def layers_of(self, depth: int) -> tuple[int, int]:
        """The low and the deep layer of a tower of that depth."""
        low, deep = (i + depth if i < 0 else i for i in (self.low_layer, self.deep_layer))
        return min(max(low, 0), depth - 1), min(max(deep, 0), depth - 1)

    def taps(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted(set(self.layers_of(depth))))

    def similarity(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n, n) cosines of the low-layer keys, heads concatenated."""
        key = signals.KEY[:, self.taps(state.depth).index(self.layers_of(state.depth)[0]), :, state.prefix :]
        rows = matching.unit(key.transpose(1, 2).flatten(2))
        return rows @ rows.mT

    def attention(self, signals: Signals, state: TokenState, layer: int, live: Tensor) -> Tensor:
        """(R, n) softmax of the class token's query over the live patches' keys, heads concatenated."""
        at = self.taps(state.depth).index(layer)
        query, key = signals.QUERY_PREFIX[:, at], signals.KEY[:, at, :, state.prefix :]
        # QUERY_PREFIX holds the scale of one head; concatenated heads are H times as wide.
        logits = (query @ key.mT).sum(dim=(1, 2)) * query.shape[1] ** -0.5
        return logits.masked_fill(~live, -torch.inf).softmax(dim=-1)

    def repeats(self, cosine: Tensor, live: Tensor) -> Tensor:
        """(R, n) int64 how many other live patches each one resembles."""
        near = (cosine > self.tau) & live.unsqueeze(1)
        return near.sum(dim=2) - near.diagonal(dim1=1, dim2=2).long()

    def chosen(
        self, signals: Signals, state: TokenState, cosine: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Local and global tokens, each (R, n) bool, and (R, n) int64 priority among all tokens, 0 the best."""
        low, deep = (self.attention(signals, state, layer, live) for layer in self.layers_of(state.depth))
        if self.sampling == "sample":
            noise = (rank_keys(state.items, seed=self.seed, layer=state.layer, device=live.device) + 0.5) / 2**31
            low = torch.where(live, low.log() - (-noise.to(low.dtype).log()).log(), -torch.inf)
        by_low, by_deep = (stable_order(stable_order(p.masked_fill(~live, -torch.inf), descending=True))
                           for p in (low, deep))  # fmt: skip
        count = ((self.repeats(cosine, live) < self.min_repeats) & live).sum(dim=1, keepdim=True).clamp_min(1)
        local, wide = (by_low < count) & live, outliers(deep, live)
        priority = torch.where(wide, by_deep, state.items + by_low)
        return local, wide, torch.where(by_low == 0, -1, priority).masked_fill(~live, 2 * state.items)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        crops, n = signals.CROPS, state.items
        live = torch.ones(state.batch, n, dtype=torch.bool, device=state.device)
        if crops.number:
            live[1:] = _valid(crops, state.device)
        left = self._left(budget, state, crops)
        if left is None and not self.always:
            return None
        cosine = self.similarity(signals, state)
        local, wide, priority = self.chosen(signals, state, cosine, live)
        cap = n if self.max_tokens is None else min(self.max_tokens, n)
        kept = (local | wide) & (stable_order(stable_order(priority)) < cap)
        if crops.number:
            kept[0], cap = True, n
        if left is not None:
            first = 1 if crops.number else 0
            rank = stable_order(stable_order(priority[first:].flatten())).view(-1, n)
            kept[first:] = live[first:] & (rank < left - first * n)
            cap = n if crops.number else left
        return self._map(kept, cosine, live, cap, state.prefix)

    def _map(self, kept: Tensor, cosine: Tensor, live: Tensor, cap: int, prefix: int) -> TokenMap:
        counts = kept.sum(dim=1)
        index = stable_order(kept.to(torch.int8), descending=True)[:, :cap]
        slots = torch.arange(cap, device=kept.device)
        assign = torch.full(kept.shape, -1, dtype=torch.int64, device=kept.device)
        assign = assign.scatter(1, index, torch.where(slots < counts.unsqueeze(1), slots, -1))
        if self.aggregate == "nearest_mean":
            near = cosine.masked_fill(~kept.unsqueeze(1), -torch.inf).argmax(dim=2)
            assign = torch.where(kept | ~live, assign, assign.gather(1, near))
        form = "any" if self.aggregate == "nearest_mean" else "select"
        return TokenMap(F.pad(assign, (prefix, 0), value=-1), cap, anchor=index + prefix, counts=counts, form=form)

    def _left(self, budget: int | None, state: TokenState, crops: Crops) -> int | None:
        # Padding counts as tokens in the budget, which is of the whole rows; None without a budget.
        total, whole = state.batch * state.items, state.items if crops.number else 0
        if budget is None:
            (own,) = self.budgets(state.depth).values()
            budget = self.removed(total, own, Where(state.depth, state.depth, start=total), state.prefix)
        elif budget < 0:
            raise ParameterError(f"{self.name}: budget must be at least 0 (tokens to remove), got {budget!r}.")
        # One token of each crop stays, and the whole thumbnail.
        return max(total - budget, whole + max(crops.number, 1)) if budget else None
