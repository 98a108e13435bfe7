"""ToMe: token merging by bipartite soft matching of attention keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visiontok.core.reducer import Card, Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching

__all__ = ["ToMe", "ToMeKth"]

_PAPER = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023"
_URL = "https://arxiv.org/abs/2210.09461"
_LICENSE = "CC-BY-NC 4.0"


def head_sum(key: Tensor) -> Tensor:
    """(B, H, N, d) keys to a (B, N, d) metric: the direction of their mean over heads, which is all a cosine sees."""
    return key.squeeze(1) if key.shape[1] == 1 else key.sum(dim=1)


@dataclass(frozen=True)
class _KeyMerger(Reducer):
    """What both variants share: they compare keys and weigh attention by size if asked to."""

    prop_attn: bool = True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.KEY,)

    @property
    def proportional(self) -> bool:
        return self.prop_attn


@dataclass(frozen=True)
class ToMe(_KeyMerger):
    """Token Merging (arXiv:2210.09461): each block merges its r most similar pairs of tokens.

    Tokens at even positions merge into tokens at odd positions by cosine of the head-averaged keys, size-weighted.

    Args:
        r: Tokens merged per block; the released default is 0 (nothing).
        prop_attn: Whether attention adds log(size) to the keys. Official: True, False for MAE off the shelf.
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
        assign = matching.even_odd_slots(head_sum(signals.KEY.detach()), r, state.prefix)
        stays = (matching.first_odd(state.prefix), 2)
        return TokenMap(assign, state.n - r, stays=stays, form="complete")


@dataclass(frozen=True)
class ToMeKth(_KeyMerger):
    """ToMe's k-th variant (arXiv:2210.09461): the last token of each k stays, all others join their best match.

    Args:
        k: Group length, at least 2; N // k tokens remain.
        layer: The block that merges.
        prop_attn: Whether attention adds log(size) to the keys.
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
        metric = head_sum(signals.KEY.detach())[:, state.prefix :]
        match = matching.every_kth(metric, self.k, drop_tail=self.compat == "official")
        src, dst, order = (part + state.prefix for part in match)
        return TokenMap.merge(src, dst, order, state.prefix, length=state.n)
