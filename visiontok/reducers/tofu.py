"""ToFu: ToMe's pairs are pruned in early layers and merged with their norm kept in late ones."""

from __future__ import annotations

from dataclasses import dataclass

from visiontok.core.reducer import Card, Where
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.ops import matching
from visiontok.reducers.tome import KeyMerger, check_onset, onset

__all__ = ["ToFu"]


@dataclass(frozen=True)
class ToFu(KeyMerger):
    """Token Fusion (arXiv:2312.01026): prune where the model is not linear in its tokens, merge where it is.

    Pairs are matched as in ToMe. Before `switch` a destination keeps its own value and its sources are forgotten (they
    still count in its size, and restoring gives them its value); from there on a group becomes MLERP: the direction of
    the mean with the largest norm of its members.

    Args:
        r: Tokens removed per block.
        switch: First block that merges: an int is its index, a float in [0, 1] a share of the depth.
        prop_attn: Whether attention adds log(size) to the keys.
        metric: What tokens are compared by instead of `key`; see `KeyMerger`.

    Raises:
        ParameterError: `switch` is neither.
    """

    name = "tofu"
    card = Card(
        title="Token Fusion",
        summary="ToMe's matching; early blocks drop the matched tokens, late blocks merge them and keep their norm.",
        paper="Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024",
        url="https://arxiv.org/abs/2312.01026",
        year=2023,
        license="no public code of the authors",
        cons=(
            "At most half of the patch tokens can leave in one block.",
            "Where pruning ends is a knob; half of the depth is a convention, not tuned per model.",
            "Early blocks lose what the dropped tokens held.",
        ),
        official="none; from the paper's description. Copies in other projects keep no sizes and average without them; "
        "here destinations grow and means are size-weighted, as in ToMe.",
    )

    switch: int | float = 0.5

    def __post_init__(self) -> None:
        check_onset("tofu", "switch", self.switch)
        super().__post_init__()

    def limit(self, n: int) -> int:
        return n // 2

    def merges_at(self, where: Where) -> bool:
        """Whether this place merges; else it prunes."""
        return where.layer >= onset(self.switch, where.depth)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        metric = self.measure(signals)
        src, dst, order = matching.even_odd(metric, r, state.prefix)
        if self.merges_at(Where(state.layer, max(state.depth, state.layer + 1))):
            return TokenMap.merge(src, dst, order, state.prefix, mode="mlerp")
        weight = metric.new_ones(metric.shape[:2]).scatter(1, src, 0.0)
        return TokenMap.merge(src, dst, order, state.prefix, weight=weight)
