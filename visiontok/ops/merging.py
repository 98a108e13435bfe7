"""Moving tokens into slots: segment sums, maxima, selections, and the grouping (CSR) they share.

Every function takes `assign (B, N) int64`, the slot of each token in `[0, K)` or -1 for a dropped token. Sums
accumulate in at least fp32. Nothing here sorts tokens by value, syncs with the host or has data-dependent shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.ops import dispatch, library
from visiontok.ops.constants import arange_row, wide_dtype

# Smallest positive normal fp32 number: divides a zero by something.
_TINY = torch.finfo(torch.float32).tiny

__all__ = [
    "Groups",
    "Slots",
    "group",
    "group_by_sort",
    "merge_mean",
    "segment_count",
    "segment_max",
    "segment_sum",
    "select",
    "spread",
]


def _plain(x: Tensor) -> bool:
    return not (torch.is_grad_enabled() and x.requires_grad) and dispatch.cacheable() and not x.is_meta


class Groups(NamedTuple):
    """Tokens grouped by slot, in compressed sparse rows.

    Attributes:
        csr: (B, K + 1) int64, int32 from a kernel; the tokens of slot k are `src[csr[k]:csr[k + 1]]`. Dropped tokens
            come after `csr[K]`.
        src: (B, N) in the same dtype, token indices ordered by slot, ascending inside a slot.
    """

    csr: Tensor
    src: Tensor


class Slots(NamedTuple):
    """Where tokens go, and their grouping if a kernel made it along the way.

    Attributes:
        assign: (B, N) int64 slot of each token.
        num_slots: K.
        groups: The grouping of `assign`, or None.
    """

    assign: Tensor
    num_slots: int
    groups: Groups | None = None


_group = dispatch.op("group")


def group(assign: Tensor, num_slots: int, *, complete: bool = False) -> Groups:
    """Groups tokens by slot.

    Args:
        assign: (B, N) int64.
        num_slots: K.
        complete: True promises that no token is dropped.
    """
    return Groups(*_group(assign, num_slots, complete))


def _group_fake(assign: Tensor, num_slots: int, complete: bool) -> tuple[Tensor, Tensor]:
    batch, length = assign.shape
    return assign.new_empty((batch, num_slots + 1), dtype=torch.int32), assign.new_empty(
        assign.shape, dtype=torch.int32
    )


_group.implementation("triton", dispatch.triton_refuses_indices, "by counting, no sort")(
    library.define(
        "group(Tensor assign, int num_slots, bool complete) -> (Tensor, Tensor)",
        lambda *args: tuple(part.int() for part in group_by_sort(*args)),
        _group_fake,
        lambda assign, num_slots, complete: library.launcher("merging.group")(assign, num_slots),
    )
)


@_group.implementation("torch", lambda x: None, "one stable sort")
def group_by_sort(assign: Tensor, num_slots: int, complete: bool) -> tuple[Tensor, Tensor]:
    """The torch formulation of `group`: (csr, src), both int64."""
    slots = assign if complete else torch.where(assign < 0, num_slots, assign)
    ordered, src = slots.sort(dim=1, stable=True)
    bounds = arange_row(0, num_slots + 1, assign.device)
    if assign.shape[0] != 1:
        bounds = bounds.repeat(assign.shape[0], 1)
    return torch.searchsorted(ordered, bounds), src


def select(x: Tensor, index: Tensor) -> Tensor:
    """Gathers whole tokens.

    Args:
        x: (B, N, ...).
        index: (B, K) int64 in `[0, N)`.

    Returns:
        (B, K, ...).
    """
    batch, count = index.shape
    rows = index if batch == 1 else index + _starts(batch, x.shape[1], index.device)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (batch, count))


_spread = dispatch.op("spread")


def spread(y: Tensor, assign: Tensor, *, residual: Tensor | None = None, share: Tensor | None = None) -> Tensor:
    """Gives every token the value of its slot; the inverse of a merge, and with shares the gradient of one.

    Args:
        y: (B, K, ...).
        assign: (B, N) int64; dropped tokens receive zeros.
        residual: (B, N, ...) to add to.
        share: (B, N) factors for y.

    Returns:
        (B, N, ...).
    """
    return _spread(y, assign, residual, share)


@_spread.implementation(
    "triton",
    lambda y: (
        dispatch.triton_refuses(y) or ("not (B, K, C) without gradients" if y.dim() != 3 or not _plain(y) else None)
    ),
    "gather, factor and residual in one kernel",
)
def _spread_triton(y: Tensor, assign: Tensor, residual: Tensor | None, share: Tensor | None) -> Tensor:
    return library.launcher("merging.spread")(y, assign, residual, share)


@_spread.implementation("torch", lambda y: None, "gather")
def _spread_torch(y: Tensor, assign: Tensor, residual: Tensor | None, share: Tensor | None) -> Tensor:
    out = select(y, assign.clamp_min(0))
    shape = (*assign.shape, *[1] * (y.dim() - 2))
    out = out.masked_fill((assign < 0).view(shape), 0)
    out = out if share is None else (out * share.view(shape)).to(y.dtype)
    return out if residual is None else residual + out


_segment_sum = dispatch.op("segment_sum")


def segment_sum(x: Tensor, assign: Tensor, num_slots: int, weight: Tensor | None = None, *, complete: bool = False,
                groups: Groups | None = None) -> Tensor:  # fmt: skip
    """Weighted sum of the tokens of each slot.

    Args:
        x: (B, N, C).
        assign: (B, N) int64.
        num_slots: K.
        weight: (B, N) float, or None for ones.
        complete: True promises that no token is dropped, which saves a spare slot.
        groups: The grouping of `assign`, if it is at hand already.

    Returns:
        (B, K, C) in at least fp32.
    """
    return _segment_sum(x, assign, num_slots, weight, complete, groups)


def uses_groups(x: Tensor) -> bool:
    """Whether `segment_sum` of x reads the CSR grouping, so that callers with several streams share one."""
    return _segment_sum.choose(x).name == "embedding_bag"


@_segment_sum.implementation(
    "embedding_bag",
    refuses=lambda x: "traced or on the meta device" if dispatch.tracing() or x.is_meta else None,
    reason="eager: one pass over the tokens in slot order, no atomics; backward is a gather",
)
def _segment_sum_bag(
    x: Tensor, assign: Tensor, num_slots: int, weight: Tensor | None, complete: bool, groups: Groups | None
) -> Tensor:
    groups = groups if groups is not None else group(assign, num_slots, complete=complete)
    wide = wide_dtype(x.dtype)
    rows = x if x.dtype == wide else x.to(wide)
    if weight is not None and weight.dtype != wide:
        weight = weight.to(wide)
    if torch.is_grad_enabled() and (rows.requires_grad or (weight is not None and weight.requires_grad)):
        return _BagSum.apply(rows, weight, assign, groups.csr, groups.src, complete)
    return _bag_sum(rows, weight, groups.csr, groups.src, complete)


def _bag_sum(rows: Tensor, weight: Tensor | None, csr: Tensor, src: Tensor, complete: bool) -> Tensor:
    batch, length, channels = rows.shape
    if weight is not None:
        weight = weight.gather(1, src if src.dtype == torch.int64 else src.long()).view(-1)
    # Without the promise of completeness a spare last bag swallows the dropped tokens.
    bags = csr[:, :-1] if complete else csr
    count = bags.shape[1]
    if batch > 1:
        start = _starts(batch, length, rows.device)
        bags, src = bags + start, src + start
    flat = rows.reshape(batch * length, channels)
    # The op itself (mode 0 is sum): the functional wrapper's checks cost as much as the op at batch 1.
    out = torch.embedding_bag(flat, src.reshape(-1), bags.reshape(-1), False, 0, False, weight)[0]
    out = out.view(batch, count, channels)
    return out if complete else out[:, :-1]


def _starts(batch: int, length: int, device: torch.device) -> Tensor:
    # (B, 1) position of each sample's first token in the flattened batch.
    return arange_row(0, batch, device).t() * length


class _BagSum(torch.autograd.Function):
    """`_bag_sum` with a backward of gathers, differentiable again."""

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor | None, assign: Tensor, csr: Tensor, src: Tensor, complete: bool
    ) -> Tensor:
        return _bag_sum(rows, weight, csr, src, complete)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, weight, assign, *_ = inputs
        ctx.save_for_backward(rows if weight is not None and weight.requires_grad else None, weight, assign)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, assign = ctx.saved_tensors
        back = spread(grads[0], assign)
        grad_weight = None if rows is None else (back * rows).sum(dim=-1)
        grad_rows = back if weight is None else back * weight.unsqueeze(-1)
        return grad_rows, grad_weight, None, None, None, None


@_segment_sum.implementation(
    "index_add", refuses=lambda x: None, reason="traced: plain scatter, which compiles, exports and converts to ONNX"
)
def _segment_sum_index_add(
    x: Tensor, assign: Tensor, num_slots: int, weight: Tensor | None, complete: bool, groups: Groups | None
) -> Tensor:
    batch, length, channels = x.shape
    slots = num_slots if complete else num_slots + 1
    index = assign if complete else torch.where(assign < 0, num_slots, assign)
    index = index + _starts(batch, slots, x.device)
    rows = x.to(wide_dtype(x.dtype))
    if weight is not None:
        rows = rows * weight.to(rows.dtype).unsqueeze(-1)
    out = rows.new_zeros(batch * slots, channels).index_add_(0, index.flatten(), rows.reshape(batch * length, channels))
    return out.view(batch, slots, channels)[:, :num_slots]


_merge_mean = dispatch.op("merge_mean")


def merge_mean(x: Tensor, size: Tensor | None, assign: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """The whole of a size-weighted merge in one op: values and sizes of the slots.

    Args:
        x: (B, N, C).
        size: (B, N, 1) at least fp32, or None for all ones.
        assign: (B, N) int64, no token dropped.
        num_slots: K.

    Returns:
        (B, K, C) in x.dtype and (B, K, 1) in at least fp32.
    """
    return _merge_mean(x, size, assign, num_slots)


@_merge_mean.implementation(
    "embedding_bag",
    refuses=lambda x: None if _plain(x) else "traced, with gradients or on the meta device",
    reason="eager inference: one sort of the slots, one pass over the tokens, no atomics",
)
def _merge_mean_bag(x: Tensor, size: Tensor | None, assign: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    wide = wide_dtype(x.dtype)
    weight = x.new_ones(batch, length, dtype=wide) if size is None else size.view(batch, length)
    total = weight.new_zeros(batch, num_slots).scatter_add_(1, assign, weight)
    ordered, src = assign.sort(dim=1, stable=True)
    # Padding has size 0, whose share must not become 0 / 0.
    share = weight.gather(1, src).div_(total.gather(1, ordered).clamp_min_(_TINY))
    bounds = arange_row(0, num_slots, x.device)
    if batch != 1:
        bags = torch.searchsorted(ordered, bounds.repeat(batch, 1))
        start = _starts(batch, length, x.device)
        bags, src = bags.add_(start), src.add_(start)
    else:
        bags = torch.searchsorted(ordered, bounds)
    rows = x if x.dtype == wide else x.to(wide)
    flat = rows.reshape(batch * length, channels)
    out = torch.embedding_bag(flat, src.view(-1), bags.view(-1), False, 0, False, share.view(-1))[0]
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return out.view(batch, num_slots, channels), total.unsqueeze(-1)


@_merge_mean.implementation("composed", lambda x: None, "traced or with gradients: made of segment_sum")
def _merge_mean_composed(x: Tensor, size: Tensor | None, assign: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    weight = x.new_ones(x.shape[:2], dtype=wide) if size is None else size.squeeze(-1)
    total = segment_count(weight, assign, num_slots, complete=True)
    share = weight / total.clamp_min(_TINY).gather(1, assign)
    out = segment_sum(x, assign, num_slots, share, complete=True)
    return out.to(x.dtype), total.unsqueeze(-1)


def segment_count(weight: Tensor, assign: Tensor, num_slots: int, *, complete: bool = False) -> Tensor:
    """Sum of one number per token over each slot: sizes, denominators, counts.

    Args:
        weight: (B, N) float.
        assign: (B, N) int64.
        num_slots: K.
        complete: True promises that no token is dropped.

    Returns:
        (B, K) in the dtype of `weight`.
    """
    slots = num_slots if complete else num_slots + 1
    index = assign if complete else torch.where(assign < 0, num_slots, assign)
    out = weight.new_zeros(assign.shape[0], slots).scatter_add_(1, index, weight)
    return out if complete else out[:, :num_slots]


def segment_max(x: Tensor, assign: Tensor, num_slots: int) -> Tensor:
    """Largest value per channel over each slot.

    Args:
        x: (B, N, C).
        assign: (B, N) int64.
        num_slots: K.

    Returns:
        (B, K, C) in x.dtype; zero for a slot without tokens.
    """
    index = torch.where(assign < 0, num_slots, assign).unsqueeze(-1).expand_as(x)
    out = x.new_zeros(x.shape[0], num_slots + 1, x.shape[2])
    return out.scatter_reduce(1, index, x, reduce="amax", include_self=False)[:, :num_slots]
