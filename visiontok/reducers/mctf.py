"""MCTF: tokens fuse in both directions by similarity, attention and size together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["MCTF"]

# Smallest positive normal fp32 number: a token that nobody looks at must not divide by zero.
_TINY = torch.finfo(torch.float32).tiny
# The released code stops reducing at this many tokens.
_LEAST = 10


@dataclass(frozen=True)
class MCTF(Reducer):
    """Multi-Criteria Token Fusion with one-step-ahead attention (arXiv:2403.10030).

    Pairs of even and odd tokens are rated by ((cos + 1) / 2)^(1/tau_sim), by how little attention both receive and by
    how small both are; half of the budget leaves the even set, then half the odd set. Values are averaged by attention
    times size.

    Args:
        r: Tokens removed per block, from block 1 on. The released fast schedule is `keep={3: .65, 6: .65, 9: .65}`.
        tau_sim: Temperature of the similarity; 0 leaves it out.
        tau_info: Temperature of the attention received; 0 leaves it out.
        tau_size: Temperature of the size; 0 leaves it out.
        bidirection: Whether the odd set gives tokens too.
        one_step_ahead: Whether the attention is that of the block to come; else that of the block just run.
        prop_attn: Whether attention adds log(size) to the keys.
        compat: `"official"` never goes below 10 tokens, prefix included.

    Raises:
        ParameterError: A negative temperature.
    """

    name = "mctf"
    card = Card(
        title="Multi-Criteria Token Fusion",
        summary="Matches in both directions by similarity, informativeness and size, with the next block's attention.",
        paper="Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention, CVPR 2024",
        url="https://arxiv.org/abs/2403.10030",
        year=2024,
        license="MIT",
        cons=(
            "Published accuracies need 30 epochs of fine-tuning.",
            "Looking ahead costs one more projection to queries and keys and the column sums of the attention.",
            "At most half of the patch tokens can leave in one block.",
        ),
        official="reuses the merged attention map for the block's own attention; here attention is computed anew from "
        "the merged tokens, as its 'precise' variant does. Ties and the order of unmerged tokens are stable here.",
    )
    site = Site.PRE

    tau_sim: float = 1
    tau_info: float = 20
    tau_size: float = 40
    bidirection: bool = True
    one_step_ahead: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        for name in ("tau_sim", "tau_info", "tau_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ParameterError(f"mctf: {name} must be a number >= 0 (0 leaves it out), got {value!r}.")
        super().__post_init__()

    @property
    def look(self) -> str:  # type: ignore[override]
        return "ahead" if self.one_step_ahead else "behind"

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.ATTN_VOTE)

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def layers(self, depth: int) -> range:
        return range(1, depth)

    def limit(self, n: int) -> int:
        return n // 2

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        most = super().removed(n, budget, where, prefix)
        return min(most, max(n + prefix - _LEAST, 0)) if self.compat == "official" else most

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        hidden = signals.HIDDEN.detach()
        attention = self.attention(signals, hidden)
        even, odd = self.split(state)
        size = torch.ones_like(attention) if state.size is None else state.size.squeeze(-1).to(attention.dtype)
        places = self.places(self.scores(hidden, attention, size, even, odd), even, odd, r, state.prefix)
        return TokenMap(places.assign, places.K, weight=attention * size, anchor=places.anchor, form=places.form)

    def attention(self, signals: Signals, hidden: Tensor) -> Tensor:
        """(B, N) attention that each token receives, mean over heads and queries."""
        everyone = hidden.new_ones(hidden.shape[0], 1, hidden.shape[1])
        received = signals.ATTN_VOTE.vote(everyone).detach().mean(dim=1) / hidden.shape[1]
        return received.clamp_min(_TINY)

    def split(self, state: TokenState) -> tuple[Tensor, Tensor]:
        """Positions of the even and of the odd tokens, without the prefix."""
        place = torch.arange(state.n, device=state.device)
        first_odd = matching.first_odd(state.prefix)
        return place[state.prefix + state.prefix % 2 :: 2], place[first_odd::2]

    def scores(self, hidden: Tensor, attention: Tensor, size: Tensor, even: Tensor, odd: Tensor) -> Tensor:
        """(B, Ne, No) logarithm of how well each even token fits each odd one: products of many powers would vanish."""
        rows = matching.unit(hidden)
        dull = torch.zeros_like(attention)
        for tau, value in ((self.tau_info, attention), (self.tau_size, size)):
            if tau:
                dull = dull - value.clamp_min(_TINY).log() / tau
        pairs = dull[:, even].unsqueeze(2) + dull[:, odd].unsqueeze(1)
        if self.tau_sim:
            cosine = rows[:, even] @ rows[:, odd].transpose(1, 2)
            pairs = pairs + ((cosine + 1) / 2).clamp_min(_TINY).log() / self.tau_sim
        return pairs

    def places(self, scores: Tensor, even: Tensor, odd: Tensor, r: int, prefix: int) -> TokenMap:
        """Where tokens go: r // 2 even tokens join odd ones, then the rest of r odd tokens join even ones left."""
        first = r // 2 if self.bidirection else r
        batch = scores.shape[0]
        best, partner = scores.max(dim=2)
        ranked = stable_order(best, descending=True)
        leaving, staying = ranked[:, :first], ranked[:, first:].sort(dim=1).values
        order = torch.cat((even[staying], odd.expand(batch, -1)), dim=1)
        away = TokenMap.merge(even[leaving], odd[partner.gather(1, leaving)], order, prefix)
        if not self.bidirection:
            return away
        # The scores are those before the first half, as in the released code; slots are those after it.
        left = scores.gather(1, staying.unsqueeze(2).expand(-1, -1, scores.shape[2])).transpose(1, 2)
        best, partner = left.max(dim=2)
        ranked = stable_order(best, descending=True)
        count = staying.shape[1]
        leaving, rest = ranked[:, : r - first], ranked[:, r - first :]
        slots = torch.arange(prefix, prefix + count, device=scores.device).expand(batch, -1)
        order = torch.cat((slots, rest + prefix + count), dim=1)
        back = TokenMap.merge(leaving + prefix + count, partner.gather(1, leaving) + prefix, order, prefix)
        return away.then(back)
