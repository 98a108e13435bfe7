"""Weights of tokenizers: official files read as data, and the one-file form with its config inside."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from visiontok.errors import FormatError, ParameterError
from visiontok.models.checkpoints import find_checkpoint, read_checkpoint
from visiontok.models.tiny import METADATA_KEY
from visiontok.tokenizers.base import Tokenizer

__all__ = ["read_weights", "save_weights"]

_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
_LONGEST = 10_000


def read_weights(
    source: str | Path | Mapping[str, Any], filename: str | None = None, revision: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config of a weights file. Nothing in either is executed or instantiated.

    Args:
        source: A state dict, a file, a directory, or a repository id on the Hugging Face Hub.
        filename: The file in a directory or repository; default `model.safetensors`, else `pytorch_model.bin`.
        revision: Branch, tag or commit of the repository.

    Returns:
        The tensors by name, and what is known of the model: the header of the safetensors file, else the
        `config.json` beside it, else nothing.

    Raises:
        ParameterError: Nothing is there.
        FormatError: It cannot be read.
    """
    if isinstance(source, Mapping):
        return read_checkpoint(source), {}
    path = _found(source, filename, revision)
    header = _header(path) if path.suffix == ".safetensors" else {}
    return read_checkpoint(path), header or _beside(path)


def save_weights(tokenizer: Tokenizer, path: str | Path, **info: Any) -> None:
    """Writes weights and config into one `.safetensors` file that `from_checkpoint` reads.

    Args:
        tokenizer: Of any dtype.
        path: File; its folder exists.
        **info: More plain values for the header, under their names.
    """
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in tokenizer.state_dict().items()}
    header = json.dumps({"family": tokenizer.name, "config": tokenizer.config, **info}, sort_keys=True)
    save_file(state, str(path), metadata={METADATA_KEY: header})


def _found(source: str | Path, filename: str | None, revision: str | None) -> Path:
    if filename is not None:
        return find_checkpoint(source, filename, revision)
    folder = Path(source)
    if folder.is_dir():
        there = [name for name in _NAMES if (folder / name).is_file()]
        if not there:
            raise ParameterError(f"{folder} holds none of {', '.join(_NAMES)}; name the file with filename=.")
        return folder / there[0]
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2:
        return find_checkpoint(source, None, revision)
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return find_checkpoint(source, _NAMES[0], revision)
    except EntryNotFoundError:
        return find_checkpoint(source, _NAMES[1], revision)


def _header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} cannot be read as a checkpoint: {error}") from None
    if METADATA_KEY in metadata:
        return dict(json.loads(metadata[METADATA_KEY]))
    return {key: _plain(value) for key, value in metadata.items() if key != "format"}


def _beside(path: Path) -> dict[str, Any]:
    config = path.with_name("config.json")
    if not config.is_file():
        return {}
    try:
        return dict(json.loads(config.read_text()))
    except (ValueError, OSError) as error:
        raise FormatError(f"{config} cannot be read: {error}") from None


def _plain(text: str) -> Any:
    """A header entry as data: a Python literal, or YAML; long ones are no config and stay text."""
    if len(text) > _LONGEST:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return yaml.safe_load(re.sub(r"\bNone\b", "null", text))
    except (yaml.YAMLError, RecursionError):
        return text
