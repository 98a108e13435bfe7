"""ToMe: token merging by bipartite soft matching of attention keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.ops.constants import wide_dtype

__all__ = ["KeyMerger", "MetricHead", "ToMe", "ToMeKth", "check_onset", "even_odd_map", "head_sum", "onset"]

_PAPER = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023"
_URL = "https://arxiv.org/abs/2210.09461"
_LICENSE = "CC-BY-NC 4.0"
# What tokens may be compared by, and the signal that it is read from.
_METRICS = {
    "key": Signal.KEY,
    "query": Signal.QUERY,
    "value": Signal.VALUE,
    "concat": Signal.KEY,
    "hidden": Signal.HIDDEN,
    "learned": Signal.HIDDEN,
}


def head_sum(key: Tensor) -> Tensor:
    """(B, H, N, d) keys to a (B, N, d) metric: the direction of their mean over heads, which is all a cosine sees."""
    return key.squeeze(1) if key.shape[1] == 1 else key.sum(dim=1)


def onset(value: float, depth: int) -> int:
    """The first layer of a later part of the model: an int is its index, a float a share of the depth."""
    return math.ceil(value * depth) if isinstance(value, float) else value


def check_onset(method: str, name: str, value: Any) -> None:
    """Raises ParameterError if `onset` does not understand a value."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if not number or (isinstance(value, float) and value > 1):
        raise ParameterError(
            f"{method}: {name} must be a layer (int >= 0) or a share of the depth (float in [0, 1]), got {value!r}."
        )


def even_odd_map(metric: Tensor, r: int, state: TokenState) -> TokenMap:
    """ToMe's step: the r best pairs of even and odd positions merge by size.

    Args:
        metric: (B, H, N, d) what tokens are compared by: the direction of its mean over heads.
        r: Tokens to merge, 1 … (N - prefix) // 2.
        state: The tokens' history.
    """
    return TokenMap.of_slots(matching.match_slots(metric, r, state.prefix), (matching.first_odd(state.prefix), 2))


class MetricHead(nn.Linear):
    """A learned metric: a linear map of the layer-normed token (DTEM, NeurIPS 2024)."""

    @classmethod
    def of(cls, build: Build, dim: int | None = None) -> MetricHead:
        """The head for a point; by default as wide as one attention head, as two from width 1024 on."""
        head = build.width // build.heads * (1 if build.width < 1024 else 2)
        return cls(build.width, head if dim is None else dim)

    def forward(self, input: Tensor) -> Tensor:
        # Signals are fp32 or wider whatever the model's dtype is. The norm has no scale: the weights would absorb it.
        rows = F.layer_norm(input, input.shape[-1:])
        return F.linear(rows, self.weight.to(rows.dtype), self.bias.to(rows.dtype))


@dataclass(frozen=True)
class KeyMerger(Reducer):
    """What the family shares: tokens are compared by keys, or what `metric` names, and attention weighed by size.

    Args:
        prop_attn: Whether attention adds log(size) to the keys.
        metric: What tokens are compared by: `key` (default), `query` or `value` (mean over heads), `concat` (the keys
            of all heads side by side), `hidden` (the tokens themselves) or `learned` (a head trained with `dtem`).

    Raises:
        ParameterError: An unknown metric.
    """

    prop_attn: bool = True
    metric: str = field(default="key", kw_only=True)

    def __post_init__(self) -> None:
        if self.metric not in _METRICS:
            raise ParameterError(f"{self.name}: metric must be one of {', '.join(_METRICS)}, got {self.metric!r}.")
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (_METRICS[self.metric],)

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def modules(self, build: Build) -> nn.Module | None:
        if self.metric != "learned":
            return None
        # Only `dtem` trains the head; a parameter that never gets a gradient would stop distributed training.
        return MetricHead.of(build).requires_grad_(False)

    def official(self, stage: int) -> str:
        # The keys that dtem leaves in a model whose blocks all merge.
        return f"blocks.{stage}.visiontok.dtem_{stage}."

    def heads(self, signals: Signals) -> Tensor:
        """(B, H, N, d) what tokens are compared by, in the model's dtype, without gradient; its sum over H counts."""
        source = _METRICS[self.metric].value
        if self.metric in ("key", "query", "value"):
            return signals.raw(source).detach()
        found = signals.get(source).detach()
        if self.metric == "learned":
            found = signals.MODULE(found).detach()
        return (found.transpose(1, 2).flatten(2) if self.metric == "concat" else found).unsqueeze(1)

    def measure(self, signals: Signals) -> Tensor:
        """(B, N, d) what tokens are compared by, in at least fp32 and without gradient."""
        heads = self.heads(signals)
        return head_sum(heads.to(wide_dtype(heads.dtype)))


@dataclass(frozen=True)
class ToMe(KeyMerger):
    """Token Merging (arXiv:2210.09461): each block merges its r most similar pairs of tokens.

    Tokens at even positions merge into tokens at odd positions by cosine of the head-averaged keys, size-weighted.

    Args:
        r: Tokens merged per block; the released default is 0 (nothing).
        prop_attn: Whether attention adds log(size) to the keys. Official: True, False for MAE off the shelf.
        metric: What tokens are compared by instead of `key`; see `KeyMerger`.
    """

    name = "tome"
    card = Card(
        title="Token Merging",
        summary="Merges the r most similar token pairs between attention and MLP of every block.",
        paper=_PAPER,
        url=_URL,
        year=2022,
        license=_LICENSE,
        cons=(
            "At most half of the patch tokens can merge in one block.",
            "Which tokens meet depends on their position parity, so a permutation of tokens changes the result.",
            "Dense heads need restore.",
        ),
        official="drops LayerScale, q/k-norm and gates, protects index 0 only, pools unweighted (timm patch) or by "
        "size (MAE patch), cuts longer lists; here all prefix tokens stay, pools are size-weighted, longer lists are "
        "errors.",
    )

    def limit(self, n: int) -> int:
        return n // 2

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        return even_odd_map(self.heads(signals), r, state)


@dataclass(frozen=True)
class ToMeKth(KeyMerger):
    """ToMe's k-th variant (arXiv:2210.09461): the last token of each k stays, all others join their best match.

    Args:
        k: Group length, at least 2; N // k tokens remain.
        layer: The block that merges.
        prop_attn: Whether attention adds log(size) to the keys.
        metric: What tokens are compared by instead of `key`; see `KeyMerger`.
        compat: `"official"` drops the tail that does not fill a group; by default it merges like the rest.
    """

    name = "tome_kth"
    card = Card(
        title="Token Merging, k-th variant",
        summary="Keeps every k-th token of the sequence and merges all others into their most similar kept one.",
        paper=_PAPER,
        url=_URL,
        year=2022,
        license=_LICENSE,
        cons=("One strong step at one block; its only budget is k.",),
        official="used by no released patch; no class token handling, drops the tail of the sequence.",
    )
    budget_names = ()

    k: int = 2
    layer: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 2:
            raise ParameterError(f"tome_kth: k must be an int >= 2, got {self.k!r}.")
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise ParameterError(f"tome_kth: layer must be an int >= 0, got {self.layer!r}.")
        given = [name for name in ("r", "keep", "gflops", "tokens") if getattr(self, name) is not None]
        if given:
            raise ParameterError(f"tome_kth takes no {given[0]}; its budget is k={self.k}.")
        super().__post_init__()

    def layers(self, depth: int) -> range:
        return range(self.layer, min(self.layer + 1, depth))

    def budgets(self, depth: int) -> dict[int, Budget]:
        return dict.fromkeys(self.layers(depth), Budget(ratio=1 / self.k))

    def removed(self, n: int, budget: Budget, where: Where, prefix: int = 0) -> int:
        return n - n // self.k if n >= self.k else 0

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        if state.items < self.k:
            return None
        metric = self.measure(signals)[:, state.prefix :]
        match = matching.every_kth(metric, self.k, drop_tail=self.compat == "official")
        src, dst, order = (part + state.prefix for part in match)
        return TokenMap.merge(src, dst, order, state.prefix, length=state.n)
