"""TokenState: what travels with the hidden tensor from block to block, and how a map changes it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import merging
from visiontok.ops.constants import wide_dtype
from visiontok.ops.restoring import Fill, restore

__all__ = ["TokenState", "apply"]


@dataclass(frozen=True, eq=False)
class TokenState:
    """The tokens' history at one point of a forward pass. Never mutated: `apply` makes the next one.

    Attributes:
        batch: B.
        n: N, tokens now, prefix included.
        n0: N0, tokens when the state was opened.
        device: Where the hidden tensor lives.
        prefix: Leading tokens that no reducer may merge or drop.
        layer: Blocks already run.
        depth: Blocks of the model.
        size: (B, N, 1) original tokens per token, at least fp32; None for all ones, 0 for padding.
        proportional: Whether attention adds log(size) to the keys.
        padded: Whether some slots may be padding.
        grid: (h, w) of the non-prefix tokens while they form one, else None.
        positions: (B, N, ...) positions of the tokens, for backbones whose positions follow tokens.
        carry: Tensors (B, N, ...) that follow their tokens.
        carry_rules: How each entry of `carry` follows: `sum`, `any` or `anchor`.
        stash: (B, M, C) tokens kept outside the sequence.
        memo: Private tensors of the reducer across sites.
        trail: The assignments made so far, from which `origin` is composed on demand.
        marks: Length of `trail` after each block.
    """

    batch: int
    n: int
    n0: int
    device: torch.device = torch.device("cpu")
    prefix: int = 1
    layer: int = 0
    depth: int = 0
    size: Tensor | None = None
    proportional: bool = False
    padded: bool = False
    grid: tuple[int, int] | None = None
    positions: Tensor | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    carry_rules: Mapping[str, str] = field(default_factory=dict)
    stash: Tensor | None = None
    memo: Mapping[str, Any] = field(default_factory=dict)
    trail: tuple[Tensor, ...] = ()
    marks: tuple[int, ...] = ()

    @classmethod
    def initial(cls, x: Tensor, prefix: int = 1, grid: tuple[int, int] | None = None, **fields: Any) -> TokenState:
        """The state before any reduction.

        Args:
            x: (B, N, C) hidden tokens.
            prefix: Leading tokens to protect.
            grid: (h, w) of the other tokens.

        Raises:
            ParameterError: x is not (B, N, C), or prefix or grid do not fit N.
        """
        if x.dim() != 3:
            raise ParameterError(f"x must be (B, N, C), got shape {tuple(x.shape)}.")
        batch, length = x.shape[:2]
        if not 0 <= prefix <= length:
            raise ParameterError(f"prefix must be in [0, {length}], got {prefix}.")
        if grid is not None and grid[0] * grid[1] != length - prefix:
            raise ParameterError(f"grid {grid} does not hold the {length - prefix} non-prefix tokens.")
        return cls(batch=batch, n=length, n0=length, device=x.device, prefix=prefix, grid=grid, **fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Saved features must load with weights_only=True, which knows no class of ours: a state ends with its tensor.
        return (OrderedDict, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenState:
        return self

    @property
    def items(self) -> int:
        """Non-prefix tokens now."""
        return self.n - self.prefix

    @property
    def origin(self) -> Tensor:
        """(B, N0) int32: the slot that holds each original token now, -1 if it was dropped."""
        return self.origin_after(len(self.trail))

    def origin_after(self, count: int) -> Tensor:
        """The origin as it was after the first `count` maps."""
        place: Tensor | None = None
        for assign in self.trail[:count]:
            moved = assign if place is None else assign.gather(1, place.clamp_min(0))
            place = moved if place is None else moved.masked_fill(place < 0, -1)
        if place is None:
            place = torch.arange(self.n0, device=self.device).expand(self.batch, self.n0)
        return place.int()

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Additive attention bias over keys: log(size) if proportional, -inf for padding.

        Returns:
            (B, 1, 1, N) in `dtype`, or None if there is nothing to say.
        """
        if self.size is None:
            return None
        row = self.size.reshape(self.batch, 1, 1, self.n)
        if self.proportional:
            bias = row.log()
            return bias if bias.dtype == dtype else bias.to(dtype)
        if not self.padded:
            return None
        return torch.zeros_like(row, dtype=dtype).masked_fill(row == 0, -math.inf)

    def restore(self, y: Tensor, fill: Fill = "zero", x: Tensor | None = None) -> Tensor:
        """Undoes every reduction so far: (B, N, C) to (B, N0, C). See `TokenMap.restore` for `fill`."""
        if not self.trail:
            return y
        live = self.size.squeeze(-1) > 0 if self.padded and self.size is not None else None
        return restore(y, self.origin, fill, x=x, live=live, prefix=self.prefix)

    def to(self, device: torch.device) -> TokenState:
        """The same state with every tensor on `device`."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(
            self,
            device=device,
            size=move(self.size),
            positions=move(self.positions),
            stash=move(self.stash),
            carry={name: move(value) for name, value in self.carry.items()},
            memo={name: move(value) for name, value in self.memo.items()},
            trail=tuple(move(assign) for assign in self.trail),
        )

    def changed(self, **fields: Any) -> TokenState:
        """A copy with some fields replaced."""
        if torch.compiler.is_compiling():
            # torch.compile traces a constructor call on every supported torch, dataclasses.replace not.
            values = {name: getattr(self, name) for name in _FIELDS}
            values.update(fields)
            return TokenState(**values)
        other = object.__new__(TokenState)
        vars(other).update(vars(self))
        vars(other).update(fields)
        return other

    def advance(self, tm: TokenMap, size: Tensor | None) -> TokenState:
        """The state after a map.

        Args:
            tm: The decision.
            size: The new sizes, `tm.sizes(self.size, dtype)`.
        """
        if tm.assign.shape[1] != self.n:
            raise ParameterError(f"the map takes {tm.assign.shape[1]} tokens, the state has {self.n}.")
        carry = {
            name: _follow(value, tm, self.carry_rules.get(name, "anchor"))
            for name, value in self.carry.items()
            if tm.carry is None or name not in tm.carry
        }
        if tm.carry is not None:
            carry.update(tm.carry)
        moved, positions = tm.form != "identity", self.positions
        if moved and positions is not None:
            positions = merging.select(positions, tm.kept)
        return self.changed(
            n=tm.K,
            size=size,
            padded=self.padded or tm.counts is not None,
            grid=tm.grid if moved else self.grid,
            positions=positions,
            carry=carry,
            stash=self.stash if tm.stash is None else tm.stash,
            memo=self.memo if tm.memo is None else {**self.memo, **tm.memo},
            trail=(*self.trail, tm.assign) if moved else self.trail,
        )


_FIELDS = tuple(TokenState.__dataclass_fields__)


def _follow(value: Tensor, tm: TokenMap, rule: str) -> Tensor:
    if rule not in ("sum", "any", "anchor"):
        raise ParameterError(f"a carry rule must be sum, any or anchor, got {rule!r}.")
    if tm.form == "identity":
        return value
    if rule == "anchor":
        return merging.select(value, tm.kept)
    # Doubles hold every integer that a count can reach.
    wide = wide_dtype(value.dtype) if value.is_floating_point() or rule == "any" else torch.float64
    flat = value.reshape(*value.shape[:2], math.prod(value.shape[2:])).to(wide)
    out = merging.segment_sum(flat, tm.assign, tm.K).reshape(value.shape[0], tm.K, *value.shape[2:])
    return out > 0 if rule == "any" else out.to(value.dtype)


def apply(tm: TokenMap, x: Any, state: TokenState) -> tuple[Any, TokenState]:
    """Carries out a decision.

    Args:
        tm: The map.
        x: (B, N, C) hidden tokens, or a tuple of such streams that follow the same tokens.
        state: The state that belongs to x.

    Returns:
        The reduced x (same structure, K tokens) and the new state (sizes, origin, carried values).

    Raises:
        ParameterError: The token counts of map, x and state differ.
    """
    streams: tuple[Tensor, ...] = x if isinstance(x, tuple) else (x,)
    for stream in streams:
        if stream.shape[:2] != tm.assign.shape:
            raise ParameterError(f"x is {tuple(stream.shape)}, the map is over {tuple(tm.assign.shape)} tokens.")
    first, alone = streams[0], len(streams) == 1
    if tm.merges_by_size and alone:
        reduced_one, size = merging.merge_mean(first, state.size, tm.assign, tm.K)
        return (reduced_one,) if isinstance(x, tuple) else reduced_one, state.advance(tm, size)
    if not alone and merging.uses_groups(first):
        tm.share_groups()
    size = tm.sizes(state.size, first.dtype)
    reduced = [tm.reduce(stream, state.size) for stream in streams]
    return (tuple(reduced) if isinstance(x, tuple) else reduced[0]), state.advance(tm, size)
