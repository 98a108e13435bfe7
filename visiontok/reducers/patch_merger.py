"""PatchMerger: a few learned queries attend to all tokens, and what they read replaces them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.staged import Staged, check_share
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.ops.constants import wide_dtype

__all__ = ["Merger", "PatchMerger"]


class Merger(nn.Module):
    """K learned queries and the norm of the tokens that they read (arXiv:2202.12015).

    Args:
        dim: C, channels of a token.
        count: K, tokens that come out.
        scale: Factor on the logits.
    """

    def __init__(self, dim: int, count: int, scale: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(count, dim))
        self.scale = scale

    def forward(self, x: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, K, N) shares, each row summing to 1 over the tokens, and the (B, N, C) normed tokens that they mix.

        Args:
            x: (B, N, C) tokens without the prefix.
            live: (B, N) bool, False for padding, which gets no share.
        """
        wide = wide_dtype(x.dtype)
        normed = self.norm(x.to(self.queries.dtype)).to(wide)
        logits = self.queries.to(wide) @ normed.transpose(1, 2) * self.scale
        if live is not None:
            # Finite, so that a sample that is all padding stays free of NaN.
            logits = logits.masked_fill(~live.unsqueeze(1), torch.finfo(wide).min)
        return logits.softmax(dim=2), normed


@dataclass(frozen=True)
class PatchMerger(Staged):
    """PatchMerger (arXiv:2202.12015): softmax over tokens of q LN(x)ᵀ mixes the normed tokens into K new ones.

    The queries are random, and destroy the accuracy, until trained or loaded (`Reduction.load_learned`). Their count
    is part of their weights: at another resolution than the nominal one each point still returns its own K tokens.

    Args:
        r, keep: Budget per point; one number acts at a quarter, a half and three quarters of the depth.
        keep_rate: Official budget: point i keeps `int(N0 * keep_rate**i)` of the N0 tokens that the model starts
            with, at least 1.
        scaled_attention: Divides the logits by sqrt(C). Official: False.
    """

    name = "patch_merger"
    card = Card(
        title="PatchMerger",
        summary="Learned queries read all patch tokens and replace them by a few mixtures.",
        paper="Renggli et al., Learning to Merge Tokens in Vision Transformers, 2022",
        url="https://arxiv.org/abs/2202.12015",
        year=2022,
        license="MIT (TokenReduction and CLCA, whose keys and counts are followed; the authors published no module)",
        training_free=False,
        cons=(
            "Needs training; untrained queries mix at random.",
            "Adds parameters, whose shape fixes the token counts: another count needs another training.",
            "Tokens are mixtures of normed tokens, so neither sizes nor exact origins exist.",
        ),
        official="mixes tokens appended by CLCA together with the patches.",
    )
    trainable = True
    # The trained weights fix the count, so a point acts also where a budget for this resolution would remove nothing.
    always = True
    budget_names = (*Reducer.budget_names, "keep_rate")

    keep_rate: float | None = None
    scaled_attention: bool = False

    def __post_init__(self) -> None:
        check_share("patch_merger", "keep_rate", self.keep_rate)
        super().__post_init__()

    @property
    def share(self) -> float | None:
        return None if self.keep_rate is None else float(self.keep_rate)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    def modules(self, build: Build) -> nn.Module | None:
        if build.after == build.before:
            return None
        return Merger(build.width, build.after, build.width**-0.5 if self.scaled_attention else 1.0)

    def official(self, stage: int) -> str:
        return f"cluster_layers.{stage}."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        """See `Reducer.decide`. The count is that of `signals.MODULE`, a budget other than None does not change it."""
        self.amount(budget, state)
        module = signals.MODULE if "MODULE" in signals else None
        if module is None or state.items == 0:
            return None
        prefix, x = state.prefix, signals.HIDDEN
        live = state.size[:, prefix:, 0] > 0 if state.padded and state.size is not None else None
        shares, normed = module(x[:, prefix:], live)
        alone = torch.eye(prefix, state.n, dtype=shares.dtype, device=shares.device).expand(state.batch, -1, -1)
        soft = torch.cat((alone, F.pad(shares, (prefix, 0))), dim=1)
        values = torch.cat((x[:, :prefix].to(normed.dtype), normed), dim=1)
        return TokenMap(soft.argmax(dim=1), soft.shape[1], soft=soft, values=values, anchor=soft.argmax(dim=2))
