"""EViT and TopK: keep the tokens that the class token attends to, and fuse the rest or drop it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.ops.ordering import stable_order

__all__ = ["EViT", "TopK"]


def class_attention(signals: Signals, state: TokenState, name: str) -> Tensor:
    """(B, H, N - P) attention of the class token (index 0) to the non-prefix tokens.

    Raises:
        IncompatibleError: The sequence has no prefix token.
    """
    if state.prefix == 0:
        raise IncompatibleError(f"{name} ranks tokens by the class token's attention; this sequence has no prefix.")
    return signals.ATTN_PREFIX[:, :, 0, state.prefix :]


def rates(name: str, field: str, value: Any) -> Any:
    """A share kept, or a list or `{layer: share}` of them, as floats.

    Raises:
        ParameterError: An entry is no number in (0, 1].
    """
    if isinstance(value, Mapping):
        return {layer: rates(name, field, rate) for layer, rate in value.items()}
    if isinstance(value, (list, tuple)):
        return [rates(name, field, rate) for rate in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ParameterError(f"{name}: {field} must be in (0, 1], or a list or dict of such shares, got {value!r}.")
    # Official lists spell "all" as the int 1, which as a `keep` would mean one token.
    return float(value)


@dataclass(frozen=True)
class _ClassRank(Reducer):
    """What both methods share: tokens ranked by the class token's mean attention, and the official budgets."""

    spread = "ratio"
    budget_names = (*Reducer.budget_names, "keep_rate", "left_tokens")

    keep_rate: Any = None
    left_tokens: Any = None
    sort: bool = False

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX,)

    @property
    def _fuses(self) -> bool:
        return False

    def spec(self) -> tuple[Any, Any]:
        if self.keep_rate is not None:
            return None, rates(self.name, "keep_rate", self.keep_rate)
        return self.r, self.keep if self.left_tokens is None else self.left_tokens

    def layers(self, depth: int) -> Sequence[int]:
        return quarters(depth)

    def limit(self, n: int) -> int:
        return max(n - 1 - self._fuses, 0)

    def left(self, n: int, budget: Budget) -> int:
        """L, tokens that stay themselves under an official budget; the fused token is not among them."""
        if budget.ratio is not None:
            return max(math.ceil(budget.ratio * n), 1)
        return n if budget.count is None else min(budget.count, n)

    @property
    def _official(self) -> bool:
        return self.keep_rate is not None or self.left_tokens is not None

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        # A plain r, as gflops and tokens give too, means the same in both.
        if not self._official or (budget.ratio is None and budget.count is None):
            return super().removed(n, budget, where, prefix)
        left = self.left(n, budget)
        return n - left - self._fuses if left < n else 0

    def ranked(self, signals: Signals, state: TokenState) -> tuple[Tensor, Tensor]:
        """(B, n) mean attention of the class token and (B, n) int64 its decreasing order, non-prefix tokens only."""
        score = class_attention(signals, state, self.name).mean(dim=1)
        return score, stable_order(score.detach(), descending=True)

    def _kept(self, order: Tensor, left: int) -> Tensor:
        return order[:, :left].sort(dim=-1).values if self.sort else order[:, :left]


@dataclass(frozen=True)
class TopK(_ClassRank):
    """Top-K by class attention (arXiv:2308.04657): EViT without the fused token.

    Args:
        keep_rate: Share kept (rounded up) at blocks 3, 6, 9 of 12, or a list per block, or `{block: share}`.
        left_tokens: Tokens kept instead (the official argument `tokens`): int, list or dict.
        sort: Whether kept tokens stay in sequence order. Official: False, by decreasing attention.
    """

    name = "topk"
    card = Card(
        title="Top-K by class attention",
        summary="Keeps the tokens that the class token attends to most, drops all others.",
        paper="Haurum et al., Which Tokens to Use? Investigating Token Reduction in Vision Transformers, ICCVW 2023",
        url="https://arxiv.org/abs/2308.04657",
        year=2023,
        license="MIT",
        cons=(
            "Dropped tokens are lost for good; dense heads need restore.",
            "Needs a class token.",
            "Off the shelf it loses more accuracy than merging; the papers fine-tune.",
        ),
        official="protects index 0 only and reorders tokens by score; here every prefix token stays.",
    )

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        _, order = self.ranked(signals, state)
        return TokenMap.keep(self._kept(order, state.items - r) + state.prefix, state.n, state.prefix)


@dataclass(frozen=True)
class EViT(_ClassRank):
    """Expediting Vision Transformers via token reorganisation (arXiv:2202.07800).

    Between attention and MLP the L tokens with the largest mean class attention stay; the sum of the others, each
    times its attention and not divided, becomes one more token behind them. It counts as an ordinary token later.

    With `keep_rate` or `left_tokens`, L is the kept tokens and the fused one comes on top, as in the released code.
    With r, keep, tokens or gflops, the fused token is part of the budget: keep=5 leaves 4 tokens and the fused one.

    The fused slot's size is the number of original tokens in it, which weighs it in size-weighted pools; its value is
    no mean, though, so pools over patches see a small vector.

    Args:
        keep_rate: Share kept (rounded up) at blocks 3, 6, 9 of 12, or a list per block, or `{block: share}`.
        left_tokens: Tokens kept instead (the official argument `tokens`): int, list or dict.
        sort: Whether kept tokens stay in sequence order. Official: False, by decreasing attention.
        fuse_token: Whether the others are fused; False is `topk`.
    """

    name = "evit"
    card = Card(
        title="EViT, token reorganisation",
        summary="Keeps the tokens that the class token attends to most and fuses all others into one.",
        paper="Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token "
        "Reorganizations, ICLR 2022",
        url="https://arxiv.org/abs/2202.07800",
        year=2022,
        license="Apache-2.0",
        cons=(
            "Three strong steps; off the shelf it loses more accuracy than merging, the paper trains or fine-tunes.",
            "The fused token is an unnormalised sum, a small vector that later layers must have learnt to read.",
            "Needs a class token.",
        ),
        official="treats a distillation token as a patch and reduces only blocks built with keep_rate < 1; here every "
        "prefix token stays.",
    )

    fuse_token: bool = True

    @property
    def _fuses(self) -> bool:
        return self.fuse_token

    @property
    def always(self) -> bool:  # type: ignore[override]
        # With one token left over, fusing rescales that token and removes none.
        return self.fuse_token and self._official

    def _rescales(self, state: TokenState) -> bool:
        own = self.budgets(max(state.depth, state.layer + 1)).get(state.layer, Budget())
        return self.left(state.items, own) == state.items - 1 if self.always else False

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r, n = self.amount(budget, state), state.items
        if r == 0 and not self._rescales(state):
            return None
        score, order = self.ranked(signals, state)
        if not self.fuse_token:
            return TokenMap.keep(self._kept(order, n - r) + state.prefix, state.n, state.prefix)
        left = n - r - 1
        kept, fused = self._kept(order, left), order[:, left:]
        # Tokens that stay keep their value; weights carry the gradient to the attention, as in the released code.
        weight = torch.cat((score.new_ones(score.shape[0], state.prefix), score.scatter(1, kept, 1.0)), dim=1)
        order = torch.cat((kept, fused[:, :1]), dim=1) + state.prefix
        into = fused[:, :1].expand(-1, fused.shape[1] - 1) + state.prefix
        return TokenMap.merge(fused[:, 1:] + state.prefix, into, order, state.prefix, weight=weight, mode="sum")
