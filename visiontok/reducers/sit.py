"""SiT: self-slimmed ViT. Between stages a small learned module writes the tokens anew as fewer mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.staged import Staged, check_share
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops.constants import wide_dtype

__all__ = ["SiT", "TokenSlimmingModule"]


class TokenSlimmingModule(nn.Module):
    """Mixing weights of K new tokens, predicted from the old ones (arXiv:2111.12624, section 3.2).

    K is fixed by the weights; the number of tokens that come in is free. Weights start as torch's linear layers do:
    with the authors' smaller ones (0.02) a narrow model's new tokens are copies of one another and hardly learn.

    Args:
        dim: C, channels of a token.
        K: Tokens that come out; may exceed those that come in.
        ratio: Hidden width over C.
    """

    def __init__(self, dim: int, K: int, ratio: float = 0.5) -> None:
        super().__init__()
        hidden = max(int(dim * ratio), 1)
        self.K = K
        self.weight = nn.Sequential(
            nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, K)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor, live: Tensor | None = None) -> Tensor:
        """(B, K, N) shares, each row summing to 1 over the tokens.

        Args:
            x: (B, N, C) tokens without the prefix.
            live: (B, N) bool, False for padding, which gets no share.
        """
        logits = self.weight(x.to(self.scale.dtype)) * self.scale
        logits = logits.to(wide_dtype(x.dtype))
        if live is not None:
            # Finite, so that a sample that is all padding stays free of NaN.
            logits = logits.masked_fill(~live.unsqueeze(-1), torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1).transpose(1, 2)


@dataclass(frozen=True)
class SiT(Staged):
    """Self-slimmed ViT (arXiv:2111.12624): after each stage but the last, learned weights mix all tokens into fewer.

    Stage i keeps `int(N0 * keeping_ratio**i)` of the N0 tokens that the model starts with, at least 1. The modules are
    random, and destroy the accuracy, until trained or loaded (`Reduction.load_learned`). Their counts are part of their
    weights: at another resolution than the nominal one each still returns its own K tokens, whatever comes in.

    Args:
        keeping_ratio: Share of tokens that each stage keeps of the one before, in (0, 1]. Official and default: 0.5.
            Other budgets (`r`, `keep`, `gflops`, `tokens`) act per stage end instead.
        stage_blocks: Blocks of each stage, as in the released models; must add up to the depth. Default: quarters.
        slim_ratio: Hidden width of the module over the model's; 0.5 in all released models.
    """

    name = "sit"
    card = Card(
        title="SiT, self-slimmed vision transformer",
        summary="After each stage a learned module mixes all patch tokens softly into half as many.",
        paper="Zong et al., Self-slimmed Vision Transformer, ECCV 2022",
        url="https://arxiv.org/abs/2111.12624",
        year=2022,
        license="Apache-2.0",
        training_free=False,
        cons=(
            "Needs training, best with feature recalibration (visiontok.training.frd).",
            "Adds parameters, whose shape fixes the token counts: another count needs another training.",
            "Tokens are mixtures of all tokens afterwards, so maps of kept tokens show only the largest share.",
        ),
        official="LV-ViT only (the paper also has DeiT); multiplies by a learned scale where the paper divides by a "
        "temperature; distillation from a CNN crashes, and so does a count that rounds to 0 tokens, here 1.",
    )
    trainable = True
    budget_names = (*Reducer.budget_names, "keeping_ratio")

    keeping_ratio: float | None = None
    stage_blocks: Any = None
    slim_ratio: float = 0.5

    def __post_init__(self) -> None:
        blocks = self.stage_blocks
        check_share("sit", "keeping_ratio", self.keeping_ratio)
        whole = isinstance(blocks, (list, tuple)) and all(type(count) is int and count > 0 for count in blocks)
        if blocks is not None and not (whole and blocks):
            raise ParameterError(f"sit: stage_blocks must list the blocks of each stage (ints >= 1), got {blocks!r}.")
        if (
            isinstance(self.slim_ratio, bool)
            or not isinstance(self.slim_ratio, (int, float))
            or not 0 < self.slim_ratio < 64
        ):
            raise ParameterError(
                f"sit: slim_ratio must be above 0 and below 64 (hidden width over C), got {self.slim_ratio!r}."
            )
        super().__post_init__()

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN,)

    @property
    def always(self) -> bool:  # type: ignore[override]
        # The trained weights fix the count, so a point acts also where a budget for this resolution would remove
        # nothing. A compute target is counted without the modules, which needs points that act by budget alone.
        return self.gflops is None

    @property
    def share(self) -> float | None:
        given = [value for value in (self.r, self.keep, self.gflops, self.tokens) if value is not None]
        return None if given else 0.5 if self.keeping_ratio is None else float(self.keeping_ratio)

    def layers(self, depth: int) -> Sequence[int]:
        if self.stage_blocks is None:
            return super().layers(depth)
        if sum(self.stage_blocks) != depth:
            total = sum(self.stage_blocks)
            raise ParameterError(f"sit: stage_blocks={self.stage_blocks!r} has {total} blocks, the model has {depth}.")
        return tuple(accumulate(self.stage_blocks))[:-1]

    def modules(self, build: Build) -> nn.Module | None:
        # A ratio may round to the same count twice in a small model; the released code has a module there too.
        if build.after == build.before and (self.share or 1.0) == 1.0:
            return None
        return TokenSlimmingModule(build.width, build.after, self.slim_ratio)

    def official(self, stage: int) -> str:
        return f"tsm.{stage}."

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        """See `Reducer.decide`. The count is that of `signals.MODULE`, whatever the budget."""
        amount = self.amount(budget, state)
        module = signals.MODULE if amount or "MODULE" in signals else None
        if module is None or state.items == 0:
            return None
        prefix, x = state.prefix, signals.HIDDEN
        live = state.size[:, prefix:, 0] > 0 if state.padded and state.size is not None else None
        shares = module(x[:, prefix:], live)
        alone = torch.eye(prefix, state.n, dtype=shares.dtype, device=shares.device).expand(state.batch, -1, -1)
        soft = torch.cat((alone, F.pad(shares, (prefix, 0))), dim=1)
        return TokenMap(soft.argmax(dim=1), soft.shape[1], soft=soft, anchor=soft.argmax(dim=2))
