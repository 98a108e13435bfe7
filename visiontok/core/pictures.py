"""Pictures: the images and videos of a prompt as the reducers of sites POST and EMBED see them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.visual import Crops, Text
from visiontok.ops.anyres import valid_area

__all__ = [
    "Kept",
    "Picture",
    "Row",
    "Tower",
    "Vision",
    "arrange",
    "assemble",
    "lay_out",
    "plain_picture",
    "spread_budget",
    "whole_rows",
]


class Row(NamedTuple):
    """One row of a decision: a crop, or a whole image or video.

    Attributes:
        tokens: Number n of its tokens.
        packed: (n,) int64 places of its tokens among the picture's features; None for all of them in order.
        crop: Row of the tower's tensors, or None where one row of the prompt is not one row of the tower.
        cells: (n,) int64 tokens of that crop, class token not counted; None for all of them.
        grid: (h, w) of the n tokens, or None.
        frames: Frames of equal length, one after the other.
        scores: ATTN_PREFIX (L, H, 1, n) of a row that is none of the tower's.
    """

    tokens: int
    packed: Tensor | None = None
    crop: int | None = None
    cells: Tensor | None = None
    grid: tuple[int, int] | None = None
    frames: int = 1
    scores: Callable[[], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """One image or video of the prompt.

    Attributes:
        features: (M, D) what the language model would read in place of its M placeholders.
        rows: What a decision sees of it; features in no row (newlines) always stay.
        sample: Batch row of the prompt.
        crops: How it was cut, where the prompt holds the crops one row of tokens after the other.
        newline: (D,) feature after every row of tokens, if there is one.
        extras: Further features (M, D') per placeholder, which follow it (DeepStack).
        places: (M,) int64 placeholder that each feature stands for, where the tower merged tokens; else None.
        full: Number of placeholders, where it is not M.
        raw: (1 + crops, n, D) features of the thumbnail and of whole crops, padding included.
    """

    features: Tensor
    rows: tuple[Row, ...]
    sample: int = 0
    crops: Crops | None = None
    newline: Tensor | None = None
    extras: tuple[Tensor, ...] = ()
    places: Tensor | None = None
    full: int | None = None
    raw: Tensor | None = None

    @property
    def placeholders(self) -> int:
        """Placeholders of this picture in the full prompt."""
        return self.features.shape[0] if self.full is None else self.full

    @property
    def tokens(self) -> int:
        """Tokens that may go."""
        return sum(row.tokens for row in self.rows)


class Tower(NamedTuple):
    """The vision tower's side of a decision.

    Attributes:
        hidden: (S, P + n, C) selected features of its S rows, or None where only projected ones exist.
        prefix: P, leading class tokens in `hidden`.
        depth: Layers of the tower.
        offers: ATTN_PREFIX, QUERY_PREFIX and KEY of the tapped layers, each with S first, lazily.
        project: From (…, C) to what the language model reads.
    """

    hidden: Tensor | None
    prefix: int
    depth: int
    offers: Mapping[str, Callable[[], Tensor]]
    project: Callable[[Tensor], Tensor] | None


class Vision(NamedTuple):
    """All pictures of one kind (images or videos) of a prompt.

    Attributes:
        pictures: In the order of their placeholders.
        tower: The vision tower's tensors.
        text: The samples' text.
    """

    pictures: tuple[Picture, ...]
    tower: Tower
    text: Callable[[], Text]


class Kept(NamedTuple):
    """What remains of a picture.

    Attributes:
        columns: (m,) int64 the placeholder whose position each remaining token takes.
        features: (m, D).
        extras: (m, D') each.
    """

    columns: Tensor
    features: Tensor
    extras: tuple[Tensor, ...] = ()


def plain_picture(features: Tensor, grid: tuple[int, int] | None = None, **fields: Any) -> Picture:
    """A picture of one row, which holds all of its tokens.

    Args:
        features: (M, D).
        grid: (h, w) of the tokens.
        **fields: `crop` and `frames` of the row, and further fields of the picture.
    """
    row = Row(features.shape[0], crop=fields.pop("crop", None), grid=grid, frames=fields.pop("frames", 1))
    return Picture(features, (row,), **fields)


@functools.lru_cache(maxsize=256)
def lay_out(crops: Crops, padded: bool = False) -> Tensor:
    """How the tokens of an image's crops stand in the prompt: row by row over all crops.

    Args:
        crops: How the image was cut.
        padded: Whether rows and columns that only pad the image stay in.

    Returns:
        (M,) int64 crop * n + cell of each token, -1 for a newline; the thumbnail is not among them.
    """
    height, width = crops.rows * crops.side[0], crops.columns * crops.side[1]
    flat = torch.arange(crops.number * crops.side[0] * crops.side[1])
    canvas = flat.view(crops.rows, crops.columns, *crops.side).permute(0, 2, 1, 3).reshape(height, width)
    top, bottom, left, right = (0, height, 0, width) if padded else valid_area(crops.image_size, (height, width))
    canvas = canvas[top:bottom, left:right]
    if crops.newline:
        canvas = torch.cat((canvas, canvas.new_full((canvas.shape[0], 1), -1)), dim=1)
    return canvas.flatten()


def assemble(projected: Tensor, first: int, crops: Crops, newline: Tensor | None, **fields: Any) -> Picture:
    """The picture of an image cut into a thumbnail and crops.

    Args:
        projected: (1 + crops, n, D) features of the thumbnail and of the crops.
        first: Row of the tower's tensors that holds the thumbnail.
        crops: How it was cut.
        newline: (D,) feature after every row of tokens, or None.
        **fields: Further fields of the picture.
    """
    count, width = projected.shape[1], projected.shape[2]
    order = lay_out(crops).to(projected.device)
    bank = projected[1:].reshape(-1, width)
    tokens = bank[order.clamp_min(0)]
    if newline is not None:
        tokens = torch.where((order < 0).unsqueeze(1), newline.to(tokens), tokens)
    features = torch.cat((projected[0], tokens))
    return Picture(features, _rows(order, crops, first, count), crops=crops, newline=newline, raw=projected, **fields)


def _rows(order: Tensor, crops: Crops, first: int, count: int) -> tuple[Row, ...]:
    places = _places(crops)
    rows = [Row(count, torch.arange(count, device=order.device), first, None, crops.side)]
    for index, (packed, cells, grid) in enumerate(places):
        if cells.numel():
            at, of = (packed + count).to(order.device), cells.to(order.device)
            rows.append(Row(cells.numel(), at, first + 1 + index, of, grid))
    return tuple(rows)


@functools.lru_cache(maxsize=256)
def _places(crops: Crops) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Per crop: places of its valid tokens in the prompt, their cells, and the grid that they form."""
    order, length = lay_out(crops), crops.side[0] * crops.side[1]
    found = []
    for index in range(crops.number):
        packed = ((order >= index * length) & (order < (index + 1) * length)).nonzero().squeeze(1)
        cells = order[packed] - index * length
        rows = int(cells.div(crops.side[1], rounding_mode="floor").unique().numel())
        found.append((packed, cells, (rows, cells.numel() // max(rows, 1))))
    return found


def spread_budget(keep: int, tokens: Sequence[int]) -> list[int]:
    """Splits a number of tokens to keep over rows in proportion to their lengths, exactly (largest remainders)."""
    total = sum(tokens)
    shares = [keep * n // total for n in tokens]
    rest = sorted(range(len(tokens)), key=lambda i: (-(keep * tokens[i] % total), i))
    for i in rest[: keep - sum(shares)]:
        shares[i] += 1
    return shares


def whole_rows(picture: Picture) -> Picture:
    """The picture with rows of whole crops, padding included; itself if it was not cut."""
    crops = picture.crops
    if crops is None:
        return picture
    lead = picture.rows[0]
    length = crops.side[0] * crops.side[1]
    order = lay_out(crops).to(picture.features.device)
    # Where each cell of the crops stands in the prompt; padding stands with the token before it.
    at = torch.full((crops.number * length,), lead.tokens, dtype=torch.int64, device=order.device)
    live = order >= 0
    at[order[live]] = live.nonzero().squeeze(1) + lead.tokens
    packed = at.view(crops.number, length).cummax(dim=1).values
    rows = tuple(Row(length, packed[i], (lead.crop or 0) + 1 + i, None, crops.side) for i in range(crops.number))
    return replace(picture, rows=(lead, *rows))


def arrange(
    projected: Sequence[Tensor], cells: Sequence[Tensor], first: int, crops: Crops, newline: Tensor | None
) -> Picture:
    """The picture of an image whose tokens were merged in the tower before its crops are put together.

    Args:
        projected: Per crop, thumbnail first, (k, D) features.
        cells: Per crop (k,) int64, the cell that each token stands for.
        first: Row of the tower's tensors that holds the thumbnail.
        crops: How it was cut.
        newline: (D,) feature after every row of tokens, or None.
    """
    device = projected[0].device
    order, length = lay_out(crops).to(device), crops.side[0] * crops.side[1]
    place = torch.arange(len(order), device=device)
    at = torch.full((crops.number * length,), -1, dtype=torch.int64, device=device)
    at[order[order >= 0]] = place[order >= 0]
    ranks = [at[c + i * length] for i, c in enumerate(cells[1:])]
    kept = [(rank >= 0).nonzero().squeeze(1) for rank in ranks]
    spots = [rank[chosen] for rank, chosen in zip(ranks, kept)]
    bank = [p[chosen] for p, chosen in zip(projected[1:], kept)]
    if newline is not None:
        line = place[order < 0]
        spots.append(line)
        bank.append(newline.to(projected[0]).expand(len(line), -1))
    every = torch.cat(spots)
    ranked = every.argsort(stable=True)
    position = torch.empty_like(ranked).scatter(0, ranked, torch.arange(len(ranked), device=device))
    lead = len(cells[0])
    pieces = position.split([len(spot) for spot in spots])
    rows = [Row(lead, torch.arange(lead, device=device), first, torch.arange(lead, device=device))]
    for i, (piece, chosen) in enumerate(zip(pieces, kept)):
        if len(chosen):
            rows.append(Row(len(chosen), piece + lead, first + 1 + i, chosen))
    return Picture(
        torch.cat((projected[0], torch.cat(bank)[ranked])),
        tuple(rows),
        places=torch.cat((cells[0], every[ranked] + length)),
        full=length + len(order),
    )
