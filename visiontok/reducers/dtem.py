"""DTEM: ToMe by an embedding of its own, learned through a relaxed choice of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.reducer import Build, Card
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops import matching
from visiontok.reducers.tome import MetricHead, ToMe, even_odd_map

__all__ = ["DTEM"]


@dataclass(frozen=True)
class DTEM(ToMe):
    """Decoupled Token Embedding for Merging: a small head per block says which tokens are alike.

    NeurIPS 2024, https://openreview.net/forum?id=pVPyCgXv57.

    It is ToMe with the head's output as metric. Where gradients are recorded the values are the same, and gradients
    reach the head as if r pairs were drawn one after another by softmax (each token's `k2` best partners, temperatures
    `tau1` and `tau2`), the relaxation of the paper; they never pass from the head into the model.

    Args:
        r: Tokens merged per block.
        feat_dim: Channels of the metric; None is the size of one attention head, of two from width 1024 on.
        k2: Partners per token that take part in the relaxation.
        tau1: Temperature of similarities.
        tau2: Temperature of the softmax over pairs.
        prop_attn: Whether attention adds log(size) to the keys. Official: True, False for MAE in evaluation.

    Raises:
        ParameterError: A value outside its range.
    """

    name = "dtem"
    card = Card(
        title="Decoupled Token Embedding for Merging",
        summary="ToMe whose metric is a small learned head per block instead of the attention keys.",
        paper="Lee and Hong, Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers, "
        "NeurIPS 2024",
        url="https://openreview.net/forum?id=pVPyCgXv57",
        year=2024,
        license="none given",
        training_free=False,
        cons=(
            "Useless before its heads are trained, which leaves the model itself untouched.",
            "At most half of the patch tokens can merge in one block.",
            "The gradient is inherently sequential: one softmax per merged token, where gradients are recorded.",
        ),
        official="its head reads the normed input of the attention, fused into the qkv layer; here the layer-normed "
        "token at the merge, so its checkpoints do not fit. In training it keeps all tokens with soft weights; here "
        "the merge is hard and only the gradient is soft (straight-through).",
    )
    trainable = True

    metric: str = field(default="learned", kw_only=True)
    feat_dim: int | None = None
    k2: int = 3
    tau1: float = 0.1
    tau2: float = 0.1

    def __post_init__(self) -> None:
        if self.metric != "learned":
            raise ParameterError(f"dtem: metric must be 'learned', got {self.metric!r}; use tome for the others.")
        for name in ("feat_dim", "k2"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ParameterError(f"dtem: {name} must be an int >= 1, got {value!r}.")
        for name in ("tau1", "tau2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ParameterError(f"dtem: {name} must be a number > 0, got {value!r}.")
        super().__post_init__()

    def modules(self, build: Build) -> nn.Module | None:
        return MetricHead.of(build, self.feat_dim)

    def official(self, stage: int) -> str:
        return ""

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        metric = signals.MODULE(signals.HIDDEN.detach())
        hard = even_odd_map(metric.detach().unsqueeze(1), r, state)
        # Not so without gradients or with a frozen head: then the map is ToMe's, and as fast.
        return self.relaxed(hard, metric, state) if metric.requires_grad else hard

    def relaxed(self, hard: TokenMap, metric: Tensor, state: TokenState) -> TokenMap:
        """The same map with the gradient of pairs that are drawn softly."""
        size = metric.new_ones(state.batch, state.n) if state.size is None else state.size.squeeze(-1).to(metric.dtype)
        even = torch.arange(state.prefix + state.prefix % 2, state.n, 2, device=state.device)
        odd = torch.arange(matching.first_odd(state.prefix), state.n, 2, device=state.device)
        drawn = self.drawn(metric[:, even], metric[:, odd], state.n - hard.K)
        slots = torch.arange(hard.K, device=state.device)
        share = (hard.assign.unsqueeze(1) == slots.unsqueeze(1)).to(metric.dtype)
        # Zero in value. The odd tokens have the last slots, in order.
        pull = metric.new_zeros(state.batch, odd.shape[0], state.n)
        pull = pull.index_copy(2, even, (drawn - drawn.detach()).transpose(1, 2))
        pull = F.pad(pull, (0, 0, hard.K - odd.shape[0], 0))
        weight = (share + pull) * size.unsqueeze(1)
        soft = weight / weight.sum(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return TokenMap(hard.assign, hard.K, soft=soft, mass=size, anchor=hard.kept)

    def drawn(self, even: Tensor, odd: Tensor, r: int) -> Tensor:
        """(B, Ne, No) how much of each even token joins each odd one when r pairs are drawn softly.

        Args:
            even: (B, Ne, d) metric of the tokens that may leave.
            odd: (B, No, d) metric of the tokens that may receive.
            r: Pairs to draw.
        """
        cosine = matching.unit(even) @ matching.unit(odd).transpose(1, 2)
        near = cosine.topk(min(self.k2, cosine.shape[2]), dim=2)
        logits = near.values / self.tau1
        total = torch.zeros_like(logits)
        for _ in range(r):
            chance = (logits.flatten(1) / self.tau2).softmax(dim=1).view_as(logits)
            total = total + chance
            # A token that has left is unlikely to be drawn again.
            left = (1 - chance.sum(dim=2, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
            logits = logits + left.log()
        # No token gives more than all of itself; the bound takes no part in the gradient.
        total = total / total.sum(dim=2, keepdim=True).detach().clamp_min(1.0)
        return torch.zeros_like(cosine).scatter_add(2, near.indices, total)
