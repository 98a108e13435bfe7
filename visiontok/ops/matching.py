"""Which tokens are alike: bipartite matching and the partitions that methods use.

Similarities are cosines in fp32 or wider. Ties go to the lowest index and every order is stable, so results do not
depend on device or thread count. A zero vector has similarity 0 to everything. Indices are absolute token positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.constants import arange_row, shape_constant, wide_dtype
from visiontok.ops.ordering import stable_order

__all__ = [
    "Match",
    "alternate",
    "best_match",
    "bipartite",
    "even_odd",
    "even_odd_slots",
    "every_kth",
    "first_odd",
    "halves",
    "unit",
]


# Below this length a vector has no direction; as in F.normalize.
_TINY = 1e-12


class Match(NamedTuple):
    """A decision to merge.

    Attributes:
        src: (B, r) tokens that leave, best match first.
        dst: (B, r) the token each of them joins.
        order: (B, K) the tokens that stay (without the prefix), in the order of their slots.
    """

    src: Tensor
    dst: Tensor
    order: Tensor


def unit(metric: Tensor) -> Tensor:
    """Rows of length one in at least fp32; zero rows stay zero.

    Args:
        metric: (B, N, d).
    """
    wide = wide_dtype(metric.dtype)
    rows = metric if metric.dtype == wide else metric.to(wide)
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(_TINY)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row of a among the rows of b.

    Args:
        a: (B, Na, d) unit rows.
        b: (B, Nb, d) unit rows.

    Returns:
        (B, Na) similarity and (B, Na) int64 index into b.
    """
    best = torch.bmm(a, b.transpose(1, 2)).max(dim=-1)
    return best.values, best.indices


def bipartite(a_metric: Tensor, b_metric: Tensor, a: Tensor, b: Tensor, r: int, *, ascending: bool) -> Match:
    """Merges the r tokens of set a that are most similar to a token of set b (ToMe, arXiv:2210.09461).

    Args:
        a_metric: (B, Na, d) unit rows of the tokens that may leave.
        b_metric: (B, Nb, d) unit rows of the tokens that may receive.
        a: (B, Na) or (Na,) positions of set a.
        b: (B, Nb) or (Nb,) positions of set b.
        r: Tokens to merge, 0 … Na.
        ascending: Whether the unmerged tokens of a keep their order in a; else most similar first.

    Returns:
        The match; its order is the unmerged tokens of a, then all of b.
    """
    batch = a_metric.shape[0]
    a, b = a.expand(batch, -1), b.expand(batch, -1)
    score, partner = best_match(a_metric, b_metric)
    ranked = stable_order(score, descending=True)
    leaving, staying = ranked[:, :r], ranked[:, r:]
    if ascending:
        staying = staying.sort(dim=-1).values
    dst = b.gather(1, partner.gather(1, leaving))
    return Match(a.gather(1, leaving), dst, torch.cat((a.gather(1, staying), b), dim=1))


def even_odd(metric: Tensor, r: int, prefix: int = 0) -> Match:
    """ToMe's matching: even positions merge into odd ones, counted over the sequence with its prefix.

    Prefix tokens neither leave nor receive. Without a prefix the unmerged tokens come most similar first, with one in
    ascending order, as in the released code; the order decides the next layer's partition.

    Args:
        metric: (B, N, d).
        r: Tokens to merge, clamped to (N - prefix) // 2.
        prefix: Leading tokens to protect.
    """
    r = max(min(r, (metric.shape[1] - prefix) // 2), 0)
    place = torch.arange(metric.shape[1], device=metric.device)
    if r == 0:
        # Nothing merges, so every token keeps its place.
        none = place.new_empty(metric.shape[0], 0)
        return Match(none, none, place[prefix:].expand(metric.shape[0], -1))
    rows = unit(metric)
    first_a, first_b = _parity(prefix)
    a, b = place[first_a::2], place[first_b::2]
    return bipartite(rows[:, first_a::2], rows[:, first_b::2], a, b, r, ascending=prefix > 0)


def even_odd_slots(metric: Tensor, r: int, prefix: int = 0) -> Tensor:
    """`even_odd` as an assignment, in fewer and smaller operations: the hot path of ToMe.

    Args:
        metric: (B, N, d).
        r: Tokens to merge, 1 … (N - prefix) // 2.
        prefix: Leading tokens to protect.

    Returns:
        (B, N) int64 slot of each token among N - r. The tokens at `first_odd(prefix)`, and every second one after it,
        are the destinations.
    """
    batch, length, _ = metric.shape
    first_a, first_b = _parity(prefix)
    rows = unit(metric)
    score, partner = best_match(rows[:, first_a::2], rows[:, first_b::2])
    ranked = stable_order(score, descending=True)
    leaving, count = ranked[:, :r], score.shape[1] - r
    if prefix > 0:
        # Ascending order of the unmerged: a token's slot is the number of unmerged ones up to it.
        slot = torch.ones_like(ranked).scatter_(1, leaving, 0).cumsum_(dim=1)
    else:
        places = arange_row(1, count + 1, metric.device).expand(batch, -1)
        slot = torch.empty_like(ranked).scatter_(1, ranked[:, r:], places)
    slot.scatter_(1, leaving, partner.gather(1, leaving).add_(count + 1))
    # Slots: prefix, unmerged tokens of a, then b in order. `slot` counts from one, hence the shift.
    assign = _template(length, count, prefix, metric.device).expand(batch, -1).clone()
    assign[:, first_a::2].add_(slot)
    return assign


@shape_constant
def _template(length: int, count: int, prefix: int, device: torch.device) -> Tensor:
    # (1, N), what does not depend on the match: slots of prefix and b, and the start of a's slots.
    first_a, first_b = _parity(prefix)
    row = torch.arange(length, device=device)
    place = (row - first_b).div(2, rounding_mode="floor") + prefix + count
    place = torch.where(row < prefix, row, place)
    place = torch.where((row >= first_a) & ((row - first_a) % 2 == 0), prefix - 1, place)
    return place.unsqueeze(0)


def _parity(prefix: int) -> tuple[int, int]:
    return prefix + prefix % 2, first_odd(prefix)


def first_odd(prefix: int) -> int:
    """The first odd position that is not in the prefix: where ToMe's destinations start."""
    return prefix + (prefix + 1) % 2


def every_kth(metric: Tensor, k: int, *, drop_tail: bool = False) -> Match:
    """ToMe's k-th variant: the last token of each group of k is a destination, all others merge.

    Args:
        metric: (B, N, d).
        k: Group length, at least 2 and at most N.
        drop_tail: Whether tokens after the last whole group are left out of the match, as in the released code; else
            they merge too.

    Raises:
        ParameterError: k does not fit N.
    """
    batch, length = metric.shape[:2]
    if not 2 <= k <= length:
        raise ParameterError(f"k must be in [2, {length}] for {length} tokens, got {k}.")
    whole = length // k * k
    place = torch.arange(length, device=metric.device)
    groups = place[:whole].view(-1, k)
    a, b = groups[:, :-1].flatten(), groups[:, -1]
    if not drop_tail:
        a = torch.cat((a, place[whole:]))
    rows = unit(metric)
    _, partner = best_match(rows[:, a], rows[:, b])
    return Match(a.expand(batch, -1), b[partner], b.expand(batch, -1))


def alternate(order: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a ranking (B, M) into ranks 0, 2, 4 … and 1, 3, 5 …"""
    return order[:, 0::2], order[:, 1::2]


def halves(order: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a ranking (B, 2r) into its first and second half."""
    r = order.shape[1] // 2
    return order[:, :r], order[:, r : 2 * r]
