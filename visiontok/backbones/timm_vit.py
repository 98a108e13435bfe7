"""timm's VisionTransformer and its variants: DeiT, DeiT-III, DINOv2, CLIP, SigLIP, FlexiViT, registers, pools."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.runtime import Stage, attach_state, carry_state, hint_grid, state_of
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.attention import Votes

__all__ = ["TimmViT"]

_BLOCK = "timm.models.vision_transformer.Block"
_RES_POST = "timm.models.vision_transformer.ResPostBlock"
_PARALLEL_THINGS = "timm.models.vision_transformer.ParallelThingsBlock"
# Where timm's plain attention lives in the versions that we support.
_ATTENTION_FORWARDS = (
    "timm.layers.attention.Attention.forward",
    "timm.models.vision_transformer.Attention.forward",
)

_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION


class PatchedAttention:
    """Attention that, when given a tap, leaves its q, k, v there."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, *args: Any, tap: Tap | None = None, **kwargs: Any
    ) -> Tensor:
        if tap is None:
            return super().forward(x, attn_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = self._visiontok_qkv(x)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            logits = logits if attn_mask is None else logits + attn_mask
            y = self.attn_drop(logits.softmax(dim=-1)) @ v
        y = self.norm(y.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)
        if gate is not None:
            y = y * gate(x).sigmoid()
        tap.q, tap.k, tap.v = q, k, v
        return self.proj_drop(self.proj(y))

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v


def _attend(attn: Any, x: Tensor, state: TokenState) -> tuple[Tensor, Offers]:
    bias = state.key_bias(bias_dtype(x, attn.fused_attn))
    if not issubclass(type(attn), PatchedAttention):
        return attn(x, attn_mask=bias), {}
    tap = Tap()
    y = attn(x, attn_mask=bias, tap=tap)
    return y, tap.offers(attn.scale, bias, state.prefix)


def _ahead(attn: Any, normed: Callable[[], Tensor], state: TokenState) -> Offers:
    if not issubclass(type(attn), PatchedAttention):
        return {}
    project = lambda: attn._visiontok_qkv(normed())  # noqa: E731
    return offers_ahead(project, attn.scale, state.key_bias(torch.float32), state.prefix)


class PatchedBlock:
    """A block with a reduction point between attention and MLP."""

    _visiontok: Stage

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        host = super().forward  # type: ignore[misc]
        given = "attn_mask" if attn_mask is not None else "is_causal" if kwargs.get("is_causal") else None
        return run_block(
            self._visiontok,
            x,
            lambda x, _: host(x, attn_mask, **kwargs),
            self._visiontok_ahead,
            self._visiontok_run,
            given,
        )


class _PreNormBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _ahead(self.attn, lambda: self.norm1(x), state)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        y, offered = _attend(self.attn, self.norm1(x), state)
        x = x + self.drop_path1(self.ls1(y))
        x, after = self._visiontok.mid(x, state, offered)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, after, offered


class _ResPostBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _ahead(self.attn, lambda: x, state)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        y, offered = _attend(self.attn, x, state)
        x = x + self.drop_path1(self.norm1(y))
        x, after = self._visiontok.mid(x, state, offered)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return x, after, offered


class _ParallelThingsBlock(PatchedBlock):
    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        return _joined([_ahead(branch.attn, lambda b=branch: b.norm(x), state) for branch in self.attns])

    def _visiontok_run(self: Any, x: Tensor, state: TokenState) -> Ran:
        ran = [(branch, *_attend(branch.attn, branch.norm(x), state)) for branch in self.attns]
        x = x + torch.stack([branch.drop_path(branch.ls(y)) for branch, y, _ in ran]).sum(dim=0)
        offered = _joined([signals for _, _, signals in ran])
        x, after = self._visiontok.mid(x, state, offered)
        x = x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)
        return x, after, offered


def _joined(branches: list[Offers]) -> Offers:
    # Parallel attentions count as one with all their heads.
    def join(name: str) -> Callable[[], Any]:
        if name == "ATTN_VOTE":
            return lambda: Votes.joined([branch[name]() for branch in branches])
        return lambda: torch.cat([branch[name]() for branch in branches], dim=1)

    return {name: join(name) for name in branches[0]}


class PatchedNorm:
    """A norm that lets the token state pass to the head."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return carry_state(x, super().forward(x))  # type: ignore[misc]


class PatchedFeatures:
    """What a consumer of tokens does with their state: ends spans, restores, or lets a reducer read the output out."""

    _visiontok: Any

    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        fill, state = self._visiontok.restore_fill, state_of(y)
        return y if state is None else attach_state(*state.whole(y, fill))

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        state = state_of(x)
        if state is not None and not pre_logits:
            output = self._visiontok.readout(state.memo)
            if output is not None:
                return output
        y = super().forward_head(x, pre_logits)  # type: ignore[misc]
        # Without pool and head the features themselves come out; their state must not.
        return y if state_of(y) is None else y.view_as(y)


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
        mean = ((x * size).sum(dim=1) / size.sum(dim=1)).to(x.dtype)
        if kind == "avg":
            return mean
        peak = x.masked_fill(size == 0, -math.inf).amax(dim=1)
        return peak if kind == "max" else 0.5 * (peak + mean)

    def _visiontok_attention_pool(self: Any, x: Tensor, state: TokenState, skip: int, pool_type: str | None) -> Tensor:
        if not Backbone.accepts(self.attn_pool.forward, "attn_mask"):
            # A token counts as often as it has members, so the restored sequence gives the exact pool.
            return super().pool(state.restore(x, "nearest"), pool_type)  # type: ignore[misc]
        bias = state.changed(proportional=True).key_bias(bias_dtype(x, self.attn_pool.fused_attn))
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
        final, taken = call(x, indices, True, norm, stop_early, "NLC", False, **kwargs)
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

    def _visiontok_dense(self: Any, pairs: Any, indices: Any, state: TokenState | None, fill: Any) -> list[Tensor]:
        from timm.models._features import feature_take_indices

        spatial = [y for y, _ in pairs]
        if state is None:
            return spatial
        layers, _ = feature_take_indices(len(self.blocks), indices)
        skip = self.num_prefix_tokens
        # The prefix is in no feature map, but the way back is over the whole sequence.
        whole = [y if skip == 0 else torch.cat((lead, y), dim=1) for y, lead in pairs]
        return [state.restore_at(layer, y, fill)[:, skip:] for layer, y in zip(layers, whole)]


class TimmViT(Backbone):
    """timm VisionTransformer with Block, ResPostBlock or ParallelThingsBlock."""

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
        return _attentions(model.blocks[0])[0].num_heads

    def classes(self, model: Any) -> int:
        return model.num_classes

    def class_token(self, model: Any) -> Tensor | None:
        return getattr(model, "cls_token", None)

    def input_size(self, model: Any) -> tuple[int, ...]:
        height, width = model.patch_embed.img_size
        return model.in_chans if hasattr(model, "in_chans") else 3, int(height), int(width)

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        tapped = all(_tappable(attn) for _, block in self.blocks(model) for attn in _attentions(block))
        have = self.provides[site] if tapped else self.provides[site] - ATTENTION
        return have if model.num_prefix_tokens else have - {Signal.ATTN_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            if _mixin(block) is None:
                raise IncompatibleError(
                    f"{path} is a {type(block).__name__}, which has no point between attention and MLP; visiontok runs "
                    "Block, ResPostBlock and ParallelThingsBlock of timm."
                )

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedViT)]
        for path, block in self.blocks(model):
            mixin = _mixin(block)
            if mixin is not None:
                swaps.append(Swap(path, block, mixin))
            swaps += [Swap(f"{path} attention", a, PatchedAttention) for a in _attentions(block) if _tappable(a)]
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
        }
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
    paths = class_paths(block)
    known = {_BLOCK: _PreNormBlock, _RES_POST: _ResPostBlock, _PARALLEL_THINGS: _ParallelThingsBlock}
    path = next((path for path in paths if path in known), None)
    # A subclass with a forward of its own may do anything there; running ours instead would be silently wrong.
    own = own_class(block).forward
    return known[path] if path is not None and f"{own.__module__}.{own.__qualname__}" == f"{path}.forward" else None


def _attentions(block: Any) -> list[Any]:
    return [branch.attn for branch in block.attns] if hasattr(block, "attns") else [block.attn]


def _tappable(attn: Any) -> bool:
    own = own_class(attn).forward
    return f"{own.__module__}.{own.__qualname__}" in _ATTENTION_FORWARDS
