"""P9 and the errors of patch: each names argument, value and remedy, and comes before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import visiontok as vt
from visiontok.errors import (
    FormatError,
    IncompatibleError,
    NothingPatchedError,
    ParameterError,
    UnknownNameError,
)

BAD_REDUCERS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("unknown", "tomee", {}, UnknownNameError, r"unknown reducer 'tomee'. Did you mean 'tome'\? Known: .*tome"),
    ("far from all", "zzzzqqq", {}, UnknownNameError, r"unknown reducer 'zzzzqqq'. Known: "),
    (
        "no name",
        None,
        {"r": 2},
        ParameterError,
        r"a reducer is a name, \(name, \{param\w+\}\) or a Reducer, got \(None",
    ),
    ("a class", dict, {}, ParameterError, r"a reducer is a name"),
    ("empty list", [], {"r": 2}, ParameterError, r"r cannot be given with a list of reducers"),
    ("empty list alone", [], {}, ParameterError, r"the list of reducers is empty"),
    (
        "list with params",
        ["tome"],
        {"r": 2},
        ParameterError,
        r"r cannot be given with a list.*\(name, \{param\w+\}\)",
    ),
    ("bad item", [("tome", 3)], {}, ParameterError, r"got \('tome', 3\)"),
    (
        "unknown parameter",
        "tome",
        {"prop_atn": 1},
        UnknownNameError,
        r"no parameter 'prop_atn'. Did you mean 'prop_attn'",
    ),
    ("r text", "tome", {"r": "13"}, ParameterError, r"r must be an int, a float.*a list or a dict, got '13'"),
    ("r bool", "tome", {"r": True}, ParameterError, r"r must be .* got True"),
    ("r negative", "tome", {"r": -1}, ParameterError, r"r must be at least 0 \(tokens removed per point\).*got -1"),
    ("r nan", "tome", {"r": math.nan}, ParameterError, r"r must be at least 0 .*got nan"),
    ("r list entry", "tome", {"r": [2, -3]}, ParameterError, r"entries of r must be ints >= 0 .*got -3"),
    ("r list text", "tome", {"r": [2, "x"]}, ParameterError, r"entries of r must be ints >= 0 .*got 'x'"),
    ("r inflection", "tome", {"r": (4, 1.5)}, ParameterError, r"the inflection of r must be in \[-1, 1\], got 1.5"),
    (
        "r too long",
        "tome",
        {"r": [1, 1, 1, 1]},
        ParameterError,
        r"r has 4 entries but the model has 3 points; give at most 3",
    ),
    ("r layer", "tome", {"r": {3: 1}}, ParameterError, r"r names layers \[3\].*\(0 … 2\)"),
    ("keep zero", "tome", {"keep": 0.0}, ParameterError, r"a float keep must be in \(0, 1\].*got 0.0"),
    ("keep above", "tome", {"keep": 1.01}, ParameterError, r"a float keep must be in \(0, 1\].*got 1.01"),
    ("keep nan", "tome", {"keep": math.nan}, ParameterError, r"a float keep must be in \(0, 1\].*got nan"),
    ("keep int", "tome", {"keep": 0}, ParameterError, r"an int keep must be at least 1 \(tokens kept\), got 0"),
    ("keep negative", "tome", {"keep": -2}, ParameterError, r"an int keep must be at least 1 .*got -2"),
    ("keep text", "tome", {"keep": "0.5"}, ParameterError, r"keep must be a float in \(0, 1\], an int >= 1.*got '0.5'"),
    ("keep bool", "tome", {"keep": True}, ParameterError, r"keep must be a float.* got True"),
    ("keep too long", "tome", {"keep": [0.5] * 4}, ParameterError, r"keep has 4 entries but the model has 3 points"),
    ("two budgets", "tome", {"r": 2, "keep": 0.5}, ParameterError, r"tome: give one budget, got 2 \(r=2, keep=0.5\)"),
    ("three budgets", "pitome", {"r": 2, "ratio": 0.5, "tokens": 4}, ParameterError, r"pitome: give one budget, got 3"),
    ("tokens", "tome", {"tokens": 99}, ParameterError, r"tome: tokens=99 exceeds the 16 tokens"),
    ("tokens type", "tome", {"tokens": 4.5}, ParameterError, r"tome: tokens must be an int >= 1, got 4.5"),
    (
        "gflops",
        "tome",
        {"gflops": 50},
        ParameterError,
        r"tome: gflops=50 is outside what this model can reach, 0\.\d+ … 0\.\d",
    ),
    ("gflops type", "tome", {"gflops": "4"}, ParameterError, r"gflops must be a positive number of GMACs, got '4'"),
    ("compat", "tome", {"compat": "yes"}, ParameterError, r"compat must be None or 'official', got 'yes'"),
    (
        "restore",
        "tome",
        {"r": 2, "restore": "on"},
        ParameterError,
        r"restore must be None, 'gather' or 'zero', got 'on'",
    ),
    ("recipe and reducer", "tome", {"recipe": "x.yaml"}, ParameterError, r"give a recipe or a reducer with parameters"),
    ("recipe missing", None, {"recipe": "nowhere.yaml"}, FormatError, r"nowhere.yaml"),
    ("preset", "pitome", {"preset": "dei"}, UnknownNameError, r"pitome has no preset 'dei'. Did you mean 'deit'\?"),
    ("k", "tome_kth", {"k": 1}, ParameterError, r"tome_kth: k must be an int >= 2, got 1"),
    ("k with r", "tome_kth", {"r": 1}, ParameterError, r"tome_kth takes no r; its budget is k=2"),
    ("seed", "random", {"r": 1, "seed": 0.5}, ParameterError, r"random: seed must be an int, got 0.5"),
]


@pytest.mark.parametrize(
    ("reducer", "options", "kind", "message"),
    [case[1:] for case in BAD_REDUCERS],
    ids=[case[0] for case in BAD_REDUCERS],
)
def test_a_bad_reducer_or_budget(
    vit: nn.Module,
    snapshot: Callable[[nn.Module], Any],
    reducer: Any,
    options: Any,
    kind: type[Exception],
    message: str,
) -> None:
    held = snapshot(vit)
    with pytest.raises(kind, match=message) as caught:
        vt.patch(vit, reducer, **options)
    assert isinstance(caught.value, (vt.VisionTokError, ValueError))
    assert snapshot(vit) == held


@pytest.mark.parametrize("keep", [(0.9, 0.8), [0.9, 0.8], {0: 0.9, 1: 0.8}], ids=["tuple", "list", "dict"])
def test_keep_per_layer(vit: nn.Module, image: Tensor, keep: Any) -> None:
    with vt.patched(vit, "tome", keep=keep) as red:
        vit(image)
        assert red.tokens == red.plan.tokens == [16, 13, 13]


def test_p9_nothing_matched_names_the_known_families() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(NothingPatchedError, match=r"no part of Sequential .*nothing was patched.*VisionTransformer"):
        vt.patch(model, "tome", r=2)
    assert not vt.supports("tome", model)
    assert "no part of Sequential" in vt.supports("tome", model).reason


def test_p9_a_near_miss_is_offered() -> None:
    class VisionTransfomer(nn.Module):
        pass

    with pytest.raises(NothingPatchedError, match=r"Did you mean 'VisionTransformer'\?"):
        vt.patch(VisionTransfomer(), "tome", r=2)


@pytest.mark.parametrize(
    "model", [None, "deit_small", nn.Linear, torch.zeros(2)], ids=["None", "str", "class", "tensor"]
)
def test_p9_no_module_at_all(model: Any) -> None:
    with pytest.raises(ParameterError, match=rf"model must be a torch.nn.Module .*, got {type(model).__name__}"):
        vt.patch(model, "tome", r=2)


def test_p9_the_one_vit_inside_a_wrapper_is_found(
    vit: nn.Module, image: Tensor, make_vit: Callable[..., nn.Module]
) -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Identity()
            self.encoder = nn.ModuleDict({"backbone": vit})

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder["backbone"](self.stem(x))

    model = Detector().eval()
    before = model(image)
    red = vt.patch(model, "tome", r=2)
    assert red.model is vit
    assert type(model) is Detector
    assert not torch.equal(model(image), before)
    assert vt.unpatch(model) is model
    assert torch.equal(model(image), before)


def test_p9_two_vits_inside_a_wrapper_are_refused(vit: nn.Module, make_vit: Callable[..., nn.Module]) -> None:
    pair = nn.ModuleDict({"student": vit, "teacher": make_vit(class_token=False, global_pool="avg")})
    with pytest.raises(NothingPatchedError, match=r"holds several models.*\(student, teacher\); pass one of them"):
        vt.patch(pair, "tome", r=2)
    with vt.patched(pair["teacher"], "tome", r=2), vt.patched(pair["student"], "random", r=2):
        pass
    vt.patch(pair["teacher"], "tome", r=2)
    vt.patch(pair["student"], "tome", r=2)
    vt.unpatch(pair)
    assert all("_visiontok" not in vars(m) for m in pair.modules())


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_ddp_wrapped_model_is_refused(vit: nn.Module, snapshot: Callable[[nn.Module], Any]) -> None:
    held = snapshot(vit)
    wrapped = nn.parallel.DistributedDataParallel(vit)
    with pytest.raises(
        IncompatibleError, match=r"wrapped in DistributedDataParallel: patch before wrapping.*model\.module"
    ):
        vt.patch(wrapped, "tome", r=2)
    assert not vt.supports("tome", wrapped)
    assert snapshot(vit)["types"] == held["types"]


def test_a_data_parallel_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(IncompatibleError, match=r"wrapped in DataParallel: DataParallel is not supported, use DDP"):
        vt.patch(nn.DataParallel(vit), "tome", r=2)


def test_a_compiled_model_is_refused(vit: nn.Module, snapshot: Callable[[nn.Module], Any]) -> None:
    compiled = torch.compile(vit, backend="eager")
    held = snapshot(vit)
    with pytest.raises(IncompatibleError, match=r"the result of torch.compile; patch the model that you compiled"):
        vt.patch(compiled, "tome", r=2)
    assert snapshot(vit) == held


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_is_refused(vit: nn.Module, image: Tensor) -> None:
    with pytest.raises(IncompatibleError, match=r"a compiled TorchScript module; patch the eager model"):
        vt.patch(torch.jit.trace(vit, image), "tome", r=2)


def test_a_missing_site_or_signal_is_named(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from visiontok.core.signals import Signal, Site

    tome = vt.reducers.ToMe
    monkeypatch.setattr(tome, "needs", property(lambda _: (Signal.SSM_OUT, Signal.KEY)))
    fits = vt.supports("tome", vit)
    assert (fits.ok, fits.missing) == (False, ("SSM_OUT",))
    with pytest.raises(
        IncompatibleError, match=r"tome cannot be used on VisionTransformer: timm_vit does not offer SSM_OUT"
    ):
        vt.patch(vit, "tome", r=2)
    monkeypatch.undo()
    monkeypatch.setattr(tome, "site", Site.KV)
    with pytest.raises(IncompatibleError, match=r"tome acts at site KV; timm_vit has MID, PRE"):
        vt.patch(vit, "tome", r=2)
