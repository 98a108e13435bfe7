"""Tiny random models of transformers' vision encoders, for docs and tests."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["plain_examples", "positional_examples", "tiny"]

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}


def tiny(package: str, config: str, model: str, **options: Any) -> Any:
    """A model whose parameters are all random: many start at zero, where a mistake would not show."""
    where = f"transformers.models.{package}"
    settings = getattr(import_module(f"{where}.configuration_{package}"), config)(**{**_SMALL, **options})
    made: Any = getattr(import_module(f"{where}.modeling_{package}"), model)(settings)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 or any(word in name for word in ("lambda", "token", "embedding")):
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def _image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def plain_examples() -> dict[str, tuple[nn.Module, Any]]:
    """Of `HFViT`."""
    small_vision = {"projection_dim": 16}
    made: dict[str, tuple[nn.Module, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made["vit"] = tiny("vit", "ViTConfig", "ViTModel"), _image()
        made["deit"] = tiny("deit", "DeiTConfig", "DeiTModel", attn_implementation="eager"), _image()
        mae = tiny("vit_mae", "ViTMAEConfig", "ViTMAEModel", image_size=48, mask_ratio=0.5)
        made["mae"] = mae, {"pixel_values": torch.randn(2, 3, 48, 48), "noise": torch.rand(2, 36)}
        made["ijepa"] = tiny("ijepa", "IJepaConfig", "IJepaForImageClassification"), _image()
        made["dinov2"] = tiny("dinov2", "Dinov2Config", "Dinov2ForImageClassification", mlp_ratio=2), _image()
        registers = {"mlp_ratio": 2, "num_register_tokens": 4, "use_swiglu_ffn": True}
        stem = "Dinov2WithRegisters"
        made["registers"] = tiny("dinov2_with_registers", f"{stem}Config", f"{stem}Model", **registers), _image()
        made["feature_maps"] = tiny("dinov2", "Dinov2Config", "Dinov2Backbone", mlp_ratio=2), _image()
        made["clip"] = tiny("clip", "CLIPVisionConfig", "CLIPVisionModel", **small_vision), _image()
        made["siglip"] = tiny("siglip", "SiglipVisionConfig", "SiglipVisionModel"), _image()
        flexible = tiny("siglip2", "Siglip2VisionConfig", "Siglip2VisionModel", num_patches=16)
        patches, shapes = torch.randn(2, 16, 3 * 8 * 8), torch.tensor([[4, 4], [3, 4]])
        mask = (torch.arange(16) < shapes.prod(dim=1, keepdim=True)).long()
        made["siglip2"] = (
            flexible,
            {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes},
        )
    return made


def positional_examples() -> dict[str, tuple[nn.Module, Any]]:
    """Of `HFPositionalViT`."""
    made: dict[str, tuple[nn.Module, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made["dinov3"] = tiny("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", num_register_tokens=4), _image()
        beit = {"use_mask_token": False, "drop_path_rate": 0.0}
        made["beit"] = tiny("beit", "BeitConfig", "BeitModel", use_relative_position_bias=True, **beit), _image()
        shared = {"use_shared_relative_position_bias": True, "use_mean_pooling": False, **beit}
        made["beit_shared"] = tiny("beit", "BeitConfig", "BeitModel", attn_implementation="eager", **shared), _image()
    return made
