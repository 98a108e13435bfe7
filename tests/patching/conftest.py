"""A small ViT for the patching tests, and a record of everything that a patch must give back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def make_vit() -> Callable[..., nn.Module]:
    """Makes a timm ViT of 16 patches and 3 blocks, the same one for the same options."""
    from timm.models.vision_transformer import VisionTransformer

    def make(**options: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return VisionTransformer(**{**SMALL, **options}).eval()

    return make


@pytest.fixture
def vit(make_vit: Callable[..., nn.Module]) -> nn.Module:
    """The default one."""
    return make_vit()


@pytest.fixture
def image() -> Tensor:
    """Two images for `vit`."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


Snapshot = Callable[[nn.Module], dict[str, Any]]


@pytest.fixture
def snapshot() -> Snapshot:
    """Everything about a model that patching and unpatching must leave as it was."""
    return take_snapshot


def take_snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return {
        "types": {path: type(m) for path, m in model.named_modules()},
        "keys": {path: list(vars(m)) for path, m in model.named_modules()},
        "values": {
            path: {
                k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (int, float, str, bool, tuple, type(None)))
            }
            for path, m in model.named_modules()
        },
        "hooks": {path: [len(vars(m)[name] or ()) for name in hooks] for path, m in model.named_modules()},
        "training": {path: m.training for path, m in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "storage": {name: t.data_ptr() for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "state_dict": list(model.state_dict()),
        "repr": repr(model),
    }
