"""Learned parts: hung into the model while patched, kept by set(), loaded exactly, gone after unpatch."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import visiontok as vt
from visiontok.errors import FormatError, IncompatibleError


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5} | options
    return VisionTransformer(**given).eval()


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def learned(model: Any) -> set[str]:
    return {name for name in model.state_dict() if "visiontok" in name.split(".")}


def test_they_come_with_the_patch_and_go_with_it() -> None:
    model = tiny()
    before, keys = model(IMAGE), set(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    red = vt.patch(model, "sit", keep=0.5)
    assert learned(model)
    assert set(model.state_dict()) - learned(model) == keys
    assert all(p.requires_grad for name, p in model.named_parameters() if name in learned(model))
    red.unpatch()
    assert set(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(IMAGE), before)
    assert not any("visiontok" in key for module in model.modules() for key in vars(module))


def test_set_keeps_parts_that_still_fit_and_remakes_the_others() -> None:
    model = tiny()
    red = vt.patch(model, "sit", keep=8)
    part = model.blocks[0].visiontok["sit_1"]
    red.set(keep={1: 8, 2: 4})
    assert model.blocks[0].visiontok["sit_1"] is part
    red.set(keep=4)
    assert model.blocks[0].visiontok["sit_1"] is not part
    red.set(keep=1.0)
    assert not learned(model)


def test_parts_take_device_dtype_and_mode_of_their_block() -> None:
    model = tiny().double().train()
    vt.patch(model, "sit", keep=0.5)
    parts = [p for name, p in model.named_parameters() if name in learned(model)]
    assert {p.dtype for p in parts} == {torch.float64}
    assert model.blocks[0].visiontok.training
    model.eval()
    assert not model.blocks[0].visiontok.training


def test_copies_and_pickles_have_parts_of_their_own() -> None:
    model = tiny()
    vt.patch(model, "clca", inner="sit", num_clr=1)
    expected = model(IMAGE)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(IMAGE), expected)
        with torch.no_grad():
            for name, value in other.named_parameters():
                if name in learned(other):
                    value.add_(1.0)
        assert not torch.equal(other(IMAGE), expected)
        other.unpatch() if hasattr(other, "unpatch") else vt.unpatch(other)
    assert torch.equal(model(IMAGE), expected)


def test_save_and_load_carry_them(tmp_path: Path) -> None:
    model = tiny()
    red = vt.patch(model, ("clca", {"inner": ("evit", {"keep_rate": 0.6})})[0], inner=("evit", {"keep_rate": 0.6}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in learned(model):
                value.uniform_(-1, 1)
    expected = model(IMAGE)
    red.save_pretrained(tmp_path)
    again = tiny()
    loaded = vt.from_pretrained(again, tmp_path)
    assert loaded.reducers == red.reducers
    assert torch.equal(again(IMAGE), expected)


def test_loading_names_every_misfit() -> None:
    model = tiny()
    red = vt.patch(model, "sit", keep=0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = sorted(learned(model))
    gone, wrong = names[0], names[1]
    before = {name: model.state_dict()[name].clone() for name in names}
    spoiled = {name: value for name, value in state.items() if name != gone}
    spoiled[wrong] = torch.zeros(3, 3, 3)
    spoiled["blocks.0.visiontok.sit_1.extra"] = torch.zeros(1)
    with pytest.raises(FormatError) as error:
        red.load_learned(spoiled)
    said = str(error.value)
    assert gone in said
    assert wrong in said
    assert "(3, 3, 3)" in said
    assert "sit_1.extra" in said
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)
    assert set(red.load_learned(state)) == set(names)
    assert red.load_learned({}, strict=False) == []


def test_a_head_that_cannot_be_made_leaves_no_trace() -> None:
    model = tiny(class_token=False, global_pool="avg")
    names = set(model.state_dict())
    assert not vt.supports("clca", model)
    with pytest.raises(IncompatibleError, match="class token"):
        vt.patch(model, "clca")
    assert set(model.state_dict()) == names
    assert type(model) is VisionTransformer


def test_a_part_that_fails_to_build_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    names = set(model.state_dict())

    def broken(self: Any, build: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(vt.reducers.SiT, "modules", broken)
    with pytest.raises(RuntimeError, match="no memory left"):
        vt.patch(model, "sit", keep=0.5)
    assert set(model.state_dict()) == names
    assert all(type(block).__module__.startswith("timm") and "_visiontok" not in vars(block) for block in model.blocks)
    vt.patch(model, "tome", r=2)


def test_returned_tokens_are_protected_by_default() -> None:
    model = tiny()
    red = vt.patch(model, "clca", inner=("topk", {"keep_rate": 0.5}), num_clr=2, trace=True)
    model(IMAGE)
    assert red.tokens == red.plan.tokens
    grown = 1 + 2
    for step in red.trace:
        if step.map.extra is None:
            # The class token, the carriers and all that came back stay where they are.
            assert step.prefix >= grown
            lead = torch.arange(step.prefix).expand(2, -1)
            assert torch.equal(step.map.assign[:, : step.prefix], lead)
    official = tiny()
    red = vt.patch(official, "clca", inner=("topk", {"keep_rate": 0.5}), num_clr=2, trace=True, compat="official")
    official(IMAGE)
    assert {step.prefix for step in red.trace} == {1}
