"""Expedite: grids, counts, maps and spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Site
from visiontok.errors import ParameterError
from visiontok.ops import clustering
from visiontok.ops.clustering import fit_cells as fit
from visiontok.reducers.expedite import Expedite


def tokens(grid: tuple[int, int], prefix: int, batch: int = 2) -> Tensor:
    noise = torch.Generator().manual_seed(grid[0] * 7 + prefix)
    return torch.randn(batch, prefix + grid[0] * grid[1], 5, generator=noise, dtype=torch.float64)


def decide(reducer: Any, grid: tuple[int, int], prefix: int, budget: int) -> tuple[Tensor, Any, Any]:
    x = tokens(grid, prefix)
    state = vt.TokenState.initial(x, prefix=prefix, grid=grid, layer=1, depth=2)
    return x, state, reducer.decide(vt.Signals.of(HIDDEN=x, GRID=grid), state, budget=budget)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("grid", "cells"), [((4, 6), (2, 3)), ((5, 5), (3, 3)), ((1, 8), (1, 3)), ((2, 1), (1, 1))])
def test_slots_are_clusters_behind_the_untouched_prefix(
    grid: tuple[int, int], cells: tuple[int, int], prefix: int
) -> None:
    reducer = Expedite(clusters=cells, temperature=0.2, k=2)
    x, state, tm = decide(reducer, grid, prefix, grid[0] * grid[1] - cells[0] * cells[1])
    made = clustering.cluster_dense(x[:, prefix:], grid, cells, 5, 0.2, 5)
    y, after = vt.apply(tm, x, state)
    assert tm.grid == after.grid == cells
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(y[:, prefix:], made.centroids, rtol=1e-9, atol=1e-11)
    full = tm.restore(y)
    back = clustering.reconstruct_weights(x[:, prefix:], made.centroids, 2, 0.2)
    assert torch.equal(full[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(full[:, prefix:], back @ made.centroids, rtol=1e-9, atol=1e-11)
    nearest = torch.cdist(x[:, prefix:], made.centroids).argmin(dim=-1) + prefix
    assert torch.equal(tm.assign[:, prefix:], nearest)
    assert torch.equal(tm.assign[:, :prefix], torch.arange(prefix).expand(2, -1))


def test_nothing_to_remove_is_no_map() -> None:
    assert decide(Expedite(), (4, 4), 1, 0)[2] is None
    assert decide(Expedite(clusters=16), (1, 1), 1, 0)[2] is None


@pytest.mark.parametrize(
    ("grid", "most", "cells"),
    [
        ((14, 14), 196, (14, 14)),
        ((14, 14), 195, (14, 13)),
        ((14, 14), 100, (10, 10)),
        ((14, 14), 98, (10, 9)),
        ((16, 64), 256, (8, 32)),
        ((3, 3), 2, (2, 1)),
        ((1, 9), 4, (1, 4)),
        ((5, 2), 1, (1, 1)),
    ],
)
def test_a_count_becomes_the_largest_grid_of_the_same_shape(
    grid: tuple[int, int], most: int, cells: tuple[int, int]
) -> None:
    assert fit(grid, most) == cells or fit(grid, most) == cells[::-1]


def test_fitted_grids_never_exceed_and_are_stable() -> None:
    for grid in ((1, 1), (1, 12), (3, 4), (7, 5), (14, 14), (9, 40)):
        for most in range(1, grid[0] * grid[1] + 1):
            h, w = fit(grid, most)
            assert h <= grid[0]
            assert w <= grid[1]
            assert h * w <= most
            assert fit(grid, h * w) == (h, w)


def test_counts_that_are_asked_are_the_counts_that_are_made() -> None:
    for grid in ((4, 4), (3, 5), (6, 6)):
        n = grid[0] * grid[1]
        for r in range(n):
            reducer = Expedite(r=r)
            removed = reducer.removed(n, Budget(r=r), Where(1, 2), 1)
            assert removed >= r
            tm = decide(reducer, grid, 1, removed)[2]
            assert (tm is None) == (removed == 0)
            assert tm is None or n + 1 - removed == tm.K


def test_official_counts() -> None:
    reducer = Expedite(clusters=9)
    assert reducer.budgets(12) == {6: Budget(count=9)}
    assert reducer.removed(49, Budget(count=9), Where(6, 12)) == 40
    for clusters in ((9, 2), 25, (9, 1)):
        with pytest.raises(ParameterError, match="do not fit a map of 4 x 4"):
            Expedite(clusters=clusters).removed(16, Budget(count=1), Where(6, 12, grid=(4, 4)))


def test_places() -> None:
    assert list(Expedite(r=1).layers(12)) == [6]
    assert list(Expedite(r=1, start=3).span(12)) == [3]
    assert Expedite(r=1).until(6, 12) is None
    assert Expedite(r=1, end=8).until(6, 12) == 8
    assert Expedite().site is Site.AROUND
    assert Expedite(reconstruct=False).site is Site.PRE
    with pytest.raises(ParameterError, match="start=13"):
        Expedite(start=13).span(12)
    with pytest.raises(ParameterError, match="end"):
        Expedite(end=5).until(6, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 8}, "perfect square"),
        ({"clusters": (2, 0)}, "clusters"),
        ({"clusters": True}, "clusters"),
        ({"clusters": 4, "r": 2}, "one budget"),
        ({"start": -1}, "start"),
        ({"start": 3, "end": 3}, "end"),
        ({"end": 3, "reconstruct": False}, "reconstruct"),
        ({"window": 4}, "window"),
        ({"k": 0}, "k must"),
        ({"temperature": 0.0}, "temperature"),
        ({"norm": "l3"}, "norm"),
        ({"iters": -1}, "iters"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        vt.reducers.create("expedite", **options)


def test_gradients_flow_through_clusters_and_way_back() -> None:
    x = tokens((4, 4), 1).requires_grad_()
    state = vt.TokenState.initial(x, prefix=1, grid=(4, 4), layer=1, depth=2)
    tm = Expedite(clusters=4).decide(vt.Signals.of(HIDDEN=x, GRID=(4, 4)), state)
    assert tm is not None
    assert tm.soft is not None
    assert not tm.soft.requires_grad
    tm.restore(vt.apply(tm, x, state)[0]).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any(dim=-1).all()


@pytest.mark.parametrize("end", [3, None])
def test_a_span_in_a_model_by_hand(end: int | None) -> None:
    from visiontok import backbones

    model: Any
    model, image = backbones.registry.get("timm_vit")().examples()["registers"]
    model, image = model.double(), image.double()
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
        skip = model.num_prefix_tokens
        x = model.blocks[0](x)
        made = clustering.cluster_dense(x[:, skip:], (4, 4), (3, 3), 5, 0.02, 5)
        back = clustering.reconstruct_weights(x[:, skip:], made.centroids, 20, 0.02)
        y = torch.cat((x[:, :skip], made.centroids), dim=1)
        for block in model.blocks[1 : end or 4]:
            y = block(y)
        y = model.norm(y) if end is None else y
        y = torch.cat((y[:, :skip], back @ y[:, skip:]), dim=1)
        if end is not None:
            y = model.norm(model.blocks[3](y))
        expected = model.forward_head(y)
        with vt.patched(model, "expedite", clusters=9, start=1, end=end) as red:
            torch.testing.assert_close(model.forward_features(image), y, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(model(image), expected, rtol=1e-10, atol=1e-10)
            inside = [skip + 9] * (3 if end is None else 1)
            assert red.tokens == red.plan.tokens
            assert red.tokens[0] == skip + 9
            assert red.tokens[: len(inside)] == inside
    model.float()
