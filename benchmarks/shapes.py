"""The shapes that ops are measured at, and the least bytes and FLOPs that each op can do with. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

# Of the H200 that kernels were designed for: copy bandwidth and dense bf16 products, measured on such a card.
H200_BYTES, H200_FLOPS = 4.3e12, 790e12


class Shape(NamedTuple):
    """Tokens of one block.

    Attributes:
        title: What it comes from.
        tokens: N, prefix included.
        channels: C.
        heads: H.
        r: Tokens to merge.
        prefix: Leading tokens that stay.
        grid: (h, w) of a diffusion model's tokens, else None.
        cpu: Batches measured on a CPU by default.
        gpu: Batches measured on a GPU by default.
    """

    title: str
    tokens: int
    channels: int
    heads: int
    r: int
    prefix: int = 1
    grid: tuple[int, int] | None = None
    cpu: tuple[int, ...] = (1, 16)
    gpu: tuple[int, ...] = (1, 16, 64, 256)

    @property
    def width(self) -> int:
        """d, channels of a head."""
        return self.channels // self.heads

    @property
    def kept(self) -> int:
        """K, slots."""
        return self.tokens - self.r


def _diffusion(title: str, side: int, channels: int, heads: int, gpu: tuple[int, ...]) -> Shape:
    # tomesd's default: one destination per 2 x 2 cell, half of all tokens merge.
    tokens = side * side
    return Shape(title, tokens, channels, heads, tokens // 2, 0, (side, side), (1,), gpu)


SHAPES = {
    "deit_s": Shape("DeiT-S/16 224", 197, 384, 6, 13),
    "vit_b": Shape("ViT-B/16 224", 197, 768, 12, 13),
    "vit_l": Shape("ViT-L/16 224", 197, 1024, 16, 8, gpu=(1, 16, 128)),
    "vit_l_384": Shape("ViT-L/16 384, CLIP-L/14 336", 577, 1024, 16, 23, cpu=(1, 4), gpu=(1, 16, 64)),
    "sd15_64": _diffusion("SD 1.5, 64 x 64", 64, 320, 8, (2, 64)),
    "sd15_32": _diffusion("SD 1.5, 32 x 32", 32, 640, 8, (2, 64)),
    "sdxl_64": _diffusion("SDXL, 64 x 64", 64, 640, 10, (2, 16)),
    "sdxl_128": _diffusion("SDXL, 128 x 128", 128, 640, 10, (2, 8)),
}


def floor(op: str, shape: Shape, batch: int, itemsize: int) -> tuple[float, float]:
    """Bytes and FLOPs that an op cannot do without: every input read once, every output written once.

    Args:
        op: A key of `ops.OPS`, or `add_norm`, the residual and LayerNorm of an unpatched block.
        shape: Tokens of one image.
        batch: Images.
        itemsize: Bytes per activation.
    """
    n, k, c, h = shape.tokens, shape.kept, shape.channels, shape.heads
    before, after, plan = n * c * itemsize, k * c * itemsize, 4 * (2 * n + k)
    leaving = n // 2 if shape.grid is None else n - n // 4
    scores = 2 * leaving * (n - leaving)
    product = 2 * n * n * c
    cost = {
        "match": (before + plan, scores * shape.width),
        "merge": (before + after + plan, 0),
        "merge_add_norm": (2 * (before + after) + plan, 0),
        "match_merge": (2 * before + after + plan, scores * shape.width),
        "best_match": (before + 8 * leaving, scores * c),
        "restore": (after + 2 * before + 4 * n, 0),
        "attention": (4 * before, 2 * product),
        "votes": (2 * before + 4 * h * n, product),
        "class_row": (before + 4 * h * n, 2 * n * c),
        "add_norm": (4 * before, 0),
    }[op]
    return batch * float(cost[0]), batch * float(cost[1])


def block_floor(shape: Shape, batch: int, itemsize: int) -> list[tuple[float, float]]:
    """Bytes and FLOPs of an unpatched block by kernel: its four products, flash attention, two fused adds and norms."""
    n, c = shape.tokens, shape.channels
    rows = batch * n
    products = [(rows * (i + o) * c * itemsize + i * o * c * c * itemsize, 2.0 * rows * i * o * c * c)
                for i, o in ((1, 3), (1, 1), (1, 4), (4, 1))]  # fmt: skip
    return [*products, floor("attention", shape, batch, itemsize), *[floor("add_norm", shape, batch, itemsize)] * 2]


def seconds(work: tuple[float, float], bandwidth: float = H200_BYTES, rate: float = H200_FLOPS) -> float:
    """Time at the limits: whichever of moving and computing takes longer."""
    return max(work[0] / bandwidth, work[1] / rate)
