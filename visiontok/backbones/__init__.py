"""One file per model family."""

from __future__ import annotations

from torch import nn

from visiontok.core.backbone import Backbone
from visiontok.registry import Registry

__all__ = ["find", "registry"]

registry: Registry[Backbone] = Registry("backbone", "visiontok.backbones", "visiontok.backbones")


def find(model: nn.Module) -> Backbone | None:
    """The backbone whose family the model belongs to, or None."""
    return next((cls() for cls in registry.classes() if cls().matches(model)), None)
