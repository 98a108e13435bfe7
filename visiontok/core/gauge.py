"""Gauge: the compute of a model as a function of the tokens that a reducer removes at each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from visiontok.core import flops, patching
from visiontok.core.backbone import Backbone
from visiontok.core.chain import Chain
from visiontok.core.plan import bind
from visiontok.core.reducer import Reducer
from visiontok.core.schedule import split

if TYPE_CHECKING:
    from visiontok.core.reduction import Reduction

__all__ = ["Gauge"]

# How much of the tokens the probes remove, in all.
_PROBES = (0.0, 0.3, 0.6, 0.8, 1.0)


class Gauge:
    """GMACs of one input for given removals.

    A call predicts them from a few counted forwards: each block costs a polynomial in the tokens that it sees and
    leaves. `exact` counts a forward of its own.

    Args:
        model: The model; a copy on the meta device is run.
        backbone: Its family.
    """

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        self._model = model
        self._backbone = backbone
        self._ghost: Reduction | None = None
        self._fits: dict[tuple[str, tuple[int, ...]], list[np.ndarray]] = {}

    def __call__(self, reducer: Reducer, removals: dict[int, int]) -> float:
        key = (reducer.name, tuple(removals))
        if key not in self._fits:
            self._fits[key] = self._fitted(reducer, tuple(removals))
        before, after = self._tokens(reducer, removals)
        rows = [_features(n, m) for n, m in zip(before, after)]
        return float(sum(row @ fit for row, fit in zip([*rows, rows[-1]], self._fits[key])))

    def exact(self, reducer: Reducer, removals: dict[int, int]) -> float:
        """The GMACs, counted."""
        return self._profile(reducer, removals).total / 1e9

    def _fitted(self, reducer: Reducer, layers: tuple[int, ...]) -> list[np.ndarray]:
        """Coefficients of every block, and of what is outside the blocks."""
        items = self._backbone.length(self._model) - self._backbone.prefix(self._model)
        seen: list[tuple[list[int], list[int]]] = []
        costs: list[list[float]] = []
        for share in _PROBES:
            removals = dict(zip(layers, split(int(share * (items - 1)), len(layers), items, "ratio")))
            found = self._profile(reducer, removals)
            blocks = [macs / 1e9 for macs in found.blocks.values()]
            seen.append(self._tokens(reducer, removals))
            costs.append([*blocks, found.total / 1e9 - sum(blocks)])
        fits = []
        for index in range(len(costs[0])):
            block = min(index, len(costs[0]) - 2)
            rows = np.stack([_features(before[block], after[block]) for before, after in seen])
            fits.append(np.linalg.lstsq(rows, np.array([cost[index] for cost in costs]), rcond=1e-12)[0])
        return fits

    def _profile(self, reducer: Reducer, removals: dict[int, int]) -> flops.Profile:
        from visiontok.core.reduction import Reduction

        leading = flops.Leading(inner=reducer, r=removals)
        if self._ghost is None:
            ghost = flops.meta_copy(self._model)
            if patching.ATTRIBUTE in vars(ghost):
                vars(ghost)[patching.ATTRIBUTE].unpatch()
            self._ghost = Reduction(ghost, self._backbone, [leading], Chain())
            self._ghost.install()
        self._ghost.set(inner=reducer, r=removals)
        ghost = self._ghost.model
        paths = tuple(block.path for block in self._backbone.blocks(ghost))
        inputs = self._backbone.nominal(ghost, self._backbone.input_size(self._model))
        return flops.profile(ghost, inputs, paths)

    def _tokens(self, reducer: Reducer, removals: dict[int, int]) -> tuple[list[int], list[int]]:
        """Tokens before and after each block."""
        plan = bind([flops.Leading(inner=reducer, r=removals)], self._backbone, self._model)
        return [plan.length, *plan.tokens[:-1]], plan.tokens


def _features(before: int, after: int) -> Any:
    # Attention grows with the square of what it sees, all else in proportion; scaled to keep the fit well conditioned.
    n, m = before / 256, after / 256
    return np.array([1.0, n, n * n, m, m * m])
