"""Attention with a bias, in every implementation, against the map written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import attending, dispatch
from visiontok.ops.attending import attend

TORCH = ("mask", "fold")
BIASES = ("none", "sizes", "padding", "pairs", "heads")


def draw(dtype: torch.dtype, queries: int = 19, keys: int = 26, width: int = 16, heads: int = 3) -> list[Tensor]:
    """q, k, v as slices of fused projections."""
    noise = torch.Generator().manual_seed(keys)

    def projected(length: int) -> list[Tensor]:
        qkv = torch.randn(2, length, 3 * heads * width, generator=noise, dtype=torch.float64).to(dtype)
        return list(qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0))

    return [projected(queries)[0], *projected(keys)[1:]]


def biased(kind: str, queries: int = 19, keys: int = 26, heads: int = 3) -> Tensor | None:
    noise = torch.Generator().manual_seed(3)
    size = torch.randint(2, 200, (2, 1, 1, keys), generator=noise).double()
    if kind == "padding":
        size[1, ..., keys // 2 :] = 0
    pairs = torch.randn(2, heads if kind == "heads" else 1, queries, keys, generator=noise, dtype=torch.float64)
    return None if kind == "none" else pairs if kind in ("pairs", "heads") else size.log()


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = scale * torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    return (logits if bias is None else logits + bias.double()).softmax(dim=-1) @ v.double()


@pytest.mark.parametrize("implementation", TORCH)
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_every_implementation_is_the_map(implementation: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    q, k, v = draw(dtype)
    bias = biased(kind)
    given = None if bias is None else bias.to(dtype)
    with dispatch.use("attend", implementation):
        out = attend(q, k, v, given, scale=0.3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), written_out(q, k, v, bias, 0.3), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("implementation", TORCH)
def test_halves_err_no_more_than_twice_as_much_as_masked_attention(implementation: str, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype, 50, 64, 64)
    bias = biased("padding", 50, 64)
    assert bias is not None
    want = written_out(q, k, v, bias, 0.125)
    logits = 0.125 * (q @ k.transpose(-2, -1)) + bias.to(dtype)
    usual = (logits.softmax(dim=-1) @ v - want).abs()
    with dispatch.use("attend", implementation):
        out = attend(q, k, v, bias.float(), scale=0.125)
    assert out.dtype == dtype
    error = (out - want).abs()
    assert error.max() <= 2 * usual.max()
    assert error.mean() <= 2 * usual.mean()


def test_folded_sizes_lose_nothing_to_half_precision() -> None:
    q, k, v = draw(torch.bfloat16, 50, 64, 64)
    bias = biased("sizes", 50, 64)
    assert bias is not None
    want = written_out(q, k, v, bias, 0.125)
    with dispatch.use("attend", "fold"):
        folded = attend(q, k, v, bias.float(), scale=0.125)
    rounded = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.bfloat16().double().float(), scale=0.125)
    assert (folded - want).abs().mean() < (rounded - want).abs().mean()


@pytest.mark.parametrize("implementation", TORCH)
@pytest.mark.parametrize("kind", ["none", "sizes", "padding", "heads"])
def test_gradients(implementation: str, kind: str) -> None:
    parts = [x.detach().requires_grad_() for x in draw(torch.float64, 4, 5, 3, 2)]
    bias = biased(kind, 4, 5, 2)
    with dispatch.use("attend", implementation):
        assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, bias, scale=0.6), parts)


def test_gradients_of_a_bias_reach_it_in_every_implementation() -> None:
    q, k, v = draw(torch.float64)
    found = []
    for implementation in TORCH:
        bias = biased("sizes").requires_grad_()  # type: ignore[union-attr]
        with dispatch.use("attend", implementation):
            attend(q, k, v, bias, scale=0.3).square().sum().backward()
        found.append(bias.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("implementation", TORCH)
def test_values_may_be_narrower(implementation: str) -> None:
    q, k, v = draw(torch.float64)
    bias = biased("sizes")
    with dispatch.use("attend", implementation):
        out = attend(q, k, v[..., :5], bias, scale=0.3)
    torch.testing.assert_close(out, written_out(q, k, v[..., :5], bias, 0.3))


@pytest.mark.parametrize("implementation", TORCH)
def test_dropout_drops(implementation: str) -> None:
    q, k, _ = draw(torch.float32, 60, 60)
    ones = torch.ones_like(k)
    torch.manual_seed(0)
    with dispatch.use("attend", implementation):
        out = attend(q, k, ones, biased("sizes", 60, 60).float(), scale=0.01, dropout_p=0.5)  # type: ignore[union-attr]
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.05


@pytest.mark.parametrize("implementation", TORCH)
def test_normed_queries_under_autocast(implementation: str) -> None:
    q, k, v = draw(torch.float32)
    bias = biased("padding")
    assert bias is not None
    with torch.autocast("cpu", torch.bfloat16), dispatch.use("attend", implementation):
        out = attend(q, k, v.bfloat16(), bias.float(), scale=0.3)
    assert out.dtype == torch.bfloat16
    assert (out - written_out(q, k, v, bias, 0.3)).abs().max() < 0.05


def test_without_a_bias_torch_is_called_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(torch.bfloat16)
    seen = []
    real = F.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor | None = None, **options: float) -> Tensor:
        seen.append((args, attn_mask, options))
        return real(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for implementation in TORCH:
        with dispatch.use("attend", implementation):
            attend(q, k, v, None, scale=0.3)
    for args, mask, options in seen:
        assert [id(x) for x in args] == [id(q), id(k), id(v)]
        assert mask is None
        assert options == {"dropout_p": 0.0, "scale": 0.3}


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.float16, "fold"), (torch.bfloat16, "fold"), (torch.float32, "mask"), (torch.float64, "mask")],
)
def test_choice_by_device_and_dtype(dtype: torch.dtype, chosen: str) -> None:
    class OnGpu:
        is_cuda = True
        device = torch.device("cuda")

    fake = OnGpu()
    fake.dtype = dtype  # type: ignore[attr-defined]
    assert attending._attend.choose(fake).name == chosen  # type: ignore[arg-type]
    assert attending._attend.choose(torch.empty(0, dtype=dtype)).name == "mask"


def test_autocast_counts_as_half(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True
        device = torch.device("cuda")
        dtype = torch.float32

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert attending._attend.choose(OnGpu()).name == "fold"  # type: ignore[arg-type]


def test_compiles_without_breaks() -> None:
    q, k, v = draw(torch.float32)
    bias = biased("sizes").float()  # type: ignore[union-attr]
    run = torch.compile(lambda q, k, v: attend(q, k, v, bias, scale=0.3), fullgraph=True, backend="eager")
    for implementation in TORCH:
        torch.compiler.reset()
        with dispatch.use("attend", implementation):
            torch.testing.assert_close(run(q, k, v), attend(q, k, v, bias, scale=0.3))


def test_kernel_refuses_what_it_cannot() -> None:
    q, k, v = draw(torch.float32)
    with dispatch.use("attend", "triton"):
        with pytest.raises(ParameterError, match=r"inference, got dropout_p=0\.1"):
            attend(q, k, v, None, scale=1.0, dropout_p=0.1)
        with pytest.raises(ParameterError, match="and gradients; use fold or mask"):
            attend(q.requires_grad_(), k, v, None, scale=1.0)
        with pytest.raises(ParameterError, match="one width up to 128, got 16 for q and 5 for v"):
            attend(q.detach(), k, v[..., :5], None, scale=1.0)


def test_padded_image_stays_finite() -> None:
    q, k, v = draw(torch.float16)
    bias = torch.zeros(2, 1, 1, 26)
    bias[0] = -math.inf
    with dispatch.use("attend", "fold"):
        assert attend(q, k, v, bias, scale=0.3).isfinite().all()
