"""What reducers need of a vision tower's attention, collected while the tower runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError, StateLostError
from visiontok.ops.constants import wide_dtype
from visiontok.ops.probing import key_votes, prefix_rows

__all__ = ["Layout", "Watch"]


class Layout(NamedTuple):
    """How a family's features come about.

    Attributes:
        tower: Path of the vision tower in the inner model.
        layers: Path of its layers in the tower.
        projector: Path of the projector in the inner model, where it works token by token; else None.
        form: `rows` (an image is a row of the tower), `crops` (thumbnail and crops with newlines), `shuffled` (2 x 2
            tokens of a row become one), `thw` (flat tokens of a time-height-width grid), or `list`.
    """

    tower: str
    layers: str
    projector: str | None
    form: str


class Watch:
    """Collects what reducers need of a tower's attention while it runs."""

    def __init__(self, tower: nn.Module, layout: Layout, taps: Sequence[int], needs: frozenset[str]) -> None:
        layers = tower.get_submodule(layout.layers)
        self._layer = {id(part): i for i, layer in enumerate(layers.children()) for part in layer.modules()}  # type: ignore[union-attr]
        self._taps, self._needs = tuple(taps), needs
        self._classes = _class_tokens(tower)
        self._pieces = layout.form == "thw"
        self._seen: dict[int, dict[str, Tensor]] = {}

    def see(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> None:
        """Called with the inputs of every attention of the tower."""
        layer = self._layer.get(id(module))
        if layer is None or layer not in self._taps:
            return
        if self._pieces:
            # One call per image, frame or window, in their order.
            share = query.new_full(query.shape[:3], 1 / query.shape[2], dtype=wide_dtype(query.dtype))
            piece = key_votes(query, key, scale, None, share)
            before = self._seen.get(layer)
            self._seen[layer] = {
                "ATTN_PREFIX": piece if before is None else torch.cat((before["ATTN_PREFIX"], piece), 2)
            }
            return
        found = self._seen[layer] = {}
        # Scores carry no gradient; nor may checkpointing, which does not look again, miss what they would save.
        query, key = query.detach(), key.detach()
        if "ATTN_PREFIX" in self._needs:
            found["ATTN_PREFIX"] = self._rows(query, key, mask, scale)
        if "QUERY_PREFIX" in self._needs and self._classes:
            found["QUERY_PREFIX"] = query[:, :, :1].to(wide_dtype(query.dtype)) * scale
        if "KEY" in self._needs:
            found["KEY"] = key

    def _rows(self, query: Tensor, key: Tensor, mask: Any, scale: float) -> Tensor:
        bias = mask if isinstance(mask, Tensor) and mask.is_floating_point() else None
        if self._classes:
            return prefix_rows(query, key, 1, scale, bias)
        share = query.new_full(query.shape[:3], 1 / query.shape[2], dtype=wide_dtype(query.dtype))
        return key_votes(query, key, scale, bias, share).unsqueeze(2)

    def offers(self, state: TokenState | None) -> dict[str, Callable[[], Tensor]]:
        """What was collected, stacked over the layers.

        Args:
            state: What the tower did with the tokens that the features stand for.

        Raises:
            StateLostError: A layer was not seen.
        """
        missing = [layer for layer in self._taps if layer not in self._seen]
        if missing:
            raise StateLostError(
                f"the attention of layers {missing} of the vision tower was not seen. Its attention implementation was "
                "changed after patching; unpatch, change it, and patch again."
            )
        names = set.intersection(*(set(found) for found in self._seen.values()))
        return {name: (lambda name=name: self._stacked(name, state)) for name in names}

    def _stacked(self, name: str, state: Any) -> Tensor:
        layers = [self._seen[layer][name] for layer in sorted(self._seen)]
        if state is not None and state.trail and name == "ATTN_PREFIX":
            layers = [_moved(row, layer, state) for row, layer in zip(layers, sorted(self._seen))]
        if len({tuple(layer.shape) for layer in layers}) > 1:
            raise IncompatibleError(f"{name} of several layers is not available where the vision tower merges tokens.")
        return torch.stack(layers, dim=1)


def _moved(row: Tensor, layer: int, state: Any) -> Tensor:
    """(S, H, 1, N) of a layer, summed over the tokens that became one since."""
    done = len(state.marks[layer - 1]) if layer else 0
    for moved in state.trail[done:]:
        slots = int(moved.assign.shape[1])
        row = row[..., :slots]
        spare = torch.where(moved.assign < 0, slots, moved.assign)[:, None, None].expand(row.shape)
        row = row.new_zeros(*row.shape[:-1], slots + 1).scatter_add(-1, spare, row)[..., :slots]
    return row[..., : state.n]


def _class_tokens(tower: nn.Module) -> int:
    names = ("class_embedding", "cls_token", "class_token")
    return int(any(name.rpartition(".")[2] in names for name, _ in tower.named_parameters()))
