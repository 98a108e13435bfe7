"""Parts of LV-ViT, with the parameter names of the released files and the attribute names of timm's blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.errors import IncompatibleError, ParameterError
from visiontok.ops.constants import wide_dtype

__all__ = ["Attention", "Block", "DropPath", "Mlp", "PatchEmbed", "Share"]

# Strides and width divisors of the stems; every convolution is 3x3 and followed by a batch norm.
_STEMS = {"4c": ((2, 8), (2, 4), (2, 2), (2, 1)), "6c": ((2, 8), (1, 8), (1, 8), (2, 4), (2, 2), (2, 1))}
_STEM_PATCH = 16


class PatchEmbed(nn.Module):
    """(B, 3, H, W) images to (B, h * w, C) patch tokens in raster order.

    Args:
        img_size: Side of the square image in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch; 16 for the convolutional stems.
        in_chans: Channels of the image.
        embed_dim: C, a multiple of 8 for the convolutional stems.
        p_emb: `4c` or `6c`, convolutions with batch norm and GELU between them, or `naive`, one convolution.

    Raises:
        ParameterError: A value outside its range.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, p_emb: str) -> None:
        super().__init__()
        if p_emb not in (*_STEMS, "naive"):
            raise ParameterError(f"p_emb must be one of {', '.join(_STEMS)}, naive; got {p_emb!r}.")
        if img_size < patch_size or img_size % patch_size:
            raise ParameterError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}.")
        if p_emb in _STEMS and (patch_size != _STEM_PATCH or embed_dim % 8):
            raise ParameterError(
                f"p_emb={p_emb!r} needs patch_size={_STEM_PATCH} and an embed_dim that is a multiple of 8, got "
                f"patch_size={patch_size}, embed_dim={embed_dim}."
            )
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if p_emb == "naive":
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
            self.convolutions = 0
            return
        stem = _STEMS[p_emb]
        self.convolutions = len(stem)
        widths = [in_chans, *(embed_dim // divisor for _, divisor in stem)]
        for i, (stride, _) in enumerate(stem):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            height, width = self.img_size
            raise IncompatibleError(
                f"the image is {x.shape[-2]} x {x.shape[-1]}, but this model's positions are for {height} x {width}; "
                f"resize it or build the model with another img_size."
            )
        if self.convolutions == 0:
            return self.proj(x).flatten(2).transpose(1, 2)
        for i in range(self.convolutions):
            x = F.gelu(x) if i > 0 else x
            x = getattr(self, f"bn{i + 1}")(getattr(self, f"conv{i + 1}")(x))
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention without q, k, v biases, always computed in fp32 or wider, also under autocast."""

    fused_attn = True

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ParameterError(f"num_heads must divide the width {dim}, got {num_heads}.")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d) of (B, N, C) tokens."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.to(wide_dtype(qkv.dtype)).unbind(0)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, N, C) output in `dtype` for these heads; `attn_mask` is added to the logits."""
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(q.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2).to(dtype)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.mix(*self.heads(x), attn_mask, x.dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear, over the last dimension."""

    def __init__(self, dim: int, hidden: int, out: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Share(nn.Module):
    """Divides a residual branch by a constant; without parameters, so that checkpoints need no entry for it."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by

    def extra_repr(self) -> str:
        return f"by={self.by:g}"


class DropPath(nn.Module):
    """Drops a residual branch of whole samples with probability p while training (stochastic depth)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class Block(nn.Module):
    """Pre-norm block whose branches are divided by `skip_lam`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        skip_lam: float = 1.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads, attn_drop, drop)
        self.ls1 = Share(skip_lam)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim, drop)
        self.ls2 = Share(skip_lam)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
