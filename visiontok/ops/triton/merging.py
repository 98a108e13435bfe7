"""Kernels that move tokens: merging with all that surrounds it in a block, and the way back.

Sums accumulate in fp32 in the order of the tokens, every output is written by one program, and nothing is atomic, so
results are the same bits from run to run.
"""

# The language of the kernels is typed as Python functions of tensors, without arithmetic between them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.triton.configuring import launch_options
from visiontok.ops.triton.grouping import group

__all__ = ["Merged", "group", "merge", "spread"]

Mode = Literal["mean", "sum", "amax", "absmax", "mlerp"]

# Smallest positive normal fp32 number: divides a zero by something.
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Members whose weights are summed at once: most slots have fewer.
_AT_ONCE = tl.constexpr(16)
# More slots per program than this would wait for the longest of too many lists.
_MOST_SLOTS = 32


class Merged(NamedTuple):
    """What `merge` makes of the tokens.

    Attributes:
        out: (B, K, C) values of the slots in the dtype of x.
        size: (B, K) fp32, the sizes of the tokens of each slot summed, or their number.
        rows: (B, K, R) fp32 weighted means of the rows, or None without rows.
        normed: (B, K, C) LayerNorm of `out` in its dtype, or None without a norm.
    """

    out: Tensor
    size: Tensor
    rows: Tensor | None
    normed: Tensor | None


def merge(
    x: Tensor, csr: Tensor, src: Tensor, *, y: Tensor | None = None, gamma: Tensor | None = None,
    weight: Tensor | None = None, size: Tensor | None = None, mode: Mode = "mean", rows: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> Merged:  # fmt: skip
    """Residual, LayerScale, merge, sizes and LayerNorm in one pass over the tokens `x + gamma * y`.

    Args:
        x: (B, N, C) fp32, fp16 or bf16.
        csr: (B, K + 1) int32, see `group`.
        src: (B, N) int32.
        y: (B, N, C) what the sub-layer adds to x.
        gamma: (C,) LayerScale of y.
        weight: (B, N) share of each token in its slot's value. Default: the sizes.
        size: (B, N) fp32 sizes of the tokens. Default: ones.
        mode: `mean` divides by the sum of the weights, `sum` does not, `amax` takes the largest entry per channel,
            `absmax` the one of largest magnitude (of two the positive one), `mlerp` gives the mean the largest norm
            among the tokens (ToFu, arXiv:2312.01026). A slot with one token copies it, except in `sum`; one without
            tokens is zero, and so is a mean whose weights are all zero.
        rows: (B, N, R) fp32 numbers that are averaged by the same weights in every mode, such as positions.
        norm: (weight (C,), bias (C,), eps) of a LayerNorm that follows.
    """
    batch, _, channels = x.shape
    slots = csr.shape[1] - 1
    x = _contiguous_rows(x)
    y = None if y is None else _contiguous_rows(y)
    out = torch.empty(batch, slots, channels, dtype=x.dtype, device=x.device)
    size_out = torch.empty(batch, slots, dtype=torch.float32, device=x.device)
    rows_out = None
    if rows is not None:
        rows_out = torch.empty(batch, slots, rows.shape[2], dtype=torch.float32, device=x.device)
    normed = None if norm is None else torch.empty_like(out)
    if batch == 0 or slots == 0:
        return Merged(out, size_out, rows_out, normed)
    options = launch_options("merge", channels, x.device)
    whole = triton.next_power_of_2(channels)
    tile = options.pop("tile")
    # Both need a token's whole row in one program.
    width = whole if norm is not None or mode == "mlerp" else min(whole, tile)
    held = min(max(tile // width, 1), _MOST_SLOTS)
    align, strides = _units(x, y)
    scale, shift, eps = (None, None, 0.0) if norm is None else norm
    grid = (batch * triton.cdiv(slots, held) * triton.cdiv(channels, width),)
    _merge_kernel[grid](
        x, y, _dense(gamma), _dense(weight), _dense(size), _dense(rows), _dense(csr), _dense(src),
        out, size_out, rows_out, normed, _dense(scale), _dense(shift), eps,
        *strides, x.shape[1], slots,
        MODE=mode, CHANNELS=channels, ROW=0 if rows is None else rows.shape[2], ALIGN=align, SLOTS=held, WIDTH=width,
        UNROLL=options.pop("unroll"), enable_fp_fusion=True, **options,
    )  # fmt: skip
    return Merged(out, size_out, rows_out, normed)


@triton.jit(do_not_specialize=["x_batch", "x_row", "y_batch", "y_row", "num_tokens", "num_slots"])
def _merge_kernel(
    x, y, gamma, weight, size, rows, csr, src, out, size_out, rows_out, normed, norm_weight, norm_bias, eps,
    x_batch, x_row, y_batch, y_row, num_tokens, num_slots,
    MODE: tl.constexpr, CHANNELS: tl.constexpr, ROW: tl.constexpr, ALIGN: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # Strides count in units of ALIGN elements: the compiler must know the divisor to load vectors, and would make
    # variants for lengths if it looked at the strides themselves.
    parts: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    blocks = tl.cdiv(num_slots, SLOTS)
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts
    image = (block // blocks).to(tl.int64)
    slot = (block % blocks) * SLOTS + tl.arange(0, SLOTS)
    channel = part * WIDTH + tl.arange(0, WIDTH)
    live, real = slot < num_slots, channel < CHANNELS

    csr += image * (num_slots + 1)
    first = tl.load(csr + slot, mask=live, other=0)
    stop = tl.load(csr + slot + 1, mask=live, other=0)
    count, longest = stop - first, tl.max(stop - first, axis=0)
    x += image * x_batch * ALIGN
    src += image * num_tokens
    mass = count.to(tl.float32)
    if size is not None:
        size += image * num_tokens
        mass = _totals(size, src, first, stop, longest, SLOTS)
    total, given = mass, size
    if weight is not None:
        given = weight + image * num_tokens
        total = _totals(given, src, first, stop, longest, SLOTS)
    total = tl.maximum(total, _TINY)
    inverse = tl.div_rn(1.0, total)
    if y is not None:
        y += image * y_batch * ALIGN

    acc = tl.full([SLOTS, WIDTH], float("-inf") if MODE == "amax" else 0.0, tl.float32)
    peak = tl.zeros([SLOTS], tl.float32)
    for e in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            inside = first + e + u < stop
            token = tl.load(src + first + e + u, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & real[None, :]
            place = token[:, None] * x_row * ALIGN + channel[None, :]
            value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
            if y is not None:
                place = token[:, None] * y_row * ALIGN + channel[None, :]
                added = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
                if gamma is not None:
                    added *= tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)[None, :]
                value += added
            if MODE == "amax":
                acc = tl.where(mask & ((value > acc) | (value != value)), value, acc)
            elif MODE == "absmax":
                larger = tl.abs(value) > tl.abs(acc)
                larger |= (tl.abs(value) == tl.abs(acc)) & (value > acc)
                acc = tl.where(larger | (value != value), value, acc)
            elif MODE == "sum":
                acc += _weights(given, token, inside)[:, None] * value
            else:
                acc += _shares(given, token, inside, total, inverse)[:, None] * value
            if MODE == "mlerp":
                peak = tl.maximum(peak, tl.sum(value * value, axis=1))
    if MODE == "amax":
        acc = tl.where((count > 0)[:, None] & real[None, :], acc, 0.0)
    elif MODE == "mlerp":
        length = tl.maximum(tl.sqrt_rn(tl.sum(acc * acc, axis=1)), _TINY)
        # In two steps: of a mean of zero the unit is zero, while the ratio of the norms may be infinite.
        unit = acc * tl.div_rn(1.0, length)[:, None]
        acc = tl.where((count > 1)[:, None], unit * tl.sqrt_rn(peak)[:, None], acc)

    slot_row = image * num_slots + slot
    shown = live[:, None] & real[None, :]
    place = slot_row[:, None] * CHANNELS + channel[None, :]
    kept = acc.to(out.dtype.element_ty)
    tl.store(out + place, kept, mask=shown)
    if part == 0:
        tl.store(size_out + slot_row, mass, mask=live)
        if rows is not None:
            rows += image * num_tokens * ROW
            _merge_rows(rows, given, src, rows_out, slot_row, live, first, stop, longest, total, inverse, ROW, SLOTS)
    if normed is not None:
        # What the next layer would have read, after rounding.
        value = kept.to(tl.float32)
        value -= (tl.sum(value, axis=1) / CHANNELS)[:, None]
        value = tl.where(real[None, :], value, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, axis=1) / CHANNELS + eps)[:, None]
        if norm_weight is not None:
            value *= tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            value += tl.load(norm_bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + place, value.to(normed.dtype.element_ty), mask=shown)


@triton.jit
def _merge_rows(
    rows, given, src, rows_out, slot_row, live, first, stop, longest, total, inverse,
    ROW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    entry = tl.arange(0, triton.next_power_of_2(ROW))
    real = entry < ROW
    acc = tl.zeros([SLOTS, triton.next_power_of_2(ROW)], tl.float32)
    for e in range(0, longest):
        inside = first + e < stop
        token = tl.load(src + first + e, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & real[None, :]
        value = tl.load(rows + token[:, None] * ROW + entry[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += _shares(given, token, inside, total, inverse)[:, None] * value
    tl.store(rows_out + slot_row[:, None] * ROW + entry[None, :], acc, mask=live[:, None] & real[None, :])


@triton.jit
def _totals(values, src, first, stop, longest, SLOTS: tl.constexpr):
    total = tl.zeros([SLOTS], tl.float32)
    for e in range(0, longest, _AT_ONCE):
        at = first[:, None] + e + tl.arange(0, _AT_ONCE)[None, :]
        inside = at < stop[:, None]
        token = tl.load(src + at, mask=inside, other=0).to(tl.int64)
        total += tl.sum(_weights(values, token, inside), axis=1)
    return total


@triton.jit
def _shares(given, token, inside, total, inverse):
    # Formed before the products, and exactly one where a token is all of its slot: its values are copied bit by bit.
    weights = _weights(given, token, inside)
    return tl.where(weights == total, 1.0, weights * inverse)


@triton.jit
def _weights(given, token, inside):
    weights = inside.to(tl.float32)
    if given is not None:
        weights = tl.load(given + token, mask=inside, other=0.0).to(tl.float32)
    return weights


def spread(y: Tensor, assign: Tensor, residual: Tensor | None = None, share: Tensor | None = None) -> Tensor:
    """Gives every token the value of its slot: restoring, with the residual added, and the backward of `merge`.

    Args:
        y: (B, K, C) fp32, fp16 or bf16.
        assign: (B, N) int64 slot of each token, -1 dropped.
        residual: (B, N, C) added to it; the whole of what a dropped token gets. Default: zero.
        share: (B, N) fp32 factor of each token; its weight over its slot's total for the gradient of a mean.

    Returns:
        (B, N, C) in the dtype that y and the residual promote to.
    """
    batch, _, channels = y.shape
    length = assign.shape[1]
    dtype = y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype)
    out = torch.empty(batch, length, channels, dtype=dtype, device=y.device)
    if batch == 0 or length == 0:
        return out
    y = _contiguous_rows(y)
    residual = None if residual is None else _contiguous_rows(residual)
    options = launch_options("spread", channels, y.device)
    tile = options.pop("tile")
    width = min(triton.next_power_of_2(channels), tile)
    held = min(max(tile // width, 1), _MOST_SLOTS)
    align, strides = _units(y, residual)
    grid = (batch * triton.cdiv(length, held) * triton.cdiv(channels, width),)
    _spread_kernel[grid](
        y, assign.contiguous(), residual, _dense(share), out, *strides, length,
        CHANNELS=channels, ALIGN=align, TOKENS=held, WIDTH=width, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["y_batch", "y_row", "base_batch", "base_row", "num_tokens"])
def _spread_kernel(
    y, assign, residual, share, out, y_batch, y_row, base_batch, base_row, num_tokens,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Strides in units of ALIGN elements, as in the merge.
    parts: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    blocks = tl.cdiv(num_tokens, TOKENS)
    block = tl.program_id(0) // parts
    image = (block // blocks).to(tl.int64)
    token = (block % blocks) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    channel = (tl.program_id(0) % parts) * WIDTH + tl.arange(0, WIDTH)
    live = token < num_tokens
    shown = live[:, None] & (channel < CHANNELS)[None, :]
    token_row = image * num_tokens + token
    slot = tl.load(assign + token_row, mask=live, other=-1)
    held = slot >= 0
    place = (image * y_batch + slot[:, None] * y_row) * ALIGN + channel[None, :]
    value = tl.load(y + place, mask=shown & held[:, None], other=0.0).to(tl.float32)
    if share is not None:
        value *= tl.load(share + token_row, mask=held, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        base = (image * base_batch + token[:, None] * base_row) * ALIGN + channel[None, :]
        value += tl.load(residual + base, mask=shown, other=0.0).to(tl.float32)
    tl.store(out + token_row[:, None] * CHANNELS + channel[None, :], value.to(out.dtype.element_ty), mask=shown)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _units(x: Tensor, y: Tensor | None) -> tuple[int, list[int]]:
    # The largest vector that no row cuts, and the strides of images and tokens counted in it.
    strides = [*x.stride()[:2], *((0, 0) if y is None else y.stride()[:2])]
    align = math.gcd(16, *strides)
    return align, [stride // align for stride in strides]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
