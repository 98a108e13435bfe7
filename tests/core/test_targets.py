"""gflops= and tokens=: met to one token at one layer, at the method's own layers first, else wherever it may act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from visiontok import reducers
from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import quarters, split
from visiontok.core.targets import solve
from visiontok.errors import ParameterError

DEPTH, ITEMS = 12, 196


def cost(counts: Sequence[float]) -> float:
    """What a ViT of some width costs with these tokens in its blocks."""
    return sum(n * (12 * 64 + 2 * n) for n in counts) / 1e6


def measure(reducer: Reducer, removals: dict[int, int]) -> float:
    now, counts = ITEMS, list[float]()
    for layer in range(DEPTH):
        # Half of a block sees the tokens before its reduction.
        before, now = now, now - removals.get(layer, 0)
        counts.append((before + now) / 2)
    return cost(counts)


@dataclass(frozen=True)
class Sparse(Reducer):
    """Acts at three blocks unless told otherwise."""

    def layers(self, depth: int) -> Sequence[int]:
        return quarters(depth)

    def decide(self, signals, state, budget=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return None


DENSE = measure(Sparse(), {})


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("kind", ["tome", "sparse"])
def test_gflops_is_met_to_one_token_at_one_layer(kind: str, share: float) -> None:
    target = share * DENSE
    reducer = Sparse(gflops=target) if kind == "sparse" else reducers.create("random", gflops=target)
    found = {layer: budget.r for layer, budget in solve(reducer, DEPTH, ITEMS, measure).items()}
    reached = measure(reducer, found)
    assert reached <= target
    # The finest step: one token for the blocks from one point to the next.
    layers = sorted(found)
    gap = max(b - a for a, b in zip(layers, [*layers[1:], DEPTH]))
    assert target - reached <= gap * (cost([ITEMS]) - cost([ITEMS - 1]))


def test_own_layers_come_first() -> None:
    assert set(solve(Sparse(gflops=0.6 * DENSE), DEPTH, ITEMS, measure)) == {3, 6, 9}
    assert set(solve(Sparse(gflops=0.2 * DENSE), DEPTH, ITEMS, measure)) == set(range(DEPTH))
    with pytest.raises(ParameterError, match="outside what this model can reach"):
        solve(Sparse(gflops=0.2 * DENSE, spacing="ratio"), DEPTH, ITEMS, measure)


@pytest.mark.parametrize("spacing", ["even", "ratio", "linear"])
@pytest.mark.parametrize(("total", "points"), [(0, 3), (7, 3), (195, 12), (100, 1), (5, 12)])
def test_splits_sum_and_are_never_negative(spacing: str, total: int, points: int) -> None:
    parts = split(total, points, ITEMS, spacing)
    assert sum(parts) == total
    assert len(parts) == points
    assert min(parts) >= 0


def test_spacings_have_their_shape() -> None:
    assert split(120, 12, ITEMS, "even") == [10] * 12
    falling = split(156, 12, ITEMS, "linear")
    assert falling == sorted(falling, reverse=True)
    left, shares = ITEMS, []
    for r in split(180, 6, ITEMS, "ratio"):
        shares.append((left - r) / left)
        left -= r
    assert max(shares) - min(shares) < 0.05
    with pytest.raises(ParameterError, match="spacing must be"):
        split(3, 2, 9, "cubic")


@pytest.mark.parametrize("tokens", [196, 150, 49, 7, 1])
def test_tokens_are_reached_exactly(tokens: int) -> None:
    for reducer in (Sparse(tokens=tokens), reducers.create("tome", tokens=tokens)):
        left = ITEMS
        for budget in solve(reducer, DEPTH, ITEMS).values():
            assert budget.r <= reducer.limit(left)
            left -= budget.r
        assert left == tokens


def test_gflops_needs_something_to_count() -> None:
    with pytest.raises(ParameterError, match="whose compute can be counted"):
        solve(Sparse(gflops=1.0), DEPTH, ITEMS)


def test_quarters() -> None:
    found = {depth: quarters(depth) for depth in (12, 24, 4, 2, 1)}
    assert found == {12: (3, 6, 9), 24: (6, 12, 18), 4: (1, 2, 3), 2: (0, 1), 1: (0,)}


@pytest.mark.parametrize(("r", "multiple", "want"), [
    (13, 16, [192, 176, 160, 144, 128, 112, 112, 96, 80, 64, 48, 48]),
    (8, 16, [192, 176, 176, 160, 160, 144, 144, 128, 128, 112, 112, 96]),
    (13, 1, [197 - 13 * i for i in range(1, 13)]),
])  # fmt: skip
def test_lengths_are_rounded_to_the_nearest_multiple(r: int, multiple: int, want: list[int]) -> None:
    reducer = reducers.create("tome", r=r, round_tokens=multiple)
    budgets = solve(reducer, 12, 196, prefix=1)
    lengths, now = [], 197
    for layer in range(12):
        now -= reducer.removed(now - 1, budgets[layer], Where(layer, 12, start=196), 1)
        lengths.append(now)
    assert lengths == want


@pytest.mark.parametrize("value", [0, -16, 2.5, True, "16"])
def test_a_multiple_must_be_a_positive_int(value: object) -> None:
    with pytest.raises(ParameterError, match="round_tokens"):
        reducers.create("tome", r=13, round_tokens=value)


def test_rounding_needs_a_budget() -> None:
    with pytest.raises(ParameterError, match="tome_kth"):
        reducers.create("tome_kth", k=2, round_tokens=16)
