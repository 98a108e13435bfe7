"""LV-ViT (Jiang et al., All Tokens Matter, NeurIPS 2021, arXiv:2104.10858), the host of the released SiT checkpoints.

A plain ViT with a convolutional stem and residual branches divided by `skip_lam`. Parameter names are those of the
released files. `lvvit_<size>` builds the dense model, `sit_lvvit_<size>` the self-slimmed one (arXiv:2111.12624) with
the slimming modules where the paper has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.errors import ParameterError, UnknownNameError, did_you_mean
from visiontok.models.checkpoints import load_exactly, read_checkpoint
from visiontok.models.lvvit_parts import Block, PatchEmbed

__all__ = [
    "VARIANTS",
    "LVViT",
    "Variant",
    "load_official",
    "lvvit",
    "lvvit_large",
    "lvvit_medium",
    "lvvit_small",
    "lvvit_tiny",
    "lvvit_xsmall",
    "sit_lvvit",
    "sit_lvvit_large",
    "sit_lvvit_medium",
    "sit_lvvit_small",
    "sit_lvvit_tiny",
    "sit_lvvit_xsmall",
]


class LVViT(nn.Module):
    """LV-ViT (arXiv:2104.10858): class token, learned positions, classification from the class token.

    Args:
        img_size: Side of the square image in pixels.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Outputs; 0 returns the class token's features.
        embed_dim: Width C.
        depth: Blocks.
        num_heads: Heads; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP over C.
        p_emb: Stem: `4c`, `6c` or `naive`.
        skip_lam: Divisor of the residual branches.
        drop_rate: Dropout after positions, projections and MLP layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0.
        aux_head: Whether to hold `aux_head`, which the released files contain and nothing uses. It does not train.

    Raises:
        ParameterError: A value outside its range.
    """

    num_prefix_tokens = 1
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        p_emb: str = "4c",
        skip_lam: float = 2.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
    ) -> None:
        super().__init__()
        if skip_lam <= 0:
            raise ParameterError(f"skip_lam must be above 0 (residual branches are divided by it), got {skip_lam!r}.")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, p_emb)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        common = (embed_dim, num_heads, mlp_ratio, skip_lam, drop_rate, attn_drop_rate)
        self.blocks = nn.ModuleList(Block(*common, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if aux_head:
            self.aux_head = nn.Linear(embed_dim, num_classes).requires_grad_(False)
        for value in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(value, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.pos_drop(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 1 + N, C) normalised tokens of images (B, 3, H, W)."""
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_classes) logits of features, or the class token's features (B, C)."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@dataclass(frozen=True)
class Variant:
    """A published size of LV-ViT and of the SiT made from it.

    Attributes:
        embed_dim, depth, num_heads, img_size, p_emb, skip_lam, drop_path_rate: See `LVViT`.
        stage_blocks: Blocks per stage; SiT slims between stages.
        top1, gmacs: ImageNet-1k accuracy in percent and GMACs of SiT, as published (arXiv:2111.12624).
        teacher_top1, teacher_gmacs: The same of the dense model.
        crop_pct: Share of the resized image that the evaluation crops.
    """

    embed_dim: int
    depth: int
    num_heads: int
    stage_blocks: tuple[int, ...]
    top1: float
    gmacs: float
    teacher_top1: float | None
    teacher_gmacs: float | None
    img_size: int = 224
    p_emb: str = "4c"
    skip_lam: float = 2.0
    crop_pct: float = 0.9


_LARGE: dict[str, Any] = {"img_size": 288, "p_emb": "6c", "skip_lam": 3.0, "crop_pct": 1.0}
VARIANTS: dict[str, Variant] = {
    "tiny": Variant(320, 14, 5, (1, 1, 1, 11), 80.1, 1.0, 81.8, 3.5),
    "xsmall": Variant(384, 16, 6, (1, 1, 1, 13), 81.2, 1.5, None, None),
    "small": Variant(384, 16, 6, (9, 3, 2, 2), 83.1, 4.0, 83.1, 5.5),
    "medium": Variant(512, 20, 8, (10, 4, 3, 3), 84.2, 8.1, 84.0, 11.9, crop_pct=1.0),
    "large": Variant(768, 24, 12, (10, 4, 3, 7), 85.6, 34.4, 85.3, 56.1, **_LARGE),
}


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise UnknownNameError(f"unknown LV-ViT {name!r}.{did_you_mean(name, VARIANTS)} Known: {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def load_official(model: LVViT, state: Mapping[str, Tensor], drop: tuple[str, ...] = ()) -> None:
    """Loads a released state dict into the dense part of a model.

    The training-only `rtsm.*`, and `aux_head.*` where the model has none, are left out.

    Args:
        model: Patched or not.
        state: What `read_checkpoint` returns.
        drop: More prefixes to leave out.

    Raises:
        FormatError: The rest does not fit exactly; the message names the entries. Nothing is loaded then.
    """
    unused = () if hasattr(model, "aux_head") else ("aux_head.",)
    load_exactly(model, state, drop=("rtsm.", *unused, *drop))


def lvvit(variant: str, checkpoint: Any = None, *, filename: str | None = None, revision: str | None = None,
          **options: Any) -> LVViT:  # fmt: skip
    """A dense LV-ViT, the teacher of SiT. `lvvit_tiny(...)` and so on are this with the variant filled in.

    Args:
        variant: `tiny`, `xsmall`, `small`, `medium` or `large`.
        checkpoint: A released file, see `read_checkpoint`; None for random weights.
        filename: File in a hub repository.
        revision: Branch, tag or commit of a hub repository.
        **options: Fields of `LVViT` that replace the variant's.

    Returns:
        The model in eval mode.
    """
    size = _variant(variant)
    names = ("embed_dim", "depth", "num_heads", "img_size", "p_emb", "skip_lam")
    model = LVViT(**{**{name: getattr(size, name) for name in names}, **options})
    # timm's own tools derive the evaluation transform from this.
    model.pretrained_cfg = model.default_cfg = {
        "architecture": f"lvvit_{variant}",
        "num_classes": model.num_classes,
        "input_size": (model.in_chans, *model.patch_embed.img_size),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": size.crop_pct,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
    }
    if checkpoint is not None:
        load_official(model, read_checkpoint(checkpoint, filename, revision))
    return model.eval()


def sit_lvvit(
    variant: str,
    checkpoint: Any = None,
    *,
    teacher: Any = None,
    keeping_ratio: float = 0.5,
    filename: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> LVViT:
    """A self-slimmed LV-ViT: the dense model patched with the reducer `sit`; `visiontok.unpatch` takes that off again.

    `sit_lvvit_tiny(...)` and so on are this with the variant filled in.

    Args:
        variant: `tiny`, `xsmall`, `small`, `medium` or `large`.
        checkpoint: A released SiT file, see `read_checkpoint`; None for random slimming modules, which need training.
        teacher: A released dense file for the weights of the dense part, as SiT's training starts; not with
            `checkpoint`.
        keeping_ratio: Share of tokens per stage, see the reducer.
        filename: File in a hub repository.
        revision: Branch, tag or commit of a hub repository.
        **options: Fields of `LVViT` that replace the variant's; `stage_blocks` replaces the variant's stages.

    Returns:
        The patched model in eval mode.

    Raises:
        FormatError: The file does not fit; the message lists every missing, unexpected and misshaped entry's name.
    """
    from visiontok.api import patch

    if checkpoint is not None and teacher is not None:
        raise ParameterError("give checkpoint or teacher, not both.")
    stages = options.pop("stage_blocks", _variant(variant).stage_blocks)
    model = lvvit(variant, teacher, filename=filename, revision=revision, **options)
    reduction = patch(model, "sit", keeping_ratio=keeping_ratio, stage_blocks=tuple(stages))
    if checkpoint is not None:
        state = read_checkpoint(checkpoint, filename, revision)
        load_official(model, state, drop=("tsm.",))
        reduction.load_learned(state)
    return model


lvvit_tiny = partial(lvvit, "tiny")
lvvit_xsmall = partial(lvvit, "xsmall")
lvvit_small = partial(lvvit, "small")
lvvit_medium = partial(lvvit, "medium")
lvvit_large = partial(lvvit, "large")
sit_lvvit_tiny = partial(sit_lvvit, "tiny")
sit_lvvit_xsmall = partial(sit_lvvit, "xsmall")
sit_lvvit_small = partial(sit_lvvit, "small")
sit_lvvit_medium = partial(sit_lvvit, "medium")
sit_lvvit_large = partial(sit_lvvit, "large")
