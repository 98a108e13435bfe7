"""R10: nothing outlives the forward that made it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from reliability_support import every_reducer_at_length, every_reducer_slowly, images, patched_tiny, settings, tiny

import visiontok as vt
from visiontok.core.state import TokenState


def _alive() -> tuple[int, int]:
    """Tensors and states that exist without the cyclic collector's help."""
    objects = gc.get_objects()
    states = sum(type(o) is TokenState or type(o) is vt.TokenMap for o in objects)
    return sum(type(o) is torch.Tensor for o in objects), states


@pytest.fixture(autouse=True)
def kept() -> Any:
    """States that other tests of this process still hold; with the collector off, a reference cycle shows as growth."""
    gc.collect()
    gc.disable()
    yield _alive()[1]
    gc.enable()


@every_reducer_at_length
def test_no_growth_over_three_hundred_forwards(name: str, kept: int) -> None:
    model, _ = patched_tiny(name, depth=2, embed_dim=12)
    x = images(1)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        before = _alive()
        for _ in range(300):
            model(x)
        assert _alive() == before
    assert before[1] == kept


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@every_reducer_slowly
def test_nothing_is_alive_after_the_output_is_gone(name: str, grad: bool, kept: int) -> None:
    model, _ = patched_tiny(name)
    born: list[weakref.ref[Any]] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda m, a, out: born.extend([weakref.ref(out), weakref.ref(out._visiontok_state)])
        )
    with torch.set_grad_enabled(grad):
        out = model(images())
    assert len(born) == 8
    del out
    assert [ref() for ref in born] == [None] * 8
    assert _alive()[1] == kept


def test_training_steps_leave_nothing_behind(kept: int) -> None:
    model, _ = patched_tiny()
    model.set_grad_checkpointing(True)
    counts = []
    for _ in range(6):
        loss = model(images()).square().sum()
        loss.backward()
        del loss
        counts.append(_alive())
    assert len(set(counts[1:])) == 1
    assert counts[-1][1] == kept


def test_a_trace_holds_one_forward_only() -> None:
    model = tiny()
    with vt.patched(model, "tome", r=3, trace=True) as red, torch.no_grad():
        model(images())
        maps = [weakref.ref(step.map) for step in red.trace]
        before = _alive()
        for _ in range(5):
            model(images())
        assert _alive() == before
        assert [ref() for ref in maps] == [None] * 4


def test_patching_and_unpatching_over_and_over_leaves_nothing() -> None:
    model = tiny()
    counts = []
    for rounds in (2, 3):
        for _ in range(rounds):
            with vt.patched(model, "tome", **settings("tome")), torch.no_grad():
                model(images())
        gc.collect()
        counts.append(_alive())
    assert counts[-1] == counts[0]


def test_a_model_dies_with_its_patch() -> None:
    model, red = patched_tiny()
    with torch.no_grad():
        model(images())
    ref = weakref.ref(model)
    del model, red
    gc.collect()
    assert ref() is None
