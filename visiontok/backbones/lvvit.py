"""LV-ViT: a pre-norm ViT with a convolutional stem, scaled residual branches and attention in fp32."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from visiontok.backbones.timm_vit import PatchedAttention, PatchedFeatures, PatchedNorm, TimmViT, _PreNormBlock
from visiontok.core.backbone import Swap, own_class
from visiontok.core.runtime import hint_grid
from visiontok.core.signals import Signal, Site
from visiontok.errors import IncompatibleError

__all__ = ["LVViTBackbone"]

_PARTS = "visiontok.models.lvvit_parts"


class PatchedLVAttention(PatchedAttention):
    """Attention in fp32 that, when given a tap, leaves its q, k, v there."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, *, tap: Any = None) -> Tensor:
        if tap is None:
            return super().forward(x, attn_mask)
        tap.q, tap.k, tap.v = q, k, v = self.heads(x)
        return self.mix(q, k, v, attn_mask, x.dtype)

    def _visiontok_qkv(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(x)


class PatchedLVViT(PatchedFeatures):
    """The model: hands the patch grid to block 0 and lets features and head see the token state."""

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        return hint_grid(super()._pos_embed(x), self.patch_embed.grid_size)  # type: ignore[misc]


class LVViTBackbone(TimmViT):
    """`visiontok.models.lvvit.LVViT`, whose blocks have the attributes of timm's."""

    name = "lvvit"
    library = ""
    hosts = ("visiontok.models.lvvit.LVViT",)

    def heads(self, model: Any) -> int:
        return model.blocks[0].attn.num_heads

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        return self.provides[site]

    def check(self, model: Any, site: Site) -> None:
        for path, block in self.blocks(model):
            for where, part, name in ((path, block, "Block"), (f"{path}.attn", block.attn, "Attention")):
                own: Any = own_class(cast("nn.Module", part)).forward
                # A subclass with a forward of its own may do anything there; running ours instead would be wrong.
                if f"{own.__module__}.{own.__qualname__}" != f"{_PARTS}.{name}.forward":
                    raise IncompatibleError(f"{where} is a {type(part).__name__}, not LV-ViT's own {name}.")

    def swaps(self, model: Any) -> list[Swap]:
        swaps = [Swap("", model, PatchedLVViT), Swap("norm", model.norm, PatchedNorm)]
        for path, block in self.blocks(model):
            attn: Any = block.attn
            swaps += [Swap(path, block, _PreNormBlock), Swap(f"{path} attention", attn, PatchedLVAttention)]
        return swaps

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from visiontok.models.lvvit import LVViT

        small: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {
                "cls": (LVViT(img_size=64, **small).eval(), torch.randn(2, 3, 64, 64)),
                "naive": (LVViT(img_size=32, patch_size=8, p_emb="naive", **small).eval(), torch.randn(2, 3, 32, 32)),
            }
