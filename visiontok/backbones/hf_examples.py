"""Tiny random models of transformers' vision encoders, for docs and tests."""

from __future__ import annotations

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


def tiny(config: Any, model: Any, **options: Any) -> Any:
    """A model whose parameters are all random: many start at zero, where a mistake would not show.

    Args:
        config: Class of its configuration.
        model: Its class.
        **options: Of the configuration, besides small sizes.
    """
    made: Any = model(config(**{**_SMALL, **options}))
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 or any(word in name for word in ("lambda", "token", "embedding")):
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def _image() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def plain_examples() -> dict[str, tuple[nn.Module, Any]]:
    """Of `HFViT`."""
    import transformers as hf

    small_vision = {"projection_dim": 16}
    made: dict[str, tuple[nn.Module, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made["vit"] = tiny(hf.ViTConfig, hf.ViTModel), _image()
        made["deit"] = tiny(hf.DeiTConfig, hf.DeiTModel, attn_implementation="eager"), _image()
        mae = tiny(hf.ViTMAEConfig, hf.ViTMAEModel, image_size=48, mask_ratio=0.5)
        made["mae"] = mae, {"pixel_values": torch.randn(2, 3, 48, 48), "noise": torch.rand(2, 36)}
        made["ijepa"] = tiny(hf.IJepaConfig, hf.IJepaForImageClassification), _image()
        made["dinov2"] = tiny(hf.Dinov2Config, hf.Dinov2ForImageClassification, mlp_ratio=2), _image()
        registers = {"mlp_ratio": 2, "num_register_tokens": 4, "use_swiglu_ffn": True}
        made["registers"] = tiny(hf.Dinov2WithRegistersConfig, hf.Dinov2WithRegistersModel, **registers), _image()
        made["feature_maps"] = tiny(hf.Dinov2Config, hf.Dinov2Backbone, mlp_ratio=2), _image()
        made["clip"] = tiny(hf.CLIPVisionConfig, hf.CLIPVisionModel, **small_vision), _image()
        made["siglip"] = tiny(hf.SiglipVisionConfig, hf.SiglipVisionModel), _image()
        flexible = tiny(hf.Siglip2VisionConfig, hf.Siglip2VisionModel, num_patches=16)
        patches, shapes = torch.randn(2, 16, 3 * 8 * 8), torch.tensor([[4, 4], [2, 8]])
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": shapes}
        made["siglip2"] = flexible, inputs
    return made


def positional_examples() -> dict[str, tuple[nn.Module, Any]]:
    """Of `HFPositionalViT`."""
    import transformers as hf

    made: dict[str, tuple[nn.Module, Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made["dinov3"] = tiny(hf.DINOv3ViTConfig, hf.DINOv3ViTModel, num_register_tokens=4), _image()
        beit = {"use_mask_token": False, "drop_path_rate": 0.0}
        made["beit"] = tiny(hf.BeitConfig, hf.BeitModel, use_relative_position_bias=True, **beit), _image()
        shared = {"use_shared_relative_position_bias": True, "use_mean_pooling": False, **beit}
        made["beit_shared"] = tiny(hf.BeitConfig, hf.BeitModel, attn_implementation="eager", **shared), _image()
    return made
