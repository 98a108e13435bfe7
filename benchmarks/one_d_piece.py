"""One-D-Piece encodes and decodes beside the official sequence of operations, one by one and in batches.

The official way is written anew here: `nn.MultiheadAttention` over sequences first, all rows through the last block,
distances to the codebook as the quantiser of the release computes them, enlarge and convolve in the pixel decoder.

    python benchmarks/one_d_piece.py [--batch 8] [--tokens 32] [--repeats 5] [--store]

Weights are random: the size is official, and time does not depend on their values. All sides run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import store
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.tokenizers.one_d_piece import OneDPiece
from visiontok.training.tokenizer_config import load_tokenizer_recipe

FILE = store.RESULTS / "one_d_piece.csv"
KEY = ("model", "what", "implementation", "batch", "tokens", "device")


class OfficialBlock(nn.Module):
    """A block over `(n, B, W)` with torch's own attention module, holding the weights of ours."""

    def __init__(self, block: Any, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = block.ln_1, block.ln_2, block.mlp
        self.attn = nn.MultiheadAttention(width, heads)
        self.attn.load_state_dict(block.attn.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Official:
    """Encodes and decodes as the released code does."""

    def __init__(self, model: OneDPiece) -> None:
        self.model, config = model, model.config
        self.encoder, self.decoder = (
            nn.Sequential(*(OfficialBlock(b, config[p]["width"], config[p]["heads"]) for b in part.transformer)).eval()
            for p, part in (("encoder", model.encoder), ("decoder", model.decoder))
        )

    def encode(self, images: Tensor) -> Tensor:
        part, batch = self.model.encoder, len(images)
        x = part.patch_embed(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([part.class_embedding.expand(batch, -1, -1), x], 1) + part.positional_embedding
        latents = self.model.latent_tokens.expand(batch, -1, -1) + part.latent_token_positional_embedding
        x = part.ln_pre(torch.cat([x, latents], 1))
        x = self.encoder(x.permute(1, 0, 2)).permute(1, 0, 2)
        y = part.ln_post(x[:, part.patches + 1 :])
        z = part.conv_out(y.reshape(batch, y.shape[2], y.shape[1], 1)).reshape(batch, -1, 1, y.shape[1])
        rows = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), dim=-1)
        codes = F.normalize(self.model.codebook, dim=-1)
        distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
        return distances.argmin(1).view(batch, -1)

    def decode(self, ids: Tensor) -> Tensor:
        part, model = self.model.decoder, self.model
        tokens = part.decoder_embed(F.normalize(model.codebook[ids], dim=-1))
        tokens = tokens + part.latent_token_positional_embedding[: ids.shape[1]]
        canvas = torch.cat(
            [part.class_embedding.expand(len(ids), -1, -1), part.mask_token.repeat(len(ids), part.grid**2, 1)], 1
        )
        x = part.ln_pre(torch.cat([canvas + part.positional_embedding, tokens], 1))
        x = self.decoder(x.permute(1, 0, 2)).permute(1, 0, 2)
        y = part.ln_post(x[:, 1 : part.grid**2 + 1]).permute(0, 2, 1).reshape(len(ids), -1, part.grid, part.grid)
        share = part.ffn(y.contiguous()).softmax(1)
        return self.pixels(torch.einsum("nchw,cd->ndhw", share, model.pixel_quantize.embedding.weight))

    def pixels(self, x: Tensor) -> Tensor:
        part: Any = self.model.pixel_decoder
        x = part.conv_in(x)
        for block in part.mid:
            x = self.residual(block, x)
        for level in reversed(part.up):
            for block in level.block:
                x = self.residual(block, x)
            if hasattr(level, "upsample_conv"):
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return part.conv_out(F.silu(part.norm_out(x)))

    def residual(self, block: Any, x: Tensor) -> Tensor:
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.conv2(F.silu(block.norm2(h)))
        return h + (block.nin_shortcut(h) if hasattr(block, "nin_shortcut") else x)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


@torch.inference_mode()
def compare(name: str, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each side of encoding and decoding."""
    torch.manual_seed(0)
    model = OneDPiece(load_tokenizer_recipe(f"{name}_stage1").model).eval()
    official, images = Official(model), torch.rand(batch, 3, 256, 256)
    whole = official.encode(images)
    same = float((whole == model.encode(images)).float().mean())
    ids = whole[:, :tokens]
    difference = float((official.decode(ids) - model.decode(ids, clamp=False)).abs().max())
    sides: dict[str, dict[str, Callable[[], object]]] = {
        "encode": {
            "official, one by one": lambda: [official.encode(image[None]) for image in images],
            "official, batch": lambda: official.encode(images),
            "ours, one by one": lambda: [model.encode(image) for image in images],
            "ours, batch": lambda: model.encode(images),
        },
        "decode": {
            "official, one by one": lambda: [official.decode(row[None]) for row in ids],
            "official, batch": lambda: official.decode(ids),
            "ours, one by one": lambda: [model.decode(row) for row in ids],
            "ours, batch": lambda: model.decode(ids),
        },
    }
    rows = []
    for what, runs in sides.items():
        found = measure(runs, repeats)
        base = found["official, one by one"]
        for implementation, seconds in found.items():
            rows.append({
                "model": name, "what": what, "implementation": implementation, "batch": batch, "tokens": tokens,
                "ms_per_image": round(statistics.median(seconds) / batch * 1e3, 1),
                "ratio": round(statistics.median(a / b for a, b in zip(base, seconds)), 2),
                "same_ids": same, "difference": f"{difference:.1e}", "repeats": repeats,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="one_d_piece_s")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--store", action="store_true", help=f"keep the results in {FILE.name}")
    args = parser.parse_args()
    rows = compare(args.model, args.batch, args.tokens, args.repeats)
    if args.store:
        where = store.machine("cpu")
        store.put(FILE, [row | where for row in rows], KEY)


if __name__ == "__main__":
    main()
