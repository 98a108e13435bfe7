"""bind(reducers, backbone, model) -> Plan: checks everything and fixes every budget before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from visiontok.core.backbone import Backbone
from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget, even
from visiontok.core.signals import Site
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
    """

    site: Site
    layer: int
    path: str
    reducer: Reducer
    budget: Budget
    before: int
    after: int
    skipped: str = ""


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
                if _runs_in(point) == block:
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


def _runs_in(point: Point) -> int:
    # PRE k is run by block k - 1, so that it has that block's signals; PRE 0 by block 0.
    return point.layer if point.site is Site.MID else max(point.layer - 1, 0)


def support(reducer: Reducer, backbone: Backbone, model: nn.Module) -> Support:
    """Whether `backbone` offers the reducer's site and signals in this model."""
    offered = backbone.provides
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
        return Support(False, f"{backbone.name} does not offer {', '.join(missing)} at {reducer.site}.", missing)
    return Support(True)


def bind(
    reducers: Sequence[Reducer],
    backbone: Backbone,
    model: nn.Module,
    measure: Callable[[Reducer, list[int]], float] | None = None,
) -> Plan:
    """Fixes where each reducer acts and how much it removes there.

    Args:
        reducers: In the order of use; the same (site, layer) twice is refused.
        backbone: The model's family.
        model: The model.
        measure: GMACs of the model when a reducer removes given numbers of tokens at its points; for `gflops`.

    Raises:
        IncompatibleError: Site or signals are missing, or two reducers meet at one place.
        ParameterError: A budget does not fit the model.
    """
    blocks = backbone.blocks(model)
    depth, length, prefix = len(blocks), backbone.length(model), backbone.prefix(model)
    if len(reducers) > 1 and any(reducer.gflops is not None for reducer in reducers):
        raise ParameterError("gflops is a target for the whole model and needs a single reducer; give r or keep.")
    wanted: dict[tuple[int, bool], tuple[Reducer, Budget]] = {}
    for reducer in reducers:
        fits = support(reducer, backbone, model)
        if not fits:
            raise IncompatibleError(f"{reducer.name} cannot be used on {type(model).__name__}: {fits.reason}")
        for layer, budget in _budgets(reducer, depth, length - prefix, measure).items():
            key = (layer, reducer.site is Site.MID)
            if key in wanted:
                other = wanted[key][0].name
                raise IncompatibleError(
                    f"{reducer.name} and {other} both act at ({reducer.site}, layer {layer}); give one of them other "
                    "layers."
                )
            wanted[key] = (reducer, budget)
    points, now = [], length
    for layer, at_mid in sorted(wanted):
        reducer, budget = wanted[layer, at_mid]
        after = now - reducer.removed(now - prefix, budget, Where(layer, depth), prefix)
        path = blocks[layer if at_mid else max(layer - 1, 0)].path
        note = "" if after < now else "nothing to remove"
        points.append(Point(reducer.site, layer, path, reducer, budget, now, after, note))
        now = after
    return Plan(backbone.name, type(model).__name__, depth, prefix, length, tuple(points))


def _budgets(
    reducer: Reducer, depth: int, items: int, measure: Callable[[Reducer, list[int]], float] | None
) -> dict[int, Budget]:
    if reducer.tokens is None and reducer.gflops is None:
        return reducer.budgets(depth)
    layers = reducer.layers(depth)
    if reducer.tokens is not None:
        total = _reach_tokens(reducer, layers, depth, items)
    else:
        total = _reach_gflops(reducer, layers, items, measure)
    return {layer: Budget(r=r) for layer, r in zip(layers, even(total, len(layers)))}


def _final(reducer: Reducer, layers: range, depth: int, items: int, total: int) -> int:
    for layer, r in zip(layers, even(total, len(layers))):
        items -= reducer.removed(items, Budget(r=r), Where(layer, depth))
    return items


def _reach_tokens(reducer: Reducer, layers: range, depth: int, items: int) -> int:
    target = reducer.tokens or 0
    if target > items:
        raise ParameterError(f"{reducer.name}: tokens={target} exceeds the {items} tokens that the model starts with.")
    total = items - target
    reached = _final(reducer, layers, depth, items, total)
    if reached != target:
        raise ParameterError(
            f"{reducer.name}: tokens={target} cannot be reached: {len(layers)} even steps end at {reached}; "
            "give r as a list instead."
        )
    return total


def _reach_gflops(
    reducer: Reducer, layers: range, items: int, measure: Callable[[Reducer, list[int]], float] | None
) -> int:
    if measure is None:
        raise ParameterError(f"{reducer.name}: gflops needs a model whose compute can be counted here.")

    def gmacs(total: int) -> float:
        return measure(reducer, even(total, len(layers)))

    target, low, high = float(reducer.gflops or 0), 0, items - 1
    above, below = gmacs(low), gmacs(high)
    if not below <= target <= above:
        raise ParameterError(
            f"{reducer.name}: gflops={target:g} is outside what this model can reach, {below:.4g} … {above:.4g} GMACs."
        )
    if above <= target:
        return low
    # Compute falls almost linearly, so interpolation finds the place in a few counts; every other step halves the
    # interval in case it does not.
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (above - target) / (above - below)
        guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
        found = gmacs(guess)
        if found <= target:
            high, below = guess, found
        else:
            low, above = guess, found
        halve = not halve
    return high
