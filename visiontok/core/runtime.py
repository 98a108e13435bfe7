"""What runs inside a patched block: read the state, decide, apply, hand the state on with the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.core.chain import Chain, recomputing
from visiontok.core.joints import Joint, Seam
from visiontok.core.positions import Positions
from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Offers, Signal, Signals, Site
from visiontok.core.state import Frame, TokenState, apply
from visiontok.core.tokens import TokenMap
from visiontok.errors import IncompatibleError, StateLostError
from visiontok.ops import fusing
from visiontok.ops.constants import length_of, without_autocast

__all__ = [
    "Decision",
    "Stage",
    "Step",
    "attach_state",
    "carry_state",
    "free_of_attention",
    "state_of",
]

# Signals that cost nothing: they need no part of the block.
_FREE = {Signal.HIDDEN, Signal.GRID, Signal.RAND}
# Most lengths whose removals are remembered per block.
_LENGTHS = 256
_STATE = "_visiontok_state"
_GRID = "_visiontok_grid"


class Step(NamedTuple):
    """One reducer at one place, with its learned part if it has one."""

    reducer: Reducer
    budget: Budget
    module: nn.Module | None = None
    order: int = 0


def free_of_attention(reducer: Reducer) -> bool:
    """Whether the reducer's signals cost nothing, so that the block before it may run untouched."""
    return set(reducer.needs) <= _FREE


def state_of(x: Tensor) -> TokenState | None:
    """The state that travels with a tensor, or None."""
    state = getattr(x, _STATE, None)
    # A tensor that was saved and loaded carries an empty stand-in.
    return state if isinstance(state, TokenState) else None


def attach_state(x: Tensor, state: TokenState) -> Tensor:
    """Lets a state travel with a tensor."""
    setattr(x, _STATE, state)
    return x


def carry_state(source: Tensor, target: Tensor) -> Tensor:
    """Copies state and grid hint from one tensor to another of the same tokens."""
    for name in (_STATE, _GRID):
        value = getattr(source, name, None)
        if value is not None:
            setattr(target, name, value)
    return target


def hint_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tells the first block the patch grid of this input."""
    setattr(x, _GRID, grid)
    return x


class Decision(NamedTuple):
    """The hidden tensor and its state after a point."""

    x: Tensor
    state: TokenState


@dataclass
class Stage:
    """The patch of one block: which reducers act in it. Replaced, never changed, by `Reduction.set`.

    Attributes:
        layer: The block's index.
        depth: Blocks in the model.
        prefix: Leading tokens to protect.
        grid: (h, w) of the nominal input.
        steps: By place, in order: `HERE` is the PRE point before this block (for those that look ahead, and before
            block 0), `MID`, and `NEXT`, the PRE point after it.
        proportional: Whether attention adds log(size).
        carry_rules: See TokenState.
        chain: Shared notes.
        grid_only: Whether only maps with a grid may be used.
        positions: Rule by which positions follow tokens, or None if nothing reads them.
        aid: What `Backbone.aid` gives for the block.
    """

    layer: int
    depth: int
    prefix: int
    grid: tuple[int, int] | None
    steps: Mapping[str, tuple[Step, ...]]
    proportional: bool
    carry_rules: Mapping[str, str]
    chain: Chain
    grid_only: bool = False
    positions: str | None = None
    aid: Any = None
    _amounts: dict[Any, int] = field(default_factory=dict, repr=False, compare=False)

    def enter(self, x: Tensor) -> TokenState:
        """The state of x at this block; block 0 opens a new one.

        Raises:
            StateLostError: No state came with x, or it belongs to another layer or shape.
        """
        if self.layer == 0:
            return self._open(x)
        state = state_of(x)
        if state is None and not torch.compiler.is_compiling():
            state = self.chain.recovered(x, self.layer)
        if state is None or state.layer != self.layer or (state.batch, state.n) != tuple(x.shape[:2]):
            raise StateLostError(_lost(self.layer, x, state))
        return state

    def _open(self, x: Tensor) -> TokenState:
        batch, length = x.shape[0], length_of(x)
        grid = getattr(x, _GRID, None) or self.grid
        if grid is not None and grid[0] * grid[1] != length - self.prefix:
            grid = None
        positions = None
        if self.positions is not None:
            positions = Positions.initial(self.positions, batch, length, self.prefix, grid, x.device)
        state = TokenState(
            batch=batch, n=length, n0=length, device=x.device, prefix=self.prefix, depth=self.depth, grid=grid,
            grid0=grid, proportional=self.proportional, carry_rules=self.carry_rules, positions=positions,
        )  # fmt: skip
        if not torch.compiler.is_compiling() and not recomputing():
            self.chain.opened(state)
        return state

    @property
    def opens(self) -> bool:
        """Whether something may happen before the block."""
        return "HERE" in self.steps

    def idle(self, state: TokenState) -> bool:
        """True if the block may run untouched: no reduction needs its attention, and attention needs no bias."""
        if state.size is not None and (state.proportional or state.padded):
            return False
        if any(self._does(step, state) for step in self.steps.get("MID", ())):
            return False
        following = [step for step in self.steps.get("NEXT", ()) if not free_of_attention(step.reducer)]
        later = state.changed(layer=self.layer + 1) if following else state
        return not any(self._does(step, later) for step in following)

    def acts(self, state: TokenState) -> bool:
        """Whether any reducer does anything in this block, before, in or after it."""
        later = state.changed(layer=self.layer + 1)
        places = {"HERE": state, "MID": state, "NEXT": later}
        return any(self._does(step, at) for place, at in places.items() for step in self.steps.get(place, ()))

    def before(self, x: Tensor, state: TokenState, offered: Offers) -> Decision:
        """Reduces before the block; `offered` are its own signals, for reducers that look ahead."""
        return self._reduce("HERE", x, state, offered)

    def mid(self, x: Tensor, state: TokenState, offered: Offers) -> Decision:
        """Reduces between attention and MLP."""
        return self._reduce("MID", x, state, offered)

    def between(
        self, x: Tensor, y: Tensor, joint: Joint, state: TokenState, offered: Offers
    ) -> tuple[Tensor, Tensor, TokenState]:
        """What lies between attention and MLP: residual sum, reduction, norm; one kernel where there is one.

        Args:
            x: (B, N, C) the block's input.
            y: (B, N, C) output of its attention.
            joint: How the block joins them.
            state: The tokens' history.
            offered: Signals of the attention.

        Returns:
            The hidden tokens, the normed ones for the MLP, and the state.
        """
        steps = self.steps.get("MID", ())
        kernel = fusing.kernel(x) if len(steps) == 1 else None
        if kernel is None:
            x, state = self.mid(x + joint.settle(y), state, offered)
            return x, joint.norm(x), state
        amount = self._amount(steps[0], state)
        if amount == 0 and not steps[0].reducer.always:
            x = x + joint.settle(y)
            return x, joint.norm(x), state
        seam = Seam(x, y, joint, kernel)
        x, state = self._step(steps[0], amount, seam, state, offered)
        return x, joint.norm(x) if seam.normed is None else seam.normed, state

    def leave(self, x: Tensor, state: TokenState, offered: Offers) -> Tensor:
        """Ends spans and reduces before the next block, and attaches the state to the tensor handed on."""
        if not state.frames and "NEXT" not in self.steps:
            return self._hand_on(x, state.changed(layer=self.layer + 1, marks=(*state.marks, state.trail)))
        state = state.changed(layer=self.layer + 1)
        while state.frames and state.frames[-1].until == self.layer + 1:
            x, state = state.close(x)
            offered = {}
        x, state = self._reduce("NEXT", x, state, offered)
        return self._hand_on(x, state.changed(marks=(*state.marks, state.trail)))

    def _hand_on(self, x: Tensor, state: TokenState) -> Tensor:
        setattr(x, _STATE, state)
        if not torch.compiler.is_compiling() and not recomputing():
            self.chain.notes.tokens.append(int(state.n))
            if self.chain.notes.states is not None:
                self.chain.notes.states.append(state)
            self.chain.handed(x, None if state.layer == self.depth else state)
        return x

    def _amount(self, step: Step, state: TokenState) -> int:
        if torch.compiler.is_compiling():
            return self._counted(step, state)
        # The same lengths come again with every batch.
        key = (step.order, state.layer, state.n, state.n0, state.prefix, state.prefix0, state.grid)
        found = self._amounts.get(key)
        if found is None:
            if len(self._amounts) >= _LENGTHS:
                self._amounts.clear()
            found = self._amounts[key] = self._counted(step, state)
        return found

    def _counted(self, step: Step, state: TokenState) -> int:
        where = Where(state.layer, self.depth, start=state.n0 - state.lead, grid=state.grid)
        return step.reducer.removed(state.items, step.budget, where, state.prefix)

    def _does(self, step: Step, state: TokenState) -> bool:
        return step.reducer.always or self._amount(step, state) != 0

    def _reduce(self, key: str, x: Tensor, state: TokenState, offered: Offers) -> Decision:
        for step in self.steps.get(key, ()):
            amount = self._amount(step, state)
            if amount != 0 or step.reducer.always:
                x, after = self._step(step, amount, x, state, offered)
                # Signals of a block name the tokens that it saw.
                offered = offered if len(after.trail) == len(state.trail) else {}
                state = after
        return Decision(x, state)

    def _step(self, step: Step, amount: int, x: Tensor | Seam, state: TokenState, offered: Offers) -> Decision:
        reducer, first = step.reducer, x.x if isinstance(x, Seam) else x
        hidden = (lambda: x.hidden) if isinstance(x, Seam) else lambda: x
        signals = Signals({"HIDDEN": hidden, "GRID": lambda: _grid(state), "MODULE": lambda: step.module, **offered})
        with without_autocast(first.device.type):
            tm = reducer.decide(signals, state, amount)
            if tm is None:
                return Decision(hidden(), state)
            if self.grid_only and tm.form != "identity" and tm.grid is None:
                raise IncompatibleError(f"{reducer.name} gave a map without a grid, which this model's blocks need.")
            if tm.counts is not None and getattr(reducer, "compact", False) and _may_sync(first):
                tm = tm.compacted()
            reduced, after = apply(_owned(tm), x, state)
        if reducer.site is Site.AROUND and tm.form != "identity":
            kept = hidden() if reducer.fill == "self" else None
            fill: Any = reducer.fill
            frame = Frame(reducer.until(state.layer, self.depth), fill, state, kept)
            after = after.changed(frames=(*after.frames, frame))
        if not torch.compiler.is_compiling():
            if not recomputing() and len(after.trail) != len(state.trail):
                self.chain.decided(state.layer, reducer.site, tm, after)
            if self.chain.check_finite:
                _check_finite(reduced, reducer, state.layer)
        return Decision(reduced, after)


def _owned(tm: TokenMap) -> TokenMap:
    """The map with no view in what it leaves in the state.

    The state hangs on a hidden tensor; a view of that tensor in the state would make a circle through C++, which
    Python's garbage collector cannot see.
    """
    if torch.compiler.is_compiling() or (tm.memo is None and tm.stash is None and tm.carry is None):
        return tm

    def own(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(own, value))
        return value.clone() if isinstance(value, Tensor) and value._is_view() else value

    def owned(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if values is None else {name: own(value) for name, value in values.items()}

    return tm.with_state(carry=owned(tm.carry), stash=own(tm.stash), memo=owned(tm.memo))


def _may_sync(x: Tensor) -> bool:
    # A length read from the data is a constant in a traced graph and unknown on the meta device.
    return not (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or x.is_meta)


def _grid(state: TokenState) -> tuple[int, int]:
    if state.grid is None:
        raise IncompatibleError(
            f"the {state.items} tokens at layer {state.layer} form no grid (an earlier reduction or a patch dropout "
            "removed some); put a grid-based reducer first or use a grid-preserving one before it."
        )
    return state.grid


def _check_finite(x: Tensor, reducer: Reducer, layer: int) -> None:
    if not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise FloatingPointError(f"{reducer.name} at layer {layer}: {count} values are NaN or Inf after the reduction.")


def _lost(layer: int, x: Tensor, state: TokenState | None) -> str:
    found = "no token state came with its input"
    if state is not None:
        found = f"the state that came with its input is for layer {state.layer} and {state.batch} x {state.n} tokens"
    return (
        f"block {layer}: {found} (input {tuple(x.shape)}). Something between the blocks made a new tensor. "
        "With gradient checkpointing use use_reentrant=False; call blocks in order, each on the output of the one "
        "before; a hook that replaces a block's output must return the same tensor."
    )
