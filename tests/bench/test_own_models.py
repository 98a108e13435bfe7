"""Models that no library has, by name, and checkpoints that hold learned parts beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import visiontok as vt
from visiontok.bench import models
from visiontok.errors import FormatError, ParameterError

pytest.importorskip("visiontok.reducers.sit")

SIZE = (3, 32, 32)


def reduced(checkpoint: Path | None = None, seed: int = 0) -> tuple[Any, Any, bool]:
    model = models.load("lvvit_tiny", checkpoint=checkpoint, input_size=SIZE, seed=seed)
    torch.manual_seed(seed)
    reduction = vt.patch(model, "sit", keep={1: 0.5})
    return model, reduction, checkpoint is not None and models.load_learned(reduction, checkpoint)


def test_one_file_holds_model_and_learned_parts(tmp_path: Path) -> None:
    model, _, _ = reduced()
    ours = tmp_path / "model.safetensors"
    save_file(model.state_dict(), ours)
    official = {}
    for name, value in model.state_dict().items():
        path = name.split(".")
        official[f"tsm.0.{'.'.join(path[4:])}" if "visiontok" in path else name] = value
    released = tmp_path / "released.pth"
    torch.save({"model": {**official, "rtsm.1.norm1.weight": torch.ones(3)}}, released)
    for path in (ours, released):
        other, _, loaded = reduced(path, seed=1)
        assert loaded
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_dense_file_leaves_the_learned_parts_alone(tmp_path: Path) -> None:
    dense = models.load("lvvit_tiny", input_size=SIZE)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    model, _, loaded = reduced(tmp_path / "dense.safetensors", seed=3)
    assert not loaded
    assert torch.equal(model.state_dict()["head.weight"], dense.state_dict()["head.weight"])
    part = {name: value for name, value in model.state_dict().items() if "visiontok" in name.split(".")}
    some = dict(list(part.items())[:2])
    save_file({**dense.state_dict(), **some}, tmp_path / "torn.safetensors")
    with pytest.raises(FormatError, match="missing"):
        reduced(tmp_path / "torn.safetensors")


def test_own_names() -> None:
    assert set(models.OWN) <= set(models.list_models("lvvit_*"))
    assert models.smaller_sibling("lvvit_small") == "lvvit_xsmall"
    assert models.smaller_sibling("lvvit_tiny") is None
    with pytest.raises(ParameterError, match="pass --checkpoint FILE"):
        models.load("lvvit_tiny", pretrained=True)
    with pytest.raises(ParameterError, match="square images"):
        models.load("lvvit_tiny", input_size=(3, 32, 64))
