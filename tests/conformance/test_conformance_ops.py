"""C2–C6 and C11 by hand: `decide` and `apply` of every reducer on small shapes, against a loop-level reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance_loops import naive_sizes, naive_values, slots_alive
from conformance_matrix import budget_names, encoder_reducers, make_module, make_signal, settings_of, shape_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import visiontok as vt
from visiontok import reducers
from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Site
from visiontok.ops.attention import Votes

PREFIXES = (0, 1, 2, 5)
PATCHES = (1, 2, 3, 4, 9, 12)
DEPTH = 4


EVERY = [
    pytest.param(
        name,
        params,
        id="-".join([name, *(f"{k}={v}" for k, v in params.items())]),
        marks=() if set(params) <= {"compat"} else pytest.mark.full,
    )
    for name in encoder_reducers()
    for params in settings_of(name)
]


def ask(reducer: Reducer, patches: int, prefix: int, budget: int, batch: int = 2, dtype: Any = torch.float64) -> Any:
    """State, hidden tokens, the number of tokens to remove, and the decision."""
    grid = shape_of(patches)
    made = {str(s): make_signal(str(s), batch, patches + prefix, prefix, grid, dtype) for s in reducer.needs}
    x = make_signal("HIDDEN", batch, patches + prefix, prefix, grid, dtype)
    layer = 0 if reducer.site is Site.MID else 1
    if "ATTN_PREFIX" in made and prefix == 0:
        return None, x, 0, None
    state = vt.TokenState.initial(x, prefix, grid, layer=layer, depth=DEPTH, proportional=reducer.proportional)
    given_budget = dict(reducer.budgets(DEPTH)).get(layer)
    own = reducer.budget_names == () and given_budget is not None
    place = Where(layer, DEPTH, grid=grid)
    asked = reducer.removed(patches, given_budget, place, prefix) if own else budget
    clamped = asked if own else max(min(asked, reducer.limit(patches)), 0)
    if reducer.grid_preserving and not own:
        # What leaves a grid is at least what was asked.
        clamped = reducer.removed(patches, Budget(r=budget), place, prefix)
    made["MODULE"] = make_module(reducer, layer, patches, prefix, clamped, dtype) if clamped > 0 else None
    return state, x, clamped, reducer.decide(vt.Signals.of(**made), state, budget=asked)


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_c2_c3_counts_and_prefix_for_every_small_shape(name: str, params: dict[str, Any]) -> None:
    reducer = reducers.create(name, **params)
    for prefix in PREFIXES:
        for patches in PATCHES:
            for budget in (0, 1, 2, patches // 2 + 1, 10**6):
                state, x, removed, tm = ask(reducer, patches, prefix, budget)
                where = f"{patches} patches, prefix {prefix}, budget {budget}"
                if tm is None:
                    assert removed == 0, where
                    continue
                expected = patches + prefix - removed
                assert expected >= tm.K if reducer.ragged else expected == tm.K, where
                y, after = vt.apply(tm, x, state)
                assert (after.n, y.shape) == (tm.K, (2, tm.K, 8)), where
                assert torch.isfinite(y).all(), where
                lead = torch.arange(prefix).expand(2, prefix)
                assert torch.equal(tm.assign[:, :prefix], lead), where
                assert not ((tm.assign[:, prefix:] >= 0) & (tm.assign[:, prefix:] < prefix)).any(), where
                assert torch.equal(y[:, :prefix], x[:, :prefix]), where
                assert tm.assign.max() < tm.K, where
                assert tm.assign.min() >= -1, where
                live = torch.ones(2, tm.K, dtype=torch.bool) if tm.live is None else tm.live
                if tm.soft is None:
                    slots = tm.assign.gather(1, tm.kept)
                    assert torch.equal(slots[live], torch.arange(tm.K).expand(2, -1)[live]), where


@pytest.mark.parametrize("name", encoder_reducers())
def test_a_negative_budget_is_refused(name: str) -> None:
    if "r" not in budget_names(name):
        pytest.skip(f"{name} takes no budget from outside")
    reducer = reducers.create(name)
    if reducer.limit(9) == 0:
        pytest.skip(f"{name} ignores every budget")
    with pytest.raises(vt.VisionTokError, match=r"budget must be at least 0 .*got -1"):
        ask(reducer, 9, 1, -1)


@pytest.mark.parametrize("name", encoder_reducers())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    patches=st.integers(1, 13),
    prefix=st.sampled_from(PREFIXES),
    budget=st.integers(0, 9),
    batch=st.integers(1, 3),
    sized=st.booleans(),
)
def test_c11_values_sizes_and_gradients_equal_loops(
    name: str, patches: int, prefix: int, budget: int, batch: int, sized: bool
) -> None:
    state, x, _, tm = ask(reducers.create(name), patches, prefix, budget, batch)
    if tm is None:
        return
    size = None
    if sized:
        size = torch.arange(x.shape[1], dtype=torch.float64).remainder(3).add(1).expand(batch, -1).unsqueeze(-1)
        state = state.changed(size=size)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, after = vt.apply(tm, ours, state)
    expected = naive_values(tm, theirs, size)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.ones(batch, tm.K, 1, dtype=torch.float64) if after.size is None else after.size
    torch.testing.assert_close(found, naive_sizes(tm, size), rtol=0, atol=0)
    if tm.values is not None:
        # Not a function of x here: the values came in as the signal HIDDEN.
        return
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("name", encoder_reducers())
def test_c11_constant_signals_are_defined(name: str, fill: float) -> None:
    reducer = reducers.create(name)
    tokens, prefix = 10, 1
    x = torch.full((2, tokens, 8), fill)
    made: dict[str, Any] = {}
    layer = 0 if reducer.site is Site.MID else 1
    for signal in reducer.needs:
        value = make_signal(str(signal), 2, tokens, prefix, (3, 3), torch.float32)
        constant = fill if signal in (Signal.HIDDEN, Signal.KEY, Signal.QUERY, Signal.VALUE) else 1 / tokens
        made[str(signal)] = torch.full_like(value, constant) if isinstance(value, Tensor) else value
        if signal is Signal.ATTN_VOTE:
            made[str(signal)] = Votes.of(torch.full((2, 2, tokens, tokens), 1 / tokens))
    made["MODULE"] = make_module(reducer, layer, tokens - prefix, prefix, 2, torch.float32)
    state = vt.TokenState.initial(x, prefix, (3, 3), layer=layer, depth=DEPTH)
    tm = reducer.decide(vt.Signals.of(**made), state, budget=2)
    if tm is None:
        assert reducer.limit(9) == 0
        return
    y, _ = vt.apply(tm, x, state)
    if tm.mode == "mean" and (tm.soft is None or tm.values is None):
        torch.testing.assert_close(y * slots_alive(tm), torch.full_like(y, fill) * slots_alive(tm))
    assert torch.isfinite(y).all()
    again = reducer.decide(vt.Signals.of(**made), state, budget=2)
    assert torch.equal(tm.assign, again.assign)
