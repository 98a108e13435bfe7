"""Which part of what a user hands over is patched: the model itself, a tower of it, or the model in a pipeline."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch._dynamo import OptimizedModule
from torch.jit import ScriptModule

from visiontok import backbones
from visiontok.core.backbone import Backbone, class_paths
from visiontok.errors import IncompatibleError, NothingPatchedError, ParameterError, did_you_mean

__all__ = ["TOWERS", "Target", "find_towers", "resolve_target", "unwrapped"]

TOWERS = ("visual", "text")

# What models with a visual and a text tower have.
_ENCODE_IMAGE = ("encode_image", "get_image_features")
_WINDOWS = (
    "its blocks attend in shifted windows of a fixed size and its stages merge patches 2 x 2, so every token needs its "
    "place in a full grid"
)
# Families that people ask for and that no reducer can be used on, by class path, with the reason.
_REFUSED = {
    "timm.models.swin_transformer.SwinTransformer": _WINDOWS,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _WINDOWS,
    "transformers.models.swin.modeling_swin.SwinModel": _WINDOWS,
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model": _WINDOWS,
    "torchvision.models.swin_transformer.SwinTransformer": _WINDOWS,
    "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionModel": (
        "its attention makes its own position bias and its layers return tuples, which no backbone of visiontok runs"
    ),
    "open_clip.modified_resnet.ModifiedResNet": "it is a convolutional network, which has no tokens",
}


class Target(NamedTuple):
    """What will be patched.

    Attributes:
        module: The module.
        backbone: Its family.
        path: Where it is in the model, `""` for the model itself.
    """

    module: nn.Module
    backbone: Backbone
    path: str = ""


def resolve_target(model: Any, tower: str | None = None) -> tuple[nn.Module, Backbone]:
    """The module that would be patched, and its family.

    Args:
        model: A module, or a pipeline with a `model`.
        tower: `visual` or `text`, for models with both; default visual.

    Raises:
        ParameterError: Not a model, or no such tower.
        IncompatibleError: It is wrapped or compiled, or of a family that cannot be patched.
        NothingPatchedError: No part of it, or more than one, could be meant.
    """
    if tower not in (None, *TOWERS):
        raise ParameterError(f"tower must be 'visual' or 'text', got {tower!r}.")
    towers = find_towers(model)
    inner = unwrapped(model)
    name = type(inner).__name__
    if tower is None and "visual" not in towers and any(hasattr(inner, method) for method in _ENCODE_IMAGE):
        raise _refused(inner) or IncompatibleError(
            f"the visual tower of {name} is of no known family, nothing was patched; tower='text' patches the other."
        )
    wanted = tower or next(iter(towers))
    if wanted not in towers:
        raise ParameterError(f"{name} has no {wanted} tower that can be patched; it has: {', '.join(towers)}.")
    hits = towers[wanted]
    if len(hits) > 1:
        paths = ", ".join(hit.path for hit in hits)
        raise NothingPatchedError(f"{name} holds several models that could be patched ({paths}); pass one of them.")
    return hits[0].module, hits[0].backbone


def find_towers(model: Any) -> dict[str, list[Target]]:
    """Everything in a model that could be patched, outermost modules only, visual towers first.

    Raises:
        As `resolve_target`.
    """
    model = unwrapped(model)
    towers: dict[str, list[Target]] = {}
    # Families are of classes, and a model has few of them.
    seen: dict[type, Backbone | None] = {}
    for path, module in model.named_modules():
        kind = type(module)
        if kind not in seen:
            seen[kind] = backbones.find(module)
        backbone = seen[kind]
        if backbone is None:
            continue
        held = towers.setdefault(backbone.tower, [])
        if not any(path.startswith(f"{hit.path}.") or not hit.path for hit in held):
            held.append(Target(module, backbone, path))
    if not towers:
        raise _nothing(model)
    return {tower: towers[tower] for tower in TOWERS if tower in towers}


def unwrapped(model: Any) -> nn.Module:
    """The module that a pipeline or a user hands over.

    Raises:
        ParameterError: It is none.
        IncompatibleError: It is wrapped for parallel training, scripted or compiled.
    """
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise ParameterError(
            f"model must be a torch.nn.Module or a pipeline with a .model, got {type(model).__name__}."
        )
    parallel = {type(module).__name__ for module in inner.modules()} & {"DataParallel", "DistributedDataParallel"}
    for kind in sorted(parallel):
        advice = "DataParallel is not supported, use DDP" if kind == "DataParallel" else "patch before wrapping"
        raise IncompatibleError(f"the model is wrapped in {kind}: {advice} (patch model.module, then wrap it).")
    if isinstance(inner, (ScriptModule, OptimizedModule)):
        kind = "a compiled TorchScript module" if isinstance(inner, ScriptModule) else "the result of torch.compile"
        advice = "patch the eager model" if isinstance(inner, ScriptModule) else "patch the model that you compiled"
        raise IncompatibleError(f"the model is {kind}; {advice} instead.")
    return inner


def _refused(model: nn.Module) -> IncompatibleError | None:
    name = type(model).__name__
    for path, module in model.named_modules():
        reason = next((_REFUSED[host] for host in class_paths(module) if host in _REFUSED), None)
        if reason is not None:
            where = f"{name}.{path} ({type(module).__name__})" if path else name
            return IncompatibleError(f"{where} cannot be patched: {reason}.")
    return None


def _nothing(model: nn.Module) -> Exception:
    refused = _refused(model)
    if refused is not None:
        return refused
    name = type(model).__name__
    hosts = [host for cls in backbones.registry.classes() for host in cls.hosts]
    hint = did_you_mean(name, [host.rpartition(".")[2] for host in hosts])
    return NothingPatchedError(
        f"no part of {name} ({type(model).__module__}) is of a known family, nothing was patched.{hint} Known: "
        f"{', '.join(hosts)}."
    )
