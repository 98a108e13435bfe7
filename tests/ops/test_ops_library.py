"""The operators registered with torch, and the dispatcher that picks what runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from visiontok.errors import ParameterError
from visiontok.ops import dispatch, fusing, matching, merging, probing, scoring
from visiontok.ops.merging import Groups

OPS = torch.ops.visiontok


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    key, x = new(2, 3, 11, 8), new(2, 11, 6)
    assign, csr, src = OPS.match_slots(key, 3, 1)
    return {"key": key, "query": new(2, 3, 11, 8), "x": x, "y": new(2, 11, 6), "gamma": new(6), "assign": assign,
            "csr": csr, "src": src, "size": torch.randint(1, 5, (2, 11), generator=generator).float(),
            "rows": matching.unit(new(2, 11, 8)), "bias": new(2, 11)}  # fmt: skip


def calls() -> dict[str, tuple[Any, ...]]:
    d = data()
    a, b = torch.arange(2, 11, 2), torch.arange(1, 11, 2)
    score, partner = OPS.best_match(d["rows"], a, b)
    merge = (d["x"], d["csr"], d["src"], d["y"], d["gamma"], None, d["size"], "mean")
    return {
        "match_slots": (d["key"], 3, 1),
        "best_match": (d["rows"], a, b),
        "plan": (score, partner, a, b, 3, 1, 11, True),
        "group": (d["assign"], 8, True),
        "merge": (*merge, None, None, None, 0.0, False),
        "merge ": (*merge, d["rows"], d["gamma"], d["gamma"], 1e-6, True),
        "energy": (d["rows"], 0.5, 1.0, "elu"),
        "class_rows": (d["query"], d["key"], d["bias"], 0.3, 2),
        "key_votes": (d["query"], d["key"], 0.3, d["bias"], torch.ones(2, 3, 11)),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_operators_keep_their_contract_with_torch(name: str) -> None:
    # Schema, fake tensors, and no surprise under autograd and AOT.
    torch.library.opcheck(getattr(OPS, name.strip()).default, calls()[name])


def test_gradient_of_the_fused_merge() -> None:
    d = data()
    size = d["size"].double()

    def merged(x: Tensor) -> Tensor:
        return fusing.merge_with_gradient(x, Groups(d["csr"], d["src"]), d["assign"], size)[0]

    assert torch.autograd.gradcheck(merged, (d["x"].double().requires_grad_(),))


@pytest.mark.parametrize("length", [5, 40, 1100])
def test_best_match_in_strips_is_that_of_the_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = matching.unit(torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length)))
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    a, b = order[: length // 2], order[length // 2 :]
    whole = (rows[:, a] @ rows[:, b].mT).max(dim=-1)
    monkeypatch.setattr(matching, "_AT_ONCE", 64)
    score, partner = matching.best_match(rows, a, b)
    torch.testing.assert_close(score, whole.values, rtol=0, atol=1e-6)
    assert torch.equal(partner, whole.indices)


def test_slots_of_a_random_partition_are_those_of_the_match() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = matching.unit(torch.randn(2, 41, 5, generator=generator))
    order = torch.randperm(40, generator=generator) + 1
    a, b = order[:30].sort().values, order[30:].sort().values
    for ascending in (True, False):
        slots = matching.bipartite_slots(rows, a, b, 12, prefix=1, ascending=ascending)
        match = matching.bipartite(rows, a, b, 12, ascending=ascending)
        assert slots.num_slots == 29
        staying = torch.cat((torch.zeros(2, 1, dtype=torch.long), match.order), dim=1)
        assert torch.equal(slots.assign.gather(1, staying), torch.arange(29).expand(2, -1))
        assert torch.equal(slots.assign.gather(1, match.src), slots.assign.gather(1, match.dst))
        assert slots.groups is not None
        want = merging.group(slots.assign, 29, complete=True)
        assert torch.equal(slots.groups.csr.long(), want.csr)
        assert torch.equal(slots.groups.src.long(), want.src)


def test_votes_and_rows_take_a_bias_per_key_or_per_pair() -> None:
    d = data()
    per_key = d["bias"][:, None, None]
    per_pair = per_key.expand(2, 1, 11, 11).clone()
    weight = torch.rand(2, 3, 11)
    for run in (
        lambda bias: probing.key_votes(d["query"], d["key"], 0.3, bias, weight),
        lambda bias: probing.prefix_rows(d["query"], d["key"], 2, 0.3, bias),
    ):
        torch.testing.assert_close(run(per_key), run(per_pair))


@pytest.fixture
def fresh() -> Iterator[Callable[..., dispatch.Op]]:
    made: list[str] = []

    def make(name: str) -> dispatch.Op:
        made.append(name)
        op = dispatch.op(name)
        op.implementation("triton", dispatch.triton_refuses, "fast")(lambda x: "triton")
        op.implementation("torch", lambda x: None, "always there")(lambda x: "torch")
        return op

    yield make
    for name in made:
        del dispatch._ops[name]
    dispatch.wanted.cache_clear()
    dispatch._triton_missing.cache_clear()


def test_a_fall_back_is_logged_once_with_its_reason(
    fresh: Callable[..., dispatch.Op], caplog: pytest.LogCaptureFixture
) -> None:
    op = fresh("trial_op")
    with caplog.at_level(logging.INFO, "visiontok.dispatch"):
        assert op(torch.ones(1)) == op(torch.ones(2)) == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "trial_op: torch (always there; triton: not on a GPU)"
    ]
    row = next(row for row in dispatch.report() if row.op == "trial_op [cpu]")
    assert row == ("trial_op [cpu]", "torch", "always there", (("triton", "not on a GPU"),))


class OnGPU:
    """What the verifiers look at, of a tensor on a GPU."""

    is_cuda, dtype = True, torch.float16


def test_triton_is_refused_with_the_reason(fresh: Callable[..., dispatch.Op], monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = OnGPU()
    pytest.importorskip("triton")
    assert dispatch.triton_refuses(x) is None
    monkeypatch.setattr(OnGPU, "dtype", torch.float64)
    assert dispatch.triton_refuses(x) == "no kernel for float64"
    monkeypatch.setattr(OnGPU, "dtype", torch.float16)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    fresh("trial_op")
    dispatch._triton_missing.cache_clear()
    assert "older than 2.14" in str(dispatch.triton_refuses(x))
    monkeypatch.setenv("VISIONTOK_KERNELS", "reference")
    dispatch.wanted.cache_clear()
    dispatch._triton_missing.cache_clear()
    assert dispatch.triton_refuses(x) == "VISIONTOK_KERNELS=reference"
    monkeypatch.setenv("VISIONTOK_KERNELS", "triton")
    dispatch.wanted.cache_clear()
    dispatch._triton_missing.cache_clear()
    with pytest.raises(ParameterError, match="VISIONTOK_KERNELS=triton, but torch 2.6.0"):
        dispatch.triton_refuses(x)
    monkeypatch.setenv("VISIONTOK_KERNELS", "cuda")
    dispatch.wanted.cache_clear()
    dispatch._triton_missing.cache_clear()
    with pytest.raises(ParameterError, match="auto, reference, triton, cpp, got 'cuda'"):
        dispatch.triton_refuses(x)


def test_an_exported_graph_gets_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = OnGPU()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.triton_refuses(x) is None
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert "without visiontok" in str(dispatch.triton_refuses(x))


def test_energy_of_every_kind_matches_its_formula() -> None:
    rows = data()["rows"]
    cosine = rows @ rows.mT
    elu = torch.where(cosine > 0.3, cosine - 0.3, 0.7 * torch.expm1(cosine - 0.3)).mean(-1)
    torch.testing.assert_close(scoring.energy(rows, 0.3, 0.7), elu)
    hinge = torch.where(cosine >= 0.3, cosine, 0.7 * torch.expm1(cosine - 0.3)).mean(-1)
    torch.testing.assert_close(scoring.energy(rows, 0.3, 0.7, hinge=True), hinge)
    density = torch.distributions.Normal(1.0, 0.7).log_prob(cosine).exp().mean(-1)
    torch.testing.assert_close(scoring.gaussian_energy(rows, 0.3), density)
