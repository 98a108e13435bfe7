"""A trial as a pure function: its row, its reproducibility, its failures (W4, W5, W7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import visiontok as vt
from visiontok.bench import models, timing, trial
from visiontok.bench.results import TrialSpec
from visiontok.bench.schema import check_row
from visiontok.bench.table import table
from visiontok.errors import FormatError, ParameterError, UnknownNameError, VisionTokError

pytest.importorskip("timm")
pytest.importorskip("sklearn")

QUICK = {"num_warm_iter": 1, "num_bench_iter": 2, "batch_size": 10, "threads": 1, "max_images": 30}


def stable(row: dict) -> dict:
    timed = ("latency", "reference_ms", "oracle_ms", "speedup", "images_per_s", "e_total", "e_hw", "e_method")
    return {name: value for name, value in row.items() if not name.startswith((*timed, "wall_s", "created"))}


def test_reduced_trial_fills_its_row(tmp_path: Path) -> None:
    row = trial.run_trial(TrialSpec("tiny_vit", "tome", {"r": 4}, **QUICK), tmp_path)
    assert check_row(row) == []
    assert row["tokens"] == [65 - 4 * layer for layer in range(1, 13)]
    assert (row["tokens_in"], row["tokens_out"], row["n_images"], row["n_failed"]) == (65, 17, 30, 0)
    assert row["gmacs"] < row["gmacs_base"]
    assert row["top1_low"] <= row["top1"] <= row["top1_high"]
    assert row["e_total"] == pytest.approx(row["e_hw"] * row["e_method"])
    assert row["clock"] == "process"
    assert row["oracle_note"] is None


def test_row_follows_from_its_spec(tmp_path: Path) -> None:
    spec = TrialSpec("tiny_vit", "random", {"keep": 0.9}, **QUICK, timing=False)
    first = trial.run_trial(spec, tmp_path)
    again = trial.run_trial(TrialSpec.from_dict(first["spec"]))
    assert stable(again) == stable(first)
    assert len(list(tmp_path.iterdir())) == 1


def test_dense_trials() -> None:
    unreduced = trial.run_trial(TrialSpec("tiny_vit", **QUICK))
    smaller = trial.run_trial(TrialSpec("tiny_vit_small_dense", reference="tiny_vit", **QUICK))
    assert (unreduced["role"], smaller["role"]) == ("unreduced", "smaller")
    assert unreduced["delta"] == 0
    assert unreduced.get("speedup") is None
    assert smaller["ideal_speedup"] > 1.8
    assert smaller["e_hw"] is None
    assert smaller["gmacs_base"] == unreduced["gmacs"]


def test_memory_that_runs_out_halves_the_batch_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.interleave

    def scarce(calls, **options):
        if next(iter(calls.values())).args[0].shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(calls, **options)

    monkeypatch.setattr(timing, "interleave", scarce)
    spec = TrialSpec("tiny_vit", "tome", {"r": 4}, **{**QUICK, "batch_size": 16}, data="none")
    row = trial.attempt(spec)
    assert (row["status"], row["batch_size"], row["batch_decay"]) == ("ok", 4, [16, 8])
    row = trial.attempt(TrialSpec.from_dict(spec.to_dict() | {"retry": False}))
    assert (row["status"], row["error"]) == ("oom", "OutOfMemoryError: CUDA out of memory")
    assert check_row(row) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": "tiny_vitt"}, "unknown model 'tiny_vitt'. Did you mean 'tiny_vit"),
        ({"reducer": "tomee", "params": {"r": 1}}, "unknown reducer 'tomee'. Did you mean 'tome'"),
        ({"reducer": "tome", "params": {"rr": 1}}, "tome has no parameter 'rr'"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"data": "/gone"}, "data folder '/gone' does not exist"),
        ({"split": "extra"}, "the splits 'test' and 'train', not 'extra'"),
        ({"model": "vit_tiny_patch16_224", "input_size": (3, 32, 32)}, "the embedded digits are for tiny_vit"),
    ],
)
def test_failures_are_rows_with_a_reason(fields: dict, text: str) -> None:
    row = trial.attempt(TrialSpec.from_dict(TrialSpec("tiny_vit", **QUICK).to_dict() | fields))
    assert row["status"] == "error"
    assert text in row["error"]
    assert check_row(row) == []


@pytest.mark.parametrize(
    ("reducer", "params", "checkpoint", "note"),
    [
        ("evit", {"keep": 0.5}, None, None),
        ("ats", {}, None, "counts depend on the image; tokens and GMACs are the most that an image can need"),
        ("sit", {"keep": 0.5}, None, "learned parts are untrained: pass trained ones with --checkpoint"),
        ("clca", {"inner": "evit", "keep": 0.5}, None, "learned parts are untrained: pass trained ones"),
        ("sit", {"keep": 0.5}, "dense", "learned parts are untrained: the checkpoint holds none"),
        ("sit", {"keep": 0.5}, "sit", None),
    ],
)
def test_a_row_says_what_its_numbers_hide(
    reducer: str, params: dict, checkpoint: str | None, note: str | None, tmp_path: Path
) -> None:
    if checkpoint is not None:
        model = models.load("tiny_vit")
        if checkpoint != "dense":
            vt.patch(model, checkpoint, **params)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    file = None if checkpoint is None else str(tmp_path / "model.safetensors")
    row = trial.run_trial(TrialSpec("tiny_vit", reducer, params, checkpoint=file, data="none", timing=False))
    assert (row["note"] or "").startswith(note or "")
    assert (row["note"] is None) == (note is None)
    assert check_row(row) == []
    assert (f"{reducer}: {row['note']}" in table([row, row]).splitlines()) == (note is not None)


@pytest.mark.parametrize("runtime", [{"dtype": "bfloat16"}, {"amp": True}, {"channels_last": True}])
def test_precisions(runtime: dict) -> None:
    row = trial.run_trial(TrialSpec("tiny_vit", "tome", {"r": 4}, **QUICK, **runtime, timing=False))
    assert row["dtype"] == ("bfloat16" if "dtype" in runtime else "bfloat16 (amp)" if "amp" in runtime else "float32")


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    trial.attempt(TrialSpec("tiny_vitt", **QUICK))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("tiny_vit", "tiny_vit_small_dense"),
        ("tiny_vit_small_dense", None),
        ("deit_small_patch16_224", "deit_tiny_patch16_224"),
        ("deit_small_patch16_224.fb_in1k", "deit_tiny_patch16_224.fb_in1k"),
        ("vit_base_patch16_224.mae", "vit_small_patch16_224"),
        ("vit_large_patch16_384", "vit_base_patch16_384"),
        ("vit_huge_patch14_224", "vit_large_patch14_224"),
        ("vit_tiny_patch16_224", None),
        ("vit_so400m_patch14_siglip_224", None),
    ],
)
def test_smaller_sibling(name: str, smaller: str | None) -> None:
    assert models.smaller_sibling(name) == smaller


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("cannot find the requested files in the local cache.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(VisionTokError, match="cannot be fetched: .* pass a file with --checkpoint"):
        models.load("deit_tiny_patch16_224", pretrained=True)


def test_checkpoints_are_read_as_tensors_only(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(FormatError, match="cannot be read as tensors only"):
        models.load("tiny_vit", checkpoint=tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
    model = models.load("tiny_vit")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "ok.pth"
    )
    assert models.load("tiny_vit", checkpoint=tmp_path / "ok.pth").state_dict().keys() == model.state_dict().keys()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FormatError, match="does not fit VisionTransformer"):
        models.load("tiny_vit", checkpoint=tmp_path / "other.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match="cannot be read"):
        models.load("tiny_vit", checkpoint=tmp_path / "broken.safetensors")
    with pytest.raises(ParameterError, match="does not exist"):
        models.load("tiny_vit", checkpoint=tmp_path / "gone.pth")
    with pytest.raises(UnknownNameError):
        models.load("tinyvit")
