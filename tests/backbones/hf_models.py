"""Tiny models of transformers by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from visiontok.backbones import hf_examples


def tiny(package: str, config: str, model: str, **options: Any) -> Any:
    """A random model of `transformers.models.<package>`; see `hf_examples.tiny`."""
    where = f"transformers.models.{package}"
    settings = getattr(import_module(f"{where}.configuration_{package}"), config)
    return hf_examples.tiny(settings, getattr(import_module(f"{where}.modeling_{package}"), model), **options)
