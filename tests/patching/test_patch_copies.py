"""P5, P6, P8, P14: copies, pickles, other processes, detached models, and no global side effects."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import patching_child
import pytest
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.core import patching


def test_p5_a_deepcopy_is_independent(vit: nn.Module, image: Tensor) -> None:
    vt.patch(vit, "tome", r=2)
    expected = vit(image)
    twin = copy.deepcopy(vit)
    with torch.no_grad():
        for block in vit.blocks:
            for parameter in block.parameters():
                parameter.zero_()
    assert torch.equal(twin(image), expected)
    assert not torch.equal(vit(image), expected)


def test_p5_patch_state_is_not_shared_either(vit: nn.Module, image: Tensor) -> None:
    before = vit(image)
    red = vt.patch(vit, "tome", r=2, trace=True)
    reduced = vit(image)
    twin = copy.deepcopy(vit)
    red.set(r=3)
    assert torch.equal(twin(image), reduced)
    assert red.tokens == [14, 11, 8]
    red.unpatch()
    assert torch.equal(twin(image), reduced)
    vt.unpatch(twin)
    assert type(twin) is type(vit)
    assert torch.equal(twin(image), before)
    assert all("_visiontok" not in vars(m) for m in twin.modules())


def test_p5_a_patched_copy_leaves_the_unpatched_original_alone(vit: nn.Module, image: Tensor) -> None:
    before = vit(image)
    twin = copy.deepcopy(vit)
    vt.patch(twin, "tome", r=2)
    twin(image)
    assert torch.equal(vit(image), before)
    assert not any(patching.is_patched(m) for m in vit.modules())


def test_p5_copy_of_one_block(vit: nn.Module, image: Tensor) -> None:
    vt.patch(vit, "tome", r=2)
    block = copy.deepcopy(vit.blocks[0])
    x = vit._pos_embed(vit.patch_embed(image))
    assert torch.equal(block(x), vit.blocks[0](x))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_p6_pickle(vit: nn.Module, image: Tensor, protocol: int) -> None:
    before = vit(image)
    vt.patch(vit, "tome", r=2, restore="gather", trace=True)
    reduced = vit(image)
    back = pickle.loads(pickle.dumps(vit, protocol=protocol))  # noqa: S301
    assert type(back) is type(vit)
    assert torch.equal(back(image), reduced)
    assert vars(back)["_visiontok"].tokens == [15, 13, 11]
    assert torch.equal(vt.unpatch(back)(image), before)


def test_p6_torch_save_of_the_whole_model(vit: nn.Module, image: Tensor) -> None:
    vt.patch(vit, [("tome", {"r": 1}), ("pitome", {"preset": "llava", "ratio": 0.8})])
    reduced = vit(image)
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(back(image), reduced)
    assert list(back.state_dict()) == list(vit.state_dict())


def test_p6_the_state_dict_of_a_patched_model_is_safe_to_load(vit: nn.Module) -> None:
    vt.patch(vit, "tome", r=2)
    file = io.BytesIO()
    torch.save(vit.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == vit.state_dict().keys()


def test_p8_detached_shares_tensors_and_leaves_the_original(
    vit: nn.Module, image: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    vit.register_buffer("extra", torch.ones(2))
    held, before = snapshot(vit), vit(image)
    fast = vt.detached(vit)
    red = vt.patch(fast, "tome", r=2)
    reduced = fast(image)
    assert red.tokens == [15, 13, 11]
    assert snapshot(vit) == held
    assert torch.equal(vit(image), before)
    assert {n: p.data_ptr() for n, p in fast.named_parameters()} == {n: p.data_ptr() for n, p in vit.named_parameters()}
    assert all(a is b for a, b in zip(fast.parameters(), vit.parameters()))
    assert fast.extra is vit.extra
    assert not {id(m) for m in fast.modules()} & {id(m) for m in vit.modules()}
    with torch.no_grad():
        vit.head.bias.add_(1.0)
    torch.testing.assert_close(fast(image), reduced + 1.0)


def test_p8_detached_of_a_patched_model_is_patched_on_its_own(vit: nn.Module, image: Tensor) -> None:
    red = vt.patch(vit, "tome", r=2)
    reduced = vit(image)
    twin = vt.detached(vit)
    red.unpatch()
    assert torch.equal(twin(image), reduced)
    assert torch.equal(vt.unpatch(twin)(image), vit(image))


@pytest.fixture(scope="module")
def spawned() -> dict[str, Any]:
    """What a spawned process answers to a pickled patched model; see patching_child."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(image).tolist()
        vt.patch(model, "tome", r=2)
        reduced = model(image).tolist()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=patching_child.child, args=(theirs,))
    process.start()
    theirs.close()
    ours.send_bytes(pickle.dumps((model, image)))
    answer = ours.recv()
    process.join(60)
    assert process.exitcode == 0
    return {**answer, "expected": (reduced, plain)}


def test_p6_a_spawned_process_runs_and_unpatches_the_model(spawned: dict[str, Any]) -> None:
    reduced, plain = spawned["expected"]
    torch.testing.assert_close(torch.tensor(spawned["reduced"]), torch.tensor(reduced))
    torch.testing.assert_close(torch.tensor(spawned["plain"]), torch.tensor(plain))
    assert reduced != plain


def test_p14_importing_and_using_visiontok_changes_no_global(spawned: dict[str, Any]) -> None:
    assert spawned["changed"] == []
    assert spawned["switches"] == []


def test_p14_patching_changes_no_class(vit: nn.Module, image: Tensor) -> None:
    watched = ("torch.nn", "timm.models", "timm.layers")
    before = patching_child.globals_of(watched)
    assert "timm.models.vision_transformer.Block.forward" in before
    assert "timm.layers.attention.Attention.forward" in before
    with vt.patched(vit, "tome", r=2):
        vit(image)
        during = patching_child.globals_of(watched)
    assert {key for key in before if during.get(key) != before[key]} == set()
