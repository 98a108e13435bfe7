"""C1–C10, C12 and C13 on models: every reducer of the registry on every backbone example that it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance_matrix import (
    BUDGETS,
    Case,
    Variant,
    batch,
    budget_names,
    cases,
    close,
    encoder_backbones,
    encoder_reducers,
    example,
    outputs,
    poisoned,
    rows,
    run,
    same,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import visiontok as vt
from visiontok import backbones
from visiontok.core.chain import LayerTrace
from visiontok.core.reducer import Where
from visiontok.core.signals import Site
from visiontok.errors import ParameterError

FAR_TOO_MANY = 10**6


def counted(trace: list[LayerTrace]) -> bool:
    """Whether sizes count original tokens: every map gives each slot the sizes of its own tokens."""
    return all(step.map.mass is None and step.map.soft is None for step in trace)


def lengths(origin: Tensor, slots: int) -> Tensor:
    """(B, K) original tokens per slot."""
    ones = (origin >= 0).double()
    return ones.new_zeros(origin.shape[0], slots).scatter_add(1, origin.long().clamp_min(0), ones)


def sized(step: LayerTrace) -> Tensor:
    """(B, K) sizes after a step, None spelled out."""
    shape = (step.origin.shape[0], step.tokens)
    return torch.ones(shape, dtype=torch.float64) if step.size is None else step.size.squeeze(-1).double()


def made(red: Any) -> list[Any]:
    """The points at which the method itself reduces, without the ends of spans and what a composite adds."""
    return [p for p in red.plan.points if not p.undo and not type(p.reducer).__name__.startswith("_")]


def per_sample(origin: Tensor, samples: int) -> Tensor:
    """(B, items, N0): a decision may be made on several items of a sample."""
    return origin.unflatten(0, (samples, -1))


def adds(red: Any) -> bool:
    """Whether tokens join that are not of the input."""
    return any(part.protects(Where(layer, 4)) > 0 for r in red.reducers for part in r.parts() for layer in range(5))


def ragged(red: Any) -> bool:
    return any(part.ragged for reducer in red.reducers for part in reducer.parts())


def comparable(red: Any, a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Without the token sequences of ragged reducers, which are as long as the longest of the batch."""
    pairs = [(x, y) for x, y in zip(a, b) if not ragged(red) or x.shape == y.shape]
    assert pairs
    return [x for x, _ in pairs], [y for _, y in pairs]


def check_tokens(red: Any) -> None:
    """The plan is exact, or for counts that depend on the data an upper bound."""
    if ragged(red):
        assert len(red.tokens) == len(red.plan.tokens)
        assert all(n <= cap for n, cap in zip(red.tokens, red.plan.tokens))
    else:
        assert red.tokens == red.plan.tokens


def each_budget(case: Case) -> Iterator[tuple[dict[str, Any], list[LayerTrace], Any]]:
    for budget in case.budgets():
        with case.patched(**budget) as red:
            run(case.model, case.inputs)
            yield budget, red.trace, red


def test_the_matrix_has_every_reducer_and_every_variant() -> None:
    every = [case for case, _ in cases()]
    default = [case for case, level in cases() if level in ("all", "quick")]
    met = [case for case, level in cases() if level != "none"]
    assert {case.reducer for case in every} == set(encoder_reducers())
    variants = {Variant(name, key) for name in encoder_backbones() for key in backbones.registry.get(name)().examples()}
    assert {case.variant for case in met} == variants
    for name in encoder_reducers():
        have = {case.variant for case in every if case.reducer == name}
        assert len({case.variant for case in default if case.reducer == name}) >= min(2, len(have))
    for backbone in encoder_backbones():
        fit = {case.reducer for case in every if case.variant.backbone == backbone}
        assert len({case.reducer for case in default if case.variant.backbone == backbone}) >= min(3, len(fit))


@pytest.mark.parametrize("nothing", [{"r": 0}, {"keep": 1.0}], ids=["r=0", "keep=1.0"])
def test_c1_a_zero_budget_is_bit_equal(case: Case, nothing: dict[str, Any]) -> None:
    if not set(nothing) <= set(budget_names(case.reducer)):
        pytest.skip(f"{case.reducer} takes no {next(iter(nothing))}; its own parameters are its budget")
    before = run(case.model, case.inputs)
    with case.patched(**nothing) as red:
        if len(red.reducers[0].parts()) > 1:
            pytest.skip(f"{case.reducer} adds tokens and a head of its own whatever is removed")
        assert same(run(case.model, case.inputs), before)
        assert not red.plan.removes
        assert red.trace == []
    assert same(run(case.model, case.inputs), before)


def test_c1_restored_after_a_real_reduction(case: Case) -> None:
    before = run(case.model, case.inputs)
    with case.patched():
        run(case.model, case.inputs)
    assert same(run(case.model, case.inputs), before)


def test_c2_counts_equal_the_plan(case: Case) -> None:
    for _, trace, red in each_budget(case):
        check_tokens(red)
        acting = [point for point in red.plan.points if point.before != point.after and not point.undo]
        assert [(point.layer, point.site) for point in acting] == [(step.layer, step.site) for step in trace]
        if not ragged(red):
            assert [point.after for point in acting] == [step.tokens for step in trace]


def test_c2_far_too_large_budgets_stop_at_the_limit(case: Case) -> None:
    if "r" not in budget_names(case.reducer):
        pytest.skip(f"{case.reducer} takes no r")
    with case.patched(r=FAR_TOO_MANY) as red:
        assert all(torch.isfinite(y).all() for y in run(case.model, case.inputs))
        check_tokens(red)
        assert min(red.tokens) >= red.plan.prefix
        for point in red.plan.points:
            if point in made(red):
                assert 0 <= point.before - point.after <= point.reducer.limit(point.before - red.plan.prefix)


def test_c2_short_lists_are_padded_and_long_ones_refused(case: Case) -> None:
    if "r" not in budget_names(case.reducer):
        pytest.skip(f"{case.reducer} takes no r")
    with case.patched(r=[1]) as red:
        run(case.model, case.inputs)
        check_tokens(red)
        assert all(point.before == point.after for point in made(red)[1:])
        points = len(made(red))
    with pytest.raises(ParameterError, match=f"r has {points + 1} entries but the model has {points} points"):
        vt.patch(case.model, case.reducer, r=[1] * (points + 1))
    assert not hasattr(case.model, "_visiontok")


def test_c3_the_prefix_is_never_merged_or_dropped(case: Case) -> None:
    for _, trace, red in each_budget(case):
        prefix = red.plan.prefix
        for step in trace:
            expected = torch.arange(prefix, dtype=torch.int32).expand(step.origin.shape[0], prefix)
            assert torch.equal(step.origin[:, :prefix], expected)
            assert (lengths(step.origin, step.tokens)[:, :prefix] == 1).all()
            assert (sized(step)[:, :prefix] == 1).all()


def test_c4_c6_sizes_count_original_tokens(case: Case) -> None:
    for _, trace, _ in each_budget(case):
        for step in trace:
            if any(earlier.map.extra is not None for earlier in trace):
                continue
            size = sized(step)
            assert step.origin.dtype == torch.int32
            assert (step.origin >= -1).all()
            assert (step.origin < step.tokens).all()
            if step.map.counts is None:
                assert (lengths(step.origin, step.tokens) >= 1).all() or step.map.soft is not None
            if counted(trace):
                assert torch.equal(size, lengths(step.origin, step.tokens))
                assert (size == size.round()).all()
            if counted(trace) and (step.origin >= 0).all():
                assert (size.sum(dim=1) == step.origin.shape[1]).all()


def test_c6_origins_compose_the_maps(case: Case) -> None:
    for _, trace, red in each_budget(case):
        place = torch.arange(red.plan.length).expand(len(trace[0].origin) if trace else 1, -1)
        ends: list[tuple[int, Tensor]] = []
        for step in trace:
            while ends and ends[-1][0] <= step.layer:
                place = ends.pop()[1]
            here = [p for p in red.plan.points if (p.layer, p.site) == (step.layer, step.site) and not p.undo]
            part = here[0].reducer
            until = part.until(step.layer, red.plan.depth) if step.site is Site.AROUND else None
            if until is not None:
                ends.append((until, place))
            place = torch.where(place < 0, -1, step.map.assign.gather(1, place.clamp_min(0)))
            assert torch.equal(step.origin.long(), place)


def test_c5_the_sized_sum_is_conserved(case: Case) -> None:
    values = torch.Generator().manual_seed(5)
    for _, trace, _ in each_budget(case):
        size: Tensor | None = None
        for step in trace:
            tm = step.map
            if tm.extra is not None:
                size = step.size
                continue
            x = torch.randn(*tm.assign.shape, 6, generator=values, dtype=torch.float64)
            held = torch.ones(tm.assign.shape, dtype=torch.float64) if size is None else size.squeeze(-1).double()
            if counted([step]) and tm.mode == "mean" and tm.weight is None:
                alive = held * (tm.assign >= 0)
                total = (sized(step).unsqueeze(-1) * tm.reduce(x, size)).sum(dim=1)
                torch.testing.assert_close(total, (alive.unsqueeze(-1) * x).sum(dim=1), rtol=1e-12, atol=1e-12)
            size = step.size


def test_c7_the_batch_split_does_not_matter(case: Case) -> None:
    whole = batch(case, 3)
    with case.patched(double=True) as red:
        together = run(red.model, whole)
        origins = [step.origin for step in red.trace]
        for i in range(3):
            alone = run(red.model, rows(whole, [i]))
            assert all(torch.equal(step.origin, per_sample(o, 3)[i]) for step, o in zip(red.trace, origins))
            close(*comparable(red, alone, [y[i : i + 1] for y in together]))


def test_c8_samples_may_be_permuted(case: Case) -> None:
    whole, order = batch(case, 3), [2, 0, 1]
    with case.patched(double=True) as red:
        straight = run(red.model, whole)
        origins = [step.origin for step in red.trace]
        turned = run(red.model, rows(whole, order))
        for step, origin in zip(red.trace, origins):
            assert torch.equal(per_sample(step.origin, 3), per_sample(origin, 3)[order])
        close(turned, [y[order] for y in straight])


def test_c9_the_same_bits_twice_and_no_thread_dependence(case: Case) -> None:
    threads = torch.get_num_threads()
    with case.patched() as red:
        first = run(case.model, case.inputs)
        origins = [step.origin for step in red.trace]
        assert same(run(case.model, case.inputs), first)
        torch.manual_seed(99)
        assert same(run(case.model, case.inputs), first)
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            close(run(case.model, case.inputs), first, 1e-5)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(step.origin, o) for step, o in zip(red.trace, origins))


def test_c10_nan_in_one_sample_stays_there(case: Case) -> None:
    clean = batch(case, 3)
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(clean)):
        pytest.skip(f"{case.variant} takes no numbers that could be NaN")
    with case.patched(double=True) as red:
        expected = run(red.model, clean)
        origins = [step.origin for step in red.trace]
        found = run(red.model, poisoned(clean))
        assert any(y[0].isnan().any() for y in found)
        if ragged(red):
            # The length of the batch, and with it the order of sums, may change; the values may not.
            close(*comparable(red, [y[1:] for y in found], [y[1:] for y in expected]), 1e-12)
        else:
            assert same([y[1:] for y in found], [y[1:] for y in expected])
        for step, origin in zip(red.trace, origins):
            assert torch.equal(per_sample(step.origin, 3)[1:], per_sample(origin, 3)[1:])
            assert (step.origin < step.tokens).all()


def test_c12_tokens_that_were_left_alone_come_back_unchanged(case: Case) -> None:
    values = torch.Generator().manual_seed(12)
    for _, trace, _ in each_budget(case):
        for step in trace:
            tm = step.map
            if tm.soft is not None or tm.back is not None or tm.extra is not None:
                continue
            x = torch.randn(*tm.assign.shape, 5, generator=values, dtype=torch.float64)
            reduced = tm.reduce(x)
            full = tm.restore(reduced)
            alone = (lengths(tm.assign, tm.K) == 1).gather(1, tm.assign.clamp_min(0)) & (tm.assign >= 0)
            assert alone.any()
            if tm.mode == "mean":
                torch.testing.assert_close(full[alone], x[alone], rtol=1e-14, atol=1e-14)
                torch.testing.assert_close(tm.reduce(full), reduced, rtol=1e-12, atol=1e-12)
            assert not full[tm.assign < 0].any()


def test_c12_gather_restore_gives_full_length_features(case: Case) -> None:
    with case.patched(double=True, restore="gather") as red:
        if not hasattr(red.model, "forward_features"):
            pytest.skip(f"{case.variant} has no forward_features")
        x = batch(case, 2)
        features = red.model.forward_features(x)
        # A class token may join behind the blocks.
        whole = example(case.variant)[0].forward_features(case.inputs).shape[1]
        assert features.shape[1] == whole
        if red.trace and all(step.map.back is None and step.map.soft is None for step in red.trace):
            slot = red.trace[-1].origin[:, red.plan.prefix :]
            kept = features[:, whole - red.plan.length + red.plan.prefix :]
            for b in range(2):
                for k in slot[b].unique().tolist():
                    members = kept[b][slot[b] == k]
                    assert k < 0 or (members == members[0]).all()


def test_c13_compute_falls_as_the_budget_grows(case: Case) -> None:
    if "r" not in budget_names(case.reducer):
        pytest.skip(f"{case.reducer} takes no r")
    with case.patched(r=1) as red:
        some = red.report()
        if not red.set(r=FAR_TOO_MANY).plan.removes:
            assert some.gmacs_after == some.gmacs_before
            return
        items = red.plan.points[0].before - red.plan.prefix
        more, growing = red.set(r=items // 2 if red.reducers[0].grid_preserving else 3).report(), adds(red)
    assert some.gmacs_before == more.gmacs_before
    assert some.gmacs_after > more.gmacs_after
    if growing:
        # The tokens that it adds may cost more than a small budget saves.
        return
    assert some.gmacs_before > some.gmacs_after
    assert some.gmacs_matcher >= 0
    assert sum(after for _, after in more.layers) < sum(before for before, _ in more.layers)


def test_c13_schedules_sum_and_never_grow(case: Case) -> None:
    for budget in case.budgets():
        with case.patched(**budget) as red:
            plan = red.plan
            own, growing = made(red), adds(red)
        removed = [point.before - point.after for point in own]
        assert all(r >= 0 for r in removed)
        assert sum(removed) > 0 or case.reducer == "identity"
        if len(own) == len(plan.points):
            assert plan.tokens == sorted(plan.tokens, reverse=True)
            assert plan.length - plan.tokens[-1] == sum(removed)
        if "r" in budget and not growing and not own[0].reducer.grid_preserving:
            limits = [point.reducer.limit(point.before - plan.prefix) for point in own]
            assert removed == [min(budget["r"], limit) for limit in limits]


def test_training_reaches_every_parameter_that_the_model_alone_reaches(case: Case) -> None:
    def reached(x: Any) -> set[str]:
        case.model.zero_grad(set_to_none=True)
        sum(y.square().sum() for y in outputs(case.model, x)).backward()
        found = {name for name, p in case.model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        case.model.zero_grad(set_to_none=True)
        return found

    plain = reached(case.inputs)
    with case.patched() as red:
        headed = any(part.site is Site.HEAD for reducer in red.reducers for part in reducer.parts())
        unused = {name for name in plain if headed and name.split(".")[0] in ("norm", "fc_norm", "head", "head_dist")}
        found = reached(case.inputs)
        assert plain - unused <= found
        extra = {name for name, _ in red.model.named_parameters() if "visiontok" in name.split(".")}
        assert found - plain == (extra if red.reducers[0].trainable else set())


def test_examples_are_the_same_every_time() -> None:
    assert BUDGETS
    for name in encoder_backbones():
        again = backbones.registry.get(name)().examples()
        for key, (model, inputs) in again.items():
            known, known_inputs = example(Variant(name, key))
            assert same(run(known, known_inputs), run(model, inputs)), f"{name}.{key} is not deterministic"
