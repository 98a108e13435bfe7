"""ALGM: neighbouring tokens merge in small windows first, similar tokens anywhere merge later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.grids import Windows
from visiontok.ops.joining import join
from visiontok.ops.ordering import stable_order

__all__ = ["ALGM"]


@dataclass(frozen=True)
class ALGM(Reducer):
    """Adaptive Local-then-Global Merging (arXiv:2406.09936).

    The first selected layer averages windows of the grid whose tokens are alike, judged by the mean cosine of all
    pairs in the window; the other layers merge as ToMe does, on hidden states. By default both take exactly r tokens,
    the most similar windows (the last of them in part, its first tokens into its last one) or pairs first. `adaptive`
    is the paper's rule by thresholds, decided per sample.

    Args:
        r: Tokens removed at each selected layer.
        selected_layers: Layers counted from 1; the first merges locally. Default: 1 and a third of the depth + 1.
        threshold: Mean cosine from which a window merges, if adaptive.
        window_size: (height, width) of a window, both at least 2; windows cut by the border count as smaller ones.
        adaptive: Merge every window of at least `threshold`, and later every pair of at least mean + std / layer of
            the best similarities; r is then the least number removed.
        compact: In eager mode, cut slots that no sample of the batch uses (waits for the device).
        compat: `"official"` is adaptive with the released batch coupling: thresholds of the whole batch, and every
            sample merges as many as the one with fewest.
    """

    name = "algm"
    card = Card(
        title="Adaptive Local-then-Global Token Merging",
        summary="Averages uniform 2 x 2 windows after the first attention, then merges similar tokens globally.",
        paper="Norouzi et al., ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation with "
        "Plain Vision Transformers, CVPR 2024",
        url="https://arxiv.org/abs/2406.09936",
        year=2024,
        license="MIT",
        cons=(
            "The first step needs the tokens as a grid.",
            "A fixed budget can take at most half of the tokens at one layer; only adaptive windows go further.",
            "adaptive=True gives counts that differ per sample: batches are padded to the longest.",
        ),
        official="takes the smallest count of the batch, so results depend on batch mates; needs grids that windows "
        "divide; passes sizes to an attention that ignores them.",
    )

    selected_layers: Any = None
    threshold: float = 0.88
    window_size: Any = (2, 2)
    adaptive: bool = False
    compact: bool = True

    def __post_init__(self) -> None:
        layers, window = self.selected_layers, self.window_size
        if layers is not None and not (_ints(layers, 1) and sorted(set(layers)) == list(layers)):
            raise ParameterError(f"algm: selected_layers must be ascending ints >= 1, got {layers!r}.")
        if not (_ints(window, 2) and len(window) == 2):
            raise ParameterError(f"algm: window_size must be (height, width), both at least 2, got {window!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.HIDDEN, Signal.GRID

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.adaptive or self.compat == "official"

    @property
    def always(self) -> bool:  # type: ignore[override]
        return self.ragged

    def layers(self, depth: int) -> Sequence[int]:
        chosen = (1, depth // 3 + 1) if self.selected_layers is None else self.selected_layers
        return sorted({layer - 1 for layer in chosen if layer <= depth})

    def limit(self, n: int) -> int:
        return n // 2

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if state.items < 2 or (r == 0 and not self.ragged):
            return None
        first = min(self.layers(max(state.depth, state.layer + 1)), default=0)
        rows = matching.unit(signals.HIDDEN.detach())
        if state.layer == first:
            windows = Windows.of(signals.GRID, self.window_size, rows.device)
            target, order = self.local(rows[:, state.prefix :], windows, r)
        else:
            live = state.size[..., 0] > 0 if state.padded and state.size is not None else None
            target, order = self.globally(rows, state.prefix, r, state.layer + 1, live)
        joined, slots = join(target, order, state.prefix), state.n - r
        counts = joined.counts if self.ragged else None
        return TokenMap(joined.assign, slots, anchor=joined.order[:, :slots], counts=counts, form="complete")

    def local(self, rows: Tensor, windows: Windows, r: int) -> tuple[Tensor, Tensor]:
        """Merges windows.

        Args:
            rows: (B, n, C) unit rows of the grid's tokens.
            windows: Of the grid.
            r: Least number of tokens to remove; the number, unless adaptive.

        Returns:
            (B, n) the token that each joins, and (B, n) the order of slots: merged windows, most similar first, then
            the other tokens.
        """
        batch, length, _ = rows.shape
        alike = windows.similarity(rows)
        ranked = stable_order(alike, descending=True)
        room = (windows.sizes - 1).expand(batch, -1).gather(1, ranked)
        before = room.cumsum(dim=1) - room
        taken = torch.minimum((r - before).clamp_min(0), room)
        if self.ragged:
            near = alike.gather(1, ranked) >= self.threshold
            if self.compat == "official":
                fewest = near.sum(dim=1).min()
                near = torch.arange(near.shape[1], device=near.device).expand(batch, -1) < fewest
            taken = torch.where(near, room, taken)
        place = torch.arange(length, device=rows.device).expand(batch, -1)
        last = windows.last.expand(batch, -1)
        leaves = torch.zeros_like(ranked).scatter(1, ranked, taken).gather(1, windows.window.expand(batch, -1))
        target = torch.where(windows.rank < leaves, last.gather(1, windows.window.expand(batch, -1)), place)
        ends = last.gather(1, ranked)
        first = torch.where(taken > 0, torch.arange(ranked.shape[1], device=rows.device), ends + length)
        return target, stable_order((place + length).scatter(1, ends, first))

    def globally(
        self, rows: Tensor, prefix: int, r: int, number: int, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Merges tokens at even positions into tokens at odd positions.

        Args:
            rows: (B, N, C) unit rows, prefix included.
            prefix: Leading tokens to protect.
            r: Least number of tokens to remove; the number, unless adaptive.
            number: Layer counted from 1.
            live: (B, N) bool, False for padding.

        Returns:
            As `local`; slots are the unmerged tokens, then the destinations.
        """
        batch, length, _ = rows.shape
        place = torch.arange(length - prefix, device=rows.device)
        odd = matching.first_odd(prefix) - prefix
        even = slice(1 - odd, None, 2)
        a, b = place[even], place[odd::2]
        cosine = rows[:, prefix:][:, even] @ rows[:, prefix + odd :: 2].transpose(1, 2)
        here = torch.ones_like(cosine[..., 0], dtype=torch.bool)
        if live is not None:
            here = live[:, prefix:][:, even]
            cosine = cosine.masked_fill(~live[:, None, prefix + odd :: 2], -2)
        score, partner = cosine.max(dim=-1)
        score = score.masked_fill(~here, -3)
        ranked = stable_order(score, descending=True)
        rank = torch.empty_like(ranked).scatter(1, ranked, torch.arange(len(a), device=rows.device).expand(batch, -1))
        leaves = rank < r
        if self.ragged:
            leaves = (rank < self._above(score, here, prefix, number).clamp_min(r)) | ~here
        target = place.expand(batch, -1).clone()
        target[:, even] = torch.where(leaves, b[partner], a)
        order = torch.cat((a.expand(batch, -1) if prefix > 0 else a[ranked], b.expand(batch, -1)), dim=1)
        return target, order

    def _above(self, score: Tensor, here: Tensor, prefix: int, number: int) -> Tensor:
        known, share = score.masked_fill(~here, 0), here.to(score.dtype)
        if self.compat == "official" and prefix == 0:
            # The released code leaves out what it takes for the class token.
            known, share = known[:, 1:], share[:, 1:]
        total = share.sum(dim=1, keepdim=True)
        mean = known.sum(dim=1, keepdim=True) / total.clamp_min(1)
        square = ((known - mean).square() * share).sum(dim=1, keepdim=True)
        spread = (square / (total - 1).clamp_min(1)).sqrt()
        if self.compat == "official":
            mean, spread = mean.mean(), spread.mean()
        count = (score >= mean + spread / number).sum(dim=1, keepdim=True)
        return count.amin(dim=0, keepdim=True) if self.compat == "official" else count


def _ints(values: Any, low: int) -> bool:
    whole = isinstance(values, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return whole and len(values) > 0 and min(values) >= low
