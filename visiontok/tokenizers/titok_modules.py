"""Encoder and decoder of TiTok (arXiv:2406.07550) and One-D-Piece (arXiv:2501.10064), named as in their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.tokenizers.parts import in_parts

__all__ = ["Block", "Codebook", "Decoder", "Encoder"]


class Attention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
        """Attention of the tokens `rows` to all."""
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query = F.linear(x[:, rows], weight[:width], bias[:width])
        key, value = F.linear(x, weight[width:], bias[width:]).chunk(2, -1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm block, batch first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, rows: slice = slice(None), mask: Tensor | None = None) -> Tensor:
        """Tokens `rows` of `(B, n, W)` after the block; `mask` is broadcast over `(B, heads, rows, n)`."""
        y = x[:, rows] + self.attn(self.ln_1(x), rows, mask)
        return y + self.mlp(self.ln_2(y))


def run(blocks: nn.ModuleList, x: Tensor, rows: slice, mask: Tensor | None = None) -> Tensor:
    """All blocks; of the last one only `rows` are computed."""

    def through(x: Tensor, mask: Tensor | None) -> Tensor:
        for number, block in enumerate(blocks):
            x = block(x, rows if number + 1 == len(blocks) else slice(None), mask)
        return x

    return in_parts(through, 4 * x[0].numel() * x.element_size(), x, mask)


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Encoder(nn.Module):
    """Images to latents `(B, d, 1, K)`."""

    def __init__(self, config: Mapping[str, Any], channels: int) -> None:
        super().__init__()
        part = config["encoder"]
        width, size = part["width"], config["patch_size"]
        self.legacy: bool = config["legacy"]
        self.patches = (config["image_size"] // size) ** 2
        self.class_embedding = _random(1, width)
        self.positional_embedding = _random(self.patches + 1, width)
        self.latent_token_positional_embedding = _random(config["length"], width)
        self.patch_embed = nn.Conv2d(3, width, size, stride=size)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList([Block(width, part["heads"]) for _ in range(part["depth"])])
        self.conv_out = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        rows = len(x)
        x = torch.cat([self.class_embedding.expand(rows, -1, -1), x], 1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(rows, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], 1))
        y = self.ln_post(run(self.transformer, x, slice(self.patches + 1, None)))
        # Released weights were trained with a reshape where a transpose was meant: slot k mixes all latents.
        y = y.reshape(rows, y.shape[2], 1, y.shape[1]) if self.legacy else y.transpose(1, 2)[:, :, None]
        return self.conv_out(y)


class Decoder(nn.Module):
    """Latents to logits over pixel codes `(B, V, g, g)`, or to images `(B, 3, H, W)`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        part, size = config["decoder"], config["patch_size"]
        width, pixel = part["width"], config["pixel"]
        self.grid = config["image_size"] // size
        self.size = size
        patches = self.grid**2
        self.class_embedding = _random(1, width)
        self.positional_embedding = _random(patches + 1, width)
        self.mask_token = _random(1, 1, width)
        self.latent_token_positional_embedding = _random(config["length"], width)
        self.decoder_embed = nn.Linear(config["token_size"], width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList([Block(width, part["heads"]) for _ in range(part["depth"])])
        if pixel is None:
            self.ffn = nn.Sequential(nn.Conv2d(width, size * size * 3, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, pixel["codes"], 1))

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Decodes `(B, d, 1, k)`, any k up to K; only these tokens are computed.

        Args:
            latents: Quantised.
            mask: `(B, 1, 1, 1 + P + k)` bool, False where a row has no token.
        """
        tokens = self.decoder_embed(latents[:, :, 0].transpose(1, 2))
        rows, count = tokens.shape[:2]
        patches = self.grid**2
        tokens = tokens + self.latent_token_positional_embedding[:count]
        canvas = torch.cat([self.class_embedding[None], self.mask_token.expand(1, patches, -1)], 1)
        canvas = (canvas + self.positional_embedding).expand(rows, -1, -1)
        x = self.ln_pre(torch.cat([canvas.to(tokens.dtype), tokens], 1))
        y = self.ln_post(run(self.transformer, x, slice(1, patches + 1), mask))
        y = self.ffn(y.transpose(1, 2).reshape(rows, -1, self.grid, self.grid))
        return self.conv_out(self._spread(y)) if hasattr(self, "conv_out") else y

    def _spread(self, y: Tensor) -> Tensor:
        """`(B, p * p * 3, g, g)` to pixels."""
        cells = y.reshape(len(y), self.size, self.size, 3, self.grid, self.grid).permute(0, 3, 4, 1, 5, 2)
        return cells.reshape(len(y), 3, self.grid * self.size, self.grid * self.size)


class Codebook(nn.Module):
    """Holds `embedding.weight`."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, width)
        nn.init.uniform_(self.embedding.weight, -1 / entries, 1 / entries)
