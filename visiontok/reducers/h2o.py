"""H2O: the entries of the KV cache that received most attention so far, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import CacheReducer
from visiontok.errors import ParameterError
from visiontok.ops.receiving import heaviest_and_last

__all__ = ["H2O", "Recent"]


@dataclass(frozen=True)
class Recent(CacheReducer):
    """What methods share that keep the last entries of the cache and the best of the others, head by head."""

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_SUM,)

    @property
    def own(self) -> bool:
        """Whether the method's own default budget counts, because no other one was given."""
        return all(getattr(self, name) is None for name in self.budget_names)

    def parted(self, n: int) -> tuple[int, int]:
        """Heavy and recent entries of n under the method's own budget."""
        raise NotImplementedError

    def window(self, count: int, n: int) -> int:
        """How many of `count` entries kept out of n are the most recent ones."""
        raise NotImplementedError

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n) what the entries outside the window are ranked by."""
        raise NotImplementedError

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if not self.own:
            return super().removed(n, budget, where, prefix)
        return min(n - sum(self.parted(n)), self.limit(n))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        n = state.items
        count = n - self.amount(budget, state)
        if count == n:
            return None
        last = min(self.window(count, n), count)
        return TokenMap.keep(heaviest_and_last(self.score(signals, state), count, last), n)


@dataclass(frozen=True)
class H2O(Recent):
    """Heavy-Hitter Oracle (arXiv:2306.14048), once after prefill and for each key-value head by itself.

    An entry's score is the attention that it received from all queries of the prompt. The best entries stay and,
    whatever their score, the most recent ones.

    Without another budget the two shares below are of the entries that may go: with `over="visual"` of the visual
    tokens (recent means the last ones of the image, usually its bottom rows), with `over="all"` of the prompt as in the
    released code. With r, keep or tokens the kept entries are split in the proportion of the two.

    Args:
        heavy_ratio: Share kept for its score (rounded down).
        recent_ratio: Share kept as the most recent (rounded down).
        over: `visual` or `all`.

    Raises:
        ParameterError: A share is outside [0, 1], or their sum outside (0, 1].
    """

    name = "h2o"
    card = Card(
        title="H2O, heavy-hitter oracle",
        summary="Evicts the cache entries that received least attention during prefill; the most recent ones stay.",
        paper="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, "
        "NeurIPS 2023",
        url="https://arxiv.org/abs/2306.14048",
        year=2023,
        license="no licence in the authors' repository",
        cons=(
            "Made for text: over visual tokens the text stays whole, and the recent window falls on the image's end.",
            "Sums of causal attention favour early tokens, which more queries see.",
            "Saves cache memory; prefill costs more, and decoding hardly gets faster.",
        ),
        official="masks instead of evicting in its accuracy code, at batch 1, and evicts again at every decoded token; "
        "here once after prefill. Shares are of the prompt there.",
    )

    heavy_ratio: float = 0.1
    recent_ratio: float = 0.1

    def __post_init__(self) -> None:
        for field in ("heavy_ratio", "recent_ratio"):
            value: Any = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ParameterError(f"{self.name}: {field} must be in [0, 1], got {value!r}.")
        if not 0 < self.heavy_ratio + self.recent_ratio <= 1:
            raise ParameterError(
                f"{self.name}: heavy_ratio + recent_ratio must be in (0, 1], got {self.heavy_ratio!r} + "
                f"{self.recent_ratio!r}."
            )
        super().__post_init__()

    def parted(self, n: int) -> tuple[int, int]:
        return int(self.heavy_ratio * n), int(self.recent_ratio * n)

    def window(self, count: int, n: int) -> int:
        if self.own:
            return self.parted(n)[1]
        return int(count * self.recent_ratio / (self.heavy_ratio + self.recent_ratio))

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        return signals.ATTN_SUM.sum()
