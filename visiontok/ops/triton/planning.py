"""From scores to a plan: which tokens merge, the slot of every token, and the tokens of every slot.

Ranks and positions are found by counting comparisons: no sort, no scan, no atomics, so the result is the same bit by
bit from run to run, and that of a stable descending sort. The helpers serve both the kernels here, which have a
program per tile, and the one of `matching` that has a program per image.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.triton.configuring import launch_options

__all__ = ["empty_plan", "place_kernel", "place_tile", "plan", "rank_kernel", "rank_tile", "steps_of"]

# Above every index: the destination of a token that stays, so that it counts before no other.
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _scores(score, i, leaving):
    # NaN would break the order, which must hold every token once: it ranks last.
    value = tl.load(score + i, mask=i < leaving, other=-float("inf"))
    return tl.where(value == value, value, -float("inf"))


@triton.jit
def rank_tile(score, partner, code, i, leaving, r, COLUMNS: tl.constexpr):
    """Writes what becomes of entries i of set a, of `leaving` in all: their partner, or -1 - rank if they stay."""
    value = _scores(score, i, leaving)
    rank = tl.zeros(i.shape, tl.int32)
    for start in range(0, leaving, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = _scores(score, j, leaving)[None, :]
        ahead = (other > value[:, None]) | ((other == value[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    live = i < leaving
    to = tl.load(partner + i, mask=live, other=0).to(tl.int32)
    tl.store(code + i, tl.where(rank < r, to, -1 - rank), mask=live)


@triton.jit
def _token(positions, step, first, i, live):
    # Token of entry i of a list; without a list the set is every second token from `first` on.
    return first + 2 * i if positions is None else tl.load(positions + i * step, mask=live, other=0).to(tl.int32)


@triton.jit
def _count(
    code, a_ptr, a_step, first_a, i, to, token_a, token_b, leaving,
    ASCENDING: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # For entries i of both sets: staying tokens of a before i; merged tokens in front of token_a, which moves to `to`,
    # in the order of (slot, token); those in slots before that of b's entry i; those in its slot in front of token_b.
    stay = tl.zeros(i.shape, tl.int32)
    front = tl.zeros(i.shape, tl.int32)
    lower = tl.zeros(i.shape, tl.int32)
    inside = tl.zeros(i.shape, tl.int32)
    for start in range(0, leaving, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = tl.load(code + j, mask=j < leaving, other=-1)
        other = tl.where(other < 0, _NOWHERE, other)[None, :]
        token = _token(a_ptr, a_step, first_a, j, j < leaving)[None, :]
        if ASCENDING:
            stay += tl.sum(((other == _NOWHERE) & (j[None, :] < i[:, None])).to(tl.int32), 1)
        before = (other < to[:, None]) | ((other == to[:, None]) & (token < token_a[:, None]))
        front += tl.sum(before.to(tl.int32), 1)
        lower += tl.sum((other < i[:, None]).to(tl.int32), 1)
        inside += tl.sum(((other == i[:, None]) & (token < token_b[:, None])).to(tl.int32), 1)
    return stay, front, lower, inside


@triton.jit
def place_tile(
    code, a_ptr, a_step, b_ptr, b_step, assign, csr, src, i, leaving, receiving, r, prefix,
    ASCENDING: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes assign, csr and src of the prefix tokens i and of entries i of the sets a and b, of one image.

    Without lists (None) the sets are the even and the odd positions from the prefix on.
    """
    first_a = prefix + prefix % 2
    first_b = prefix + (prefix + 1) % 2
    in_a, in_b = i < leaving, i < receiving
    token_a = _token(a_ptr, a_step, first_a, i, in_a)
    token_b = _token(b_ptr, b_step, first_b, i, in_b)
    fate = tl.load(code + i, mask=in_a, other=-1)
    merged = fate >= 0
    stay, front, lower, inside = _count(
        code, a_ptr, a_step, first_a, i, fate, token_a, token_b, leaving, ASCENDING, COLUMNS
    )
    # Slots of b start here; slots before it hold one token each, so they are their own places in csr and src.
    base = prefix + leaving - r
    slot_a = prefix + (stay if ASCENDING else -1 - fate - r)
    tl.store(assign + token_a, tl.where(merged, base + fate, slot_a), mask=in_a)
    tl.store(csr + slot_a, slot_a, mask=in_a & (fate < 0))
    tl.store(src + slot_a, token_a, mask=in_a & (fate < 0))
    own = _token(b_ptr, b_step, first_b, fate, merged)
    tl.store(src + base + fate + front + (own < token_a).to(tl.int32), token_a, mask=merged)
    tl.store(assign + token_b, base + i, mask=in_b)
    tl.store(csr + base + i, base + i + lower, mask=in_b)
    tl.store(src + base + i + lower + inside, token_b, mask=in_b)
    in_prefix = i < prefix
    tl.store(assign + i, i, mask=in_prefix)
    tl.store(csr + i, i, mask=in_prefix)
    tl.store(src + i, i, mask=in_prefix)
    # The last bound: the number of tokens. Every tile writes it.
    tl.store(csr + base + receiving, base + receiving + r)


@triton.jit(do_not_specialize=["leaving", "r"])
def rank_kernel(score_ptr, partner_ptr, code_ptr, leaving, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`rank_tile`; grid (tiles of a, images)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * leaving
    rank_tile(score_ptr + row, partner_ptr + row, code_ptr + row, i, leaving, r, COLUMNS)


@triton.jit(
    do_not_specialize=["a_image", "a_step", "b_image", "b_step", "leaving", "receiving", "r", "prefix"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr"],
)
def place_kernel(
    code_ptr, a_ptr, b_ptr, assign_ptr, csr_ptr, src_ptr, a_image, a_step, b_image, b_step,
    leaving, receiving, r, prefix, ASCENDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`place_tile`; grid (tiles of the longest of a, b and the prefix, images)."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = prefix + leaving + receiving
    place_tile(
        code_ptr + image * leaving, a_ptr + image * a_image, a_step, b_ptr + image * b_image, b_step,
        assign_ptr + image * length, csr_ptr + image * (length - r + 1), src_ptr + image * length,
        i, leaving, receiving, r, prefix, ASCENDING, COLUMNS,
    )  # fmt: skip


def plan(
    score: Tensor, partner: Tensor, a: Tensor, b: Tensor, r: int, prefix: int, length: int, ascending: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the r tokens of set a with the highest scores into their partners in set b.

    Slots: the prefix, the other tokens of a, then b in order. Among equal scores the earlier entry of a goes first;
    NaN counts as the lowest score.

    Args:
        score: (B, Na) fp32.
        partner: (B, Na) int64 indices into b.
        a: (Na,) or (B, Na) int64 positions.
        b: (Nb,) or (B, Nb) int64 positions; a and b hold every token but the prefix once.
        r: Tokens to merge, 0 … Na.
        prefix: Number of leading tokens that keep their places.
        length: N = prefix + Na + Nb.
        ascending: Whether the unmerged tokens of a keep their order in a; else highest score first.

    Returns:
        (B, N) int64 slot of each token among K = N - r; (B, K + 1) int32 bounds of the slots in (B, N) int32 tokens
        grouped by slot, ascending inside a slot.
    """
    batch, leaving = score.shape
    receiving = length - prefix - leaving
    made = empty_plan(batch, length, r, score.device)
    if not made[0].numel():
        return made
    code = torch.empty(batch, leaving, dtype=torch.int32, device=score.device)
    if leaving:
        options = launch_options("rank", leaving, score.device)
        rank_kernel[(triton.cdiv(leaving, options["ROWS"]), batch)](
            score.contiguous(), partner.contiguous(), code, leaving, r, enable_fp_fusion=True, **options
        )
    options = launch_options("place", leaving, score.device)
    place_kernel[(triton.cdiv(max(leaving, receiving, prefix), options["ROWS"]), batch)](
        code, a, b, *made, *steps_of(a), *steps_of(b), leaving, receiving, r, prefix,
        ASCENDING=ascending, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return made


def empty_plan(batch: int, length: int, r: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten assign, csr and src of `plan`."""
    assign = torch.empty(batch, length, dtype=torch.int64, device=device)
    csr = torch.empty(batch, length - r + 1, dtype=torch.int32, device=device)
    return assign, csr, torch.empty(batch, length, dtype=torch.int32, device=device)


def steps_of(positions: Tensor) -> tuple[int, ...]:
    """Strides of a list (M,) or lists (B, M), from image to image and from entry to entry."""
    return (0, positions.stride(0)) if positions.dim() == 1 else positions.stride()
