"""visiontok: fewer tokens for vision and multimodal models.

`import visiontok` costs nothing: names are loaded when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ORIGIN = {
    "Card": "visiontok.core.reducer",
    "Reducer": "visiontok.core.reducer",
    "Reduction": "visiontok.core.reduction",
    "Signals": "visiontok.core.signals",
    "Support": "visiontok.core.plan",
    "TokenMap": "visiontok.core.tokens",
    "TokenState": "visiontok.core.state",
    "VisionTokError": "visiontok.errors",
    "apply": "visiontok.core.state",
    "compatibility": "visiontok.api",
    "describe": "visiontok.api",
    "detached": "visiontok.core.patching",
    "from_pretrained": "visiontok.hub",
    "list_backbones": "visiontok.api",
    "list_reducers": "visiontok.api",
    "patch": "visiontok.api",
    "patched": "visiontok.api",
    "supports": "visiontok.api",
    "unpatch": "visiontok.api",
    "warmup": "visiontok.warming",
}
_MODULES = ("backbones", "bench", "core", "errors", "hub", "models", "ops", "reducers", "tokenizers", "training", "viz")

__all__ = [*_ORIGIN, "__version__", *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from visiontok import backbones, bench, core, errors, hub, models, ops, reducers, tokenizers, training, viz
    from visiontok.api import (
        compatibility,
        describe,
        list_backbones,
        list_reducers,
        patch,
        patched,
        supports,
        unpatch,
    )
    from visiontok.core.patching import detached
    from visiontok.core.plan import Support
    from visiontok.core.reducer import Card, Reducer
    from visiontok.core.reduction import Reduction
    from visiontok.core.signals import Signals
    from visiontok.core.state import TokenState, apply
    from visiontok.core.tokens import TokenMap
    from visiontok.errors import VisionTokError
    from visiontok.hub import from_pretrained
    from visiontok.warming import warmup


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        value = getattr(importlib.import_module(_ORIGIN[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"visiontok.{name}")
    else:
        raise AttributeError(f"module 'visiontok' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
