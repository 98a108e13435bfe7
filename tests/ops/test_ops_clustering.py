"""Clustering and reconstruction against loops, against the dense formula, and at the edges of fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import clustering

SHAPES = [
    ((6, 10), (3, 5), 3),
    ((7, 7), (3, 3), 5),
    ((5, 9), (4, 2), 1),
    ((4, 4), (4, 4), 3),
    ((1, 7), (1, 3), 5),
    ((3, 3), (1, 1), 1),
    ((33, 20), (20, 17), 3),
]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def loops(
    x: Tensor, grid: tuple[int, int], cells: tuple[int, int], iters: int, t: float, window: int
) -> list[list[float]]:
    """Centroids of one sample, one token and cell at a time; x is (H * W, C)."""
    (height, width), (h, w) = grid, cells
    rows = [[float(v) for v in row] for row in x]
    span = range(x.shape[1])
    centroids = []
    for r in range(h):
        for c in range(w):
            inside = [
                rows[i * width + j]
                for i in range(math.floor(r * height / h), math.ceil((r + 1) * height / h))
                for j in range(math.floor(c * width / w), math.ceil((c + 1) * width / w))
            ]
            centroids.append([sum(row[d] for row in inside) / len(inside) for d in span])
    for _ in range(iters):
        share = [[0.0] * len(rows) for _ in centroids]
        for n, row in enumerate(rows):
            at = (n // width * h // height, n % width * w // width)
            near = [k for k in range(h * w) if max(abs(k // w - at[0]), abs(k % w - at[1])) <= window // 2]
            logits = [-t * sum((row[d] - centroids[k][d]) ** 2 for d in span) for k in near]
            top = max(logits)
            total = sum(math.exp(value - top) for value in logits)
            for k, value in zip(near, logits):
                share[k][n] = math.exp(value - top) / total
        centroids = [[sum(a * row[d] for a, row in zip(own, rows)) / sum(own) for d in span] for own in share]
    return centroids


@pytest.mark.parametrize(("grid", "cells", "window"), SHAPES[:-1])
@pytest.mark.parametrize("iters", [0, 1, 3])
def test_centroids_equal_loops(grid: tuple[int, int], cells: tuple[int, int], window: int, iters: int) -> None:
    x = draw(1, grid[0] * grid[1], 4, seed=window)
    expected = torch.tensor(loops(x[0], grid, cells, iters, 0.3, window), dtype=torch.float64)
    got = clustering.cluster(x, grid, cells, iters, 0.3, window)
    torch.testing.assert_close(got.centroids[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.share.sum(dim=-1), torch.ones_like(got.share[..., 0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grid", "cells", "window"), SHAPES)
@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_every_tiling_equals_the_dense_formula(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], cells: tuple[int, int], window: int, tile: int
) -> None:
    monkeypatch.setattr(clustering, "_tile", lambda *_: tile)
    x = draw(2, grid[0] * grid[1], 6, seed=tile)
    found = clustering.cluster(x, grid, cells, 3, 0.2, window)
    dense = clustering.cluster_dense(x, grid, cells, 3, 0.2, window)
    torch.testing.assert_close(found.share, dense.share, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.centroids, dense.centroids, rtol=1e-10, atol=1e-12)


def test_large_maps_are_tiled_and_small_ones_are_not() -> None:
    assert clustering._tile(28, 28, 2) == 4
    assert clustering._tile(10, 10, 2) == 10
    # At most (tile + window - 1)² cells are candidates of a token's tile, far fewer than all.
    assert clustering._candidates(40, 40, 28, 28, 2, 4, torch.device("cpu")).shape == (49, 64)


def test_pooling_and_home_cells_are_torchs() -> None:
    x = draw(2, 70, 3)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (7, 10)), (3, 4))
    torch.testing.assert_close(clustering.pooled(x, (7, 10), (3, 4)), pooled.flatten(2).transpose(1, 2))
    index = torch.arange(12.0).view(1, 1, 3, 4)
    nearest = torch.nn.functional.interpolate(index, size=(7, 10), mode="nearest").flatten().long()
    assert torch.equal(clustering.home((7, 10), (3, 4)), nearest)


def test_gradients_reach_the_tokens_through_the_centroids_only() -> None:
    x = draw(2, 24, 3).requires_grad_()
    found = clustering.cluster(x, (4, 6), (2, 3), 2, 0.3, 3)
    assert not found.share.requires_grad
    weight = draw(2, 6, 3, seed=5)
    (found.centroids * weight).sum().backward()
    torch.testing.assert_close(x.grad, found.share.transpose(1, 2) @ weight)


def test_nothing_underflows_and_no_cell_is_lost() -> None:
    x = draw(1, 64, 32, scale=30.0).float()
    found = clustering.cluster(x, (8, 8), (4, 4), 5, 1.0, 5)
    exact = clustering.cluster_dense(x.double(), (8, 8), (4, 4), 5, 1.0, 5)
    torch.testing.assert_close(found.centroids.double(), exact.centroids, rtol=1e-3, atol=1e-3)
    back = clustering.reconstruct_weights(x, found.centroids, 5, 1.0)
    torch.testing.assert_close(back.sum(dim=-1), torch.ones(1, 64))


def test_a_large_common_offset_does_not_cost_digits() -> None:
    x = draw(1, 36, 16)
    shifted = clustering.cluster((x + 300).float(), (6, 6), (3, 3), 5, 0.1, 5)
    plain = clustering.cluster(x, (6, 6), (3, 3), 5, 0.1, 5)
    torch.testing.assert_close(shifted.share.double(), plain.share, rtol=1e-3, atol=1e-4)


def test_the_official_floor_lets_far_cells_vanish() -> None:
    # One cell may hold one token only, a distance of 1e4 from it, so all its weight goes to the other cell.
    x = torch.tensor([[[0.0], [100.0], [100.0], [100.0]]], dtype=torch.float64)
    sane = clustering.cluster(x, (1, 4), (1, 2), 1, 1.0, 3)
    floored = clustering.cluster(x, (1, 4), (1, 2), 1, 1.0, 3, official=True)
    assert bool((sane.share.sum(dim=-1) > 0.999).all())
    # Loops in the released code's own order of operations.
    pooled = torch.tensor([50.0, 100.0], dtype=torch.float64)
    a = (-((pooled[:, None] - x[0, :, 0]) ** 2)).softmax(dim=0)
    expected = (a @ x[0, :, 0]) / a.sum(dim=1).clamp_min(1e-16)
    torch.testing.assert_close(floored.centroids[0, :, 0], expected)


def naive_weights(f: Tensor, s: Tensor, k: int, t: float, norm: str) -> Tensor:
    out = torch.zeros(f.shape[0], s.shape[0], dtype=torch.float64)
    for n in range(f.shape[0]):
        distance = [float(((f[n] - s[m]) ** 2).sum()) for m in range(s.shape[0])]
        kept = sorted(range(s.shape[0]), key=lambda m: (distance[m], m))[: k if k > 0 else None]
        weight = [math.exp(-t * (distance[m] - distance[kept[0]])) for m in kept]
        total = sum(weight) if norm == "l1" else math.sqrt(sum(w * w for w in weight))
        for m, w in zip(kept, weight):
            out[n, m] = w / total
    return out


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("k", [1, 3, 7, 20, -1])
def test_weights_equal_loops(k: int, norm: Any) -> None:
    f, s = draw(11, 5, seed=1), draw(7, 5, seed=2)
    for t in (0.05, 1.0, 40.0):
        got = clustering.reconstruct_weights(f[None], s[None], k, t, norm)
        torch.testing.assert_close(got[0], naive_weights(f, s, k, t, norm), rtol=1e-9, atol=1e-12)


def test_ties_go_to_the_lowest_index_or_all_count() -> None:
    f, s = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0], [0, 1], [0, 0.5], [-1, 0]]])
    sane = clustering.reconstruct_weights(f, s, 2, 0.1)
    official = clustering.reconstruct_weights(f, s, 2, 0.1, official=True)
    assert (sane[0, 0] > 0).tolist() == [True, False, True, False]
    assert (official[0, 0] > 0).tolist() == [True, True, True, True]


def test_officially_weights_that_round_to_the_same_number_are_ties() -> None:
    f, s = torch.zeros(1, 1, 2), torch.tensor([[[10.000001, 0], [10.0, 0], [20, 0]]])
    sane = clustering.reconstruct_weights(f, s, 1, 0.0001)
    official = clustering.reconstruct_weights(f, s, 1, 0.0001, official=True)
    assert (sane[0, 0] > 0).tolist() == [False, True, False]
    assert (official[0, 0] > 0).tolist() == [True, True, False]


def test_official_weights_are_the_released_formula() -> None:
    f, s = draw(1, 9, 5, seed=1), draw(1, 6, 5, seed=2)
    for t in (0.1, 3.0, 20.0):
        w = torch.exp(-t * torch.cdist(f, s) ** 2)
        w = torch.where(w >= w.topk(3, dim=-1).values[..., -1:], w, 0)
        expected = torch.nn.functional.normalize(w, dim=2)
        got = clustering.reconstruct_weights(f, s, 3, t, "l2", official=True)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("k", [2, -1])
def test_gradcheck_of_the_weights(k: int, norm: Any) -> None:
    f, s = draw(1, 5, 3, seed=3).requires_grad_(), draw(1, 4, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: clustering.reconstruct_weights(a, b, k, 0.4, norm), (f, s))


def test_hard_labels_are_the_nearest_of_all() -> None:
    x, c = draw(2, 12, 4), draw(2, 5, 4, seed=9)
    assert torch.equal(clustering.hard_labels(x, c), torch.cdist(x, c).argmin(dim=-1))
    assert not clustering.hard_labels(torch.ones(1, 3, 2), torch.ones(1, 4, 2)).any()


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_are_defined(value: float) -> None:
    x = torch.full((1, 12, 3), value)
    found = clustering.cluster(x, (3, 4), (2, 2), 5, 1.0, 3)
    torch.testing.assert_close(found.centroids, torch.full((1, 4, 3), value))
    assert clustering.reconstruct_weights(x, found.centroids, 2).isfinite().all()


def test_wrong_values_are_named() -> None:
    x = draw(1, 12, 3)
    wrong: tuple[tuple[Any, str], ...] = (
        (((3, 5), (2, 2)), "x must be"),
        (((3, 4), (4, 2)), "cells must be"),
        (((3, 4), (2, 2), -1), "iters"),
        (((3, 4), (2, 2), 1, 0.0), "temperature"),
        (((3, 4), (2, 2), 1, 1.0, 4), "window"),
    )
    for arguments, words in wrong:
        with pytest.raises(ParameterError, match=words):
            clustering.cluster(x, *arguments)
    for options in ({"k": 0}, {"k": True}, {"norm": "l3"}, {"temperature": math.nan}):
        with pytest.raises(ParameterError, match=next(iter(options))):
            clustering.reconstruct_weights(x, x, **options)  # type: ignore[arg-type]
