"""Draw where the tokens of an image went: which patches were merged, which were dropped.

Everything here is numpy and Pillow on a label image: the slot of every patch, upsampled to pixels. Group means are one
`np.bincount` per channel and borders are comparisons of that image with its own shifts, so a 24-layer strip takes
milliseconds and not the seconds of a loop over groups.
"""

from __future__ import annotations

import colorsys
import hashlib
from typing import Any

import numpy as np
from PIL import Image

from visiontok.errors import ParameterError

STYLES = ("mean", "label", "heat")
MIN_SIDE = 256
"""Pictures whose shorter side is below this are enlarged by a whole factor when no `scale` is given."""

MAX_PIXELS = 50_000_000
_DROPPED = -1
_INK, _INK_ON_DARK, _DARK = 24, 110, 72  # brightness of the borders of single tokens, and below what is dark
# Viridis at 0, 1/4, ... 1: perceptually even and safe for color-blind readers, without importing matplotlib.
_VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def token_map(
    image: Any,
    origin: Any,
    grid: tuple[int, int],
    prefix: int = 1,
    *,
    style: str = "mean",
    scale: int | None = None,
    borders: bool = True,
) -> Image.Image:
    """Paints the groups of tokens over the picture they came from.

    Args:
        image: what the model saw: a PIL image, or an array `(H, W)`, `(H, W, 1|3|4)` of uint8 or of floats in [0, 1].
        origin: `(N0,)` integers, one sample: the slot that every original token sits in now, prefix tokens first,
            -1 = dropped.
        grid: rows and columns of the original patch grid, `N0 = prefix + h * w`.
        prefix: class, distillation and register tokens before the patches.
        style: `mean` fills a group with its mean color; `label` tints merged groups in a color of their own and
            leaves single tokens as they are; `heat` shows the share of a token that a patch has kept for itself
            (1 = on its own, 1/n = in a group of n).
        scale: whole factor from `image` to the result. Default: the smallest that makes the shorter side 256 pixels.
        borders: draw a line around every group.

    Returns:
        An RGB picture of `scale` times the size of `image`. Dropped tokens are hatched gray.

    Raises:
        ParameterError: an argument does not fit; the text names it, its value and what is accepted.
    """
    check_choice("style", style, STYLES)
    slots = patch_slots(origin, grid, prefix)
    picture = enlarge(as_picture(image), scale)
    pixels = np.asarray(picture, dtype=np.float64)  # (H, W, 3)
    height, width = pixels.shape[:2]
    groups = canonical_groups(slots)
    rows, columns = (np.arange(height) * grid[0]) // height, (np.arange(width) * grid[1]) // width
    labels = groups[np.ix_(rows, columns)]  # (H, W)
    count = int(groups.max()) + 1
    sizes = np.bincount(groups[groups >= 0], minlength=max(count, 1))
    colors = _group_colors(groups)

    if style == "mean":
        out = _fill_means(pixels, labels, count)
    elif style == "label":
        out = _tint_groups(pixels, labels, sizes, colors)
    else:
        out = heat_overlay(pixels, _lookup(1.0 / np.maximum(sizes, 1), labels))
    out = np.where((labels == _DROPPED)[..., None], _hatching(height, width), out)
    if borders:
        _draw_borders(out, labels, sizes, colors, min(height // grid[0], width // grid[1]))
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8), "RGB")


def label_hash(origin: Any, grid: tuple[int, int], prefix: int = 1) -> str:
    """Names a partition of the patches by 16 hex digits, for tests that must not depend on pixels.

    Groups are renumbered by first appearance, so two reducers that order their slots differently but group alike agree.

    Args:
        origin: `(N0,)` slots as in `token_map`.
        grid: rows and columns of the patch grid.
        prefix: tokens before the patches.

    Returns:
        The head of the SHA-256 of the label image.
    """
    groups = canonical_groups(patch_slots(origin, grid, prefix))
    return hashlib.sha256(f"{groups.shape}".encode() + groups.astype("<i4").tobytes()).hexdigest()[:16]


def patch_slots(origin: Any, grid: tuple[int, int], prefix: int = 1) -> np.ndarray:
    """Cuts the patch part out of an origin map.

    Args:
        origin: `(N0,)` slots of one sample, prefix first, -1 = dropped; `(1, N0)` is accepted too.
        grid: rows and columns of the patch grid.
        prefix: tokens before the patches.

    Returns:
        `(h, w)` int64 slots.

    Raises:
        ParameterError: the lengths do not add up, or the values are no slots.
    """
    slots = as_array(origin)
    if slots.ndim == 2 and slots.shape[0] == 1:
        slots = slots[0]
    if slots.ndim != 1:
        raise ParameterError(
            f"origin has shape {slots.shape}; one sample is drawn at a time: pass a vector of N0 slots, "
            "for a batch (B, N0) one row of it, such as origin[0]"
        )
    if not np.issubdtype(slots.dtype, np.integer):
        raise ParameterError(f"origin has dtype {slots.dtype}; expected integers: a slot number, or -1 for dropped")
    if len(grid) != 2 or min(grid) < 1:
        raise ParameterError(f"grid={grid!r} is no patch grid; expected (rows, columns), both at least 1")
    if prefix < 0:
        raise ParameterError(f"prefix={prefix} is negative; expected the number of tokens before the patches")
    expected = prefix + grid[0] * grid[1]
    if slots.size != expected:
        raise ParameterError(
            f"origin has {slots.size} tokens, but prefix={prefix} and grid={tuple(grid)} make "
            f"{prefix} + {grid[0]} * {grid[1]} = {expected}; check prefix (class, distillation and register tokens)"
        )
    if slots.min() < _DROPPED:
        raise ParameterError(f"origin contains {slots.min()}; expected slots from 0 up, or -1 for dropped")
    return slots[prefix:].astype(np.int64).reshape(grid)


def as_picture(image: Any) -> Image.Image:
    """Turns any usual picture into RGB: 16-bit is scaled, transparency is laid on white.

    Args:
        image: PIL image, or array `(H, W)`, `(H, W, 1|3|4)` of uint8, bool or floats in [0, 1].

    Raises:
        ParameterError: shape, dtype, range or size are not those of a picture.
    """
    picture = image if isinstance(image, Image.Image) else _picture_from_array(as_array(image))
    if picture.width * picture.height > MAX_PIXELS:
        raise ParameterError(f"image has {picture.width}x{picture.height} pixels; at most {MAX_PIXELS} are drawn")
    if picture.mode.startswith("I;16") or picture.mode == "I":
        picture = Image.fromarray((np.asarray(picture).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def as_array(value: Any) -> np.ndarray:
    """Reads an array-like or a tensor on any device as numpy."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def canonical_groups(slots: np.ndarray) -> np.ndarray:
    """Renumbers slots by first appearance in reading order; dropped stays -1. Same shape as `slots`."""
    values, first, inverse = np.unique(slots.ravel(), return_index=True, return_inverse=True)
    order = np.argsort(np.where(values == _DROPPED, -1, first), kind="stable")
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values)) - int(values[0] == _DROPPED)
    return rank[inverse].reshape(slots.shape)


def heat_overlay(pixels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Lays viridis over a gray version of a picture.

    Args:
        pixels: `(H, W, 3)` floats 0..255.
        share: `(H, W)` in [0, 1], 1 is yellow.

    Returns:
        `(H, W, 3)` floats 0..255.
    """
    position = np.clip(share, 0, 1) * (len(_VIRIDIS) - 1)
    stops = np.arange(len(_VIRIDIS))
    color = np.stack([np.interp(position, stops, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1)
    return 0.35 * _luminance(pixels)[..., None] + 0.65 * color


def _picture_from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ParameterError(f"image has shape {array.shape}; expected (H, W) or (H, W, 1|3|4), channels last")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ParameterError("image has floats outside [0, 1]; undo the model's normalization, or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ParameterError(f"image has dtype {array.dtype}; expected uint8, bool, or floats in [0, 1]")
    return Image.fromarray(array)


def enlarge(picture: Image.Image, scale: int | None) -> Image.Image:
    """Scales a picture up by a whole factor; `None` makes the shorter side at least 256 pixels.

    Raises:
        ParameterError: the factor is no positive int, or the result would be too large.
    """
    short = min(picture.size)
    if scale is None:
        scale = max(1, -(-MIN_SIDE // short))
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ParameterError(f"scale={scale!r} is no whole factor; expected an int from 1 up, or None")
    if picture.width * picture.height * scale**2 > MAX_PIXELS:
        raise ParameterError(
            f"scale={scale} makes {picture.size} larger than {MAX_PIXELS} pixels; choose a smaller one"
        )
    # Tiny pictures are scans whose pixels matter; smoothing them would hide what the model saw.
    resample = Image.Resampling.NEAREST if short < 64 else Image.Resampling.BICUBIC
    return picture.resize((picture.width * scale, picture.height * scale), resample) if scale > 1 else picture


def _lookup(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return values[np.maximum(labels, 0)]


def _fill_means(pixels: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    flat = labels.ravel() + 1  # slot 0 collects the dropped pixels
    area = np.maximum(np.bincount(flat, minlength=count + 1), 1)
    sums = [np.bincount(flat, pixels[..., channel].ravel(), minlength=count + 1) for channel in range(3)]
    return (np.stack(sums, axis=-1) / area[:, None])[labels + 1]


def _tint_groups(pixels: np.ndarray, labels: np.ndarray, sizes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    tinted = 0.45 * pixels + 0.55 * _lookup(colors, labels)
    return np.where((_lookup(sizes, labels) > 1)[..., None], tinted, pixels)


def _group_colors(groups: np.ndarray) -> np.ndarray:
    """`(count, 3)` bright colors; neighbors are far apart in hue (golden ratio).

    Keyed by the first patch of a group, so that a group that grows from layer to layer mostly keeps its color.
    """
    saturation, brightness = (0.9, 0.6, 0.75), (1.0, 0.9)
    values, first = np.unique(groups.ravel(), return_index=True)
    colors = [
        colorsys.hsv_to_rgb(i * 0.61803398875 % 1, saturation[i % 3], brightness[i // 3 % 2])
        for i in first[values >= 0].tolist()
    ]
    return np.array(colors or [(0, 0, 0)]) * 255


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def _hatching(height: int, width: int) -> np.ndarray:
    period = max(6, min(height, width) // 40)
    stripe = (np.arange(height)[:, None] + np.arange(width)[None, :]) % period < max(2, period // 3)
    return np.repeat(np.where(stripe, 168.0, 96.0)[..., None], 3, axis=-1)


def _draw_borders(out: np.ndarray, labels: np.ndarray, sizes: np.ndarray, colors: np.ndarray, cell: int) -> None:
    """Draws inside the edge of every region, in the color of its group, so that parts of one group match by eye."""
    thickness = int(np.clip(cell // 12, 1, 4))
    edge = np.zeros(labels.shape, dtype=bool)
    for shift in range(1, thickness + 1):
        down, right = labels[shift:] != labels[:-shift], labels[:, shift:] != labels[:, :-shift]
        edge[shift:] |= down
        edge[:, shift:] |= right
        if cell >= 8:  # smaller cells would be all border
            edge[:-shift] |= down
            edge[:, :-shift] |= right
    grouped = (_lookup(sizes, labels) > 1) & (labels != _DROPPED)
    out[edge] = np.where(_luminance(out[edge]) < _DARK, _INK_ON_DARK, _INK)[:, None]
    out[edge & grouped] = _lookup(colors, labels)[edge & grouped]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a word that is not among `choices`.

    Raises:
        ParameterError: it is not.
    """
    if value not in choices:
        raise ParameterError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
