"""StreamingLLM: the first entries of the cache, on which attention leans, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from visiontok.core.reducer import Card
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import CacheReducer
from visiontok.errors import ParameterError

__all__ = ["StreamingLLM"]


@dataclass(frozen=True)
class StreamingLLM(CacheReducer):
    """Attention sinks (arXiv:2309.17453): keeps the first and the last entries and looks at nothing.

    With `over="visual"` these are the first and the last tokens of each image, so all between its top left and its last
    rows goes; with `over="all"` the first and last of the prompt, which usually deletes the image.

    Args:
        start_size: Entries kept at the start (sinks); they are part of any budget.
        recent_size: Entries kept at the end; 512 where no other budget is given.
        over: `visual` or `all`.

    Raises:
        ParameterError: `start_size` is no int >= 0, or `recent_size` no int >= 1.
    """

    name = "streaming_llm"
    card = Card(
        title="StreamingLLM, attention sinks",
        summary="Keeps the first and the last entries of the cache, whatever they hold.",
        paper="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
        url="https://arxiv.org/abs/2309.17453",
        year=2024,
        license="MIT",
        cons=(
            "Made for endless text: over visual tokens it cuts the image's middle out; a floor for other methods.",
            "Saves cache memory; decoding hardly gets faster.",
        ),
        official="rotates cached keys anew by their place in the cache; here entries keep their positions.",
    )
    budget_names = (*CacheReducer.budget_names, "recent_size")

    start_size: int = 4
    recent_size: int | None = None

    def __post_init__(self) -> None:
        for field, low in (("start_size", 0), ("recent_size", 1)):
            value: Any = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ParameterError(f"{self.name}: {field} must be an int >= {low}, got {value!r}.")
        super().__post_init__()

    def spec(self) -> tuple[Any, Any]:
        if self.recent_size is not None:
            return None, self.start_size + self.recent_size
        if all(getattr(self, name) is None for name in self.budget_names):
            return None, self.start_size + 512
        return super().spec()

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        n = state.items
        count = n - self.amount(budget, state)
        if count == n:
            return None
        kept = torch.arange(count, device=state.device)
        kept = torch.where(kept < self.start_size, kept, kept + (n - count))
        return TokenMap.keep(kept.expand(state.batch, -1), n)
