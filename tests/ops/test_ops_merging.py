"""Segment operations and TokenMap values against loops: both implementations, every mode, every dtype, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ROUNDING, Problem, examples, normal, plain, problems
from torch import Tensor

import visiontok as vt
from visiontok.core.tokens import TokenMap
from visiontok.errors import ParameterError, UnknownNameError
from visiontok.ops import dispatch, merging

BOTH = ("index_add", "embedding_bag")
MODES = ("mean", "sum", "amax", "absmax", "mlerp")

both = pytest.mark.parametrize("implementation", BOTH)


def assert_near(got: Tensor, want: np.ndarray, dtype: torch.dtype) -> None:
    """Compares with a float64 result up to the rounding of `dtype`, relative to the largest entry."""
    scale = max(float(np.abs(want).max(initial=0.0)), 1.0)
    error = float(np.abs(plain(got) - want).max(initial=0.0))
    assert error <= ROUNDING[dtype] * scale, f"off by {error:.3g} at scale {scale:.3g}"


@given(problem=problems())
@examples(60)
def test_group(problem: Problem) -> None:
    groups = merging.group(problem.assign, problem.slots)
    for assign, csr, src in zip(problem.assign.tolist(), groups.csr.tolist(), groups.src.tolist()):
        assert (csr, src) == naive.group(assign, problem.slots)
    tm = TokenMap(problem.assign, problem.slots)
    assert torch.equal(tm.csr, groups.csr)
    assert torch.equal(tm.src, groups.src)
    assert tm.groups is tm.groups


@both
@given(problem=problems(), weighted=st.booleans())
@examples(60)
def test_segment_sum(implementation: str, problem: Problem, weighted: bool) -> None:
    with dispatch.use("segment_sum", implementation):
        got = merging.segment_sum(
            problem.x, problem.assign, problem.slots, problem.weight if weighted else None, complete=problem.complete
        )
    want = np.stack([naive.segment_sum(x, a, problem.slots, w if weighted else None) for x, a, w in problem.samples])
    assert got.dtype == torch.promote_types(problem.x.dtype, torch.float32)
    assert_near(got, want, got.dtype)


@both
def test_segment_sum_keeps_the_dtype_of_x(implementation: str) -> None:
    x, assign = normal(0, 2, 5, 3, dtype=torch.float16), torch.tensor([[0, 1, 1, 0, -1]] * 2)
    for weight in (
        None,
        torch.ones(2, 5),
        torch.ones(2, 5, dtype=torch.float64),
        torch.ones(2, 5, dtype=torch.float16),
    ):
        with dispatch.use("segment_sum", implementation):
            assert merging.segment_sum(x, assign, 2, weight).dtype == torch.float32
            assert merging.segment_sum(x.double(), assign, 2, weight).dtype == torch.float64


@given(problem=problems())
@examples(40)
def test_segment_max_and_count(problem: Problem) -> None:
    got = merging.segment_max(problem.x, problem.assign, problem.slots)
    want = np.stack([naive.segment_max(x, a, problem.slots) for x, a, _ in problem.samples])
    assert plain(got).tolist() == want.tolist()
    counted = merging.segment_count(problem.weight, problem.assign, problem.slots, complete=problem.complete)
    assert counted.tolist() == [naive.sizes(a, problem.slots, w) for _, a, w in problem.samples]


@both
@given(problem=problems(), mode=st.sampled_from(MODES), by=st.sampled_from(["ones", "weight", "size"]))
@examples(150)
def test_reduce(implementation: str, problem: Problem, mode: str, by: str) -> None:
    form = "complete" if problem.complete else "any"
    tm = TokenMap(
        problem.assign, problem.slots, mode=mode, weight=problem.weight if by == "weight" else None, form=form
    )
    size = problem.weight.unsqueeze(-1) if by == "size" else None
    with dispatch.use("segment_sum", implementation):
        got = tm.reduce(problem.x, size)
        apart = torch.cat([one_of(tm, i).reduce(problem.x[i : i + 1], part(size, i)) for i in range(len(problem.x))])
    want = np.stack(
        [naive.reduce(x, a, problem.slots, mode, None if by == "ones" else w) for x, a, w in problem.samples]
    )
    assert got.dtype == problem.x.dtype
    if np.abs(want).max(initial=0.0) < torch.finfo(got.dtype).max:
        assert_near(got, want, got.dtype)
    assert torch.equal(got, apart), "a sample depends on its batch mates"


def one_of(tm: TokenMap, i: int) -> TokenMap:
    return TokenMap(tm.assign[i : i + 1], tm.K, mode=tm.mode, weight=part(tm.weight, i), form=tm.form)


def part(tensor: Tensor | None, i: int) -> Tensor | None:
    return None if tensor is None else tensor[i : i + 1]


@given(problem=problems(), by=st.sampled_from(["ones", "size", "mass"]), cap=st.integers(0, 20))
@examples(60)
def test_sizes(problem: Problem, by: str, cap: int) -> None:
    counts = torch.full((len(problem.x),), min(cap, problem.slots))
    weights = {"ones": {}, "size": {}, "mass": {"mass": problem.weight}}[by]
    size = problem.weight.unsqueeze(-1) if by == "size" else None
    for live in (None, counts):
        tm = TokenMap(problem.assign, problem.slots, counts=live, **weights)
        got = tm.sizes(size, problem.x.dtype)
        assert got is not None
        assert got.dtype == torch.promote_types(problem.x.dtype, torch.float32)
        limit = None if live is None else int(counts[0])
        want = [naive.sizes(a, problem.slots, None if by == "ones" else w, limit) for _, a, w in problem.samples]
        assert got.squeeze(-1).tolist() == want


@given(problem=problems(), fill=st.sampled_from(["zero", "mean", "self", "nearest"]))
@examples(80)
def test_restore(problem: Problem, fill: str) -> None:
    tm = TokenMap(problem.assign, problem.slots)
    y = normal(7, len(problem.x), problem.slots, problem.x.shape[2], dtype=problem.x.dtype)
    got = tm.restore(y, fill, x=problem.x)
    want = np.stack([naive.restore(v, a, fill, x) for v, (x, a, _) in zip(plain(y), problem.samples)])
    assert got.dtype == y.dtype
    assert_near(got, want, y.dtype)
    taken = problem.assign >= 0
    slots = problem.assign.clamp_min(0).unsqueeze(-1).expand(-1, -1, y.shape[2])
    assert torch.equal(got[taken], y.gather(1, slots)[taken]), "a token that has a slot got something else"


def test_restore_is_identity_on_tokens_that_stayed_alone() -> None:
    x = normal(0, 2, 12, 5, dtype=torch.float32)
    state = vt.TokenState.initial(x)
    tm = vt.reducers.ToMe(r=3).decide(vt.Signals.of(KEY=x.unsqueeze(1)), state)
    assert tm is not None
    reduced, after = vt.apply(tm, x, state)
    alone = after.size.squeeze(-1).gather(1, tm.assign) == 1
    assert 0 < int(alone.sum()) < alone.numel()
    assert torch.equal(tm.restore(reduced)[alone], x[alone])


# ---- numbers that are not tame


@both
@pytest.mark.parametrize("mode", MODES)
def test_nan_in_one_sample_leaves_the_others(implementation: str, mode: str) -> None:
    clean = normal(0, 3, 11, 4, dtype=torch.float32)
    spoiled = clean.clone()
    spoiled[1, 3] = math.nan
    spoiled[1, 5, 0] = math.inf
    assign = torch.tensor([[0, 1, 2, 2, 2, -1, 3, 3, 0, 1, -1]] * 3)
    with dispatch.use("segment_sum", implementation):
        before, after = (TokenMap(assign, 4, mode=mode).reduce(x) for x in (clean, spoiled))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.isnan(after[1, 2]).all()
    # A dropped infinity and the other slots of the same sample are no concern of slot 2.
    assert torch.equal(before[1, [0, 1, 3]], after[1, [0, 1, 3]])


@both
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_values_follow_ieee(implementation: str, value: float) -> None:
    x = torch.tensor([[[1.0], [value], [2.0], [3.0]]])
    assign = torch.tensor([[0, 0, 1, 1]])
    with dispatch.use("segment_sum", implementation):
        for mode in ("mean", "sum"):
            assert TokenMap(assign, 2, mode=mode).reduce(x)[0, 0, 0] == value
    assert TokenMap(assign, 2, mode="amax").reduce(x)[0, 0, 0] == max(value, 1.0)
    assert TokenMap(assign, 2, mode="absmax").reduce(x)[0, 0, 0] == value


@both
@pytest.mark.parametrize("mode", ["mean", "mlerp", "amax", "absmax"])
def test_fp16_with_large_activations_stays_finite(implementation: str, mode: str) -> None:
    x = torch.full((1, 400, 64), 400.0, dtype=torch.float16)
    assign = torch.zeros(1, 400, dtype=torch.int64)
    assign[:, -2:] = torch.tensor([1, 2])
    with dispatch.use("segment_sum", implementation):
        got = TokenMap(assign, 3, mode=mode, form="complete").reduce(x)
        sized = TokenMap(assign, 3, mode=mode, form="complete").reduce(x, torch.full((1, 400, 1), 1000.0))
    for one in (got, sized):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, torch.full_like(one, 400.0), atol=1.0, rtol=0)


def test_fp16_mlerp_with_a_norm_beyond_fp16() -> None:
    # 2 100 in 1 024 channels has norm 67 200, more than fp16 holds; the result itself fits.
    x = torch.full((1, 4, 1024), 2100.0, dtype=torch.float16)
    got = TokenMap(torch.tensor([[0, 0, 1, 1]]), 2, mode="mlerp").reduce(x)
    torch.testing.assert_close(got, torch.full_like(got, 2100.0), atol=4.0, rtol=0)


@both
def test_sizes_are_exact_at_1e5(implementation: str) -> None:
    length = 100_003
    assign = torch.zeros(1, length, dtype=torch.int64)
    assign[0, -3:] = torch.tensor([1, 1, 2])
    x = torch.ones(1, length, 1, dtype=torch.float16)
    with dispatch.use("segment_sum", implementation):
        reduced, state = vt.apply(TokenMap(assign, 3), x, vt.TokenState.initial(x))
    assert state.size.flatten().tolist() == [100_000.0, 2.0, 1.0]
    assert state.size.dtype == torch.float32
    torch.testing.assert_close(reduced, torch.ones_like(reduced), atol=1e-3, rtol=0)
    again, state = vt.apply(TokenMap(torch.tensor([[0, 0, 0]]), 1), reduced, state)
    assert state.size.flatten().tolist() == [float(length)]


@both
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(implementation: str, mode: str) -> None:
    with dispatch.use("segment_sum", implementation):
        got = TokenMap(torch.empty(0, 5, dtype=torch.int64), 3, mode=mode).reduce(torch.empty(0, 5, 2))
    assert got.shape == (0, 3, 2)


@both
def test_strided_input(implementation: str) -> None:
    wide = normal(0, 2, 4, 7, dtype=torch.float32)
    x, assign = wide.transpose(1, 2), torch.tensor([[0, 1, 0, 1, 2, 2, -1]] * 2)
    with dispatch.use("segment_sum", implementation):
        got = TokenMap(assign, 3).reduce(x)
        assert torch.equal(got, TokenMap(assign, 3).reduce(x.contiguous()))
        offset = torch.cat((wide, wide))[1:3]
        assert torch.equal(merging.segment_sum(offset, torch.tensor([[0, 0, 1, 1]] * 2), 2),
                           merging.segment_sum(offset.clone(), torch.tensor([[0, 0, 1, 1]] * 2), 2))  # fmt: skip


# ---- gradients

ASSIGN = torch.tensor([[0, 1, 0, -1, 1, 2], [2, 2, 2, 0, 1, -1]])


def differentiable(mode: str, weighted: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: TokenMap(ASSIGN, 3, mode=mode, weight=w if weighted else None).reduce(x)  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["mean", "sum", "mlerp"])
def test_gradcheck(implementation: str, mode: str, weighted: bool) -> None:
    x = normal(1, 2, 6, 2).requires_grad_()
    w = (normal(2, 2, 6).abs() + 0.5).requires_grad_()
    function = differentiable(mode, weighted)
    with dispatch.use("segment_sum", implementation):
        inputs = (x, w if weighted else w.detach())
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("mode", ["amax", "absmax"])
def test_gradcheck_of_maxima(mode: str) -> None:
    x = normal(1, 2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TokenMap(ASSIGN, 3, mode=mode).reduce(x), (x,))  # type: ignore[arg-type]


def test_gradcheck_of_soft_mass_and_back() -> None:
    x, soft = normal(1, 2, 6, 2).requires_grad_(), normal(2, 2, 3, 6).requires_grad_()
    mass, back = normal(3, 2, 6).abs().requires_grad_(), normal(4, 2, 6, 3).requires_grad_()

    def function(x: Tensor, soft: Tensor, mass: Tensor, back: Tensor) -> tuple[Tensor, ...]:
        tm = TokenMap(ASSIGN, 3, soft=soft, mass=mass, back=back)
        y = tm.reduce(x)
        size = tm.sizes(None, x.dtype)
        assert size is not None
        return y, size, tm.restore(y)

    assert torch.autograd.gradcheck(function, (x, soft, mass, back))


@both
@given(problem=problems((torch.float64,)), mode=st.sampled_from(["mean", "sum"]), weighted=st.booleans())
@examples(40)
def test_gradient_is_that_of_the_loops(implementation: str, problem: Problem, mode: str, weighted: bool) -> None:
    x = problem.x.clone().requires_grad_()
    weight = (problem.weight.double() + 0.5).requires_grad_() if weighted else None
    with dispatch.use("segment_sum", implementation):
        y = TokenMap(problem.assign, problem.slots, mode=mode, weight=weight).reduce(x)
        up = normal(3, *y.shape)
        grads = torch.autograd.grad(y, [x] if weight is None else [x, weight], up)
    plain_x = problem.x.clone().requires_grad_()
    plain_w = torch.ones_like(problem.weight, dtype=torch.float64)
    plain_w = (plain_w if weight is None else weight.detach().clone()).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b, assign in enumerate(problem.assign.tolist()):
        for k, tokens in enumerate(naive.members(assign, problem.slots)):
            if tokens:
                value = sum(plain_w[b, i] * plain_x[b, i] for i in tokens)
                value = value / sum(plain_w[b, i] for i in tokens) if mode == "mean" else value
                total = total + (value * up[b, k]).sum()
    want = torch.autograd.grad(total, [plain_x, plain_w], allow_unused=True, materialize_grads=True) \
        if total.requires_grad else (torch.zeros_like(plain_x), torch.zeros_like(plain_w))  # fmt: skip
    for got, expected in zip(grads, want):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)


def test_every_token_that_has_a_slot_gets_a_gradient() -> None:
    x = normal(0, 2, 6, 3, dtype=torch.float32).requires_grad_()
    TokenMap(ASSIGN, 3).reduce(x).sum().backward()
    assert torch.equal(x.grad.abs().sum(dim=-1) > 0, ASSIGN >= 0)


@pytest.mark.parametrize("grad", [True, False])
def test_spread_and_select_gradients(grad: bool) -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    x = normal(0, 2, 3, 2).requires_grad_(grad)
    assert merging.select(x, index).requires_grad == grad
    if grad:
        assert torch.autograd.gradcheck(lambda t: merging.select(t, index), (x,))
        assert torch.autograd.gradcheck(lambda t: merging.spread(t, torch.tensor([[0, -1, 2, 2], [1, 0, -1, 0]])), (x,))


# ---- dispatch


def test_use_forces_and_restores() -> None:
    op = dispatch.op("segment_sum")
    before = op.choose(torch.empty(1)).name
    with dispatch.use("segment_sum", "index_add"):
        assert op.choose(torch.empty(1)).name == "index_add"
        with dispatch.use("segment_sum", "embedding_bag"):
            assert op.choose(torch.empty(1)).name == "embedding_bag"
        assert op.choose(torch.empty(1)).name == "index_add"
    assert op.choose(torch.empty(1)).name == before
    with pytest.raises(RuntimeError, match="inside"), dispatch.use("segment_sum", "index_add"):
        raise RuntimeError("inside")
    assert op.choose(torch.empty(1)).name == before


def test_use_names_what_it_knows() -> None:
    with pytest.raises(UnknownNameError, match=r"no implementation 'cuda' of op 'segment_sum'.*embedding_bag"), \
            dispatch.use("segment_sum", "cuda"):  # fmt: skip
        pass
    with pytest.raises(UnknownNameError, match="segment_sum"), dispatch.use("segment_total", "index_add"):
        pass


def test_meta_tensors_take_the_traceable_implementation() -> None:
    assert dispatch.op("segment_sum").choose(torch.empty(1, device="meta")).name == "index_add"
    x = torch.empty(2, 6, 3, device="meta")
    assert TokenMap(ASSIGN.to("meta"), 3).reduce(x).shape == (2, 3, 3)


def test_report_gives_a_reason_for_every_op() -> None:
    rows = dispatch.report()
    assert any(row.op.startswith("segment_sum") for row in rows)
    assert all(row.implementation and row.reason for row in rows)


def test_unknown_fill_is_refused() -> None:
    tm = TokenMap(ASSIGN, 3)
    with pytest.raises(ParameterError, match="fill must be"):
        tm.restore(torch.zeros(2, 3, 1), "closest")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="needs x"):
        tm.restore(torch.zeros(2, 3, 1), "self")
