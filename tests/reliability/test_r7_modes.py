"""R7, R8: the ways of calling a model and the layouts of its input change nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from reliability_support import every_reducer, fitting, images, patch_or_skip, patched_tiny, tiny
from torch.func import functional_call

import visiontok as vt
from visiontok.ops import dispatch


def _reference(name: str, x: torch.Tensor) -> torch.Tensor:
    model, _ = patched_tiny(name)
    with torch.no_grad():
        return model(x)


@every_reducer
@pytest.mark.parametrize("mode", ["grad", "inference_mode", "train", "functional_call", "frozen"])
def test_modes_are_bit_equal(name: str, mode: str) -> None:
    with dispatch.use("merge", "torch"), dispatch.use("match_slots", "torch"):
        _modes_agree(name, mode, exact=True)


@pytest.mark.parametrize("mode", ["grad", "train", "functional_call"])
def test_modes_with_gradients_agree_with_the_kernels_of_inference(mode: str) -> None:
    _modes_agree("tome", mode, exact=False)


def _modes_agree(name: str, mode: str, exact: bool) -> None:
    model, _ = patched_tiny(name)
    x = images()
    if mode == "inference_mode":
        with torch.inference_mode():
            out = model(x)
    elif mode == "functional_call":
        values = {key: value.clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}
        out = functional_call(model, values, (x,))
    else:
        model.train(mode == "train").requires_grad_(mode != "frozen")
        out = model(x)
    assert out.requires_grad == (mode in ("grad", "train", "functional_call"))
    if any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules()) and mode == "train":
        return
    if mode == "frozen" or not exact:
        # Linear layers without gradients may take another kernel; so do residual, merge and norm.
        torch.testing.assert_close(out, _reference(name, x), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out, _reference(name, x))


def test_functional_call_uses_the_values_it_is_given() -> None:
    model, _ = patched_tiny()
    values = {key: value * 0.5 for key, value in model.named_parameters()}
    other = tiny()
    other.load_state_dict(values)
    with vt.patched(other, "tome", r=3):
        assert torch.equal(functional_call(model, values, (images(),)), other(images()))


def test_train_mode_with_dropout_and_drop_path_runs_and_is_seeded() -> None:
    model = tiny(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.1, patch_drop_rate=0.25).train()
    with vt.patched(model, "tome", r=2) as red:
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(model(images()))
        assert red.tokens == [11, 9, 7, 5]
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "non_contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "storage_offset": lambda x: torch.cat([torch.zeros_like(x), x])[len(x) :],
    "expanded_batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "requires_grad": lambda x: x.clone().requires_grad_(),
}


@every_reducer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_layouts(name: str, layout: str) -> None:
    x = LAYOUTS[layout](images())
    model, _ = patched_tiny(name)
    out = model(x)
    # The patch convolution may take another kernel for another layout, which moves the last bits.
    expected = _reference(name, x.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=5e-5)
    if x.requires_grad:
        out.sum().backward()
        assert x.grad.abs().sum() > 0


@every_reducer
def test_channels_last_model(name: str) -> None:
    model, _ = patched_tiny(name)
    out = model.to(memory_format=torch.channels_last)(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, _reference(name, images()), rtol=1e-4, atol=5e-5)


POOLS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"class_token": False, "global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "manual"])
@pytest.mark.parametrize("pool", POOLS)
@every_reducer
def test_zero_batch(name: str, pool: str, fused: bool) -> None:
    model = tiny(**POOLS[pool])
    for block in model.blocks:
        block.attn.fused_attn = fused
    want = model(images()[:0]).shape
    red = patch_or_skip(model, name)
    out = model(images()[:0].requires_grad_())
    assert out.shape == want == (0, 10)
    out.sum().backward()
    assert red.tokens == red.plan.tokens


@every_reducer
def test_batch_of_one(name: str) -> None:
    model, _ = patched_tiny(name)
    together = _reference(name, images())
    for index in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(images()[index : index + 1]), together[index : index + 1])


def test_the_output_of_the_model_does_not_carry_the_state() -> None:
    for options in ({}, {"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        model, _ = patched_tiny(**options)
        assert vars(model(images())) == {}


def test_vmap_is_not_supported_but_not_silent() -> None:
    model, _ = patched_tiny()
    x = torch.stack([images(seed=1), images(seed=2)])
    want = torch.stack([model(x[0]), model(x[1])])
    with contextlib.suppress(RuntimeError, vt.VisionTokError, NotImplementedError):
        torch.testing.assert_close(torch.func.vmap(model)(x), want)


def test_every_registered_reducer_is_covered() -> None:
    assert {"tome", "pitome", "random", "identity", "tome_kth"} <= set(fitting())


def test_a_fake_tensor_forward_leaves_no_fake_behind() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    # A length of its own, so that nothing was cached for it before.
    model, _ = patched_tiny("tome", img_size=48)
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)):
            with mode:
                assert model(x).shape == (2, 10)
            assert type(model(x)) is torch.Tensor
