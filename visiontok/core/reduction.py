"""Reduction: the handle a user holds on a patched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visiontok.core import flops, learned, patching, saving
from visiontok.core.backbone import Backbone
from visiontok.core.chain import Chain, LayerTrace
from visiontok.core.gauge import Gauge
from visiontok.core.plan import Plan, bind
from visiontok.core.reducer import Reducer
from visiontok.core.runtime import Stage, Step
from visiontok.core.schedule import Budget
from visiontok.core.signals import Site
from visiontok.errors import NotPatchedError, ParameterError
from visiontok.ops.restoring import Fill

__all__ = ["Reduction", "Report"]

_RESTORE: dict[str | None, Fill | None] = {None: None, "gather": "nearest", "zero": "zero"}


@dataclass(frozen=True)
class Report:
    """Tokens and compute of a patched model for one input size. Prints as a table; MACs are of one image.

    Attributes:
        tokens_in: Tokens before block 0, prefix included.
        tokens: Tokens after each block.
        gmacs_before: GMACs of the unpatched model (what papers call GFLOPs).
        gmacs_after: GMACs of the patched model without its matcher.
        gmacs_matcher: GMACs of scoring and matching.
        layers: `(before, after)` GMACs of each block.
    """

    tokens_in: int
    tokens: list[int]
    gmacs_before: float
    gmacs_after: float
    gmacs_matcher: float
    layers: list[tuple[float, float]]

    @property
    def ideal_speedup(self) -> float:
        """Speed-up if time were proportional to GMACs and the matcher were free."""
        return self.gmacs_before / self.gmacs_after

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("tokens_in", "tokens", "gmacs_before", "gmacs_after", "gmacs_matcher", "ideal_speedup", "layers")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        rows = [f"{'block':>5}  {'tokens':>6}  {'GMACs before':>12}  {'after':>8}"]
        for i, (n, (before, after)) in enumerate(zip(self.tokens, self.layers)):
            rows.append(f"{i:>5}  {n:>6}  {before:>12.3f}  {after:>8.3f}")
        rows.append(f"model: {self.gmacs_before:.3f} -> {self.gmacs_after:.3f} GMACs, x{self.ideal_speedup:.2f} ideal")
        rows.append(f"matcher: {self.gmacs_matcher:.4f} GMACs on top")
        return "\n".join(rows)


class Reduction:
    """What `visiontok.patch` returns. Holds the plan; changes or removes the patch.

    Attributes:
        model: The patched model.
        backbone: Its family.
        reducers: The reducers in use.
        plan: What was patched, with budgets and tokens of the nominal input.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, reducers: Sequence[Reducer], chain: Chain) -> None:
        self.model = model
        self.backbone = backbone
        self.reducers = tuple(reducers)
        self.plan: Plan = bind(self.reducers, backbone, model, Gauge(model, backbone))
        self._chain = chain
        self._modules: list[nn.Module] = []
        self._head: Step | None = None

    # ---- life cycle

    def install(self) -> None:
        """Puts the patch in place; nothing is changed if it fails."""
        swaps = self.backbone.swaps(self.model)
        patching.install(swaps)
        self._modules = [swap.module for swap in swaps]
        try:
            self._stage()
        except BaseException:
            self.unpatch()
            raise
        vars(self.model)[patching.ATTRIBUTE] = self

    def unpatch(self) -> nn.Module:
        """Restores the model bit for bit and returns it.

        Raises:
            NotPatchedError: It is not patched any more, or was wrapped since (FSDP2): unwrap it first.
        """
        if not self._modules:
            raise NotPatchedError("this reduction is not in place any more.")
        patching.remove(self._modules)
        learned.remove([block.module for block in self.backbone.blocks(self.model)] + [self.model])
        vars(self.model).pop(patching.ATTRIBUTE, None)
        self._modules = []
        return self.model

    @property
    def in_place(self) -> bool:
        """Whether the patch is on."""
        return bool(self._modules)

    def load_learned(self, state: Mapping[str, Tensor], strict: bool = True) -> list[str]:
        """Loads learned parts from a state dict of this patched model, or of the authors' own checkpoint.

        Args:
            state: Other keys than those of learned parts are ignored.
            strict: Whether every learned part must be there.

        Returns:
            The keys that were used.

        Raises:
            FormatError: A key is missing, unknown or of another shape; the message lists all of them.
        """
        return learned.load(self.model, self.plan, self.reducers, state, strict)

    def set(self, **params: Any) -> Reduction:
        """Changes parameters without re-patching (one recompile under torch.compile).

        Args:
            **params: Fields of the reducer; with several reducers, those that have the field. A new budget replaces
                the old one.

        Raises:
            UnknownNameError, ParameterError, IncompatibleError: As in `patch`; nothing is changed then.
        """
        if not self._modules:
            raise NotPatchedError("this reduction is not in place any more; patch again.")
        targets = self.reducers
        if len(targets) != 1:
            raise ParameterError(
                f"set(...) is ambiguous with {len(targets)} reducers ({', '.join(r.name for r in targets)}); unpatch "
                "and patch with the new list."
            )
        (target,) = targets
        changed = (target.replaced(**params),)
        plan = bind(changed, self.backbone, self.model, Gauge(self.model, self.backbone))
        self.reducers, self.plan = changed, plan
        # Notes of earlier forwards, in any thread, belong to the old plan.
        self._chain = self._chain.fresh()
        self._stage()
        return self

    # ---- looking

    @property
    def restore_fill(self) -> Fill | None:
        """What dropped tokens get in full-length features, or None where features stay reduced."""
        return _RESTORE[self._chain.restore]

    @property
    def restore_mode(self) -> str | None:
        """The `restore` that the model was patched with."""
        return self._chain.restore

    @property
    def tokens(self) -> list[int]:
        """Tokens after each block, prefix included: of this thread's last eager forward, else of the plan."""
        return list(self._chain.notes.tokens) or self.plan.tokens

    @property
    def trace(self) -> list[LayerTrace]:
        """What each point did in this thread's last eager forward; empty unless patched with `trace=True`."""
        return list(self._chain.notes.trace)

    def report(self, input_size: tuple[int, ...] | None = None) -> Report:
        """Tokens per layer and GMACs before and after, counted on the meta device.

        Args:
            input_size: Shape of one input without the batch; default: the model's nominal size.
        """
        size = tuple(input_size or self.backbone.input_size(self.model))
        x = self.backbone.nominal(self.model, size)
        paths = tuple(block.path for block in self.backbone.blocks(self.model))
        ghost = flops.meta_copy(self.model)
        own: Reduction = vars(ghost)[patching.ATTRIBUTE]
        real = flops.profile(ghost, x, paths)
        tokens, tokens_in = own.tokens, own._chain.notes.entered
        own._stand_in()
        after = flops.profile(ghost, x, paths)
        own.unpatch()
        before = flops.profile(ghost, x, paths)
        layers = [(before.blocks[path] / 1e9, after.blocks[path] / 1e9) for path in paths]
        matcher = (real.total - after.total) / 1e9
        return Report(tokens_in, tokens, before.total / 1e9, after.total / 1e9, matcher, layers)

    def readout(self, memo: Mapping[str, Any]) -> Any:
        """The output of a reducer at site HEAD from what the forward left in the memo, or None if there is none."""
        return None if self._head is None else self._head.reducer.readout(self._head.module, memo)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Writes `visiontok_config.json` (and learned parts, if any); load with `visiontok.from_pretrained`.

        Args:
            directory: Made if missing.

        Returns:
            The path of the configuration.
        """
        return saving.save_pretrained(self, directory)

    def __repr__(self) -> str:
        names = ", ".join(repr(r) for r in self.reducers)
        state = "in place" if self._modules else "removed"
        return f"Reduction({names} on {type(self.model).__name__}, {state})"

    # ---- parts

    def _stage(self) -> None:
        blocks = self.backbone.blocks(self.model)
        parts = [part for reducer in self.reducers for part in reducer.parts()]
        rules = {name: rule for part in parts for name, rule in part.carry_rules.items()}
        learned.register(self.model, self.backbone, self.plan, parts)
        heads = [
            Step(part, Budget(), learned.part_of(self.model, part, None)) for part in parts if part.site is Site.HEAD
        ]
        self._head = heads[0] if heads else None
        for index, block in enumerate(blocks):
            steps: dict[str, tuple[Step, ...]] = {}
            for point in self.plan.points:
                if point.block == index and not point.undo:
                    module = learned.part_of(block.module, point.reducer, point.layer)
                    step = Step(point.reducer, point.budget, module, point.order)
                    steps[point.place] = (*steps.get(point.place, ()), step)
            vars(block.module)[patching.ATTRIBUTE] = Stage(
                layer=index,
                depth=len(blocks),
                prefix=self.plan.prefix,
                grid=self.backbone.grid(self.model),
                steps=steps,
                proportional=any(part.proportional for part in parts),
                carry_rules=rules,
                chain=self._chain,
                grid_only=self.backbone.grid_only,
                positions=self.reducers[0].positions if self.backbone.positional else None,
                aid=self.backbone.aid(self.model, index),
            )

    def _stand_in(self) -> None:
        # Same budgets and counts, free decisions.
        # What notes something or takes tokens in stays: it is cheap, and a stand-in cannot know what it takes in.
        fewer = {(point.block, point.place, point.order) for point in self.plan.points if point.after < point.before}
        for index, block in enumerate(self.backbone.blocks(self.model)):
            stage: Stage = vars(block.module)[patching.ATTRIBUTE]
            stage.steps = {
                place: tuple(_free(step) if (index, place, step.order) in fewer else step for step in steps)
                for place, steps in stage.steps.items()
            }


def _free(step: Step) -> Step:
    return Step(flops.Leading(inner=step.reducer), step.budget, order=step.order)
