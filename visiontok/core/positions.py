"""Positions: where tokens stand, for backbones whose attention reads positions (rotary, relative biases, causal)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError
from visiontok.ops import merging
from visiontok.ops import positions as ops

__all__ = ["RULES", "Positions"]

RULES = ("mean", "gather")


@dataclass(frozen=True, eq=False)
class Positions:
    """Where each token stands among the original ones.

    Attributes:
        rule: `mean`: a merged token stands at the size-weighted mean of its members; `gather`: where its anchor stood.
        lead: Leading original tokens, which have no place in the grid.
        grid: (h, w) of the other original tokens, or None.
        index: (B, N) int64 original token that stands for each token (its anchor's), -1 for one that joined later.
        coords: (B, N, 2) fp32 row and column in patches; None under `gather` and without a grid.
        joined: Whether some tokens may have joined later.
    """

    rule: str
    lead: int
    grid: tuple[int, int] | None
    index: Tensor
    coords: Tensor | None = None
    joined: bool = False

    @classmethod
    def initial(
        cls, rule: str, batch: int, length: int, lead: int, grid: tuple[int, int] | None, device: torch.device
    ) -> Positions:
        """The positions before any reduction: every token stands for itself."""
        index = torch.arange(length, device=device).expand(batch, length)
        positions = cls(rule, lead, grid, index)
        return positions if rule == "gather" or grid is None else replace(positions, coords=positions._anchors())

    def advance(self, tm: TokenMap, size: Tensor | None) -> Positions:
        """The positions after a map.

        Args:
            tm: The decision.
            size: (B, N, 1) sizes before it, or None for all ones.
        """
        joined = tm.assign.shape[1] - self.index.shape[1]
        index, coords = self.index, self.coords
        if joined:
            index = torch.cat((index, index.new_full((index.shape[0], joined), -1)), dim=1)
        moved = replace(self, index=merging.select(index, tm.kept), joined=self.joined or joined > 0)
        if coords is None:
            return moved
        if joined:
            coords = torch.cat((coords, coords.new_zeros(coords.shape[0], joined, 2)), dim=1)
            size = size if size is None else torch.cat((size, size.new_ones(size.shape[0], joined, 1)), dim=1)
        return replace(moved, coords=self._meant(tm, coords, size))

    def rotary(self, sin: Tensor, cos: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a rotary embedding for the tokens behind the prefix.

        Args:
            sin: (N0 - lead, D), (H, N0 - lead, D) or (B, 1 | H, N0 - lead, D): the host's table.
            cos: The same.
            steps: (2, D) or (2, H, D) fp32 radians by which each channel turns from one row, and one column, to the
                next, in the table's own layout.

        Returns:
            sin, cos, each (B, 1 | H, N - lead, D). A token that joined later is not turned at all; one that was never
            merged has the row of the table, bit for bit.

        Raises:
            IncompatibleError: Rule `mean` without a patch grid.
        """
        index = self.index[:, self.lead :] - self.lead
        # No angle: turned by nothing.
        blanks = (0.0, 1.0) if self.joined else (None, None)
        sin, cos = (ops.gather_rows(table, index, blank) for table, blank in zip((sin, cos), blanks))
        if self.rule == "gather":
            return sin, cos
        if self.coords is None:
            raise IncompatibleError(
                "the tokens came without a patch grid (patch dropout?), so merged ones have no mean position; patch "
                "with positions='gather'."
            )
        away = (self.coords - self._anchors())[:, self.lead :]
        away = away.masked_fill((index < 0).unsqueeze(-1), 0) if self.joined else away
        steps = steps.to(away.dtype)
        steps = (steps.unsqueeze(1) if steps.dim() == 2 else steps).unsqueeze(2)
        rows, columns = away[:, None, :, :1], away[:, None, :, 1:]
        return ops.turn(sin, cos, rows * steps[0] + columns * steps[1])

    def bias(self, table: Tensor, slot: Tensor) -> Tensor:
        """A bias between original tokens, as one between the tokens of now.

        Args:
            table: (N0, N0), (H, N0, N0) or (B, 1 | H, N0, N0), prefix included.
            slot: (B, N0) `TokenState.origin`.

        Returns:
            (B, 1 | H, N, N): between anchors under `gather`, else the mean over members. Exact between tokens that were
            never merged; 0 from and to one that joined later.
        """
        if self.rule == "gather":
            return ops.gather_bias(table, self.index, 0.0 if self.joined else None)
        return ops.mean_bias(table, slot.long(), self.index.shape[1])

    def to(self, device: torch.device) -> Positions:
        """The same positions on another device."""
        coords = None if self.coords is None else self.coords.to(device)
        return replace(self, index=self.index.to(device), coords=coords)

    def _anchors(self) -> Tensor:
        grid: Any = self.grid
        place = self.index - self.lead
        return torch.stack((place.div(grid[1], rounding_mode="floor"), place % grid[1]), dim=-1).float()

    def _meant(self, tm: TokenMap, coords: Tensor, size: Tensor | None) -> Tensor:
        if tm.form in ("select", "identity"):
            return merging.select(coords, tm.kept)
        if tm.soft is not None:
            share = tm.soft.to(coords.dtype)
            return share @ coords / share.sum(dim=2, keepdim=True).clamp_min(torch.finfo(coords.dtype).tiny)
        places = TokenMap(tm.assign, tm.K, form="complete" if tm.form == "complete" else "any")
        return places.reduce(coords, size)
