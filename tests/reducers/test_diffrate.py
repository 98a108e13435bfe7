"""DiffRate against a ranking and a merge written token by token, and its published schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import visiontok as vt
from visiontok.core.recipe import load_recipe
from visiontok.core.reducer import Where
from visiontok.errors import ParameterError

CONFIGS = Path(__file__).parents[2] / "configs" / "diffrate"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(prefix: int, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, vt.TokenState]:
    x, rows = draw(2, length, 5, seed=seed), draw(2, 3, prefix, length, seed=seed + 1).softmax(dim=-1)
    size = draw(2, length, 1, seed=seed + 2).abs().mul(3).ceil()
    size[:, :prefix] = 1
    return x, rows, size, vt.TokenState.initial(x, prefix, layer=2, depth=6).changed(size=size)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize(("prune", "merge"), [(2, 3), (0, 4), (5, 0), (1, 8)])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_against_loops(prefix: int, prune: int, merge: int, floor: float) -> None:
    x, rows, size, state = case(prefix, seed=prune + 10 * merge)
    reducer = vt.reducers.create("diffrate", prune={2: prune}, merge={2: merge}, floor=floor)
    tm = reducer.decide(vt.Signals.of(HIDDEN=x, ATTN_PREFIX=rows), state)
    y, after = vt.apply(tm, x, state)
    for b in range(2):
        ranked = sorted(range(prefix, 12), key=lambda n: -float(rows[b, :, 0, n].mean()))
        kept = ranked[: len(ranked) - prune - merge]
        merged = ranked[len(kept) : len(kept) + merge]
        values = {k: [x[b, k]] for k in kept}
        sizes = {k: float(size[b, k]) for k in kept}
        for n in merged:
            cosines = [float(torch.cosine_similarity(x[b, n], x[b, k], dim=0)) for k in kept]
            target = kept[cosines.index(max(cosines))]
            values[target].append(x[b, n])
            sizes[target] += max(float(size[b, n]) * max(cosines), floor)
        assert tm.kept[b].tolist() == [*range(prefix), *kept]
        for slot, k in enumerate(kept, start=prefix):
            torch.testing.assert_close(y[b, slot], sum(values[k]) / len(values[k]), rtol=1e-12, atol=1e-12)
            assert float(after.size[b, slot]) == pytest.approx(sizes[k], rel=1e-12)
        assert [int(s) for s in tm.assign[b, ranked[len(ranked) - prune :]]] == [-1] * prune
        assert torch.equal(y[b, :prefix], x[b, :prefix])


def kept(prune: list[int], merge: list[int], length: int) -> tuple[list[int], list[int]]:
    after_prune, after_merge = [], []
    for p, m in zip(prune, merge):
        after_prune.append(length - p)
        after_merge.append(length - p - m)
        length -= p + m
    return after_prune, after_merge


def gmacs(counts: list[tuple[int, int]], width: int, patch: int, length: int) -> float:
    """As the paper counts: attention on the tokens that enter a block, MLP on those that stay."""
    total = length * width * patch * patch * 3 + width * 1000
    for before, after in counts:
        total += 4 * before * width**2 + 2 * before**2 * width + 8 * after * width**2
    return total / 1e9


@pytest.mark.parametrize(
    ("name", "width", "patch", "length"),
    [
        ("deit_small_patch16_224", 384, 16, 197),
        ("deit_base_patch16_224", 768, 16, 197),
        ("vit_base_patch16_224.mae", 768, 16, 197),
        ("vit_large_patch16_224.mae", 1024, 16, 197),
        ("vit_huge_patch14_224.mae", 1280, 14, 257),
    ],
)
def test_published_schedules_have_the_published_compute(name: str, width: int, patch: int, length: int) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    reducer: Any = recipe.reducer()
    depth = len(reducer.prune)
    counts, now = [], length
    for layer, budget in reducer.budgets(depth).items():
        removed = reducer.removed(now - 1, budget, Where(layer, depth), 1)
        assert removed == reducer.prune[layer] + reducer.merge[layer]
        assert reducer.dropped(removed, layer) == reducer.prune[layer]
        counts.append((now, now - removed))
        now -= removed
    assert gmacs(counts, width, patch, length) == pytest.approx(recipe.expected.gflops, abs=6e-4)


def test_the_small_schedule_is_the_released_one() -> None:
    reducer: Any = load_recipe(CONFIGS / "deit_small_patch16_224.yaml").reducer()
    prune, merge = kept(reducer.prune, reducer.merge, 197)
    assert prune == [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
    assert merge == [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]


def test_how_a_budget_is_shared_out() -> None:
    create = vt.reducers.create
    assert create("diffrate", r=7).dropped(7, 0) == 3
    assert create("diffrate", r=7, share=1.0).dropped(7, 0) == 7
    assert create("diffrate", r=7, prune=[0, 5]).dropped(7, 1) == 5
    assert create("diffrate", r=3, prune=[0, 5]).dropped(3, 1) == 3
    assert create("diffrate", prune=[1, 2]).spec() == ([1, 2], None)
    assert create("diffrate", merge=4).spec() == (4, None)
    assert create("diffrate", merge=4).dropped(4, 0) == 0
    assert create("diffrate", prune=[1, 2], merge=[3]).spec() == ([4, 2], None)
    assert create("diffrate", prune={3: 1}, merge={3: 2, 5: 1}).spec() == ({3: 3, 5: 1}, None)
    assert create("diffrate", prune=2, merge=3).spec() == (5, None)
    assert create("diffrate", prune=[1, 2], merge=[3]).replaced(keep=0.5).spec() == (None, 0.5)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"merge": [1], "r": 2}, "give one budget"),
        ({"prune": [-1]}, "prune must be an int >= 0"),
        ({"merge": 0.5}, "merge must be an int >= 0"),
        ({"prune": [1], "merge": {0: 1}}, "same form"),
        ({"share": 1.5}, r"share must be in \[0, 1\]"),
        ({"floor": -1}, r"floor must be in \[0, inf\]"),
    ],
)
def test_errors(params: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        vt.reducers.create("diffrate", **params)


def test_sizes_stay_positive() -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    rows = torch.tensor([[[[0.5, 0.3, 0.2]]]], dtype=torch.float64)
    state = vt.TokenState.initial(x, 1)
    tm = vt.reducers.create("diffrate", merge=1).decide(vt.Signals.of(HIDDEN=x, ATTN_PREFIX=rows), state)
    assert vt.apply(tm, x, state)[1].size.flatten().tolist() == [1.0, 1.0]


def test_gradients() -> None:
    x, rows, _, state = case(1, length=8)
    tm = vt.reducers.create("diffrate").decide(vt.Signals.of(HIDDEN=x, ATTN_PREFIX=rows), state, budget=4)
    assert torch.autograd.gradcheck(lambda x: vt.apply(tm, x, state)[0], x.requires_grad_())
