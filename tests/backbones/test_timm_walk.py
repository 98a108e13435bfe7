"""Every name of timm's ViT families is supported or refused with a reason, and the table in the docs says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm

DOCS = Path(__file__).parents[2] / "docs"
VERSION, NAMES = "1.0.31", 289


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"visiontok_docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Half a minute.
@pytest.mark.full
@pytest.mark.skipif(timm.__version__ != VERSION, reason=f"the names were counted in timm {VERSION}")
def test_every_timm_name_is_supported_or_refused_with_a_reason() -> None:
    walk = load("walk_timm")
    # Runs one model of each structure, and raises if one that counts as supported does not run as it must.
    rows = walk.walk()
    assert [row.name for row in rows] == walk.names()
    assert len(rows) == len({row.name for row in rows}) == NAMES
    assert sum(not row.reason for row in rows) >= 0.95 * NAMES
    assert all(row.reason == "" or len(row.reason.split()) > 3 for row in rows)
    # As many structures as there are, not one for all: a key that tells too little would run too few.
    assert len({row.config for row in rows}) > 60
    assert load("build").stored_walk() == walk.table(rows), "run `python docs/build.py`"


def test_names_with_different_parts_are_different_structures() -> None:
    walk = load("walk_timm")
    deit, deit3, registers, parallel, biased, shared = (
        walk.structure(walk.tiny(name))
        for name in ("deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch14_reg4_dinov2",
                     "vit_base_patch16_xp_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224")
    )  # fmt: skip
    assert len({deit, deit3, registers, parallel, biased, shared}) == 6
    assert walk.structure(walk.tiny("vit_small_patch16_224")) == deit
