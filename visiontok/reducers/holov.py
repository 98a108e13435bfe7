"""HoloV: the budget is spread over stretches of the image before the best tokens of each are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops.ordering import stable_order

__all__ = ["HoloV"]

# As released: guard of every division, and the factor that lifts attention to the order of one.
_EPS, _LIFT = 1e-6, 1e3


@dataclass(frozen=True)
class HoloV(PromptReducer):
    """HoloV (arXiv:2510.02912).

    Tokens in raster order are cut into stretches. A token's score is its class attention plus `alpha` times the
    variance of its cosines to the other tokens of its stretch, both brought to the same scale; a stretch gets budget in
    proportion to its mean score and keeps the tokens of highest attention. What a stretch cannot use goes to the best
    remaining tokens by attention.

    Args:
        new_image_token_num: Official budget, tokens kept per crop.
        num_patches: Stretches.
        alpha: Weight of the variance.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: num_patches or new_image_token_num is no int >= 1, or alpha is negative.
    """

    name = "holov"
    card = Card(
        title="HoloV",
        summary="Spreads the budget over stretches of the image by attention and variety, then keeps the attended.",
        paper='Zou et al., Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context '
        "Retention, NeurIPS 2025",
        url="https://arxiv.org/abs/2510.02912",
        year=2025,
        license="unknown",
        cons=(
            "Stretches are runs of the raster, not regions.",
            "Spends tokens on empty areas too.",
        ),
        official="orders tokens by attention inside a stretch, fills what a full stretch cannot use with zero tokens, "
        "and fixes the number of tokens in the code.",
    )
    budget_names = (*PromptReducer.budget_names, "new_image_token_num")

    new_image_token_num: int | None = None
    num_patches: int = 16
    alpha: float = 0.09

    def __post_init__(self) -> None:
        for field in ("num_patches", "new_image_token_num"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ParameterError(f"{self.name}: {field} must be an int >= 1, got {value!r}.")
        if not isinstance(self.alpha, (int, float)) or isinstance(self.alpha, bool) or self.alpha < 0:
            raise ParameterError(f"{self.name}: alpha must be at least 0, got {self.alpha!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX, Signal.HIDDEN)

    def taps(self, depth: int) -> tuple[int, ...]:
        return (max(depth - 2, 0),)

    def spec(self) -> tuple[Any, Any]:
        return (self.r, self.keep) if self.new_image_token_num is None else (None, self.new_image_token_num)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed, n = self.amount(budget, state), state.items
        if removed == 0:
            return None
        left, parts = n - removed, min(self.num_patches, n)
        attention = signals.ATTN_PREFIX[:, -1, :, 0, state.prefix :].mean(dim=1)
        short, longer = divmod(n, parts)
        part = torch.arange(parts, device=state.device)
        sizes, starts = short + (part < longer).long(), part * short + part.clamp_max(longer)
        cell = torch.arange(short + (longer > 0), device=state.device)
        live = cell < sizes.unsqueeze(1)
        member = torch.where(live, starts.unsqueeze(1) + cell, 0)
        inside = attention[:, member].masked_fill(~live, -torch.inf)
        share = self._shares(signals.HIDDEN[:, state.prefix :][:, member], inside, live, sizes)
        allotted = (share * left).floor().long()
        # Parts of largest share get what flooring left over, one each.
        best = stable_order(stable_order(share, descending=True))
        allotted = allotted + (best < left - allotted.sum(dim=1, keepdim=True)).long()
        rank = stable_order(stable_order(inside, descending=True))
        taken = (rank < allotted.unsqueeze(2)) & live
        # Back to the tokens; padding of the parts goes to a place of its own.
        spot = torch.where(live, member, n).flatten().expand(state.batch, -1)
        chosen = torch.zeros(state.batch, n + 1, dtype=torch.int64, device=state.device)
        chosen = chosen.scatter(1, spot, taken.flatten(1).long())[:, :n]
        order = stable_order(attention, descending=True)
        order = order.gather(1, stable_order(chosen.gather(1, order), descending=True))
        return TokenMap.keep(order[:, :left].sort(dim=1).values + state.prefix, state.n)

    def _shares(self, x: Tensor, inside: Tensor, live: Tensor, sizes: Tensor) -> Tensor:
        # (R, parts) share of the budget of each part; x (R, parts, m, C).
        rows = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + _EPS)
        own = torch.eye(live.shape[1], dtype=torch.bool, device=x.device)
        pair = live.unsqueeze(1) & live.unsqueeze(2)
        cosine = (rows @ rows.mT).masked_fill(own | ~pair, 0)
        others = (sizes - 1).clamp_min(1).view(-1, 1)
        mean = cosine.sum(dim=-1, keepdim=True) / others.unsqueeze(-1)
        # The released code counts the cleared diagonal among the deviations.
        variance = ((cosine - mean).square() * pair).sum(dim=-1) / others
        lifted = inside.masked_fill(~live, 0) * _LIFT
        count = sizes.to(x.dtype).view(-1, 1)
        level = lifted.abs().sum(dim=-1, keepdim=True) / count
        spread = (variance * live).sum(dim=-1, keepdim=True) / count
        score = ((lifted + self.alpha * variance * level / (spread + _EPS)) * live).sum(dim=-1) / count.squeeze(-1)
        return score / (score.sum(dim=1, keepdim=True) + _EPS)
