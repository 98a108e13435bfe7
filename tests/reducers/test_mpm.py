"""MPM against pairs and chains followed token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontok as vt


def tokens(batch: int, length: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(x: Tensor) -> list[tuple[float, int]]:
    """Similarity and index of each token's nearest other token, by direct cosines."""
    out = []
    for i in range(len(x)):
        cosines = [float(x[i] @ x[j] / x[i].norm() / x[j].norm()) if i != j else -9.0 for j in range(len(x))]
        out.append((max(cosines), cosines.index(max(cosines))))
    return out


def groups(x: Tensor, r: int | None) -> list[list[int]]:
    """Groups of one sample without prefix, ascending; r None: all mutual pairs."""
    near = nearest(x)
    pairs = [j for j, (_, i) in enumerate(near) if near[i][1] == j and i < j]
    pairs.sort(key=lambda j: -near[j][0])
    rest = [j for j, (_, i) in enumerate(near) if near[i][1] != j]
    rest.sort(key=lambda j: -near[j][0])
    leaving = pairs if r is None else [*pairs, *rest][:r]
    ends = []
    for token in range(len(x)):
        while token in leaving:
            token = near[token][1]
        ends.append(token)
    return [[t for t in range(len(x)) if ends[t] == end] for end in sorted(set(ends))]


def decided(x: Tensor, prefix: int, r: int | None = 0, size: Tensor | None = None, **params):
    state = vt.TokenState.initial(x, prefix, layer=2, depth=12)
    state = state if size is None else state.changed(size=size, padded=True)
    reducer = vt.reducers.create("mpm", **params)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x), state, budget=r)
    return tm, vt.apply(tm, x, state)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("r", [1, 3, 5, 8])
def test_exact_budgets_take_the_best_pairs_then_chains(prefix: int, r: int) -> None:
    x = tokens(3, prefix + 17, seed=r)
    tm, (y, after) = decided(x, prefix, r)
    assert prefix + 17 - r == tm.K
    used_fill = False
    for b in range(3):
        expected = groups(x[b, prefix:], r)
        used_fill |= len(groups(x[b, prefix:], None)) > 17 - r
        slots = [[t - prefix for t in range(prefix, prefix + 17) if tm.assign[b, t] == k] for k in range(prefix, tm.K)]
        assert slots == expected
        assert torch.equal(y[b, :prefix], x[b, :prefix])
        for slot, members in enumerate(expected, start=prefix):
            mean = torch.stack([x[b, prefix + m] for m in members]).mean(dim=0)
            torch.testing.assert_close(y[b, slot], mean, rtol=1e-12, atol=1e-12)
            assert float(after.size[b, slot, 0]) == len(members)
    if r == 8:
        assert used_fill, "this budget was meant to exceed the pairs"


def test_the_mean_is_plain_whatever_the_sizes() -> None:
    x = tokens(1, 2)
    size = torch.tensor([[[3.0], [1.0]]], dtype=torch.float64)
    state = vt.TokenState.initial(x, 0, layer=2, depth=12).changed(size=size)
    y, after = vt.apply(vt.reducers.create("mpm").decide(vt.Signals.of(HIDDEN=x), state, budget=1), x, state)
    torch.testing.assert_close(y[0, 0], x[0].mean(dim=0))
    assert after.size.flatten().tolist() == [4.0]


def test_adaptive_merges_every_mutual_pair_of_each_sample() -> None:
    x = tokens(4, 1 + 14, seed=3)
    tm, (y, after) = decided(x, 1, adaptive=True)
    live = [1 + len(groups(x[b, 1:], None)) for b in range(4)]
    assert tm.counts.tolist() == live
    assert len(set(live)) > 1, "the samples were meant to differ"
    for b in range(4):
        for slot, members in enumerate(groups(x[b, 1:], None), start=1):
            torch.testing.assert_close(y[b, slot], x[b, [1 + m for m in members]].mean(dim=0))
        assert not after.size[b, live[b] :].any()
        alone, (y1, _) = decided(x[b : b + 1], 1, adaptive=True)
        assert torch.equal(alone.assign[0], tm.assign[b])
        torch.testing.assert_close(y1[0, : live[b]], y[b, : live[b]], rtol=0, atol=0)
    cut = tm.compacted()
    assert max(live) == cut.K


def test_adaptive_with_r_removes_at_least_r() -> None:
    x = tokens(3, 12, seed=5)
    tm, _ = decided(x, 0, 6, adaptive=True)
    assert tm.K == 6
    assert tm.counts.tolist() == [12 - max(6, 12 - len(groups(x[b], None))) for b in range(3)]


def test_padding_is_nobodys_neighbour_and_leaves() -> None:
    x = tokens(2, 1 + 9, seed=6)
    size = torch.ones(2, 10, 1, dtype=torch.float64)
    size[1, 7:] = 0
    padded, (y, _) = decided(x, 1, size=size, adaptive=True)
    alone, (y1, _) = decided(x[1:, :7], 1, adaptive=True)
    count = int(alone.counts[0])
    assert int(padded.counts[1]) == count
    torch.testing.assert_close(y[1, :count], y1[0, :count])


def test_equal_tokens_collapse_without_rings() -> None:
    x = torch.ones(1, 9, 4)
    tm, (y, _) = decided(x, 1, 4)
    assert tm.K == 5
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize("compact", [True, False])
def test_on_a_model_the_paper_schedule_acts_at_two_layers(compact: bool) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, embed_dim=48, num_heads=2).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad(), vt.patched(model, "mpm", adaptive=True, compact=compact, trace=True) as red:
        together = model(x)
        assert [step.layer for step in red.trace] == [1, 2]
        assert all(step.map.counts is not None or compact for step in red.trace)
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], together[b], rtol=1e-4, atol=1e-5)


def test_layers_follow_the_depth() -> None:
    reducer = vt.reducers.create("mpm", r=4)
    assert list(reducer.layers(12)) == [2, 5]
    assert list(reducer.layers(24)) == [4, 10]
    assert all(1 <= layer < depth for depth in range(2, 30) for layer in reducer.layers(depth))
