"""Towers: the handle on a model of which the visual and the text tower are patched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from visiontok.core.reduction import Reduction
from visiontok.errors import UnknownNameError

__all__ = ["Towers"]


class Towers(Mapping[str, Reduction]):
    """One `Reduction` per tower: `red["visual"].set(r=8)`, `red["text"].plan`."""

    def __init__(self, towers: Mapping[str, Reduction]) -> None:
        self._towers = dict(towers)

    def __getitem__(self, tower: str) -> Reduction:
        if tower not in self._towers:
            raise UnknownNameError(f"no tower {tower!r}; patched: {', '.join(self._towers)}.")
        return self._towers[tower]

    def __iter__(self) -> Iterator[str]:
        return iter(self._towers)

    def __len__(self) -> int:
        return len(self._towers)

    def unpatch(self) -> list[nn.Module]:
        """Restores every tower bit for bit and returns them."""
        return [reduction.unpatch() for reduction in self._towers.values()]

    def __str__(self) -> str:
        return "\n\n".join(f"{tower}: {reduction.plan}" for tower, reduction in self._towers.items())

    def __repr__(self) -> str:
        return f"Towers({self._towers!r})"
