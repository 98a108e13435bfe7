"""timm's VisionTransformer and its variants: DeiT, DeiT-III, DINOv2, CLIP, SigLIP, FlexiViT, registers, pools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontok.backbones.timm_blocks import (
    PatchedAttention,
    PatchedDiffAttention,
    PatchedFeatures,
    PatchedNorm,
    _DiffParallelScalingBlock,
    _ParallelScalingBlock,
    _ParallelThingsBlock,
    _PreNormBlock,
    _ResPostBlock,
)
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.blocks import bias_dtype, sized_mean
from visiontok.core.runtime import hint_grid, state_of
from visiontok.core.signals import ATTENTION, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["TimmViT"]

_BLOCKS: dict[str, type] = {
    "timm.models.vision_transformer.Block": _PreNormBlock,
    "timm.models.vision_transformer.ResPostBlock": _ResPostBlock,
    "timm.models.vision_transformer.ParallelThingsBlock": _ParallelThingsBlock,
    "timm.models.vision_transformer.ParallelScalingBlock": _ParallelScalingBlock,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _DiffParallelScalingBlock,
}
# By the forward that it replaces; where timm keeps its plain attention depends on the version.
_ATTENTIONS: dict[str, type] = {
    "timm.layers.attention.Attention.forward": PatchedAttention,
    "timm.models.vision_transformer.Attention.forward": PatchedAttention,
    "timm.layers.diff_attention.DiffAttention.forward": PatchedDiffAttention,
}

_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION


class PatchedViT(PatchedFeatures):
    """The model: hands the patch grid to block 0 and lets pools and feature maps see sizes and origins."""

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        # Not the grid of the plan: a dynamic size or set_input_size may have changed it.
        height, width = x.shape[1:3] if x.dim() == 4 else self.patch_embed.grid_size
        return hint_grid(super()._pos_embed(x), (int(height), int(width)))  # type: ignore[misc]

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        state = state_of(x)
        kind = self.global_pool if pool_type is None else pool_type
        if state is None or state.size is None or (self.attn_pool is None and kind in ("", "token")):
            return super().pool(x, pool_type)  # type: ignore[misc]
        skip = 0 if self.pool_include_prefix else state.prefix
        if self.attn_pool is not None:
            return self._visiontok_attention_pool(x, state, skip, pool_type)
        x, size = x[:, skip:], state.size[:, skip:]
        mean = sized_mean(x, size)
        if kind == "avg":
            return mean
        peak = x.masked_fill(size == 0, -math.inf).amax(dim=1)
        return peak if kind == "max" else 0.5 * (peak + mean)

    def _visiontok_attention_pool(self: Any, x: Tensor, state: TokenState, skip: int, pool_type: str | None) -> Tensor:
        if not Backbone.accepts(self.attn_pool.forward, "attn_mask"):
            # A token counts as often as it has members, so the restored sequence gives the exact pool.
            return super().pool(state.restore(x, "nearest"), pool_type)  # type: ignore[misc]
        bias = state.changed(proportional=True, mute=False).key_bias(bias_dtype(x, self.attn_pool.fused_attn))
        return self.attn_pool(x[:, skip:], attn_mask=None if bias is None else bias[..., skip:])

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        fill = self._visiontok.restore_fill or ("nearest" if output_fmt == "NCHW" else None)
        call = super().forward_intermediates  # type: ignore[misc]
        if fill is None or output_fmt not in ("NCHW", "NLC"):
            plain = (indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict)
            return call(x, *plain, **kwargs)
        final, taken = call(x, indices, self.num_prefix_tokens > 0, norm, stop_early, "NLC", False, **kwargs)
        state = state_of(final)
        pairs = taken if self.num_prefix_tokens else [(spatial, None) for spatial in taken]
        features = self._visiontok_dense(pairs, indices, state, fill)
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            features = [y.transpose(1, 2).unflatten(2, (height, width)).contiguous() for y in features]
        prefixes = [prefix for _, prefix in pairs] if self.num_prefix_tokens and return_prefix_tokens else None
        final = final if state is None else state.whole(final, self._visiontok.restore_fill)[0]
        if output_dict:
            out = {"image_intermediates": features}
            out.update({} if prefixes is None else {"image_intermediates_prefix": prefixes})
            return out if intermediates_only else {**out, "image_features": final}
        shown = features if prefixes is None else list(zip(features, prefixes))
        return shown if intermediates_only else (final, shown)


class TimmViT(Backbone):
    """timm VisionTransformer with any of the blocks and attentions that timm has for it.

    A parallel block has no point between attention and MLP: there, what acts at MID acts after their sum.
    """

    name = "timm_vit"
    library = "timm"
    hosts = ("timm.models.vision_transformer.VisionTransformer",)
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {
        Site.MID: _HAVE,
        Site.PRE: _HAVE,
        Site.AROUND: _HAVE,
        Site.HEAD: frozenset(),
    }

    def blocks(self, model: Any) -> list[Block]:
        return [Block(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]

    def prefix(self, model: Any) -> int:
        return model.num_prefix_tokens

    def length(self, model: Any) -> int:
        return model.patch_embed.num_patches + model.num_prefix_tokens

    def grid(self, model: Any) -> tuple[int, int] | None:
        height, width = model.patch_embed.grid_size
        return int(height), int(width)

    def width(self, model: Any) -> int:
        return model.embed_dim

    def heads(self, model: Any) -> int:
        return (_attentions(model.blocks[0]) or model.blocks)[0].num_heads

    def classes(self, model: Any) -> int:
        return model.num_classes

    def class_token(self, model: Any) -> Tensor | None:
        return getattr(model, "cls_token", None)

    def input_size(self, model: Any) -> tuple[int, ...]:
        height, width = model.patch_embed.img_size
        return model.in_chans if hasattr(model, "in_chans") else 3, int(height), int(width)

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        have = self.provides[site]
        for _, block in self.blocks(model):
            for mixin in [_attention(attn) for attn in _attentions(block)] or [_mixin(block)]:
                have -= ATTENTION - getattr(mixin, "_visiontok_offers", frozenset())
        return have if model.num_prefix_tokens else have - {Signal.ATTN_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            if _mixin(block) is None:
                known = ", ".join(name.rpartition(".")[2] for name in _BLOCKS)
                raise IncompatibleError(
                    f"{path} is a {type(block).__name__} with a forward of its own; visiontok runs the blocks {known} "
                    "of timm."
                )

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedViT)]
        for path, block in self.blocks(model):
            mixins = [(path, block, _mixin(block))]
            mixins += [(f"{path} attention", attn, _attention(attn)) for attn in _attentions(block)]
            swaps += [Swap(where, module, mixin) for where, module, mixin in mixins if mixin is not None]
        norms = [(name, getattr(model, name)) for name in ("norm", "norm_pre")]
        return swaps + [Swap(name, norm, PatchedNorm) for name, norm in norms if not isinstance(norm, nn.Identity)]

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["cls"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from timm.models import deit
        from timm.models import vision_transformer as vit

        small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
        variants: dict[str, dict[str, Any]] = {
            "cls": {},
            "gap": {"class_token": False, "global_pool": "avg"},
            "gap_cls": {"global_pool": "avg"},
            "registers": {"reg_tokens": 4, "init_values": 0.1, "no_embed_class": True},
            "avgmax": {"class_token": False, "global_pool": "avgmax"},
            "map": {"class_token": False, "global_pool": "map"},
            "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
            "res_post": {"block_fn": vit.ResPostBlock, "init_values": 0.1},
            "parallel_things": {"block_fn": vit.ParallelThingsBlock, "init_values": 0.1},
            "dynamic": {"dynamic_img_size": True, "pre_norm": True},
            "parallel_scaling": {"block_fn": vit.ParallelScalingBlock, "init_values": 0.1},
        }
        if hasattr(vit, "DiffAttention"):
            variants["diff"] = {"attn_layer": "diff"}
        made: dict[str, tuple[nn.Module, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            image = torch.randn(2, 3, 32, 32)
            for key, options in variants.items():
                made[key] = (vit.VisionTransformer(**small, **options).eval(), image)
            gated: Any = made["qk_norm"][0]
            for block in gated.blocks:
                if hasattr(block.attn, "gate"):
                    block.attn.gate = nn.Linear(small["embed_dim"], block.attn.attn_dim)
            made["distilled"] = (deit.VisionTransformerDistilled(**small).eval(), image)
        return made


def _mixin(block: Any) -> type | None:
    path = next((path for path in class_paths(block) if path in _BLOCKS), None)
    # A subclass with a forward of its own may do anything there; running ours instead would be silently wrong.
    own = own_class(block).forward
    return _BLOCKS[path] if path is not None and f"{own.__module__}.{own.__qualname__}" == f"{path}.forward" else None


def _attentions(block: Any) -> list[Any]:
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    # A parallel block is its own attention.
    return [block.attn] if hasattr(block, "attn") else []


def _attention(attn: Any) -> type | None:
    own = own_class(attn).forward
    return _ATTENTIONS.get(f"{own.__module__}.{own.__qualname__}")
