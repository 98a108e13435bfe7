"""accelerate's hooks (offload, device maps) move weights and activations; the patch works under them in any order."""

from __future__ import annotations

import pytest
import torch
from reliability_support import images, patched_tiny, tiny

import visiontok as vt

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # noqa: E402


def _want() -> torch.Tensor:
    model, _ = patched_tiny()
    with torch.no_grad():
        return model(images())


def _same(got: torch.Tensor) -> None:
    # A norm that a hook has to load is called as a module; else it may be part of the merge, which rounds otherwise.
    torch.testing.assert_close(got, _want(), rtol=0, atol=1e-6)


def test_cpu_offload_after_the_patch() -> None:
    model, red = patched_tiny()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.no_grad():
        _same(model(images()))
    assert red.tokens == [14, 11, 8, 5]


def test_cpu_offload_before_the_patch_and_clean_removal() -> None:
    model = tiny()
    with torch.no_grad():
        dense = model(images())
        accelerate.cpu_offload(model, execution_device="cpu")
        with vt.patched(model, "tome", r=3) as red:
            _same(model(images()))
            assert red.tokens == [14, 11, 8, 5]
        assert torch.equal(model(images()), dense)


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_hooks_on_every_block_in_either_order(first: str) -> None:
    model = tiny()
    with torch.no_grad():
        dense = model(images())
        calls: list[int] = []

        class Seen(AlignDevicesHook):
            def pre_forward(self, module: torch.nn.Module, *args: object, **kwargs: object) -> object:
                calls.append(1)
                return super().pre_forward(module, *args, **kwargs)

        def hook() -> None:
            for block in model.blocks:
                add_hook_to_module(block, Seen("cpu", io_same_device=True))

        if first == "hooks":
            hook()
        red = vt.patch(model, "tome", r=3)
        if first == "patch":
            hook()
        _same(model(images()))
        assert len(calls) == 4
        red.unpatch()
        assert torch.equal(model(images()), dense)
        assert len(calls) == 8
        for block in model.blocks:
            remove_hook_from_module(block)
        assert torch.equal(model(images()), dense)


def test_dispatch_over_a_device_map() -> None:
    model = tiny()
    parts = [name for name, _ in model.named_children() if name != "blocks"] + [f"blocks.{i}" for i in range(4)]
    plan = dict.fromkeys([*parts, "cls_token", "pos_embed"], "cpu")
    accelerate.dispatch_model(model, plan, main_device="cpu", force_hooks=True)
    with torch.no_grad():
        vt.patch(model, "tome", r=3)
        _same(model(images()))


def test_hooks_that_copy_between_blocks_keep_the_state() -> None:
    # On one device accelerate passes tensors on as they are; a copying hook stands for a move to another device.
    class Copying(AlignDevicesHook):
        def pre_forward(self, module: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> object:
            return tuple(arg.clone() for arg in args), kwargs

    model, red = patched_tiny()
    for block in model.blocks:
        add_hook_to_module(block, Copying("cpu"))
    with torch.no_grad():
        _same(model(images()))
    assert red.tokens == [14, 11, 8, 5]
