"""LLaVA-PruMerge: outliers of the class token's attention stay and gather their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order
from visiontok.ops.scoring import outliers

__all__ = ["PruMerge"]


@dataclass(frozen=True)
class PruMerge(PromptReducer):
    """PruMerge and PruMerge+ (arXiv:2403.15388).

    Tokens whose class attention in the tower's last layer is an outlier (above the upper quartile by 1.5 interquartile
    ranges) stay. To each of them are added its `neighbors` nearest others by key, each times its attention, and one
    more token is the sum of all tokens that did not stay, each times its attention. These sums are not divided, as in
    the released code.

    Args:
        plus: PruMerge+: tokens at even steps stay too, about three for each outlier.
        neighbors: Nearest others added to a token that stays.
        max_tokens: Most tokens per crop, the last one included; best attention first.
        r, keep, tokens: Exact number instead, the last token included; with `plus` half of them by attention and half
            at even steps among the others.
        compat: `"official"`: attention is one head over all channels, the share of outliers is that of the whole batch,
            and tokens are in the order in which they were chosen.
        positions, per: See `PromptReducer`.

    Raises:
        ParameterError: neighbors is no int >= 0, or max_tokens no int >= 2.
    """

    name = "prumerge"
    card = Card(
        title="LLaVA-PruMerge",
        summary="Keeps the attention outliers of the class token and adds their nearest neighbours to them.",
        paper="Shang et al., LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025",
        url="https://arxiv.org/abs/2403.15388",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Without a budget the saving depends on the image.",
            "Sums that are not divided lengthen the tokens; the paper also fine-tunes.",
            "Needs a class token for the released attention; few outliers lose fine detail.",
        ),
        official="attends with one head of full width, decides the number over a whole batch, reorders tokens by "
        "attention, and may return more tokens than there were; here the least attended one then joins the rest.",
    )
    ragged = True

    plus: bool = False
    neighbors: int = 32
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for field, low in (("neighbors", 0), ("max_tokens", 2)):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ParameterError(f"{self.name}: {field} must be an int >= {low}, got {value!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.KEY, Signal.QUERY_PREFIX if self.compat else Signal.ATTN_PREFIX)

    @property
    def always(self) -> bool:  # type: ignore[override]
        return all(getattr(self, name) is None for name in self.budget_names)

    def taps(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def limit(self, n: int) -> int:
        return max(n - 2, 0)

    def attention(self, signals: Signals, state: TokenState) -> Tensor:
        """(R, n) attention of the class token."""
        if not self.compat:
            return signals.ATTN_PREFIX[:, -1, :, 0, state.prefix :].mean(dim=1)
        query, key = signals.QUERY_PREFIX[:, -1], signals.KEY[:, -1]
        # QUERY_PREFIX holds the scale of one head; concatenated heads are H times as wide.
        logits = (query @ key.mT).sum(dim=(1, 2)) * query.shape[1] ** -0.5
        return logits.softmax(dim=-1)[:, state.prefix :]

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed, n = self.amount(budget, state), state.items
        if (removed == 0 and not self.always) or n < 3:
            return None
        score = self.attention(signals, state)
        rank = stable_order(stable_order(score, descending=True))
        if removed:
            most = n - removed - 1
            best = (most + 1) // 2 if self.plus else most
            kept = self._exact(rank, best, most)
        else:
            kept, best, most = self._adaptive(score, rank)
        # Officially those chosen by attention come first.
        order = torch.arange(n, device=rank.device).expand_as(rank)
        order = torch.where(rank < best, rank, n + order) if self.compat else order
        index = stable_order(order.masked_fill(~kept, 3 * n))[:, :most]
        counts = kept.sum(dim=1)
        return self._gathered(signals, state, score, kept, index, counts, exact=removed > 0)

    def _exact(self, rank: Tensor, best: int, most: int) -> Tensor:
        kept = rank < best
        if most == best:
            return kept
        # The j-th of m even steps among the others, each in the middle of its stretch.
        rest, m = rank.shape[1] - best, most - best
        steps = (2 * torch.arange(m, device=rank.device) + 1) * rest // (2 * m)
        others = stable_order(kept.to(torch.int8))[:, :rest]
        return kept.scatter(1, others[:, steps], True)

    def _adaptive(self, score: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, int]:
        n = rank.shape[1]
        if self.compat:
            share = outliers(score.flatten()).double().mean().expand(score.shape[0], 1)
        else:
            share = outliers(score).double().mean(dim=1, keepdim=True)
        share = share.clamp_min(1 / n)
        # Half a millionth of a token absorbs the rounding of a count that went through a share.
        count = (share * n + 5e-7).floor().long()
        kept, place = rank < count, torch.arange(n, device=rank.device)
        if self.plus:
            step = (1 / share).floor().long()
            start, stride = step // 6, (step // 3).clamp_min(1)
            kept = kept | ((place >= start) & ((place - start) % stride == 0) & (place < n - 1))
        # No more than a quarter can be outliers, and one slot belongs to the rest.
        most = n - 1 if self.plus else max(n // 4, 1)
        if self.max_tokens is not None:
            most = min(most, self.max_tokens - 1)
        best = stable_order(stable_order(torch.where(kept, rank, 2 * n)))
        return kept & (best < most), count, most

    def _gathered(self, signals: Signals, state: TokenState, score: Tensor, kept: Tensor, index: Tensor,
                  counts: Tensor, exact: bool) -> TokenMap:  # fmt: skip
        rows = matching.unit(signals.KEY[:, -1, :, state.prefix :].transpose(1, 2).flatten(2))
        own = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        cosine = (own @ rows.mT).scatter(2, index.unsqueeze(-1), -torch.inf)
        near = stable_order(cosine, descending=True)[:, :, : min(self.neighbors, state.items - 1)]
        share = score.unsqueeze(1).expand(-1, index.shape[1], -1)
        soft = torch.zeros_like(cosine).scatter(2, near, share.gather(2, near)).scatter(2, index.unsqueeze(-1), 1.0)
        # Behind a row's own tokens comes its rest, then nothing.
        slots = torch.arange(index.shape[1] + 1, device=index.device)
        last = counts.unsqueeze(1)
        rest = (score * ~kept).unsqueeze(1) * (slots == last).unsqueeze(-1)
        soft = F.pad(soft, (0, 0, 0, 1)) * (slots < last).unsqueeze(-1) + rest
        spot = torch.where(slots[:-1] < last, slots[:-1], last)
        assign = last.expand(-1, state.items).scatter(1, index, spot)
        pad = (state.prefix, 0)
        first = stable_order(kept.to(torch.int8))[:, :1]
        anchor = torch.where(slots < last, F.pad(index, (0, 1)), first) + state.prefix
        return TokenMap(
            F.pad(assign, pad, value=-1), len(slots), soft=F.pad(soft, pad), anchor=anchor,
            counts=None if exact else counts + 1,
        )  # fmt: skip
