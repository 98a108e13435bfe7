"""P1–P4, P7: what patch puts in place, unpatch takes away, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.core import patching
from visiontok.errors import (
    AlreadyPatchedError,
    IncompatibleError,
    NotPatchedError,
    StateLostError,
    UnknownNameError,
)

TWO_SITES = ["tome", ("pitome", {"preset": "llava", "ratio": 0.8})]


def test_p1_unpatch_restores_everything(
    make_vit: Callable[..., nn.Module], image: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    vit = make_vit(pre_norm=True, init_values=0.1, drop_path_rate=0.1)
    vit.blocks[1].register_forward_hook(lambda *_: None)
    vit.blocks[0].requires_grad_(False)
    vit.train()
    vit.blocks[2].eval()
    held = snapshot(vit)
    before = vit.eval()(image)
    vit.train()
    vit.blocks[2].eval()
    red = vt.patch(vit, "tome", r=2, trace=True, restore="gather", check_finite=True)
    vit(image)
    assert vt.unpatch(vit) is vit
    assert snapshot(vit) == held
    assert torch.equal(vit.eval()(image), before)
    assert repr(red).endswith("removed)")


def test_p1_a_patched_model_passes_for_itself(vit: nn.Module, snapshot: Callable[[nn.Module], Any]) -> None:
    held, types = snapshot(vit), [type(m) for m in vit.modules()]
    with vt.patched(vit, "tome", r=2):
        now = snapshot(vit)
        for key in ("hooks", "training", "requires_grad", "storage", "state_dict", "repr"):
            assert now[key] == held[key], key
        for module, cls in zip(vit.modules(), types):
            assert isinstance(module, cls)
            names = ("__name__", "__qualname__", "__module__")
            assert [getattr(type(module), n) for n in names] == [getattr(cls, n) for n in names]


def test_p1_the_subclass_is_made_once(make_vit: Callable[..., nn.Module]) -> None:
    first, second = make_vit(), make_vit()
    vt.patch(first, "tome", r=2)
    vt.patch(second, "random", r=2)
    assert type(first) is type(second)
    assert type(first.blocks[0]) is type(second.blocks[2])


def test_p2_patching_twice_is_refused_and_set_works(vit: nn.Module, image: Tensor) -> None:
    red = vt.patch(vit, "tome", r=2)
    reduced = vit(image)
    with pytest.raises(AlreadyPatchedError, match=r"VisionTransformer is patched already.*Reduction\.set.*unpatch"):
        vt.patch(vit, "random", r=1)
    assert torch.equal(vit(image), reduced)
    assert red.set(r=4) is red
    vit(image)
    assert red.tokens == red.plan.tokens == [13, 9, 5]


def test_p2_a_patched_part_is_refused(vit: nn.Module, image: Tensor) -> None:
    other = nn.Sequential(vit, nn.Identity())
    vt.patch(vit, "tome", r=2)
    with pytest.raises(AlreadyPatchedError, match="patched already"):
        vt.patch(other, "tome", r=2)
    vt.unpatch(other)
    assert not any(patching.is_patched(m) for m in other.modules())


def test_p3_an_exception_inside_patched_restores(
    vit: nn.Module, image: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    held, before = snapshot(vit), vit(image)

    def fail() -> None:
        with vt.patched(vit, "tome", r=2):
            vit(image)
            raise KeyError("user code")

    with pytest.raises(KeyError, match="user code"):
        fail()
    assert snapshot(vit) == held
    assert torch.equal(vit(image), before)


def test_p3_bad_input_leaves_no_state_behind(vit: nn.Module, image: Tensor) -> None:
    before = vit(image)
    with vt.patched(vit, "tome", r=2):
        reduced = vit(image)
        with pytest.raises((RuntimeError, AssertionError)):
            vit(torch.randn(2, 3, 16, 16))
        assert torch.equal(vit(image), reduced)
    assert torch.equal(vit(image), before)


@pytest.mark.parametrize("fails_at", [0, 1, 4, 7])
def test_a_failing_install_leaves_no_trace(
    vit: nn.Module, image: Tensor, snapshot: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    held, before = snapshot(vit), vit(image)
    swap, calls = patching._swap, []

    def broken(module: nn.Module, cls: type) -> None:
        calls.append(module)
        if len(calls) == fails_at + 1:
            raise MemoryError("injected")
        swap(module, cls)

    monkeypatch.setattr(patching, "_swap", broken)
    with pytest.raises(MemoryError, match="injected"):
        vt.patch(vit, "tome", r=2)
    monkeypatch.undo()
    assert snapshot(vit) == held
    assert torch.equal(vit(image), before)
    with vt.patched(vit, "tome", r=2):
        vit(image)


def test_a_failing_staging_leaves_no_trace(
    vit: nn.Module, snapshot: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, made = snapshot(vit), []

    def broken(**options: Any) -> None:
        made.append(options)
        if len(made) == 3:
            raise MemoryError("injected")

    monkeypatch.setattr("visiontok.core.reduction.Stage", broken)
    with pytest.raises(MemoryError, match="injected"):
        vt.patch(vit, "tome", r=2)
    assert len(made) == 3
    assert snapshot(vit) == held


def test_a_failing_set_changes_nothing(vit: nn.Module, image: Tensor) -> None:
    red = vt.patch(vit, "tome", r=2)
    reduced, plan = vit(image), str(red.plan)
    for params in ({"r": -1}, {"r": [1] * 9}, {"keep": 1.5}, {"colour": 3}):
        with pytest.raises(vt.VisionTokError):
            red.set(**params)
        assert str(red.plan) == plan
        assert torch.equal(vit(image), reduced)


def test_unpatching_what_is_not_patched(vit: nn.Module) -> None:
    with pytest.raises(NotPatchedError, match="VisionTransformer is not patched"):
        vt.unpatch(vit)
    red = vt.patch(vit, "tome", r=2)
    red.unpatch()
    for call in (red.unpatch, lambda: red.set(r=3)):
        with pytest.raises(NotPatchedError, match="not in place any more"):
            call()


def test_unpatch_inside_a_with_block_is_reported(vit: nn.Module) -> None:
    with pytest.raises(NotPatchedError, match="not in place any more"), vt.patched(vit, "tome", r=2):
        vt.unpatch(vit)
    assert not any(patching.is_patched(m) for m in vit.modules())


def test_p4_two_reducers_at_different_sites(vit: nn.Module, image: Tensor) -> None:
    with vt.patched(vit, [("tome", {"r": 1}), TWO_SITES[1]], trace=True) as red:
        vit(image)
        assert {(step.layer, str(step.site)) for step in red.trace} == {
            (0, "MID"), (1, "PRE"), (1, "MID"), (2, "PRE"), (2, "MID"), (3, "PRE"),
        }  # fmt: skip
        assert red.tokens == red.plan.tokens
        with pytest.raises(vt.VisionTokError, match=r"set\(...\) is ambiguous with 2 reducers \(tome, pitome\)"):
            red.set(r=2)


def test_p4_the_same_place_twice_is_refused(vit: nn.Module, snapshot: Callable[[nn.Module], Any]) -> None:
    held = snapshot(vit)
    with pytest.raises(IncompatibleError, match=r"random and tome both act at \(MID, layer 0\)"):
        vt.patch(vit, [("tome", {"r": 1}), ("random", {"r": 1})])
    assert snapshot(vit) == held


def test_p7_state_dicts_load_strictly_both_ways(make_vit: Callable[..., nn.Module], image: Tensor) -> None:
    plain, other = make_vit(), make_vit()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    red = vt.patch(other, "tome", r=2)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert plain.load_state_dict(other.state_dict(), strict=True).missing_keys == []
    scaled = plain(image)
    fresh = make_vit()
    assert other.load_state_dict(fresh.state_dict(), strict=True).unexpected_keys == []
    red.unpatch()
    assert torch.equal(other(image), fresh(image))
    assert not torch.equal(scaled, fresh(image))


def test_unknown_parameters_of_a_reducer_instance(vit: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match=r"tome has no parameter 'rr'.*Did you mean 'r'\?"):
        vt.patch(vit, vt.reducers.ToMe(), rr=3)
    assert not patching.is_patched(vit)


def test_hooks_on_blocks_and_attention_still_fire(vit: nn.Module, image: Tensor) -> None:
    seen: list[tuple[str, int]] = []
    for name in ("blocks.0", "blocks.2", "blocks.1.attn", "blocks.1.norm1", "blocks.1.mlp", "norm"):
        part = vit.get_submodule(name)
        part.register_forward_hook(lambda _, args, out, name=name: seen.append((name, out.shape[1])))
    vit(image)
    order, seen[:] = [name for name, _ in seen], []
    with vt.patched(vit, "tome", r=2):
        vit(image)
    assert [name for name, _ in seen] == order
    assert dict(seen) == {
        "blocks.0": 15, "blocks.1.norm1": 15, "blocks.1.attn": 15, "blocks.1.mlp": 13, "blocks.2": 11, "norm": 11,
    }  # fmt: skip


@pytest.mark.parametrize("reducer", ["tome", "random"])
def test_a_hook_may_replace_the_attention_output(vit: nn.Module, image: Tensor, reducer: str) -> None:
    with vt.patched(vit, reducer, r=2):
        plain = vit(image)
        handle = vit.blocks[1].attn.register_forward_hook(lambda _, args, out: out * 0.0)
        steered = vit(image)
        assert not torch.equal(steered, plain)
        assert torch.isfinite(steered).all()
        handle.remove()
        assert torch.equal(vit(image), plain)


def test_a_hook_that_replaces_a_block_output_is_a_clear_error(vit: nn.Module, image: Tensor) -> None:
    vit.blocks[0].register_forward_hook(lambda _, args, out: out + 1.0)
    vit(image)
    with (
        torch.no_grad(),
        vt.patched(vit, "tome", r=2),
        pytest.raises(
            StateLostError, match=r"block 1: no token state came with its input \(input \(2, 15, 24\)\).*hook"
        ),
    ):
        vit(image)


def test_blocks_called_by_hand_out_of_order(vit: nn.Module, image: Tensor) -> None:
    x = vit._pos_embed(vit.patch_embed(image))
    with vt.patched(vit, "tome", r=2):
        y = vit.blocks[0](x)
        assert vit.blocks[1](y).shape == (2, 13, 24)
        with pytest.raises(
            StateLostError, match="block 2: the state that came with its input is for layer 1 and 2 x 15"
        ):
            vit.blocks[2](y)
        with pytest.raises(StateLostError, match="block 1: no token state"):
            vit.blocks[1](torch.randn(2, 15, 24))


def test_a_model_that_uses_one_block_twice_is_refused(vit: nn.Module, snapshot: Callable[[nn.Module], Any]) -> None:
    vit.blocks[2] = vit.blocks[0]
    held = snapshot(vit)
    with pytest.raises(IncompatibleError, match=r"blocks\.0 and blocks\.2 are the same module"):
        vt.patch(vit, "tome", r=2)
    assert snapshot(vit) == held


def test_patch_without_a_budget_warns(vit: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"without a budget and removes nothing; give one \(r=, keep="):
        vt.patch(vit, "tome")
