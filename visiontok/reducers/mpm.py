"""MPM: tokens that are each other's nearest neighbour merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.ops import matching
from visiontok.ops.joining import follow, join
from visiontok.ops.ordering import stable_order

__all__ = ["MPM", "neighbours"]


@dataclass(frozen=True)
class MPM(Reducer):
    """Mutual Pair Merging (arXiv:2604.05718).

    Two tokens merge into their plain mean if each is the other's most similar token (cosine of hidden states). The
    paper has no budget: all such pairs merge, so the count depends on the image (`adaptive`). With a budget the most
    similar pairs merge first; if there are fewer than r, the remaining tokens join their nearest neighbours' slots,
    most similar first, until exactly r are gone.

    Args:
        r: Tokens merged per point.
        adaptive: The paper's rule: every mutual pair merges, per sample; r is then the least number removed.
        compact: In eager mode, cut slots that no sample of the batch uses (waits for the device).
    """

    name = "mpm"
    card = Card(
        title="Mutual Pair Merging",
        summary="Averages pairs of tokens that are each other's nearest neighbour, before two blocks.",
        paper="Rave et al., MPM: Mutual Pair Merging for Efficient Vision Transformers, CVPR Findings 2026",
        url="https://arxiv.org/abs/2604.05718",
        year=2026,
        license="no public code",
        cons=(
            "No public code: written from the paper's abstract and summaries of it; the exact budget is ours.",
            "The similarity of all token pairs is needed, four times the matching cost of ToMe.",
            "adaptive=True gives counts that differ per sample: batches are padded to the longest.",
        ),
        official="inserted before blocks 2 and 5 of 12, which we read as 2 and 5 blocks already run.",
    )
    site = Site.PRE

    adaptive: bool = False
    compact: bool = True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.adaptive

    @property
    def always(self) -> bool:  # type: ignore[override]
        return self.adaptive

    def layers(self, depth: int) -> Sequence[int]:
        places = (round(depth * 2 / 12), round(depth * 5 / 12))
        return sorted({max(place, 1) for place in places if place < depth})

    def limit(self, n: int) -> int:
        return n // 2

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if state.items < 2 or (r == 0 and not self.adaptive):
            return None
        rows = matching.unit(signals.HIDDEN.detach()[:, state.prefix :])
        live = state.size[:, state.prefix :, 0] > 0 if state.padded and state.size is not None else None
        score, nearest = neighbours(rows, live)
        place = torch.arange(state.items, device=rows.device).expand_as(nearest)
        mutual = nearest.gather(1, nearest) == place
        # Of a pair the later token leaves. Tokens outside pairs come after all pairs, in case those do not suffice.
        first, second = mutual & (place < nearest), mutual & (place > nearest)
        if live is not None:
            first, second = first & live, second & live & live.gather(1, nearest)
        tier = 2 * second.long() - 4 * first.long()
        weight = rows.new_ones(rows.shape[0], state.n)
        if live is not None:
            tier = tier - 2 * (~live).long()
            weight[:, state.prefix :] = live.to(rows.dtype)
        ranked = stable_order(score, descending=True)
        ranked = ranked.gather(1, stable_order(tier.gather(1, ranked), descending=True))
        rank = torch.empty_like(place).scatter(1, ranked, place)
        leaves = rank < r
        if self.adaptive:
            leaves = rank < second.sum(dim=1, keepdim=True).clamp_min(r)
            leaves = leaves if live is None else leaves | ~live
        joined = join(follow(torch.where(leaves, nearest, place)), prefix=state.prefix)
        slots = state.n - r
        counts = joined.counts if self.adaptive else None
        anchor = joined.order[:, :slots]
        return TokenMap(joined.assign, slots, weight=weight, anchor=anchor, counts=counts, form="complete")


def neighbours(rows: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Similarity to, and index of, the most similar other token.

    Args:
        rows: (B, N, d) unit rows.
        live: (B, N) bool, False for padding, which is nobody's neighbour.

    Returns:
        (B, N) cosine and (B, N) int64; following the indices ends at a pair of mutual neighbours from everywhere.
    """
    cosine = rows @ rows.transpose(1, 2)
    # Exactly symmetric, or rounding could close a ring of nearest neighbours.
    cosine = (cosine + cosine.transpose(1, 2)).nan_to_num(nan=0.0) / 2
    itself = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
    cosine = cosine if live is None else cosine.masked_fill(~live.unsqueeze(1), -2)
    # Lower than padding: among padding only, a token that was its own neighbour would lead nowhere.
    best = cosine.masked_fill(itself, -3).max(dim=-1)
    return best.values, best.indices
