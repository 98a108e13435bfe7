"""ATS: adaptive token sampling, by inverse transform of the class token's attention. Counts differ per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap, with_prefix
from visiontok.errors import ParameterError
from visiontok.ops.constants import arange_row, shape_constant
from visiontok.ops.dispatch import tracing
from visiontok.ops.ordering import stable_order
from visiontok.reducers.evit import class_attention

__all__ = ["ATS", "ATSv2"]

_TINY = torch.finfo(torch.float32).tiny
# How many non-prefix tokens the plan has at the next point; the batch may have fewer.
_PLANNED = "ats.planned"


class Sampling(NamedTuple):
    """One round of inverse transform sampling.

    Attributes:
        order: (B, n) int64 non-prefix tokens in the order of the cdf.
        cdf: (B, n) cumulated scores.
        ys: (B, M) where the inverse is evaluated.
        picked: (B, M) int64 rank nearest to each sample.
        kept: (B, n) bool, ranks that were picked at least once.
    """

    order: Tensor
    cdf: Tensor
    ys: Tensor
    picked: Tensor
    kept: Tensor


def nearest(cdf: Tensor, ys: Tensor) -> Tensor:
    """(B, M) int64 index of the value of a non-decreasing cdf (B, n) nearest to each sample, the first on ties.

    Costs M log n instead of the M x n differences, and gives the same indices as comparing all of them.
    """
    if tracing():
        # Exporters know no binary search.
        return (ys.unsqueeze(2) - cdf.unsqueeze(1)).abs().argmin(dim=2)
    last = cdf.shape[1] - 1
    above = torch.searchsorted(cdf, ys).clamp_(max=last)
    over = (cdf.gather(1, above) - ys).abs_()
    under = (ys - cdf.gather(1, (above - 1).clamp_(min=0))).abs_()
    best = torch.minimum(over, under)
    # Differences that round to the same number are a tie too, so the first index is searched among all: it is the
    # number of values that lie further below their sample.
    steps = last.bit_length()
    padded = F.pad(cdf, (0, 2**steps - 1 - last), value=torch.inf)
    found = torch.zeros_like(above)
    for bit in reversed(range(steps)):
        far = ys - padded.gather(1, found + (2**bit - 1)) > best
        found = torch.where(far, found + 2**bit, found)
    return found.clamp_(max=last)


def _spread(least: Tensor, samples: int) -> Tensor:
    # (B, M) equal steps from `least` to one. Rounded as the released code does it: near ties decide between tokens.
    if samples == 1:
        return torch.ones_like(least)
    line, steps = _line(samples, least.device)
    return least + (line - least * steps) / (samples - 1)


@shape_constant
def _line(samples: int, device: torch.device) -> Tensor:
    # (2, M): the steps as the released code rounds them, and exactly.
    line = torch.linspace(0, 1, samples, device=device, dtype=torch.float32)
    return torch.stack((line * (samples - 1), torch.arange(samples, device=device, dtype=torch.float32)))


def selection(sampled: Sampling, cap: int, state: TokenState, memo: Mapping[str, Any]) -> TokenMap:
    """The map that keeps what was picked, in the order of the cdf, in `cap` slots of which each sample fills some."""
    batch, prefix = sampled.kept.shape[0], state.prefix
    counts = sampled.kept.sum(dim=1)
    order = stable_order(sampled.kept.to(torch.int8), descending=True)[:, :cap]
    index = sampled.order.gather(1, order) + prefix
    slots = arange_row(0, prefix + cap, index.device)
    live = slots < counts.unsqueeze(1) + prefix
    anchor = with_prefix(index, prefix)
    assign = torch.full((batch, state.n), -1, device=index.device).scatter(1, anchor, torch.where(live, slots, -1))
    return TokenMap(assign, prefix + cap, anchor=anchor, counts=counts + prefix, memo=memo, form="select")


def alive(state: TokenState) -> Tensor | None:
    """(B, n) bool: which non-prefix tokens are no padding, or None if none can be."""
    return state.size[:, state.prefix :, 0] > 0 if state.padded and state.size is not None else None


@dataclass(frozen=True)
class ATS(Reducer):
    """Adaptive Token Sampling (arXiv:2111.15667).

    Tokens are scored by class attention times the norm of their value, sorted, cumulated, and sampled at equal steps of
    the cumulated score. A token that is hit once or more stays, so peaked attention keeps few tokens. Slots follow
    ascending scores. Nothing depends on the other images of a batch.

    Args:
        r, keep, tokens, gflops: Here the number of samples is what the budget leaves: a static cap on the tokens kept,
            of which each image uses some. Without a budget there is one sample per non-prefix token of the un-reduced
            input, the released setting, and nothing but the image decides how many stay.
        ats_blocks: Blocks that sample. Default: the last three quarters (3 ... 11 of 12), as released.
        compact: Whether, where that is possible (not while compiling or exporting), the longest sample of the batch
            sets the length; results stay the same, with `compat="official"` only for `compact=False`.
        compat: `"official"` drops all tokens when two are left (the released duplicate test), and never keeps the
            lowest score of the longest image of a batch (the released `DROP_TOKENS`).
    """

    name = "ats"
    card = Card(
        title="Adaptive Token Sampling",
        summary="Samples tokens by the cumulated class attention times value norm; each image keeps its own number.",
        paper="Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022",
        url="https://arxiv.org/abs/2111.15667",
        year=2021,
        license="Apache-2.0",
        cons=(
            "Counts differ per image, so a batch runs at its longest image and needs a mask; compiled models run at "
            "the static cap.",
            "Without a budget the saving depends on the data and cannot be planned.",
            "Needs a class token; dense heads need restore.",
        ),
        official="cannot run with a budget, depends on batch mates with DROP_TOKENS, loses every token when two are "
        "left, smooths the softmax by 1e-6; here a budget caps the samples, and a single token stays.",
    )
    spread = "ratio"
    ragged = True

    ats_blocks: Any = None
    compact: bool = True

    def __post_init__(self) -> None:
        blocks = self.ats_blocks
        if blocks is not None:
            listed = isinstance(blocks, (list, tuple))
            if not listed or not all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in blocks):
                raise ParameterError(f"{self.name}: ats_blocks must be a list of ints >= 0, got {blocks!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX, Signal.VALUE)

    @property
    def always(self) -> bool:  # type: ignore[override]
        # Also where a shortened batch has nothing left to remove: its images must fare as in any other batch.
        given = self.r if self.keep is None else self.keep
        if given is None:
            return self._adaptive or not self._budgetless
        values = list(given.values()) if isinstance(given, Mapping) else given
        listed = values if isinstance(values, (list, tuple)) else [values]
        return any(value > 0 if self.keep is None else not isinstance(value, float) or value < 1 for value in listed)

    @property
    def _budgetless(self) -> bool:
        return self.r is None and self.keep is None and self.gflops is None and self.tokens is None

    @property
    def _adaptive(self) -> bool:
        return self._budgetless

    def layers(self, depth: int) -> Sequence[int]:
        return range(depth // 4, depth) if self.ats_blocks is None else sorted(set(self.ats_blocks))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        planned = state.memo.get(_PLANNED, state.items)
        samples = self._samples(budget, state, planned)
        if samples is None or state.items < 2:
            return None
        memo = {_PLANNED: min(planned, samples)}
        tm = selection(self.sample(signals, state, samples), min(state.items, samples), state, memo)
        return self.dressed(tm, state)

    def dressed(self, tm: TokenMap, state: TokenState) -> TokenMap:
        """The map with what a variant's padding holds."""
        return tm

    def _samples(self, budget: int | None, state: TokenState, planned: int) -> int | None:
        # `planned` tokens would be here without compaction. Counting from the actual ones would let the longest image
        # of a batch decide for the others.
        removed, depth = self.amount(budget, state), max(state.depth, state.layer + 1)
        if removed == 0 and self._adaptive:
            return max(state.n0 - state.prefix, 1)
        if self.r is not None or self.keep is not None:
            own = self.budgets(depth).get(state.layer, Budget())
            where = Where(state.layer, depth)
            if removed == self.removed(state.items, own, where, state.prefix):
                removed = self.removed(planned, own, where, state.prefix)
        return planned - removed if removed > 0 else None

    @torch.no_grad()
    def sample(self, signals: Signals, state: TokenState, samples: int) -> Sampling:
        """Picks ranks of the ascending scores.

        Args:
            signals: ATTN_PREFIX and VALUE.
            state: The tokens' history: what is padding, and how many there were at first.
            samples: M, number of samples.
        """
        score = self.score(signals, state)
        live, n = alive(state), state.items
        order = stable_order(score if live is None else score.masked_fill(~live, -1.0))
        cdf = score.gather(1, order).cumsum(dim=1)
        # The cdf starts at zero, which drops the lowest score, until something left: after that the padding that the
        # released code keeps is its zero. Its DROP_TOKENS takes the padding of this batch instead.
        most = n if self.compat == "official" else state.n0 - state.prefix
        shown = count = None
        start = cdf[:, :1] if n == most else cdf.new_zeros(())
        if live is not None:
            shown, count = live.gather(1, order), live.sum(dim=1, keepdim=True)
            start = cdf[:, :1].where(count == most, cdf.new_zeros(()))
        cdf = (cdf - start) / (cdf[:, -1:] - start).clamp_min(_TINY)
        cdf = cdf if shown is None else cdf.masked_fill(~shown, 0.0)
        ys = _spread(cdf.masked_fill(cdf <= 0, 1.0).amin(dim=1, keepdim=True), samples)
        picked = nearest(cdf, ys)
        if count is not None:
            # Padding comes first and is never picked.
            picked = torch.maximum(picked, n - count)
        kept = torch.zeros_like(order, dtype=torch.uint8).scatter(1, picked.clamp(max=n - 1), 1).bool()
        if self.compat == "official" and n == 2:
            kept = torch.zeros_like(kept)
        return Sampling(order, cdf, ys, picked, kept if shown is None else kept & shown)

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        """(B, n) share of each non-prefix token in the class attention times value norm."""
        norm = torch.linalg.vector_norm(signals.VALUE[:, :, state.prefix :], dim=(1, 3))
        score = class_attention(signals, state, self.name).sum(dim=1) * norm
        total = score.sum(dim=1, keepdim=True)
        return torch.where(total > 0, score / total.clamp_min(_TINY), 1.0 / score.shape[1])


@dataclass(frozen=True)
class ATSv2(ATS):
    """ATS as vit-pytorch, TokenReduction and CLCA have it: no sorting, value norms per head, samples inside the steps.

    Scores are cumulated in sequence order and sampled at (2i + 1) / 2M, so slots keep the order of the sequence and the
    lowest score may stay (arXiv:2501.00243 uses it).

    Args:
        r, keep, tokens, gflops: What the budget leaves is M, the number of samples and the static cap.
        ats_blocks: Blocks that sample. Default: a quarter, half and three quarters (3, 6, 9 of 12).
        compact: See `ATS`.
        compat: `"official"` places samples as the released code's float steps do (mostly one fewer) and lets padding in
            the middle of the sequence attract samples, by which it becomes a token again.
    """

    name = "ats_v2"
    card = Card(
        title="Adaptive Token Sampling, unsorted variant",
        summary="Samples tokens by class attention times value norm, cumulated in sequence order.",
        paper="Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022; as used by CLCA, "
        "ICASSP 2025",
        url="https://arxiv.org/abs/2501.00243",
        year=2025,
        license="MIT",
        cons=(
            "Not the published ATS: neighbours in the sequence compete for a sample.",
            "Counts differ per image, so a batch runs at its longest image and needs a mask.",
            "Needs a class token; dense heads need restore.",
        ),
        official="steps made by a float arange yield one sample more or less depending on rounding; here always M.",
    )

    @property
    def _adaptive(self) -> bool:
        return False

    def layers(self, depth: int) -> Sequence[int]:
        return quarters(depth) if self.ats_blocks is None else super().layers(depth)

    @torch.no_grad()
    def sample(self, signals: Signals, state: TokenState, samples: int) -> Sampling:
        """Picks positions of the sequence; see `ATS.sample`."""
        score, live = self.score(signals, state), alive(state)
        order = arange_row(0, state.items, score.device).expand(score.shape[0], -1)
        ys = self.steps(samples, score).repeat(score.shape[0], 1)
        if self.compat == "official":
            cdf = score.cumsum(dim=1)
            # Not monotone with padding in the middle. What cdist rounds decides near ties.
            cdf = cdf if live is None else cdf + 0.1 * ~live
            picked = torch.cdist(ys.unsqueeze(2), cdf.unsqueeze(2)).argmin(dim=2)
            live = None
        else:
            cdf = (score if live is None else score.masked_fill(~live, 0.0)).cumsum(dim=1)
            picked = nearest(cdf, ys)
        kept = torch.zeros_like(cdf, dtype=torch.bool).scatter(1, picked, True)
        return Sampling(order, cdf, ys, picked, kept if live is None else kept & live)

    def steps(self, samples: int, like: Tensor) -> Tensor:
        """(M,) where the inverse is evaluated, for M samples."""
        if self.compat == "official":
            ends = 1 / (2 * samples), (2 * samples - 1) / (2 * samples)
            found = torch.arange(*ends, 1 / samples, device=like.device, dtype=like.dtype)
            return found if len(found) else torch.full((1,), 0.5, device=like.device, dtype=like.dtype)
        return (2 * torch.arange(samples, device=like.device, dtype=like.dtype) + 1) / (2 * samples)

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        """(B, n) class attention times value norm, summed over heads, as shares."""
        norm = torch.linalg.vector_norm(signals.VALUE[:, :, state.prefix :], dim=3)
        score = (class_attention(signals, state, self.name) * norm).sum(dim=1)
        return score / (score.sum(dim=1, keepdim=True) + 1e-6)

    def dressed(self, tm: TokenMap, state: TokenState) -> TokenMap:
        if self.compat != "official" or tm.live is None:
            return tm
        # Padding is a copy of the class token whose queries see all keys alike; means over tokens count it.
        live = tm.live.unsqueeze(-1)
        anchor = tm.kept.masked_fill(~live.squeeze(-1), 0)
        soft = torch.zeros(state.batch, tm.K, state.n, device=anchor.device).scatter(2, anchor.unsqueeze(-1), 1.0)
        return replace(tm, soft=soft, mass=torch.ones_like(tm.assign, dtype=soft.dtype), mute=True)
