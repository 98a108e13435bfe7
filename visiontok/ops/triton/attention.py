"""Attention with a bias over keys that also returns its log-sum-exp, and what is read from attention without its map.

FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691), in base 2. The column
votes and the prefix rows form each probability again from the stored log-sum-exp. Every output element belongs to one
program that sums in a fixed order, so results are the same bit by bit from run to run.
"""

# The language of the kernels is typed as Python functions of tensors, without arithmetic between them.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.triton.configuring import launch_options
from visiontok.ops.triton.matching import precision_for

__all__ = ["attention", "class_rows", "key_votes"]

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# Rows of the smallest product that tensor cores take.
_FEW_ROWS = 16


@triton.jit
def _tile(base, row_stride, start, stop, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    # (BLOCK, BLOCK_D) rows start … start + BLOCK - 1, zero from `stop` on.
    row, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    live = (start + row < stop)[:, None]
    if WIDTH != BLOCK_D:
        live = live & (d < WIDTH)[None, :]
    return tl.load(base + row[:, None] * row_stride + d[None, :], mask=live, other=0.0)


@triton.jit
def _logits(q, k, factor, bias, PRECISION: tl.constexpr):
    # In base 2. Without a precision the operands are halves, whose products are exact in the fp32 accumulator.
    if PRECISION is None:
        dots = tl.dot(q, tl.trans(k))
    else:
        dots = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision=PRECISION)
    return dots * factor + bias[None, :]


@triton.jit
def _key_bias(base, start, stop, BLOCK: tl.constexpr):
    # (BLOCK,) in base 2, -inf from `stop` on.
    j = start + tl.arange(0, BLOCK)
    if base is None:
        bias = tl.where(j < stop, 0.0, -float("inf"))
    else:
        bias = tl.load(base + j, mask=j < stop, other=-float("inf")).to(tl.float32) * _LOG2E
    return bias


@triton.jit
def _online(highest, total, s):
    # One step of the online softmax: new maxima and sums, the probabilities, and what earlier sums shrink by.
    above = tl.maximum(highest, tl.max(s, 1))
    # While all keys of a row are padding its maximum is -inf, and -inf - -inf would be NaN.
    level = tl.where(above == -float("inf"), 0.0, above)
    p = tl.exp2(s - level[:, None])
    shrink = tl.exp2(highest - level)
    return above, total * shrink + tl.sum(p, 1), p, shrink


@triton.jit(
    do_not_specialize=[
        "q_image", "q_head", "q_row", "k_image", "k_head", "k_row", "v_image", "v_head", "v_row",
        "out_image", "out_head", "out_row", "bias_image", "heads", "queries", "keys",
    ]
)  # fmt: skip
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, scale,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, out_image, out_head, out_row,
    bias_image, heads, queries, keys,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of queries: softmax(scale q kᵀ + bias) v and its log-sum-exp."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    lane = tl.program_id(0) // blocks
    b, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_Q
    # Strides come in units of ALIGN: their divisibility, which wide loads need, is then known without being a variant.
    q_base = q_ptr + b * (q_image * ALIGN) + h * (q_head * ALIGN) + first.to(tl.int64) * (q_row * ALIGN)
    k_base = k_ptr + b * (k_image * ALIGN) + h * (k_head * ALIGN)
    v_base = v_ptr + b * (v_image * ALIGN) + h * (v_head * ALIGN)
    out_base = out_ptr + b * (out_image * ALIGN) + h * (out_head * ALIGN) + first.to(tl.int64) * (out_row * ALIGN)
    bias_base = bias_ptr if bias_ptr is None else bias_ptr + b * bias_image
    q = _tile(q_base, q_row * ALIGN, first, queries, WIDTH, BLOCK_D, BLOCK_Q)
    highest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_K):
        k = _tile(k_base, k_row * ALIGN, start, keys, WIDTH, BLOCK_D, BLOCK_K)
        v = _tile(v_base, v_row * ALIGN, start, keys, WIDTH, BLOCK_D, BLOCK_K)
        s = _logits(q, k, scale * _LOG2E, _key_bias(bias_base, start, keys, BLOCK_K), PRECISION)
        highest, total, p, shrink = _online(highest, total, s)
        mixed *= shrink[:, None]
        if PRECISION is None:
            mixed = tl.dot(p.to(v.dtype), v, mixed)
        else:
            mixed = tl.dot(p, v.to(tl.float32), mixed, input_precision=PRECISION)
        k_base += BLOCK_K * (k_row * ALIGN)
        v_base += BLOCK_K * (v_row * ALIGN)
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    row, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    live = first + row < queries
    to = out_base + row[:, None] * (out_row * ALIGN) + d[None, :]
    tl.store(to, mixed.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < WIDTH)[None, :])
    tl.store(lse_ptr + lane.to(tl.int64) * queries + first + row, (highest + tl.log2(total)) * _LN2, mask=live)


@triton.jit(
    do_not_specialize=[
        "q_image", "q_head", "q_row", "k_image", "k_head", "k_row", "bias_image", "heads", "queries", "keys", "skipped",
    ]
)  # fmt: skip
def _vote_kernel(
    q_ptr, k_ptr, bias_ptr, lse_ptr, weight_ptr, out_ptr, scale,
    q_image, q_head, q_row, k_image, k_head, k_row, bias_image, heads, queries, keys, skipped,
    TOGETHER: tl.constexpr,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of keys: weighted column sums over the queries from `skipped` on, and over heads."""
    blocks = tl.cdiv(keys, BLOCK_K)
    lane = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks) * BLOCK_K
    if TOGETHER:
        b, h, count = lane.to(tl.int64), lane.to(tl.int64) * 0, heads
    else:
        b, h, count = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64), 1
    bias = _key_bias(bias_ptr if bias_ptr is None else bias_ptr + b * bias_image, begin, keys, BLOCK_K)
    row = tl.arange(0, BLOCK_Q)
    # Summed per place in a tile and reduced once at the end: no exchange between threads inside the loops.
    sums = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for _ in range(count):
        k_base = k_ptr + b * (k_image * ALIGN) + h * (k_head * ALIGN) + begin.to(tl.int64) * (k_row * ALIGN)
        k = _tile(k_base, k_row * ALIGN, begin, keys, WIDTH, BLOCK_D, BLOCK_K)
        q_base = q_ptr + b * (q_image * ALIGN) + h * (q_head * ALIGN) + skipped * (q_row * ALIGN)
        place = (b * heads + h) * queries
        for start in range(skipped, queries, BLOCK_Q):
            q = _tile(q_base, q_row * ALIGN, start, queries, WIDTH, BLOCK_D, BLOCK_Q)
            s = _logits(q, k, scale * _LOG2E, bias, PRECISION)
            lse = tl.load(lse_ptr + place + start + row, mask=start + row < queries, other=-float("inf"))
            p = tl.exp2(s - (lse * _LOG2E)[:, None])
            if weight_ptr is not None:
                p *= tl.load(weight_ptr + place + start + row, mask=start + row < queries, other=0.0)[:, None]
            # Rows beyond the last, and those whose keys are all padding, attend to nothing.
            sums += tl.where((lse != -float("inf"))[:, None], p, 0.0)
            q_base += BLOCK_Q * (q_row * ALIGN)
        h += 1
    j = begin + tl.arange(0, BLOCK_K)
    tl.store(out_ptr + lane.to(tl.int64) * keys + j, tl.sum(sums, 0), mask=j < keys)


@triton.jit(
    do_not_specialize=[
        "q_image", "q_head", "q_row", "k_image", "k_head", "k_row", "bias_image", "lse_lane", "heads", "prefix", "keys",
        "span",
    ]
)  # fmt: skip
def _row_kernel(
    q_ptr, k_ptr, bias_ptr, lse_ptr, out_ptr, scale,
    q_image, q_head, q_row, k_image, k_head, k_row, bias_image, lse_lane, heads, prefix, keys, span,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per few leading queries and `span` keys: their probabilities."""
    blocks = tl.cdiv(prefix, BLOCK_Q)
    lane = tl.program_id(0) // blocks
    b, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_Q
    q_base = q_ptr + b * (q_image * ALIGN) + h * (q_head * ALIGN) + first.to(tl.int64) * (q_row * ALIGN)
    k_base = k_ptr + b * (k_image * ALIGN) + h * (k_head * ALIGN)
    bias_base = bias_ptr if bias_ptr is None else bias_ptr + b * bias_image
    q = _tile(q_base, q_row * ALIGN, first, prefix, WIDTH, BLOCK_D, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)
    if lse_ptr is None:
        highest = tl.full([BLOCK_Q], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        seen = k_base
        for start in range(0, keys, BLOCK_K):
            k = _tile(seen, k_row * ALIGN, start, keys, WIDTH, BLOCK_D, BLOCK_K)
            s = _logits(q, k, scale * _LOG2E, _key_bias(bias_base, start, keys, BLOCK_K), PRECISION)
            highest, total, _, _ = _online(highest, total, s)
            seen += BLOCK_K * (k_row * ALIGN)
        level = highest + tl.log2(total)
    else:
        level = tl.load(lse_ptr + lane.to(tl.int64) * lse_lane + row, mask=row < prefix, other=0.0) * _LOG2E
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, keys)
    k_base += begin.to(tl.int64) * (k_row * ALIGN)
    out_base = out_ptr + (lane.to(tl.int64) * prefix + row[:, None]) * keys
    for start in range(begin, stop, BLOCK_K):
        k = _tile(k_base, k_row * ALIGN, start, stop, WIDTH, BLOCK_D, BLOCK_K)
        s = _logits(q, k, scale * _LOG2E, _key_bias(bias_base, start, stop, BLOCK_K), PRECISION)
        p = tl.where((level == -float("inf"))[:, None], 0.0, tl.exp2(s - level[:, None]))
        j = start + tl.arange(0, BLOCK_K)
        tl.store(out_base + j[None, :], p, mask=(row < prefix)[:, None] & (j < stop)[None, :])
        k_base += BLOCK_K * (k_row * ALIGN)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ + bias) v and the log-sum-exp of its rows.

    Args:
        q: (B, H, Nq, d) fp32, fp16 or bf16, any strides.
        k: (B, H, Nk, d).
        v: (B, H, Nk, d).
        bias: (B, Nk) fp32 in nats over keys, e.g. log sizes; -inf for padding.
        scale: Factor on the logits.

    Returns:
        (B, H, Nq, d) in q.dtype, in memory (B, Nq, H, d), and (B, H, Nq) fp32 in nats, bias included. Where every key
        is padding: 0 and -inf.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, queries, width = q.shape
    # Side by side, as the projection after it wants the heads of a token.
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        options = _options("attention", q)
        bias, bias_image = _over_keys(bias)
        align, strides = _strides(q, k, v, out)
        _attention_kernel[(triton.cdiv(queries, options["BLOCK_Q"]) * batch * heads,)](
            q, k, v, bias, out, lse, float(scale), *strides, bias_image, heads, queries, k.shape[2],
            ALIGN=align, WIDTH=width, **options,
        )  # fmt: skip
    return out, lse


def key_votes(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, weight: Tensor | None = None,
    first: int = 0, together: bool = False,
) -> Tensor:  # fmt: skip
    """What each key receives when query i spends weight_i by its attention: column sums of the map.

    Args:
        q: (B, H, Nq, d) fp32, fp16 or bf16, any strides.
        k: (B, H, Nk, d).
        lse: (B, H, Nq) fp32, as `attention` returned it for the same q, k, bias and scale.
        bias: (B, Nk) fp32 in nats over keys, or None.
        scale: Factor on the logits.
        weight: (B, H, Nq) fp32; None spends 1 each.
        first: The queries before it spend nothing, e.g. 1 for patches without the class token.
        together: Sum over the heads.

    Returns:
        (B, H, Nk) fp32, or (B, Nk).
    """
    q, k, lse = _rows(q), _rows(k), lse.contiguous()
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    shape = (batch, keys) if together else (batch, heads, keys)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if out.numel():
        options = _options("key_votes", q)
        bias, bias_image = _over_keys(bias)
        align, strides = _strides(q, k)
        lanes = batch if together else batch * heads
        _vote_kernel[(triton.cdiv(keys, options["BLOCK_K"]) * lanes,)](
            q, k, bias, lse, None if weight is None else weight.contiguous(), out, float(scale), *strides, bias_image,
            heads, queries, keys, first, TOGETHER=together, ALIGN=align, WIDTH=width, **options,
        )  # fmt: skip
    return out


def class_rows(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, prefix: int, lse: Tensor | None = None
) -> Tensor:
    """Softmax rows of the leading queries.

    Args:
        q: (B, H, Nq, d) fp32, fp16 or bf16, any strides.
        k: (B, H, Nk, d).
        bias: (B, Nk) fp32 in nats over keys, or None.
        scale: Factor on the logits.
        prefix: Number P of leading queries.
        lse: (B, H, Nq) fp32, as `attention` returned it; None reads the keys twice instead.

    Returns:
        (B, H, P, Nk) fp32; 0 where every key is padding.
    """
    q, k = _rows(q), _rows(k)
    batch, heads, _, width = q.shape
    keys = k.shape[2]
    out = torch.empty(batch, heads, prefix, keys, dtype=torch.float32, device=q.device)
    if out.numel():
        options = _options("class_rows", q) | {"BLOCK_Q": _FEW_ROWS}
        bias, bias_image = _over_keys(bias)
        align, strides = _strides(q, k)
        lse = None if lse is None else lse.contiguous()
        # With sums at hand every block of keys has a program of its own.
        span, lse_lane = (keys, 0) if lse is None else (options["BLOCK_K"], lse.shape[2])
        _row_kernel[(triton.cdiv(prefix, _FEW_ROWS) * batch * heads, triton.cdiv(keys, span))](
            q, k, bias, lse, out, float(scale), *strides, bias_image, lse_lane, heads, prefix, keys, span,
            ALIGN=align, WIDTH=width, **options,
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _over_keys(bias: Tensor | None) -> tuple[Tensor | None, int]:
    if bias is None:
        return None, 0
    bias = _rows(bias)
    return bias, bias.stride(0)


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    # The largest power of two up to 16 that divides all strides, and the strides in its units.
    strides = [s if n > 1 else 0 for x in tensors for s, n in zip(x.stride()[:3], x.shape[:3])]
    align = math.gcd(16, *strides)
    return align, [s // align for s in strides]


def _options(kernel: str, q: Tensor) -> dict[str, Any]:
    width = q.shape[3]
    options = launch_options(f"{kernel}_fp32" if q.dtype == torch.float32 else kernel, width, q.device)
    block_d = max(16, triton.next_power_of_2(width))
    return {**options, "BLOCK_D": block_d, "PRECISION": precision_for(q.dtype), "enable_fp_fusion": True}
