"""Accuracy statistics against scipy-free reference values, and the paired comparison."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visiontok.bench.accuracy import Predictions, compare, mcnemar, predict, top_k, wilson
from visiontok.bench.data import Batch, Failure
from visiontok.errors import ParameterError


def predictions(best: list[int], targets: list[int]) -> Predictions:
    return Predictions(np.array([[value, (value + 1) % 10] for value in best]), np.array(targets))


# scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (481, 500, 0.9414152, 0.9755399),
    ],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=2e-6)


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(won: int, lost: int) -> None:
    n, k = won + lost, min(won, lost)
    exact = min(Fraction(1), Fraction(2 * sum(math.comb(n, i) for i in range(k + 1)), 2**n))
    assert mcnemar(won, lost) == pytest.approx(float(exact), abs=1e-15)


def test_mcnemar_of_a_whole_validation_set() -> None:
    assert mcnemar(2500, 2500) == 1.0
    assert 0 < mcnemar(2400, 2600) < 0.01
    assert mcnemar(0, 0) == 1.0


def test_paired_comparison() -> None:
    reference = predictions([0, 1, 2, 3, 4], [0, 1, 2, 3, 9])
    reduced = predictions([0, 1, 7, 8, 9], [0, 1, 2, 3, 9])
    paired = compare(reduced, reference)
    assert (paired.lost, paired.won) == (2, 1)
    assert paired.delta == pytest.approx(-20.0)
    assert paired.p_value == 1.0
    assert paired.agreement == pytest.approx(40.0)


def test_comparison_needs_the_same_images() -> None:
    with pytest.raises(ParameterError, match="needs the same images"):
        compare(predictions([0], [0]), predictions([0, 1], [0, 1]))


def test_top_k_counts_the_true_class_among_the_best() -> None:
    found = predictions([0, 8, 5], [0, 9, 1])
    assert top_k(found).value == pytest.approx(100 / 3)
    assert top_k(found, 2).value == pytest.approx(200 / 3)
    assert top_k(found).n == 3


def test_predict_counts_failures_and_goes_on() -> None:
    images = torch.eye(3)
    batches = [
        Batch(images, torch.tensor([0, 1, 0]), (Failure("a.png", "empty file"),)),
        Batch(torch.empty(0), torch.tensor([], dtype=torch.int64), (Failure("b.png", "truncated"),)),
    ]
    seen: list[int] = []
    found = predict(lambda x: x, batches, lambda x: x, k=5, on_batch=seen.append)
    assert found.ranked.shape == (3, 3)
    assert found.best.tolist() == [0, 1, 2]
    assert [failure.path for failure in found.failures] == ["a.png", "b.png"]
    assert seen == [4, 1]


def test_predict_says_what_is_wrong() -> None:
    with pytest.raises(ParameterError, match=r"no image could be read \(1 failed: b.png: truncated\)"):
        predict(lambda x: x, [Batch(torch.empty(0), torch.empty(0), (Failure("b.png", "truncated"),))], lambda x: x)
    with pytest.raises(ParameterError, match="classifier returns"):
        predict(lambda x: x[None], [Batch(torch.eye(2), torch.tensor([0, 1]))], lambda x: x)
