"""V1: numbers of this checkout against those stored by the last release."""

from __future__ import annotations

import pytest
import torch
from regression_numbers import FOLDER, numbers, stored

import visiontok as vt


def test_every_backbone_has_stored_numbers() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == sorted(vt.list_backbones())


@pytest.mark.parametrize("backbone", vt.list_backbones())
def test_v1_numbers_are_those_stored(backbone: str) -> None:
    have, (want, versions) = numbers(backbone), stored(backbone)
    hint = f"stored with {versions}; see regression_numbers.py"
    assert sorted(have) == sorted(want), hint
    for name, values in have.items():
        # Similarities are in fp32 whatever the model's precision, and every CPU sums them in an order of its own.
        torch.testing.assert_close(values, want[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m} {hint}")
