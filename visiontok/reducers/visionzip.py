"""VisionZip: keep what the class token attends to and merge the rest into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer, keep_top
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["VisionZip"]

# The released pairs for 64, 128 and 192 tokens (54+10, 108+20, 162+30) all have this proportion.
_PAIR = (54, 10)
_METRICS = {"key": Signal.KEY, "hidden": Signal.HIDDEN}


@dataclass(frozen=True)
class VisionZip(PromptReducer):
    """VisionZip (arXiv:2412.04467).

    Dominant tokens are the class token and the patches that it attends to most in the last but one layer, in raster
    order. Of the other patches, evenly spaced targets become contextual tokens behind them: each other patch goes to
    the target with the most similar key, and the mean of what a target got is added to it.

    The class token is one of the kept tokens and goes to the language model, unless nothing is removed. Towers without
    one rank patches by the mean attention that they receive, and all kept tokens are patches.

    Args:
        dominant: Dominant tokens with the class token. Default 191 if no other budget is given.
        contextual: Contextual tokens besides. Default 30; with keep, r, tokens or gflops 10 of 64 tokens.
        metric: What patches are compared by: `key` (mean over heads) or `hidden`, for towers that offer no keys.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: A count is out of range, or `contextual` is given with another budget than `dominant`.
    """

    name = "visionzip"
    budget_names = (*PromptReducer.budget_names, "dominant")
    card = Card(
        title="VisionZip",
        summary="Keeps the tokens with most class attention and merges the others into evenly spaced ones by their "
        "keys.",
        paper="Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025",
        url="https://arxiv.org/abs/2412.04467",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Does not read the question.",
            "A contextual token is a sum of two tokens, about twice as long as those that the projector knows.",
            "Targets are chosen by their place in the list only.",
        ),
        official="is written for 24 layers and patches all CLIP attentions of the process; it fails where fewer "
        "patches are left than contextual tokens; on LLaVA-NeXT it drops the newlines.",
    )

    dominant: Any = None
    contextual: int | None = None
    metric: str = "key"

    def __post_init__(self) -> None:
        for field, low in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ParameterError(f"{self.name}: {field} must be an int >= {low}, got {value!r}.")
        if self.contextual is not None and self._budgeted:
            raise ParameterError(f"{self.name}: contextual goes with dominant, got contextual={self.contextual!r}.")
        if self.metric not in _METRICS:
            raise ParameterError(f"{self.name}: metric must be 'key' or 'hidden', got {self.metric!r}.")
        super().__post_init__()

    @property
    def _budgeted(self) -> bool:
        return any(getattr(self, field) is not None for field in PromptReducer.budget_names)

    @property
    def _pair(self) -> tuple[int, int]:
        if self._budgeted:
            return _PAIR
        return self.dominant or 191, 30 if self.contextual is None else self.contextual

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.ATTN_PREFIX, _METRICS[self.metric]

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self._budgeted else (None, sum(self._pair))

    def taps(self, depth: int) -> tuple[int, ...]:
        return (max(depth - 2, 0),)

    def scores(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n) attention to each non-prefix token, summed over heads."""
        return signals.ATTN_PREFIX[:, 0, :, 0, state.prefix :].sum(dim=1)

    def rows(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n, d) unit vectors that non-prefix tokens are compared by."""
        metric = signals.KEY[:, 0].mean(dim=1) if self.metric == "key" else signals.HIDDEN
        return matching.unit(metric[:, state.prefix :])

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        n, lead = state.items, state.prefix
        count = n - self.amount(budget, state)
        score = self.scores(signals, state)
        if count == n:
            return keep_top(score, n, state)
        dominant, contextual = self._pair
        # Rounded half up; a row's only tokens are dominant ones.
        merged = (2 * count * contextual + dominant + contextual) // (2 * (dominant + contextual))
        merged = min(merged, max(count - 1, 0))
        whole = min(lead, count)
        order = stable_order(score, descending=True)
        kept = order[:, : count - merged - whole].sort(dim=1).values
        rest = order[:, count - merged - whole :].sort(dim=1).values
        if merged == 0:
            return TokenMap.keep(self._with_class(kept + lead, whole), state.n)
        step = max(rest.shape[1] // merged, 1)
        place = torch.arange(rest.shape[1], device=rest.device)
        aimed = (place % step == 0) & (place < step * merged)
        targets = rest[:, : step * merged : step]
        # Which places are targets depends on shapes only.
        others = rest[:, stable_order(aimed.int())[: rest.shape[1] - merged]]
        _, into = matching.best_match(self.rows(signals, state), others, targets)
        got = torch.zeros_like(targets).scatter_add(1, into, torch.ones_like(into))
        share = score.new_ones(()) / got.gather(1, into)
        weight = torch.ones_like(score).scatter(1, others, share.to(score.dtype))
        slot = kept.shape[1] + whole
        anchor = torch.cat((self._with_class(kept + lead, whole), targets + lead), dim=1)
        assign = torch.full((state.batch, state.n), -1, dtype=torch.int64, device=rest.device)
        assign = assign.scatter(1, anchor, torch.arange(count, device=rest.device).expand(state.batch, -1))
        assign = assign.scatter(1, others + lead, into + slot)
        weight = torch.cat((weight.new_ones(state.batch, lead), weight), dim=1)
        return TokenMap(assign, count, weight=weight, mode="sum", anchor=anchor)

    @staticmethod
    def _with_class(kept: Tensor, whole: int) -> Tensor:
        lead = torch.arange(whole, device=kept.device).expand(kept.shape[0], -1)
        return torch.cat((lead, kept), dim=1)
