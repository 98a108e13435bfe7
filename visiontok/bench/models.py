"""Models by name for the command line and for trials: the embedded ones, timm's and torchvision's."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontok.bench import torchvision_models
from visiontok.errors import (
    FormatError,
    MissingDependencyError,
    ParameterError,
    UnknownNameError,
    VisionTokError,
    did_you_mean,
)

if TYPE_CHECKING:
    from torch import nn

    from visiontok.bench.data import Transform
    from visiontok.core.reduction import Reduction

DEFAULT_MODEL = "tiny_vit"
DEFAULT_SMALLER = "tiny_vit_small_dense"
EMBEDDED = (DEFAULT_MODEL, DEFAULT_SMALLER)
# Models that no installable library has; their released weights come as files.
OWN = tuple(f"lvvit_{size}" for size in ("tiny", "xsmall", "small", "medium", "large"))
SIZES = ("tiny", "small", "base", "large", "huge")


def load(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    seed: int = 42,
) -> nn.Module:
    """Builds a model in eval mode.

    Args:
        name: an embedded model, one of `OWN`, a timm name, with or without a `.tag`, or
            `torchvision/<name>[.<weights>]`.
        pretrained: load the library's weights (needs the network or its cache); embedded models always have theirs.
        checkpoint: weights to load instead, `.safetensors`, or a `.pth` that is read as tensors only.
        input_size: `(C, H, W)`, None for the model's own.
        seed: seed of the weights where none are loaded.

    Raises:
        UnknownNameError: neither embedded nor known to the library.
        ParameterError: the model cannot take that input size.
        FormatError: the checkpoint does not fit or holds more than tensors.
        MissingDependencyError: the library is not installed.
        VisionTokError: the weights cannot be fetched.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in OWN:
            model = _own(name, pretrained and checkpoint is None, input_size)
        elif name.startswith(torchvision_models.PREFIX):
            fetch = pretrained and checkpoint is None
            model = torchvision_models.load(name, pretrained=fetch, input_size=input_size)
        else:
            model = _embedded(name, input_size) if name in EMBEDDED else _timm(name, pretrained, checkpoint, input_size)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """`(C, H, W)` that a model expects."""
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    return (channels, int(size[0]), int(size[1])) if size is not None else (channels, height, width)


def transform(model: nn.Module, name: str, size: Sequence[int] | None = None) -> Transform:
    """The evaluation transform of a model: its own for embedded ones, else from timm's configuration.

    Args:
        model: as `load` returns it.
        name: its name.
        size: `(C, H, W)`, None for the model's own.
    """
    if name in EMBEDDED:
        from visiontok.models.tiny import tiny_transform

        return tiny_transform()
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_data_config({"input_size": tuple(size or input_size(model))}, model=model)
    return create_transform(**config)  # pyright: ignore[reportReturnType]


def list_models(pattern: str = "*") -> list[str]:
    """Embedded models, our own, torchvision's and timm's (if installed) that match a shell pattern."""
    known = (*EMBEDDED, *OWN, *torchvision_models.names())
    names = [name for name in known if fnmatch.fnmatch(name, pattern)]
    try:
        import timm
    except ImportError:
        return names
    return names + timm.list_models(pattern)


def smaller_sibling(name: str) -> str | None:
    """The next smaller dense model of the same family, by name; None where there is none.

    `deit_small_patch16_224` -> `deit_tiny_patch16_224`. A `.tag` is kept if the sibling was trained with it too.
    """
    if name == DEFAULT_MODEL:
        return DEFAULT_SMALLER
    if name in EMBEDDED:
        return None
    if name in OWN:
        return dict(zip(OWN[1:], OWN)).get(name)
    if name.startswith(torchvision_models.PREFIX):
        return torchvision_models.smaller_sibling(name)
    import timm

    base, _, tag = name.partition(".")
    match = re.search(rf"_({'|'.join(SIZES)})(?=_|\d|$)", base)
    if match is None:
        return None
    for size in reversed(SIZES[: SIZES.index(match[1])]):
        sibling = f"{base[: match.start()]}_{size}{base[match.end() :]}"
        if timm.is_model(sibling):
            tagged = f"{sibling}.{tag}"
            return tagged if tag and tagged in timm.list_pretrained(f"{sibling}.*") else sibling
    return None


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads weights strictly; pickles are read as tensors only, never executed.

    Learned parts of reducers in the file are left out, `load_learned` takes them.

    Raises:
        ParameterError: no such file.
        FormatError: not a checkpoint of this model, or it holds more than tensors.
    """
    from visiontok.core.learned import CHILD
    from visiontok.models.checkpoints import read_checkpoint
    from visiontok.models.lvvit import LVViT, load_official

    state = {name: value for name, value in read_checkpoint(path).items() if CHILD not in name.split(".")}
    if isinstance(model, LVViT):
        return load_official(model, state, drop=("tsm.",))
    if (getattr(model, "pretrained_cfg", None) or {}).get("source") == "torchvision":
        from visiontok.backbones.torchvision_vit import swag_keys

        state = swag_keys(state)
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, AttributeError) as error:
        raise FormatError(f"checkpoint '{path}' does not fit {type(model).__name__}: {error}") from error


def load_learned(reduction: Reduction, path: str | Path) -> bool:
    """Loads the learned parts of a reduction, by our names or the authors', if the file holds any.

    Returns:
        Whether it did.

    Raises:
        ParameterError: no such file.
        FormatError: some are missing or do not fit.
    """
    from visiontok.models.checkpoints import read_checkpoint

    state = read_checkpoint(path)
    return bool(reduction.load_learned(state, strict=False)) and bool(reduction.load_learned(state))


def _embedded(name: str, size: Sequence[int] | None) -> nn.Module:
    from visiontok.models.tiny import INPUT_SIZE, TINY_MODELS

    if size is not None and tuple(size) != INPUT_SIZE:
        raise ParameterError(f"{name} takes {INPUT_SIZE} images only, got {tuple(size)}; leave out --img-size")
    return TINY_MODELS[name](True)


def _own(name: str, pretrained: bool, size: Sequence[int] | None) -> nn.Module:
    from visiontok.models import lvvit

    if pretrained:
        raise ParameterError(f"the weights of {name} are released as files: download one and pass --checkpoint FILE")
    if size is not None and (size[0] != 3 or size[1] != size[2]):
        raise ParameterError(f"{name} takes square images of 3 channels, got {tuple(size)}")
    options: dict[str, Any] = {} if size is None else {"img_size": int(size[1])}
    return lvvit.lvvit(name.removeprefix("lvvit_"), **options)


def _timm(name: str, pretrained: bool, checkpoint: str | Path | None, size: Sequence[int] | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(f"model '{name}' needs timm: pip install 'visiontok[timm]'") from error
    if not timm.is_model(name):
        close = did_you_mean(name, [*EMBEDDED, *timm.list_models()])
        raise UnknownNameError(f"unknown model '{name}'.{close} List them with: visiontok list models 'deit*'")
    options: dict[str, Any] = {}
    if size is not None:
        # A model that keeps its own size is better served without the argument: not every family takes it.
        default = timm.get_pretrained_cfg(name)
        if default is None or tuple(default.input_size) != tuple(size):
            options["img_size"] = tuple(size[1:]) if size[1] != size[2] else size[1]
        if size[0] != 3:
            options["in_chans"] = size[0]
    try:
        return timm.create_model(name, pretrained=pretrained and checkpoint is None, **options)
    except (TypeError, AssertionError) as error:
        raise ParameterError(f"timm cannot build '{name}' with {options}: {error}") from error
    except OSError as error:
        raise VisionTokError(
            f"the weights of '{name}' cannot be fetched: {str(error).splitlines()[0]} "
            "Without a network, pass a file with --checkpoint"
        ) from error
    except RuntimeError as error:
        raise ParameterError(f"timm cannot load '{name}' (pretrained={pretrained}): {error}") from error
