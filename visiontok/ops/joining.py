"""Slots from pointers: each token names the token it joins, and the slots follow, also where counts differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visiontok.ops.constants import length_of
from visiontok.ops.ordering import stable_order

__all__ = ["Joined", "follow", "join"]


class Joined(NamedTuple):
    """Slots of all tokens.

    Attributes:
        assign: (B, N) int64 slot of each token; live slots come first.
        order: (B, N) int64 tokens in the order of their slots, those that stay first: `order[:, :K]` are the anchors.
        counts: (B,) int64 tokens that stay.
    """

    assign: Tensor
    order: Tensor
    counts: Tensor


def join(target: Tensor, order: Tensor | None = None, prefix: int = 0) -> Joined:
    """Gives every token that stays a slot, and every other token the slot of the one it joins.

    Args:
        target: (B, N) int64 the token that each token joins; one that stays names itself. A target must stay.
        order: (B, N) int64, a permutation: the order in which staying tokens get their slots. Default: ascending.
        prefix: Tokens before these that stay in front; the result is over prefix + N tokens.

    Returns:
        Slots, without any host synchronisation, so the number of slots may differ per sample.
    """
    batch, length = target.shape
    place = torch.arange(length, device=target.device).expand(batch, length)
    order = place if order is None else order
    stays = (target == place).gather(1, order)
    slot = torch.zeros_like(target).scatter(1, order, stays.long().cumsum(dim=1) - 1)
    first = order.gather(1, stable_order((~stays).int()))
    lead = torch.arange(prefix, device=target.device).expand(batch, prefix)
    assign = torch.cat((lead, slot.gather(1, target) + prefix), dim=1)
    return Joined(assign, torch.cat((lead, first + prefix), dim=1), stays.sum(dim=1) + prefix)


def follow(target: Tensor) -> Tensor:
    """Follows pointers to their ends: (B, N) targets that may leave too become targets that stay.

    Args:
        target: (B, N) int64 without cycles other than tokens that name themselves.
    """
    for _ in range(max(length_of(target) - 1, 0).bit_length()):
        target = target.gather(1, target)
    return target
