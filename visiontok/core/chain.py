"""What the blocks of one patched model share: switches, and notes on the running forward of each thread."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.signals import Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap

__all__ = ["Chain", "LayerTrace", "recomputing"]


class LayerTrace(NamedTuple):
    """What happened at one point of the last traced forward.

    Attributes:
        layer: Blocks already run (at MID the block's index).
        site: Where in the block.
        map: The decision.
        size: (B, K, 1) sizes after it, or None for all ones.
        origin: (B, N0) int32 slot of each original token, -1 dropped.
        grid: (h, w) of the original patch tokens, or None.
        prefix: Leading tokens.
        tokens: K.
    """

    layer: int
    site: Site
    map: TokenMap
    size: Tensor | None
    origin: Tensor
    grid: tuple[int, int] | None
    prefix: int
    tokens: int


class _Record(threading.local):
    """Per-thread notes on the running forward; eager only."""

    def __init__(self) -> None:
        self.entered = 0
        self.tokens: list[int] = []
        self.trace: list[LayerTrace] = []
        self.grid: tuple[int, int] | None = None
        self.handed: tuple[Any, Any] | None = None
        # States after every block, while somebody collects them.
        self.states: list[TokenState] | None = None


class Chain:
    """Shared by all blocks of one patched model: switches and per-thread notes. Copies start with empty notes.

    Args:
        trace: Whether maps and origins are kept for `Reduction.trace`.
        restore: None, or what dropped tokens get in full-length features: `gather` (nearest kept token) or `zero`.
        check_finite: Whether every reduced tensor is checked for NaN and Inf (debugging; syncs).
    """

    def __init__(self, trace: bool = False, restore: str | None = None, check_finite: bool = False) -> None:
        self.trace = trace
        self.restore = restore
        self.check_finite = check_finite
        self.notes = _Record()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Chain, (self.trace, self.restore, self.check_finite))

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return self.fresh()

    def fresh(self) -> Chain:
        """A chain with the same switches and no notes."""
        return Chain(self.trace, self.restore, self.check_finite)

    def opened(self, state: TokenState) -> None:
        """Starts the notes of a forward."""
        notes = self.notes
        notes.tokens, notes.trace, notes.grid, notes.entered = [], [], state.grid, state.n

    def decided(self, layer: int, site: Site, tm: TokenMap, state: TokenState) -> None:
        """Notes one decision."""
        if self.trace:
            self.notes.trace.append(
                LayerTrace(layer, site, tm, state.size, state.origin, self.notes.grid, state.prefix, tm.K)
            )

    def handed(self, x: Tensor, state: TokenState | None) -> None:
        """Remembers, weakly, what the last block of this thread returned."""
        self.notes.handed = None if state is None else (weakref.ref(x), weakref.ref(state))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[list[TokenState]]:
        """Collects this thread's states after every block."""
        self.notes.states = found = []
        try:
            yield found
        finally:
            self.notes.states = None

    def recovered(self, x: Tensor, layer: int) -> TokenState | None:
        """The state of a tensor that was moved, cast or copied between two blocks and so lost its attribute.

        Only the very last hand-over of this thread counts, while its tensor is alive and x holds the same values:
        with two forwards interleaved in one thread, shape and layer alone would hand one the other's sizes.
        """
        if self.notes.handed is None:
            return None
        source, state = self.notes.handed[0](), self.notes.handed[1]()
        if source is None or state is None or source.shape != x.shape or state.layer != layer:
            return None
        if not _same_values(source, x):
            return None
        return state if state.device == x.device else state.to(x.device)


def _same_values(source: Tensor, x: Tensor) -> bool:
    if source.is_meta or x.is_meta:
        return source.device == x.device
    return torch.allclose(source.detach().to(x.device, x.dtype), x.detach(), rtol=0, atol=0, equal_nan=True)


def recomputing() -> bool:
    """Whether this runs inside backward, as checkpointing does with blocks: such a run is not the last forward."""
    return torch._C._current_graph_task_id() != -1
