"""The free-slice oracle: the token schedule of a reduction at no cost, the fastest that the reduction could be.

It keeps the first K tokens as a view: no matching, no size bias, no gather. What it computes
is meaningless; its time is the bound that `E_method = S / S_oracle` compares with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visiontok.errors import IncompatibleError, ParameterError

SITES = ("MID", "PRE")


class _Sliced:
    """Mixin of a block that keeps the first `_keep` tokens: after the attention residual, or at its end."""

    _keep: int
    _inside: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self._attend(x)
        if self._inside:
            x = x[:, : self._keep]
        x = x + self._feed(x)
        return x if self._inside else x[:, : self._keep]


class _PreNorm(_Sliced):
    """timm's `Block`."""

    def _attend(self: Any, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def _feed(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _PostNorm(_Sliced):
    """timm's `ResPostBlock`."""

    def _attend(self: Any, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(x)))

    def _feed(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


_ANATOMY = {"Block": _PreNorm, "ResPostBlock": _PostNorm}
_TIMM_VIT = "timm.models.vision_transformer"


def oracle(model: nn.Module, tokens: Sequence[int], site: str = "MID") -> nn.Module:
    """A copy of a model, sharing its parameters, that slices its tokens to a given schedule.

    Args:
        model: an unpatched timm ViT.
        tokens: tokens after each block, prefix included, as `Reduction.tokens` lists them.
        site: `MID`, slice between attention and MLP, or `PRE`, slice between blocks.

    Returns:
        The copy; `model` itself is left alone.

    Raises:
        IncompatibleError: a block is of a kind that the oracle does not know.
        ParameterError: `tokens` has another length than the model has blocks, or `site` is unknown.
    """
    if site not in SITES:
        raise ParameterError(f"the oracle slices at {' or '.join(SITES)}, not at '{site}'")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential):
        raise IncompatibleError(
            f"{type(model).__name__} has no `blocks` in a Sequential; the oracle runs those of timm's VisionTransformer"
        )
    if len(tokens) != len(blocks):
        raise ParameterError(f"{len(tokens)} token counts were given for {len(blocks)} blocks")
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    sliced: list[Any] = list(twin.get_submodule("blocks").children())
    for index, (block, keep) in enumerate(zip(sliced, tokens)):
        kind = type(block)
        if kind.__module__ != _TIMM_VIT or kind.__name__ not in _ANATOMY:
            raise IncompatibleError(
                f"blocks.{index} is {kind.__module__}.{kind.__name__}; the oracle knows {', '.join(_ANATOMY)} of timm"
            )
        block.__class__ = type(f"Sliced{kind.__name__}", (_ANATOMY[kind.__name__], kind), {})
        block._keep, block._inside = int(keep), site == "MID"
    return twin
