"""identity: changes nothing. The honest baseline for overhead and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(Reducer):
    """Removes nothing whatever the budget; a patched model stays bit-identical."""

    name = "identity"
    card = Card(
        title="Identity",
        summary="Removes nothing; shows what patching itself costs.",
        paper="none",
        url="",
        year=2026,
        license="none",
        cons=("Saves nothing.",),
    )

    def limit(self, n: int) -> int:
        return 0

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return 0

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return None
