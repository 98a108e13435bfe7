"""A whole merge in one kernel: residual, weighted segment reduction, sizes and the norm that follows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.ops import cpu, dispatch, library
from visiontok.ops.constants import wide_dtype
from visiontok.ops.merging import Groups, segment_count, segment_max, segment_sum, spread

__all__ = ["Kernel", "Merged", "Norm", "kernel", "merge", "merge_with_gradient", "rescaled"]

# Smallest positive normal fp32 number: divides a zero by something.
_TINY = torch.finfo(torch.float32).tiny


class Norm(NamedTuple):
    """A layer norm over channels.

    Attributes:
        weight: (C,) or None.
        bias: (C,) or None.
        eps: Added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Merged(NamedTuple):
    """What a merge gives.

    Attributes:
        out: (B, K, C) values of the slots in x.dtype; zero for a slot without tokens.
        size: (B, K) sums of sizes (of ones without sizes), at least fp32.
        rows: (B, K, R) the extra rows, merged alike, or None.
        normed: (B, K, C) `out` after the norm, or None.
    """

    out: Tensor
    size: Tensor
    rows: Tensor | None = None
    normed: Tensor | None = None


_log = logging.getLogger("visiontok.cpu")
_HALVES = (torch.float16, torch.bfloat16)
_merge = dispatch.op("merge")


Kernel = Callable[..., Any]


def kernel(x: Tensor) -> Kernel | None:
    """What does `merge` of x in one kernel here, or None where that is a sequence of torch operations."""
    chosen = _merge.choose(x)
    if chosen.name != "torch":
        return chosen.run
    if x.is_cpu and x.dtype in _HALVES and not dispatch.tracing():
        _warn_of_slow_merges()
    return None


@functools.cache
def _warn_of_slow_merges() -> None:
    missing = cpu.missing()
    if missing is not None:
        _log.warning(
            "half precision on a CPU without visiontok's C++ kernels (%s): a reduced model may be no faster than the "
            "unpatched one at small batches. Install a C++ compiler or visiontok[cpu].",
            missing,
        )


def merge(
    x: Tensor,
    groups: Groups,
    by: Kernel | None = None,
    *,
    y: Tensor | None = None,
    gamma: Tensor | None = None,
    weight: Tensor | None = None,
    size: Tensor | None = None,
    mode: str = "mean",
    rows: Tensor | None = None,
    norm: Norm | None = None,
) -> Merged:
    """Reduces the tokens `x + gamma * y` of each slot to one, all arithmetic in at least fp32.

    Args:
        x: (B, N, C).
        groups: Tokens by slot.
        by: The answer of `kernel(x)`, if it is at hand.
        y: (B, N, C) branch to add first.
        gamma: (C,) its scale per channel.
        weight: (B, N) weights in at least fp32. Default: the sizes.
        size: (B, N) token sizes in at least fp32. Default: ones.
        mode: `mean` (by weights divided by their sum, so a token alone is copied), `sum`, `amax`, `absmax`, `mlerp`;
            see `TokenMap`.
        rows: (B, N, R) fp32 values that follow the tokens by the weights of the mean, e.g. coordinates.
        norm: A norm to apply to the result.
    """
    return Merged(*(by or _merge)(x, groups.csr, groups.src, y, gamma, weight, size, mode, rows, norm))


def _merge_torch(
    x: Tensor, csr: Tensor, src: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor | None,
    size: Tensor | None, mode: str, rows: Tensor | None, norm: Norm | None,
) -> Merged:  # fmt: skip
    wide, count = wide_dtype(x.dtype), csr.shape[1] - 1
    assign = _assigned(csr, src)
    tokens = x.to(wide)
    if y is not None:
        branch = y.to(wide)
        tokens = tokens + (branch if gamma is None else branch * gamma.to(wide))
    ones = tokens.new_ones(tokens.shape[:2])
    new_size = segment_count(ones if size is None else size.to(wide), assign, count)
    weight = (ones if size is None else size) if weight is None else weight
    share = _shares(weight.to(wide), assign, count)
    if mode == "mean":
        out = segment_sum(tokens, assign, count, share)
    elif mode == "sum":
        out = segment_sum(tokens, assign, count, weight.to(wide))
    elif mode == "amax":
        out = segment_max(tokens, assign, count)
    elif mode == "absmax":
        high, low = segment_max(tokens, assign, count), -segment_max(-tokens, assign, count)
        out = torch.where(low.abs() > high.abs(), low, high)
    else:
        out = rescaled(segment_sum(tokens, assign, count, share), tokens, assign)
    out = out.to(x.dtype)
    moved = None if rows is None else segment_sum(rows, assign, count, share)
    normed = None if norm is None else F.layer_norm(out, out.shape[-1:], norm.weight, norm.bias, norm.eps)
    return Merged(out, new_size, moved, normed)


def _assigned(csr: Tensor, src: Tensor) -> Tensor:
    # (B, N) int64 slot of each token, -1 where no slot names it. What stands behind the last slot is not read.
    batch, length = src.shape
    place = torch.arange(length, device=src.device, dtype=csr.dtype).repeat(batch, 1)
    slot = torch.searchsorted(csr.contiguous(), place, right=True) - 1
    token = torch.where(slot < csr.shape[1] - 1, src.long(), length)
    return slot.new_full((batch, length + 1), -1).scatter_(1, token, slot)[:, :length]


def _shares(weight: Tensor, assign: Tensor, count: int) -> Tensor:
    total = segment_count(weight, assign, count).clamp_min(_TINY).gather(1, assign.clamp_min(0))
    return (weight / total).masked_fill(assign < 0, 0)


def rescaled(mean: Tensor, x: Tensor, assign: Tensor) -> Tensor:
    """Mean directions with the largest norm of their members; a token alone stays as it is (ToFu, arXiv:2312.01026).

    Args:
        mean: (B, K, C) weighted means in at least fp32.
        x: (B, N, C) the tokens in that dtype.
        assign: (B, N) int64.
    """
    count = mean.shape[1]
    norms = segment_max(torch.linalg.vector_norm(x, dim=-1, keepdim=True), assign, count)
    alone = segment_count(torch.ones_like(assign, dtype=torch.float32), assign, count).unsqueeze(-1) == 1
    length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(_TINY)
    return torch.where(alone, mean, mean / length * norms)


def _operator(
    x: Tensor, csr: Tensor, src: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor | None,
    size: Tensor | None, mode: str, rows: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, normed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    # The flat signature that torch's schemas allow; absent results are empty tensors.
    norm = Norm(norm_weight, norm_bias, eps) if normed else None
    made = _merge_torch(x, csr, src, y, gamma, weight, size, mode, rows, norm)
    return tuple(x.new_empty(0) if part is None else part.contiguous() for part in made)


def _fake(x: Tensor, csr: Tensor, src: Tensor, y: Any, gamma: Any, weight: Any, size: Any, mode: str, rows: Any,
          norm_weight: Any, norm_bias: Any, eps: float, normed: bool) -> tuple[Tensor, ...]:  # fmt: skip
    batch, count = csr.shape[0], csr.shape[1] - 1
    out = x.new_empty((batch, count, x.shape[2]))
    new_size = x.new_empty((batch, count), dtype=wide_dtype(x.dtype))
    moved = x.new_empty(0) if rows is None else rows.new_empty((batch, count, rows.shape[2]))
    return out, new_size, moved, torch.empty_like(out) if normed else x.new_empty(0)


def _kernel(x: Tensor, csr: Tensor, src: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, gamma, weight, size, mode, rows, norm_weight, norm_bias, eps, normed = rest
    norm = Norm(norm_weight, norm_bias, eps) if normed else None
    made = _launch(x, csr, src, y=y, gamma=gamma, weight=weight, size=size, mode=mode, rows=rows, norm=norm)
    return tuple(x.new_empty(0) if part is None else part for part in made)


_launch = library.launcher("merging.merge")
_recorded = library.define(
    "merge(Tensor x, Tensor csr, Tensor src, Tensor? y, Tensor? gamma, Tensor? weight, Tensor? size, str mode,"
    " Tensor? rows, Tensor? norm_weight, Tensor? norm_bias, float eps, bool normed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _operator,
    _fake,
    _kernel,
)


@_merge.implementation("triton", dispatch.triton_refuses, "one kernel: residual, segments, sizes and norm")
def _merge_triton(
    x: Tensor, csr: Tensor, src: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor | None,
    size: Tensor | None, mode: str, rows: Tensor | None, norm: Norm | None,
) -> Any:  # fmt: skip
    if not torch.compiler.is_compiling():
        return _launch(x, csr, src, y=y, gamma=gamma, weight=weight, size=size, mode=mode, rows=rows, norm=norm)
    flat = (None, None, 0.0, False) if norm is None else (*norm, True)
    out, new_size, moved, normed = _recorded(x, csr, src, y, gamma, weight, size, mode, rows, *flat)
    return out, new_size, None if rows is None else moved, None if norm is None else normed


@_merge.implementation("cpp", cpu.refuses, "one pass in C++: residual, segments, sizes and norm")
def _merge_cpp(
    x: Tensor, csr: Tensor, src: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor | None,
    size: Tensor | None, mode: str, rows: Tensor | None, norm: Norm | None,
) -> Any:  # fmt: skip
    return cpu.merge(x, csr, src, y=y, gamma=gamma, weight=weight, size=size, mode=mode, rows=rows, norm=norm)


_merge.implementation("torch", lambda x: None, "segment sums")(_merge_torch)


def merge_with_gradient(x: Tensor, groups: Groups, assign: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of `merge` with gradients for x: forward one kernel, backward a gather.

    Args:
        x: (B, N, C).
        groups: Tokens by slot.
        assign: (B, N) int64, the same map.
        size: (B, N) sizes without gradient, or None for ones.

    Returns:
        (B, K, C) values and (B, K) sizes.
    """
    return _FusedMean.apply(x, size, groups.csr, groups.src, assign)


class _FusedMean(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, size: Tensor | None, csr: Tensor, src: Tensor, assign: Tensor) -> tuple[Tensor, Tensor]:
        made = merge(x, Groups(csr, src), size=size)
        return made.out, made.size

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, size, csr, _, assign = inputs
        ctx.mark_non_differentiable(output[1])
        given = torch.ones_like(assign, dtype=wide_dtype(x.dtype)) if size is None else size
        ctx.save_for_backward(_shares(given, assign, csr.shape[1] - 1), assign)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        share, assign = ctx.saved_tensors
        return spread(grads[0], assign, share=share), None, None, None, None
