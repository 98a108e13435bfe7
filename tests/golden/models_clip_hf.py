"""transformers' CLIPVisionModel from golden parameters, and what LLaVA reads of it."""

from __future__ import annotations

import torch
from golden_case import Case
from torch import Tensor, nn

from visiontok.backbones.hf_vit import clip_vision_keys


def build(case: Case) -> nn.Module:
    """The vision tower that `params` describes, from a state dict with the names of transformers 4."""
    from transformers.models.clip import configuration_clip, modeling_clip

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    more = ("projection_dim", "layer_norm_eps", "hidden_act")
    config = configuration_clip.CLIPVisionConfig(**{name: case.params[name] for name in (*names, *more)})
    model = modeling_clip.CLIPVisionModel(config)
    state = clip_vision_keys(case.weights())
    # What LLaVA reads lies before the last norm, so the file leaves that out.
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"post_layernorm.weight", "post_layernorm.bias"}, missing
    assert not unexpected
    return model.eval()


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """All hidden states, the first being the embeddings."""
    with torch.no_grad():
        return model(x, output_hidden_states=True).hidden_states


def check_features(case: Case, hidden: tuple[Tensor, ...], group: Tensor) -> None:
    """Compares hidden states, what LLaVA takes of them, token counts and the last groups."""
    for layer, states in enumerate(hidden):
        case.check(f"hidden_states.{layer}", states)
    case.check("llava_features", hidden[-2][:, 1:])
    case.check("tokens", torch.tensor([states.shape[1] for states in hidden]))
    case.check("group_last", group)
