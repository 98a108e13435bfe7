"""EMS: evict the least important entries of the KV cache, then merge the next ones into those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import CacheReducer
from visiontok.errors import ParameterError
from visiontok.ops.constants import arange_row
from visiontok.ops.matching import best_match, unit
from visiontok.ops.ordering import stable_order

__all__ = ["EMS"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class EMS(CacheReducer):
    """Evict-then-merge with global and local importance (arXiv:2412.08521), for each key-value head by itself.

    An entry's importance is the attention received from all queries plus that from the last `window` ones, each divided
    by its mean over the entries, so that neither drowns the other. The K best entries stay as centres. The next ones,
    up to the best `pool * K`, join the centre with the most similar key, keys and values averaged by importance, unless
    even that cosine is below `threshold`. All others are evicted.

    Args:
        window: Last queries of the prompt that the local part looks at.
        pool: Entries that survive eviction, as a multiple of those kept; 1 merges nothing.
        threshold: Least cosine of two keys to be merged.
        over: `visual` or `all`.

    Raises:
        ParameterError: `window` below 1, `pool` below 1, or `threshold` outside [-1, 1].
    """

    name = "ems"
    card = Card(
        title="EMS, evict-then-merge (experimental)",
        summary="Evicts unimportant cache entries and merges middling ones into the important ones, head by head.",
        paper="Li et al., EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on "
        "Global-Local Importance, 2024",
        url="https://arxiv.org/abs/2412.08521",
        year=2024,
        license="no public code of the authors",
        cons=(
            "Experimental: written from the paper's abstract. How scores are joined, the pool and the threshold are "
            "ours, and not checked against the authors' results.",
            "Averages keys that were rotated for different positions.",
            "Every head keeps equally many entries, because a ragged cache would save no memory.",
            "Saves cache memory; prefill costs more, and decoding hardly gets faster.",
        ),
        official="none. The paper adapts the merging per head and gives what joins no centre to a class of zeros.",
    )

    window: int = 32
    pool: float = 2.0
    threshold: float = 0.6

    def __post_init__(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ParameterError(f"{self.name}: window must be an int >= 1, got {self.window!r}.")
        if not (number(self.pool) and self.pool >= 1):
            raise ParameterError(f"{self.name}: pool must be at least 1, got {self.pool!r}.")
        if not (number(self.threshold) and -1 <= self.threshold <= 1):
            raise ParameterError(f"{self.name}: threshold must be in [-1, 1], got {self.threshold!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_SUM, Signal.KEY)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        n = state.items
        count = n - self.amount(budget, state)
        if count == n:
            return None
        received = signals.ATTN_SUM
        score = _levelled(received.sum()) + _levelled(received.sum(last=self.window))
        order = stable_order(score, descending=True)
        kept = order[:, :count].sort(dim=1).values
        joining = order[:, count : max(min(int(self.pool * count), n), count)]
        slots = arange_row(0, count, score.device).expand(score.shape[0], -1)
        assign = torch.full_like(order, -1).scatter(1, kept, slots)
        if joining.shape[1]:
            cosine, centre = best_match(unit(signals.KEY.squeeze(1)), joining, kept)
            assign = assign.scatter(1, joining, centre.masked_fill(cosine < self.threshold, -1))
        # An entry that nobody looked at still has its own value when it is a centre.
        return TokenMap(assign, count, weight=score.clamp_min(_TINY), anchor=kept)


def _levelled(received: Tensor) -> Tensor:
    return received / received.mean(dim=1, keepdim=True).clamp_min(_TINY)
