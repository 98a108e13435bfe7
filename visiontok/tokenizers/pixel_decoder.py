"""The decoder of the MaskGIT-VQGAN (arXiv:2202.04200) that TiTok and One-D-Piece end in, with its quirks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PixelDecoder", "ResidualBlock", "same_padding"]

_GROUPS = 32


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding as TensorFlow's SAME: what is uneven goes to the right and to the bottom."""
    pads: list[int] = []
    for size in reversed(x.shape[-2:]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut.

    Where the number of channels changes the shortcut is a 1x1 convolution of the processed activation and the input
    is dropped: an oversight of the original that its weights were trained with.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class _Level(nn.Module):
    def __init__(self, channels: int, out: int, count: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResidualBlock(channels if i == 0 else out, out) for i in range(count)])
        if upsample:
            self.upsample_conv = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelDecoder(nn.Module):
    """`(B, z, g, g)` to images `(B, 3, g * f, g * f)`, f = 2 ** (levels - 1); not cut off to [0, 1].

    Args:
        config: `z_channels`, `hidden_channels`, `channel_mult` (one per level, finest first), `res_blocks`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [config["hidden_channels"] * mult for mult in config["channel_mult"]]
        count = config["res_blocks"]
        self.conv_in = nn.Conv2d(config["z_channels"], widths[-1], 3, padding=1)
        self.mid = nn.ModuleList([ResidualBlock(widths[-1], widths[-1]) for _ in range(count)])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList([_Level(before[i], width, count, upsample=i > 0) for i, width in enumerate(widths)])
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
