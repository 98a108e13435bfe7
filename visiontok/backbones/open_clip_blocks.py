"""Blocks, attentions and stacks of open_clip's transformers, as its visual and text towers share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visiontok.backbones import mha
from visiontok.core.backbone import Block, Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, carry_state
from visiontok.core.signals import Offers
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.attending import attend

__all__ = [
    "MODULE",
    "CustomBlock",
    "PatchedBlock",
    "PatchedStack",
    "ResidualBlock",
    "blocks_of",
    "check_stack",
    "hint",
    "hint_of",
    "is_own",
    "is_residual",
    "swaps_of",
]

MODULE = "open_clip.transformer"
_HINT = "_visiontok_hint"
_RESIDUAL = f"{MODULE}.ResidualAttentionBlock"
_CUSTOM = f"{MODULE}.CustomResidualAttentionBlock"
_ATTENTION = f"{MODULE}.Attention"
_STACKS = (f"{MODULE}.Transformer", f"{MODULE}.CustomTransformer")


def hint(x: Tensor, value: Any) -> Tensor:
    """Lets the model tell its stack or blocks something about this input; `value` None says nothing."""
    if value is not None:
        setattr(x, _HINT, value)
    return x


def hint_of(x: Tensor) -> Any:
    """What the model said about this input, or None."""
    return getattr(x, _HINT, None)


def _turned(x: Tensor) -> Tensor:
    return hint(carry_state(x, x.transpose(0, 1)), hint_of(x))


class PatchedAttention:
    """open_clip's own attention, which when given a tap leaves its q, k, v there and adds any bias."""

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        tap: Tap | None = None,
        bias: Tensor | None = None,
        look: bool = False,
    ) -> Tensor:
        if tap is None:
            return super().forward(x, attn_mask=attn_mask)  # type: ignore[misc]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.logit_scale is None:
            q, k = self.ln_q(q), self.ln_k(k)
        else:
            sharp = self.logit_scale.clamp(max=self.logit_scale_max).exp()
            q, k = F.normalize(q, dim=-1) * sharp, F.normalize(k, dim=-1)
        tap.q, tap.k, tap.v = q, k, v
        if look:
            return x
        dropout = self.attn_drop.p if self.training else 0.0
        y = attend(q, k, v, bias, scale=_scale(self), dropout_p=dropout)
        if self.head_scale is not None:
            y = y * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(y.transpose(1, 2).flatten(2))))


def _scale(attn: Any) -> float:
    # Cosine attention has its factor in the queries.
    return 1.0 if getattr(attn, "logit_scale", None) is not None else attn.head_dim**-0.5


class PatchedBlock:
    """A block with a reduction point between attention and MLP."""

    _visiontok: Stage
    _visiontok_attend: Callable[[Tensor, Tap, Tensor | None], Tensor]
    _visiontok_project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def _visiontok_bias(self: Any, state: TokenState, dtype: torch.dtype) -> Tensor | None:
        return state.key_bias(dtype)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        bias = self._visiontok_bias(state, torch.float32)
        return offers_ahead(lambda: self._visiontok_project(self.ln_1(x)), _scale(self.attn), bias, state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        tap, h = Tap(), self.ln_1(x)
        bias = self._visiontok_bias(state, bias_dtype(h, attends=True))
        y = self._visiontok_attend(h, tap, bias)
        offered = tap.offers(_scale(self.attn), bias, state.prefix)
        joint = Joint(self.ls_1, self.ln_2, self.ls_1)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = x + self.ls_2(self.mlp(normed))
        return x, after, offered


class ResidualBlock(PatchedBlock):
    """With torch's attention; `_visiontok_pass(x, host, mask, given)` says what happens to (B, N, C) tokens."""

    def forward(
        self: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        host = super().forward  # type: ignore[misc]
        given = "k_x" if k_x is not None else "v_x" if v_x is not None else None
        if self.attn.batch_first:
            return self._visiontok_pass(q_x, lambda x: host(x, k_x, v_x, attn_mask), attn_mask, given)
        call = lambda x: host(x.transpose(0, 1), k_x, v_x, attn_mask).transpose(0, 1)  # noqa: E731
        return _turned(self._visiontok_pass(_turned(q_x), call, attn_mask, given))

    def _visiontok_attend(self: Any, h: Tensor, tap: Tap, bias: Tensor | None) -> Tensor:
        return mha.attend(self.attn, h, tap, bias)

    def _visiontok_project(self: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mha.project(self.attn, h)


class CustomBlock(PatchedBlock):
    """With open_clip's own attention."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        host = super().forward  # type: ignore[misc]
        return self._visiontok_pass(x, lambda x: host(x, attn_mask), attn_mask, None)

    def _visiontok_attend(self: Any, h: Tensor, tap: Tap, bias: Tensor | None) -> Tensor:
        return self.ln_attn(self.attn(h, tap=tap, bias=bias))

    def _visiontok_project(self: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tap = Tap()
        self.attn(h, tap=tap, look=True)
        return tap.q, tap.k, tap.v


class PatchedStack:
    """A transformer, which hands state and hints on also where it runs tokens first."""

    def _visiontok_stack(
        self: Any, x: Tensor, attn_mask: Tensor | None, indices: Any = None, stop_early: bool = False, take: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        if self.batch_first and not take:
            return super().forward(x, attn_mask=attn_mask), []  # type: ignore[misc]
        if self.batch_first:
            call = super().forward_intermediates  # type: ignore[misc]
            return call(x, attn_mask=attn_mask, indices=indices, stop_early=stop_early)
        from open_clip.utils import feature_take_indices

        wanted, last = feature_take_indices(len(self.resblocks), indices) if take else ((), 0)
        taken: list[Tensor] = []
        x = hint(x.transpose(0, 1).contiguous(), hint_of(x))
        for index, block in enumerate(self.resblocks[: last + 1] if stop_early else self.resblocks):
            if self.grad_checkpointing:
                y: Any = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
            else:
                y = block(x, attn_mask=attn_mask)
            x = y
            taken += [_turned(x)] if index in wanted else []
        return _turned(x), taken


def is_own(module: nn.Module, path: str, *methods: str) -> bool:
    """Whether the module is of the class at `path`, or of a subclass that leaves these methods alone."""
    if path not in class_paths(module):
        return False
    own = [getattr(own_class(module), name) for name in ("forward", *methods)]
    return [f"{f.__module__}.{f.__qualname__}" for f in own] == [f"{path}.{name}" for name in ("forward", *methods)]


def is_residual(block: nn.Module) -> bool:
    """Whether it is a block with torch's attention."""
    return is_own(block, _RESIDUAL, "attention") and not hasattr(block, "ln_1_kv")


def blocks_of(model: Any) -> list[Block]:
    """The blocks of a tower's transformer in running order."""
    return [Block(f"transformer.resblocks.{i}", block) for i, block in enumerate(model.transformer.resblocks)]


def check_stack(model: Any) -> None:
    """Raises IncompatibleError if the transformer of a tower, or a part of it, is not open_clip's own."""
    stack = model.transformer
    if not any(is_own(stack, path) for path in _STACKS):
        raise IncompatibleError(f"transformer is a {type(stack).__name__}; visiontok runs open_clip's Transformer.")
    for path, block in blocks_of(model):
        attn: Any = getattr(block, "attn", None)
        if is_residual(block):
            why = mha.obstacle(attn)
        elif is_own(block, _CUSTOM):
            why = None if is_own(attn, _ATTENTION) else f"it is a {type(attn).__name__}, not open_clip's Attention"
        else:
            raise IncompatibleError(
                f"{path} is a {type(block).__name__}; visiontok runs open_clip's ResidualAttentionBlock without "
                "cross-attention and its CustomResidualAttentionBlock."
            )
        if why is not None:
            raise IncompatibleError(f"visiontok cannot read queries and keys from {path}.attn: {why}.")


def swaps_of(model: Any, stack: type, residual: type, custom: type) -> list[Swap]:
    """The swaps of a tower's transformer: the stack, its blocks and their attentions."""
    swaps = [Swap("transformer", model.transformer, stack)]
    for path, block in blocks_of(model):
        attn: Any = block.attn
        if is_residual(block):
            swaps += [Swap(path, block, residual), Swap(f"{path}.attn", mha.inner(attn), mha.PatchedAttention)]
        else:
            swaps += [Swap(path, block, custom), Swap(f"{path}.attn", attn, PatchedAttention)]
    return swaps
