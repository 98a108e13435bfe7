"""vid-TLDR: tokens merge as in ToMe, weighted by how sharply they attend; background vanishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontok.core.reducer import Card, Reducer
from visiontok.core.signals import Signal, Signals
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.ops import matching

__all__ = ["VidTLDR", "saliency"]


@dataclass(frozen=True)
class VidTLDR(Reducer):
    """Training-free token merging for light-weight video transformers (arXiv:2403.13347).

    A token is salient if its attention, averaged over heads, is sharp (low entropy). The r best matches of ToMe's
    split, on hidden states, merge; a source counts by its saliency times its size, in value and in size, and not at
    all if it is less salient than the mean, so background is dropped by being merged with weight zero.

    Args:
        r: Tokens merged per point; one number acts in the first quarter of the blocks.
    """

    name = "vid_tldr"
    card = Card(
        title="vid-TLDR",
        summary="Merges similar tokens in the first blocks; background sources, told by blurred attention, count zero.",
        paper="Choi et al., vid-TLDR: Training Free Token merging for Light-weight Video Transformer, CVPR 2024",
        url="https://arxiv.org/abs/2403.13347",
        year=2024,
        license="MIT",
        cons=(
            "Reads every attention row: the map is computed once more, in strips of rows.",
            "Sizes are no longer counts, since a source adds only its saliency.",
            "At most half of the patch tokens can merge in one block.",
        ),
        official="made for video encoders without a class token; here all prefix tokens stay and are left out of the "
        "saliency. Its r per layer is a list such as [600, 200, 100] for 1568 tokens.",
    )

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal.HIDDEN, Signal.ATTN_VOTE

    @property
    def proportional(self) -> bool:
        return True

    def layers(self, depth: int) -> Sequence[int]:
        return range(max(depth // 4, 1))

    def limit(self, n: int) -> int:
        return n // 2

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        r = self.amount(budget, state)
        if r == 0:
            return None
        prefix, rows = state.prefix, matching.unit(signals.HIDDEN.detach())
        place = torch.arange(state.n, device=rows.device)
        a, b = place[prefix + prefix % 2 :: 2], place[matching.first_odd(prefix) :: 2]
        found = matching.bipartite(rows, a, b, r, ascending=True)
        size = rows.new_ones(rows.shape[0], state.n) if state.size is None else state.size[..., 0].to(rows.dtype)
        # The host adds log sizes to its attention; sharpness is that of the attention without them.
        sizes = size if state.proportional and state.size is not None else None
        value = saliency(signals.ATTN_VOTE.mean_entropy(sizes).detach()[:, prefix:])
        share = value.gather(1, found.src - prefix) * size.gather(1, found.src)
        share = size.scatter(1, found.src, share)
        return TokenMap.merge(found.src, found.dst, found.order, prefix, weight=share, mass=share)


def saliency(entropy: Tensor) -> Tensor:
    """Sharpness of attention, scaled to [0, 1]; zero for tokens below the mean (background).

    Args:
        entropy: (B, n) of the attention rows.
    """
    tiny = torch.finfo(entropy.dtype).tiny
    sharp = entropy.amax(dim=1, keepdim=True) - entropy
    sharp = sharp / sharp.amax(dim=1, keepdim=True).clamp_min(tiny)
    above = (sharp - sharp.mean(dim=1, keepdim=True)).clamp_min(0)
    return above / above.amax(dim=1, keepdim=True).clamp_min(tiny)
