"""Staged: methods that act between a few stages and count from the tokens that the model starts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Site
from visiontok.errors import ParameterError

__all__ = ["Staged", "check_share"]


def check_share(name: str, field: str, value: Any) -> None:
    """Raises ParameterError unless a share of tokens kept is None or in (0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= 1):
        raise ParameterError(f"{name}: {field} must be in (0, 1] (share of tokens kept), got {value!r}.")


@dataclass(frozen=True)
class Staged(Reducer):
    """Base of methods whose stage i keeps `int(N0 * share**i)` of the N0 tokens that the model starts with."""

    site: ClassVar[Site] = Site.PRE
    spread: ClassVar[str] = "ratio"

    @property
    def share(self) -> float | None:
        """Share that each stage keeps of the one before, or None where another budget was given."""
        return None

    def spec(self) -> tuple[Any, Any]:
        return self.r, self.keep if self.share is None else self.share

    def layers(self, depth: int) -> Sequence[int]:
        return tuple(layer for layer in quarters(depth) if layer > 0)

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.share is None:
            return super().budgets(depth)
        return {layer: Budget(ratio=self.share**i) for i, layer in enumerate(self.layers(depth), start=1)}

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.share is None or budget.ratio is None:
            return super().removed(n, budget, where, prefix)
        # Of the tokens that the model starts with: rounding stage by stage would give other counts.
        return max(n - max(int((where.start or n) * budget.ratio), 1), 0)
