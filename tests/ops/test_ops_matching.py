"""matching and scoring against loops: decisions must be equal, not close."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import budgets, examples, lattices, normal, plain, prefixes
from torch import Tensor

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget
from visiontok.errors import ParameterError
from visiontok.ops import matching, scoring
from visiontok.reducers.pitome import PiToMe

REPEATS = {"distinct": 0, "pairs": 2, "constant": 10**6}


def assert_match(got: matching.Match, want: list[naive.Match]) -> None:
    for name, tensor in zip(got._fields, got):
        assert tensor.tolist() == [list(getattr(one, name)) for one in want], name
    everyone = torch.cat((got.src, got.order), dim=1).sort(dim=1).values
    assert all(len(set(row)) == len(row) for row in everyone.tolist()), (
        "a token both stays and leaves, or does so twice"
    )


def metric_of(length: int, seed: int, repeat: str) -> Tensor:
    """fp64 metric; `pairs` and `constant` repeat rows, so that scores tie exactly."""
    metric = normal(seed, 2, length, 6)
    if repeat == "pairs":
        metric = metric[:, torch.arange(length) // 2 % max(length // 3, 1)]
    return metric[:, :1].expand(-1, length, -1).contiguous() if repeat == "constant" else metric


@given(metric=lattices(), r=budgets, prefix=prefixes)
@examples(150)
def test_even_odd_with_ties(metric: Tensor, r: int, prefix: int) -> None:
    prefix = min(prefix, metric.shape[1])
    want = [naive.even_odd(one, r, prefix) for one in plain(metric)]
    got = matching.even_odd(metric, r, prefix)
    assert_match(got, want)


@given(
    length=st.integers(1, 20), seed=st.integers(0, 99), r=budgets, prefix=prefixes, dtype=st.sampled_from(["f8", "f4"])
)
@examples(60)
def test_even_odd(length: int, seed: int, r: int, prefix: int, dtype: str) -> None:
    metric, prefix = normal(seed, 3, length, 8), min(prefix, length)
    metric = metric.float() if dtype == "f4" else metric
    want = [naive.even_odd(one, r, prefix) for one in plain(metric)]
    assert_match(matching.even_odd(metric, r, prefix), want)


@given(metric=lattices(), r=budgets, prefix=prefixes)
@examples(100)
def test_tome_assigns_what_the_loops_say(metric: Tensor, r: int, prefix: int) -> None:
    prefix = min(prefix, metric.shape[1])
    state = vt.TokenState.initial(metric, prefix=prefix)
    tm = vt.reducers.ToMe(r=r).decide(vt.Signals.of(KEY=metric.unsqueeze(1)), state)
    want = [naive.even_odd(one, r, prefix) for one in plain(metric)]
    decided = [naive.assignment(match, metric.shape[1], prefix) for match in want]
    if tm is None:
        assert not want[0].src
        return
    assert decided[0][1] == tm.K
    assert tm.assign.tolist() == [assign for assign, _ in decided]
    stays = [[*range(prefix), *match.order] for match in want]
    assert tm.kept.tolist() == stays


@given(metric=lattices(), k=st.integers(2, 20), drop_tail=st.booleans())
@examples(80)
def test_every_kth(metric: Tensor, k: int, drop_tail: bool) -> None:
    if k > metric.shape[1]:
        with pytest.raises(ParameterError, match=rf"k must be in \[2, {metric.shape[1]}\]"):
            matching.every_kth(metric, k, drop_tail=drop_tail)
        return
    want = [naive.every_kth(one, k, drop_tail) for one in plain(metric)]
    assert_match(matching.every_kth(metric, k, drop_tail=drop_tail), want)


@given(
    metric=lattices(), split=st.integers(1, 19), r=st.integers(0, 20), ascending=st.booleans(), shuffled=st.randoms()
)
@examples(80)
def test_bipartite_on_any_two_sets(metric: Tensor, split: int, r: int, ascending: bool, shuffled: object) -> None:
    length = metric.shape[1]
    if length < 2:
        return
    places = list(range(length))
    shuffled.shuffle(places)  # type: ignore[attr-defined]
    split = min(split, length - 1)
    a, b = places[:split], places[split:]
    r = min(r, split)
    unit = matching.unit(metric)
    got = matching.bipartite(unit, torch.tensor(a), torch.tensor(b), r, ascending=ascending)
    want = [naive.bipartite(one, a, b, r, ascending) for one in plain(metric)]
    if r:
        assert_match(got, want)
    else:
        assert got.src.shape[1] == 0
        assert got.order.sort(dim=1).values.tolist() == [sorted(places)] * len(metric)


@given(metric=lattices())
@examples(30)
def test_unit_rows(metric: Tensor) -> None:
    got = matching.unit(metric)
    assert got.dtype == torch.promote_types(metric.dtype, torch.float32)
    assert got.double().tolist() == [naive.unit(one).tolist() for one in plain(metric)]


def test_unit_keeps_tiny_and_huge_rows_finite() -> None:
    metric = torch.tensor([[[1e-20, 0.0], [3e18, 4e18], [0.0, 0.0]]])
    rows = matching.unit(metric)
    assert torch.isfinite(rows).all()
    assert rows[0, 1].tolist() == pytest.approx([0.6, 0.8])
    assert rows[0, 2].tolist() == [0.0, 0.0]


def test_zero_vector_has_similarity_zero() -> None:
    metric = torch.zeros(1, 4, 3)
    metric[0, 0, 0] = metric[0, 1, 1] = 1.0
    place = torch.arange(metric.shape[1])
    score, _ = matching.best_match(matching.unit(metric), place[0::2], place[1::2])
    assert score.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("length", [2, 3, 8, 9, 33, 64, 197])
def test_constant_metric_goes_to_the_lowest_index(length: int) -> None:
    # One product per pair from equal inputs: a kernel that rounds columns differently would break the tie rule.
    metric = normal(length, 1, 1, 7, dtype=torch.float32).expand(2, length, 7).contiguous()
    r = length // 2
    got = matching.even_odd(metric, r, 0)
    assert got.src.tolist() == [list(range(0, 2 * r, 2))] * 2
    assert got.dst.tolist() == [[1] * r] * 2


@pytest.mark.parametrize("case", ["inf", "-inf", "nan"])
def test_bad_sample_leaves_others_bit_equal(case: str) -> None:
    clean = normal(1, 3, 19, 8, dtype=torch.float32)
    spoiled = clean.clone()
    spoiled[1, 4, 2] = spoiled[1, 7] = float(case)
    for decide in (
        lambda m: matching.even_odd(m, 6, 1),
        lambda m: matching.every_kth(m, 3),
        lambda m: PiToMe(kind="protect", margin=0.2).match(m, 5, Where(0, 1), 1),
        lambda m: PiToMe(kind="bsm_pitome", margin=0.2).match(m, 5, Where(0, 1), 1),
    ):
        for before, after in zip(decide(clean), decide(spoiled)):
            assert torch.equal(before[[0, 2]], after[[0, 2]])
            # The spoiled sample still gets positions that exist.
            assert int(after.min()) >= 0
            assert int(after.max()) < 19


# ---- energies and PiToMe


@given(
    length=st.integers(1, 20),
    seed=st.integers(0, 99),
    margin=st.sampled_from([0.9, 0.5, 0.0, -0.5]),
    alpha=st.sampled_from([1.0, 0.5]),
    repeat=st.sampled_from(sorted(REPEATS)),
)
@examples(40)
def test_energy(length: int, seed: int, margin: float, alpha: float, repeat: str) -> None:
    metric = metric_of(length, seed, repeat)
    rows = matching.unit(metric)
    for hinge in (False, True):
        # At the hinge a cosine that equals the margin may round to either side.
        clear = not hinge or (rows @ rows.transpose(1, 2) - margin).abs().min() > 1e-9
        if clear:
            want = [naive.energy(one, margin, alpha, hinge) for one in plain(metric)]
            got = scoring.energy(rows, margin, alpha, hinge=hinge)
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    want = [naive.gaussian_energy(one, margin) for one in plain(metric)]
    got = scoring.gaussian_energy(rows, margin)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


def test_energy_in_strips_equals_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = matching.unit(normal(0, 2, 37, 5))
    whole = scoring.energy(rows, 0.3), scoring.gaussian_energy(rows, 0.3)
    monkeypatch.setattr(scoring, "_ROWS", 8)
    for one, pieces in zip(whole, (scoring.energy(rows, 0.3), scoring.gaussian_energy(rows, 0.3))):
        torch.testing.assert_close(pieces, one, atol=1e-13, rtol=0)


@given(
    length=st.integers(1, 20),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["protect", "bsm_pitome", "bsm", "text"]),
    ratio=st.sampled_from([0.9, 0.7, 0.5, 0.2]),
    prefix=prefixes,
    zero=st.booleans(),
)
@examples(120)
def test_pitome(length: int, seed: int, kind: str, ratio: float, prefix: int, zero: bool) -> None:
    metric, prefix = normal(seed, 2, length, 8), min(prefix, length)
    if zero and length > prefix:
        metric[0, prefix] = 0
    reducer = PiToMe(ratio=ratio, kind=kind, margin=0.3, alpha=0.7)
    state = vt.TokenState.initial(metric, prefix=prefix, depth=1)
    tm = reducer.decide(vt.Signals.of(KEY=metric.unsqueeze(1)), state)
    items = length - prefix
    r = reducer.removed(items, Budget(ratio=ratio), Where(0, 1), prefix)
    assert 0 <= r <= items // 2
    if tm is None:
        assert r == 0
        return
    assert length - r == tm.K
    if kind == "bsm":
        want = [naive.even_odd(one, r, prefix) for one in plain(metric)]
    else:
        found = [naive.pitome(one, r, kind, 0.3, 0.7, prefix) for one in plain(metric)]
        # Two tokens always have the same energy but for rounding, which then decides; so may others.
        gaps = [np.diff(sorted(one.energy)).min(initial=1.0) for one in found]
        if min(gaps) < 1e-9:
            for assign in tm.assign.tolist():
                assert assign[:prefix] == list(range(prefix))
                assert sorted(set(assign)) == list(range(tm.K))
            return
        want = [one.match for one in found]
    assert_match(reducer.match(metric, r, Where(0, 1), prefix), want)
    assert tm.assign.tolist() == [naive.assignment(match, length, prefix)[0] for match in want]


@pytest.mark.parametrize("kind", ["protect", "bsm_pitome", "text"])
def test_pitome_ties_go_to_the_lowest_index(kind: str) -> None:
    metric = torch.ones(2, 9, 4)
    got = PiToMe(kind=kind, margin=0.3).match(metric, 3, Where(0, 1), 1)
    items = {"protect": ([1, 3, 5], 2), "bsm_pitome": ([1, 3, 5], 2), "text": ([1, 2, 3], 4)}
    leaving, into = items[kind]
    assert got.src.tolist() == [leaving] * 2
    assert got.dst.tolist() == [[into] * 3] * 2
