"""Items: the rows on which decisions are made when they are not whole sequences (images in a prompt, crops, frames).

A backbone's layout says which tokens of which batch row form an item. The core cuts the signals, asks the reducer once
per group of items of equal length, and stitches the answers into one map of the whole batch; tokens outside every item
keep their place among the items' slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Reducer
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, ParameterError

__all__ = ["Items", "decide_items", "stitch"]

# Token axis of each signal that is cut; all others are handed on as they are.
_TOKEN_AXIS = {"HIDDEN": 1, "QUERY": 2, "KEY": 2, "VALUE": 2, "SSM_OUT": 1, "SSM_DELTA": 1, "ATTN_PREFIX": -1}


@dataclass(frozen=True)
class Items:
    """A group of items of equal length.

    Attributes:
        rows: Batch row of each of the R items.
        index: (R, n) int64 positions of its tokens in that row, in the item's order.
        prefix: Leading tokens of an item that no reducer may touch.
    """

    rows: tuple[int, ...]
    index: Tensor
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.index.shape[0] != len(self.rows):
            raise ParameterError(f"index must be ({len(self.rows)}, n), got {tuple(self.index.shape)}.")

    def cut(self, x: Tensor, axis: int = 1) -> Tensor:
        """The items' part of a batched tensor whose token axis is `axis`."""
        row = torch.tensor(self.rows, device=x.device).unsqueeze(1)
        return x.movedim(axis, 1)[row, self.index].movedim(1, axis)

    def state(self, state: TokenState) -> TokenState:
        """The state of the items, as if they were a batch."""
        count, length = self.index.shape
        return state.changed(
            batch=count,
            n=length,
            n0=length,
            prefix=self.prefix,
            grid=None,
            grid0=None,
            size=None if state.size is None else self.cut(state.size),
            positions=None,
            carry={name: self.cut(value) for name, value in state.carry.items()},
            trail=(),
            marks=(),
            prefix0=None,
            frames=(),
            stash=None,
        )


def decide_items(
    reducer: Reducer,
    offered: Mapping[str, Callable[[], Any]],
    state: TokenState,
    groups: Sequence[Items],
    budgets: Sequence[int],
) -> TokenMap | None:
    """Asks the reducer once per group and stitches the answers.

    Args:
        reducer: Who decides.
        offered: Signals of the whole batch, lazily.
        state: The batch's state.
        groups: Items of equal length each; no token may be in two items.
        budgets: Tokens to remove from each item of the group.

    Returns:
        One map of the batch, or None if every answer is identity.
    """
    maps: list[TokenMap | None] = []
    for group, budget in zip(groups, budgets):
        own = group.state(state)
        maps.append(reducer.decide(Signals(_cut_all(offered, group)), own, budget))
    if all(tm is None for tm in maps):
        return None
    whole = [tm or TokenMap.identity(group.index) for tm, group in zip(maps, groups)]
    return stitch(whole, groups, state)


def _cut_all(offered: Mapping[str, Callable[[], Any]], group: Items) -> dict[str, Callable[[], Any]]:
    def cutter(name: str, read: Callable[[], Any]) -> Callable[[], Any]:
        axis = _TOKEN_AXIS.get(name)
        return read if axis is None else lambda: group.cut(read(), axis)

    return {name: cutter(name, read) for name, read in offered.items()}


def stitch(maps: Sequence[TokenMap], groups: Sequence[Items], state: TokenState) -> TokenMap:
    """One map of the whole batch from maps of its items.

    Args:
        maps: One per group, over (R, n) tokens.
        groups: The items.
        state: The batch's state.

    Raises:
        IncompatibleError: Maps with different modes, soft maps, or carried values, which have no stitched form.
    """
    batch, length, device = state.batch, state.n, state.device
    if len({tm.mode for tm in maps}) > 1:
        raise IncompatibleError(f"maps of one decision must share a mode, got {sorted({tm.mode for tm in maps})}.")
    if any(tm.soft is not None or tm.carry is not None or tm.stash is not None for tm in maps):
        raise IncompatibleError("soft maps and carried values are not available for items within a sequence.")
    stride = length + 1
    # A key per token that orders the future slots: the place of the item's first token, then the item's own order.
    key = torch.arange(length, device=device).mul(stride).repeat(batch, 1)
    stands = torch.ones(batch, length, dtype=torch.bool, device=device)
    live = [length] * batch
    for tm, group in zip(maps, groups):
        row = torch.tensor(group.rows, device=device).unsqueeze(1)
        first = group.index.amin(dim=1, keepdim=True) * stride
        key[row, group.index] = torch.where(tm.assign < 0, -1, first + tm.assign)
        stands[row, group.index] = False
        stands[row, group.index.gather(1, tm.kept)] = True
        for r in group.rows:
            live[r] -= group.index.shape[1] - tm.K
    count = max(live)
    ordered, order = key.sort(dim=1, stable=True)
    fresh = torch.cat((ordered[:, :1] >= 0, (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)), dim=1)
    rank = (fresh.cumsum(dim=1) - 1).masked_fill(ordered < 0, -1)
    assign = torch.empty_like(key).scatter(1, order, rank)
    ragged = len(set(live)) > 1 or any(tm.counts is not None for tm in maps)
    place = torch.arange(length, device=device).expand(batch, -1)
    spare = torch.where(stands & (assign >= 0), assign, count)
    anchor = place.new_zeros(batch, count + 1).scatter(1, spare, place)[:, :count]
    return TokenMap(
        assign,
        count,
        mode=maps[0].mode,
        weight=_spread_shares([tm.weight for tm in maps], groups, state),
        mass=_spread_shares([tm.mass for tm in maps], groups, state),
        anchor=anchor,
        counts=assign.amax(dim=1) + 1 if ragged else None,
    )


def _spread_shares(shares: Sequence[Tensor | None], groups: Sequence[Items], state: TokenState) -> Tensor | None:
    if all(share is None for share in shares):
        return None
    wide = next(share for share in shares if share is not None)
    sizes = state.size.squeeze(-1) if state.size is not None else wide.new_ones(state.batch, state.n)
    out = sizes.to(wide.dtype).clone()
    for share, group in zip(shares, groups):
        if share is not None:
            out[torch.tensor(group.rows, device=out.device).unsqueeze(1), group.index] = share
    return out
