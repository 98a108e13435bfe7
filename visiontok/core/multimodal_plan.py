"""What a patched multimodal language model does where: the plan, and the notes of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from visiontok.core.plan import Plan
from visiontok.core.schedule import Budget
from visiontok.core.signals import Site

__all__ = ["PROMPT", "MultimodalPlan", "Stop", "VisualTrace"]

PROMPT = (Site.POST, Site.EMBED)


class Stop(NamedTuple):
    """One reducer at one place after the vision tower.

    Attributes:
        reducer: Who decides.
        budget: Of each picture, or of each row of the cache.
        layer: Decoder layer; the tower's depth for sites before the decoder.
    """

    reducer: Any
    budget: Budget
    layer: int


class VisualTrace(NamedTuple):
    """What one place did with the visual tokens of the last traced forward.

    Attributes:
        site: Where.
        layer: Decoder layer, or the depth of the vision tower.
        kept: Per picture: at POST and EMBED (m,) the placeholder that each remaining token stands for; at LLM (m,)
            columns of the sequence before this place; at KV (rows, m) entries that stay, one row per key-value head.
        before: Visual tokens of each picture before.
    """

    site: Site
    layer: int
    kept: list[Tensor]
    before: list[int]


@dataclass(frozen=True)
class MultimodalPlan(Plan):
    """What was patched, for one image of the nominal size. Prints as a table.

    Attributes:
        tower: Plan of the vision tower, if something acts there.
        decoder: Layers of the language model.
    """

    tower: Plan | None = None
    decoder: int = 0

    @property
    def tokens(self) -> list[int]:
        """Visual tokens that each decoder layer computes on at prefill."""
        now, out = self.length - self.prefix, []
        if self.tower is not None:
            now = (self.tower.tokens[-2:-1] or self.tower.tokens)[0] - self.tower.prefix
        for layer in range(self.decoder):
            for point in self.points:
                if point.site in PROMPT or (point.site is Site.LLM and point.layer == layer):
                    now = point.after if point.site is Site.LLM or layer == 0 else now
            out.append(now)
        return out

    @property
    def removes(self) -> bool:
        """Whether any token is removed."""
        return super().removes or (self.tower is not None and self.tower.removes)

    def __str__(self) -> str:
        head = (
            f"{self.model} ({self.backbone}): {self.decoder} decoder layers, {self.length - self.prefix} visual tokens"
        )
        rows = [f"{'layer':>5}  {'site':<6} {'reducer':<14} {'budget':<12} {'tokens':<12} note"]
        points = [*(self.tower.points if self.tower else ()), *self.points]
        for p in points:
            change = f"{p.before} -> {p.after}"
            rows.append(f"{p.layer:>5}  {p.site!s:<6} {p.reducer.name:<14} {p.budget!s:<12} {change:<12} {p.skipped}")
        return "\n".join([head, *(row.rstrip() for row in rows)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        tower = None if self.tower is None else self.tower.to_dict()
        return {**super().to_dict(), "tower": tower, "decoder": self.decoder}
