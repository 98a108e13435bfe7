"""TokenMap: constructors, what it refuses, what it derives, and how maps compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import visiontok as vt
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError

QUICK = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def tokens(batch: int, length: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- constructors


def test_identity_returns_the_very_tensor() -> None:
    x = tokens(2, 5)
    tm = TokenMap.identity(x)
    assert (tm.K, tm.form) == (5, "identity")
    assert tm.reduce(x) is x
    assert tm.sizes(None) is None
    size = torch.full((2, 5, 1), 3.0)
    assert tm.sizes(size) is size
    assert tm.kept.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.equal(tm.restore(x), x)


def test_keep_puts_the_prefix_first_and_drops_the_rest() -> None:
    x = tokens(2, 6)
    tm = TokenMap.keep(torch.tensor([[4, 2], [5, 3]]), 6, prefix=1)
    assert tm.assign.tolist() == [[0, -1, 2, -1, 1, -1], [0, -1, -1, 2, -1, 1]]
    assert (tm.K, tm.form) == (3, "select")
    assert torch.equal(tm.reduce(x), torch.stack((x[0, [0, 4, 2]], x[1, [0, 5, 3]])))
    assert tm.sizes(None) is None
    size = torch.arange(1.0, 13.0).view(2, 6, 1)
    assert tm.sizes(size).squeeze(-1).tolist() == [[1.0, 5.0, 3.0], [7.0, 12.0, 10.0]]


def test_keep_nothing_but_the_prefix() -> None:
    x = tokens(2, 6)
    tm = TokenMap.keep(torch.empty(2, 0, dtype=torch.int64), 6, prefix=2)
    assert torch.equal(tm.reduce(x), x[:, :2])
    assert torch.equal(tm.restore(x[:, :2])[:, 2:], torch.zeros(2, 4, 3, dtype=x.dtype))


def test_keep_in_sum_mode_weighs_by_size() -> None:
    x = tokens(1, 3)
    tm = TokenMap.keep(torch.tensor([[2]]), 3, mode="sum")
    assert torch.equal(tm.reduce(x, torch.full((1, 3, 1), 2.0)), 2 * x[:, 2:])


def test_merge_keeps_the_order_it_was_given() -> None:
    x = tokens(1, 7)
    tm = TokenMap.merge(torch.tensor([[2, 4]]), torch.tensor([[5, 5]]), torch.tensor([[6, 1, 5, 3]]), prefix=1)
    assert tm.assign.tolist() == [[0, 2, 3, 4, 3, 3, 1]]
    assert (tm.K, tm.form) == (5, "complete")
    assert tm.kept.tolist() == [[0, 6, 1, 5, 3]]
    torch.testing.assert_close(tm.reduce(x)[0, 3], x[0, [2, 4, 5]].mean(dim=0))
    assert tm.sizes(None).flatten().tolist() == [1, 1, 1, 3, 1]


def test_merge_with_a_length_drops_the_unnamed() -> None:
    tm = TokenMap.merge(torch.tensor([[0]]), torch.tensor([[2]]), torch.tensor([[2, 1]]), length=5)
    assert tm.assign.tolist() == [[0, 1, 0, -1, -1]]
    assert tm.form == "any"
    assert TokenMap.merge(torch.tensor([[0]]), torch.tensor([[2]]), torch.tensor([[2, 1]]), length=3).form == "complete"


def test_merge_of_nothing_keeps_every_token() -> None:
    x, none = tokens(1, 3), torch.empty(1, 0, dtype=torch.int64)
    tm = TokenMap.merge(none, none, torch.tensor([[2, 1]]), prefix=1)
    assert torch.equal(tm.reduce(x), x[:, [0, 2, 1]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"assign": torch.zeros(4, dtype=torch.int64)}, r"assign must be \(B, N\), got shape \(4,\)"),
        ({"assign": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"assign must be \(B, N\)"),
        ({"mode": "median"}, "mode must be one of mean, sum, amax, absmax, mlerp, got 'median'"),
        ({"weight": torch.ones(2, 3)}, r"weight must have shape \(2, 4\), got \(2, 3\)"),
        ({"mass": torch.ones(4)}, r"mass must have shape \(2, 4\), got \(4,\)"),
        ({"anchor": torch.zeros(2, 4, dtype=torch.int64)}, r"anchor must have shape \(2, 2\), got \(2, 4\)"),
        ({"counts": torch.ones(3)}, r"counts must have shape \(2,\), got \(3,\)"),
        ({"soft": torch.ones(2, 4, 2)}, r"soft must have shape \(2, 2, 4\), got \(2, 4, 2\)"),
        ({"back": torch.ones(2, 2, 4)}, r"back must have shape \(2, 4, 2\), got \(2, 2, 4\)"),
    ],
)
def test_malformed_maps_are_refused(fields: dict[str, Any], message: str) -> None:
    good = {"assign": torch.tensor([[0, 1, 0, 1]] * 2), "K": 2}
    with pytest.raises(ParameterError, match=message):
        TokenMap(**{**good, **fields})


@pytest.mark.parametrize("extra", [{"mode": "median"}, {"weight": torch.ones(1, 2)}, {"counts": torch.ones(2)},
                                   {"soft": torch.ones(1, 1, 1)}])  # fmt: skip
def test_constructors_check_what_they_pass_on(extra: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=next(iter(extra))):
        TokenMap.merge(torch.tensor([[0]]), torch.tensor([[2]]), torch.tensor([[2, 1]]), **extra)
    with pytest.raises(ParameterError, match=next(iter(extra))):
        TokenMap.keep(torch.tensor([[0]]), 3, **extra)


# ---- what is derived


def test_anchor_default_is_the_lowest_index() -> None:
    tm = TokenMap(torch.tensor([[2, 0, 2, 1, -1]]), 4)
    # Slot 3 has no token; whatever stands for it must exist.
    assert tm.kept[0, :3].tolist() == [1, 3, 0]
    assert 0 <= int(tm.kept[0, 3]) < 5
    given = TokenMap(torch.tensor([[2, 0, 2, 1, -1]]), 3, anchor=torch.tensor([[1, 3, 2]]))
    assert given.kept.tolist() == [[1, 3, 2]]


def test_counts_cut_slots_to_size_zero() -> None:
    x = tokens(2, 4)
    tm = TokenMap(torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]]), 3, counts=torch.tensor([3, 1]))
    assert tm.live.tolist() == [[True, True, True], [True, False, False]]
    assert tm.sizes(None).squeeze(-1).tolist() == [[1, 1, 2], [4, 0, 0]]
    assert TokenMap(tm.assign, 3).live is None
    assert torch.equal(tm.reduce(x)[1, 1:], torch.zeros(2, 3, dtype=x.dtype))
    kept = TokenMap.keep(torch.tensor([[3, 1], [2, 0]]), 4, counts=torch.tensor([2, 1]))
    assert kept.sizes(None).squeeze(-1).tolist() == [[1, 1], [1, 0]]


def test_mean_fill_averages_live_slots_only() -> None:
    tm = TokenMap(torch.tensor([[0, -1, 1, -1], [0, -1, -1, -1]]), 2, counts=torch.tensor([2, 1]))
    y = torch.tensor([[[2.0], [4.0]], [[6.0], [0.0]]])
    assert tm.restore(y, "mean").squeeze(-1).tolist() == [[2.0, 3.0, 4.0, 3.0], [6.0, 6.0, 6.0, 6.0]]


def test_soft_map_is_a_matrix_product() -> None:
    x, soft = tokens(2, 5), tokens(2, 3, 5, seed=1)
    tm = TokenMap(soft.argmax(dim=1), 3, soft=soft)
    torch.testing.assert_close(tm.reduce(x), soft @ x)
    assert tm.sizes(None) is None
    assert tm.sizes(torch.ones(2, 5, 1)) is None
    massed = TokenMap(soft.argmax(dim=1), 3, soft=soft, mass=torch.full((2, 5), 2.0))
    assert massed.sizes(None).sum(dim=1).flatten().tolist() == [10.0, 10.0]
    half = tm.reduce(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, (soft @ x.half().double()).half(), atol=2e-2, rtol=1e-2)


def test_back_replaces_the_gather() -> None:
    y, back = tokens(2, 3), tokens(2, 5, 3, seed=1)
    tm = TokenMap(torch.zeros(2, 5, dtype=torch.int64), 3, back=back)
    torch.testing.assert_close(tm.restore(y), back @ y)


def test_weight_changes_values_and_mass_changes_sizes() -> None:
    x = torch.tensor([[[1.0], [3.0], [5.0]]])
    assign = torch.tensor([[0, 0, 1]])
    weighted = TokenMap(assign, 2, weight=torch.tensor([[3.0, 1.0, 1.0]]))
    assert weighted.reduce(x).flatten().tolist() == [1.5, 5.0]
    assert weighted.sizes(None).flatten().tolist() == [2.0, 1.0]
    massive = TokenMap(assign, 2, mass=torch.tensor([[3.0, 1.0, 0.5]]))
    assert massive.reduce(x).flatten().tolist() == [2.0, 5.0]
    assert massive.sizes(torch.full((1, 3, 1), 9.0)).flatten().tolist() == [4.0, 0.5]


def test_weights_of_zero_give_zero_not_nan() -> None:
    tm = TokenMap(torch.tensor([[0, 0, 1]]), 2, weight=torch.tensor([[0.0, 0.0, 1.0]]))
    assert tm.reduce(torch.ones(1, 3, 1)).flatten().tolist() == [0.0, 1.0]


def test_restore_fills() -> None:
    tm = TokenMap(torch.tensor([[-1, 0, -1, -1, -1, 1, 0]]), 2)
    y, x = torch.tensor([[[1.0], [5.0]]]), torch.arange(10.0, 17.0).view(1, 7, 1)
    assert tm.restore(y).flatten().tolist() == [0, 1, 0, 0, 0, 5, 1]
    assert tm.restore(y, "mean").flatten().tolist() == [3, 1, 3, 3, 3, 5, 1]
    assert tm.restore(y, "self", x=x).flatten().tolist() == [10, 1, 12, 13, 14, 5, 1]
    # Token 3 is two away from both neighbours: the left one wins.
    assert tm.restore(y, "nearest").flatten().tolist() == [1, 1, 1, 1, 5, 5, 1]


# ---- composition


@st.composite
def chains(draw: st.DrawFn) -> list[TokenMap]:
    """Two or three maps that fit one after another, complete ones included."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 12))
    maps = []
    for _ in range(draw(st.integers(2, 3))):
        slots = draw(st.integers(1, length))
        low = draw(st.sampled_from([0, -1]))
        cells = draw(st.lists(st.integers(low, slots - 1), min_size=batch * length, max_size=batch * length))
        assign = torch.tensor(cells).view(batch, length)
        maps.append(TokenMap(assign, slots, form="complete" if low == 0 else "any"))
        length = slots
    return maps


@given(chain=chains())
@QUICK
def test_composed_map_does_what_the_chain_does(chain: list[TokenMap]) -> None:
    x = tokens(len(chain[0].assign), chain[0].assign.shape[1])
    state = vt.TokenState.initial(x, prefix=0)
    value, now, whole = x, state, chain[0]
    for i, tm in enumerate(chain):
        value, now = vt.apply(tm, value, now)
        whole = whole if i == 0 else tm.after(whole)
    once, after = vt.apply(whole, x, state)
    assert whole.assign.tolist() == now.origin.tolist()
    # A slot that got no token is a zero with size zero on both ways.
    torch.testing.assert_close(once, value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(after.size, now.size, atol=0, rtol=0)


def test_then_is_after_reversed() -> None:
    first, later = TokenMap(torch.tensor([[0, 0, 1, 2]]), 3), TokenMap(torch.tensor([[1, 0, -1]]), 2)
    assert first.then(later).assign.tolist() == later.after(first).assign.tolist() == [[1, 1, 0, -1]]


def test_composition_of_sums_with_weights() -> None:
    x = tokens(1, 5)
    first = TokenMap(torch.tensor([[0, 0, 1, 1, 2]]), 3, mode="sum", weight=tokens(1, 5, 1, 2).squeeze(-1))
    later = TokenMap(torch.tensor([[0, 1, 0]]), 2, mode="sum", weight=tokens(1, 3, 1, 3).squeeze(-1))
    torch.testing.assert_close(first.then(later).reduce(x), later.reduce(first.reduce(x)))


@pytest.mark.parametrize("early", [None, [[0.5, 2.0, 1.0, 3.0, 4.0]]])
@pytest.mark.parametrize("late", [None, [[1.5, 8.0, 0.25]]])
def test_composition_of_masses(early: Any, late: Any) -> None:
    x = tokens(1, 5)
    first, later = (
        TokenMap(torch.tensor(assign), slots, mass=None if mass is None else torch.tensor(mass))
        for assign, slots, mass in (([[0, 0, 1, 1, 2]], 3, early), ([[0, 1, 0]], 2, late))
    )
    _, stepwise = vt.apply(later, *vt.apply(first, x, vt.TokenState.initial(x, prefix=0)))
    torch.testing.assert_close(first.then(later).sizes(None, x.dtype), stepwise.size)


def test_anchors_compose() -> None:
    first = TokenMap.keep(torch.tensor([[5, 3, 1]]), 6)
    later = TokenMap.merge(torch.tensor([[0]]), torch.tensor([[2]]), torch.tensor([[2, 1]]))
    assert first.then(later).kept.tolist() == [[1, 3]]


def test_forms_compose() -> None:
    x = tokens(1, 4)
    same, keep = TokenMap.identity(x), TokenMap.keep(torch.tensor([[3, 1]]), 4)
    merge = TokenMap.merge(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[1, 2, 3]]))
    assert same.then(same).form == "identity"
    assert same.then(keep).form == "select"
    assert same.then(merge).form == "complete"
    assert merge.then(TokenMap.keep(torch.tensor([[0]]), 3)).form == "any"
    assert keep.then(TokenMap.keep(torch.tensor([[1]]), 2)).form == "select"


def test_maps_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ParameterError, match="earlier has 2 slots, later takes 3"):
        TokenMap(torch.tensor([[0, 1, 0]]), 2).after(TokenMap(torch.tensor([[0, 1, 1]]), 2))


def test_with_state_keeps_places() -> None:
    tm = TokenMap(torch.tensor([[0, 1, 0]]), 2, mode="sum")
    other = tm.with_state(carry={"a": torch.ones(1, 2)}, stash=torch.zeros(1, 1, 1), memo={"b": 1})
    assert other.assign is tm.assign
    assert other.mode == "sum"
    assert tm.carry is None
    assert other.memo == {"b": 1}
