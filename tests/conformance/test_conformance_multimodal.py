"""Every reducer of the registry on every multimodal example that it fits: lossless off, exact on, gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance_matrix import (
    BUDGETS,
    Case,
    Variant,
    budget_names,
    close,
    encoder_backbones,
    encoder_reducers,
    example,
    multimodal_cases,
    rows,
    run,
    same,
    widened,
)

import visiontok as vt
from visiontok import backbones
from visiontok.core.multimodal import VisualTrace
from visiontok.core.signals import Signal, Site

# Qwen3-VL adds visual features up to layer 1, before which nothing may act in its decoder.
LATER = {"pyramiddrop": {"layer_list": (2, 3)}, "sparsevlm": {"pruning_loc": (1, 2)}}


def patched(talk: Case, **options: Any) -> Any:
    """See `Case.patched`; the reducer acts where this family lets it."""
    return talk.patched(**(LATER.get(talk.reducer, {}) if talk.variant.name == "qwen3_vl" else {}), **options)


def ragged(red: Any) -> bool:
    return any(part.ragged or part.always for reducer in red.reducers for part in reducer.parts())


def check_counts(red: Any, inputs: Any) -> None:
    """The plan is exact for an image of the nominal size, and nothing grows in any case."""
    plan = red.plan
    nominal = plan.length - plan.prefix
    most = int((inputs["input_ids"] == inputs["input_ids"].mode().values[0]).sum(dim=1).max())
    assert len(red.tokens) == plan.decoder
    assert red.tokens == sorted(red.tokens, reverse=True)
    if ragged(red):
        assert red.tokens[0] <= most
        return
    visual = [step for step in red.trace if isinstance(step, VisualTrace)]
    if most == nominal:
        assert red.tokens == plan.tokens
        acting = {(p.site, p.layer): p.after for p in plan.points if p.before != p.after}
        # Entries that may come back are hidden when the first new token comes, not here.
        later = {place for place in acting if getattr(red.reducers[0], "revives", False)}
        assert {(step.site, step.layer) for step in visual} == set(acting) - later
        for step in visual:
            assert [kept.shape[-1] for kept in step.kept] == [acting[step.site, step.layer]] * len(step.kept)
    elif visual and not any(Signal.FRAMES in reducer.needs for reducer in red.reducers):
        # Methods that compare frames may leave images as they are.
        assert red.tokens[-1] < most or any(step.site is Site.KV for step in visual)


def test_the_matrix_has_every_reducer_and_every_family() -> None:
    every = [case for case, _ in multimodal_cases()]
    met = [case for case, level in multimodal_cases() if level != "none"]
    assert {case.reducer for case in every} | set(encoder_reducers()) == set(vt.list_reducers())
    families = sorted(set(vt.list_backbones()) - set(encoder_backbones()))
    variants = {Variant(name, key) for name in families for key in backbones.registry.get(name)().examples()}
    assert {case.variant for case in met} == variants
    assert {case.reducer for case in met} == {case.reducer for case in every}
    for variant in variants:
        assert len({case.reducer for case in met if case.variant == variant}) >= 3


def test_counts_are_exact_and_the_model_comes_back(talk: Case) -> None:
    before = run(talk.model, talk.inputs)
    for budget in talk.budgets():
        with patched(talk, **budget) as red:
            found = run(talk.model, talk.inputs)
            assert all(torch.isfinite(y).all() for y in found)
            check_counts(red, talk.inputs)
        assert not hasattr(talk.model, "_visiontok")
    assert same(run(talk.model, talk.inputs), before)


@pytest.mark.parametrize("nothing", [{"r": 0}, {"keep": 1.0}], ids=["r=0", "keep=1.0"])
def test_a_zero_budget_is_bit_equal(talk: Case, nothing: dict[str, Any]) -> None:
    if not set(nothing) <= set(budget_names(talk.reducer)):
        pytest.skip(f"{talk.reducer} takes no {next(iter(nothing))}; its own parameters are its budget")
    before = run(talk.model, talk.inputs)
    with patched(talk, **nothing) as red:
        assert same(run(talk.model, talk.inputs), before)
        assert not red.plan.removes


def test_the_same_bits_twice(talk: Case) -> None:
    with patched(talk) as red:
        first = run(talk.model, talk.inputs)
        tokens = red.tokens
        torch.manual_seed(99)
        assert same(run(talk.model, talk.inputs), first)
        assert red.tokens == tokens


def test_the_batch_split_does_not_matter(talk: Case) -> None:
    if talk.inputs["input_ids"].shape[0] != talk.inputs["pixel_values"].shape[0] or len(talk.inputs["input_ids"]) < 2:
        pytest.skip(f"the pictures of {talk.variant} are not one a sample")
    whole = widened(talk.inputs)
    # Selections that exhaust the rank of the tokens go on by rounding: far less than that is kept.
    budget = {"keep": 0.25} if "keep" in budget_names(talk.reducer) else {}
    with patched(talk, double=True, **budget) as red:
        together = run(red.model, whole)[0]
        for i in range(len(together)):
            alone = run(red.model, rows(whole, [i]))[0]
            # Rotary angles are in single precision whatever the model is.
            close([alone[:, -1]], [together[i : i + 1, -1]], 1e-4)


def test_generation_goes_on_from_the_shorter_prompt(talk: Case) -> None:
    with patched(talk), torch.no_grad():
        made: Any = talk.model
        first = made.generate(**talk.inputs, max_new_tokens=3, do_sample=False)
        again = made.generate(**talk.inputs, max_new_tokens=3, do_sample=False)
        logits = run(talk.model, talk.inputs)[0][:, -1]
    assert torch.equal(first, again)
    assert torch.equal(first[:, talk.inputs["input_ids"].shape[1]], logits.argmax(dim=-1))


def test_examples_are_the_same_every_time() -> None:
    assert BUDGETS
    for name in sorted(set(vt.list_backbones()) - set(encoder_backbones())):
        again = backbones.registry.get(name)().examples()
        for key, (model, inputs) in again.items():
            known, known_inputs = example(Variant(name, key))
            assert same(run(known, known_inputs), run(model, inputs)), f"{name}.{key} is not deterministic"
