"""Reading released checkpoints from a file or the Hugging Face Hub: weights only, every misfit named."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontok.errors import FormatError, ParameterError

__all__ = ["find_checkpoint", "load_exactly", "read_checkpoint"]

# Under which names training scripts put the weights beside optimizer and arguments, the averaged ones first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_SHOWN = 12


def read_checkpoint(
    source: Mapping[str, Any] | str | Path, filename: str | None = None, revision: str | None = None
) -> dict[str, Tensor]:
    """The state dict of a released checkpoint. Unpickles tensors and plain data only, never code.

    Args:
        source: A state dict, a `.safetensors` file, a file that torch saved, a directory, or a repository id on the
            Hugging Face Hub (`owner/name`). Weights below a top-level key `model` or `state_dict` (or their `_ema`)
            are found there; a `module.` before every name, as DDP writes it, is taken off.
        filename: The file in a directory or hub repository; default `model.safetensors`.
        revision: Branch, tag or commit of the repository.

    Raises:
        ParameterError: `source` is neither an existing path nor a repository id.
        FormatError: The file cannot be read, or holds something other than tensors under names.
    """
    data = source if isinstance(source, Mapping) else _read(find_checkpoint(source, filename, revision))
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    wrong = (
        [str(key) for key, value in data.items() if not isinstance(value, Tensor)] if isinstance(data, Mapping) else []
    )
    if not isinstance(data, Mapping) or wrong:
        found = f"entries that are no tensors: {_listed(wrong)}" if wrong else f"a {type(data).__name__}"
        raise FormatError(f"the checkpoint must hold a state dict (tensors by name), found {found}.")
    return {key.removeprefix("module."): value for key, value in data.items()}


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], drop: tuple[str, ...] = ()) -> None:
    """Loads a state dict whose names and shapes must be exactly those of the model; all or nothing.

    Parts that visiontok added to a patched model are left out of the comparison.

    Args:
        model: The model.
        state: Its weights, by state_dict key.
        drop: Prefixes of entries to ignore.

    Raises:
        FormatError: An entry is missing, unexpected or of another shape; the message names them.
    """
    expected = {key: value for key, value in model.state_dict().items() if "visiontok" not in key.split(".")}
    given = {key: value for key, value in state.items() if not key.startswith(drop)}
    shapes = {key: (tuple(given[key].shape), tuple(expected[key].shape)) for key in expected if key in given}
    faults = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "misshaped": [f"{key} {got} instead of {want}" for key, (got, want) in shapes.items() if got != want],
    }
    said = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in faults.items() if names]
    if said:
        raise FormatError(f"the checkpoint does not fit this {type(model).__name__}: {'; '.join(said)}.")
    model.load_state_dict(given, strict=False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_checkpoint(source: str | Path, filename: str | None, revision: str | None) -> Path:
    """The local path of a file, or of one in a directory or a hub repository; errors as in `read_checkpoint`."""
    path = Path(source)
    if path.is_dir():
        path = path / (filename or "model.safetensors")
        if not path.is_file():
            raise ParameterError(f"{path.parent} holds no {path.name}; name the file with filename=.")
    if path.is_file():
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.suffix in (".pth", ".pt", ".safetensors"):
        raise ParameterError(f"checkpoint '{source!s}' does not exist; give a file, or a hub repository 'owner/name'.")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), filename or "model.safetensors", revision=revision))


def _read(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts save their parsed command line beside the weights; it is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise FormatError(f"{path.name} cannot be read as a checkpoint: {error}") from None
    except Exception as error:
        # torch raises pickle's own error, which must not be imported here, for anything but plain data.
        if type(error).__name__ != "UnpicklingError":
            raise
        # Not torch's whole message: it goes on to recommend loading without the check.
        why = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0]
        raise FormatError(
            f"checkpoint '{path.name}' cannot be read as tensors only: {why}. It holds more than tensors and plain "
            "data; convert a checkpoint that you trust to safetensors."
        ) from None
