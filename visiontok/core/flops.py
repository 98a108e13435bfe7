"""Compute in multiply-accumulates, counted by torch.utils.flop_counter on the meta device. Papers call MACs FLOPs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap

__all__ = ["Leading", "Profile", "count_macs", "meta_copy", "profile"]


@dataclass(frozen=True)
class Profile:
    """MACs of one forward.

    Attributes:
        total: All of them.
        blocks: Of each counted module, by path.
    """

    total: int
    blocks: dict[str, int]


@dataclass(frozen=True)
class Leading(Reducer):
    """Keeps the leading tokens, at no cost: the stand-in that tells a model's compute from its matcher's.

    Args:
        inner: The reducer whose places and counts it takes.
    """

    inner: Reducer | None = None

    @property
    def site(self) -> Site:  # type: ignore[override]
        return self.inner.site if self.inner else Site.MID

    @property
    def proportional(self) -> bool:
        return bool(self.inner and self.inner.proportional)

    @property
    def grid_preserving(self) -> bool:  # type: ignore[override]
        return bool(self.inner and self.inner.grid_preserving)

    @property
    def look(self) -> str:  # type: ignore[override]
        return self.inner.look if self.inner else "behind"

    def layers(self, depth: int) -> Sequence[int]:
        return self.inner.layers(depth) if self.inner else super().layers(depth)

    def budgets(self, depth: int) -> dict[int, Budget]:
        return {layer: Budget(r=r) for layer, r in (self.r or {}).items()}

    def until(self, layer: int, depth: int) -> int | None:
        return self.inner.until(layer, depth) if self.inner else None

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        source = super() if self.inner is None else self.inner
        return source.removed(n, budget, where, prefix)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = budget or 0
        index = torch.arange(state.n - removed, device=state.device).clamp_max(state.n - 1).expand(state.batch, -1)
        places = torch.arange(state.n, device=state.device).expand(state.batch, -1)
        left = index.shape[1] - state.prefix
        height = next((h for h in range(math.isqrt(left), 0, -1) if left % h == 0), 1)
        grid = (height, left // height) if self.inner is not None and self.inner.grid_preserving else None
        assign = torch.where(places < index.shape[1], places, -1)
        return TokenMap(assign, index.shape[1], anchor=index, grid=grid, form="select")


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device: same modules and shapes, no storage."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty: Tensor = tensor.detach().to("meta")
        # Without gradients: FlopCounterMode's module tracker trips over views of leaves that require one.
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).eval()


def meta_input(model: nn.Module, size: tuple[int, ...], batch: int = 1) -> Tensor:
    """An input on the meta device in the dtype of the model's parameters."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(batch, *size, device="meta", dtype=next(dtypes, None))


def profile(model: nn.Module, inputs: Any, paths: tuple[str, ...] = ()) -> Profile:
    """Counts the MACs of one forward; the model may be on the meta device.

    Args:
        model: The model.
        inputs: Its input, a tuple of positional inputs, or a dict of keyword arguments.
        paths: Modules whose share is wanted, by dotted path.
    """
    counter = FlopCounterMode(display=False)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    with torch.no_grad(), counter:
        model(*args, **(inputs if isinstance(inputs, dict) else {}))
    by_module = {name.partition(".")[2]: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return Profile(counter.get_total_flops() // 2, {path: by_module.get(path, 0) for path in paths})


def count_macs(model: nn.Module, input_size: tuple[int, ...], batch: int = 1) -> int:
    """MACs of one forward of a model, on the meta device; the model itself is not run.

    Args:
        model: A model whose only input is a tensor.
        input_size: Shape without the batch, e.g. (3, 224, 224).
        batch: Batch size.
    """
    ghost = meta_copy(model)
    return profile(ghost, meta_input(ghost, input_size, batch)).total
