"""torchvision's vision transformers by name, `torchvision/<name>[.<weights>]`, as recipes write them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from visiontok.errors import MissingDependencyError, ParameterError, UnknownNameError, VisionTokError, did_you_mean

PREFIX = "torchvision/"
_SMALLER = {"vit_l_16": "vit_b_16", "vit_l_32": "vit_b_32", "vit_h_14": "vit_l_16"}


def load(name: str, *, pretrained: bool = False, input_size: Sequence[int] | None = None) -> nn.Module:
    """Builds a torchvision ViT as its weights want it: their input size, their classes.

    Args:
        name: `torchvision/<name>`, for torchvision's default weights, or `torchvision/<name>.<weights>`, in any case.
        pretrained: fetch those weights (needs the network or torch's cache); otherwise they only say sizes and
            normalisation, and the values are random.
        input_size: `(3, S, S)`, None for that of the weights.

    Returns:
        The model; its `pretrained_cfg` says, as timm's do, how pictures are prepared.

    Raises:
        UnknownNameError: no such model or no such weights.
        ParameterError: the input size does not fit.
        MissingDependencyError: torchvision is not installed.
        VisionTokError: the weights cannot be fetched.
    """
    base, weights = _resolve(name)
    size = _input_size(name, base, weights, pretrained, input_size)
    state = _fetch(name, weights) if pretrained else None
    model = _library().get_model(base, image_size=size, num_classes=len(weights.meta["categories"]))
    if state is not None:
        model.load_state_dict(state)
    model.pretrained_cfg = _config(weights, size)
    return model


def names() -> list[str]:
    """All names without weights; none where torchvision is not installed."""
    try:
        return [PREFIX + name for name in _names()]
    except MissingDependencyError:
        return []


def smaller_sibling(name: str) -> str | None:
    """The next smaller model with weights of the same kind and input size, or None."""
    base, weights = _resolve(name)
    smaller, tag = _SMALLER.get(base), name.partition(".")[2]
    if smaller is None:
        return None
    sibling = f"{PREFIX}{smaller}{'.' * bool(tag)}{tag}"
    try:
        other = _resolve(sibling)[1]
    except UnknownNameError:
        return None
    return sibling if other.meta["min_size"] == weights.meta["min_size"] else None


def _library() -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise MissingDependencyError("models of torchvision/... need torchvision: pip install torchvision") from error
    return torchvision.models


def _names() -> list[str]:
    return [name for name in _library().list_models() if name.startswith("vit_")]


def _resolve(name: str) -> tuple[str, Any]:
    base, _, tag = name.removeprefix(PREFIX).partition(".")
    known = _names()
    if base not in known:
        close = did_you_mean(base, known)
        raise UnknownNameError(f"unknown model '{name}'.{close} Of torchvision there are: {', '.join(known)}.")
    kinds = _library().get_model_weights(base)
    if not tag:
        return base, kinds.DEFAULT
    tags = {kind.name.lower(): kind for kind in kinds}
    if tag.lower() not in tags:
        raise UnknownNameError(f"unknown weights '{tag}' of '{PREFIX}{base}'. Known: {', '.join(tags)}.")
    return base, tags[tag.lower()]


def _input_size(name: str, base: str, weights: Any, pretrained: bool, size: Sequence[int] | None) -> int:
    own = int(weights.meta["min_size"][0])
    if size is None:
        return own
    patch = int(base.rpartition("_")[2])
    if size[0] != 3 or size[1] != size[2] or size[1] % patch:
        raise ParameterError(
            f"{name} takes square images of 3 channels whose side is a multiple of {patch}, got {tuple(size)}"
        )
    if pretrained and size[1] != own:
        raise ParameterError(
            f"the weights of {name} are for {own} x {own} images, got {tuple(size)}; leave out --img-size"
        )
    return int(size[1])


def _fetch(name: str, weights: Any) -> dict[str, Any]:
    try:
        # torch announces a download on standard output, where commands print results.
        with contextlib.redirect_stdout(sys.stderr):
            return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VisionTokError(
            f"the weights of '{name}' cannot be fetched: {reason.rstrip('.')}. Without a network, pass a file with "
            "--checkpoint"
        ) from error


def _config(weights: Any, size: int) -> dict[str, Any]:
    prepare = weights.transforms()
    return {
        "source": "torchvision",
        "input_size": (3, size, size),
        "num_classes": len(weights.meta["categories"]),
        "crop_pct": prepare.crop_size[0] / prepare.resize_size[0],
        "interpolation": prepare.interpolation.value,
        "mean": tuple(prepare.mean),
        "std": tuple(prepare.std),
    }
