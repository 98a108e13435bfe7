"""C2–C6 and C11 by hand: `decide` and `apply` of every reducer on small shapes, against a loop-level reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conformance_matrix import budget_names, make_module, make_signal
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


def settings_of(name: str) -> list[dict[str, Any]]:
    """The default parameters, and each switch of the method turned over."""
    cls = reducers.registry.get(name)
    flips: list[dict[str, Any]] = []
    for field in dataclasses.fields(cls):
        kinds = str(field.type)
        if field.default in (True, False) and isinstance(field.default, bool):
            flips.append({field.name: not field.default})
        elif kinds.startswith("bool | None"):
            flips += [{field.name: True}, {field.name: False}]
    return [{}, {"compat": "official"}, *flips]


EVERY = [
    pytest.param(name, params, id="-".join([name, *(f"{k}={v}" for k, v in params.items())]))
    for name in vt.list_reducers()
    for params in settings_of(name)
]


def shape(patches: int) -> tuple[int, int]:
    height = max(h for h in range(1, int(patches**0.5) + 1) if patches % h == 0)
    return height, patches // height


def ask(reducer: Reducer, patches: int, prefix: int, budget: int, batch: int = 2, dtype: Any = torch.float64) -> Any:
    """State, hidden tokens, the number of tokens to remove, and the decision."""
    grid = shape(patches)
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


@pytest.mark.parametrize("name", vt.list_reducers())
def test_a_negative_budget_is_refused(name: str) -> None:
    if "r" not in budget_names(name):
        pytest.skip(f"{name} takes no budget from outside")
    reducer = reducers.create(name)
    if reducer.limit(9) == 0:
        pytest.skip(f"{name} ignores every budget")
    with pytest.raises(vt.VisionTokError, match=r"budget must be at least 0 .*got -1"):
        ask(reducer, 9, 1, -1)


@pytest.mark.parametrize("name", vt.list_reducers())
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
@pytest.mark.parametrize("name", vt.list_reducers())
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


def slots_alive(tm: Any) -> Tensor:
    return torch.ones(1, tm.K, 1) if tm.live is None else tm.live.unsqueeze(-1).float()


def naive_values(tm: Any, x: Tensor, size: Tensor | None) -> Tensor:
    """(B, K, C) slot values, one token at a time."""
    batch, length, channels = x.shape
    if tm.soft is not None:
        source = x if tm.values is None else tm.values
        return sum(tm.soft[:, :, n : n + 1] * source[:, n : n + 1] for n in range(length))
    out = []
    for b in range(batch):
        for k in range(tm.K):
            members = [n for n in range(length) if int(tm.assign[b, n]) == k]
            if not members:
                out.append(x.new_zeros(channels))
                continue
            share = [_share(tm, size, b, n) for n in members]
            rows = [x[b, n] for n in members]
            total = sum((w * row for w, row in zip(share, rows)), x.new_zeros(channels))
            if tm.mode == "sum":
                out.append(total)
            elif tm.mode == "amax":
                out.append(torch.stack(rows).amax(dim=0))
            elif tm.mode == "absmax":
                stacked = torch.stack(rows)
                out.append(stacked.gather(0, stacked.abs().argmax(dim=0, keepdim=True)).squeeze(0))
            else:
                mean = total / sum(share)
                if tm.mode == "mlerp" and len(rows) > 1:
                    mean = mean / mean.norm() * torch.stack([row.norm() for row in rows]).max()
                out.append(mean)
    return torch.stack(out).view(batch, tm.K, channels)


def _share(tm: Any, size: Tensor | None, b: int, n: int) -> float:
    if tm.weight is not None:
        return float(tm.weight[b, n])
    return 1.0 if size is None else float(size[b, n, 0])


def naive_sizes(tm: Any, size: Tensor | None) -> Tensor:
    """(B, K, 1) slot sizes, one token at a time."""
    batch, length = tm.assign.shape
    out = torch.zeros(batch, tm.K, 1, dtype=torch.float64)
    for b in range(batch):
        for n in range(length):
            mass = float(tm.mass[b, n]) if tm.mass is not None else 1.0 if size is None else float(size[b, n, 0])
            if int(tm.assign[b, n]) >= 0:
                out[b, int(tm.assign[b, n])] += mass
    return out if tm.soft is None or tm.mass is not None else torch.ones_like(out)
