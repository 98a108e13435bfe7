"""MustDrop: merge in the vision tower, filter twice in the language model, and clean its cache up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import CacheReducer, DecoderReducer, PromptReducer
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.grids import Windows
from visiontok.ops.joining import join
from visiontok.ops.ordering import stable_order

__all__ = ["MustDrop"]

_KEY = "mustdrop.key"
_LAYERS, _DEPTH = (2, 6, 10, 14), 32
# (global_thr, individual_thr) of the released scripts, by the average number of tokens over the layers.
_PRESETS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


def _whole(values: Any, low: int) -> bool:
    whole = isinstance(values, (list, tuple)) and all(type(value) is int and value >= low for value in values)
    return whole and len(values) > 0


@dataclass(frozen=True)
class MustDrop(DecoderReducer):
    """MustDrop, multi-stage token dropping (arXiv:2411.10803).

    Four parts: windows of alike tokens merge after the tower's first layer; the tokens with the most class attention in
    its last layer become a key set; at four depths of the language model every visual token leaves that the text
    attends to little in sum and at no word, unless it is in the key set; the caches of the layers in between keep only
    what survived all of them. Thresholds decide, so counts differ per image. By hand, `decide` is the dual filter.

    Args:
        spatial_threshold: Mean cosine of all pairs of a window from which it merges.
        window: (height, width) of the windows.
        keep_rate: Share of the tower's tokens, rounded up, that is the key set.
        global_thr: A token may leave if it gets less than this share of the text's attention to all visual tokens.
        individual_thr: and less than this from every text token. Default of both: by `retained_tokens`.
        retained_tokens: Released pair of thresholds, by the average tokens per layer that it aims at: 192 (default),
            128 or 64.
        pruning_layers: Decoder layers, counted from 0, after which the filter acts, by their attention; ascending.
            Default: (2, 6, 10, 14) of 32, at the same depths in other models.
        max_tokens: Most visual tokens that the first filter leaves; key set first, then by attention. Default: no cap.
        compact: In eager mode, cut slots that no sample of the batch uses (waits for the device).
        compat: `"official"` merges as many windows in each image as in that of the batch with fewest, and puts them
            before the other tokens, most alike first. By default each image counts alone and tokens stay in order.

    Raises:
        ParameterError: A budget by number, or a value outside its range.
    """

    name = "mustdrop"
    card = Card(
        title="MustDrop, multi-stage vision token dropping",
        summary="Merges alike windows in the tower, drops what text ignores in the decoder, trims the cache.",
        paper="Liu et al., Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model, 2024",
        url="https://arxiv.org/abs/2411.10803",
        year=2024,
        license="not known here",
        cons=(
            "Thresholds decide, so token counts cannot be set; max_tokens caps them.",
            "Needs the attention of all text tokens at four layers.",
            "Counts differ per image: batches are padded to the longest.",
        ),
        official="runs images one by one with layer numbers of a 24-layer tower and a 32-layer decoder; merged windows "
        "lose their place in the raster (compat='official').",
    )
    ragged: ClassVar[bool] = True
    always: ClassVar[bool] = True
    carry_rules: ClassVar[Mapping[str, str]] = {_KEY: "any"}
    budget_names = ("retained_tokens",)

    spatial_threshold: float = 0.8
    window: Any = (3, 3)
    keep_rate: float = 0.08
    global_thr: float | None = None
    individual_thr: float | None = None
    retained_tokens: int | None = None
    pruning_layers: Any = None
    max_tokens: int | None = None
    compact: bool = True
    positions: str = field(default="compact", kw_only=True)

    def __post_init__(self) -> None:
        for name in Reducer.budget_names:
            if getattr(self, name) is not None:
                raise ParameterError(f"mustdrop takes no {name}: thresholds decide; give max_tokens for a cap.")
        if self.retained_tokens is not None and self.retained_tokens not in _PRESETS:
            known = ", ".join(map(str, _PRESETS))
            raise ParameterError(f"mustdrop: retained_tokens must be one of {known}, got {self.retained_tokens!r}.")
        if not (_whole(self.window, 1) and len(self.window) == 2 and max(self.window) > 1):
            raise ParameterError(f"mustdrop: window must be (height, width) of at least 2 tokens, got {self.window!r}.")
        layers = self.pruning_layers
        if layers is not None and not (_whole(layers, 0) and list(layers) == sorted(set(layers))):
            raise ParameterError(f"mustdrop: pruning_layers must be ascending ints >= 0, got {layers!r}.")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise ParameterError(f"mustdrop: max_tokens must be an int >= 1, got {self.max_tokens!r}.")
        super().__post_init__()
        if not 0 <= self.keep_rate <= 1:
            raise ParameterError(f"mustdrop: keep_rate must be in [0, 1], got {self.keep_rate!r}.")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_TEXT,)

    @property
    def thresholds(self) -> tuple[float, float]:
        """(global_thr, individual_thr) in force."""
        preset = _PRESETS[self.retained_tokens or 192]
        own = (self.global_thr, self.individual_thr)
        return tuple(a if b is None else float(b) for a, b in zip(preset, own))  # type: ignore[return-value]

    def parts(self) -> tuple[Reducer, ...]:
        return _Merge(owner=self), _KeySet(owner=self), _Filter(owner=self, positions=self.positions), _Cache(
            owner=self, positions=self.positions
        )  # fmt: skip

    def after(self, depth: int) -> list[int]:
        """Decoder layers, of `depth`, after which the filter acts."""
        if self.pruning_layers is not None:
            return list(self.pruning_layers)
        return sorted({at for at in (round(at * depth / _DEPTH) for at in _LAYERS) if at + 1 < depth})

    def layers(self, depth: int) -> Sequence[int]:
        return tuple(layer + 1 for layer in self.after(depth))

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        attention = signals.ATTN_TEXT.mean(dim=1)
        total, live = attention.sum(dim=1), _live(state)
        key = state.carry.get(_KEY)
        key = torch.zeros_like(total, dtype=torch.bool) if key is None else key.bool()
        kept = self.filtered(attention) | key
        if live is not None:
            kept, total = kept & live, total.masked_fill(~live, -1)
        # An image without any token would leave nothing to attend to.
        best = torch.zeros_like(kept).scatter(1, stable_order(total, descending=True)[:, :1], True)
        kept = kept | (best & ~kept.any(dim=1, keepdim=True))
        most = state.n
        if self.max_tokens is not None and self.max_tokens < state.n:
            most = self.max_tokens
            # Two stable sorts: by attention, then key set before the rest before what leaves.
            order = stable_order(total, descending=True)
            group = torch.where(kept, 1 - key.long(), 2).gather(1, order)
            order = order.gather(1, stable_order(group))
            kept = kept & torch.zeros_like(kept).scatter(1, order[:, :most], True)
        return _selected(kept, most, key)

    def filtered(self, attention: Tensor) -> Tensor:
        """(R, n) bool, what the dual filter keeps.

        Args:
            attention: (R, T, n) head mean of the text's attention to the visual tokens; zero rows for no text.
        """
        share, each = self.thresholds
        total = attention.sum(dim=1)
        return ~((total < share * total.sum(dim=1, keepdim=True)) & (attention.amax(dim=1) < each))


@dataclass(frozen=True)
class _Merge(Reducer):
    """Averages windows of alike tokens after the tower's first layer."""

    name = "mustdrop"
    site = Site.PRE
    always = True
    ragged = True
    budget_names = ()

    owner: MustDrop = MustDrop()

    @property
    def compact(self) -> bool:
        return self.owner.compact

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.HIDDEN, Signal.GRID

    def layers(self, depth: int) -> Sequence[int]:
        return (1,)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        x, prefix = signals.HIDDEN.detach(), state.prefix
        windows = Windows.of(signals.GRID, tuple(self.owner.window), x.device)
        alike = windows.similarity(matching.unit(x[:, prefix:]))
        merges = alike >= self.owner.spatial_threshold
        first, order = windows.members[:, 0], None
        batch, length = x.shape[0], state.items
        place = torch.arange(length, device=x.device).expand(batch, -1)
        if self.owner.compat == "official":
            ranked = stable_order(alike, descending=True)
            rank = torch.empty_like(ranked).scatter(
                1, ranked, torch.arange(ranked.shape[1], device=x.device).expand(batch, -1)
            )
            merges = rank < merges.sum(dim=1).min()
            start = torch.where(merges, rank, first + length)
            order = stable_order((place + length).scatter(1, first.expand(batch, -1), start))
        window = windows.window.expand(batch, -1)
        target = torch.where(merges.gather(1, window), first[window], place)
        joined = join(target, order, prefix)
        return TokenMap(joined.assign, state.n, anchor=joined.order, counts=joined.counts, form="complete")


@dataclass(frozen=True)
class _KeySet(PromptReducer):
    """Notes, for the language model, which tokens the class token attends to most in the tower's last layer."""

    name = "mustdrop"
    always = True
    carry_rules: ClassVar[Mapping[str, str]] = MustDrop.carry_rules
    budget_names = ()

    owner: MustDrop = MustDrop()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.ATTN_PREFIX,)

    def taps(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        prefix = state.prefix
        score, live = signals.ATTN_PREFIX[:, -1, :, 0, prefix:].mean(dim=1), _live(state)
        batch, n = score.shape
        index = torch.arange(n, device=score.device).expand(batch, -1)
        if live is not None:
            score = score.masked_fill(~live, -1)
        tokens = torch.full((batch, 1), n, device=score.device) if live is None else live.sum(dim=1, keepdim=True)
        # In double precision, where the product rounds as Python's does.
        count = (self.owner.keep_rate * tokens.double()).ceil().long()
        order = stable_order(score, descending=True)
        rank = torch.empty_like(order).scatter(1, order, index)
        return TokenMap.keep(index + prefix, state.n, carry={_KEY: rank < count})


@dataclass(frozen=True)
class _Filter(DecoderReducer):
    """The dual filter in the language model."""

    name = "mustdrop"
    always = True
    ragged = True
    carry_rules: ClassVar[Mapping[str, str]] = MustDrop.carry_rules
    budget_names = ()

    owner: MustDrop = MustDrop()

    @property
    def compact(self) -> bool:
        return self.owner.compact

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.owner.needs

    def layers(self, depth: int) -> Sequence[int]:
        return self.owner.layers(depth)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        return self.owner.decide(signals, state, budget)


@dataclass(frozen=True)
class _Cache(CacheReducer):
    """Drops from the caches of the layers between the filters what a later filter dropped."""

    name = "mustdrop"
    always = True
    ragged = True
    budget_names = ()

    owner: MustDrop = MustDrop()

    @property
    def compact(self) -> bool:
        return self.owner.compact

    def layers(self, depth: int) -> Sequence[int]:
        after = self.owner.after(depth)
        return range(after[0], after[-1] + 1) if after else ()

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        alive = state.carry.get("alive")
        return None if alive is None else _selected(alive, state.n)


def _selected(kept: Tensor, most: int, key: Tensor | None = None) -> TokenMap:
    """The map that keeps the tokens marked in `kept` (R, n), at most `most` in a row, in order."""
    order, counts = stable_order((~kept).int())[:, :most], kept.sum(dim=1)
    assign = torch.where(kept, kept.long().cumsum(dim=1) - 1, -1)
    carry = None if key is None else {_KEY: (key & kept).gather(1, order)}
    return TokenMap(assign, order.shape[1], anchor=order, counts=counts, carry=carry, form="select")


def _live(state: TokenState) -> Tensor | None:
    """(R, n) bool, False for padding; None where there is none."""
    if not state.padded or state.size is None:
        return None
    return state.size[:, state.prefix :, 0] > 0
