"""DPC-KNN against loops over pairs of tokens, and against the golden files of CLCA."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError
from visiontok.ops import density
from visiontok.reducers.dpc_knn import Scorer

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

from clca_dpcknn import run_dpcknn  # noqa: E402
from golden_case import discover, golden_folder  # noqa: E402

CASES = [case for case in discover(golden_folder()) if case.path.stem.startswith("op_dpcknn")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden(case: Any) -> None:
    case.load()
    run_dpcknn(case)
    case.finish()


def test_there_are_golden_files() -> None:
    assert CASES


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x: Tensor, count: int, k: int) -> tuple[list[int], list[int]]:
    """Centres and clusters of one sample."""
    n = range(len(x))
    gap = [[math.dist(x[i].tolist(), x[j].tolist()) / math.sqrt(x.shape[1]) for j in n] for i in n]
    near = [sorted(row)[: min(k, len(x))] for row in gap]
    rho = [math.exp(-sum(d * d for d in row) / len(row)) for row in near]
    far = max(max(row) for row in gap)
    delta = [min([gap[i][j] for j in n if rho[j] > rho[i]], default=far) for i in n]
    centers = sorted(n, key=lambda i: -rho[i] * delta[i])[:count]
    near_center = [min(range(count), key=lambda c: (gap[centers[c]][i], c)) for i in n]
    return centers, [centers.index(i) if i in centers else near_center[i] for i in n]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("count", "k"), [(1, 5), (4, 1), (6, 3), (10, 40)])
@pytest.mark.parametrize("compat", [None, "official"])
def test_clusters_and_weighted_means(prefix: int, count: int, k: int, compat: str | None) -> None:
    x = draw(2, prefix + 13, 4, seed=count)
    scorer = Scorer(4).double()
    with torch.no_grad():
        scorer.score.weight.copy_(draw(1, 4, seed=8))
        scorer.score.bias.fill_(0.3)
    state = vt.TokenState.initial(x, prefix, layer=3, depth=12)
    for equal in (False, True):
        reducer = vt.reducers.create("dpc_knn", k_neighbors=k, equal_weight=equal, compat=compat)
        tm = reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=scorer), state, budget=13 - count)
        y, after = vt.apply(tm, x, state)
        assert prefix + count == tm.K
        for b in range(2):
            centers, cluster = naive(x[b, prefix:], count, k)
            assert tm.kept[b, prefix:].tolist() == [prefix + c for c in centers]
            assert tm.assign[b, prefix:].tolist() == [prefix + c for c in cluster]
            for c in range(count):
                members = [i + prefix for i in range(13) if cluster[i] == c]
                score = [1.0 if equal else math.exp(float(scorer.score(x[b, m]).detach())) for m in members]
                total = sum(score) + (1e-6 if compat else 0)
                mean = sum(w * x[b, m] for w, m in zip(score, members)) / total
                torch.testing.assert_close(y[b, prefix + c], mean, rtol=1e-10, atol=1e-12)
                assert float(after.size[b, prefix + c, 0]) == len(members)
        assert torch.equal(y[:, :prefix], x[:, :prefix])


def test_untrained_scores_weigh_all_tokens_alike() -> None:
    x = draw(2, 10, 4, seed=2)
    state = vt.TokenState.initial(x, 1, layer=3, depth=12)
    signals = vt.Signals.of(HIDDEN=x, MODULE=Scorer(4).double())
    learned = vt.reducers.create("dpc_knn").decide(signals, state, budget=4)
    equal = vt.reducers.create("dpc_knn", equal_weight=True).decide(signals, state, budget=4)
    torch.testing.assert_close(learned.reduce(x), equal.reduce(x))


def test_distances_survive_a_large_common_offset() -> None:
    x = draw(1, 20, 8, seed=3).float()
    moved = density.distances(x + 1000)
    exact = torch.cdist(x.double() + 0, x.double()) / math.sqrt(8)
    torch.testing.assert_close(moved.double(), exact, rtol=1e-3, atol=1e-3)
    assert not density.distances(x).diagonal(dim1=1, dim2=2).any()


def test_padding_is_no_neighbour_and_no_centre() -> None:
    x = draw(1, 12, 4, seed=4)
    live = torch.ones(1, 12, dtype=torch.bool)
    live[0, 8:] = False
    found = density.peaks(x, 3, 4, live)
    alone = density.peaks(x[:, :8], 3, 4)
    assert torch.equal(found.centers, alone.centers)
    assert torch.equal(found.assign[:, :8], alone.assign)


def test_equal_tokens_are_defined() -> None:
    found = density.peaks(torch.ones(2, 7, 3), 3)
    assert found.centers.tolist() == [[0, 1, 2]] * 2
    assert found.assign.tolist() == [[0, 1, 2, 0, 0, 0, 0]] * 2


def test_gradients_reach_scores_and_tokens() -> None:
    x, scorer = draw(1, 7, 3, seed=5).requires_grad_(), Scorer(3).double()
    reducer = vt.reducers.create("dpc_knn")

    def run(x: Tensor, *_: Tensor) -> Tensor:
        state = vt.TokenState.initial(x, 1, layer=3, depth=12)
        return vt.apply(reducer.decide(vt.Signals.of(HIDDEN=x, MODULE=scorer), state, budget=3), x, state)[0]

    assert torch.autograd.gradcheck(run, (x, *scorer.parameters()))


def test_official_counts_keys_and_refusals() -> None:
    reducer = vt.reducers.create("dpc_knn", keep_rate=0.7)
    found = [reducer.removed(196, b, Where(layer, 12), 1) for layer, b in reducer.budgets(12).items()]
    assert found == [196 - int(196 * 0.7**i) for i in (1, 2, 3)]
    assert reducer.official(1) == "cluster_layers.1."
    assert set(Scorer(4).state_dict()) == {"score.weight", "score.bias"}
    for params in ({"k_neighbors": 0}, {"keep_rate": 1.5}, {"keep_rate": 0.5, "r": 3}):
        with pytest.raises(ParameterError, match="dpc_knn: "):
            vt.reducers.create("dpc_knn", **params)
    with pytest.raises(ParameterError, match=r"count must be in \[1, 5\] clusters, got 6"):
        density.peaks(torch.ones(1, 5, 2), 6)
