"""timm's Beit: BEiT and BEiT v2, whose relative position biases follow merged tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.backbones.timm_relpos import PatchedBiasAttention, PatchedBiasBlock, TimmRelPos, _attend, _made
from visiontok.core.blocks import Ran
from visiontok.core.joints import Joint
from visiontok.core.state import TokenState

__all__ = ["TimmBeit"]

_HOME = "timm.models.beit"


class PatchedBeitAttention(PatchedBiasAttention):
    """Attention with a bias between tokens that, when given a tap, adds the one given and leaves its q, k, v there."""

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_bias is None:
            y = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            # The host reads the weight, so what wraps qkv acts in merged layers exactly as far as it does in others.
            y = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        q, k, v = y.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _visiontok_table(self: Any, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        own = self._get_rel_pos_bias()
        return own if shared is None else own + shared


class _BeitBlock(PatchedBiasBlock):
    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self._visiontok_forward(x, shared_rel_pos_bias)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, shared: Tensor | None) -> Ran:
        y, offered = _attend(self.attn, self.norm1(x), state, shared)
        settle = lambda y: self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)  # noqa: E731
        joint = Joint(settle, self.norm2, self.gamma_1, not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        y = self.mlp(normed)
        x = x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)
        return x, after, offered


class TimmBeit(TimmRelPos):
    """timm Beit."""

    name = "timm_beit"
    hosts = (f"{_HOME}.Beit",)
    parts: ClassVar[dict[str, type]] = {
        f"{_HOME}.Block.forward": _BeitBlock,
        f"{_HOME}.Attention.forward": PatchedBeitAttention,
    }

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from timm.models.beit import Beit

        variants: dict[str, dict[str, Any]] = {
            "average": {"use_abs_pos_emb": False, "use_rel_pos_bias": True},
            "shared": {"use_shared_rel_pos_bias": True, "global_pool": "token", "swiglu_mlp": True, "scale_mlp": True},
        }
        return _made(Beit, variants)
