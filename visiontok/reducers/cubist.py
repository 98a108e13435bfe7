"""CubistMerge: every row of the grid loses as many tokens, then every column, so a grid remains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap, with_prefix
from visiontok.errors import ParameterError
from visiontok.ops.grids import lines, row_slots, squarest
from visiontok.ops.ordering import stable_order

__all__ = ["CubistMerge"]


@dataclass(frozen=True)
class CubistMerge(Reducer):
    """CubistMerge (arXiv:2509.21764): grid-preserving merging for windowed and position-biased backbones.

    In each row the tokens at odd positions are matched with their more similar direct neighbour (cosine of hidden
    states), the best `rw` of them merge; the same then in each column of what is left, `rh` of them. A merged token
    takes, per channel, the entry of largest magnitude. An (h, w) grid becomes (h - rh, w - rw).

    Args:
        r, keep: Budget; removes at least as many tokens, the fewest that leave a grid whose sides shrink evenly.
        rh: Rows to remove (with or without `rw`), at most half of them. Excludes the other budgets.
        rw: Columns to remove, at most half of them.
        loc: The block before which one number acts. Official: must be given. Default: a quarter of the depth.
    """

    name = "cubist"
    aliases = ("cubist_merge", "cume")
    card = Card(
        title="CubistMerge",
        summary="Merges neighbours so that every row and column shrinks alike and the tokens stay a grid.",
        paper="Gong and Lis, CubistMerge: Spatial-Preserving Token Merging For Diverse ViT Backbones, 2025",
        url="https://arxiv.org/abs/2509.21764",
        year=2025,
        license="CC-BY-NC 4.0 (a fork of ToMe)",
        cons=(
            "Every row loses as many tokens, be it uniform or not.",
            "Counts come in whole rows and columns; at most half of each side goes at one point.",
            "Needs the tokens as a grid.",
        ),
        official="writes merged tokens in two passes and may lose one of two sources of a token; here all count.",
    )
    site = Site.PRE
    grid_preserving = True

    rh: int | None = None
    rw: int | None = None
    loc: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("rh", self.rh), ("rw", self.rw), ("loc", self.loc)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ParameterError(f"cubist: {name} must be an int >= 0, got {value!r}.")
        given = [name for name in self.budget_names if getattr(self, name) is not None]
        if self._sides is not None and given:
            raise ParameterError(f"cubist: give one budget, got rh={self.rh!r}, rw={self.rw!r} and {given[0]}.")
        super().__post_init__()

    @property
    def _sides(self) -> tuple[int, int] | None:
        return None if self.rh is None and self.rw is None else (self.rh or 0, self.rw or 0)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.HIDDEN, Signal.GRID

    def span(self, depth: int) -> range:
        return range(depth)

    def layers(self, depth: int) -> Sequence[int]:
        return (min(depth // 4 if self.loc is None else self.loc, depth - 1),)

    def budgets(self, depth: int) -> dict[int, Budget]:
        return dict.fromkeys(self.layers(depth), Budget()) if self._sides is not None else super().budgets(depth)

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return n - math.prod(self.regrid(n, budget, where))

    def regrid(self, n: int, budget: Budget, where: Where) -> tuple[int, int]:
        height, width = where.grid or squarest(n)
        wanted = budget.removed(n)
        rh, rw = self._sides if self._sides is not None else lines(height, width, max(wanted, 0))
        return height - min(rh, height // 2), width - min(rw, width // 2)

    def limit(self, n: int) -> int:
        height, width = squarest(n)
        return n - (height - height // 2) * (width - width // 2)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        height, width = signals.GRID
        rh, rw = lines(height, width, r) if self._sides is None else self._sides
        rh, rw = min(rh, height // 2), min(rw, width // 2)
        x = signals.HIDDEN.detach()[:, state.prefix :]
        batch, channels, high, wide = x.shape[0], x.shape[2], height - rh, width - rw
        place = row_slots(x.reshape(batch * height, width, channels), rw).view(batch, height, width)
        assign = (place + wide * torch.arange(height, device=x.device).view(1, -1, 1)).flatten(1)
        if rh > 0:
            # Columns are matched on the tokens that the rows left.
            left = TokenMap(assign, height * wide, mode="absmax").reduce(x).view(batch, height, wide, channels)
            place = row_slots(left.transpose(1, 2).reshape(batch * wide, height, channels), rh)
            place = place.view(batch, wide, height).transpose(1, 2)
            assign = (place * wide + torch.arange(wide, device=x.device)).flatten(1).gather(1, assign)
        anchor = _largest(x, assign, high * wide)
        prefix = state.prefix
        return TokenMap(
            with_prefix(assign + prefix, prefix), prefix + high * wide, mode="absmax",
            anchor=with_prefix(anchor + prefix, prefix), grid=(high, wide), form="complete",
        )  # fmt: skip


def _largest(x: Tensor, assign: Tensor, slots: int) -> Tensor:
    """(B, slots) token of largest norm of each slot; of equals the first."""
    order = stable_order(torch.linalg.vector_norm(x, dim=-1), descending=True)
    place = torch.arange(x.shape[1], device=x.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    first = rank.new_full((x.shape[0], slots), x.shape[1]).scatter_reduce(1, assign, rank, reduce="amin")
    return order.gather(1, first)
