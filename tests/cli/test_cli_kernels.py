"""`tune-kernels`, the kernels section of `doctor`, and `warmup`, on a machine without a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import visiontok as vt
from visiontok.bench import tune
from visiontok.cli import main
from visiontok.errors import MissingDependencyError, ParameterError
from visiontok.models.tiny import tiny_vit
from visiontok.ops import dispatch
from visiontok.warming import warmup


@pytest.fixture
def table() -> None:
    """Skips where the launch table cannot be read."""
    try:
        tune.shipped()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("table")
def test_tuning_without_a_gpu_fails_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune-kernels"]) == 1
    assert capsys.readouterr().err.startswith("visiontok tune-kernels: error: no CUDA device here")


@pytest.mark.usefixtures("table")
def test_dry_run_lists_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune-kernels", "--kernel", "merge", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("merge width 384: ")
    first, *others = (json.loads(line[line.index("{") :]) for line in lines[: lines.index(next(
        line for line in lines if line.startswith("merge width 768")))])  # fmt: skip
    assert len(others) >= 4
    assert all(sum(first[name] != other[name] for name in first) == 1 for other in others)


@pytest.mark.usefixtures("table")
def test_unknown_kernels_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune-kernels", "--kernel", "merj"]) == 2
    assert "Did you mean 'merge'?" in capsys.readouterr().err


def test_doctor_says_why_nothing_faster_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert kernels["setting"] == f"VISIONTOK_KERNELS={dispatch.wanted()}"
    assert kernels["C++ library"]
    assert "entries for any" in kernels["Triton launch table"] or "missing or too old" in kernels["Triton launch table"]
    assert "not triton: " in kernels["match_slots [cpu]"]
    for choice in dispatch.report():
        assert kernels[choice.op].startswith(f"{choice.implementation} (")


def test_warmup_runs_every_distinct_shape_once_and_leaves_no_trace() -> None:
    model = tiny_vit()
    model.train()
    vt.patch(model, "random", r=4, seed=0)
    seen: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    rows = warmup(model, [(1, 3, 32, 32), [2, 3, 32, 32], (1, 3, 32, 32)])  # type: ignore[list-item]
    assert torch.equal(torch.rand(1), expected)
    hook.remove()
    assert seen == [(1, 3, 32, 32), (2, 3, 32, 32)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [row.kind for row in rows] == ["C++ kernels", "forward", "forward"]
    assert rows[0].detail
    assert rows[1].name == "1x3x32x32 float32 cpu"
    assert len(warmup(model, (1, 3, 32, 32))) == 2


def test_warmup_is_a_function_even_after_its_module_is_imported() -> None:
    # A submodule of the same name would take its place in the package.
    assert vt.warmup is warmup


def test_warmup_refuses_what_it_cannot_run() -> None:
    model = nn.Linear(2, 2)
    for shape in ([], (0, 2), ()):
        with pytest.raises(ParameterError, match="input_shape must be"):
            warmup(model, shape)
    with pytest.raises(ParameterError, match="but the model is on 'cpu'"):
        warmup(model, (1, 2), device="meta")
