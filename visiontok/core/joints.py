"""Carrying out a map in one kernel, with the residual sum before it and the norm after it where a block has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from visiontok.core.tokens import TokenMap
from visiontok.ops import fusing, merging
from visiontok.ops.constants import arange_row

__all__ = ["Joint", "Merged", "Seam", "merged"]

# Forwards that do nothing but scale per channel, and the name of the factor.
_SCALES = {
    "timm.layers.layer_scale.LayerScale.forward": "gamma",
    "timm.models.vision_transformer.LayerScale.forward": "gamma",
    "open_clip.transformer.LayerScale.forward": "gamma",
    "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale.forward": "lambda1",
}
# Forwards that are F.layer_norm.
_NORMS = (
    "torch.nn.modules.normalization.LayerNorm.forward",
    "timm.layers.norm.LayerNorm.forward",
    "open_clip.transformer.LayerNorm.forward",
)


class Merged(NamedTuple):
    """What `merged` gives.

    Attributes:
        x: (B, K, C) values of the slots.
        size: (B, K, 1) sizes, or None for all ones.
        normed: (B, K, C) normed values, or None.
    """

    x: Tensor
    size: Tensor | None
    normed: Tensor | None


def merged(
    tm: TokenMap, x: Tensor, size: Tensor | None, kernel: fusing.Kernel | None, *, y: Tensor | None = None,
    gamma: Tensor | None = None, norm: fusing.Norm | None = None,
) -> Merged | None:  # fmt: skip
    """Values and sizes of the slots of the tokens `x + gamma * y`, and the values normed, by one kernel.

    Args:
        tm: The map.
        x: (B, N, C).
        size: (B, N, 1) token sizes, or None for all ones.
        kernel: The answer of `fusing.kernel(x)`.
        y: (B, N, C) a branch to add first.
        gamma: (C,) its scale.
        norm: Layer norm to apply to the values.

    Returns:
        None where no kernel does it: none for this device or dtype, soft maps, counts per image, gradients of more than
        a plain merge.
    """
    if kernel is None or tm.soft is not None or tm.counts is not None or tm.form == "identity":
        return None
    flat = None if size is None else size.squeeze(-1)
    parts = (x, y, gamma, tm.weight, tm.mass, size, *(norm or ())[:2])
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        simple = tm.form == "complete" and tm.mode == "mean" and tm.weight is tm.mass is None
        if not simple or y is not None or norm is not None or (size is not None and size.requires_grad):
            return None
        out, new_size = fusing.merge_with_gradient(x, tm.groups, tm.assign, flat)
        return Merged(out, new_size.unsqueeze(-1), None)
    alone = tm.form == "select" and tm.mode != "sum"
    made = fusing.merge(
        x,
        _picks(tm) if alone else tm.groups,
        kernel,
        y=y,
        gamma=gamma,
        weight=flat if tm.weight is None else tm.weight,
        size=flat if tm.mass is None else tm.mass,
        # A maximum over one token copies it whatever its size; a mean would lose padding of size 0.
        mode="amax" if alone else tm.mode,
        norm=norm,
    )
    sized = tm.form != "select" or size is not None or tm.mass is not None
    return Merged(made.out, made.size.unsqueeze(-1) if sized else None, made.normed)


def _picks(tm: TokenMap) -> merging.Groups:
    # Slots of one token each; what stands behind them is never read.
    kept = F.pad(tm.kept, (0, tm.assign.shape[1] - tm.K)).int()
    bounds = arange_row(0, tm.K + 1, kept.device).int()
    return merging.Groups(bounds.expand(kept.shape[0], -1).contiguous(), kept)


class Joint(NamedTuple):
    """The seam between attention and MLP of a block: `x + settle(y)`, a reduction, `norm`.

    Attributes:
        settle: What the block does to the output of its attention before adding it: layer scale, dropped paths.
        norm: The module that the sum goes through next.
        scale: The layer scale inside `settle`: a module, a (C,) parameter, or None.
        plain: Whether `settle` is nothing but that scale now: no path is dropped, no dropout.
    """

    settle: Callable[[Tensor], Tensor]
    norm: Any
    scale: Any = None
    plain: bool = True

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, fusing.Norm] | None:
        """(gamma, norm) if the seam is one of plain scale and plain layer norm that a kernel may replace, else None."""
        if not self.plain or (x.dtype != y.dtype and torch.promote_types(x.dtype, y.dtype) != x.dtype):
            return None
        gamma, norm = None, self.norm
        if isinstance(self.scale, Tensor):
            gamma = self.scale
        elif self.scale is not None and type(self.scale) is not nn.Identity:
            name = _SCALES.get(_forward(self.scale))
            if name is None or _hooked(self.scale):
                return None
            gamma = getattr(self.scale, name)
        if _forward(norm) not in _NORMS or getattr(norm, "_fast_norm", False) or _hooked(norm):
            return None
        weight = norm.weight
        if norm.normalized_shape != (x.shape[-1],) or (weight is not None and weight.dtype != x.dtype):
            return None
        return gamma, fusing.Norm(weight, norm.bias, norm.eps)


class Seam:
    """The sum at a joint before it is formed, so that a kernel may form it, reduce it and norm it in one pass.

    Args:
        x: (B, N, C) the block's input.
        y: (B, N, C) output of its attention.
        joint: How the block joins them.
        kernel: The answer of `fusing.kernel(x)`.

    Attributes:
        normed: (B, K, C) the result of the joint's norm, if the kernel made it.
    """

    def __init__(self, x: Tensor, y: Tensor, joint: Joint, kernel: fusing.Kernel) -> None:
        self.x, self._y, self._joint, self._kernel = x, y, joint, kernel
        self._hidden: Tensor | None = None
        self.normed: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, N, C) the sum, formed when first read."""
        if self._hidden is None:
            self._hidden = self.x + self._joint.settle(self._y)
        return self._hidden

    def merged(self, tm: TokenMap, size: Tensor | None) -> Merged | None:
        """`merged` of the sum, with the norm; None where this seam or this map has no kernel."""
        parts = self._joint.parts(self.x, self._y)
        if parts is None:
            return None
        (gamma, norm), formed = parts, self._hidden
        if formed is None:
            made = merged(tm, self.x, size, self._kernel, y=self._y, gamma=gamma, norm=norm)
        else:
            made = merged(tm, formed, size, self._kernel, norm=norm)
        self.normed = None if made is None else made.normed
        return made


def _forward(module: nn.Module) -> str:
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}"


def _hooked(module: nn.Module) -> bool:
    if "forward" in vars(module):
        # Offloading and tracing tools put a forward of their own on the instance.
        return True
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _hooks._global_forward_hooks or _hooks._global_forward_pre_hooks)
