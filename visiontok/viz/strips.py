"""Token maps over depth: one panel per traced layer, as a strip, as an animation, or averaged into a survival map."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visiontok.errors import ParameterError
from visiontok.viz.tokens import as_array, as_picture, canonical_groups, enlarge, heat_overlay, patch_slots, token_map

MAX_COLUMNS = 7
_GAP = 8
_PAPER, _TEXT = (255, 255, 255), (32, 33, 36)


def layer_maps(
    image: Any,
    trace: Sequence[Any],
    *,
    sample: int = 0,
    style: str = "mean",
    scale: int | None = None,
    borders: bool = True,
    layers: Sequence[int] | None = None,
) -> list[tuple[str, Image.Image]]:
    """Draws the input and one token map per traced layer.

    Args:
        image: the picture that went in as `sample`; kinds as in `token_map`.
        trace: `red.trace` of a forward with `trace=True`: entries with `layer`, `origin (B, N0)`, `grid`, `prefix`.
        sample: row of the batch.
        style: `mean`, `label` or `heat`, as in `token_map`.
        scale: whole factor from `image` to a panel, as in `token_map`.
        borders: draw a line around every group.
        layers: which layers to draw; default all of the trace.

    Returns:
        `(caption, panel)` pairs, first `input: 65 tokens`, then `layer 3: 41 tokens` and so on; `span` is added where
        the reduction is undone later, so that patches without a token only wait.

    Raises:
        ParameterError: the trace is empty, lacks a layer, or does not fit the sample.
    """
    entries = _select(trace, layers)
    flat = [entry.layer for entry in entries if entry.grid is None]
    if flat:
        raise ParameterError(
            f"layers {flat} of the trace have no patch grid, so their tokens have no place on a picture"
        )
    total = _origin(entries[0], sample).size
    panels = [(f"input: {total} tokens", enlarge(as_picture(image), scale))]
    for entry in entries:
        origin = _origin(entry, sample)
        prefix = _prefix(entry, origin)
        panel = token_map(image, origin, entry.grid, prefix, style=style, scale=scale, borders=borders)
        undone = ", span" if getattr(getattr(entry, "site", None), "name", None) == "AROUND" else ""
        panels.append((f"layer {entry.layer}: {token_count(entry, sample)} tokens{undone}", panel))
    return panels


def token_strip(image: Any, trace: Sequence[Any], *, columns: int | None = None, **options: Any) -> Image.Image:
    """Lays the panels of `layer_maps` on one sheet.

    Args:
        image: the picture, as in `layer_maps`.
        trace: `red.trace`, as in `layer_maps`.
        columns: panels per row; default one row up to seven panels, more in rows of about equal length.
        options: `sample`, `style`, `scale`, `borders`, `layers` of `layer_maps`.

    Returns:
        A white sheet, every panel with its caption below.

    Raises:
        ParameterError: as `layer_maps`, or `columns` is below 1.
    """
    panels = layer_maps(image, trace, **options)
    if columns is None:
        rows = -(-len(panels) // MAX_COLUMNS)
        columns = -(-len(panels) // rows)
    if columns < 1:
        raise ParameterError(f"columns={columns} leaves no room; expected at least 1, or None")
    width, height = panels[0][1].size
    points = max(12, width // 18)
    font = ImageFont.load_default(size=points)
    line = int(points * 1.8)
    rows = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), _GAP + rows * (height + line)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (caption, panel) in enumerate(panels):
        left, top = _GAP + index % columns * (width + _GAP), _GAP + index // columns * (height + line)
        sheet.paste(panel, (left, top))
        draw.text((left + width / 2, top + height + line / 2), caption, fill=_TEXT, font=font, anchor="mm")
    return sheet


def token_gif(image: Any, trace: Sequence[Any], *, milliseconds: int = 700, **options: Any) -> bytes:
    """Animates the panels of `layer_maps`, looping forever; the last one stays three times as long.

    Args:
        image: the picture, as in `layer_maps`.
        trace: `red.trace`, as in `layer_maps`.
        milliseconds: time per panel.
        options: `sample`, `style`, `scale`, `borders`, `layers` of `layer_maps`.

    Returns:
        The bytes of a GIF file.
    """
    frames = [panel for _, panel in layer_maps(image, trace, **options)]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def survival_map(image: Any, trace: Sequence[Any], *, sample: int = 0, scale: int | None = None) -> Image.Image:
    """Shows which patches kept a token of their own, averaged over the traced layers.

    A patch counts 1 at a layer where it is alone in its token, 1/n in a group of n, 0 once dropped.

    Args:
        image: the picture, as in `layer_maps`.
        trace: `red.trace`, as in `layer_maps`.
        sample: row of the batch.
        scale: as in `token_map`.

    Returns:
        The picture in gray under viridis: yellow = kept for itself all the way, violet = merged or dropped early.
    """
    entries = _select(trace, None)
    origins = [_origin(entry, sample) for entry in entries]
    slots = [patch_slots(o, entry.grid, _prefix(entry, o)) for entry, o in zip(entries, origins)]
    share = np.mean([_share(one) for one in slots], axis=0)
    pixels = np.asarray(enlarge(as_picture(image), scale), dtype=np.float64)
    rows = (np.arange(pixels.shape[0]) * share.shape[0]) // pixels.shape[0]
    columns = (np.arange(pixels.shape[1]) * share.shape[1]) // pixels.shape[1]
    return Image.fromarray(np.rint(heat_overlay(pixels, share[np.ix_(rows, columns)])).astype(np.uint8), "RGB")


def token_count(entry: Any, sample: int = 0) -> int:
    """Counts the live tokens of one sample after a traced layer, prefix included."""
    mapping = getattr(entry, "map", None)
    if mapping is None:
        return len(np.setdiff1d(_origin(entry, sample), [-1]))
    if mapping.counts is not None:
        return int(mapping.counts[sample])
    # Slots that an earlier reduction left empty for this sample stay, with size 0.
    size = getattr(entry, "size", None)
    return int(mapping.K if size is None else (as_array(size)[sample] > 0).sum())


def _prefix(entry: Any, origin: np.ndarray) -> int:
    """Original tokens before the patches; tokens that joined since count in `entry.prefix` and have no origin."""
    return min(entry.prefix, max(origin.size - entry.grid[0] * entry.grid[1], 0))


def _share(slots: np.ndarray) -> np.ndarray:
    groups = canonical_groups(slots)
    sizes = np.bincount(groups.ravel() + 1)
    return np.where(groups < 0, 0.0, 1.0 / sizes[groups + 1])


def _select(trace: Sequence[Any], layers: Sequence[int] | None) -> list[Any]:
    entries = list(trace or [])
    if not entries:
        raise ParameterError(
            "trace is empty: patch with trace=True, reduce at least one token, and run a forward before drawing"
        )
    if layers is None:
        return entries
    known = [entry.layer for entry in entries]
    missing = [layer for layer in layers if layer not in known]
    if missing:
        raise ParameterError(f"layers={list(layers)} asks for {missing}, but the trace has {known}")
    return [entry for entry in entries if entry.layer in layers]


def _origin(entry: Any, sample: int) -> np.ndarray:
    if entry.origin is None:
        raise ParameterError(f"the trace of layer {entry.layer} has no origin map: patch with trace=True")
    origin = as_array(entry.origin)
    if not 0 <= sample < len(origin):
        raise ParameterError(f"sample={sample} is not in the traced batch of {len(origin)}")
    return origin[sample]
