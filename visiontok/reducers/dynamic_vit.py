"""DynamicViT: a small learned predictor per stage scores tokens, the best stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError
from visiontok.ops.constants import wide_dtype
from visiontok.ops.ordering import stable_order
from visiontok.reducers.evit import rates

__all__ = ["DynamicViT", "Predictor"]


class Predictor(nn.Module):
    """Scores tokens from their own features and the mean of all (arXiv:2106.02034, section 3.2).

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """Log probabilities to keep and to drop.

        Args:
            x: (B, n, C) non-prefix tokens.
            live: (B, n, 1) 1 for tokens, 0 for padding; None for all ones.

        Returns:
            (B, n, 2).
        """
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        own, shared = x[..., :half], x[..., half:]
        if live is None:
            mean = shared.mean(dim=1, keepdim=True)
        else:
            live = live.to(x.dtype)
            mean = (shared * live).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp_min(1)
        return self.out_conv(torch.cat((own, mean.expand_as(shared)), dim=-1))


# Officially, tokens that joined after a reduction (CLCA's cache) do not count in the predictor's global mean.
_DECISION = "dynamic_vit.decision"


@dataclass(frozen=True)
class DynamicViT(Reducer):
    """DynamicViT (arXiv:2106.02034): before blocks 3, 6 and 9 of 12, the tokens with the best predicted score stay.

    Training: the kept tokens are multiplied by one plus their keep probability minus its detached self, which is one
    but carries the gradient to the predictor (score-weighted straight-through). Tokens are really dropped in training
    too, so the paper's Gumbel masks, ratio loss and distillation are not part of this; their checkpoints load.

    Args:
        base_rate: Official: at the i-th point the integer part of `base_rate ** i` of the initial tokens stays.
        keep_rate: The integer part of this share of the current tokens stays instead (as in CLCA); or a list per layer
            from 1, or `{layer: share}`.
        pruning_loc: Layers before which tokens leave. Default: a quarter, half and three quarters of the model.
        sort: Whether kept tokens stay in sequence order. Official: False, by decreasing score.
    """

    name = "dynamic_vit"
    card = Card(
        title="DynamicViT",
        summary="A learned predictor scores the tokens at three points; the best of each stay.",
        paper="Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021",
        url="https://arxiv.org/abs/2106.02034",
        year=2021,
        license="MIT",
        training_free=False,
        cons=(
            "Without trained predictors it drops at random; the model has to be fine-tuned with them.",
            "Dropped tokens are lost for good; dense heads need restore.",
            "Our training path is a straight-through one, not the paper's Gumbel masks.",
        ),
        official="protects index 0 only and reorders tokens by score; here every prefix token stays.",
    )
    site = Site.PRE
    spread = "ratio"
    trainable = True
    budget_names = (*Reducer.budget_names, "base_rate", "keep_rate")

    carry_rules = {_DECISION: "anchor"}

    base_rate: float | None = None
    keep_rate: Any = None
    pruning_loc: Any = None
    sort: bool = False

    def __post_init__(self) -> None:
        if self.base_rate is not None:
            rates(self.name, "base_rate", self.base_rate)
        places = self.pruning_loc
        if places is not None and not (
            isinstance(places, (list, tuple)) and all(isinstance(p, int) and p is not True and p > 0 for p in places)
        ):
            raise ParameterError(f"dynamic_vit: pruning_loc must be a list of ints >= 1, got {places!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    def spec(self) -> tuple[Any, Any]:
        if self.keep_rate is not None:
            return None, rates(self.name, "keep_rate", self.keep_rate)
        return self.r, self.keep if self.base_rate is None else float(self.base_rate)

    def layers(self, depth: int) -> Sequence[int]:
        return [q for q in quarters(depth) if q > 0] if self.pruning_loc is None else sorted(set(self.pruning_loc))

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if budget.ratio is None or (self.base_rate is None and self.keep_rate is None):
            return super().removed(n, budget, where, prefix)
        left = n * budget.ratio
        if self.base_rate is not None and where.start:
            left = where.start * self.base_rate ** (1 + list(self.layers(where.depth)).index(where.layer))
        return n - min(max(int(left), 1), n)

    def modules(self, build: Build) -> nn.Module | None:
        return Predictor(build.width) if build.before != build.after else None

    def official(self, stage: int) -> str:
        return f"score_predictor.{stage}."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r, prefix = self.amount(budget, state), state.prefix
        if r == 0:
            return None
        score = self.score(signals, state)
        order = stable_order(score.detach(), descending=True)[:, : state.items - r]
        order = order.sort(dim=-1).values if self.sort else order
        carry = {_DECISION: order.new_ones(state.batch, state.n - r)} if self.compat == "official" else None
        if not (torch.is_grad_enabled() and score.requires_grad):
            return TokenMap.keep(order + prefix, state.n, prefix, carry=carry)
        chance = score.exp()
        weight = torch.cat((chance.new_ones(state.batch, prefix), 1 + (chance - chance.detach())), dim=1)
        return TokenMap.keep(order + prefix, state.n, prefix, weight=weight, mode="sum", carry=carry)

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        """(B, n) log probability to keep of each non-prefix token; padding gets -inf."""
        module = signals.MODULE
        if module is None:
            raise IncompatibleError(f"dynamic_vit at layer {state.layer} has no predictor; patch again with a budget.")
        x = signals.HIDDEN[:, state.prefix :]
        live = state.size[:, state.prefix :] > 0 if state.padded and state.size is not None else None
        seen = state.carry.get(_DECISION) if self.compat == "official" else None
        policy = live if seen is None else seen[:, state.prefix :, None] > 0
        score = module(x.to(module.in_conv[1].weight.dtype), policy)[..., 0]
        score = score.to(wide_dtype(score.dtype))
        return score if live is None else score.masked_fill(~live.squeeze(-1), float("-inf"))
