"""random: drops tokens at random. Every method has to beat it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops.hashing import rank_keys
from visiontok.ops.ordering import stable_order

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Reducer):
    """Drops tokens chosen by a hash of (seed, layer, token): the same for every batch split, device and thread.

    Args:
        seed: Any int.
    """

    name = "random"
    card = Card(
        title="Random dropping",
        summary="Drops randomly chosen tokens; the baseline that any method must beat.",
        paper="none",
        url="",
        year=2026,
        license="none",
        cons=("Ignores the image.",),
    )
    stochastic = True

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ParameterError(f"random: seed must be an int, got {self.seed!r}.")
        super().__post_init__()

    def placed(self, sites: Collection[Site]) -> Reducer:
        """In multimodal language models the prompt's tokens are dropped, not those of the vision tower's blocks."""
        if Site.POST not in sites:
            return self
        given = {name: value for name, value in self.fields().items() if name != "positions"}
        return _RandomPrompt.create(**given)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        return TokenMap.keep(_kept(state, removed, self.seed), state.n, state.prefix)


@dataclass(frozen=True)
class _RandomPrompt(PromptReducer):
    """Random dropping of a prompt's visual tokens."""

    name = "random"
    card = Random.card
    stochastic = True

    seed: int = 0

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return TokenMap.keep(_kept(state, self.amount(budget, state), self.seed), state.n)


def _kept(state: TokenState, removed: int, seed: int) -> Tensor:
    keys = rank_keys(state.items, seed=seed, layer=state.layer, device=state.device)
    kept = stable_order(keys)[: state.items - removed].sort().values + state.prefix
    return kept.expand(state.batch, -1)
