"""TokenState: what travels with the hidden tensor from block to block, and how a map changes it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.joints import Seam, merged
from visiontok.core.positions import Positions
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import fusing, merging
from visiontok.ops.constants import wide_dtype
from visiontok.ops.restoring import Fill, restore

__all__ = ["Frame", "Moved", "TokenState", "apply"]


class Moved(NamedTuple):
    """One map of the past, as far as undoing it goes.

    Attributes:
        assign: (B, N) int64 slot of each token, -1 dropped.
        back: (B, N, K) weights that restore, or None for the gather.
    """

    assign: Tensor
    back: Tensor | None = None


class Frame(NamedTuple):
    """An open span: a reduction that will be undone.

    Attributes:
        until: Layer at which it is undone; None leaves that to the consumer of the model's features.
        fill: What tokens without a slot get then.
        state: The state before the reduction.
        x: (B, N, C) tokens before it, kept only for `fill="self"`.
    """

    until: int | None
    fill: Fill
    state: TokenState
    x: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenState:
    """The tokens' history at one point of a forward pass. Never mutated: `apply` makes the next one.

    Attributes:
        batch: B.
        n: N, tokens now, prefix included.
        n0: N0, tokens when the state was opened.
        device: Where the hidden tensor lives.
        prefix: Leading tokens that no reducer may merge or drop.
        prefix0: How many of the original tokens these were when the state was opened.
        layer: Blocks already run.
        depth: Blocks of the model.
        size: (B, N, 1) original tokens per token, at least fp32; None for all ones, 0 for padding.
        proportional: Whether attention adds log(size) to the keys.
        padded: Whether some slots may be padding.
        mute: Whether queries of padding attend to all keys alike; see `TokenMap.mute`.
        grid: (h, w) of the non-prefix tokens while they form one, else None.
        grid0: (h, w) of the original ones, if they formed one.
        positions: Where the tokens stand, for backbones whose attention reads positions; else None.
        carry: Tensors (B, N, ...) that follow their tokens.
        carry_rules: How each entry of `carry` follows: `sum`, `any` or `anchor`.
        stash: (B, M, C) tokens kept outside the sequence.
        memo: Private tensors of the reducer across sites.
        trail: The maps made so far, from which `origin` is composed on demand.
        marks: `trail` as it was after each block.
        frames: Open spans, outermost first.
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
    mute: bool = False
    grid: tuple[int, int] | None = None
    grid0: tuple[int, int] | None = None
    positions: Positions | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    carry_rules: Mapping[str, str] = field(default_factory=dict)
    stash: Tensor | None = None
    memo: Mapping[str, Any] = field(default_factory=dict)
    trail: tuple[Moved, ...] = ()
    marks: tuple[tuple[Moved, ...], ...] = ()
    prefix0: int | None = None
    frames: tuple[Frame, ...] = ()

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
        shape = {"batch": batch, "n": length, "n0": length, "device": x.device}
        return cls(**shape, prefix=prefix, grid=grid, grid0=grid, **fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Saved features must load with weights_only=True, which knows no class of ours: a state ends with its tensor.
        return (OrderedDict, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenState:
        return self

    @property
    def lead(self) -> int:
        """Leading tokens among the original ones."""
        return self.prefix if self.prefix0 is None else self.prefix0

    @property
    def items(self) -> int:
        """Non-prefix tokens now."""
        return self.n - self.prefix

    @property
    def origin(self) -> Tensor:
        """(B, N0) int32: the slot that holds each original token now, -1 if it was dropped."""
        return self._origin(self.trail)

    def origin_at(self, block: int) -> Tensor:
        """The origin as it was after a block."""
        return self._origin(self.marks[block])

    def _origin(self, trail: tuple[Moved, ...]) -> Tensor:
        place: Tensor | None = None
        for assign, _ in trail:
            moved = assign if place is None else assign.gather(1, place.clamp_min(0))
            place = moved if place is None else moved.masked_fill(place < 0, -1)
        if place is None:
            place = torch.arange(self.n0, device=self.device).expand(self.batch, self.n0)
        return place.int()

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Additive attention bias over keys: log(size) if proportional, -inf for padding.

        Returns:
            (B, 1, 1, N) in `dtype` ((B, 1, N, N) if `mute`), or None if there is nothing to say.
        """
        if self.size is None:
            return None
        row = self.size.reshape(self.batch, 1, 1, self.n)
        if self.mute and self.padded:
            # So far below any logit that adding one changes nothing.
            live = row > 0
            return torch.zeros_like(row, dtype=dtype).masked_fill(~(live & live.mT), torch.finfo(dtype).min / 2)
        if self.proportional:
            bias = row.log()
            return bias if bias.dtype == dtype else bias.to(dtype)
        if not self.padded:
            return None
        return torch.zeros_like(row, dtype=dtype).masked_fill(row == 0, -math.inf)

    def restore(self, y: Tensor, fill: Fill = "zero", x: Tensor | None = None) -> Tensor:
        """Undoes every reduction so far: (B, N, C) to (B, N0, C). See `TokenMap.restore` for `fill`."""
        return self._undo(y, self.trail, fill, x)

    def restore_at(self, block: int, y: Tensor, fill: Fill) -> Tensor:
        """`restore` for the tokens y (B, n, C) that this block returned."""
        return self._undo(y, self.marks[block], fill)

    def close(self, y: Tensor) -> tuple[Tensor, TokenState]:
        """Undoes the innermost open span: its tokens y (B, N, C) become those before it, with the state of then."""
        *rest, frame = self.frames
        trail = self.trail[len(frame.state.trail) :]
        full = frame.state._undo(y, trail, frame.fill, frame.x)
        fields = {"layer": self.layer, "marks": self.marks, "memo": self.memo, "frames": tuple(rest)}
        return full, frame.state.changed(**fields, carry=self._carried_back(frame.state, trail))

    def whole(self, y: Tensor, fill: Fill | None) -> tuple[Tensor, TokenState]:
        """What the consumer of the features gets: every open span undone and, with a fill, every reduction."""
        state = self
        while state.frames:
            y, state = state.close(y)
        if fill is None:
            return y, state
        full = state.restore(y, fill)
        return full, TokenState.initial(full, self.lead).changed(memo=state.memo)

    def _carried_back(self, before: TokenState, trail: tuple[Moved, ...]) -> dict[str, Tensor]:
        carry = dict(before.carry)
        place = before._origin(trail).long()
        for name, value in self.carry.items():
            old = before.carry.get(name)
            rows = merging.select(value, place.clamp_min(0))
            gone = (place < 0).view(*place.shape, *[1] * (value.dim() - 2))
            carry[name] = rows.masked_fill(gone, 0) if old is None else torch.where(gone, old, rows)
        return carry

    def _undo(self, y: Tensor, trail: tuple[Moved, ...], fill: Fill, x: Tensor | None = None) -> Tensor:
        if not trail:
            return y
        if all(moved.back is None for moved in trail):
            live = self.size.squeeze(-1) > 0 if self.padded and self.size is not None else None
            live = live if live is None or live.shape[1] == y.shape[1] else None
            grid = self.grid0 if trail[0].assign.shape[1] == self.n0 else self.grid
            grid = grid if grid is not None and math.prod(grid) == trail[0].assign.shape[1] - self.lead else None
            return restore(y, self._origin(trail), fill, x=x, live=live, prefix=self.lead, grid=grid)
        # Learned or interpolated ways back do not compose to one gather; then only the outermost step can know x.
        for moved in reversed(trail):
            if moved.back is not None:
                wide = wide_dtype(y.dtype)
                y = (moved.back.to(wide) @ y.to(wide)).to(y.dtype)
            else:
                last = moved is trail[0]
                way: Fill = "nearest" if fill == "self" and not last else fill
                y = restore(y, moved.assign, way, x=x if last else None, prefix=self.lead)
        return y

    def to(self, device: torch.device) -> TokenState:
        """The same state with every tensor on `device`."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return replace(
            self,
            device=device,
            size=move(self.size),
            positions=None if self.positions is None else self.positions.to(device),
            stash=move(self.stash),
            carry={name: move(value) for name, value in self.carry.items()},
            memo={name: move(value) for name, value in self.memo.items()},
            trail=tuple(Moved(*map(move, moved)) for moved in self.trail),
            marks=tuple(tuple(Moved(*map(move, moved)) for moved in mark) for mark in self.marks),
            frames=tuple(f._replace(state=f.state.to(device), x=move(f.x)) for f in self.frames),
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
        taken = 0 if tm.extra is None else tm.extra.shape[1]
        if tm.assign.shape[1] != self.n + taken:
            raise ParameterError(f"the map takes {tm.assign.shape[1]} tokens, the state has {self.n + taken}.")
        carry = {
            name: _follow(_longer(value, taken), tm, self.carry_rules.get(name, "anchor"))
            for name, value in self.carry.items()
            if tm.carry is None or name not in tm.carry
        }
        if tm.carry is not None:
            carry.update(tm.carry)
        moved, positions = tm.form != "identity" or taken > 0, self.positions
        own = tm.assign[:, : self.n] if taken else tm.assign
        if moved and positions is not None:
            positions = positions.advance(tm, self.size)
        return self.changed(
            n=tm.K,
            size=size,
            padded=self.padded or tm.counts is not None,
            mute=self.mute or tm.mute,
            grid=tm.grid if moved else self.grid,
            positions=positions,
            carry=carry,
            prefix=self.prefix if tm.protect is None else tm.protect,
            prefix0=self.lead,
            stash=self.stash if tm.stash is None else tm.stash,
            memo=self.memo if tm.memo is None else {**self.memo, **tm.memo},
            trail=(*self.trail, Moved(own, tm.back)) if moved else self.trail,
        )


_FIELDS = tuple(TokenState.__dataclass_fields__)


def _longer(value: Tensor, more: int) -> Tensor:
    # Tokens that join carry nothing.
    if more == 0:
        return value
    return torch.cat((value, value.new_zeros(value.shape[0], more, *value.shape[2:])), dim=1)


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
        x: (B, N, C) hidden tokens, a tuple of such streams that follow the same tokens, or a `Seam`.
        state: The state that belongs to x.

    Returns:
        The reduced x (same structure, K tokens) and the new state (sizes, origin, carried values).

    Raises:
        ParameterError: The token counts of map, x and state differ.
    """
    if isinstance(x, Seam):
        fused = x.merged(tm, state.size) if tm.extra is None else None
        return apply(tm, x.hidden, state) if fused is None else (fused.x, state.advance(tm, fused.size))
    streams: tuple[Tensor, ...] = x if isinstance(x, tuple) else (x,)
    size_before = state.size
    if tm.extra is not None:
        streams, size_before = _joined(streams, tm.extra, state)
    for stream in streams:
        if stream.shape[:2] != tm.assign.shape:
            raise ParameterError(f"x is {tuple(stream.shape)}, the map is over {tuple(tm.assign.shape)} tokens.")
    first, alone = streams[0], len(streams) == 1
    fused = merged(tm, first, size_before, fusing.kernel(first)) if alone else None
    if fused is not None:
        return (fused.x,) if isinstance(x, tuple) else fused.x, state.advance(tm, fused.size)
    if tm.merges_by_size and alone:
        reduced_one, size = merging.merge_mean(first, size_before, tm.assign, tm.K)
        return (reduced_one,) if isinstance(x, tuple) else reduced_one, state.advance(tm, size)
    if not alone and merging.uses_groups(first):
        tm.share_groups()
    size = tm.sizes(size_before, first.dtype)
    reduced = [tm.reduce(stream, size_before) for stream in streams]
    return (tuple(reduced) if isinstance(x, tuple) else reduced[0]), state.advance(tm, size)


def _joined(streams: tuple[Tensor, ...], extra: Tensor, state: TokenState) -> tuple[tuple[Tensor, ...], Tensor | None]:
    longer = tuple(torch.cat((x, extra.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1) for x in streams)
    if state.size is None:
        return longer, None
    return longer, torch.cat((state.size, state.size.new_ones(state.batch, extra.shape[1], 1)), dim=1)
