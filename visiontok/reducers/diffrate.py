"""DiffRate: tokens are ranked by class attention; the last are dropped, those before them merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.ordering import stable_order

__all__ = ["DiffRate"]


@dataclass(frozen=True)
class DiffRate(Reducer):
    """Differentiable Compression Rate (arXiv:2305.17997), with its learned rates as data.

    Tokens are ranked by the class token's attention. The `prune` least important ones are dropped; of the rest the
    `merge` least important ones join the most similar kept token (cosine of the tokens, plain mean). What a merged
    token adds to the size is its own size times that similarity.

    Args:
        r: Tokens removed per block; shared out by `prune`, or else by `share`.
        prune: Tokens dropped per block: int, list or `{layer: n}`. Without `merge` and another budget it is the budget;
            with another budget it says how many of its tokens are dropped.
        merge: Tokens merged per block, in the same form; together with `prune` this is the budget. The published
            schedules are in configs/diffrate.
        share: Share of a budget that is dropped where `prune` is not given, in [0, 1].
        floor: Least size that a merged token adds. The released evaluation has none, its training 1; 0 keeps sizes
            positive and changes nothing as long as similarities are.

    Raises:
        ParameterError: `merge` beside another budget, two forms, or a value outside its range.
    """

    name = "diffrate"
    card = Card(
        title="Differentiable Compression Rate",
        summary="Drops the tokens that the class token ignores most and merges the next ones into similar kept tokens.",
        paper="Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023",
        url="https://arxiv.org/abs/2305.17997",
        year=2023,
        license="none given",
        cons=(
            "Needs a class token.",
            "Rates are learned per model; searching new ones is not part of this package.",
            "Sizes no longer count tokens.",
        ),
        official="protects index 0 only and may give a group a size below zero for dissimilar tokens; here all prefix "
        "tokens stay and a merged token adds at least `floor`.",
    )
    budget_names = (*Reducer.budget_names, "merge")

    prune: Any = None
    merge: Any = None
    share: float = 0.5
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("prune", self.prune), ("merge", self.merge)):
            _check(name, value)
        for name, value, high in (("share", self.share, 1.0), ("floor", self.floor, float("inf"))):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
                raise ParameterError(f"diffrate: {name} must be in [0, {high:g}], got {value!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX, Signal.HIDDEN)

    @property
    def proportional(self) -> bool:
        return True

    def spec(self) -> tuple[Any, Any]:
        given = any(getattr(self, name) is not None for name in Reducer.budget_names)
        if given or (self.prune is None and self.merge is None):
            return self.r, self.keep
        return _sum(0 if self.prune is None else self.prune, 0 if self.merge is None else self.merge), None

    def dropped(self, removed: int, layer: int) -> int:
        """How many of the tokens that leave at a layer are dropped; the others merge."""
        if self.prune is not None:
            return min(_at(self.prune, layer), removed)
        if self.merge is not None:
            return max(removed - _at(self.merge, layer), 0)
        return int(removed * self.share)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        prefix, kept = state.prefix, state.items - r
        # A sum ranks like the mean over heads; the class token is the first of the prefix.
        score = signals.ATTN_PREFIX.detach()[:, :, :1, prefix:].sum(dim=(1, 2))
        ranked = stable_order(score, descending=True)
        order, src = ranked[:, :kept], ranked[:, kept : state.items - self.dropped(r, state.layer)]
        rows = matching.unit(signals.HIDDEN[:, prefix:])
        _, partner = matching.best_match(rows.detach(), src, order)
        dst = order.gather(1, partner)
        # Again, for the gradient: the match itself has none.
        similar = (_take(rows, src) * _take(rows, dst)).sum(dim=-1)
        size = rows.new_ones(rows.shape[0], state.n) if state.size is None else state.size.squeeze(-1).to(rows.dtype)
        src, dst, order = src + prefix, dst + prefix, order + prefix
        mass = size.scatter(1, src, (size.gather(1, src) * similar).clamp_min(self.floor))
        return TokenMap.merge(src, dst, order, prefix, length=state.n, weight=torch.ones_like(size), mass=mass)


def _check(name: str, value: Any) -> None:
    entries = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entries):
        raise ParameterError(f"diffrate: {name} must be an int >= 0, a list or a dict of these, got {value!r}.")


def _at(values: Any, layer: int) -> int:
    if isinstance(values, Mapping):
        return values.get(layer, 0)
    if isinstance(values, list):
        return values[layer] if layer < len(values) else 0
    return values


def _sum(prune: Any, merge: Any) -> Any:
    if isinstance(prune, Mapping) and isinstance(merge, Mapping):
        return {layer: _at(prune, layer) + _at(merge, layer) for layer in sorted({*prune, *merge})}
    if isinstance(prune, list) and isinstance(merge, list):
        return [_at(prune, layer) + _at(merge, layer) for layer in range(max(len(prune), len(merge)))]
    if isinstance(prune, int) and isinstance(merge, int):
        return prune + merge
    # A plain 0 stands for 'not given'.
    if 0 in (prune if isinstance(prune, int) else None, merge if isinstance(merge, int) else None):
        return merge if isinstance(prune, int) else prune
    raise ParameterError(f"diffrate: give prune and merge in the same form, got prune={prune!r}, merge={merge!r}.")


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
