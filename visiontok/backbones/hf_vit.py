"""The ViTs of transformers: ViT, DeiT, MSN, MAE, I-JEPA, DINOv2, DINOv3, CLIP, SigLIP, SigLIP 2, BEiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from visiontok.backbones import hf_layers, hf_outputs
from visiontok.backbones.timm_blocks import PatchedNorm
from visiontok.core.backbone import Backbone, Block, Swap, class_paths, own_class
from visiontok.core.signals import ATTENTION, Signal, Site
from visiontok.errors import IncompatibleError

__all__ = ["HFPositionalViT", "HFViT", "clip_vision_keys"]

_HAVE = frozenset({Signal.HIDDEN, Signal.GRID}) | ATTENTION


class _Kind(NamedTuple):
    """What encoders of one kind call their outputs.

    Attributes:
        layers: Path of the layers.
        norms: Norms that tokens pass before or after them.
        layer: Mixin of a layer.
        attention: Mixin of its attention.
        model: End of the encoder's class name.
        suffix: End of the layers' class name.
    """

    layers: str = "layers"
    norms: tuple[str, ...] = ("layernorm",)
    layer: type = hf_layers.PatchedLayer
    attention: type = hf_layers.PatchedAttention
    model: str = "Model"
    suffix: str = "Layer"


class _Family(NamedTuple):
    """One modeling file.

    Attributes:
        package: Folder below `transformers.models`.
        stem: Start of its class names.
        kind: What its parts are called.
        around: Models around the encoder: end of the class name, name of the encoder in it, and what it makes of the
            last hidden states (see `PatchedModel`).
    """

    package: str
    stem: str
    kind: _Kind
    around: tuple[tuple[str, str, str], ...] = ()

    def path(self, name: str) -> str:
        """Path of the class whose name ends so."""
        return f"transformers.models.{self.package}.modeling_{self.package}.{self.stem}{name}"


_PLAIN = _Kind()
_BEIT = _Kind(layer=hf_layers.BeitLayer)
_DINO = _Kind("encoder.layer", layer=hf_layers.DinoLayer)
_ROTARY = _Kind("model.layer", ("norm",), hf_layers.RotaryLayer, hf_layers.RotaryAttention)
_CLIP = _Kind(
    "encoder.layers", ("pre_layrnorm",), hf_layers.ClipLayer, hf_layers.ClipAttention, "VisionModel", "EncoderLayer"
)
_SIGLIP = _CLIP._replace(norms=("post_layernorm",))

_MASKED = "ForMaskedImageModeling"
_CLASSIFIER = "ForImageClassification"
_FAMILIES = (
    _Family("vit", "ViT", _PLAIN, ((_MASKED, "vit", "dense"),)),
    _Family("vit_msn", "ViTMSN", _PLAIN),
    _Family("vit_mae", "ViTMAE", _PLAIN, (("ForPreTraining", "vit", "dense"),)),
    _Family("deit", "DeiT", _PLAIN, ((_MASKED, "deit", "dense"),)),
    _Family("ijepa", "IJepa", _PLAIN, ((_CLASSIFIER, "ijepa", "mean"),)),
    _Family("dinov2", "Dinov2", _DINO, ((_CLASSIFIER, "dinov2", "mean"), ("Backbone", "", "dense"))),
    _Family(
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        _DINO,
        ((_CLASSIFIER, "dinov2_with_registers", "mean"), ("Backbone", "", "dense")),
    ),
    _Family("clip", "CLIP", _CLIP, ((_CLASSIFIER, "vision_model", "mean"),)),
    _Family("metaclip_2", "MetaClip2", _CLIP, ((_CLASSIFIER, "vision_model", "mean"),)),
    _Family("siglip", "Siglip", _SIGLIP, ((_CLASSIFIER, "vision_model", "mean"),)),
    _Family("siglip2", "Siglip2", _SIGLIP, ((_CLASSIFIER, "vision_model", "mean"),)),
)
_POSITIONAL = (
    _Family("dinov3_vit", "DINOv3ViT", _ROTARY, (("Backbone", "", "dense"),)),
    _Family(
        "beit",
        "Beit",
        _BEIT,
        ((_MASKED, "beit", "dense"), ("ForSemanticSegmentation", "beit", "dense"), ("Backbone", "beit", "dense")),
    ),
)


class _Place(NamedTuple):
    """Where an encoder sits: its family, its name in the model around it, and what that needs of it."""

    family: _Family
    name: str = ""
    need: str | None = None


def _places(families: tuple[_Family, ...]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    for family in families:
        found[family.path(family.kind.model)] = _Place(family)
        found |= {family.path(end): _Place(family, name, need) for end, name, need in family.around}
    return found


def clip_vision_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the vision tower's part of a CLIP or SigLIP state dict of transformers 4 into one of version 5.

    Args:
        state: Of a `CLIPVisionModel` (`vision_model.encoder.layers.0…`) or of a whole `CLIPModel`, whose other parts
            are left out.

    Returns:
        The tensors as `CLIPVisionModel` of version 5 names them (`encoder.layers.0…`).
    """
    lead = "vision_model."
    named = {name.removeprefix(lead): value for name, value in state.items() if name.startswith(lead)}
    # A buffer that was saved once and is made anew now.
    named.pop("embeddings.position_ids", None)
    return named


class HFViT(Backbone):
    """Vision encoders of transformers with absolute positions, alone or inside a model that reads their tokens.

    The encoders inside models that read only their prefix or pooled output (`ViTForImageClassification`, `CLIPModel`)
    are found there.
    """

    name = "hf_vit"
    library = "transformers"
    hosts = tuple(_places(_FAMILIES))
    provides: ClassVar[Mapping[Site, frozenset[Signal]]] = {Site.MID: _HAVE, Site.PRE: _HAVE, Site.AROUND: _HAVE}
    _known: ClassVar[Mapping[str, _Place]] = _places(_FAMILIES)

    def _place(self, model: nn.Module) -> _Place:
        return next(self._known[path] for path in class_paths(model) if path in self._known)

    def _encoder(self, model: Any) -> Any:
        return model.get_submodule(self._place(model).name)

    def blocks(self, model: Any) -> list[Block]:
        place = self._place(model)
        path = ".".join(part for part in (place.name, place.family.kind.layers) if part)
        return [Block(f"{path}.{i}", layer) for i, layer in enumerate(model.get_submodule(path))]

    def prefix(self, model: Any) -> int:
        encoder = self._encoder(model)
        names = ("cls_token", "class_embedding", "distillation_token")
        single = sum(getattr(encoder.embeddings, name, None) is not None for name in names)
        registers = getattr(encoder.embeddings, "register_tokens", None)
        return single + (0 if registers is None else registers.shape[1])

    def length(self, model: Any) -> int:
        config = self._encoder(model).config
        if self._package(model) == "siglip2":
            return config.num_patches + self.prefix(model)
        height, width = self._sides(model)
        hidden = config.mask_ratio if self._package(model) == "vit_mae" else 0
        return int(height * width * (1 - hidden)) + self.prefix(model)

    def grid(self, model: Any) -> tuple[int, int] | None:
        # A random subset in random order, and images of any shape in one batch.
        return None if self._package(model) in ("vit_mae", "siglip2") else self._sides(model)

    def _package(self, model: Any) -> str:
        return self._place(model).family.package

    def _sides(self, model: Any) -> tuple[int, int]:
        config = self._encoder(model).config
        (height, width), (down, across) = hf_outputs.pair(config.image_size), hf_outputs.pair(config.patch_size)
        return height // down, width // across

    def width(self, model: Any) -> int:
        return self._encoder(model).config.hidden_size

    def heads(self, model: Any) -> int:
        return self._encoder(model).config.num_attention_heads

    def class_token(self, model: Any) -> Tensor | None:
        embeddings = self._encoder(model).embeddings
        token = getattr(embeddings, "cls_token", getattr(embeddings, "class_embedding", None))
        return None if token is None else token.view(1, 1, -1)

    def input_size(self, model: Any) -> tuple[int, ...]:
        config = self._encoder(model).config
        if self._package(model) == "siglip2":
            return config.num_patches, config.num_channels * config.patch_size**2
        return config.num_channels, *hf_outputs.pair(config.image_size)

    def nominal(self, model: Any, size: tuple[int, ...], batch: int = 1) -> Any:
        x = super().nominal(model, size, batch)
        if self._package(model) != "siglip2":
            return x
        # One row of patches without padding.
        return x, None, torch.tensor([[1, size[0]]] * batch)

    def signals(self, model: Any, site: Site) -> frozenset[Signal]:
        have = self.provides[site] if self.grid(model) else self.provides[site] - {Signal.GRID}
        return have if self.prefix(model) else have - {Signal.ATTN_PREFIX}

    def check(self, model: Any, site: Site) -> None:
        family = self._place(model).family
        for path, layer in self.blocks(model):
            attn = getattr(layer, family.kind.layer._visiontok_attention)
            names = family.kind.suffix, "Attention"
            for where, module, name in zip((path, f"{path} attention"), (layer, attn), names):
                own, known = own_class(module).forward, family.path(name)
                # A subclass with a forward of its own may do anything there.
                if f"{own.__module__}.{own.__qualname__}" != f"{known}.forward":
                    raise IncompatibleError(
                        f"{where} is a {type(module).__name__} with a forward of its own; visiontok runs {known}."
                    )
            self._check_bias(path, layer, attn.config)

    def _check_bias(self, path: str, layer: Any, config: Any) -> None:
        shared = getattr(config, "use_shared_relative_position_bias", False)
        biased = shared or getattr(layer, "relative_position_bias", None) is not None
        if biased and config._attn_implementation not in hf_layers.MASKED:
            raise IncompatibleError(
                f"{path} has a relative position bias, and its attention {config._attn_implementation!r} takes none; "
                f"load the model with attn_implementation in {hf_layers.MASKED}."
            )

    def swaps(self, model: Any) -> list[Swap]:
        family, name, need = self._place(model)
        encoder, lead = model.get_submodule(name), f"{name}." if name else ""
        kind = family.kind
        if own_class(encoder).__name__.endswith("Backbone"):
            # Feature maps are cut from what the stack of layers returns.
            stack = kind.layers.rpartition(".")[0]
            swaps = [
                Swap("", model, hf_outputs.Holder),
                Swap(stack, model.get_submodule(stack), hf_outputs.presents(need)),
            ]
        else:
            swaps = [Swap("", model, hf_outputs.Holder)] if name else []
            swaps.append(Swap(name, encoder, hf_outputs.presents(need)))
        for path, layer in self.blocks(model):
            attn = getattr(layer, kind.layer._visiontok_attention)
            swaps += [Swap(path, layer, kind.layer), Swap(f"{path} attention", attn, kind.attention)]
        if self.grid(model):
            swaps.append(Swap(f"{lead}embeddings", encoder.embeddings, hf_outputs.PatchedEmbeddings))
        norms = [(norm, getattr(encoder, norm)) for norm in kind.norms]
        swaps += [Swap(lead + norm, m, PatchedNorm) for norm, m in norms if not isinstance(m, nn.Identity)]
        return swaps + _pools(encoder, lead)

    def example(self) -> tuple[nn.Module, Any]:
        return self.examples()["vit"]

    def examples(self) -> dict[str, tuple[nn.Module, Any]]:
        from visiontok.backbones.hf_examples import plain_examples

        return plain_examples()


class HFPositionalViT(HFViT):
    """DINOv3 (rotary positions) and BEiT (relative position bias) of transformers."""

    name = "hf_vit_positional"
    hosts = tuple(_places(_POSITIONAL))
    positional = True
    _known = _places(_POSITIONAL)

    def aid(self, model: Any, index: int) -> Any:
        return getattr(self._encoder(model), "rope_embeddings", None)

    def example(self) -> tuple[nn.Module, Any]:
        return self.examples()["dinov3"]

    def examples(self) -> dict[str, tuple[nn.Module, Any]]:
        from visiontok.backbones.hf_examples import positional_examples

        return positional_examples()


def _pools(encoder: Any, lead: str) -> list[Swap]:
    head: Any = getattr(encoder, "head", None)
    pooler: Any = getattr(encoder, "pooler", None)
    swaps: list[Swap] = []
    if isinstance(getattr(head, "attention", None), nn.MultiheadAttention):
        swaps.append(Swap(f"{lead}head", head, hf_outputs.PatchedHead))
        swaps.append(Swap(f"{lead}head.attention", head.attention, hf_outputs.PatchedProbe))
    if pooler is not None and own_class(pooler).__name__ in ("BeitPooler", "IJepaPooler"):
        swaps.append(Swap(f"{lead}pooler", pooler, hf_outputs.PatchedPooler))
    return swaps
