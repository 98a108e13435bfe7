"""Reducer: decides where tokens go. One frozen dataclass per method; it knows no backbone."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from visiontok.core import schedule
from visiontok.core.positions import RULES
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError, UnknownNameError, did_you_mean

__all__ = ["Build", "Card", "Reducer", "Where"]

_BUDGETS = ("r", "keep", "gflops", "tokens")
# Annotations of fields that are checked; a field annotated otherwise is its method's own business.
_SCALARS: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "None": type(None)}


@dataclass(frozen=True)
class Card:
    """What a method is, for people: shown by `visiontok.describe`, the CLI, the docs and the demo.

    Attributes:
        title: Full name.
        summary: One sentence.
        paper: Citation.
        url: Where to read it.
        year: Of publication.
        license: Licence of the authors' code (ours is written anew under Apache-2.0).
        training_free: Works on a pretrained model as it is.
        cons: Honest drawbacks.
        official: How the released code differs from the paper or from us.
        name, site, signals, parameters: Filled in by `describe`.
    """

    title: str
    summary: str
    paper: str
    url: str
    year: int
    license: str
    training_free: bool = True
    cons: tuple[str, ...] = ()
    official: str = ""
    name: str = ""
    site: str = ""
    signals: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}", self.summary, f"{self.paper}. {self.url}"]
        free = "training-free" if self.training_free else "needs training"
        lines.append(f"{self.year}, original licence {self.license}, {free}")
        lines.append(f"site {self.site}, needs {', '.join(self.signals) or 'nothing'}")
        lines += [f"  {name} = {value!r}" for name, value in self.parameters.items()]
        lines += [f"- {con}" for con in self.cons]
        if self.official:
            lines.append(f"Official code: {self.official}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Where:
    """The place of a decision.

    Attributes:
        layer: Blocks already run (at MID the block's index).
        depth: Blocks of the model.
        step: Step of a sampler.
        start: Non-prefix tokens that the model started with; 0 if unknown.
        grid: (h, w) of the non-prefix tokens there, if they form one.
        frames: Frames that these tokens are, one for an image; 0 if unknown.
    """

    layer: int
    depth: int
    step: int = 0
    start: int = 0
    grid: tuple[int, int] | None = None
    frames: int = 0


@dataclass(frozen=True)
class Build:
    """What a learned part is made for.

    Attributes:
        site: Of the point.
        layer: Of the point.
        depth: Blocks of the model.
        width: C, channels of a token.
        heads: Attention heads.
        before: Non-prefix tokens that the point gets from the nominal input.
        after: Non-prefix tokens that it leaves.
        prefix: Leading tokens.
        stage: Index of the point among the method's points with a learned part.
        classes: Outputs of the model's head, 0 if it has none.
        class_token: (1, 1, C) the model's class token, if any.
    """

    site: Site
    layer: int
    depth: int
    width: int
    heads: int
    before: int
    after: int
    prefix: int = 1
    stage: int = 0
    classes: int = 0
    class_token: Tensor | None = None


@dataclass(frozen=True)
class Reducer(ABC):
    """Base of all methods. Fields are hyper-parameters with the official defaults.

    Args:
        r: Tokens removed per point: int, float, `(r, inflection)`, list per block, or `{layer: r}`.
        keep: Kept per point: float in (0, 1] is a share, int >= 1 a count; list or dict too.
        gflops: Target compute of the whole model in GMACs (what papers call GFLOPs), solved when patching.
        tokens: Target number of non-prefix tokens after the last point.
        spacing: How `gflops` and `tokens` are spread over the points: `even` counts, the same share at each (`ratio`)
            or falling counts (`linear`). Default: the method's own; `ratio` where that cannot reach the target.
        compat: `"official"` reproduces quirks of the released code; None is the sane behaviour.
        positions: Where a merged token stands in models whose attention reads positions (RoPE, relative biases):
            `mean` of its members, weighted by size, or `gather`, where the token stood that it merged into.
        round_tokens: Round the number of tokens after each point, prefix included, to the nearest multiple of this at
            the model's nominal input. Matrix units work in tiles: 16 suits AMX processors, 64 small batches on GPUs.

    At most one of r, keep, gflops, tokens may be given.

    Raises:
        ParameterError: Several budgets, or a value outside its range.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card]
    site: ClassVar[Site] = Site.MID
    look: ClassVar[str] = "behind"
    spread: ClassVar[str] = "even"
    fill: ClassVar[str] = "nearest"
    always: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    grid_preserving: ClassVar[bool] = False
    class_token: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    when: ClassVar[str] = "prefill"
    scope: ClassVar[str] = "item"
    carry_rules: ClassVar[Mapping[str, str]] = {}
    budget_names: ClassVar[tuple[str, ...]] = _BUDGETS
    position_rules: ClassVar[tuple[str, ...]] = RULES

    r: Any = field(default=None, kw_only=True)
    keep: Any = field(default=None, kw_only=True)
    gflops: float | None = field(default=None, kw_only=True)
    tokens: int | None = field(default=None, kw_only=True)
    spacing: str | None = field(default=None, kw_only=True)
    compat: str | None = field(default=None, kw_only=True)
    positions: str = field(default="mean", kw_only=True)
    round_tokens: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.budget_names if getattr(self, name) is not None}
        if len(given) > 1:
            said = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ParameterError(f"{self.name}: give one budget, got {len(given)} ({said}).")
        if self.compat not in (None, "official"):
            raise ParameterError(f"{self.name}: compat must be None or 'official', got {self.compat!r}.")
        if self.positions not in self.position_rules:
            known = " or ".join(map(repr, self.position_rules))
            raise ParameterError(f"{self.name}: positions must be {known}, got {self.positions!r}.")
        if self.spacing not in (None, "even", "ratio", "linear"):
            raise ParameterError(
                f"{self.name}: spacing must be None, 'even', 'ratio' or 'linear', got {self.spacing!r}."
            )
        if self.round_tokens is not None:
            if not isinstance(self.round_tokens, int) or isinstance(self.round_tokens, bool) or self.round_tokens < 1:
                raise ParameterError(f"{self.name}: round_tokens must be an int >= 1, got {self.round_tokens!r}.")
            if not self.budget_names:
                raise ParameterError(f"{self.name} takes no round_tokens: it has no budget to round.")
        for name, low in (("gflops", 0.0), ("tokens", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            whole = name == "tokens" and not isinstance(value, int)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or whole or value < low or value == 0:
                kind = "a positive number of GMACs" if name == "gflops" else "an int >= 1"
                raise ParameterError(f"{self.name}: {name} must be {kind}, got {value!r}.")
        self._check_types({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        # Catches a malformed budget here, before any model is known; the length is checked when patching.
        schedule.check(*self.spec())

    # ---- what a method may override

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Signals read by `decide`."""
        return ()

    @property
    def proportional(self) -> bool:
        """Whether attention after this reduction adds log(size) to the keys."""
        return False

    @abstractmethod
    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        """Where the tokens of each item go.

        Args:
            signals: What `needs` names, fp32 or wider.
            state: The tokens' history; `state.prefix` leading tokens must stay.
            budget: Tokens to remove, clamped to `limit`; None takes it from the method's own budget at `state.layer`.

        Returns:
            The map, or None for identity.
        """

    def limit(self, n: int) -> int:
        """Most tokens that one point can remove out of n non-prefix tokens."""
        return max(n - 1, 0)

    def layers(self, depth: int) -> Sequence[int]:
        """Layers at which one budget for all points acts in a model of `depth` blocks."""
        return self.span(depth)

    def span(self, depth: int) -> range:
        """Layers at which the method may act; lists and dictionaries of budgets are over these."""
        if self.site is Site.MID or self.look == "ahead":
            return range(depth)
        return range(1, depth)

    def until(self, layer: int, depth: int) -> int | None:
        """At site AROUND: the layer at which the reduction made at `layer` is undone; None: by the consumer."""
        return None

    def placed(self, sites: Collection[Site]) -> Reducer:
        """The form of this reducer for a model that offers these sites; itself unless it has several."""
        return self

    def parts(self) -> tuple[Reducer, ...]:
        """The reducers that act in this one's name, in order; more than itself only for composites."""
        return (self,)

    def modules(self, build: Build) -> nn.Module | None:
        """The learned part of one point, or None. It becomes child `visiontok` of the block that runs the point."""
        return None

    def official(self, stage: int) -> str:
        """Key prefix of a learned part in the authors' checkpoints."""
        return ""

    def protects(self, where: Where) -> int:
        """Tokens that the map at a place adds to the protected prefix."""
        return 0

    def readout(self, module: nn.Module | None, memo: Mapping[str, Any]) -> Any:
        """At site HEAD: the model's output from what the forward left in the memo; replaces norm, pool and head."""
        raise NotImplementedError

    def spec(self) -> tuple[Any, Any]:
        """The `(r, keep)` pair that the schedule is made from; methods with official names map them here."""
        return self.r, self.keep

    # ---- shared

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        """Tokens to remove out of n non-prefix tokens: the budget, clamped to what the method can do."""
        return max(min(budget.removed(n), self.limit(n)), 0)

    def regrid(self, n: int, budget: Budget, where: Where) -> tuple[int, int] | None:
        """(h, w) that n non-prefix tokens form after this point, or None where no grid remains."""
        return None

    def budgets(self, depth: int) -> dict[int, Budget]:
        """The budget of every layer at which the method acts in a model of `depth` blocks."""
        r, keep = self.spec()
        listed = isinstance(r if keep is None else keep, (list, Mapping))
        layers = self.span(depth) if listed else self.layers(depth)
        return dict(zip(layers, schedule.resolve(r, keep, layers, self.compat)))

    def amount(self, budget: int | None, state: TokenState) -> int:
        """The clamped number of tokens that `decide` has to remove; negative if the method adds tokens there."""
        if budget is None:
            depth = max(state.depth, state.layer + 1)
            own = self.budgets(depth).get(state.layer, Budget())
            where = Where(state.layer, depth, start=state.n0 - state.lead, grid=state.grid)
            return self.removed(state.items, own, where, state.prefix)
        if budget < 0:
            raise ParameterError(f"{self.name}: budget must be at least 0 (tokens to remove), got {budget!r}.")
        return max(min(budget, self.limit(state.items)), 0)

    @classmethod
    def create(cls, **params: Any) -> Reducer:
        """Builds the method, turning an unknown parameter into an error that names the known ones.

        Raises:
            UnknownNameError: A parameter does not exist.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in params:
            if name not in known:
                raise UnknownNameError(
                    f"{cls.name} has no parameter {name!r}.{did_you_mean(name, known)} Parameters: {', '.join(known)}."
                )
        try:
            return cls(**params)
        except TypeError:
            # A check of the method's own may trip over a value of a wrong type before the base class sees it.
            cls._check_types(params)
            raise

    @classmethod
    def _check_types(cls, params: Mapping[str, Any]) -> None:
        for f in dataclasses.fields(cls):
            kinds = str(f.type).split(" | ")
            if f.name in params and f.name not in _BUDGETS and set(kinds) <= set(_SCALARS):
                value = params[f.name]
                fits = any(isinstance(value, _SCALARS[kind]) for kind in kinds)
                if not fits or (isinstance(value, bool) and "bool" not in kinds):
                    raise ParameterError(f"{cls.name}: {f.name} must be {' or '.join(kinds)}, got {value!r}.")

    def replaced(self, **params: Any) -> Reducer:
        """A copy with other parameters; a new budget replaces the old one."""
        if any(name in self.budget_names for name in params):
            params = {**dict.fromkeys(self.budget_names), **params}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self).create(**{**values, **params})

    @classmethod
    def describe(cls) -> Card:
        """The card with site, signals and parameters filled in."""
        sample = cls()
        parameters = {f.name: f.default for f in dataclasses.fields(cls)}
        return dataclasses.replace(
            cls.card,
            name=cls.name,
            site=str(sample.site),
            signals=tuple(str(signal) for signal in sample.needs),
            parameters=parameters,
        )

    def fields(self) -> dict[str, Any]:
        """Parameters that differ from their defaults, as plain data."""
        pairs = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {f.name: value for f, value in pairs if value != f.default}
