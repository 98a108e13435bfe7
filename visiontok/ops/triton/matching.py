"""Bipartite matching of tokens by cosine, from raw rows or keys: norms, products, row maximum and plan without N x N.

Products are of raw rows and are scaled by the inverse norms afterwards: products of halves are exact, where rounded
unit vectors would change which tokens are most alike. Ties go to the lowest index, NaN counts as the lowest similarity,
and a zero row has similarity 0 to everything. Rows are read as fp32, fp16 or bf16 and all else is fp32.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.constants import shape_constant
from visiontok.ops.triton.configuring import INTERPRETED, launch_options
from visiontok.ops.triton.planning import empty_plan, place_tile, plan, rank_tile, steps_of

__all__ = [
    "best_kernel", "best_match", "dots", "inverse_norms", "match_kernel", "match_slots", "norm_kernel", "plan",
    "precision_for", "strides_of",
]  # fmt: skip

# Below this length a vector has no direction; as in F.normalize.
_TINY = tl.constexpr(1e-12)
# Longest sequence and widest rows that one program takes: its counting is quadratic in the length, and tiles hold
# whole rows.
_LONGEST = 1024
_WIDEST = 128


@triton.jit
def _inverse(squares):
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), _TINY))


@triton.jit
def _inverse_norm(rows):
    rows = rows.to(tl.float32)
    return _inverse(tl.sum(rows * rows, 1))


@triton.jit
def _product(left, right, total, PRECISION: tl.constexpr):
    # Without a precision the operands are halves, whose products are exact in the fp32 accumulator.
    if PRECISION is None:
        total = tl.dot(left, tl.trans(right), total)
    else:
        total = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), total, input_precision=PRECISION)
    return total


@triton.jit
def _improve(best, partner, similarity, start, live):
    # Takes a tile of similarities to entries from `start` on into the running maximum of each row.
    similarity = tl.where(live[None, :] & (similarity == similarity), similarity, -float("inf"))
    highest, index = tl.max(similarity, axis=1, return_indices=True, return_indices_tie_break_left=True)
    # Strictly: an earlier tile wins a tie.
    better = highest > best
    return tl.where(better, highest, best), tl.where(better, start + index, partner)


@triton.jit
def dots(
    base, row_stride, left, right, in_left, in_right,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, columns) fp32 products of the tokens `left` with the tokens `right` of one image."""
    total = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        d = start + tl.arange(0, DEPTH)
        inside = (d < WIDTH)[None, :]
        x = tl.load(base + left[:, None] * row_stride + d[None, :], mask=in_left[:, None] & inside, other=0.0)
        y = tl.load(base + right[:, None] * row_stride + d[None, :], mask=in_right[:, None] & inside, other=0.0)
        total = _product(x, y, total, PRECISION)
    return total


@triton.jit(do_not_specialize=["image_stride", "row_stride", "length"])
def norm_kernel(
    metric_ptr, inverse_ptr, image_stride, row_stride, length,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Inverse norms of rows; grid (tiles of tokens, images)."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = metric_ptr + image * (image_stride * ALIGN) + i.to(tl.int64)[:, None] * (row_stride * ALIGN)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        d = start + tl.arange(0, DEPTH)
        x = tl.load(row + d[None, :], mask=(i < length)[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    tl.store(inverse_ptr + image * length + i, _inverse(squares), mask=i < length)


@triton.jit(
    do_not_specialize=[
        "image_stride", "row_stride", "a_image", "a_step", "b_image", "b_step", "length", "leaving", "receiving",
    ],
    # Lists are slices of rankings, from any entry on.
    do_not_specialize_on_alignment=["a_ptr", "b_ptr"],
)  # fmt: skip
def best_kernel(
    metric_ptr, inverse_ptr, a_ptr, b_ptr, score_ptr, partner_ptr,
    image_stride, row_stride, a_image, a_step, b_image, b_step, length, leaving, receiving,
    ALIGN: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Running maximum and its index over b for a tile of a; grid (tiles of a, images)."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_a = i < leaving
    base = metric_ptr + image * (image_stride * ALIGN)
    inverse = inverse_ptr + image * length
    token_a = tl.load(a_ptr + image * a_image + i * a_step, mask=in_a, other=0)
    scale = tl.load(inverse + token_a, mask=in_a, other=0.0)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    partner = tl.zeros([ROWS], tl.int32)
    for start in range(0, receiving, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        in_b = j < receiving
        token_b = tl.load(b_ptr + image * b_image + j * b_step, mask=in_b, other=0)
        similarity = dots(base, row_stride * ALIGN, token_a, token_b, in_a, in_b, WIDTH, DEPTH, PRECISION)
        similarity *= scale[:, None] * tl.load(inverse + token_b, mask=in_b, other=0.0)[None, :]
        best, partner = _improve(best, partner, similarity, start, in_b)
    tl.store(score_ptr + image * leaving + i, best, mask=in_a)
    tl.store(partner_ptr + image * leaving + i, partner, mask=in_a)


def best_match(metric: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each token of set a among the tokens of set b.

    Args:
        metric: (B, N, d) rows of any length, fp32, fp16 or bf16, any strides.
        a: (Na,) or (B, Na) int64 positions.
        b: (Nb,) or (B, Nb) int64 positions, at least one.

    Returns:
        (B, Na) fp32 similarity and (B, Na) int64 index into b. Where every similarity is NaN: -inf and 0.
    """
    metric = metric if metric.stride(-1) == 1 else metric.contiguous()
    batch, length, width = metric.shape
    leaving, receiving = a.shape[-1], b.shape[-1]
    score = torch.empty(batch, leaving, dtype=torch.float32, device=metric.device)
    partner = torch.empty(batch, leaving, dtype=torch.int64, device=metric.device)
    if score.numel():
        precision = precision_for(metric.dtype)
        options = launch_options("best" if precision is None else "best_fp32", width, metric.device)
        align, strides = strides_of(metric)
        best_kernel[(triton.cdiv(leaving, options["ROWS"]), batch)](
            metric, inverse_norms(metric), a, b, score, partner, *strides, *steps_of(a), *steps_of(b),
            length, leaving, receiving,
            ALIGN=align, WIDTH=width, PRECISION=precision, enable_fp_fusion=True, **options,
        )  # fmt: skip
    return score, partner


def inverse_norms(metric: Tensor) -> Tensor:
    """(B, N) fp32 inverse lengths of the rows of metric (B, N, d); lengths below 1e-12 count as 1e-12."""
    batch, length, width = metric.shape
    inverse = torch.empty(batch, length, dtype=torch.float32, device=metric.device)
    options = launch_options("norm", width, metric.device)
    align, strides = strides_of(metric)
    norm_kernel[(triton.cdiv(length, options["ROWS"]), batch)](
        metric, inverse, *strides, length, ALIGN=align, WIDTH=width, enable_fp_fusion=True, **options
    )
    return inverse


@triton.jit
def _keys(base, head_stride, row_stride, token, live, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    # (tokens, BLOCK_D) keys: those of one head as they are, of several their fp32 sum, whose cosines are the mean's.
    d = tl.arange(0, BLOCK_D)
    where = base + token[:, None] * row_stride + d[None, :]
    live = live[:, None] & (d < WIDTH)[None, :]
    if HEADS == 1:
        keys = tl.load(where, mask=live, other=0.0)
    else:
        keys = tl.zeros([token.shape[0], BLOCK_D], tl.float32)
        # Unrolled, so that the loads of several heads are under way at once.
        for head in tl.range(0, HEADS, loop_unroll_factor=4):
            keys += tl.load(where + head * head_stride, mask=live, other=0.0).to(tl.float32)
    return keys


@triton.jit(do_not_specialize=["image_stride", "head_stride", "row_stride", "length", "r", "prefix"])
def match_kernel(
    key_ptr, score_ptr, scratch_ptr, assign_ptr, csr_ptr, src_ptr,
    image_stride, head_stride, row_stride, length, r, prefix,
    ALIGN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ASCENDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """From keys to a plan over even and odd positions; one program per image."""
    image = tl.program_id(0).to(tl.int64)
    first_a = prefix + prefix % 2
    first_b = prefix + (prefix + 1) % 2
    leaving = (length - first_a + 1) // 2
    receiving = (length - first_b + 1) // 2
    base = key_ptr + image * (image_stride * ALIGN)
    score, partner = score_ptr + image * leaving, scratch_ptr + image * leaving * 2
    code = partner + leaving
    for top in range(0, leaving, ROWS):
        i = top + tl.arange(0, ROWS)
        x = _keys(base, head_stride * ALIGN, row_stride * ALIGN, first_a + 2 * i, i < leaving, HEADS, WIDTH, BLOCK_D)
        scale = _inverse_norm(x)
        best = tl.full([ROWS], -float("inf"), tl.float32)
        to = tl.zeros([ROWS], tl.int32)
        for start in range(0, receiving, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            in_b = j < receiving
            y = _keys(base, head_stride * ALIGN, row_stride * ALIGN, first_b + 2 * j, in_b, HEADS, WIDTH, BLOCK_D)
            similarity = _product(x, y, tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
            similarity *= scale[:, None] * _inverse_norm(y)[None, :]
            best, to = _improve(best, to, similarity, start, in_b)
        tl.store(score + i, best, mask=i < leaving)
        tl.store(partner + i, to, mask=i < leaving)
    # Threads read in the next phase what others wrote in this one.
    tl.debug_barrier()
    for top in range(0, leaving, ROWS):
        rank_tile(score, partner, code, top + tl.arange(0, ROWS), leaving, r, COUNTED)
    tl.debug_barrier()
    assign, csr, src = assign_ptr + image * length, csr_ptr + image * (length - r + 1), src_ptr + image * length
    for top in range(0, tl.maximum(tl.maximum(leaving, receiving), prefix), ROWS):
        place_tile(
            code, None, 0, None, 0, assign, csr, src, top + tl.arange(0, ROWS),
            leaving, receiving, r, prefix, ASCENDING, COUNTED,
        )  # fmt: skip


def match_slots(key: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching (arXiv:2210.09461) from keys to slots: even positions merge into odd ones.

    Cosines are of the mean over heads, formed in fp32. Up to 1024 tokens and d = 128 it is one launch.

    Args:
        key: (B, H, N, d) fp32, fp16 or bf16, any strides.
        r: Tokens to merge, 1 … (N - prefix) // 2.
        prefix: Leading tokens, which neither leave nor receive. With one the unmerged tokens keep their order, without
            they come most similar first.

    Returns:
        (B, N) int64 slot of each token among K = N - r: prefix, unmerged even positions, then odd positions;
        (B, K + 1) int32 bounds of the slots in (B, N) int32 tokens grouped by slot, ascending inside a slot.
    """
    key = key if key.stride(-1) == 1 else key.contiguous()
    batch, heads, length, width = key.shape
    if length > _LONGEST or width > _WIDEST:
        metric = key[:, 0] if heads == 1 else key.sum(dim=1, dtype=torch.float32)
        a, b = _even_odd(prefix, length, key.device)
        score, partner = best_match(metric, a, b)
        return plan(score, partner, a, b, r, prefix, length, prefix > 0)
    made = empty_plan(batch, length, r, key.device)
    if batch:
        leaving = (length - prefix - prefix % 2 + 1) // 2
        score = torch.empty(batch, leaving, dtype=torch.float32, device=key.device)
        scratch = torch.empty(batch, 2, leaving, dtype=torch.int32, device=key.device)
        precision = precision_for(key.dtype if heads == 1 else torch.float32)
        options = launch_options("match" if precision is None else "match_fp32", width, key.device)
        align, strides = strides_of(key)
        match_kernel[(batch,)](
            key, score, scratch, *made, *strides, length, r, prefix,
            ALIGN=align, HEADS=heads, WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(width)),
            PRECISION=precision, ASCENDING=prefix > 0, enable_fp_fusion=True, **options,
        )  # fmt: skip
    return made


@shape_constant
def _even_odd(prefix: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    place = torch.arange(length, device=device)
    return place[prefix + prefix % 2 :: 2], place[prefix + (prefix + 1) % 2 :: 2]


def precision_for(dtype: torch.dtype) -> str | None:
    """How products of rows of this dtype are formed: `input_precision` of fp32 ones, None for exact ones of halves."""
    if INTERPRETED:
        # Its arithmetic of bf16 is wrong.
        return "ieee"
    if dtype != torch.float32:
        return None
    # Three TF32 products are as good as fp32, on tensor cores; AMD's have fp32.
    return "ieee" if torch.version.hip else "tf32x3"


def strides_of(x: Tensor) -> tuple[int, list[int]]:
    """The largest power of two up to 16 that divides all strides but the last, and those strides in its units.

    Kernels multiply them again: the divisibility that wide loads need is then known without a variant for each N.
    """
    strides = [step if count > 1 else 0 for step, count in zip(x.stride()[:-1], x.shape[:-1])]
    align = math.gcd(16, *strides)
    return align, [step // align for step in strides]
