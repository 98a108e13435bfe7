"""How much each token repeats its neighbours: row sums over the cosines of all pairs, which stay in registers."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalOperand=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from visiontok.ops.triton.configuring import launch_options
from visiontok.ops.triton.matching import dots, inverse_norms, precision_for, strides_of

__all__ = ["energy", "energy_kernel"]


@triton.jit
def _near(cosine, margin, alpha, KIND: tl.constexpr):
    if KIND == "gauss":
        far = (1 - cosine) / (1 - margin)
        near = tl.exp(-0.5 * far * far)
    else:
        above = cosine - margin
        below = alpha * (tl.exp(above) - 1)
        near = tl.where(above >= 0, cosine if KIND == "hinge" else above, below)
    return near


@triton.jit(do_not_specialize=["image_stride", "row_stride", "length"])
def energy_kernel(
    metric_ptr, inverse_ptr, out_ptr, margin, alpha, factor, image_stride, row_stride, length,
    KIND: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of rows over all tokens; grid (tiles of tokens, images)."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < length
    base = metric_ptr + image * (image_stride * ALIGN)
    inverse = inverse_ptr + image * length
    scale = tl.load(inverse + i, mask=in_rows, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, length, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = j < length
        cosine = dots(
            base, row_stride * ALIGN, i.to(tl.int64), j.to(tl.int64), in_rows, inside, WIDTH, DEPTH, PRECISION
        )
        cosine *= scale[:, None] * tl.load(inverse + j, mask=inside, other=0.0)[None, :]
        total += tl.sum(tl.where(inside[None, :], _near(cosine, margin, alpha, KIND), 0.0), 1)
    tl.store(out_ptr + image * length + i, total * factor, mask=in_rows)


def energy(metric: Tensor, margin: float, alpha: float, kind: str) -> Tensor:
    """PiToMe's energy (arXiv:2405.16148): the mean over tokens of a function of the cosine; high means redundant.

    Args:
        metric: (B, N, d) rows of any length, fp32, fp16 or bf16, any strides; each token counts itself.
        margin: Similarity from which a neighbour counts fully; below 1 for `gauss`.
        alpha: Slope of the negative part; not used by `gauss`.
        kind: `elu`: ELU(cosine - margin). `hinge`: the cosine itself from the margin on. `gauss`: Gaussian density of
            1 - cosine with deviation 1 - margin.

    Returns:
        (B, N) fp32; NaN for all tokens of an image that has a NaN.
    """
    metric = metric if metric.stride(-1) == 1 else metric.contiguous()
    batch, length, width = metric.shape
    out = torch.empty(batch, length, dtype=torch.float32, device=metric.device)
    if out.numel():
        precision = precision_for(metric.dtype)
        options = launch_options("energy" if precision is None else "energy_fp32", width, metric.device)
        align, strides = strides_of(metric)
        factor = 1 / length
        if kind == "gauss":
            factor /= (1 - margin) * math.sqrt(2 * math.pi)
        energy_kernel[(triton.cdiv(length, options["ROWS"]), batch)](
            metric, inverse_norms(metric), out, float(margin), float(alpha), factor, *strides, length,
            KIND=kind, ALIGN=align, WIDTH=width, PRECISION=precision, enable_fp_fusion=True, **options,
        )  # fmt: skip
    return out
