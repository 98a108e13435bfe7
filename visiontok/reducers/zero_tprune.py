"""Zero-TPrune: attention as a graph ranks tokens, keys tell which repeat each other; the rest leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.attention import Votes
from visiontok.ops.ordering import stable_order

__all__ = ["ZeroTPrune"]

_TINY = torch.finfo(torch.float32).tiny


class Importance(NamedTuple):
    """What the votes say.

    Attributes:
        score: (B, N) importance, root mean square over the heads in use; 0 for tokens that are gone.
        variance: (B, H) population variance of each head's signal over the tokens, in the scale of mean 1.
        used: (B, H) bool, the heads in use.
    """

    score: Tensor
    variance: Tensor
    used: Tensor


@dataclass(frozen=True)
class ZeroTPrune(Reducer):
    """Zero-TPrune (arXiv:2305.17328): training-free pruning by a weighted page rank on the attention graph.

    At each point, from the attention and keys of the block before: one vote orders the tokens; among the less important
    half those most similar to a token of the other half leave (S-stage); then `iters` votes among the survivors rank
    them and the least important leave (I-stage). Importance and variance are defined over the whole sequence; prefix
    tokens vote but never leave.

    A total budget (r, keep, tokens, gflops) splits in two: the S-stage takes up to `similar` tokens (at most half of
    them all), the I-stage the rest. `schedule` gives both by hand. The paper's DeiT-S setting, as recalled, is
    `{1: (1, 30, 10), 3: (0.9, 5, 10), 6: (0.8, 5, 10), 9: (0.7, 1, 10), 11: (1, 1, 10)}`.

    Args:
        schedule: `{layer: (retention, iters, r)}`: after `layer` blocks the S-stage removes r tokens, then the I-stage
            keeps the share `retention`, rounded to the nearest count, at least 1.
        iters: Votes of the I-stage: int, `{layer: int}`, or a list with one per block. Default: 30 in the first
            quarter of the model, 1 in the last, 5 between.
        boost: Whether the class token's first vote counts sqrt(N) times; False is the paper's "uni" variant.
        similar: Most tokens that the S-stage takes out of a total budget.
        feat: What is compared: `mean` (keys averaged over heads) or `concat`.
        v_min: Heads whose signal varies less are left out.
        v_max: Heads whose signal varies more are left out. If that leaves none, all are used.
    """

    name = "zero_tprune"
    card = Card(
        title="Zero-TPrune",
        summary="Ranks tokens by page rank on the attention graph and drops similar and unimportant ones.",
        paper="Wang et al., Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in "
        "Pre-Trained Transformers, CVPR 2024",
        url="https://arxiv.org/abs/2305.17328",
        year=2023,
        license="no public code",
        cons=(
            "No public code: this follows the paper's description, and its open points are our choices.",
            "Inherently sequential: `iters` rounds of voting; more than one form the whole attention map.",
            "Dropped tokens are lost for good; dense heads need restore.",
        ),
        official="none was released. Ours: signals have mean 1 (otherwise the paper's variance bounds exclude every "
        "head), the I-stage renormalises rows after the S-stage, counts round to nearest.",
    )
    site = Site.PRE
    budget_names = (*Reducer.budget_names, "schedule")

    schedule: Any = None
    iters: Any = None
    boost: bool = True
    similar: int = 10
    feat: str = "mean"
    v_min: float = 0.01
    v_max: float = 0.7

    def __post_init__(self) -> None:
        if self.feat not in ("mean", "concat"):
            raise ParameterError(f"zero_tprune: feat must be 'mean' or 'concat', got {self.feat!r}.")
        if not _whole(self.similar, 0):
            raise ParameterError(f"zero_tprune: similar must be an int >= 0, got {self.similar!r}.")
        turns = self.iters if isinstance(self.iters, (list, tuple)) else [self.iters]
        turns = list(self.iters.values()) if isinstance(self.iters, Mapping) else turns
        if self.iters is not None and not all(_whole(turn, 1) for turn in turns):
            raise ParameterError(f"zero_tprune: iters must be an int >= 1, or a list or dict, got {self.iters!r}.")
        if self.schedule is not None:
            rows = self.schedule.items() if isinstance(self.schedule, Mapping) else [(None, None)]
            if not all(_whole(layer, 0) and _entry(row) for layer, row in rows):
                said = "{layer: (retention in (0, 1], iters >= 1, r >= 0)}"
                raise ParameterError(f"zero_tprune: schedule must be {said}, got {self.schedule!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_VOTE, Signal.KEY)

    def layers(self, depth: int) -> Sequence[int]:
        # The paper's layers 1, 3, 6, 9, 11 of 12, scaled.
        places = {1, depth // 4, depth // 2, depth * 3 // 4, depth - 1}
        return tuple(sorted(layer for layer in places if 1 <= layer < depth))

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.schedule is None:
            return super().budgets(depth)
        return {
            layer: Budget(r=r) if retention == 1 else Budget(ratio=float(retention))
            for layer, (retention, _, r) in sorted(self.schedule.items())
        }

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.schedule is None or where.layer not in self.schedule:
            return super().removed(n, budget, where, prefix)
        retention, _, r = self.schedule[where.layer]
        left = n - min(r, n // 2)
        return n - min(max(math.floor(left * retention + 0.5), 1), left)

    def turns(self, where: Where) -> int:
        """Votes of the I-stage at a place."""
        if self.schedule is not None and where.layer in self.schedule:
            return self.schedule[where.layer][1]
        given = self.iters
        if isinstance(given, (list, tuple)):
            given = given[where.layer - 1] if 0 < where.layer <= len(given) else None
        if isinstance(given, Mapping):
            given = given.get(where.layer)
        if given is not None:
            return given
        return 30 if where.layer < where.depth / 4 else 5 if where.layer < where.depth * 3 / 4 else 1

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed, n, prefix = self.amount(budget, state), state.items, state.prefix
        if removed == 0:
            return None
        where = Where(state.layer, max(state.depth, state.layer + 1))
        own = self.schedule.get(state.layer) if self.schedule is not None else None
        repeats = min(self.similar if own is None else own[2], n // 2, removed)
        votes, turns = signals.ATTN_VOTE, self.turns(where)
        votes.expect(1 if removed == repeats else 1 + turns)
        everyone = torch.ones(state.batch, state.n, dtype=votes.dtype, device=state.device)
        score = self.importance(votes, everyone, state.n, prefix).score
        live = everyone.scatter(1, self.redundant(signals.KEY, score, repeats, prefix), 0.0)
        rank = live
        if removed > repeats:
            # Importance is not negative, so tokens that left already come last.
            rank = self.importance(votes, live, state.n - repeats, prefix, turns).score.masked_fill(live == 0, -1.0)
        kept = stable_order(rank[:, prefix:], descending=True)[:, : n - removed]
        return TokenMap.keep(kept.sort(dim=-1).values + prefix, state.n, prefix)

    @torch.no_grad()
    def importance(self, votes: Votes, live: Tensor, count: int, prefix: int, turns: int = 1) -> Importance:
        """Importance after some rounds of voting on the attention among the live tokens, its rows summing to one.

        Args:
            votes: The attention of all tokens.
            live: (B, N) 1 for tokens that take part, 0 for those that left.
            count: Number of live tokens, prefix included.
            prefix: Leading tokens; with 0 there is no class token to boost.
            turns: Rounds.
        """
        first = live * (count / (count - 1 + math.sqrt(count)) if self.boost and prefix else 1.0)
        if self.boost and prefix:
            first = torch.cat((first[:, :1] * math.sqrt(count), first[:, 1:]), dim=1)
        if turns == 1:
            signal = votes.vote(first.unsqueeze(1), None if count == live.shape[-1] else live)
            live = live.unsqueeze(1)
        else:
            live, signal = live.unsqueeze(1), first.unsqueeze(1).expand(votes.shape)
            # The restricted map is never formed: its row sums, taken once, and masked votes say the same.
            spent = votes.attend(live.unsqueeze(-1).expand(*votes.shape, 1)).squeeze(-1).clamp_min(_TINY)
            for _ in range(turns):
                signal = votes.vote(signal / spent) * live
        mean = signal.sum(dim=-1, keepdim=True) / count
        variance = ((signal - mean).square() * live).sum(dim=-1) / count
        used = (variance >= self.v_min) & (variance <= self.v_max)
        used = used | ~used.any(dim=-1, keepdim=True)
        share = used.to(signal.dtype) / used.sum(dim=-1, keepdim=True)
        return Importance((signal.square() * share.unsqueeze(-1)).sum(dim=1).sqrt(), variance, used)

    def redundant(self, key: Tensor, score: Tensor, r: int, prefix: int) -> Tensor:
        """(B, r) int64 tokens of the less important half that are most similar to one of the other half."""
        group_a, best = self.similarity(key, score, prefix)
        return group_a.gather(1, stable_order(best, descending=True)[:, :r])

    @torch.no_grad()
    def similarity(self, key: Tensor, score: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """The less important half of the tokens and how similar each is to its nearest token of the other half.

        Returns:
            (B, n // 2) int64 tokens, most important first, and (B, n // 2) cosine.
        """
        ranked = stable_order(score[:, prefix:], descending=True) + prefix
        kept = ranked.shape[1] - ranked.shape[1] // 2
        rows = matching.unit(key.mean(dim=1) if self.feat == "mean" else key.transpose(1, 2).flatten(2))
        return ranked[:, kept:], matching.best_match(rows, ranked[:, kept:], ranked[:, :kept])[0]


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _entry(row: Any) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != 3:
        return False
    share, turns, r = row
    fits = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
    return fits and _whole(turns, 1) and _whole(r, 0)
