"""The seam between attention and MLP: one op for residual, merge and norm gives what the block's own modules give."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import visiontok as vt
from visiontok.core.joints import Joint
from visiontok.core.state import TokenState, apply
from visiontok.core.tokens import TokenMap
from visiontok.ops import cpu, dispatch, fusing

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

OPS = ("match_slots", "merge", "best_match", "energy", "class_rows", "key_votes")
needs_library = pytest.mark.skipif(
    cpu.refuses(torch.empty(0)) is not None, reason=f"no C++ kernels: {cpu.refuses(torch.empty(0))}"
)


@contextlib.contextmanager
def forced(implementation: str, ops: tuple[str, ...] = ("match_slots", "merge")) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ops:
            stack.enter_context(dispatch.use(name, implementation))
        yield


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**size, **{"init_values": 0.3, **options}).eval()
    for block in model.blocks:
        nn.init.normal_(block.norm2.weight, 1, 0.2)
        nn.init.normal_(block.norm2.bias, 0, 0.2)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def recorded(model: nn.Module, x: Tensor) -> Counter[str]:
    """The functions that torch.compile records of a forward, in one graph."""
    count: Counter[str] = Counter()

    def count_nodes(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        count.update(str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=count_nodes)(x)
    return count


@needs_library
@pytest.mark.parametrize(
    ("name", "budget"),
    [("tome", {"r": 3}), ("tofu", {"r": 3}), ("pitome", {"keep": 0.8}), ("evit", {"keep": 0.7}),
     ("topk", {"keep": 0.7}), ("diffrate", {"r": 3}), ("clca", {"keep": 0.8})],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"init_values": None}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_one_op_gives_what_the_modules_give(name: str, budget: dict[str, Any], options: dict[str, Any]) -> None:
    model = vit(**options)
    if options.get("class_token") is False and name in ("evit", "topk", "diffrate", "clca"):
        pytest.skip("ranks by the class token")
    vt.patch(model, name, **budget)
    with torch.inference_mode():
        with forced("torch"):
            want = model(images())
        with forced("cpp"):
            got = model(images())
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@needs_library
def test_hooks_on_the_norm_still_run() -> None:
    model, seen = vit(), []
    vt.patch(model, "tome", r=3)
    with torch.inference_mode():
        want = model(images())
        handle = model.blocks[1].norm2.register_forward_hook(
            lambda m, args, out: seen.append(tuple(out.shape)) or 2 * out
        )
        doubled = model(images())
        handle.remove()
        again = model(images())
    assert seen == [(2, 11, 48)]
    assert not torch.allclose(doubled, want)
    assert torch.equal(again, want)


@needs_library
@pytest.mark.parametrize("replace", ["instance", "subclass", "hooked scale"])
def test_a_module_that_does_something_else_is_called(replace: str) -> None:
    plain, model = vit(), vit()
    block: Any = model.blocks[0]
    if replace == "instance":
        forward = block.norm2.forward
        block.norm2.forward = lambda x: forward(x) + 1
    elif replace == "subclass":

        class Shifted(type(block.norm2)):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        block.norm2.__class__ = Shifted
    else:
        block.ls1.register_forward_hook(lambda m, args, out: 2 * out)
    for each in (plain, model):
        vt.patch(each, "tome", r=3)
    with torch.inference_mode():
        got = model(images())
        with forced("torch"):
            want = model(images())
        assert not torch.allclose(got, plain(images()), atol=1e-3)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_training_and_mixed_dtypes_keep_the_modules() -> None:
    block: Any = vit().blocks[0]
    x, half = torch.randn(1, 4, 48), torch.randn(1, 4, 48, dtype=torch.bfloat16)
    settle = lambda y: y  # noqa: E731
    assert Joint(settle, block.norm2, block.ls1).parts(x, x) is not None
    assert Joint(settle, block.norm2, block.ls1).parts(x, half) is not None, "autocast: fp32 residual, half branch"
    assert Joint(settle, block.norm2, block.ls1, plain=False).parts(x, x) is None
    assert Joint(settle, block.norm2, block.ls1).parts(half, x) is None
    assert Joint(settle, block.norm2, block.ls1).parts(half, half) is None, "norm in another dtype"
    assert Joint(settle, nn.BatchNorm1d(48)).parts(x, x) is None
    assert Joint(settle, nn.LayerNorm((4, 48))).parts(x, x) is None


@needs_library
def test_autocast_and_half_precision() -> None:
    model = vit()
    vt.patch(model, "tome", r=3)
    with torch.inference_mode():
        want = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images())
        low = model.bfloat16()(images(torch.bfloat16))
    assert mixed.dtype == torch.bfloat16
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), want, rtol=0, atol=0.1)
    torch.testing.assert_close(low.float(), want, rtol=0, atol=0.2)


def test_two_operators_replace_residual_sum_and_norm() -> None:
    """What a GPU runs: the registered operators in place of the block's own scale, sum and norm2."""
    model, x = vit(), images()
    before = recorded(model, x)
    vt.patch(model, "tome", r=3, prop_attn=False)
    with forced("triton", OPS):
        after = recorded(model, x)
    assert after["match_slots.default"] == after["merge.default"] == 3
    fewer = before - after
    assert fewer["layer_norm"] == 3
    assert fewer["mul"] == 3
    assert fewer["add"] == 3


@pytest.mark.parametrize(
    "name", ["zero_tprune", *(pytest.param(name, marks=pytest.mark.full) for name in ("pitome", "evit"))]
)
def test_other_methods_record_whole_with_operators(name: str) -> None:
    model, x = vit(), images()
    vt.patch(model, name, keep=0.7)
    want = model(x).detach()
    torch._dynamo.reset()
    with torch.no_grad(), forced("triton", OPS):
        got = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@needs_library
def test_selected_padding_keeps_its_values() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([1.0, 2.0, 0.0, 3.0, 0.0]).view(1, 5, 1)
    tm = TokenMap.keep(torch.tensor([[2, 3]]), 5, prefix=1)
    with forced("cpp"):
        reduced, state = apply(tm, x, TokenState.initial(x, 1).changed(size=size, padded=True))
    assert torch.equal(reduced, x[:, [0, 2, 3]])
    assert state.size is not None
    assert state.size.flatten().tolist() == [1.0, 0.0, 3.0]


def test_half_precision_without_the_library_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler")
    fusing._warn_of_slow_merges.cache_clear()
    with caplog.at_level("WARNING", "visiontok.cpu"), forced("torch"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert fusing.kernel(torch.empty(1, dtype=dtype)) is None
    fusing._warn_of_slow_merges.cache_clear()
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.records[0].getMessage()


def test_a_norm_trained_alone_gets_its_gradient() -> None:
    model = vit().requires_grad_(False)
    vt.patch(model, "tome", r=3)
    trained = [model.blocks[0].norm2.weight, model.blocks[1].ls1.gamma]
    for parameter in trained:
        parameter.requires_grad_(True)
    model(images()).sum().backward()
    got = [parameter.grad.clone() for parameter in trained]
    model.zero_grad()
    with forced("torch"):
        model(images()).sum().backward()
    for mine, parameter in zip(got, trained):
        torch.testing.assert_close(mine, parameter.grad)
        assert bool(mine.abs().sum() > 0)
