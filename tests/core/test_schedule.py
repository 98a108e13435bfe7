"""Budgets: every form, every refusal, and text that is not a budget."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import visiontok as vt
from visiontok.core.reducer import Where
from visiontok.core.schedule import Budget, check, even, parse_budget, parse_keep, parse_r, resolve
from visiontok.errors import FormatError, ParameterError, VisionTokError

QUICK = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(
    ("r", "points", "want"),
    [
        (7, 3, [7, 7, 7]),
        (7.9, 2, [7, 8]),
        (0, 2, [0, 0]),
        (10**6, 2, [10**6, 10**6]),
        ((16, -1.0), 4, [32, 21, 10, 0]),
        ((16, 1), 4, [0, 10, 21, 32]),
        ((7, 0.25), 4, [5, 6, 7, 9]),
        ((8, -1.0), 1, [16]),
        ((8, 1.0), 1, [0]),
        (5, 1, [5]),
        ([3, 0, 5], 5, [3, 0, 5, 0, 0]),
        ([3, 0, 5], 3, [3, 0, 5]),
        ([], 2, [0, 0]),
        ({}, 2, [0, 0]),
        ({1: 4}, 3, [0, 4, 0]),
    ],
)
def test_parse_r(r: Any, points: int, want: list[int]) -> None:
    assert parse_r(r, points) == want


def test_a_float_r_is_split_as_the_released_code_does() -> None:
    # low = int(7.9) = 7, high = 15.8 - 7 = 8.8, truncated step by step.
    assert parse_r(7.9, 4) == [int(7 + (8.8 - 7) / 3 * i) for i in range(4)]


@given(r=st.integers(0, 60), inflection=st.floats(-1, 1), points=st.integers(1, 30))
@QUICK
def test_inflection_keeps_mean_and_direction(r: int, inflection: float, points: int) -> None:
    values = parse_r((r, inflection), points)
    assert len(values) == points
    assert all(0 <= value <= 2 * r for value in values)
    assert values == sorted(values, reverse=inflection < 0)
    # Each entry loses less than one to truncation.
    assert points == 1 or r * points - points < sum(values) <= r * points + 1e-6 * points + points


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r must be at least 0"),
        (-0.5, "r must be at least 0"),
        (math.inf, "r must be at least 0"),
        (math.nan, "r must be at least 0"),
        (1e308, "r must be at least 0"),
        (10**400, "r must be at least 0"),
        ((-1, 0.5), "r must be at least 0"),
        ((8, 1.5), r"inflection of r must be in \[-1, 1\], got 1.5"),
        ((8, -1.01), "inflection"),
        ((8, math.nan), "inflection"),
        ((8, math.inf), "inflection"),
        ((8, 0.5, 1), "r must be an int, a float"),
        ((True, 0.5), "r must be an int, a float"),
        (True, "r must be an int, a float"),
        ("13", "r must be an int, a float"),
        ([1, -2], r"entries of r must be ints >= 0 \(tokens removed\), got -2"),
        ([1, 2.0], "entries of r must be ints"),
        ([True], "entries of r must be ints"),
        ([[1]], "entries of r must be ints"),
        ([1, 2, 3, 4], "r has 4 entries but the model has 3 points; give at most 3"),
        ({5: 2}, r"r names layers \[5\], which are no points of this model \(0 … 2\)"),
        ({-1: 2}, r"r names layers \[-1\]"),
        ({True: 2}, r"r names layers \[True\]"),
        ({"0": 2}, r"r names layers \['0'\]"),
        ({0: -2}, "entries of r must be ints"),
    ],
)
def test_parse_r_refuses(r: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_r(r, 3)
    with pytest.raises(ParameterError):
        vt.reducers.ToMe(r=r).budgets(3)


@pytest.mark.parametrize(
    ("keep", "points", "want"),
    [
        (0.7, 2, [Budget(ratio=0.7)] * 2),
        (1.0, 1, [Budget(ratio=1.0)]),
        (1, 2, [Budget(count=1)] * 2),
        (64, 1, [Budget(count=64)]),
        ([0.5, 8], 3, [Budget(ratio=0.5), Budget(count=8), Budget()]),
        ({1: 0.5}, 3, [Budget(ratio=1.0), Budget(ratio=0.5), Budget(ratio=1.0)]),
    ],
)
def test_parse_keep(keep: Any, points: int, want: list[Budget]) -> None:
    assert parse_keep(keep, points) == want


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, r"a float keep must be in \(0, 1\]"),
        (1.01, r"a float keep must be in \(0, 1\] \(share of tokens kept\), got 1.01"),
        (-0.5, "a float keep"),
        (math.nan, "a float keep"),
        (math.inf, "a float keep"),
        (0, r"an int keep must be at least 1 \(tokens kept\), got 0"),
        (-3, "an int keep"),
        (True, "keep must be a float"),
        (False, "keep must be a float"),
        ("0.5", "keep must be a float"),
        ([0.5, 0], "an int keep"),
        ([True], "keep must be a float"),
        ([0.5] * 4, "keep has 4 entries but the model has 3 points"),
        ({3: 0.5}, r"keep names layers \[3\]"),
        ({0: 2.0}, "a float keep"),
    ],
)
def test_parse_keep_refuses(keep: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        parse_keep(keep, 3)
    with pytest.raises(ParameterError):
        vt.reducers.ToMe(keep=keep).budgets(3)


def test_longer_list_is_cut_only_with_compat() -> None:
    assert parse_r([1, 2, 3, 4], 3, compat="official") == [1, 2, 3, 4]
    assert resolve([1, 2, 3, 4], None, range(3), compat="official") == (Budget(1), Budget(2), Budget(3))
    assert list(vt.reducers.ToMe(r=[1, 2, 3], compat="official").budgets(2).values()) == [Budget(1), Budget(2)]
    with pytest.raises(ParameterError, match="3 entries but the model has 2"):
        vt.reducers.ToMe(r=[1, 2, 3]).budgets(2)


@pytest.mark.parametrize("pair", [{"r": 3, "keep": 0.5}, {"r": 3, "tokens": 9}, {"keep": 4, "gflops": 1.0},
                                  {"gflops": 1.0, "tokens": 4}, {"r": 0, "keep": 1.0}])  # fmt: skip
def test_two_budgets_at_once_are_refused(pair: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="give one budget, got 2") as error:
        vt.reducers.create("tome", **pair)
    assert all(f"{name}={value!r}" in str(error.value) for name, value in pair.items())


def test_pitome_counts_ratio_as_a_budget() -> None:
    with pytest.raises(ParameterError, match="give one budget, got 2"):
        vt.reducers.create("pitome", ratio=0.9, r=3)
    with pytest.raises(ParameterError, match="give r or keep, not both"):
        resolve(1, 0.5, range(3))
    for bad in (0, 0.0, -0.5, 1.5, math.nan, True, "0.9"):
        with pytest.raises(ParameterError, match=r"ratio must be in \(0, 1\]"):
            vt.reducers.create("pitome", ratio=bad)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("gflops", 0), ("gflops", -1.0), ("gflops", True), ("gflops", "4"), ("tokens", 0), ("tokens", 1.5),
     ("tokens", True), ("tokens", -4)],
)  # fmt: skip
def test_targets_must_be_positive_numbers(name: str, bad: Any) -> None:
    with pytest.raises(ParameterError, match=f"tome: {name} must be"):
        vt.reducers.create("tome", **{name: bad})


def test_sparse_budgets_are_keyed_by_layer() -> None:
    # A method that acts between blocks starts at layer 1.
    assert resolve({3: 5}, None, range(1, 5)) == (Budget(), Budget(), Budget(5), Budget())
    with pytest.raises(ParameterError, match=r"r names layers \[0\], which are no points of this model \(1 … 4\)"):
        resolve({0: 5}, None, range(1, 5))
    with pytest.raises(ParameterError, match=r"keep names layers \[5\]"):
        resolve(None, {5: 0.5}, range(1, 5))


@pytest.mark.parametrize("bad", [{10**9: 1}, {10**30: 1}, {-(10**9): 1}])
def test_absurd_layers_are_refused_at_once(bad: dict[int, int]) -> None:
    with pytest.raises(ParameterError, match="layer"):
        vt.reducers.create("tome", r=bad)


def test_check_takes_budgets_of_any_depth() -> None:
    for r, keep in ((13, None), ([1] * 40, None), ({23: 4}, None), (None, {11: 0.5}), (None, [0.5, 3]), (None, None)):
        check(r, keep)
    with pytest.raises(ParameterError):
        check({-1: 3}, None)


# ---- what a budget removes


@given(n=st.integers(0, 300), keep=st.floats(0.01, 1.0))
@QUICK
def test_ratio_removes_the_floor_in_double_precision(n: int, keep: float) -> None:
    assert Budget(ratio=keep).removed(n) == math.floor(n - n * keep)


def test_budget_removed_idle_and_text() -> None:
    assert [Budget(r=3).removed(n) for n in (0, 2, 10)] == [3, 3, 3]
    assert [Budget(count=4).removed(n) for n in (0, 4, 10)] == [0, 0, 6]
    assert [b.idle for b in (Budget(), Budget(r=1), Budget(ratio=1.0), Budget(ratio=0.5), Budget(count=5))] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert [str(b) for b in (Budget(r=3), Budget(ratio=0.5), Budget(count=4))] == ["r=3", "keep 0.5", "keep 4"]


@given(n=st.integers(0, 40), r=st.one_of(st.integers(0, 50), st.just(10**6)), name=st.sampled_from(vt.list_reducers()))
@QUICK
def test_every_reducer_clamps_to_what_it_can_do(n: int, r: int, name: str) -> None:
    reducer = vt.reducers.create(name)
    removed = reducer.removed(n, Budget(r=r), Where(0, 12), prefix=1)
    assert isinstance(removed, int)
    assert 0 <= removed <= n
    # Something is left wherever there was something.
    assert n == 0 or removed < n


@given(total=st.integers(0, 500), points=st.integers(1, 30))
@QUICK
def test_even_split(total: int, points: int) -> None:
    parts = even(total, points)
    assert sum(parts) == total
    assert len(parts) == points
    assert max(parts) - min(parts) <= 1


def test_shares_of_one_keep_everything() -> None:
    for n in range(300):
        assert Budget(ratio=1.0).removed(n) == 0


# ---- text

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=string.digits + "()[]{}:,.-+eEjx_ \n'\"", max_size=40),
    st.integers().map(str),
    st.floats().map(repr),
    st.lists(st.integers(0, 99), max_size=6).map(str),
    st.dictionaries(st.integers(0, 20), st.integers(0, 99), max_size=5).map(str),
    st.recursive(st.just("1"), lambda inner: inner.map(lambda text: f"[{text}]"), max_leaves=30),
)


@given(text=TEXTS)
@settings(QUICK, max_examples=500)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_text_is_a_budget_or_a_format_error(text: str) -> None:
    try:
        value = parse_budget(text)
    except FormatError:
        return
    assert isinstance(value, (int, float, list, tuple, dict))
    # What was read may still be no budget, but then that is said properly too.
    for name in ("r", "keep"):
        try:
            vt.reducers.create("tome", **{name: value})
        except VisionTokError:
            continue


@pytest.mark.parametrize("text", ["13", " 13 ", "0.7", "(16, -1.0)", "[10, 0, 7]", "{3: 20, 6: 10}", "[]", "1e2"])
def test_parse_budget_reads(text: str) -> None:
    value = parse_budget(text)
    assert value == eval(text.strip())
    assert type(value) is type(eval(text.strip()))


@pytest.mark.parametrize(
    "text",
    ["", "r", "None", "True", "[True]", "1j", "'13'", "[1, 'a']", "[[1]]", "{1: [2]}", "{1, 2}", "__import__('os')",
     "1 +", "(", "\0", "9" * 5000, "[" * 3000, "-" * 4000 + "1", "lambda: 1", "f'{1}'"],
)  # fmt: skip
def test_parse_budget_refuses(text: str) -> None:
    with pytest.raises(FormatError):
        parse_budget(text)
