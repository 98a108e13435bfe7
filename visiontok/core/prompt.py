"""Decisions on the pictures of a prompt, before the language model (sites POST and EMBED)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.pictures import Kept, Picture, Row, Tower, Vision, lay_out, spread_budget, whole_rows
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Offers, Signals, Site
from visiontok.core.state import TokenState, apply
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import Crops, PromptReducer, Text
from visiontok.errors import IncompatibleError
from visiontok.ops.constants import without_autocast

__all__ = ["Decided", "decide_pictures"]


class Decided(NamedTuple):
    """What a reducer decided on the pictures of a prompt.

    Attributes:
        kept: Per picture.
        maps: The maps, one per group of rows.
        carry: Per picture, tensors (m, ...) that follow its tokens into the language model.
    """

    kept: list[Kept]
    maps: list[TokenMap]
    carry: list[Mapping[str, Tensor]]


class _Slots(NamedTuple):
    """What remains of one row.

    Attributes:
        values: (k, D) projected.
        token: (k,) the token of the row that each stands for, -1 for a class token.
        grid: (h, w) that they form, if they do.
        carry: Tensors (k, ...) by name.
    """

    values: Tensor
    token: Tensor
    grid: tuple[int, int] | None = None
    carry: Mapping[str, Tensor] = {}


def decide_pictures(reducer: PromptReducer, budget: Budget, vision: Vision) -> Decided | None:
    """Asks the reducer about every picture.

    Args:
        reducer: At POST or EMBED.
        budget: Of each picture (of each crop where `reducer.per` says so).
        vision: The pictures and what the tower knows of them.

    Returns:
        What remains, or None if everything stays as it is.

    Raises:
        IncompatibleError: A signal is not there.
    """
    whole = reducer.scope == "image" or reducer.grid_preserving
    pictures = [whole_rows(picture) if whole else picture for picture in vision.pictures]
    removed = [_removals(reducer, budget, picture, vision.tower.depth) for picture in vision.pictures]
    if reducer.scope == "image":
        # Cells that only pad the crops are in the rows, and go in any case.
        padding = [whole.tokens - cut.tokens for whole, cut in zip(pictures, vision.pictures)]
        removed = [[sum(row) + more] for row, more in zip(removed, padding)]
    if not reducer.always and not any(any(row) for row in removed):
        return None
    asked = _Asked(reducer, vision)
    with without_autocast(pictures[0].features.device.type):
        slots = asked.by_image(pictures, removed) if reducer.scope == "image" else asked.by_row(pictures, removed)
    made = [_packed(reducer, picture, row) for picture, row in zip(pictures, slots)]
    return Decided([kept for kept, _ in made], asked.maps, [carry for _, carry in made])


def _removals(reducer: PromptReducer, budget: Budget, picture: Picture, depth: int) -> list[int]:
    """Tokens to remove from each row of a picture."""
    lengths = [row.tokens for row in picture.rows]
    where = [Where(depth, depth, start=row.tokens, grid=row.grid, frames=row.frames) for row in picture.rows]
    if reducer.grid_preserving:
        # Grids shrink as a whole, so that every crop loses the same.
        return [reducer.removed(n, budget, at) for n, at in _whole_lengths(picture, where)]
    if reducer.per == "crop" or len(lengths) == 1:
        return [reducer.removed(n, budget, at) for n, at in zip(lengths, where)]
    total = sum(lengths)
    keep = total - reducer.removed(total, budget, Where(depth, depth, start=total))
    return [n - k for n, k in zip(lengths, spread_budget(keep, lengths))]


def _whole_lengths(picture: Picture, where: Sequence[Where]) -> list[tuple[int, Where]]:
    return [
        (row.tokens, replace(at, start=row.tokens, grid=row.grid)) for row, at in zip(whole_rows(picture).rows, where)
    ]


class _Asked:
    """One question to a reducer about all pictures of a prompt."""

    def __init__(self, reducer: PromptReducer, vision: Vision) -> None:
        self.reducer = reducer
        self.tower: Tower = vision.tower
        self.text: Callable[[], Text] = vision.text
        self.maps: list[TokenMap] = []

    def by_row(self, pictures: Sequence[Picture], removed: Sequence[Sequence[int]]) -> list[list[_Slots]]:
        groups: dict[Any, list[tuple[int, int]]] = {}
        for i, picture in enumerate(pictures):
            for j, row in enumerate(picture.rows):
                key = (row.tokens, removed[i][j], row.grid, row.frames, row.crop is None, _crop_kind(picture, j))
                groups.setdefault(key, []).append((i, j))
        found: list[list[Any]] = [[None] * len(picture.rows) for picture in pictures]
        for members in groups.values():
            rows = [pictures[i].rows[j] for i, j in members]
            own = [pictures[i] for i, _ in members]
            one, other = members[0]
            answers = self._ask(own, rows, removed[one][other], own[0].crops)
            for (i, j), slots in zip(members, answers):
                found[i][j] = slots
        return found

    def by_image(self, pictures: Sequence[Picture], removed: Sequence[Sequence[int]]) -> list[list[_Slots]]:
        return [
            self._ask([picture] * len(picture.rows), picture.rows, sum(row), picture.crops or _uncut(picture))
            for picture, row in zip(pictures, removed)
        ]

    def _ask(self, pictures: Sequence[Picture], rows: Sequence[Row], removed: int, crops: Crops | None) -> list[_Slots]:
        embed = self.reducer.site is Site.EMBED or self.tower.hidden is None or rows[0].crop is None
        projected = torch.stack([_features(picture, row) for picture, row in zip(pictures, rows)])
        cut = _Cut(self.tower, rows, embed, projected.device)
        x = projected if embed else cut.tokens(self.tower.hidden, 1)
        state = TokenState.initial(x, cut.prefix).changed(
            grid=rows[0].grid, layer=self.tower.depth, depth=self.tower.depth
        )
        if removed == 0 and not self.reducer.always:
            every = torch.arange(x.shape[1] - cut.prefix, device=x.device)
            return [_Slots(values, every) for values in projected]
        samples = torch.tensor([picture.sample for picture in pictures], device=x.device)
        signals = Signals({**cut.offers(), **self._own_offers(x, rows[0], samples, crops, embed)})
        tm = self.reducer.decide(signals, state, removed)
        if tm is None:
            tm = TokenMap.keep(
                torch.arange(x.shape[1] - cut.prefix, device=x.device).expand(len(rows), -1) + cut.prefix, state.n
            )
        self.maps.append(tm)
        return self._slots(tm, x, state, projected, embed)

    def _own_offers(self, x: Tensor, row: Row, samples: Tensor, crops: Crops | None, embed: bool) -> Offers:
        def grid() -> tuple[int, int]:
            if row.grid is None:
                raise IncompatibleError(f"the {row.tokens} tokens of this picture form no grid.")
            return row.grid

        def text() -> Text:
            tokens, live = self.text()
            return Text(tokens[samples], live[samples])

        own: dict[str, Callable[[], Any]] = {"HIDDEN": lambda: x, "GRID": grid, "FRAMES": lambda: row.frames}
        own["CROPS"] = lambda: crops
        if embed:
            own["TEXT"] = text
        return own

    def _slots(self, tm: TokenMap, x: Tensor, state: TokenState, projected: Tensor, embed: bool) -> list[_Slots]:
        reduced, after = apply(tm, x, state)
        token = tm.kept - state.prefix
        chosen = tm.form in ("select", "identity") and tm.mode == "mean" and tm.soft is None
        if chosen and not embed:
            values = projected.gather(1, token.clamp_min(0).unsqueeze(2).expand(-1, -1, projected.shape[2]))
        elif embed:
            values = reduced
        else:
            if self.tower.project is None:
                raise IncompatibleError(
                    f"{self.reducer.name} merges tokens before the projector, which mixes them here."
                )
            values = self.tower.project(reduced)
        counts = [tm.K] * len(values) if tm.counts is None else tm.counts.tolist()
        # Only grids of whole crops can be put together.
        grid = tm.grid if self.reducer.grid_preserving else None
        return [
            _Slots(v[:n], t[:n], grid, {name: c[i, :n] for name, c in after.carry.items()})
            for i, (v, t, n) in enumerate(zip(values, token, counts))
        ]


class _Cut:
    """The tower's tensors of some rows."""

    def __init__(self, tower: Tower, rows: Sequence[Row], embed: bool, device: torch.device) -> None:
        self.tower, self.rows = tower, rows
        self.prefix = 0 if embed else tower.prefix
        # Rows of one group are alike in this.
        self.known = rows[0].crop is not None
        self.crop = torch.tensor([row.crop or 0 for row in rows], device=device)
        cells = [row.cells for row in rows if row.cells is not None]
        self.cells = torch.stack(cells).to(device) if cells else None

    def tokens(self, tensor: Tensor | None, axis: int) -> Tensor:
        """The rows' part of a tensor of the tower, with the prefix if it belongs to the decision."""
        if tensor is None:
            raise IncompatibleError("this model has no features before its projector that could be reduced.")
        cut = tensor[self.crop]
        lead = self.tower.prefix
        if self.cells is None:
            return cut.narrow(axis, lead - self.prefix, cut.shape[axis] - lead + self.prefix)
        head = torch.arange(lead - self.prefix, lead, device=cut.device).expand(len(cut), -1)
        index = torch.cat((head, self.cells + lead), dim=1)
        axis %= cut.dim()
        shape = [len(index), *[1] * (cut.dim() - 1)]
        shape[axis] = index.shape[1]
        return cut.gather(axis, index.view(shape).expand(*cut.shape[:axis], -1, *cut.shape[axis + 1 :]))

    def offers(self) -> dict[str, Callable[[], Tensor]]:
        scores = [row.scores for row in self.rows if row.scores is not None]
        if len(scores) == len(self.rows):
            return {"ATTN_PREFIX": lambda: torch.stack([read() for read in scores])}
        if not self.known:
            return {}
        axes = {"ATTN_PREFIX": -1, "KEY": 3}
        return {
            name: (lambda read=read, axis=axes[name]: self.tokens(read(), axis))
            if name in axes
            else (lambda read=read: read()[self.crop])
            for name, read in self.tower.offers.items()
        }


def _features(picture: Picture, row: Row) -> Tensor:
    """(n, D) projected features of a row."""
    if picture.raw is not None and row.crop is not None and row.cells is None:
        return picture.raw[row.crop - (picture.rows[0].crop or 0)]
    return picture.features if row.packed is None else picture.features[row.packed]


def _crop_kind(picture: Picture, row: int) -> tuple[bool, bool]:
    return picture.crops is not None, row == 0


def _uncut(picture: Picture) -> Crops:
    row = picture.rows[0]
    side = row.grid or (1, row.tokens)
    return Crops(0, 0, side, side, False)


def _packed(reducer: PromptReducer, picture: Picture, rows: Sequence[_Slots]) -> tuple[Kept, Mapping[str, Tensor]]:
    """The prompt's tokens of one picture from what remains of its rows."""
    if picture.crops is not None:
        return _packed_crops(reducer, picture, rows)
    columns = torch.cat([_columns(row, slots) for row, slots in zip(picture.rows, rows)])
    values = torch.cat([slots.values for slots in rows])
    carry = {name: torch.cat([slots.carry[name] for slots in rows]) for name in rows[0].carry}
    outside = _outside(picture)
    if outside.numel():
        columns, values = torch.cat((columns, outside)), torch.cat((values, picture.features[outside].to(values)))
        carry = {name: _followed(value, len(outside)) for name, value in carry.items()}
    if len(rows) > 1:
        # Rows and newlines in the order of the prompt.
        order = columns.argsort(stable=True)
        columns, values = columns[order], values[order]
        carry = {name: value[order] for name, value in carry.items()}
    return Kept(columns, values, tuple(extra[columns] for extra in picture.extras)), carry


def _followed(value: Tensor, more: int) -> Tensor:
    # Newlines carry nothing.
    return torch.cat((value, value.new_zeros(more, *value.shape[1:])))


def _columns(row: Row, slots: _Slots) -> Tensor:
    token = slots.token.clamp_min(0)
    return token if row.packed is None else row.packed[token]


def _outside(picture: Picture) -> Tensor:
    length, device = picture.features.shape[0], picture.features.device
    if any(row.packed is None for row in picture.rows):
        return torch.empty(0, dtype=torch.int64, device=device)
    inside = torch.cat([row.packed for row in picture.rows if row.packed is not None])
    free = torch.ones(length, dtype=torch.bool, device=device).index_fill(0, inside, False)
    return free.nonzero().squeeze(1) if inside.numel() < length else inside[:0]


def _packed_crops(
    reducer: PromptReducer, picture: Picture, rows: Sequence[_Slots]
) -> tuple[Kept, Mapping[str, Tensor]]:
    """Thumbnail in slot order, then what remains of the crops in the order of the canvas, with its newlines."""
    crops: Any = picture.crops
    device, first = picture.features.device, rows[0]
    count = picture.rows[0].tokens
    grid = next((slots.grid for slots in rows if slots.grid is not None), None)
    side = crops.side if grid is None else grid
    order = lay_out(crops._replace(side=side), reducer.padded).to(device)
    length = side[0] * side[1]
    # Odd ranks: places on the canvas; even ones: class tokens, before the first place of their crop.
    rank = torch.full((crops.number * length,), -1, dtype=torch.int64, device=device)
    place = torch.arange(len(order), device=device) * 2 + 1
    rank[order[order >= 0]] = place[order >= 0]
    ranks, columns, values = [], [], []
    for row, slots in zip(picture.rows[1:], rows[1:]):
        start = ((row.crop or 0) - (picture.rows[0].crop or 0) - 1) * length
        cell = slots.token if row.cells is None else row.cells[slots.token.clamp_min(0)]
        cell = torch.arange(len(cell), device=device) if grid is not None else cell.clamp_min(0)
        own = rank[start : start + length]
        lead = own.masked_fill(own < 0, 2 * len(order)).amin() - 1
        ranks.append(torch.where(slots.token < 0, lead, own[cell]))
        columns.append(_columns(row, slots))
        values.append(slots.values)
    if not ranks:
        return Kept(first.token.clamp_min(0), first.values), first.carry
    carry = {name: torch.cat([slots.carry[name] for slots in rows[1:]]) for name in first.carry}
    if crops.newline and picture.newline is not None:
        line = place[order < 0]
        ranks.append(line)
        columns.append(_line_columns(len(line), count, picture))
        values.append(picture.newline.to(first.values).expand(len(line), -1))
        carry = {name: _followed(value, len(line)) for name, value in carry.items()}
    found, at, bank = torch.cat(ranks), torch.cat(columns), torch.cat(values)
    chosen = found.argsort(stable=True)
    chosen = chosen[found[chosen] >= 0]
    kept = Kept(torch.cat((first.token.clamp_min(0), at[chosen])), torch.cat((first.values, bank[chosen])))
    return kept, {name: torch.cat((first.carry[name], value[chosen])) for name, value in carry.items()}


def _line_columns(lines: int, count: int, picture: Picture) -> Tensor:
    """Where the newlines of the full prompt stand; those that it does not have stand with the last one."""
    device = picture.features.device
    own = (lay_out(picture.crops, False) < 0).nonzero().squeeze(1).to(device) + count  # type: ignore[arg-type]
    return own[torch.arange(lines, device=device).clamp(max=len(own) - 1)]
