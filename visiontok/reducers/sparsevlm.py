"""SparseVLM: text tokens that matter rate the visual tokens; some of the dropped ones come back as clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import DecoderReducer, Text
from visiontok.errors import ParameterError
from visiontok.ops import density
from visiontok.ops.ordering import stable_order

__all__ = ["SparseVLM"]

# Tokens that stay themselves at each stage, by the released budgets (averages over layers, for 576 tokens).
_TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_LAYERS, _DEPTH = (2, 6, 15), 32


@dataclass(frozen=True)
class SparseVLM(DecoderReducer):
    """SparseVLM (arXiv:2410.04417): visual tokens ranked by the attention of the text tokens that fit the image.

    Raters are the text tokens whose mean softmax similarity to the visual tokens is above average. Of the tokens
    that leave, the best 30 % are clustered (density peaks) and each tenth of them comes back as a mean, behind the
    tokens that stay. With r, keep, tokens or gflops these means are part of the budget; with `retained_tokens` they
    come on top, as in the released code.

    Args:
        retained_tokens: Released budget: 192, 128, 96 or 64 (an average over the layers of a 7B LLaVA with 576 tokens,
            held by absolute counts per stage). Default: 192 where no other budget is given.
        pruning_loc: Decoder layers, counted from 0, after which tokens leave, by their attention; ascending. Default:
            (2, 6, 15) of 32, at the same depths in other models.
        recycle: Whether clusters of dropped tokens come back.

    Raises:
        ParameterError: An unknown budget, or layers that are not ascending.
    """

    name = "sparsevlm"
    card = Card(
        title="SparseVLM",
        summary="Text tokens that fit the image rate the visual tokens; dropped ones come back as cluster means.",
        paper="Zhang et al., SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, "
        "ICML 2025",
        url="https://arxiv.org/abs/2410.04417",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Needs the attention of all text tokens at three layers, not of one.",
            "The released tables are counts for 576 tokens; give keep for other models.",
            "Cluster means stand behind the image, out of raster order.",
        ),
        official="runs batches of one; chooses raters once, on input embeddings, where here each stage chooses by its "
        "hidden states; breaks ties of the clustering by random noise, here by the lower index; its first version "
        "adapts counts to the rank of the attention, which is left out. No golden files exist.",
    )
    spread = "ratio"
    budget_names = (*Reducer.budget_names, "retained_tokens")

    retained_tokens: int | None = None
    pruning_loc: Any = None
    recycle: bool = True
    positions: str = field(default="compact", kw_only=True)

    def __post_init__(self) -> None:
        if self.retained_tokens is not None and self.retained_tokens not in _TABLES:
            known = ", ".join(map(str, _TABLES))
            raise ParameterError(f"sparsevlm: retained_tokens must be one of {known}, got {self.retained_tokens!r}.")
        loc = self.pruning_loc
        if loc is not None and not (
            isinstance(loc, (list, tuple)) and loc and all(type(at) is int and at >= 0 for at in loc)
            and list(loc) == sorted(set(loc))
        ):  # fmt: skip
            raise ParameterError(f"sparsevlm: pruning_loc must be ascending ints >= 0, got {loc!r}.")
        super().__post_init__()
        if self.table is not None and loc is not None and len(loc) != len(self.table):
            raise ParameterError(
                f"sparsevlm: retained_tokens needs {len(self.table)} layers in pruning_loc, got {loc!r}."
            )

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.HIDDEN, Signal.TEXT, Signal.ATTN_TEXT

    @property
    def table(self) -> tuple[int, ...] | None:
        """Tokens that stay themselves at each stage, or None where another budget was given."""
        if self.retained_tokens is not None:
            return _TABLES[self.retained_tokens]
        given = any(getattr(self, name) is not None for name in Reducer.budget_names)
        return None if given else _TABLES[192]

    def layers(self, depth: int) -> Sequence[int]:
        loc = [round(at * depth / _DEPTH) for at in _LAYERS] if self.pruning_loc is None else self.pruning_loc
        made = sorted({at + 1 for at in loc})
        return tuple(made if self.pruning_loc is not None else [layer for layer in made if layer < depth])

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.table is None:
            return super().budgets(depth)
        layers = self.layers(depth)
        return {layer: Budget(count=count) for layer, count in zip(layers, self.table[-len(layers) :])}

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.table is None or budget.count is None:
            return super().removed(n, budget, where, prefix)
        stay = min(budget.count, n - 1)
        return max(n - stay - self.clusters(n - stay), 0)

    def recycled(self, dropped: int) -> int:
        """Of so many dropped tokens, those that are clustered."""
        return int(dropped * 0.3) + 1 if self.recycle and dropped else 0

    def clusters(self, dropped: int) -> int:
        """Means that come back for so many dropped tokens."""
        return int(self.recycled(dropped) / 10) + 1 if self.recycle and dropped else 0

    def split(self, n: int, left: int) -> tuple[int, int]:
        """(tokens that stay themselves, means) that make `left` of n tokens, fewer than n."""
        # One more token that stays costs at most one mean, so every sum is reached.
        stay = next((t for t in range(left, -1, -1) if t + self.clusters(n - t) <= left), 0)
        return stay, left - stay

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed, n = self.amount(budget, state), state.items
        if removed == 0:
            return None
        x = signals.HIDDEN
        raters = text_raters(x, signals.TEXT).unsqueeze(-1)
        score = (signals.ATTN_TEXT.mean(dim=1) * raters).sum(dim=1)
        order = stable_order(score, descending=True)
        stay, means = self.split(n, n - removed)
        kept = order[:, :stay].sort(dim=1).values
        if means == 0:
            return TokenMap.keep(kept, n)
        # Among the dropped tokens those with the best scores come first.
        back = order[:, stay : stay + self.recycled(n - stay)]
        found = density.peaks(x.gather(1, back.unsqueeze(-1).expand(-1, -1, x.shape[-1])), means, k=means)
        place = torch.arange(stay, device=x.device).expand_as(kept)
        assign = torch.full_like(order, -1).scatter(1, kept, place).scatter(1, back, found.assign + stay)
        anchor = torch.cat((kept, back.gather(1, found.centers)), dim=1)
        return TokenMap(assign, stay + means, weight=torch.ones_like(score), anchor=anchor)


def text_raters(x: Tensor, text: Text) -> Tensor:
    """(R, T) shares, each row summing to one, of the text tokens that fit the visual tokens better than average.

    Args:
        x: (R, n, C) visual tokens.
        text: Of T tokens; rows without any live token get zeros.
    """
    live = text.live
    logits = (x @ text.tokens.to(x.dtype).transpose(1, 2)).masked_fill(~live.unsqueeze(1), torch.finfo(x.dtype).min)
    fit = logits.softmax(dim=-1).mean(dim=1) * live
    count = live.sum(dim=1, keepdim=True)
    chosen = live & (fit > fit.sum(dim=1, keepdim=True) / count.clamp_min(1))
    # Where all fit alike, all of them rate.
    chosen = torch.where(chosen.any(dim=1, keepdim=True), chosen, live).to(x.dtype)
    return chosen / chosen.sum(dim=1, keepdim=True).clamp_min(1)
