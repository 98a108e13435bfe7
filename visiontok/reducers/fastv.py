"""FastV: inside the language model, keep the visual tokens that the last token attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import DecoderReducer, keep_top
from visiontok.errors import ParameterError

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(DecoderReducer):
    """FastV (arXiv:2403.06764): from decoder layer k on, the visual tokens with the most attention of the last token.

    Attention is that of layer k - 1, averaged over heads. Kept tokens stay in order and, by default, at their places.

    Args:
        k: Decoder layer, counted from 0, before which tokens leave; at least 1.
        ratio: Share of the visual tokens that leaves (the official r), in [0, 1]: `round(n * (1 - ratio))` stay, halves
            to even. Default: 0.5 where no other budget is given. 1 leaves the text alone.

    Raises:
        ParameterError: k below 1, or ratio outside [0, 1].
    """

    name = "fastv"
    card = Card(
        title="FastV",
        summary="Drops, after a few decoder layers, the visual tokens that the last prompt token attends to least.",
        paper="Chen et al., An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models, ECCV 2024",
        url="https://arxiv.org/abs/2403.06764",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Layers before k see every token, so the saving is bounded by them.",
            "Attention of the last token favours visual tokens near the text.",
            "Decoding is hardly faster: the gain is prefill and cache memory.",
        ),
        official="is a fork of transformers for batch 1 with fixed places of the image; its version without a cache "
        "prunes anew at every step, here tokens leave once, as in its version with a cache.",
    )
    budget_names = (*Reducer.budget_names, "ratio")

    k: int = 2
    ratio: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ParameterError(f"fastv: k must be an int >= 1 (a decoder layer), got {self.k!r}.")
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if self.ratio is not None and not (number and 0 <= self.ratio <= 1):
            raise ParameterError(f"fastv: ratio must be in [0, 1] (share of tokens dropped), got {self.ratio!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_LAST,)

    @property
    def share(self) -> float | None:
        """Share dropped, or None where another budget was given."""
        if self.ratio is not None:
            return float(self.ratio)
        given = any(getattr(self, name) is not None for name in Reducer.budget_names)
        return None if given else 0.5

    def limit(self, n: int) -> int:
        return n if self.share == 1 else max(n - 1, 0)

    def layers(self, depth: int) -> Sequence[int]:
        return (self.k,)

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.share is None:
            return super().budgets(depth)
        return {self.k: Budget(ratio=1 - self.share)}

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.share is None or budget.ratio is None:
            return super().removed(n, budget, where, prefix)
        return n - int(round(n * (1 - self.share)))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        return keep_top(signals.ATTN_LAST.mean(dim=1), state.items - removed, state)
