"""CDPruner: tokens that fit the question and differ from each other, by a determinantal point process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer, Text
from visiontok.errors import ParameterError
from visiontok.ops import matching

__all__ = ["CDPruner"]

# What keeps the least relevant token from having no weight at all, as released.
_EPS = 1e-6
# Below this variance everything that is left lies in the span of what was chosen.
_FLAT = 1e-12


@dataclass(frozen=True)
class CDPruner(PromptReducer):
    """CDPruner (arXiv:2506.10967): greedy MAP of a DPP whose kernel is relevance times cosine times relevance.

    The relevance of a token is its mean cosine to the text's tokens, scaled to [0, 1] over its image. Greedy steps
    update one Cholesky row each, so the kernel matrix is never formed.

    Args:
        visual_token_num: Official budget, tokens kept per crop.
        compat: `"official"` negates the cosine, which suits the CLIP embeddings of the released code, and scales
            relevance over the whole batch.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: visual_token_num is no int >= 1.
    """

    name = "cdpruner"
    card = Card(
        title="CDPruner",
        summary="Keeps tokens that are relevant to the text and unlike each other (conditional DPP).",
        paper="Zhang et al., Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in "
        "MLLMs, NeurIPS 2025",
        url="https://arxiv.org/abs/2506.10967",
        year=2025,
        license="unknown",
        cons=(
            "As many dependent steps as tokens are kept, each longer than the last.",
            "The released code compares CLIP's image and text embeddings; here the language model's own embeddings "
            "stand in, which are aligned less well.",
            "Depends on the question, so a prompt's tokens cannot be reused for another one.",
        ),
        official="needs CLIP's text tower, negates the cosine, and couples the images of a batch.",
    )
    site = Site.EMBED
    budget_names = (*PromptReducer.budget_names, "visual_token_num")

    visual_token_num: int | None = None

    def __post_init__(self) -> None:
        count = self.visual_token_num
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ParameterError(f"{self.name}: visual_token_num must be an int >= 1, got {count!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.TEXT)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.visual_token_num is None else (None, self.visual_token_num)

    def relevance(self, rows: Tensor, text: Text) -> Tensor:
        """(R, n) in about [0, 1]; the same for all tokens of a row without text.

        Args:
            rows: (R, n, D) unit rows of the visual tokens.
            text: Of the rows.
        """
        live = text.live.unsqueeze(-1)
        words = (matching.unit(text.tokens) * live).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp_min(
            1
        )
        cosine = (rows @ words.mT).squeeze(-1)
        if self.compat:
            cosine = -cosine
            low, high = cosine.amin(), cosine.amax()
        else:
            low, high = cosine.amin(dim=1, keepdim=True), cosine.amax(dim=1, keepdim=True)
        span = high - low
        return torch.where(span > 0, (cosine - low + _EPS) / span, 1.0)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        rows = matching.unit(signals.HIDDEN[:, state.prefix :])
        rows = rows * self.relevance(rows, signals.TEXT).unsqueeze(-1)
        left = state.items - removed
        basis = rows.new_zeros(state.batch, left, state.items)
        variance, chosen = rows.square().sum(dim=-1), []
        for step in range(left):
            pick = variance.argmax(dim=1, keepdim=True)
            chosen.append(pick)
            row = rows.gather(1, pick.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            known = basis[:, :step]
            seen = known.gather(2, pick.unsqueeze(1).expand(-1, step, -1))
            along = (row @ rows.mT - seen.mT @ known).squeeze(1) / variance.gather(1, pick).clamp_min(_FLAT).sqrt()
            basis[:, step] = along
            variance = (variance - along.square()).scatter(1, pick, -torch.inf)
        return TokenMap.keep(torch.cat(chosen, dim=1).sort(dim=1).values + state.prefix, state.n)
