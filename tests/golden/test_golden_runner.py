"""The golden runner itself, on cases made here from the loop-level reference, and its rules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_case
import naive
import numpy as np
import pytest
import test_golden
import torch
from golden_case import Case
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def write(path: Path, method: str, level: str, params: dict[str, Any], tensors: dict[str, Any]) -> Case:
    """Saves a golden file as the README lays it out, and opens it."""
    whole = {name: as_tensor(value).contiguous() for name, value in tensors.items()}
    metadata = {"method": method, "level": level, "params": json.dumps(params), "source": "tests", "notes": ""}
    file = path / f"{method}_{level}.safetensors"
    save_file(whole, file, metadata)
    return Case.open(file)


def as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def typed(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Indices stay int32, everything else gets `dtype`."""
    out = {}
    for name, value in tensors.items():
        tensor = as_tensor(value)
        out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor.to(torch.int32)
    return out


def merged(x: np.ndarray, size: np.ndarray, decided: list[tuple[list[int], int]], origin: np.ndarray) -> dict[str, Any]:
    """What every op file saves, from (assign, slots) per sample; `origin` is (B, N0)."""
    slots = decided[0][1]
    assigns = [assign for assign, _ in decided]
    out = {
        f"out.merge_{mode}": np.stack([naive.reduce(one, a, slots, mode) for one, a in zip(x, assigns)])
        for mode in ("sum", "mean", "amax")
    }
    average = [naive.reduce(one, a, slots, "mean", s) for one, a, s in zip(x, assigns, size)]
    out["out.wavg_x"] = np.stack(average)
    out["out.wavg_size"] = np.stack([naive.sizes(a, slots, s) for a, s in zip(assigns, size)])[..., None]
    places = [naive.compose(place, a) for place, a in zip(origin, assigns)]
    out["out.source"] = np.stack([naive.one_hot(place, slots) for place in places])
    out["unmerged"] = np.stack([naive.restore(y, a, "zero") for y, a in zip(average, assigns)])
    return out


def tome_op(length: int, batch: int, r: int, cls: bool, distill: bool, sized: int, dtype: torch.dtype) -> Any:
    """A tome op file; `sized` > 0 gives sizes and a source of `sized` original tokens."""
    prefix = cls + distill
    metric = np.float64(np.float32(rows(length, batch, length, 6)))
    x = np.float64(np.float32(rows(length + 1, batch, length, 4)))
    matches = [naive.even_odd(one, r, prefix) for one in metric]
    tensors: dict[str, Any] = {"in.metric": metric, "in.x": x}
    size, origin = np.ones((batch, length)), np.tile(np.arange(length), (batch, 1))
    if sized:
        draw = np.random.default_rng(sized)
        size = draw.integers(1, 9, (batch, length)).astype(float)
        origin = np.stack([draw.permutation(np.r_[np.arange(length), draw.integers(0, length, sized - length)])
                           for _ in range(batch)])  # fmt: skip
        tensors["in.size"] = size[..., None]
        tensors["in.source"] = np.stack([naive.one_hot(place, length) for place in origin])
    decided = [naive.assignment(match, length, prefix) for match in matches]
    tensors |= merged(x, size, decided, origin)
    unmerged = tensors.pop("unmerged")
    if not distill:
        tensors["out.unmerge_of_wavg_x"] = unmerged
    effective = len(matches[0].src)
    if effective:
        tensors["out.src_idx"] = np.array([match.src for match in matches]) // 2
        tensors["out.dst_idx"] = np.array([match.dst for match in matches]) // 2
        stay = [[i // 2 for i in match.order if i % 2 == 0] for match in matches]
        tensors["out.unm_idx"] = np.array([[0] * bool(prefix) + one for one in stay])
    params = {"r": r, "class_token": cls, "distill_token": distill, "effective_r": effective}
    return params, typed(tensors, dtype)


TOME_OPS = {
    "even_nocls": (64, 3, 13, False, False, 0, "fp32"),
    "odd_nocls_fp64": (33, 2, 9, False, False, 0, "fp64"),
    "fp64_size_source": (33, 2, 10, True, False, 38, "fp64"),
    "fp32_size_source": (32, 2, 10, True, False, 40, "fp32"),
    "distill_odd": (23, 2, 6, True, True, 0, "fp64"),
    "tiny3_cls": (3, 1, 5, True, False, 0, "fp32"),
    "tiny2_cls": (2, 1, 5, True, False, 0, "fp32"),
    "tiny2_nocls": (2, 2, 5, False, False, 0, "fp64"),
    "tiny1_nocls": (1, 2, 5, False, False, 0, "fp32"),
}


@pytest.mark.parametrize("name", TOME_OPS)
def test_tome_op(tmp_path: Path, name: str) -> None:
    *shape, dtype = TOME_OPS[name]
    params, tensors = tome_op(*shape, DTYPES[dtype])
    test_golden.run(write(tmp_path, "tome", "op", params, tensors))


def pitome_op(length: int, batch: int, kind: str, ratio: float, margin: float, cls: bool, alpha: float, sized: bool,
              dtype: torch.dtype) -> Any:  # fmt: skip
    """A pitome op file; `length` counts the class token."""
    metric = np.float64(np.float32(rows(length, batch, length, 6)))
    x = np.float64(np.float32(rows(length + 1, batch, length, 4)))
    counted = length if kind == "bsm" else length - cls
    r = math.floor(counted - counted * ratio)
    tensors: dict[str, Any] = {"in.metric": metric, "in.x": x}
    size = np.ones((batch, length))
    if sized:
        size = np.random.default_rng(3).integers(1, 9, (batch, length)).astype(float)
        tensors["in.size"] = size[..., None]
    if kind == "bsm":
        matches = [naive.even_odd(one, r, int(cls)) for one in metric]
        tensors["out.src_idx"] = np.array([match.src for match in matches]) // 2
        tensors["out.dst_idx"] = np.array([match.dst for match in matches]) // 2
        tensors["out.unm_idx"] = np.array([[0] * cls + [i // 2 for i in m.order if i % 2 == 0] for m in matches])
    else:
        found = [naive.pitome(one, r, kind, margin, alpha, int(cls)) for one in metric]
        matches = [one.match for one in found]
        tensors["out.energy"] = np.array([one.energy for one in found])
        tensors["out.a_idx"] = np.array([one.a for one in found])
        tensors["out.b_idx"] = np.array([one.b for one in found])
        into = [[one.b.index(token - cls) for token in one.match.dst] for one in found]
        tensors["out.dst_idx"] = np.array(into)
        if kind == "bsm_pitome":
            tensors["out.src_idx"] = np.array([[one.a.index(i - cls) for i in one.match.src] for one in found])
            stay = [one.match.order[: len(one.a) - r] for one in found]
            tensors["out.unm_idx"] = np.array([[one.a.index(i - cls) for i in s] for one, s in zip(found, stay)])
        else:
            tensors["out.protected_idx"] = np.array([one.protected for one in found])
    decided = [naive.assignment(match, length, int(cls)) for match in matches]
    tensors |= merged(x, size, decided, np.tile(np.arange(length), (batch, 1)))
    del tensors["unmerged"]
    if kind in ("protect", "bsm_pitome"):
        slots = decided[0][1]
        tensors["out.merge_prune"] = np.stack(
            [naive.reduce(one, a, slots, "mean", [float(i not in m.src) for i in range(length)])
             for one, (a, _), m in zip(x, decided, matches)]
        )  # fmt: skip
    params = {"kind": kind, "ratio": ratio, "margin": margin, "alpha": alpha, "class_token": cls, "removed": r}
    return params, typed(tensors, dtype)


PITOME_OPS = {
    "protect_cls": (37, 2, "protect", 0.85, 0.5, True, 1.0, False, "fp64"),
    "protect_nocls": (40, 3, "protect", 0.7, 0.9, False, 1.0, False, "fp64"),
    "protect_fp32": (16, 2, "protect", 0.7, 0.4, True, 1.0, False, "fp32"),
    "protect_fp64_alpha": (30, 2, "protect", 0.8, 0.3, True, 0.5, True, "fp64"),
    "bsm_pitome": (21, 2, "bsm_pitome", 0.6, 0.4, True, 1.0, True, "fp64"),
    "bsm": (24, 2, "bsm", 0.8, 0.0, True, 1.0, False, "fp64"),
    "bsm_nocls": (24, 2, "bsm", 0.8, 0.0, False, 1.0, True, "fp64"),
    "text": (21, 2, "text", 0.6, 0.8, True, 1.0, False, "fp64"),
}


@pytest.mark.parametrize("name", PITOME_OPS)
def test_pitome_op(tmp_path: Path, name: str) -> None:
    *shape, dtype = PITOME_OPS[name]
    params, tensors = pitome_op(*shape, DTYPES[dtype])
    test_golden.run(write(tmp_path, "pitome", "op", params, tensors))


# ---- models

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0, "qkv_bias": True,
         "norm_eps": 1e-6, "num_classes": 7}  # fmt: skip


def weights(depth: int, seed: int, pooled: bool = False) -> dict[str, np.ndarray]:
    """A random timm state dict of the SMALL model, fp32 values in float64, scaled so that tokens differ."""
    width, hidden, classes = SMALL["embed_dim"], 2 * SMALL["embed_dim"], SMALL["num_classes"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 17, width), "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,), "head.weight": (classes, width), "head.bias": (classes,),
    }  # fmt: skip
    for name in ["fc_norm" if pooled else "norm"] + [f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for i in range(depth):
        for name, out, into in (("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", hidden, width),
                                ("mlp.fc2", width, hidden)):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
    draw = np.random.default_rng(seed)
    return {
        name: np.float64(np.float32(draw.standard_normal(shape) * 0.2 + ("norm" in name and name.endswith("weight"))))
        for name, shape in shapes.items()
    }


Decide = Callable[[int, np.ndarray, np.ndarray], Any]


def model_case(path: Path, method: str, params: dict[str, Any], decide: Decide, notes: Any, prop: bool, batch: int,
               dtype: torch.dtype) -> Case:  # fmt: skip
    """A model file: baseline and reduced logits of the reference ViT, with everything saved per layer."""
    pooled = bool(params.get("global_pool"))
    state = weights(params["depth"], params["depth"], pooled)
    model = naive.VisionTransformer(state, SMALL["num_heads"])

    def logits(x: np.ndarray, size: np.ndarray) -> np.ndarray:
        top = model.norm("fc_norm", (x[1:] * size[1:, None]).sum(0) / 16) if pooled else model.norm("norm", x)[0]
        return state["head.weight"] @ top + state["head.bias"]

    images = np.float64(np.float32(rows(5, batch, 3, 16, 16)))
    tensors: dict[str, Any] = {"in.x": images}
    plain = [model.run(image, lambda *_: None, False) for image in images]
    ran = [model.run(image, decide, prop) for image in images]
    tensors["out.baseline_logits"] = np.stack([logits(x, size) for x, size, _ in plain])
    tensors["out.logits"] = np.stack([logits(x, size) for x, size, _ in ran])
    for i in range(params["depth"]):
        layers = [layers[i] for _, _, layers in ran]
        for name in ("hidden", "size", "group", "metric"):
            if name in layers[0]:
                tensors[f"out.layer{i}.{name}"] = np.stack([layer[name] for layer in layers])
        if "metric" in layers[0]:
            for name, value in notes(i, [layer["metric"] for layer in layers]).items():
                tensors[f"out.layer{i}.{name}"] = np.array(value)
    tokens = [len(layer["hidden"]) for layer in ran[0][2]]
    tensors = typed(tensors | {f"weight.{name}": value for name, value in state.items()}, dtype)
    tensors["out.tokens"] = torch.tensor(tokens)
    return write(path, method, "model", {**SMALL, **params, "tokens_per_layer": tokens}, tensors)


TOME_MODELS = {
    "decreasing": ((3, -1.0), [6, 4, 3, 1, 0], 5, True, False, 1, "fp64"),
    "list_noprop": ([3, 0, 2], [3, 0, 2, 0], 4, False, False, 3, "fp64"),
    "r_too_large": (1000, [1000] * 3, 3, True, False, 2, "fp64"),
    "fp32": (3, [3, 3], 2, True, False, 2, "fp32"),
    "gap": (3, [3, 3, 3], 3, False, True, 2, "fp64"),
    "r0": (0, [0, 0], 2, True, False, 1, "fp64"),
}


@pytest.mark.parametrize("name", TOME_MODELS)
def test_tome_model(tmp_path: Path, name: str) -> None:
    r, parsed, depth, prop, pooled, batch, dtype = TOME_MODELS[name]

    def decide(layer: int, metric: np.ndarray, hidden: np.ndarray) -> Any:
        match = naive.even_odd(metric, parsed[layer], 1)
        return naive.assignment(match, len(metric), 1) if match.src else None

    def notes(layer: int, metrics: list[np.ndarray]) -> dict[str, Any]:
        matches = [naive.even_odd(metric, parsed[layer], 1) for metric in metrics]
        return {
            "src_idx": [[i // 2 for i in match.src] for match in matches],
            "dst_idx": [[i // 2 for i in match.dst] for match in matches],
            "unm_idx": [[0] + [i // 2 for i in match.order if i % 2 == 0] for match in matches],
        }

    kind = {int: "int", tuple: "tuple", list: "list"}[type(r)]
    params = {"depth": depth, "r": r, "r_kind": kind, "parsed_r": parsed, "prop_attn": prop, "global_pool": pooled}
    test_golden.run(model_case(tmp_path, "tome", params, decide, notes, prop, batch, DTYPES[dtype]))


PITOME_MODELS = {
    "r0.9": (0.9, 3, False, 2, "fp64"),
    "r0.7": (0.7, 4, False, 1, "fp64"),
    "r1": (1.0, 2, False, 1, "fp64"),
    "mae": (0.8, 3, True, 2, "fp64"),
    "fp32": (0.8, 2, False, 1, "fp32"),
}


@pytest.mark.parametrize("name", PITOME_MODELS)
def test_pitome_model(tmp_path: Path, name: str) -> None:
    ratio, depth, mae, batch, dtype = PITOME_MODELS[name]
    kinds = ["protect" if (i < math.ceil(depth / 2)) == mae else "bsm_pitome" for i in range(depth)]
    margins = [0.75 - 0.75 * (i / depth) for i in range(depth)]

    def find(layer: int, metric: np.ndarray) -> naive.Energies:
        items = len(metric) - 1
        return naive.pitome(metric, math.floor(items - items * ratio), kinds[layer], margins[layer], 1.0, 1)

    def decide(layer: int, metric: np.ndarray, hidden: np.ndarray) -> Any:
        match = find(layer, metric).match
        return naive.assignment(match, len(metric), 1) if match.src else None

    def notes(layer: int, metrics: list[np.ndarray]) -> dict[str, Any]:
        found = [find(layer, metric) for metric in metrics]
        out: dict[str, Any] = {"a_idx": [one.a for one in found], "b_idx": [one.b for one in found]}
        out["dst_idx"] = [[one.b.index(i - 1) for i in one.match.dst] for one in found]
        if kinds[layer] == "protect":
            return out | {"protected_idx": [one.protected for one in found]}
        out["src_idx"] = [[one.a.index(i - 1) for i in one.match.src] for one in found]
        stay = [one.match.order[: len(one.a) - len(one.match.src)] for one in found]
        return out | {"unm_idx": [[one.a.index(i - 1) for i in tokens] for one, tokens in zip(found, stay)]}

    params = {"depth": depth, "ratio": ratio, "patch": "mae" if mae else "deit", "kinds": kinds, "margins": margins,
              "global_pool": mae}  # fmt: skip
    test_golden.run(model_case(tmp_path, "pitome", params, decide, notes, False, batch, DTYPES[dtype]))


# ---- the runner's rules


@pytest.fixture
def case(tmp_path: Path) -> Case:
    params, tensors = tome_op(9, 2, 3, True, False, 0, torch.float32)
    return write(tmp_path, "tome", "op", params, tensors)


def test_wrong_value_fails(case: Case) -> None:
    _, tensors = tome_op(9, 2, 3, True, False, 0, torch.float32)
    for name in [name for name in tensors if name.startswith("out.")]:
        spoiled = dict(tensors)
        spoiled[name] = tensors[name] + 1
        with pytest.raises(AssertionError):
            test_golden.run(write(case.path.parent, "tome", "op", case.params, spoiled))


def test_small_error_fails_in_fp64_only(tmp_path: Path) -> None:
    for dtype, fails in ((torch.float64, True), (torch.float32, False)):
        params, tensors = tome_op(9, 2, 3, True, False, 0, dtype)
        tensors["out.wavg_x"] = tensors["out.wavg_x"] + 1e-5
        spoiled = write(tmp_path, "tome", "op", params, tensors)
        if fails:
            with pytest.raises(AssertionError, match="wavg_x: off by"):
                test_golden.run(spoiled)
        else:
            test_golden.run(spoiled)


def test_unknown_output_fails(case: Case) -> None:
    _, tensors = tome_op(9, 2, 3, True, False, 0, torch.float32)
    more = write(case.path.parent, "tome", "op", case.params, {**tensors, "out.novelty": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"never compared: out\.novelty"):
        test_golden.run(more)


def test_implemented_method_without_runner_fails(tmp_path: Path) -> None:
    for method, level in (("tome", "block"), ("random", "op")):
        case = write(tmp_path, method, level, {}, {"out.x": np.ones(1)})
        assert test_golden.skip_reason(case) is None
        with pytest.raises(AssertionError, match="nothing runs its"):
            test_golden.run(case)


def test_unimplemented_method_says_so(tmp_path: Path) -> None:
    case = write(tmp_path, "no_such_method", "op", {}, {"out.x": np.ones(1)})
    assert test_golden.skip_reason(case) == ("no_such_method", "method no_such_method is not implemented yet")
    assert "no_such_method" not in test_golden.EXPECTED_SKIPS


def test_missing_backbone_is_the_only_other_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"nowhere": "a ViT of nowhere"}
    runner = test_golden._MODULES["pitome"]
    monkeypatch.setattr(runner, "missing_backbone", lambda case: lacks.get(case.params["patch"]), raising=False)
    case = write(tmp_path, "pitome", "model", {"patch": "nowhere"}, {"out.x": np.ones(1)})
    reason = "needs a backbone that does not exist yet: a ViT of nowhere"
    assert test_golden.skip_reason(case) == ("pitome/nowhere", reason)
    same = write(tmp_path, "pitome", "model", {"patch": "deit"}, {"out.x": np.ones(1)})
    assert test_golden.skip_reason(same) is None


def test_names_of_modules_count_as_implemented() -> None:
    names = golden_case.implemented_names()
    assert {"tome", "pitome", "identity", "tomekth", "matching"} <= names
    assert golden_case.flat("Plain_Mamba-2") == "plainmamba2"


def test_folder_is_found_by_variable(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTOK_GOLDEN", str(tmp_path))
    assert [found.id for found in golden_case.discover(golden_case.golden_folder())] == [case.id]
    monkeypatch.setenv("VISIONTOK_GOLDEN", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="missing"):
        golden_case.golden_folder()


def test_folder_falls_back_to_bundled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISIONTOK_GOLDEN", raising=False)
    monkeypatch.setattr(golden_case, "PROJECT", tmp_path / "project")
    assert golden_case.golden_folder() == golden_case.BUNDLED
    shared = tmp_path / "shared" / "golden"
    shared.mkdir(parents=True)
    assert golden_case.golden_folder() == shared
