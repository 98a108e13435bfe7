"""The patched layers of transformers' vision encoders, and their attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones.hf_attention import base_name
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage
from visiontok.core.signals import Offers
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.attending import as_mask, folds
from visiontok.ops.attention import fold_bias
from visiontok.ops.constants import wide_dtype

__all__ = [
    "MASKED",
    "BeitLayer",
    "ClipAttention",
    "ClipLayer",
    "DinoLayer",
    "PatchedAttention",
    "PatchedLayer",
    "RotaryAttention",
    "RotaryLayer",
    "will_act",
]

# Attention implementations that add a mask to the logits.
MASKED = ("eager", "sdpa")


# ---- attention


class PatchedAttention:
    """Attention that, when given a tap, leaves its q, k, v there."""

    _visiontok_names: ClassVar[tuple[str, str, str]] = ("scaling", "attention_dropout", "o_proj")

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tap: Tap | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if tap is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        scaling, dropout, out = (getattr(self, name) for name in self._visiontok_names)
        q, k, v = self._visiontok_qkv(hidden_states, kwargs.pop("position_embeddings", None))
        tap.q, tap.k, tap.v = q, k, v
        asked, host = self.config._attn_implementation, _host(self)
        attend, name = host.ALL_ATTENTION_FUNCTIONS.get_interface(asked, host.eager_attention_forward), base_name(asked)
        if attention_mask is not None and (name not in MASKED or (name == "sdpa" and folds(q, attention_mask))):
            q, k, v = fold_bias(q, k, v, attention_mask, scaling)
            attention_mask = None
        elif attention_mask is not None and name == "sdpa":
            attention_mask = as_mask(attention_mask, q)
        dropout = dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out(y[..., : tap.v.shape[-1]].flatten(2)), weights

    def _visiontok_qkv(self: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if rope is not None:
            q, k = _host(self).apply_rotary_pos_emb(q, k, *rope)
        return q, k, v


class RotaryAttention(PatchedAttention):
    """DINOv3's names."""

    _visiontok_names = ("scaling", "dropout", "o_proj")


class ClipAttention(PatchedAttention):
    """CLIP's and SigLIP's names."""

    _visiontok_names = ("scale", "dropout", "out_proj")


def _host(module: nn.Module) -> Any:
    # A patched class keeps the module name of its own class.
    return sys.modules[type(module).__module__]


# ---- layers


class PatchedLayer:
    """A layer with a reduction point between attention and MLP; ViT's names.

    Names are of the attention, of the two norms, and of what the output of each branch passes before it is added.
    """

    _visiontok: Stage
    _visiontok_attention: ClassVar[str] = "attention"
    _visiontok_norms: ClassVar[tuple[str, str]] = ("layernorm_before", "layernorm_after")
    _visiontok_ends: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("dropout",), ("dropout",))

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        host = super().forward  # type: ignore[misc]
        if self._visiontok_pads(attention_mask):
            return self._visiontok_padded(host, hidden_states, attention_mask, kwargs)
        return run_block(
            self._visiontok,
            hidden_states,
            lambda x, state: self._visiontok_untouched(host, x, state, attention_mask, kwargs),
            lambda x, state: self._visiontok_ahead(x, state, attention_mask, kwargs),
            lambda x, state: self._visiontok_run(x, state, attention_mask, kwargs),
        )

    def _visiontok_padded(self, host: Any, x: Tensor, mask: Tensor, given: Any) -> Tensor:
        # The host's mask serves until something happens; from then on padding is a size of zero.
        stage = self._visiontok
        state = stage.enter(x)
        if not state.padded:
            if not stage.acts(state):
                return stage.leave(host(x, mask, **given), state, {})
            state = state.changed(size=_live(mask, x), padded=True)
        if stage.opens:
            x, state = stage.before(x, state, self._visiontok_ahead(x, state, None, given))
        y, after, offered = self._visiontok_run(x, state, None, given)
        return stage.leave(y, after, offered if after is state else {})

    def _visiontok_pads(self, mask: Tensor | None) -> bool:
        """Whether a mask says which tokens are padding."""
        return mask is not None

    def _visiontok_untouched(self, host: Any, x: Tensor, state: TokenState, mask: Tensor | None, given: Any) -> Tensor:
        return host(x, mask, **given)

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState, mask: Tensor | None, given: Any) -> Offers:
        attn, norm = getattr(self, self._visiontok_attention), getattr(self, self._visiontok_norms[0])
        rope = self._visiontok_placed(state, given).get("position_embeddings")
        bias = self._visiontok_bias(state, torch.float32, mask, given)
        scale = getattr(attn, attn._visiontok_names[0])
        return offers_ahead(lambda: attn._visiontok_qkv(norm(x), rope), scale, bias, state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, mask: Tensor | None, given: Any) -> Ran:
        attn, (first, second) = getattr(self, self._visiontok_attention), self._visiontok_norms
        normed, tap = getattr(self, first)(x), Tap()
        name = base_name(attn.config._attn_implementation)
        dtype = bias_dtype(normed, name != "eager", attends=True)
        bias = self._visiontok_bias(state, dtype, mask, given)
        y, _ = attn(normed, bias, tap=tap, **self._visiontok_placed(state, given))
        offered = tap.offers(getattr(attn, attn._visiontok_names[0]), bias, state.prefix)
        scales = [getattr(self, name) for name in self._visiontok_ends[0] if name not in ("dropout", "drop_path")]
        plain = not self.training and len(scales) <= 1
        joint = Joint(lambda y: self._visiontok_end(0, y), getattr(self, second), *scales[:1], plain=plain)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        x = self._visiontok_end(1, self.mlp(normed)) + x
        return x, after, offered

    def _visiontok_end(self: Any, branch: int, y: Tensor) -> Tensor:
        for name in self._visiontok_ends[branch]:
            part = getattr(self, name)
            y = part(y) if isinstance(part, nn.Module) else part * y
        return y

    def _visiontok_placed(self, state: TokenState, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the attention is called with besides its input and bias."""
        return dict(given)

    def _visiontok_bias(
        self, state: TokenState, dtype: torch.dtype, mask: Tensor | None, given: Mapping[str, Any]
    ) -> Tensor | None:
        """What the attention adds to its logits."""
        return state.key_bias(dtype)


class DinoLayer(PatchedLayer):
    """DINOv2's names."""

    _visiontok_norms = ("norm1", "norm2")
    _visiontok_ends = (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))


class RotaryLayer(DinoLayer):
    """DINOv3: the rotary table follows the tokens."""

    def _visiontok_untouched(self, host: Any, x: Tensor, state: TokenState, mask: Tensor | None, given: Any) -> Tensor:
        return host(x, mask, **self._visiontok_placed(state, given))

    def _visiontok_placed(self, state: TokenState, given: Mapping[str, Any]) -> dict[str, Any]:
        if not state.trail:
            return dict(given)
        positions: Any = state.positions
        cos, sin = given["position_embeddings"]
        sin, cos = positions.rotary(sin, cos, self._visiontok_steps(state, cos))
        return {**given, "position_embeddings": (cos, sin)}

    def _visiontok_steps(self, state: TokenState, table: Tensor) -> Tensor:
        if state.grid0 is None:
            return table.new_zeros(2, 1)
        # Patch centres lie in [-1, 1] along each axis. Training may scale that; then what an anchor has of it is exact,
        # and only the way from there to the mean is that of the plain grid.
        rows, columns = (4 * math.pi / side * self._visiontok.aid.inv_freq for side in state.grid0)
        none = torch.zeros_like(rows)
        return torch.stack((torch.cat((rows, none)).tile(2), torch.cat((none, columns)).tile(2)))


class BeitLayer(PatchedLayer):
    """BEiT: the relative position bias, of the layer or shared by all of them, follows the tokens."""

    _visiontok_ends = (("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path"))

    def _visiontok_untouched(
        self: Any, host: Any, x: Tensor, state: TokenState, mask: Tensor | None, given: Any
    ) -> Tensor:
        # The host can make its bias for the original tokens only.
        return self._visiontok_run(x, state, mask, given)[0] if state.trail else host(x, mask, **given)

    def _visiontok_pads(self: Any, mask: Tensor | None) -> bool:
        # A shared bias is passed as a mask, with one row per head for all samples.
        if mask is None or not self.attention.config.use_shared_relative_position_bias:
            return mask is not None
        if mask.shape[0] > 1 and will_act(self._visiontok):
            raise IncompatibleError(
                f"block {self._visiontok.layer}: attention_mask was given and is one with BEiT's shared position bias "
                "here, so it cannot follow the tokens; call without it."
            )
        return False

    def _visiontok_placed(self, state: TokenState, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if name not in ("resolution", "interpolate_pos_encoding")}

    def _visiontok_bias(
        self: Any, state: TokenState, dtype: torch.dtype, mask: Tensor | None, given: Mapping[str, Any]
    ) -> Tensor | None:
        table, key = mask, state.key_bias(dtype)
        if self.relative_position_bias is not None:
            height, width = given["resolution"]
            window = (height // self.patch_size, width // self.patch_size)
            resized = given.get("interpolate_pos_encoding", False)
            own = self.relative_position_bias(window, resized, dim_size=state.n0)
            table = own if table is None else own + table
        if table is None:
            return key
        if state.trail:
            positions: Any = state.positions
            table = positions.bias(table[0], state.origin)
        return table.to(dtype) if key is None else table.to(dtype) + key


class ClipLayer(PatchedLayer):
    """CLIP's and SigLIP's names."""

    _visiontok_attention = "self_attn"
    _visiontok_norms = ("layer_norm1", "layer_norm2")
    _visiontok_ends = ((), ())


def will_act(stage: Stage) -> bool:
    """Whether any step of a block has something to do."""
    return any(step.reducer.always or not step.budget.idle for steps in stage.steps.values() for step in steps)


def _live(mask: Tensor, x: Tensor) -> Tensor:
    # Of (B, N), or (B, 1, N, N) with equal rows; boolean, or 0 where tokens are attended to.
    row = mask if mask.dim() == 2 else mask[:, 0, 0]
    live = row == 0 if row.is_floating_point() else row.bool()
    return live.expand(x.shape[:2]).unsqueeze(-1).to(wide_dtype(x.dtype))
