"""What keys receive, against loops over queries and keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import receiving
from visiontok.ops.hashing import gumbel, mixed, rank_keys
from visiontok.ops.receiving import Received, heaviest_and_last

# Padding on the left, on the right, and none.
LIVE = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 7 + [0, 0], [1] * 9]).bool()


def tensors(heads: int, shared: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(heads + queries)
    query = torch.randn(3, heads, queries, 4, generator=noise, dtype=torch.float64)
    return query, torch.randn(3, shared, keys, 4, generator=noise, dtype=torch.float64)


def shifted(logits: Tensor, rows: Tensor) -> Tensor:
    heads, keys = logits.shape[1], logits.shape[3]
    head = torch.arange(heads, dtype=logits.dtype).view(heads, 1, 1)
    return logits * 0.5 + torch.sin(head * 5.0 + rows.view(-1, 1) * 3.0 + torch.arange(keys))


def naive(
    query: Tensor, key: Tensor, live: Tensor | None, offset: int, last: int | None, noisy: bool
) -> list[list[list[float]]]:
    batch, heads, queries, _ = query.shape
    shared, keys = key.shape[1:3]
    group = heads // shared
    out = [[[0.0] * keys for _ in range(shared)] for _ in range(batch)]
    for b in range(batch):
        alive = [live is None or bool(live[b, j]) for j in range(keys)]
        asking = [i for i in range(queries) if alive[offset + i]]
        for i in asking if last is None else asking[-last:]:
            seen = [j for j in range(offset + i + 1) if alive[j]]
            for h in range(heads):
                logits = {j: 0.3 * float(query[b, h, i] @ key[b, h // group, j]) for j in seen}
                if noisy:
                    logits = {j: 0.5 * x + math.sin(h * 5.0 + (offset + i) * 3.0 + j) for j, x in logits.items()}
                total = sum(math.exp(x) for x in logits.values())
                for j, x in logits.items():
                    out[b][h // group][j] += math.exp(x) / total / group
    return out


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("last", [None, 1, 3, 50])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("heads", "shared", "offset"), [(2, 2, 0), (6, 2, 0), (4, 1, 3)])
def test_columns_are_those_of_the_written_out_map(
    heads: int, shared: int, offset: int, padded: bool, last: int | None, noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(heads, shared, 9 - offset, 9)
    live = LIVE if padded else None
    expected = torch.tensor(naive(query, key, live, offset, last, noisy), dtype=torch.float64)
    perturb = shifted if noisy else None
    # One strip, and strips of two rows with a shorter last one.
    for at_once in (2**22, heads * 9 * 2):
        monkeypatch.setattr(receiving, "_AT_ONCE", at_once)
        found = Received(query, key, 0.3, live, offset).sum(perturb, last)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rows_share_out_one_each_and_half_precision_is_summed_in_fp32() -> None:
    query, key = tensors(4, 2, 9, 9)
    found = Received(query.bfloat16(), key.bfloat16(), 0.5, LIVE).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(-1), LIVE.sum(1).float()[:, None].expand(3, 2))
    assert float(found.masked_fill(LIVE.unsqueeze(1), 0).abs().max()) == 0


def test_a_sample_does_not_see_its_batch_mates() -> None:
    query, key = tensors(4, 2, 9, 9)
    whole = Received(query, key, 0.5, LIVE).sum(last=4)
    for b in range(3):
        alone = Received(query[b : b + 1], key[b : b + 1], 0.5, LIVE[b : b + 1]).sum(last=4)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-12, atol=1e-12)


def test_wrong_shapes_are_refused() -> None:
    query, key = tensors(4, 2, 5, 9)
    with pytest.raises(ParameterError, match="4 query heads cannot share 3"):
        Received(query, key[:, :1].expand(-1, 3, -1, -1), 1.0)
    with pytest.raises(ParameterError, match=r"offset must be in \[0, 4\]"):
        Received(query, key, 1.0, offset=5)
    with pytest.raises(ParameterError, match=r"live must be \(3, 9\)"):
        Received(query, key, 1.0, LIVE[:, 1:])
    with pytest.raises(ParameterError, match="last must be at least 1"):
        Received(query, key, 1.0).sum(last=0)


def test_heaviest_and_last() -> None:
    score = torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0, 9.0, 9.0]])
    assert heaviest_and_last(score, 4, 2).tolist() == [[0, 2, 4, 5], [0, 1, 4, 5]]
    assert heaviest_and_last(score, 2, 2).tolist() == [[4, 5], [4, 5]]
    assert heaviest_and_last(score, 3, 0).tolist() == [[0, 2, 5], [0, 4, 5]]
    assert heaviest_and_last(score, 6, 1).tolist() == [list(range(6))] * 2


def test_gumbel_noise_has_its_mean_and_variance_and_is_independent() -> None:
    # Rows whose indices overlap but for a shift, as grids of positions give them.
    key = mixed(mixed(torch.arange(400)).unsqueeze(1) + torch.arange(1000))
    noise = gumbel(key)
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    centred = noise - noise.mean()
    for one, other in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs(float((one * other).mean())) < 0.02
    assert bool(gumbel(torch.tensor([0, 2**31 - 2])).isfinite().all())


def test_rank_keys_stay_what_they_were() -> None:
    assert rank_keys(3, seed=1, layer=2).tolist() == [839027568, 307770802, 722797254]
