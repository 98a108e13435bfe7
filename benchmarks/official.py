"""The released formulations of token merging, their sequences of operations written anew, and the free-slice oracle.

Used by ops.py and models.py alike. Nothing here is copied: what is reproduced is which tensor operations run, on what
shapes and in what order, because that is what costs time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A match of the even with the odd tokens, as index tensors with a trailing axis of one.

    Attributes:
        staying: (B, Na - r, 1) even tokens that stay, counted among the even ones.
        leaving: (B, r, 1) even tokens that leave.
        dst: (B, r, 1) odd token that each of them joins, counted among the odd ones.
    """

    staying: Tensor
    leaving: Tensor
    dst: Tensor


@torch.no_grad()
def match(metric: Tensor, r: int) -> Pairs:
    """ToMe's match with a class token: metric (B, N, d), normalised in its own dtype, a full score matrix, argsort."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., 0, :] = -torch.inf
    best, partner = scores.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    staying, leaving = ranked[..., r:, :], ranked[..., :r, :]
    dst = partner[..., None].gather(dim=-2, index=leaving)
    return Pairs(staying.sort(dim=1)[0], leaving, dst)


def combine(x: Tensor, pairs: Pairs) -> Tensor:
    """Sums (B, N, C) into (B, N - r, C) by expanded gathers and scatter_reduce."""
    source, target = x[..., ::2, :], x[..., 1::2, :]
    batch, count, channels = source.shape
    r = pairs.leaving.shape[1]
    kept = source.gather(dim=-2, index=pairs.staying.expand(batch, count - r, channels))
    gone = source.gather(dim=-2, index=pairs.leaving.expand(batch, r, channels))
    target = target.scatter_reduce(-2, pairs.dst.expand(batch, r, channels), gone, reduce="sum")
    return torch.cat([kept, target], dim=1)


def merge(x: Tensor, size: Tensor | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Size-weighted mean; sizes (B, N, 1) in the dtype of x, as released."""
    size = torch.ones_like(x[..., 0, None]) if size is None else size
    merged, size = combine(x * size, pairs), combine(size, pairs)
    return merged / size, size


def slots(pairs: Pairs, length: int) -> Tensor:
    """(B, N) slot of each token after `combine`; for checks, never timed."""
    batch, kept = pairs.staying.shape[:2]
    place = torch.arange(length, device=pairs.dst.device).expand(batch, length).clone()
    evens, odds = place[:, ::2], place[:, 1::2]
    odds.copy_(torch.arange(odds.shape[1], device=place.device) + kept)
    evens.scatter_(1, pairs.staying.squeeze(-1), torch.arange(kept, device=place.device).expand(batch, kept))
    evens.scatter_(1, pairs.leaving.squeeze(-1), pairs.dst.squeeze(-1) + kept)
    return place


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """Attention (B, H, N, d) with log(size) on the keys, its map materialised; size (B, N, 1)."""
    return probabilities(q, k, size, scale) @ v


def probabilities(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """The attention map (B, H, N, N)."""
    logits = (q @ k.transpose(-2, -1)) * scale
    if size is not None:
        logits = logits + size.log()[:, None, None, :, 0]
    return logits.softmax(dim=-1)


class Grid(NamedTuple):
    """A match for diffusion models, as index tensors with a trailing axis of one.

    Attributes:
        a: (1, Na, 1) positions that may leave.
        b: (1, Nb, 1) positions that receive.
        staying: (B, Na - r, 1), counted among a.
        leaving: (B, r, 1), counted among a.
        dst: (B, r, 1), counted among b.
    """

    a: Tensor
    b: Tensor
    staying: Tensor
    leaving: Tensor
    dst: Tensor


@torch.no_grad()
def match_grid(metric: Tensor, a: Tensor, b: Tensor, r: int) -> Grid:
    """The match of ToMe for Stable Diffusion: metric (B, N, C), positions a and b, all Na x Nb scores in memory."""
    batch, _, channels = metric.shape
    a, b = a.view(1, -1, 1), b.view(1, -1, 1)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    source = metric.gather(1, a.expand(batch, -1, channels))
    target = metric.gather(1, b.expand(batch, -1, channels))
    best, partner = (source @ target.transpose(-1, -2)).max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)[..., None]
    leaving = ranked[..., :r, :]
    return Grid(a, b, ranked[..., r:, :], leaving, partner[..., None].gather(-2, leaving))


def restore_grid(y: Tensor, grid: Grid) -> Tensor:
    """Gives every token the value of its slot: (B, N - r, C), staying first, to (B, N, C) by three scatters."""
    batch, _, channels = y.shape
    count = grid.staying.shape[1]
    staying, target = y[:, :count], y[:, count:]
    gone = target.gather(-2, grid.dst.expand(-1, -1, channels))
    out = torch.zeros(batch, grid.a.shape[1] + grid.b.shape[1], channels, device=y.device, dtype=y.dtype)
    out.scatter_(-2, grid.b.expand(batch, -1, channels), target)
    where = grid.a.expand(batch, -1, 1)
    out.scatter_(-2, where.gather(1, grid.staying).expand(-1, -1, channels), staying)
    out.scatter_(-2, where.gather(1, grid.leaving).expand(-1, -1, channels), gone)
    return out


def slots_grid(grid: Grid) -> Tensor:
    """(B, N) slot of each token of a `Grid`; for checks, never timed."""
    batch, count = grid.staying.shape[:2]
    length, device = grid.a.shape[1] + grid.b.shape[1], grid.a.device
    place = torch.empty(batch, length, dtype=torch.int64, device=device)
    a, b = grid.a[..., 0].expand(batch, -1), grid.b[..., 0].expand(batch, -1)
    place.scatter_(1, b, torch.arange(count, count + b.shape[1], device=device).expand(batch, -1))
    order = torch.arange(count, device=device).expand(batch, -1)
    place.scatter_(1, a.gather(1, grid.staying[..., 0]), order)
    return place.scatter_(1, a.gather(1, grid.leaving[..., 0]), grid.dst[..., 0] + count)


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """Embedded tokens of a timm ViT before block 0."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def forward(model: Any, images: Tensor, removals: list[int]) -> Tensor:
    """A forward of a timm ViT in ToMe's released formulation: materialised attention with log(size).

    Args:
        model: With one `qkv` projection, no q/k norm and no LayerScale, as the released patch needs.
        images: (B, 3, h, w).
        removals: Tokens to merge in each block.
    """
    x, size = tokens_of(model, images), None
    for block, r in zip(model.blocks, removals):
        attn, h = block.attn, block.norm1(x)
        batch, length, channels = h.shape
        qkv = attn.qkv(h).reshape(batch, length, 3, attn.num_heads, channels // attn.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = attention(q, k, v, size, attn.scale).transpose(1, 2).reshape(batch, length, channels)
        x = x + attn.proj(y)
        if r > 0:
            x, size = merge(x, size, match(k.mean(1), r))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def oracle(model: Any, images: Tensor, removals: list[int]) -> Tensor:
    """The same token counts for free: `x[:, :K]`, no matching, no size bias."""
    x = tokens_of(model, images)
    for block, r in zip(model.blocks, removals):
        x = x + block.attn(block.norm1(x))
        x = x[:, : x.shape[1] - r]
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))
