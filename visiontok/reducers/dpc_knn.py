"""DPC-KNN: tokens cluster around density peaks and each cluster becomes one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.staged import Staged, check_share
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap, with_prefix
from visiontok.errors import ParameterError
from visiontok.ops import density, merging

__all__ = ["DPCKNN", "Scorer"]

# The released code's guard against empty clusters.
_EPS = 1e-6


class Scorer(nn.Module):
    """A linear score per token (arXiv:2204.08680). Starts at zero, where all tokens count the same.

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) positive weights of the tokens x (B, N, C), in the dtype of x."""
        return self.score(x.to(self.score.weight.dtype)).squeeze(-1).to(x.dtype).exp()


@dataclass(frozen=True)
class DPCKNN(Staged):
    """Density-peak clustering with k nearest neighbours (TCFormer, arXiv:2204.08680).

    Centres are the K tokens of highest density times distance to any denser token; the others join the nearest centre,
    and a cluster becomes the mean of its tokens, weighted by exp of a learned score. Slots are in the order of the
    centres' scores. Untrained scores are zero, so the method also works off the shelf.

    Args:
        r, keep: Budget per point; one number acts at a quarter, a half and three quarters of the depth.
        keep_rate: Official budget: point i keeps `int(N0 * keep_rate**i)` of the N0 tokens that the model starts
            with, at least 1.
        k_neighbors: Neighbours that make a token's density, itself among them.
        equal_weight: No scores: plain means.
        compat: `"official"` adds 1e-6 to the sum of weights that a cluster is divided by.
    """

    name = "dpc_knn"
    aliases = ("tcformer",)
    card = Card(
        title="DPC-KNN token clustering",
        summary="Clusters tokens around density peaks of the hidden states and averages each cluster.",
        paper="Zeng et al., Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering Transformer, "
        "CVPR 2022; as a reduction: Haurum et al., Which Tokens to Use?, ICCVW 2023",
        url="https://arxiv.org/abs/2204.08680",
        year=2022,
        license="Apache-2.0",
        training_free=True,
        cons=(
            "The distance of all token pairs is needed, and a sort of them per token.",
            "Forgets sizes: the mean of a cluster of clusters is not the mean of their tokens.",
            "The scores help only after training.",
        ),
        official="adds random noise of 1e-6 to the densities; here equal densities fall back to the token order.",
    )
    trainable = True
    budget_names = (*Reducer.budget_names, "keep_rate")

    keep_rate: float | None = None
    k_neighbors: int = 5
    equal_weight: bool = False

    def __post_init__(self) -> None:
        check_share("dpc_knn", "keep_rate", self.keep_rate)
        k = self.k_neighbors
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ParameterError(f"dpc_knn: k_neighbors must be an int >= 1, got {k!r}.")
        super().__post_init__()

    @property
    def share(self) -> float | None:
        return None if self.keep_rate is None else float(self.keep_rate)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    def modules(self, build: Build) -> nn.Module | None:
        return None if self.equal_weight or build.after == build.before else Scorer(build.width)

    def official(self, stage: int) -> str:
        return f"cluster_layers.{stage}."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        prefix, x = state.prefix, signals.HIDDEN
        live = state.size[:, prefix:, 0] > 0 if state.padded and state.size is not None else None
        found = density.peaks(x.detach()[:, prefix:], state.items - r, self.k_neighbors, live)
        slots, assign = state.n - r, with_prefix(found.assign + prefix, prefix)
        module = signals.MODULE if "MODULE" in signals and not self.equal_weight else None
        weight = x.new_ones(x.shape[:2])
        if module is not None:
            weight = torch.cat((weight[:, :prefix], module(x[:, prefix:])), dim=1)
        if live is not None:
            weight = torch.cat((weight[:, :prefix], weight[:, prefix:] * live), dim=1)
        anchor = with_prefix(found.centers + prefix, prefix)
        if self.compat != "official":
            return TokenMap(assign, slots, weight=weight, anchor=anchor, form="complete")
        total = merging.segment_count(weight, assign, slots, complete=True) + _EPS
        share = weight / total.gather(1, assign)
        share = torch.cat((torch.ones_like(share[:, :prefix]), share[:, prefix:]), dim=1)
        return TokenMap(assign, slots, weight=share, mode="sum", anchor=anchor, form="complete")
