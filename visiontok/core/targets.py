"""Targets for a whole model, `gflops=` and `tokens=`, turned into a budget for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget, split
from visiontok.errors import ParameterError

__all__ = ["Measure", "solve"]

Measure = Callable[[Reducer, list[int]], float]


def solve(reducer: Reducer, depth: int, items: int, measure: Measure | None = None) -> dict[int, Budget]:
    """The budget of every layer at which a reducer acts.

    Args:
        reducer: With any kind of budget.
        depth: Blocks of the model.
        items: Non-prefix tokens that the model starts with.
        measure: GMACs of the model when the reducer removes given numbers of tokens at its points; for `gflops`.

    Raises:
        ParameterError: The target is out of reach.
    """
    if reducer.tokens is None and reducer.gflops is None:
        return reducer.budgets(depth)
    layers = reducer.layers(depth)
    if not layers:
        raise ParameterError(f"{reducer.name}: a model of {depth} blocks has no point to remove tokens at.")
    if reducer.tokens is not None:
        removals = _reach_tokens(reducer, layers, depth, items)
    else:
        removals = _reach_gflops(reducer, layers, items, measure)
    return {layer: Budget(r=r) for layer, r in zip(layers, removals)}


def _final(reducer: Reducer, layers: Sequence[int], depth: int, items: int, removals: Sequence[int]) -> int:
    start = items
    for layer, r in zip(layers, removals):
        items -= reducer.removed(items, Budget(r=r), Where(layer, depth, start=start))
    return items


def _spacings(reducer: Reducer) -> list[str]:
    return [reducer.spacing] if reducer.spacing else list(dict.fromkeys([reducer.spread, "ratio"]))


def _reach_tokens(reducer: Reducer, layers: Sequence[int], depth: int, items: int) -> list[int]:
    target = reducer.tokens or 0
    if target > items:
        raise ParameterError(f"{reducer.name}: tokens={target} exceeds the {items} tokens that the model starts with.")
    reached: dict[str, int] = {}
    for spacing in _spacings(reducer):
        removals = split(items - target, len(layers), items, spacing)
        reached[spacing] = _final(reducer, layers, depth, items, removals)
        if reached[spacing] == target:
            return removals
    ends = " and ".join(f"{len(layers)} {spacing} steps end at {end}" for spacing, end in reached.items())
    raise ParameterError(f"{reducer.name}: tokens={target} cannot be reached: {ends}; give r as a list instead.")


def _reach_gflops(reducer: Reducer, layers: Sequence[int], items: int, measure: Measure | None) -> list[int]:
    if measure is None:
        raise ParameterError(f"{reducer.name}: gflops needs a model whose compute can be counted here.")
    target, limits = float(reducer.gflops or 0), []
    for spacing in _spacings(reducer):

        def gmacs(total: int, spacing: str = spacing) -> float:
            return measure(reducer, split(total, len(layers), items, spacing))

        above, below = gmacs(0), gmacs(items - 1)
        if below <= target <= above:
            total = _least(gmacs, target, items - 1, above, below)
            return _refined(reducer, measure, target, total, len(layers), items, spacing)
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


def _refined(
    reducer: Reducer, measure: Measure, target: float, total: int, points: int, items: int,
    spacing: str,
) -> list[int]:  # fmt: skip
    """Moves the last removal as late as the target allows: one token at one point is the finest step there is."""
    if total == 0:
        return split(0, points, items, spacing)
    fewer = split(total - 1, points, items, spacing)

    def with_one_at(point: int) -> list[int]:
        return [r + (i == point) for i, r in enumerate(fewer)]

    low, high = 0, points - 1
    if measure(reducer, with_one_at(low)) > target:
        return split(total, points, items, spacing)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(reducer, with_one_at(middle)) <= target:
            low = middle
        else:
            high = middle - 1
    return with_one_at(low)
