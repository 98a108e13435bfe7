"""Space-time ToMe: tokens of a video merge with their likes in other frames."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from visiontok.core.reducer import Card
from visiontok.core.signals import Signal, Signals, Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.core.visual import PromptReducer
from visiontok.ops import grids, matching
from visiontok.ops.ordering import stable_order

__all__ = ["FrameToMe"]


@dataclass(frozen=True)
class FrameToMe(PromptReducer):
    """ToMe's matching (arXiv:2210.09461) over the projected tokens of a whole video.

    Tokens of even frames merge into the most similar tokens of odd frames, anywhere in space and time; values are means
    weighted by size. Where the budget asks for more than one round can give, further rounds match every second of the
    remaining tokens with the others. Images, which are one frame, begin with those rounds. The number is exact, and a
    merged token stands where its destination stood.

    Args:
        positions: Default `original`: tokens keep their place in time.
        per: See `PromptReducer`.
    """

    name = "frame_tome"
    card = Card(
        title="Space-time token merging",
        summary="Merges similar video tokens across frames before the language model, weighted by size.",
        paper="Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023; here over the projected tokens of a video",
        url="https://arxiv.org/abs/2210.09461",
        year=2022,
        license="CC BY-NC 4.0",
        cons=(
            "Merged tokens mix moments, which blurs the order of fast events.",
            "Compares tokens of half of the frames with those of the other half.",
        ),
        official="none for this place: ToMe merges inside the encoder.",
    )
    site = Site.EMBED

    positions: str = field(default="original", kw_only=True)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal.HIDDEN, Signal.FRAMES)

    def decide(self, signals: Signals, state: TokenState, budget: int | None = None) -> TokenMap | None:
        removed = self.amount(budget, state)
        if removed == 0:
            return None
        frames, *_ = grids.frame_grid(state.items, signals.FRAMES, None)
        x, size, total = signals.HIDDEN, state.size, None
        place = torch.arange(state.items, device=state.device)
        odd = (place // (state.items // frames) if frames > 1 else place) % 2
        # Which tokens are in which half depends on shapes alone, so these lengths are static.
        half = state.items // frames * (-(-frames // 2)) if frames > 1 else -(-state.items // 2)
        order = stable_order(odd)
        a, b = order[:half], order[half:]
        while removed:
            r = min(removed, a.shape[0])
            match = matching.bipartite(matching.unit(x), a, b, r, ascending=True)
            length = a.shape[0] + b.shape[0]
            step = TokenMap.merge(match.src, match.dst, match.order.sort(dim=1).values)
            x, size = step.reduce(x, size), step.sizes(size, x.dtype)
            total = step if total is None else total.then(step)
            place = torch.arange(length - r, device=state.device)
            a, b, removed = place[::2], place[1::2], removed - r
        return total
