"""open_clip's vision tower around the transformer of a golden file."""

from __future__ import annotations

from typing import Any

from golden_case import Case


def build(case: Case) -> Any:
    """A tower whose transformer has the weights of the file and takes (B, N, C); the rest of it is not used.

    The files hold a bare stack of blocks over (N, B, C) tokens, the class token first.
    """
    from open_clip.transformer import VisionTransformer

    params, (length, _, width) = case.params, case.need("x").shape
    patches: Any = (1, length - 1)
    model = VisionTransformer(patches, 1, width, params["layers"], params["heads"], params["mlp_ratio"], output_dim=1)
    model.to(case.need("x").dtype)
    model.transformer.load_state_dict(case.weights(), strict=True)
    return model.eval()
