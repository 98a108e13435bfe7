"""The decoder of the MaskGIT-VQGAN (arXiv:2202.04200) that TiTok and One-D-Piece end in, with its quirks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.tokenizers.parts import in_parts

__all__ = ["PixelDecoder", "ResidualBlock", "same_padding", "upsampled_conv"]

_GROUPS = 32


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero padding as TensorFlow's SAME: what is uneven goes to the right and to the bottom."""
    pads: list[int] = []
    for size in reversed(x.shape[-2:]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def upsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of x enlarged twofold by its nearest neighbours, as one transposed convolution.

    Enlarging repeats each value four times, so that taps of the kernel which meet the same value are summed
    beforehand: 16 products for 4 outputs in place of 36.
    """
    taps = F.pad(conv.weight, (1, 1, 1, 1))
    taps = taps[..., 1:] + taps[..., :-1]
    taps = taps[..., 1:, :] + taps[..., :-1, :]
    return F.conv_transpose2d(x, taps.flip(2, 3).transpose(0, 1), conv.bias, stride=2, padding=1)


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    # New memory for every activation costs as much as the arithmetic.
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


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
        h = self.conv1(_activated(self.norm1, x))
        h = self.conv2(_activated(self.norm2, h))
        other = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x
        return h + other if torch.is_grad_enabled() else h.add_(other)


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
            x = upsampled_conv(x, self.upsample_conv)
        return x


class PixelDecoder(nn.Module):
    """`(B, z, g, g)` to images `(B, 3, g * f, g * f)`, f = 2 ** (levels - 1); not cut off to [0, 1].

    Runs channels last, the layout that convolutions of CPUs and of tensor cores want.

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
        x = x.contiguous(memory_format=torch.channels_last)
        widest = self.norm_out.num_channels * 4 ** (len(self.up) - 1) * x.shape[2] * x.shape[3]
        return in_parts(self._decode, widest * x.element_size(), x)

    def _decode(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(_activated(self.norm_out, x))
