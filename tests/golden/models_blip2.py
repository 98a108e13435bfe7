"""timm's Eva with the weights of LAVIS's EVA ViT, the vision tower of BLIP-2."""

from __future__ import annotations

import functools
from typing import Any

from golden_case import Case
from torch import nn


def build(case: Case) -> Any:
    """The tower that the weights of the file describe, in the dtype of the images; it returns all tokens.

    LAVIS's tower has no bias on keys and, as a rule, no norm after the last block and no head.
    """
    from timm.models.eva import Eva

    weights, x = case.weights(), case.need("x")
    kernel, hidden = weights["patch_embed.proj.weight"], weights["blocks.0.mlp.fc1.weight"]
    model = Eva(
        img_size=tuple(x.shape[-2:]),
        patch_size=tuple(kernel.shape[-2:]),
        embed_dim=len(kernel),
        depth=case.params["depth"],
        num_heads=case.params["num_heads"],
        mlp_ratio=len(hidden) / len(kernel),
        qkv_bias="blocks.0.attn.q_bias" in weights,
        init_values=1.0 if "blocks.0.gamma_1" in weights else None,
        norm_layer=functools.partial(nn.LayerNorm, eps=case.params.get("norm_eps", 1e-6)),
        use_post_transformer_norm="norm.weight" in weights,
        use_fc_norm=False,
        global_pool="",
        num_classes=0,
    ).to(x.dtype)
    model.load_state_dict(weights, strict=True)
    return model.eval()
