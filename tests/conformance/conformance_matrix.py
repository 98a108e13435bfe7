"""What the conformance tests run on: every reducer of the registry times every backbone variant that fits it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import visiontok as vt
from visiontok import backbones, reducers
from visiontok.core.reducer import Build, Reducer
from visiontok.core.reduction import Reduction
from visiontok.ops.attention import Votes

BUDGETS: tuple[dict[str, Any], ...] = ({"r": 2}, {"keep": 0.7})


class Variant(NamedTuple):
    """One example model of one backbone."""

    backbone: str
    name: str

    def __str__(self) -> str:
        return f"{self.backbone}.{self.name}"


class Case(NamedTuple):
    """One reducer on one example model."""

    reducer: str
    variant: Variant

    def __str__(self) -> str:
        return f"{self.reducer}-{self.variant}"

    @property
    def model(self) -> nn.Module:
        """The shared example: patch it only inside `with vt.patched`."""
        return example(self.variant)[0]

    @property
    def inputs(self) -> Any:
        return example(self.variant)[1]

    def budgets(self) -> list[dict[str, Any]]:
        """The default budgets that this reducer takes; `{}` if its own parameters are its budget."""
        return budgets(self.reducer)

    @contextmanager
    def patched(self, double: bool = False, **options: Any) -> Iterator[Reduction]:
        """The model, patched with the first default budget and a trace unless `options` say otherwise."""
        model = copy.deepcopy(self.model).double() if double else self.model
        given = {
            "trace": True,
            **({} if set(options) & set(budget_names(self.reducer)) else self.budgets()[0]),
            **options,
        }
        with vt.patched(model, self.reducer, **given) as red:
            yield red


def budget_names(name: str) -> tuple[str, ...]:
    """Names of the budgets that a reducer takes."""
    return reducers.registry.get(name).budget_names


def budgets(name: str) -> list[dict[str, Any]]:
    """See `Case.budgets`."""
    known = budget_names(name)
    return [budget for budget in BUDGETS if set(budget) <= set(known)] or [{}]


@functools.cache
def _examples(backbone: str) -> dict[str, tuple[nn.Module, Any]]:
    return backbones.registry.get(backbone)().examples()


def example(variant: Variant) -> tuple[nn.Module, Any]:
    """Model and inputs of a variant; made once per process."""
    return _examples(variant.backbone)[variant.name]


@functools.cache
def cases() -> tuple[tuple[Case, str], ...]:
    """Every case that `supports` says fits, and how much of it the default run takes: `all`, `brief` or `none`.

    All of each reducer on two backbones, and of each backbone with at least three reducers; in brief, each variant that
    is not among these with one reducer.
    """
    names = vt.list_reducers()
    fits = {
        backbone: {
            variant: [name for name in names if vt.supports(name, example(variant)[0])]
            for variant in (Variant(backbone, key) for key in _examples(backbone))
        }
        for backbone in vt.list_backbones()
    }
    chosen: set[tuple[str, Variant]] = set()
    brief: set[tuple[str, Variant]] = set()
    for place, name in enumerate(names):
        homes = [(backbone, [v for v, fitting in table.items() if name in fitting]) for backbone, table in fits.items()]
        homes = [(backbone, variants) for backbone, variants in homes if variants]
        # The start rotates, so that the default run meets many variants and all backbones.
        for turn in range(min(2, len(homes))):
            variants = homes[(place + turn) % len(homes)][1]
            chosen.add((name, variants[place % len(variants)]))
    for table in fits.values():
        first = next(iter(table))
        have = {name for name, at in chosen if at in table}
        chosen |= {(name, first) for name in [n for n in table[first] if n not in have][: max(0, 3 - len(have))]}
        for row, (variant, fitting) in enumerate(table.items()):
            missing = not any(at == variant for _, at in chosen)
            brief |= {(fitting[row % len(fitting)], variant)} if missing and fitting else set()
    every = [(name, variant) for table in fits.values() for variant, fitting in table.items() for name in fitting]
    level = {**dict.fromkeys(brief, "brief"), **dict.fromkeys(chosen, "all")}
    return tuple((Case(*pair), level.get(pair, "none")) for pair in every)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors of one forward without gradients."""
    with torch.no_grad():
        return outputs(model, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Tensors of one forward."""
    out = (
        model(*inputs) if isinstance(inputs, tuple) else model(**inputs) if isinstance(inputs, dict) else model(inputs)
    )
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def rows(tree: Any, index: list[int]) -> Any:
    """The samples of a batch given by index."""
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def widened(tree: Any) -> Any:
    """Floating tensors in double precision."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def batch(case: Case, size: int) -> Any:
    """A batch of `size` different samples in double precision."""
    noise = torch.Generator().manual_seed(11)

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        picked = leaf[[i % leaf.shape[0] for i in range(size)]]
        if not leaf.is_floating_point():
            return picked
        return picked.double() + torch.randn(picked.shape, generator=noise, dtype=torch.float64)

    return tree_map(vary, case.inputs)


def poisoned(tree: Any) -> Any:
    """The same batch with NaN in every floating entry of sample 0."""

    def poison(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        leaf = leaf.clone()
        leaf[0] = float("nan")
        return leaf

    return tree_map(poison, tree)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit-equal, NaN included."""
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(a, b))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def make_module(reducer: Reducer, layer: int, patches: int, prefix: int, removed: int, dtype: torch.dtype) -> Any:
    """The learned part of a point over the tokens that `make_signal` makes, or None."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        build = Build(
            reducer.site, layer, 4, 8, 2, patches, patches - removed, prefix, class_token=torch.zeros(1, 1, 8)
        )
        module = reducer.modules(build)
    return None if module is None else module.to(dtype).eval().requires_grad_(False)


def make_signal(name: str, batch: int, tokens: int, prefix: int, grid: tuple[int, int], dtype: torch.dtype) -> Any:
    """A random signal of the shape that ARCHITECTURE §3 gives it."""
    noise = torch.Generator().manual_seed(tokens * 131 + prefix * 17 + len(name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64).to(dtype)

    makers: dict[str, Any] = {
        "HIDDEN": lambda: draw(batch, tokens, 8),
        "QUERY": lambda: draw(batch, 2, tokens, 4),
        "KEY": lambda: draw(batch, 2, tokens, 4),
        "VALUE": lambda: draw(batch, 2, tokens, 4),
        "QUERY_PREFIX": lambda: draw(batch, 2, prefix, 4),
        "ATTN_PREFIX": lambda: draw(batch, 2, prefix, tokens).softmax(dim=-1),
        "ATTN_LAST": lambda: draw(batch, 2, 1, tokens).softmax(dim=-1),
        "ATTN": lambda: draw(batch, 2, tokens, tokens).softmax(dim=-1),
        "ATTN_VOTE": lambda: Votes(draw(batch, 2, tokens, 4), draw(batch, 2, tokens, 4), 0.5),
        "GRID": lambda: grid,
    }
    if name not in makers:
        pytest.fail(f"conformance cannot make the signal {name} yet; add it to make_signal in {__file__}.")
    return makers[name]()
