"""V1: the numbers of every reducer on every backbone, stored, so that a release cannot change them unnoticed.

Weights and inputs come from a frozen generator, not from the host library's initialisation, so that only mathematics
can change them. After an intended change: `python tests/regression/regression_numbers.py [backbone ...]`, and say in
the commit why they moved.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import visiontok as vt
from visiontok import backbones, reducers

FOLDER = Path(__file__).parent / "data"
# Enough to notice any change, little enough to keep.
SAMPLES = 64


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that depend on a name only: numpy keeps the stream of RandomState for ever."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def fill(model: nn.Module, part: str = "") -> None:
    """Gives every parameter with axes, and with `part` in its name, numbers that depend on its name only."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part not in name or not parameter.dim():
                continue
            noise = draw(name, tuple(parameter.shape))
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))


def sampled(values: Tensor) -> Tensor:
    """At most `SAMPLES` values, evenly spread."""
    flat = values.detach().double().flatten()
    return flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES]


def budget_of(name: str) -> dict[str, Any]:
    known = reducers.registry.get(name).budget_names
    return next((budget for budget in ({"r": 2}, {"keep": 0.7}) if set(budget) <= set(known)), {})


def numbers(backbone: str) -> dict[str, Tensor]:
    """What every reducer that fits the backbone's example makes of it, in double precision."""
    model, inputs = backbones.registry.get(backbone)().example()
    model = model.double().eval()

    def fixed(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return draw("input", tuple(leaf.shape)) if floating else leaf

    fill(model)
    inputs = tree_map(fixed, inputs)
    found: dict[str, Tensor] = {}
    for name in vt.list_reducers():
        if not vt.supports(name, model):
            continue
        with vt.patched(model, name, **budget_of(name)), torch.no_grad():
            fill(model, "visiontok.")
            out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        if isinstance(out, Mapping) and "logits" in out:
            # What stands beside the logits of a multimodal model depends on the version of transformers.
            out = out["logits"]
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        found[name] = torch.cat([sampled(leaf) for leaf in leaves])
    return found


def stored(backbone: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The stored numbers and the versions that they are from."""
    with safe_open(FOLDER / f"{backbone}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def store(backbone: str) -> None:
    """Writes the numbers of now."""
    library = backbones.registry.get(backbone).library.replace("open_clip", "open_clip_torch")
    said = {"visiontok": vt.__version__, "torch": version("torch"), **({library: version(library)} if library else {})}
    FOLDER.mkdir(exist_ok=True)
    save_file(numbers(backbone), FOLDER / f"{backbone}.safetensors", metadata=said)


if __name__ == "__main__":
    for name in sys.argv[1:] or vt.list_backbones():
        store(name)
        print(f"{name}: {len(stored(name)[0])} reducers")
