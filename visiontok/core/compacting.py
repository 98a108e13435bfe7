"""Compaction: a prompt without the placeholders of removed tokens, padded on the left again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visiontok.errors import IncompatibleError

__all__ = ["Compacted", "Span", "compact", "find_spans"]


class Span(NamedTuple):
    """Where a picture's placeholders stand in the prompt.

    Attributes:
        sample: Batch row.
        columns: (M,) int64 columns in that row, ascending.
    """

    sample: int
    columns: Tensor


class Compacted(NamedTuple):
    """A shortened prompt.

    Attributes:
        place: (B, L') int64 column of the full prompt that each column shows (arbitrary where padding).
        source: (B, L') int64 column whose position it has in the full prompt.
        live: (B, L') bool, False for padding on the left.
        spans: The pictures' remaining columns in the shortened prompt.
        padded: Whether any column is padding.
    """

    place: Tensor
    source: Tensor
    live: Tensor
    spans: list[Span]
    padded: bool

    def take(self, tensor: Tensor, fill: int | float) -> Tensor:
        """A (B, L) tensor of the full prompt, shortened.

        Args:
            tensor: (B, L).
            fill: Value of padding.
        """
        return tensor.gather(1, self.place).masked_fill(~self.live, fill)


def find_spans(ids: Tensor, token: int, counts: Sequence[int], kind: str) -> list[Span]:
    """Finds the placeholders of each picture.

    Args:
        ids: (B, L) prompt.
        token: Placeholder id.
        counts: Features of each picture, in the order of the prompt.
        kind: What they are, for messages.

    Raises:
        IncompatibleError: The prompt has no placeholders, or another number than there are features, or a picture's
            placeholders stand in two rows.
    """
    found = (ids == token).nonzero()
    if len(found) != sum(counts):
        if len(found) == 0:
            raise IncompatibleError(
                f"the prompt holds no {kind} placeholder (token {token}), but {len(counts)} {kind} inputs were given; "
                "build input_ids with the model's processor."
            )
        raise IncompatibleError(
            f"the prompt holds {len(found)} {kind} placeholders (token {token}), but the {kind}s have {sum(counts)} "
            f"features ({', '.join(map(str, counts))}); build input_ids with the model's processor and the same images."
        )
    rows = found[:, 0].tolist()
    spans, start = [], 0
    for count in counts:
        if rows[start] != rows[start + count - 1]:
            raise IncompatibleError(
                f"the placeholders of a {kind} with {count} features stand in two rows of the batch ({rows[start]} and "
                f"{rows[start + count - 1]}); give the {kind}s in the order of the rows."
            )
        spans.append(Span(rows[start], found[start : start + count, 1]))
        start += count
    return spans


def compact(mask: Tensor, spans: Sequence[Span], kept: Sequence[Tensor]) -> Compacted:
    """Drops the placeholders of removed tokens, and all padding, and pads on the left again.

    Args:
        mask: (B, L) bool, False for padding.
        spans: The pictures' placeholders.
        kept: Per picture (m,) int64, the placeholder whose position each remaining token takes, in prompt order.
    """
    batch, length = mask.shape
    device = mask.device
    text = mask.clone()
    rows, places, sources, owners = [], [], [], []
    for index, (span, chosen) in enumerate(zip(spans, kept)):
        text[span.sample, span.columns] = False
        source = span.columns[chosen]
        rows.append(torch.full_like(source, span.sample))
        # Tokens keep their order among themselves whatever positions they take.
        places.append(source.sort().values)
        sources.append(source)
        owners.append(torch.full_like(source, index))
    row, column = text.nonzero(as_tuple=True)
    rows, places = torch.cat((row, *rows)), torch.cat((column, *places))
    sources, owners = torch.cat((column, *sources)), torch.cat((torch.full_like(column, -1), *owners))
    order = (rows * length + places).argsort(stable=True)
    rows, places, sources, owners = rows[order], places[order], sources[order], owners[order]
    counts = torch.bincount(rows, minlength=batch)
    sizes = counts.tolist()
    longest = max(sizes)
    # A row's tokens end at the last column.
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)[:-1]))
    column = torch.arange(len(rows), device=device) - starts[rows] + longest - counts[rows]
    place = torch.zeros(batch, longest, dtype=torch.int64, device=device)
    source, owner = place.clone(), torch.full_like(place, -1)
    live = torch.zeros(batch, longest, dtype=torch.bool, device=device)
    place[rows, column], source[rows, column], owner[rows, column] = places, sources, owners
    live[rows, column] = True
    # Grouped by picture, in prompt order within each.
    slot = torch.cat([(owner[span.sample] == i).nonzero().squeeze(1) for i, span in enumerate(spans)] or [column[:0]])
    pieces = slot.split([len(chosen) for chosen in kept])
    shorter = [Span(span.sample, piece) for span, piece in zip(spans, pieces)]
    return Compacted(place, source, live, shorter, min(sizes) < longest)
