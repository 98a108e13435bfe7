"""Targets for a whole model, `gflops=`, `tokens=` and `round_tokens=`, turned into a budget for every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget, split
from visiontok.errors import ParameterError

__all__ = ["Measure", "solve"]

Removals = dict[int, int]
Measure = Callable[[Reducer, Removals], float]

# Layers, and how removals are spaced over them.
Way = tuple[Sequence[int], str]


def solve(
    reducer: Reducer, depth: int, items: int, measure: Measure | None = None, prefix: int = 0
) -> dict[int, Budget]:
    """The budget of every layer at which a reducer acts.

    Args:
        reducer: With any kind of budget.
        depth: Blocks of the model.
        items: Non-prefix tokens that the model starts with.
        measure: GMACs of the model when the reducer removes given numbers of tokens at its points; for `gflops`. If it
            has a method `exact`, calls may be predictions, which that one then confirms.
        prefix: Leading tokens, which count where lengths are rounded.

    Raises:
        ParameterError: The target is out of reach.
    """
    budgets = _solved(reducer, depth, items, measure)
    return budgets if reducer.round_tokens is None else _rounded(reducer, budgets, depth, items, prefix)


def _rounded(reducer: Reducer, budgets: dict[int, Budget], depth: int, items: int, prefix: int) -> dict[int, Budget]:
    # Each length becomes the multiple next to what was asked for there; where that is the length already, nothing
    # happens at all, so no error adds up and points fall away.
    multiple, wanted, now = reducer.round_tokens or 1, items, items
    made: dict[int, Budget] = {}
    for layer, budget in budgets.items():
        where = Where(layer, depth, start=items)
        wanted -= reducer.removed(wanted, budget, where, prefix)
        nearest = max((2 * (wanted + prefix) + multiple) // (2 * multiple), 1) * multiple
        made[layer] = Budget(r=max(now + prefix - nearest, 0))
        now -= reducer.removed(now, made[layer], where, prefix)
    return made


def _solved(reducer: Reducer, depth: int, items: int, measure: Measure | None) -> dict[int, Budget]:
    if reducer.tokens is None and reducer.gflops is None:
        return reducer.budgets(depth)
    layers = reducer.layers(depth)
    if not layers:
        raise ParameterError(f"{reducer.name}: a model of {depth} blocks has no point to remove tokens at.")
    ways = _ways(reducer, layers, depth)
    if reducer.tokens is not None:
        removals = _reach_tokens(reducer, ways, depth, items)
    else:
        removals = _reach_gflops(reducer, ways, items, measure)
        exact: Measure | None = getattr(measure, "exact", None)
        if exact is not None and not math.isclose(
            exact(reducer, removals), (measure or exact)(reducer, removals), rel_tol=1e-6
        ):
            # A model whose compute is no such function of its token counts.
            removals = _reach_gflops(reducer, ways, items, exact)
    return {layer: Budget(r=r) for layer, r in removals.items()}


def _final(reducer: Reducer, depth: int, items: int, removals: Removals) -> int:
    start = items
    for layer, r in removals.items():
        items -= reducer.removed(items, Budget(r=r), Where(layer, depth, start=start))
    return items


def _ways(reducer: Reducer, layers: Sequence[int], depth: int) -> list[Way]:
    """Layers and spacings to try: the method's own first, then wherever it may act."""
    if reducer.spacing:
        return [(layers, reducer.spacing)]
    ways = [(layers, reducer.spread), (layers, "ratio")]
    return list(dict.fromkeys([*((tuple(at), spacing) for at, spacing in ways), (tuple(reducer.span(depth)), "ratio")]))


def _split(layers: Sequence[int], spacing: str, total: int, items: int) -> Removals:
    return dict(zip(layers, split(total, len(layers), items, spacing)))


def _reach_tokens(reducer: Reducer, ways: Sequence[Way], depth: int, items: int) -> Removals:
    target = reducer.tokens or 0
    if target > items:
        raise ParameterError(f"{reducer.name}: tokens={target} exceeds the {items} tokens that the model starts with.")
    reached: list[str] = []
    for layers, spacing in ways:
        removals = _split(layers, spacing, items - target, items)
        end = _final(reducer, depth, items, removals)
        if end == target:
            return removals
        reached.append(f"{len(layers)} {spacing} steps end at {end}")
    ends = " and ".join(reached)
    raise ParameterError(f"{reducer.name}: tokens={target} cannot be reached: {ends}; give r as a list instead.")


def _reach_gflops(reducer: Reducer, ways: Sequence[Way], items: int, measure: Measure | None) -> Removals:
    if measure is None:
        raise ParameterError(f"{reducer.name}: gflops needs a model whose compute can be counted here.")
    target, limits = float(reducer.gflops or 0), []
    for way in ways:

        def gmacs(total: int, way: Way = way) -> float:
            return measure(reducer, _split(*way, total, items))

        above, below = gmacs(0), gmacs(items - 1)
        if below <= target <= above:
            total = _least(gmacs, target, items - 1, above, below)
            return _refined(reducer, measure, target, _split(*way, total, items))
        limits += [above, below]
    raise ParameterError(
        f"{reducer.name}: gflops={target:g} is outside what this model can reach, {min(limits):.4g} … "
        f"{max(limits):.4g} GMACs."
    )


def _least(gmacs: Callable[[int], float], target: float, high: int, above: float, below: float) -> int:
    """The fewest removals that meet the target."""
    low = 0
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


def _refined(reducer: Reducer, measure: Measure, target: float, removals: Removals) -> Removals:
    """Gives back tokens that the target has room for, at early layers first: a late one is the finest step there is."""
    for layer in removals:
        while removals[layer] > 0:
            fewer = {**removals, layer: removals[layer] - 1}
            if measure(reducer, fewer) > target:
                break
            removals = fewer
    return removals
