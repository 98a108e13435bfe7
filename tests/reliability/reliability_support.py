"""Tiny timm models and the reducers that the reliability tests run on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visiontok as vt

SIZE = 32


def tiny(**options: Any) -> Any:
    """A random ViT of 16 patches and a class token; the same weights every time."""
    from timm.models.vision_transformer import VisionTransformer

    defaults: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(**{**defaults, "num_classes": 10, **options}).eval()
        for parameter in model.parameters():
            # timm starts biases at zero and the class token near it, which would hide mix-ups.
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images."""
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def settings(name: str) -> dict[str, Any]:
    """Parameters with which a reducer removes a few tokens; chosen by what it accepts, so new files join."""
    for params in ({"r": 3}, {"keep": 0.8}, {}):
        try:
            vt.reducers.create(name, **params)
        except vt.VisionTokError:
            continue
        return params
    raise AssertionError(f"{name} accepts neither r, keep nor its defaults")


def fitting() -> list[str]:
    """Registered reducers that fit the tiny model."""
    return [name for name in vt.list_reducers() if vt.supports(vt.reducers.create(name, **settings(name)), tiny())]


def patch_or_skip(model: Any, name: str, **options: Any) -> vt.Reduction:
    """Patches with `settings`; skips the test where the model lacks what the reducer needs (a class token)."""
    fits = vt.supports(vt.reducers.create(name, **settings(name)), model)
    if not fits:
        pytest.skip(fits.reason)
    return vt.patch(model, name, **settings(name), **options)


def patched_tiny(name: str = "tome", **options: Any) -> tuple[Any, vt.Reduction]:
    """A patched tiny model and its handle."""
    model = tiny(**options)
    return model, patch_or_skip(model, name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    """Two sets of named tensors agree."""
    assert ours.keys() == theirs.keys()
    assert ours
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# One of each kind for the default run: merging, random selection, summing, padding, column votes, looking ahead, spans,
# learned and soft maps, composites. The others run under `full`.
_KINDS = ("tome", "random", "evit", "ats", "zero_tprune", "mctf", "expedite", "sit", "clca")
# Where one test takes many seconds (compilers, exporters): merging, and a composite, which holds most kinds.
_FEW = ("tome", "clca")


def _among(names: tuple[str, ...]) -> pytest.MarkDecorator:
    full = pytest.mark.full
    return pytest.mark.parametrize(
        "name", [name if name in names else pytest.param(name, marks=full) for name in fitting()]
    )


every_reducer = _among(_KINDS)
every_reducer_slowly = _among(_FEW)
# Where a single method takes ten seconds.
every_reducer_at_length = _among(_FEW[:1])
