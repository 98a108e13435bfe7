"""DART: keep a few pivots and the visual tokens that repeat them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget, even
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import DecoderReducer, Text
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["DART"]


@dataclass(frozen=True)
class DART(DecoderReducer):
    """DART, duplication-aware reduction of tokens (arXiv:2502.11494).

    Pivots are the visual tokens with the largest keys (L1 norm over all heads, layer k - 1) and the text tokens with
    the largest hidden states. Each pivot in turn keeps its share of the visual tokens that are left and least similar
    to it (cosine of hidden states). Visual pivots stay too; text only judges.

    Args:
        k: Decoder layer, counted from 0, before which tokens leave; at least 1.
        reduction_ratio: Official share that leaves: `pivot_image_token` plus n * (1 - ratio), rounded down to a
            multiple of all pivots, stay. Default: 0.778 where no other budget is given.
        pivot_image_token: Visual pivots, at least 1.
        pivot_text_token: Text pivots; where a sample has fewer text tokens, its first visual pivot acts for them.

    Raises:
        ParameterError: k or pivot_image_token below 1, negative pivot_text_token, or a ratio outside [0, 1).
    """

    name = "dart"
    card = Card(
        title="DART, duplication-aware reduction",
        summary="Keeps a few pivot tokens and those least similar to them, inside the language model.",
        paper="Wen et al., Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, "
        "EMNLP 2025",
        url="https://arxiv.org/abs/2502.11494",
        year=2025,
        license="not known here",
        cons=(
            "Depends on few pivots; text pivots are taken by their hidden states, for keys of text are not probed.",
            "Layers before k see every token.",
        ),
        official="was not read: written after the description in the survey and a port in LightCompress, which norms "
        "hidden states by the final norm first and takes text pivots by their keys. No golden files exist.",
    )
    budget_names = (*Reducer.budget_names, "reduction_ratio")

    k: int = 2
    reduction_ratio: float | None = None
    pivot_image_token: int = 4
    pivot_text_token: int = 4

    def __post_init__(self) -> None:
        for name, low in (("k", 1), ("pivot_image_token", 1), ("pivot_text_token", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ParameterError(f"dart: {name} must be an int >= {low}, got {value!r}.")
        ratio = self.reduction_ratio
        if ratio is not None and not (type(ratio) in (int, float) and 0 <= ratio < 1):
            raise ParameterError(f"dart: reduction_ratio must be in [0, 1) (share of tokens dropped), got {ratio!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.KEY, *((Signal.TEXT,) if self.pivot_text_token else ()))

    @property
    def share(self) -> float | None:
        """Share dropped, or None where another budget was given."""
        if self.reduction_ratio is not None:
            return float(self.reduction_ratio)
        given = any(getattr(self, name) is not None for name in Reducer.budget_names)
        return None if given else 0.778

    @property
    def pivots(self) -> int:
        """Pivots of both kinds."""
        return self.pivot_image_token + self.pivot_text_token

    def layers(self, depth: int) -> Sequence[int]:
        return (self.k,)

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.share is None:
            return super().budgets(depth)
        return {self.k: Budget(ratio=1 - self.share)}

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.share is None or budget.ratio is None:
            return super().removed(n, budget, where, prefix)
        each = int(n * (1 - self.share) // self.pivots)
        return max(n - self.pivot_image_token - each * self.pivots, 0)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed, n = self.amount(budget, state), state.items
        if removed == 0:
            return None
        left = n - removed
        size = signals.KEY.abs().sum(dim=(1, 3))
        chosen = stable_order(size, descending=True)[:, : min(self.pivot_image_token, left)]
        rows = matching.unit(signals.HIDDEN)
        pivots = rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        if self.pivot_text_token:
            pivots = torch.cat((pivots, self._judges(signals.TEXT, pivots)), dim=1)
        # Higher is less similar; what is kept already is out of reach.
        unlike = -(pivots @ rows.transpose(1, 2))
        kept = torch.zeros_like(size, dtype=torch.bool).scatter(1, chosen, True)
        for j, share in enumerate(even(left - chosen.shape[1], pivots.shape[1])):
            order = stable_order(unlike[:, j].masked_fill(kept, -torch.inf), descending=True)
            kept = kept.scatter(1, order[:, :share], True)
        return TokenMap.keep(stable_order((~kept).int())[:, :left], n)

    def _judges(self, text: Text, pivots: Tensor) -> Tensor:
        """(R, pivot_text_token, C) unit rows of the text pivots."""
        tokens, live = text.tokens.to(pivots.dtype), text.live
        size = tokens.abs().sum(dim=-1).masked_fill(~live, -1)
        best = stable_order(size, descending=True)[:, : self.pivot_text_token]
        found = matching.unit(tokens.gather(1, best.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])))
        found = torch.where(live.gather(1, best).unsqueeze(-1), found, pivots[:, :1])
        missing = self.pivot_text_token - best.shape[1]
        return torch.cat((found, pivots[:, :1].expand(-1, missing, -1)), dim=1)
