"""VTC-CLS: keep the visual tokens that the class token attends to over several layers of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer, keep_top
from visiontok.errors import ParameterError

__all__ = ["VTCCls"]


@dataclass(frozen=True)
class VTCCls(PromptReducer):
    """Visual token compression by the class token (arXiv:2412.05819).

    A token's score is the class token's attention to it, averaged over heads and summed over the tower's layers from
    `start_layer` to the last but one, where LLaVA's features come from. The best tokens stay, in raster order. Towers
    without a class token give the mean attention that a token receives instead.

    Args:
        token_num: Tokens kept per image (the official name of `keep` as a count); more than there are keeps all.
        start_layer: First layer of the sum, negative from the end as in a slice; None is the first layer. The authors
            give no default and choose it per task; -10 sums the nine layers before the last.

    Raises:
        ParameterError: `start_layer` leaves no layer before the last.
    """

    name = "vtc_cls"
    budget_names = (*PromptReducer.budget_names, "token_num")
    card = Card(
        title="VTC-CLS, visual token compression by [CLS] attention",
        summary="Keeps the image tokens that the vision tower's class token attends to most, over several layers.",
        paper="Wang et al., [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, 2024",
        url="https://arxiv.org/abs/2412.05819",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Does not read the question: what the class token ignores is lost whatever is asked.",
            "Keeps near-duplicates of salient tokens.",
            "Which layers to sum is a knob that the authors set per benchmark.",
        ),
        official="is right for one image at a time and 576 tokens only, and fails for token_num = 1.",
    )

    token_num: Any = None
    start_layer: int | None = -10

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX,)

    def spec(self) -> tuple[Any, Any]:
        return self.r, self.keep if self.token_num is None else self.token_num

    def taps(self, depth: int) -> tuple[int, ...]:
        layers = tuple(range(depth)[self.start_layer : -1])
        if not layers:
            raise ParameterError(
                f"{self.name}: start_layer must leave a layer before the last of the tower's {depth}, "
                f"got {self.start_layer!r}."
            )
        return layers

    def scores(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n) attention to each non-prefix token, summed over the tapped layers."""
        return signals.ATTN_PREFIX[..., 0, state.prefix :].mean(dim=2).sum(dim=1)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return keep_top(self.scores(signals, state), state.items - self.amount(budget, state), state)
