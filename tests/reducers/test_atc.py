"""ATC against scikit-learn, as the released code runs it, and against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError

LINKAGES = ("single", "complete", "average")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(n for n, other in enumerate(labels) if other == label) for label in labels}


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize(("count", "dim"), [(40, 6), (25, 32)])
def test_the_clusters_of_scikit_learn(linkage: str, count: int, dim: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    metric = draw(3, count, dim, seed=count)
    unit = torch.nn.functional.normalize(metric, dim=-1)
    reducer = vt.reducers.create("atc", linkage=linkage)
    for r in (1, count // 3, count // 2, count - 4, count - 1):
        ours = reducer.clusters(metric, r)
        for b in range(3):
            model = cluster.AgglomerativeClustering(n_clusters=count - r, metric="precomputed", linkage=linkage)
            theirs = model.fit((1 - unit[b] @ unit[b].T).numpy()).labels_
            assert parts(ours[b].tolist()) == parts(theirs.tolist())


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_distances_of_the_definition(linkage: str) -> None:
    """Without the update formula: every distance from the members of both clusters."""
    metric = draw(1, 14, 5, seed=3)
    unit = torch.nn.functional.normalize(metric[0], dim=-1)
    take = {"single": min, "complete": max, "average": lambda values: sum(values) / len(values)}[linkage]
    groups = [[n] for n in range(14)]
    for r in range(1, 14):
        options = [(i, j) for i in range(len(groups)) for j in range(i)]
        far = {(i, j): take([float(1 - unit[a] @ unit[b]) for a in groups[i] for b in groups[j]]) for i, j in options}
        i, j = min(options, key=far.__getitem__)
        groups[j] += groups.pop(i)
        ours = vt.reducers.create("atc", linkage=linkage).clusters(metric, r)[0].tolist()
        assert parts(ours) == {frozenset(group) for group in groups}
        assert all(first == min(g) for n, first in enumerate(ours) for g in groups if n in g)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_map(prefix: int) -> None:
    x, key = draw(2, 10 + prefix, 4), draw(2, 2, 10 + prefix, 3, seed=1)
    size = torch.ones(2, 10 + prefix, 1, dtype=torch.float64)
    size[:, prefix:] += draw(2, 10, 1, seed=2).abs().ceil()
    state = vt.TokenState.initial(x, prefix).changed(size=size)
    reducer = vt.reducers.create("atc")
    tm = reducer.decide(vt.Signals.of(KEY=key), state, budget=6)
    first = reducer.clusters(key.mean(dim=1)[:, prefix:], 6)
    y, after = vt.apply(tm, x, state)
    for b in range(2):
        groups = sorted(sorted(group) for group in parts(first[b].tolist()))
        assert tm.kept[b].tolist() == [*range(prefix), *(group[0] + prefix for group in groups)]
        for slot, group in enumerate(groups, start=prefix):
            members = [n + prefix for n in group]
            held = sum(size[b, n] for n in members)
            torch.testing.assert_close(y[b, slot], sum(size[b, n] * x[b, n] for n in members) / held)
            assert after.size[b, slot] == held


def test_equal_tokens_unite_from_the_first_on() -> None:
    clusters = vt.reducers.create("atc").clusters(torch.ones(1, 5, 3), 2)
    assert clusters.tolist() == [[0, 0, 0, 3, 4]]


def test_nan_stays_in_its_sample() -> None:
    metric = draw(2, 9, 4)
    poisoned = metric.clone()
    poisoned[0] = float("nan")
    reducer = vt.reducers.create("atc")
    assert torch.equal(reducer.clusters(poisoned, 4)[1], reducer.clusters(metric, 4)[1])
    assert len(set(reducer.clusters(poisoned, 4)[0].tolist())) == 5


def test_places_and_counts() -> None:
    assert sorted(vt.reducers.create("atc", keep=0.9).budgets(12)) == [3, 6, 9]
    assert sorted(vt.reducers.create("atc", r=8).budgets(12)) == list(range(12))
    reducer, n = vt.reducers.create("atc", keep=0.9), 196
    left = []
    for layer, budget in reducer.budgets(12).items():
        n -= reducer.removed(n, budget, Where(layer, 12), 1)
        left.append(n)
    assert left == [int(196 * 0.9**i) for i in (1, 2, 3)]


def test_unknown_linkage() -> None:
    with pytest.raises(ParameterError, match="linkage must be one of single, complete, average, got 'ward'"):
        vt.reducers.create("atc", linkage="ward")


def test_gradients() -> None:
    x, key = draw(1, 7, 3), draw(1, 1, 7, 4, seed=5)
    state = vt.TokenState.initial(x, 1)
    tm = vt.reducers.create("atc").decide(vt.Signals.of(KEY=key), state, budget=4)
    assert torch.autograd.gradcheck(lambda x: vt.apply(tm, x, state)[0], x.requires_grad_())
