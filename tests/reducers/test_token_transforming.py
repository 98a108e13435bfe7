"""Token Transforming against its matrix written entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.errors import ParameterError


def signals(batch: int, length: int, prefix: int, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 3, generator=noise, dtype=torch.float64)
    attn = torch.randn(batch, 2, prefix, length, generator=noise, dtype=torch.float64).softmax(dim=-1)
    return {"HIDDEN": hidden, "ATTN_PREFIX": attn}


@pytest.mark.parametrize(("prefix", "r", "tau"), [(1, 4, 0.05), (2, 7, 0.3), (5, 10, 1.0)])
def test_every_entry(prefix: int, r: int, tau: float) -> None:
    length = prefix + 11
    given = signals(2, length, prefix, seed=r)
    x = given["HIDDEN"]
    state = vt.TokenState.initial(x, prefix, layer=3, depth=12)
    tm = vt.reducers.create("token_transforming", temperature=tau).decide(vt.Signals.of(**given), state, budget=r)
    y, after = vt.apply(tm, x, state)
    kept = 11 - r
    for b in range(2):
        score = [sum(float(given["ATTN_PREFIX"][b, h, 0, n]) for h in range(2)) for n in range(prefix, length)]
        target = sorted(sorted(range(11), key=lambda n: -score[n])[:kept])
        rows = x[b, prefix:]
        cosine = [[float(torch.cosine_similarity(rows[t], rows[n], dim=0)) for n in range(11)] for t in target]
        spread = [[math.exp(row[n] / tau) for n in range(11)] for row in cosine]
        column = [sum(row[n] for row in spread) for n in range(11)]
        for k in range(kept):
            share = [spread[k][n] / column[n] for n in range(11)]
            mixed = sum(w / sum(share) * x[b, prefix + n] for n, w in enumerate(share))
            torch.testing.assert_close(y[b, prefix + k], mixed, rtol=1e-10, atol=1e-10)
        for n in range(11):
            best = max(range(kept), key=lambda k: cosine[k][n])
            assert int(tm.assign[b, prefix + n]) == prefix + best
        assert tm.kept[b, prefix:].tolist() == [prefix + t for t in target]
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert after.size is None
    torch.testing.assert_close(tm.soft.sum(dim=2), torch.ones(2, tm.K, dtype=torch.float64))


def test_a_cold_matrix_merges_into_the_most_similar_target() -> None:
    given = signals(2, 1 + 12, 1, seed=4)
    x = given["HIDDEN"]
    state = vt.TokenState.initial(x, 1, layer=3, depth=12)
    tm = vt.reducers.create("token_transforming", temperature=1e-6).decide(vt.Signals.of(**given), state, budget=6)
    merged = vt.TokenMap(tm.assign, tm.K).reduce(x)
    torch.testing.assert_close(tm.reduce(x), merged, rtol=1e-6, atol=1e-6)


def test_padding_has_no_share() -> None:
    given = signals(1, 1 + 8, 1, seed=5)
    x = given["HIDDEN"]
    size = torch.ones(1, 9, 1, dtype=torch.float64)
    size[0, 6:] = 0
    state = vt.TokenState.initial(x, 1, layer=3, depth=12).changed(size=size, padded=True)
    tm = vt.reducers.create("token_transforming").decide(vt.Signals.of(**given), state, budget=4)
    assert not tm.soft[:, :, 6:].any()
    assert (tm.kept[0] < 6).all()


@pytest.mark.parametrize("value", [0, -1.0, True])
def test_temperatures_that_make_no_sense(value: object) -> None:
    with pytest.raises(ParameterError, match=r"token_transforming: temperature must be above 0, got"):
        vt.reducers.create("token_transforming", temperature=value)
