"""PyramidDrop: visual tokens leave the language model in stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget, quarters
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import DecoderReducer, keep_top
from visiontok.errors import ParameterError

__all__ = ["PyramidDrop"]

_RATIOS = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class PyramidDrop(DecoderReducer):
    """PyramidDrop (arXiv:2410.17247): at a few depths the visual tokens with the most attention of the last token stay.

    Attention is that of the layer that comes next, averaged over heads.

    Args:
        layer_list: Decoder layers, counted from 0, before which tokens leave; ascending, at least 1. Default: a
            quarter, a half and three quarters of the depth, which is the official (8, 16, 24) of 32.
        image_token_ratio_list: Share of the image's first token count that stays at each of them (rounded down).
            Default: (0.5, 0.25, 0.125) where no other budget is given. A share as `keep` is of the tokens left there.

    Raises:
        ParameterError: Layers not ascending, shares outside (0, 1] or rising, or numbers of both that differ.
    """

    name = "pyramiddrop"
    aliases = ("pdrop",)
    card = Card(
        title="PyramidDrop",
        summary="Drops visual tokens in stages, by the next layer's attention of the last instruction token.",
        paper="Xing et al., PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction, CVPR 2025",
        url="https://arxiv.org/abs/2410.17247",
        year=2024,
        license="Apache-2.0",
        cons=(
            "The first quarter of the layers sees every token.",
            "Queries and keys of the layers at which tokens leave are computed twice.",
        ),
        official="pads batches on the right; in training it also reduces by the last instruction token, which is not "
        "the last token there. No golden files exist: rule after the released code, not compared with its numbers.",
    )
    look = "ahead"
    spread = "ratio"
    budget_names = (*Reducer.budget_names, "image_token_ratio_list")

    layer_list: Any = None
    image_token_ratio_list: Any = None
    positions: str = field(default="compact", kw_only=True)

    def __post_init__(self) -> None:
        layers, ratios = self.layer_list, self.image_token_ratio_list
        if layers is not None and not _ascending(layers):
            raise ParameterError(f"pyramiddrop: layer_list must be ascending ints >= 1, got {layers!r}.")
        if ratios is not None and not _falling(ratios):
            raise ParameterError(
                f"pyramiddrop: image_token_ratio_list must be falling shares in (0, 1], got {ratios!r}."
            )
        super().__post_init__()
        stages = 3 if layers is None else len(layers)
        if self.ratios is not None and len(self.ratios) != stages:
            raise ParameterError(
                f"pyramiddrop: image_token_ratio_list must have {stages} shares, one a layer, got {self.ratios!r}."
            )

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_LAST,)

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """Shares of the first token count, or None where another budget was given."""
        if self.image_token_ratio_list is not None:
            return tuple(float(ratio) for ratio in self.image_token_ratio_list)
        given = any(getattr(self, name) is not None for name in Reducer.budget_names)
        return None if given else _RATIOS

    def span(self, depth: int) -> range:
        return range(1, depth)

    def layers(self, depth: int) -> Sequence[int]:
        if self.layer_list is not None:
            return tuple(self.layer_list)
        return tuple(layer for layer in quarters(depth) if layer > 0)

    def budgets(self, depth: int) -> dict[int, Budget]:
        if self.ratios is None:
            return super().budgets(depth)
        # A very shallow model has fewer stages; the last ones then count, for they set what remains.
        layers = self.layers(depth)
        return {layer: Budget(ratio=ratio) for layer, ratio in zip(layers, self.ratios[-len(layers) :])}

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        if self.ratios is None or budget.ratio is None:
            return super().removed(n, budget, where, prefix)
        return max(n - max(int((where.start or n) * budget.ratio), 1), 0)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        return keep_top(signals.ATTN_LAST.mean(dim=1), state.items - removed, state)


def _ascending(layers: Any) -> bool:
    whole = isinstance(layers, (list, tuple)) and all(type(layer) is int and layer >= 1 for layer in layers)
    return whole and len(layers) > 0 and list(layers) == sorted(set(layers))


def _falling(ratios: Any) -> bool:
    shares = isinstance(ratios, (list, tuple)) and all(type(r) in (int, float) and 0 < r <= 1 for r in ratios)
    return shares and len(ratios) > 0 and list(ratios) == sorted(ratios, reverse=True)
