"""Configurations of TiTok and One-D-Piece, read from the shapes of their weights and what a config adds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from visiontok.errors import FormatError

__all__ = ["infer_config", "official_config"]

_SIZES = {"small": (512, 8), "base": (768, 12), "large": (1024, 16)}
_HEAD = 64
_PIXEL = {"codes": 1024, "z_channels": 256, "hidden_channels": 128, "channel_mult": [1, 1, 2, 2, 4], "res_blocks": 2}


def official_config(official: Mapping[str, Any], crop: int = 256) -> dict[str, Any]:
    """Our config from an official one (`model.vq_model` of a YAML file, or `config.json`), as data.

    Raises:
        FormatError: A setting is missing or unknown.
    """
    vq = official.get("model", official)
    vq = vq.get("vq_model", vq)
    size = official.get("dataset", {}).get("preprocessing", {}).get("crop_size", crop)
    try:
        legacy, quantize = vq.get("is_legacy", True), vq.get("quantize_mode", "vq")
        sides = {}
        for part, key in (("encoder", "vit_enc_model_size"), ("decoder", "vit_dec_model_size")):
            width, heads = _SIZES[vq[key]]
            depth = {"small": 8, "base": 12, "large": 24}[vq[key]]
            sides[part] = {"width": width, "depth": depth, "heads": heads}
        return {
            "image_size": size, "patch_size": vq["vit_enc_patch_size"], "length": vq["num_latent_tokens"],
            "codebook_size": vq["codebook_size"] if quantize == "vq" else 0, "token_size": vq["token_size"],
            "use_l2_norm": vq.get("use_l2_norm", True), "commitment_cost": vq.get("commitment_cost", 0.25),
            "pixel": _PIXEL if vq.get("finetune_decoder", True) and legacy else None,
            "legacy": legacy, "quantize": quantize, **sides,
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise FormatError(f"the config lacks or does not know {error}; leave it out to go by the weights.") from None


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our config from the shapes of released weights.

    Heads are 64 wide, as in all released sizes; legacy models (with a pixel codebook) normalise their codes.

    Raises:
        FormatError: The weights are not of this kind, or of TA-TiTok, which needs a text encoder.
    """
    if any(key.startswith("decoder.text_guidance") for key in state):
        raise FormatError("these are weights of TA-TiTok: its decoder needs text features, which is not supported.")
    try:
        length = len(state["latent_tokens"])
        patch = state["encoder.patch_embed.weight"].shape[-1]
        grid = math.isqrt(len(state["encoder.positional_embedding"]) - 1)
        channels, token = len(state["encoder.conv_out.weight"]), state["decoder.decoder_embed.weight"].shape[1]
        sides = {part: _trunk(state, part) for part in ("encoder", "decoder")}
    except KeyError as error:
        raise FormatError(f"the weights are not of TiTok or One-D-Piece: {error} is missing.") from None
    codes = state.get("quantize.embedding.weight")
    pixel = _pixel(state) if "pixel_quantize.embedding.weight" in state else None
    if codes is None and channels != 2 * token:
        raise FormatError("the weights have neither a codebook (quantize.embedding.weight) nor a mean and variance.")
    return {
        "image_size": grid * patch, "patch_size": patch, "length": length,
        "codebook_size": 0 if codes is None else len(codes), "token_size": token, "use_l2_norm": pixel is not None,
        "commitment_cost": 0.25, "pixel": pixel, "legacy": pixel is not None,
        "quantize": "vae" if codes is None else "vq", **sides,
    }  # fmt: skip


def _trunk(state: Mapping[str, Tensor], part: str) -> dict[str, int]:
    width = state[f"{part}.ln_pre.weight"].numel()
    numbers = {int(key.split(".")[2]) for key in state if key.startswith(f"{part}.transformer.")}
    return {"width": width, "depth": len(numbers), "heads": max(1, width // _HEAD)}


def _pixel(state: Mapping[str, Tensor]) -> dict[str, Any]:
    codes, channels = state["pixel_quantize.embedding.weight"].shape
    levels = {int(key.split(".")[2]) for key in state if key.startswith("pixel_decoder.up.")}
    widths = [len(state[f"pixel_decoder.up.{level}.block.0.conv1.weight"]) for level in sorted(levels)]
    blocks = {int(key.split(".")[2]) for key in state if key.startswith("pixel_decoder.mid.")}
    return {
        "codes": codes, "z_channels": channels, "hidden_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths], "res_blocks": len(blocks),
    }  # fmt: skip
