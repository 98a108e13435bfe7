"""Votes and prefix rows: everything that is read from attention without its map equals the map's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops.attention import Votes
from visiontok.ops.probing import prefix_rows


def draw(length: int, heads: int = 2, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, heads, length, 4, generator=noise, dtype=torch.float64) for _ in range(3))
    return q, k, v


def spelled_out(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Row by row."""
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                row = torch.stack([(q[b, h, i] * k[b, h, j]).sum() * scale for j in range(k.shape[2])])
                row = row if bias is None else row + bias[b, 0, 0]
                weight = (row - row.max()).exp()
                out[b, h, i] = weight / weight.sum()
    return out


# 64 query rows are formed at one time: below, at and above that, and not a multiple.
@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
def test_rows_votes_and_entropy_equal_the_map(length: int) -> None:
    q, k, v = draw(length, heads=1, batch=1) if length > 60 else draw(length)
    bias = torch.rand(len(q), 1, 1, length, dtype=torch.float64).log()
    full = spelled_out(q, k, 0.5, bias)
    votes = Votes(q, k, 0.5, bias)
    s = torch.rand(q.shape[:3], dtype=torch.float64)
    torch.testing.assert_close(votes.vote(s), torch.einsum("bhij,bhi->bhj", full, s))
    torch.testing.assert_close(votes.attend(v), full @ v)
    torch.testing.assert_close(votes.entropy(), -(full * full.log()).sum(dim=-1))
    assert votes._map is None
    torch.testing.assert_close(votes.map, full)
    torch.testing.assert_close(votes.vote(s), torch.einsum("bhij,bhi->bhj", full, s))
    torch.testing.assert_close(prefix_rows(q, k, 1, 0.5, bias), full[:, :, :1])


def test_padding_gets_no_vote() -> None:
    q, k, _ = draw(6)
    bias = torch.zeros(2, 1, 1, 6, dtype=torch.float64)
    bias[1, ..., 4:] = -torch.inf
    found = Votes(q, k, 0.5, bias).vote(torch.ones(1, 1, 6, dtype=torch.float64))
    assert (found[1, :, 4:] == 0).all()
    torch.testing.assert_close(found.sum(dim=-1), torch.full((2, 2), 6.0, dtype=torch.float64))


def test_half_precision_is_widened() -> None:
    q, k, _ = (x.half() for x in draw(5))
    assert Votes(q, k, 0.5).map.dtype == torch.float32
    assert prefix_rows(q, k, 1, 0.5).dtype == torch.float32


def test_votes_of_a_map() -> None:
    attention = torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(dim=-1)
    votes = Votes.of(attention)
    assert votes.shape == (2, 3, 5)
    torch.testing.assert_close(votes.vote(torch.ones(1)), attention.sum(dim=2))
    with pytest.raises(ParameterError, match=r"\(B, H, N, N\), got shape \(2, 5, 5\)"):
        Votes.of(attention[:, 0])


def test_gradients_flow_through_votes() -> None:
    q, k, v = (x[:1, :1].requires_grad_() for x in draw(5))
    assert torch.autograd.gradcheck(lambda q, k, v: Votes(q, k, 0.5).vote(v[..., 0]), (q, k, v))
