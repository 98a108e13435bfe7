"""Keyformer: H2O with Gumbel noise in the scores, which makes up for what eviction takes from the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontok.core.reducer import Card
from visiontok.core.signals import Signals
from visiontok.core.state import TokenState
from visiontok.errors import ParameterError
from visiontok.ops.hashing import gumbel, mixed
from visiontok.reducers.h2o import Recent

__all__ = ["Keyformer"]


@dataclass(frozen=True)
class Keyformer(Recent):
    """Keyformer (arXiv:2403.09054), once after prefill and for each key-value head by itself.

    Gumbel noise is added to the attention logits before a softmax with temperature `tau_init`; an entry's score is what
    it receives so from all queries. The most recent entries stay, and of the others the best.

    The noise is a hash of (seed, layer, query head, query, key), positions counted from the prompt's end: the same on
    every device, for every batch split and for any padding on the left. Samples share it.

    Args:
        kv_cache: Per cent of the entries that stay (rounded down); 60 where no other budget is given.
        recent: Per cent of those that are the most recent entries (rounded down).
        tau_init: Temperature of the scores. The released code adds 0.01 per decoded token; eviction happens before any.
        seed: Any int.
        over: `visual` or `all`.

    Raises:
        ParameterError: A percentage, the temperature or the seed is out of range.
    """

    name = "keyformer"
    card = Card(
        title="Keyformer",
        summary="Evicts the cache entries with the lowest Gumbel-softmax scores; the most recent ones stay.",
        paper="Adnan et al., Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative "
        "Inference, MLSys 2024",
        url="https://arxiv.org/abs/2403.09054",
        year=2024,
        license="Apache-2.0",
        cons=(
            "Random: another seed keeps other entries.",
            "Made for text: over visual tokens the text stays whole, and the recent window falls on the image's end.",
            "Saves cache memory; prefill costs more than with h2o, and decoding hardly gets faster.",
        ),
        official="batch 1, unseeded noise for every head, discards again at every decoded token with a growing "
        "temperature, and masks instead of evicting; GPT-J, MPT and GPT-2 only. Percentages are of the prompt there.",
    )
    stochastic = True
    budget_names = (*Recent.budget_names, "kv_cache")

    kv_cache: float | None = None
    recent: float = 30.0
    tau_init: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        if self.kv_cache is not None and not (number(self.kv_cache) and 0 < self.kv_cache <= 100):
            raise ParameterError(f"{self.name}: kv_cache must be in (0, 100] (per cent), got {self.kv_cache!r}.")
        if not (number(self.recent) and 0 <= self.recent <= 100):
            raise ParameterError(f"{self.name}: recent must be in [0, 100] (per cent), got {self.recent!r}.")
        if not (number(self.tau_init) and self.tau_init > 0):
            raise ParameterError(f"{self.name}: tau_init must be above 0, got {self.tau_init!r}.")
        super().__post_init__()

    @property
    def own(self) -> bool:
        return self.kv_cache is not None or super().own

    def parted(self, n: int) -> tuple[int, int]:
        count = int(n * (60.0 if self.kv_cache is None else self.kv_cache) / 100)
        return count - int(count * self.recent / 100), int(count * self.recent / 100)

    def window(self, count: int, n: int) -> int:
        return int(count * self.recent / 100)

    def score(self, signals: Signals, state: TokenState) -> Tensor:
        start = (self.seed * 1_000_003 + state.layer * 7_919) % 2**31

        def perturb(logits: Tensor, rows: Tensor) -> Tensor:
            # (B, H, q, L): counted from the end, where prompts of different lengths are aligned.
            heads, keys = logits.shape[1], logits.shape[3]
            head = mixed(torch.arange(heads, device=rows.device) + start)[:, None]
            query = mixed(head + (keys - 1 - rows)).unsqueeze(-1)
            key = mixed(query + torch.arange(keys - 1, -1, -1, device=rows.device))
            return (logits + gumbel(key)) / self.tau_init

        return signals.ATTN_SUM.sum(perturb)
