"""1D image tokenizers: an image to a few ordered tokens and back.

`load` gives a `Tokenizer`; `save` and `open` are the `.vtok` files that hold tokens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visiontok.registry import Registry
from visiontok.tokenizers.base import Progressive, Tokenizer

registry: Registry[Tokenizer] = Registry("tokenizer", "visiontok.tokenizers", "visiontok.tokenizers")

_ORIGIN = {
    "load": "loading",
    "list_tokenizers": "loading",
    "open": "file_format",
    "save": "file_format",
}

__all__ = ["Progressive", "Tokenizer", "list_tokenizers", "load", "open", "registry", "save"]

if TYPE_CHECKING:
    from visiontok.tokenizers.file_format import open, save
    from visiontok.tokenizers.loading import list_tokenizers, load


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module 'visiontok.tokenizers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ORIGIN[name]}"), name)
