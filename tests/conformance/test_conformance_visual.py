"""`decide` of every reducer of multimodal models by hand, on small shapes: counts, purity, rows, values, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance_loops import naive_sizes, naive_values, slots_alive
from conformance_matrix import (
    VisualAsk,
    encoder_reducers,
    same,
    settings_of,
    shape_of,
    visual_parts,
    visual_question,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import visiontok as vt
from visiontok.core.reducer import Reducer, Where
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Site
from visiontok.core.visual import Crops

ITEMS = (1, 2, 3, 4, 9, 12, 16)
NAMES = [name for name in vt.list_reducers() if visual_parts(name)]
EVERY = [
    pytest.param(name, params, id="-".join([name, *(f"{k}={v}" for k, v in params.items())]))
    for name in NAMES
    for params in settings_of(name)
]
PARTS = [
    pytest.param(part, id=f"{part.name}-{part.site}")
    for name in NAMES
    for part in visual_parts(name)
    if part.scope != "image"
]
# Whole, of 2 x 2 crops, and of a row of two that pad above and below.
CUTS = (Crops(0, 0, (4, 4), (4, 4), False), Crops(2, 2, (4, 4), (80, 80)), Crops(1, 2, (4, 4), (30, 80)))


def prefixes(part: Reducer) -> tuple[int, ...]:
    """Class tokens that rows of the part's site may have."""
    return (0, 1) if part.site is Site.POST and Signal.QUERY_PREFIX not in part.needs else (
        (1,) if part.site is Site.POST else (0,)
    )  # fmt: skip


def decide(part: Reducer, asked: VisualAsk, budget: int | None) -> Any:
    return part.decide(vt.Signals.of(**asked.signals), asked.state, budget)


def expected(part: Reducer, items: int, frames: int, budget: int) -> int:
    """Tokens that go, of a row."""
    where = Where(4, 4, start=items, grid=shape_of(items // frames), frames=frames)
    return part.replaced(r=budget).removed(items, Budget(r=budget), where)


def bound(part: Reducer) -> bool:
    """Whether a budget from outside is no concern of the part."""
    return part.budget_names == () or Site.POST is not part.site and part.ragged


def check_map(tm: Any, asked: VisualAsk, anchored: bool = True) -> Tensor:
    y, after = vt.apply(tm, asked.x, asked.state)
    rows = asked.x.shape[0]
    assert (after.n, y.shape) == (tm.K, (rows, tm.K, 8))
    assert tm.assign.min() >= -1
    assert tm.assign.max() < tm.K
    live = torch.ones(rows, tm.K, dtype=torch.bool) if tm.live is None else tm.live
    assert torch.isfinite(y[live]).all()
    assert (tm.kept[live] >= 0).all()
    if tm.counts is not None:
        assert torch.equal(live.sum(dim=1), tm.counts)
    if tm.soft is None and anchored:
        slots = tm.assign.gather(1, tm.kept.clamp_min(0))
        assert torch.equal(slots[live], torch.arange(tm.K).expand(rows, -1)[live])
    return y


def questions(part: Reducer) -> Iterator[tuple[VisualAsk, int, int]]:
    for prefix in prefixes(part):
        for items in ITEMS:
            for frames in (1, 2) if Signal.FRAMES in part.needs and items % 2 == 0 else (1,):
                yield visual_question(part, items, prefix, frames=frames), items, frames


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_counts_are_exact_for_every_small_shape(name: str, params: dict[str, Any]) -> None:
    for part in visual_parts(name, **params):
        if part.scope == "image":
            continue
        for asked, items, frames in questions(part):
            for budget in (0, 1, 2, items // 2 + 1, 10**6):
                tm = decide(part, asked, budget)
                where = f"{part.site}, {items} items, prefix {asked.state.prefix}, {frames} frames, budget {budget}"
                if tm is None:
                    assert bound(part) or expected(part, items, frames, budget) == 0 or items < 3, where
                    continue
                check_map(tm, asked)
                # With nothing to remove, some go by a default of their own.
                if not bound(part) and not (part.always and expected(part, items, frames, budget) == 0):
                    assert items - expected(part, items, frames, budget) == tm.K, where


@pytest.mark.parametrize("crops", CUTS, ids=["whole", "2x2", "1x2"])
@pytest.mark.parametrize("name", [name for name in NAMES if visual_parts(name)[0].scope == "image"])
def test_counts_of_an_image_are_exact(name: str, crops: Crops) -> None:
    for official in (None, "official"):
        (part,) = visual_parts(name, compat=official)
        for prefix in prefixes(part):
            asked = visual_question(part, 16, prefix, crops=crops)
            rows = asked.x.shape[0]
            padding = 0 if crops.number == 0 or crops.rows == crops.columns else 2 * 16 - 2 * 4 * 3
            for budget in (padding + 1, padding + 7, rows * 16 // 2):
                tm = decide(part, asked, budget)
                check_map(tm, asked, anchored=official is None)
                left = rows * tm.K if tm.counts is None else int(tm.counts.sum())
                if official is None:
                    assert left == max(rows * 16 - budget, 16 + crops.number if _whole_thumbnail(name, crops) else 0)
                else:
                    assert left <= rows * 16


def _whole_thumbnail(name: str, crops: Crops) -> bool:
    return name == "token_corr" and crops.number > 0


@pytest.mark.parametrize("part", PARTS)
def test_the_same_answer_twice_and_signals_are_left_alone(part: Reducer) -> None:
    asked = visual_question(part, 12, prefixes(part)[-1])
    kept = [leaf.clone() for leaf in tree_leaves(asked.signals) if isinstance(leaf, Tensor)]
    first = decide(part, asked, 3)
    torch.manual_seed(99)
    again = decide(part, asked, 3)
    assert (first is None) == (again is None)
    assert first is None or torch.equal(first.assign, again.assign)
    assert same([leaf for leaf in tree_leaves(asked.signals) if isinstance(leaf, Tensor)], kept)


@pytest.mark.parametrize("part", PARTS)
def test_a_row_does_not_depend_on_the_others(part: Reducer) -> None:
    asked = visual_question(part, 12, prefixes(part)[-1], rows=3)
    together, sick = decide(part, asked, 5), decide(part, asked.poisoned(), 5)
    turned = decide(part, asked.rows([2, 0, 1]), 5)
    if together is None:
        assert (sick, turned) == (None, None)
        return
    assert torch.equal(turned.assign, together.assign[[2, 0, 1]])
    assert torch.equal(sick.assign[1:], together.assign[1:])
    assert sick.assign.max() < sick.K
    for i in range(3):
        alone = decide(part, asked.rows([i]), 5)
        assert torch.equal(alone.assign[0], together.assign[i])


@pytest.mark.parametrize("part", PARTS)
def test_values_sizes_and_gradients_equal_loops(part: Reducer) -> None:
    for asked, items, _ in questions(part):
        tm = decide(part, asked, items // 3 + 1)
        if tm is None:
            continue
        ours, theirs = asked.x.clone().requires_grad_(), asked.x.clone().requires_grad_()
        y, after = vt.apply(tm, ours, asked.state)
        wanted = naive_values(tm, theirs, None)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        sizes = torch.ones(y.shape[0], tm.K, 1, dtype=torch.float64) if after.size is None else after.size
        torch.testing.assert_close(sizes, naive_sizes(tm, None), rtol=0, atol=0)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        (y * weight).sum().backward()
        (wanted * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("part", PARTS)
def test_constant_signals_are_defined(part: Reducer, fill: float) -> None:
    asked = visual_question(part, 9, prefixes(part)[-1], constant=fill)
    tm = decide(part, asked, 2)
    if tm is None:
        return
    y = check_map(tm, asked)
    if tm.mode == "mean" and tm.soft is None:
        torch.testing.assert_close(y * slots_alive(tm), torch.full_like(y, fill) * slots_alive(tm))
    assert torch.equal(decide(part, asked, 2).assign, tm.assign)


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_budget_is_refused(name: str) -> None:
    for part in visual_parts(name):
        if part.budget_names == () or part.limit(9) == 0:
            continue
        if name == "mustdrop":
            continue
        crops = CUTS[0]._replace(side=(3, 3)) if part.scope == "image" else None
        with pytest.raises(vt.VisionTokError, match=r"budget must be at least 0 .*got -1"):
            decide(part, visual_question(part, 9, prefixes(part)[-1], crops=crops), -1)


def test_every_reducer_is_asked_somewhere() -> None:
    assert set(NAMES) | set(encoder_reducers()) == set(vt.list_reducers())
