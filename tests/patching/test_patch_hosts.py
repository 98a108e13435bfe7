"""P10–P13: models that accelerate, PEFT, a quantiser or torch.compile got hold of before or after patching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visiontok as vt
from visiontok.errors import IncompatibleError, NotPatchedError

hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")


class Counting(hooks.ModelHook):
    """Counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def expected(model: nn.Module, image: Tensor, **params: Any) -> tuple[Tensor, Tensor]:
    """Outputs of a clean model, plain and with ToMe."""
    plain = model(image)
    with vt.patched(model, "tome", **params):
        return plain, model(image)


def hooked(model: nn.Module) -> list[nn.Module]:
    return [model, *model.blocks, *(block.attn for block in model.blocks), model.norm]


def test_p10_accelerate_hooks_before_patching(vit: nn.Module, image: Tensor, snapshot: Callable[..., Any]) -> None:
    plain, reduced = expected(vit, image, r=2)
    counters = [Counting() for _ in hooked(vit)]
    for module, counter in zip(hooked(vit), counters):
        hooks.add_hook_to_module(module, counter)
    held = snapshot(vit)
    with vt.patched(vit, "tome", r=2):
        assert torch.equal(vit(image), reduced)
        assert [counter.calls for counter in counters] == [1] * len(counters)
    assert snapshot(vit) == held
    assert torch.equal(vit(image), plain)
    assert [counter.calls for counter in counters] == [2] * len(counters)
    hooks.remove_hook_from_module(vit, recurse=True)
    assert torch.equal(vit(image), plain)


def test_p10_accelerate_hooks_after_patching_and_unpatch_under_them(vit: nn.Module, image: Tensor) -> None:
    plain, reduced = expected(vit, image, r=2)
    red = vt.patch(vit, "tome", r=2)
    counters = [Counting() for _ in hooked(vit)]
    for module, counter in zip(hooked(vit), counters):
        hooks.add_hook_to_module(module, counter)
    assert torch.equal(vit(image), reduced)
    red.unpatch()
    assert torch.equal(vit(image), plain)
    assert [counter.calls for counter in counters] == [2] * len(counters)


def test_p10_hooks_removed_while_patched_and_after(vit: nn.Module, image: Tensor) -> None:
    plain, reduced = expected(vit, image, r=2)
    for module in hooked(vit):
        hooks.add_hook_to_module(module, Counting())
    red = vt.patch(vit, "tome", r=2)
    hooks.remove_hook_from_module(vit, recurse=True)
    assert "forward" in vars(vit.blocks[0])
    assert torch.equal(vit(image), reduced)
    red.unpatch()
    assert torch.equal(vit(image), plain)
    with vt.patched(vit, "tome", r=2):
        assert torch.equal(vit(image), reduced)
    assert torch.equal(vit(image), plain)


def test_p10_cpu_offload_before_and_after(make_vit: Callable[..., nn.Module], image: Tensor) -> None:
    from accelerate import cpu_offload

    plain, reduced = expected(make_vit(), image, r=2)
    vit = make_vit()
    cpu_offload(vit, execution_device=torch.device("cpu"))
    assert vit.blocks[0].attn.qkv.weight.is_meta
    with torch.no_grad(), vt.patched(vit, "tome", r=2):
        assert torch.equal(vit(image), reduced)
    with torch.no_grad():
        assert torch.equal(vit(image), plain)
    late = make_vit()
    red = vt.patch(late, "tome", r=2)
    cpu_offload(late, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(late(image), reduced)
        red.unpatch()
        assert torch.equal(late(image), plain)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_p10_device_map(make_vit: Callable[..., nn.Module], image: Tensor) -> None:
    from accelerate import dispatch_model

    plain, reduced = expected(make_vit(), image, r=2)
    vit = make_vit()
    parts = [name for name, _ in vit.named_children()]
    dispatch_model(vit, dict.fromkeys([*parts, "cls_token", "pos_embed"], "cpu"), force_hooks=True)
    assert hasattr(vit, "_hf_hook")
    with torch.no_grad(), vt.patched(vit, "tome", r=2):
        assert torch.equal(vit(image), reduced)
    with torch.no_grad():
        assert torch.equal(vit(image), plain)


@pytest.mark.parametrize("where", ["", "blocks.1", "blocks.1.attn", "norm"])
def test_p10_a_strangers_forward_is_refused(
    vit: nn.Module, image: Tensor, where: str, snapshot: Callable[..., Any]
) -> None:
    module = vit.get_submodule(where)
    module.forward = functools.partial(type(module).forward, module)
    held = snapshot(vit)
    named = {"": "VisionTransformer", "blocks.1.attn": "blocks.1 attention"}.get(where, where).replace(".", r"\.")
    message = rf"{named} has a forward of its own on the instance \(partial\), which would bypass.*remove it"
    with pytest.raises(IncompatibleError, match=message):
        vt.patch(vit, "tome", r=2)
    assert snapshot(vit) == held


def test_p10_a_strangers_forward_under_an_accelerate_hook_is_refused(vit: nn.Module) -> None:
    block = vit.blocks[0]
    block.forward = functools.partial(type(block).forward, block)
    hooks.add_hook_to_module(block, Counting())
    with pytest.raises(IncompatibleError, match=r"blocks\.0 has a forward of its own"):
        vt.patch(vit, "tome", r=2)


def test_p10_a_strangers_forward_after_patching_blocks_unpatch(vit: nn.Module, image: Tensor) -> None:
    plain, reduced = expected(vit, image, r=2)
    red = vt.patch(vit, "tome", r=2)
    block = vit.blocks[1]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(IncompatibleError, match=r"cannot unpatch Block: it was given a forward of its own.*remove"):
        red.unpatch()
    assert torch.equal(vit(image), reduced)
    del block.forward
    red.unpatch()
    assert torch.equal(vit(image), plain)


def test_a_class_changed_after_patching_blocks_unpatch(vit: nn.Module, image: Tensor) -> None:
    # What FSDP2 does to a module that it shards.
    red = vt.patch(vit, "tome", r=2)
    patched_class = type(vit.blocks[0])
    vit.blocks[0].__class__ = type("FSDPBlock", (patched_class,), {})
    reduced = vit(image)
    with pytest.raises(
        NotPatchedError, match="cannot unpatch FSDPBlock: its class was changed after patching; unshard"
    ):
        red.unpatch()
    assert torch.equal(vit(image), reduced)
    vit.blocks[0].__class__ = patched_class
    red.unpatch()
    assert "_visiontok" not in vars(vit.blocks[0])


# ---- PEFT


def lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(4)
    config = peft.LoraConfig(target_modules=["qkv"], r=4, lora_alpha=32, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def keys_of_block0(vit: Any, image: Tensor) -> Tensor:
    x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(image)))
    qkv = vit.blocks[0].attn.qkv(x)
    return qkv.view(*x.shape[:2], 3, vit.blocks[0].attn.num_heads, -1).permute(2, 0, 3, 1, 4)[1]


@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_p11_lora_on_qkv_is_in_the_keys(vit: nn.Module, image: Tensor, order: str) -> None:
    with torch.no_grad():
        if order == "patch first":
            red = vt.patch(vit, "tome", r=3, trace=True)
            model = lora(vit)
        else:
            model = lora(vit)
            red = vt.patch(model, "tome", r=3, trace=True)
        assert red.model is vit
        with_lora = model(image)
        state = vt.TokenState.initial(torch.empty(2, 17, 24), prefix=1)
        wanted = vt.reducers.ToMe(r=3).decide(vt.Signals.of(KEY=keys_of_block0(vit, image)), state, budget=3)
        assert torch.equal(red.trace[0].map.assign, wanted.assign)
        with model.disable_adapter():
            assert not torch.allclose(model(image), with_lora, atol=1e-3)
            assert not torch.equal(red.trace[0].map.assign, wanted.assign)
        torch.testing.assert_close(model(image), with_lora)
        model.merge_adapter()
        torch.testing.assert_close(model(image), with_lora, rtol=1e-4, atol=1e-4)
        assert torch.equal(red.trace[0].map.assign, wanted.assign)
        model.unmerge_adapter()
        red.unpatch()
        plain = model(image)
        assert not torch.allclose(plain, with_lora, atol=1e-3)
        with vt.patched(model, "tome", r=3):
            torch.testing.assert_close(model(image), with_lora)
        torch.testing.assert_close(model(image), plain)


def test_p11_lora_trains_through_the_merges(vit: nn.Module, image: Tensor) -> None:
    model = lora(vit)
    with vt.patched(model, "tome", r=3):
        model(image).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all("lora_" in name for name in trained)


# ---- quantised layers


class Packed(nn.Module):
    """A linear layer with int8 storage, and no `weight` to slice."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", linear.bias.detach().clone())

    def dequantised(self) -> Tensor:
        return self.packed * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.shift)


def test_p12_quantised_linears_without_weight(make_vit: Callable[..., nn.Module], image: Tensor) -> None:
    packed, dense = make_vit(), make_vit()
    for block, twin in zip(packed.blocks, dense.blocks):
        for name in ("qkv", "proj"):
            layer = Packed(getattr(block.attn, name))
            setattr(block.attn, name, layer)
            getattr(twin.attn, name).weight.data.copy_(layer.dequantised())
    assert not hasattr(packed.blocks[0].attn.qkv, "weight")
    plain, reduced = expected(dense, image, r=2)
    before = packed(image)
    torch.testing.assert_close(before, plain)
    with vt.patched(packed, "tome", r=2) as red:
        torch.testing.assert_close(packed(image), reduced)
        assert red.tokens == [15, 13, 11]
    assert torch.equal(packed(image), before)


# ---- torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_p13_patch_set_and_unpatch_after_compile_take_effect(
    make_vit: Callable[..., nn.Module], image: Tensor, how: str
) -> None:
    vit = make_vit(depth=2)
    plain, reduced = expected(vit, image, r=2)
    _, stronger = expected(vit, image, r=4)
    compiled: Any = vit
    if how == "torch.compile":
        compiled = torch.compile(vit, backend="eager", fullgraph=True)
    else:
        vit.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), plain)
    red = vt.patch(vit, "tome", r=2)
    torch.testing.assert_close(compiled(image), reduced)
    red.set(r=4)
    torch.testing.assert_close(compiled(image), stronger)
    red.unpatch()
    torch.testing.assert_close(compiled(image), plain)
    assert not torch.allclose(plain, reduced)
    assert not torch.allclose(reduced, stronger)


@pytest.mark.usefixtures("fresh_dynamo")
def test_p13_patch_then_compile_then_unpatch(make_vit: Callable[..., nn.Module], image: Tensor) -> None:
    vit = make_vit(depth=2)
    plain, reduced = expected(vit, image, r=2)
    vt.patch(vit, "tome", r=2)
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), reduced)
    vt.unpatch(vit)
    torch.testing.assert_close(compiled(image), plain)


@pytest.mark.usefixtures("fresh_dynamo")
def test_p13_no_hook_carries_the_patch(vit: nn.Module) -> None:
    count = sum(len(vars(m)[k]) for m in vit.modules() for k in vars(m) if k.endswith("_hooks") and vars(m)[k])
    with vt.patched(vit, "tome", r=2):
        now = sum(len(vars(m)[k]) for m in vit.modules() for k in vars(m) if k.endswith("_hooks") and vars(m)[k])
        assert now == count
        assert not any("forward" in vars(m) for m in vit.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_works(vit: nn.Module, image: Tensor) -> None:
    with vt.patched(vit, "tome", r=2), torch.no_grad():
        traced = torch.jit.trace(vit, image)
        torch.testing.assert_close(traced(image), vit(image))
