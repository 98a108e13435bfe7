"""Loading a saved reduction from a directory or the Hugging Face Hub. Never a class path, never code."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from visiontok import backbones
from visiontok.core.reduction import Reduction
from visiontok.core.saving import CONFIG, WEIGHTS, learned_parts, read_config, revive_fields, save_pretrained
from visiontok.errors import FormatError, ParameterError

__all__ = ["from_pretrained", "save_pretrained"]


def from_pretrained(model: nn.Module, source: str | Path, *, revision: str | None = None) -> Reduction:
    """Patches a model as saved.

    Args:
        model: A model of the class and depth that the configuration names.
        source: A directory, or a repository id on the Hugging Face Hub.
        revision: Branch, tag or commit of the repository.

    Raises:
        FormatError: The configuration does not follow its schema, or is for another kind of model; the message lists
            what differs. Nothing is patched then.
        UnknownNameError, ParameterError, IncompatibleError: As in `visiontok.patch`.
    """
    from visiontok.api import patch
    from visiontok.finding import resolve_target

    config = read_config(_fetch(source, CONFIG, revision))
    items = [(item["name"], revive_fields(item["fields"])) for item in config["reducers"]]
    tower = _tower_of(config["backbone"])
    target, backbone = resolve_target(model, tower)
    blocks = backbone.blocks(target)
    found = {"backbone": backbone.name, "model_class": type(target).__name__, "depth": len(blocks)}
    differing = [key for key, value in found.items() if config[key] != value]
    wrong = [f"{key}: saved {config[key]!r}, this model {found[key]!r}" for key in differing]
    if wrong:
        raise FormatError(f"the saved reduction is for another model ({'; '.join(wrong)}).")
    reduction = patch(model, items, tower=tower, restore=config["restore"])
    try:
        if learned_parts(target):
            _load_learned(target, _fetch(source, WEIGHTS, revision))
    except BaseException:
        reduction.unpatch()
        raise
    return reduction


def _tower_of(backbone: str) -> str | None:
    known = backbones.registry.names()
    return backbones.registry.get(backbone).tower if backbone in known else None


def _fetch(source: str | Path, name: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        file = folder / name
        if not file.is_file():
            raise FormatError(f"{folder} holds no {name}; save a reduction there with Reduction.save_pretrained.")
        return file
    if folder.is_absolute() or len(folder.parts) > 2:
        raise ParameterError(f"source must be an existing directory or a hub repository 'owner/name', got {source!s}.")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), name, revision=revision))


def _load_learned(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} cannot be read: {error}.") from None
    expected = learned_parts(model)
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise FormatError(f"{path.name} does not fit: missing {missing}, unexpected {extra}.")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.is_floating_point() != want.is_floating_point():
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise FormatError(f"{path.name}: {name} is {got}, this model has {tuple(want.shape)} {want.dtype}.")
    model.load_state_dict(tensors, strict=False)
