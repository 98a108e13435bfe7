"""Which tokens are alike: bipartite matching and the partitions that methods use.

Similarities are cosines in fp32 or wider. Ties go to the lowest index and every order is stable, so results do not
depend on device or thread count. A zero vector has similarity 0 to everything. Indices are absolute token positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import cpu, dispatch, library
from visiontok.ops.constants import arange_row, shape_constant, wide_dtype
from visiontok.ops.merging import Groups, Slots, group_by_sort
from visiontok.ops.ordering import stable_order

__all__ = [
    "Match",
    "alternate",
    "best_match",
    "bipartite",
    "bipartite_slots",
    "even_odd",
    "even_odd_slots",
    "every_kth",
    "first_odd",
    "halves",
    "match_slots",
    "unit",
]


# Below this length a vector has no direction; as in F.normalize.
_TINY = 1e-12
# Most similarities per image that exist at once.
_AT_ONCE = 2**20


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


_best_match = dispatch.op("best_match")


def best_match(rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each token of set a among the tokens of set b.

    Args:
        rows: (B, N, d) unit rows.
        a: (Na,) or (B, Na) int64 positions.
        b: (Nb,) or (B, Nb) int64 positions.

    Returns:
        (B, Na) similarity in at least fp32 and (B, Na) int64 index into b. Never Na x Nb in memory for long sequences.
    """
    return _best_match(rows, a, b)


def _best_match_fake(rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], a.shape[-1])
    return rows.new_empty(shape, dtype=wide_dtype(rows.dtype)), a.new_empty(shape)


def _best_match_torch(rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(rows.dtype)
    rows = rows if rows.dtype == wide else rows.to(wide)
    leaving, columns = _rows_at(rows, a), _rows_at(rows, b).transpose(1, 2)
    step = max(_AT_ONCE // max(columns.shape[2], 1), 1)
    if leaving.shape[1] <= step:
        best = torch.bmm(leaving, columns).max(dim=-1)
        return best.values, best.indices
    parts = [torch.bmm(strip, columns).max(dim=-1) for strip in leaving.split(step, dim=1)]
    return torch.cat([part.values for part in parts], dim=1), torch.cat([part.indices for part in parts], dim=1)


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    if index.dim() == 1:
        return rows.index_select(1, index)
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


_best_match.implementation("triton", dispatch.triton_refuses, "running row maximum, similarities stay in registers")(
    library.define(
        "best_match(Tensor rows, Tensor a, Tensor b) -> (Tensor, Tensor)",
        _best_match_torch,
        _best_match_fake,
        "matching.best_match",
    )
)
_best_match.implementation("torch", lambda x: None, "strips of a matrix product")(_best_match_torch)


def bipartite(rows: Tensor, a: Tensor, b: Tensor, r: int, *, ascending: bool) -> Match:
    """Merges the r tokens of set a that are most similar to a token of set b (ToMe, arXiv:2210.09461).

    Args:
        rows: (B, N, d) unit rows.
        a: (B, Na) or (Na,) positions of the tokens that may leave.
        b: (B, Nb) or (Nb,) positions of the tokens that may receive.
        r: Tokens to merge, 0 … Na.
        ascending: Whether the unmerged tokens of a keep their order in a; else most similar first.

    Returns:
        The match; its order is the unmerged tokens of a, then all of b.
    """
    batch = rows.shape[0]
    score, partner = best_match(rows, a, b)
    a, b = a.expand(batch, -1), b.expand(batch, -1)
    ranked = stable_order(score, descending=True)
    leaving, staying = ranked[:, :r], ranked[:, r:]
    if ascending:
        staying = staying.sort(dim=-1).values
    dst = b.gather(1, partner.gather(1, leaving))
    return Match(a.gather(1, leaving), dst, torch.cat((a.gather(1, staying), b), dim=1))


_plan = dispatch.op("plan")


def bipartite_slots(rows: Tensor, a: Tensor, b: Tensor, r: int, *, prefix: int = 0, ascending: bool = False) -> Slots:
    """`bipartite` as an assignment, for sets that hold all tokens but the prefix: random partitions of diffusion grids.

    Args:
        rows: (B, N, d) unit rows.
        a: (Na,) or (B, Na) positions of the tokens that may leave.
        b: (Nb,) or (B, Nb) positions of the tokens that may receive; Na + Nb = N - prefix.
        r: Tokens to merge, 1 … Na.
        prefix: Leading tokens, which keep their slots.
        ascending: Whether the unmerged tokens of a keep their order in a; else most similar first.

    Returns:
        Slots: prefix, unmerged tokens of a, then b in order.
    """
    score, partner = best_match(rows, a, b)
    assign, csr, src = _plan(score, partner, a, b, r, prefix, rows.shape[1], ascending)
    return Slots(assign, rows.shape[1] - r, None if csr is None else Groups(csr, src))


def _plan_fake(
    score: Tensor, partner: Tensor, a: Tensor, b: Tensor, r: int, prefix: int, length: int, ascending: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch = score.shape[0]
    short = partner.new_empty((batch, length - r + 1), dtype=torch.int32)
    return partner.new_empty((batch, length)), short, partner.new_empty((batch, length), dtype=torch.int32)


def _plan_torch(
    score: Tensor, partner: Tensor, a: Tensor, b: Tensor, r: int, prefix: int, length: int, ascending: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = score.shape[0], score.shape[1] - r
    a, b = a.expand(batch, -1), b.expand(batch, -1)
    ranked = stable_order(score, descending=True)
    leaving, staying = ranked[:, :r], ranked[:, r:]
    staying = staying.sort(dim=-1).values if ascending else staying
    places = arange_row(prefix, length - r, score.device).expand(batch, -1)
    assign = arange_row(0, length, score.device).repeat(batch, 1)
    assign.scatter_(1, torch.cat((a.gather(1, staying), b), dim=1), places)
    assign.scatter_(1, a.gather(1, leaving), partner.gather(1, leaving) + (prefix + count))
    return assign, *group_by_sort(assign, length - r, True)


def _narrow(assign: Tensor, csr: Tensor, src: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Kernels write groupings in half the bytes.
    return assign, csr.int(), src.int()


_plan.implementation("triton", dispatch.triton_refuses, "ranks and slots by counting, no sort")(
    library.define(
        "plan(Tensor score, Tensor partner, Tensor a, Tensor b, int r, int prefix, int length, bool ascending)"
        " -> (Tensor, Tensor, Tensor)",
        lambda *args: _narrow(*_plan_torch(*args)),
        _plan_fake,
        "planning.plan",
    )
)
_plan.implementation("torch", lambda x: None, "one stable sort and scatters")(_plan_torch)


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
    return bipartite(rows, place[first_a::2], place[first_b::2], r, ascending=prefix > 0)


_match_slots = dispatch.op("match_slots")


def match_slots(key: Tensor, r: int, prefix: int = 0) -> Slots:
    """`even_odd` on head-averaged keys as an assignment: the hot path of ToMe, one kernel where there is one.

    Args:
        key: (B, H, N, d); the metric is their mean over heads, as in every cosine a sum does.
        r: Tokens to merge, 1 … (N - prefix) // 2.
        prefix: Leading tokens to protect.

    Returns:
        Slots among N - r. The tokens at `first_odd(prefix)`, and every second one after it, are the destinations.
    """
    assign, csr, src = _match_slots(key, r, prefix)
    return Slots(assign, key.shape[2] - r, None if csr is None else Groups(csr, src))


def _match_slots_fake(key: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length = key.shape[0], key.shape[2]
    short = key.new_empty((batch, length - r + 1), dtype=torch.int32)
    return key.new_empty((batch, length), dtype=torch.int64), short, key.new_empty((batch, length), dtype=torch.int32)


def _match_slots_torch(key: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    metric = key.to(wide_dtype(key.dtype))
    metric = metric.squeeze(1) if key.shape[1] == 1 else metric.sum(dim=1)
    return even_odd_slots(metric, r, prefix), None, None


def _match_slots_grouped(key: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    assign, _, _ = _match_slots_torch(key, r, prefix)
    return _narrow(assign, *group_by_sort(assign, key.shape[2] - r, True))


_match_slots.implementation("triton", dispatch.triton_refuses, "one kernel from keys to slots")(
    library.define(
        "match_slots(Tensor key, int r, int prefix) -> (Tensor, Tensor, Tensor)",
        _match_slots_grouped,
        _match_slots_fake,
        "matching.match_slots",
    )
)
_match_slots.implementation("cpp", cpu.refuses, "one pass in C++ from keys to slots")(cpu.match_slots)
_match_slots.implementation("torch", lambda x: None, "matrix product, stable sort, scatters")(_match_slots_torch)


def even_odd_slots(metric: Tensor, r: int, prefix: int = 0) -> Tensor:
    """`even_odd` as an assignment, in fewer and smaller operations.

    Args:
        metric: (B, N, d).
        r: Tokens to merge, 1 … (N - prefix) // 2.
        prefix: Leading tokens to protect.

    Returns:
        (B, N) int64 slot of each token among N - r.
    """
    batch, length, _ = metric.shape
    first_a, first_b = _parity(prefix)
    rows = unit(metric)
    # Slices, where positions would make copies.
    best = torch.bmm(rows[:, first_a::2], rows[:, first_b::2].transpose(1, 2)).max(dim=-1)
    score, partner = best.values, best.indices
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
    _, partner = best_match(rows, a, b)
    return Match(a.expand(batch, -1), b[partner], b.expand(batch, -1))


def alternate(order: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a ranking (B, M) into ranks 0, 2, 4 … and 1, 3, 5 …"""
    return order[:, 0::2], order[:, 1::2]


def halves(order: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a ranking (B, 2r) into its first and second half."""
    r = order.shape[1] // 2
    return order[:, :r], order[:, r : 2 * r]
