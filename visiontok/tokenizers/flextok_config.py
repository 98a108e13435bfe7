"""Configurations of FlexTok: the released sizes, and official configs read as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visiontok.errors import FormatError, UnknownNameError, did_you_mean

__all__ = ["VARIANTS", "from_official", "variant_config"]

_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "act_fn": "silu",
}  # fmt: skip
_VAE_KEYS = (*_VAE, "in_channels", "out_channels", "sample_size")
VARIANTS = {"d12_d12": (12, 12), "d18_d18": (18, 18), "d18_d28": (18, 28)}
"""Depth of encoder and decoder; the width is 64 times that."""

# What these flags say elsewhere changes the computation in ways that no released model uses.
_REQUIRED = {
    "enc_register_module": {"ordering_mode": "nested"},
    "enc_seq_packer": {"mask_mode": "causal_last"},
    "dec_seq_packer": {"mask_mode": "full", "per_subseq_embs": True},
    "dec_transformer": {"adaLN_expansion": 2, "gated_mlp": True, "qk_norm": True},
    "enc_transformer": {"gated_mlp": True, "qk_norm": True},
    "dec_latent_dropout": {"replace_with_single_token": False},
    "enc_posemb_module": {"posemb_type": "sincos"},
    "dec_patches_posemb_module": {"posemb_type": "sincos"},
}


def variant_config(name: str, channels: int = 16) -> dict[str, Any]:
    """The config of a released size: "d12_d12", "d18_d18" or "d18_d28".

    Raises:
        UnknownNameError: Another name.
    """
    key = name.replace("-", "_")
    if key not in VARIANTS:
        raise UnknownNameError(
            f"unknown FlexTok variant {name!r}.{did_you_mean(name, VARIANTS)} Known: {', '.join(VARIANTS)}."
        )
    encoder, decoder = VARIANTS[key]
    return {
        "image_size": 256, "latent_size": 32, "latent_channels": channels, "patch_size": 2, "length": 256,
        "levels": [8, 8, 8, 5, 5, 5], "scaling_factor": 1.0, "vae": {**_VAE, "latent_channels": channels},
        "posemb_scaling": "absolute", "register_posemb": "learnable_sum",
        "encoder": {"dim": 64 * encoder, "depth": encoder, "head_dim": 64, "mlp_ratio": 4.0},
        "decoder": {
            "dim": 64 * decoder, "depth": decoder, "head_dim": 64, "mlp_ratio": 4.0, "frequency_size": 256,
            "max_timestep": 1000.0, "max_period": 256.0,
        },
    }  # fmt: skip


def from_official(official: Mapping[str, Any], vae: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Our config from the hydra config in a released file's header or `config.json`.

    Args:
        official: With the keys `vae`, `encoder`, `decoder`, `regularizer`; only read, never instantiated.
        vae: The VAE's own diffusers config; default the released one.

    Raises:
        FormatError: A part is missing, or a flag asks for a computation that is not the released one.
    """
    try:
        encoder, decoder = (official[part]["module_dict"] for part in ("encoder", "decoder"))
        _check({**encoder, **decoder})
        enc, dec = encoder["enc_transformer"], decoder["dec_transformer"]
        patch, places, time = encoder["enc_patch_emb"], encoder["enc_posemb_module"], decoder["dec_time_embedder"]
        registers = decoder["dec_registers_posemb_module"]
        latent = int(places["max_sizes"][0]) * int(patch["patch_sizes"][0])
        layers = dict(vae or {**_VAE, "latent_channels": patch["channels_in"]})
        # Every level of the VAE but the last halves the picture.
        size = latent * 2 ** (len(layers["block_out_channels"]) - 1)
        return {
            "image_size": size, "latent_size": latent, "latent_channels": int(patch["channels_in"]),
            "patch_size": int(patch["patch_sizes"][0]), "length": int(registers["max_sizes"][0]),
            "levels": [int(level) for level in official["regularizer"]["levels"]],
            "scaling_factor": float(official["vae"].get("scaling_factor", 1.0)),
            "vae": {key: layers[key] for key in _VAE_KEYS if key in layers},
            "posemb_scaling": places.get("posemb_scaling", "absolute"),
            "register_posemb": registers.get("posemb_type", "learnable_sum"),
            "encoder": _trunk(enc),
            "decoder": {
                **_trunk(dec), "frequency_size": int(time.get("frequency_embedding_size", 256)),
                "max_timestep": float(time.get("max_timestep", 1000.0)),
                "max_period": float(time.get("max_period", 256.0)),
            },
        }  # fmt: skip
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FormatError(f"the config of FlexTok is incomplete: {error!r}; pass config= or variant=.") from None


def _trunk(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dim": int(part["dim"]), "depth": int(part["depth"]), "head_dim": int(part.get("head_dim", 64)),
        "mlp_ratio": float(part.get("mlp_ratio", 4.0)),
    }  # fmt: skip


def _check(modules: Mapping[str, Any]) -> None:
    for name, flags in _REQUIRED.items():
        for flag, wanted in flags.items():
            found = modules.get(name, {}).get(flag, wanted)
            if found != wanted:
                raise FormatError(f"{name}.{flag} is {found!r} in this config; only {wanted!r} is supported.")
