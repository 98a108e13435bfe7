"""ATM: merges while similarity exceeds a threshold that falls with depth; late layers pair small tokens with large."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Where
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order
from visiontok.reducers.tome import KeyMerger, check_onset, even_odd_map, onset

__all__ = ["ATM"]


@dataclass(frozen=True)
class ATM(KeyMerger):
    """Adaptive Token Merging (arXiv:2505.15160).

    Before block `split` pairs are matched as in ToMe. From it on tokens are sorted by size and the smaller half merges
    into the larger one, because the error of a merge grows with n_i n_j / (n_i + n_j). By default each block removes
    exactly its budget; with `adaptive` each image merges every pair whose cosine exceeds
    theta_l = max(alpha - (exp(beta (l - 1)) - 1), theta_min), l = 1 for the first block.

    Args:
        r: Tokens removed per block; with `adaptive` the least number removed.
        adaptive: Whether the threshold decides, image by image.
        alpha: Threshold of the first block.
        beta: How fast it falls.
        theta_min: Least threshold.
        split: First block that pairs by size: an int is its index, a float in [0, 1] a share of the depth.
        compact: Whether eager runs cut the slots that no image of the batch uses.
        prop_attn: Whether attention adds log(size) to the keys.
        metric: What tokens are compared by instead of `key`; see `KeyMerger`.

    Raises:
        ParameterError: A value outside its range.
    """

    name = "atm"
    card = Card(
        title="Adaptive Token Merging",
        summary="ToMe with a similarity threshold per layer instead of a count, and size-aware pairs in late layers.",
        paper="Lee and Choi, Lossless Token Merging Even Without Fine-Tuning in Vision Transformers, 2025",
        url="https://arxiv.org/abs/2505.15160",
        year=2025,
        license="no public code",
        cons=(
            "No public code: written from the paper's description; alpha, beta, theta_min and split default to our "
            "choice.",
            "Adaptive counts differ per image, so a batch is padded to its longest member.",
            "At most half of the patch tokens can merge in one block.",
        ),
        official="none. The paper sets one count per batch; here counts are per image and never depend on the batch.",
    )
    adaptive: bool = False
    alpha: float = 0.95
    beta: float = 0.02
    theta_min: float = 0.7
    split: int | float = 0.75
    compact: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "theta_min"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (name == "beta" and value < 0):
                low = " >= 0" if name == "beta" else ""
                raise ParameterError(f"atm: {name} must be a finite number{low}, got {value!r}.")
        check_onset("atm", "split", self.split)
        super().__post_init__()

    @property
    def always(self) -> bool:  # type: ignore[override]
        return self.adaptive

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.adaptive

    def limit(self, n: int) -> int:
        return n // 2

    def threshold(self, layer: int) -> float:
        """Cosine from which a pair merges at a block (0 is the first)."""
        return max(self.alpha - math.expm1(self.beta * layer), self.theta_min)

    def by_size(self, where: Where) -> bool:
        """Whether this place pairs small tokens with large ones."""
        return where.layer >= onset(self.split, where.depth)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0 and not self.adaptive:
            return None
        metric, prefix = self.measure(signals), state.prefix
        late = self.by_size(Where(state.layer, max(state.depth, state.layer + 1)))
        if not late and not self.adaptive:
            return even_odd_map(metric.unsqueeze(1), r, state)
        rows = matching.unit(metric[:, prefix:])
        size = rows.new_ones(rows.shape[:2]) if state.size is None else state.size[:, prefix:, 0]
        live = size > 0
        small, large = _halves(size, live) if late else _parities(prefix, live)
        score, partner = _pairs(rows, small, large)
        limit = live.sum(dim=1) // 2
        count = torch.full_like(limit, r)
        if self.adaptive:
            close = (score > self.threshold(state.layer)).sum(dim=1)
            count = torch.minimum(count.maximum(close), limit)
        stays = live & (_ranks(score) >= count.unsqueeze(1))
        slot = _slots(stays, first=None if late else small) + prefix
        slot = torch.where(stays, slot, slot.gather(1, partner)).masked_fill(~live, -1)
        lead = torch.arange(prefix, device=slot.device).expand(state.batch, -1)
        counts = stays.sum(dim=1) + prefix if self.adaptive else None
        anchor = None if self.adaptive else _anchors(slot, stays, prefix, state.n - r)
        return TokenMap(torch.cat((lead, slot), dim=1), state.n - r, anchor=anchor, counts=counts)


def _halves(size: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) masks of the smaller and the larger half of the live tokens; padding, of size 0, ranks last."""
    rank = _ranks(size)
    total = live.sum(dim=1, keepdim=True)
    large = rank < total - total // 2
    return live & ~large, live & large


def _parities(prefix: int, live: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) masks of the live tokens at even and at odd positions of the sequence."""
    odd = (torch.arange(live.shape[1], device=live.device) + prefix) % 2 == 1
    return live & ~odd, live & odd


def _pairs(rows: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) cosine of each source with its best target, and the target; -inf for tokens that are no source."""
    cosine = (rows @ rows.transpose(1, 2)).masked_fill(~targets.unsqueeze(1), -math.inf)
    best = cosine.max(dim=2)
    return best.values.masked_fill(~sources, -math.inf), best.indices


def _ranks(score: Tensor) -> Tensor:
    """(B, n) place of each token in falling order."""
    order = stable_order(score, descending=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def _slots(stays: Tensor, first: Tensor | None) -> Tensor:
    """(B, n) slot of each token that stays: in order of position, those in `first` before all others (ToMe's order)."""
    if first is None:
        return stays.cumsum(dim=1) - 1
    ahead = stays & first
    others = stays & ~first
    return torch.where(ahead, ahead.cumsum(dim=1), ahead.sum(dim=1, keepdim=True) + others.cumsum(dim=1)) - 1


def _anchors(slot: Tensor, stays: Tensor, prefix: int, slots: int) -> Tensor:
    """(B, K) the token that stays in each slot; every slot has one."""
    place = torch.arange(slot.shape[1], device=slot.device) + prefix
    spare = torch.where(stays, slot, slots)
    anchor = torch.arange(slots + 1, device=slot.device).repeat(slot.shape[0], 1)
    return anchor.scatter(1, spare, place.expand_as(slot))[:, :slots]
