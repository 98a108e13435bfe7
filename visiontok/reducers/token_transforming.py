"""Token Transforming: one matrix maps all tokens to fewer, every old token feeding many new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from visiontok.core.reducer import Card, Reducer
from visiontok.core.schedule import quarters
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap, with_prefix
from visiontok.errors import ParameterError
from visiontok.ops import matching, merging
from visiontok.ops.ordering import stable_order

__all__ = ["TokenTransforming"]


@dataclass(frozen=True)
class TokenTransforming(Reducer):
    """Many-to-many token transforming (arXiv:2506.05709).

    New tokens are W x with a row-normalised matrix W (K, N), one GEMM. The K tokens to which the class token attends
    most are the targets; each token spreads itself over the targets by a softmax of cosines of hidden states, and then
    every row of W is divided by its sum. As the temperature falls W becomes a merge into the most similar target.

    Args:
        r: Tokens removed per point; one number acts at a quarter, a half and three quarters of the depth.
        temperature: Of the softmax over targets, above 0; our choice, the paper's value is not public.
    """

    name = "token_transforming"
    card = Card(
        title="Token Transforming",
        summary="Mixes all tokens into the K most attended ones with a row-normalised similarity matrix.",
        paper="Zeng et al., Token Transforming: A Unified and Training-Free Token Compression Framework for Vision "
        "Transformer Acceleration, 2025",
        url="https://arxiv.org/abs/2506.05709",
        year=2025,
        license="no public code",
        cons=(
            "No public code: written from the paper's description; kernel and temperature are ours.",
            "Needs a class token, whose attention picks the targets.",
            "A dense K x N matrix is multiplied with the tokens, K * N * C MACs per point.",
            "New tokens are mixtures, so sizes and exact origins do not exist; origin is the strongest target.",
        ),
        official="the authors' repository holds no code.",
    )

    temperature: float = 0.02

    def __post_init__(self) -> None:
        tau = self.temperature
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or tau <= 0:
            raise ParameterError(f"token_transforming: temperature must be above 0, got {tau!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.ATTN_PREFIX, Signal.HIDDEN

    def layers(self, depth: int) -> Sequence[int]:
        return quarters(depth)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        prefix, kept = state.prefix, state.items - r
        score = signals.ATTN_PREFIX.detach()[:, :, 0, prefix:].mean(dim=1)
        live = state.size[:, prefix:, 0] > 0 if state.padded and state.size is not None else None
        if live is not None:
            score = score.masked_fill(~live, -1)
        target = stable_order(score, descending=True)[:, :kept].sort(dim=1).values
        rows = matching.unit(signals.HIDDEN[:, prefix:])
        cosine = merging.select(rows, target) @ rows.transpose(1, 2)
        share = (cosine / self.temperature).softmax(dim=1)
        if live is not None:
            share = share * live.unsqueeze(1)
        # A target's own share is at least 1 / K; only an all-padding row sums to nothing.
        share = share / share.sum(dim=2, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        lead = torch.eye(prefix, dtype=share.dtype, device=share.device)
        soft = F.pad(share, (prefix, 0, prefix, 0)) + F.pad(lead, (0, state.items, 0, kept))
        own = torch.arange(kept, device=target.device).expand_as(target)
        assign = with_prefix(cosine.max(dim=1).indices.scatter(1, target, own) + prefix, prefix)
        return TokenMap(assign, prefix + kept, soft=soft, anchor=with_prefix(target + prefix, prefix))
