"""Attention, key votes and class rows in Triton, against the map written out in fp64 (K1-K3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton_modes import kernels

from visiontok.ops import dispatch
from visiontok.ops.attending import attend
from visiontok.ops.attention import Votes
from visiontok.ops.probing import prefix_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


class Mode(NamedTuple):
    """Where the kernels run.

    Attributes:
        kernels: The module.
        device: Of the tensors.
        limit: Largest error of a result of fp32 arithmetic, absolute below 1 and relative above.
    """

    kernels: ModuleType
    device: str
    limit: float


@pytest.fixture(scope="module", params=["interpreted", "compiled"])
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    interpret = request.param == "interpreted"
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no GPU")
    with kernels("attention", interpret=interpret) as module:
        # Three TF32 products lose the last bits of fp32, which the interpreter does not show.
        yield Mode(module, "cpu", 1e-6) if interpret else Mode(module, "cuda", 5e-6)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(*shape, **options).fill_(math.nan))


class Case(NamedTuple):
    """Operands of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float

    def map(self) -> tuple[Tensor, Tensor]:
        """(B, H, Nq, Nk) probabilities and (B, H, Nq) log-sum-exp in fp64; 0 and -inf where all keys are padding."""
        logits = self.scale * torch.einsum("bhid,bhjd->bhij", self.q.double(), self.k.double())
        if self.bias is not None:
            logits = logits + self.bias.double()[:, None, None]
        return logits.softmax(dim=-1).nan_to_num(0), logits.logsumexp(dim=-1)


def draw(mode: Mode, queries: int, keys: int, width: int, bias: str = "sizes", dtype: torch.dtype = torch.float32,
         batch: int = 2, heads: int = 2) -> Case:  # fmt: skip
    """q, k and v as slices of fused projections, the heads of a token side by side."""
    noise = torch.Generator().manual_seed(1000 * queries + keys + width)

    def projected(length: int) -> tuple[Tensor, ...]:
        qkv = torch.randn(batch, length, 3 * heads * width, generator=noise).to(mode.device, dtype)
        return qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)

    _, k, v = projected(keys)
    size = torch.randint(2, 40, (batch, keys), generator=noise).float()
    if bias == "padding":
        size[0, keys - keys // 3 :] = 0
        size[1] = 0
    given = None if bias == "none" else size.log().to(mode.device)
    return Case(projected(queries)[0], k, v, given, width**-0.5)


def close(found: Tensor, want: Tensor, limit: float) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=limit, atol=limit)


def check_all(mode: Mode, case: Case, *, first: int = 1, prefix: int = 1, limit: float | None = None) -> None:
    """Every function on one case."""
    q, k, v, bias, scale = case
    limit = limit or mode.limit
    probability, lse = case.map()
    out, found = mode.kernels.attention(q, k, v, bias, scale)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    # Two ulp of the output, and its rounded probabilities.
    close(out, probability @ v.double(), limit if q.dtype == torch.float32 else 2 * torch.finfo(q.dtype).eps)
    close(found, lse, limit)
    weight = torch.rand(lse.shape, generator=torch.Generator().manual_seed(1)).to(q.device)
    spent = weight.double() * (torch.arange(q.shape[2], device=q.device) >= first)
    want = torch.einsum("bhi,bhij->bhj", spent, probability)
    close(mode.kernels.key_votes(q, k, found, bias, scale, weight, first=first), want, limit)
    close(mode.kernels.key_votes(q, k, found, bias, scale, weight, first, together=True), want.sum(dim=1), 2 * limit)
    close(mode.kernels.key_votes(q, k, found, bias, scale), probability.sum(dim=2), limit)
    for known in (None, found):
        rows = mode.kernels.class_rows(q, k, bias, scale, prefix, known)
        close(rows, probability[:, :, :prefix], limit)


@pytest.mark.parametrize(
    ("queries", "keys", "width", "bias"),
    [
        (35, 67, 64, "sizes"),
        (65, 33, 16, "padding"),
        (7, 70, 72, "none"),
        (20, 32, 80, "sizes"),
        (5, 3, 1, "padding"),
        (1, 1, 2, "sizes"),
        (9, 40, 128, "padding"),
    ],
)
def test_every_result_is_that_of_the_map(mode: Mode, queries: int, keys: int, width: int, bias: str) -> None:
    check_all(mode, draw(mode, queries, keys, width, bias), first=min(1, queries - 1), prefix=min(queries, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bias", ["none", "padding"])
def test_halves_are_multiplied_exactly(mode: Mode, dtype: torch.dtype, bias: str) -> None:
    check_all(mode, draw(mode, 35, 70, 40, bias, dtype), prefix=2)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bias", ["none", "sizes", "padding"])
@pytest.mark.parametrize("width", [3, 16, 17, 48, 63, 65, 127])
@pytest.mark.parametrize(("queries", "keys"), [(2, 7), (64, 128), (130, 63)])
def test_every_result_is_that_of_the_map_everywhere(
    mode: Mode, queries: int, keys: int, width: int, bias: str, dtype: torch.dtype
) -> None:
    check_all(mode, draw(mode, queries, keys, width, bias, dtype, heads=3), first=queries // 2, prefix=min(queries, 20))


@pytest.mark.parametrize("prefix", [1, 4, 17])
def test_class_rows_of_any_prefix(mode: Mode, prefix: int) -> None:
    case = draw(mode, 20, 70, 24, heads=1)
    q, k, v, bias, scale = case
    lse = mode.kernels.attention(q, k, v, bias, scale)[1]
    for known in (None, lse):
        close(mode.kernels.class_rows(q, k, bias, scale, prefix, known), case.map()[0][:, :, :prefix], mode.limit)


@pytest.mark.parametrize("first", [0, 5, 33, 40])
def test_votes_from_any_query_on(mode: Mode, first: int) -> None:
    case = draw(mode, 40, 37, 24, heads=1)
    q, k, v, bias, scale = case
    lse = mode.kernels.attention(q, k, v, bias, scale)[1]
    want = case.map()[0][:, :, first:].sum(dim=2)
    close(mode.kernels.key_votes(q, k, lse, bias, scale, first=first), want, mode.limit)
    found = mode.kernels.key_votes(q, k, lse, bias, scale, first=first, together=True)
    close(found, want.sum(dim=1), 2 * mode.limit)


def test_agreement_with_the_torch_functions(mode: Mode) -> None:
    q, k, v, bias, scale = draw(mode, 40, 40, 32, heads=1)
    assert bias is not None
    lse = mode.kernels.attention(q, k, v, bias, scale)[1]
    weight = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(2)).to(q.device)
    over_keys = bias[:, None, None].double()
    votes = Votes(q.double(), k.double(), scale, over_keys)
    close(mode.kernels.key_votes(q, k, lse, bias, scale, weight), votes.vote(weight), mode.limit)
    rows = prefix_rows(q.double(), k.double(), 3, scale, over_keys)
    close(mode.kernels.class_rows(q, k, bias, scale, 3), rows, mode.limit)


@pytest.mark.parametrize("kind", ["none", "keys", "shared", "pairs"])
def test_attend_runs_the_kernel_on_request(mode: Mode, kind: str) -> None:
    q, k, v, bias, scale = case = draw(mode, 21, 30, 16, "sizes" if kind == "keys" else "none")
    over = {"keys": bias, "shared": torch.linspace(-2, 2, 30, device=q.device)[None]}.get(kind)
    if kind == "pairs":
        given = torch.linspace(-2, 2, 21 * 30, device=q.device).view(1, 1, 21, 30)
        want = (scale * (q @ k.mT) + given).softmax(dim=-1) @ v
    else:
        given = None if over is None else over[:, None, None]
        want = case._replace(bias=None if over is None else over.expand(2, -1)).map()[0] @ v.double()
    with dispatch.use("attend", "triton"):
        close(attend(q, k, v, given, scale=scale), want, mode.limit)


def test_keys_of_size_one_need_no_bias(mode: Mode) -> None:
    q, k, v, _, scale = draw(mode, 21, 34, 16, "none")
    for found, want in zip(
        mode.kernels.attention(q, k, v, torch.zeros(2, 34, device=q.device), scale),
        mode.kernels.attention(q, k, v, None, scale),
    ):
        assert torch.equal(found, want)


def test_large_logits_neither_overflow_nor_vanish(mode: Mode) -> None:
    case = draw(mode, 20, 70, 64, "padding", heads=1)
    case = case._replace(q=40 * case.q, k=40 * case.k)
    logits = case.scale * torch.einsum("bhid,bhjd->bhij", case.q, case.k)
    assert logits.abs().max() > 4000
    # An ulp of the largest logit is a change of the probabilities by as much.
    check_all(mode, case, prefix=3, limit=max(1, mode.limit / 1e-6) * 4 * 2**-11)


def test_any_strides(mode: Mode) -> None:
    q, k, v, bias, scale = draw(mode, 19, 30, 12)
    assert bias is not None
    wide = torch.zeros(2, 60, device=q.device)
    wide[:, ::2] = bias
    weight = torch.rand(2, 19, 2, device=q.device).transpose(1, 2)
    want = mode.kernels.attention(q, k, v, bias, scale)
    for swap in (lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        found = mode.kernels.attention(swap(q), swap(k), swap(v), wide[:, ::2], scale)
        assert all(map(torch.equal, found, want))
        rows = mode.kernels.class_rows(swap(q), swap(k), wide[:, ::2], scale, 2)
        assert torch.equal(rows, mode.kernels.class_rows(q, k, bias, scale, 2))
        votes = mode.kernels.key_votes(swap(q), swap(k), want[1].mT.contiguous().mT, wide[:, ::2], scale, weight)
        assert torch.equal(votes, mode.kernels.key_votes(q, k, want[1], bias, scale, weight.contiguous()))
    shared = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    out = mode.kernels.attention(*shared, bias[:1].expand(2, -1), scale)[0]
    assert torch.equal(out[1], want[0][0])


def test_nan_stays_in_its_image_and_head(mode: Mode) -> None:
    q, k, v, bias, scale = draw(mode, 11, 23, 16, batch=3)
    clean = results(mode, q, k, v, bias, scale)
    for broken in range(3):
        parts = [x.clone() for x in (q, k, v)]
        parts[broken][1, 1, 5] = math.nan
        for found, want in zip(results(mode, parts[0], parts[1], parts[2], bias, scale), clean):
            assert torch.equal(found[[0, 2]], want[[0, 2]])
            # Votes over all heads share the image.
            assert found.dim() == 2 or torch.equal(found[1, 0], want[1, 0])


def results(mode: Mode, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> list[Tensor]:
    """Outputs of all functions."""
    out, lse = mode.kernels.attention(q, k, v, bias, scale)
    votes = [mode.kernels.key_votes(q, k, lse, bias, scale, together=together) for together in (False, True)]
    rows = [mode.kernels.class_rows(q, k, bias, scale, 2, known) for known in (None, lse)]
    return [out, lse, *votes, *rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_an_image_gives_the_same_bits_in_every_run_and_batch(mode: Mode, dtype: torch.dtype) -> None:
    q, k, v, bias, scale = draw(mode, 35, 66, 16, dtype=dtype, heads=1)
    assert bias is not None
    want = results(mode, q, k, v, bias, scale)
    assert all(map(torch.equal, results(mode, q, k, v, bias, scale), want))
    alone = results(mode, q[1:], k[1:], v[1:], bias[1:], scale)
    assert all(torch.equal(found, both[1:]) for found, both in zip(alone, want))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_to_do(mode: Mode, batch: int, queries: int, keys: int) -> None:
    q = torch.ones(batch, 2, queries, 8, device=mode.device)
    k = torch.ones(batch, 2, keys, 8, device=mode.device)
    bias = torch.zeros(batch, keys, device=mode.device)
    out, lse = mode.kernels.attention(q, k, k, bias, 1.0)
    votes, together = (mode.kernels.key_votes(q, k, lse, bias, 1.0, together=flag) for flag in (False, True))
    first = min(2, queries)
    rows, known = (mode.kernels.class_rows(q, k, bias, 1.0, first, given) for given in (None, lse))
    assert out.shape == q.shape
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    assert votes.shape == (batch, 2, keys)
    assert together.shape == (batch, keys)
    assert not votes.any()
    assert not together.any()
    assert rows.shape == known.shape == (batch, 2, first, keys)
