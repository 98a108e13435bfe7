"""One-D-Piece (arXiv:2501.10064): TiTok's two-stage model trained for 1 to 256 tokens by dropping the tail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from visiontok.tokenizers.titok import TiTok

__all__ = ["OneDPiece"]


class OneDPiece(TiTok):
    """One-D-Piece of any size.

    All tokens come out of one pass, so fewer cost the encoder nothing less; the decoder computes only those it gets.

    Args:
        config: As of `TiTok`.
    """

    name: ClassVar[str] = "one_d_piece"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.shortest = 1
