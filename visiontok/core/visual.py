"""Reducers of multimodal language models: of the prompt's visual tokens, of a decoder layer's, and of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from visiontok.core.reducer import Reducer, Where
from visiontok.core.signals import Site
from visiontok.core.state import TokenState
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError
from visiontok.ops.ordering import stable_order

__all__ = ["CacheReducer", "Crops", "DecoderReducer", "PromptReducer", "Text", "keep_top"]


class Crops(NamedTuple):
    """How one image was cut: rows of a decision are the thumbnail, if there is one, then the crops row by row.

    Attributes:
        rows, columns: Crops from top to bottom and from left to right; 0 for an image without crops.
        side: (h, w) tokens of each crop and of the thumbnail.
        image_size: (H, W) of the original image in pixels.
        newline: Whether the language model reads a newline token after every row of the crops.
    """

    rows: int
    columns: int
    side: tuple[int, int]
    image_size: tuple[int, int]
    newline: bool = True

    @property
    def number(self) -> int:
        """How many crops, thumbnail not included."""
        return self.rows * self.columns


class Text(NamedTuple):
    """The text that goes with the items of a decision.

    Attributes:
        tokens: (R, T, C) vectors in the space of HIDDEN, zero where `live` is False.
        live: (R, T) bool.
    """

    tokens: Tensor
    live: Tensor


@dataclass(frozen=True)
class PromptReducer(Reducer):
    """Base of methods that reduce visual tokens before the language model.

    `decide` sees one row per image or crop. At site POST the tokens are those of the vision tower with its class token
    (`state.prefix`), at EMBED those of the projector. The class token has no place in the prompt: maps drop it (-1)
    unless the method sends it to the language model.

    Args:
        positions: What positions the language model sees: `compact` renumbers the shortened prompt from 0, `original`
            keeps those of the full prompt.
        per: What an absolute budget counts: `image` (spread over the crops of an image in proportion to their tokens,
            exactly) or `crop`. Shares are the same either way.
    """

    site: ClassVar[Site] = Site.POST
    position_rules: ClassVar[tuple[str, ...]] = ("compact", "original")

    positions: str = field(default="compact", kw_only=True)
    per: str = field(default="image", kw_only=True)

    def __post_init__(self) -> None:
        if self.per not in ("image", "crop"):
            raise ParameterError(f"{self.name}: per must be 'image' or 'crop', got {self.per!r}.")
        super().__post_init__()

    @property
    def padded(self) -> bool:
        """Whether the rows of an image's crops that only pad it keep their newlines in the prompt."""
        return False

    def taps(self, depth: int) -> tuple[int, ...]:
        """Layers of the vision tower, ascending, whose attention is stacked in ATTN_PREFIX, QUERY_PREFIX and KEY.

        Args:
            depth: Layers of the tower.
        """
        return ()

    def span(self, depth: int) -> range:
        return range(depth, depth + 1)

    def amount(self, budget: int | None, state: TokenState) -> int:
        if budget is not None:
            return super().amount(budget, state)
        (own,) = self.budgets(state.depth).values()
        return self.removed(state.items, own, Where(state.depth, state.depth, start=state.items), state.prefix)


@dataclass(frozen=True)
class DecoderReducer(Reducer):
    """Base of methods that drop visual tokens inside the language model during prefill (site LLM).

    `decide` sees one row per image; text is outside. Layer k means: before decoder layer k, with the attention of layer
    k - 1 (`look = "behind"`) or of layer k itself (`look = "ahead"`).

    Args:
        positions: What positions the remaining tokens have in later layers: `original` or `compact` (renumbered from 0
            after every reduction).
    """

    site: ClassVar[Site] = Site.LLM
    position_rules: ClassVar[tuple[str, ...]] = ("compact", "original")

    positions: str = field(default="original", kw_only=True)

    def span(self, depth: int) -> range:
        return range(1, depth)


@dataclass(frozen=True)
class CacheReducer(Reducer):
    """Base of methods that evict entries of the KV cache after prefill (site KV).

    `decide` sees one row per sample and key-value head, and is asked once per layer. Where `revives` is set it is asked
    again with every new token, and what it leaves out is hidden until then instead of being evicted.

    Args:
        positions: `original`: cached keys and later tokens keep the positions that they had; `compact`: later tokens
            count from the length of their layer's cache.
        over: Which entries may go: `visual` tokens (text stays) or `all`.
    """

    site: ClassVar[Site] = Site.KV
    revives: ClassVar[bool] = False
    position_rules: ClassVar[tuple[str, ...]] = ("compact", "original")

    positions: str = field(default="original", kw_only=True)
    over: str = field(default="visual", kw_only=True)

    def __post_init__(self) -> None:
        if self.over not in ("visual", "all"):
            raise ParameterError(f"{self.name}: over must be 'visual' or 'all', got {self.over!r}.")
        super().__post_init__()

    def span(self, depth: int) -> range:
        return range(depth)


def keep_top(score: Tensor, count: int, state: TokenState, **extra: Any) -> TokenMap:
    """Keeps the `count` best tokens of each row in raster order, and drops the prefix.

    Args:
        score: (R, n) of the non-prefix tokens; among equals the lower index wins.
        count: Tokens to keep.
        state: Of the rows; `state.n` is n plus the prefix.
        **extra: Further fields of the map.
    """
    best = stable_order(score, descending=True)[:, :count].sort(dim=1).values
    return TokenMap.keep(best + state.prefix, state.n, **extra)
