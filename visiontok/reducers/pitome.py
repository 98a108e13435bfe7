"""PiToMe: energy decides which tokens are redundant before they are matched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.staged import check_share
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError, UnknownNameError, did_you_mean
from visiontok.ops import matching, scoring
from visiontok.ops.ordering import stable_order
from visiontok.reducers.tome import head_sum

__all__ = ["PiToMe"]

_KINDS = ("protect", "bsm_pitome", "bsm", "text")


class _Preset(NamedTuple):
    """How one released patch (or the paper) runs the method.

    `margin` is (a, b): margin_l = a - b * l / L. `kinds` are the variants of the first `switch` layers and of the rest;
    `switch` None means the first ceil(L / 2) layers.
    """

    margin: tuple[float, float]
    kinds: tuple[str, str] = ("protect", "protect")
    switch: int | None = None
    metric: str = "key"
    site: Site = Site.MID
    prop_attn: bool = False
    sized: bool = True
    skip_last: bool = False
    hinge: bool = False


_PRESETS = {
    "paper": _Preset((0.9, 0.9), prop_attn=True, hinge=True),
    "deit": _Preset((0.75, 0.75), kinds=("bsm_pitome", "protect")),
    "mae": _Preset((0.75, 0.75), kinds=("protect", "bsm_pitome")),
    "augreg": _Preset((0.9, 0.9), kinds=("bsm_pitome", "protect")),
    "clip": _Preset((0.95, 0.95), metric="hidden"),
    "blip": _Preset((0.9, 0.9), metric="hidden", skip_last=True),
    "blip2": _Preset((0.75, 0.4), prop_attn=True),
    "llava": _Preset((0.9, 0.9), kinds=("bsm", "protect"), switch=13, metric="hidden", site=Site.PRE, sized=False),
}


@dataclass(frozen=True)
class PiToMe(Reducer):
    """Protect Informative Tokens before Merging (arXiv:2405.16148).

    The energy of a token is how many near neighbours it has; tokens of high energy are redundant and may merge, tokens
    of low energy are protected.

    Args:
        ratio: Share of non-prefix tokens kept at each point (the official name of `keep`), in (0, 1].
        preset: Which released patch to follow: `deit` (default), `mae`, `augreg`, `clip`, `blip`, `blip2`, `llava`, or
            `paper`. They differ in metric, margin, variant per layer, site and attention bias.
        kind: Variant at every layer instead of the preset's: `protect`, `bsm_pitome`, `bsm` (plain ToMe split), `text`.
        margin: Margin at every layer (float) or per layer (list) instead of the preset's.
        alpha: Slope of the negative part of the energy.
        metric: `key` (head-averaged) or `hidden` instead of the preset's.
        prop_attn: Whether attention adds log(size), instead of the preset's choice.
        skip_last: Whether the last block does not merge, instead of the preset's choice (`blip` skips it in `forward`,
            not in `forward_features`).
    """

    name = "pitome"
    card = Card(
        title="PiToMe, spectrum-preserving token merging",
        summary="Scores tokens by an energy (density of near neighbours), protects isolated ones, merges the rest.",
        paper="Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024",
        url="https://arxiv.org/abs/2405.16148",
        year=2024,
        license="CC-BY-NC 4.0",
        cons=(
            "The similarity of all token pairs is needed, four times the matching cost of ToMe.",
            "A keep ratio compounds over blocks, so most tokens leave early.",
            "Released patches differ from the paper and from one another; see the presets.",
        ),
        official="crashes when a block has nothing to merge or for ratio < 0.5, does not protect a distillation token, "
        "divides MAE pooling by 3; here budgets are clamped, all prefix tokens stay and pools are size-weighted.",
    )
    budget_names = (*Reducer.budget_names, "ratio")

    ratio: float | None = None
    preset: str = "deit"
    kind: str | None = None
    margin: Any = None
    alpha: float = 1.0
    metric: str | None = None
    prop_attn: bool | None = None
    skip_last: bool | None = None

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            hint = did_you_mean(self.preset, _PRESETS)
            raise UnknownNameError(f"pitome has no preset {self.preset!r}.{hint} Presets: {', '.join(_PRESETS)}.")
        for name, value, known in (("kind", self.kind, _KINDS), ("metric", self.metric, ("key", "hidden"))):
            if value is not None and value not in known:
                raise ParameterError(f"pitome: {name} must be one of {', '.join(known)}, got {value!r}.")
        check_share("pitome", "ratio", self.ratio)
        margins = self.margin if isinstance(self.margin, (list, tuple)) else [self.margin or 0.0]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in margins):
            raise ParameterError(f"pitome: margin must be a number or a list with one per layer, got {self.margin!r}.")
        if self.kind == "text" and self.margin is not None and not self._margins_below_one():
            raise ParameterError(f"pitome: the text energy needs margins below 1, got {self.margin!r}.")
        super().__post_init__()

    def _margins_below_one(self) -> bool:
        margins = self.margin if isinstance(self.margin, (list, tuple)) else [self.margin]
        return all(margin < 1 for margin in margins)

    @property
    def _preset(self) -> _Preset:
        return _PRESETS[self.preset]

    @property
    def site(self) -> Site:  # type: ignore[override]
        return self._preset.site

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.KEY,) if (self.metric or self._preset.metric) == "key" else (Signal.HIDDEN,)

    @property
    def proportional(self) -> bool:
        return self._preset.prop_attn if self.prop_attn is None else self.prop_attn

    def spec(self) -> tuple[Any, Any]:
        return self.r, self.keep if self.ratio is None else float(self.ratio)

    def layers(self, depth: int) -> range:
        skip = self._preset.skip_last if self.skip_last is None else self.skip_last
        first = 1 if self.site is Site.PRE else 0
        return range(first, depth + first - (1 if skip and depth > 1 else 0))

    def limit(self, n: int) -> int:
        return n // 2

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.kind_at(where) == "bsm" and budget.ratio is not None:
            # The plain ToMe split counts the prefix in T, as the released code does.
            total = n + prefix
            return max(min(math.floor(total - total * budget.ratio), self.limit(n)), 0)
        return super().removed(n, budget, where, prefix)

    def kind_at(self, where: Where) -> str:
        """The variant used at a place."""
        if self.kind is not None:
            return self.kind
        switch = self._preset.switch
        switch = math.ceil(where.depth / 2) if switch is None else switch
        return self._preset.kinds[0 if self._block(where) < switch else 1]

    def margin_at(self, where: Where) -> float:
        """The margin used at a place."""
        block = self._block(where)
        if self.margin is None:
            start, slope = self._preset.margin
            return start - slope * (block / where.depth)
        if isinstance(self.margin, (list, tuple)):
            if block >= len(self.margin):
                raise ParameterError(f"pitome: margin has {len(self.margin)} entries, layer {block} needs one more.")
            return float(self.margin[block])
        return float(self.margin)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        where = Where(state.layer, max(state.depth, state.layer + 1))
        metric = head_sum(signals.KEY) if self.needs[0] is Signal.KEY else signals.HIDDEN
        match = self.match(metric.detach(), r, where, state.prefix)
        weight = None if self._preset.sized else metric.new_ones(metric.shape[:2])
        return TokenMap.merge(match.src, match.dst, match.order, state.prefix, weight=weight)

    def match(self, metric: Tensor, r: int, where: Where, prefix: int) -> matching.Match:
        """The pairs to merge.

        Args:
            metric: (B, N, d) with the prefix.
            r: Tokens to merge, at most half of the non-prefix tokens.
            where: Decides variant and margin.
            prefix: Leading tokens left out of energy and matching.
        """
        kind = self.kind_at(where)
        if kind == "bsm":
            return matching.even_odd(metric, r, prefix)
        rows = matching.unit(metric[:, prefix:])
        ranked = stable_order(self.energy(rows, where), descending=True)
        if kind == "bsm_pitome":
            a, b = matching.alternate(ranked)
            found = matching.bipartite(rows, a, b, r, ascending=False)
            return matching.Match(*(part + prefix for part in found))
        movable, protected = ranked[:, : 2 * r], ranked[:, 2 * r :]
        a, b = matching.halves(movable) if kind == "text" else matching.alternate(movable)
        _, partner = matching.best_match(rows, a, b)
        order = torch.cat((protected, b), dim=1)
        return matching.Match(a + prefix, b.gather(1, partner) + prefix, order + prefix)

    def energy(self, rows: Tensor, where: Where) -> Tensor:
        """(B, N) energy of unit rows (B, N, d)."""
        margin = self.margin_at(where)
        if self.kind_at(where) == "text":
            return scoring.gaussian_energy(rows, margin)
        return scoring.energy(rows, margin, self.alpha, hinge=self._preset.hinge)

    def _block(self, where: Where) -> int:
        return where.layer - 1 if self.site is Site.PRE else where.layer
