"""Evo-ViT: tokens that the class token has been attending to are updated, the others wait and come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visiontok.core.reducer import Card, Reducer
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.ops.ordering import stable_order

__all__ = ["EvoViT"]

_SCORE = "evo_vit.score"


@dataclass(frozen=True)
class EvoViT(Reducer):
    """Evo-ViT's slow-fast updating (arXiv:2108.01390), training-free on any class-token model.

    A token's score is its running class attention, summed over heads. In each of the later blocks only the tokens with
    the best scores go through; the others skip the block unchanged and come back behind it, so the model's features
    keep their full length. Scores of waiting tokens stay as they are.

    Args:
        r: Tokens that skip each block, from a third of the model on (4 ... 11 of 12); or a list per block from 1, or
            `{block: r}`.
        keep: Share or number of tokens that go through instead. The released models: 0.5.
        tradeoff: Share of the new attention in the running score; the first score is the attention itself.
    """

    name = "evo_vit"
    card = Card(
        title="Evo-ViT, slow-fast token evolution",
        summary="Updates the tokens with the best running class attention; the others skip blocks but are not lost.",
        paper="Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, AAAI 2022",
        url="https://arxiv.org/abs/2108.01390",
        year=2021,
        license="MIT",
        cons=(
            "Every block gathers and puts back tokens, and the last feature map has tokens of different depth.",
            "The paper trains with it from scratch; off the shelf waiting tokens go stale.",
            "Needs a class token; gflops= and tokens= are not available, since no token is removed for good.",
        ),
        official="the paper's representative token, which the released DeiT code leaves out too, is not part of this; "
        "the released head averages all patches, here the model's own head decides.",
    )
    site = Site.AROUND
    fill = "self"
    budget_names = ("r", "keep")

    tradeoff: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.tradeoff, (int, float)) or not 0 <= self.tradeoff <= 1:
            raise ParameterError(f"evo_vit: tradeoff must be in [0, 1], got {self.tradeoff!r}.")
        given = [name for name in ("gflops", "tokens") if getattr(self, name) is not None]
        if given:
            raise ParameterError(f"evo_vit takes no {given[0]}, since all tokens come back; give r or keep.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX,)

    def layers(self, depth: int) -> Sequence[int]:
        return range(max(depth // 3, 1), depth)

    def until(self, layer: int, depth: int) -> int | None:
        return layer + 1

    def parts(self) -> tuple[Reducer, ...]:
        return (_RunningScore(r=self.r, keep=self.keep, tradeoff=self.tradeoff), self)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        score = state.carry.get(_SCORE)
        if score is None:
            if state.prefix == 0:
                raise IncompatibleError("evo_vit ranks tokens by the class token's attention; there is no prefix.")
            score = signals.ATTN_PREFIX[:, :, 0].sum(dim=1)
        order = stable_order(score[:, state.prefix :].detach(), descending=True)[:, : state.items - r]
        return TokenMap.keep(order.sort(dim=-1).values + state.prefix, state.n, state.prefix)


@dataclass(frozen=True)
class _RunningScore(EvoViT):
    # Between attention and MLP: every token that the block updates mixes its class attention into its score.
    site = Site.MID
    always = True

    def budgets(self, depth: int) -> dict[int, Budget]:
        whole = EvoViT(r=self.r, keep=self.keep).budgets(depth)
        acting = [layer for layer, budget in whole.items() if not budget.idle]
        # From the block before the first that skips; after the last one scores are of no use.
        return {block: Budget() for block in range(acting[0] - 1, acting[-1])} if acting else {}

    def parts(self) -> tuple[Reducer, ...]:
        return (self,)

    def limit(self, n: int) -> int:
        return 0

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        row, before = signals.ATTN_PREFIX[:, :, 0].sum(dim=1).detach(), state.carry.get(_SCORE)
        score = row if before is None else (1 - self.tradeoff) * before + self.tradeoff * row
        return TokenMap.identity(score, carry={_SCORE: score})
