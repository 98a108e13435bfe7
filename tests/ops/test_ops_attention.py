"""Attention read without its map, against the map written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from visiontok.ops import attention
from visiontok.ops.attention import Votes
from visiontok.ops.probing import prefix_rows


def projected(length: int, heads: int = 3, width: int = 8, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a fused projection leaves them."""
    noise = torch.Generator().manual_seed(length)
    qkv = torch.randn(batch, length, 3 * heads * width, generator=noise, dtype=torch.float64)
    q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def biases(length: int) -> dict[str, Tensor | None]:
    noise = torch.Generator().manual_seed(7)
    keys = torch.randn(2, 1, 1, length, generator=noise, dtype=torch.float64)
    keys[1, ..., length // 2] = -math.inf
    pairs = torch.randn(2, 1, length, length, generator=noise, dtype=torch.float64)
    return {"none": None, "keys": keys, "pairs": pairs}


def written_out(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 11])
def test_prefix_rows_are_rows_of_the_map_in_every_layout(prefix: int, kind: str) -> None:
    q, k, _ = projected(23)
    bias = biases(23)[kind]
    want = written_out(q, k, 0.4, bias)[:, :, :prefix]
    for query, key in ((q, k), (q.contiguous(), k.contiguous()), (q[:, :1], k[:, :1])):
        got = prefix_rows(query, key, prefix, 0.4, bias)
        torch.testing.assert_close(got, want[:, : query.shape[1]])


def test_prefix_rows_have_gradients() -> None:
    q, k, _ = projected(6, width=4)
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: prefix_rows(q, k, 1, 0.5), (q, k))


@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("length", [5, 64, 65, 150])
def test_strips_say_what_the_map_says(length: int, kind: str) -> None:
    q, k, v = projected(length)
    bias = biases(length)[kind]
    lean, whole = Votes(q, k, 0.4, bias), Votes(q, k, 0.4, bias)
    full = written_out(q, k, 0.4, bias)
    torch.testing.assert_close(whole.map, full)
    s = torch.rand(2, 3, length, dtype=torch.float64)
    live = (torch.arange(length) % 3 != 1).double().expand(2, -1)
    inner = full * live[:, None, None]
    inner = inner / inner.sum(dim=-1, keepdim=True)
    size = torch.rand(2, length, dtype=torch.float64) + 0.5
    unsized = full / size[:, None, None]
    unsized = (unsized / unsized.sum(dim=-1, keepdim=True)).mean(dim=1)
    for votes in (lean, whole):
        torch.testing.assert_close(votes.vote(s), torch.einsum("bhi,bhij->bhj", s, full))
        among = torch.einsum("bhi,bhij->bhj", s * live.unsqueeze(1), inner)
        torch.testing.assert_close(votes.vote(s, among=live), among)
        for wide in (v, v[..., :1]):
            torch.testing.assert_close(votes.attend(wide), full @ wide)
        torch.testing.assert_close(votes.entropy(), torch.special.entr(full).sum(dim=-1))
        torch.testing.assert_close(votes.mean_entropy(), torch.special.entr(full.mean(dim=1)).sum(dim=-1))
        torch.testing.assert_close(votes.mean_entropy(size), torch.special.entr(unsized).sum(dim=-1))
    assert lean._map is None


def test_keys_of_size_zero_stay_out_of_the_entropy() -> None:
    q, k, _ = projected(9)
    size = torch.rand(2, 9, dtype=torch.float64) + 0.5
    size[:, 4] = 0
    alone = torch.arange(9) != 4
    short = Votes(q[:, :, alone], k[:, :, alone], 0.4).mean_entropy()
    found = Votes(q, k, 0.4, size.log()[:, None, None]).mean_entropy(size)
    torch.testing.assert_close(found[:, alone], short)


def test_expect_decides_by_uses_and_size(monkeypatch: Any) -> None:
    q, k, _ = projected(10)
    for uses, most, formed in ((1, 300, False), (2, 300, True), (2, 299, False), (3, 0, True)):
        monkeypatch.setattr(attention, "_SMALL", most)
        votes = Votes(q, k, 0.4)
        votes.expect(uses)
        assert (votes._map is not None) is formed
