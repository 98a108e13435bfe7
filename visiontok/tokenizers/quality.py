"""How good a reconstruction is, and how many tokens a wanted quality takes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from visiontok.errors import ParameterError
from visiontok.tokenizers.base import Tokenizer

__all__ = ["METRICS", "allocate", "default_lengths", "psnr", "rate_quality", "shortest", "ssim"]

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, `(B,)`; infinite where images are equal.

    Args:
        images, references: `(B, C, H, W)` float in [0, 1].

    Raises:
        ParameterError: Shapes that differ.
    """
    _check_pair(images, references)
    error = (images.float() - references.float()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity, `(B,)`: mean over pixels and channels, as of Wang et al. (2004).

    A Gaussian window of 11 x 11 pixels with sigma 1.5 is used where it lies inside of the image, and data range 1.

    Args:
        images, references: `(B, C, H, W)` float in [0, 1], at least 11 x 11 pixels.

    Raises:
        ParameterError: Shapes that differ, or smaller images.
    """
    _check_pair(images, references)
    if min(images.shape[-2:]) < _WINDOW:
        raise ParameterError(f"images must be at least {_WINDOW} x {_WINDOW} pixels, got {tuple(images.shape[-2:])}.")
    x, y = images.double().flatten(0, 1)[:, None], references.double().flatten(0, 1)[:, None]
    taps = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    line = torch.softmax(-taps.square() / (2 * _SIGMA**2), 0)
    parts = torch.cat([x, y, x * x, y * y, x * y], dim=1).flatten(0, 1)[:, None]
    smooth = functional.conv2d(functional.conv2d(parts, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = smooth.view(len(x), 5, *smooth.shape[-2:]).unbind(1)
    c1, c2 = _K1**2, _K2**2
    top = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    bottom = (mean_x.square() + mean_y.square() + c1) * (xx - mean_x.square() + yy - mean_y.square() + c2)
    return (top / bottom).flatten(1).mean(1).view(images.shape[:2]).mean(1).float()


METRICS = {"psnr": psnr, "ssim": ssim}
"""Names of `shortest(metric=)`; for all of them more is better."""


def default_lengths(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Powers of two from the fewest tokens that a tokenizer decodes to the most."""
    powers = [1 << power for power in range(tokenizer.length.bit_length())]
    inside = [k for k in powers if tokenizer.shortest <= k < tokenizer.length]
    return tuple(sorted({tokenizer.shortest, *inside, tokenizer.length}))


@torch.no_grad()
def rate_quality(
    tokenizer: Tokenizer,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    metric: str = "psnr",
    batch_size: int = 64,
    **options: Any,
) -> Tensor:
    """Quality of every image at every length, `(B, L)` float32.

    Images are encoded once; all lengths of an image are decoded in shared batches.

    Args:
        tokenizer: Any.
        images: As `Tokenizer.encode` takes them.
        ids: `(B, N)`, what `encode` gave, if it is known.
        lengths: L numbers of tokens; default powers of two (`default_lengths`).
        metric: "psnr" or "ssim".
        batch_size: Most rows to decode at once.
        **options: Of `decode`. For flow decoders a few `steps` are enough to compare lengths.

    Raises:
        ParameterError: A metric or length that there is not.
    """
    if metric not in METRICS:
        raise ParameterError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    grid = _checked_grid(tokenizer, lengths)
    codes = tokenizer.encode(images) if ids is None else ids
    rows = [(image, place) for image in range(len(images)) for place in range(len(grid))]
    values = torch.empty(len(images), len(grid))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        decoded = tokenizer.decode([codes[image][: grid[place]] for image, place in part], **options)
        owners, places = (torch.tensor(column) for column in zip(*part))
        found = METRICS[metric](decoded, images.to(decoded.device)[owners.to(decoded.device)])
        values[owners, places] = found.float().cpu()
    return values


def shortest(
    tokenizer: Tokenizer,
    images: Tensor,
    target: float,
    *,
    metric: str = "psnr",
    lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[list[int], Tensor]:
    """The fewest tokens of a grid with which each image reaches a quality.

    Quality need not rise with every token, so the whole grid is looked at. An image that never reaches the target
    gets the length at which it is best.

    Args:
        tokenizer, images, metric, lengths, **options: As in `rate_quality`.
        target: Wanted value of the metric (dB for "psnr").

    Returns:
        One length per image, and its quality there `(B,)`: below `target` where it cannot be reached.

    Raises:
        ParameterError: A metric or length that there is not, or a target that is no number.
    """
    if not np.isfinite(target):
        raise ParameterError(f"target must be a finite number, got {target}.")
    grid = _checked_grid(tokenizer, lengths)
    values = rate_quality(tokenizer, images, metric=metric, lengths=grid, **options)
    enough = values >= target
    # argmax gives the first of equal ones.
    chosen = torch.where(enough.any(1), enough.int().argmax(1), values.argmax(1))
    return [grid[place] for place in chosen.tolist()], values.gather(1, chosen[:, None])[:, 0]


def allocate(errors: ArrayLike, lengths: Sequence[int], budget: int) -> NDArray[np.int64]:
    """Shares out a budget of tokens among images so that their errors sum to as little as possible.

    Tokens go, step by step, to the image whose error falls most per token, along the lower convex hull of its curve.
    For convex curves of steps of one size that is the optimum; otherwise it is within one step of it.

    Args:
        errors: `(n, L)`, less is better, such as the mean square error at each length.
        lengths: L rising numbers of tokens.
        budget: Tokens for all images together.

    Returns:
        `(n,)`, one of `lengths` for each image.

    Raises:
        ParameterError: Lengths that do not rise, errors of another shape or not finite, or a budget that does not
            give every image the least length.
    """
    curves, grid = np.asarray(errors, dtype=np.float64), np.asarray(lengths, dtype=np.int64)
    if curves.ndim != 2 or curves.shape[1] != len(grid) or not np.isfinite(curves).all():
        raise ParameterError(f"errors must be finite and (n, {len(grid)}), got shape {curves.shape}.")
    if not len(grid) or (np.diff(grid) <= 0).any():
        raise ParameterError(f"lengths must rise, got {list(lengths)}.")
    least = int(grid[0]) * len(curves)
    if budget < least:
        raise ParameterError(f"budget must be at least {least} tokens for {len(curves)} images, got {budget}.")
    hulls = [_hull(curve, grid) for curve in curves]
    at, left = [0] * len(hulls), budget - least
    steps = [_step(curves, grid, hull, number, 0) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, number, cost = heapq.heappop(steps)
        if cost > left:
            continue
        left, at[number] = left - cost, at[number] + 1
        if at[number] + 1 < len(hulls[number]):
            heapq.heappush(steps, _step(curves, grid, hulls[number], number, at[number]))
    return np.array([grid[hull[place]] for hull, place in zip(hulls, at)], dtype=np.int64)


def _step(
    curves: NDArray[np.float64], grid: NDArray[np.int64], hull: list[int], number: int, place: int
) -> tuple[float, int, int]:
    here, there = hull[place], hull[place + 1]
    cost = int(grid[there] - grid[here])
    return float(curves[number, there] - curves[number, here]) / cost, number, cost


def _hull(curve: NDArray[np.float64], grid: NDArray[np.int64]) -> list[int]:
    """Places on the falling part of the lower convex hull, from the first place on."""
    hull: list[int] = []
    for place in range(int(curve.argmin()) + 1):
        while len(hull) > 1 and _above(curve, grid, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _above(curve: NDArray[np.float64], grid: NDArray[np.int64], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    line = (curve[c] - curve[a]) * (grid[b] - grid[a])
    return bool((curve[b] - curve[a]) * (grid[c] - grid[a]) >= line)


def _checked_grid(tokenizer: Tokenizer, lengths: Sequence[int] | None) -> tuple[int, ...]:
    grid = default_lengths(tokenizer) if lengths is None else tuple(sorted(set(lengths)))
    if not grid or grid[0] < tokenizer.shortest or grid[-1] > tokenizer.length:
        raise ParameterError(f"lengths must be {tokenizer.shortest} to {tokenizer.length}, got {list(grid)}.")
    return grid


def _check_pair(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.dim() != 4:
        raise ParameterError(
            "images and references must be (B, C, H, W) alike, "
            f"got {tuple(images.shape)} and {tuple(references.shape)}."
        )
