"""Grouping tokens by slot, which every merge reads."""

# The language of the kernels is typed as Python functions of tensors, without arithmetic between them.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.triton.configuring import launch_options

__all__ = ["group"]


def group(assign: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Groups tokens by slot, by counting instead of sorting.

    Args:
        assign: (B, N) int64 slot of each token in `[0, K)`, -1 dropped.
        num_slots: K.

    Returns:
        csr: (B, K + 1) int32; the tokens of slot k are `src[csr[k]:csr[k + 1]]`. Dropped tokens come after `csr[K]`.
        src: (B, N) int32, token indices ordered by slot, ascending inside a slot.
    """
    batch, length = assign.shape
    csr = torch.empty(batch, num_slots + 1, dtype=torch.int32, device=assign.device)
    src = torch.empty(batch, length, dtype=torch.int32, device=assign.device)
    if batch == 0:
        return csr, src
    options = launch_options("group", length, assign.device)
    block, tile = options.pop("block"), options.pop("tile")
    grid = (batch * triton.cdiv(max(length, num_slots + 1), block),)
    _group_kernel[grid](
        assign.contiguous(), csr, src, length, num_slots, BLOCK=block, TILE=tile, enable_fp_fusion=True, **options
    )
    return csr, src


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _group_kernel(assign, csr, src, num_tokens, num_slots, BLOCK: tl.constexpr, TILE: tl.constexpr):
    blocks = tl.cdiv(tl.maximum(num_tokens, num_slots + 1), BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    assign += image * num_tokens
    own = tl.load(assign + i, mask=i < num_tokens, other=-1).to(tl.int32)
    own = tl.where(own < 0, num_slots, own)
    before = tl.zeros([BLOCK, TILE], tl.int32)
    below = tl.zeros([BLOCK, TILE], tl.int32)
    for start in range(0, num_tokens, TILE):
        j = start + tl.arange(0, TILE)
        slot = tl.load(assign + j, mask=j < num_tokens, other=-1).to(tl.int32)
        # Dropped tokens come after every slot, like those beyond the last token, which are before nothing.
        slot = tl.where(slot < 0, num_slots, slot)
        earlier = (j[None, :] < i[:, None]).to(tl.int32)
        before += (slot[None, :] < own[:, None] + earlier).to(tl.int32)
        below += (slot[None, :] < i[:, None]).to(tl.int32)
    tl.store(src + image * num_tokens + tl.sum(before, axis=1), i, mask=i < num_tokens)
    tl.store(csr + image * (num_slots + 1) + i, tl.sum(below, axis=1), mask=i <= num_slots)
