"""`load`: a tokenizer by name, from official weights or from those that the package ships."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import torch

from visiontok.errors import ParameterError, UnknownNameError, did_you_mean
from visiontok.models.tiny import WEIGHTS_DIR, MissingWeightsError
from visiontok.tokenizers.base import Tokenizer

__all__ = ["TINY", "list_tokenizers", "load", "tiny_path"]

TINY = {"tiny_one_d_piece": "one_d_piece", "tiny_flextok": "flextok"}
"""Tokenizers that the package ships, trained on handwritten digits at 32 x 32 pixels, and their families."""


def list_tokenizers(pattern: str = "*") -> list[str]:
    """Sorted names that `load` takes, by shell-style pattern."""
    from visiontok.tokenizers import registry

    return sorted(name for name in (*registry.names(), *TINY) if fnmatch.fnmatchcase(name, pattern))


def load(
    name: str, source: str | Path | dict[str, Any] | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> Tokenizer:
    """A tokenizer with its weights, in eval mode.

    Args:
        name: "flextok", "one_d_piece", "titok" or that of a third party; or one that is shipped with its weights:
            "tiny_one_d_piece", "tiny_flextok".
        source: A weights file (`.safetensors`, or a pickle of tensors only), a directory, a repository id on the
            Hugging Face Hub, or a state dict. None only for those that are shipped.
        device: Where to put it.
        **options: Those of the family's `from_checkpoint`: `variant`, `config`, `filename`, `revision`.

    Raises:
        UnknownNameError: No such tokenizer.
        ParameterError: No source where one is needed, or a source where none is.
        FormatError: The weights do not fit; missing, unexpected and misshaped entries are named.
        MissingDependencyError: FlexTok with a VAE needs diffusers.
    """
    from visiontok.tokenizers import registry

    known = list_tokenizers()
    wanted = name.replace("-", "_")
    if wanted not in known and wanted.startswith("tiny"):
        raise UnknownNameError(f"unknown tokenizer {name!r}.{did_you_mean(wanted, known)} Known: {', '.join(known)}.")
    family: Any = registry.get(TINY.get(wanted, name))
    shipped = wanted in TINY
    if shipped and source is not None:
        raise ParameterError(f"{name} brings its weights; for weights of your own use {family.name!r}.")
    if source is None and not shipped:
        tiny = next((key for key, of in TINY.items() if of == family.name), None)
        other = f", or load {tiny!r}, which is shipped" if tiny else ""
        raise ParameterError(f"source must name the weights of {family.name}: a path or a hub id{other}.")
    tokenizer = family.from_checkpoint(tiny_path(name) if source is None else source, **options)
    return tokenizer.to(device).eval()


def tiny_path(name: str) -> Path:
    """The weights file of a shipped tokenizer.

    Raises:
        MissingWeightsError: It is not there.
    """
    path = WEIGHTS_DIR / f"{name.replace('-', '_')}_digits.safetensors"
    if not path.is_file():
        raise MissingWeightsError(f"{path} is missing; install visiontok anew, or make it with train-tokenizer.")
    return path
