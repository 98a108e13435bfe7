"""Every reducer: a card that tells the truth, parameters that survive a copy, plain data."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest

import visiontok as vt
from visiontok.core.reducer import Reducer
from visiontok.core.schedule import Budget
from visiontok.core.signals import Signal, Site
from visiontok.errors import ParameterError

NAMES = vt.list_reducers()
each = pytest.mark.parametrize("name", NAMES)


@each
def test_card_is_complete(name: str) -> None:
    card = vt.describe(name)
    cls = vt.reducers.registry.get(name)
    sample = cls()
    assert card.name == name == cls.name
    assert card.title
    assert card.summary.endswith(".")
    assert card.paper
    assert card.license
    assert 2017 <= card.year <= 2026
    assert card.cons, "every method has a drawback"
    assert Site(card.site) is sample.site
    assert card.signals == tuple(str(Signal(signal)) for signal in sample.needs)
    assert card.url.startswith("https://") or card.paper == "none"


@each
def test_card_lists_every_parameter_with_its_default(name: str) -> None:
    card, cls = vt.describe(name), vt.reducers.registry.get(name)
    assert dict(card.parameters) == {f.name: f.default for f in dataclasses.fields(cls)}
    assert {"r", "keep", "gflops", "tokens", "compat"} <= set(card.parameters)


@each
def test_card_prints(name: str) -> None:
    card = vt.describe(name)
    text = str(card)
    assert text.startswith(f"{name}: {card.title}")
    for part in (card.summary, card.url, f"site {card.site}", *card.cons, *card.parameters):
        assert part in text


@each
def test_own_parameters_are_documented(name: str) -> None:
    cls = vt.reducers.registry.get(name)
    shared = {f.name for f in dataclasses.fields(Reducer)}
    text = inspect.getdoc(cls) or ""
    for field in dataclasses.fields(cls):
        if field.name not in shared:
            assert f"{field.name}" in text.partition("Args:")[2], f"{field.name} is not in the docstring"


@each
def test_card_is_not_changed_by_describing(name: str) -> None:
    cls = vt.reducers.registry.get(name)
    before = cls.card
    vt.describe(name)
    assert cls.card is before
    assert cls.card.parameters == {}


@each
def test_reducers_are_frozen_values(name: str) -> None:
    one, two = vt.reducers.create(name), vt.reducers.create(name)
    assert one == two
    assert one.fields() == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.compat = "official"  # type: ignore[misc]
    with pytest.raises(ParameterError, match=f"{name}: compat must be None or 'official', got 'paper'"):
        vt.reducers.create(name, compat="paper")


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 8, "prop_attn": False}),
    ("tome", {"r": (8, -1.0)}),
    ("tome", {"keep": [0.5, 4]}),
    ("pitome", {"ratio": 0.9, "preset": "mae"}),
    ("tome_kth", {"k": 4, "layer": 2}),
    ("random", {"keep": 0.5, "seed": 3}),
    ("identity", {"r": 3}),
]


@pytest.mark.parametrize(("name", "params"), SETTINGS)
def test_fields_rebuild_the_reducer(name: str, params: dict[str, Any]) -> None:
    reducer = vt.reducers.create(name, **params)
    assert reducer.fields() == params
    assert vt.reducers.create(name, **reducer.fields()) == reducer
    assert json.loads(json.dumps(reducer.fields())) == json.loads(json.dumps(params))


def test_a_new_budget_replaces_the_old_one() -> None:
    tome = vt.reducers.create("tome", r=8, prop_attn=False)
    assert tome.replaced(keep=0.5).fields() == {"keep": 0.5, "prop_attn": False}
    assert tome.replaced(prop_attn=True).fields() == {"r": 8}
    assert vt.reducers.create("pitome", ratio=0.9).replaced(r=3).fields() == {"r": 3}
    assert vt.reducers.create("pitome", r=3).replaced(ratio=0.9).fields() == {"ratio": 0.9}
    assert tome.fields() == {"r": 8, "prop_attn": False}


@pytest.mark.parametrize(
    "bad", [{"k": 1}, {"k": 2.0}, {"k": True}, {"r": 3}, {"keep": 0.5}, {"tokens": 4}, {"gflops": 1}]
)
def test_tome_kth_takes_k_only(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="tome_kth"):
        vt.reducers.create("tome_kth", **bad)


@pytest.mark.parametrize("bad", [{"kind": "merge"}, {"metric": "value"}])
def test_pitome_refuses_unknown_variants(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"pitome: {next(iter(bad))} must be one of"):
        vt.reducers.create("pitome", **bad)


@pytest.mark.parametrize("seed", [1.5, True, "0", None])
def test_random_wants_an_int_seed(seed: Any) -> None:
    with pytest.raises(ParameterError, match="seed must be an int"):
        vt.reducers.create("random", seed=seed)


def test_layers_and_budgets() -> None:
    assert list(vt.reducers.ToMe(r=3).budgets(4)) == [0, 1, 2, 3]
    assert list(vt.reducers.create("pitome", preset="llava", ratio=0.9).budgets(4)) == [1, 2, 3, 4]
    assert list(vt.reducers.create("pitome", preset="blip", ratio=0.9).budgets(4)) == [0, 1, 2]
    assert vt.reducers.create("tome_kth", k=4, layer=2).budgets(6) == {2: Budget(ratio=0.25)}
    assert vt.reducers.ToMe(r={2: 5}).budgets(4)[2] == Budget(r=5)


def test_negative_budget_by_hand_is_refused() -> None:
    import torch

    state = vt.TokenState.initial(torch.zeros(1, 9, 4))
    with pytest.raises(ParameterError, match="budget must be at least 0"):
        vt.reducers.ToMe().decide(vt.Signals.of(KEY=torch.zeros(1, 1, 9, 4)), state, -1)
