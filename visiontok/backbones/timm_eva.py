"""timm's Eva: EVA, EVA-02, Perception Encoder, RoPE-ViT, DINOv3, Sapiens 2; rotary positions follow the tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.backbones.timm_blocks import PatchedNorm, mix
from visiontok.backbones.timm_vit import PatchedViT, TimmViT
from visiontok.core.backbone import Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage, hint_grid, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["TimmEva", "rotary_steps"]

_BLOCK = "timm.models.eva.EvaBlock"
_POST_NORM = "timm.models.eva.EvaBlockPostNorm"
_ATTENTION_FORWARDS = ("timm.models.eva.EvaAttention.forward", "timm.layers.attention.AttentionRope.forward")
_ROPE = "timm.layers.pos_embed_sincos.RotaryEmbedding"
_KINDS = ("Cat", "DinoV3", "Mixed", "MRope")


class PatchedAttention:
    """Attention that, when given a tap, leaves its q, k, v there."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *args: Any,
        tap: Tap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if tap is None:
            return super().forward(x, rope, attn_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = self._visiontok_qkv(x, rope)
        y = self.norm(mix(self, q, k, v, attn_mask).transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        tap.q, tap.k, tap.v = q, k, v
        return self.proj_drop(self.proj(y))

    def _visiontok_qkv(self: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            shared = getattr(self, "num_kv_heads", self.num_heads)
            parts = ((self.q_proj, self.num_heads), (self.k_proj, shared), (self.v_proj, shared))
            q, k, v = (project(x).unflatten(-1, (heads, -1)).transpose(1, 2) for project, heads in parts)
        else:
            joined = self._visiontok_joined(x).unflatten(-1, (3, self.num_heads, -1))
            q, k, v = joined.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._visiontok_turn(q, rope).type_as(v), self._visiontok_turn(k, rope).type_as(v)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v

    def _visiontok_joined(self: Any, x: Tensor) -> Tensor:
        if getattr(self, "q_bias", None) is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        # As the host does, which reads the weight here: a patched model must not see an adapter that it ignores.
        return F.linear(x, self.qkv.weight, bias)

    def _visiontok_turn(self: Any, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        layout = {"half": True} if getattr(self, "rotate_half", False) else {}
        lead, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat((lead, apply_rot_embed_cat(rest, rope, **layout)), dim=2)


def _attend(attn: Any, x: Tensor, rope: Tensor | None, state: TokenState) -> tuple[Tensor, Offers]:
    bias = state.key_bias(bias_dtype(x, attn.fused_attn, attends=True))
    if not issubclass(type(attn), PatchedAttention):
        return attn(x, rope=rope, attn_mask=bias), {}
    tap = Tap()
    y = attn(x, rope=rope, attn_mask=bias, tap=tap)
    return y, tap.offers(attn.scale, bias, state.prefix)


class PatchedBlock:
    """A block with a reduction point between attention and MLP, where the rotary table follows the tokens."""

    _visiontok: Stage

    def forward(
        self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        host = super().forward  # type: ignore[misc]
        given = "attn_mask" if attn_mask is not None else "is_causal" if kwargs.get("is_causal") else None
        table = functools.partial(_followed, rope, self._visiontok)
        return run_block(
            self._visiontok,
            x,
            lambda x, state: host(x, rope=table(state), attn_mask=attn_mask, **kwargs),
            lambda x, state: self._visiontok_ahead(x, state, table),
            lambda x, state: self._visiontok_run(x, state, table(state)),
            given,
        )

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState, table: Callable[[TokenState], Any]) -> Offers:
        attn = self.attn
        if not issubclass(type(attn), PatchedAttention):
            return {}
        project = lambda: attn._visiontok_qkv(self._visiontok_normed(x), table(state))  # noqa: E731
        return offers_ahead(project, attn.scale, state.key_bias(torch.float32), state.prefix)


class _PreNormBlock(PatchedBlock):
    def _visiontok_normed(self: Any, x: Tensor) -> Tensor:
        return self.norm1(x)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, rope: Tensor | None) -> Ran:
        y, offered = _attend(self.attn, self.norm1(x), rope, state)
        settle = lambda y: self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)  # noqa: E731
        joint = Joint(settle, self.norm2, self.gamma_1, not self.training)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        y = self.mlp(normed)
        x = x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)
        return x, after, offered


class _PostNormBlock(PatchedBlock):
    def _visiontok_normed(self: Any, x: Tensor) -> Tensor:
        return x

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, rope: Tensor | None) -> Ran:
        y, offered = _attend(self.attn, x, rope, state)
        x = x + self.drop_path1(self.norm1(y))
        x, after = self._visiontok.mid(x, state, offered)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x, after, offered


class PatchedEva(PatchedViT):
    """The model: as timm's VisionTransformer, but its pools are over patches and its attention pool is over all."""

    pool_include_prefix = False

    def _pos_embed(self: Any, x: Tensor) -> Any:
        height, width = x.shape[1:3] if x.dim() == 4 else self.patch_embed.grid_size
        x, rope = super(PatchedViT, self)._pos_embed(x)  # type: ignore[misc]
        return hint_grid(x, (int(height), int(width))), rope

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        state = state_of(x)
        if state is None or state.size is None or self.attn_pool is None:
            return super().pool(x, pool_type)
        return self._visiontok_attention_pool(x, state, 0, pool_type)

    def forward_intermediates(  # type: ignore[override]
        self: Any,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        plain = (indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        if output_fmt != "NCHW" and (self._visiontok.restore_fill is None or output_fmt != "NLC"):
            return super(PatchedViT, self).forward_intermediates(x, *plain, **kwargs)  # type: ignore[misc]
        return super().forward_intermediates(x, *plain, **kwargs)


def _followed(rope: Tensor | None, stage: Stage, state: TokenState) -> Tensor | None:
    """The rotary table for the tokens of now."""
    if rope is None or not state.trail:
        return rope
    positions: Any = state.positions
    sin, cos = rope.chunk(2, dim=-1)
    # Training may have shifted and scaled the coordinates of the table: what an anchor has of that is exact, only the
    # way from there to the mean is that of the plain grid.
    steps = sin.new_zeros(2, sin.shape[-1])
    steps = steps if state.grid0 is None else rotary_steps(stage.aid, state.grid0, stage.layer)
    # Both channels of a pair turn alike, so one of them is enough to follow.
    if _halved(stage.aid):
        half = sin.shape[-1] // 2
        sin, cos = positions.rotary(sin[..., :half], cos[..., :half], steps[..., :half])
        return torch.cat((sin, sin, cos, cos), dim=-1)
    sin, cos = positions.rotary(sin[..., ::2], cos[..., ::2], steps[..., ::2])
    return torch.cat((sin, cos), dim=-1).repeat_interleave(2, dim=-1)


def rotary_steps(rope: Any, grid: tuple[int, int], layer: int = 0) -> Tensor:
    """How far each channel of a rotary table of timm turns from one patch to the next.

    Args:
        rope: One of timm's rotary embeddings of Eva.
        grid: (h, w) patches of the input.
        layer: The block, where each has frequencies of its own.

    Returns:
        (2, D) or (2, H, D) fp32 radians per row and per column, in the layout of the table.
    """
    kind = _rotary(rope)
    if kind == "Mixed":
        steps = rope.freqs[:, layer].float()
    elif kind == "MRope":
        steps = torch.stack([(rope.axis == axis) * rope.inv_freq for axis in (1, 2)])
    else:
        bands = 2 * math.pi / rope.periods if kind == "DinoV3" else _bands(rope)
        first, second = (bands * apart for apart in _apart(rope, grid))
        first, second = (second, first) if rope.grid_indexing == "xy" else (first, second)
        none = torch.zeros_like(bands)
        steps = torch.stack((torch.cat((first, none)), torch.cat((none, second))))
    # With "xy" the first coordinate is the column.
    steps = steps.flip(0) if rope.grid_indexing == "xy" else steps
    return torch.cat((steps, steps), dim=-1) if _halved(rope) else steps.repeat_interleave(2, dim=-1)


def _halved(rope: Any) -> bool:
    """Whether the two channels of a pair are half a head apart, and not side by side."""
    return getattr(rope, "rotate_half", _rotary(rope) == "MRope")


def _rotary(rope: Any) -> str | None:
    # By the method that makes the table: a subclass may have one of its own.
    maker: Any = own_class(rope).get_embed  # type: ignore[attr-defined]
    path = f"{maker.__module__}.{maker.__qualname__}"
    return next((kind for kind in _KINDS if path == f"{_ROPE}{kind}.get_embed"), None)


def _apart(rope: Any, grid: tuple[int, int]) -> list[float]:
    """Distance between neighbours in the coordinates of an axial table, along rows' and along columns' axis."""
    kind = getattr(rope, "grid_type", None) or ("pixel" if getattr(rope, "in_pixels", False) else "index")
    if hasattr(rope, "periods") or kind == "centered":
        over = {"max": (max(grid),) * 2, "min": (min(grid),) * 2, "separate": grid}[rope.normalize_coords]
        apart = [2 / length for length in over]
    else:
        apart = [2 / max(length - 1, 1) if kind == "pixel" else 1.0 for length in grid]
    ref = getattr(rope, "ref_feat_shape", None)
    return apart if ref is None else [step / length * full for step, length, full in zip(apart, grid, ref)]


def _bands(rope: Any) -> Tensor:
    if rope.bands is not None:
        return rope.bands
    from timm.layers.pos_embed_sincos import freq_bands, pixel_freq_bands

    # Older timm keeps no frequencies beside a finished table.
    count, device = rope.dim // 4, rope.pos_embed.device
    if rope.in_pixels:
        return pixel_freq_bands(count, float(rope.max_res), device=device)
    return freq_bands(count, rope.temperature, step=1, device=device)


class TimmEva(TimmViT):
    """timm Eva with EvaBlock or EvaBlockPostNorm."""

    name = "timm_eva"
    hosts = ("timm.models.eva.Eva",)
    positional = True

    def heads(self, model: Any) -> int:
        return model.blocks[0].attn.num_heads

    def aid(self, model: Any, index: int) -> nn.Module | None:
        return model.rope

    def input_size(self, model: Any) -> tuple[int, ...]:
        height, width = model.patch_embed.img_size
        return model.patch_embed.proj.in_channels, int(height), int(width)

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        tapped = all(_tappable(block.attn) for _, block in self.blocks(model))
        have = self.provides[site] if tapped else self.provides[site] - ATTENTION
        return have if model.num_prefix_tokens else have - {Signal.ATTN_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            if _mixin(block) is None:
                raise IncompatibleError(
                    f"{path} is a {type(block).__name__}, which has no point between attention and MLP that visiontok "
                    "knows; it runs EvaBlock and EvaBlockPostNorm of timm."
                )
        if model.rope is not None and _rotary(model.rope) is None:
            raise IncompatibleError(
                f"rope is a {type(model.rope).__name__}, whose positions visiontok cannot let follow tokens; it knows "
                f"timm's RotaryEmbedding{', RotaryEmbedding'.join(_KINDS)}."
            )

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedEva)]
        for path, block in self.blocks(model):
            mixin = _mixin(block)
            if mixin is not None:
                swaps.append(Swap(path, block, mixin))
            attn: Any = block.attn
            if _tappable(attn):
                swaps.append(Swap(f"{path}.attn", attn, PatchedAttention))
        norms: list[tuple[str, Any]] = [(name, getattr(model, name)) for name in ("norm", "norm_pre")]
        return swaps + [Swap(name, norm, PatchedNorm) for name, norm in norms if not isinstance(norm, nn.Identity)]

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["eva02"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from timm.models.eva import Eva

        small = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
        rope = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
        variants: dict[str, dict[str, Any]] = {
            "eva02": {**rope, "use_abs_pos_emb": True, "ref_feat_shape": 3, "qkv_fused": False, "swiglu_mlp": True,
                      "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"},
            "post_norm": {"use_post_norm": True, "global_pool": "token"},
            "perception": {**rope, "global_pool": "map", "attn_type": "rope", "use_pre_transformer_norm": True,
                           "rope_grid_indexing": "xy", "rope_grid_offset": 1.0},
            "mixed": {**rope, "attn_type": "rope", "rope_type": "mixed", "rope_grid_indexing": "xy",
                      "rope_temperature": 10.0, "init_values": 0.1, "class_token": False},
            "dinov3": {**rope, "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True,
                       "num_reg_tokens": 2, "qkv_bias": False, "use_fc_norm": False, "dynamic_img_size": True},
        }  # fmt: skip
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            image = torch.randn(2, 3, 32, 32)
            for key, options in variants.items():
                # Older timm has fewer options.
                if all(self.accepts(Eva, option) for option in options):
                    made[key] = (Eva(img_size=32, **small, **options, head_init_scale=1.0).eval(), image)
        return made


def _mixin(block: Any) -> type | None:
    known = {_BLOCK: _PreNormBlock, _POST_NORM: _PostNormBlock}
    path = next((path for path in class_paths(block) if path in known), None)
    # A subclass with a forward of its own may do anything there; running ours instead would be silently wrong.
    own = own_class(block).forward
    return known[path] if path is not None and f"{own.__module__}.{own.__qualname__}" == f"{path}.forward" else None


def _tappable(attn: Any) -> bool:
    own = own_class(attn).forward
    return f"{own.__module__}.{own.__qualname__}" in _ATTENTION_FORWARDS
