"""What stands around the layers of transformers' vision encoders: embeddings, poolers, and the model's output."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontok.backbones.hf_layers import will_act
from visiontok.core.blocks import sized_mean
from visiontok.core.runtime import Stage, attach_state, hint_grid, state_of
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError
from visiontok.ops.restoring import Fill

__all__ = [
    "Holder",
    "PatchedEmbeddings",
    "PatchedHead",
    "PatchedModel",
    "PatchedPooler",
    "PatchedProbe",
    "pair",
    "presents",
    "signed",
]

_STATE, _GRID = "_visiontok_state", "_visiontok_grid"


def pair(value: Any) -> tuple[int, int]:
    """(h, w) of a size that may be one number."""
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return int(height), int(width)


class PatchedEmbeddings:
    """Embeddings that tell block 0 the patch grid of this image."""

    def forward(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        height, width = pixel_values.shape[-2:]
        down, across = pair(self.patch_size if hasattr(self, "patch_size") else self.config.patch_size)
        y = super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        return hint_grid(y, (int(height) // down, int(width) // across))


class PatchedPooler:
    """A pooler of the mean over patches, or of the first patch where there is no class token."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        state = state_of(hidden_states)
        if state is not None and state.trail:
            first = state.lead == 0
            y, state = state.whole(hidden_states, "nearest" if first else None)
            hidden_states = y if first else _averaged(y, state)
        return super().forward(hidden_states)  # type: ignore[misc]


class PatchedHead:
    """SigLIP's attention pool; its attention is a PatchedProbe."""

    def forward(self: Any, hidden_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = state_of(hidden_state)
        if state is not None and (state.trail or state.size is not None):
            # Sizes say what is padding; the mask names the original tokens.
            return super().forward(attach_state(*state.whole(hidden_state, None)))  # type: ignore[misc]
        return super().forward(hidden_state, *args, **kwargs)  # type: ignore[misc]


class PatchedProbe:
    """`nn.MultiheadAttention` to which a token counts as often as it has members."""

    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        state = state_of(key)
        bias = None if state is None else state.changed(proportional=True, mute=False).key_bias(query.dtype)
        mask = key_padding_mask if bias is None else bias[:, 0, 0]
        return super().forward(query, key, value, key_padding_mask=mask, **kwargs)  # type: ignore[misc]


class Holder:
    """A model around the encoder, unchanged: it holds the handle."""


class PatchedModel:
    """The encoder: its output carries no state, and is restored where that was asked for.

    `_visiontok_needs` is what the model around it makes of the last hidden states: `mean` averages them, `dense` needs
    all of them in their places, None reads the prefix or is unknown.
    """

    _visiontok_needs: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = vars(cls).get("_visiontok_base")
        if base is not None:
            # Callers look arguments up in the signature.
            cls.forward = signed(base.forward, cls.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_dict = kwargs.pop("return_dict", None)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2 and any(will_act(layer._visiontok) for layer in _layers(self)):
            raise IncompatibleError(
                f"attention_mask has shape {tuple(mask.shape)}; only one of shape (B, N), which says what is padding, "
                "can follow the tokens that this patch merges or drops."
            )
        outputs = super().forward(*args, return_dict=True, **kwargs)  # type: ignore[misc]
        self._visiontok_present(outputs)
        return outputs if (self.config.return_dict if as_dict is None else as_dict) else outputs.to_tuple()

    def _visiontok_present(self: Any, outputs: Any) -> None:
        fill = _fill(_layers(self)[0]._visiontok, self._visiontok_needs)
        # Recomputation starts from the very tensors that layers were given.
        checkpointed = self.training and getattr(_layers(self)[0], "gradient_checkpointing", False)
        reused = torch.compiler.is_compiling() or checkpointed
        state = state_of(outputs["last_hidden_state"]) if "last_hidden_state" in outputs else None
        if outputs.get("hidden_states") is not None:
            shown = [h if h is None else _shown(h, fill, reused) for h in outputs["hidden_states"]]
            outputs["hidden_states"] = tuple(shown)
        if state is not None:
            last = outputs["last_hidden_state"]
            if self._visiontok_needs == "mean" and state.trail:
                outputs["last_hidden_state"] = _averaged(*state.whole(last, None))
            else:
                outputs["last_hidden_state"] = _bare(state.whole(last, fill)[0], reused)


class _Averaging(PatchedModel):
    _visiontok_needs = "mean"


class _Dense(PatchedModel):
    _visiontok_needs = "dense"


def presents(need: str | None) -> type[PatchedModel]:
    """The mixin of an encoder whose consumer has this need; see `PatchedModel`."""
    return {None: PatchedModel, "mean": _Averaging, "dense": _Dense}[need]


def signed(host: Any, patched: Any) -> Any:
    """`patched` with the signature of `host`."""

    @functools.wraps(host)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return patched(self, *args, **kwargs)

    return forward


def _layers(model: Any) -> Any:
    holder = getattr(model, "encoder", None) or getattr(model, "model", None) or model
    return holder.layers if hasattr(holder, "layers") else holder.layer


def _fill(stage: Stage, need: str | None) -> Fill | None:
    fill: Any = {"gather": "nearest"}.get(str(stage.chain.restore), stage.chain.restore)
    return "nearest" if fill is None and need == "dense" else fill


def _shown(h: Tensor, fill: Fill | None, reused: bool) -> Tensor:
    state = state_of(h)
    return _bare(h if state is None or fill is None else state.restore(h, fill), reused)


def _bare(y: Tensor, reused: bool) -> Tensor:
    """The tensor without what visiontok hung on it."""
    held = [name for name in (_STATE, _GRID) if hasattr(y, name)]
    if held and reused:
        return y.view_as(y)
    for name in held:
        delattr(y, name)
    return y


def _averaged(x: Tensor, state: TokenState) -> Tensor:
    """(B, N0, C) with the prefix, and at every patch the mean over all of them; each token counts as often as it has
    members."""
    patches, size = x[:, state.prefix :], state.size
    mean = patches.mean(dim=1) if size is None else sized_mean(patches, size[:, state.prefix :])
    return torch.cat((x[:, : state.lead], mean.unsqueeze(1).expand(-1, state.n0 - state.lead, -1)), dim=1)
