"""torch.nn.MultiheadAttention as self-attention with a bias over keys, from which q, k, v can be taken."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.backbone import class_paths, own_class
from visiontok.core.blocks import Tap
from visiontok.ops import attending

__all__ = ["PatchedAttention", "attend", "inner", "obstacle", "project"]

_PATH = "torch.nn.modules.activation.MultiheadAttention"
# It merges its delta into the weights of the module inside, calls that one with whatever it was called with, and takes
# the delta out again: inside its forward, and only there, the weights are the right ones.
_LORA = "peft.tuners.lora.layer.MultiheadAttention"


class PatchedAttention:
    """Self-attention over (B, N, C), whatever `batch_first` says, when it is given a tap; else the host's."""

    def forward(
        self: Any,
        query: Tensor,
        *args: Any,
        tap: Tap | None = None,
        bias: Tensor | None = None,
        look: bool = False,
        **kwargs: Any,
    ) -> Any:
        if tap is None:
            return super().forward(query, *args, **kwargs)  # type: ignore[misc]
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        tap.q, tap.k, tap.v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if look:
            return query, None
        dropout = self.dropout if self.training else 0.0
        y = attending.attend(tap.q, tap.k, tap.v, bias, scale=tap.q.shape[-1] ** -0.5, dropout_p=dropout)
        # Not the module: torch reads its weights too, so an adapter around it alone has no effect in either.
        return F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None


def inner(attn: Any) -> Any:
    """The attention itself, where LoRA has wrapped it."""
    return attn.get_base_layer() if _LORA in class_paths(attn) else attn


def obstacle(attn: nn.Module) -> str | None:
    """Why queries and keys cannot be read from an attention, or None if they can."""
    core = inner(attn)
    own = own_class(core).forward
    if _PATH not in class_paths(core) or f"{own.__module__}.{own.__qualname__}" != f"{_PATH}.forward":
        return f"it is a {type(attn).__name__}, not torch.nn.MultiheadAttention"
    if not core._qkv_same_embed_dim or core.in_proj_weight is None:
        return "its queries, keys and values have no joint projection"
    if core.bias_k is not None or core.add_zero_attn:
        return "it adds a key of its own (add_bias_kv, add_zero_attn)"
    return None


def attend(attn: Any, x: Tensor, tap: Tap, bias: Tensor | None) -> Tensor:
    """Runs a patched attention over its normed input x (B, N, C)."""
    return attn(x, x, x, need_weights=False, tap=tap, bias=bias)[0]


def project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, d) of a patched attention, without attending."""
    tap = Tap()
    attn(x, x, x, need_weights=False, tap=tap, look=True)
    return tap.q, tap.k, tap.v
