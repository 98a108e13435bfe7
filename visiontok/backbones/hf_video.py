"""VideoMAE and ViViT of transformers: joint attention over all patches of a video.

A token may merge with any other in space and time. The core's grids are flat, so these tokens form none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.backbones.hf_layers import PatchedAttention, PatchedLayer
from visiontok.backbones.hf_outputs import Holder, pair, presents
from visiontok.backbones.timm_blocks import PatchedNorm
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.blocks import Ran, Tap, bias_dtype, offers_ahead, run_block
from visiontok.core.joints import Joint
from visiontok.core.runtime import Stage
from visiontok.core.signals import ATTENTION, Offers, Signal, Site
from visiontok.core.state import TokenState
from visiontok.errors import IncompatibleError

__all__ = ["HFVideo"]

_HAVE = frozenset({Signal.HIDDEN}) | ATTENTION


class VideoMAEAttention(PatchedAttention):
    """VideoMAE's names; it takes no mask, and its output projection stands outside."""

    _visiontok_names = ("scaling", "dropout_prob", "_visiontok_out")

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *, tap: Tap | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if tap is None:
            return super(PatchedAttention, self).forward(hidden_states, **kwargs)  # type: ignore[misc]
        return super().forward(hidden_states, attention_mask, tap=tap, **kwargs)

    def _visiontok_qkv(self: Any, x: Tensor, rope: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.query, self.key, self.value)
        q, k, v = (part(x).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for part in parts)
        return q, k, v

    @staticmethod
    def _visiontok_out(y: Tensor) -> Tensor:
        return y


class VideoMAELayer:
    """A layer with a reduction point between attention and MLP; its MLP ends with the residual."""

    _visiontok: Stage

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        host = super().forward  # type: ignore[misc]
        return run_block(
            self._visiontok,
            hidden_states,
            lambda x, _: host(x, **kwargs),
            self._visiontok_ahead,
            lambda x, state: self._visiontok_run(x, state, **kwargs),
        )

    def _visiontok_ahead(self: Any, x: Tensor, state: TokenState) -> Offers:
        attn, bias = self.attention.attention, state.key_bias(torch.float32)
        return offers_ahead(lambda: attn._visiontok_qkv(self.layernorm_before(x)), attn.scaling, bias, state.prefix)

    def _visiontok_run(self: Any, x: Tensor, state: TokenState, **kwargs: Any) -> Ran:
        attn, normed, tap = self.attention.attention, self.layernorm_before(x), Tap()
        name = attn.config._attn_implementation
        bias = state.key_bias(bias_dtype(normed, name != "eager", attends=True))
        y = self.attention(normed, attention_mask=bias, tap=tap, **kwargs)
        offered = tap.offers(attn.scaling, bias, state.prefix)
        joint = Joint(lambda y: y, self.layernorm_after)
        x, normed, after = self._visiontok.between(x, y, joint, state, offered)
        return self.output(self.intermediate(normed), x), after, offered


class _Family(NamedTuple):
    """Where the parts of a model are.

    Attributes:
        module: Where its classes are.
        stem: What their names begin with.
        inner: Attribute of the encoder in models with a head.
        layers: Path of the layers in the encoder.
        attention: Classes of the modules on the way from the layer to its attention, by path.
        layer: Mixin of a layer.
        attend: Mixin of the innermost of those modules.
    """

    module: str
    stem: str
    inner: str
    layers: str
    attention: dict[str, str]
    layer: type
    attend: type


_FAMILIES = (
    _Family(
        "transformers.models.videomae.modeling_videomae",
        "VideoMAE",
        "videomae",
        "encoder.layer",
        {"attention": "VideoMAEAttention", "attention.attention": "VideoMAESelfAttention"},
        VideoMAELayer,
        VideoMAEAttention,
    ),
    _Family(
        "transformers.models.vivit.modeling_vivit",
        "Vivit",
        "vivit",
        "layers",
        {"attention": "VivitAttention"},
        PatchedLayer,
        PatchedAttention,
    ),
)


def _hosts(family: _Family) -> tuple[str, ...]:
    heads = ("Model", "ForVideoClassification", *(("ForPreTraining",) if family.stem == "VideoMAE" else ()))
    return tuple(f"{family.module}.{family.stem}{head}" for head in heads)


class HFVideo(Backbone):
    """VideoMAE and ViViT encoders of transformers, alone, with a classifier or with VideoMAE's decoder.

    A mean over tokens counts each as often as it has members; a decoder gets every visible token back in its place.
    Without mean pooling VideoMAE classifies by its first token, which is the prefix then.
    """

    name = "hf_video"
    library = "transformers"
    hosts = tuple(host for family in _FAMILIES for host in _hosts(family))
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}

    def blocks(self, model: Any) -> list[Block]:
        family, lead, inner = _parts(model)
        layers: Any = inner.get_submodule(family.layers)
        return [Block(f"{lead}{family.layers}.{i}", layer) for i, layer in enumerate(layers)]

    def prefix(self, model: Any) -> int:
        return 1 if self.class_token(model) is not None or _need(model) == "first" else 0

    def length(self, model: Any) -> int:
        embeddings = _parts(model)[2].embeddings
        return embeddings.patch_embeddings.num_patches + int(self.class_token(model) is not None)

    def grid(self, model: Any) -> tuple[int, int] | None:
        return None

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        return self.provides[site] - (set() if self.prefix(model) else {Signal.ATTN_PREFIX})

    def width(self, model: Any) -> int:
        return model.config.hidden_size

    def heads(self, model: Any) -> int:
        return model.config.num_attention_heads

    def class_token(self, model: Any) -> Tensor | None:
        return getattr(_parts(model)[2].embeddings, "cls_token", None)

    def input_size(self, model: Any) -> tuple[int, ...]:
        return model.config.num_frames, model.config.num_channels, *pair(model.config.image_size)

    def check(self, model: Any, site: Site) -> None:
        family = _parts(model)[0]
        for path, layer in self.blocks(model):
            for where, name in {"": f"{family.stem}Layer", **family.attention}.items():
                part = layer.get_submodule(where)
                own: Any = own_class(part).forward
                # A subclass with a forward of its own may do anything there; running ours instead would be wrong.
                if f"{own.__module__}.{own.__qualname__}" != f"{family.module}.{name}.forward":
                    place = f"{path}.{where}" if where else path
                    raise IncompatibleError(f"{place} is a {type(part).__name__}; visiontok runs {name} there.")

    def swaps(self, model: Any) -> list[Swap]:
        family, lead, inner = _parts(model)
        need = _need(model)
        swaps = [Swap("", model, Holder)] if lead else []
        swaps.append(Swap(lead[:-1], inner, presents(None if need == "first" else need)))
        if inner.layernorm is not None:
            swaps.append(Swap(f"{lead}layernorm", inner.layernorm, PatchedNorm))
        innermost = list(family.attention)[-1]
        for path, layer in self.blocks(model):
            swaps.append(Swap(path, layer, family.layer))
            swaps.append(Swap(f"{path}.{innermost}", layer.get_submodule(innermost), family.attend))
        return swaps

    def example(self) -> tuple[nn.Module, Tensor]:
        return self.examples()["videomae"]

    def examples(self) -> dict[str, tuple[nn.Module, Tensor]]:
        from transformers.models.videomae import configuration_videomae as mae_configs
        from transformers.models.videomae import modeling_videomae as mae
        from transformers.models.vivit import configuration_vivit as vivit_configs
        from transformers.models.vivit import modeling_vivit as vivit

        small: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
        small |= {"intermediate_size": 96, "image_size": 32, "num_frames": 4, "num_labels": 10}
        small |= {"initializer_range": 0.1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            joint = mae.VideoMAEForVideoClassification(mae_configs.VideoMAEConfig(**small, patch_size=8))
            tubes: Any = vivit.VivitForVideoClassification(vivit_configs.VivitConfig(**small, tubelet_size=[2, 8, 8]))
            for part in (tubes.vivit.embeddings.position_embeddings, tubes.vivit.embeddings.cls_token):
                # They start at zero, where no mistake with tokens would show.
                nn.init.normal_(part, std=0.2)
            video = torch.randn(2, 4, 3, 32, 32)
            return {"videomae": (joint.eval(), video), "vivit": (tubes.eval(), video)}


def _parts(model: Any) -> tuple[_Family, str, Any]:
    """The family, and path and module of the encoder."""
    paths = class_paths(model)
    family = next(family for family in _FAMILIES if any(host in paths for host in _hosts(family)))
    alone = f"{family.module}.{family.stem}Model" in paths
    return (family, "", model) if alone else (family, f"{family.inner}.", getattr(model, family.inner))


def _need(model: Any) -> str | None:
    """What the model around the encoder makes of its tokens: `mean`, `dense`, `first` or, unknown, None."""
    if hasattr(model, "decoder"):
        return "dense"
    if not hasattr(model, "fc_norm"):
        return None
    return "first" if model.fc_norm is None else "mean"
