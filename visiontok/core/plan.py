"""bind(reducers, backbone, model) -> Plan: checks everything and fixes every budget before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from visiontok.core.backbone import Backbone
from visiontok.core.reducer import Reducer, Where
from visiontok.core.runtime import free_of_attention
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Site
from visiontok.core.targets import Measure, solve
from visiontok.errors import IncompatibleError, ParameterError

__all__ = ["Plan", "Point", "Support", "bind", "support"]


@dataclass(frozen=True)
class Support:
    """Whether a reducer fits a model.

    Attributes:
        ok: It does.
        reason: Why not, or an empty string.
        missing: Signals that the model does not offer at the reducer's site.
    """

    ok: bool
    reason: str = ""
    missing: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Point:
    """One place where a reducer acts.

    Attributes:
        site: Where in the block.
        layer: Blocks already run (at MID the block's index).
        path: The block that runs it.
        reducer: Who decides.
        budget: How many tokens it removes.
        before: Tokens before, for the nominal input, prefix included.
        after: Tokens after.
        skipped: Why nothing happens here, or an empty string.
        undo: Whether a span ends here instead of a reduction being made.
        order: Place among points at the same spot.
    """

    site: Site
    layer: int
    path: str
    reducer: Reducer
    budget: Budget
    before: int
    after: int
    skipped: str = ""
    undo: bool = False
    order: int = 0

    @property
    def block(self) -> int:
        """The block that runs it. PRE k is run by block k - 1, so that it has that block's signals, unless the reducer
        looks ahead; PRE 0 by block 0."""
        ahead = self.reducer.look == "ahead" and not self.undo
        return self.layer if self.site is Site.MID or ahead else max(self.layer - 1, 0)

    @property
    def place(self) -> str:
        """Where in that block: `HERE`, `MID` or `NEXT`."""
        if self.site is Site.MID:
            return "MID"
        return "HERE" if self.block == self.layer and not self.undo else "NEXT"


@dataclass(frozen=True)
class Plan:
    """What was patched, with the tokens of the nominal input at every point. Prints as a table."""

    backbone: str
    model: str
    depth: int
    prefix: int
    length: int
    points: tuple[Point, ...]

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block for the nominal input, prefix included."""
        out, now = [], self.length
        for block in range(self.depth):
            for point in self.points:
                if point.block == block:
                    now = point.after
            out.append(now)
        return out

    @property
    def removes(self) -> bool:
        """Whether any token is removed."""
        return any(point.before != point.after for point in self.points)

    def __str__(self) -> str:
        head = f"{self.model} ({self.backbone}): {self.depth} blocks, {self.length} tokens, {self.prefix} prefix"
        rows = [f"{'layer':>5}  {'site':<6} {'reducer':<14} {'budget':<12} {'tokens':<12} note"]
        for p in self.points:
            change = f"{p.before} -> {p.after}"
            rows.append(f"{p.layer:>5}  {p.site!s:<6} {p.reducer.name:<14} {p.budget!s:<12} {change:<12} {p.skipped}")
        return "\n".join([head, *(row.rstrip() for row in rows)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "backbone": self.backbone,
            "model": self.model,
            "depth": self.depth,
            "prefix": self.prefix,
            "tokens_in": self.length,
            "tokens": self.tokens,
            "points": [
                {"site": str(p.site), "layer": p.layer, "reducer": p.reducer.name, "budget": str(p.budget),
                 "before": p.before, "after": p.after, "skipped": p.skipped}
                for p in self.points
            ],
        }  # fmt: skip


def support(reducer: Reducer, backbone: Backbone, model: nn.Module) -> Support:
    """Whether `backbone` offers the site and signals of a reducer, and of its parts, in this model."""
    reducer = reducer.placed(backbone.provides)
    if reducer.class_token and backbone.prefix(model) == 0:
        return Support(False, f"{reducer.name} reads the class token; this {type(model).__name__} has none.")
    for part in reducer.parts():
        fits = _support(part, backbone, model)
        if not fits:
            return fits
    return Support(True)


def _support(reducer: Reducer, backbone: Backbone, model: nn.Module) -> Support:
    offered = backbone.provides
    if backbone.grid_only and not reducer.grid_preserving:
        reason = "blocks use windows or relative positions, so only reducers that keep a grid can be used"
        return Support(False, f"{backbone.name}'s {reason}; {reducer.name} does not.")
    if reducer.site not in offered:
        sites = ", ".join(str(site) for site in offered)
        return Support(False, f"{reducer.name} acts at site {reducer.site}; {backbone.name} has {sites}.")
    try:
        backbone.check(model, reducer.site)
    except IncompatibleError as error:
        return Support(False, str(error))
    have = backbone.signals(model, reducer.site)
    missing = tuple(str(signal) for signal in reducer.needs if signal not in have)
    if missing:
        why = f"{backbone.name} does not offer {', '.join(missing)} at {reducer.site} in this model"
        if str(Signal.ATTN_PREFIX) in missing and backbone.prefix(model) == 0:
            why += f": it has no class token, and {reducer.name} ranks tokens by the class token's attention"
        return Support(False, f"{why}.", missing)
    return Support(True)


def bind(
    reducers: Sequence[Reducer],
    backbone: Backbone,
    model: nn.Module,
    measure: Measure | None = None,
) -> Plan:
    """Fixes where each reducer acts and how much it removes there.

    Args:
        reducers: In the order of use; the same (site, layer) twice is refused, except within a composite.
        backbone: The model's family.
        model: The model.
        measure: GMACs of the model when a reducer removes given numbers of tokens at its points; for `gflops`.

    Raises:
        IncompatibleError: Site or signals are missing, or two reducers meet at one place.
        ParameterError: A budget does not fit the model.
    """
    rules = {reducer.positions for reducer in reducers}
    if backbone.positional and len(rules) > 1:
        raise ParameterError("all reducers of a list need the same positions, got 'mean' and 'gather'.")
    blocks = backbone.blocks(model)
    depth, length, prefix = len(blocks), backbone.length(model), backbone.prefix(model)
    parts = [(reducer, part) for reducer in reducers for part in reducer.parts()]
    if len(parts) > 1 and any(part.gflops is not None for _, part in parts):
        raise ParameterError("gflops is a target for the whole model and needs a single reducer; give r or keep.")
    wanted: list[Point] = []
    owners: dict[tuple[int, int], Reducer] = {}
    for order, (owner, part) in enumerate(parts):
        fits = support(owner, backbone, model)
        if not fits:
            raise IncompatibleError(f"{part.name} cannot be used on {type(model).__name__}: {fits.reason}")
        if part.site is Site.HEAD:
            continue
        for layer, budget in solve(part, depth, length - prefix, measure, prefix).items():
            _check_place(part, layer, depth)
            point = Point(part.site, layer, "", part, budget, 0, 0, order=order)
            acts = part.always or not budget.idle
            place = (point.block, _PLACES.index(point.place))
            other = owners.setdefault(place, owner) if acts else owner
            if other is not owner:
                raise IncompatibleError(
                    f"{owner.name} and {other.name} both act at ({part.site}, layer {layer}); give one of them other "
                    "layers."
                )
            wanted.append(point)
    points = _counted(sorted(wanted, key=_running_order), depth, length, prefix, backbone.grid(model))
    named = tuple(replace(point, path=blocks[point.block].path) for point in points)
    return Plan(backbone.name, type(model).__name__, depth, prefix, length, named)


# In the order in which a block comes by them.
_PLACES = ("HERE", "MID", "NEXT")


def _running_order(point: Point) -> tuple[int, int, int]:
    return point.block, _PLACES.index(point.place), point.order


def _check_place(reducer: Reducer, layer: int, depth: int) -> None:
    allowed = reducer.span(depth)
    if layer == 0 and reducer.site is not Site.MID and reducer.look != "ahead" and not free_of_attention(reducer):
        needs = ", ".join(str(signal) for signal in reducer.needs)
        raise IncompatibleError(f"{reducer.name} at layer 0: no block has run, so there is no {needs} yet.")
    if not 0 <= layer <= depth or (layer == depth and (reducer.site is Site.MID or reducer.look == "ahead")):
        known = f"{allowed[0]} … {allowed[-1]}" if allowed else "none"
        raise ParameterError(f"{reducer.name}: layer {layer} does not exist; this model has {known} for it.")


def _counted(
    wanted: Sequence[Point], depth: int, length: int, prefix: int, grid: tuple[int, int] | None
) -> list[Point]:
    """The points with their token counts, and the ends of spans between them."""
    points: list[Point] = []
    spans: list[_Span] = []
    now, start = length, length - prefix
    for point in wanted:
        closed = _close_spans(spans, points, now, point)
        now, grid = (now, grid) if closed is None else (closed.start.before, closed.grid)
        reducer, where = point.reducer, Where(point.layer, depth, start=start, grid=grid)
        after = now - reducer.removed(now - prefix, point.budget, where, prefix)
        items = now - prefix
        prefix += reducer.protects(where)
        if after < now:
            grid = reducer.regrid(items, point.budget, where)
        note = "" if after != now or reducer.always else "nothing to remove"
        points.append(replace(point, before=now, after=after, skipped=note))
        if reducer.site is Site.AROUND and after != now:
            spans.append(_span(points[-1], where.grid, depth, spans))
        now = after
    _close_spans(spans, points, now, None)
    return points


class _Span(NamedTuple):
    """A reduction that is undone at a layer (infinity: by the consumer), and the grid that it found."""

    until: float
    start: Point
    grid: tuple[int, int] | None


def _span(start: Point, grid: tuple[int, int] | None, depth: int, spans: Sequence[_Span]) -> _Span:
    name, until = start.reducer.name, start.reducer.until(start.layer, depth)
    if until is not None and not start.layer < until <= depth:
        raise ParameterError(f"{name}: a span from layer {start.layer} cannot end at layer {until}.")
    end = math.inf if until is None else until
    if spans and end > spans[-1].until:
        outer, where = spans[-1], "the end of the model" if until is None else f"layer {until}"
        crossed = f"{outer.start.reducer.name}'s span at layer {outer.until}"
        raise IncompatibleError(
            f"{name} spans layer {start.layer} to {where}, across the end of {crossed}; end it there or earlier."
        )
    return _Span(end, start, grid)


def _close_spans(spans: list[_Span], points: list[Point], now: int, upcoming: Point | None) -> _Span | None:
    """Adds the ends of spans that come before a point, and returns the outermost of them."""
    closed: _Span | None = None
    # A span ends in block until - 1, before what else that block does for the next one.
    here = (math.inf, 0) if upcoming is None else (upcoming.block, _PLACES.index(upcoming.place))
    while spans and here >= (spans[-1].until - 1, _PLACES.index("NEXT")):
        closed = spans.pop()
        before, layer = closed.start.before, int(closed.until)
        points.append(replace(closed.start, layer=layer, before=now, after=before, skipped="span ends", undo=True))
        now = before
    return closed
