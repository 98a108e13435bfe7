"""Tiny random multimodal models of transformers, with prompts; for documentation and tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IMAGE", "examples", "prompt"]

# Placeholder id of all examples; 0 pads, 1 begins, 2 ends.
IMAGE = 98
VIDEO = 97


def prompt(rows: list[list[int]], **pictures: Tensor) -> dict[str, Tensor]:
    """Token ids padded on the left, with their mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **pictures}


def examples() -> dict[str, tuple[nn.Module, Any]]:
    """Every tested family: a model and keyword arguments of a forward."""
    made = {"llava": _llava(), "llava_next": _llava_next(), "llava_onevision": _onevision(), "internvl": _internvl()}
    return {**made, "qwen2_5_vl": _qwen("2_5"), "qwen3_vl": _qwen("3")}


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes})


def _clip() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=4
    )


def _spread(model: nn.Module) -> Any:
    # Fresh models give every token nearly the same features; wider weights tell them apart.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.25 if p.dim() >= 2 else 1 + 0.1 * noise if "norm" in name.lower() else 0.1 * noise)
    return model.eval()


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _llava() -> tuple[nn.Module, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE)
    rows = [[1, 5, *[IMAGE] * 64, 6, 7, 8], [1, 9, *[IMAGE] * 64, 10]]
    return _spread(LlavaForConditionalGeneration(config)), prompt(rows, pixel_values=_pixels(2, 3, 32, 32))


def _llava_next() -> tuple[nn.Module, Any]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    points = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE, image_grid_pinpoints=points
    )
    # 50 x 60 pixels on a canvas of 64 x 64: 16 rows of which 13 or 14 are not padding.
    count = 64 + _cropped((50, 60), (16, 16))
    rows = [[1, 5, *[IMAGE] * count, 6, 7, 8]]
    sizes = torch.tensor([[50, 60]])
    pixels = _pixels(1, 5, 3, 32, 32)
    model = LlavaNextForConditionalGeneration(config)
    return _spread(model), prompt(rows, pixel_values=pixels, image_sizes=sizes)


def _cropped(size: tuple[int, int], canvas: tuple[int, int]) -> int:
    from visiontok.ops.anyres import valid_area

    top, bottom, left, right = valid_area(size, canvas)
    return (bottom - top) * (right - left + 1)


def _onevision() -> tuple[nn.Module, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    tokens: Any = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    points = [[32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=_llama(), image_grid_pinpoints=points, vision_feature_layer=-1, **tokens
    )
    count = 64 + _cropped((50, 60), (16, 16))
    rows = [[1, 5, *[IMAGE] * count, 6, 7, 8]]
    sizes = torch.tensor([[50, 60]])
    model = LlavaOnevisionForConditionalGeneration(config)
    return _spread(model), prompt(rows, pixel_values=_pixels(1, 5, 3, 32, 32), image_sizes=sizes)


def _internvl() -> tuple[nn.Module, Any]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=[32, 32],
        patch_size=[4, 4],
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=_llama(), image_token_id=IMAGE)
    rows = [[1, 5, *[IMAGE] * 16, 6, 7, 8], [1, 9, *[IMAGE] * 16, 10]]
    return _spread(InternVLForConditionalGeneration(config)), prompt(rows, pixel_values=_pixels(2, 3, 32, 32))


def _qwen(version: str) -> tuple[nn.Module, Any]:
    import transformers

    stem = {"2_5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    text = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "temporal_patch_size": 2, "spatial_merge_size": 2}
    if version == "2_5":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    else:
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = getattr(transformers, f"{stem}Config")(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=95,
        vision_end_token_id=96,
    )  # fmt: skip
    rows = [[1, 95, *[IMAGE] * 16, 96, 6, 7, 8], [1, 95, *[IMAGE] * 24, 96, 10]]
    given = prompt(rows, pixel_values=_pixels(64 + 96, 3 * 2 * 4 * 4))
    given["image_grid_thw"] = torch.tensor([[1, 8, 8], [1, 8, 12]])
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return _spread(getattr(transformers, f"{stem}ForConditionalGeneration")(config)), given
