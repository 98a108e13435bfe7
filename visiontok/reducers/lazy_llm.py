"""LazyLLM: every step looks at the entries of the KV cache that it needs; the others wait and may come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from visiontok.core.reducer import Card
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import CacheReducer
from visiontok.errors import ParameterError
from visiontok.ops.ordering import stable_order

__all__ = ["LazyLLM"]


@dataclass(frozen=True)
class LazyLLM(CacheReducer):
    """LazyLLM's revival (arXiv:2407.14057) as a visibility mask that is decided anew at every step.

    After prefill and at every decoded token each layer shows the current query those entries that attend best to it,
    fewer in later layers. Nothing is evicted, so an entry that was hidden at one step can be seen at the next.

    Without another budget, all entries are visible up to layer `begin * depth`, and from there on a share that falls
    linearly to `final_keep` at the last layer. One r or keep holds for all layers from `begin` on.

    Args:
        begin: Share of the depth at which hiding begins.
        final_keep: Share that is visible at the last layer.
        over: `visual` or `all`.

    Raises:
        ParameterError: `begin` is outside [0, 1), or `final_keep` outside (0, 1].
    """

    name = "lazy_llm"
    card = Card(
        title="LazyLLM, dynamic visibility (experimental)",
        summary="Shows each step only the cache entries that its query attends to; hidden ones can come back.",
        paper="Fu et al., LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference, 2024",
        url="https://arxiv.org/abs/2407.14057",
        year=2024,
        license="no public code of the authors",
        cons=(
            "Experimental: saves neither memory nor time, since all entries are computed and stay cached; it shows "
            "what revival does to the answers.",
            "Each key-value head chooses for itself, by its own layer's attention; the paper averages heads and prunes "
            "by the layer before.",
            "The falling shares are ours; the paper gives no schedule that can be read here.",
        ),
        official="none. The paper computes hidden tokens lazily and keeps their hidden states in an auxiliary cache, "
        "which is where its faster prefill comes from.",
    )
    when = "both"
    revives: ClassVar[bool] = True

    begin: float = 0.3
    final_keep: float = 0.3

    def __post_init__(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        if not (number(self.begin) and 0 <= self.begin < 1):
            raise ParameterError(f"{self.name}: begin must be in [0, 1), got {self.begin!r}.")
        if not (number(self.final_keep) and 0 < self.final_keep <= 1):
            raise ParameterError(f"{self.name}: final_keep must be in (0, 1], got {self.final_keep!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_SUM,)

    def layers(self, depth: int) -> Sequence[int]:
        return range(int(self.begin * depth), depth)

    def budgets(self, depth: int) -> dict[int, Budget]:
        if any(getattr(self, name) is not None for name in self.budget_names):
            return super().budgets(depth)
        layers = self.layers(depth)
        fall = (1.0 - self.final_keep) / len(layers)
        return {layer: Budget(ratio=1.0 - fall * (i + 1)) for i, layer in enumerate(layers)}

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        n = state.items
        count = n - self.amount(budget, state)
        if count == n:
            return None
        best = stable_order(signals.ATTN_SUM.sum(last=1), descending=True)[:, :count]
        return TokenMap.keep(best.sort(dim=1).values, n)
